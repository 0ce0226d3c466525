"""What ExpFamilyDEQ does behind its public methods: validate, to tensors, solve, store."""

import warnings
from dataclasses import asdict, replace

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import _check_sample_weight, check_is_fitted

from skdeq._base import (
    check_observations,
    exposure_offset,
    log_base_rows,
    resolve_device,
    rows_of,
    seeded_generator,
    to_numpy,
    to_observations,
    to_tensor,
)
from skdeq._canonical import through
from skdeq._fit import FitOptions, Trace, fit_full_batch, fit_minibatches
from skdeq._latents import fit_start_map, solve_latents, typical_variance
from skdeq._model import LatentModel, Setting, null_model
from skdeq._progress import Progress
from skdeq._rotation import (
    explained_deviance,
    latent_covariance,
    orthonormal_scores,
    pooled_covariance,
)
from skdeq._stochastic import AdamState, adam_state, make_adam, solve_and_step
from skdeq.families import Family, get_canonical_map
from skdeq.families import get_family as _get_family
from skdeq.fixed_point import FixedPointResult

__all__ = ["LatentVariableEstimator"]


class LatentVariableEstimator(BaseEstimator):
    """Private methods of :class:`~skdeq.ExpFamilyDEQ`, in the order of a fit."""

    def _family(self) -> Family:
        canonical_map = get_canonical_map(self.canonical_map)
        family = through(_get_family(self.family), canonical_map)
        if len(tuple(self.hidden_layer_sizes)):
            raise ValueError(
                f"hidden_layer_sizes={self.hidden_layer_sizes!r}: only (), the model with one "
                "layer of latents, is available."
            )
        if self.exposure is not None and not family.scales_with_exposure:
            detail = "" if family.is_canonical else f" with canonical_map={canonical_map!r}"
            raise ValueError(
                f"exposure={self.exposure!r} needs a family whose mean it multiplies, such as "
                f"'poisson'; family {family.name!r}{detail} has no such offset."
            )
        return family

    def _setting(self, X, family: Family, sample_weight, profile) -> tuple[Setting, np.ndarray]:
        """Move validated data to the device."""
        device = resolve_device(self.device)
        offset = None
        if self.exposure is not None:
            offset, profile = exposure_offset(X, profile)
            offset = torch.from_numpy(offset.astype(X.dtype)).to(device)
        if sample_weight is not None:
            sample_weight = torch.from_numpy(sample_weight).to(device)
        setting = Setting(
            family=family,
            observations=to_observations(X, family, device),
            alpha=float(self.alpha),
            weight_decay=float(self.weight_decay),
            sample_weight=sample_weight,
            row_offset=offset,
        )
        return setting, profile

    def _training(self, X, sample_weight, *, reset: bool) -> tuple:
        """Validate training data: X, setting, exposure profile."""
        family = self._family().exact
        if family.widths:
            family = family.smoothed(family.widths[0])
        X = check_observations(self, X, family, reset=reset)
        n, p = X.shape
        if sample_weight is not None:
            sample_weight = _check_sample_weight(
                sample_weight, X, dtype=X.dtype, ensure_non_negative=True
            )
            if reset and not sample_weight.all():
                # Rows without weight take no part in the fit, not even by leaving the domain.
                kept = np.flatnonzero(sample_weight)
                X, sample_weight = X[kept], sample_weight[kept]
        profile = None if reset else self._exposure_profile
        setting, profile = self._setting(X, family, sample_weight, profile)
        logs = torch.from_numpy(log_base_rows(X, family))
        return X, replace(setting, log_base=setting.weighted_sum(logs)), profile

    def _fit(self, X, sample_weight, progress: Progress):
        X, setting, profile = self._training(X, sample_weight, reset=True)
        n, p = X.shape
        k = self.n_components
        if k > min(n, p):
            raise ValueError(
                f"n_components={k} is more than min(n_samples, n_features)={min(n, p)} "
                f"(n_samples={n}, n_features={p})."
            )
        generator = seeded_generator(self.random_state)
        previous = None
        if self.warm_start and getattr(self, "loadings_", np.empty(0)).shape == (p, k):
            previous = self._parameters(setting)
        solver = fit_minibatches if self.solver == "adam" else fit_full_batch
        options = self._options()

        def store(estimator, fit: tuple[LatentModel, Trace]) -> None:
            model, trace = fit
            moments = latent_covariance(model.latents, setting.sample_weight)
            estimator._store(X, setting, model, trace, moments)
            estimator._exposure_profile, estimator._adam = profile, None

        progress.store = store
        model, trace = solver(setting, options, generator, previous, progress)
        if not trace.converged and not progress.stopped:
            advice = ", or weight_decay: without it the optimum may lie at infinity"
            advice = advice if self.weight_decay == 0 else ""
            warnings.warn(
                f"{type(self).__name__} did not converge: the objective still changed by more "
                f"than tol={self.tol:g} of its gain after max_iter={self.max_iter} iterations; "
                f"increase max_iter or tol{advice}.",
                ConvergenceWarning,
                stacklevel=4,
            )
        store(self, (model, trace))
        return setting, model

    def _options(self) -> FitOptions:
        return FitOptions(
            n_components=int(self.n_components),
            max_iter=int(self.max_iter),
            tol=float(self.tol),
            learning_rate=float(self.learning_rate),
            batch_size=self.batch_size,
            fixed_point=self.fixed_point,
            fixed_point_tol=float(self.fixed_point_tol),
            fixed_point_max_iter=int(self.fixed_point_max_iter),
        )

    def _store(self, X, setting, model, trace, moments) -> None:
        """Rotate to principal scores and keep everything as numpy."""
        components, to_scores = orthonormal_scores(model.loadings, moments[1])
        latents = model.latents
        explained = explained_deviance(
            setting,
            lambda index: rows_of(X, index, latents.device),
            components.to(latents.dtype),
            model.intercept,
            trace.null_intercept,
            latents @ to_scores.to(latents.dtype),
        )
        dtype = X.dtype
        self.components_ = to_numpy(components, dtype)
        self.intercept_ = to_numpy(model.intercept, dtype)
        self.loadings_ = to_numpy(model.loadings, dtype)
        self.explained_deviance_ratio_ = to_numpy(explained, dtype)
        self.loss_curve_ = list(trace.loss_curve)
        self.n_iter_ = trace.n_iter
        self.converged_ = trace.converged
        self._to_scores = to_numpy(to_scores, dtype)
        self._curvature = to_numpy(typical_variance(setting, model, "rows"), dtype)
        self._start_map = to_numpy(fit_start_map(setting, model), dtype)
        self._moments = (to_numpy(moments[0]), to_numpy(moments[1]), moments[2])

    def _replace_parameters(
        self,
        loadings: np.ndarray,
        intercept: np.ndarray,
        latents: np.ndarray,
        sample_weight: np.ndarray | None,
    ) -> None:
        """Take over parameters that were trained elsewhere, and turn the scores accordingly.

        What was said of the old ones, the deviance they explain, is taken back.
        """
        weight = None if sample_weight is None else to_tensor(sample_weight)
        moments = latent_covariance(to_tensor(latents), weight)
        self._moments = (to_numpy(moments[0]), to_numpy(moments[1]), moments[2])
        components, to_scores = orthonormal_scores(to_tensor(loadings), moments[1])
        vars(self).pop("explained_deviance_ratio_", None)
        dtype = self.loadings_.dtype
        self.loadings_, self.intercept_ = loadings.astype(dtype), intercept.astype(dtype)
        self.components_ = to_numpy(components, dtype)
        self._to_scores = to_numpy(to_scores, dtype)

    def _update(self, X, sample_weight) -> None:
        X, setting, _ = self._training(X, sample_weight, reset=False)
        loadings, intercept = self._parameters(setting)
        parameters = torch.cat([loadings, intercept.unsqueeze(1)], dim=1)
        state = AdamState(**self._adam) if self._adam else AdamState.zeros(*loadings.shape)
        rate = self.learning_rate / (1 + state.step / 100) ** 0.5
        optimiser = make_adam(parameters, rate, state)
        solution, objective = solve_and_step(
            setting,
            parameters,
            optimiser,
            to_tensor(self._curvature).to(parameters),
            **self._options().latent_solver(),
        )
        model = LatentModel(parameters[:, :-1], parameters[:, -1], solution.value)
        null_intercept, null_objective = null_model(setting)
        trace = Trace(
            null_intercept,
            null_objective,
            [*self.loss_curve_, objective],
            self.n_iter_ + 1,
            converged=True,
        )
        batch = latent_covariance(solution.value, setting.sample_weight)
        mean, covariance, weight = self._moments
        seen = (
            to_tensor(mean).to(batch[0]),
            to_tensor(covariance).to(batch[0]),
            weight,
        )
        moments = pooled_covariance(seen, batch)
        self._store(X, setting, model, trace, moments)
        # Of plain types, as everything else that is saved.
        self._adam = asdict(adam_state(parameters, optimiser))

    def _parameters(self, setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
        """Fitted loadings and intercept in the type and on the device of the data."""
        like = {"dtype": setting.observations.dtype, "device": setting.observations.device}
        return (
            to_tensor(self.loadings_).to(**like),
            to_tensor(self.intercept_).to(**like),
        )

    def _latents(self, setting: Setting, start: torch.Tensor | None = None) -> FixedPointResult:
        """Solve the rows of a setting at the fitted parameters."""
        loadings, intercept = self._parameters(setting)
        return solve_latents(
            setting,
            loadings,
            intercept,
            curvature=to_tensor(self._curvature).to(loadings),
            start=start,
            start_map=to_tensor(self._start_map).to(loadings),
            **self._options().latent_solver(),
        )

    def _solve(self, X) -> tuple[FixedPointResult, Setting, object]:
        """Validate rows and solve them; also their setting and the validated rows."""
        check_is_fitted(self)
        family = self._family()
        X = check_observations(self, X, family, reset=False)
        setting, _ = self._setting(X, family, None, self._exposure_profile)
        return self._latents(setting), setting, X

    def _checked(self, result: FixedPointResult) -> FixedPointResult:
        """Warn of rows that are not solved."""
        left = int((~result.converged).sum())
        if left:
            single = result.value.dtype == torch.float32
            warnings.warn(
                f"The latents of {left} of {len(result.converged)} rows are not solved to "
                f"fixed_point_tol={self.fixed_point_tol:g} (largest residual "
                f"{float(result.residual.max()):.1e}, see map_latents): increase "
                "fixed_point_max_iter, use fixed_point='newton'"
                + (", pass float64 data or centre them." if single else "."),
                ConvergenceWarning,
                stacklevel=3,
            )
        return result

    def _output(self, latents: torch.Tensor) -> np.ndarray:
        if not self.whiten:
            latents = latents @ to_tensor(self._to_scores).to(latents)
        return to_numpy(latents)
