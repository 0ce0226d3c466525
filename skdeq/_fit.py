"""The two ways to fit all the data: full-batch scoring and epochs of minibatches."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from skdeq._balance import balance
from skdeq._columns import first_loadings
from skdeq._from_zero import descend, objective_of
from skdeq._hierarchy import HiddenLayer, has_one_solution
from skdeq._latent_model import LatentModel
from skdeq._latents import LatentSolver, feature_variances, solve_latents
from skdeq._optimiser_state import forget_steps
from skdeq._progress import Progress
from skdeq._rotation import Moments, fix_signs
from skdeq._scoring import Scoring
from skdeq._setting import Setting, hidden_setting, null_model
from skdeq._spectral import spectral_start
from skdeq._stochastic import hold, mean_objective, solve_and_step
from skdeq._trace import MOST_LOST, UNTOLD, Trace, telling_gain

__all__ = ["FitOptions", "fit_full_batch", "fit_minibatches"]

_BATCH_SIZE = 256
# Iterations after which two starts are compared, and rows, at most. All rows of MNIST as counts
# (k = 50) would take as long as eight iterations of the fit, of which four are lost.
_TRIAL, _TRIAL_ROWS = 4, 4096
# Rows that the first kernels of a convolution are made of, and rows and scales that they are
# tried on.
_PATCHED_ROWS, _SCALED_ROWS = 2000, 500
_HALVINGS, _MOST_HALVINGS = 8, 60
# How often a move of the latents may be halved that takes intercepts out of their domain.
_MOST_CUTS = 10
# Iterations of each layer before all are trained together.
_GREEDY = 20
# Scaled residual up to which latents are solved for one step of a minibatch.
_LOOSE = 1e-3
# The same for the latents of a whole fit whose iterations form no Hessians: a digit costs several
# passes over the data, and the moments of the latents, which are all that is kept, need few.
_CLOSE = 1e-4
# Loss of an epoch, as a share of what the best one has gained, that sends the fit back to it.
_ASTRAY = 0.1
# Share of the first learning rate down to which the change of an epoch is held against the
# tolerance itself, and from which on against a share of it.
_TELLING = 0.1
# Epochs in a row that change next to nothing after which a fit has converged.
_QUIET = 2


@dataclass(frozen=True)
class FitOptions:
    """Options of a fit, as the estimator documents them."""

    n_components: int
    max_iter: int
    tol: float
    learning_rate: float
    batch_size: int | None
    latent_solver: LatentSolver
    hidden_layer_sizes: tuple[int, ...] = ()


def _start(
    setting: Setting,
    options: FitOptions,
    generator: torch.Generator,
    previous: LatentModel | None,
) -> tuple[LatentModel, Trace]:
    intercept, objective = null_model(setting)
    trace = Trace(intercept, objective)
    if previous is not None:
        parameters = setting.loadings.parameters(previous)
        hold(setting, parameters)
        model = setting.loadings.model(parameters)
        solved = solve_latents(setting, model, options.latent_solver)
        model = replace(model, latents=solved.value)
        # What was fitted to other data, or under another law, may be worse than nothing.
        if mean_objective(setting, parameters, solved.value) < objective:
            return model, trace
    convolution = setting.loadings.convolution
    if convolution is not None:
        some = _some_rows(setting, _PATCHED_ROWS)
        kernels = convolution.start(
            _working_residuals(some, intercept), some.sample_weight, options.n_components
        )
        return _best_scale(setting, options, kernels, intercept), trace
    sizes = (*options.hidden_layer_sizes, options.n_components)
    model = _first_layer(setting, sizes[0], generator, intercept, objective)
    return _add_layers(setting, model, sizes[1:], generator, intercept, objective), trace


def _some_rows(setting: Setting, most: int) -> Setting:
    """Evenly spaced rows, at most so many."""
    n = setting.observations.shape[0]
    if n <= most:
        return setting
    return setting.take(torch.arange(0, n, -(-n // most), device=setting.observations.device))


def _working_residuals(setting: Setting, intercept: Tensor) -> Tensor:
    """Residuals (n, p) of the linear predictors in the model without latents."""
    family, observations = setting.family, setting.observations
    predictor = intercept.unsqueeze(0)
    if setting.row_offset is not None:
        predictor = predictor + setting.row_offset.unsqueeze(1)
    variance = family.variance(predictor)
    # Where next to nothing varies, a residual in units of the variance is next to infinite.
    variance = variance + variance.mean(1, keepdim=True)
    n, _ = observations.shape
    rows = observations.dense_rows(0, n)
    residual = -family.slope(predictor.expand_as(rows), rows) / variance
    missing = observations.missing_rows(0, n)
    return residual if missing is None else residual.masked_fill(missing, 0)


def _best_scale(
    setting: Setting, options: FitOptions, kernels: Tensor, intercept: Tensor
) -> LatentModel:
    """Scale the first kernels to what serves some of the rows best."""
    some = _some_rows(setting, _SCALED_ROWS)
    best: tuple[float, LatentModel | Any] = (torch.inf, None)
    null = null_model(some)[1]
    for halvings in range(_MOST_HALVINGS):
        # Where few rows have all the weight the first kernels may be much too long.
        if halvings >= _HALVINGS and best[0] < null:
            break
        parameters = [kernels * 0.5**halvings, intercept]
        model = setting.loadings.model(parameters)
        solved = solve_latents(some, model, options.latent_solver)
        objective = mean_objective(some, parameters, solved.value)
        if best[1] is None or objective < best[0]:
            best = (objective, model)
    return best[1]


def _first_layer(
    setting: Setting, k: int, generator: torch.Generator, intercept: Tensor, objective: float
) -> LatentModel:
    def begin(setting: Setting, on_link_scale: bool = False) -> LatentModel:
        latents = spectral_start(setting, intercept, k, generator, on_link_scale)
        return first_loadings(setting, latents)

    if setting.family.variance_bound is not None:
        return begin(setting)
    # Counts that range over decades and counts that are mostly zero want different residuals;
    # the objective tells which these are, though not before a few iterations: on simulated
    # counts up to 3e5 one of the two starts fails to recover the latents now and then.
    some = _some_rows(setting, _TRIAL_ROWS)
    trials, ends = [], []
    for on_link_scale in (False, True):
        trials.append(Trace(intercept, objective))
        ends.append(Scoring(some, trials[-1], _TRIAL, 0.0).run(begin(some, on_link_scale)))
    best = trials[1].loss_curve[-1] < trials[0].loss_curve[-1]
    # What some rows are enough to choose they are not enough to go on from: latents predicted
    # from theirs are so far off that exponentials of them undo the gain.
    return ends[best] if some is setting else begin(setting, best)


def _add_layers(
    setting: Setting,
    model: LatentModel,
    sizes: tuple[int, ...],
    generator: torch.Generator,
    intercept: Tensor,
    objective: float,
) -> LatentModel:
    """Fit one layer on top of the other, each to the latents of the one below."""
    if not sizes:
        return model
    fits = [Scoring(setting, Trace(intercept, objective), _GREEDY, 0.0).run(model)]
    for size in sizes:
        fits[-1] = _raised(fits[-1], setting)
        given = hidden_setting(setting, fits[-1].latents)
        intercept, objective = null_model(given)
        above = _first_layer(given, size, generator, intercept, objective)
        fits.append(Scoring(given, Trace(intercept, objective), _GREEDY, 0.0).run(above))
    bottom, *others = fits
    latents = torch.cat([one.latents for one in fits], dim=1)
    upper = tuple(HiddenLayer(one.loadings, one.intercept) for one in others)
    return LatentModel(bottom.loadings, bottom.intercept, latents, upper)


def _raised(model: LatentModel, setting: Setting) -> LatentModel:
    """Move latents to where a map without negative values can reach most of them.

    Centred, half of them are out of its reach: the layer above would tell what is not there by
    intercepts far below zero, where the map has no slope to learn by. Predictors stay as they are,
    and latents of zero in the domain: where the intercepts would leave it, latents move less.
    """
    if setting.hidden_map.range.low < 0:
        return model
    covariance = Moments.of(model.latents, setting.sample_weight).covariance
    step = covariance.diagonal().sqrt().to(model.latents)
    for _ in range(_MOST_CUTS):
        intercept = model.intercept - model.loadings @ step
        if bool(setting.family.domain.contains(intercept).all()):
            return replace(model, intercept=intercept, latents=model.latents + step)
        step = step / 2
    return model


def fit_full_batch(
    setting: Setting,
    options: FitOptions,
    generator: torch.Generator,
    previous: LatentModel | None,
    progress: Progress,
) -> tuple[LatentModel, Trace]:
    """Fit by alternating Fisher scoring, from a spectral start or from previous parameters."""
    model, trace = _start(setting, options, generator, previous)
    solver, is_convex = options.latent_solver, setting.family.is_convex

    def finish(model: LatentModel) -> tuple[LatentModel, Trace]:
        ended = replace(trace)
        # The latents are those of the loadings before the last, or on the way to them. Of several
        # solutions they are the one that new rows find.
        solved = solve_latents(
            setting,
            model,
            solver if scoring.exact else solver.to_within(_CLOSE),
            curvature=partial(feature_variances, setting, model),
            start=model.latents if is_convex else None,
        )
        model = replace(model, latents=solved.value)
        if not is_convex:
            ended.end_at(objective_of(setting, model), trace.loss_curve[-1])
        return fix_signs(model), ended

    scoring = Scoring(setting, trace, options.max_iter, options.tol, progress, finish)
    try:
        last = scoring.run(model)
        reached = trace.loss_curve[-1]
        fitted, ended = finish(last)
        if is_convex:
            return fitted, ended
        # Of all that is known the one that serves latents from zero best.
        best, others = (ended.from_zero, fitted), [] if previous is None else [model]
        if trace.converged and ended.lost > MOST_LOST and not progress.stopped:
            others.append(descend(scoring, solver, last))
        for other in others:
            fitted, ended = finish(other)
            if ended.from_zero < best[0]:
                best = ended.from_zero, fitted
        trace.end_at(best[0], reached)
        return best[1], trace
    finally:
        # Each would keep the other, and the data on a card, until the collector comes by.
        del scoring.finish


class _Epochs:
    """Training by epochs of minibatches, of which the best is kept.

    Parameters
    ----------
    setting : Setting
    options : FitOptions
    model : LatentModel
        Where to start.
    null_objective : float
        Of the model without latents.

    Attributes
    ----------
    best : tuple of float and LatentModel
        Objective and model, as solved for in training.
    loose : LatentSolver
        Of the latents that a step is taken at.
    n_quiet : int
        Epochs in a row, up to the last one, that changed next to nothing.
    """

    def __init__(
        self, setting: Setting, options: FitOptions, model: LatentModel, null_objective: float
    ):
        self.setting, self._options, self._null_objective = setting, options, null_objective
        n = setting.observations.shape[0]
        self._size = min(options.batch_size or _BATCH_SIZE, n)
        self._n_batches = -(-n // self._size)
        self._parameters = setting.loadings.parameters(model)
        self._optimiser = torch.optim.Adam(self._parameters, lr=options.learning_rate)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self._optimiser, options.max_iter * self._n_batches
        )
        # What a step can use.
        self.loose = options.latent_solver.to_within(_LOOSE)
        solved = solve_latents(setting, model, options.latent_solver, rounded=True)
        self._last = mean_objective(setting, self._parameters, solved.value)
        self.best = (self._last, replace(model, latents=solved.value))
        self._latents = solved.value.clone()
        self.n_quiet = 0

    def epoch(self, generator: torch.Generator) -> tuple[float, Tensor]:
        """Go once through the rows; return the mean objective and the residuals of all rows."""
        setting, latents = self.setting, self._latents
        n, device = setting.observations.shape[0], setting.observations.device
        order = torch.randperm(n, generator=generator, device="cpu").to(device)
        for index in order.split(self._size):
            batch = setting.take(index)
            share = batch.total_weight * self._n_batches / setting.total_weight
            # From where the last visit left the rows.
            visit, _ = solve_and_step(
                batch, self._parameters, self._optimiser, self.loose, share, start=latents[index]
            )
            latents[index] = visit.value
            self._schedule.step()
        model = setting.loadings.model(self._parameters)
        # The objective is flat at its minimum: its error is that of the latents squared.
        solved = solve_latents(setting, model, self.loose, start=latents, rounded=True)
        self._latents = solved.value.clone()
        objective = mean_objective(setting, self._parameters, solved.value)
        self._judge(objective)
        if objective < self.best[0]:
            self.best = (objective, replace(model, latents=solved.value))
        elif not objective - self.best[0] <= _ASTRAY * abs(self._null_objective - self.best[0]):
            self._set_back()
        return objective, solved.residual

    def _judge(self, objective: float) -> None:
        """Count epochs that change next to nothing."""
        gained = telling_gain(self._null_objective, objective)
        # At the end of the schedule steps are so short that little changes wherever they are.
        pace = self._schedule.get_last_lr()[0] / (_TELLING * self._schedule.base_lrs[0])
        still = abs(self._last - objective) <= self._options.tol * gained * min(1.0, pace)
        self.n_quiet = self.n_quiet + 1 if still else 0
        self._last = objective

    def _set_back(self) -> None:
        """Go back to the best parameters, with smaller steps from there."""
        kept = self.setting.loadings.parameters(self.best[1])
        for one, old in zip(self._parameters, kept, strict=True):
            one.copy_(old)
        forget_steps(self._optimiser, 0.1)
        self._schedule.base_lrs = [0.1 * rate for rate in self._schedule.base_lrs]
        # The latents that went with the others may be outside the domain of the family.
        self._last, self._latents = self.best[0], self.best[1].latents.clone()

    def finished(self, trace: Trace) -> LatentModel:
        """Return the best model with latents in full accuracy.

        Where a row has several solutions, they are the one that is found without knowing another.
        """
        setting, model = self.setting, self.best[1]
        is_free = setting.loadings.may_be_turned and not model.upper
        several = not has_one_solution(setting.family, model.upper)
        if is_free and several:
            # It moves the latents, and with them zero.
            model = balance(setting, model)(model)
        solved = solve_latents(setting, model, self._options.latent_solver)
        model = replace(model, latents=solved.value)
        if several:
            trace.end_at(objective_of(setting, model), self.best[0], UNTOLD)
        elif is_free:
            model = balance(setting, model)(model)
        return fix_signs(model) if is_free else model


def fit_minibatches(
    setting: Setting,
    options: FitOptions,
    generator: torch.Generator,
    previous: LatentModel | None,
    progress: Progress,
) -> tuple[LatentModel, Trace]:
    """Fit by epochs of minibatches; the parameters of the best epoch are kept."""
    model, trace = _start(setting, options, generator, previous)
    epochs = _Epochs(setting, options, model, trace.null_objective)
    progress.unit, progress.row_tol = "epoch", epochs.loose.tol

    def finish() -> tuple[LatentModel, Trace]:
        # A callback may ask before the end, and the losses go on.
        ended = replace(trace)
        return epochs.finished(ended), ended

    for _ in range(options.max_iter):
        progress.begin()
        objective, residual = epochs.epoch(generator)
        trace.loss_curve.append(objective)
        trace.n_iter += 1
        trace.converged = epochs.n_quiet >= _QUIET
        if progress.end(objective, finish, residual=residual) or trace.converged:
            break
    return finish()
