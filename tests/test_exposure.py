"""Exposures against offsets written out: small rows, gaps, minibatches and float32."""

import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import sample
from numpy.testing import assert_allclose
from scipy.optimize import minimize
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


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_of_next_to_nothing_have_the_exposure_that_they_have(size, dtype):
    rng = np.random.default_rng(0)
    rate = np.exp(rng.normal(size=(200, 2)) @ rng.normal(size=(2, 20)) * 0.4)
    X = rng.poisson(size * rate).astype(dtype)
    deq = ExpFamilyDEQ(2, family="poisson", exposure="total", whiten=True, random_state=0).fit(X)
    rows = np.zeros((3, 20), dtype=dtype)
    rows[1, 3], rows[2, [3, 5]] = 1, (3, 2)
    latents = deq.transform(rows)
    loadings, intercept = deq.loadings_.astype(float), deq.intercept_.astype(float)
    np.testing.assert_allclose(latents[0], 0, atol=1e-6)
    assert deq.score_samples(rows[:1])[0] == pytest.approx(0, abs=1e-6)
    for row, found in zip(rows[1:].astype(float), latents[1:], strict=True):
        offset = np.log(row.sum() / X.sum(axis=1, dtype=float).mean())

        def objective(z, row=row, offset=offset):
            predictor = intercept + offset + loadings @ z
            return (np.exp(predictor) - row * predictor).sum() + z @ z / 2

        np.testing.assert_allclose(found, minimize(objective, np.zeros(2)).x, atol=1e-4)


@pytest.mark.parametrize("make", [np.asarray, sp.csr_array, torch.from_numpy])
def test_row_exposures_are_those_of_what_is_observed(make):
    rng = np.random.default_rng(0)
    size = rng.lognormal(size=(300, 1))
    expected = size * np.exp(rng.normal(size=(300, 2)) @ rng.normal(size=(2, 30)) * 0.4)
    whole = rng.poisson(expected).astype(float)
    whole[5] = 0
    is_missing = rng.random(whole.shape) < np.where(np.arange(300) % 2, 0.1, 0.8)[:, None]
    is_missing[:, 0] = is_missing[5] = False
    X = np.where(is_missing, np.nan, whole)
    deq = ExpFamilyDEQ(2, family="poisson", exposure="total", random_state=0).fit(make(X))
    found = np.asarray(deq.row_exposures(make(X)))
    profile = np.nanmean(X, axis=0)
    known = np.nansum(X, axis=1) / (~np.isnan(X) @ profile)
    assert found.shape == (300,)
    np.testing.assert_allclose(found, known, rtol=1e-12, atol=1e-12)
    # What is missing is filled in at the exposure of its row, however much of it is missing.
    filled = found[:, None] * deq.inverse_transform(deq.transform(X))
    for gaps in (np.isnan(X[1::2]), np.isnan(X[::2])):
        part = slice(1, None, 2) if gaps.mean() < 0.5 else slice(None, None, 2)
        assert filled[part][gaps].sum() == pytest.approx(whole[part][gaps].sum(), rel=0.1)
    plain = ExpFamilyDEQ(2, family="poisson", random_state=0).fit(make(X))
    np.testing.assert_array_equal(np.asarray(plain.row_exposures(make(X))), 1)


def test_rows_of_which_only_rare_columns_are_seen():
    rng = np.random.default_rng(0)
    rate = np.r_[np.full(8, 500.0), 1.0, 1.0, 0.0, 0.0]
    X = rng.poisson(rate, size=(80, 12)).astype(float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deq = model().fit(X)
    rare, unseen = np.full((2, 1, 12), np.nan)
    rare[0, [8, 9]], unseen[0, [10, 11]] = 6.0, (3.0, 1.0)
    expected = 12 / X.mean(axis=0)[[8, 9]].sum()
    assert deq.row_exposures(rare)[0] == pytest.approx(expected, rel=1e-9)
    # Training says nothing of the size of such a row, but that it is finite.
    assert np.isfinite(deq.row_exposures(unseen)).all()
    assert np.isfinite(deq.transform(unseen)).all()
