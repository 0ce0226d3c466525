"""What ExpFamilyDEQ does with fitted parameters: rows to tensors, solve, return."""

from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.utils.validation import check_is_fitted

from skdeq._base import numpy_dtype, resolve_device, returned, to_tensor, torch_dtype
from skdeq._data import to_observations
from skdeq._expfam_layout import LatentLayout, changed_law
from skdeq._exposure import exposure_offset
from skdeq._family import CanonicalMap
from skdeq._fit import FitOptions
from skdeq._hierarchy import HiddenLayer, has_kinks, mean_from_top, split_layers
from skdeq._latent_model import LatentModel
from skdeq._latents import LatentSolver, solve_latents
from skdeq._setting import Setting
from skdeq._validation import check_observations, refuse_other_law
from skdeq._warn import warn_of_convergence
from skdeq.families import Family
from skdeq.fixed_point import SOLVERS, FixedPointResult

__all__ = ["FittedLatents", "narrowed", "predictor_of", "top_latents"]


# Linear predictors from which on kinks are too narrow for the digits of some rows.
_TOO_LARGE_FOR_KINKS = 1e6


class FittedLatents(LatentLayout):
    """Private methods of :class:`~skdeq.ExpFamilyDEQ` that solve rows at given parameters."""

    # Whether float32 data are worked on in float64, as the training data ask for.
    _in_double: bool = False
    # What the model was fitted as; saved by an older version, it does not know.
    _fitted_as: dict[str, Any] | None = None
    # What is taken off dense rows, and off the intercept, before anything is computed.
    _origin: np.ndarray | None = None

    def _origin_of(self, X) -> torch.Tensor | None:
        """Origin (p,), float64, of validated rows, where they are."""
        if self._origin is None or sp.issparse(X):
            return None
        return to_tensor(self._origin, X.device)

    def _moved(self, X):
        """Take their origin off validated rows."""
        origin = self._origin_of(X)
        return X if origin is None else (X - origin).to(X.dtype)

    def _setting(self, X, family: Family, sample_weight, profile) -> tuple[Setting, np.ndarray]:
        """Move validated data, moved by their origin, to the device."""
        device = resolve_device(self.device, X)
        offset = None
        if self.exposure is not None:
            factors, profile = exposure_offset(X, profile, sample_weight)
            offset = factors.to(device, torch_dtype(numpy_dtype(X)))
        if sample_weight is not None:
            sample_weight = to_tensor(sample_weight, device)
        origin = self._origin_of(X)
        # In float64 they are twice as large, and for a while there beside those in float32.
        copies = 3 if self._in_double else 1
        observations = to_observations(X, family, device, copies)
        setting = Setting(
            family=family,
            observations=observations,
            alpha=float(self.alpha),
            weight_decay=float(self.weight_decay),
            sample_weight=sample_weight,
            row_offset=offset,
            hidden_map=self._hidden_map(),
            loadings=self._loadings(),
            origin=None if origin is None else origin.to(observations.device),
        )
        return setting.double() if self._in_double else setting, profile

    def _options(self) -> FitOptions:
        return FitOptions(
            n_components=int(self.n_components),
            max_iter=int(self.max_iter),
            tol=float(self.tol),
            learning_rate=float(self.learning_rate),
            batch_size=self.batch_size,
            latent_solver=self._latent_solver(),
            hidden_layer_sizes=self._sizes()[:-1],
        )

    def _latent_solver(self) -> LatentSolver:
        return LatentSolver(
            self.fixed_point, float(self.fixed_point_tol), int(self.fixed_point_max_iter)
        )

    @property
    def _starts_from_zero(self) -> bool:
        """Whether the solver that was asked for, if one was, starts from zero."""
        asked = SOLVERS.get(self.fixed_point)
        return asked is not None and asked.starts_from_zero

    def _layer_sizes(self) -> tuple[int, ...]:
        """Numbers of features and of latents of each layer as fitted; empty before."""
        if getattr(self, "loadings_", None) is None:
            return ()
        return (*self.loadings_.shape, *(one.shape[1] for one, _ in self._hidden()))

    def _hidden(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return loadings and intercept of each layer above the first."""
        if not hasattr(self, "hidden_loadings_"):
            return []
        return list(zip(self.hidden_loadings_, self.hidden_intercepts_, strict=True))

    def _model(self, device: torch.device, dtype: torch.dtype) -> LatentModel:
        """Fitted parameters in a type and on a device, such as those of data."""
        return LatentModel(
            to_tensor(self.loadings_),
            to_tensor(self.intercept_),
            upper=tuple(
                HiddenLayer(to_tensor(loadings), to_tensor(intercept))
                for loadings, intercept in self._hidden()
            ),
        ).to(device, dtype)

    def _model_for(self, setting: Setting) -> LatentModel:
        """Fitted parameters in the type and on the device of data, and from their origin."""
        device, dtype = setting.observations.device, setting.observations.dtype
        if setting.origin is None:
            return self._model(device, dtype)
        return setting.inwards(self._model(device, torch.float64)).to(device, dtype)

    def _predictors(self, codes: torch.Tensor) -> torch.Tensor:
        """Linear predictors at unit exposure of what `transform` returns, where that lies."""
        model = self._model(codes.device, torch.float64)
        latents = codes.double()
        if not (model.upper or self.whiten):
            # Products with the scores' own basis, exact where a component is empty.
            predictor = latents @ to_tensor(self.components_).to(latents) + model.intercept
        else:
            if not self.whiten:
                to_scores = to_tensor(self._to_scores).to(latents)
                latents = latents @ self._loadings().from_scores(to_scores)
            predictor = predictor_of(latents, model, self._hidden_map())
        return predictor.to(codes.dtype)

    def _latents(self, setting: Setting, start: torch.Tensor | None = None) -> FixedPointResult:
        """Solve the rows of a setting at the fitted parameters."""
        model = self._model_for(setting)
        result = solve_latents(
            setting,
            model,
            self._latent_solver(),
            curvature=to_tensor(self._curvature).to(model.loadings),
            start=start,
            start_map=to_tensor(self._start_map).to(model.loadings),
        )
        return replace(result, layer_sizes=self._layer_sizes()[1:])

    def _solve(self, X) -> tuple[FixedPointResult, Setting, object]:
        """Validate rows and solve them; also their setting, and the rows from their origin."""
        X = self._moved(self._checked(X))
        return *self._solve_moved(X), X

    def _checked(self, X):
        """Validate rows for the model as it was fitted."""
        check_is_fitted(self)
        self._check_law()
        return check_observations(self, X, self._family(), reset=False)

    def _solve_moved(self, X) -> tuple[FixedPointResult, Setting]:
        """Solve validated rows that their origin has been taken off; also their setting."""
        setting, _ = self._setting(X, self._family(), None, self._exposure_profile)
        return self._latents(setting), setting

    def _row_exposures(self, X) -> torch.Tensor:
        """Size factors (n,) of rows, where they are."""
        X = self._checked(X)
        device = resolve_device(self.device, X)
        if self.exposure is None:
            return torch.ones(X.shape[0], dtype=torch.float64, device=device)
        return exposure_offset(X, self._exposure_profile)[0].exp().to(device)

    def _predictors_given(self, X) -> torch.Tensor:
        """Linear predictors (n, p) of all entries of rows by their latents and exposures."""
        result, setting, _ = self._solve(X)
        model = setting.outwards(self._model_for(setting))
        bottom = split_layers(self._warned_of(result).value, model.upper)[0]
        predictors = model.predictor(bottom)
        if setting.row_offset is not None:
            predictors += setting.row_offset.unsqueeze(1)
        return predictors

    def _check_law(self) -> None:
        """Refuse to apply a fitted model under another law than it was fitted with."""
        if self._fitted_as is not None:
            refuse_other_law(self, changed_law(self.get_params(deep=False), self._fitted_as))

    def _codes(self, X) -> torch.Tensor:
        """MAP latents of rows, in their own type; warn of those that are not solved."""
        result, setting, _ = self._solve(X)
        return narrowed(self._warned_of(result), setting).value

    def _warned_of(self, result: FixedPointResult) -> FixedPointResult:
        """Warn of rows that are not solved."""
        left = int((~result.converged).sum())
        if left:
            worst = float(result.residual[~result.converged].max())
            advice = [f"increase fixed_point_max_iter={self.fixed_point_max_iter}"]
            asked = SOLVERS.get(self.fixed_point)
            if asked is not None and not asked.forms_hessians:
                advice.append("use fixed_point='newton'")
            largest = self._largest_predictor(result.value[~result.converged])
            # More iterations do not help.
            if worst <= self.fixed_point_tol:
                advice = ["raise alpha, as their digits do not tell the latents apart"]
            elif self._has_kinks and largest > _TOO_LARGE_FOR_KINKS:
                advice = [
                    "divide the data by a constant, as linear predictors of up to "
                    f"{largest:.0e} leave too few digits to solve at the kinks of the map"
                ]
            if result.value.dtype == torch.float32:
                advice.append("pass float64 data or centre them")
            warn_of_convergence(
                f"The latents of {left} of {len(result.converged)} rows are not solved to "
                f"fixed_point_tol={self.fixed_point_tol:g} (largest residual {worst:.1e}, see "
                f"map_latents): {', or '.join(advice)}."
            )
        return result

    @property
    def _has_kinks(self) -> bool:
        """Whether a map of the model has kinks."""
        return has_kinks(self._family(), self._hidden(), self._hidden_map())

    def _largest_predictor(self, latents: torch.Tensor) -> float:
        """Largest size of the linear predictors of latents (m, K) at unit exposure."""
        model = self._model(latents.device, latents.dtype)
        bottom = split_layers(latents, model.upper)[0]
        return float(model.predictor(bottom).abs().max())

    def _output(self, latents: torch.Tensor, X) -> np.ndarray | torch.Tensor:
        """Turn latents of the rows X into what `transform` returns."""
        latents = latents[:, -len(self._to_scores) :]
        if not self.whiten:
            latents = latents @ to_tensor(self._to_scores).to(latents)
        elif not self._to_scores.any():
            # All components are empty, and what is left of them is dust.
            latents = torch.zeros_like(latents)
        return returned(latents, X, self)


def narrowed(result: FixedPointResult, setting: Setting) -> FixedPointResult:
    """Return a result in the type of the data."""
    return result if setting.narrow is None else result.to(setting.narrow)


def top_latents(latents: torch.Tensor, upper: tuple[HiddenLayer, ...]) -> torch.Tensor:
    """Latents (n, k) of the top layer, of those of all layers side by side."""
    return split_layers(latents, upper)[-1].contiguous()


def predictor_of(top: torch.Tensor, model: LatentModel, hidden_map: CanonicalMap) -> torch.Tensor:
    """Linear predictor at unit exposure of what the prior expects below the top latents."""
    return model.predictor(mean_from_top(top, model.upper, hidden_map))
