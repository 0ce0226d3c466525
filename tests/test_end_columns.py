"""Columns at one end of the support: a finite intercept, the same whatever finds it."""

import copy
import pickle

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import sample

from skdeq import DEQClassifier, ExpFamilyDEQ
from skdeq._end_columns import EndColumns
from skdeq.families import Binomial, Family, Interval, NegativeBinomial, get_family

# Fits that are cut short on purpose say so.
pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    # So do those of a density that has no bound at the ends.
    pytest.mark.filterwarnings("ignore:Column 4 of X is . wherever:UserWarning"),
]

AT_HIGH_END = ["bernoulli", Binomial(5), "rademacher", "continuous_bernoulli"]
AT_LOW_END = [*AT_HIGH_END, "poisson", NegativeBinomial(0.5)]
CASES = [
    *((family, "low", 1.0) for family in AT_LOW_END),
    *((family, "high", -1.0) for family in AT_HIGH_END),
]


def data(family, end, n=120):
    X = sample(family, n=n)
    X[:, 4] = getattr(get_family(family).support, end)
    return X


def fit(X, family, **options):
    return ExpFamilyDEQ(2, family=family, random_state=0, **options).fit(X)


@pytest.mark.parametrize(("family", "end", "inward"), CASES, ids=str)
def test_is_half_an_observation_inside(family, end, inward):
    X = data(family, end)
    model = fit(X, family)
    law = get_family(family)
    edge = getattr(law.support, end)
    expected = float(law.link(torch.tensor(edge + inward * 0.5 / 121, dtype=torch.float64)))
    assert model.intercept_[4] == pytest.approx(expected, rel=1e-12)
    np.testing.assert_array_equal(model.loadings_[4], 0)
    # The rest is as if the column were not there.
    rest = fit(np.delete(X, 4, axis=1), family, tol=1e-9)
    closely = fit(X, family, tol=1e-9)
    np.testing.assert_allclose(closely.transform(X), rest.transform(np.delete(X, 4, 1)), atol=1e-9)
    # Neither the type nor the tolerance nor the solver decides what a held-out entry costs.
    other = X.copy()
    other[0, 4] = edge + inward
    scores = [
        fit(X.astype(dtype), family, **options).score_samples(other.astype(dtype))[0]
        - fit(X.astype(dtype), family, **options).score_samples(X.astype(dtype))[0]
        for dtype, options in [
            (np.float64, {}),
            (np.float64, {"tol": 1e-9}),
            (np.float32, {}),
            (np.float64, {"solver": "adam", "max_iter": 30}),
        ]
    ]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-4)


@pytest.mark.parametrize("family", ["poisson", "bernoulli"])
def test_weights_gaps_and_sparse_rows(family):
    X = data(family, "low")
    weight = np.random.default_rng(0).integers(1, 4, size=120).astype(float)
    gaps = X.copy()
    gaps[::3, 4] = np.nan
    for rows in (X, gaps):
        weighted = ExpFamilyDEQ(2, family=family).fit(rows, sample_weight=weight)
        repeated = ExpFamilyDEQ(2, family=family).fit(np.repeat(rows, weight.astype(int), axis=0))
        assert weighted.intercept_[4] == pytest.approx(repeated.intercept_[4], rel=1e-12)
        sparse = ExpFamilyDEQ(2, family=family).fit(sp.csr_array(rows), sample_weight=weight)
        assert sparse.intercept_[4] == pytest.approx(weighted.intercept_[4], rel=1e-12)
        # Weights that sum to one are no less than the rows are.
        few = ExpFamilyDEQ(2, family=family).fit(rows, sample_weight=weight / weight.sum())
        observed = np.isfinite(rows[:, 4]) @ weight / weight.mean()
        assert few.intercept_[4] == pytest.approx(
            float(get_family(family).link(torch.tensor(0.5 / (observed + 1)))), rel=1e-6
        )


@pytest.mark.parametrize("exposure", [None, "total"])
def test_restarts_and_exposure(exposure):
    X = data("poisson", "low")
    seen = X.copy()
    seen[:, 4] = 1.0
    model = fit(seen, "poisson", exposure=exposure, warm_start=True)
    assert np.abs(model.loadings_[4]).max() > 0
    model.fit(X)
    np.testing.assert_array_equal(model.loadings_[4], 0)
    assert model.intercept_[4] == pytest.approx(np.log(0.5 / 121))


def test_other_columns_are_none_of_its_business():
    X = sample("poisson", n=120)
    X[:, 4] = 0
    X[3, 4] = 1
    model = fit(X, "poisson")
    assert np.abs(model.loadings_[4]).max() > 0
    # A constant elsewhere has a most likely intercept.
    X[:, 4] = 2
    assert fit(X, "poisson").intercept_[4] == pytest.approx(np.log(2), abs=1e-4)
    # A map of its own, densities without bound and supports without an attained end.
    for family, options in [
        ("gaussian", {}),
        ("poisson", {"canonical_map": "softplus", "max_iter": 3}),
    ]:
        X[:, 4] = 0
        assert np.isfinite(fit(X, family, **options).intercept_[4])


@pytest.mark.parametrize("make", [np.asarray, sp.csr_array])
@pytest.mark.parametrize(("family", "end", "inward"), CASES, ids=str)
def test_a_stream_begins_them_anew_once_they_move(family, end, inward, make):
    X = sample(family, n=1200)
    law = get_family(family)
    edge = getattr(law.support, end)
    first = X[:100].copy()
    first[:, 4] = edge
    if end == "high" and make is sp.csr_array:
        X[100:, 4] = np.where(np.arange(1100) % 3, edge, X[100:, 4])
    stream = ExpFamilyDEQ(2, family=family, random_state=0).partial_fit(make(first))
    stream.partial_fit(make(first))
    mean = torch.tensor(edge + inward * 0.5 / 201, dtype=torch.float64)
    assert stream.intercept_[4] == pytest.approx(float(law.link(mean)), rel=1e-10)
    np.testing.assert_array_equal(stream.loadings_[4], 0)
    stream = pickle.loads(pickle.dumps(stream))
    stream.partial_fit(make(X[100:400]))
    pooled = (200 * edge + X[100:400, 4].sum()) / 500
    # One step of Adam away from the mean of all that the stream has seen.
    expected = float(law.link(torch.tensor(pooled, dtype=torch.float64)))
    assert stream.intercept_[4] == pytest.approx(expected, abs=0.021)
    for low in range(400, 1200, 100):
        stream.partial_fit(make(X[low : low + 100]))
    assert np.abs(stream.loadings_[4]).max() > 0


def test_a_stream_that_meets_a_gene_late_comes_close_to_a_fit():
    rng = np.random.default_rng(0)
    X = rng.poisson(1.0, size=(5000, 20)).astype(float)
    X[:500, 7] = 0
    stream = ExpFamilyDEQ(1, family="poisson", random_state=0)
    for _ in range(3):
        for low in range(0, 5000, 500):
            stream.partial_fit(X[low : low + 500])
    fitted = ExpFamilyDEQ(1, family="poisson", random_state=0).fit(X)
    # It was 42 below.
    assert stream.score(X) > fitted.score(X) - 0.1


def test_kernels_keep_their_share():
    X = sample("bernoulli", n=100, p=16)
    X[:, 5] = 0
    options = {"loadings": "conv2d", "image_shape": (4, 4), "kernel_size": 2, "stride": 2}
    model = ExpFamilyDEQ(1, family="bernoulli", max_iter=5, **options).fit(X)
    expected = np.log(0.5 / 101) - np.log1p(-0.5 / 101)
    assert model.intercept_[5] == pytest.approx(expected, rel=1e-6)
    stream = ExpFamilyDEQ(1, family="bernoulli", max_iter=5, **options)
    stream.partial_fit(X).partial_fit(X)
    assert stream.intercept_[5] < expected
    X[:50, 5] = 1
    stream.partial_fit(X)
    assert stream.intercept_[5] == pytest.approx(np.log(50 / 250), abs=0.021)


@pytest.mark.parametrize("make", [np.asarray, sp.csr_array])
@pytest.mark.parametrize(("family", "end", "inward"), CASES, ids=str)
def test_streams_with_weights_and_gaps(family, end, inward, make):
    rng = np.random.default_rng(0)
    X = data(family, end)
    gaps = X.copy()
    gaps[:, 4] = np.nan
    stream = ExpFamilyDEQ(2, family=family, random_state=0)
    total = 0.0
    for rows in (X, gaps, X, gaps):
        weight = rng.random(len(rows)) + 1
        stream.partial_fit(make(rows), sample_weight=weight)
        total += weight.sum() if rows is X else 0.0
    law = get_family(family)
    mean = getattr(law.support, end) + inward * 0.5 / (total + 1)
    expected = float(law.link(torch.tensor(mean, dtype=torch.float64)))
    assert stream.intercept_[4] == pytest.approx(expected, rel=1e-10)
    # Rows without weight say nothing.
    X[:5, 4] += inward
    weight = np.r_[np.zeros(5), np.ones(115)]
    stream.partial_fit(make(X), sample_weight=weight)
    np.testing.assert_array_equal(stream.loadings_[4], 0)


def test_a_late_gene_is_measured_in_units_of_exposure():
    rng = np.random.default_rng(0)
    first = rng.poisson(2.0, size=(500, 30)).astype(float)
    first[:, 4] = 0
    deep = rng.poisson(20.0, size=(500, 30)).astype(float)
    stream = ExpFamilyDEQ(1, family="poisson", exposure="total", random_state=0)
    stream.partial_fit(first).partial_fit(deep)
    # As many as ten rows of the first batch say what one of the second does.
    assert stream.intercept_[4] == pytest.approx(np.log(500 * 20 / (500 + 5000)), abs=0.1)


def test_restarted_columns_take_steps_as_long_as_the_others():
    rng = np.random.default_rng(0)
    X = rng.poisson(1.0, size=(200, 10)).astype(float)
    X[:, 4] = 0
    stream = ExpFamilyDEQ(1, family="poisson", random_state=0)
    for _ in range(60):
        stream.partial_fit(X)
    X[:, 4] = rng.poisson(1.0, size=200)
    stream.partial_fit(X)
    for _ in range(5):
        before = stream.intercept_[4]
        stream.partial_fit(X)
        # The rate is 0.02 / sqrt(1.6); Adam may take three times that, and took six.
        assert abs(stream.intercept_[4] - before) < 0.04


class Tenths(Family):
    """Yes or no, in hundredths."""

    name = "tenths"
    support = Interval(0, 0.01, True, True)

    def log_partition(self, eta):
        return torch.nn.functional.softplus(0.01 * eta)

    def mean(self, eta):
        return 0.01 * torch.sigmoid(0.01 * eta)

    def variance(self, eta):
        return 1e-4 * torch.sigmoid(0.01 * eta) * torch.sigmoid(-0.01 * eta)

    def link(self, mu):
        return 100 * torch.logit(100 * mu)

    def log_base(self, x):
        return torch.zeros_like(x)


def test_narrow_supports_and_late_fine_tuning():
    X = 0.01 * data("bernoulli", "low", n=30)
    model = ExpFamilyDEQ(1, family=Tenths(), weight_decay=1e-6).fit(X)
    assert model.intercept_[4] == pytest.approx(100 * np.log(0.5 / 30.5), rel=1e-6)
    assert np.isfinite(model.score(X))
    X = data("bernoulli", "low")
    options = {"random_state": 0, "max_iter": 2}
    tuned = DEQClassifier(ExpFamilyDEQ(2, family="bernoulli"), **options).fit(X, X[:, 0])
    loadings = tuned.backbone_.loadings_[4].copy()
    assert np.abs(loadings).max() > 0
    # What was trained with the others goes on with them.
    tuned.backbone_.partial_fit(X)
    assert np.abs(tuned.backbone_.loadings_[4] - loadings).max() < 0.03
    assert np.abs(tuned.backbone_.loadings_[4]).max() > 0


def test_sparse_batches_of_a_stream_stay_sparse(monkeypatch):
    rng = np.random.default_rng(0)
    X = sp.csr_array(sp.random(40, 3000, density=0.002, random_state=rng))
    X.data[:] = rng.integers(1, 4, size=X.nnz)
    X.data[3] = np.nan
    weight = rng.integers(0, 3, size=40).astype(float)
    dense = ExpFamilyDEQ(1, family="poisson", max_iter=2, random_state=0).partial_fit(X[:20])
    stream = pickle.loads(pickle.dumps(dense))
    dense.partial_fit(X[20:].toarray(), sample_weight=weight[20:])
    after = EndColumns.after

    def watched(self, *args):
        with monkeypatch.context() as patch:
            # Nothing is made dense.
            patch.setattr(sp.csr_array, "toarray", None)
            patch.setattr(sp.csr_array, "todense", None)
            return after(self, *args)

    monkeypatch.setattr(EndColumns, "after", watched)
    stream.partial_fit(X[20:], sample_weight=weight[20:])
    np.testing.assert_allclose(stream.intercept_, dense.intercept_, rtol=1e-9)
    np.testing.assert_allclose(stream._ends["sizes"], dense._ends["sizes"], rtol=1e-12)


def test_a_column_that_goes_to_the_other_end_has_left_its_own():
    X = sample("bernoulli", n=120)
    X[:, 4], X[:, 5] = 0, 1
    stream = ExpFamilyDEQ(2, family="bernoulli", random_state=0).partial_fit(X)
    X[:, 4] = 1
    stream.partial_fit(X)
    # As many of one as of the other, to one step of Adam.
    assert stream.intercept_[4] == pytest.approx(0, abs=0.021)
    assert stream.intercept_[5] == pytest.approx(np.log(240.5 / 0.5), rel=1e-6)


def test_observations_are_counted_in_units_of_exposure():
    rng = np.random.default_rng(0)
    X = rng.poisson(np.where(np.arange(100) % 2, 1.0, 50.0)[:, None], size=(100, 12)).astype(float)
    X[:, 4] = np.where(np.arange(100) % 2, 0, np.nan)
    model = fit(X, "poisson", exposure="total")
    seen = model.row_exposures(X)[1::2].sum()
    assert seen < 5
    assert model.intercept_[4] == pytest.approx(np.log(0.5 / (seen + 1)), rel=1e-9)


def test_columns_that_begin_anew_leave_what_another_stream_knows():
    X = data("poisson", "low")
    stream = ExpFamilyDEQ(2, family="poisson", random_state=0).partial_fit(X).partial_fit(X)
    twin = pickle.loads(pickle.dumps(stream))
    first, X[:, 4] = X.copy(), 1
    copy.copy(stream).partial_fit(X)
    for _ in range(2):
        stream.partial_fit(first)
        twin.partial_fit(first)
    np.testing.assert_array_equal(stream._adam[0]["exp_avg_sq"], twin._adam[0]["exp_avg_sq"])
    np.testing.assert_array_equal(stream.loadings_, twin.loadings_)
