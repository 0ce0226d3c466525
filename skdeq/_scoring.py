r"""Alternating Fisher scoring: latents given loadings, loadings given latents, and again.

Three things make the plain alternation fast:

* each half takes one Newton step per row with a Hessian of its own, or, where that is dear and
  the variance of the family has a bound, one step with a curvature shared by all rows;
* both blocks are extrapolated by Nesterov momentum, restarted when the objective rises;
* after each iteration the latents are centred and balanced against the loadings in closed form
  (:mod:`skdeq._balance`), which leaves every linear predictor as it is and lowers both penalties.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from skdeq._balance import balance
from skdeq._columns import stepped
from skdeq._latent_model import LatentModel
from skdeq._map_problem import MapProblem, over_chunks
from skdeq._newton import newton_step
from skdeq._progress import Progress
from skdeq._setting import Setting, column_problem, row_problem
from skdeq._trace import Trace, telling_gain

__all__ = ["Scoring"]

# Above this many floating point operations for the Hessians of one half, one curvature is
# shared by all rows if the variance has a bound. Measured on binarised MNIST at k = 50 (1.2e11):
# 2.9 s against 0.2 s. Without a bound curvatures differ too much between rows: on 3,000 rows of
# MNIST as Poisson counts (k = 50) eighty iterations with a shared one came as far as the first
# with Hessians, in eight times the time; gamma rows behaved alike.
_HESSIAN_FLOPS = 1e10
_SMALL_RANK = 16
# Where the variance has a bound, the share of it that is used as curvature at first, and the
# factor by which it goes back towards the whole when the objective rises. Few entries are near
# the bound: on binarised MNIST 0.6 needs four fifths of the iterations, 0.4 fails now and then.
_FIRST_SHARE = 0.6
_CAUTION = 1.5
# Rows from which rounding of an objective is estimated, at most.
_ROUNDED_ROWS = 1024
# Steps in a row that raise the objective, each half as long as the one before, that end a fit.
_MOST_REFUSED = 8


@dataclass
class _Path:
    """Where a fit is, and what came of its last steps.

    Attributes
    ----------
    model, previous : LatentModel
        After the last step, and after the one before it, in the coordinates of `model`.
    accepted : LatentModel
        The last point from which a step was taken: the objective is known there, and no higher
        than at the point before.
    momentum : float
        Of Nesterov's sequence; one at the start and after a step that was too long.
    refused : int
        Steps in a row that raised the objective by more than rounding does.
    """

    model: LatentModel
    previous: LatentModel
    accepted: LatentModel
    momentum: float = 1.0
    refused: int = 0


@dataclass
class Scoring:
    """Fit of the loadings, intercept and latents by alternating Fisher scoring.

    Parameters
    ----------
    setting : Setting
    trace : Trace
        Where losses and iterations are written down.
    max_iter : int
        Iterations at most; an iteration is one half over rows and one over columns.
    tol : float
        Stop once an iteration lowers the objective by less than this share of what the latents
        have gained over the intercept alone, or of fifty times the objective (above one)
        where that is less, twice in a row.
    progress : Progress, optional
        Is told of each iteration.
    finish : callable, optional
        What would come of the fit if it ended with this model, for `progress`.
    """

    setting: Setting
    trace: Trace
    max_iter: int
    tol: float
    progress: Progress = field(default_factory=Progress)
    finish: Callable[[LatentModel], object] = lambda model: model
    # Whether every row has a Hessian of its own.
    exact: bool = field(default=True, init=False)
    # Share of the bound of the variance that stands for the curvature of all rows.
    _share: float = field(default=_FIRST_SHARE, init=False)
    # Of every row's latents, where a step of Newton's method makes it known.
    _residual: Tensor | None = field(default=None, init=False)

    def run(self, model: LatentModel) -> LatentModel:
        """Iterate from ``model``."""
        n, p = self.setting.observations.shape
        k = model.loadings.shape[1]
        self.exact = k <= _SMALL_RANK or 1.0 * n * p * k * k <= _HESSIAN_FLOPS
        self.exact |= self.setting.family.variance_bound is None
        self._share, self._residual = _FIRST_SHARE, None
        path, trace = _Path(model, model, model), self.trace
        quiet = 0
        for iteration in range(1, self.max_iter + 1):
            self.progress.begin()
            last = trace.loss_curve[-1] if trace.loss_curve else torch.inf
            point, objective = self._next_point(path, last)
            moved = self._moved(path, point)
            change = balance(self.setting, moved)
            path.previous, path.model = change(path.model), change(moved)
            trace.loss_curve.append(objective)
            trace.n_iter = iteration
            if not path.refused:
                gained = telling_gain(trace.null_objective, objective)
                quiet = quiet + 1 if last - objective <= self.tol * gained else 0
            trace.converged = quiet >= 2
            stop = self.progress.end(
                objective, partial(self._finished, path), residual=self._residual
            )
            if trace.converged or stop or path.refused > _MOST_REFUSED:
                break
        return self._accepted(path)

    def count(self, objective: float, model: LatentModel) -> bool:
        """Count an iteration that another has taken from here; return whether to stop."""
        self.progress.begin()
        self.trace.loss_curve.append(objective)
        self.trace.n_iter += 1
        return self.progress.end(objective, lambda: self.finish(model))

    def _next_point(self, path: "_Path", last: float) -> tuple[LatentModel, float]:
        """Point with the latents that its step leads to, and its objective.

        Of the point that momentum leads to, of the model itself, and of the point before the last
        step, it is the first whose objective is not above ``last``.
        """
        point = self._extrapolated(path)
        latents, objective = self._rows(point)
        if not objective <= last and point is not path.model:
            point, path.momentum = path.model, 1.0
            self._share = min(1.0, _CAUTION * self._share)
            latents, objective = self._rows(point)
        if objective <= last or self.trace.n_iter == 0:
            path.refused = 0
        else:
            # A step beyond the bound of the curvature went too far, unless it is rounding that
            # tells the two apart: take it back.
            is_rest = objective - last <= self._rounding(point, last)
            path.refused = 0 if is_rest else path.refused + 1
            point, path.momentum, self._share = path.accepted, 1.0, 1.0
            latents, objective = self._rows(point)
        path.accepted = point
        return LatentModel(point.loadings, point.intercept, latents), objective

    def _extrapolated(self, path: "_Path") -> LatentModel:
        """Go on from the model in the direction of the last step, or stay within the domain."""
        following = (1 + (1 + 4 * path.momentum**2) ** 0.5) / 2
        amount, path.momentum = (path.momentum - 1) / following, following
        if amount == 0:
            return path.model
        point = path.model.extrapolate(path.previous, amount)
        domain = self.setting.family.domain
        if domain.is_real_line or bool(domain.contains(point.intercept).all()):
            return point
        path.momentum = 1.0
        return path.model

    def _moved(self, path: "_Path", point: LatentModel) -> LatentModel:
        """Take the columns' step, or less of it where it has been refused before."""
        moved = self.columns(point)
        if path.refused > 1:
            # The same step again would be refused again, for ever.
            moved = point.extrapolate(moved, -(0.5 ** (path.refused - 1)))
        return moved

    def _rounding(self, model: LatentModel, objective: float) -> float:
        """Error that rounding of the predictors may make in a mean objective."""
        latents = model.latents[:: -(-len(model.latents) // _ROUNDED_ROWS)]
        predictors = model.predictor(latents)
        sizes = self.setting.family.log_partition(predictors).abs().double()
        # A step too far, or a gap, beyond the domain is no rounding.
        sizes = torch.where(torch.isfinite(sizes), sizes, 0.0).sum(1)
        # A and T(x) eta nearly cancel far from the origin.
        terms = abs(objective) + 2 * float(sizes.mean())
        return torch.finfo(predictors.dtype).eps * terms

    def _accepted(self, path: "_Path") -> LatentModel:
        """Return the model after the last step, or the one before if that step went too far."""
        if not self.exact and self._share < 1:
            # The last step, beyond the bound of the curvature, has not been looked at yet.
            _, objective = self._rows(path.model)
            if not objective <= self.trace.loss_curve[-1]:
                return path.accepted
        return path.model

    def _finished(self, path: "_Path") -> object:
        return self.finish(self._accepted(path))

    def _rows(self, model: LatentModel) -> tuple[Tensor, float]:
        problem = row_problem(self.setting, model, *self._curvature(model.intercept))
        if self.exact:
            latents, objective, self._residual = _newton_steps(problem, model.latents)
        else:
            latents, objective = over_chunks(_majorised_step, problem, model.latents)
        mean = self.setting.weighted_sum(objective) - self.setting.log_base
        mean /= self.setting.total_weight
        penalty = 0.5 * self.setting.weight_decay * float(model.loadings.double().square().sum())
        return latents, mean + penalty

    def columns(self, model: LatentModel) -> LatentModel:
        """Take one step of the loadings and the intercept at the latents of a model."""
        curvature = self._curvature(model.latents[:, 0])
        problem = column_problem(self.setting, model.latents, *curvature)
        start = torch.cat([model.loadings, model.intercept.unsqueeze(1)], dim=1)
        if self.exact:
            solution, *_ = _newton_steps(problem, start)
        else:
            (solution,) = over_chunks(_majorised_move, problem, start)
        return stepped(self.setting, problem, start, solution, model.latents)

    def _curvature(self, like: Tensor) -> tuple[Tensor | None, bool]:
        """Variances along a design, of so many entries, and whether all rows share them."""
        bound = self.setting.family.variance_bound
        if self.exact or bound is None:
            return None, False
        return torch.full_like(like, self._share * bound), True


def _newton_steps(problem: MapProblem, start: Tensor) -> tuple[Tensor, ...]:
    """One Newton step in every row; also the objectives at the start, and the residuals."""
    tol = 8 * torch.finfo(start.dtype).eps
    return over_chunks(
        lambda part, point, rows: newton_step(part, point, rows, tol), problem, start
    )


def _majorised_step(part: MapProblem, point: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """One step with one curvature for all rows, and the objectives before it.

    With all of the bound of the curvature none can fail.
    """
    objective, gradient = part.value_and_gradient(point, rows)
    return point + part.shaped_step(gradient, rows), objective


def _majorised_move(part: MapProblem, point: Tensor, rows: Tensor) -> tuple[Tensor]:
    """Step as above without the objectives, whose logarithms are dear."""
    return (point + part.shaped_step(part.bare_gradient(point, rows), rows),)
