"""Latents of given rows under a fitted model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from skdeq._canonical import TRAINING_WIDTH, WIDTHS
from skdeq._chunks import map_chunks, sum_chunks
from skdeq._fixed_point_problem import OF_ROWS, LatentProblem
from skdeq._hierarchy import has_kinks
from skdeq._latent_model import LatentModel
from skdeq._latent_starts import better_of, first_latents
from skdeq._newton import confirm
from skdeq._setting import Setting, latent_problem
from skdeq.fixed_point import SOLVERS, FixedPointResult, Solver, newton

__all__ = ["LatentSolver", "feature_variances", "row_variances", "solve_latents"]

# Up to this rank a Hessian for every row costs less than the iterations it saves.
_NEWTON_RANK = 16
# Sample sizes of the average variances, which only shape steps.
_VARIANCE_ROWS = 4096
_VARIANCE_COLUMNS = 1024
# Rows whose variances are formed at a time, fewer where there are more columns than that.
_VARIANCE_CHUNK = 256


@dataclass(frozen=True)
class LatentSolver:
    """How the latents of rows are solved for.

    Attributes
    ----------
    method : {"auto", "newton", "anderson", "picard"}
        "auto" is Newton's method for up to 16 components, for families without a bound of the
        variance, whose curvature differs too much between rows to be shared, and for several
        layers; else Anderson acceleration with a shared curvature, and Newton's method for the
        rows it leaves unsolved.
    tol : float
        Scaled residual at which a row is solved.
    max_iter : int
        Iterations of each row, at most.
    """

    method: str
    tol: float
    max_iter: int

    def to_within(self, tol: float) -> "LatentSolver":
        """Return the same with a tolerance of no less than ``tol``."""
        return replace(self, tol=max(self.tol, tol))


@dataclass(frozen=True)
class _Plan:
    """What a way of solving comes to for one model.

    Attributes
    ----------
    solver : Solver
    tol : float
    max_iter : int
    is_bounded : bool
        Whether the variance has a bound, so that rows share a curvature.
    is_finished : bool
        Whether Newton's method goes on with the rows that are left.
    is_quadratic : bool
        Whether one step with the shared curvature is one of Newton's.
    stages : tuple of float
        Widths over which the kinks of the maps are rounded off, one after another.
    """

    solver: Solver
    tol: float
    max_iter: int
    is_bounded: bool
    is_finished: bool
    is_quadratic: bool
    stages: tuple[float, ...]

    @classmethod
    def of(
        cls, setting: Setting, model: LatentModel, solver: LatentSolver, stages: tuple[float, ...]
    ) -> "_Plan":
        family, method = setting.family, solver.method
        is_bounded = family.variance_bound is not None
        is_wide = model.loadings.shape[1] > _NEWTON_RANK and not model.upper
        is_finished = method == "auto" and is_bounded and is_wide
        if method == "auto":
            method = "anderson" if is_finished else "newton"
        return cls(
            SOLVERS[method],
            solver.tol,
            solver.max_iter,
            is_bounded,
            is_finished,
            is_quadratic=is_finished and family.has_constant_variance,
            stages=stages,
        )

    def problem(
        self,
        setting: Setting,
        model: LatentModel,
        curvature: Tensor | Callable[[], Tensor] | None,
    ) -> LatentProblem:
        """Pose the problem with what shapes the steps of the solver."""
        bound = setting.family.variance_bound
        if self.solver.forms_hessians:
            curvature = None
        elif curvature is None and bound is not None:
            curvature = torch.full_like(model.intercept, bound)
        elif callable(curvature):
            curvature = curvature()
        if curvature is not None:
            curvature = curvature.to(model.loadings.dtype)
        return latent_problem(setting, model, curvature, shared_map=self.is_bounded)

    def chunk_rows(self, problem: LatentProblem) -> int:
        """Rows to be solved at a time."""
        return problem.hessian_rows() if self.solver.forms_hessians else problem.chunk_rows()

    def solve(self, part: LatentProblem, start: Tensor, batch_rows: int) -> FixedPointResult:
        """Solve the rows of a chunk, with the Hessians of ``batch_rows`` at a time."""
        result = self._in_stages(part, start) if self.stages else self._once(part, start)
        if not self.solver.forms_hessians and not self.is_bounded:
            confirm(part, result, tol=self.tol, batch_rows=batch_rows)
        if self.is_quadratic:
            # The shared step is Newton's own, but where entries are missing: it leaves rounding.
            rows = torch.arange(len(start), device=start.device)
            result.value.add_(part.shaped_step(part.bare_gradient(result.value, rows), rows))
        if self.is_finished:
            self._finish(part, result, batch_rows)
        return result

    def _once(self, part: LatentProblem, start: Tensor, tol: float = 0.0) -> FixedPointResult:
        return self.solver(part, start, tol=max(tol, self.tol), max_iter=self.max_iter)

    def _in_stages(self, problem: LatentProblem, value: Tensor) -> FixedPointResult:
        """Solve rows through kinks that are rounded off over ever smaller widths."""
        rows = torch.arange(len(value), device=value.device)
        is_done = torch.zeros_like(rows, dtype=torch.bool)
        residual = torch.full_like(value[:, 0], torch.inf)
        final = FixedPointResult(
            value.clone(), residual, torch.zeros_like(is_done), torch.zeros_like(rows)
        )
        last, every = value, problem
        for at, width in enumerate(self.stages):
            problem.smooth(width)
            start = value
            if at > 1:
                # What lies on a kink comes closer to it in proportion to the width. From where the
                # last width left it Newton's method would have to search for the narrower ramp.
                wider, wide = self.stages[at - 2 : at]
                guess = torch.lerp(value, last, (width - wide) / (wider - wide))
                these = torch.arange(len(rows), device=rows.device)
                start = better_of(problem, guess, value, these, problem.objective(value, these))
            # On the ramp rounding of a predictor is that much of the slope.
            result = self._once(problem, start, torch.finfo(value.dtype).eps / width)
            result = replace(result, n_iter=final.n_iter[rows] + result.n_iter)
            # Beside a ramp steeper than the accuracy wants, digits may be too few for the rest.
            stay = (~is_done | result.converged).nonzero().squeeze(1)
            if len(stay) < len(rows):
                problem, result = problem.select(stay), result.take(stay)
                rows, value, is_done = rows[stay], value[stay], is_done[stay]
            final.put_(rows, result)
            last, value = value, result.value
            is_done |= result.converged & (width <= self.tol * problem.extent(value))
        # What looks at the rows after this means the kinks as narrow as they get.
        every.smooth(self.stages[-1])
        return final

    def _finish(self, part: LatentProblem, result: FixedPointResult, batch_rows: int) -> None:
        """Solve by Newton's method the rows that are left, in place."""
        unsolved = (~result.converged).nonzero().squeeze(1)
        for left in unsolved.split(batch_rows):
            if not len(left):
                break
            rest = newton(
                part.select(left), result.value[left], tol=self.tol, max_iter=self.max_iter
            )
            n_iter = result.n_iter[left] + rest.n_iter
            result.put_(left, replace(rest, n_iter=n_iter))


def solve_latents(
    setting: Setting,
    model: LatentModel,
    solver: LatentSolver,
    *,
    curvature: Tensor | Callable[[], Tensor] | None = None,
    start: Tensor | None = None,
    check_start: bool = False,
    start_map: Tensor | None = None,
    rounded: bool = False,
) -> FixedPointResult:
    """MAP latents of every row in all layers, chunk by chunk.

    Parameters
    ----------
    setting : Setting
    model : LatentModel
        Whose own latents are of no account.
    solver : LatentSolver
    curvature : Tensor of shape (p,) or callable that returns it, optional
        Average variance of each feature, which preconditions Anderson acceleration and is not
        asked for otherwise; by default its bound, where there is one.
    start : Tensor of shape (n, k), optional
        Where to start; a row that would be outside the domain of the family starts from zero.
    check_start : bool
        Whether ``start`` may be far off. Where the variance has no bound few steps lead back from
        there: rows of a convex problem in which it is worse than zero then start from zero.
    start_map : Tensor of shape (k + 1, k), optional
        From :func:`fit_start_map`: where Newton's method and Anderson acceleration start without
        ``start``, with four components or more in one layer whose rows have one solution. All else
        starts from zero, which is inside any domain.
    rounded : bool
        Whether the kinks of the maps are left as round as ``setting`` has them for training,
        which is what its steps want, at a small part of the cost of latents that are exact.

    Returns
    -------
    FixedPointResult
    """
    dtype = model.loadings.dtype
    kinked = has_kinks(setting.family, model.upper, setting.hidden_map)
    stages: tuple[float, ...] = WIDTHS if kinked else ()
    if rounded:
        # Rows that start somewhere have come through the wider ones.
        stages = tuple(one for one in stages if start is None and one >= TRAINING_WIDTH)
    elif kinked and dtype != torch.float64:
        # Next to a kink float32 cannot tell the sides apart.
        setting, model = setting.double(), model.to(torch.float64)
        start = None if start is None else start.double()
    plan = _Plan.of(setting, model, solver, stages)
    problem = plan.problem(setting, model, curvature)
    if plan.solver.starts_from_zero:
        start_map = None
    zero = model.loadings.new_zeros(problem.n_rows, problem.r)
    begin = first_latents(problem, setting, zero, start, check_start, start_map)
    batch_rows = problem.hessian_rows()

    def work(low: int, high: int) -> FixedPointResult:
        return plan.solve(problem.chunk(low, high), begin[low:high], batch_rows)

    parts = map_chunks(work, problem.n_rows, plan.chunk_rows(problem), begin.device)
    joined: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in OF_ROWS
    }
    return FixedPointResult(**joined).to(dtype)


def feature_variances(setting: Setting, model: LatentModel) -> Tensor:
    """Average variance of each feature (p,) over at most 4,096 evenly spaced rows."""
    every = -(-len(model.latents) // _VARIANCE_ROWS)
    some = replace(model, latents=model.latents[::every])
    offset = None if setting.row_offset is None else setting.row_offset[::every]
    n, size, device = _chunks_of_variances(some)
    total = sum_chunks(
        lambda low, high: _variances(setting, some, offset, low, high).sum(0, dtype=torch.float64),
        n,
        size,
        device,
    )
    return (total / n).to(model.latents.dtype)


def row_variances(setting: Setting, model: LatentModel) -> Tensor:
    """Average variance of each row (n,) over at most 1,024 evenly spaced features."""
    every = -(-len(model.loadings) // _VARIANCE_COLUMNS)
    some = replace(
        model, loadings=model.loadings[::every].contiguous(), intercept=model.intercept[::every]
    )
    offset = setting.row_offset
    parts = map_chunks(
        lambda low, high: _variances(setting, some, offset, low, high).mean(
            1, dtype=torch.float64
        ),
        *_chunks_of_variances(some),
    )
    return torch.cat(parts).to(model.latents.dtype)


def _chunks_of_variances(model: LatentModel) -> tuple[int, int, torch.device]:
    """Return the number of rows, how many to look at together, and where they are."""
    size = min(_VARIANCE_CHUNK, _VARIANCE_CHUNK * _VARIANCE_COLUMNS // len(model.loadings))
    return len(model.latents), max(1, size), model.latents.device


def _variances(
    setting: Setting, model: LatentModel, offset: Tensor | None, low: int, high: int
) -> Tensor:
    """Variances of the entries of the rows ``low:high`` at the latents of a model."""
    eta = model.predictor(model.latents[low:high])
    if offset is not None:
        eta += offset[low:high].unsqueeze(1)
    variance = setting.family.statistics_(eta, variance=True)[2]
    # Entries that are missing may lie outside the domain.
    return torch.where(torch.isfinite(variance), variance, 0.0)
