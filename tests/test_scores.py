"""Scores against Laplace's formula, written out with scipy's laws or torch's own Hessians."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import log_joint, sample
from numpy.testing import assert_allclose
from scipy import stats

from skdeq import ExpFamilyDEQ
from skdeq._likelihood import _log_determinant
from skdeq.families import ReLU


@pytest.mark.parametrize("exposure", [None, "total"])
@pytest.mark.parametrize("layout", [np.asarray, sp.csr_array])
def test_score_of_counts(exposure, layout):
    X = sample("poisson", n=50, p=15)
    X[:, 0] += 1  # no row is empty, which has no exposure
    alpha = 0.7
    deq = ExpFamilyDEQ(2, family="poisson", exposure=exposure, alpha=alpha, random_state=0).fit(X)
    total = X.sum(axis=1, keepdims=True)
    offset = np.log(total / total.mean()) if exposure else 0.0
    z, W = deq.map_latents(X).value, deq.loadings_
    mean = np.exp(z @ W.T + deq.intercept_ + offset)
    hessians = alpha * np.eye(2) + np.einsum("nj,jk,jl->nkl", mean, W, W)
    joint = stats.poisson.logpmf(X, mean).sum(1) + np.log(alpha) - 0.5 * alpha * (z**2).sum(1)
    expected = joint - np.linalg.slogdet(hessians)[1] / 2
    # At the latents that were found, nothing but rounding is left.
    assert_allclose(deq.score_samples(layout(X)), expected, atol=1e-7)


def test_sparse_gaussian_score_is_the_normal_density():
    X = sample("gaussian", n=40, p=7)
    X[np.random.default_rng(0).random(X.shape) < 0.6] = 0
    deq = ExpFamilyDEQ(2, random_state=0).fit(sp.csr_array(X))
    W = deq.loadings_
    law = stats.multivariate_normal(deq.intercept_, W @ W.T + np.eye(7))
    assert_allclose(deq.score_samples(sp.csr_array(X)), law.logpdf(X), atol=1e-8)


def test_float32_scores_of_many_columns_far_from_zero_are_the_normal_density():
    rng = np.random.default_rng(0)
    p = 784
    X = rng.normal(size=(60, 3)) @ rng.normal(size=(3, p)) + rng.normal(size=(60, p)) + 300
    X = X.astype(np.float32)
    deq = ExpFamilyDEQ(3, random_state=0).fit(X)
    assert deq.loadings_.dtype == np.float32
    W, b = deq.loadings_.astype(float), deq.intercept_.astype(float)
    law = stats.multivariate_normal(b, W @ W.T + np.eye(p))
    # Summed in float32 they were off by twenty.
    assert_allclose(deq.score_samples(X), law.logpdf(X.astype(float)), atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"canonical_map": "softplus"},
        {"hidden_layer_sizes": (4,)},
        {"hidden_layer_sizes": (4,), "canonical_map": "softplus"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_score_has_the_observed_hessian(options):
    # Through a map, or of layers, it is not the expected one.
    X = sample("poisson", n=30)
    options = {"alpha": 1.5, "max_iter": 10, "random_state": 0, **options}
    deq = ExpFamilyDEQ(2, family="poisson", **options).fit(X)
    result = deq.map_latents(X)
    sizes = [part.shape[1] for part in result.layers]
    score = deq.score_samples(X)
    for row in range(0, 30, 3):
        x, z = torch.from_numpy(X[row]), torch.from_numpy(result.value[row])

        def density(z, x=x):
            return log_joint(deq, x, *z.split(sizes))

        hessian = torch.func.hessian(density)(z)
        expected = density(z) + len(z) / 2 * np.log(2 * np.pi) - torch.logdet(-hessian) / 2
        # A row is solved to residuals of 1e-6, of which the determinant sees the first order.
        assert score[row] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("mask", ["inputs", "off"])
def test_score_of_other_masks_is_the_law_at_their_latents(mask):
    X = sample("gaussian", n=30)
    deq = ExpFamilyDEQ(2, canonical_map=ReLU(mask=mask), random_state=0).fit(X)
    z, W = deq.map_latents(X).value, deq.loadings_
    zeta = z @ W.T + deq.intercept_
    joint = stats.norm.logpdf(X, np.maximum(zeta, 0)).sum(1) - (z**2).sum(1) / 2
    hessians = np.eye(2) + np.einsum("nj,jk,jl->nkl", (zeta > 0).astype(float), W, W)
    expected = joint - np.linalg.slogdet(hessians)[1] / 2
    assert_allclose(deq.score_samples(X), expected, atol=1e-8)


def test_determinant_of_a_hessian_that_rounding_made_singular():
    # 1 + 1e20 is 1e20 in float64, and the true determinant 1 + 2e20.
    hessian = torch.full((1, 2, 2), 1e20, dtype=torch.float64)
    assert float(_log_determinant(hessian, 1.0)) == pytest.approx(np.log(2e20), rel=1e-12)
