"""The pass over the data that all solvers share: sums over the entries of each row, by tiles."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skdeq._design import Design
from skdeq._family import Family

__all__ = ["Sums", "Wanted", "sum_over_entries"]

# Arrays of the size of a tile that the energy of an entry takes through a map.
_ENERGY_ARRAYS = 8


@dataclass(frozen=True)
class Wanted:
    """What is asked for; ``observed`` says with the curvature of the map in it or without."""

    objective: bool = False
    gradient: bool = False
    hessian: bool = False
    curvature: bool = False
    observed: bool = False


class Sums(NamedTuple):
    """Sums over the entries of each row; None is what was not asked for.

    Through a canonical map the terms are those of the energy, which has T(x) in it.

    Attributes
    ----------
    total : Tensor of shape (m,), float64
        Of A.
    slope : Tensor of shape (r, m)
        Of A' D.
    bend : Tensor of shape (r (r + 1) / 2, m)
        Of A'' D D^T.
    size : Tensor of shape (m,)
        Of A'' |D|^2.
    """

    total: Tensor | Any
    slope: Tensor | Any
    bend: Tensor | Any
    size: Tensor | Any


def sum_over_entries(
    family: Family,
    design: Design,
    unknowns: Tensor,
    wanted: Wanted,
    *,
    statistic: Tensor | None = None,
    missing: Tensor | None = None,
    step: Tensor | None = None,
) -> Sums:
    """Sum over the entries of each row what is wanted.

    Parameters
    ----------
    family : Family
    design : Design
    unknowns : Tensor of shape (m, r + offsets)
        With what the design has for offsets beside them.
    wanted : Wanted
    statistic : Tensor of shape (m, q), optional
        T(x), where it does not enter through products alone.
    missing : Tensor of shape (m, q), bool, optional
        Places of entries that count as none.
    step : Tensor of shape (m, r), optional
        The sums are those at the unknowns less this; predictors are moved by it instead of made
        anew, and so known to more digits.

    Returns
    -------
    Sums
    """
    m, r = len(unknowns), design.r
    plain = design.weight is None and missing is None
    width = design.tile_columns(m, 1 if family.is_canonical else _ENERGY_ARRAYS)
    if wanted.hessian:
        width = design.outer.tile_columns(width)
    zeros = unknowns.new_zeros
    total: Tensor | Any = zeros(m, dtype=torch.float64) if wanted.objective else None
    slope: Tensor | Any = zeros(r, m) if wanted.gradient else None
    bend: Tensor | Any = zeros(design.outer.pairs, m) if wanted.hessian else None
    size: Tensor | Any = zeros(m) if wanted.curvature else None
    buffer = unknowns.new_empty(m, width)
    for start in range(0, design.q, width):
        tile = slice(start, min(start + width, design.q))
        columns = tile.stop - start
        eta = buffer if columns == width else unknowns.new_empty(m, columns)
        torch.mm(unknowns, design.expand[:, tile], out=eta)
        if step is not None:
            eta.addmm_(step, design.expand[:r, tile], alpha=-1)
        values = None if statistic is None else statistic[:, tile]
        summed, terms = _terms(family, eta, values, wanted, plain)
        if missing is not None:
            gaps = missing[:, tile]
            for one in terms:
                if one is not None:
                    one.masked_fill_(gaps, 0)
        log_partition, mean, variance = terms
        collect = design.collect[:, tile]
        if summed is not None:
            total += summed
        elif wanted.objective:
            total += torch.mv(log_partition, collect[0])
        if wanted.gradient:
            slope.addmm_(collect[1:], mean.T)
        if wanted.hessian:
            bend.addmm_(design.outer.of(tile), variance.T)
        if wanted.curvature:
            size += torch.mv(variance, design.square[tile])
    return Sums(total, slope, bend, size)


def _terms(
    family: Family, eta: Tensor, statistic: Tensor | None, wanted: Wanted, plain: bool
) -> tuple[Tensor | None, tuple[Tensor | Any, Tensor | Any, Tensor | Any]]:
    """Sum of A over the entries of a tile, if known already, and A, A' and A'' of each.

    ``plain`` says that all entries count, and as much. The predictors are written over.
    """
    if statistic is not None:
        return None, family.energy(eta, statistic, observed=wanted.observed)
    variance = wanted.hessian or wanted.curvature
    if wanted.objective and plain:
        summed, mean, bend = family.summed_statistics_(eta, variance=variance)
        return summed, (None, mean, bend)
    return None, family.statistics_(eta, log_partition=wanted.objective, variance=variance)
