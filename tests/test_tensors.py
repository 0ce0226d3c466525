"""Tensors in, and under scikit-learn's array API dispatch tensors out."""

import os
import subprocess
import sys

import numpy as np
import pytest
import sklearn
import torch
from conftest import CUDA, sample
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import check_array_api_input

from skdeq import DEQClassifier, DEQRegressor, ExpFamilyDEQ, ImplicitEMEncoder
from skdeq._data import to_observations, to_rows
from skdeq._validation import check_codes, check_observations, check_rows, check_weights
from skdeq.families import get_family

DISPATCHES = os.environ.get("SCIPY_ARRAY_API") == "1"


def counts(dtype=np.float64):
    return sample("poisson", n=120, p=8).astype(dtype)


def labels(X):
    return (X[:, 0] > np.median(X[:, 0])).astype(np.int64)


def backbone():
    return ExpFamilyDEQ(2, family="poisson", random_state=0)


ESTIMATORS = {
    "ExpFamilyDEQ": lambda: ExpFamilyDEQ(2, family="poisson", exposure="total", random_state=0),
    "adam": lambda: ExpFamilyDEQ(2, solver="adam", max_iter=3, tol=1.0, random_state=0),
    "ImplicitEMEncoder": lambda: ImplicitEMEncoder(6, max_iter=3, random_state=0),
    "DEQClassifier": lambda: DEQClassifier(backbone(), tol=1.0, random_state=0),
    "DEQRegressor": lambda: DEQRegressor(backbone(), tol=1.0, random_state=0),
}
METHODS = ("transform", "predict", "predict_proba", "score_samples", "responsibilities")
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)


def fitted_arrays(estimator):
    return {
        name: value
        for name, value in vars(estimator).items()
        if isinstance(value, np.ndarray) and value.dtype.kind == "f"
    }


@every_estimator
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8])
def test_tensors_give_what_arrays_give_bit_for_bit(name, dtype):
    X = counts(dtype)
    y, weight = labels(X), np.linspace(0.5, 1.5, len(X))
    given, tensors = (X, y, weight), [torch.from_numpy(one) for one in (X, y, weight)]
    one = ESTIMATORS[name]().fit(*given[:2], sample_weight=given[2])
    two = ESTIMATORS[name]().fit(*tensors[:2], sample_weight=tensors[2])
    if name != "adam":
        # Numpy without dispatch, as scikit-learn's own estimators.
        one.partial_fit(*given[:2])
        two.partial_fit(*tensors[:2])
    expected = fitted_arrays(one)
    assert expected.keys() == fitted_arrays(two).keys()
    for key, value in fitted_arrays(two).items():
        assert value.tobytes() == expected[key].tobytes(), key
    for method in METHODS:
        if hasattr(one, method):
            result = getattr(two, method)(tensors[0])
            assert isinstance(result, np.ndarray)
            np.testing.assert_array_equal(result, getattr(one, method)(X), strict=True)
    assert two.score(*tensors[:2]) == one.score(*given[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_observations_share_memory_with_the_tensor(dtype):
    X = torch.from_numpy(counts()).to(dtype)
    family = get_family("poisson")
    rows = check_observations(ExpFamilyDEQ(), X, family, reset=True)
    assert rows.data_ptr() == X.data_ptr()
    observations = to_observations(rows, family, torch.device("cpu"))
    assert observations.values.data_ptr() == X.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int16, torch.bool])
def test_rows_of_the_encoder_share_memory_with_the_tensor(dtype):
    X = torch.from_numpy(counts()).to(dtype)
    rows = to_rows(check_rows(ImplicitEMEncoder(), X, reset=True), torch.device("cpu"))
    assert rows.data_ptr() == X.data_ptr()


@pytest.mark.parametrize("order", ["contiguous", "transposed", "every other"])
def test_any_layout_in_memory(order):
    X = torch.from_numpy(counts())
    if order == "transposed":
        X = X.T.contiguous().T
    elif order == "every other":
        X = torch.repeat_interleave(X, 2, dim=1)[:, ::2]
    before = X.clone()
    expected = backbone().fit_transform(X.contiguous().numpy())
    np.testing.assert_array_equal(backbone().fit_transform(X), expected)
    assert torch.equal(X, before)


class TestChecks:
    def test_places_are_named(self):
        X = torch.from_numpy(counts())
        X[3, 5] = -2
        with pytest.raises(ValueError, match="row 3, column 5 of X is -2, but family 'poisson'"):
            backbone().fit(X)
        X[3, 5] = torch.inf
        with pytest.raises(ValueError, match="contains infinity: row 3, column 5"):
            backbone().fit(X)
        X[3, 5] = torch.nan
        with pytest.raises(ValueError, match="contains NaN: row 3, column 5"):
            ImplicitEMEncoder().fit(X)
        X[:, 2] = torch.nan
        with pytest.raises(ValueError, match="Column 2 of X has no observed entry"):
            backbone().fit(X)

    def test_missing_entries_are_allowed_where_they_are(self):
        X = counts()
        X[::7, 3] = np.nan
        expected = backbone().fit_transform(X)
        np.testing.assert_array_equal(backbone().fit_transform(torch.from_numpy(X)), expected)

    @every_estimator
    def test_tensors_that_require_grad_are_refused(self, name):
        X = torch.from_numpy(counts()).requires_grad_()
        y = labels(counts())
        with pytest.raises(ValueError, match=r"X is a tensor that requires grad.*X\.detach\(\)"):
            ESTIMATORS[name]().fit(X, y)
        estimator = ESTIMATORS[name]().fit(X.detach(), y)
        use = estimator.transform if hasattr(estimator, "transform") else estimator.predict
        with pytest.raises(ValueError, match="requires grad"):
            use(X)
        # Who says so wants no gradient.
        with torch.no_grad():
            np.testing.assert_array_equal(use(X), use(X.detach()))

    def test_targets_that_require_grad_are_refused(self):
        X = torch.from_numpy(counts())
        with pytest.raises(ValueError, match="y is a tensor that requires grad"):
            ESTIMATORS["DEQRegressor"]().fit(X, X[:, 0].clone().requires_grad_())

    def test_sparse_and_complex_tensors_are_refused(self):
        X = torch.from_numpy(counts())
        with pytest.raises(TypeError, match="sparse data as SciPy's CSR arrays"):
            backbone().fit(X.to_sparse())
        with pytest.raises(ValueError, match="Complex data not supported"):
            backbone().fit(X.to(torch.complex64))

    def test_half_precision_is_worked_on_in_float64(self):
        X = torch.from_numpy(counts())
        for dtype in (torch.bfloat16, torch.float16):
            result = backbone().fit_transform(X.to(dtype))
            np.testing.assert_array_equal(result, backbone().fit_transform(X), strict=True)

    def test_shapes(self):
        X = torch.from_numpy(counts())
        deq = backbone().fit(X)
        with pytest.raises(ValueError, match="X has 3 features, but ExpFamilyDEQ is expecting 8"):
            deq.transform(X[:, :3])
        with pytest.raises(ValueError, match="Expected 2D array, got 1D array instead"):
            deq.transform(X[0])
        with pytest.raises(ValueError, match=r"0 sample\(s\)"):
            deq.transform(X[:0])
        with pytest.raises(ValueError, match="Z has 3 columns, but this model has 2"):
            deq.inverse_transform(X[:, :3])
        with pytest.raises(ValueError, match="Input Z contains NaN"):
            deq.inverse_transform(X[:, :2] * torch.nan)


class TestOnAnotherDevice:
    """With a device without data, on which every look at them and every way to the host fails."""

    @pytest.fixture(autouse=True)
    def device(self, monkeypatch):
        monkeypatch.setattr(
            "skdeq._validation.resolve_device", lambda device, X: torch.device("meta")
        )
        # What is known only from the data.
        monkeypatch.setattr("skdeq._support._first_outside", lambda *known: None)
        monkeypatch.setattr("skdeq._support._check_size", lambda *known: None)

    def test_rules_of_scikit_learn_are_checked_without_the_data(self):
        X = torch.from_numpy(counts()).to("meta")
        deq, family = backbone().fit(counts()), get_family("poisson")
        rows = check_observations(deq, X, family, reset=False)
        assert rows.device.type == "meta"
        with pytest.raises(ValueError, match="X has 3 features, but ExpFamilyDEQ is expecting 8"):
            check_observations(deq, X[:, :3], family, reset=False)
        with pytest.raises(ValueError, match="Expected 2D array, got 1D array"):
            check_observations(deq, X[0], family, reset=False)
        with pytest.raises(ValueError, match="minimum of 2 is required"):
            check_rows(ImplicitEMEncoder(), X[:1].to(torch.uint8), reset=True, min_rows=2)
        with pytest.raises(ValueError, match="Complex data not supported"):
            check_observations(deq, X.to(torch.complex64), family, reset=False)
        with pytest.raises(ValueError, match="requires grad"):
            check_observations(deq, X.requires_grad_(), family, reset=False)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16, torch.bool])
    def test_types_are_converted_there(self, dtype):
        X = torch.from_numpy(counts()).to("meta", dtype)
        rows = check_observations(backbone(), X, get_family("poisson"), reset=False)
        assert (rows.device.type, rows.dtype) == ("meta", torch.float64)

    def test_weights_need_nothing_but_the_shape(self):
        X = torch.from_numpy(counts(np.float32)).to("meta")
        assert check_weights(np.ones(len(X)), X).dtype == np.float32
        assert check_weights(np.ones(len(X)), X.to(torch.uint8)).dtype == np.float32


def test_codes_of_other_types():
    codes = check_codes(torch.zeros(3, 2, dtype=torch.int32), 2, "Z")
    assert codes.dtype == torch.float64


@pytest.mark.parametrize("name", ["ExpFamilyDEQ", "ImplicitEMEncoder"])
def test_data_frames_come_of_tensors(name):
    X = counts()
    transformer = ESTIMATORS[name]().set_output(transform="pandas").fit(torch.from_numpy(X))
    expected = ESTIMATORS[name]().fit_transform(X)
    for frame in (
        transformer.transform(torch.from_numpy(X)),
        transformer.fit_transform(torch.from_numpy(X)),
    ):
        assert frame.columns.tolist() == transformer.get_feature_names_out().tolist()
        np.testing.assert_allclose(frame.to_numpy(), expected, rtol=1e-7)


def test_search_over_tensors():
    X = counts()
    search = GridSearchCV(backbone(), {"alpha": [0.5, 2.0]}, cv=3)
    one = search.fit(X).cv_results_["mean_test_score"]
    two = search.fit(torch.from_numpy(X)).cv_results_["mean_test_score"]
    np.testing.assert_array_equal(one, two)


@every_estimator
def test_array_api_support_is_not_claimed(name):
    # The tag promises fitted attributes in the namespace of X; ours are numpy, on purpose.
    assert not get_tags(ESTIMATORS[name]()).array_api_support


@pytest.mark.skipif(DISPATCHES, reason="dispatch is tested here")
def test_dispatch_in_a_process_of_its_own():
    pytest.importorskip("scipy", minversion="1.14", reason="scikit-learn asks for it")
    # SciPy reads the variable once, when it is imported.
    tests = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            __file__,
            "-k",
            "Dispatch",
        ],
        env={**os.environ, "SCIPY_ARRAY_API": "1"},
        capture_output=True,
        text=True,
    )
    assert tests.returncode == 0, tests.stdout + tests.stderr
    assert "passed" in tests.stdout


@pytest.mark.skipif(not DISPATCHES, reason="needs SCIPY_ARRAY_API=1")
@pytest.mark.parametrize("device", ["cpu", CUDA])
class TestDispatch:
    @pytest.fixture(autouse=True)
    def dispatch(self):
        with sklearn.config_context(array_api_dispatch=True):
            yield

    @every_estimator
    def test_results_lie_where_the_rows_lie(self, name, device):
        X = counts(np.float32)
        y = labels(X)
        tensor = torch.from_numpy(X).to(device)
        expected = ESTIMATORS[name]().fit(X, y)
        estimator = ESTIMATORS[name]().fit(tensor, torch.from_numpy(y).to(device))
        for attribute, value in fitted_arrays(estimator).items():
            np.testing.assert_allclose(
                value, getattr(expected, attribute), rtol=1e-3, atol=1e-3, err_msg=attribute
            )
        seen = 0
        for method in METHODS:
            if hasattr(estimator, method):
                result = getattr(estimator, method)(tensor)
                wanted = getattr(expected, method)(X)
                assert isinstance(wanted, np.ndarray)
                assert result.device == tensor.device
                np.testing.assert_allclose(result.cpu(), wanted, rtol=1e-2, atol=1e-2)
                seen += 1
        assert seen
        if hasattr(estimator, "fit_transform"):
            assert estimator.fit_transform(tensor).device == tensor.device
            codes = estimator.transform(tensor)
            means = estimator.inverse_transform(codes)
            assert means.device == tensor.device and means.dtype == codes.dtype
            assert isinstance(estimator.inverse_transform(codes.cpu().numpy()), np.ndarray)
        assert isinstance(estimator.score(tensor, y), float)
        assert isinstance(estimator.score(tensor, torch.from_numpy(y).to(device)), float)

    def test_certificates(self, device):
        X = torch.from_numpy(counts()).to(device)
        result = backbone().fit(X).map_latents(X)
        for part in (result.value, result.residual, result.converged, result.n_iter):
            assert part.device == X.device
        assert bool(result.converged.all())

    def test_in_a_pipeline_with_scikit_learns_own(self, device):
        X = sample("gaussian", n=200, p=10)
        y = X[:, :3].sum(1)
        pipeline = make_pipeline(StandardScaler(), ExpFamilyDEQ(4, random_state=0), Ridge())
        expected = pipeline.fit(X, y).predict(X)
        tensor, target = torch.from_numpy(X).to(device), torch.from_numpy(y).to(device)
        predicted = pipeline.fit(tensor, target).predict(tensor)
        assert predicted.device == tensor.device
        np.testing.assert_allclose(predicted.cpu(), expected, atol=1e-6)
        assert isinstance(pipeline[-1].coef_, torch.Tensor)

    def test_labels_that_are_text(self, device):
        X = counts()
        y = np.array(["few", "many"])[labels(X)]
        tensor = torch.from_numpy(X).to(device)
        classifier = ESTIMATORS["DEQClassifier"]().fit(tensor, y)
        assert isinstance(classifier.predict(tensor), np.ndarray)
        assert classifier.predict_proba(tensor).device == tensor.device
        assert classifier.score(tensor, y) > 0.5

    def test_a_data_frame_that_was_asked_for(self, device):
        X = torch.from_numpy(counts()).to(device)
        frame = backbone().set_output(transform="pandas").fit_transform(X)
        assert frame.shape == (120, 2)

    @every_estimator
    def test_arrays_as_without_dispatch(self, name, device):
        check_array_api_input(
            name, ESTIMATORS[name](), array_namespace="numpy", expect_only_array_outputs=False
        )


@pytest.mark.parametrize("device", [CUDA])
@every_estimator
def test_devices_of_tensor_and_estimator_may_differ(name, device):
    X = counts(np.float32)
    y = labels(X)
    expected = ESTIMATORS[name]().set_params(device="cpu").fit(X, y)
    for where, kept in (("cpu", device), (device, "cpu"), (device, device), (device, "auto")):
        tensor = torch.from_numpy(X).to(where)
        estimator = ESTIMATORS[name]().set_params(device=kept).fit(tensor, y)
        use = "transform" if hasattr(estimator, "transform") else "predict"
        result = getattr(estimator, use)(tensor)
        assert isinstance(result, np.ndarray)
        np.testing.assert_allclose(result, getattr(expected, use)(X), rtol=1e-2, atol=1e-2)
