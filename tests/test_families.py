import copy
import math
import pickle

import mpmath
import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from scipy import integrate, stats
from sklearn.base import clone
from sklearn.metrics import log_loss, mean_gamma_deviance, mean_poisson_deviance
from sklearn.model_selection import GridSearchCV

from skdeq import ExpFamilyDEQ
from skdeq._canonical import through
from skdeq._interval import invert_increasing
from skdeq.families import (
    CANONICAL_MAPS,
    FAMILIES,
    Bernoulli,
    Binomial,
    CanonicalMap,
    ContinuousBernoulli,
    Family,
    Gamma,
    Gaussian,
    Identity,
    Interval,
    NegativeBinomial,
    Poisson,
    Rademacher,
    ReLU,
    Tanh,
    get_canonical_map,
    get_family,
)

DEFAULTS = [family() for family in FAMILIES.values()]
ALL = [*DEFAULTS, Binomial(n_trials=7), NegativeBinomial(dispersion=0.3), Gamma(shape=2.5)]
every_family = pytest.mark.parametrize("family", ALL, ids=repr)


class Exponential(Family):
    """A user's family on a half-line domain: only the four abstract methods."""

    name = "exponential"
    support = Interval(0, math.inf, False, False)
    domain = Interval(-math.inf, 0, False, False)

    def log_partition(self, eta):
        return torch.where(eta < 0, -torch.log(-eta), math.inf)

    def mean(self, eta):
        return torch.where(eta < 0, -1 / eta, math.inf)

    def variance(self, eta):
        return torch.where(eta < 0, 1 / eta**2, math.inf)

    def log_base(self, x):
        return torch.zeros_like(x)


class Coin(Family):
    """A user's family on the whole line whose mean saturates at 0 and 1."""

    name = "coin"

    def log_partition(self, eta):
        return -torch.nn.functional.logsigmoid(-eta)

    def mean(self, eta):
        return torch.sigmoid(eta)

    def variance(self, eta):
        return torch.sigmoid(eta) * torch.sigmoid(-eta)

    def log_base(self, x):
        return torch.zeros_like(x)


def moderate(family, dtype=torch.float64):
    """Natural parameters inside the domain, neither at its edge nor in the tails."""
    if family.domain.high == 0:
        return torch.linspace(-5, -0.05, 41, dtype=dtype)
    return torch.linspace(-5, 5, 41, dtype=dtype)


def extreme(family):
    sizes = [1e-300, 1e-160, 1e-100, 1e-20, 1e-8, 1e-4, 0.1, 0.5, math.log(2), 0.9999, 1.0]
    sizes += [1.0001, 2.0, 5.0, 20.5, 36.0, 40.5, 100.0, 354.0, 700.0]
    etas = sorted([-size for size in sizes] + [0.0] + sizes)
    if isinstance(family, Poisson):
        etas.append(709.7)
    eta = torch.tensor(etas, dtype=torch.float64)
    return eta[family.domain.contains(eta)]


def exact(family, eta):
    """Return A, A' and A'' at the float `eta` from textbook formulas in many digits."""
    mp = mpmath.mp
    eta = mp.mpf(eta)
    e = mp.exp(eta)
    if isinstance(family, Gaussian):
        return eta**2 / 2, eta, mp.mpf(1)
    if isinstance(family, Bernoulli | Binomial):
        n = getattr(family, "n_trials", 1)
        return n * mp.log(1 + e), n * e / (1 + e), n * e / (1 + e) ** 2
    if isinstance(family, Poisson):
        return e, e, e
    if isinstance(family, ContinuousBernoulli):
        if eta == 0:
            return mp.mpf(0), mp.mpf(1) / 2, mp.mpf(1) / 12
        variance = 1 / eta**2 - e / (e - 1) ** 2
        return mp.log((e - 1) / eta), e / (e - 1) - 1 / eta, variance
    if isinstance(family, NegativeBinomial):
        r = 1 / mp.mpf(family.dispersion)
        return -r * mp.log(1 - e), r * e / (1 - e), r * e / (1 - e) ** 2
    if isinstance(family, Gamma):
        shape = mp.mpf(family.shape)
        return -shape * mp.log(-eta), -shape / eta, shape / eta**2
    if isinstance(family, Rademacher):
        return mp.log(e + 1 / e), mp.tanh(eta), mp.sech(eta) ** 2
    raise AssertionError(f"no textbook formula for {family!r}")


@every_family
def test_agrees_with_many_digit_arithmetic(family):
    eta = extreme(family)
    # 1 / eta^2 - e / (e - 1)^2 at eta = 1e-300 loses 900 digits.
    with mpmath.workdps(1200):
        expected = [[float(v) for v in exact(family, value)] for value in eta.tolist()]
    actual = torch.stack([family.log_partition(eta), family.mean(eta), family.variance(eta)], 1)
    # Below the smallest normal number a float has fewer digits, or none.
    np.testing.assert_allclose(
        actual.numpy(), expected, rtol=1e-12, atol=np.finfo(np.float64).tiny
    )


@every_family
def test_sweep_agrees_with_many_digit_arithmetic(family):
    # Dense where formulas are switched, in vectors long enough for the vectorised kernels.
    eta = torch.linspace(-45, 45, 451, dtype=torch.float64)
    eta = eta[family.domain.contains(eta)]
    with mpmath.workdps(60):
        expected = [[float(v) for v in exact(family, value)] for value in eta.tolist()]
    actual = torch.stack([family.log_partition(eta), family.mean(eta), family.variance(eta)], 1)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12, atol=0)


def derivative(function, eta):
    eta = eta.clone().requires_grad_()
    return torch.autograd.grad(function(eta).sum(), eta)[0]


@every_family
def test_derivatives_are_the_moments(family):
    eta = moderate(family)
    torch.testing.assert_close(
        derivative(family.log_partition, eta), family.mean(eta), rtol=1e-12, atol=1e-14
    )
    torch.testing.assert_close(
        derivative(family.mean, eta), family.variance(eta), rtol=1e-11, atol=1e-14
    )


@every_family
def test_derivatives_at_extremes(family):
    eta = extreme(family)
    # autograd differentiates sigmoid as s (1 - s): right to rounding in absolute terms only.
    scale = max(1.0, getattr(family, "n_trials", 1))
    for function, expected in [
        (family.log_partition, family.mean(eta)),
        (family.mean, family.variance(eta)),
    ]:
        actual = derivative(function, eta)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15 * scale)


@every_family
def test_second_derivative_of_log_partition_at_extremes(family):
    eta = extreme(family)
    # Autograd's intermediate 1 / eta^2 overflows before the half-line families do at 1e-300.
    eta = eta[(eta.abs() > 1e-100) | (eta == 0)].requires_grad_()
    first = torch.autograd.grad(family.log_partition(eta).sum(), eta, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), eta)[0]
    scale = max(1.0, getattr(family, "n_trials", 1))
    torch.testing.assert_close(
        second, family.variance(eta).detach(), rtol=1e-11, atol=2e-15 * scale
    )


@every_family
def test_derivative_of_the_variance_is_finite_where_the_variance_is(family):
    eta = extreme(family)
    eta = eta[(eta.abs() > 1e-100) | (eta == 0)].requires_grad_()
    variance = family.variance(eta)
    if not variance.requires_grad:
        assert isinstance(family, Gaussian)
        return
    third = torch.autograd.grad(variance.sum(), eta)[0]
    assert not third.isnan().any()

    # Central differences: exact to step^2 times a fifth cumulant of order one.
    eta = moderate(family)
    step = 1e-4
    expected = (family.variance(eta + step) - family.variance(eta - step)) / (2 * step)
    torch.testing.assert_close(derivative(family.variance, eta), expected, rtol=1e-3, atol=1e-7)


@every_family
def test_outside_the_domain_is_plus_infinity(family):
    if family.domain.high == math.inf:
        # All reals: only an overflow is outside, and must not become NaN.
        eta = torch.tensor([-math.inf, math.inf])
        assert not family.log_partition(eta).isnan().any()
        assert not family.statistics_(eta.clone(), log_partition=True)[0].isnan().any()
        return
    eta = torch.tensor([0.0, -0.0, 1e-30, 0.5, 3.0, 200.0, math.inf], dtype=torch.float64)
    for function in (family.log_partition, family.mean, family.variance):
        assert (function(eta) == math.inf).all()
        assert not derivative(function, eta).isnan().any()
    for statistic in family.statistics_(eta.clone(), log_partition=True, variance=True):
        assert (statistic == math.inf).all()
    inside = torch.tensor([1.0], dtype=torch.float64)
    assert (family.log_prob(inside, eta[2:-1]) == -math.inf).all()


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fused_statistics(family, dtype):
    eta = torch.cat(
        [0.03 * moderate(family, dtype), *(s * moderate(family, dtype) for s in (1, 17))]
    )
    expected = family.log_partition(eta), family.mean(eta), family.variance(eta)
    eps = torch.finfo(dtype).eps
    # Absolute accuracy is a few roundings of the numbers that are combined: n for the binomial,
    # r for the negative binomial, whose mean is r / (1 - exp(eta)) - r.
    scale = getattr(family, "n_trials", 1)
    scale = max(scale, 1 / getattr(family, "dispersion", 1.0))

    def close(actual, wanted):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, wanted, rtol=8 * eps, atol=8 * eps * scale)

    for with_a in (False, True):
        for with_v in (False, True):
            a, mean, v = family.statistics_(eta.clone(), log_partition=with_a, variance=with_v)
            assert (a is not None) == with_a
            assert (v is not None) == with_v
            close(mean, expected[1])
            if with_a:
                close(a, expected[0])
            if with_v:
                close(v, expected[2])


@every_family
def test_public_functions_neither_alter_nor_alias_eta(family):
    eta = moderate(family)
    before = eta.clone()
    for function in (family.log_partition, family.mean, family.variance):
        function(eta).zero_()
        assert torch.equal(eta, before)


@every_family
def test_variance_bound(family):
    eta = extreme(family)
    if family.variance_bound is None:
        assert family.variance(eta).max() > 1e3
    else:
        # A supremum is approached (here at eta = 0) and not exceeded beyond rounding.
        assert float(family.variance(eta).max()) == pytest.approx(family.variance_bound)


@every_family
def test_self_concordance(family):
    def log_partition(eta):
        return family.log_partition(eta).sum()

    def second(eta):
        return torch.func.grad(lambda t: torch.func.grad(log_partition)(t).sum())(eta).sum()

    eta = torch.linspace(-12, 12, 241, dtype=torch.float64)
    eta = eta[family.domain.contains(eta)]
    size = torch.func.grad(second)(eta).abs()
    variance = family.variance(eta)
    if family.self_concordance is None:
        assert (size / variance).max() > 15
        return
    # autograd's derivatives of sigmoid are right to rounding in absolute terms only.
    assert (size <= family.self_concordance * variance + 1e-14 * variance.max()).all()
    if not isinstance(family, ContinuousBernoulli):
        # The smallest such constant: approached in the tails.
        inner = slice(20, -20)
        sharp = (size[inner] / variance[inner]).max()
        assert float(sharp) == pytest.approx(family.self_concordance, rel=1e-3)


@every_family
def test_exposure_scales_the_mean_where_it_is_said_to(family):
    eta = moderate(family) - 6
    scaled = family.mean(eta + math.log(2))
    assert torch.allclose(scaled, 2 * family.mean(eta), rtol=1e-9) == family.scales_with_exposure


TRUSTED = {
    "gaussian": lambda family, mu: stats.norm(loc=mu),
    "bernoulli": lambda family, mu: stats.bernoulli(mu),
    "binomial": lambda family, mu: stats.binom(family.n_trials, mu / family.n_trials),
    "poisson": lambda family, mu: stats.poisson(mu),
    "negative_binomial": lambda family, mu: stats.nbinom(
        1 / family.dispersion, 1 / (1 + family.dispersion * mu)
    ),
    "gamma": lambda family, mu: stats.gamma(family.shape, scale=mu / family.shape),
}
OBSERVATIONS = {
    "gaussian": [-3.0, 0.0, 0.7],
    "bernoulli": [0.0, 1.0],
    "binomial": [0.0, 1.0, 5.0, 7.0],
    "gamma": [1e-3, 0.5, 4.0],
}


@pytest.mark.parametrize("family", [f for f in ALL if f.name in TRUSTED], ids=repr)
def test_log_prob_agrees_with_scipy(family):
    x = torch.tensor(OBSERVATIONS.get(family.name, [0.0, 1.0, 9.0, 60.0]), dtype=torch.float64)
    eta = moderate(family)[:, None]
    trusted = TRUSTED[family.name](family, family.mean(eta).numpy())
    log_prob = getattr(trusted, "logpmf", None) or trusted.logpdf
    if family.name in ("gaussian", "gamma"):
        log_prob = trusted.logpdf
    # Limited by scipy, which rounds the success probability: 1 - p near 1 keeps 13 digits.
    np.testing.assert_allclose(
        family.log_prob(x, eta).numpy(), log_prob(x.numpy()), rtol=1e-11, atol=1e-11
    )


def test_every_family_has_its_normalisation_tested():
    assert set(FAMILIES) == set(TRUSTED) | {"continuous_bernoulli", "rademacher"}


@pytest.mark.parametrize("eta", [-30.0, -1.0, -1e-3, 0.0, 0.5, 1.5, 30.0])
def test_continuous_bernoulli_density_integrates_to_one(eta):
    family = ContinuousBernoulli()
    eta = torch.tensor(eta, dtype=torch.float64)

    def density(x):
        return float(family.log_prob(torch.tensor(x, dtype=torch.float64), eta).exp())

    assert integrate.quad(density, 0, 1)[0] == pytest.approx(1, abs=1e-9)
    first_moment = integrate.quad(lambda x: x * density(x), 0, 1)[0]
    assert first_moment == pytest.approx(float(family.mean(eta)), abs=1e-9)


def test_rademacher_probabilities_sum_to_one():
    eta = torch.linspace(-20, 20, 9, dtype=torch.float64)
    minus, plus = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    total = Rademacher().log_prob(minus, eta).exp() + Rademacher().log_prob(plus, eta).exp()
    torch.testing.assert_close(total, torch.ones_like(eta), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dispersion", [1e-10, 1e-6, 0.01, 0.066, 1.0, 30.0, 1e6])
def test_negative_binomial_base_of_huge_arguments(dispersion):
    x = [0.0, 0.5, 1.0, 2.0, 14.5, 15.0, 16.0, 100.0, 1e5, 1e9]
    actual = NegativeBinomial(dispersion).log_base(torch.tensor(x, dtype=torch.float64))
    with mpmath.workdps(60):
        r = mpmath.mpf(1 / dispersion)
        expected = [
            float(mpmath.loggamma(v + r) - mpmath.loggamma(r) - mpmath.loggamma(v + 1)) for v in x
        ]
    # A difference of three lgammas would be 1e-6 off where these are of size 1e10.
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("n_trials", [1, 13, 40, 10**9])
def test_binomial_base_of_huge_arguments(n_trials):
    x = sorted({0, 1, min(2, n_trials), n_trials // 2, n_trials - 1, n_trials})
    actual = Binomial(n_trials).log_base(torch.tensor(x, dtype=torch.float64))
    with mpmath.workdps(60):
        expected = [
            float(
                mpmath.loggamma(n_trials + 1)
                - mpmath.loggamma(v + 1)
                - mpmath.loggamma(n_trials - v + 1)
            )
            for v in x
        ]
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("family", [*ALL, Exponential(), Coin()], ids=repr)
def test_link_inverts_the_mean(family):
    eta = moderate(family)
    # At |eta| = 5 a rounding of the mean moves eta by eps / variance, 150 times as much.
    torch.testing.assert_close(family.link(family.mean(eta)), eta, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("family", [*ALL, Exponential(), Coin()], ids=repr)
def test_default_link_agrees_with_the_closed_form(family):
    eta = moderate(family, torch.float32)
    mu = family.mean(eta)
    actual = Family.link(family, mu)
    assert actual.dtype == torch.float32
    # Two eta of one rounded mean are eps * mean / variance apart; a few of those are allowed.
    slack = 8 * 1.2e-7 * (1 + mu.abs() / family.variance(eta) + eta.abs())
    assert ((actual - eta).abs() <= slack).all()
    assert Family.link(family, torch.tensor([[math.nan]])).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "family, least, largest",
    [
        (Gaussian(), -math.inf, math.inf),
        (Bernoulli(), 0, 1),
        (Binomial(7), 0, 7),
        (Poisson(), 0, math.inf),
        (ContinuousBernoulli(), 0, 1),
        (NegativeBinomial(0.3), 0, math.inf),
        (Gamma(2.5), 0, math.inf),
        (Rademacher(), -1, 1),
        (Exponential(), 0, math.inf),
        (Coin(), 0, 1),
    ],
    ids=repr,
)
def test_link_at_the_ends_of_the_mean_space(family, least, largest, dtype):
    ends = family.link(torch.tensor([least, largest], dtype=dtype))
    assert ends.tolist() == [family.domain.low, family.domain.high]


def test_default_link_of_means_far_out():
    mu = torch.tensor([1e-200, 1e-30, 1e30, 1e200], dtype=torch.float64)
    torch.testing.assert_close(Family.link(Poisson(), mu), mu.log(), rtol=1e-14, atol=0)
    # Within the range of its variance: without one only the bisection is left.
    mu = mu.sqrt()
    torch.testing.assert_close(Family.link(Exponential(), mu), -1 / mu, rtol=1e-14, atol=0)


def test_default_link_on_a_bounded_domain():
    class Bounded(Coin):
        domain = Interval(-2, 3, False, True)

    family = Bounded()
    eta = torch.linspace(-1.9, 2.9, 7, dtype=torch.float64)
    torch.testing.assert_close(family.link(family.mean(eta)), eta, rtol=1e-12, atol=1e-13)
    assert family.link(torch.tensor([0.0, 1.0])).tolist() == [-2, 3]


DEVIANCES = {
    "gaussian": lambda x, mu: (x - mu) ** 2,
    "bernoulli": lambda x, mu: 2 * log_loss([x], [mu], labels=[0, 1]),
    "poisson": lambda x, mu: mean_poisson_deviance([x], [mu]),
    "gamma": lambda x, mu: mean_gamma_deviance([x], [mu]),
}


@pytest.mark.parametrize("name", DEVIANCES)
def test_deviance_agrees_with_scikit_learn(name):
    family = get_family(name)
    x = torch.tensor(OBSERVATIONS.get(name, [0.0, 1.0, 9.0, 60.0]), dtype=torch.float64)
    eta = moderate(family)[::8, None]
    expected = [
        [DEVIANCES[name](v, mu) for v in x.tolist()] for mu in family.mean(eta)[:, 0].tolist()
    ]
    np.testing.assert_allclose(family.deviance(x, eta).numpy(), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("family", [*ALL, Exponential(), Coin()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_deviance_of_the_saturated_and_of_other_parameters(family, dtype):
    eta = moderate(family, dtype)
    x = family.mean(eta)
    assert family.deviance(x, eta).max() <= 100 * torch.finfo(dtype).eps * (1 + x.abs().max())
    deviance = family.deviance(x, eta[:, None])
    assert deviance.dtype == dtype
    assert (deviance >= 0).all()
    log_prob = family.log_prob(x, family.saturated(x)) - family.log_prob(x, eta[:, None])
    scale = float(log_prob.abs().max())
    torch.testing.assert_close(
        deviance, 2 * log_prob, rtol=0, atol=100 * torch.finfo(dtype).eps * (1 + scale)
    )
    assert family.deviance(torch.tensor(math.nan, dtype=dtype), eta).isnan().all()


@pytest.mark.parametrize(
    "family", [f for f in ALL if f.support.low_inclusive or f.support.high_inclusive], ids=repr
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_saturated_is_finite_at_the_ends_of_the_support(family, dtype):
    ends = [family.support.low, family.support.high]
    x = torch.tensor([end for end in ends if math.isfinite(end)], dtype=dtype)
    saturated = family.saturated(x)
    assert saturated.tolist() == [-40, 40][: len(x)]
    assert family.log_prob(x, saturated).isfinite().all()
    # The supremum is probability one; a density has none.
    if not isinstance(family, ContinuousBernoulli):
        torch.testing.assert_close(
            family.log_prob(x, saturated), torch.zeros_like(x), rtol=0, atol=1e-15
        )
    if family.domain.high == 0:
        assert (family.deviance(x, torch.tensor([0.0, 1.0], dtype=dtype)) == math.inf).all()


class Stars(Family):
    """A user's family on the numbers 0 to 4, whose mean overflows far out."""

    name = "stars"
    support = Interval(0, 4, True, True)

    def _shares(self, eta):
        return torch.softmax(eta[..., None] * torch.arange(5.0).to(eta), -1)

    def log_partition(self, eta):
        return torch.logsumexp(eta[..., None] * torch.arange(5.0).to(eta), -1)

    def mean(self, eta):
        return self._shares(eta) @ torch.arange(5.0).to(eta)

    def variance(self, eta):
        gap = torch.arange(5.0).to(eta) - self.mean(eta)[..., None]
        return (self._shares(eta) * gap**2).sum(-1)

    def log_base(self, x):
        return torch.zeros_like(x)


def test_a_mean_that_overflows_leaves_deviances_and_scores_alone():
    ends = torch.tensor([0.0, 4.0], dtype=torch.float64)
    assert Stars().saturated(ends).tolist() == [-40, 40]
    rng = np.random.default_rng(0)
    eta = rng.normal(size=(120, 2)) @ rng.normal(size=(2, 15))
    shares = Stars()._shares(torch.from_numpy(eta)).numpy()
    X = (rng.random((120, 15, 1)) > shares.cumsum(-1)).sum(-1).astype(float)
    model = ExpFamilyDEQ(2, family=Stars(), random_state=0).fit(X)
    assert 0.2 < model.explained_deviance_ratio_.sum() < 1
    assert np.linalg.matrix_rank(model.transform(X)) == 2


def test_saturated_stays_inside_the_domain():
    class Shifted(Exponential):
        domain = Interval(-math.inf, -100, False, False)

        def mean(self, eta):
            return super().mean(eta + 100)

        def variance(self, eta):
            return super().variance(eta + 100)

    class Mirrored(Shifted):
        domain = Interval(100, math.inf, False, False)

        def mean(self, eta):
            return -super().mean(-eta)

        def variance(self, eta):
            return super().variance(-eta)

    x = torch.tensor([0.0], dtype=torch.float64)
    assert Shifted().saturated(x).tolist() == [-140]
    assert Mirrored().saturated(x).tolist() == [140]


@pytest.mark.parametrize("family", [Exponential(), Coin()], ids=repr)
def test_user_defined_family(family):
    assert get_family(family) is family
    eta = moderate(family)
    twin = Gamma(shape=1.0) if isinstance(family, Exponential) else Bernoulli()
    x = torch.tensor(0.25, dtype=torch.float64)
    torch.testing.assert_close(family.log_prob(x, eta), twin.log_prob(x, eta))
    for actual, expected in zip(
        family.statistics_(eta.clone(), log_partition=True, variance=True),
        twin.statistics_(eta.clone(), log_partition=True, variance=True),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)
    assert family.statistics_(eta)[::2] == (None, None)


def test_incomplete_user_defined_family_is_refused():
    class Incomplete(Family):
        name = "incomplete"

    with pytest.raises(TypeError, match="log_base"):
        Incomplete()


def test_own_sufficient_statistic_enters_log_prob():
    class Squared(Coin):
        def sufficient(self, x):
            return x**2

    x, eta = torch.tensor(3.0), torch.tensor(-0.5)
    expected = 9 * -0.5 - math.log1p(math.exp(-0.5))
    assert float(Squared().log_prob(x, eta)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_get_family_by_name(name):
    family = get_family(name)
    assert type(family) is FAMILIES[name]
    assert family.name == name
    assert family.accepts
    assert not family.support.contains(torch.tensor([math.nan, math.inf, -math.inf])).any()


def test_get_family_errors():
    with pytest.raises(ValueError, match="'poison'.*Did you mean 'poisson'") as error:
        get_family("poison")
    assert all(repr(name) in str(error.value) for name in FAMILIES)
    with pytest.raises(ValueError, match="Did you mean 'gaussian'"):
        get_family("Gaussian")
    with pytest.raises(ValueError, match="Unknown family 'qqq'") as error:
        get_family("qqq")
    assert "Did you mean" not in str(error.value)
    with pytest.raises(TypeError, match="string or a Family object; got int"):
        get_family(3)
    with pytest.raises(TypeError, match=r"not a class: write Poisson\("):
        get_family(Poisson)


def test_canonical_maps():
    zeta = torch.tensor([-2.0, 0.0, 3.0])
    identity = get_canonical_map("identity")
    assert torch.equal(identity.value(zeta), zeta)
    assert get_canonical_map(identity) is identity
    assert identity == Identity()
    assert repr(identity) == "Identity()"
    with pytest.raises(ValueError, match="Unknown canonical map 'identiti'.*Did you mean"):
        get_canonical_map("identiti")
    with pytest.raises(TypeError, match="CanonicalMap object; got NoneType"):
        get_canonical_map(None)
    with pytest.raises(TypeError, match="abstract .*derivative"):
        CanonicalMap()


@pytest.mark.parametrize("name", CANONICAL_MAPS)
def test_derivative_of_canonical_maps(name):
    # An even number of points: 0 is the kink of the ReLU.
    zeta = torch.linspace(-3, 3, 12, dtype=torch.float64)
    canonical_map = get_canonical_map(name)
    torch.testing.assert_close(
        derivative(canonical_map.value, zeta), canonical_map.derivative(zeta)
    )


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Binomial(n_trials=0), ValueError, "n_trials >= 1; got 0"),
        (lambda: Binomial(n_trials=2.0), TypeError, "integer as n_trials; got 2.0"),
        (lambda: Binomial(n_trials=True), TypeError, "integer as n_trials; got True"),
        (lambda: NegativeBinomial(dispersion=0), ValueError, "dispersion > 0; got 0"),
        (lambda: NegativeBinomial(dispersion=math.nan), ValueError, "dispersion > 0; got nan"),
        (lambda: NegativeBinomial(dispersion="1"), TypeError, "number as dispersion; got '1'"),
        (lambda: Gamma(shape=-1.0), ValueError, "shape > 0; got -1.0"),
        (lambda: Gamma(shape=math.inf), ValueError, "finite shape"),
        (lambda: Gamma(shape=None), TypeError, "number as shape; got None"),
    ],
)
def test_constructor_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


@every_family
def test_equality_hash_copy_and_pickle(family):
    for twin in (copy.deepcopy(family), pickle.loads(pickle.dumps(family))):
        assert twin is not family
        assert twin == family
        assert hash(twin) == hash(family)
        eta = moderate(family)
        assert torch.equal(twin.mean(eta), family.mean(eta))
    assert [other for other in ALL if other == family] == [family]
    assert family != repr(family)


def test_parameters_tell_families_apart():
    assert Binomial(3) == Binomial(np.int64(3)) != Binomial(4)
    assert len({Gamma(1.0), Gamma(1), Gamma(2.0), NegativeBinomial(1.0)}) == 3
    assert eval(repr(NegativeBinomial(0.3))) == NegativeBinomial(0.3)
    assert repr(Binomial(n_trials=10)) == "Binomial(n_trials=10)"
    assert repr(Poisson()) == "Poisson()"


@every_family
def test_parameters_by_name_make_the_same_family(family):
    assert type(family)(**family.get_params()) == family
    assert clone(family) == family
    assert clone(family) is not family


def test_parameters_are_set_by_name():
    family = Gamma(shape=2.0)
    assert family.set_params(shape=3) is family
    assert family == Gamma(3.0)
    for wrong, error, message in [
        ({"shape": -1.0}, ValueError, "finite shape > 0; got -1.0"),
        ({"shape": "3"}, TypeError, "number as shape; got '3'"),
        ({"sharp": 1.0}, ValueError, "Gamma has no parameter 'sharp'. Known are 'shape'"),
    ]:
        with pytest.raises(error, match=message):
            family.set_params(**wrong)
        assert family == Gamma(3.0)
    with pytest.raises(ValueError, match="Poisson has no parameter 'shape'. Known are none"):
        Poisson().set_params(shape=1.0)


def test_families_that_keep_something_else_are_cloned():
    class Made(Poisson):
        def __init__(self, rates):
            self.rates = torch.tensor(rates)

    family = Made([1.0, 2.0])
    assert clone(ExpFamilyDEQ(family=family)).family == family


def test_a_search_finds_parameters_of_family_and_map():
    rng = np.random.default_rng(0)
    mean = np.exp(rng.normal(size=(150, 2)) @ rng.normal(size=(2, 20)) / 2)
    X = rng.poisson(mean * rng.gamma(2.0, 0.5, size=mean.shape))
    family = NegativeBinomial(dispersion=20.0)
    model = ExpFamilyDEQ(2, family=family, canonical_map="log", random_state=0)
    search = GridSearchCV(model, {"family__dispersion": [0.01, 0.5, 20.0]}, cv=2).fit(X)
    assert search.best_params_ == {"family__dispersion": 0.5}
    assert search.best_estimator_.family == NegativeBinomial(0.5)
    assert model.family is family
    assert family == NegativeBinomial(20.0)
    by_hand = clone(model).set_params(family=NegativeBinomial(0.5)).fit(X)
    assert_array_equal(search.best_estimator_.components_, by_hand.components_)
    mapped = ExpFamilyDEQ(canonical_map=ReLU()).set_params(canonical_map__mask="off")
    assert mapped.canonical_map == ReLU(mask="off")
    stream = clone(model).partial_fit(X)
    stream.set_params(family__dispersion=1.0)
    with pytest.raises(ValueError, match=r"dispersion=1.0\), but partial_fit goes on"):
        stream.partial_fit(X)


def test_base_and_map_tell_families_apart():
    one = through(NegativeBinomial(1.0), Tanh())
    assert one == through(NegativeBinomial(1.0), Tanh())
    assert one != through(NegativeBinomial(5.0), Tanh())
    assert repr(one) == "MappedFamily(base=NegativeBinomial(dispersion=1.0), canonical_map=Tanh())"


def test_interval():
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0, math.nan])
    assert (
        Interval(0, 1, True, True).contains(x).tolist() == [False, True, True, True] + [False] * 2
    )
    assert Interval(0, 1, False, False).contains(x).tolist() == [False] * 2 + [True] + [False] * 3
    assert str(Interval(0, 1, True, True)) == "[0, 1]"
    assert str(Gamma().support) == "(0, inf)"
    assert str(Binomial(7).support) == "[0, 7]"
    assert str(Poisson().domain) == "(-inf, inf)"
    with pytest.raises(ValueError, match="low < high; got low=1 and high=0"):
        Interval(1, 0, True, True)


@pytest.mark.parametrize("width", [1, 2, 17, 111, 112, 113, 224, 1023])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["bernoulli", "binomial", "poisson", "rademacher"])
def test_summed_statistics_are_the_sums(name, width, dtype):
    family = get_family(name)
    eta = torch.linspace(-30, 10, 4 * width, dtype=dtype).reshape(width, 4).T.contiguous()
    # Factors of one half throughout, the smallest there are.
    eta[3] = 0
    sums, mean, nothing = family.summed_statistics_(eta.clone())
    assert nothing is None
    exact = family.log_partition(eta.double()).sum(1)
    scale = family.log_partition(eta.double()).abs().sum(1) + width
    assert ((sums.double() - exact).abs() <= 8 * torch.finfo(dtype).eps * scale).all()
    torch.testing.assert_close(mean.double(), family.mean(eta.double()), rtol=1e-5, atol=1e-6)
    again, mean, variance = family.summed_statistics_(eta.clone(), variance=True)
    assert torch.equal(again, sums)
    expected = family.variance(eta.double())
    # In absolute terms only: of the order of the rounding of the mean, which reaches n_trials.
    atol = 1e-6 * getattr(family, "n_trials", 1)
    torch.testing.assert_close(variance.double(), expected, rtol=1e-5, atol=atol)
    torch.testing.assert_close(mean.double(), family.mean(eta.double()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_log_prob_of_infinite_parameters_is_a_limit(name):
    family = get_family(name)
    x = torch.tensor([family.support.low, family.support.high], dtype=torch.float64)
    x = x[torch.isfinite(x) & family.support.contains(x)]
    if family.unbounded_at or not len(x):
        x = x[:0]
    # At the end of the support that it stands for, an infinite parameter makes x certain.
    certain = family.log_prob(x, family.link(family.sufficient(x)))
    torch.testing.assert_close(certain, torch.zeros_like(x))
    one = torch.tensor(1.0, dtype=torch.float64)
    assert float(family.log_prob(one, -one * math.inf)) < -1e100
    assert torch.isnan(family.log_prob(one, one * math.nan))


@pytest.mark.parametrize("value", [-20.0, 0.5, 3.0])
def test_functions_that_overflow_far_out_are_inverted(value):
    # Of x^5 and 1 + x^4 only infinities are left there.
    found = invert_increasing(
        lambda x: x**5 / (1 + x**4),
        lambda x: (x**8 + 5 * x**4) / (1 + x**4) ** 2,
        torch.tensor([value], dtype=torch.float64),
        Interval(-np.inf, np.inf, False, False),
    ).item()
    assert found**5 / (1 + found**4) == pytest.approx(value, rel=1e-12)
