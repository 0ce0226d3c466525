"""The border between scikit-learn's world (numpy, CSR, DataFrame) and tensors on a device."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import scipy.sparse as sp
import torch
from sklearn import get_config
from sklearn.utils import check_random_state
from sklearn.utils._set_output import _get_output_config
from torch import Tensor

from skdeq._chunks import free_memory, map_chunks
from skdeq._family import Family
from skdeq._host_data import HostObservations
from skdeq._model import LEAST_EXPOSURE
from skdeq._observations import CompressedRows, Observations
from skdeq._version import __version__

__all__ = [
    "CHUNK_ENTRIES",
    "SkdeqManners",
    "chunk_rows",
    "detached",
    "exposure_offset",
    "host_array",
    "log_base_rows",
    "missing_per_column",
    "numpy_dtype",
    "resolve_device",
    "returned",
    "rows_of",
    "seeded_generator",
    "stream_batch",
    "take_rows",
    "to_numpy",
    "to_observations",
    "to_rows",
    "to_tensor",
    "unchanged_on_error",
]

CHUNK_ENTRIES = 2**20


class SkdeqManners:
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
        written = state.pop("_skdeq_version", None)
        if written != __version__:
            import warnings

            warnings.warn(
                f"This {type(self).__name__} was saved by skdeq {written} and is loaded by skdeq "
                f"{__version__}: results may differ or fail.",
                UserWarning,
                stacklevel=2,
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


@contextmanager
def stream_batch(estimator) -> Iterator[None]:
    """Count a batch of a stream, or say which one it was that failed.

    Batches are counted from the first call of `partial_fit` or the last of `fit`; one that
    failed has not been learned and is not counted. That it leaves the estimator as it was is
    the promise of the block inside.
    """
    number = getattr(estimator, "_n_batches", 0) + 1
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"{error} It is batch {number} of this stream, and {type(estimator).__name__} is as "
            "it was before."
        ) from error
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
    return values.detach()


def host_array(values, name: str):
    """Bring targets, weights or the like to the host if they are a tensor; leave all else."""
    return detached(values, name).cpu().numpy() if isinstance(values, Tensor) else values


def numpy_dtype(X) -> np.dtype:
    """Type of a tensor or an array, as numpy says it."""
    return torch.empty(0, dtype=X.dtype).numpy().dtype if isinstance(X, Tensor) else X.dtype


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


def chunk_rows(X: Tensor) -> int:
    """Rows of dense data to be looked at together."""
    return max(1, CHUNK_ENTRIES // X.shape[1])


def missing_per_column(X) -> np.ndarray:
    """Count the NaN of each column of validated data, shape (p,)."""
    if sp.issparse(X):
        return np.bincount(X.indices[np.isnan(X.data)], minlength=X.shape[1])
    # The sum of a column is NaN if any entry is; most data need nothing more.
    suspicious = (~torch.isfinite(X.new_ones(len(X)) @ X)).nonzero().squeeze(1)
    count = torch.zeros(X.shape[1], dtype=torch.long, device=X.device)
    if len(suspicious):
        count[suspicious] = torch.isnan(X[:, suspicious]).sum(0)
    return count.cpu().numpy()


def to_tensor(array: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Share an array with a tensor on the CPU, or copy it where torch cannot share it."""
    # torch refuses negative strides and warns about arrays it may not write to.
    if not array.flags.writeable or any(step < 0 for step in array.strides):
        array = array.copy()
    return torch.from_numpy(array).to(device)


def _compressed(indptr, indices, data, shape, device: torch.device) -> CompressedRows:
    # Products with int32 places take half of the time, and all that makes them is half as large.
    fits = max(len(indices), *shape) <= np.iinfo(np.int32).max
    places = np.int32 if fits else np.int64
    return CompressedRows(
        to_tensor(indptr.astype(places, copy=False), device),
        to_tensor(indices.astype(places, copy=False), device),
        None if data is None else to_tensor(data, device),
        tuple(shape),
    )


def _home(size: int, at: torch.device, device: torch.device) -> torch.device:
    """Where data of so many bytes go: to the device, unless they would fill half of it."""
    stay = at.type == "cpu" and device.type == "cuda" and size > free_memory(device) / 2
    return at if stay else device


def to_observations(X, family: Family, device: torch.device) -> Observations:
    """Sufficient statistics of validated data for a device; dense floats are shared, not copied.

    They go to the device, or stay where they are if they would fill half of what it has free.
    """
    values: Tensor | CompressedRows
    missing: Tensor | CompressedRows | None
    if sp.issparse(X):
        # The transpose is wanted as well.
        size = 2 * (X.data.nbytes + X.indices.nbytes)
        home = _home(size, torch.device("cpu"), device)
        values, missing = _sparse_observations(X, family, home)
    else:
        home = _home(X.nbytes, X.device, device)
        rows, missing = X.to(home), None
        if missing_per_column(rows).any():
            missing = torch.isnan(rows)
            values = torch.where(missing, 0.0, family.sufficient(rows))
        else:
            values = family.sufficient(rows)
    if home.type == device.type:
        return Observations(values, missing)
    return HostObservations(values, missing, worked_on=device)


def _sparse_observations(
    X, family: Family, device: torch.device
) -> tuple[CompressedRows, CompressedRows | None]:
    """Return T(x) of the stored entries and the places of those that are missing."""
    gaps = np.isnan(X.data)
    missing = None
    data = family.sufficient(to_tensor(X.data, torch.device("cpu"))).numpy()
    if gaps.any():
        data = np.where(gaps, 0, data).astype(X.dtype)
        rows = np.repeat(np.arange(X.shape[0]), np.diff(X.indptr))[gaps]
        counts = np.bincount(rows, minlength=X.shape[0])
        indptr = np.concatenate([[0], np.cumsum(counts)])
        missing = _compressed(indptr, X.indices[gaps], None, X.shape, device)
    return _compressed(X.indptr, X.indices, data, X.shape, device), missing


def to_rows(X, device: torch.device) -> Tensor | CompressedRows:
    """Turn validated rows into tensors of their own type, without a copy where they lie.

    They go to the device, or stay where they are if they would fill half of what it has free.
    """
    if sp.issparse(X):
        data = X.data.view(np.uint8) if X.dtype == bool else X.data
        # Places keep their type, too: as int64 they would outweigh the values.
        n, p = X.shape
        rows = CompressedRows(to_tensor(X.indptr), to_tensor(X.indices), to_tensor(data), (n, p))
        size = X.indptr.nbytes + X.indices.nbytes + data.nbytes
    else:
        rows = X.view(torch.uint8) if X.dtype == torch.bool else X
        size = rows.nbytes
    return rows.to(_home(size, rows.device, device))


def seeded_generator(random_state) -> torch.Generator:
    """Return a generator of our own, so that no global state is read or written."""
    seed = check_random_state(random_state).randint(np.iinfo(np.int32).max)
    return torch.Generator().manual_seed(int(seed))


def take_rows(X, index: np.ndarray):
    """Return some rows of validated data, in the order given."""
    return X[index] if sp.issparse(X) else X[torch.from_numpy(index).to(X.device)]


def rows_of(X, index: Tensor, device: torch.device) -> Tensor:
    """Return some rows of validated data as a dense tensor, NaN where missing."""
    if sp.issparse(X):
        return to_tensor(X[index.cpu().numpy()].toarray(), device)
    return X[index.to(X.device)].to(device)


def log_base_rows(X, family: Family) -> Tensor:
    """Sum of log h(x) over the observed entries of each row, float64 (n,), where X lies."""
    n, p = X.shape
    at_zero = 0.0
    zero = torch.zeros(1, dtype=torch.float64)
    if bool(family.support.contains(zero)):
        at_zero = float(family.log_base(zero))

    def values(entries: Tensor) -> Tensor:
        # A sum is many times faster than a look at every entry.
        if not bool(torch.isnan(entries.sum())):
            return family.log_base(entries.double())
        gaps = torch.isnan(entries)
        return family.log_base(entries.double().masked_fill(gaps, 1.0)).masked_fill_(gaps, 0.0)

    def stored(start: int, stop: int) -> Tensor:
        entries = to_tensor(X.data[X.indptr[start] : X.indptr[stop]])
        counts = np.diff(X.indptr[start : stop + 1])
        rows = np.repeat(np.arange(stop - start), counts)
        logs = np.bincount(rows, values(entries).numpy(), minlength=stop - start)
        return torch.from_numpy(logs + (p - counts) * at_zero)

    def dense(start: int, stop: int) -> Tensor:
        block = X[start:stop]
        # Counts and answers are mostly zeros, whose log h is one number.
        places = block != 0
        logs = torch.full(block.shape, at_zero, dtype=torch.float64, device=block.device)
        return logs.masked_scatter_(places, values(block.masked_select(places))).sum(1)

    sparse = sp.issparse(X)
    work, device = (stored, torch.device("cpu")) if sparse else (dense, X.device)
    return torch.cat(map_chunks(work, n, max(1, CHUNK_ENTRIES // p), device))


def exposure_offset(X, profile: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Compute the log size factor of each row from the row itself.

    Without gaps it is ``log(row total / mean training row total)``; with gaps, the total of the
    observed entries over the training mean of the same entries.

    Parameters
    ----------
    X : Tensor or CSR array of shape (n, p)
    profile : ndarray of shape (p,) or None
        Training mean of each column; None to compute it from X.

    Returns
    -------
    offset : ndarray of shape (n,)
    profile : ndarray of shape (p,)
    """
    n = X.shape[0]
    total, column = _sums_observed(X)
    missing = missing_per_column(X)
    if profile is None:
        profile = column / np.maximum(n - missing, 1)
    expected = np.full(n, profile.sum())
    if missing.any():
        expected -= _profile_of_gaps(X, profile)
    least = LEAST_EXPOSURE * max(float(profile.sum()), np.finfo(float).tiny)
    ratio = np.maximum(total, least) / np.maximum(expected, least)
    return np.log(ratio), profile


def _sums_observed(X) -> tuple[np.ndarray, np.ndarray]:
    """Add up the observed entries of each row and of each column, float64."""
    if sp.issparse(X):
        n, p = X.shape
        totals, columns = np.zeros(n), np.zeros(p)
        size = max(1, n * CHUNK_ENTRIES // max(X.nnz, 1))
        for start in range(0, n, size):
            part = X[start : start + size].astype(np.float64)
            np.nan_to_num(part.data, copy=False)
            totals[start : start + size] = np.asarray(part.sum(axis=1)).ravel()
            columns += np.asarray(part.sum(axis=0)).ravel()
        return totals, columns

    def work(start: int, stop: int) -> tuple[Tensor, Tensor]:
        rows = X[start:stop].to(torch.float64, copy=True)
        if bool(torch.isnan(rows.sum())):
            rows.nan_to_num_(0.0)
        return rows.sum(1), rows.new_ones(len(rows)) @ rows

    parts = map_chunks(work, len(X), chunk_rows(X), X.device)
    total = torch.cat([one for one, _ in parts])
    column = torch.stack([two for _, two in parts]).sum(0)
    return to_numpy(total), to_numpy(column)


def _profile_of_gaps(X, profile: np.ndarray) -> np.ndarray:
    """Sum of the profile over the missing entries of each row."""
    n = X.shape[0]
    if sp.issparse(X):
        gaps = np.isnan(X.data)
        rows = np.repeat(np.arange(n), np.diff(X.indptr))[gaps]
        return np.bincount(rows, profile[X.indices[gaps]], minlength=n)
    means = to_tensor(profile, X.device)

    def work(start: int, stop: int) -> Tensor:
        return torch.isnan(X[start:stop]).double() @ means

    return to_numpy(torch.cat(map_chunks(work, n, chunk_rows(X), X.device)))


def to_numpy(tensor: Tensor, dtype=None) -> np.ndarray:
    """Copy of a tensor as a numpy array on the host."""
    array = tensor.detach().cpu().numpy()
    return array.astype(array.dtype if dtype is None else dtype, copy=True)
