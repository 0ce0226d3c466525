"""Where rows start that are to be solved: at what is given, predicted, or at zero."""

import torch
from torch import Tensor

from skdeq._chunks import map_chunks
from skdeq._fixed_point_problem import LatentProblem
from skdeq._latent_model import LatentModel
from skdeq._map_problem import MapProblem
from skdeq._setting import Setting, row_problem

__all__ = ["better_of", "first_latents", "fit_start_map"]

# From this rank on a prediction of the latents costs less than the steps it saves.
_LEAST_RANK_TO_PREDICT = 4
# Predictors that a start has to come to for its objective to be looked at.
_FAR = 100.0
# Rows that the prediction is fitted to, at most.
_PREDICTED_ROWS = 4096


def first_latents(
    problem: LatentProblem,
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


def _inside(problem: LatentProblem, start: Tensor) -> Tensor:
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
    index = torch.arange(0, n, -(-n // _PREDICTED_ROWS), device=device)
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
        return _checked_start(problem, _predicted(start_map, _gradient_at_zero(problem)))

    def work(low: int, high: int) -> Tensor:
        part, rows = problem.chunk(low, high), torch.arange(high - low, device=design.device)
        zero = design.new_zeros(high - low, problem.r)
        objective, gradient = part.value_and_gradient(zero, rows)
        return better_of(part, _predicted(start_map, gradient), zero, rows, objective)

    return torch.cat(map_chunks(work, problem.n_rows, problem.chunk_rows(), design.device))


def _predicted(start_map: Tensor, gradient: Tensor) -> Tensor:
    predicted = torch.addmm(start_map[-1], gradient, start_map[:-1])
    # A row of which nothing is observed is solved at zero, exactly.
    return torch.where((gradient != 0).any(1, keepdim=True), predicted, 0.0)


def _checked_start(problem: MapProblem, start: Tensor) -> Tensor:
    """Replace a start by zero in the rows that it would lead astray."""
    # Where the variance has a bound, nothing nearer does any harm.
    least = _FAR if problem.scale_is_bounded else 0.0

    def work(low: int, high: int) -> Tensor:
        part, given = problem.chunk(low, high), start[low:high]
        rows = (part.extent(given) > least).nonzero().squeeze(1)
        if not len(rows):
            return given
        zero = torch.zeros_like(given[rows])
        kept = better_of(part, given[rows], zero, rows, part.objective(zero, rows))
        return given.index_copy(0, rows, kept)

    return torch.cat(map_chunks(work, problem.n_rows, problem.chunk_rows(), start.device))


def better_of(
    problem: LatentProblem,
    guess: Tensor,
    other: Tensor,
    rows: Tensor,
    objective_of_other: Tensor,
) -> Tensor:
    """Replace a guess in the rows whose objective it does not lower."""
    better = problem.objective(guess, rows) < objective_of_other
    return torch.where(better.unsqueeze(1), guess, other)
