"""The border between scikit-learn's world (numpy, CSR, DataFrame) and tensors on a device."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.utils import check_random_state
from sklearn.utils.validation import validate_data
from torch import Tensor

from skdeq._chunks import map_chunks
from skdeq._family import Family
from skdeq._model import LEAST_EXPOSURE
from skdeq._observations import CompressedRows, Observations
from skdeq._version import __version__

__all__ = [
    "SkdeqManners",
    "check_observations",
    "check_rows",
    "exposure_offset",
    "log_base_rows",
    "resolve_device",
    "rows_of",
    "seeded_generator",
    "to_numpy",
    "to_observations",
    "to_rows",
    "to_tensor",
    "unchanged_on_error",
]

_CHUNK_ENTRIES = 2**20


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


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device asked for; "auto" is CUDA where there is one.

    Raises
    ------
    ValueError
        If the name is not one of a device, or the device is not there.
    """
    if str(device) == "auto":
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


def check_observations(estimator, X, family: Family, *, reset: bool):
    """Validate X against scikit-learn's rules and the support of the family.

    Returns
    -------
    ndarray or CSR array of shape (n, p)
        float32 or float64; NaN marks missing entries.

    Raises
    ------
    ValueError
        If an entry is infinite or outside the support, naming family, row and column; in
        fitting, also if a column has no observed entry.
    """
    X = validate_data(
        estimator,
        X,
        reset=reset,
        accept_sparse="csr",
        dtype=[np.float64, np.float32],
        order="C",
        ensure_all_finite=False,
    )
    if sp.issparse(X):
        if not X.has_canonical_format:
            X = X.copy()
            X.sum_duplicates()
        _check_sparse(estimator, X, family)
    else:
        bad = _first_outside(X, family)
        if bad is not None:
            _refuse(estimator, family, *bad)
    _check_size(X, family)
    if reset:
        empty = np.flatnonzero(_missing_per_column(X) == X.shape[0])
        if len(empty):
            raise ValueError(
                f"Column {empty[0]} of X has no observed entry, every one of its {X.shape[0]} "
                f"rows is NaN ({len(empty)} such columns in all); drop such columns before "
                f"{type(estimator).__name__}.fit."
            )
    return X


# Types that need no copy as floats: batches of them are converted as they are used.
_ROW_TYPES = (np.float64, np.float32, np.uint8, np.int8, np.int16, np.bool_)


def check_rows(estimator, X, *, reset: bool, min_rows: int = 1):
    """Validate rows of finite real numbers against scikit-learn's rules.

    Returns
    -------
    ndarray or CSR array of shape (n, p)
        Floats, small integers or booleans as they came, all else as float64.

    Raises
    ------
    ValueError
        If an entry is not finite, naming row and column, or there are too few rows.
    """
    X = validate_data(
        estimator,
        X,
        reset=reset,
        accept_sparse="csr",
        dtype=list(_ROW_TYPES),
        order="C",
        ensure_all_finite=False,
        ensure_min_samples=min_rows,
    )
    if sp.issparse(X) and not X.has_canonical_format:
        X = X.copy()
        X.sum_duplicates()
    values = X.data if sp.issparse(X) else X
    if values.dtype.kind != "f":
        return X
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = not np.isfinite(values.sum())
    if suspicious and not np.isfinite(values).all():
        place = np.argwhere(~np.isfinite(values))[0]
        value = values[tuple(place)]
        if sp.issparse(X):
            place = (np.searchsorted(X.indptr, place[0], side="right") - 1, X.indices[place[0]])
        raise ValueError(
            f"Input X contains {'NaN' if np.isnan(value) else 'infinity'}: row {place[0]}, column "
            f"{place[1]} of X is {value}. {type(estimator).__name__} accepts finite numbers only; "
            "sklearn.impute has estimators that fill in missing values."
        )
    return X


def _check_size(X, family: Family) -> None:
    """Refuse finite values whose sums of squares overflow."""
    values = X.data if sp.issparse(X) else X
    if not values.size or np.isfinite(family.support.high - family.support.low):
        return
    limit = np.sqrt(np.finfo(X.dtype).max / max(X.shape[0] * X.shape[1], 1e6))
    with np.errstate(invalid="ignore"):
        largest = max(float(np.fmax.reduce(values, axis=None)), 0.0)
        largest = max(largest, -float(np.fmin.reduce(values, axis=None)))
    if largest > limit:
        raise ValueError(
            f"X has values as large as {largest:.1e}; sums of their squares overflow {X.dtype}. "
            f"Rescale X below {limit:.0e}"
            + (" or pass float64." if X.dtype == np.float32 else ".")
        )


def _outside(values: np.ndarray, family: Family) -> np.ndarray:
    tensor = to_tensor(values)
    inside = family.support.contains(tensor) & torch.isfinite(tensor)
    return (~inside & ~torch.isnan(tensor)).numpy()


def _suspicious(X: np.ndarray, family: Family) -> list[int]:
    """Return the starts of chunks whose extremes are outside the support, or NaN."""

    def work(start: int, stop: int) -> int | None:
        ends = np.array([X[start:stop].min(), X[start:stop].max()], dtype=np.float64)
        inside = np.isfinite(ends).all() and family.support.contains(torch.from_numpy(ends)).all()
        return None if inside else start

    rows = max(1, _CHUNK_ENTRIES // X.shape[1])
    starts = map_chunks(work, len(X), rows, torch.device("cpu"))
    return [start for start in starts if start is not None]


def _first_outside(X: np.ndarray, family: Family) -> tuple[int, int, float] | None:
    rows = max(1, _CHUNK_ENTRIES // X.shape[1])
    for start in _suspicious(X, family):
        outside = _outside(X[start : start + rows], family)
        if outside.any():
            row, column = np.argwhere(outside)[0]
            return start + int(row), int(column), float(X[start + row, column])
    return None


def _check_sparse(estimator, X, family: Family) -> None:
    outside = _outside(X.data, family)
    if outside.any():
        place = int(np.flatnonzero(outside)[0])
        row = int(np.searchsorted(X.indptr, place, side="right")) - 1
        _refuse(estimator, family, row, int(X.indices[place]), float(X.data[place]))
    zero = torch.zeros(1, dtype=torch.float64)
    if X.nnz < X.shape[0] * X.shape[1]:
        if not bool(family.support.contains(zero)):
            row = int(np.flatnonzero(np.diff(X.indptr) < X.shape[1])[0])
            taken = X.indices[X.indptr[row] : X.indptr[row + 1]]
            column = int(np.setdiff1d(np.arange(X.shape[1]), taken)[0])
            _refuse(estimator, family, row, column, 0.0)
        if float(family.sufficient(zero)) != 0:
            raise ValueError(
                f"Sparse X needs a family with T(0) = 0; that of {family!r} is "
                f"{float(family.sufficient(zero))}. Pass X.toarray()."
            )


def _refuse(estimator, family: Family, row: int, column: int, value: float) -> None:
    name = type(estimator).__name__
    where = f"row {row}, column {column} of X"
    if np.isinf(value):
        raise ValueError(
            f"Input X contains infinity: {where} is {value}. {name} accepts finite numbers, and "
            "NaN for missing entries."
        )
    # "Negative values in data" is what scikit-learn's own estimators say.
    prefix = "Negative values in data passed to" if value < 0 else "Unsuitable value in data for"
    raise ValueError(
        f"{prefix} {name}: {where} is {value:g}, but family {family.name!r} accepts "
        f"{family.accepts}, {family.support}."
    )


def _missing_per_column(X) -> np.ndarray:
    if sp.issparse(X):
        return np.bincount(X.indices[np.isnan(X.data)], minlength=X.shape[1])
    # The sum of a column is NaN if any entry is; most data need nothing more.
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = np.flatnonzero(~np.isfinite(X.sum(axis=0)))
    count = np.zeros(X.shape[1], dtype=np.intp)
    count[suspicious] = np.isnan(X[:, suspicious]).sum(axis=0)
    return count


def to_tensor(array: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Share an array with a tensor on the CPU, or copy it where torch cannot share it."""
    # torch refuses negative strides and warns about arrays it may not write to.
    if not array.flags.writeable or any(step < 0 for step in array.strides):
        array = array.copy()
    return torch.from_numpy(array).to(device)


def _compressed(indptr, indices, data, shape, device: torch.device) -> CompressedRows:
    return CompressedRows(
        to_tensor(indptr.astype(np.int64), device),
        to_tensor(indices.astype(np.int64), device),
        None if data is None else to_tensor(data, device),
        tuple(shape),
    )


def to_observations(X, family: Family, device: torch.device) -> Observations:
    """Sufficient statistics of validated data as tensors; dense floats are shared, not copied."""
    if not sp.issparse(X):
        values = to_tensor(X, device)
        missing = None
        if _missing_per_column(X).any():
            missing = torch.isnan(values)
            values = torch.where(missing, 0.0, family.sufficient(values))
        else:
            values = family.sufficient(values)
        return Observations(values, missing=missing)
    gaps = np.isnan(X.data)
    missing = None
    data = family.sufficient(to_tensor(X.data, torch.device("cpu"))).numpy()
    if gaps.any():
        data = np.where(gaps, 0, data).astype(X.dtype)
        rows = np.repeat(np.arange(X.shape[0]), np.diff(X.indptr))[gaps]
        counts = np.bincount(rows, minlength=X.shape[0])
        indptr = np.concatenate([[0], np.cumsum(counts)])
        missing = _compressed(indptr, X.indices[gaps], None, X.shape, device)
    return Observations(_compressed(X.indptr, X.indices, data, X.shape, device), missing)


def to_rows(X, device: torch.device) -> Tensor | CompressedRows:
    """Turn validated rows into tensors of their own type, without a copy on the CPU."""
    if not sp.issparse(X):
        return to_tensor(X.view(np.uint8) if X.dtype == bool else X, device)
    data = X.data.view(np.uint8) if X.dtype == bool else X.data
    # Places keep their type, too: as int64 they would outweigh the values.
    parts = (to_tensor(part, device) for part in (X.indptr, X.indices, data))
    return CompressedRows(*parts, tuple(X.shape))


def seeded_generator(random_state) -> torch.Generator:
    """Return a generator of our own, so that no global state is read or written."""
    seed = check_random_state(random_state).randint(np.iinfo(np.int32).max)
    return torch.Generator().manual_seed(int(seed))


def rows_of(X, index: Tensor, device: torch.device) -> Tensor:
    """Return some rows of validated data as a dense tensor, NaN where missing."""
    rows = X[index.cpu().numpy()]
    return to_tensor(rows.toarray() if sp.issparse(rows) else rows, device)


def log_base_rows(X, family: Family) -> np.ndarray:
    """Sum of log h(x) over the observed entries of each row, float64, shape (n,)."""
    n, p = X.shape
    at_zero = 0.0
    zero = torch.zeros(1, dtype=torch.float64)
    if bool(family.support.contains(zero)):
        at_zero = float(family.log_base(zero))

    def values(entries: np.ndarray) -> np.ndarray:
        return family.log_base(torch.from_numpy(entries.astype(np.float64))).numpy()

    def work(start: int, stop: int) -> np.ndarray:
        if sp.issparse(X):
            low, high = X.indptr[start], X.indptr[stop]
            entries = X.data[low:high]
            rows = np.repeat(np.arange(stop - start), np.diff(X.indptr[start : stop + 1]))
        else:
            block = X[start:stop]
            # Counts and answers are mostly zeros, whose log h is one number.
            stored = block != 0
            rows = np.repeat(np.arange(stop - start), stored.sum(axis=1))
            entries = block[stored]
        observed = ~np.isnan(entries)
        zeros = p - np.bincount(rows, minlength=stop - start)
        logs = np.where(observed, values(np.where(observed, entries, 1)), 0.0)
        return np.bincount(rows, logs, minlength=stop - start) + zeros * at_zero

    size = max(1, _CHUNK_ENTRIES // p)
    return np.concatenate(map_chunks(work, n, size, torch.device("cpu")))


def exposure_offset(X, profile: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Compute the log size factor of each row from the row itself.

    Without gaps it is ``log(row total / mean training row total)``; with gaps, the total of the
    observed entries over the training mean of the same entries.

    Parameters
    ----------
    X : ndarray or CSR array of shape (n, p)
    profile : ndarray of shape (p,) or None
        Training mean of each column; None to compute it from X.

    Returns
    -------
    offset : ndarray of shape (n,)
    profile : ndarray of shape (p,)
    """
    n, p = X.shape
    if sp.issparse(X):
        gaps = np.isnan(X.data)
        filled = sp.csr_array((np.where(gaps, 0, X.data), X.indices, X.indptr), shape=X.shape)
        total = np.asarray(filled.sum(axis=1), dtype=np.float64).ravel()
        column = np.asarray(filled.sum(axis=0), dtype=np.float64).ravel()
    else:
        gaps = np.zeros(1, dtype=bool)
        column = X.sum(axis=0, dtype=np.float64)
        total = X.sum(axis=1, dtype=np.float64)
        if np.isnan(column).any():
            gaps = np.isnan(X)
            column, total = np.nansum(X, axis=0, dtype=float), np.nansum(X, axis=1, dtype=float)
    if profile is None:
        profile = column / np.maximum(n - _missing_per_column(X), 1)
    expected = np.full(n, profile.sum())
    if gaps.any() and sp.issparse(X):
        rows = np.repeat(np.arange(n), np.diff(X.indptr))[gaps]
        expected -= np.bincount(rows, profile[X.indices[gaps]], minlength=n)
    elif gaps.any():
        expected -= gaps @ profile
    least = LEAST_EXPOSURE * max(float(profile.sum()), np.finfo(float).tiny)
    ratio = np.maximum(total, least) / np.maximum(expected, least)
    return np.log(ratio), profile


def to_numpy(tensor: Tensor, dtype=None) -> np.ndarray:
    """Copy of a tensor as a numpy array on the host."""
    array = tensor.detach().cpu().numpy()
    return array.astype(array.dtype if dtype is None else dtype, copy=True)
