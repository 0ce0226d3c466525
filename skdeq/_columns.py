"""Steps of loadings and intercepts: the first, and what of a step may be taken."""

from dataclasses import replace

import torch
from torch import Tensor

from skdeq._balance import balance
from skdeq._chunks import map_chunks
from skdeq._latent_model import LatentModel
from skdeq._latents import row_variances
from skdeq._map_problem import MapProblem, over_chunks
from skdeq._newton import backtrack
from skdeq._setting import Setting, column_problem

__all__ = ["first_loadings", "stepped"]

# Halvings of a step along the limit of an intercept.
_MOST_CUTS = 6


def first_loadings(setting: Setting, model: LatentModel) -> LatentModel:
    """First loadings for latents of a start: one safeguarded Newton step from zero.

    Without loadings the variances of all features have the same shape over the rows, so
    that the step with a shared curvature is the Newton step.
    """
    curvature = row_variances(setting, model)
    problem = column_problem(setting, model.latents, curvature)
    start = torch.cat([model.loadings, model.intercept.unsqueeze(1)], dim=1)

    def step(part: MapProblem, point: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        objective, gradient = part.value_and_gradient(point, rows)
        direction = -part.shaped_step(gradient, rows)
        every = torch.ones_like(rows, dtype=torch.bool)
        return backtrack(part, point, direction, gradient, objective, rows, every)

    solution, _ = over_chunks(step, problem, start)
    model = _shrunk(setting, stepped(setting, problem, start, solution, model.latents))
    return balance(setting, model)(model)


def _shrunk(setting: Setting, model: LatentModel) -> LatentModel:
    r"""Give loadings of unit latents the sizes that they have at the optimum, where known.

    Of complete Gaussian data of variance v the optimum is principal components whose sizes
    are less by :math:`\sqrt{\alpha \beta} / v`, as of a penalised nuclear norm.
    """
    family, decay = setting.family, setting.weight_decay
    known = family.has_constant_variance and decay > 0
    if not known or setting.observations.missing is not None:
        return model
    variance = family.variance(model.intercept[:1])
    penalised = model.loadings.norm(dim=0)
    size = penalised * (1 + decay / variance) - (setting.alpha * decay) ** 0.5 / variance
    shares = torch.where(penalised > 0, size.clamp_min(0) / penalised, 0.0)
    return replace(model, loadings=model.loadings * shares)


def stepped(
    setting: Setting, problem: MapProblem, start: Tensor, end: Tensor, latents: Tensor
) -> LatentModel:
    """Model after a step of the columns (p, k + 1), in so far as they may take it."""
    matrix = _inside(setting, problem, start, end)
    loadings, intercept = matrix[:, :-1].contiguous(), matrix[:, -1].clone()
    if setting.pins is not None:
        setting.pins.hold_(intercept, loadings)
    return LatentModel(loadings, intercept, latents)


def _inside(setting: Setting, problem: MapProblem, start: Tensor, end: Tensor) -> Tensor:
    """Take back what of the columns' steps leads their intercepts out of their limits.

    A column with gaps, seen on one side of the latents alone, would not mind; the rows would.
    """
    limits = setting.intercept_limits
    if limits is None:
        return end

    def work(first: int, last: int) -> Tensor:
        before, goal = start[first:last], end[first:last]
        low, high = (limit[first:last] for limit in limits)
        out = (~((goal[:, -1] >= low) & (goal[:, -1] <= high))).nonzero().squeeze(1)
        if not len(out):
            return goal
        part = problem.chunk(first, last)
        old, new = before[out], goal[out]
        new[:, -1].clamp_(low[out], high[out])
        most = part.objective(old, out)
        length = torch.ones_like(new[:, :1])
        for _ in range(_MOST_CUTS):
            worse = ~(part.objective(torch.lerp(old, new, length), out) <= most)
            if not bool(worse.any()):
                break
            length = torch.where(worse.unsqueeze(1), 0.5 * length, length)
        else:
            length = torch.where(worse.unsqueeze(1), 0.0, length)
        return goal.index_copy(0, out, torch.lerp(old, new, length))

    return torch.cat(map_chunks(work, len(start), problem.chunk_rows(), start.device))
