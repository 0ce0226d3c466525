"""Minibatch fitting by Adam along the gradient at the MAP latents, and streams of batches.

By the envelope theorem the gradient of the mean objective in loadings and intercept needs no
derivative of the latents: they minimise the very term that depends on them.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from skdeq._family import Family
from skdeq._hierarchy import split_layers
from skdeq._latents import LatentSolver, solve_latents
from skdeq._loadings import Pins
from skdeq._map_problem import MapProblem, over_chunks
from skdeq._optimiser_state import OptimiserState
from skdeq._setting import Setting, column_problem, layer_settings
from skdeq.fixed_point import FixedPointResult

__all__ = [
    "envelope_gradient",
    "hold",
    "mean_objective",
    "restart",
    "shorten",
    "solve_and_step",
]

_MAX_HALVINGS = 20


def hold(setting: Setting, parameters: list[Tensor]) -> None:
    """Take back, in place, what the free parameters of columns that are not fitted have moved."""
    if setting.pins is not None:
        setting.loadings.hold_(parameters, setting.pins)


def restart(
    setting: Setting, parameters: list[Tensor], state: OptimiserState, pins: Pins
) -> OptimiserState:
    """Begin some columns anew, in place, and return what Adam knows of the others."""
    setting.loadings.hold_(parameters, pins)
    if not state:
        return []
    own, columns = setting.loadings.own, pins.columns.cpu().numpy()
    known = {name: value.copy() for name, value in state[own].items()}
    known["exp_avg"][columns] = 0
    # Zero, corrected for no more at this step, would make for steps several times as long.
    known["exp_avg_sq"][columns] = known["exp_avg_sq"].mean(axis=0)
    return [*state[:own], known, *state[own + 1 :]]


def mean_objective(setting: Setting, parameters: list[Tensor], latents: Tensor) -> float:
    """Mean objective of free parameters and the latents (n, K) of all layers side by side."""
    total = 0.0
    for given, matrix, here, unit in _layers(setting, parameters, latents):
        problem = column_problem(given, here)
        (objective,) = over_chunks(lambda part, *at: (part.objective(*at),), problem, matrix)
        total += unit * _mean(given, objective, here)
    return total


def envelope_gradient(
    setting: Setting, parameters: list[Tensor], latents: Tensor
) -> tuple[list[Tensor], float]:
    """Gradients of the mean objective in the free parameters at MAP latents; the objective.

    Parameters
    ----------
    setting : Setting
    parameters : list of Tensor
        As `setting.loadings` has them.
    latents : Tensor of shape (n, K)
        Of all layers side by side.
    """
    gradients, total = [], 0.0
    for given, matrix, here, unit in _layers(setting, parameters, latents):
        problem = column_problem(given, here)
        objective, gradient = over_chunks(MapProblem.value_and_gradient, problem, matrix)
        gradients.append(gradient * (unit / given.total_weight))
        total += unit * _mean(given, objective, here)
    return setting.loadings.gradients(gradients), total


def _layers(
    setting: Setting, parameters: list[Tensor], latents: Tensor
) -> list[tuple[Setting, Tensor, Tensor, float]]:
    """Of each layer what is given, its parameters, its latents, and the unit of its objective."""
    model = setting.loadings.model(parameters)
    parts = [one.contiguous() for one in split_layers(latents, model.upper)]
    units = [1.0, *(setting.alpha for _ in model.upper)]
    return list(zip(layer_settings(setting, parts), model.matrices(), parts, units, strict=True))


def _mean(setting: Setting, objective: Tensor, latents: Tensor) -> float:
    """Mean objective from those of the features (p,) and the prior of latents (n, k)."""
    prior = 0.5 * setting.alpha * setting.weighted_sum(latents.double().square().sum(1))
    return (float(objective.sum()) - setting.log_base + prior) / setting.total_weight


def solve_and_step(
    setting: Setting,
    parameters: list[Tensor],
    optimiser: torch.optim.Optimizer,
    solver: LatentSolver,
    share: float = 1.0,
    *,
    start: Tensor | None = None,
    curvature: Tensor | None = None,
) -> tuple[FixedPointResult, float]:
    """Solve the latents of a batch and move ``parameters`` by one step.

    A step that takes the batch, or rows at zero, out of the domain of the family is halved until
    it does not.

    Parameters
    ----------
    setting : Setting
    parameters : list of Tensor
        As `setting.loadings` has them.
    optimiser : Optimizer
        Of the parameters.
    solver : LatentSolver
    share : float
        Weight of the batch in units of the mean weight of all batches.
    start : Tensor of shape (n, k), optional
        Where the latents start; by default from zero.
    curvature : Tensor of shape (p,), optional
        As :func:`~skdeq._latents.solve_latents` wants it.
    """
    before = [one.clone() for one in parameters]
    model = setting.loadings.model(before)
    solution = solve_latents(
        setting, model, solver, start=start, curvature=curvature, rounded=True
    )
    gradients, objective = envelope_gradient(setting, parameters, solution.value)
    for one, gradient in zip(parameters, gradients, strict=True):
        one.grad = torch.nan_to_num(share * gradient, nan=0.0, posinf=0.0, neginf=0.0)
    optimiser.step()
    pairs, own = list(zip(parameters, before, strict=True)), setting.loadings.own
    shorten(setting.family, model.intercept, [pairs[own]], pairs[:own])
    hold(setting, parameters)
    if not setting.family.domain.is_real_line:
        for _ in range(_MAX_HALVINGS):
            if _is_inside(setting, parameters, solution.value):
                break
            for one, old in pairs:
                one.copy_(torch.lerp(old, one, 0.5))
        else:
            for one, old in pairs:
                one.copy_(old)
    return solution, objective


def shorten(
    family: Family,
    intercept: Tensor,
    own: Sequence[tuple[Tensor, Tensor]],
    shared: Sequence[tuple[Tensor, Tensor]],
) -> None:
    """Shorten, in place, a step of the parameters next to the data whose family has an end.

    Adam's steps are as long as its rate, whatever the units. Near the end of a domain canonical
    parameters are small, those of amounts in the thousands a thousandth: there a step is in units
    of the standard deviation that one observation leaves, at most one.

    Parameters
    ----------
    family : Family
    intercept : Tensor of shape (p,)
        Before the step.
    own : sequence of pairs of Tensor of shape (p,) or (p, ...)
        Parameters of each feature, after and before it.
    shared : sequence of pairs of Tensor
        Those that serve all features, as kernels do.
    """
    if family.domain.is_real_line:
        return
    curvature = family.energy(intercept, torch.zeros_like(intercept))[2]
    length = curvature.rsqrt().clamp_max(1.0)
    for one, old in own:
        one.copy_(torch.lerp(old, one, length.view(-1, *(1,) * (one.dim() - 1))))
    for one, old in shared:
        one.copy_(torch.lerp(old, one, length.min()))


def _is_inside(setting: Setting, parameters: list[Tensor], latents: Tensor) -> bool:
    """Whether rows with these latents are in the domain, and rows that start from zero."""
    at_zero = setting.family.log_partition(setting.loadings.intercept(parameters))
    if not bool(torch.isfinite(at_zero).all()):
        return False
    return bool(np.isfinite(mean_objective(setting, parameters, latents)))
