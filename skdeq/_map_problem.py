r"""The maximum-a-posteriori problem: many ridge GLMs that share one design matrix.

Row ``i`` minimises

.. math:: \sum_j w_j m_{ij} [A(\eta_{ij}) - T(x_{ij}) \eta_{ij}]
          + \tfrac12 \sum_l \lambda_l z_{il}^2,
          \qquad \eta_{ij} = D_j z_i + o_j + c_i .

With the loadings as design it is the problem of the latents of each row of the data; with the
latents (and a column of ones) as design it is the problem of the loadings and intercept of each
feature. Both halves of the alternation are therefore one piece of code.
"""

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from skdeq._chunks import map_chunks
from skdeq._design import Design
from skdeq._family import Family
from skdeq._fixed_point_problem import certified_residual, scaled_residual, usable_hessian
from skdeq._map_geometry import CurvatureMap
from skdeq._observations import Observations
from skdeq._tile_sums import Sums, Wanted, sum_over_entries

__all__ = ["MapProblem", "over_chunks"]

# A Newton step is taken unseen if no linear predictor moves by more than this (in units of the
# self-concordance constant): the decrease is then at least 0.28 of the Newton decrement, since
# (exp(t) - t - 1) / t^2 < 0.72 at t = 1 (Sun & Tran-Dinh 2019, Prop. 10).
_SAFE_MOVE = 1.0
# Times that the squared Newton decrement of a row may be what a shared curvature makes of it. Of
# rows unlike those of the fit, of all families with a bound, it was up to 1,000 times that; and
# where the residual decides, as in most rows, it is far smaller anyway.
_CAUTION = 1e3


class MapProblem:
    """Batch of ridge GLMs with a common design; implements ``FixedPointProblem``.

    Parameters
    ----------
    family : Family
    design : Tensor of shape (q, r)
        The matrix D.
    observations : Observations of shape (n, q)
        The entries T(x); of a canonical family only their products and gaps are used.
    penalty : Tensor of shape (r,)
        Ridge penalties, non-negative.
    offset : Tensor of shape (q,), optional
        Offsets o of the entries of every row.
    row_offset : Tensor of shape (n,), optional
        Offsets c of whole rows.
    weight : Tensor of shape (q,), optional
        Weights w of the entries of every row.
    curvature : Tensor of shape (q,), optional
        Typical variances of the entries. They shape the map of :meth:`shaped_step`, and the
        certificates.
    shared_map : bool
        Whether all rows share one map, as they may where the curvature bounds theirs or varies
        little; if not, each row scales the curvature to its own mean.
    """

    def __init__(
        self,
        family: Family,
        design: Tensor,
        observations: Observations,
        penalty: Tensor,
        *,
        offset: Tensor | None = None,
        row_offset: Tensor | None = None,
        weight: Tensor | None = None,
        curvature: Tensor | None = None,
        shared_map: bool = False,
    ):
        self.family = family
        self.observations = observations
        self.penalty = penalty
        self.row_offset = row_offset
        self.r = design.shape[1]
        self.n_rows = observations.shape[0]
        self._bounds = (0, self.n_rows)
        self._size = design.new_zeros(self.n_rows)
        self._size_at: Tensor | None = None
        self._design = Design(design, offset, weight, row_offset is not None)
        self._has_offset = offset is not None
        self.projection = design.new_zeros(self.n_rows, self.r)
        # The part of sum_j T(x_j) eta_j that does not depend on z.
        self.constant = design.new_zeros(self.n_rows, dtype=torch.float64)
        if family.is_canonical:
            # T(x) enters the problem through this product alone.
            projected = observations @ self._design.weighted().T
            self.projection = projected[:, : self.r].contiguous()
            if offset is not None:
                self.constant += projected[:, self.r]
            if row_offset is not None:
                self.constant += row_offset.double() * projected[:, -1]
        if self.rows_differ_in_data_alone and weight is None and offset is not None:
            # Entries that no unknown moves, such as columns of one value, add the same to all
            # rows: a tenth of the pixels of MNIST.
            moved = (design != 0).any(1)
            if 0 < int(moved.sum()) < len(moved):
                self.constant -= family.log_partition(offset[~moved].double()).sum()
                self._design = Design(design[moved], offset[moved], None, False)
                curvature = curvature if curvature is None else curvature[moved]
        self.scale_is_bounded = family.variance_bound is not None
        self._map = None
        if curvature is not None:
            variance = curvature * self._design.collect[0]
            self._map = CurvatureMap(
                self.design, variance, penalty, None if shared_map else self.n_rows
            )

    @property
    def design(self) -> Tensor:
        """Design matrix, without entries that no unknown moves."""
        return self._design.matrix

    def chunk_rows(self) -> int:
        """Rows to be worked on at a time."""
        return self._design.chunk_rows(self.n_rows)

    def hessian_rows(self) -> int:
        """Rows whose Hessians are to be held at a time."""
        return self._design.hessian_rows(self.n_rows)

    def chunk(self, start: int, stop: int) -> "MapProblem":
        """Return the problem of the rows ``start:stop``, sharing the design."""
        part = self._part(slice(start, stop))
        part.n_rows = stop - start
        part._size, part._size_at = part._size.clone(), None
        first = self._bounds[0]
        part._bounds = (first + start, first + stop)
        for name in ("_missing", "_statistic", "_total_statistic"):
            part.__dict__.pop(name, None)
        return part

    def select(self, index: Tensor) -> "MapProblem":
        """Return the problem of some rows of this chunk, in the order given."""
        part = self._part(index)
        part.n_rows = len(index)
        if self._size_at is not None:
            part._size_at = self._size_at[index]
        missing = self._missing
        part.__dict__["_missing"] = None if missing is None else missing[index]
        if not self.family.is_canonical:
            part.__dict__["_statistic"] = self._statistic[index]
            part.__dict__.pop("_total_statistic", None)
        return part

    def _part(self, index: slice | Tensor) -> "MapProblem":
        part = copy.copy(self)
        for name in ("projection", "_size", "constant", "row_offset", "_map"):
            values = getattr(self, name)
            setattr(part, name, None if values is None else values[index])
        return part

    def smooth(self, width: float) -> None:
        """Round off the kinks of the canonical map, if it has any."""
        self.family = self.family.smoothed(width)

    def mean_at_zero(self) -> Tensor:
        """Sum A'(o) D over the entries of a row at zero, (r,), where it is that of every row."""
        first = self.chunk(0, 1)
        zero = self.design.new_zeros(1, self.r)
        rows = torch.zeros(1, dtype=torch.long, device=zero.device)
        return first._accumulate(zero, rows, gradient=True).slope[:, 0]

    @property
    def has_curvature(self) -> bool:
        """Whether `shaped_step` is shaped by a curvature."""
        return self._map is not None

    @property
    def rows_differ_in_data_alone(self) -> bool:
        """Whether the gradients of two rows at one point differ in their projections alone."""
        same_entries = self.observations.missing is None and self.row_offset is None
        return same_entries and self.family.is_canonical

    @cached_property
    def _missing(self) -> Tensor | None:
        return self.observations.missing_rows(*self._bounds)

    @cached_property
    def _statistic(self) -> Tensor:
        """T(x) of the rows, where it does not enter through products alone."""
        return self.observations.dense_rows(*self._bounds)

    @cached_property
    def _total_statistic(self) -> Tensor:
        """Sum of the sizes of T(x) over the entries of each row."""
        return self._statistic.abs().nan_to_num(0.0) @ self._design.collect[0]

    def _of(self, values: Tensor, rows: Tensor) -> Tensor:
        # Rows come in order and once each: as many as there are is all of them.
        return values if len(rows) == self.n_rows else values[rows]

    def _with_offsets(self, z: Tensor, rows: Tensor) -> Tensor:
        """Put what goes with offsets beside the unknowns."""
        extra = []
        if self._has_offset:
            extra.append(z.new_ones(len(z), 1))
        if self.row_offset is not None:
            extra.append(self._of(self.row_offset, rows).unsqueeze(1))
        return torch.cat([z, *extra], dim=1) if extra else z

    def _accumulate(
        self, z: Tensor, rows: Tensor, *, step: Tensor | None = None, **wanted: bool
    ) -> Sums:
        """Sum what is :class:`Wanted` at ``z``, or at ``z - step``."""
        missing = self._missing
        return sum_over_entries(
            self.family,
            self._design,
            self._with_offsets(z, rows),
            Wanted(**wanted),
            statistic=None if self.family.is_canonical else self._of(self._statistic, rows),
            missing=None if missing is None else self._of(missing, rows),
            step=step,
        )

    def _penalised(self, total: Tensor, z: Tensor, rows: Tensor) -> Tensor:
        wide = z.double()
        value = total - self._linear(wide, rows) + self._ridge(wide)
        return torch.nan_to_num(value, nan=torch.inf, posinf=torch.inf)

    def _linear(self, z: Tensor, rows: Tensor) -> Tensor:
        """Sum of T(x) eta, where it does not enter term by term, in the type of z."""
        linear = (self._of(self.projection, rows).to(z.dtype) * z).sum(1)
        return linear + self._of(self.constant, rows)

    def _ridge(self, z: Tensor) -> Tensor:
        return 0.5 * (z.square() @ self.penalty.to(z.dtype))

    def rounding(self, objective: Tensor, z: Tensor, rows: Tensor) -> Tensor:
        """Error that rounding is expected to make in the objectives at ``z``, at most."""
        # Of the sums that make it up, which may cancel; their own rounding is of no account.
        sums = objective.abs() + self._linear(z, rows).abs() + self._ridge(z)
        if self.has_kinks:
            # What is zero on one side of a kink is not on the other.
            sums = sums + self._of(self._total_statistic, rows)
        # An exponential turns the absolute error of a predictor into a relative one.
        sums = (8 + self.extent(z)) * sums + self._design.sizes.total_weight
        return torch.finfo(z.dtype).eps * sums

    def extent(self, z: Tensor) -> Tensor:
        """Return what the linear predictors of each row (m,) come to at most at ``z``."""
        sizes = self._design.sizes
        return z.norm(dim=1) * sizes.longest + sizes.furthest

    def _gradient(self, slope: Tensor, z: Tensor, rows: Tensor) -> Tensor:
        # The slope comes transposed; what is made of the gradient is faster row by row.
        linear = torch.addcmul(self._of(self.projection, rows), z, self.penalty, value=-1)
        return linear.neg_().add_(slope.T)

    def _residual(self, gradient: Tensor, z: Tensor, curvature: Tensor) -> Tensor:
        # A row whose entries have no variance left (an all-zero column of counts whose intercept
        # tends to minus infinity) counts as solved instead of being chased for ever.
        least = self._design.sizes.spread * torch.finfo(z.dtype).eps
        curvature = curvature.clamp_min(least) / self.r
        return scaled_residual(gradient, z, self.penalty.mean() + curvature)

    def _adapt(self, rows: Tensor, size: Tensor) -> None:
        if self._map is not None:
            self._map.adapt(rows, size / self.r)

    def objective(self, z: Tensor, rows: Tensor) -> Tensor:
        """Objective of each row, float64; infinite outside the domain of the family."""
        sums = self._accumulate(z, rows, objective=True)
        return self._penalised(sums.total, z, rows)

    def gradient(self, z: Tensor, rows: Tensor, fresh: bool = True) -> tuple[Tensor, Tensor]:
        """Gradient and scaled residual of each row."""
        gradient, size = self.gradient_and_size(z, rows, fresh)
        residual = self._residual(gradient, z, size)
        if self._map is not None:
            # The squared Newton decrement, with the curvature that shapes the map.
            decrement = -(gradient * self._map.step(gradient, rows)).sum(1)
            # Of the sums that are known without another pass.
            rounding = self.rounding(torch.zeros_like(self._of(self.constant, rows)), z, rows)
            caution = 1.0 if self._map.adapts else _CAUTION
            residual = certified_residual(residual, decrement, rounding, caution)
        return gradient, residual

    def gradient_and_size(
        self, z: Tensor, rows: Tensor, fresh: bool = True
    ) -> tuple[Tensor, Tensor]:
        r"""Gradient of each row and its curvature, summed over the unknowns.

        Unless ``fresh``, what the curvature is at least: by self-concordance
        :math:`A''(\eta + \delta) \ge e^{-c |\delta|} A''(\eta)`.
        """
        size = None if fresh else self._least_size(z, rows)
        # On the scale of the residuals that `derivatives` returns.
        sums = self._accumulate(
            z, rows, gradient=True, curvature=size is None, observed=self.family.is_convex
        )
        if size is None:
            size = sums.size
            self._adapt(rows, size)
            if self._size_at is None:
                self._size_at = torch.zeros_like(self.projection)
            self._size[rows], self._size_at[rows] = size, z
        return self._gradient(sums.slope, z, rows), size

    def _least_size(self, z: Tensor, rows: Tensor) -> Tensor | None:
        constant, at = self.family.self_concordance, self._size_at
        if constant is None or at is None:
            return None
        moved = (z - at[rows]).square_().sum(1).sqrt_()
        return self._size[rows] * moved.mul_(-constant * self._design.sizes.longest).exp_()

    @property
    def has_kinks(self) -> bool:
        """Whether the canonical map has kinks, rounded off or not."""
        return self.family.has_kinks

    def residual_after(self, z: Tensor, step: Tensor, rows: Tensor) -> Tensor:
        """Scaled residual of each row at ``z - step``, its predictors moved from those at z."""
        gradient, size = self.gradient_after(z, step, rows)
        return self._residual(gradient, z - step, size)

    def gradient_after(self, z: Tensor, step: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient and curvature of :meth:`gradient_and_size` at ``z - step``, as it is there."""
        sums = self._accumulate(z, rows, gradient=True, curvature=True, step=step)
        return self._gradient(sums.slope, z - step, rows), sums.size

    def value_and_gradient(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Objective and gradient of each row."""
        adapt = self._map is not None and self._map.adapts
        sums = self._accumulate(z, rows, objective=True, gradient=True, curvature=adapt)
        if adapt:
            self._adapt(rows, sums.size)
        return self._penalised(sums.total, z, rows), self._gradient(sums.slope, z, rows)

    def variance(self, z: Tensor, rows: Tensor) -> Tensor:
        """A''(eta) times the weights of the entries of each row (m, q), zero in its gaps."""
        eta = self._with_offsets(z, rows) @ self._design.expand
        variance: Tensor | Any = self.family.statistics_(eta, variance=True)[2]
        if self._missing is not None:
            variance = variance.masked_fill(self._of(self._missing, rows), 0)
        return variance * self._design.collect[0]

    def bare_gradient(self, z: Tensor, rows: Tensor) -> Tensor:
        """Gradient of each row and nothing else."""
        return self._gradient(self._accumulate(z, rows, gradient=True).slope, z, rows)

    def derivatives(
        self, z: Tensor, rows: Tensor, observed: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Objective, gradient, Hessian and scaled residual of each row.

        The Hessian, and the curvature that scales the residual, is the observed one where the
        problem is convex, or if ``observed``. Elsewhere the residual is scaled by the expected
        one, and the Hessian is the observed one where that is positive definite.
        """
        if observed or self.family.is_convex:
            return self.derivatives_of_kind(z, rows, observed=True)
        value, gradient, hessian, residual = self.derivatives_of_kind(z, rows, observed=False)
        hessian = usable_hessian(self.observed_hessian(z, rows), hessian)
        return value, gradient, hessian, residual

    def derivatives_of_kind(
        self, z: Tensor, rows: Tensor, *, observed: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Objective, gradient, observed or expected Hessian and scaled residual of each row.

        Both Hessians of a canonical family are the same.
        """
        sums = self._accumulate(
            z, rows, objective=True, gradient=True, hessian=True, observed=observed
        )
        hessian = self._design.outer.symmetric(sums.bend)
        size = hessian.diagonal(dim1=1, dim2=2).sum(1)
        hessian.diagonal(dim1=1, dim2=2).add_(self.penalty)
        gradient = self._gradient(sums.slope, z, rows)
        residual = self._residual(gradient, z, size)
        return self._penalised(sums.total, z, rows), gradient, hessian, residual

    def observed_hessian(self, z: Tensor, rows: Tensor) -> Tensor:
        """Hessian of each row with the curvature of the canonical map in it."""
        sums = self._accumulate(z, rows, hessian=True, observed=True)
        hessian = self._design.outer.symmetric(sums.bend)
        hessian.diagonal(dim1=1, dim2=2).add_(self.penalty)
        return hessian

    def step(self, gradient: Tensor, rows: Tensor) -> Tensor:
        """Displacement f(z) - z of the equilibrium layer."""
        return -gradient / self.penalty

    def shaped_step(self, gradient: Tensor, rows: Tensor) -> Tensor:
        """Displacement of the map that the curvature shapes, if one is given."""
        if self._map is None:
            return self.step(gradient, rows)
        return self._map.step(gradient, rows)

    def is_safe(self, step: Tensor, rows: Tensor) -> Tensor:
        """Where a full Newton step decreases the objective by self-concordance."""
        constant = self.family.self_concordance
        if constant is None:
            return torch.zeros(len(step), dtype=torch.bool, device=step.device)
        return constant * step.norm(dim=1) * self._design.sizes.longest <= _SAFE_MOVE


def over_chunks(
    step: Callable[[MapProblem, Tensor, Tensor], tuple[Tensor, ...]],
    problem: MapProblem,
    points: Tensor,
) -> tuple[Tensor, ...]:
    """Apply ``step(part, point, rows)`` to the points (n_rows, r) of each chunk; join the results.

    ``rows`` counts the rows of the part.
    """

    def work(low: int, high: int) -> tuple[Tensor, ...]:
        rows = torch.arange(high - low, device=points.device)
        return step(problem.chunk(low, high), points[low:high], rows)

    parts = map_chunks(work, len(points), problem.chunk_rows(), points.device)
    return tuple(torch.cat(one) for one in zip(*parts, strict=True))
