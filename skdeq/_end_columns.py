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
from skdeq._data import columns_at, missing_per_column, take_rows
from skdeq._family import Family
from skdeq._loadings import Pins
from skdeq._setting import Setting

__all__ = ["EndColumns", "end_columns", "ends_at_infinity"]


@dataclass
class EndColumns:
    """Columns at an end of the support, and how much says so.

    Attributes
    ----------
    columns : ndarray of int, shape (m,)
    ends : ndarray of shape (m,)
        The one value that each column has.
    sizes : ndarray of shape (m,)
        Observations of it: the sum of their sample weights, or their number if that is larger, in
        units of the mean exposure. So weights equal repetition, and weights that sum to one are
        not less than one row.
    """

    columns: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.columns)

    def pinned(self, setting: Setting) -> Setting:
        """Fix these columns half an observation inside, as a proportion is by Jeffreys' prior."""
        if not len(self):
            return setting
        family = setting.family.exact
        at_end, sizes = _statistics(family, self.ends), torch.tensor(self.sizes, device="cpu")
        # No more than the support is wide.
        low, high = _statistics(family, np.array([family.support.low, family.support.high]))
        unit = (high - low).abs().nan_to_num(1.0).clamp_max(1.0)
        inward = -torch.sign(family.link(at_end)) * unit
        intercept = family.link(at_end + inward * 0.5 / (sizes + 1))
        return replace(setting, pins=_pins(self.columns, intercept, setting))

    def after(self, X: Any, setting: Setting) -> tuple["EndColumns", Pins]:
        """Look at more rows: what is left at an end, and where the others start from now."""
        family, (weight, size) = setting.family.exact, _row_weights(setting)
        rows = np.flatnonzero(weight)
        some = take_rows(X, rows) if len(rows) < len(weight) else X
        weight, size = weight[rows], size[rows]
        if sp.issparse(some):
            some = some[:, self.columns]
        else:
            some = some[:, torch.tensor(self.columns, device=some.device)]
        at_end = np.zeros(len(self), dtype=bool)
        for end in np.unique(self.ends):
            there = columns_at(some, end)
            at_end[there] |= self.ends[there] == end
        sizes = self.sizes + size.sum() - missing_per_column(some, size)
        total = _statistics(family, self.ends).numpy() * self.sizes
        total += _sums_of_statistics(family, some, weight)
        left = EndColumns(self.columns[at_end], self.ends[at_end], sizes[at_end])
        intercept = family.link(torch.tensor((total / sizes)[~at_end], device="cpu"))
        return left, _pins(self.columns[~at_end], intercept, setting)


def end_columns(X: Any, setting: Setting) -> EndColumns:
    """Find the columns of validated data that are at an end of the support."""
    family = setting.family.exact
    found = [EndColumns(np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0))]
    # Of a problem that is not convex more than the intercept may lead to the end.
    if family.is_convex:
        for end in ends_at_infinity(family):
            columns = columns_at(X, end)
            if len(columns):
                _, size = _row_weights(setting)
                sizes = size.sum() - missing_per_column(X, size)[columns]
                found.append(EndColumns(columns, np.full(len(columns), float(end)), sizes))
    parts = zip(*((one.columns, one.ends, one.sizes) for one in found), strict=True)
    return EndColumns(*(np.concatenate(part) for part in parts))


def ends_at_infinity(family: Family) -> list[float]:
    """Find the ends of the support that are observed, with a likelihood greatest at infinity."""
    support = family.support
    ends = {support.low: support.low_inclusive, support.high: support.high_inclusive}
    taken = [end for end, is_taken in ends.items() if is_taken]
    links = family.link(_statistics(family, np.array(taken)))
    return [end for end, link in zip(taken, links.tolist(), strict=True) if np.isinf(link)]


def _statistics(family: Family, x: np.ndarray) -> Tensor:
    return family.sufficient(torch.tensor(x, dtype=torch.float64, device="cpu"))


def _sums_of_statistics(family: Family, X: Any, weight: np.ndarray) -> np.ndarray:
    """Sum T(x) over the observed entries of each column under the weights of the rows."""
    if not sp.issparse(X):
        return weight @ _observed_statistics(family, to_numpy(X.double()))
    # T(0) is zero where entries that are not stored are.
    by_entry = np.repeat(weight, np.diff(X.indptr)) * _observed_statistics(family, X.data)
    return np.bincount(X.indices, by_entry, minlength=X.shape[1])


def _observed_statistics(family: Family, x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), 0.0, _statistics(family, x).numpy())


def _pins(columns: np.ndarray, intercept: Tensor, setting: Setting) -> Pins:
    device = setting.observations.device
    return Pins(torch.tensor(columns, device="cpu").to(device), intercept.to(device))


def _row_weights(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Return what the entries of each row count for, and how many observations they are."""
    weight = np.ones(setting.observations.shape[0])
    if setting.sample_weight is not None:
        weight = to_numpy(setting.sample_weight.double())
        weight = weight * max(1.0, np.count_nonzero(weight) / weight.sum())
    if setting.row_offset is None:
        return weight, weight
    return weight, weight * np.exp(to_numpy(setting.row_offset.double()))
