"""Sizes of the rows of count data, which offset their natural parameters."""

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from skdeq._base import to_numpy, to_tensor
from skdeq._chunks import map_chunks
from skdeq._data import CHUNK_ENTRIES, chunk_rows, missing_per_column

__all__ = ["LEAST_EXPOSURE", "exposure_offset"]

# A row without any count says nothing of its size. This share of the mean exposure keeps its
# logarithm finite and its expected counts negligible.
LEAST_EXPOSURE = 1e-6


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
