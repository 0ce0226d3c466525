"""Data larger than the card: on the host, and fetched block by block."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import CUDA, sample
from numpy.testing import assert_allclose

import skdeq._expfam_fitted as expfam_fitted
import skdeq._host_data as host_data
from skdeq import ExpFamilyDEQ
from skdeq._data import to_observations
from skdeq._host_data import HostObservations
from skdeq._observations import CompressedRows, Observations
from skdeq.families import Poisson

N, P, BLOCK = 90, 8, 17
HARMLESS = {"__get__", "__getitem__", "__len__", "stride", "contiguous"}


class OnTheHost(torch.Tensor):
    """Stand-in for a tensor where the card cannot reach it: to be cut, not to compute with."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function.__name__ in HARMLESS, f"{function.__name__} of data on the host"
        return super().__torch_function__(function, types, args, kwargs)


class Card:
    """Stand-in for a card: counts what it fetches."""

    device = torch.device("cpu")

    def __init__(self):
        self.rows = []

    def fetched(self, part, device):
        assert device == self.device
        self.rows.append(part.shape[0])
        return part.as_subclass(torch.Tensor) if isinstance(part, torch.Tensor) else part

    def observations(self, X, family, device, copies=1):
        made = to_observations(X, family, device)
        return HostObservations(
            *(
                part.as_subclass(OnTheHost) if isinstance(part, torch.Tensor) else part
                for part in (made.values, made.missing)
            ),
            worked_on=self.device,
        )


@pytest.fixture
def card(monkeypatch):
    card = Card()
    monkeypatch.setattr(host_data, "fetched", card.fetched)
    monkeypatch.setattr(host_data, "tile_entries", lambda like: BLOCK * P)
    return card


def with_gaps(X):
    X = X.astype(np.float64)
    X[::7, 2] = np.nan
    return X


LAYOUTS = {
    "rows": np.ascontiguousarray,
    "columns": np.asfortranarray,
    "strided": lambda X: np.repeat(X, 2, axis=1)[:, ::2],
    "sparse": sp.csr_array,
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


class TestHostObservations:
    @pytest.fixture(params=[False, True], ids=["complete", "gaps"])
    def pair(self, request, layout, card):
        X = sample("poisson", n=N, p=P).astype(np.float64)
        X = LAYOUTS[layout](with_gaps(X) if request.param else X)
        X = X if sp.issparse(X) else torch.from_numpy(X)
        family, device = Poisson(), torch.device("cpu")
        return to_observations(X, family, device), card.observations(X, family, device)

    @layouts
    def test_products(self, pair, card):
        for here, away in (pair, [one.T for one in pair], [one.T.T for one in pair]):
            matrix = torch.randn(here.shape[1], 3, dtype=torch.float64)
            card.rows.clear()
            assert_allclose((away @ matrix).numpy(), (here @ matrix).numpy(), rtol=1e-12)
            assert len(card.rows) > 1
            if here.missing is not None:
                expected = here.missing_product(matrix).numpy()
                assert_allclose(away.missing_product(matrix).numpy(), expected, rtol=1e-12)

    @layouts
    def test_rows(self, pair):
        for here, away in (pair, [one.T for one in pair]):
            assert away.shape == here.shape
            assert away.dtype == here.dtype
            for part in ("dense_rows", "missing_rows"):
                expected, actual = getattr(here, part)(2, 6), getattr(away, part)(2, 6)
                assert (expected is None) == (actual is None)
                if expected is not None:
                    assert type(actual) is torch.Tensor
                    assert torch.equal(actual, expected)

    @layouts
    def test_rows_taken_are_on_the_device(self, pair):
        here, away = pair
        index = torch.tensor([5, 0, 33])
        some = away.take(index)
        assert type(some) is Observations
        assert torch.equal(some.dense_rows(0, 3), here.take(index).dense_rows(0, 3))
        if here.missing is not None:
            assert torch.equal(some.missing_rows(0, 3), here.take(index).missing_rows(0, 3))

    @pytest.mark.parametrize("layout", ["rows", "sparse"])
    def test_out_of_memory(self, pair, card, monkeypatch):
        here, away = pair
        fetched = card.fetched

        def scarce(part, device):
            if part.shape[0] > 5:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return fetched(part, device)

        monkeypatch.setattr(host_data, "fetched", scarce)
        matrix = torch.randn(P, 3, dtype=torch.float64)
        with pytest.warns(RuntimeWarning, match="too many for the memory"):
            product = away @ matrix
        assert_allclose(product.numpy(), (here @ matrix).numpy(), rtol=1e-12)


def one_sided(X):
    """Let a column be seen only where others are large, so that its intercept is at its limit."""
    X = X.astype(float)
    size = X[:, 1:].sum(axis=1)
    X[:, 0] = np.where(size > np.median(size), 30 * size, np.nan)
    return X


FITS = {
    "gaussian": ({}, np.asarray),
    "poisson": ({"family": "poisson", "exposure": "total"}, np.asarray),
    "bernoulli": ({"family": "bernoulli", "n_components": 5}, np.asarray),
    "gaps": ({"family": "poisson"}, with_gaps),
    "sparse": ({"family": "poisson", "exposure": "total"}, sp.csr_array),
    "sparse, gaps": ({"family": "poisson"}, lambda X: sp.csc_array(with_gaps(X))),
    "canonical map": ({"canonical_map": "softplus"}, np.asarray),
    "kinks": ({"canonical_map": "relu"}, lambda X: np.float32(X)),
    "too large for float32": ({}, lambda X: np.float32(X + 1e4)),
    "one-sided column": ({"family": "negative_binomial", "weight_decay": 1e-3}, one_sided),
    "two layers": ({"hidden_layer_sizes": (4,), "family": "poisson"}, np.asarray),
    "adam": ({"solver": "adam", "family": "poisson"}, np.asarray),
    "convolution": (
        {"loadings": "conv2d", "image_shape": (2, 4), "kernel_size": 2, "family": "poisson"},
        np.asarray,
    ),
}


@pytest.mark.parametrize("name", FITS)
def test_a_fit_never_has_the_data_on_the_card(name, card, monkeypatch):
    options, prepare = FITS[name]
    X = sample(options.get("family", "gaussian"), n=N, p=P).astype(np.float64)
    X = prepare(X)
    options = {"n_components": 2, "max_iter": 6, "tol": 1.0, "random_state": 0, **options}
    # The card is a stand-in.
    options["device"] = "cpu"
    expected = ExpFamilyDEQ(**options).fit(X)
    monkeypatch.setattr(expfam_fitted, "to_observations", card.observations)
    actual = ExpFamilyDEQ(**options).fit(X)
    assert card.rows
    rtol = 1e-6 if X.dtype == np.float64 else 1e-3
    compared = ("components_", "loadings_", "intercept_", "loss_curve_")
    for attribute in (*compared, "explained_deviance_ratio_"):
        values = getattr(expected, attribute)
        assert_allclose(getattr(actual, attribute), values, rtol, rtol * np.max(np.abs(values)))
    for method in ("transform", "score_samples"):
        monkeypatch.setattr(expfam_fitted, "to_observations", to_observations)
        here = getattr(expected, method)(X)
        monkeypatch.setattr(expfam_fitted, "to_observations", card.observations)
        card.rows.clear()
        there = getattr(expected, method)(X)
        assert card.rows
        assert_allclose(there, here, rtol, rtol * np.max(np.abs(here)))


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_array])
def test_only_data_that_fill_half_of_the_card_stay(layout, monkeypatch):
    X = layout(sample("poisson", n=N, p=P).astype(np.float32))
    rows = X if sp.issparse(X) else torch.from_numpy(X)
    # Nothing moves to this card, which is not there.
    monkeypatch.setattr("skdeq._data.free_memory", lambda device: 100)
    stayed = to_observations(rows, Poisson(), torch.device("cuda"))
    assert isinstance(stayed, HostObservations)
    assert stayed.device.type == "cuda"
    assert stayed.values.device.type == "cpu"
    assert isinstance(stayed.values, CompressedRows) == sp.issparse(X)
    assert type(to_observations(rows, Poisson(), torch.device("cpu"))) is Observations


def test_data_of_which_copies_are_made_want_room_for_them(monkeypatch):
    X = torch.from_numpy(sample("poisson", n=N, p=P).astype(np.float32))
    # Room for two of them in half of the card, and for three not.
    monkeypatch.setattr("skdeq._data.free_memory", lambda device: 4 * X.nbytes)
    stayed = to_observations(X, Poisson(), torch.device("cuda"), copies=3)
    assert isinstance(stayed, HostObservations)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("name", FITS)
def test_data_larger_than_the_card(device, name, monkeypatch):
    options, prepare = FITS[name]
    X = prepare(sample(options.get("family", "gaussian"), n=N, p=P).astype(np.float64))
    options = {"n_components": 2, "max_iter": 6, "tol": 1.0, "random_state": 0, **options}
    # The card is a stand-in.
    options["device"] = "cpu"
    expected = ExpFamilyDEQ(device=device, **options).fit(X)
    monkeypatch.setattr("skdeq._data.free_memory", lambda device: 0)
    actual = ExpFamilyDEQ(device=device, **options).fit(X)
    scale = np.max(np.abs(expected.components_))
    rtol = 1e-6 if X.dtype == np.float64 else 1e-3
    assert_allclose(actual.components_, expected.components_, rtol, rtol * scale)
    scores = expected.transform(X)
    assert_allclose(actual.transform(X), scores, rtol, rtol * np.max(np.abs(scores)))
