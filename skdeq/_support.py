"""Whether data are in the support of a family, and where they leave it."""

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from skdeq._base import to_numpy, to_tensor
from skdeq._chunks import map_chunks
from skdeq._data import chunk_rows
from skdeq._family import Family

__all__ = ["place_of", "stored_values", "within_support"]


def within_support(estimator, X, family: Family):
    """Return validated data, entries that rounding took out of the support put back.

    Raises
    ------
    ValueError
        If an entry is infinite or outside the support, naming family, row and column, or too
        large for sums of squares.
    """
    values = stored_values(X)
    ends = _ends(values)
    bad = _first_outside(values, ends, family)
    if bad is not None:
        values = _unrounded(values, family)
        X = _with_values(X, values)
        ends = _ends(values)
        bad = _first_outside(values, ends, family)
    if bad is not None:
        row, column = place_of(X, bad[0]) if sp.issparse(X) else bad
        _refuse(estimator, family, row, column, float(values[bad]))
    if sp.issparse(X):
        _check_zeros(estimator, X, family)
    _check_size(values, ends, X.shape[0] * X.shape[1], family)
    return X


def _ends(values: Tensor, *, with_gaps: bool = True) -> Tensor:
    """Least and largest value of each chunk of rows; NaN, unless gaps are left out, if it has any.

    Nothing waits for a device in between.
    """

    def work(start: int, stop: int) -> Tensor:
        rows = values[start:stop]
        return torch.stack(torch.aminmax(rows if with_gaps else rows.nan_to_num(0.0)))

    if not values.numel():
        return values.new_empty(0, 2)
    return torch.stack(map_chunks(work, len(values), chunk_rows(values), values.device))


def _check_size(values: Tensor, ends: Tensor, entries: int, family: Family) -> None:
    """Refuse finite values whose sums of squares overflow."""
    if not values.numel() or np.isfinite(family.support.high - family.support.low):
        return
    limit = (torch.finfo(values.dtype).max / max(entries, 1e6)) ** 0.5
    if bool(torch.isnan(ends).any()):
        ends = _ends(values, with_gaps=False)
    largest = float(ends.abs().max())
    if largest > limit:
        name = "float32" if values.dtype == torch.float32 else "float64"
        raise ValueError(
            f"X has values as large as {largest:.1e}; sums of their squares overflow {name}. "
            f"Rescale X below {limit:.0e}" + (" or pass float64." if name == "float32" else ".")
        )


def _outside(values: Tensor, family: Family) -> Tensor:
    inside = family.support.contains(values) & torch.isfinite(values)
    return ~inside & ~torch.isnan(values)


def stored_values(X) -> Tensor:
    """Return the values of validated data; of sparse data the stored ones, in one column."""
    return to_tensor(X.data).unsqueeze(1) if sp.issparse(X) else X


def _with_values(X, values: Tensor):
    """Return the same data with other values."""
    if not sp.issparse(X):
        return values
    parts = to_numpy(values.squeeze(1)), X.indices, X.indptr
    return type(X)(parts, shape=X.shape)


def _first_outside(X: Tensor, ends: Tensor, family: Family) -> tuple[int, int] | None:
    # Chunks whose extremes are outside the support, or NaN.
    inside = torch.isfinite(ends) & family.support.contains(ends)
    suspicious = (~inside.all(1)).nonzero().squeeze(1)
    size = chunk_rows(X)
    for start in (size * suspicious).tolist():
        outside = _outside(X[start : start + size], family)
        if bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            return start + row, column
    return None


def _unrounded(X: Tensor, family: Family) -> Tensor:
    """Put back onto an end of the support what rounding has taken beyond it, in a copy.

    What a MinMaxScaler makes of a column's maximum may be 1 + 2e-16.
    """
    slack = 8 * torch.finfo(X.dtype).eps
    for end in (family.support.low, family.support.high):
        if not np.isfinite(end):
            continue
        near = (X - end).abs() <= slack * max(1.0, abs(end))
        X = torch.where(near & ~family.support.contains(X), end, X)
    return X


def _check_zeros(estimator, X, family: Family) -> None:
    """Refuse sparse data whose entries that are not stored would not be zeros to the family."""
    zero = torch.zeros(1, dtype=torch.float64, device="cpu")
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


def place_of(X, stored: int) -> tuple[int, int]:
    """Return row and column of a stored entry of a CSR array."""
    return int(np.searchsorted(X.indptr, stored, side="right")) - 1, int(X.indices[stored])


def _refuse(estimator, family: Family, row: int, column: int, value: float) -> None:
    name = type(estimator).__name__
    where = f"row {row}, column {column} of X"
    if np.isinf(value):
        raise ValueError(
            f"Input X contains infinity: {where} is {value}. {name} accepts finite numbers, and "
            "NaN for missing entries."
        )
    # "Negative values in data" is what scikit-learn's own estimators say.
    negative = value < 0 <= family.support.low
    prefix = "Negative values in data passed to" if negative else "Unsuitable value in data for"
    raise ValueError(
        f"{prefix} {name}: {where} is {value:g}, but family {family.name!r} accepts "
        f"{family.accepts}, {family.support}."
    )
