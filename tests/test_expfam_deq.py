"""ExpFamilyDEQ against PCA, ridge GLMs and the normal law; data of every kind."""

import copy
import functools
import pickle
import subprocess
import sys
import warnings

import joblib
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import CUDA, FAMILY_OBJECTS, sample
from numpy.testing import assert_allclose
from scipy.optimize import minimize
from scipy.special import expit, logit
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression, PoissonRegressor
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags

import skdeq._expfam_base as expfam_base
from skdeq import ExpFamilyDEQ, ImplicitEMEncoder
from skdeq.families import Binomial, Poisson, get_family

# Options that take a fit to its optimum, for comparisons to many digits.
TIGHT = {"tol": 1e-14, "max_iter": 3000, "fixed_point_tol": 1e-12, "random_state": 0}


def digits(n=400):
    X = load_digits().data[:n]
    return X[:, X.std(axis=0) > 0]


def model(family="poisson", **options):
    return ExpFamilyDEQ(2, family=family, random_state=0, **options)


@pytest.fixture(scope="module")
def fits():
    X = digits()
    deq = ExpFamilyDEQ(6, alpha=1e-9, weight_decay=1e-9, **TIGHT).fit(X)
    return X, deq, PCA(6, svd_solver="full").fit(X)


class TestAgainstPCA:
    def test_components_order_and_sign(self, fits):
        _, deq, pca = fits
        np.testing.assert_allclose(deq.components_, pca.components_, atol=1e-6)

    def test_scores(self, fits):
        X, deq, pca = fits
        np.testing.assert_allclose(deq.transform(X), pca.transform(X), atol=1e-6)

    def test_explained_deviance_is_explained_variance(self, fits):
        _, deq, pca = fits
        np.testing.assert_allclose(
            deq.explained_deviance_ratio_, pca.explained_variance_ratio_, atol=1e-9
        )

    def test_inverse_transform(self, fits):
        X, deq, pca = fits
        np.testing.assert_allclose(
            deq.inverse_transform(deq.transform(X)),
            pca.inverse_transform(pca.transform(X)),
            atol=1e-6,
        )

    def test_intercept_is_the_mean(self, fits):
        X, deq, _ = fits
        np.testing.assert_allclose(deq.intercept_, X.mean(axis=0), atol=1e-8)


@pytest.mark.parametrize("k", [16, 17, 40])
def test_scores_of_many_components_are_those_of_pca(k):
    # From 17 on the rows are not solved by Newton's method.
    X = digits()
    deq = ExpFamilyDEQ(k, alpha=1e-8, weight_decay=1e-8)
    scores = deq.fit_transform(X)
    np.testing.assert_allclose(scores, PCA(k, svd_solver="full").fit_transform(X), atol=1e-6)
    np.testing.assert_allclose(deq.transform(X[:5]), scores[:5], rtol=1e-9)


def test_few_rows_of_many_features_start_from_the_space_of_the_rows(monkeypatch):
    eigh, sizes = torch.linalg.eigh, []

    def counted(matrix):
        sizes.append(len(matrix))
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    X = np.random.default_rng(0).normal(size=(15, 3000))
    deq = ExpFamilyDEQ(3, alpha=1e-8, weight_decay=1e-8, **TIGHT).fit(X)
    assert max(sizes) <= 15  # of the features it would be 3,000, and take half a minute
    scores = PCA(3, svd_solver="full").fit_transform(X)
    np.testing.assert_allclose(deq.transform(X), scores, atol=1e-6)
    assert np.isfinite(ExpFamilyDEQ(3).partial_fit(sp.csr_array(X)).loadings_).all()


def test_penalised_gaussian_model_is_soft_thresholded_svd():
    # Nuclear norm: singular values shrink by sqrt(n alpha weight_decay), and no further.
    X = digits(200)
    centred = X - X.mean(axis=0)
    deq = ExpFamilyDEQ(5, alpha=4.0, weight_decay=2.0, **TIGHT).fit(X)
    left, values, right = np.linalg.svd(centred, full_matrices=False)
    shrunk = np.maximum(values[:5] - np.sqrt(len(X) * 4.0 * 2.0), 0)
    expected = (left[:, :5] * shrunk) @ right[:5]
    fitted = deq.natural_parameters(deq.transform(X)) - X.mean(axis=0)
    np.testing.assert_allclose(fitted, expected, atol=1e-5)


def test_poisson_transform_is_the_ridge_glm_of_scikit_learn():
    X = sample("poisson")
    alpha = 0.7
    deq = model(alpha=alpha, whiten=True, fixed_point_tol=1e-12).fit(X)
    latents = deq.transform(X)
    design, offset = deq.loadings_, deq.intercept_
    for row in range(0, 80, 9):
        # PoissonRegressor has no offset: y exp(-o) with weight exp(o) has the same likelihood.
        weight = np.exp(offset)
        glm = PoissonRegressor(
            alpha=alpha / weight.sum(), fit_intercept=False, tol=1e-12, solver="newton-cholesky"
        )
        glm.fit(design, X[row] / weight, sample_weight=weight)
        np.testing.assert_allclose(latents[row], glm.coef_, atol=1e-6)


def test_bernoulli_transform_is_the_ridge_glm_of_scikit_learn():
    X = sample("bernoulli")
    alpha = 0.3
    deq = model("bernoulli", alpha=alpha, whiten=True, fixed_point_tol=1e-12).fit(X)
    # LogisticRegression has no offset either: make it zero and keep the loadings.
    deq.intercept_ = np.zeros_like(deq.intercept_)
    latents = deq.transform(X)
    checked = 0
    for row in range(80):
        if 0 < X[row].sum() < X.shape[1]:
            glm = LogisticRegression(
                C=1 / alpha, fit_intercept=False, tol=1e-12, solver="newton-cholesky"
            )
            glm.fit(deq.loadings_, X[row])
            np.testing.assert_allclose(latents[row], glm.coef_[0], atol=1e-6)
            checked += 1
    assert checked > 40


@pytest.mark.parametrize("family", FAMILY_OBJECTS, ids=str)
def test_transform_minimises_the_log_joint_of_every_family(family):
    X = sample(family)
    deq = model(family, whiten=True, fixed_point_tol=1e-11).fit(X)
    law = get_family(family)

    def objective(z, x):
        eta = torch.from_numpy(deq.loadings_ @ z + deq.intercept_)
        value = -float(law.log_prob(torch.from_numpy(x), eta).sum()) + 0.5 * z @ z
        return value if np.isfinite(value) else 1e300

    latents = deq.transform(X)
    for row in (0, 17, 42):
        options = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 2000}
        best = minimize(
            objective, latents[row] + 0.05, args=(X[row],), method="Nelder-Mead", options=options
        )
        # Nelder-Mead resolves a minimum to the root of the rounding of its values.
        np.testing.assert_allclose(latents[row], best.x, atol=1e-5)
        assert objective(latents[row], X[row]) <= best.fun + 1e-10


@pytest.mark.parametrize("family", FAMILY_OBJECTS, ids=str)
def test_fit_is_a_stationary_point_of_the_objective(family):
    X = sample(family)
    alpha, weight_decay = 0.8, 0.05
    deq = model(family, alpha=alpha, weight_decay=weight_decay)
    deq.set_params(**{**TIGHT, "tol": 1e-13}).fit(X)
    law = get_family(family)
    latents = torch.from_numpy(deq.map_latents(X).value)
    loadings = torch.from_numpy(deq.loadings_).requires_grad_()
    intercept = torch.from_numpy(deq.intercept_).requires_grad_()
    likelihood = law.log_prob(torch.from_numpy(X), latents @ loadings.T + intercept).sum(1)
    objective = (-likelihood + 0.5 * alpha * latents.square().sum(1)).mean()
    objective = objective + 0.5 * weight_decay * loadings.square().sum()
    assert float(objective.detach()) == pytest.approx(deq.loss_curve_[-1], abs=1e-8)
    objective.backward()
    assert float(loadings.grad.abs().max()) < 1e-5
    assert float(intercept.grad.abs().max()) < 1e-5


@pytest.mark.parametrize("family", FAMILY_OBJECTS, ids=str)
def test_objective_never_rises(family):
    curve = np.array(model(family, max_iter=60, tol=0).fit(sample(family)).loss_curve_)
    assert (np.diff(curve) <= 1e-10 * np.abs(curve[:-1])).all()


def test_gaussian_score_is_the_normal_log_density():
    X = sample("gaussian", n=60, p=7)
    deq = ExpFamilyDEQ(3, alpha=0.6, weight_decay=0.1, random_state=0).fit(X)
    covariance = deq.loadings_ @ deq.loadings_.T / 0.6 + np.eye(7)
    exact = multivariate_normal(deq.intercept_, covariance).logpdf(X)
    np.testing.assert_allclose(deq.score_samples(X), exact, atol=1e-8)
    assert deq.score(X) == pytest.approx(exact.mean(), abs=1e-8)


def test_gaussian_score_with_gaps_is_the_marginal_density():
    X = sample("gaussian", n=20, p=7)
    deq = ExpFamilyDEQ(2, random_state=0).fit(X)
    X[3, [1, 4]] = np.nan
    keep = np.setdiff1d(np.arange(7), [1, 4])
    covariance = (deq.loadings_ @ deq.loadings_.T + np.eye(7))[np.ix_(keep, keep)]
    exact = multivariate_normal(deq.intercept_[keep], covariance).logpdf(X[3, keep])
    assert deq.score_samples(X)[3] == pytest.approx(exact, abs=1e-8)


@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize(("family", "error"), [("poisson", 0.005), ("bernoulli", 0.03)])
def test_laplace_score_is_near_the_integral(family, error, alpha):
    X = sample(family, n=30, p=25, k=1)
    deq = ExpFamilyDEQ(1, family=family, alpha=alpha, random_state=0).fit(X)
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64) / alpha**0.5
    eta = grid[:, None] * torch.from_numpy(deq.loadings_[:, 0]) + torch.from_numpy(deq.intercept_)
    law = get_family(family)
    prior = -0.5 * alpha * grid.square() - 0.5 * np.log(2 * np.pi / alpha)
    for row in (0, 11, 29):
        joint = law.log_prob(torch.from_numpy(X[row]), eta).sum(1) + prior
        integral = float(torch.logsumexp(joint, 0)) + np.log(float(grid[1] - grid[0]))
        # The error of the formula itself, with 25 observations for one latent: what is yes or
        # no says less than a count.
        assert deq.score_samples(X)[row] == pytest.approx(integral, abs=error)


def test_score_selects_the_rank_that_made_the_data():
    X = sample("poisson", n=500, p=40, k=3, seed=3)
    search = GridSearchCV(
        ExpFamilyDEQ(family="poisson", random_state=0), {"n_components": [1, 2, 3, 5, 8]}, cv=3
    )
    assert search.fit(X).best_params_ == {"n_components": 3}


@pytest.mark.parametrize("family", ["gaussian", "poisson", "bernoulli"])
def test_weights_equal_repetition(family):
    X = sample(family)
    weight = np.random.default_rng(0).integers(0, 4, len(X))
    deq = model(family).set_params(**TIGHT)
    weighted = clone(deq).fit(X, sample_weight=weight)
    repeated = clone(deq).fit(np.repeat(X, weight, axis=0))
    np.testing.assert_allclose(weighted.loadings_, repeated.loadings_, atol=1e-6)
    np.testing.assert_allclose(weighted.transform(X), repeated.transform(X), atol=1e-6)
    assert weighted.loss_curve_[-1] == pytest.approx(repeated.loss_curve_[-1], abs=1e-9)
    np.testing.assert_allclose(
        weighted.explained_deviance_ratio_, repeated.explained_deviance_ratio_, atol=1e-6
    )


@pytest.mark.parametrize("family", ["gaussian", "poisson", "bernoulli"])
def test_order_of_the_rows_does_not_matter(family):
    X = sample(family)
    order = np.random.default_rng(0).permutation(len(X))
    deq = model(family).set_params(**TIGHT)
    one, two = clone(deq).fit(X), clone(deq).fit(X[order])
    np.testing.assert_allclose(one.components_, two.components_, atol=1e-6)
    np.testing.assert_allclose(one.transform(X)[order], two.transform(X[order]), atol=1e-6)


def test_no_order_of_the_rows_chooses_signs():
    # A column and its mirror image have loadings of one size, but for rounding.
    rng = np.random.default_rng(0)
    column, other = rng.normal(size=(2, 200, 1))
    X = np.hstack([column, -column, other + column / 2])
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(200)
        deq = ExpFamilyDEQ(1, random_state=0).fit(X[order])
        for first in (deq.loadings_[0, 0], deq.components_[0, 0]):
            assert first > 0


@pytest.mark.parametrize("family", FAMILY_OBJECTS, ids=str)
def test_missing_entries_equal_a_model_without_them(family):
    # A row with gaps is solved as the GLM of its observed entries alone.
    X = sample(family)
    deq = model(family, whiten=True, fixed_point_tol=1e-11).fit(X)
    gaps = X.copy()
    gaps[5, [0, 3]] = np.nan
    gaps[6] = np.nan
    latents = deq.transform(gaps)
    keep = np.setdiff1d(np.arange(9), [0, 3])
    narrow = pickle.loads(pickle.dumps(deq))
    narrow.loadings_ = deq.loadings_[keep]
    narrow.intercept_ = deq.intercept_[keep]
    narrow._curvature = deq._curvature[keep]
    narrow.n_features_in_ = 7
    np.testing.assert_allclose(latents[5], narrow.transform(X[5:6, keep])[0], atol=1e-9)
    np.testing.assert_array_equal(latents[6], 0)
    untouched = np.setdiff1d(np.arange(80), [5, 6])
    np.testing.assert_allclose(latents[untouched], deq.transform(X)[untouched], atol=1e-12)


@pytest.mark.parametrize("family", FAMILY_OBJECTS, ids=str)
def test_fit_with_missing_entries_is_a_stationary_point(family):
    X = sample(family)
    observed = np.random.default_rng(1).random(X.shape) < 0.8
    observed[7] = False
    gaps = np.where(observed, X, np.nan)
    deq = model(family, weight_decay=0.05).set_params(**{**TIGHT, "tol": 1e-13}).fit(gaps)
    law = get_family(family)
    latents = torch.from_numpy(deq.map_latents(gaps).value)
    assert (latents[7] == 0).all()
    loadings = torch.from_numpy(deq.loadings_).requires_grad_()
    intercept = torch.from_numpy(deq.intercept_).requires_grad_()
    terms = law.log_prob(torch.from_numpy(X), latents @ loadings.T + intercept)
    # Unobserved entries may lie outside the domain of the family.
    objective = -terms[torch.from_numpy(observed)].sum() / len(X)
    objective = objective + 0.5 * latents.square().sum(1).mean()
    objective = objective + 0.025 * loadings.square().sum()
    assert float(objective.detach()) == pytest.approx(deq.loss_curve_[-1], abs=1e-8)
    objective.backward()
    assert float(loadings.grad.abs().max()) < 1e-5
    assert float(intercept.grad.abs().max()) < 1e-5


@pytest.mark.parametrize("exposure", [None, "total"])
@pytest.mark.parametrize("layout", [sp.csr_array, sp.csc_array, sp.csr_matrix])
@pytest.mark.parametrize("gaps", [False, True])
def test_sparse_equals_dense(exposure, layout, gaps):
    X = sample("poisson", n=60, p=12)
    X[4] = 0
    if gaps:
        X[np.random.default_rng(0).random(X.shape) < 0.1] = np.nan
    # Stopped well before the iterations reach rounding, where the two would part.
    deq = model(exposure=exposure, max_iter=12, tol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        dense, sparse = clone(deq).fit(X), clone(deq).fit(layout(X))
    np.testing.assert_allclose(dense.loadings_, sparse.loadings_, atol=1e-7)
    np.testing.assert_allclose(dense.transform(X), sparse.transform(layout(X)), atol=1e-7)
    np.testing.assert_allclose(dense.score_samples(X), sparse.score_samples(layout(X)), atol=1e-7)
    assert dense.loss_curve_ == pytest.approx(sparse.loss_curve_, abs=1e-9)


@pytest.mark.parametrize("family", FAMILY_OBJECTS, ids=str)
def test_float32_agrees_with_float64(family):
    X = sample(family).astype(np.float32)
    deq = model(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        single, double = clone(deq).fit(X), clone(deq).fit(X.astype(np.float64))
    scores = single.transform(X)
    assert scores.dtype == single.components_.dtype == np.float32
    assert single.inverse_transform(scores).dtype == np.float32
    # Fits stop at 1e-5 of their gain: the root of that, in the scores, is the common accuracy.
    reference = double.transform(X.astype(np.float64))
    assert np.abs(scores - reference).max() < 5e-3 * np.abs(reference).max()
    assert single.loss_curve_[-1] == pytest.approx(double.loss_curve_[-1], rel=1e-4)
    # The map itself, at equal parameters, is accurate to single precision.
    for name in ("loadings_", "intercept_", "_to_scores", "_curvature", "_start_map"):
        setattr(double, name, getattr(single, name).astype(np.float64))
    reference = double.transform(X.astype(np.float64))
    assert np.abs(scores - reference).max() < 2e-5 * np.abs(reference).max()


def test_same_seed_same_bytes_whatever_the_threads():
    X = sample("poisson", n=3000, p=120, k=3)
    before, fits = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            deq = model().fit(X)
            fits.add((deq.loadings_.tobytes(), deq.transform(X).tobytes()))
    finally:
        torch.set_num_threads(before)
    assert len(fits) == 1


def test_global_random_states_are_left_alone():
    X = sample("poisson")
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    ExpFamilyDEQ(family="poisson", random_state=0).fit(X)
    ExpFamilyDEQ(family="poisson", solver="adam", max_iter=2, tol=1.0, random_state=0).fit(X)
    assert (np.random.get_state()[1] == before[0]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("fixed_point", ["newton", "anderson", "picard"])
@pytest.mark.parametrize("family", ["gaussian", "poisson", "bernoulli"])
def test_fixed_point_solvers_agree(family, fixed_point):
    X = sample(family)
    # Strong penalties, under which the layer contracts.
    deq = model(family, alpha=20.0, weight_decay=0.5).fit(X)
    reference = deq.map_latents(X)
    deq.set_params(fixed_point=fixed_point, fixed_point_max_iter=3000, fixed_point_tol=1e-9)
    result = deq.map_latents(X)
    assert result.converged.all() and isinstance(result.value, np.ndarray)
    np.testing.assert_allclose(result.value, reference.value, atol=1e-5)


@pytest.mark.parametrize("family", ["bernoulli", "poisson"])
def test_many_components(family):
    # Beyond the rank up to which every row gets a Hessian of its own.
    X = sample(family, n=300, p=60, k=5)
    deq = ExpFamilyDEQ(20, family=family, random_state=0, fixed_point_tol=1e-9).fit(X)
    result = deq.map_latents(X)
    assert result.converged.all()
    newton = deq.set_params(fixed_point="newton").map_latents(X)
    np.testing.assert_allclose(result.value, newton.value, atol=1e-6)


def fits_of_small_and_of_large_data(family, monkeypatch):
    X = sample(family, n=200, p=30)
    small = ExpFamilyDEQ(2, family=family, **{**TIGHT, "tol": 1e-10}).fit(X)
    monkeypatch.setattr("skdeq._scoring._SMALL_RANK", 0)
    monkeypatch.setattr("skdeq._scoring._HESSIAN_FLOPS", 0)
    return small, ExpFamilyDEQ(2, family=family, **{**TIGHT, "tol": 1e-10}).fit(X)


@pytest.mark.parametrize("family", ["bernoulli", "binomial", "rademacher"])
def test_shared_curvature_reaches_the_same_optimum(family, monkeypatch):
    exact, shared = fits_of_small_and_of_large_data(family, monkeypatch)
    assert shared.n_iter_ > exact.n_iter_
    assert shared.loss_curve_[-1] == pytest.approx(exact.loss_curve_[-1], rel=1e-6)
    curve = np.array(shared.loss_curve_)
    assert (np.diff(curve) <= 1e-9).all()


@pytest.mark.parametrize("family", ["poisson", "negative_binomial", "gamma"])
def test_curvatures_without_a_bound_are_not_shared(family, monkeypatch):
    small, large = fits_of_small_and_of_large_data(family, monkeypatch)
    assert large.loss_curve_ == small.loss_curve_


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_scores_of_a_fit_with_shared_curvature_are_principal(monkeypatch):
    monkeypatch.setattr("skdeq._scoring._SMALL_RANK", 0)
    monkeypatch.setattr("skdeq._scoring._HESSIAN_FLOPS", 0)
    X = sample("bernoulli", n=300, p=20, k=4)
    deq = ExpFamilyDEQ(4, family="bernoulli", random_state=0, max_iter=5, fixed_point_tol=1e-9)
    covariance = np.cov(deq.fit(X).transform(X).T)
    variance = np.diag(covariance)
    assert (np.diff(variance) < 0).all()
    # To the digits to which the fit solves its rows in the end; on the way there it has none.
    assert np.abs(covariance - np.diag(variance)).max() < 1e-3 * variance.max()


def test_a_certificate_holds_for_rows_of_less_curvature_than_others():
    # Next to the ends counts have next to no variance, and the curvature that rows share none of
    # it.
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(300, 20)) @ rng.normal(size=(20, 40)) * 2 / np.sqrt(20)
    X = rng.binomial(1000, 1 / (1 + np.exp(-logits))).astype(float)
    extreme = np.where(rng.random((60, 40)) < 0.5, 1000.0, 0.0)
    deq = ExpFamilyDEQ(20, family=Binomial(1000), weight_decay=0.001, random_state=0, max_iter=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = deq.fit(X).map_latents(extreme)
        exact = deq.set_params(fixed_point="newton", fixed_point_tol=1e-12).map_latents(extreme)

    def objective(z):
        eta = z @ deq.loadings_.T + deq.intercept_
        loss = 1000 * np.logaddexp(0, eta) - extreme * eta
        return loss.sum(1) + 0.5 * (z**2).sum(1)

    assert found.converged.all()
    # Half of the squared decrement, at most.
    assert (objective(found.value) - objective(exact.value)).max() < 1e-6


@pytest.mark.parametrize("k", [2, 18])
def test_a_row_of_nothing_has_latents_of_zero(k):
    X = sample("bernoulli", n=100, p=30)
    deq = ExpFamilyDEQ(k, family="bernoulli", random_state=0, max_iter=3, whiten=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        deq.fit(X)
    X[3] = np.nan
    assert not deq.transform(X)[3].any()


@pytest.mark.parametrize("family", [["poisson"], None, 3])
def test_an_unusable_family_has_tags_and_a_picture(family):
    deq = ExpFamilyDEQ(family=family)
    assert not get_tags(deq).input_tags.positive_only
    assert "ExpFamilyDEQ" in deq._repr_html_()


def test_whitened_latents_and_scores_have_the_same_predictors():
    X = sample("poisson")
    scores = model().fit(X)
    latents = clone(scores).set_params(whiten=True).fit(X)
    np.testing.assert_allclose(
        scores.natural_parameters(scores.transform(X)),
        latents.natural_parameters(latents.transform(X)),
        atol=1e-10,
    )
    np.testing.assert_allclose(
        scores.inverse_transform(scores.transform(X)),
        np.exp(scores.natural_parameters(scores.transform(X))),
    )


def test_scores_are_principal():
    X = sample("poisson", n=300, p=20, k=4)
    deq = ExpFamilyDEQ(4, family="poisson", **TIGHT).fit(X)
    scores = deq.transform(X)
    covariance = np.cov(scores.T)
    variance = np.diag(covariance)
    assert (np.diff(variance) < 0).all()
    assert np.abs(covariance - np.diag(variance)).max() < 1e-6 * variance.max()
    np.testing.assert_allclose(deq.components_ @ deq.components_.T, np.eye(4), atol=1e-12)
    largest = np.abs(deq.components_).argmax(axis=1)
    assert (deq.components_[np.arange(4), largest] > 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_components_that_the_penalty_empties_are_zero(dtype):
    X = (digits(300) > 7).astype(dtype)
    X = X[:, X.std(axis=0) > 0]
    deq = ExpFamilyDEQ(20, family="bernoulli", weight_decay=0.3, tol=1e-9, max_iter=1000)
    spread = deq.fit_transform(X).std(axis=0)
    alive = spread > 0
    assert 2 < alive.sum() < 20
    assert spread[alive].min() > 1e-8 * spread.max()
    assert not alive[alive.sum() :].any()


def test_exposure_takes_out_the_size_of_rows():
    rng = np.random.default_rng(0)
    X = sample("poisson", n=300, p=40)
    size = rng.integers(1, 20, len(X))
    counts = rng.poisson(np.exp(0.3 * rng.normal(size=(300, 2)) @ rng.normal(size=(2, 40))))
    counts = rng.poisson((counts.mean(axis=0) + 0.5) * size[:, None]).astype(float)
    plain = model().fit(counts)
    offset = model(exposure="total").fit(counts)

    def correlation(deq):
        return np.abs(np.corrcoef(deq.transform(counts)[:, 0], np.log(size))[0, 1])

    assert correlation(plain) > 0.9
    assert correlation(offset) < 0.2
    # A row's size factor is its own: the mean at unit exposure ignores it.
    doubled = 2 * counts[:5]
    z, W = offset.map_latents(doubled).value, offset.loadings_
    once = np.exp(z @ W.T + offset.intercept_)
    scores = offset.transform(doubled)
    np.testing.assert_allclose(offset.inverse_transform(scores), once, rtol=1e-9)
    exposure = doubled.sum(axis=1, keepdims=True) / counts.sum(axis=1).mean()
    np.testing.assert_allclose(z, (doubled - exposure * once) @ W, atol=1e-9)


def test_exposure_agrees_with_an_explicit_offset():
    X = sample("poisson", n=50, p=15)
    X[:, 0] += 1
    deq = model(exposure="total", whiten=True, fixed_point_tol=1e-12).fit(X)
    total = X.sum(axis=1)
    offset = np.log(total / total.mean())
    z = deq.transform(X)
    mean = np.exp(z @ deq.loadings_.T + deq.intercept_ + offset[:, None])
    np.testing.assert_allclose(z, (X - mean) @ deq.loadings_, atol=1e-9)


class TestStreams:
    def test_likelihood_improves_along_a_stream(self):
        X = sample("poisson", n=3000, p=30, k=3)
        train, test = X[:2500], X[2500:]
        deq = ExpFamilyDEQ(3, family="poisson", random_state=0)
        deq.partial_fit(train[:50])
        first = deq.score(test)
        for batch in np.array_split(train[50:], 49):
            deq.partial_fit(batch)
        full = ExpFamilyDEQ(3, family="poisson", random_state=0).fit(train)
        assert deq.score(test) > first
        # Nine tenths of the way from the first batch to the fit of all the data.
        assert full.score(test) - deq.score(test) < 0.1 * (full.score(test) - first)
        assert deq.n_iter_ == len(deq.loss_curve_)

    def test_pickled_stream_goes_on_bit_for_bit(self):
        X = sample("bernoulli", n=200)
        deq = model("bernoulli").partial_fit(X[:100])
        deq.partial_fit(X[100:150])
        copy = pickle.loads(pickle.dumps(deq))
        one, two = deq.partial_fit(X[150:]), copy.partial_fit(X[150:])
        assert one.loadings_.tobytes() == two.loadings_.tobytes()

    def test_bad_batch_leaves_the_model_as_it_was(self):
        X = sample("poisson")
        deq = model().partial_fit(X)
        before = pickle.dumps(deq)
        for bad, message in (
            (X[:, :5], "X has 5 features"),
            (-X - 1, "Negative values in data"),
            (np.full_like(X, np.inf), "contains infinity"),
        ):
            with pytest.raises(ValueError, match=message):
                deq.partial_fit(bad)
        assert pickle.dumps(deq) == before

    def test_sparse_batches(self):
        X = sample("poisson", n=200)
        dense, sparse = model(), model()
        for batch in np.array_split(X, 4):
            dense.partial_fit(batch)
            sparse.partial_fit(sp.csr_array(batch))
        np.testing.assert_allclose(dense.loadings_, sparse.loadings_, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("family", ["gaussian", "poisson", "bernoulli"])
def test_a_model_that_its_penalties_emptied_says_so(family, dtype):
    X = sample(family, n=200, p=8).astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ExpFamilyDEQ(2, family=family).fit(X)
    with pytest.warns(
        ConvergenceWarning, match=r"All 2 components .* weight_decay=1e\+08 outweigh"
    ) as caught:
        empty = ExpFamilyDEQ(2, family=family, weight_decay=1e8, max_iter=1).fit(X)
    assert len(caught) == 1  # and not that it did not converge either
    np.testing.assert_allclose(empty.transform(X), 0, atol=1e-6)
    if family == "gaussian":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ExpFamilyDEQ(2, weight_decay=1e-20).fit(1e-8 * X)


@pytest.mark.parametrize(
    ("dtype", "advice"), [(np.float32, "float64 data have more"), (np.float64, "; raise alpha")]
)
def test_a_fit_whose_steps_are_all_refused_says_so(monkeypatch, dtype, advice):
    monkeypatch.setattr("skdeq._scoring._MOST_REFUSED", -1)  # as if the first step had been
    X = sample("poisson", n=100, p=8).astype(dtype)
    with pytest.warns(ConvergenceWarning, match=f"after 1 iterations no step lowered .*{advice}"):
        model("poisson").fit(X)


@pytest.mark.parametrize("family", ["gaussian", "poisson", "negative_binomial", "gamma"])
def test_adam_that_diverges_keeps_the_best_parameters(family):
    X = sample(family, n=200, p=12)
    deq = model(family, solver="adam", learning_rate=100.0, batch_size=32, max_iter=10)
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        deq.fit(X)
    assert not deq.converged_
    assert np.isfinite(deq.loadings_).all()
    # The start is the first half-iteration of scoring: never worse than the intercept alone.
    law, x = get_family(family), torch.from_numpy(X)
    latents = torch.from_numpy(deq.map_latents(X).value)
    eta = latents @ torch.from_numpy(deq.loadings_).T + torch.from_numpy(deq.intercept_)
    objective = float((0.5 * latents.square().sum(1) - law.log_prob(x, eta).sum(1)).mean())
    null = law.log_prob(x, law.link(x.mean(0)).expand_as(x)).sum(1).mean()
    assert objective < -float(null)


@pytest.mark.parametrize("fixed_point", ["anderson", "picard"])
@pytest.mark.parametrize("family", FAMILY_OBJECTS, ids=str)
def test_certificates_are_honest(family, fixed_point):
    # Penalties so weak that the layer does not contract, and steps leave the domain.
    X = sample(family, n=200)
    deq = model(family, alpha=0.05, fixed_point_tol=1e-8).fit(X)
    exact = deq.map_latents(X)
    assert exact.converged.all()
    result = deq.set_params(fixed_point=fixed_point).map_latents(X)
    claimed = result.converged
    np.testing.assert_allclose(result.value[claimed], exact.value[claimed], atol=1e-4)
    assert np.isfinite(result.value).all() and np.isfinite(result.residual).all()
    assert np.isfinite(deq.score(X))


@pytest.mark.parametrize("family", ["negative_binomial", "gamma"])
def test_rows_without_weight_take_no_part(family):
    X = sample(family, n=200)
    weight = np.random.default_rng(0).integers(0, 3, 200)
    weighted = model(family).fit(X, sample_weight=weight)
    repeated = model(family).fit(np.repeat(X, weight, axis=0))
    np.testing.assert_allclose(weighted.loadings_, repeated.loadings_, atol=1e-6)
    assert weighted.fit_transform(X, sample_weight=weight).shape == (200, 2)


@pytest.mark.parametrize("method", ["transform", "fit_transform", "score_samples", "score"])
def test_unsolved_rows_are_one_warning(method):
    X = sample("poisson")
    deq = model(fixed_point="picard", fixed_point_max_iter=3).fit(X)
    with pytest.warns(ConvergenceWarning, match=r"latents of \d+ of 80 rows") as caught:
        getattr(deq, method)(X)
    assert len(caught) == 1


@pytest.mark.parametrize("family", ["negative_binomial", "gamma"])
def test_explained_deviance_tells_components_apart(family):
    X = sample(family, n=300, p=12, k=1)
    ratio = ExpFamilyDEQ(4, family=family, random_state=0).fit(X).explained_deviance_ratio_
    assert (ratio >= 0).all() and ratio.sum() < 1
    assert ratio[0] > 1.2 * ratio[1]


def test_explained_deviance_adds_up():
    X = sample("poisson", n=200, p=15, k=3)
    deq = ExpFamilyDEQ(3, family="poisson", random_state=0).fit(X)
    law = get_family("poisson")
    eta = torch.from_numpy(deq.natural_parameters(deq.transform(X)))
    x = torch.from_numpy(X)
    null = law.deviance(x, torch.log(x.mean(0)).expand_as(x)).sum()
    expected = 1 - float(law.deviance(x, eta).sum() / null)
    assert deq.explained_deviance_ratio_.sum() == pytest.approx(expected, abs=1e-6)


def test_memory_mapped_model_is_silent(tmp_path):
    X = sample("poisson")
    deq = model().fit(X)
    joblib.dump(deq, tmp_path / "model")
    mapped = joblib.load(tmp_path / "model", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(mapped.transform(X), deq.transform(X))


def test_adam_reaches_the_objective_of_scoring():
    X = sample("poisson", n=600, p=20)
    full = model(tol=1e-9).fit(X)
    adam = model(solver="adam", batch_size=64, max_iter=40, tol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        adam.fit(X)
    start = adam.loss_curve_[0]
    # Forty epochs; the directions in which loadings and latents trade scale are the slow ones.
    assert min(adam.loss_curve_) - full.loss_curve_[-1] < 5e-3 * full.loss_curve_[-1]
    assert min(adam.loss_curve_) <= start
    scores = adam.transform(X)
    assert np.corrcoef(scores[:, 0], full.transform(X)[:, 0])[0, 1] > 0.99


def test_warm_start_goes_on():
    X = sample("poisson")
    with pytest.warns(ConvergenceWarning):
        cold = model(max_iter=3, tol=0).fit(X)
    warm = clone(cold).set_params(warm_start=True, max_iter=200, tol=1e-8)
    warm.loadings_, warm.intercept_ = cold.loadings_, cold.intercept_
    warm.fit(X)
    assert warm.loss_curve_[0] <= cold.loss_curve_[-1] + 1e-9
    again = warm.fit(X)
    assert again.n_iter_ <= 4


class TestBadInput:
    @pytest.mark.parametrize(
        ("family", "value", "message"),
        [
            ("poisson", -1.0, "Negative values in data.*row 3, column 2.*poisson.*non-negative"),
            ("bernoulli", 1.3, r"row 3, column 2.*1\.3.*bernoulli.*\[0, 1\]"),
            ("continuous_bernoulli", -0.1, r"row 3, column 2.*\[0, 1\]"),
            (Binomial(n_trials=4), 5.0, r"row 3, column 2.*\[0, 4\]"),
            ("gamma", 0.0, r"row 3, column 2.*gamma.*\(0, inf\)"),
            ("rademacher", 2.0, r"row 3, column 2.*\[-1, 1\]"),
            ("gaussian", np.inf, "infinity.*row 3, column 2"),
            ("poisson", np.inf, "infinity.*row 3, column 2"),
        ],
    )
    @pytest.mark.parametrize("layout", [np.asarray, sp.csr_array])
    def test_outside_the_support(self, family, value, message, layout):
        X = sample(family)
        good = X.copy()
        X[3, 2] = value
        if layout is sp.csr_array and (value == 0 or family == "gamma"):
            message = r"gamma.*\(0, inf\)"
        with pytest.raises(ValueError, match=message):
            model(family).fit(layout(X))
        deq = model(family).fit(good)
        before = pickle.dumps(deq)
        with pytest.raises(ValueError, match=message):
            deq.transform(layout(X))
        with pytest.raises(ValueError, match=message):
            deq.fit(layout(X))
        assert pickle.dumps(deq) == before

    def test_column_without_observations(self):
        X = sample("poisson")
        X[:, 4] = np.nan
        for data in (X, sp.csr_array(X)):
            with pytest.raises(ValueError, match="Column 4 of X has no observed entry"):
                model().fit(data)

    def test_too_many_components(self):
        with pytest.raises(ValueError, match=r"n_components=10 .*min\(n_samples, n_features\)=9"):
            ExpFamilyDEQ(10).fit(sample("gaussian"))

    def test_unknown_options_name_the_known_ones(self):
        X = sample("poisson")
        with pytest.raises(ValueError, match="Did you mean 'poisson'.*Known are 'gaussian'"):
            ExpFamilyDEQ(family="poison").fit(X)
        with pytest.raises(ValueError, match="'newton'"):
            ExpFamilyDEQ(fixed_point="newtn").fit(X)
        with pytest.raises(ValueError, match="'scoring'"):
            ExpFamilyDEQ(solver="lbfgs").fit(X)
        with pytest.raises(TypeError, match="famly"):
            ExpFamilyDEQ(famly="poisson")

    @pytest.mark.parametrize("device", ["cuda:77", "gpu", "mps", "cpu:3"])
    def test_device_that_is_not_there(self, device):
        with pytest.raises(ValueError, match="device"):
            ExpFamilyDEQ(device=device).fit(sample("gaussian"))

    def test_exposure_of_a_family_without_one(self):
        with pytest.raises(ValueError, match="exposure='total' needs a family"):
            ExpFamilyDEQ(family="bernoulli", exposure="total").fit(sample("bernoulli"))
        X = sample("poisson")
        with pytest.raises(ValueError, match="must be 'total' or None; got 'totals'"):
            ExpFamilyDEQ(family="poisson", exposure="totals").fit(X)
        with pytest.raises(TypeError, match="an object of type ndarray. Exposures that were meas"):
            ExpFamilyDEQ(family="poisson", exposure=X.sum(1)).fit(X)

    def test_gaussian_data_of_next_to_no_spread_are_to_be_scaled(self):
        X = 0.01 * sample("gaussian")
        with pytest.warns(
            ConvergenceWarning, match=r"are zero.* X may have to be scaled to more\."
        ):
            ExpFamilyDEQ(2).fit(X)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_values_that_overflow(self, dtype):
        X = sample("gaussian").astype(dtype) * np.sqrt(np.finfo(dtype).max)
        with pytest.raises(ValueError, match="Rescale X below"):
            ExpFamilyDEQ().fit(X)

    def test_others(self):
        X = sample("gaussian")
        with pytest.raises(NotFittedError):
            ExpFamilyDEQ().transform(X)
        for text in (np.array([[1, 2], [3, "d"]], dtype=object), [["1", "2"], ["3", "d"]]):
            with pytest.raises(ValueError, match="row 1, column 1 of X is 'd' .could not convert"):
                ExpFamilyDEQ().fit(text)
        with pytest.raises(ValueError, match="0 sample"):
            ExpFamilyDEQ().fit(X[:0])
        with pytest.raises(ValueError, match="at least one non-zero number"):
            ExpFamilyDEQ().fit(X, sample_weight=np.zeros(80))
        with pytest.raises(ValueError, match="Negative values in data passed to `sample_weight`"):
            ExpFamilyDEQ().fit(X, sample_weight=-np.ones(80))
        deq = ExpFamilyDEQ().fit(X)
        with pytest.raises(ValueError, match="Z has 3 columns, but this model has 2 components"):
            deq.inverse_transform(np.zeros((1, 3)))


class TestDifficultData:
    def check(self, deq, X):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", ConvergenceWarning)
            deq.fit(X)
            scores = deq.transform(X)
        for values in (scores, deq.loadings_, deq.intercept_, deq.components_, deq.loss_curve_):
            assert np.isfinite(values).all()
        assert np.isfinite(deq.explained_deviance_ratio_).all()
        assert np.isfinite(deq.score(X))
        return scores

    @pytest.mark.parametrize("family", FAMILY_OBJECTS, ids=str)
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_constant_column_and_duplicated_rows(self, family, dtype):
        X = sample(family)
        X[:, 2] = X[0, 2]
        X[10:20] = X[9]
        scores = self.check(model(family), X.astype(dtype))
        np.testing.assert_allclose(scores[10:20] - scores[9], 0, atol=1e-6)

    @pytest.mark.parametrize("family", ["poisson", "bernoulli", "binomial", "negative_binomial"])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_zero_rows_and_columns(self, family, dtype):
        X = sample(family)
        X[3] = 0
        X[:, 5] = 0
        deq = model(family)
        self.check(deq, X.astype(dtype))
        assert np.abs(deq.loadings_[5]).max() < 1
        self.check(model(family), sp.csr_array(X.astype(dtype)))

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_nothing_but_zeros(self, dtype):
        for exposure in (None, "total"):
            self.check(model(exposure=exposure), np.zeros((20, 5), dtype=dtype))

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("exposure", [None, "total"])
    def test_huge_counts(self, dtype, exposure):
        X = sample("poisson", n=60)
        X = np.random.default_rng(0).poisson(1e6 * (1 + X)).astype(dtype)
        deq = model(exposure=exposure)
        self.check(deq, X)
        fitted = deq.inverse_transform(deq.transform(X))
        if exposure is None:
            assert np.corrcoef(np.log(fitted).ravel(), np.log(X).ravel())[0, 1] > 0.7

    @pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e3, 1e8])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_scales(self, scale, dtype):
        self.check(model("gaussian"), (scale * sample("gaussian")).astype(dtype))

    def test_tiny_scales_are_pca_with_small_penalties(self):
        X = 1e-8 * sample("gaussian")
        deq = ExpFamilyDEQ(2, alpha=1e-16, weight_decay=1e-16, **TIGHT).fit(X)
        scores = PCA(2, svd_solver="full").fit_transform(X)
        np.testing.assert_allclose(deq.transform(X), scores, atol=1e-6 * np.abs(scores).max())

    def test_separable_answers_stay_finite(self):
        X = np.repeat(np.eye(4), 10, axis=0).repeat(3, axis=1)
        self.check(model("bernoulli", weight_decay=0.0), X)
        self.check(model("bernoulli", weight_decay=1e-8, alpha=1e-8), X)

    def test_one_row_at_transform(self):
        X = sample("poisson")
        deq = model().fit(X)
        np.testing.assert_allclose(deq.transform(X[:1]), deq.transform(X)[:1], atol=1e-10)

    def test_as_many_components_as_columns(self):
        X = sample("poisson", n=40, p=6)
        self.check(ExpFamilyDEQ(6, family="poisson", random_state=0), X)

    @pytest.mark.parametrize("alpha", [1e-8, 1e8])
    @pytest.mark.parametrize("weight_decay", [0.0, 1e8])
    def test_extreme_penalties(self, alpha, weight_decay):
        self.check(model(alpha=alpha, weight_decay=weight_decay), sample("poisson"))

    def test_layouts_and_types(self):
        X = sample("poisson")
        reference = model().fit(X).transform(X)
        read_only = X.copy()
        read_only.flags.writeable = False
        for other in (
            np.asfortranarray(X),
            X[::-1][::-1],
            X.astype(np.uint8),
            X.astype(int),
            X.tolist(),
            read_only,
            np.repeat(X, 2, axis=1)[:, ::2],
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                scores = model().fit(other).transform(other)
            np.testing.assert_allclose(scores, reference, atol=1e-9)
        assert (X == sample("poisson")).all()


def test_not_converged_is_one_warning_that_says_what_to_do():
    with pytest.warns(ConvergenceWarning, match="increase max_iter or tol") as caught:
        deq = model(max_iter=1, tol=0).fit(sample("poisson"))
    assert len(caught) == 1
    assert deq.converged_ is False and deq.n_iter_ == 1


def test_pickles_and_clones():
    X = sample("poisson")
    deq = ExpFamilyDEQ(2, family=Binomial(n_trials=50), random_state=0).fit(X)
    for other in (pickle.loads(pickle.dumps(deq)), joblib.hash(deq) and clone(deq).fit(X)):
        assert other.family == Binomial(n_trials=50)
        np.testing.assert_array_equal(other.transform(X), deq.transform(X))
    # Nothing of the training data, and no tensor, goes along.
    assert not any(isinstance(value, torch.Tensor) for value in vars(deq).values())
    big = model().fit(sample("poisson", n=4000))
    assert len(pickle.dumps(big)) < 20_000


def test_pickle_of_another_version_warns():
    deq = model().fit(sample("poisson"))
    state = deq.__getstate__()
    assert state["_skdeq_version"]
    with pytest.warns(UserWarning, match=r"saved by skdeq 0\.0\.1"):
        ExpFamilyDEQ().__setstate__({**state, "_skdeq_version": "0.0.1"})


def test_drop_in_for_pca_in_a_search_over_two_processes():
    data = load_digits()
    X, y = (data.data[:300] > 7).astype(float), data.target[:300]
    pipeline = make_pipeline(
        ExpFamilyDEQ(family="bernoulli", random_state=0), LogisticRegression(max_iter=2000)
    )
    search = GridSearchCV(pipeline, {"expfamilydeq__n_components": [2, 8]}, cv=3, n_jobs=2)
    search.fit(X, y)
    assert search.best_params_ == {"expfamilydeq__n_components": 8}
    assert search.best_score_ > 0.8


def test_names_and_data_frames():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(sample("poisson"), columns=[f"gene{j}" for j in range(9)])
    deq = model().fit(frame)
    assert list(deq.feature_names_in_) == list(frame.columns)
    assert list(deq.get_feature_names_out()) == ["expfamilydeq0", "expfamilydeq1"]
    scores = deq.set_output(transform="pandas").transform(frame)
    assert list(scores.columns) == ["expfamilydeq0", "expfamilydeq1"]


def test_interrupted_fit_leaves_nothing_behind(monkeypatch):
    import skdeq._scoring as scoring

    X = sample("poisson")
    threads = torch.get_num_threads()
    calls = []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    original = scoring.newton_step
    monkeypatch.setattr(scoring, "newton_step", interrupt)
    deq = model()
    with pytest.raises(KeyboardInterrupt):
        deq.fit(X)
    assert not hasattr(deq, "components_") and not hasattr(deq, "n_features_in_")
    assert torch.get_num_threads() == threads


def test_verbose_prints_a_line_for_each_iteration(capsys):
    deq = model(verbose=1).fit(sample("poisson"))
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1 + deq.n_iter_
    assert "objective" in lines[1]


@pytest.mark.parametrize("device", [CUDA])
def test_devices_agree(device):
    X = sample("poisson", n=300, p=20)
    reference = model(device="cpu").fit(X)
    deq = model(device=device).fit(X)
    np.testing.assert_allclose(deq.transform(X), reference.transform(X), atol=1e-5)
    copy = pickle.loads(pickle.dumps(deq)).set_params(device="cpu")
    np.testing.assert_allclose(copy.transform(X), deq.transform(X), atol=1e-6)


def test_memory_stays_within_the_chunks():
    # The latents and loadings of 4 MB; the predictors of all rows at once would be 80 MB.
    pytest.importorskip("resource")
    # In a process of its own, whose peak is not that of a test before.
    code = """
import resource, warnings
import numpy as np, scipy.sparse as sp
from skdeq import ExpFamilyDEQ
warnings.simplefilter("ignore")
X = sp.random(20_000, 500, density=0.02, format="csr", random_state=0)
X.data = np.ceil(3 * X.data)
deq = ExpFamilyDEQ(3, family="poisson", max_iter=2, tol=0, random_state=0).fit(X[:2000])
peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
deq.fit(X)
peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[1] - peaks[0])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown = int(run.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 64 * 2**20


def test_a_family_of_the_users_own_has_the_model_of_its_twin():
    from skdeq.families import Family, Interval

    class Exponential(Family):
        name = "exponential"
        support = Interval(0, np.inf, False, False)
        domain = Interval(-np.inf, 0, False, False)
        accepts = "positive numbers"

        def log_partition(self, eta):
            return torch.where(eta < 0, -torch.log(-eta), torch.inf)

        def mean(self, eta):
            return torch.where(eta < 0, -1 / eta, torch.inf)

        def variance(self, eta):
            return torch.where(eta < 0, 1 / eta.square(), torch.inf)

        def log_base(self, x):
            return torch.zeros_like(x)

    X = sample("gamma")
    mine = ExpFamilyDEQ(2, family=Exponential(), **{**TIGHT, "tol": 1e-9}).fit(X)
    # The exponential law is the gamma law of shape one.
    ours = ExpFamilyDEQ(2, family="gamma", **{**TIGHT, "tol": 1e-9}).fit(X)
    np.testing.assert_allclose(mine.transform(X), ours.transform(X), atol=1e-4)
    assert mine.score(X) == pytest.approx(ours.score(X), abs=1e-6)


@pytest.mark.parametrize("family", ["gamma", "negative_binomial"])
def test_a_warm_start_that_is_worse_than_nothing_is_dropped(family):
    X = sample("poisson", n=100, p=12) + 0.1
    cold = ExpFamilyDEQ(2, family=family, random_state=0).fit(X)
    warm = ExpFamilyDEQ(2, warm_start=True, random_state=0).fit(X)
    warm.set_params(family=family).fit(X)
    assert_allclose(warm.loss_curve_, cold.loss_curve_)


def test_the_end_of_the_schedule_is_no_convergence():
    rng = np.random.default_rng(0)
    rate = np.exp(0.7 * rng.normal(size=(100, 2)) @ rng.normal(size=(2, 12)))
    X = rng.poisson(rate).astype(float)
    model = ExpFamilyDEQ(2, family="poisson", solver="adam", warm_start=True, random_state=0)
    assert model.fit(X).converged_
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        model.fit(10 * X)
    assert not model.converged_


def test_components_that_are_all_empty_are_zero():
    X = np.random.default_rng(1).normal(size=(60, 5))
    with pytest.warns(ConvergenceWarning, match="All 2 components"):
        scores = ExpFamilyDEQ(2, weight_decay=5).fit_transform(X)
    assert (scores == 0).all()


def test_shares_of_predictors_far_out():
    rng = np.random.default_rng(0)
    rate = np.exp(rng.normal(size=(200, 2)) @ rng.normal(size=(2, 30)) / 2)
    X = (rng.poisson(rate) > 1).astype(float)
    model = ExpFamilyDEQ(2, family="bernoulli", alpha=1e-5, weight_decay=1e-5 / 200)
    scores = model.set_params(random_state=0).fit_transform(X)
    eta = model.natural_parameters(scores)
    assert np.abs(eta).max() > 1e4

    def deviance(eta):
        return 2 * np.sum(np.logaddexp(0, eta) - X * eta)

    null = deviance(np.broadcast_to(logit(X.mean(axis=0)), X.shape))
    assert_allclose(model.explained_deviance_ratio_.sum(), 1 - deviance(eta) / null, rtol=1e-6)
    assert (model.explained_deviance_ratio_ > 0).all()


def test_a_model_that_is_worse_than_its_intercept_says_so(monkeypatch):
    X = sample("bernoulli", n=60)
    nothing = torch.zeros(2, dtype=torch.float64)
    monkeypatch.setattr(expfam_base, "explained_deviance", lambda *_: (nothing, -0.5, 1.0))
    model = ExpFamilyDEQ(2, family="bernoulli", weight_decay=0.1, random_state=0)
    with pytest.warns(ConvergenceWarning, match="explain less than none.*weight_decay=0.1"):
        model.fit(X)
    assert model.components_.any()
    assert model.transform(X).any()


@pytest.mark.parametrize("end", [0.0, 1.0])
@pytest.mark.parametrize("layout", [np.asarray, sp.csr_array])
def test_columns_at_an_end_of_a_density(end, layout):
    X = np.random.default_rng(0).random((40, 5))
    X[:, [1, 3]] = end
    X[2, 3] = np.nan
    model = ExpFamilyDEQ(2, family="continuous_bernoulli", max_iter=2, tol=1.0, random_state=0)
    with pytest.warns(UserWarning, match=rf"Column 1 of X is {end:g} .*\(2 such columns in all\)"):
        model.fit(layout(X))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Column")
        model.fit(layout(X[:, [0, 2, 4]]))


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_array])
def test_a_column_seen_in_rows_without_weight_alone_is_refused(layout):
    X = sample("poisson", n=30, p=5).astype(float)
    X[:28, 4] = np.nan
    weight = np.r_[np.ones(28), 0, 0]
    with pytest.raises(ValueError, match="Column 4 of X has no observed entry.*positive weight"):
        ExpFamilyDEQ(2, family="poisson").fit(layout(X), sample_weight=weight)


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_array])
def test_what_rounding_took_beyond_an_end_is_put_back(layout):
    X = sample("bernoulli", n=40, p=5).astype(float)
    X[:2] = 0, 0, 1, 0, 1
    rounded = np.where(X == 1, np.nextafter(1, 2), X)
    kept = layout(rounded)
    one, other = (ExpFamilyDEQ(2, family="bernoulli").fit(data) for data in (X, kept))
    np.testing.assert_allclose(one.loadings_, other.loadings_, atol=1e-12)
    # What was given is left as it was.
    assert kept.max() > 1
    kept = layout(np.where(X == 1, 1 + 1e-9, X))
    with pytest.raises(ValueError, match="row 0, column 2 of X is 1"):
        one.transform(kept)


@pytest.mark.parametrize("family", ["gamma", "poisson"])
def test_rows_without_weight_take_no_part_in_a_stream(family):
    X = sample(family, n=60, p=5).astype(float)
    outliers = np.full((5, 5), 1e6)
    weight = np.r_[np.ones(30), np.zeros(5)]
    first, second = X[:30], X[30:]
    with_them, without = (
        ExpFamilyDEQ(2, family=family, random_state=0).partial_fit(first) for _ in range(2)
    )
    with_them.partial_fit(np.vstack([second, outliers]), sample_weight=weight)
    without.partial_fit(second, sample_weight=weight[:30])
    for name in ("loadings_", "intercept_", "explained_deviance_ratio_", "_curvature"):
        np.testing.assert_array_equal(getattr(with_them, name), getattr(without, name))


@pytest.mark.parametrize("asked", [{"n_components": 3}, {"hidden_layer_sizes": (4,)}])
def test_a_stream_does_not_change_its_sizes(asked):
    X = sample("poisson", n=30, p=5)
    model = ExpFamilyDEQ(2, family="poisson", random_state=0).partial_fit(X)
    with pytest.raises(ValueError, match="partial_fit goes on with the .* call fit to start anew"):
        model.set_params(**asked).partial_fit(X)


def test_steps_of_minibatches_shrink_to_the_end():
    # The last batch of an epoch may be smaller, and is a step all the same.
    X = sample("bernoulli", n=300, p=10)
    model = ExpFamilyDEQ(
        2, family="bernoulli", solver="adam", max_iter=40, tol=0.0, random_state=0
    )
    with pytest.warns(ConvergenceWarning):
        curve = np.array(model.fit(X).loss_curve_)
    changes = np.abs(np.diff(curve))
    assert changes[-3:].max() < 0.1 * changes[15:20].max()


def test_without_an_optimum_a_fit_says_so_once():
    X = (np.random.default_rng(0).random((200, 12)) < 0.5).astype(float)
    model = ExpFamilyDEQ(2, family="bernoulli", weight_decay=0, random_state=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(X)
    assert len(caught) == 1
    assert "no finite optimum" in str(caught[0].message)
    assert not model.converged_


@pytest.mark.parametrize(
    "options",
    [{}, {"canonical_map": "softplus"}, {"canonical_map": "relu"}, {"family": "gamma"}],
    ids=str,
)
def test_large_predictors_alone_are_no_missing_optimum(options):
    rng = np.random.default_rng(0)
    X = 1e3 * (rng.normal(size=(100, 1)) @ rng.normal(size=(1, 8)) + 20)
    X += 100 * rng.normal(size=X.shape)
    if options.get("family") == "gamma":
        X /= 1e9
    model = ExpFamilyDEQ(1, weight_decay=0, random_state=0, max_iter=300, tol=1e-4, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no finite optimum")
        model.fit(X)


@pytest.mark.parametrize("dtype", ["int64", "uint8", "int16", "float32", "float64"])
def test_masked_entries_are_missing(dtype):
    X = sample("poisson").astype(dtype)
    mask = np.random.default_rng(0).random(X.shape) < 0.2
    gaps = np.where(mask, np.nan, X.astype("float32" if dtype == "float32" else float))
    masked = np.ma.array(X, mask=mask)
    fitted = model().fit(masked)
    np.testing.assert_array_equal(fitted.loadings_, model().fit(gaps).loadings_)
    np.testing.assert_array_equal(fitted.transform(masked), fitted.transform(gaps))
    assert fitted.loadings_.dtype == gaps.dtype
    with pytest.raises(ValueError, match="contains NaN"):
        ImplicitEMEncoder(2).fit(masked)


@pytest.mark.parametrize("method", ["fit", "fit_transform", "transform", "partial_fit"])
def test_warnings_point_at_the_line_of_the_caller(method):
    X = sample("poisson")
    fitted = model(max_iter=1, fixed_point_max_iter=1, tol=0.0)
    if method in ("transform", "partial_fit"):
        with pytest.warns(ConvergenceWarning):
            fitted.fit(X)
    if method == "partial_fit":
        X = X.astype(np.float32)
        fitted = model(weight_decay=1e6)
    with pytest.warns(ConvergenceWarning) as caught:
        getattr(fitted, method)(X)
    assert {one.filename for one in caught} == {__file__}


def test_explained_deviance_of_large_data_does_not_hang_on_the_order_of_the_rows():
    rng = np.random.default_rng(0)
    X = 0.1 * rng.normal(size=(2000, 1600))
    # Two rows apart, as evenly spaced rows would be.
    X[1::2] += rng.normal(size=(1000, 1)) @ rng.normal(size=(1, 1600))
    shares = [
        float(ExpFamilyDEQ(1, random_state=0).fit(X[order]).explained_deviance_ratio_[0])
        for order in (slice(None), rng.permutation(2000))
    ]
    whole = PCA(1).fit(X).explained_variance_ratio_[0]
    np.testing.assert_allclose(shares, whole, rtol=0.02)


def test_scores_of_few_rows_among_many_are_no_dust():
    rng = np.random.default_rng(0)
    X = np.zeros((3000, 800))
    X[::1000] = 100 * rng.normal(size=(3, 800))
    fitted = ExpFamilyDEQ(1, random_state=0).fit(X)
    assert np.ptp(fitted.transform(X)) > 100


def test_a_dense_fit_has_no_kernels_of_an_earlier_one():
    X = sample("poisson")
    options = {"loadings": "conv2d", "image_shape": (3, 3), "kernel_size": 3, "max_iter": 2}
    fitted = ExpFamilyDEQ(1, family="poisson", tol=1.0, **options).fit(X)
    assert fitted.kernels_.shape == (1, 1, 3, 3)
    assert not hasattr(fitted.set_params(loadings="dense").fit(X), "kernels_")


@pytest.mark.parametrize(
    ("fitted_with", "asked"),
    [
        ({}, {"exposure": "total"}),
        ({"exposure": "total"}, {"exposure": None}),
        ({}, {"family": "gamma"}),
        ({"family": Binomial(50)}, {"family__n_trials": 60}),
        ({}, {"canonical_map": "softplus"}),
        ({}, {"alpha": 2.0}),
        ({"hidden_layer_sizes": (3,), "max_iter": 2}, {"hidden_map": "relu"}),
    ],
)
def test_another_law_than_was_fitted_is_refused(fitted_with, asked):
    X = sample("poisson")
    model = ExpFamilyDEQ(2, **{"family": "poisson", "tol": 1.0, "random_state": 0, **fitted_with})
    before = model.fit(X).transform(X)
    was = {name: model.get_params()[name] for name in asked}
    model.set_params(**asked)
    methods = [model.transform, model.score, model.row_exposures, lambda X: model.to_module()]
    for method in (*methods, lambda X: model.inverse_transform(before)):
        with pytest.raises(ValueError, match="was not fitted with .* but with .*; call fit again"):
            method(X)
    np.testing.assert_array_equal(model.set_params(**was).transform(X), before)
    # What does not enter the law may change.
    model.set_params(n_components=1, weight_decay=1.0, fixed_point_max_iter=60)
    np.testing.assert_array_equal(model.transform(X), before)


def likely_binary(n_components, seed):
    """Yes/no rows of rank two as float32, and a model with next to no penalties."""
    rng = np.random.default_rng(seed)
    predictors = 0.9 * rng.normal(size=(400, 2)) @ rng.normal(size=(2, 30))
    X = (rng.random(predictors.shape) < expit(predictors)).astype(np.float32)
    penalties = {"alpha": 1e-5, "weight_decay": 1e-5 / 400}
    return X, ExpFamilyDEQ(n_components, family="bernoulli", random_state=0, **penalties)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n_components", [2, 3, 5])
def test_float32_rows_never_end_above_where_they_started(n_components, seed):
    # Far out the rounding of an objective is as large as that itself.
    X, model = likely_binary(n_components, seed)
    model.fit(X)

    def objectives(latents):
        eta = latents @ model.loadings_.T.astype(float) + model.intercept_.astype(float)
        terms = np.logaddexp(0, eta) - X * eta
        return terms.sum(1) + 0.5 * model.alpha * (latents**2).sum(1)

    found = model.map_latents(X)
    latents, solved = found.value.astype(float), found.converged
    assert np.all(objectives(latents) <= objectives(0 * latents) * (1 + 1e-5))
    exact = model.map_latents(X.astype(float)).value
    assert solved.mean() > 0.95
    # What rounding of the predictors, which are in the hundreds and more, comes to over a row.
    assert_allclose(objectives(latents)[solved], objectives(exact)[solved], rtol=0, atol=0.05)


@pytest.mark.parametrize("alpha", [1e-12, 1e-9, 1e9, 1e12])
def test_only_the_product_of_the_penalties_counts_in_float32_too(alpha):
    X = sample("poisson").astype(np.float32)
    options = {"family": "poisson", "random_state": 0}
    expected = ExpFamilyDEQ(2, alpha=1.0, weight_decay=0.03, **options).fit(X)
    model = ExpFamilyDEQ(2, alpha=alpha, weight_decay=0.03 / alpha, **options).fit(X)
    assert_allclose(model.loss_curve_[-1], expected.loss_curve_[-1], rtol=1e-4)
    assert_allclose(model.score(X), expected.score(X), rtol=1e-4)
    assert model.transform(X).dtype == model.loadings_.dtype == np.float32


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_rows_through_a_kink_take_as_many_iterations_in_float32():
    rng = np.random.default_rng(0)
    means = 3 * np.maximum(rng.normal(size=(100, 3)) @ rng.normal(size=(3, 20)) + 1, 0)
    X = (means + rng.normal(size=means.shape)).astype(np.float32)
    model = ExpFamilyDEQ(3, canonical_map="relu", max_iter=5, random_state=0).fit(X)
    model.set_params(fixed_point="anderson")
    wide, narrow = model.map_latents(X.astype(float)), model.map_latents(X)
    # Without the curvature of the fit it takes half as many again.
    assert narrow.n_iter.mean() < 1.1 * wide.n_iter.mean()
    assert narrow.converged.sum() >= wide.converged.sum()


def clamped(x, least):
    return torch.clamp(x, min=least)


class Helped(type(get_family("poisson"))):
    def __init__(self):
        self.shape = functools.partial(clamped, least=0.0)
        self.method = self.mean


def test_a_family_with_helpers_that_equal_no_copy_is_the_one_that_was_fitted():
    X = sample("poisson")
    model = ExpFamilyDEQ(2, family=Helped(), random_state=0).fit(X)
    expected = model.transform(X)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).transform(X), expected)
    assert model.partial_fit(X).n_iter_ > 1


class Shaped(Poisson):
    """Counts with another statistic, whose function is a parameter."""

    def __init__(self, shape):
        self.shape = shape

    def sufficient(self, x):
        return torch.as_tensor(self.shape(x.detach()), dtype=x.dtype)

    def log_base(self, x):
        return -torch.lgamma(x + 1)


class Power(torch.nn.Module):
    def __init__(self, exponent):
        super().__init__()
        self.exponent = torch.nn.Parameter(torch.tensor([exponent, 1.0]))

    def forward(self, x):
        return (x ** self.exponent.prod()).detach()


@pytest.mark.parametrize(
    ("shape", "other"),
    [
        (np.log1p, np.sqrt),
        (functools.partial(clamped, least=0.5), functools.partial(clamped, least=1.5)),
        (Power(0.5), Power(0.7)),
    ],
)
def test_laws_with_other_functions_are_other_laws(shape, other):
    X = sample("poisson")
    model = ExpFamilyDEQ(2, family=Shaped(shape), max_iter=2, tol=1.0, random_state=0).fit(X)
    expected = model.transform(X)
    np.testing.assert_array_equal(copy.deepcopy(model).transform(X), expected)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).transform(X), expected)
    with pytest.raises(ValueError, match="was not fitted with family="):
        model.set_params(family=Shaped(other)).transform(X)


def test_a_law_that_holds_itself_is_compared_with_its_copies():
    class Helper:
        pass

    family = Shaped(np.log1p)
    family.helper, family.other = Helper(), Helper()
    for one in (family.helper, family.other):
        one.owner, one.parts = family, [None, {"weights": np.arange(3)}]
    copied = copy.deepcopy(family)
    assert copied == family
    copied.other.parts[1]["weights"][2] = 5
    assert copied != family


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.log1p, np.sqrt),
        (torch.exp, torch.log),
        (Poisson, Binomial),
        (None, 0.5),
        (np.arange(3), np.arange(4)),
        (torch.arange(3), torch.arange(3.0)),
        ([1, np.ones(2)], [1, np.zeros(2)]),
        ({"a": (1, 2)}, {"a": (1, 3)}),
        (functools.partial(clamped, least=1), functools.partial(clamped, least=2)),
        (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),
    ],
)
def test_parameters_equal_their_copies_alone(one, other):
    assert Shaped(one) == Shaped(copy.deepcopy(one)) == Shaped(one)
    assert Shaped(one) != Shaped(other) != Shaped(one)


def test_only_what_was_fitted_says_which_parameters_of_the_law_count():
    X = sample("poisson")
    options = {"family": "poisson", "max_iter": 2, "tol": 1.0, "random_state": 0}
    deep = ExpFamilyDEQ(2, hidden_layer_sizes=(4,), hidden_map="relu", **options).fit(X)
    deep.set_params(hidden_layer_sizes=(), hidden_map="tanh")
    with pytest.raises(ValueError, match="was not fitted with hidden_map='tanh' but with 'relu'"):
        deep.transform(X)
    one = ExpFamilyDEQ(2, **options).fit(X)
    expected = one.transform(X)
    one.set_params(hidden_map="relu", image_shape=(3, 3), n_components=20, solver="adam")
    np.testing.assert_array_equal(one.transform(X), expected)


def test_rows_that_are_not_solved_are_a_warning_whatever_a_later_fit_is_to_be():
    X = sample("poisson")
    options = {"hidden_layer_sizes": (4,), "hidden_map": "relu", "max_iter": 2, "tol": 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        deep = ExpFamilyDEQ(2, family="poisson", random_state=0, **options).fit(X)
    deep.set_params(n_components=6, solver="scoring", fixed_point_max_iter=1)
    with pytest.warns(ConvergenceWarning, match="rows are not solved"):
        deep.transform(X)


def test_a_family_with_an_array_for_parameter_streams():
    class Scaled(type(get_family("poisson"))):
        def __init__(self, table):
            self.table = table

    X = sample("poisson")
    stream = ExpFamilyDEQ(2, family=Scaled(np.arange(3.0)), random_state=0).partial_fit(X)
    stream.set_params(family=Scaled(np.arange(3.0))).partial_fit(X)
    with pytest.raises(ValueError, match="partial_fit goes on with the model there is"):
        stream.set_params(family=Scaled(np.arange(4.0))).partial_fit(X)


def test_rows_for_which_float32_has_too_few_digits_are_not_certified():
    rng = np.random.default_rng(0)
    X = rng.poisson(np.exp(rng.normal(size=(300, 6)) @ rng.normal(size=(6, 12)) / 2.0))
    X = X.astype(np.float32)
    fitted = ExpFamilyDEQ(6, family="poisson", alpha=1e-6, random_state=0).fit(X)
    assert fitted.map_latents(X).converged.all()
    gaps = X[:40].copy()
    for row in gaps:
        row[rng.permutation(12)[:9]] = np.nan
    single, double = fitted.map_latents(gaps), fitted.map_latents(gaps.astype(float))
    assert double.converged.all()
    error = abs(single.value - double.value).max(axis=1) / abs(double.value).max(axis=1)
    assert error[single.converged].max() < 0.005 < error[~single.converged].max()
    with pytest.warns(ConvergenceWarning, match="pass float64 data"):
        fitted.transform(gaps)


@pytest.mark.parametrize("options", [{}, {"alpha": 10.0}, {"weight_decay": 0.3}], ids=str)
@pytest.mark.parametrize("origin", [1e5, 1e6])
def test_rounding_far_from_the_origin_is_no_want_of_convergence(options, origin):
    rng = np.random.default_rng(3)
    X = rng.normal(size=(300, 2)) @ rng.normal(size=(2, 6)) + rng.normal(size=(300, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        far = ExpFamilyDEQ(2, random_state=0, **options).fit(X + origin)
    near = ExpFamilyDEQ(2, random_state=0, **options).fit(X)
    assert_allclose(far.components_, near.components_, atol=1e-4)


def test_a_density_without_a_bound_leaves_the_scores_of_images_alone():
    X, y = load_digits(return_X_y=True)
    # Of a pixel that is nearly always 0 the density there is far above that of the cut-off.
    X = X / 16 * (X > 4)
    with pytest.warns(UserWarning, match=r"Column 0 of X is 0 wherever .* \(11 such columns"):
        fitted = ExpFamilyDEQ(8, family="continuous_bernoulli", random_state=0).fit(X[:900])
    # Pixels without an optimum do not keep the others from theirs.
    assert fitted.converged_
    assert 0.1 < fitted.explained_deviance_ratio_.sum() < 1
    classifier = LogisticRegression(max_iter=1000)
    pipeline = make_pipeline(StandardScaler(), classifier).fit(fitted.transform(X[:900]), y[:900])
    assert pipeline.score(fitted.transform(X[900:]), y[900:]) > 0.75


@pytest.mark.parametrize("shape", [(600, 40), (40, 600)], ids=str)
def test_complete_gaussian_data_start_at_their_optimum(shape, monkeypatch):
    rng = np.random.default_rng(0)
    X = rng.normal(size=shape) + 3 * rng.normal(size=(shape[0], 3)) @ rng.normal(
        size=(3, shape[1])
    )
    # As of data that are too large for it, but that they are Gaussian.
    monkeypatch.setattr("skdeq._spectral._EXACT_ENTRIES", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        first = ExpFamilyDEQ(3, weight_decay=0.3, max_iter=1, random_state=0).fit(X)
    values = np.linalg.svd(X - X.mean(axis=0), compute_uv=False)
    # The singular values less sqrt(n alpha n weight_decay), as of a penalised nuclear norm.
    n = len(X)
    shrunk = np.maximum(values[:3] - n * np.sqrt(0.3 / n), 0)
    fitted = first.transform(X) @ first.components_
    np.testing.assert_allclose(
        np.linalg.svd(fitted - fitted.mean(axis=0), compute_uv=False)[:3], shrunk, rtol=1e-5
    )


@pytest.mark.parametrize("family", ["continuous_bernoulli", "bernoulli"])
def test_what_a_scaler_has_rounded_beyond_the_support_is_accepted(family):
    X = np.random.default_rng(0).random((50, 4))
    X[0], X[1] = 1.0, 0.0
    beyond = X.copy()
    beyond[0], beyond[1] = 1 + 2.3e-16, -1e-17
    make = ExpFamilyDEQ(2, family=family, max_iter=5, tol=1.0, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        expected = make.fit(X).transform(X)
        np.testing.assert_array_equal(make.fit(beyond).transform(beyond), expected)
    assert beyond[0, 0] > 1
    beyond[2, 1] = 1.001
    with pytest.raises(ValueError, match="row 2, column 1 of X is 1.001"):
        make.fit(beyond)


def test_whitened_latents_of_an_empty_model_are_zero():
    X = np.random.default_rng(0).poisson(0.05, (150, 6)).astype(float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        latents = ExpFamilyDEQ(4, family="poisson", alpha=20.0, whiten=True).fit_transform(X)
    assert not latents.any()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rows_that_lack_digits_are_not_told_to_iterate():
    rng = np.random.default_rng(0)
    eta = rng.normal(size=(60, 2)) @ rng.normal(size=(2, 12)) * 0.6 + rng.normal(size=12) * 0.3
    X = rng.poisson(np.exp(eta + 0.5) * rng.gamma(1.0, 1.0, eta.shape)) * 1e6
    deq = ExpFamilyDEQ(3, family="negative_binomial").fit(X)
    result = deq.map_latents(X)
    if result.converged.all():
        pytest.skip("all rows have digits enough here")
    with pytest.warns(ConvergenceWarning, match="digits do not tell the latents apart") as caught:
        deq.transform(X)
    assert "fixed_point_max_iter" not in str(caught[0].message)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_what_starts_from_zero_does_so_in_fit_transform():
    X = sample("bernoulli", n=200, p=8)
    model = ExpFamilyDEQ(2, family="bernoulli", fixed_point="picard", fixed_point_max_iter=5)
    np.testing.assert_array_equal(model.fit_transform(X), model.transform(X))


def test_architecture_is_of_parameters_that_are_valid():
    with pytest.raises(ValueError, match="n_components"):
        ExpFamilyDEQ(0).architecture()
    with pytest.raises(ValueError, match="hidden_layer_sizes"):
        ExpFamilyDEQ(hidden_layer_sizes=5).architecture()


def test_components_of_fractions_of_counts_are_empty_and_said_to_be_so():
    X = sample("poisson", n=100, p=8) / 1e4
    with pytest.warns(ConvergenceWarning, match="of counts, that they are no fractions"):
        ExpFamilyDEQ(2, family="poisson").fit(X)
    X = sample("gamma", n=100, p=8) * 1e-4
    with pytest.warns(ConvergenceWarning, match="canonical_map='log', which does not depend"):
        ExpFamilyDEQ(2, family="gamma").fit(X)
