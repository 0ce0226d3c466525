"""Minibatch fitting by Adam along the gradient at the MAP latents, and streams of batches.

By the envelope theorem the gradient of the mean objective in loadings and intercept needs no
derivative of the latents: they minimise the very term that depends on them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from skdeq._chunks import map_chunks
from skdeq._latents import solve_latents
from skdeq._model import Setting, column_problem
from skdeq.fixed_point import FixedPointResult

_MAX_HALVINGS = 20

__all__ = ["AdamState", "envelope_gradient", "solve_and_step"]


@dataclass
class AdamState:
    """Moments of Adam for the loadings and intercept together, as numpy arrays.

    Attributes
    ----------
    step : int
        Steps taken.
    first, second : ndarray of shape (p, k + 1)
        Running means of the gradient and of its square.
    """

    step: int
    first: np.ndarray
    second: np.ndarray

    @classmethod
    def zeros(cls, p: int, k: int) -> "AdamState":
        """State before the first step."""
        return cls(0, np.zeros((p, k + 1)), np.zeros((p, k + 1)))


def envelope_gradient(
    setting: Setting, parameters: Tensor, latents: Tensor
) -> tuple[Tensor, float]:
    """Gradient (p, k + 1) of the mean objective at MAP latents, and the objective."""
    problem = column_problem(setting, latents)

    def work(low: int, high: int) -> tuple[Tensor, Tensor]:
        part = problem.chunk(low, high)
        rows = torch.arange(high - low, device=parameters.device)
        objective, gradient = part.value_and_gradient(parameters[low:high], rows)
        return gradient, objective

    parts = map_chunks(work, len(parameters), problem.chunk_rows(), parameters.device)
    gradient = torch.cat([one for one, _ in parts]) / setting.total_weight
    objective = float(torch.cat([two for _, two in parts]).sum()) - setting.log_base
    prior = 0.5 * setting.alpha * setting.weighted_sum(latents.double().square().sum(1))
    return gradient, (objective + prior) / setting.total_weight


def solve_and_step(
    setting: Setting,
    parameters: Tensor,
    optimiser: torch.optim.Optimizer,
    curvature: Tensor | None = None,
    **fixed_point,
) -> tuple[FixedPointResult, float]:
    """Solve the latents of a batch and move ``parameters`` (p, k + 1) by one step.

    A step that takes the batch out of the domain of the family is halved until it does not.
    """
    before = parameters.clone()
    loadings, intercept = before[:, :-1].contiguous(), before[:, -1].contiguous()
    solution = solve_latents(setting, loadings, intercept, curvature=curvature, **fixed_point)
    gradient, objective = envelope_gradient(setting, parameters, solution.value)
    parameters.grad = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
    optimiser.step()
    if setting.family.domain.low > -torch.inf or setting.family.domain.high < torch.inf:
        for _ in range(_MAX_HALVINGS):
            if np.isfinite(envelope_gradient(setting, parameters, solution.value)[1]):
                break
            parameters.copy_(torch.lerp(before, parameters, 0.5))
        else:
            parameters.copy_(before)
    return solution, objective


def make_adam(parameters: Tensor, learning_rate: float, state: AdamState) -> torch.optim.Adam:
    """Torch's Adam on ``parameters`` going on from ``state``."""
    optimiser = torch.optim.Adam([parameters], lr=learning_rate)
    if state.step:
        optimiser.state[parameters] = {
            "step": torch.tensor(float(state.step)),
            "exp_avg": torch.from_numpy(state.first).to(parameters),
            "exp_avg_sq": torch.from_numpy(state.second).to(parameters),
        }
    return optimiser


def adam_state(parameters: Tensor, optimiser: torch.optim.Adam) -> AdamState:
    """State to go on from."""
    state = optimiser.state[parameters]
    return AdamState(
        int(state["step"]),
        state["exp_avg"].double().cpu().numpy(),
        state["exp_avg_sq"].double().cpu().numpy(),
    )
