"""The log link of overdispersed counts and positive amounts."""

import math
import pickle

import mpmath
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import sample
from scipy import stats
from scipy.optimize import minimize
from sklearn.linear_model import GammaRegressor

from skdeq import DEQRegressor, ExpFamilyDEQ
from skdeq.families import (
    FAMILIES,
    CanonicalMap,
    Gamma,
    Identity,
    LogLink,
    NegativeBinomial,
    get_canonical_map,
    get_family,
)
from skdeq.nn import EquilibriumLayer

LINKED = [NegativeBinomial(), NegativeBinomial(0.2), NegativeBinomial(1e-8), Gamma(), Gamma(3.0)]
each_family = pytest.mark.parametrize("family", LINKED, ids=str)
WIDE = {
    torch.float64: [-1e4, -600.0, -30.0, -2.5, 0.0, 0.4, 8.0, 36.0, 600.0, 1e4],
    torch.float32: [-1e3, -80.0, -2.5, 0.0, 0.5, 8.0, 36.0, 80.0, 1e3],
}


def linked(family, k=2, **options):
    options = {"random_state": 0, "canonical_map": "log", **options}
    return ExpFamilyDEQ(k, family=family, **options)


def mean_of(latents, loadings, intercept):
    return np.exp(latents @ loadings.T + intercept)


@each_family
def test_the_mean_is_the_exponential_of_the_linear_predictor(family):
    link = LogLink().of(family)
    zeta = torch.linspace(-9, 9, 31, dtype=torch.float64)
    torch.testing.assert_close(family.mean(link.value(zeta)), zeta.exp(), rtol=1e-12, atol=0)
    torch.testing.assert_close(link.inverse(family.link(zeta.exp())), zeta, rtol=0, atol=1e-12)
    leaf = zeta.clone().requires_grad_()
    (first,) = torch.autograd.grad(link.value(leaf).sum(), leaf)
    torch.testing.assert_close(link.derivative(zeta), first, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        link.second_derivative(zeta),
        CanonicalMap.second_derivative(link, zeta),
        rtol=1e-9,
        atol=1e-15,
    )


@each_family
@pytest.mark.parametrize("observed", [False, True])
def test_its_energy_is_that_of_any_map(family, observed):
    link = LogLink().of(family)
    zeta = torch.linspace(-5, 5, 21, dtype=torch.float64)
    for x in (0.5, 1.0, 40.0):
        statistic = torch.full_like(zeta, x)
        own = link.energy(family, zeta, statistic, observed=observed)
        general = CanonicalMap.energy(link, family, zeta, statistic, observed=observed)
        for one, other in zip(own, general, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        assert bool((own[2] > 0).all())


@each_family
@pytest.mark.parametrize("x", [1.0, 7.0])
@pytest.mark.parametrize("dtype", WIDE)
def test_its_energy_agrees_with_mpmath_far_out(family, dtype, x):
    link, zetas = LogLink().of(family), torch.tensor(WIDE[dtype], dtype=dtype)
    found = link.energy(family, zetas, torch.full_like(zetas, x), observed=True)
    expected = link.energy(family, zetas, torch.full_like(zetas, x))[2]
    limits = torch.finfo(dtype)
    with mpmath.workdps(50):
        for place, zeta in enumerate(zetas.tolist()):
            mean = mpmath.exp(zeta)
            if isinstance(family, Gamma):
                eta = -family.shape / mean
                exact = -family.shape * mpmath.log(-eta) - x * eta
                mean_curvature = mpmath.mpf(family.shape)
                first = family.shape * (1 - x / mean)
                second = family.shape * x / mean
            else:
                r = 1 / mpmath.mpf(family.dispersion)
                share, rest = mean / (mean + r), r / (mean + r)
                exact = r * mpmath.log1p(mean / r) + x * mpmath.log1p(r / mean)
                first = r * share - x * rest
                second = (x + r) * share * rest
                mean_curvature = r * share
            pairs = zip((*found, expected), (exact, first, second, mean_curvature), strict=True)
            for one, known in pairs:
                if abs(known) > limits.max:
                    assert float(one[place]) == math.copysign(math.inf, known)
                    continue
                # Digits that zeta has lost beside the logarithm of a tiny dispersion, and those
                # that an exponential loses.
                size = max(abs(zeta), 1.0) + abs(math.log(getattr(family, "dispersion", 1.0)))
                digits = 4 * size * limits.eps
                # Terms of the loss and of the slope may cancel. Those of a curvature cannot, but
                # the share that it is a multiple of may underflow.
                cancels = known is exact or known is first
                least = limits.tiny / getattr(family, "dispersion", 1.0)
                close = pytest.approx(
                    float(known), rel=digits, abs=digits * x if cancels else least
                )
                assert float(one[place]) == close


def test_the_identity_is_the_log_link_of_poisson_counts():
    X = sample("poisson")
    assert LogLink().of(get_family("poisson")) == Identity()
    plain = ExpFamilyDEQ(2, family="poisson", random_state=0).fit(X)
    np.testing.assert_array_equal(linked("poisson").fit(X).transform(X), plain.transform(X))


def test_transform_of_amounts_is_the_ridge_glm_of_scikit_learn():
    X, alpha = sample(Gamma(3.0)), 0.7
    deq = linked(Gamma(3.0), alpha=alpha, whiten=True, fixed_point_tol=1e-12).fit(X)
    latents = deq.transform(X)
    p = X.shape[1]
    for row in range(0, 80, 9):
        # GammaRegressor has no offset: the ratio to it has the same likelihood; nor has it a
        # shape, in whose units its penalty is.
        glm = GammaRegressor(
            alpha=alpha / (3.0 * p), fit_intercept=False, tol=1e-12, solver="newton-cholesky"
        )
        glm.fit(deq.loadings_, X[row] / np.exp(deq.intercept_))
        np.testing.assert_allclose(latents[row], glm.coef_, atol=1e-6)


def test_transform_of_counts_is_the_ridge_glm_of_scipy():
    X, alpha, r = sample(NegativeBinomial(0.5)), 0.7, 2.0
    deq = linked(NegativeBinomial(0.5), alpha=alpha, whiten=True, fixed_point_tol=1e-12).fit(X)
    latents = deq.transform(X)

    def objective(z, x):
        mean = mean_of(z, deq.loadings_, deq.intercept_)
        return alpha / 2 * z @ z - stats.nbinom.logpmf(x, r, r / (r + mean)).sum()

    for row in range(0, 80, 9):
        found = minimize(
            objective,
            np.zeros(2),
            args=(X[row],),
            method="Nelder-Mead",
            options={"xatol": 1e-9, "fatol": 1e-14, "maxiter": 1000},
        )
        # Half of the digits of the objective are all that it tells of its minimum.
        np.testing.assert_allclose(latents[row], found.x, atol=1e-6)
        assert objective(latents[row], X[row]) <= found.fun + 1e-9


@pytest.mark.parametrize("family", [NegativeBinomial(0.5), Gamma(3.0)], ids=str)
def test_log_prob_is_that_of_scipy(family):
    zeta, x = np.linspace(-4, 6, 11), 3.0
    mean = np.exp(zeta)
    if isinstance(family, Gamma):
        expected = stats.gamma.logpdf(x, 3.0, scale=mean / 3.0)
    else:
        expected = stats.nbinom.logpmf(x, 2.0, 2.0 / (2.0 + mean))
    law = linked(family)._family()
    found = law.log_prob(torch.full((11,), x, dtype=torch.float64), torch.from_numpy(zeta))
    np.testing.assert_allclose(found, expected, rtol=1e-11)


def test_the_unit_of_amounts_does_not_matter():
    X = sample(Gamma(3.0))
    one, other = (linked(Gamma(3.0), tol=1e-10, max_iter=300).fit(unit * X) for unit in (1, 1e4))
    np.testing.assert_allclose(other.transform(1e4 * X), one.transform(X), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(other.intercept_ - one.intercept_, np.log(1e4), rtol=1e-6)


def test_units_of_columns_and_of_images_do_not_matter_either():
    X = sample(Gamma(3.0))
    units = 10.0 ** np.arange(-6, -6 + X.shape[1])
    one, other = (
        linked(Gamma(3.0), tol=1e-10, max_iter=300).fit(unit * X) for unit in (1.0, units)
    )
    np.testing.assert_allclose(other.transform(units * X), one.transform(X), rtol=1e-5, atol=1e-7)
    images = sample(Gamma(3.0), n=60, p=36)
    maps = {"loadings": "conv2d", "image_shape": (6, 6), "kernel_size": 3, "stride": 3}
    curves = []
    for unit in (1.0, 1e3):
        model = linked(Gamma(3.0), max_iter=4, tol=0.0, **maps).fit(unit * images)
        # Of the density, whose unit is one over that of the amounts.
        curves.append(np.array(model.loss_curve_) - 36 * np.log(unit))
    np.testing.assert_allclose(*curves, rtol=1e-9)


@each_family
@pytest.mark.parametrize("exposure", [None, "total"])
def test_images_are_fitted(family, exposure):
    X = sample(family, n=60, p=36)
    X[::5, 3] = np.nan
    maps = {"loadings": "conv2d", "image_shape": (6, 6), "kernel_size": 3, "stride": 3}
    model = linked(family, exposure=exposure, max_iter=5, tol=0.0, **maps).fit(X)
    assert model.loss_curve_[-1] < model.loss_curve_[0]
    assert model.map_latents(X).converged.all()


# In float32 a logarithm of 1e-20 has lost two digits of what is beside it.
@pytest.mark.parametrize(
    ("unit", "dtype", "error"), [(1e-20, np.float32, 1e-3), (1e-170, np.float64, 1e-9)]
)
def test_amounts_of_any_size_are_fitted(unit, dtype, error):
    X = sample(Gamma(3.0))
    tiny, plain = linked(Gamma(3.0)).fit((unit * X).astype(dtype)), linked(Gamma(3.0)).fit(X)
    scores = plain.transform(X)
    found = tiny.transform((unit * X).astype(dtype))
    np.testing.assert_allclose(found, scores, atol=error * np.abs(scores).max())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_little_dispersion_is_next_to_poisson(dtype):
    X = sample("poisson", n=300, p=30).astype(dtype)
    poisson = ExpFamilyDEQ(2, family="poisson", random_state=0).fit(X)
    model = linked(NegativeBinomial(1e-8)).fit(X)
    assert model.converged_ and model.map_latents(X).converged.all()
    np.testing.assert_allclose(model.score(X), poisson.score(X), rtol=1e-6)
    scores = poisson.transform(X)
    np.testing.assert_allclose(model.transform(X), scores, atol=1e-4 * np.abs(scores).max())


@pytest.mark.parametrize(("dtype", "alpha"), [(torch.float32, 1e-2), (torch.float64, 1e-3)])
def test_a_row_of_zeros_far_from_its_start_is_solved(dtype, alpha):
    layer = EquilibriumLayer(
        10, 1, family="negative_binomial", canonical_map="log", alpha=alpha, dtype=dtype
    )
    with torch.no_grad():
        layer.loadings.fill_(1.0)
        layer.intercept.fill_(8.0)
    result = layer.certify(torch.zeros(1, 10, dtype=dtype))
    assert result.converged.all()
    # alpha z = -10 e^(z + 8) / (1 + e^(z + 8))
    z = result.value.double()
    torch.testing.assert_close(alpha * z, -10 * torch.sigmoid(z + 8), rtol=1e-4, atol=0)


@pytest.mark.parametrize("gaps", [False, True])
def test_exposure_takes_out_the_size_of_rows(gaps):
    rng = np.random.default_rng(0)
    latents, loadings = rng.normal(size=(400, 2)), rng.normal(size=(30, 2)) / 2
    mean = mean_of(latents, loadings, rng.normal(size=30)) * rng.gamma(2.0, 1.0, size=(400, 1))
    X = rng.poisson(mean * rng.gamma(2.0, 0.5, size=mean.shape)).astype(float)
    if gaps:
        X[rng.random(X.shape) < 0.1] = np.nan
    X = X[np.nansum(X, axis=1) > 0]
    model = linked(NegativeBinomial(0.5), exposure="total").fit(X)
    assert model.converged_
    size = np.log(np.nansum(X, axis=1))
    scores = model.transform(X)
    without = linked(NegativeBinomial(0.5)).fit_transform(X)
    along = [np.abs(np.corrcoef(one.T, size)[-1, :-1]).max() for one in (scores, without)]
    assert along[0] < 0.3 < 0.8 < along[1]
    assert np.isfinite(model.inverse_transform(scores)).all()


def test_overdispersed_counts_want_it():
    rng = np.random.default_rng(0)
    latents, loadings = rng.normal(size=(900, 2)), rng.normal(size=(40, 2)) / 2
    mean = mean_of(latents, loadings, rng.normal(size=40) / 2)
    X = rng.poisson(mean * rng.gamma(2.0, 0.5, size=mean.shape)).astype(float)
    train, test = X[:600], X[600:]
    family = NegativeBinomial(0.5)
    models = [
        linked(family).fit(train),
        ExpFamilyDEQ(2, family=family, random_state=0).fit(train),
        ExpFamilyDEQ(2, family="poisson", random_state=0).fit(train),
    ]
    scores = [model.score(test) for model in models]
    assert scores[0] == max(scores)
    explained = []
    for model in models:
        design = np.c_[model.transform(test), np.ones(300)]
        rest = latents[600:] - design @ np.linalg.lstsq(design, latents[600:], rcond=None)[0]
        explained.append(1 - rest.var() / latents[600:].var())
    assert explained[0] == max(explained)


@each_family
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_bad_columns_and_rows_get(family, dtype):
    X = sample(family).astype(dtype)
    counts = isinstance(family, NegativeBinomial)
    X[:, 0] = 0 if counts else 1e-3
    X[:, 1] = 7
    X[0] = 0 if counts else 1e-3
    X[1, 1:] = 1e6
    X[2:4, 2] = np.nan
    model = linked(family).fit(X)
    result = model.map_latents(X)
    assert result.converged.all()
    assert np.isfinite(model.inverse_transform(model.transform(X))).all()
    assert model.transform(X).dtype == dtype
    assert np.isfinite(model.score(X))
    if counts:
        # A feature without a count is held half an observation inside.
        assert model.intercept_[0] == pytest.approx(np.log(0.5 / (len(X) + 1)), abs=1e-4)
        assert not model.loadings_[0].any()
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.transform(X[:5]), model.transform(X[:5]))


def test_float32_agrees_with_float64():
    X = sample(NegativeBinomial(0.5))
    single, double = (linked(NegativeBinomial(0.5)).fit(X.astype(t)) for t in ("f4", "f8"))
    scores = double.transform(X)
    np.testing.assert_allclose(
        single.transform(X.astype("f4")), scores, atol=1e-4 * np.abs(scores).max()
    )


def test_many_components_layers_streams_and_networks():
    X = sample("negative_binomial", n=300, p=40)
    many = linked("negative_binomial", 20).fit(sp.csr_array(X))
    assert many.map_latents(X).converged.all()
    np.testing.assert_allclose(many.transform(X), many.transform(sp.csr_array(X)), atol=1e-8)
    deep = linked("negative_binomial", hidden_layer_sizes=(4,), max_iter=3, tol=1.0).fit(X)
    assert deep.map_latents(X).converged.all()
    stream = linked("negative_binomial")
    start = stream.partial_fit(X[:100]).score(X)
    for _ in range(20):
        for batch in np.split(X, 3):
            stream.partial_fit(batch)
    assert stream.score(X) > start
    network = DEQRegressor(linked("negative_binomial", 4), random_state=0)
    assert network.fit(X, np.log1p(X[:, 0])).score(X, np.log1p(X[:, 0])) > 0.3


def test_where_there_is_none_it_is_refused_in_words():
    assert get_canonical_map("log") == LogLink()
    for name in set(FAMILIES) - {"poisson", "negative_binomial", "gamma"}:
        with pytest.raises(ValueError, match=f"family '{name}' has no log link"):
            linked(name).fit(sample(name))
    with pytest.raises(TypeError, match="depends on the family"):
        LogLink().value(torch.zeros(1))
    with pytest.raises(ValueError, match="canonical_map='log' gives it one"):
        ExpFamilyDEQ(family="gamma", exposure="total").fit(sample("gamma"))
    with pytest.raises(ValueError, match="hidden_map cannot be the log link"):
        EquilibriumLayer(10, 2, hidden_layer_sizes=(4,), hidden_map=LogLink())
    with pytest.raises(ValueError, match="The 'hidden_map' parameter of ExpFamilyDEQ must be"):
        ExpFamilyDEQ(hidden_layer_sizes=(4,), hidden_map=LogLink()).architecture()


def test_a_log_link_of_a_family_of_ones_own():
    class Amounts(Gamma):
        link_of_mine = None

        def log_link(self):
            return self.link_of_mine

    X = sample("gamma")
    model = linked(Amounts())
    Amounts.link_of_mine = Gamma().log_link()
    np.testing.assert_array_equal(model.fit(X).transform(X), linked("gamma").fit(X).transform(X))
    with pytest.raises(ValueError, match="log link of another family than Amounts"):
        linked(Amounts(), canonical_map=Gamma(3.0).log_link()).fit(X)
    for bad in ("log", LogLink(), get_canonical_map("tanh")):
        Amounts.link_of_mine = bad
        with pytest.raises(TypeError, match="log_link of Amounts must return a CanonicalMap"):
            model.fit(X)


def test_exposure_weights_and_gaps_in_streams_and_modules():
    X = sample(NegativeBinomial(0.5), n=200)
    X = X[X.sum(axis=1) > 0]
    X[::7, 2] = np.nan
    model = linked(NegativeBinomial(0.5), exposure="total", whiten=True)
    model.partial_fit(X[:100]).partial_fit(X[100:])
    layer = model.to_module()
    np.testing.assert_allclose(layer(torch.from_numpy(X)).detach(), model.transform(X), atol=1e-6)
    weight = np.arange(len(X)) % 3
    tight = {"tol": 1e-12, "max_iter": 500}
    weighted = linked(NegativeBinomial(0.5), exposure="total", **tight)
    repeated = linked(NegativeBinomial(0.5), exposure="total", **tight)
    weighted.fit(X, sample_weight=weight)
    repeated.fit(np.repeat(X, weight, axis=0))
    np.testing.assert_allclose(weighted.loss_curve_[-1], repeated.loss_curve_[-1], rtol=1e-9)


def test_without_penalty_only_counts_may_have_no_optimum():
    model = linked(Gamma(3.0), weight_decay=0.0).fit(sample(Gamma(3.0)))
    assert model.converged_


def test_natural_parameters_and_formulas():
    X = sample("gamma")
    model = linked("gamma").fit(X)
    scores = model.transform(X)
    eta = model.natural_parameters(scores)
    assert (eta < 0).all()
    np.testing.assert_allclose(-1 / eta, model.inverse_transform(scores), rtol=1e-12)
    layer = linked(NegativeBinomial(0.5)).architecture()
    assert layer.canonical_parameter == "-log(1 + r exp(-zeta))"
    assert layer.mask == "r / (r + exp(zeta))"
    assert layer.canonical_map == "LogLink()"
    assert layer.activation == "exp(zeta)"
