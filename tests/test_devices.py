"""Devices: which one is used, and that nothing of it stays in a fitted model."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CUDA, sample
from scipy import sparse

from skdeq import DEQClassifier, DEQRegressor, ExpFamilyDEQ, ImplicitEMEncoder
from skdeq._base import resolve_device
from skdeq.families import Binomial, NegativeBinomial, ReLU

X = sample("poisson", n=60, p=6)
Y = (X[:, 0] > np.median(X[:, 0])).astype(int)
DEQ = ExpFamilyDEQ(2, family="poisson", max_iter=3, tol=1.0, random_state=0)
ESTIMATORS = {
    "one layer": DEQ,
    "family with a parameter": ExpFamilyDEQ(2, family=NegativeBinomial(0.5), tol=1.0),
    "canonical map": ExpFamilyDEQ(2, canonical_map=ReLU(), max_iter=3, tol=1.0),
    "exposure": ExpFamilyDEQ(2, family="poisson", exposure="total", tol=1.0, whiten=True),
    "two layers": ExpFamilyDEQ(2, hidden_layer_sizes=(3,), max_iter=3, tol=1.0, random_state=0),
    "trials": ExpFamilyDEQ(2, family=Binomial(int(X.max())), solver="adam", max_iter=3, tol=1.0),
    "encoder": ImplicitEMEncoder(6, max_iter=2, random_state=0),
    "encoder, adam": ImplicitEMEncoder(
        6, solver="adam", learning_rate=1e-3, max_iter=2, random_state=0
    ),
    "classifier": DEQClassifier(DEQ, max_iter=3, tol=1.0, n_iter_no_change=2, random_state=0),
    "regressor": DEQRegressor(DEQ, max_iter=3, tol=1.0, n_iter_no_change=2, random_state=0),
}
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)
every_device = pytest.mark.parametrize("device", ["cpu", CUDA])


def fitted(name, device="cpu"):
    estimator = pickle.loads(pickle.dumps(ESTIMATORS[name])).set_params(device=device)
    return estimator.fit(X, Y).partial_fit(X, Y)


def tensors_in(value, place):
    """Names of all tensors, generators and optimisers that an object holds, at any depth."""
    torchs = (torch.Tensor, torch.Generator, torch.nn.Module, torch.optim.Optimizer)
    if isinstance(value, torchs):
        return [place]
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list | tuple | set):
        parts = enumerate(value)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        parts = vars(value).items()
    else:
        return []
    return [one for key, part in parts for one in tensors_in(part, f"{place}.{key}")]


@every_estimator
@every_device
def test_no_tensor_hides_in_a_fitted_model(name, device):
    estimator = fitted(name, device)
    assert tensors_in(estimator, name) == []
    use = estimator.transform if hasattr(estimator, "transform") else estimator.predict
    use(X)
    estimator.score(X, Y)
    assert tensors_in(estimator, name) == []


def test_the_search_finds_tensors():
    class Holder:
        pass

    holder = Holder()
    holder.inner = [{"deep": Holder()}]
    holder.inner[0]["deep"].tensor = torch.zeros(1)
    assert tensors_in(holder, "holder") == ["holder.inner.0.deep.tensor"]


WITHOUT_CUDA = """
import pickle, sys
import numpy as np, torch
assert not torch.cuda.is_available()
X, models = pickle.load(open(sys.argv[1], "rb"))
for name, (model, method, expected) in models.items():
    result = getattr(model, method)(X)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5, err_msg=name)
print("SERVED", len(models))
"""


@pytest.mark.parametrize("device", ["auto", CUDA])
def test_models_serve_on_a_machine_without_cuda(device, tmp_path):
    models = {}
    for name in ESTIMATORS:
        estimator = fitted(name, device)
        method = "transform" if hasattr(estimator, "transform") else "predict"
        expected = getattr(estimator, method)(X)
        models[name] = (estimator.set_params(device="auto"), method, expected)
    file = tmp_path / "models.pickle"
    file.write_bytes(pickle.dumps((X, models)))
    served = subprocess.run(
        [sys.executable, "-c", WITHOUT_CUDA, file],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert served.stdout.strip() == f"SERVED {len(ESTIMATORS)}", served.stderr


def test_a_network_forgets_where_its_backbone_was_pretrained():
    network = fitted("classifier")
    expected = network.predict_proba(X)
    # As after a fit on a card that this machine has not.
    network.backbone_.device = "cuda:7"
    network.set_params(device="auto")
    np.testing.assert_allclose(network.predict_proba(X), expected, rtol=1e-6)


@pytest.fixture
def two_cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


class TestResolution:
    def test_with_cards(self, two_cards):
        assert resolve_device("auto") == torch.device("cuda")
        assert resolve_device("cuda:1") == torch.device("cuda:1")
        assert resolve_device(torch.device("cuda", 0)) == torch.device("cuda:0")
        assert resolve_device("cpu") == torch.device("cpu")
        with pytest.raises(ValueError, match="device='cuda:7'.*this machine has 2 CUDA devices"):
            resolve_device("cuda:7")

    def test_auto_follows_a_tensor_on_a_card(self, two_cards, monkeypatch):
        class OnCard(torch.Tensor):
            device = torch.device("cuda:1")

        tensor = torch.zeros(2).as_subclass(OnCard)
        assert resolve_device("auto", tensor) == torch.device("cuda:1")
        assert resolve_device("cuda:0", tensor) == torch.device("cuda:0")
        assert resolve_device("auto", torch.zeros(2)) == torch.device("cuda")

    def test_without(self, no_card):
        assert resolve_device("auto") == torch.device("cpu")
        for device in ("cuda", "cuda:0", torch.device("cuda")):
            with pytest.raises(ValueError, match='has 0 CUDA devices.*device="auto" falls back'):
                resolve_device(device)

    @every_estimator
    def test_every_estimator_says_so(self, name, no_card):
        estimator = pickle.loads(pickle.dumps(ESTIMATORS[name])).set_params(device="cuda")
        with pytest.raises(ValueError, match="this machine has 0 CUDA devices"):
            estimator.fit(X, Y)
        estimator.set_params(device="auto").fit(X, Y).set_params(device="cuda")
        if hasattr(estimator, "transform"):
            with pytest.raises(ValueError, match="this machine has 0 CUDA devices"):
                estimator.transform(X)


@pytest.mark.parametrize("name", ["one layer", "two layers", "encoder", "classifier"])
def test_verbose_says_where(name, no_card, capsys):
    estimator = pickle.loads(pickle.dumps(ESTIMATORS[name]))
    estimator.set_params(device="auto", verbose=1).fit(X, Y)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"[{type(estimator).__name__}] on cpu"


def adam_counts_on_the_default_device():
    """Whether this torch's own Adam fails where tensors are made on another device by default."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    try:
        with torch.device("meta"):
            torch.optim.Adam([parameter]).step()
    except RuntimeError:
        return True
    return False


@pytest.mark.skipif(adam_counts_on_the_default_device(), reason="an old torch's own fault")
@every_estimator
def test_torchs_default_device_is_not_ours(name):
    # A script may have set it for its own tensors; estimators have a parameter for theirs.
    expected = fitted(name)
    method = "predict" if hasattr(expected, "predict") else "transform"
    with torch.device("meta"):
        found = fitted(name)
        outcome = getattr(found, method)(X)
        getattr(found, method)(sparse.csr_array(X))
    # Under another default torch's Adam adds in another order.
    np.testing.assert_allclose(outcome, getattr(expected, method)(X), rtol=1e-9)
