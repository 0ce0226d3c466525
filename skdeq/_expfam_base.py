"""How ExpFamilyDEQ is fitted, behind its public methods: validate, to tensors, solve, store."""

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.utils.validation import _num_samples

from skdeq._base import numpy_dtype, resolve_device, seeded_generator, to_numpy, to_tensor
from skdeq._canonical import TRAINING_WIDTH
from skdeq._data import far_means, has_short_digits, log_base_rows, rows_of
from skdeq._end_columns import EndColumns, end_columns, ends_at_infinity
from skdeq._expfam_fitted import FittedLatents, predictor_of, top_latents
from skdeq._expfam_layout import changed_parameters, parameters_of_the_fit
from skdeq._explained_deviance import NEXT_TO_NOTHING, explained_deviance
from skdeq._family import Family
from skdeq._family_checks import check_parts
from skdeq._fit import fit_full_batch, fit_minibatches
from skdeq._hierarchy import HiddenLayer, mean_jacobian
from skdeq._latent_model import LatentModel
from skdeq._latent_starts import fit_start_map
from skdeq._latents import feature_variances, solve_latents
from skdeq._optimiser_state import OptimiserState, restore_state, saved_state
from skdeq._progress import Progress
from skdeq._rotation import Moments
from skdeq._setting import Setting, null_model
from skdeq._shortcomings import shortcoming_of
from skdeq._stochastic import hold, restart, solve_and_step
from skdeq._trace import Trace
from skdeq._validation import (
    check_columns,
    check_observations,
    check_stream_type,
    refuse_changes,
    warn_of_ends,
    weighted_rows,
)
from skdeq._warn import warn_of_convergence

if TYPE_CHECKING:
    from skdeq.nn import EquilibriumLayer

__all__ = ["LatentVariableEstimator"]

# Predictors, which are logits or logarithms, that only a model without an optimum comes to.
_ENDLESS = 100.0
# Prior precisions that float32 data are worked on in float32 with, and one over them.
_MOST_PRECISE = 1e6


def _may_be_endless(family: Family) -> bool:
    """Whether infinite predictors say something, as logits and logarithms of nought do.

    Where the density grows without bound at an end of the support, finite ones may be large.
    """
    if family.base.unbounded_at or not family.domain.is_real_line:
        return False
    return len(ends_at_infinity(family)) > 0


class LatentVariableEstimator(FittedLatents):
    """Private methods of :class:`~skdeq.ExpFamilyDEQ`, in the order of a fit."""

    _adam: OptimiserState
    _ends: dict[str, Any] | None = None
    _to_scores: np.ndarray

    def _training(self, X, sample_weight, *, reset: bool) -> tuple:
        """Validate training data: X from its origin, setting, exposure profile."""
        family = self._family().exact
        X = check_observations(self, X, family, reset=reset)
        if reset:
            check_parts(family, resolve_device(self.device, X))
        n_given = X.shape[0]
        sample_weight, X = weighted_rows(sample_weight, X)
        if reset:
            if X.shape[0] < n_given:
                check_columns(self, X, "rows of positive weight")
            warn_of_ends(X, family)
            # Latents of a scale so far from one leave float32 no digits for the objective.
            far = not 1 / _MOST_PRECISE <= self.alpha <= _MOST_PRECISE
            self._in_double = far or has_short_digits(X, family)
            self._origin = far_means(X, family, sample_weight)
        X = self._moved(X)
        profile = None if reset else self._exposure_profile
        setting, profile = self._setting(X, family, sample_weight, profile)
        logs = log_base_rows(X, family).to(setting.observations.device)
        log_base = setting.weighted_sum(logs)
        return X, replace(setting.smoothed(TRAINING_WIDTH), log_base=log_base), profile

    def _fit(self, X, sample_weight, progress: Progress):
        sizes = self._sizes()
        given = X
        X, setting, profile = self._training(X, sample_weight, reset=True)
        n, p = X.shape
        kept = " with positive weight" if n < _num_samples(given) else ""
        self._check_sizes(sizes, n, p, f"n_samples={n}{kept}, n_features={p}")
        ends = end_columns(X, setting)
        setting = ends.pinned(setting)
        generator = seeded_generator(self.random_state)
        previous = None
        if self.warm_start and self._layer_sizes() == (p, *sizes):
            previous = self._model_for(setting)
        solver = fit_full_batch if self._is_scoring() else fit_minibatches
        options = self._options()

        def store(estimator, fit: tuple[LatentModel, Trace]) -> None:
            model, trace = fit
            moments = estimator._moments_of(setting, model, of_stream=False)
            estimator._store(X, setting, model, trace, moments)
            estimator._exposure_profile, estimator._adam = profile, []
            estimator._n_batches = 0
            estimator._ends = asdict(ends)
            estimator._fitted_as = parameters_of_the_fit(estimator.get_params(deep=False))

        progress.store = store
        model, trace = solver(setting, options, generator, previous, progress)
        store(self, (model, trace))
        what = shortcoming_of(self, setting.family, trace.lost, stopped=progress.stopped)
        if what is not None:
            warn_of_convergence(what)
        return setting, model

    def _store(self, X, setting, model, trace, moments, *, of_stream: bool = False) -> None:
        """Keep what was fitted, and what it explains of the rows."""
        to_scores = self._keep(setting, model, moments)
        from_scores = setting.loadings.from_scores(to_scores)
        latents = top_latents(model.latents, model.upper)
        explained, removed, largest = explained_deviance(
            setting,
            lambda index: rows_of(X, index, latents.device),
            lambda scores: predictor_of(
                scores @ from_scores.to(scores.dtype), model, setting.hidden_map
            ),
            trace.null_intercept,
            latents @ to_scores.to(latents.dtype),
        )
        # Deviances go with the squares of what predictors move.
        is_dust = abs(removed) < NEXT_TO_NOTHING and largest < NEXT_TO_NOTHING**0.5
        if is_dust and not of_stream:
            # A StandardScaler would blow it up. Of one batch it says nothing.
            self._to_scores = np.zeros_like(self._to_scores)
        # Of a convolution, the places of each map together.
        explained = explained.reshape(int(self.n_components), -1).sum(1)
        self.explained_deviance_ratio_ = to_numpy(explained, numpy_dtype(X))
        self.loss_curve_ = list(trace.loss_curve)
        self.n_iter_ = trace.n_iter
        # A predictor that large says the same as an infinite one, whatever the tolerance.
        self._is_endless = (
            self.weight_decay == 0 and _may_be_endless(setting.family) and largest > _ENDLESS
        )
        self.converged_ = trace.converged and not self._is_endless

    def _keep(
        self,
        setting: Setting,
        model: LatentModel,
        moments: Moments,
    ) -> torch.Tensor:
        """Keep parameters, their principal scores and what shapes the solvers, as numpy.

        Returns
        -------
        Tensor of shape (k, k), float64
            From top latents to scores.
        """
        latents = top_latents(model.latents, model.upper)
        dtype = numpy_dtype(torch.empty(0, dtype=setting.narrow or latents.dtype, device="cpu"))
        components, to_scores = setting.loadings.principal(
            model.loadings,
            moments.covariance,
            mean_jacobian(latents, model.upper, self._hidden_map(), setting.sample_weight),
        )
        self.components_ = to_numpy(components, dtype)
        # Of an earlier fit.
        self.__dict__.pop("kernels_", None)
        convolution = setting.loadings.convolution
        if convolution is not None:
            shape = (-1, convolution.image_shape[0], *convolution.kernel_size)
            self.kernels_ = to_numpy(convolution.kernels(components.T).reshape(shape), dtype)
        self.intercept_ = to_numpy(setting.outwards(model).intercept, dtype)
        self.loadings_ = to_numpy(model.loadings, dtype)
        self.hidden_loadings_ = [to_numpy(one.loadings, dtype) for one in model.upper]
        self.hidden_intercepts_ = [to_numpy(one.intercept, dtype) for one in model.upper]
        self._to_scores = to_numpy(to_scores, dtype)
        curvature = feature_variances(setting, model.bottom)
        # Of entries that are missing in all but a few rows it may be beyond float32.
        curvature = curvature.clamp_max(float(np.finfo(dtype).max))
        self._curvature = to_numpy(curvature, dtype)
        self._start_map = to_numpy(fit_start_map(setting, model.bottom), dtype)
        self._moments = (to_numpy(moments.mean), to_numpy(moments.covariance), moments.weight)
        return to_scores

    def _replace_parameters(
        self,
        layer: "EquilibriumLayer",
        X,
        sample_weight,
        *,
        start: torch.Tensor | None = None,
        of_stream: bool = False,
    ) -> None:
        """Take over parameters that were trained elsewhere, and turn the scores accordingly.

        What was said of the old ones, the deviance they explain, is taken back.

        Parameters
        ----------
        layer : EquilibriumLayer
            From :meth:`to_module`, trained.
        X : Tensor or CSR array of shape (n, p)
            The training rows, validated.
        sample_weight : ndarray of shape (n,) or None
        start : Tensor of shape (n, k), optional
            Latents that are not far off.
        of_stream : bool
            Whether the rows are those of one more batch.
        """
        X = self._moved(X)
        setting, _ = self._setting(X, self._family(), sample_weight, self._exposure_profile)
        like: dict[str, Any] = {"dtype": setting.observations.dtype}
        like["device"] = setting.observations.device
        (loadings, intercept), *pairs = layer.pairs()
        upper = tuple(HiddenLayer(one.detach(), two.detach()) for one, two in pairs)
        model = LatentModel(loadings.detach(), intercept.detach(), upper=upper).to(**like)
        model = setting.inwards(model)
        # The rows anew: each of them was last seen at other parameters.
        solved = solve_latents(
            setting,
            model,
            self._latent_solver(),
            curvature=to_tensor(self._curvature).to(**like),
            start=None if start is None else start.to(**like),
            check_start=True,
        )
        model = replace(model, latents=solved.value)
        moments = self._moments_of(setting, model, of_stream)
        self._keep(setting.smoothed(TRAINING_WIDTH), model, moments)
        # Steps of another model's Adam are not for this one.
        self._adam = []
        # They have been trained like the others.
        self._ends = None
        self.__dict__.pop("explained_deviance_ratio_", None)

    def _moments_of(self, setting: Setting, model: LatentModel, of_stream: bool) -> Moments:
        """Mean, covariance and weight of the top latents; of a stream, with those before."""
        moments = Moments.of(top_latents(model.latents, model.upper), setting.sample_weight)
        if not of_stream:
            return moments
        mean, covariance, weight = self._moments
        seen = Moments(
            to_tensor(mean).to(moments.mean), to_tensor(covariance).to(moments.mean), weight
        )
        return seen.pooled(moments)

    def _update(self, X, sample_weight) -> None:
        X, setting, _ = self._training(X, sample_weight, reset=False)
        check_stream_type(X, self.loadings_)
        if self._fitted_as is not None:
            refuse_changes(changed_parameters(self.get_params(deep=False), self._fitted_as))
        parameters = setting.loadings.parameters(self._model_for(setting))
        state, ends = self._adam, EndColumns(**self._ends) if self._ends else None
        if ends:
            ends, seen = ends.after(X, setting)
            setting = ends.pinned(setting)
            state = restart(setting, parameters, state, seen)
            hold(setting, parameters)
        n_steps = float(state[0]["step"]) if state else 0.0
        rate = self.learning_rate / (1 + n_steps / 100) ** 0.5
        optimiser = torch.optim.Adam(parameters, lr=rate)
        restore_state(optimiser, state)
        solution, objective = solve_and_step(
            setting,
            parameters,
            optimiser,
            self._latent_solver(),
            curvature=to_tensor(self._curvature).to(parameters[0]),
        )
        model = replace(setting.loadings.model(parameters), latents=solution.value)
        null_intercept, null_objective = null_model(setting)
        trace = Trace(
            null_intercept,
            null_objective,
            [*self.loss_curve_, objective],
            self.n_iter_ + 1,
        )
        moments = self._moments_of(setting, model, of_stream=True)
        self._store(X, setting, model, trace, moments, of_stream=True)
        self._adam = saved_state(optimiser)
        self._ends = asdict(ends) if ends else None
