"""Data whose size leaves too few digits: in float32 and, far from zero, in float64."""

import math
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from numpy.testing import assert_allclose
from scipy.stats import multivariate_normal, norm
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import KFold

from skdeq import DEQRegressor, ExpFamilyDEQ
from skdeq.families import Gamma, get_family
from skdeq.model_selection import entrywise_cross_val_score


def gaussian(mean):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 3)) @ rng.normal(size=(3, 30)) + rng.normal(size=(300, 30))
    return (X + mean).astype(np.float32)


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e4, 1e5])
def test_score_far_from_the_origin_is_the_normal_density(mean):
    X = gaussian(mean)
    model = ExpFamilyDEQ(3, random_state=0).fit(X)
    loadings = model.loadings_.astype(float)
    law = multivariate_normal(model.intercept_.astype(float), loadings @ loadings.T + np.eye(30))
    # In float32 an intercept of 1e5 is known to a hundredth, whose square is what it costs.
    assert model.score(X) == pytest.approx(law.logpdf(X.astype(float)).mean(), abs=1e-3)
    ratio = ExpFamilyDEQ(3, random_state=0).fit(gaussian(0.0)).explained_deviance_ratio_
    assert_allclose(model.explained_deviance_ratio_, ratio, rtol=1e-3)


@pytest.mark.parametrize("mean", [1e6, 1e8, 1e10])
class TestFarFromZeroInFloat64:
    """Of X / 1e10 float64 leaves six digits of a unit, which is what is asked for."""

    def test_a_fit_is_that_of_centred_data(self, mean):
        X, tolerance = gaussian(0.0).astype(float), 1e-15 * mean + 1e-12
        X -= X.mean(0)
        X[0, 1] = X[7, 2] = np.nan
        weight = np.random.default_rng(0).uniform(0.5, 2, size=300)
        near = ExpFamilyDEQ(3, random_state=0).fit(X, sample_weight=weight)
        far = ExpFamilyDEQ(3, random_state=0).fit(X + mean, sample_weight=weight)
        assert_allclose(far.intercept_, near.intercept_ + mean, atol=10 * tolerance)
        for name in ("loadings_", "loss_curve_", "explained_deviance_ratio_"):
            assert_allclose(getattr(far, name), getattr(near, name), atol=1e3 * tolerance)
        assert_allclose(far.transform(X + mean), near.transform(X), atol=1e3 * tolerance)
        assert far.score(X + mean) == pytest.approx(near.score(X), abs=1e3 * tolerance)
        filled = far.inverse_transform(far.transform(X + mean))
        expected = near.inverse_transform(near.transform(X)) + mean
        assert_allclose(filled, expected, atol=1e3 * tolerance)

    def test_the_score_is_the_normal_density(self, mean):
        X = gaussian(0.0).astype(float) + mean
        model = ExpFamilyDEQ(3, random_state=0).fit(X)
        law = multivariate_normal(
            model.intercept_, model.loadings_ @ model.loadings_.T + np.eye(30)
        )
        assert model.score(X) == pytest.approx(law.logpdf(X).mean(), rel=1e-8)
        again = ExpFamilyDEQ(3, warm_start=True, random_state=0).fit(X).fit(X)
        assert again.score(X) == pytest.approx(model.score(X), rel=1e-6)

    def test_entries_held_out_score_the_normal_density(self, mean):
        X = gaussian(0.0).astype(float)
        model = ExpFamilyDEQ(3, random_state=0)
        near, far = (
            entrywise_cross_val_score(model, one, cv=KFold(2, shuffle=True, random_state=0))
            for one in (X, X + mean)
        )
        assert_allclose(far, near, rtol=1e-15 * mean + 1e-10)

    def test_streams_and_depth_are_those_of_centred_data(self, mean):
        X, tolerance = gaussian(0.0).astype(float), 1e-12 * mean + 1e-9
        near, far = (ExpFamilyDEQ(3, random_state=0) for _ in range(2))
        for rows in (slice(0, 100), slice(100, 200), slice(200, 300)):
            near.partial_fit(X[rows])
            far.partial_fit(X[rows] + mean)
        assert_allclose(far.loss_curve_, near.loss_curve_, atol=tolerance)
        assert_allclose(far.loadings_, near.loadings_, atol=tolerance)
        options = {"hidden_layer_sizes": (4,), "max_iter": 3, "tol": 0.0, "random_state": 0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            near, far = (ExpFamilyDEQ(2, **options).fit(X + one) for one in (0.0, mean))
        assert_allclose(far.loss_curve_, near.loss_curve_, atol=tolerance)

    def test_fine_tuning_and_sparse_rows(self, mean):
        X = gaussian(0.0).astype(float)
        X -= X.mean(0)
        y = X @ np.arange(30.0)
        options = {"max_iter": 3, "tol": 10.0, "n_iter_no_change": 2, "random_state": 0}
        near, far = (
            DEQRegressor(ExpFamilyDEQ(3, random_state=0), **options).fit(X + one, y)
            for one in (0.0, mean)
        )
        # The layer itself works on the rows as they come.
        assert_allclose(far.predict(X + mean), near.predict(X), atol=1e-5 * np.std(y) * mean**0.5)
        model = far.backbone_
        found, expected = model.transform(sp.csr_array(X + mean)), model.transform(X + mean)
        assert_allclose(found, expected, atol=1e-14 * mean)


def test_types_are_those_of_the_data():
    X = gaussian(1e4)
    model = ExpFamilyDEQ(3, random_state=0)
    assert model.fit_transform(X).dtype == np.float32
    assert model.transform(X).dtype == np.float32
    assert model.map_latents(X).value.dtype == np.float32
    assert model.loadings_.dtype == model.components_.dtype == np.float32
    assert model.inverse_transform(model.transform(X)).dtype == np.float32
    assert model.transform(X.astype(float)).dtype == np.float64
    model.partial_fit(X[:100])
    assert model.loadings_.dtype == np.float32


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_array])
def test_large_amounts_and_counts_fit_as_in_float64(layout):
    rng = np.random.default_rng(0)
    eta = 0.3 * rng.normal(size=(200, 3)) @ rng.normal(size=(3, 30))
    laws = {
        Gamma(5.0): rng.gamma(5, np.exp(eta)) * 1e6,
        "poisson": rng.poisson(np.exp(13 + eta)).astype(float),
    }
    for family, X in laws.items():
        single, double = (
            ExpFamilyDEQ(3, family=family, random_state=0).fit(layout(X.astype(dtype)))
            for dtype in (np.float32, np.float64)
        )
        assert single.loss_curve_[-1] == pytest.approx(double.loss_curve_[-1], rel=1e-6)
        assert single.score(X) == pytest.approx(double.score(X), rel=1e-4)


@pytest.mark.parametrize("seed", [3, 6, 11])
def test_components_without_rows_to_tell_them_apart_do_not_stop_a_float32_fit(seed):
    # Latents in fewer directions than there are components: their moment is indefinite to
    # rounding.
    rng = np.random.default_rng(seed)
    X = (rng.random((6, 39)) < 0.4) * 1.0
    X = X[rng.integers(0, 6, size=6)]
    losses = [
        ExpFamilyDEQ(6, family="bernoulli").fit(X.astype(dtype)).loss_curve_[-1]
        for dtype in (np.float32, np.float64)
    ]
    assert_allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize("seed", [17, 22, 26])
def test_amounts_are_fitted_in_float32_as_in_float64(seed):
    rng = np.random.default_rng(seed)
    X = rng.gamma(1.0, np.exp(rng.normal(size=(30, 3)) @ rng.normal(size=(3, 8))))
    narrow, wide = (
        ExpFamilyDEQ(3, family="gamma", weight_decay=1e-3, max_iter=1000).fit(X.astype(dtype))
        for dtype in (np.float32, np.float64)
    )
    assert narrow.components_.dtype == np.float32
    assert narrow.converged_
    assert_allclose(narrow.loss_curve_[-1], wide.loss_curve_[-1], rtol=1e-6)


@pytest.mark.parametrize("whiten", [False, True])
def test_modules_of_models_worked_on_in_float64_take_float32(whiten):
    X = (np.random.default_rng(0).normal(size=(50, 6)) * 500).astype(np.float32)
    deq = ExpFamilyDEQ(2, whiten=whiten).fit(X)
    scores = deq.to_module()(torch.from_numpy(X)).detach()
    assert_allclose(scores, deq.transform(X), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("fixed_point", ["picard", "anderson"])
def test_rows_certified_by_a_shared_curvature_are_at_their_minimum(fixed_point):
    rng = np.random.default_rng(3)
    X = rng.gamma(1.0, 1.0, size=(100, 3))
    X *= np.exp(rng.standard_t(1.5, size=(100, 3)).clip(-12, 12))
    deq = ExpFamilyDEQ(2, family="gamma", alpha=0.01, fixed_point_max_iter=200).fit(X)

    def energy(latents):
        eta = latents @ deq.loadings_.T + deq.intercept_
        return (-np.log(-eta) - X * eta).sum(1) + 0.005 * (latents**2).sum(1)

    least = energy(deq.map_latents(X).value)
    result = deq.set_params(fixed_point=fixed_point).map_latents(X)
    assert result.converged.sum() > 30
    # Some were certified 56 above.
    assert (energy(result.value) - least)[result.converged].max() < 1e-6


def test_rows_of_next_to_no_weight_do_not_settle_where_data_are_worked_on():
    X = gaussian(0.0).astype(float)
    rows, weight = np.vstack([X[:1] + 1e12, X]), np.ones(301)
    weight[0] = 1e-28
    weighted = ExpFamilyDEQ(2, random_state=0).fit(rows, sample_weight=weight)
    expected = ExpFamilyDEQ(2, random_state=0).fit(X)
    assert_allclose(weighted.intercept_, expected.intercept_, atol=1e-12)
    assert weighted.score(X) == pytest.approx(expected.score(X), rel=1e-10)


def test_a_gaussian_law_of_another_scale_is_its_own():
    class Scaled(type(get_family("gaussian"))):
        # A mean of 2 eta and a standard deviation of 2.
        def sufficient(self, x):
            return x / 2

        def log_base(self, x):
            return -(x / 2).square() / 2 - math.log(2 * math.pi * 4) / 2

    X = gaussian(5000.0).astype(float)
    values, eta = torch.from_numpy(X[:3]), torch.tensor(2500.0, dtype=torch.float64)
    expected = norm.logpdf(X[:3], 2 * 2500.0, 2.0)
    assert_allclose(Scaled().log_prob(values, eta), expected, rtol=1e-6)
    model = ExpFamilyDEQ(2, family=Scaled(), random_state=0).fit(X)
    assert_allclose(2 * model.intercept_, X.mean(0), rtol=1e-6)
    module = model.to_module()(torch.from_numpy(X)).detach()
    assert_allclose(module, model.transform(X), atol=1e-6)


def test_float32_rows_of_a_model_far_from_zero_keep_their_digits():
    # Integers of up to 24 bits have no rounding in float32.
    X = np.round(16 * gaussian(0.0).astype(float)) + 2.0**20
    model = ExpFamilyDEQ(3, random_state=0).fit(X)
    assert_allclose(model.transform(X.astype(np.float32)), model.transform(X), atol=1e-3)
