"""The border between scikit-learn's world (numpy, CSR, DataFrame) and tensors on a device."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from sklearn import get_config
from sklearn.utils import check_random_state
from sklearn.utils._set_output import _get_output_config
from torch import Tensor

from skdeq._version import __version__
from skdeq._warn import warn

__all__ = [
    "LARGEST_WEIGHT",
    "VersionedMixin",
    "detached",
    "host_array",
    "numpy_dtype",
    "resolve_device",
    "returned",
    "seeded_generator",
    "stream_batch",
    "to_numpy",
    "to_tensor",
    "torch_dtype",
    "unchanged_on_error",
]


class VersionedMixin:
    """What every estimator here has beside scikit-learn's: a documentation link, and versions.

    A pickle is stamped with the version of skdeq, and another version warns when it reads it.
    """

    _doc_link_module = "skdeq"
    _doc_link_template = (
        "https://skdeq.github.io/skdeq/generated/{estimator_module}.{estimator_name}.html"
    )

    def __getstate__(self):
        state = super().__getstate__()
        return {**state, "_skdeq_version": __version__}

    def __setstate__(self, state):
        state = dict(state)
        written = state.pop("_skdeq_version", None)
        if written != __version__:
            warn(
                f"This {type(self).__name__} was saved by skdeq {written} and is loaded by skdeq "
                f"{__version__}: results may differ or fail.",
                UserWarning,
            )
        super().__setstate__(state)


@contextmanager
def unchanged_on_error(estimator) -> Iterator[None]:
    """Give the estimator its attributes back if the block fails or is interrupted."""
    before = dict(vars(estimator))
    try:
        yield
    except BaseException:
        vars(estimator).clear()
        vars(estimator).update(before)
        raise


# A weight whose square times a million rows is a number of float32, as its inverse is.
LARGEST_WEIGHT = 1e15


def _check_stream_weights(sample_weight) -> None:
    """Refuse weights that would have to be rescaled, which those of other batches were not."""
    weight = np.asarray(0 if sample_weight is None else host_array(sample_weight, "sample_weight"))
    # All else is validated where the rows are.
    largest = np.max(weight, initial=0) if weight.dtype.kind in "iuf" else 0
    if 0 < largest < np.inf and not 1 / LARGEST_WEIGHT <= largest <= LARGEST_WEIGHT:
        raise ValueError(
            f"sample_weight is {largest:.3g} at most; the weights of a stream, which are compared "
            f"with those of other batches, must be between {1 / LARGEST_WEIGHT:g} and "
            f"{LARGEST_WEIGHT:g}. Divide those of all batches by one number."
        )


@contextmanager
def stream_batch(estimator, sample_weight=None) -> Iterator[None]:
    """Count a batch of a stream, or say which one it was that failed.

    Batches are counted from the first call of `partial_fit` or the last of `fit`; one that
    failed has not been learned and is not counted. That it leaves the estimator as it was is
    the promise of the block inside.
    """
    number = getattr(estimator, "_n_batches", 0) + 1
    try:
        _check_stream_weights(sample_weight)
        yield
    except (TypeError, ValueError) as error:
        where = (
            f"It is batch {number} of this stream, and {type(estimator).__name__} is as it was "
            "before."
        )
        if error.args == (str(error),):
            error.args = (f"{error} {where}",)
        else:
            error.add_note(where)
        raise
    estimator._n_batches = number


def resolve_device(device: str | torch.device, X=None) -> torch.device:
    """Return the device asked for; "auto" is that of X if it is on a card, else CUDA if any.

    Raises
    ------
    ValueError
        If the name is not one of a device, or the device is not there.
    """
    if str(device) == "auto":
        if isinstance(X, Tensor) and X.device.type == "cuda":
            return X.device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = 'device must be "auto", "cpu", "cuda" or "cuda:N"'
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{known}; got {device!r}.") from error
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"{known}; got {device!r}.")
    if resolved.type == "cpu" and resolved.index not in (None, 0):
        raise ValueError(f"{known}; got {device!r}.")
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (resolved.index or 0) >= count:
            raise ValueError(
                f"device={str(device)!r} was asked for, but this machine has {count} CUDA "
                'devices that torch can use; device="auto" falls back to the CPU.'
            )
    return resolved


def detached(values: Tensor, name: str) -> Tensor:
    """Return a tensor without its history, of which there must be none to lose.

    Raises
    ------
    ValueError
        If a gradient is wanted of it.
    """
    if values.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} is a tensor that requires grad, and estimators pass no gradient on: give "
            f"{name}.detach(), or use skdeq.nn.EquilibriumLayer, which has one."
        )
    values = values.detach()
    outside = values.is_inference() and not torch.is_inference_mode_enabled()
    return values.clone() if outside else values


def host_array(values, name: str):
    """Bring targets, weights or the like to the host if they are a tensor; leave all else."""
    return detached(values, name).cpu().numpy() if isinstance(values, Tensor) else values


def numpy_dtype(X) -> np.dtype:
    """Type of a tensor or an array, as numpy says it."""
    if not isinstance(X, Tensor):
        return X.dtype
    return torch.empty(0, dtype=X.dtype, device="cpu").numpy().dtype


def torch_dtype(dtype) -> torch.dtype:
    """Type that numpy names, as torch says it."""
    return torch.from_numpy(np.empty(0, dtype)).dtype


def returned(values: Tensor | np.ndarray, X, estimator=None) -> Tensor | np.ndarray:
    """Give results for X back as scikit-learn's own estimators would.

    That is a numpy array, unless X is a tensor and ``array_api_dispatch=True``: then a tensor on
    the device of X.

    Parameters
    ----------
    values : Tensor or ndarray
    X : object
        As the user gave it.
    estimator : estimator, optional
        Of whose `transform` it is the result: a data frame, if it was asked for, is made of numpy.
    """
    if isinstance(X, Tensor) and get_config()["array_api_dispatch"] and not _in_frame(estimator):
        if isinstance(values, Tensor):
            return values.detach().to(X.device)
        # Labels may be text, which no tensor holds.
        return to_tensor(values, X.device) if values.dtype.kind in "fiub" else values
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def _in_frame(estimator) -> bool:
    """Whether ``set_output`` asks for a data frame."""
    if estimator is None:
        return False
    return _get_output_config("transform", estimator)["dense"] != "default"


def to_tensor(array: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Share an array with a tensor on the CPU, or copy it where torch cannot share it."""
    # torch refuses negative strides and warns about arrays it may not write to.
    if not array.flags.writeable or any(step < 0 for step in array.strides):
        array = array.copy()
    return torch.from_numpy(array).to(device)


def seeded_generator(random_state) -> torch.Generator:
    """Return a generator of our own, so that no global state is read or written."""
    seed = check_random_state(random_state).randint(np.iinfo(np.int32).max)
    return torch.Generator("cpu").manual_seed(int(seed))


def to_numpy(tensor: Tensor, dtype=None) -> np.ndarray:
    """Copy of a tensor as a numpy array on the host."""
    array = tensor.detach().cpu().numpy()
    return array.astype(array.dtype if dtype is None else dtype, copy=True)
