"""What a fitted ExpFamilyDEQ says of rows: its public methods that change nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn import config_context
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from skdeq._base import returned
from skdeq._chunks import parallel_chunks
from skdeq._data import log_base_rows
from skdeq._expfam_base import LatentVariableEstimator
from skdeq._expfam_fitted import narrowed
from skdeq._fixed_point_problem import OF_ROWS
from skdeq._likelihood import laplace_log_likelihood
from skdeq._typing import MatrixLike, Output, VectorLike
from skdeq._validation import check_codes, check_weights
from skdeq.families import get_family
from skdeq.fixed_point import FixedPointResult

__all__ = ["LatentTransformer"]


class LatentTransformer(
    ClassNamePrefixFeaturesOutMixin, TransformerMixin, LatentVariableEstimator
):
    """Methods of :class:`~skdeq.ExpFamilyDEQ` between rows, their latents and their likelihood."""

    def transform(self, X: MatrixLike) -> Output:
        """Scores of rows, seen in training or not.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Observations in the support of the family; NaN where missing.

        Returns
        -------
        ndarray of shape (n_samples, n_components)
            Scores in the orthonormal basis `components_`, or latents if ``whiten=True``.
            A tensor on the device of X where X is a tensor and ``array_api_dispatch=True``.

        Raises
        ------
        ValueError
            For observations outside the support of the family, naming row and column, and for
            parameters of the law (`family`, `canonical_map`, `hidden_map`, `exposure`, `alpha`)
            that have been changed since `fit`.

        Warns
        -----
        ConvergenceWarning
            If rows are not solved to `fixed_point_tol`; `map_latents` says which.
        """
        with parallel_chunks():
            return self._output(self._codes(X), X)

    def map_latents(self, X: MatrixLike) -> FixedPointResult:
        """MAP latents of rows, each with its certificate of convergence.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Observations in the support of the family; NaN where missing.

        Returns
        -------
        FixedPointResult
            ``value`` (n_samples, n_components) in units of the prior, ``residual``,
            ``converged`` and ``n_iter`` (n_samples,), all numpy arrays. With hidden layers
            ``value`` has the latents of all layers side by side, from the data to the top, and
            ``layers`` those of each.
        """
        with parallel_chunks():
            result, setting, _ = self._solve(X)
        result = narrowed(result, setting)
        parts: dict[str, Any] = {one: returned(getattr(result, one), X) for one in OF_ROWS}
        return replace(result, **parts)

    def natural_parameters(self, Z: VectorLike) -> Output:
        """Canonical parameters eta, R of the linear predictor, at unit exposure.

        With hidden layers they are those at the mean of each layer given the one above.

        Parameters
        ----------
        Z : array-like of shape (n_samples, n_components)
            What `transform` returns.

        Returns
        -------
        ndarray of shape (n_samples, n_features)
        """
        return returned(self._natural_parameters(Z), Z)

    def _natural_parameters(self, Z: VectorLike) -> torch.Tensor:
        check_is_fitted(self)
        self._check_law()
        codes = check_codes(Z, self._n_features_out, "Z")
        return self._family().exact.canonical(self._predictors(codes))

    def inverse_transform(self, Z: VectorLike) -> Output:
        """Mean of the sufficient statistic at unit exposure: of T(x) = x a denoised X.

        Parameters
        ----------
        Z : array-like of shape (n_samples, n_components)
            What `transform` returns.

        Returns
        -------
        ndarray of shape (n_samples, n_features)
            Infinite where the predictors are outside the domain of a gamma or negative
            binomial family without a log link, as those of entries that were missing may be.
        """
        return returned(get_family(self.family).mean(self._natural_parameters(Z)), Z)

    def row_exposures(self, X: MatrixLike) -> Output:
        """Size of each row beside an average training row, its size factor.

        Of what is observed of it: the total of these entries over what an average training row
        has of the same. Times `inverse_transform`, which is at unit exposure, it is what the
        model expects of the row, missing entries included.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Observations in the support of the family; NaN where missing.

        Returns
        -------
        ndarray of shape (n_samples,), float64
            Ones with ``exposure=None``; next to nothing for a row without any count.
        """
        return returned(self._row_exposures(X), X)

    def score_samples(self, X: MatrixLike) -> Output:
        """Laplace approximation of the marginal log-likelihood of each row.

        It integrates the latents out around their MAP solution and keeps all constants; for
        Gaussian rows it is exact, the normal law with covariance ``W W^T / alpha + I``. With a
        ReLU whose mask is not the exact one, the latents are not the MAP solution, and the value
        is that of the same formula at another point.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Observations in the support of the family; NaN where missing.

        Returns
        -------
        ndarray of shape (n_samples,), float64
        """
        with parallel_chunks():
            result, setting, rows = self._solve(X)
            self._warned_of(result)
            marginal = laplace_log_likelihood(setting, self._model_for(setting), result.value)
            return returned(marginal + log_base_rows(rows, setting.family).to(marginal), X)

    def score(
        self, X: MatrixLike, y: object = None, sample_weight: VectorLike | None = None
    ) -> float:
        """Mean of `score_samples`, for model selection by cross-validation.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Observations in the support of the family; NaN where missing.
        y : Ignored
            Present for API consistency.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights of the rows in the mean.

        Returns
        -------
        float
            Mean log-likelihood of a row.
        """
        with config_context(array_api_dispatch=False):
            scores = self.score_samples(X)
            weight = None if sample_weight is None else check_weights(sample_weight, scores)
        return float(np.average(scores, weights=weight))

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)
