"""Models that are saved and loaded: pickle, joblib and skops."""

import gc
import io
import pickle
import warnings
import weakref

import joblib
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import sample
from sklearn.base import clone

import skdeq
from skdeq import DEQClassifier, DEQRegressor, ExpFamilyDEQ, ImplicitEMEncoder
from skdeq._encoder_fit import EncoderTrainer
from skdeq._observations import CompressedRows
from skdeq._scoring import Scoring
from skdeq.families import Binomial, ReLU

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

DEQ = "skdeq._expfam_deq.ExpFamilyDEQ"
# A model, and the types that skops must be told to trust: of ours, the classes whose instances
# the user has made, and the backbone.
MODELS = {
    "poisson": (
        ExpFamilyDEQ(2, family="poisson", exposure="total", random_state=0, max_iter=9),
        {DEQ},
    ),
    "objects": (
        ExpFamilyDEQ(2, family=Binomial(50), random_state=np.random.RandomState(0), max_iter=9),
        {DEQ, "skdeq._families_bounded.Binomial"},
    ),
    "canonical map": (
        ExpFamilyDEQ(2, canonical_map=ReLU(), random_state=0, max_iter=9),
        {DEQ, "skdeq._canonical.ReLU"},
    ),
    "layers": (
        ExpFamilyDEQ(2, hidden_layer_sizes=(4,), random_state=0, max_iter=3),
        {DEQ},
    ),
    "encoder": (
        ImplicitEMEncoder(6, solver="adam", learning_rate=0.001, random_state=0, max_iter=2),
        {"skdeq._implicit_em.ImplicitEMEncoder"},
    ),
    "classifier": (
        DEQClassifier(ExpFamilyDEQ(2, max_iter=9), random_state=0, max_iter=2),
        {DEQ, "skdeq._fine_tune.DEQClassifier"},
    ),
    "regressor": (
        DEQRegressor(early_stopping=True, random_state=0, max_iter=2),
        {DEQ, "skdeq._fine_tune.DEQRegressor"},
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


def dump_joblib(model):
    file = io.BytesIO()
    joblib.dump(model, file, compress=3)
    return file.getvalue()


def dump_skops(model):
    return pytest.importorskip("skops.io").dumps(model)


def load_skops(saved):
    skops = pytest.importorskip("skops.io")
    return skops.loads(saved, trusted=skops.get_untrusted_types(data=saved))


FORMATS = {
    "pickle": (pickle.dumps, pickle.loads),
    "joblib": (dump_joblib, lambda saved: joblib.load(io.BytesIO(saved))),
    "skops": (dump_skops, load_skops),
}
every_format = pytest.mark.parametrize("dump, load", FORMATS.values(), ids=FORMATS)


def data():
    return sample("poisson", n=60), np.arange(60) % 2


def results(model, X):
    names = ("transform", "predict", "predict_proba", "score_samples", "responsibilities")
    return {name: getattr(model, name)(X) for name in names if hasattr(model, name)}


@every_format
@every_model
def test_a_saved_model_is_the_model(name, dump, load):
    X, y = data()
    model = clone(MODELS[name][0]).fit(X, y)
    for stream in (False, True):
        if stream:
            # What a stream needs to go on is saved, too.
            model.partial_fit(X, y)
        loaded = load(dump(model))
        assert vars(loaded).keys() == vars(model).keys()
        expected = results(model, X)
        for method, value in results(loaded, X).items():
            np.testing.assert_array_equal(value, expected[method])
    loaded.partial_fit(X, y)
    model.partial_fit(X, y)
    expected = results(model, X)
    for method, value in results(loaded, X).items():
        np.testing.assert_array_equal(value, expected[method])
    assert not any(isinstance(value, torch.Tensor) for value in vars(loaded).values())


@every_model
def test_few_types_are_for_skops_to_trust(name):
    skops = pytest.importorskip("skops.io")
    X, y = data()
    model, types = MODELS[name]
    model = clone(model).fit(X, y).partial_fit(X, y)
    assert set(skops.get_untrusted_types(data=skops.dumps(model))) == types
    with pytest.raises(TypeError, match="skdeq"):
        skops.loads(skops.dumps(model))


@every_format
@every_model
def test_a_model_of_another_version_says_so(name, dump, load, monkeypatch):
    X, y = data()
    model = clone(MODELS[name][0]).fit(X, y)
    monkeypatch.setattr("skdeq._base.__version__", "0.0.1")
    saved = dump(model)
    monkeypatch.undo()
    message = rf"{type(model).__name__} was saved by skdeq 0\.0\.1 .* {skdeq.__version__}"
    with pytest.warns(UserWarning, match=message):
        loaded = load(saved)
    for method, value in results(loaded, X).items():
        np.testing.assert_array_equal(value, results(model, X)[method])
    # Its own version is no news.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(dump(loaded))


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_array])
@pytest.mark.parametrize(
    "estimator",
    [
        ExpFamilyDEQ(2, family="poisson", max_iter=3, tol=1.0),
        ExpFamilyDEQ(2, family="poisson", solver="adam", max_iter=2, tol=1.0),
        ImplicitEMEncoder(4, max_iter=2),
    ],
)
def test_nothing_of_a_fit_waits_for_the_collector(estimator, layout, monkeypatch):
    # On a card the data of one fit of a search after the other would pile up.
    held = []
    for owner in (EncoderTrainer, Scoring, CompressedRows):
        original = owner.__init__

        def init(self, *args, _original=original, **options):
            _original(self, *args, **options)
            held.append(weakref.ref(self))

        monkeypatch.setattr(owner, "__init__", init)
    X = layout(sample("poisson", n=60, p=6).astype(float))
    gc.collect()
    gc.disable()
    try:
        clone(estimator).fit(X)
        assert held
        assert not [one() for one in held if one() is not None]
    finally:
        gc.enable()
