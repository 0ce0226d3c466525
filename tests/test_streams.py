"""Streams: what partial_fit promises of every estimator."""

import copy
import pickle

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import sample
from sklearn.utils import gen_batches
from test_objectives import plain_loss

from skdeq import DEQClassifier, DEQRegressor, ExpFamilyDEQ, ImplicitEMEncoder
from skdeq._rotation import Moments
from skdeq.families import get_family
from skdeq.objectives import ObjectiveWeights

N_BATCHES, ROWS = 6, 40


def batches(dtype=np.float64):
    X = sample("poisson", n=N_BATCHES * ROWS, p=8).astype(dtype)
    y = (X[:, 0] > np.median(X[:, 0])).astype(int)
    return list(zip(X.reshape(N_BATCHES, ROWS, 8), y.reshape(N_BATCHES, ROWS), strict=True))


def backbone(**options):
    return ExpFamilyDEQ(2, family="poisson", random_state=0, **options)


def encoder(**options):
    return ImplicitEMEncoder(6, batch_size=16, random_state=0, **options)


ESTIMATORS = {
    "ExpFamilyDEQ": backbone,
    "ExpFamilyDEQ with exposure": lambda: backbone(exposure="total"),
    "encoder, sgd": encoder,
    "encoder, momentum": lambda: encoder(momentum=0.9),
    "encoder, adam": lambda: encoder(solver="adam", learning_rate=1e-3),
    "classifier": lambda: DEQClassifier(backbone(), batch_size=16, random_state=0),
    "regressor": lambda: DEQRegressor(backbone(), batch_size=16, random_state=0),
    "classifier, frozen": lambda: DEQClassifier(backbone(), fine_tune=False, random_state=0),
}
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)
own_estimators = pytest.mark.parametrize("name", ["ExpFamilyDEQ", "encoder, adam", "classifier"])


def state(value):
    """All that an object is made of, in a form that compares bit for bit."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: state(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [state(one) for one in value]
    if hasattr(value, "__dict__"):
        return type(value).__name__, state(vars(value))
    return value


def learn(estimator, batch):
    """Learn a batch; a classifier is told all the classes of the stream."""
    options = {"classes": [0, 1]} if isinstance(estimator, DEQClassifier) else {}
    return estimator.partial_fit(*batch, **options)


@every_estimator
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_killed_and_resumed_after_every_batch_bit_for_bit(name, dtype):
    through, resumed = ESTIMATORS[name](), ESTIMATORS[name]()
    for batch in batches(dtype):
        learn(through, batch)
        # As another process would find it.
        resumed = pickle.loads(pickle.dumps(learn(resumed, batch)))
        assert state(resumed) == state(through)


@every_estimator
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda X: X[:, :5], "X has 5 features, but .* is expecting 8 features as input"),
        (lambda X: X.astype(np.float32), "computed with in float32, .* before is float64"),
        (lambda X: np.where(X == X.max(), np.inf, X), "contains infinity: row"),
        (lambda X: X[:0], r"0 sample\(s\)"),
        (lambda X: X.astype(complex) + 1j, "Complex data not supported"),
    ],
    ids=["width", "type", "infinity", "empty", "complex"],
)
def test_a_bad_batch_is_named_and_changes_nothing(name, spoil, message):
    stream = batches()
    estimator = ESTIMATORS[name]()
    for batch in stream[:3]:
        learn(estimator, batch)
    before = state(estimator)
    X, y = stream[3]
    with pytest.raises(ValueError, match=f"{message}(.|\n)* batch 4 of this stream"):
        learn(estimator, (spoil(X), y[: len(spoil(X))]))
    assert state(estimator) == before
    # The stream goes on as if the batch had never been there.
    expected = ESTIMATORS[name]()
    for batch in [*stream[:3], *stream[4:]]:
        learn(expected, batch)
    for batch in stream[4:]:
        learn(estimator, batch)
    assert state(estimator) == state(expected)


@pytest.mark.parametrize("name", ["ExpFamilyDEQ", "classifier", "regressor"])
def test_values_outside_the_support_are_named_with_the_batch(name):
    stream = batches()
    estimator = ESTIMATORS[name]()
    for batch in stream[:2]:
        learn(estimator, batch)
    before = state(estimator)
    bad = stream[2][0].copy()
    bad[7, 3] = -1
    with pytest.raises(ValueError, match="row 7, column 3 of X is -1.*batch 3 of this stream"):
        learn(estimator, (bad, stream[2][1]))
    assert state(estimator) == before


@every_estimator
def test_a_first_batch_that_is_bad_leaves_nothing_behind(name):
    X, y = batches()[0]
    estimator = ESTIMATORS[name]()
    before = set(vars(estimator))
    with pytest.raises(ValueError, match="infinity.*batch 1 of this stream"):
        learn(estimator, (np.where(X == X.max(), np.inf, X), y))
    assert set(vars(estimator)) == before


@pytest.mark.parametrize("name", ["ExpFamilyDEQ", "classifier", "regressor"])
def test_a_first_batch_of_too_few_rows(name):
    X, y = batches()[0]
    estimator = ESTIMATORS[name]()
    inner = estimator if name == "ExpFamilyDEQ" else estimator.backbone
    inner.set_params(n_components=5)
    before = set(vars(estimator))
    message = r"n_components=5 is more than min\(n_samples, n_features\)=4.*batch 1 of this stream"
    first = np.r_[y.argmin(), y.argmax(), 5:7]
    with pytest.raises(ValueError, match=message):
        learn(estimator, (X[first], y[first]))
    assert set(vars(estimator)) == before
    # Later batches may be of any size.
    learn(estimator, (X, y))
    learn(estimator, (X[:1], y[:1]))


@own_estimators
def test_fit_begins_the_count_anew(name):
    stream = batches()
    estimator = ESTIMATORS[name]()
    for batch in stream[:2]:
        learn(estimator, batch)
    estimator.fit(*stream[2])
    with pytest.raises(ValueError, match="batch 1 of this stream"):
        learn(estimator, (stream[3][0][:, :5], stream[3][1]))


@every_estimator
def test_failure_after_the_step_leaves_the_optimiser_as_it_was(name, monkeypatch):
    stream = batches()
    estimator = ESTIMATORS[name]()
    for batch in stream[:3]:
        learn(estimator, batch)
    before = state(estimator)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(estimator, "_store", interrupt)
    with pytest.raises(KeyboardInterrupt):
        learn(estimator, stream[3])
    monkeypatch.undo()
    assert state(estimator) == before


@every_estimator
def test_a_stream_in_a_shallow_copy_leaves_the_original_alone(name):
    stream = batches()
    estimator = ESTIMATORS[name]()
    for batch in stream[:3]:
        learn(estimator, batch)
    before = state(estimator)
    learn(copy.copy(estimator), stream[3])
    assert state(estimator) == before


@every_estimator
@pytest.mark.parametrize("source", ["memmap", "generator", "tensors", "sparse"])
def test_batches_of_any_source(name, source, tmp_path):
    stream = batches()
    expected = ESTIMATORS[name]()
    for batch in stream:
        learn(expected, batch)
    if source == "memmap":
        file = tmp_path / "X.npy"
        np.save(file, np.concatenate([X for X, _ in stream]))
        X = np.load(file, mmap_mode="r")
        assert isinstance(X, np.memmap)
        given = [(X[i * ROWS : (i + 1) * ROWS], y) for i, (_, y) in enumerate(stream)]
    elif source == "generator":
        given = (batch for batch in stream)
    elif source == "tensors":
        given = [(torch.from_numpy(X), torch.from_numpy(y)) for X, y in stream]
    else:
        given = [(sp.csr_array(X), y) for X, y in stream]
    estimator = ESTIMATORS[name]()
    for batch in given:
        learn(estimator, batch)
    for attribute, value in vars(expected).items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            actual = getattr(estimator, attribute)
            if source == "sparse":
                # Sums in another order.
                np.testing.assert_allclose(actual, value, rtol=1e-5, atol=1e-7)
            else:
                assert actual.tobytes() == value.tobytes(), attribute


@pytest.mark.parametrize(
    "change",
    [{"family": "gaussian"}, {"alpha": 2.0}, {"exposure": "total"}, {"n_components": 3}],
    ids=lambda change: next(iter(change)),
)
def test_a_stream_does_not_go_on_with_another_model(change):
    X = sample("poisson")
    stream = backbone().partial_fit(X).partial_fit(X)
    before = stream.loadings_.copy()
    stream.set_params(**change)
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"{name}=.* partial_fit goes on .* call fit to start"):
        stream.partial_fit(X)
    np.testing.assert_array_equal(stream.loadings_, before)
    assert not stream.converged_


def test_a_batch_of_empty_rows_explains_what_it_can():
    for seed in range(12):
        X = np.random.default_rng(seed).poisson(0.2, size=(60, 5)).astype(float)
        deq = ExpFamilyDEQ(1, family="poisson").fit(X[:20])
        deq.partial_fit(X[20:40]).partial_fit(np.zeros((4, 5)))
        assert np.isfinite(deq.explained_deviance_ratio_).all()


def test_a_leftover_row_leaves_an_encoder_as_it_was():
    X = np.random.default_rng(0).normal(size=(101, 5))
    encoder = ImplicitEMEncoder(3, random_state=0)
    for batch in list(gen_batches(101, 10))[:-1]:
        encoder.partial_fit(X[batch])
    before = encoder.components_.copy()
    with pytest.warns(UserWarning, match="One row has no variance"):
        encoder.partial_fit(X[100:])
    np.testing.assert_array_equal(encoder.components_, before)
    with pytest.raises(ValueError, match="row 0, column 2"):
        encoder.partial_fit(np.array([[0, 1, np.nan, 0, 0]]))
    with pytest.raises(ValueError, match="minimum of 2"):
        ImplicitEMEncoder(3).partial_fit(X[100:])
    with pytest.warns(UserWarning, match="One row has no variance"):
        encoder.partial_fit(X[:2], sample_weight=[1.0, 0.0])
    np.testing.assert_array_equal(encoder.components_, before)
    for bad in ({"sample_weight": [-1.0]}, {"sample_weight": [1.0, 3.0]}):
        with pytest.raises(ValueError, match="sample_weight|Negative|shape"):
            encoder.partial_fit(X[100:], **bad)
    with pytest.raises(ValueError, match="float32"):
        encoder.partial_fit(X[100:].astype(np.float32))


def test_an_encoder_does_not_begin_with_rows_that_are_the_same():
    X = np.random.default_rng(0).normal(size=(50, 5))
    encoder = ImplicitEMEncoder(3, random_state=0)
    with pytest.raises(ValueError, match="All 10 rows of the first batch are the same"):
        encoder.partial_fit(np.full((10, 5), 7.0))
    assert not hasattr(encoder, "components_")
    encoder.partial_fit(X)
    np.testing.assert_array_equal(
        encoder.components_, ImplicitEMEncoder(3, random_state=0).partial_fit(X).components_
    )


def test_a_stream_is_adam_on_the_objective_at_the_latents_of_each_batch():
    X = sample("poisson", n=120)
    options = {"alpha": 1.3, "weight_decay": 0.1, "learning_rate": 0.02, "fixed_point_tol": 1e-12}
    deq = backbone(**options).partial_fit(X[:40])
    loadings, intercept = (
        torch.from_numpy(one).clone().requires_grad_() for one in (deq.loadings_, deq.intercept_)
    )
    adam = torch.optim.Adam([loadings, intercept])
    for step in range(30):
        batch = X[40:80] if step % 2 else X[80:]
        z, x = torch.from_numpy(deq.map_latents(batch).value), torch.from_numpy(batch)
        likelihood = get_family("poisson").log_prob(x, z @ loadings.T + intercept).sum(1)
        loss = -likelihood.mean() + 0.05 * loadings.square().sum()
        adam.param_groups[0]["lr"] = 0.02 / (1 + step / 100) ** 0.5
        adam.zero_grad()
        loss.backward()
        adam.step()
        deq.partial_fit(batch)
        np.testing.assert_allclose(deq.loadings_, loadings.detach(), atol=1e-6)
        np.testing.assert_allclose(deq.intercept_, intercept.detach(), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "options"),
    [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {})],
    ids=["momentum", "adam"],
)
def test_a_stream_of_an_encoder_keeps_the_moments_of_its_optimiser(make, options):
    X = np.random.default_rng(0).normal(size=(60, 5))
    solver = "adam" if make is torch.optim.Adam else "sgd"
    settings = {"lse_weight": 2.0, "learning_rate": 1e-3, "random_state": 0, "solver": solver}
    encoder = ImplicitEMEncoder(4, **settings, **options).partial_fit(X)
    layer = torch.from_numpy(encoder._weights).clone().requires_grad_()
    optimiser = make([layer], lr=1e-3, **options)
    state = {name: torch.tensor(value) for name, value in encoder._solver_state[0].items()}
    assert max(float(one.abs().max()) for one in state.values() if one.shape == layer.shape) > 0
    optimiser.state[layer] = state
    rows = torch.from_numpy((X - encoder._location) / encoder._scale)
    rows = torch.cat([rows, torch.full((60, 1), 13**0.5, dtype=rows.dtype)], dim=1)
    plain_loss(torch.relu(rows @ layer.T), ObjectiveWeights(lse=2.0)).backward()
    optimiser.step()
    # The batch is one minibatch, and the call one step.
    np.testing.assert_allclose(encoder.partial_fit(X)._weights, layer.detach(), atol=1e-10)


def test_a_stream_of_an_encoder_keeps_its_location():
    X = np.random.default_rng(0).normal(size=(60, 5)) + 50
    encoder = ImplicitEMEncoder(4, learning_rate=1e-12, random_state=0).partial_fit(X)
    before = encoder.transform(X)
    np.testing.assert_allclose(encoder.partial_fit(X).transform(X), before, atol=1e-6)
    # Of one minibatch the loss is that of the parameters before its step.
    assert encoder.loss_curve_[1] == pytest.approx(-encoder.score(X), rel=1e-6)


@pytest.mark.parametrize("name", ["classifier", "regressor"])
def test_a_stream_of_a_head_keeps_the_moments_of_its_optimiser(name):
    X, y = batches()[0]
    network = ESTIMATORS[name]().set_params(batch_size=ROWS)
    for calls in range(1, 5):
        learn(network, (X, y))
        assert {float(one["step"]) for one in network._solver_state} == {calls}


def test_pooled_covariance_is_that_of_all_rows():
    rng = np.random.default_rng(0)
    # Far apart, so that the gap of their means counts.
    groups = [torch.from_numpy(rng.normal(size=(n, 3)) + n) for n in (7, 20)]
    weights = [torch.from_numpy(rng.uniform(0.1, 3, size=len(z))) for z in groups]
    one, other = map(Moments.of, groups, weights)
    mean, covariance, total = one.pooled(other)
    rows, weight = np.concatenate(groups), np.concatenate(weights)
    np.testing.assert_allclose(mean, np.average(rows, axis=0, weights=weight))
    np.testing.assert_allclose(covariance, np.cov(rows.T, aweights=weight, ddof=0))
    assert total == pytest.approx(weight.sum())


def test_a_refused_batch_keeps_the_kind_of_its_error():
    class Refused(ValueError):
        def __init__(self, row, column):
            super().__init__(row, column)
            self.row, self.column = row, column

    class Choosy(type(get_family("poisson"))):
        def sufficient(self, x):
            if bool((x > 1000).any()):
                raise Refused(3, 1)
            return x

    X = sample("poisson")
    stream = ExpFamilyDEQ(2, family=Choosy(), random_state=0).partial_fit(X)
    with pytest.raises(Refused) as caught:
        stream.partial_fit(X + 1001)
    assert (caught.value.row, caught.value.column) == (3, 1)
    assert "batch 2 of this stream" in caught.value.__notes__[0]
