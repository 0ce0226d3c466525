"""float32 data whose size leaves float32 too few digits are worked on in float64."""

import numpy as np
import pytest
import scipy.sparse as sp
from numpy.testing import assert_allclose
from scipy.stats import multivariate_normal

from skdeq import ExpFamilyDEQ
from skdeq.families import Gamma


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
