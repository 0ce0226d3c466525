"""ImplicitEMEncoder against a plain autograd loop; data of every scale; scikit-learn manners."""

import copy
import pickle
import warnings
from unittest import mock

import joblib
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import CUDA
from sklearn.base import clone
from sklearn.datasets import (
    load_breast_cancer,
    load_diabetes,
    load_digits,
    load_iris,
    load_wine,
)
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, scale
from test_objectives import plain_loss

from skdeq import ImplicitEMEncoder
from skdeq._data import to_rows
from skdeq._encoder_fit import DEAD_VARIANCE, EncoderTrainer, start_weights
from skdeq._encoding import distance_variances
from skdeq._precondition import RowBatches, fit_preconditioner
from skdeq.objectives import ACTIVATIONS, ObjectiveWeights, PairActivation, ReLU


def digits(n=1797):
    return load_digits().data[:n]


def encoder(n_components=16, **options):
    return ImplicitEMEncoder(n_components, **{"random_state": 0, "max_iter": 3, **options})


def double(values):
    return values**2


def twice(values):
    return 2 * values


OPTIMISERS = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, {}),
}


@pytest.mark.parametrize("solver", OPTIMISERS)
@pytest.mark.parametrize("redundancy", [0.0, 0.5])
def test_training_is_that_of_a_plain_autograd_loop(solver, redundancy):
    X = digits(301)
    options = OPTIMISERS[solver][1]
    fitted = encoder(
        solver=solver.replace("momentum", "sgd"),
        learning_rate=0.002,
        batch_size=64,
        weight_redundancy=redundancy,
        **options,
    ).fit(X)
    weights = ObjectiveWeights(weight_redundancy=redundancy)
    seed = np.random.RandomState(0).randint(np.iinfo(np.int32).max)
    generator = torch.Generator().manual_seed(int(seed))
    rows = torch.from_numpy(X)
    preconditioner = fit_preconditioner(rows, None)
    layer = start_weights(16, preconditioner.varying, generator).requires_grad_()
    constant = 13**0.5
    inputs = (rows - rows.mean(0)) / preconditioner.scale
    inputs = torch.cat([inputs, torch.full((301, 1), constant, dtype=torch.float64)], dim=1)
    optimiser = OPTIMISERS[solver][0]([layer], lr=0.002, **options)
    for _ in range(3):
        losses = []
        for index in torch.randperm(301, generator=generator).tensor_split(5):
            loss = plain_loss(torch.relu(inputs[index] @ layer.T), weights)
            if redundancy:
                unit = torch.nn.functional.normalize(layer[:, :-1], dim=1)
                gap = unit @ unit.T - torch.eye(16, dtype=torch.float64)
                loss = loss + redundancy * gap.square().sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    np.testing.assert_allclose(fitted.loss_curve_[-1], np.mean(losses), rtol=1e-10)
    expected = torch.relu(inputs @ layer.T).detach()
    np.testing.assert_allclose(fitted.transform(X), expected, atol=1e-8)


def test_preconditioned_rows_have_the_documented_norm():
    X = digits() * 37 + 5
    preconditioner = fit_preconditioner(torch.from_numpy(X), None)
    np.testing.assert_allclose(preconditioner.location, X.mean(0), rtol=1e-12)
    inputs = (X - X.mean(0)) / preconditioner.scale
    np.testing.assert_allclose(np.square(inputs).sum(1).mean(), 100, rtol=1e-10)
    weights = torch.randn(4, 65, dtype=torch.float64)
    components, bias = preconditioner.fold(weights)
    batches = RowBatches(torch.from_numpy(X), preconditioner, torch.float64, torch.device("cpu"))
    out = torch.empty(len(X), 4, dtype=torch.float64)
    batches.project(batches.gather(torch.arange(len(X))), weights, out)
    np.testing.assert_allclose(X @ components.numpy().T + bias.numpy(), out, atol=1e-9)
    np.testing.assert_allclose(preconditioner.unfold(components, bias), weights, atol=1e-10)


def test_features_serve_a_linear_probe_as_well_as_the_pixels():
    X, y = load_digits(return_X_y=True)
    train = np.arange(len(X)) % 3 > 0
    fitted = encoder(32, max_iter=20).fit(X[train])
    codes = fitted.transform(X)
    scaler = StandardScaler().fit(codes[train])
    probe = LogisticRegression(max_iter=2000).fit(scaler.transform(codes[train]), y[train])
    raw = LogisticRegression(max_iter=2000).fit(X[train] / 16, y[train])
    accuracy = probe.score(scaler.transform(codes[~train]), y[~train])
    # Half as many features as pixels, and no worse than the pixels by more than noise.
    assert accuracy > raw.score(X[~train] / 16, y[~train]) - 0.01
    assert (codes > 0.01).mean() < 0.35
    assert not len(fitted.dead_components_)


def test_ablation_is_as_published():
    X = digits()
    options = {"max_iter": 40, "tol": 0.0}
    with pytest.warns(ConvergenceWarning, match="All 16 components .* are dead"):
        collapsed = encoder(variance_weight=0.0, decorrelation_weight=0.0, **options).fit(X)
    np.testing.assert_array_equal(collapsed.dead_components_, np.arange(16))
    share = collapsed.responsibilities(X)
    np.testing.assert_allclose(share, 1 / 16, atol=1e-3)

    def redundancy(fitted):
        correlation = np.corrcoef(fitted.transform(X).T)
        return np.square(correlation - np.diag(np.diag(correlation))).sum()

    alike = encoder(decorrelation_weight=0.0, **options).fit(X)
    full = encoder(**options).fit(X)
    assert not len(alike.dead_components_)
    assert not len(full.dead_components_)
    assert redundancy(alike) > 5 * redundancy(full)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("scale", "shift"),
    [(1e-6, 0), (1e-3, 0), (1e6, 0), (1, 100), (1, 1e4), (1e-30, 0), (1e30, 0)],
)
def test_any_scale_and_location_give_the_same_features(scale, shift, dtype):
    X = digits(600)
    expected = encoder().fit(X).transform(X)
    other = (X * scale + shift).astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = encoder().fit(other)
    codes = fitted.transform(other)
    assert codes.dtype == dtype
    # float32 keeps 4 of the digits at an origin 1e4 away from data of unit spread.
    tolerance = 1e-6 if dtype == np.float64 else 1e-3 * (1 + shift / 100)
    np.testing.assert_allclose(codes, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(
    ("scale", "shift", "tolerance"),
    # float64 keeps 8 of the digits of data of unit spread at 1e8, 4 at 1e12.
    [(1, 1e8, 1e-6), (1e-3, 1e5, 1e-6), (1, 1e12, 1e-2)],
)
def test_data_far_from_the_origin_give_the_same_features(scale, shift, tolerance):
    X = digits(600)
    expected = encoder().fit(X).transform(X)
    other = X * scale + shift
    fitted = encoder().fit(other)
    error = np.abs(fitted.transform(other) - expected).max()
    assert error < tolerance * np.abs(expected).max()


def with_column(X, value):
    """X with a constant column beside, in its own type."""
    return np.hstack([X, np.full((len(X), 1), value, X.dtype)])


@pytest.mark.parametrize(
    ("scale", "value"), [(1, 0.1), (1, 1.7e9), (1e-3, 1.7e9), (1e5, 1.7e14), (1, 1.7e18)]
)
def test_constant_column_beside_changes_nothing(scale, value):
    X = digits(600) * scale
    zero, beside = with_column(X, 0.0), with_column(X, value)
    expected = encoder().fit(zero)
    fitted = encoder().fit(beside)
    assert fitted._scale == expected._scale
    np.testing.assert_allclose(fitted.transform(beside), expected.transform(zero), atol=1e-9)


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_array])
@pytest.mark.parametrize("value", [0.1, 1e6, 1e8])
@pytest.mark.parametrize("weighted", [False, True])
def test_constant_column_costs_float32_no_digits(layout, value, weighted):
    X = digits(300).astype(np.float32)
    weight = np.random.default_rng(0).uniform(0.5, 2, size=300) if weighted else None
    zero, beside = layout(with_column(X, 0.0)), layout(with_column(X, value))
    expected, fitted = encoder(warm_start=True), encoder(warm_start=True)

    def check_equal():
        assert not fitted.components_[:, -1].any()
        np.testing.assert_allclose(fitted.transform(beside), expected.transform(zero), atol=1e-4)
        np.testing.assert_allclose(fitted.score(beside), expected.score(zero), rtol=1e-5)

    for _ in range(2):
        expected.fit(zero, sample_weight=weight)
        fitted.fit(beside, sample_weight=weight)
        check_equal()
    expected.partial_fit(zero, sample_weight=weight)
    fitted.partial_fit(beside, sample_weight=weight)
    check_equal()
    revived = encoder(64, revive_dead=True, lse_weight=1000.0, solver="adam").fit(beside)
    assert not revived.components_[:, -1].any()


def test_column_that_varies_later_in_a_stream_is_learned():
    X = digits(600)
    late = with_column(X, 5.0)
    late[300:, -1] += 10 * (X[300:, 20] > 8)
    stream = encoder().partial_fit(late[:300])
    assert not stream.components_[:, -1].any()
    for _ in range(5):
        stream.partial_fit(late[300:])
    assert stream.components_[:, -1].all()


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-200, 1.7e9, 1e150])
@pytest.mark.parametrize("n", [2, 50, 5000])
def test_rows_that_are_all_alike_have_no_scale(value, n):
    rows = np.full((n, 3), value)
    fitted = fit_preconditioner(torch.from_numpy(rows), None)
    assert fitted.scale == 1.0 and not fitted.varying.any()
    np.testing.assert_array_equal(fitted.location, rows[0])
    weight = torch.rand(n, generator=torch.Generator().manual_seed(0)) + 0.1
    single = torch.from_numpy(rows.clip(0, 1e30).astype(np.float32))
    assert fit_preconditioner(single, weight).scale == 1.0


AWKWARD = {
    "constant columns": lambda: np.where(np.arange(64) % 5 == 0, 100.0, digits(500)),
    "duplicated rows": lambda: np.repeat(digits(20), 50, axis=0),
    "fewer rows than a batch": lambda: digits(20),
    "more columns than rows": lambda: np.random.default_rng(0).normal(size=(30, 500)),
    "more components than columns": lambda: load_iris().data,
    "an outlier": lambda: np.vstack([digits(500), np.full((1, 64), 1e4)]),
}


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_awkward_data_train(name, dtype):
    X = AWKWARD[name]().astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if name == "an outlier":
            warnings.filterwarnings("ignore", message="Row 500 of 501")
        fitted = encoder(max_iter=20).fit(X)
    assert np.isfinite(fitted.components_).all()
    assert fitted.loss_curve_[-1] < fitted.loss_curve_[0]
    codes = fitted.transform(X)
    assert np.isfinite(codes).all()
    assert len(fitted.dead_components_) < 16


def test_rows_that_are_all_alike_have_only_dead_components():
    with pytest.warns(ConvergenceWarning, match="check that the rows differ"):
        fitted = encoder().fit(np.ones((50, 5)))
    np.testing.assert_array_equal(fitted.dead_components_, np.arange(16))
    assert np.isfinite(fitted.transform(np.ones((2, 5)))).all()


@pytest.mark.parametrize(
    "activation",
    [*ACTIVATIONS, (double, twice)],
    ids=lambda one: one if isinstance(one, str) else "own",
)
@pytest.mark.parametrize("solver", ["sgd", "adam"])
def test_every_activation_trains(activation, solver):
    X = digits(500)
    rate = 0.001
    fitted = encoder(activation=activation, solver=solver, learning_rate=rate, max_iter=10).fit(X)
    assert fitted.loss_curve_[-1] < fitted.loss_curve_[0]
    value = activation[0] if isinstance(activation, tuple) else ACTIVATIONS[activation].value
    linear = X @ fitted.components_.T + fitted.intercept_
    np.testing.assert_allclose(fitted.transform(X), value(torch.from_numpy(linear)), atol=1e-9)


def test_transform_responsibilities_and_inverse():
    X = digits(300)
    fitted = encoder().fit(X)
    codes = fitted.transform(X)
    share = np.exp(-codes) / np.exp(-codes).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(fitted.responsibilities(X), share, atol=1e-12)
    fitted.set_params(output="responsibilities")
    np.testing.assert_array_equal(fitted.transform(X), fitted.responsibilities(X))
    np.testing.assert_allclose(fitted.inverse_transform(codes), codes @ fitted.components_)
    single = fitted.inverse_transform(codes.astype(np.float32))
    assert single.dtype == np.float32
    with pytest.raises(ValueError, match="D has 3 columns, but this model has 16 components"):
        fitted.inverse_transform(np.ones((2, 3)))


def test_loss_terms_are_those_of_the_plain_objective():
    X = digits(300)
    fitted = encoder(lse_weight=3.0, variance_weight=0.5, weight_redundancy=0.1).fit(X)
    terms = fitted.loss_terms(X)
    weights = fitted._objective_weights()
    codes = torch.from_numpy(fitted.transform(X))
    unit = fitted.components_ / np.linalg.norm(fitted.components_, axis=1, keepdims=True)
    redundancy = np.linalg.norm(unit @ unit.T - np.eye(16)) ** 2
    expected = float(plain_loss(codes, weights)) + 0.1 * redundancy
    assert list(terms) == ["lse", "variance", "decorrelation", "weight_redundancy"]
    np.testing.assert_allclose(sum(terms.values()), expected, rtol=1e-12)
    np.testing.assert_allclose(fitted.score(X), -expected, rtol=1e-12)


@pytest.mark.parametrize("n", [60, 300])
def test_sparse_equals_dense(n):
    X = digits(n)
    dense = encoder().fit(X)
    for layout in (sp.csr_matrix, sp.csc_array):
        sparse = encoder().fit(layout(X))
        np.testing.assert_allclose(sparse.components_, dense.components_, atol=1e-10)
        np.testing.assert_allclose(sparse.transform(layout(X)), dense.transform(X), atol=1e-8)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.int16])
@pytest.mark.parametrize("layout", [np.asarray, sp.csr_array])
def test_small_integers_train_as_float32_does(dtype, layout):
    X = digits(300).astype(dtype)
    as_float = encoder().fit(X.astype(np.float32))
    fitted = encoder().fit(layout(X))
    assert fitted.components_.dtype == np.float32
    np.testing.assert_allclose(fitted.components_, as_float.components_, atol=1e-3)
    assert fitted.transform(layout(X)).dtype == np.float32


def test_other_integers_train_in_float64():
    X = digits(300).astype(np.int64)
    fitted = encoder().fit(X)
    np.testing.assert_array_equal(fitted.components_, encoder().fit(digits(300)).components_)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_weights_equal_repetition_up_to_a_batch(momentum):
    X = digits(40)
    weight = np.random.default_rng(0).integers(0, 4, size=40)
    options = {"max_iter": 10, "momentum": momentum}
    weighted = encoder(**options).fit(X, sample_weight=weight)
    repeated = encoder(**options).fit(np.repeat(X, weight, axis=0))
    np.testing.assert_allclose(weighted.transform(X), repeated.transform(X), atol=1e-8)
    np.testing.assert_array_equal(weighted.dead_components_, repeated.dead_components_)


def test_weights_beyond_a_batch_shift_what_is_learned():
    X, y = load_digits(return_X_y=True)
    weight = np.where(y == 3, 50.0, 0.1)
    even = encoder(8, max_iter=10).fit(X)
    uneven = encoder(8, max_iter=10).fit(X, sample_weight=weight)
    halves = encoder(8, max_iter=10).fit(X, sample_weight=np.full(len(X), 0.5))
    threes = X[y == 3]
    assert uneven.score(threes) > even.score(threes)
    # Equal shares are none.
    np.testing.assert_allclose(halves.loss_curve_, even.loss_curve_, rtol=1e-6)


@pytest.mark.parametrize("scale", [1 / 200, 1e-10, 1e-300])
def test_shares_count_by_their_ratios(scale):
    X = digits(200)
    shares = np.full(200, scale)
    np.testing.assert_allclose(
        encoder().fit(X, sample_weight=shares).transform(X),
        encoder().fit(X).transform(X),
        atol=1e-6,
    )


def test_stream_in_a_shallow_copy_leaves_the_original_alone():
    X = digits(200)
    fitted = encoder().fit(X)
    weights = fitted._weights.copy()
    copy.copy(fitted).partial_fit(X)
    np.testing.assert_array_equal(fitted._weights, weights)
    with pytest.raises(ValueError, match="n_components=3, but .* there is, of n_components=16"):
        fitted.set_params(n_components=3).partial_fit(X)


def double(a):
    return 2 * a


def test_stream_knows_one_pair_of_functions_from_another():
    X = digits(200)
    softplus = PairActivation(torch.nn.functional.softplus, torch.sigmoid)
    fitted = encoder(activation=(torch.nn.functional.softplus, torch.sigmoid)).partial_fit(X)
    pickle.loads(pickle.dumps(fitted)).partial_fit(X)
    fitted.set_params(activation=softplus).partial_fit(X)
    with pytest.raises(ValueError, match=r"activation=\(.*, but partial_fit goes on with"):
        fitted.set_params(activation=(torch.square, double)).partial_fit(X)
    named = encoder().partial_fit(X)
    named.set_params(activation=ReLU()).partial_fit(X)
    with pytest.raises(ValueError, match=r"activation='softplus', .* of activation=ReLU"):
        named.set_params(activation="softplus").partial_fit(X)


@pytest.mark.parametrize("scale", [1e160, 1e-200])
def test_scales_beyond_computing_are_refused(scale):
    with pytest.raises(ValueError, match="rescale X"):
        encoder().fit(digits(100) * scale)


def test_same_seed_same_bytes_and_global_generators_left_alone():
    X = digits(500)
    one = encoder().fit(X)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with mock.patch("numpy.random.mtrand._rand", None):
        two = encoder().fit(X)
    assert torch.equal(before, torch.get_rng_state())
    assert one.components_.tobytes() == two.components_.tobytes()
    assert one.intercept_.tobytes() == two.intercept_.tobytes()
    other = encoder(random_state=1).fit(X)
    assert np.abs(other.components_ - one.components_).max() > 1e-3


@pytest.mark.parametrize("how", ["plain", "read only", "reversed", "fortran"])
def test_input_is_left_as_it_was(how):
    X = digits(300)
    if how == "read only":
        X.setflags(write=False)
    elif how == "reversed":
        X = X[::-1, ::-1]
    elif how == "fortran":
        X = np.asfortranarray(X)
    before = X.copy()
    weight = np.ones(300)
    fitted = encoder().fit(X, sample_weight=weight)
    fitted.partial_fit(X)
    fitted.transform(X)
    np.testing.assert_array_equal(X, before)
    np.testing.assert_array_equal(weight, 1)


def test_partial_fit_learns_from_a_stream():
    X = digits()
    stream = encoder(solver="adam", learning_rate=0.003)
    scores = []
    for _ in range(4):
        for start in range(0, len(X), 300):
            stream.partial_fit(X[start : start + 300])
        scores.append(stream.score(X))
    assert stream.n_iter_ == len(stream.loss_curve_) == 24
    assert scores == sorted(scores)
    assert set(stream._solver_state[0]) == {"step", "exp_avg", "exp_avg_sq"}
    # A copy goes on as the stream itself does.
    again = pickle.loads(pickle.dumps(stream))
    np.testing.assert_array_equal(
        again.partial_fit(X[:300]).components_, stream.partial_fit(X[:300]).components_
    )
    stream.set_params(solver="sgd", momentum=0.5, learning_rate=0.001).partial_fit(X[:300])
    assert set(stream._solver_state[0]) == {"momentum_buffer"}


def test_warm_start_goes_on():
    X = digits()
    fitted = encoder(warm_start=True, max_iter=5).fit(X)
    first = fitted.loss_curve_[0]
    fitted.fit(X)
    assert fitted.loss_curve_[0] < first
    codes = encoder(warm_start=True, max_iter=1, learning_rate=1e-12)
    codes.fit(X)
    before = codes.transform(X)
    np.testing.assert_allclose(codes.fit(X * 3 + 1).transform(X), before, atol=1e-6)


def test_tol_ends_a_fit_that_has_come_to_rest():
    assert encoder(max_iter=50, tol=10.0).fit(digits(300)).n_iter_ == 6
    assert encoder(max_iter=8, tol=0.0).fit(digits(300)).n_iter_ == 8


def test_divergence_is_one_warning_and_no_nan():
    X = digits(300)
    with pytest.warns(ConvergenceWarning, match="No epoch .* was kept: with") as caught:
        fitted = encoder(learning_rate=1e300, activation="identity").fit(X)
    assert len(caught) == 1
    assert np.isfinite(fitted.transform(X)).all()
    stream = encoder().fit(X)
    before = stream.components_.copy()
    stream.set_params(learning_rate=1e300)
    with pytest.warns(ConvergenceWarning, match="were left out"):
        stream.partial_fit(X)
    np.testing.assert_array_equal(stream.components_, before)


@pytest.mark.parametrize("load", [load_iris, load_digits, load_breast_cancer])
@pytest.mark.parametrize("n_components", [2, 8])
def test_steps_that_are_too_long_are_taken_back(load, n_components):
    # Distances to both sides throw a component to and fro where rows lie along a line.
    X = load().data
    start = encoder(n_components, activation="abs", max_iter=1, learning_rate=1e-12).fit(X)
    with pytest.warns(ConvergenceWarning) as caught:
        fitted = encoder(n_components, activation="abs", max_iter=20).fit(X)
    assert (
        sum("led nowhere or diverged and were undone" in str(one.message) for one in caught) == 1
    )
    # Within the noise of two batches an epoch; without going back iris ends a thousand below.
    assert fitted.score(X) > 0.85 * start.score(X)
    assert len(fitted.loss_curve_) == fitted.n_iter_ <= 20
    assert max(fitted.loss_curve_) < 0


@pytest.mark.parametrize("activation", ["relu", "abs"])
@pytest.mark.parametrize("load", [load_iris, load_digits, load_diabetes])
def test_no_fit_comes_to_rest_above_its_start(load, activation):
    X = scale(load().data[:: 4 if load is load_digits else 2])[:120]
    for k in (4, 64):
        start = encoder(k, activation=activation, max_iter=1, learning_rate=1e-12).fit(X)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = encoder(k, activation=activation, max_iter=100).fit(X)
        assert fitted.n_iter_ > 0
        assert sum(fitted.loss_terms(X).values()) < sum(start.loss_terms(X).values())


def test_all_that_went_wrong_in_a_fit_is_one_warning():
    X = scale(load_iris().data)
    with pytest.warns(ConvergenceWarning, match="undone.*are dead") as caught:
        encoder(4, activation="abs", max_iter=20).fit(X)
    assert len(caught) == 1


@pytest.mark.parametrize("scale", [1.0, 0.5, 1e-9])
def test_no_fit_ends_with_its_random_start(scale):
    # Of one batch the loss of the first epoch is that of the start, to rounding.
    X = load_iris().data
    fitted = encoder(4, max_iter=5).fit(X, sample_weight=np.full(150, scale))
    assert fitted.n_iter_ == len(fitted.loss_curve_) == 5
    few = encoder(4, max_iter=5).fit(X[:40], sample_weight=np.full(40, scale))
    assert few.n_iter_ == len(few.loss_curve_) == 5


def test_revived_components_come_to_life():
    # More components than four features can tell apart.
    X = load_iris().data
    dead = encoder(64, max_iter=20).fit(X)
    revived = encoder(64, max_iter=20, revive_dead=True).fit(X)
    assert len(dead.dead_components_) > len(revived.dead_components_)
    adam = encoder(64, solver="adam", learning_rate=0.01, revive_dead=True, max_iter=3)
    assert np.isfinite(adam.fit(load_iris().data).components_).all()


def test_dead_components_are_those_of_small_variance():
    X = load_iris().data
    fitted = encoder(64, max_iter=20).fit(X)
    expected = np.flatnonzero(fitted.transform(X).var(axis=0) < 0.01)
    np.testing.assert_array_equal(fitted.dead_components_, expected)
    assert len(expected)


def test_dead_components_are_those_under_the_weights():
    X = np.random.default_rng(0).normal(size=(100, 4))
    X[90:] *= 30
    weight = np.r_[np.ones(90), np.full(10, 1e-4)]
    fitted = encoder(24, max_iter=20, variance_weight=0.0)
    with pytest.warns(UserWarning, match="% of their variance"):
        distance = fitted.fit(X, sample_weight=weight).transform(X)
    mean = np.average(distance, axis=0, weights=weight)
    variance = np.average((distance - mean) ** 2, axis=0, weights=weight)
    # Some of them vary over rows that hardly count.
    assert (variance < 0.01).sum() > (distance.var(axis=0) < 0.01).sum()
    np.testing.assert_array_equal(fitted.dead_components_, np.flatnonzero(variance < 0.01))


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"solver": "adam", "learning_rate": 0.01}])
def test_revived_components_have_no_moments_of_their_past(options, monkeypatch):
    revive, left = EncoderTrainer.revive, []

    def spy(self, generator):
        dead = self.variance < DEAD_VARIANCE
        revive(self, generator)
        moments = [
            one
            for one in self.optimiser.state[self.weights].values()
            if one is not None and one.shape == self.weights.shape
        ]
        left.extend(float(one[dead].abs().max()) for one in moments if dead.any())

    monkeypatch.setattr(EncoderTrainer, "revive", spy)
    encoder(64, revive_dead=True, max_iter=8, **options).fit(load_iris().data)
    assert left and not any(left)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_works_in_the_type_of_the_data(dtype):
    assert encoder().fit(digits(100).astype(dtype))._weights.dtype == dtype


def test_search_in_a_pipeline_over_two_processes():
    X, y = load_digits(return_X_y=True)
    X, y = X[:300], y[:300]
    pipeline = make_pipeline(encoder(), StandardScaler(), LogisticRegression(max_iter=100))
    grid = {
        "implicitemencoder__n_components": [8, 24],
        "implicitemencoder__output": ["activations", "responsibilities"],
    }
    search = GridSearchCV(pipeline, grid, cv=2, n_jobs=2).fit(X, y)
    assert search.best_score_ > 0.8
    assert search.best_params_["implicitemencoder__n_components"] == 24


def test_pickles_clones_and_dumps(tmp_path):
    X = digits(200)
    fitted = encoder(activation=(double, twice), learning_rate=1e-4).fit(X)
    expected = fitted.transform(X)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).transform(X), expected)
    joblib.dump(fitted, tmp_path / "encoder.joblib")
    loaded = joblib.load(tmp_path / "encoder.joblib", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(loaded.transform(X), expected)
        loaded.partial_fit(X)
    assert not hasattr(clone(fitted), "components_")
    for value in vars(fitted).values():
        assert not isinstance(value, torch.Tensor)


def test_one_row_and_data_frames():
    pd = pytest.importorskip("pandas")
    X = pd.DataFrame(digits(200), columns=[f"pixel {i}" for i in range(64)])
    fitted = encoder().set_output(transform="pandas").fit(X)
    codes = fitted.transform(X.iloc[:1])
    assert list(codes.columns) == [f"implicitemencoder{i}" for i in range(16)]
    np.testing.assert_allclose(codes, fitted.transform(X).iloc[:1], atol=1e-10)
    with pytest.raises(ValueError, match="minimum of 2 is required"):
        fitted.score(X.iloc[:1])


def test_bad_input_is_a_sentence_and_changes_nothing():
    X = digits(100)
    fitted = encoder().fit(X)
    before = dict(vars(fitted))
    gap, far = X.copy(), sp.csr_array(X)
    gap[7, 3] = np.nan
    far.data[far.indptr[5]] = np.inf
    column = far.indices[far.indptr[5]]
    cases = [
        (gap, {}, "Input X contains NaN: row 7, column 3 of X is nan"),
        (far, {}, f"Input X contains infinity: row 5, column {column} of X is inf"),
        (X[:1], {}, "1 sample"),
        (X, {"sample_weight": np.eye(100)[0]}, "positive for 1 of 100 rows"),
        (X, {"sample_weight": -np.ones(100)}, "Negative values in data passed to"),
    ]
    for data, options, message in cases:
        with pytest.raises(ValueError, match=message):
            fitted.fit(data, **options)
        assert vars(fitted) == before
    for params, message in [
        ({"activation": "rleu"}, "'activation' parameter"),
        ({"activation": (np.abs,)}, "pair \\(function, derivative\\)"),
        ({"solver": "lbfgs"}, "'solver' parameter"),
        ({"device": "cuda:99"}, "CUDA devices that torch can use"),
        ({"batch_size": 1}, "'batch_size' parameter"),
    ]:
        with pytest.raises(ValueError, match=message):
            clone(fitted).set_params(**params).fit(X)
    with pytest.raises(NotFittedError):
        encoder().transform(X)
    with pytest.raises(TypeError, match="learning_rat"):
        ImplicitEMEncoder(learning_rat=0.1)


def test_interrupted_fit_leaves_nothing_behind(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("skdeq._encoder_fit.EncoderTrainer.epoch", interrupt)
    estimator = encoder()
    with pytest.raises(KeyboardInterrupt):
        estimator.fit(digits(100))
    assert not hasattr(estimator, "components_")
    assert not hasattr(estimator, "n_features_in_")


def test_verbose_prints_a_line_for_each_epoch(capsys):
    encoder(verbose=1).fit(digits(100))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 3
    assert all(line.startswith("[ImplicitEMEncoder] epoch") for line in lines[1:])


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("layout", [np.asarray, sp.csr_array])
@pytest.mark.parametrize("solver", ["sgd", "adam"])
def test_devices_agree(device, layout, solver):
    X = digits(300)
    expected = encoder(device="cpu", solver=solver, learning_rate=0.001).fit(X)
    fitted = encoder(device=device, solver=solver, learning_rate=0.001).fit(layout(X))
    np.testing.assert_allclose(fitted.components_, expected.components_, atol=1e-6)
    np.testing.assert_allclose(
        fitted.set_params(device="cpu").transform(X), expected.transform(X), atol=1e-4
    )
    fitted.set_params(device=device).partial_fit(layout(X))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16])
def test_repeated_places_of_sparse_rows_are_added_up_without_overflow(dtype):
    X = np.random.default_rng(0).integers(0, 100, size=(40, 3)).astype(float)
    encoder = ImplicitEMEncoder(4, random_state=0, max_iter=2).fit(X)
    most = np.iinfo(dtype).max
    places = np.array([0, 0, 1]), np.array([0, 2, 3])
    rows = sp.csr_array((np.array([most, most, 1], dtype), *places), shape=(2, 3))
    expected = encoder.transform(np.array([[2.0 * most, 0, 0], [0, 1, 0]]))
    np.testing.assert_allclose(encoder.transform(rows), expected, rtol=1e-6)
    assert rows.nnz == 3  # as it came


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, bool])
def test_rows_whose_places_are_out_of_order_are_those_in_order(dtype):
    X = np.random.default_rng(0).integers(0, 2, size=(40, 6)).astype(dtype)
    ordered = sp.csr_array(X)
    indices, values = ordered.indices.copy(), ordered.data.copy()
    for low, high in zip(ordered.indptr[:-1], ordered.indptr[1:], strict=True):
        indices[low:high], values[low:high] = indices[low:high][::-1], values[low:high][::-1]
    backward = sp.csr_array((values, indices, ordered.indptr), shape=X.shape)
    one, two = (
        ImplicitEMEncoder(4, random_state=0, max_iter=2).fit(rows) for rows in (ordered, backward)
    )
    assert one.components_.dtype == two.components_.dtype == np.float32
    np.testing.assert_array_equal(one.components_, two.components_)
    one.partial_fit(backward)


@pytest.mark.parametrize("load", [load_wine, load_diabetes, load_breast_cancer, load_digits])
def test_few_rows_come_down_from_where_they_climb(load):
    X = scale(load().data[:200])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fits = [ImplicitEMEncoder(64, random_state=seed).fit(X) for seed in range(3)]
    # The first epochs are far above the random start, as 64 components want more rows than these.
    assert max(one.loss_curve_[0] for one in fits) > 0 > max(one.loss_curve_[-1] for one in fits)
    scores = [one.score(X) for one in fits]
    # Undone, with a tenth of the step from there, they ended up to two hundred below.
    assert max(scores) - min(scores) < 100
    for one in fits:
        assert np.mean(one.transform(X) > 0) < 0.35
        assert len(one.dead_components_) == 0


@pytest.mark.parametrize("batch_size", [500, 600, 1024])
def test_larger_batches_keep_more_components_alive(batch_size):
    X = load_digits().data
    few = ImplicitEMEncoder(500, random_state=0).fit(X)
    more = ImplicitEMEncoder(500, random_state=0, batch_size=batch_size).fit(X)
    assert len(more.dead_components_) < len(few.dead_components_)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_a_row_that_has_most_of_the_variance_is_named(dtype):
    X = np.random.default_rng(0).integers(0, 9, size=(300, 5)).astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(4, max_iter=1, tol=0).fit(X)
    X[123] = 10_000
    for rows in (X, sp.csr_array(X)):
        with pytest.warns(UserWarning, match=r"Row 123 of 300 .* has 100 % of their variance"):
            encoder(4, max_iter=1).fit(rows)
    with pytest.warns(UserWarning, match="Row 123 of 300"):
        encoder(4).partial_fit(X)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ((lambda a: a.sum(1, keepdim=True), torch.ones_like), r"function .* made shape \(3, 1\)"),
        ((torch.abs, lambda a: 1.0), "derivative .* made a float"),
        ((torch.log, torch.reciprocal), "function .* not finite"),
        ((lambda a: a.abs_(), torch.sign), "function .* changes its argument"),
        ((torch.abs, lambda a: a.double().sign()), "derivative .* type torch.float64"),
    ],
)
def test_pairs_that_are_no_activation_are_refused(pair, message):
    X = load_iris().data
    with pytest.raises(ValueError, match=message):
        encoder(4, activation=pair).fit(X)


def test_weights_of_one_are_no_weights():
    X = load_digits().data
    plain, weighted = encoder(8, max_iter=2), encoder(8, max_iter=2)
    plain.fit(X)
    weighted.fit(X, sample_weight=np.ones(len(X)))
    np.testing.assert_array_equal(plain.components_, weighted.components_)


def test_a_row_of_a_large_weight_is_many_rows_and_no_outlier():
    X = np.random.default_rng(0).normal(size=(100, 5))
    weight = np.ones(100)
    weight[7] = 1000
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        encoder(4).fit(X, sample_weight=weight)


def test_a_stream_goes_on_through_its_activation_alone():
    stream = encoder(4).partial_fit(digits(100))
    before = stream.components_
    with pytest.raises(ValueError, match=r"of activation='relu'; call fit to start anew"):
        stream.set_params(activation="abs").partial_fit(digits(100))
    for method in (stream.transform, stream.score):
        with pytest.raises(ValueError, match="was not fitted with activation='abs' but with 're"):
            method(digits(100))
    np.testing.assert_array_equal(stream.components_, before)
    stream.set_params(activation="relu").partial_fit(digits(100))


def test_a_pair_that_is_made_already_is_checked():
    pair = PairActivation(torch.Tensor.abs_, torch.sign)
    with pytest.raises(ValueError, match="changes its argument"):
        encoder(4, activation=pair).fit(digits(100))


def test_constant_weights_change_nothing():
    # Of 1,797 rows some batches have a row more than others.
    X = digits()
    plain = encoder(max_iter=2).fit(X)
    weighted = encoder(max_iter=2).fit(X, sample_weight=np.full(len(X), 0.5))
    np.testing.assert_allclose(weighted.components_, plain.components_, rtol=1e-6, atol=1e-9)


def test_weights_are_repetition_with_dead_components_revived():
    X = digits(100)
    weight = np.random.default_rng(0).integers(0, 4, 100)
    options = {"batch_size": 1000, "max_iter": 3, "revive_dead": True, "lse_weight": 1e4}
    weighted = encoder(8, **options).fit(X, sample_weight=weight)
    repeated = encoder(8, **options).fit(np.repeat(X, weight, axis=0))
    assert len(weighted.dead_components_)
    np.testing.assert_allclose(weighted.components_, repeated.components_, atol=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("make", [np.asarray, sp.csr_array, lambda X: X.astype(np.uint8)])
def test_variances_of_distances_are_those_of_the_features(make, weighted, monkeypatch):
    monkeypatch.setattr("skdeq._encoding._CHUNK_ENTRIES", 300)
    rng = np.random.default_rng(0)
    X = rng.integers(0, 200, size=(150, 10)).astype(np.float32)
    weight = rng.integers(1, 4, size=150).astype(np.float32) if weighted else None
    encoder = ImplicitEMEncoder(4, max_iter=2, random_state=0).fit(X)
    made, cpu = make(X), torch.device("cpu")
    rows = to_rows(made if sp.issparse(made) else torch.from_numpy(made), cpu)
    found = distance_variances(
        rows,
        None if weight is None else torch.from_numpy(weight),
        torch.from_numpy(encoder.components_),
        torch.from_numpy(encoder.intercept_),
        encoder._activation(),
        cpu,
    )
    features = encoder.transform(X).astype(float)
    expected = np.cov(features.T, aweights=weight, ddof=0).diagonal()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("solver", ["sgd", "adam"])
def test_batches_count_by_the_weights_of_their_rows(solver):
    X = digits(301)
    weight = np.random.default_rng(0).integers(1, 9, size=301)
    options = {"solver": solver, "learning_rate": 0.002, "batch_size": 64, "max_iter": 2}
    fitted = encoder(**options).fit(X, sample_weight=weight)
    seed = np.random.RandomState(0).randint(np.iinfo(np.int32).max)
    generator = torch.Generator().manual_seed(int(seed))
    rows, times = torch.from_numpy(X), torch.from_numpy(weight)
    preconditioner = fit_preconditioner(rows, times)
    layer = start_weights(16, preconditioner.varying, generator).requires_grad_()
    location = torch.from_numpy(np.average(X, axis=0, weights=weight))
    inputs = (rows - location) / preconditioner.scale
    inputs = torch.cat([inputs, torch.full((301, 1), 13**0.5, dtype=torch.float64)], dim=1)
    optimiser = OPTIMISERS[solver][0]([layer], lr=0.002)
    for _ in range(2):
        losses = []
        for index in torch.randperm(301, generator=generator).tensor_split(5):
            batch = inputs[index].repeat_interleave(times[index], dim=0)
            loss = plain_loss(torch.relu(batch @ layer.T), ObjectiveWeights())
            loss = loss * times[index].double().mean() / weight.mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    np.testing.assert_allclose(fitted.loss_curve_[-1], np.mean(losses), rtol=1e-10)
    expected = torch.relu(inputs @ layer.T).detach()
    np.testing.assert_allclose(fitted.transform(X), expected, atol=1e-8)


@pytest.mark.parametrize("batch_size", [150, 40])
@pytest.mark.parametrize("n_epochs", [1, 2])
def test_components_are_revived_that_were_dead_in_the_last_epoch(batch_size, n_epochs):
    X = load_iris().data
    # Weights that hardly move: what changes is what was revived.
    options = {"revive_dead": True, "learning_rate": 1e-12, "batch_size": batch_size, "tol": 0.0}
    before = encoder(64, max_iter=n_epochs, **options).fit(X)
    after = encoder(64, max_iter=n_epochs + 1, **options).fit(X)
    revived = np.abs(after.components_ - before.components_).max(axis=1) > 1e-6
    variance = before.transform(X).var(axis=0)
    clear = np.abs(np.log(variance / 0.01)) > (0 if batch_size == 150 else 0.3)
    np.testing.assert_array_equal(revived[clear], (variance < 0.01)[clear])
    assert ((variance > 0.005) & revived).any() and not revived.all()


def test_nothing_is_revived_after_the_last_epoch():
    X = load_iris().data
    # Of one batch, which has the same loss in any order.
    options = {"batch_size": 150, "max_iter": 1}
    plain, revived = (
        encoder(64, revive_dead=revive_dead, **options).fit(X) for revive_dead in (False, True)
    )
    assert len(plain.dead_components_)
    np.testing.assert_allclose(revived.components_, plain.components_, atol=1e-9)


def test_without_tol_all_epochs_are_run():
    X = digits(100)
    options = {"max_iter": 60, "batch_size": 25, "learning_rate": 0.03}
    fitted = encoder(4, tol=0.0, **options).fit(X)
    best = np.minimum.accumulate(fitted.loss_curve_)
    assert fitted.n_iter_ == 60
    assert (best[5:] == best[:-5]).any()
    assert encoder(4, tol=1e-12, **options).fit(X).n_iter_ < 60


@pytest.mark.parametrize("options", [{"solver": "adam"}, {"momentum": 0.5}], ids=str)
def test_steps_of_any_solver_are_shorter_once_they_are_taken_back(options):
    X = load_breast_cancer().data
    options = {"activation": "abs", **options}
    start = encoder(4, max_iter=1, learning_rate=1e-12, **options).fit(X)
    with pytest.warns(ConvergenceWarning, match="led nowhere or diverged and were undone"):
        fitted = encoder(4, max_iter=20, learning_rate=3.0, **options).fit(X)
    assert fitted.score(X) > start.score(X)


def test_the_loss_before_training_is_weighted():
    X = digits(40)
    weight = np.random.default_rng(0).integers(1, 5, size=40)
    rows, many = torch.from_numpy(X), torch.from_numpy(np.repeat(X, weight, axis=0))
    of_rows = torch.from_numpy(weight.astype(float))
    preconditioner = fit_preconditioner(many, None)
    start = start_weights(16, preconditioner.varying, torch.Generator().manual_seed(0))
    weighted, repeated = (
        encoder()
        ._trainer(some, torch.device("cpu"), preconditioner, start, np.float64)
        .loss_of(its_weight, torch.arange(len(some)))
        for some, its_weight in ((rows, of_rows), (many, None))
    )
    assert weighted == pytest.approx(repeated, rel=1e-10)


def test_a_step_beyond_the_finite_numbers_after_a_finite_loss_is_left_out():
    X = digits(100).astype(np.float32)
    stream = encoder(max_iter=1, activation="identity").fit(X)
    before = stream.components_.copy()
    with pytest.warns(ConvergenceWarning, match="were left out"):
        stream.set_params(learning_rate=1e38).partial_fit(X)
    np.testing.assert_array_equal(stream.components_, before)


def test_a_row_of_a_later_chunk_that_has_most_of_the_variance_is_named(monkeypatch):
    monkeypatch.setattr("skdeq._precondition._CHUNK_ENTRIES", 5 * 50)
    X = np.random.default_rng(0).normal(size=(300, 5))
    X[123] = 10_000
    with pytest.warns(UserWarning, match="Row 123 of 300"):
        encoder(4, max_iter=1).fit(X)


def test_a_column_that_varies_by_rounding_alone_is_constant():
    X = digits(300)
    beside = np.c_[X, np.where(np.arange(300) % 2, 0.1 + 0.2, 0.3)]
    assert beside[:, -1].std() > 0
    fitted = encoder().fit(beside)
    # Where no row is off by more than 1e-16 a weight has next to no gradient.
    assert np.abs(fitted.components_[:, -1]).max() < 1e-15


@pytest.mark.parametrize("weighted", [False, True])
def test_a_warm_start_near_the_end_goes_on(weighted):
    X = digits() / 16
    weight = np.random.default_rng(0).uniform(0.2, 5, size=len(X)) if weighted else None
    fitted = encoder(max_iter=40, warm_start=True).fit(X, sample_weight=weight)
    # Any warning is an error.
    again = fitted.loss_curve_[-1]
    fitted.fit(X, sample_weight=weight)
    assert len(fitted.loss_curve_) == fitted.n_iter_ == 40
    assert fitted.loss_curve_[-1] < again
