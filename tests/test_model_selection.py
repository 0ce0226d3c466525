"""Entries that are held out here and there, and what a model says of them."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from conftest import sample
from scipy import stats
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import KFold, ShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, scale
from sklearn.utils.validation import check_is_fitted

from skdeq import ExpFamilyDEQ
from skdeq.families import Gamma, NegativeBinomial
from skdeq.model_selection import entrywise_cross_val_score

LAWS = {
    "gaussian": lambda x, eta: stats.norm.logpdf(x, eta),
    "bernoulli": lambda x, eta: stats.bernoulli.logpmf(x, 1 / (1 + np.exp(-eta))),
    "poisson": lambda x, eta: stats.poisson.logpmf(x, np.exp(eta)),
}


def entries(X):
    """Places of the observed entries, row by row."""
    return np.flatnonzero(~np.isnan(X))


@pytest.mark.parametrize("family", LAWS)
@pytest.mark.parametrize("options", [{}, {"whiten": True}, {"n_components": 1}], ids=str)
def test_is_the_likelihood_of_what_was_hidden(family, options):
    X = sample(family, n=60, p=8)
    X[5, 2] = np.nan
    model = ExpFamilyDEQ(**{"n_components": 2, "family": family, "random_state": 0, **options})
    cv = KFold(3, shuffle=True, random_state=1)
    scores = entrywise_cross_val_score(model, X, cv=cv)
    expected = []
    for _, held in cv.split(entries(X)):
        places = np.unravel_index(entries(X)[held], X.shape)
        rest = X.copy()
        rest[places] = np.nan
        codes = model.fit_transform(rest)
        eta = model.natural_parameters(codes)
        expected.append(LAWS[family](X[places], eta[places]).mean())
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


@pytest.mark.parametrize("canonical_map", ["identity", "log"])
def test_counts_have_the_exposure_of_what_is_left_of_the_row(canonical_map):
    rng = np.random.default_rng(0)
    size = rng.gamma(2.0, size=(80, 1))
    X = rng.poisson(size * np.exp(rng.normal(size=(80, 1)) @ rng.normal(size=(1, 12)) / 2))
    X = X.astype(float)
    family = NegativeBinomial(0.3) if canonical_map == "log" else "poisson"
    model = ExpFamilyDEQ(1, family=family, canonical_map=canonical_map, exposure="total")
    (score,) = entrywise_cross_val_score(
        model, X, cv=ShuffleSplit(1, test_size=0.2, random_state=0)
    )
    ((_, held),) = ShuffleSplit(1, test_size=0.2, random_state=0).split(entries(X))
    places = np.unravel_index(entries(X)[held], X.shape)
    rest = X.copy()
    rest[places] = np.nan
    codes = model.fit_transform(rest)
    profile = np.nanmean(rest, axis=0)
    factor = np.nansum(rest, axis=1) / (~np.isnan(rest) @ profile)
    mean = (factor[:, None] * model.inverse_transform(codes))[places]
    if canonical_map == "log":
        expected = stats.nbinom.logpmf(X[places], 1 / 0.3, 1 / (1 + 0.3 * mean))
    else:
        expected = stats.poisson.logpmf(X[places], mean)
    assert score == pytest.approx(expected.mean(), rel=1e-6)


def test_finds_components_that_the_prior_hides_from_the_score_of_rows():
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(500, 4))
    X = scale(factors @ rng.normal(size=(4, 20)) / 2 + rng.normal(size=(500, 20)))
    means = [
        entrywise_cross_val_score(ExpFamilyDEQ(k, tol=1e-3), X, random_state=0).mean()
        for k in range(2, 7)
    ]
    assert 2 + np.argmax(means) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_layer_sizes": (4,), "max_iter": 20},
        {
            "loadings": "conv2d",
            "image_shape": (4, 4),
            "kernel_size": 2,
            "stride": 2,
            "max_iter": 20,
        },
        {"canonical_map": "relu", "max_iter": 20},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_all_kinds_of_models(options):
    X = sample("gaussian", n=80, p=16)
    model = ExpFamilyDEQ(2, random_state=0, **options)
    cv = KFold(2, shuffle=True, random_state=0)
    scores = entrywise_cross_val_score(model, X, cv=cv)
    for score, (_, held) in zip(scores, cv.split(entries(X)), strict=True):
        places = np.unravel_index(held, X.shape)
        rest = X.copy()
        rest[places] = np.nan
        fitted = model.fit(rest)
        latents = fitted.map_latents(rest)
        bottom = latents.layers[0] if "hidden_layer_sizes" in options else latents.value
        eta = bottom @ fitted.loadings_.T + fitted.intercept_
        eta = np.maximum(eta, 0) if "canonical_map" in options else eta
        assert score == pytest.approx(stats.norm.logpdf(X[places], eta[places]).mean(), rel=1e-6)


def test_the_type_of_the_data_does_not_matter():
    X = sample("poisson", n=60, p=8)
    model = ExpFamilyDEQ(2, family="poisson", random_state=0)
    expected = entrywise_cross_val_score(model, X, cv=2, random_state=0)
    for same in (
        sp.csr_array(X),
        sp.csc_matrix(X),
        pd.DataFrame(X, columns=[f"gene{j}" for j in range(8)]),
        torch.from_numpy(X),
        np.asfortranarray(X),
        X.astype(int),
    ):
        found = entrywise_cross_val_score(model, same, cv=2, random_state=0)
        np.testing.assert_array_equal(found, expected)
    single = entrywise_cross_val_score(model, X.astype(np.float32), cv=2, random_state=0)
    assert single.dtype == np.float64
    np.testing.assert_allclose(single, expected, rtol=1e-4)


def test_weights_are_those_of_the_rows():
    X = sample("poisson", n=60, p=8)
    model = ExpFamilyDEQ(2, family="poisson", random_state=0)
    cv = KFold(2, shuffle=True, random_state=0)
    plain = entrywise_cross_val_score(model, X, cv=cv)
    ones = entrywise_cross_val_score(model, X, sample_weight=np.full(60, 2.0), cv=cv)
    np.testing.assert_allclose(ones, plain, rtol=1e-6)
    # Rows of no weight are as if they were not there.
    weight = np.ones(60)
    weight[40:] = 0
    few = entrywise_cross_val_score(model, X, sample_weight=weight, cv=cv)
    np.testing.assert_array_equal(few, entrywise_cross_val_score(model, X[:40], cv=cv))
    # Entries count as much as their rows.
    weight = np.random.default_rng(0).integers(1, 5, size=60).astype(float)
    ((_, held),) = ShuffleSplit(1, random_state=0).split(entries(X))
    (score,) = entrywise_cross_val_score(
        model, X, sample_weight=weight, cv=ShuffleSplit(1, random_state=0)
    )
    places = np.unravel_index(held, X.shape)
    rest = X.copy()
    rest[places] = np.nan
    codes = model.fit_transform(rest, sample_weight=weight)
    likelihood = stats.poisson.logpmf(X[places], model.inverse_transform(codes)[places])
    assert score == pytest.approx(np.average(likelihood, weights=weight[places[0]]), rel=1e-6)


def test_repeats_with_the_seed_and_in_parallel_and_leaves_all_as_it_was():
    X = sample("bernoulli", n=60, p=8)
    before, model = X.copy(), ExpFamilyDEQ(2, family="bernoulli", random_state=0)
    scores = entrywise_cross_val_score(model, X, random_state=3)
    assert scores.shape == (5,)
    np.testing.assert_array_equal(scores, entrywise_cross_val_score(model, X, random_state=3))
    parallel = entrywise_cross_val_score(model, X, random_state=3, n_jobs=2)
    np.testing.assert_allclose(parallel, scores, rtol=1e-6)
    assert (scores != entrywise_cross_val_score(model, X, random_state=4)).all()
    np.testing.assert_array_equal(X, before)
    with pytest.raises(NotFittedError):
        check_is_fitted(model)


def test_a_row_of_which_all_is_hidden_is_predicted_by_the_intercept():
    X = sample("gaussian", n=40, p=5)
    held = np.arange(5)
    model = ExpFamilyDEQ(1, random_state=0)
    (score,) = entrywise_cross_val_score(model, X, cv=[(np.arange(5, 200), held)])
    rest = X.copy()
    rest[0] = np.nan
    intercept = model.fit(rest).intercept_
    assert score == pytest.approx(stats.norm.logpdf(X[0], intercept).mean(), rel=1e-6)


def test_a_prediction_outside_the_domain_is_minus_infinity():
    class Narrow(Gamma):
        """Every prediction is outside its domain."""

        def log_prob(self, x, eta):
            return super().log_prob(x, torch.ones_like(eta))

    X = sample(Gamma(2.0), n=40, p=5)
    scores = entrywise_cross_val_score(ExpFamilyDEQ(1, family=Narrow(2.0)), X, cv=2)
    np.testing.assert_array_equal(scores, -np.inf)


def test_says_what_is_wrong():
    X = sample("poisson", n=40, p=5)
    model = ExpFamilyDEQ(1, family="poisson")
    with pytest.raises(TypeError, match="takes an ExpFamilyDEQ, got Pipeline"):
        entrywise_cross_val_score(make_pipeline(StandardScaler(), model), X)
    bad = X.copy()
    bad[3, 1] = -1
    with pytest.raises(ValueError, match=r"row 3.*column 1|column 1.*row 3"):
        entrywise_cross_val_score(model, bad)
    column = [(np.arange(3), np.arange(0, 200, 5))]
    with pytest.raises(ValueError, match="Split 0 of cv holds out all 40 observed .* column 0"):
        entrywise_cross_val_score(model, X, cv=column)
    with pytest.raises(ValueError, match=r"Split 0 of cv holds no entry out\."):
        entrywise_cross_val_score(model, X, cv=[(np.arange(3), [])])
    with pytest.raises(ValueError, match="n_splits"):
        entrywise_cross_val_score(model, X, cv=1)
    with pytest.raises(ValueError, match="sample_weight"):
        entrywise_cross_val_score(model, X, sample_weight=np.ones(3))


@pytest.mark.parametrize("column", [0, 4])
def test_a_column_that_only_rows_without_weight_have_is_named(column):
    X, weight = sample("poisson", n=40, p=5), np.ones(40)
    weight[:5], X[5:, column] = 0.0, np.nan
    model = ExpFamilyDEQ(1, family="poisson")
    with pytest.raises(ValueError, match=f"Column {column} of X .* 35 rows of positive weight"):
        entrywise_cross_val_score(model, X, sample_weight=weight)


def test_a_column_of_one_observation_may_not_be_held_out():
    X = sample("poisson", n=40, p=5)
    X[1:, 4] = np.nan
    model = ExpFamilyDEQ(1, family="poisson")
    with pytest.raises(ValueError, match="Split 1 of cv holds out all 1 observed .* column 4"):
        entrywise_cross_val_score(model, X, cv=[([0], [1, 2]), ([0], [3, 4])])
