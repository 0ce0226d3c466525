"""Sample weights of ExpFamilyDEQ: what is repeated, and what is only compared."""

import numpy as np
import pytest
from conftest import sample
from numpy.testing import assert_allclose
from sklearn.base import clone

from skdeq import ExpFamilyDEQ, ImplicitEMEncoder


@pytest.mark.parametrize("batch_size", [5, 16])
def test_weights_count_between_minibatches(batch_size):
    # The start is the optimum: weights that only mattered within a batch would lead away from it.
    X = np.random.default_rng(0).normal(size=(100, 6))
    X[50:] += 2
    weight = np.repeat([100.0, 1.0], 50)
    options = {"solver": "adam", "learning_rate": 0.02, "max_iter": 40, "random_state": 0}
    model = ExpFamilyDEQ(2, batch_size=batch_size, **options).fit(X, sample_weight=weight)
    exact = ExpFamilyDEQ(2, random_state=0).fit(X, sample_weight=weight)
    assert model.loss_curve_[-1] == pytest.approx(exact.loss_curve_[-1], rel=1e-4)


@pytest.mark.parametrize("share_missing", [0.0, 0.2])
def test_exposures_of_weighted_rows_are_those_of_repeated_ones(share_missing):
    rng = np.random.default_rng(0)
    X = sample("poisson", n=40, p=8) + 0.0
    X[rng.random(X.shape) < share_missing] = np.nan
    weight = rng.integers(1, 6, size=40)
    options = {"family": "poisson", "exposure": "total", "tol": 1e-9, "random_state": 0}
    weighted = ExpFamilyDEQ(2, **options).fit(X, sample_weight=weight)
    repeated = ExpFamilyDEQ(2, **options).fit(np.repeat(X, weight, axis=0))
    assert_allclose(weighted.intercept_, repeated.intercept_, atol=1e-6)
    assert_allclose(weighted.transform(X), repeated.transform(X), atol=1e-5)


@pytest.mark.parametrize("family", ["bernoulli", "poisson"])
def test_only_ratios_of_weights_count(family):
    X = sample(family, n=60)
    # Columns without an optimum of their own.
    X[:, :3] = 0
    one = ExpFamilyDEQ(2, family=family, random_state=0).fit(X, sample_weight=np.ones(60))
    small = ExpFamilyDEQ(2, family=family, random_state=0).fit(X, sample_weight=np.full(60, 1e-6))
    for name in ("loadings_", "intercept_", "explained_deviance_ratio_"):
        assert_allclose(getattr(small, name), getattr(one, name), rtol=1e-6, atol=1e-8)


def test_weights_that_may_not_be_written_to():
    X = sample("poisson")
    weight = np.random.default_rng(0).uniform(0.5, 2, size=len(X))
    expected = ExpFamilyDEQ(2, family="poisson", random_state=0).fit(X, sample_weight=weight)
    weight.flags.writeable = False
    # Any warning, such as torch's of such arrays, is an error.
    found = ExpFamilyDEQ(2, family="poisson", random_state=0).fit(X, sample_weight=weight)
    np.testing.assert_array_equal(found.loadings_, expected.loadings_)


def test_too_few_rows_of_positive_weight_are_named():
    X = sample("poisson")
    weight = np.zeros(len(X))
    weight[3] = 1
    with pytest.raises(ValueError, match="n_samples=1 with positive weight, n_features=9"):
        ExpFamilyDEQ(2, family="poisson").fit(X, sample_weight=weight)


def test_weights_of_float32_data_that_are_worked_on_in_float64():
    X = (sample("gaussian", n=60) + 1e4).astype(np.float32)
    weight = np.random.default_rng(0).integers(1, 5, size=60)
    weighted = ExpFamilyDEQ(2, random_state=0).fit(X, sample_weight=weight)
    assert weighted._in_double
    mean = np.average(X.astype(float), axis=0, weights=weight)
    # The intercept is given back in float32.
    assert_allclose(weighted.intercept_, mean, rtol=1e-6)
    repeated = ExpFamilyDEQ(2, random_state=0).fit(np.repeat(X, weight, axis=0))
    assert weighted.loss_curve_[-1] == pytest.approx(repeated.loss_curve_[-1], rel=1e-6)


@pytest.mark.parametrize("weight", [1.0, 1e3, 1e6])
def test_kernels_are_no_worse_than_none_whatever_row_has_the_weight(weight):
    rng = np.random.default_rng(0)
    X = (rng.random((6, 16)) < 0.5).astype(float)
    weights = np.array([weight, 1, 1, 1, 1, 1])
    deq = ExpFamilyDEQ(
        2, family="bernoulli", loadings="conv2d", image_shape=(4, 4), kernel_size=2, random_state=0
    ).fit(X, sample_weight=weights)
    mean = np.average(X, axis=0, weights=weights).clip(1e-12, 1 - 1e-12)
    losses = -(X * np.log(mean) + (1 - X) * np.log(1 - mean)).sum(axis=1)
    assert deq.loss_curve_[-1] <= np.average(losses, weights=weights) * (1 + 1e-6)


@pytest.mark.parametrize("size", [1e-200, 1e-30, 1e30, 1e200])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_of_any_size_count_by_their_ratios(size, dtype):
    X = sample("poisson", n=60).astype(dtype)
    weight = np.random.default_rng(0).uniform(0.5, 2, size=60)
    model = ExpFamilyDEQ(2, family="poisson", random_state=0)
    expected = clone(model).fit(X, sample_weight=weight)
    found = clone(model).fit(X, sample_weight=weight * size)
    assert_allclose(found.loadings_, expected.loadings_, rtol=1e-4, atol=1e-5)
    scores = [one.score(X, sample_weight=weight * size) for one in (found, expected)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    encoder = ImplicitEMEncoder(4, random_state=0)
    components = clone(encoder).fit(X, sample_weight=weight * size / 100).components_
    expected = clone(encoder).fit(X, sample_weight=weight / 100).components_
    assert_allclose(components, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [1e-16, 1e16])
def test_weights_of_a_stream_are_not_rescaled(size):
    X = sample("poisson", n=60)
    stream = ExpFamilyDEQ(2, family="poisson", random_state=0).partial_fit(X, None, np.ones(60))
    before = stream.components_.copy()
    with pytest.raises(ValueError, match="Divide those of all batches.*batch 2 of this stream"):
        stream.partial_fit(X, None, np.full(60, size))
    np.testing.assert_array_equal(stream.components_, before)
    with pytest.raises(ValueError, match="could not convert string to float.*batch 2"):
        stream.partial_fit(X, None, ["a"] * 60)
