"""Latents of given rows under a fitted model, and the likelihoods that rest on them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from skdeq._chunks import map_chunks
from skdeq._hierarchy import HierarchyProblem
from skdeq._latent_model import LatentModel
from skdeq._map_problem import MapProblem
from skdeq._newton import confirm
from skdeq._setting import Setting, latent_problem, row_problem
from skdeq.fixed_point import (
    SOLVERS,
    SOLVERS_FROM_ZERO,
    SOLVERS_WITH_HESSIANS,
    FixedPointResult,
    newton,
)

__all__ = [
    "LatentSolver",
    "fit_start_map",
    "laplace_log_likelihood",
    "solve_latents",
    "typical_variance",
]

# Up to this rank a Hessian for every row costs less than the iterations it saves.
_NEWTON_RANK = 16
# From this rank on a prediction of the latents costs less than the steps it saves.
_LEAST_RANK_TO_PREDICT = 4
# Sample sizes of the average variances, which only shape steps.
_VARIANCE_ROWS = 4096
_VARIANCE_COLUMNS = 1024
# Rows whose variances are formed at a time, fewer where there are more columns than that.
_VARIANCE_CHUNK = 256
# Rows that are scored at a time, and entries of their Hessians, at most.
_SCORED_ROWS, _SCORED_ENTRIES = 1024, 2**23


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
        Whether the kinks of the maps are left as round as in training, which is what its steps
        want, at a small part of the cost of latents that are exact.

    Returns
    -------
    FixedPointResult
    """
    loadings, method, tol = model.loadings, solver.method, solver.tol
    kinks = setting.family.widths or (setting.hidden_map.widths if model.upper else ())
    stages = kinks[1:]
    if rounded:
        setting = setting.rounded_off()
        # Rows that start somewhere have come through the wider ones.
        stages = () if start is not None else tuple(one for one in stages if one >= kinks[0])
    elif kinks and loadings.dtype != torch.float64:
        # Next to a kink float32 cannot tell the sides apart.
        wide = None if start is None else start.double()
        result = solve_latents(setting.double(), model.to(torch.float64), solver, start=wide)
        return result.to(loadings.dtype)
    bound = setting.family.variance_bound
    bounded = bound is not None
    finish = method == "auto" and bounded and loadings.shape[1] > _NEWTON_RANK and not model.upper
    quadratic = finish and setting.family.self_concordance == 0
    if method == "auto":
        method = "anderson" if finish else "newton"
    if method in SOLVERS_WITH_HESSIANS:
        curvature = None
    elif curvature is None and bound is not None:
        curvature = torch.full_like(model.intercept, bound)
    elif callable(curvature):
        curvature = curvature()
    problem = latent_problem(setting, model, curvature, shared_map=bounded)
    if method in SOLVERS_FROM_ZERO:
        start_map = None
    zero = loadings.new_zeros(problem.n_rows, problem.r)
    begin = _first_latents(problem, setting, zero, start, check_start, start_map)

    def solve(part: Any, value: Tensor, tol: float = tol) -> FixedPointResult:
        return SOLVERS[method](part, value, tol=tol, max_iter=solver.max_iter)

    def work(low: int, high: int) -> FixedPointResult:
        part, value = problem.chunk(low, high), begin[low:high]
        result = _in_stages(solve, part, value, stages, tol) if stages else solve(part, value)
        if method not in SOLVERS_WITH_HESSIANS and not bounded:
            confirm(part, result, tol=tol, batch_rows=problem.hessian_rows())
        if quadratic:
            # The shared step is Newton's own, but where entries are missing: it leaves rounding.
            rows = torch.arange(high - low, device=value.device)
            result.value.add_(part.shaped_step(part.bare_gradient(result.value, rows), rows))
        if not finish:
            return result
        unsolved = (~result.converged).nonzero().squeeze(1)
        for left in unsolved.split(problem.hessian_rows()):
            if not len(left):
                break
            rest = newton(part.select(left), result.value[left], tol=tol, max_iter=solver.max_iter)
            for field in ("value", "residual", "converged"):
                getattr(result, field)[left] = getattr(rest, field)
            result.n_iter[left] += rest.n_iter
        return result

    size = problem.hessian_rows()
    if method not in SOLVERS_WITH_HESSIANS and isinstance(problem, MapProblem):
        size = problem.chunk_rows()
    parts = map_chunks(work, problem.n_rows, size, begin.device)
    fields = ("value", "residual", "converged", "n_iter")
    return FixedPointResult(
        *[torch.cat([getattr(part, field) for part in parts]) for field in fields]  # type: ignore
    )


def _first_latents(
    problem: MapProblem | HierarchyProblem,
    setting: Setting,
    zero: Tensor,
    start: Tensor | None,
    check_start: bool,
    start_map: Tensor | None,
) -> Tensor:
    """Where the rows start: as they are given, predicted, or at zero, which is in any domain."""
    is_convex = setting.family.is_convex
    convex = problem if isinstance(problem, MapProblem) and is_convex else None
    if start is not None:
        if check_start and convex is not None:
            return _checked_start(convex, start)
        return start if setting.family.domain.is_real_line else _inside(problem, start)
    # Of several solutions the one that is meant is the one found from zero.
    if start_map is not None and convex is not None and convex.r >= _LEAST_RANK_TO_PREDICT:
        return linear_start(convex, start_map)
    return zero


def _in_stages(
    solve: Callable[[Any, Tensor, float], FixedPointResult],
    problem: MapProblem | HierarchyProblem,
    value: Tensor,
    widths: tuple[float, ...],
    tol: float,
) -> FixedPointResult:
    """Solve rows through kinks that are rounded off over ever smaller widths."""
    rows = torch.arange(len(value), device=value.device)
    n_iter, last = torch.zeros_like(rows), value
    for at, width in enumerate(widths):
        problem.smooth(width)
        start = value
        if at > 1:
            # What lies on a kink comes closer to it in proportion to the width. From where the
            # last width left it Newton's method would have to search for the narrower ramp.
            wider, wide = widths[at - 2 : at]
            guess = torch.lerp(value, last, (width - wide) / (wider - wide))
            start = _better_of(problem, guess, value, rows, problem.objective(value, rows))
        # On the ramp rounding of a predictor is that much of the slope.
        result = solve(problem, start, max(tol, torch.finfo(value.dtype).eps / width))
        last, value, n_iter = value, result.value, n_iter + result.n_iter
    return replace(result, n_iter=n_iter)


def _inside(problem: MapProblem | HierarchyProblem, start: Tensor) -> Tensor:
    """Take rows that start outside the domain, such as after a step of the loadings, to zero."""

    def work(low: int, high: int) -> Tensor:
        rows = torch.arange(high - low, device=start.device)
        return torch.isfinite(problem.chunk(low, high).objective(start[low:high], rows))

    parts = map_chunks(work, len(start), problem.hessian_rows(), start.device)
    return torch.where(torch.cat(parts).unsqueeze(1), start, 0.0)


def _gradient_at_zero(problem: MapProblem) -> Tensor:
    def work(low: int, high: int) -> Tensor:
        part = problem.chunk(low, high)
        rows = torch.arange(high - low, device=problem.design.device)
        return part.bare_gradient(problem.design.new_zeros(high - low, problem.r), rows)

    if problem.rows_differ_in_data_alone and problem.n_rows:
        return problem.mean_at_zero() - problem.projection
    parts = map_chunks(work, problem.n_rows, problem.chunk_rows(), problem.design.device)
    return torch.cat(parts)


def fit_start_map(setting: Setting, model: LatentModel) -> Tensor:
    """Fit latents as a linear function of the gradient at zero, by least squares.

    It predicts the latents of a new row from one evaluation to within a tenth or so, which saves
    several iterations.

    Returns
    -------
    Tensor of shape (k + 1, k)
        From at most 4,096 evenly spaced rows; the last row is the intercept.
    """
    n, device = len(model.latents), model.latents.device
    index = torch.arange(0, n, -(-n // _VARIANCE_ROWS), device=device)
    problem = row_problem(setting.take(index), model)
    gradient = _gradient_at_zero(problem).double()
    design = torch.cat([gradient, torch.ones_like(gradient[:, :1])], dim=1)
    gram = design.T @ design
    gram.diagonal().add_(1e-8 * gram.diagonal().mean())
    right = design.T @ model.latents[index].double()
    solution = torch.linalg.solve_ex(gram, right)[0]
    return torch.nan_to_num(solution, nan=0.0, posinf=0.0, neginf=0.0).to(model.latents.dtype)


def linear_start(problem: MapProblem, start_map: Tensor) -> Tensor:
    """Predict the latents of every row from its gradient at zero.

    Where the variance has no bound a prediction may be far off, and is not used unless it is
    better than zero.
    """
    design = problem.design
    if problem.scale_is_bounded:
        return _predicted(start_map, _gradient_at_zero(problem))

    def work(low: int, high: int) -> Tensor:
        part, rows = problem.chunk(low, high), torch.arange(high - low, device=design.device)
        zero = design.new_zeros(high - low, problem.r)
        objective, gradient = part.value_and_gradient(zero, rows)
        return _better_of(part, _predicted(start_map, gradient), zero, rows, objective)

    return torch.cat(map_chunks(work, problem.n_rows, problem.chunk_rows(), design.device))


def _predicted(start_map: Tensor, gradient: Tensor) -> Tensor:
    predicted = torch.addmm(start_map[-1], gradient, start_map[:-1])
    # A row of which nothing is observed is solved at zero, exactly.
    return torch.where((gradient != 0).any(1, keepdim=True), predicted, 0.0)


def _checked_start(problem: MapProblem, start: Tensor) -> Tensor:
    """Replace a start by zero in the rows that it would lead astray."""
    if problem.scale_is_bounded:
        return start

    def work(low: int, high: int) -> Tensor:
        part, rows = problem.chunk(low, high), torch.arange(high - low, device=start.device)
        given, zero = start[low:high], torch.zeros_like(start[low:high])
        return _better_of(part, given, zero, rows, part.objective(zero, rows))

    return torch.cat(map_chunks(work, problem.n_rows, problem.chunk_rows(), start.device))


def _better_of(
    problem: MapProblem | HierarchyProblem,
    guess: Tensor,
    other: Tensor,
    rows: Tensor,
    objective_of_other: Tensor,
) -> Tensor:
    """Replace a guess in the rows whose objective it does not lower."""
    better = problem.objective(guess, rows) < objective_of_other
    return torch.where(better.unsqueeze(1), guess, other)


def laplace_log_likelihood(setting: Setting, model: LatentModel, latents: Tensor) -> Tensor:
    r"""Laplace approximation of log p(x) of each row, less the sum of log h(x).

    ``log p(x | z*) + log p(z*) + k/2 log 2 pi - 1/2 log det H(z*)``, k the number of latents in
    all layers; exact for Gaussian rows, below the top through the identity.

    Returns
    -------
    Tensor of shape (n,), float64
    """
    exact = replace(setting, family=setting.family.exact)
    # Sums over a row lose whole units in float32. A chunk of the data is made wide at a time.
    wide = model.to(torch.float64)

    def work(low: int, high: int) -> Tensor:
        rows = torch.arange(high - low, device=latents.device)
        part = exact.take(rows + low).double()
        objective, _, hessian, _ = latent_problem(part, wide).derivatives(
            latents[low:high].double(), rows, observed=True
        )
        return -objective - 0.5 * _log_determinant(hessian, setting.alpha)

    n, k = latents.shape
    size = max(1, min(_SCORED_ROWS, _SCORED_ENTRIES // k**2))
    return torch.cat(map_chunks(work, n, size, latents.device)) + 0.5 * k * math.log(setting.alpha)


def _log_determinant(hessian: Tensor, least: float) -> Tensor:
    """Log determinants of Hessians; smaller eigenvalues than ``least`` are taken for that."""
    factor, info = torch.linalg.cholesky_ex(hessian)
    result = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
    # Rounding makes the Hessian of enormous loadings indefinite.
    failed = ((info != 0) | ~torch.isfinite(result)).nonzero().squeeze(1)
    if len(failed):
        matrices = torch.nan_to_num(hessian[failed])
        result[failed] = torch.linalg.eigvalsh(matrices).clamp_min(least).log().sum(1)
    return result


def typical_variance(setting: Setting, model: LatentModel, side: str) -> Tensor:
    """Average variance of each feature over rows, or of each row over features.

    Parameters
    ----------
    setting : Setting
    model : LatentModel
    side : {"rows", "columns"}
        The half whose design it is for: "rows" gives a value for each feature, shape (p,).

    Returns
    -------
    Tensor of shape (p,) or (n,)
        From at most 4,096 evenly spaced rows, or 1,024 features.
    """
    latents, offset = model.latents, setting.row_offset
    loadings, intercept = model.loadings, model.intercept
    if side == "rows":
        every = -(-len(latents) // _VARIANCE_ROWS)
        latents = latents[::every]
        offset = None if offset is None else offset[::every]
    else:
        every = -(-len(loadings) // _VARIANCE_COLUMNS)
        loadings, intercept = loadings[::every].contiguous(), intercept[::every]

    def work(low: int, high: int) -> Tensor:
        eta = torch.addmm(intercept, latents[low:high], loadings.T)
        if offset is not None:
            eta += offset[low:high].unsqueeze(1)
        variance = setting.family.statistics_(eta, variance=True)[2]
        # Entries that are missing may lie outside the domain.
        variance = torch.where(torch.isfinite(variance), variance, 0.0)
        wide = torch.float64
        return variance.sum(0, dtype=wide) if side == "rows" else variance.mean(1, dtype=wide)

    size = max(1, min(_VARIANCE_CHUNK, _VARIANCE_CHUNK * _VARIANCE_COLUMNS // len(loadings)))
    parts = map_chunks(work, len(latents), size, latents.device)
    if side == "rows":
        return (torch.stack(parts).sum(0) / len(latents)).to(latents.dtype)
    return torch.cat(parts).to(latents.dtype)
