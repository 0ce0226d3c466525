"""Sizes of the rows of count data, which offset their natural parameters."""

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from skdeq._base import to_numpy, to_tensor
from skdeq._chunks import map_chunks, sum_chunks
from skdeq._data import chunk_rows, missing_per_column
from skdeq._size_factors import log_exposure

__all__ = ["exposure_offset"]

# Share of the weight of all rows below which a column counts as not seen: in float64 less may be
# the rounding of a difference.
_LEAST_SEEN = 1e-9


def exposure_offset(
    X, profile: np.ndarray | None, sample_weight: np.ndarray | None = None
) -> tuple[Tensor, np.ndarray]:
    """Compute the log size factor of each row from the row itself.

    Without gaps it is ``log(row total / mean training row total)``; with gaps, the total of the
    observed entries over the training mean of the same entries.

    Parameters
    ----------
    X : Tensor or CSR array of shape (n, p)
    profile : ndarray of shape (p,) or None
        Training mean of each column; None to compute it from X.
    sample_weight : ndarray of shape (n,), optional
        Of the rows, for that mean.

    Returns
    -------
    offset : Tensor of shape (n,), float64
        On the CPU.
    profile : ndarray of shape (p,)
    """
    n = X.shape[0]
    weight = np.ones(n) if sample_weight is None else sample_weight.astype(np.float64)
    total, column = _sums_observed(X, weight)
    has_gaps = missing_per_column(X).any()
    if profile is None:
        seen = np.full(len(column), weight.sum())
        if has_gaps:
            seen -= missing_per_column(X, weight)
        # What next to no weight has seen is no measure of a mean row.
        told = seen > _LEAST_SEEN * weight.sum()
        profile = np.divide(column, seen, out=np.zeros_like(column), where=told)
    whole = torch.tensor(profile.sum(), device="cpu")
    expected = whole - to_tensor(_profile_of_gaps(X, profile)) if has_gaps else whole
    return log_exposure(to_tensor(total), expected, whole), profile


def _sums_observed(X, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add up the observed entries of each row, and of each column under weights, float64."""
    if sp.issparse(X):
        n, p = X.shape
        totals, columns = np.zeros(n), np.zeros(p)
        size = chunk_rows(X)
        for start in range(0, n, size):
            part = X[start : start + size].astype(np.float64)
            np.nan_to_num(part.data, copy=False)
            totals[start : start + size] = np.asarray(part.sum(axis=1)).ravel()
            columns += weight[start : start + size] @ part
        return totals, columns

    weights = to_tensor(weight, X.device)
    total = weights.new_empty(len(X), dtype=torch.float64)

    def work(start: int, stop: int) -> Tensor:
        rows = X[start:stop].to(torch.float64, copy=True)
        if bool(torch.isnan(rows.sum())):
            rows.nan_to_num_(0.0)
        total[start:stop] = rows.sum(1)
        return weights[start:stop] @ rows

    column = sum_chunks(work, len(X), chunk_rows(X), X.device)
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
