"""Models of several latent layers, against their joint density and exact special cases."""

import pickle

import numpy as np
import pytest
import torch
from conftest import layers_of, log_joint, sample
from scipy import sparse
from scipy.stats import multivariate_normal
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import KNeighborsClassifier

from skdeq import DEQClassifier, ExpFamilyDEQ
from skdeq._canonical import TRAINING_WIDTH
from skdeq._latent_model import LatentModel
from skdeq._latents import LatentSolver, solve_latents
from skdeq._observations import Observations
from skdeq._setting import Setting
from skdeq._stochastic import envelope_gradient
from skdeq.families import Binomial, get_canonical_map, get_family
from skdeq.nn import EquilibriumLayer

MAPS = ("identity", "relu", "softplus", "tanh")


def deep(family="poisson", hidden=(4,), k=2, X=None, **options):
    X = sample(family) if X is None else X
    # At a precision of one, what multiplies and what divides by it are the same.
    options = {"alpha": 1.3, "max_iter": 15, "tol": 1e-2, "random_state": 0, **options}
    return ExpFamilyDEQ(k, family=family, hidden_layer_sizes=hidden, **options).fit(X), X


@pytest.mark.parametrize("hidden_map", MAPS)
@pytest.mark.parametrize("family", ["gaussian", "bernoulli", "poisson", "gamma"])
def test_latents_of_all_layers_are_a_local_maximum_of_the_log_joint(family, hidden_map):
    # On a kink, rounded off over 1e-8, the rounding of a predictor is 1e-8 of the slope.
    tol = 1e-8 if hidden_map == "relu" else 1e-10
    model, X = deep(family, hidden_map=hidden_map, fixed_point_tol=tol, alpha=1.5)
    result = model.map_latents(X)
    assert result.converged.all()
    for row in range(0, len(X), 9):
        parts = [torch.from_numpy(part[row].copy()) for part in result.layers]
        sizes = [len(part) for part in parts]
        x = torch.from_numpy(X[row])

        def density(joint, x=x, sizes=sizes):
            return log_joint(model, x, *joint.split(sizes))

        joint = torch.cat(parts)
        zeta = layers_of(model)[1][0] @ parts[1] + layers_of(model)[1][1]
        if hidden_map == "relu" and float(zeta.abs().min()) < 1e-6:
            # On a kink the gradient has no value: no neighbour is better.
            steps = 1e-4 * torch.randn(200, len(joint), dtype=joint.dtype)
            assert all(density(joint + step) <= density(joint) + 1e-12 for step in steps)
            continue
        gradient = torch.func.grad(density)(joint)
        assert float(gradient.abs().max()) < 1e-6
        assert float(torch.linalg.eigvalsh(torch.func.hessian(density)(joint)).max()) < 0


@pytest.mark.parametrize("canonical_map", ["softplus", "tanh", "relu"])
@pytest.mark.parametrize("family", ["gaussian", "bernoulli", "poisson"])
def test_maps_and_hidden_layers_together_are_solved(family, canonical_map):
    # The curvature of the map, taken for one layer where it is definite, made that of all layers
    # indefinite: rows stayed at zero for ever.
    torch.manual_seed(0)
    layer = EquilibriumLayer(
        8, 2, hidden_layer_sizes=(4, 3), family=family, canonical_map=canonical_map
    ).double()
    with torch.no_grad():
        for loadings, _ in layer.pairs():
            loadings *= 3
    x = torch.from_numpy(sample(family, 60, 8)).double()
    assert layer.certify(x).converged.all()
    if canonical_map == "relu":  # its rows may lie on kinks
        return
    model, X = deep(family, canonical_map=canonical_map, fixed_point_tol=1e-10)
    result = model.map_latents(X)
    assert result.converged.all()
    sizes = [part.shape[1] for part in result.layers]
    for row in range(0, len(X), 9):
        x = torch.from_numpy(X[row])
        joint = torch.from_numpy(np.concatenate([part[row] for part in result.layers]))
        gradient = torch.func.grad(lambda z, x=x: log_joint(model, x, *z.split(sizes)))(joint)
        assert float(gradient.abs().max()) < 1e-6


def test_gaussian_layers_through_the_identity_are_one_normal_law():
    X = np.random.default_rng(0).normal(size=(60, 7)) @ np.diag(np.arange(1, 8))
    model, _ = deep("gaussian", (4, 3), 2, X=X, hidden_map="identity", alpha=0.7)
    (W1, b1), (W2, b2), (W3, b3) = [tuple(map(np.asarray, pair)) for pair in layers_of(model)]
    inner = np.eye(4) + W2 @ (np.eye(3) + W3 @ W3.T) @ W2.T
    law = multivariate_normal(b1 + W1 @ (b2 + W2 @ b3), np.eye(7) + W1 @ inner @ W1.T / 0.7)
    np.testing.assert_allclose(model.score_samples(X), law.logpdf(X), rtol=1e-9)


def two_layers(n=900, p=40, h=15, k=2, alpha=5.0, seed=0):
    """Yes/no data of known parameters: z1 around tanh(W2 z2 + b2)."""
    rng = np.random.default_rng(seed)
    W2, b2 = 2 * rng.normal(size=(h, k)), 0.3 * rng.normal(size=h)
    W1 = 3 * rng.normal(size=(p, h)) / np.sqrt(h)
    top = rng.normal(size=(n, k)) / np.sqrt(alpha)
    first = np.tanh(top @ W2.T + b2) + rng.normal(size=(n, h)) / np.sqrt(alpha)
    return (rng.random((n, p)) < 1 / (1 + np.exp(-first @ W1.T))).astype(float)


def test_deep_model_beats_one_layer_on_data_of_two_layers():
    X = two_layers()
    train, test = X[:600], X[600:]
    options = {"family": "bernoulli", "alpha": 5.0, "random_state": 0}

    def held_out(model):
        """Mean log joint of held-out rows at their MAP latents, all constants kept."""
        result = model.map_latents(test)
        assert result.converged.all()
        parts = map(torch.from_numpy, result.layers)
        return float(log_joint(model, torch.from_numpy(test), *parts).mean())

    two = ExpFamilyDEQ(2, hidden_layer_sizes=(15,), max_iter=30, **options).fit(train)
    wide = ExpFamilyDEQ(15, **options).fit(train)
    narrow = ExpFamilyDEQ(2, **options).fit(train)
    # Densities of as many latents can be compared as they are; with 2 latents more the deep
    # model has one more constant of the prior, which is to its disadvantage where alpha < 2 pi.
    assert held_out(two) > held_out(wide)
    assert two.score(test) > max(wide.score(test), narrow.score(test))


def test_objective_is_the_documented_one():
    decay = 0.2
    options = {"weight_decay": decay, "max_iter": 1, "tol": 0.0}
    with pytest.warns(ConvergenceWarning):
        model, X = deep("poisson", alpha=2.5, **options)
    parts = map(torch.from_numpy, model.map_latents(X).layers)
    joint = log_joint(model, torch.from_numpy(X), *parts)
    # The constants of the prior of six latents are no part of it.
    joint = joint - 6 / 2 * np.log(2.5 / (2 * np.pi))
    penalty = sum(float(loadings.square().sum()) for loadings, _ in layers_of(model))
    expected = -float(joint.mean()) + decay / 2 * penalty
    # A fit keeps the best of its start and its epochs.
    assert min(model.loss_curve_) == pytest.approx(expected, rel=1e-9)


def test_weighted_scores_are_those_of_repeated_rows():
    X = sample("gaussian", n=60)
    weight = np.random.default_rng(0).integers(1, 6, size=60)
    # One minibatch, in which the order of the rows does not count.
    options = {"hidden_layer_sizes": (4,), "batch_size": 400, "max_iter": 5, "tol": 1.0}
    weighted = ExpFamilyDEQ(2, random_state=0, **options).fit(X, sample_weight=weight)
    repeated = ExpFamilyDEQ(2, random_state=0, **options).fit(np.repeat(X, weight, axis=0))
    np.testing.assert_allclose(weighted.components_, repeated.components_, atol=1e-6)
    np.testing.assert_allclose(weighted.transform(X), repeated.transform(X), atol=1e-6)


@pytest.mark.parametrize("hidden_map", ["tanh", "relu"])
def test_envelope_gradient_is_that_of_the_minimised_objective(hidden_map):
    rng = np.random.default_rng(1)
    X = torch.from_numpy(rng.poisson(1.0, size=(12, 6)).astype(float))
    setting = Setting(
        get_family("poisson"),
        Observations(X),
        alpha=1.3,
        weight_decay=0.2,
        sample_weight=torch.from_numpy(rng.uniform(0.5, 2, size=12)),
        hidden_map=get_canonical_map(hidden_map),
    ).smoothed(TRAINING_WIDTH)
    matrices = [torch.from_numpy(rng.normal(size=shape)) for shape in ((6, 5), (4, 4), (3, 3))]

    def solve(start=None):
        model, solver = LatentModel.of(matrices), LatentSolver("newton", 1e-10, 200)
        solved = solve_latents(setting, model, solver, start=start, rounded=True)
        assert solved.converged.all()
        return solved.value

    latents = solve()
    gradients, _ = envelope_gradient(setting, matrices, latents)
    step = 1e-5
    for gradient, matrix in zip(gradients, matrices, strict=True):
        for place in ((0, 0), (1, 1), (2, -1)):
            ends = []
            for sign in (1, -1):
                matrix[place] += sign * step
                ends.append(envelope_gradient(setting, matrices, solve(latents))[1])
                matrix[place] -= sign * step
            numeric = (ends[0] - ends[1]) / (2 * step)
            assert float(gradient[place]) == pytest.approx(numeric, rel=1e-5, abs=1e-8)


def test_exact_kinks_cost_little_more_than_rounded_ones():
    # Nine widths, of which the last six need next to nothing: what lies on a kink is extrapolated.
    model, X = deep("gaussian", hidden=(8,), hidden_map="relu", canonical_map="relu")
    result = model.map_latents(X)
    assert result.converged.all()
    assert np.abs(model.natural_parameters(model.transform(X))).min() == 0
    assert np.median(result.n_iter) <= 30


@pytest.mark.parametrize(
    "empty", [(), [], np.array([], dtype=int)], ids=["tuple", "list", "array"]
)
def test_no_hidden_layers_is_the_model_of_one_layer(empty):
    X = sample("poisson")
    plain = ExpFamilyDEQ(2, family="poisson", random_state=0).fit(X)
    same = ExpFamilyDEQ(2, family="poisson", hidden_layer_sizes=empty, random_state=0).fit(X)
    assert plain.loadings_.tobytes() == same.loadings_.tobytes()
    assert plain.transform(X).tobytes() == same.transform(X).tobytes()
    assert same.hidden_loadings_ == []
    (only,) = same.map_latents(X).layers
    np.testing.assert_array_equal(only, same.map_latents(X).value)


def test_shapes_order_and_prediction_from_the_top():
    model, X = deep("poisson", (5, 3), 2)
    result = model.map_latents(X)
    assert [part.shape[1] for part in result.layers] == [5, 3, 2]
    np.testing.assert_array_equal(np.hstack(result.layers), result.value)
    scores = model.transform(X)
    assert scores.shape == (len(X), 2)
    np.testing.assert_allclose(model.components_ @ model.components_.T, np.eye(2), atol=1e-12)
    covariance = np.cov(scores.T)
    assert abs(covariance[0, 1]) < 1e-3 * covariance[0, 0]
    assert covariance[0, 0] >= covariance[1, 1]
    # From the top down by hand, in either unit.
    first, second, top = (np.asarray(part) for part in result.layers)
    (W1, b1), (W2, b2), (W3, b3) = [tuple(map(np.asarray, pair)) for pair in layers_of(model)]
    expected = np.exp(np.tanh(np.tanh(top @ W3.T + b3) @ W2.T + b2) @ W1.T + b1)
    np.testing.assert_allclose(model.inverse_transform(scores), expected, rtol=1e-8)
    model.whiten = True
    np.testing.assert_array_equal(model.transform(X), top)
    np.testing.assert_allclose(model.inverse_transform(top), expected, rtol=1e-10)
    assert 0 < model.explained_deviance_ratio_.sum() < 1


def test_explained_deviance_is_that_of_predictions_from_the_top():
    model, X = deep("poisson", (5,), 2, whiten=True)
    family = get_family("poisson")

    def deviance(mean):
        eta = torch.from_numpy(np.log(mean))
        return float(family.deviance(torch.from_numpy(X), eta).sum())

    null = deviance(np.broadcast_to(X.mean(0), X.shape))
    model_deviance = deviance(model.inverse_transform(model.transform(X)))
    assert model.explained_deviance_ratio_.sum() == pytest.approx(1 - model_deviance / null)


@pytest.mark.parametrize("fixed_point", ["newton", "anderson", "picard"])
def test_certificates_of_deep_rows_are_honest(fixed_point):
    model, X = deep("bernoulli", fixed_point_max_iter=400, max_iter=10)
    model.set_params(fixed_point=fixed_point)
    result = model.map_latents(X)
    # The bare map of the layers need not contract.
    assert result.converged.mean() > (0.3 if fixed_point == "picard" else 0.99)
    for row in np.flatnonzero(result.converged)[::10]:
        parts = [torch.from_numpy(part[row].copy()).requires_grad_() for part in result.layers]
        gradients = torch.autograd.grad(log_joint(model, torch.from_numpy(X[row]), *parts), parts)
        assert max(float(one.abs().max()) for one in gradients) < 1e-4


def test_a_row_does_not_depend_on_its_neighbours():
    model, X = deep("poisson")
    alone = np.vstack([model.transform(X[i : i + 1]) for i in range(10)])
    np.testing.assert_allclose(alone, model.transform(X)[:10], rtol=1e-9, atol=1e-9)


def test_sparse_missing_float32_pickle_and_stream():
    X = sample("poisson", n=120)
    model, _ = deep("poisson", X=X)
    csr, _ = deep("poisson", X=sparse.csr_array(X))
    np.testing.assert_allclose(csr.loadings_, model.loadings_, rtol=1e-6, atol=1e-8)
    single, _ = deep("poisson", X=X.astype(np.float32))
    assert single.transform(X.astype(np.float32)).dtype == np.float32
    assert {one.dtype for one in single.hidden_loadings_} == {np.dtype(np.float32)}
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.transform(X), model.transform(X))
    holes = X.copy()
    holes[3] = np.nan
    holes[5, 2] = np.nan
    left_out, _ = deep("poisson", X=holes)
    result = left_out.map_latents(holes)
    assert result.converged.all()
    row = [torch.from_numpy(part[5].copy()).requires_grad_() for part in result.layers]
    gradients = torch.autograd.grad(log_joint(left_out, torch.from_numpy(holes[5]), *row), row)
    assert max(float(one.abs().max()) for one in gradients) < 1e-4
    before = model.score(X)
    stream = pickle.loads(pickle.dumps(model)).set_params(learning_rate=0.005)
    for _ in range(20):
        stream.partial_fit(X)
    assert stream.loss_curve_[-1] < stream.loss_curve_[-20]
    assert stream.score(X) > before - 0.5
    warm = pickle.loads(pickle.dumps(model)).set_params(warm_start=True, max_iter=1).fit(X)
    assert warm.loss_curve_[0] < model.loss_curve_[0]


def test_same_seed_same_bytes():
    (one, X), (two, _) = deep("bernoulli"), deep("bernoulli")
    assert one.hidden_loadings_[0].tobytes() == two.hidden_loadings_[0].tobytes()
    assert one.transform(X).tobytes() == two.transform(X).tobytes()


@pytest.mark.parametrize("hidden_map", ["softplus", "tanh"])
def test_gradcheck_of_the_deep_layer(hidden_map):
    torch.manual_seed(0)
    layer = EquilibriumLayer(
        6,
        2,
        family="poisson",
        hidden_layer_sizes=(3,),
        hidden_map=hidden_map,
        alpha=2.5,
        tol=1e-13,
    ).double()
    x = torch.poisson(torch.full((4, 6), 2.0)).double()
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = [one.detach().clone().requires_grad_() for one in layer.parameters()]
    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *values))


@pytest.mark.parametrize("whiten", [False, True])
def test_module_returns_what_transform_returns(whiten):
    model, X = deep("poisson", (5, 3), whiten=whiten)
    layer = model.to_module()
    output = layer(torch.from_numpy(X))
    np.testing.assert_allclose(output.detach().numpy(), model.transform(X), atol=1e-9)
    options = {"hidden_layer_sizes": (5, 3), "alpha": model.alpha}
    again = EquilibriumLayer(9, 2, family="poisson", **options).double()
    again.load_state_dict(layer.state_dict())
    np.testing.assert_allclose(again(torch.from_numpy(X)).detach(), output.detach(), atol=1e-6)
    assert [one.shape[1] for one in layer.certify(torch.from_numpy(X)).layers] == [5, 3, 2]


def test_classifier_trains_all_layers():
    X = two_layers(n=300, p=20, h=6)
    y = (X[:, :4].sum(1) > 2).astype(int)
    backbone, _ = deep("bernoulli", (6,), X=X, alpha=5.0)
    classifier = DEQClassifier(backbone, head_layer_sizes=(), max_iter=15, tol=0, random_state=0)
    with pytest.warns(UserWarning, match="did not converge"):
        classifier.fit(X, y)
    moved = classifier.backbone_.hidden_loadings_[0] - backbone.hidden_loadings_[0]
    assert np.abs(moved).max() > 1e-3
    assert classifier.loss_curve_[-1] < classifier.loss_curve_[0]
    # From the same first weights: other draws of them end now and then below.
    frozen = DEQClassifier(
        backbone, fine_tune=False, head_layer_sizes=(), max_iter=15, tol=0, random_state=0
    )
    with pytest.warns(UserWarning, match="did not converge"):
        frozen.fit(X, y)
    assert classifier.loss_curve_[-1] < frozen.loss_curve_[-1]
    assert classifier.backbone_.transform(X).shape == (300, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_layer_sizes": (3, 0)}, "integers of at least 1"),
        ({"hidden_layer_sizes": (2.5,)}, "integers of at least 1"),
        ({"hidden_layer_sizes": ("4",)}, "integers of at least 1"),
        ({"hidden_layer_sizes": (1,)}, "must not grow from the data to the top"),
        ({"hidden_layer_sizes": (3, 5)}, "must not grow from the data to the top"),
        ({"hidden_layer_sizes": (30,)}, "more than min\\(n_samples, n_features\\)=9"),
        ({"hidden_layer_sizes": (4,), "solver": "scoring"}, "one layer of dense loadings"),
    ],
)
def test_bad_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ExpFamilyDEQ(2, **options).fit(sample("gaussian"))


@pytest.mark.parametrize("hidden_map", ["softplus", "relu"])
def test_layers_below_a_map_without_negative_values_are_alive(hidden_map):
    X, y = load_digits(return_X_y=True)
    options = {"family": Binomial(16), "max_iter": 10, "tol": 1.0}
    model, _ = deep(hidden=(12,), k=5, X=X[:600], hidden_map=hidden_map, **options)
    assert model.explained_deviance_ratio_.min() > 0.01
    neighbours = KNeighborsClassifier().fit(model.transform(X[:600]), y[:600])
    # Where the first layer's latents were centred none or few of the components lived: 0.1, 0.6.
    assert neighbours.score(model.transform(X[600:]), y[600:]) > 0.7


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("hidden_map", ["relu", "softplus"])
@pytest.mark.parametrize("seed", range(4))
def test_intercepts_stay_in_the_domain_below_maps_without_negative_values(seed, hidden_map):
    rng = np.random.default_rng(seed)
    mean = np.exp(rng.normal(size=(100, 2)) @ rng.normal(size=(2, 12)) * 0.6)
    X = rng.gamma(1.0, mean) + 1e-9
    options = {"hidden_layer_sizes": (5,), "hidden_map": hidden_map, "max_iter": 2}
    deq = ExpFamilyDEQ(2, family="gamma", random_state=0, **options).fit(X)
    assert (deq.intercept_ < 0).all()
    assert np.isfinite(deq.loss_curve_).all()


@pytest.mark.parametrize("hidden_map", ["relu", "softplus", "tanh"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_weights_of_one_minibatch_are_repetition(hidden_map):
    X = sample("poisson", n=60, p=8)
    weight = np.random.default_rng(0).integers(0, 4, size=60)
    options = {"hidden_layer_sizes": (3,), "hidden_map": hidden_map, "batch_size": 500}
    options |= {"max_iter": 5, "tol": 0, "family": "poisson", "random_state": 0}
    weighted = ExpFamilyDEQ(2, **options).fit(X, sample_weight=weight)
    repeated = ExpFamilyDEQ(2, **options).fit(np.repeat(X, weight, axis=0))
    np.testing.assert_allclose(weighted.loadings_, repeated.loadings_, atol=1e-8)
