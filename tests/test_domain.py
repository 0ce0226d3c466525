"""Families whose canonical parameters are not the whole line: all stays inside."""

import warnings

import numpy as np
import pytest
import torch
from conftest import sample
from numpy.testing import assert_allclose
from sklearn.exceptions import ConvergenceWarning

from skdeq import DEQClassifier, ExpFamilyDEQ
from skdeq._stochastic import shorten
from skdeq.families import (
    CanonicalMap,
    Family,
    Gamma,
    Interval,
    NegativeBinomial,
    Poisson,
    Softplus,
    get_family,
)
from skdeq.nn import EquilibriumLayer


class MirroredExponential(Family):
    """Exponential law in its rate: T(x) = -x, eta > 0."""

    name = "mirrored_exponential"
    support = Interval(0, np.inf, False, False)
    domain = Interval(0, np.inf, False, False)
    accepts = "positive numbers"

    def sufficient(self, x):
        return -x

    def log_partition(self, eta):
        return torch.where(eta > 0, -torch.log(eta), torch.inf)

    def mean(self, eta):
        return torch.where(eta > 0, -1 / eta, torch.inf)

    def variance(self, eta):
        return torch.where(eta > 0, 1 / eta.square(), torch.inf)

    def log_base(self, x):
        return torch.zeros_like(x)


def one_sided(law):
    """Rows of rank 1 whose last column is seen only where the latent is large."""
    rng = np.random.default_rng(0)
    latent = rng.uniform(-1, 1, size=300)
    rate = 3 + np.outer(latent, 2 * (-1.0) ** np.arange(8))
    last = np.maximum(6 * latent - 1, 1e-3)

    def draw(rate):
        if law == "gamma":
            return rng.gamma(20, 1 / np.maximum(rate, 0.1))
        return rng.poisson(rng.gamma(20.0, 1 / np.expm1(0.3 * rate))).astype(float)

    return np.c_[draw(rate), np.where(latent > 0.3, draw(last), np.nan)]


@pytest.mark.parametrize("family", [Gamma(20.0), NegativeBinomial(0.05)], ids=lambda f: f.name)
@pytest.mark.parametrize("max_iter", [3, 100])
def test_a_column_seen_on_one_side_keeps_its_intercept_inside(family, max_iter):
    X = one_sided(family.name)
    model = ExpFamilyDEQ(
        1, family=family, weight_decay=1e-3, max_iter=max_iter, tol=1e-5, random_state=0
    )
    with np.errstate(all="raise"):
        scores = model.fit_transform(X) if max_iter > 3 else None
    if scores is None:
        with pytest.warns(ConvergenceWarning):
            scores = model.fit_transform(X)
    assert (model.intercept_ < 0).all()
    certificate = model.map_latents(X)
    assert certificate.converged.all()
    assert_allclose(model.transform(X), scores, atol=1e-6)
    assert np.isfinite(model.score(X))
    before = model.loadings_.copy()
    model.partial_fit(X[:30])
    assert np.abs(model.loadings_ - before).max() > 0


@pytest.mark.parametrize("family", ["negative_binomial", "gamma"])
@pytest.mark.parametrize("batch_size", [None, 32])
def test_minibatches_stay_in_the_domain(family, batch_size):
    # A step inside the domain of the rows of one batch may be outside that of others.
    X = sample(family, n=400, p=15)
    options = {"family": family, "random_state": 0}
    model = ExpFamilyDEQ(2, solver="adam", max_iter=12, batch_size=batch_size, tol=0.0, **options)
    with pytest.warns(ConvergenceWarning):
        curve = model.fit(X).loss_curve_
    assert np.isfinite(curve).all()
    best = ExpFamilyDEQ(2, **options).fit(X).loss_curve_[-1]
    # Short of the optimum by what twelve epochs leave, where leaving the domain cost everything.
    assert min(curve) - best < 1e-3 * abs(best)


def test_the_mirror_of_a_law_has_the_mirrored_model():
    X = sample("gamma")
    options = {"tol": 1e-10, "max_iter": 2000, "random_state": 0}
    law = ExpFamilyDEQ(2, family="gamma", **options).fit(X)
    mirror = ExpFamilyDEQ(2, family=MirroredExponential(), **options).fit(X)
    assert mirror.score(X) == pytest.approx(law.score(X), abs=1e-5)
    assert_allclose(mirror.intercept_, -law.intercept_, rtol=1e-3)


def test_a_layer_starts_inside_any_domain():
    X = torch.from_numpy(sample("gamma"))
    layer = EquilibriumLayer(9, 2, family=MirroredExponential()).double()
    assert torch.isfinite(layer(X)).all()
    assert layer.certify(X).converged.all()


@pytest.mark.parametrize("ends", [(-1, 1), (0, np.inf), (-np.inf, 0), (2, 5), (-np.inf, np.inf)])
def test_inside_an_interval(ends):
    interval = Interval(*ends, False, False)
    assert interval.contains(torch.tensor(interval.inside()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dispersion", [1e-8, 1e-3, 1.0, 100.0])
def test_fused_negative_binomial_keeps_its_digits(dispersion, dtype):
    family = NegativeBinomial(dispersion)
    mean = torch.tensor([1e-3, 0.05, 1.0, 30.0, 1e4], dtype=dtype)
    eta = family.link(mean.double()).to(dtype)
    log_partition, found, variance = family.statistics_(
        eta.clone(), log_partition=True, variance=True
    )
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 0}
    torch.testing.assert_close(found, family.mean(eta.double()).to(dtype), **tolerance)
    torch.testing.assert_close(variance, family.variance(eta.double()).to(dtype), **tolerance)
    exact = family.log_partition(eta.double()).to(dtype)
    torch.testing.assert_close(log_partition, exact, **tolerance)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_negative_binomial_tends_to_poisson(dtype):
    X = sample("poisson", n=150).astype(dtype)
    limit = ExpFamilyDEQ(2, family=Poisson(), random_state=0).fit(X)
    near = ExpFamilyDEQ(2, family=NegativeBinomial(1e-8), random_state=0).fit(X)
    assert near.map_latents(X).converged.all()
    assert near.score(X) == pytest.approx(limit.score(X), abs=2e-3)


class Counts(Family):
    support = Interval(0, float("inf"), True, False)

    def log_base(self, x):
        return -torch.lgamma(x + 1)

    def log_partition(self, eta):
        return eta.exp()

    def mean(self, eta):
        return eta.exp()

    def variance(self, eta):
        return eta.exp()


class Exponential(CanonicalMap):
    def value(self, zeta):
        return zeta.exp()

    def derivative(self, zeta):
        return zeta.exp()


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("support", (0, 1), r"support of Wrong must be an Interval, .* got \(0, 1\)"),
        ("log_base", lambda self, x: 0.0, "log_base of Wrong must return a tensor .* got 0.0"),
        ("log_base", lambda self, x: torch.zeros(()), r"got a tensor of shape \(\)"),
        ("variance", lambda self, eta: 1.0, "variance of Wrong must return a tensor"),
        ("mean", lambda self, eta: eta.float(), r"\(2, 1\) and torch.float32"),
        ("variance", lambda self, eta: -eta.exp(), "variance of family Wrong is -1 at eta = 0"),
        ("log_partition", lambda self, eta: eta * torch.nan, "Wrong is not finite at eta = 0"),
        (
            "mean",
            lambda self, eta: 1.5 * eta.exp(),
            "mean of Wrong is 1.5 at 0, but must be the derivative of log_partition, which is 1",
        ),
        (
            "variance",
            lambda self, eta: 2 * eta.exp(),
            "variance of Wrong is 2 at 0, but must be the derivative of mean, which is 1 there",
        ),
    ],
)
def test_a_family_of_ones_own_is_told_what_is_wrong_with_it(name, part, message):
    X = sample("poisson")
    ExpFamilyDEQ(1, family=Counts()).fit(X)
    wrong = type("Wrong", (Counts,), {name: part})()
    with pytest.raises((TypeError, ValueError), match=message):
        ExpFamilyDEQ(1, family=wrong).fit(X)


def test_a_map_with_the_derivative_of_another_is_refused():
    class Wrong(Softplus):
        """Has the slope of another map."""

        def derivative(self, zeta):
            return 1 - zeta.tanh() ** 2

    class Leaky(CanonicalMap):
        """Has a kink, which is no fault."""

        def value(self, zeta):
            return torch.where(zeta > 0, zeta, 0.1 * zeta)

        def derivative(self, zeta):
            return torch.where(zeta > 0, 1.0, 0.1).to(zeta)

    with pytest.raises(ValueError, match="derivative of Wrong is .* derivative of value"):
        ExpFamilyDEQ(1, canonical_map=Wrong()).fit(sample("gaussian"))
    ExpFamilyDEQ(1, canonical_map=Leaky(), max_iter=2, tol=1).fit(sample("gaussian"))


def test_a_map_that_leads_out_of_the_domain_is_refused():
    with pytest.raises(ValueError, match="Exponential leads out of the domain .* 'gamma'"):
        ExpFamilyDEQ(1, family="gamma", canonical_map=Exponential()).fit(sample("gamma"))


@pytest.mark.parametrize("options", [{}, {"solver": "adam"}, {"hidden_layer_sizes": (3,)}])
def test_half_a_line_through_a_map_is_kept_to(options):
    # Of tanh(zeta) < 0, which is zeta < 0, only the first half was known.
    rng = np.random.default_rng(4)
    X = np.floor(rng.gamma(1.0, 5.0, size=(12, 8)))
    X[rng.random(X.shape) < 0.4] = np.nan
    deq = ExpFamilyDEQ(
        2,
        family="negative_binomial",
        canonical_map="tanh",
        weight_decay=1e-3,
        max_iter=300,
        random_state=0,
        **options,
    ).fit(X)
    assert np.isfinite(deq.loss_curve_).all()
    assert (deq.intercept_ < 0).all()
    assert deq.map_latents(X).converged.all()
    assert np.isfinite(deq.score_samples(X)).all()


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_streams_of_amounts_in_any_unit_come_close_to_a_fit(scale):
    X = scale * sample("gamma", n=300)
    fitted = ExpFamilyDEQ(2, family="gamma", random_state=0).fit(X)
    stream = ExpFamilyDEQ(2, family="gamma", random_state=0)
    rng = np.random.default_rng(0)
    for _ in range(30):
        stream.partial_fit(X[rng.permutation(300)])
    # Steps of one length for all units left it 0.4 above.
    assert stream.loss_curve_[-1] == pytest.approx(fitted.loss_curve_[-1], abs=5e-3)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_fine_tuning_on_amounts_in_any_unit(scale):
    X = sample("gamma", n=300)
    label = (X[:, 0] > X[:, 1]).astype(int)
    X *= scale
    backbone = ExpFamilyDEQ(2, family="gamma").fit(X)
    options = {"random_state": 0, "max_iter": 40, "tol": 1.0, "n_iter_no_change": 39}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned = DEQClassifier(backbone, **options).fit(X, label)
        frozen = DEQClassifier(backbone, fine_tune=False, **options).fit(X, label)
    assert tuned.loss_curve_[-1] < frozen.loss_curve_[-1]
    assert tuned.score(X, label) >= frozen.score(X, label) - 0.02


def test_steps_of_what_all_columns_share_are_as_short_as_the_shortest():
    intercept = torch.tensor([-0.5, -0.02, -7.0], dtype=torch.float64)
    old, old_kernel = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    loadings, kernel = torch.ones_like(old), torch.ones_like(old_kernel)
    shorten(get_family("gamma"), intercept, [(loadings, old)], [(kernel, old_kernel)])
    # The standard deviation of an exponential law is the inverse of its rate, at most one here.
    expected = torch.tensor([0.5, 0.02, 1.0], dtype=torch.float64)
    torch.testing.assert_close(loadings, expected.unsqueeze(1).expand(3, 2))
    torch.testing.assert_close(kernel, torch.full_like(kernel, 0.02))
