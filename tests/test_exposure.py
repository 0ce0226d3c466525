"""Exposures against offsets written out: small rows, gaps, minibatches and float32."""

import numpy as np
import pytest
from conftest import sample
from numpy.testing import assert_allclose
from sklearn.exceptions import ConvergenceWarning

from skdeq import ExpFamilyDEQ


def model(**options):
    options = {"fixed_point_tol": 1e-12, "whiten": True, "random_state": 0, **options}
    return ExpFamilyDEQ(2, family="poisson", exposure="total", **options)


def check_rows(deq, X, offset, rows=slice(None), atol=1e-8):
    """Latents are those of a model with that offset: z = W' (x - mean), for what is seen."""
    z = deq.transform(X)
    mean = np.exp(z @ deq.loadings_.T + deq.intercept_ + offset[:, None])
    expected = np.nan_to_num(X - mean) @ deq.loadings_ / deq.alpha
    assert_allclose(z[rows], expected[rows], atol=atol)


def test_rows_much_smaller_than_others():
    X = sample("poisson", n=50, p=15)
    X[:, 0] += 1
    X[3:] *= 2000
    deq = model(alpha=1.3).fit(X)
    offset = np.log(X.sum(1) / X.sum(1).mean())
    assert offset[:3].max() < np.log(1e-3)
    # Where counts are in the thousands, so are the residuals that 1e-12 refers to.
    check_rows(deq, X, offset, slice(3), atol=1e-6)


def test_rows_with_gaps_are_compared_with_what_is_seen_of_them():
    X = sample("poisson", n=50, p=15) + 1.0
    X[np.random.default_rng(0).random(X.shape) < 0.3] = np.nan
    profile = np.nanmean(X, axis=0)
    offset = np.log(np.nansum(X, axis=1) / (~np.isnan(X) * profile).sum(axis=1))
    check_rows(model(alpha=1.3).fit(X), X, offset)


def test_minibatches_have_the_exposures_of_their_rows():
    rng = np.random.default_rng(0)
    size = np.repeat([1.0, 30.0], 100)[:, None] * rng.uniform(0.5, 2, size=12)
    latents, loadings = rng.normal(size=(200, 2)), rng.normal(size=(2, 12))
    X = rng.poisson(size * np.exp(0.5 * latents @ loadings)).astype(float)
    exact = model(fixed_point_tol=1e-6).fit(X)
    adam = model(fixed_point_tol=1e-6, solver="adam", learning_rate=0.01, batch_size=100)
    with pytest.warns(ConvergenceWarning):
        adam.set_params(max_iter=20, tol=0.0).fit(X)
    # Steps that did not know the exposures lead five nats away; twenty epochs leave 0.05.
    assert adam.loss_curve_[-1] == pytest.approx(exact.loss_curve_[-1], abs=0.2)


def test_exposures_of_float32_counts_that_are_worked_on_in_float64():
    X = np.random.default_rng(0).poisson(1e6, size=(60, 9)) * np.repeat([1, 5], 30)[:, None]
    wide, narrow = model().fit(X.astype(float)), model().fit(X.astype(np.float32))
    assert narrow._in_double
    assert narrow.loss_curve_[-1] == pytest.approx(wide.loss_curve_[-1], rel=1e-5)
    # Rows differ in size alone: the intercept is that of their mean, to the noise of 1e-3.
    assert_allclose(narrow.intercept_, np.log(X.mean(axis=0)), atol=1e-2)
