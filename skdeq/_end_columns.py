"""Columns that are at one end of the support wherever they are observed: a gene without a count.

No finite intercept is the most likely one for them. What a fit made of them would be an accident
of its tolerance, and each held-out entry elsewhere would cost as much as the fit ran far.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from skdeq._base import to_numpy
from skdeq._data import columns_at, missing_per_column
from skdeq._family import Family
from skdeq._model import Pins, Setting

__all__ = ["EndColumns", "end_columns"]


@dataclass
class EndColumns:
    """Columns at an end of the support, and how much says so.

    Attributes
    ----------
    columns : ndarray of int, shape (m,)
    ends : ndarray of shape (m,)
        The one value that each column has.
    sizes : ndarray of shape (m,)
        Observations of it: the sum of their sample weights, or their number if that is larger.
        So weights equal repetition, and weights that sum to one are not less than one row.
    """

    columns: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray

    def pinned(self, setting: Setting) -> Setting:
        """Fix these columns half an observation inside, as a proportion is by Jeffreys' prior."""
        if not len(self):
            return setting
        family = setting.family.exact
        at_end, sizes = self._statistics(family), torch.tensor(self.sizes, device="cpu")
        inward = -torch.sign(family.link(at_end))
        intercept = family.link(at_end + inward * 0.5 / (sizes + 1))
        return replace(setting, pins=_pins(self.columns, intercept, setting))

    def __len__(self) -> int:
        return len(self.columns)

    def after(self, X: Any, setting: Setting) -> tuple["EndColumns", Pins]:
        """Look at more rows: what is left at an end, and where the others start from now."""
        family = setting.family.exact
        before = self._statistics(family).numpy()
        total, size = _totals(X, setting, self.columns)
        at_end = np.isclose(total, before * size, rtol=1e-12, atol=0)
        left = EndColumns(self.columns[at_end], self.ends[at_end], (self.sizes + size)[at_end])
        mean = (before * self.sizes + total)[~at_end] / (self.sizes + size)[~at_end]
        intercept = family.link(torch.tensor(mean, device="cpu"))
        return left, _pins(self.columns[~at_end], intercept, setting)

    def _statistics(self, family: Family) -> Tensor:
        return family.sufficient(torch.tensor(self.ends, dtype=torch.float64, device="cpu"))


def end_columns(X: Any, setting: Setting) -> EndColumns:
    """Find the columns of validated data that are at an end of the support."""
    family = setting.family.exact
    none = EndColumns(np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0))
    if not family.is_canonical or family.base.unbounded_at:
        # A map keeps the canonical parameter from its end; and where the density has no bound
        # there, no intercept would be better than another.
        return none
    found = [none]
    for end in (family.support.low, family.support.high):
        one = EndColumns(none.columns, np.array([end]), none.sizes)
        if np.isfinite(end) and bool(torch.isinf(family.link(one._statistics(family))).all()):
            columns = columns_at(X, end)
            weight = _row_weights(setting)
            sizes = _sizes(X, weight, columns)
            found.append(EndColumns(columns, np.full(len(columns), float(end)), sizes))
    parts = zip(*((one.columns, one.ends, one.sizes) for one in found), strict=True)
    return EndColumns(*(np.concatenate(part) for part in parts))


def _pins(columns: np.ndarray, intercept: Tensor, setting: Setting) -> Pins:
    device = setting.observations.device
    return Pins(torch.tensor(columns, device="cpu").to(device), intercept.to(device))


def _row_weights(setting: Setting) -> np.ndarray:
    if setting.sample_weight is None:
        return np.ones(setting.observations.shape[0])
    weight = to_numpy(setting.sample_weight.double())
    return weight * max(1.0, np.count_nonzero(weight) / weight.sum())


def _sizes(X: Any, weight: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return weight.sum() - missing_per_column(X, weight)[columns]


def _totals(X: Any, setting: Setting, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted sums of the statistics of some columns (m,), and of the weights themselves."""
    family, weight = setting.family.exact, _row_weights(setting)
    sizes = _sizes(X, weight, columns)
    if sp.issparse(X):
        values = family.sufficient(torch.tensor(X.data, dtype=torch.float64, device="cpu"))
        of_entries = np.repeat(weight, np.diff(X.indptr)) * np.nan_to_num(values.numpy())
        return np.bincount(X.indices, of_entries, minlength=X.shape[1])[columns], sizes
    some = family.sufficient(X[:, torch.tensor(columns, device=X.device)].double())
    return weight @ some.nan_to_num(0.0).cpu().numpy(), sizes
