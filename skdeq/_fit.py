"""The two ways to fit all the data: full-batch scoring and epochs of minibatches."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from skdeq._hierarchy import HiddenLayer
from skdeq._latents import solve_latents, typical_variance
from skdeq._model import LatentModel, Setting, hidden_setting, null_model
from skdeq._progress import Progress
from skdeq._rotation import fix_signs
from skdeq._scoring import Scoring, balance, telling_gain
from skdeq._spectral import spectral_start
from skdeq._stochastic import (
    free_parameters,
    hold,
    mean_objective,
    model_of,
    solve_and_step,
)

__all__ = ["FitOptions", "Trace", "fit_full_batch", "fit_minibatches"]

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


@dataclass(frozen=True)
class FitOptions:
    """Options of a fit, as the estimator documents them."""

    n_components: int
    max_iter: int
    tol: float
    learning_rate: float
    batch_size: int | None
    fixed_point: str
    fixed_point_tol: float
    fixed_point_max_iter: int
    hidden_layer_sizes: tuple[int, ...] = ()

    def latent_solver(self) -> dict:
        """Arguments of ``solve_latents``."""
        return {
            "method": self.fixed_point,
            "tol": self.fixed_point_tol,
            "max_iter": self.fixed_point_max_iter,
        }


@dataclass
class Trace:
    """What a fit leaves behind beside the model."""

    null_intercept: Tensor
    null_objective: float
    loss_curve: list[float] = field(default_factory=list)
    n_iter: int = 0
    converged: bool = False


def _start(
    setting: Setting,
    options: FitOptions,
    generator: torch.Generator,
    previous: tuple | None,
) -> tuple[LatentModel, Trace]:
    intercept, objective = null_model(setting)
    trace = Trace(intercept, objective)
    if previous is not None:
        loadings, start, upper = previous
        parameters = free_parameters(setting, LatentModel(loadings, start, None, upper))
        hold(setting, parameters)
        model = model_of(setting, parameters)
        solved = solve_latents(setting, *model.parameters, **options.latent_solver())
        model = replace(model, latents=solved.value)
        # What was fitted to other data, or under another law, may be worse than nothing.
        if mean_objective(setting, parameters, solved.value) < objective:
            return model, trace
    convolution = setting.convolution
    if convolution is not None:
        some = _some_rows(setting, _PATCHED_ROWS)
        residual = _working_residuals(some, intercept)
        kernels = convolution.start(residual, some.sample_weight, options.n_components)
        return _best_scale(setting, options, kernels, intercept), trace
    sizes = (*options.hidden_layer_sizes, options.n_components)
    model = _first_layer(setting, sizes[0], generator, intercept, objective)
    return _add_layers(setting, model, sizes[1:], generator, objective), trace


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
    residual = (observations.dense_rows(0, n) - family.mean(predictor)) / variance
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
        model = model_of(setting, parameters)
        solved = solve_latents(some, *model.parameters, **options.latent_solver())
        objective = mean_objective(some, parameters, solved.value)
        if best[1] is None or objective < best[0]:
            best = (objective, model)
    return best[1]


def _first_layer(
    setting: Setting, k: int, generator: torch.Generator, intercept: Tensor, objective: float
) -> LatentModel:
    def begin(setting: Setting, on_link_scale: bool = False) -> LatentModel:
        latents = spectral_start(setting, intercept, k, generator, on_link_scale)
        return Scoring(setting, 1, 0.0).begin(latents)

    if setting.family.variance_bound is not None:
        return begin(setting)
    # Counts that range over decades and counts that are mostly zero want different residuals;
    # the objective tells which these are, though not before a few iterations: on simulated
    # counts up to 3e5 one of the two starts fails to recover the latents now and then.
    some = _some_rows(setting, _TRIAL_ROWS)
    trials, ends = [], []
    for on_link_scale in (False, True):
        trials.append(Scoring(some, _TRIAL, 0.0))
        ends.append(trials[-1].run(begin(some, on_link_scale), objective))
    best = trials[1].loss_curve[-1] < trials[0].loss_curve[-1]
    # What some rows are enough to choose they are not enough to go on from: latents predicted
    # from theirs are so far off that exponentials of them undo the gain.
    return ends[best] if some is setting else begin(setting, best)


def _add_layers(
    setting: Setting,
    model: LatentModel,
    sizes: tuple[int, ...],
    generator: torch.Generator,
    objective: float,
) -> LatentModel:
    """Fit one layer on top of the other, each to the latents of the one below."""
    if not sizes:
        return model
    fits = [Scoring(setting, _GREEDY, 0.0).run(model, objective)]
    for size in sizes:
        fits[-1] = _raised(fits[-1], setting)
        given = hidden_setting(setting, fits[-1].latents)
        intercept, objective = null_model(given)
        above = _first_layer(given, size, generator, intercept, objective)
        fits.append(Scoring(given, _GREEDY, 0.0).run(above, objective))
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
    step = model.latents.std(0, correction=0)
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
    previous: tuple | None,
    progress: Progress,
) -> tuple[LatentModel, Trace]:
    """Fit by alternating Fisher scoring, from a spectral start or from previous parameters."""
    model, trace = _start(setting, options, generator, previous)

    def finish(model: LatentModel) -> tuple[LatentModel, Trace]:
        trace.loss_curve, trace.n_iter = scoring.loss_curve, scoring.n_iter
        trace.converged = scoring.converged
        # The latents are those of the loadings before the last, or on the way to them.
        solver = options.latent_solver()
        if not scoring.exact:
            solver["tol"] = max(solver["tol"], _CLOSE)
        solved = solve_latents(
            setting,
            *model.parameters,
            curvature=partial(typical_variance, setting, model, "rows"),
            start=model.latents,
            **solver,
        )
        return fix_signs(replace(model, latents=solved.value)), trace

    scoring = Scoring(setting, options.max_iter, options.tol, progress, finish)
    try:
        return finish(scoring.run(model, trace.null_objective))
    finally:
        # Each would keep the other, and the data on a card, until the collector comes by.
        del scoring.finish


def fit_minibatches(
    setting: Setting,
    options: FitOptions,
    generator: torch.Generator,
    previous: tuple | None,
    progress: Progress,
) -> tuple[LatentModel, Trace]:
    """Fit by epochs of minibatches; the parameters of the best epoch are kept."""
    model, trace = _start(setting, options, generator, previous)
    n, _ = setting.observations.shape
    device = setting.observations.device
    size = min(options.batch_size or _BATCH_SIZE, n)
    parameters = free_parameters(setting, model)
    optimiser = torch.optim.Adam(parameters, lr=options.learning_rate)
    n_batches = -(-n // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.max_iter * n_batches)
    solved = solve_latents(setting, *model.parameters, rounded=True, **options.latent_solver())
    objective = mean_objective(setting, parameters, solved.value)
    best = (objective, replace(model, latents=solved.value))
    last, quiet = objective, 0
    latents = solved.value.clone()
    loose = {**options.latent_solver(), "tol": max(options.fixed_point_tol, _LOOSE)}
    progress.unit, progress.row_tol = "epoch", loose["tol"]

    def finish() -> tuple[LatentModel, Trace]:
        # In full accuracy and, where a row has several solutions, the one that is found without
        # knowing another.
        model = best[1]
        solved = solve_latents(setting, *model.parameters, **options.latent_solver())
        model = replace(model, latents=solved.value)
        if not model.upper and setting.convolution is None:
            model = fix_signs(balance(setting, model)(model))
        return model, trace

    for epoch in range(1, options.max_iter + 1):
        progress.begin()
        order = torch.randperm(n, generator=generator, device="cpu").to(device)
        for index in order.split(size):
            batch = setting.take(index)
            share = batch.total_weight * n_batches / setting.total_weight
            # From where the last visit left the rows, to the accuracy that a step can use.
            visit, _ = solve_and_step(
                batch, parameters, optimiser, share, start=latents[index], **loose
            )
            latents[index] = visit.value
            schedule.step()
        model = model_of(setting, parameters)
        # The objective is flat at its minimum: its error is that of the latents squared.
        solved = solve_latents(setting, *model.parameters, start=latents, rounded=True, **loose)
        latents = solved.value.clone()
        objective = mean_objective(setting, parameters, solved.value)
        trace.loss_curve.append(objective)
        trace.n_iter = epoch
        gained = telling_gain(trace.null_objective, objective)
        # At the end of the schedule steps are so short that little changes wherever they are.
        pace = schedule.get_last_lr()[0] / (_TELLING * schedule.base_lrs[0])
        still = abs(last - objective) <= options.tol * gained * min(1.0, pace)
        quiet = quiet + 1 if still else 0
        trace.converged = quiet >= 2
        last = objective
        if objective < best[0]:
            best = (objective, replace(model, latents=solved.value))
        elif not objective - best[0] <= _ASTRAY * abs(trace.null_objective - best[0]):
            # Gone astray: back to the best parameters, with smaller steps from there.
            for one, old in zip(parameters, free_parameters(setting, best[1]), strict=True):
                one.copy_(old)
            optimiser.state.clear()
            schedule.base_lrs = [0.1 * rate for rate in schedule.base_lrs]
            for group in optimiser.param_groups:
                group["lr"] *= 0.1
            # The latents that went with the others may be outside the domain of the family.
            last, latents = best[0], best[1].latents.clone()
        stop = progress.end(objective, finish, residual=solved.residual)
        if trace.converged or stop:
            break
    return finish()
