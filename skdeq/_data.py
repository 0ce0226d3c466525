"""Validated data, dense or sparse, on their way to a device."""

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from skdeq._base import numpy_dtype, to_tensor
from skdeq._chunks import free_memory, map_chunks
from skdeq._family import Family
from skdeq._host_data import HostObservations
from skdeq._observations import CompressedRows, Observations

__all__ = [
    "CHUNK_ENTRIES",
    "chunk_rows",
    "columns_at",
    "far_means",
    "has_short_digits",
    "log_base_rows",
    "missing_per_column",
    "brought",
    "rows_of",
    "take_rows",
    "to_observations",
    "to_rows",
]

# Entries of dense data, or stored entries of sparse, to be looked at together.
CHUNK_ENTRIES = 2**20
# Rows that are looked at before all are.
_FIRST_ROWS = 64
# Size of a term of an objective of which float32 keeps two decimals; the sums of a row keep less.
_MOST_IN_SINGLE = 1e5
# Mean from which on the squares of entries cost float64 more than a millionth of its digits.
_FAR = 1e3


def chunk_rows(X) -> int:
    """Rows of validated data to be looked at together, by the entries that are stored."""
    if sp.issparse(X):
        return max(1, X.shape[0] * CHUNK_ENTRIES // max(X.nnz, 1))
    return max(1, CHUNK_ENTRIES // X.shape[1])


def missing_per_column(X, weight: np.ndarray | None = None) -> np.ndarray:
    """Count the NaN of each column of validated data, or add up their rows' weights, (p,)."""
    if sp.issparse(X):
        gaps = np.isnan(X.data)
        of_gaps = None if weight is None else np.repeat(weight, np.diff(X.indptr))[gaps]
        return np.bincount(X.indices[gaps], of_gaps, minlength=X.shape[1])
    # The sum of a column is NaN if any entry is; most data need nothing more.
    suspicious = (~torch.isfinite(X.new_ones(len(X)) @ X)).nonzero().squeeze(1)
    count = torch.zeros(X.shape[1], dtype=torch.long, device=X.device)
    if weight is not None:
        count = count.double()
    if len(suspicious):
        gaps = torch.isnan(X[:, suspicious])
        count[suspicious] = (
            gaps.sum(0) if weight is None else to_tensor(weight, X.device) @ gaps.double()
        )
    return count.cpu().numpy()


def columns_at(X, value: float) -> np.ndarray:
    """Columns of validated data that have one value wherever they are observed."""
    if sp.issparse(X):
        return _sparse_columns_at(X, value)

    def elsewhere(rows: Tensor) -> Tensor:
        return ((rows != value) & ~torch.isnan(rows)).any(0)

    # Most columns betray themselves in the first rows.
    columns = (~elsewhere(X[:_FIRST_ROWS])).nonzero().squeeze(1)
    if len(columns):
        size = chunk_rows(X)
        parts = map_chunks(
            lambda low, high: elsewhere(X[low:high, columns]), len(X), size, X.device
        )
        columns = columns[~torch.stack(parts).any(0)]
    return columns.cpu().numpy()


def _sparse_columns_at(X: sp.csr_array, value: float) -> np.ndarray:
    n, p = X.shape
    elsewhere, stored = np.zeros(p, dtype=bool), np.zeros(p, dtype=np.int64)
    for low in range(0, X.nnz, CHUNK_ENTRIES):
        entries = slice(low, low + CHUNK_ENTRIES)
        columns, data = X.indices[entries], X.data[entries]
        elsewhere[columns[(data != value) & ~np.isnan(data)]] = True
        if value != 0:
            stored += np.bincount(columns, minlength=p)
    return np.flatnonzero(~elsewhere & ((stored == n) if value != 0 else True))


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


def to_observations(X, family: Family, device: torch.device, copies: int = 1) -> Observations:
    """Sufficient statistics of validated data for a device; dense floats are shared, not copied.

    They go to the device, or stay where they are if so many copies of them would fill half of
    what it has free.
    """
    values: Tensor | CompressedRows
    missing: Tensor | CompressedRows | None
    if sp.issparse(X):
        # The transpose is wanted as well.
        size = 2 * (X.data.nbytes + X.indices.nbytes)
        home = _home(copies * size, torch.device("cpu"), device)
        values, missing = _sparse_observations(X, family, home)
    else:
        home = _home(copies * X.nbytes, X.device, device)
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


def has_short_digits(X, family: Family) -> bool:
    """Whether float32 has too few digits for the terms of the objective of validated data.

    These are as large as the largest entry, or its square if the variance is constant, and what
    the model explains is what is left of them. Where canonical parameters end, as those of amounts
    at 0, variances next to the end are squares of what rounding has left of a predictor.
    """
    if numpy_dtype(X) != np.float32:
        return False
    if not family.domain.is_real_line:
        return True

    def largest(block: Tensor) -> Tensor:
        return torch.nan_to_num(block, nan=0.0).abs().amax()

    if sp.issparse(X):
        size = float(largest(to_tensor(X.data))) if X.nnz else 0.0
    else:
        parts = map_chunks(lambda i, j: largest(X[i:j]), len(X), chunk_rows(X), X.device)
        size = float(torch.stack(parts).amax())
    constant = family.base.has_constant_variance
    return (size**2 if constant else size) > _MOST_IN_SINGLE


def far_means(X, family: Family, weight: np.ndarray | None = None) -> np.ndarray | None:
    """Weighted means (p,) of the columns that lie far from zero, and zeros of the others.

    The terms of an objective are as large as the squares of the entries, and what the model
    explains is what is left of them.

    Returns
    -------
    ndarray or None
        None where nothing is gained by taking the means off.
    """
    if not family.is_location_family or sp.issparse(X) or X.dtype != torch.float64:
        return None
    ones = X.new_ones(len(X)) if weight is None else to_tensor(weight, X.device).to(X)
    mean = (ones @ X) / ones.sum()
    gaps = torch.isnan(mean)
    some = X[:, gaps]
    mean[gaps] = (ones @ some.nan_to_num(nan=0.0)) / (ones @ (~torch.isnan(some)).to(X))
    far = torch.isfinite(mean) & (mean.abs() > _FAR)
    return torch.where(far, mean, 0.0).cpu().numpy() if far.any() else None


def take_rows(X, index: np.ndarray):
    """Return some rows of validated data, in the order given."""
    return X[index] if sp.issparse(X) else X[torch.from_numpy(index).to(X.device)]


def brought(X, device: torch.device):
    """Bring validated data to a device; sparse ones, and what would fill half of it, stay."""
    return X if sp.issparse(X) else X.to(_home(X.nbytes, X.device, device))


def rows_of(X, index: Tensor, device: torch.device) -> Tensor:
    """Return some rows of validated data as a dense tensor, NaN where missing."""
    if sp.issparse(X):
        return to_tensor(X[index.cpu().numpy()].toarray(), device)
    return X[index.to(X.device)].to(device)


def log_base_rows(X, family: Family) -> Tensor:
    """Sum of log h(x) over the observed entries of each row, float64 (n,), where X lies."""
    n, p = X.shape
    at_zero = 0.0
    zero = torch.zeros(1, dtype=torch.float64, device="cpu")
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
    return torch.cat(map_chunks(work, n, chunk_rows(X), device))
