"""Rows with several solutions: fits in terms of the one that is found from zero.

Latents that are carried from one iteration to the next come to solutions that a row does not find
on its own, and parameters that serve those need not serve the ones that `transform` finds.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from skdeq._balance import balance
from skdeq._latent_model import LatentModel
from skdeq._latents import LatentSolver, solve_latents
from skdeq._scoring import Scoring
from skdeq._setting import Setting
from skdeq._stochastic import mean_objective
from skdeq._trace import telling_gain

__all__ = ["descend", "objective_of"]

# What a step is cut by that does not lower the objective, and how many lengths are tried.
_CUT, _MOST_TRIALS = 0.3, 4
# Share of the gain below which a step ends the descent.
_LEAST_GAIN = 1e-3
# Steps at most: most of what there is to gain comes with the first few.
_MOST_STEPS = 20


def objective_of(setting: Setting, model: LatentModel) -> float:
    """Mean objective of a model and its latents, with kinks as they are."""
    return mean_objective(setting.smoothed(0.0), setting.loadings.parameters(model), model.latents)


def descend(scoring: Scoring, solver: LatentSolver, model: LatentModel) -> LatentModel:
    """Go on from a model with steps that lower the objective at latents found from zero.

    Parameters
    ----------
    scoring : Scoring
        The fit that has led here, whose count of iterations and losses go on.
    solver : LatentSolver
    model : LatentModel

    Returns
    -------
    LatentModel
    """
    setting, trace = scoring.setting, scoring.trace

    def from_zero(model: LatentModel) -> tuple[LatentModel, float]:
        solved = solve_latents(setting, model, solver, rounded=True)
        model = replace(model, latents=solved.value)
        return model, mean_objective(setting, setting.loadings.parameters(model), solved.value)

    model, objective = from_zero(model)
    length = 1.0
    for _ in range(min(_MOST_STEPS, scoring.max_iter - trace.n_iter)):
        # It moves zero, and may by itself make the objective larger.
        turned = balance(setting, model)(model)
        found, length = _shortened(turned, scoring.columns(turned), length, objective, from_zero)
        if found is None:
            break
        gained = objective - found[1]
        model, objective = found
        length = min(1.0, length / _CUT)
        if scoring.count(objective, model) or gained <= _LEAST_GAIN * telling_gain(
            trace.null_objective, objective
        ):
            break
    return model


def _shortened(
    model: LatentModel,
    goal: LatentModel,
    length: float,
    objective: float,
    from_zero: Callable[[LatentModel], tuple[LatentModel, float]],
) -> tuple[tuple[LatentModel, float] | None, float]:
    """Go as far of the way to a goal as lowers the objective; (point, length), None if nowhere."""
    for _ in range(_MOST_TRIALS):
        point, found = from_zero(
            LatentModel(
                torch.lerp(model.loadings, goal.loadings, length),
                torch.lerp(model.intercept, goal.intercept, length),
            )
        )
        if found < objective:
            return (point, found), length
        length *= _CUT
    return None, length
