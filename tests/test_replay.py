"""What the encoder does on a card, as far as it can be done without one."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import CUDA, sample
from torch.utils._python_dispatch import TorchDispatchMode

import skdeq._encoder_fit as encoder_fit
import skdeq._encoding as encoding
import skdeq._precondition as precondition
import skdeq._replay as replay
from skdeq import ImplicitEMEncoder
from skdeq._encoder_fit import EncoderTrainer
from skdeq._replay import StepRunner


class Recorder:
    """Stand-in for a graph: captures without running, and replays on the captured tensors."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, function, device):
        self.captured += 1

        def replay():
            self.replayed += 1
            function()

        return replay


class TestStepRunner:
    def test_without_capture_it_is_the_step(self):
        seen = []
        run = StepRunner(lambda *inputs: seen.append(inputs))
        one = torch.ones(2)
        for _ in range(10):
            run(one, None)
        assert len(seen) == 10
        assert all(inputs[0] is one and inputs[1] is None for inputs in seen)

    def test_each_call_is_one_step_on_its_own_inputs(self):
        total, recorder = torch.zeros(3), Recorder()
        run = StepRunner(lambda batch, weight: total.add_(batch.sum() * weight), recorder)
        expected = 0.0
        for number in range(20):
            # Sums of two shapes, as an epoch has them.
            batch = torch.full((3 + number % 2,), float(number))
            run(batch, torch.tensor(2.0))
            expected += 2.0 * number * len(batch)
            batch.fill_(torch.nan)
        assert total.tolist() == [expected] * 3
        # Three calls of each shape come first, and the fourth is captured and replayed.
        assert (recorder.captured, recorder.replayed) == (2, 14)

    def test_forgets(self):
        recorder = Recorder()
        run = StepRunner(lambda batch: None, recorder)
        for _ in range(5):
            run(torch.ones(2))
        run.forget()
        for _ in range(3):
            run(torch.ones(2))
        assert (recorder.captured, recorder.replayed) == (1, 2)
        run(torch.ones(2))
        assert recorder.captured == 2


OPTIONS = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "adam": {"solver": "adam"},
    "redundancy": {"weight_redundancy": 0.5},
    "revived": {"revive_dead": True, "variance_weight": 0.0},
}


@pytest.fixture(autouse=True)
def early(monkeypatch):
    """Capture steps before a fit of few rows is over."""
    monkeypatch.setattr(replay, "_WARM_UP", 3)


def fitted(X, sample_weight=None, **options):
    # Long steps would blow rounding up: products differ in the last digit by where batches lie.
    options = {"lse_weight": 2.0, "learning_rate": 1e-3, "tol": 0, "random_state": 0, **options}
    encoder = ImplicitEMEncoder(8, batch_size=32, max_iter=4, **options)
    encoder.fit(X, sample_weight=sample_weight)
    return encoder.partial_fit(X, sample_weight=sample_weight)


def assert_same(one, two, rtol=1e-9):
    np.testing.assert_array_equal(one.dead_components_, two.dead_components_)
    for name in ("components_", "intercept_", "loss_curve_"):
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), rtol, rtol)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_replayed_steps_are_the_steps(name, weighted, monkeypatch):
    X = sample("gaussian", n=333, p=12)
    weight = np.linspace(1, 2, len(X)) if weighted else None
    expected = fitted(X, sample_weight=weight, **OPTIONS[name])
    recorder, make = Recorder(), EncoderTrainer.__init__

    def capturing(self, weights, options, rows):
        make(self, weights, options, rows, recorder)

    monkeypatch.setattr(EncoderTrainer, "__init__", capturing)
    assert_same(fitted(X, sample_weight=weight, **OPTIONS[name]), expected)
    # Three batches of 31 rows and eight of 30, four times, and a stream that goes through once.
    assert recorder.captured == 2 + 1
    assert recorder.replayed == (4 * 3 - 3) + (4 * 8 - 3) + (8 - 3)


class HostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in self.names
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_step_does_not_wait_for_the_device(name, weighted, monkeypatch):
    step, reads = EncoderTrainer.step, HostReads()

    def counted(self, *inputs):
        with reads:
            step(self, *inputs)

    monkeypatch.setattr(EncoderTrainer, "step", counted)
    X = sample("gaussian", n=200, p=12)
    fitted(X, sample_weight=np.linspace(1, 2, len(X)) if weighted else None, **OPTIONS[name])
    assert reads.count == 0
    with reads:
        bool(torch.ones(2).any())
    assert reads.count == 1


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("layout", [np.asarray, sp.csr_array])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_that_stay_on_the_host(dtype, layout, weighted, monkeypatch):
    X = layout(sample("poisson", n=333, p=12).astype(dtype))
    weight = np.linspace(1, 2, 333) if weighted else None
    expected = fitted(X, sample_weight=weight, device="cpu")
    fetched, fetches = precondition.fetched, []

    def counted(part, device):
        fetches.append(tuple(part.shape))
        return fetched(part, device)

    for module in (precondition, encoding):
        monkeypatch.setattr(module, "is_away", lambda values, device: True)
        monkeypatch.setattr(module, "fetched", counted)
    monkeypatch.setattr(encoder_fit, "_GATHERED_ENTRIES", 12 * 100)
    monkeypatch.setattr(encoding, "_CHUNK_ENTRIES", 12 * 100)
    actual = fitted(X, sample_weight=weight, device="cpu")
    rtol = 1e-9 if dtype == np.float64 else 1e-4
    assert_same(actual, expected, rtol)
    np.testing.assert_allclose(actual.transform(X), expected.transform(X), rtol, 10 * rtol)
    # Never more than a group of batches or a chunk at a time.
    assert max(rows for rows, _ in fetches) <= 100


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_captured_steps_are_the_steps(device, name, weighted, monkeypatch):
    X = sample("gaussian", n=333, p=12)
    weight = np.linspace(1, 2, len(X)) if weighted else None
    captured = fitted(X, sample_weight=weight, device=device, **OPTIONS[name])
    monkeypatch.setattr(encoder_fit, "ACTIVATIONS", {})
    plain = fitted(X, sample_weight=weight, device=device, **OPTIONS[name])
    assert_same(captured, plain)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("layout", [np.asarray, sp.csr_array])
def test_rows_larger_than_the_card(device, layout, monkeypatch):
    X = layout(sample("poisson", n=333, p=12).astype(np.uint8))
    expected = fitted(X, device=device)
    monkeypatch.setattr("skdeq._data.free_memory", lambda device: 0)
    assert_same(fitted(X, device=device), expected, 1e-4)
