"""Chunks of rows: their order, their threads, and what happens where memory runs out."""

import warnings
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import CUDA, sample

import skdeq._precondition as precondition
from skdeq import ExpFamilyDEQ, ImplicitEMEncoder
from skdeq._chunks import map_chunks, one_ahead, parallel_chunks, sum_chunks, working_entries
from skdeq._design import Design
from skdeq._map_problem import MapProblem
from skdeq._observations import Observations

# Only its name is looked at here; everything is computed on the CPU.
CARD = torch.device("cuda")


def spans(most, device=CARD, n_rows=100, size=40):
    """Chunks that were worked on with memory for ``most`` rows, and the calls that failed."""
    failed = []

    def work(start, stop):
        if stop - start > most:
            failed.append((start, stop))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return start, stop

    return map_chunks(work, n_rows, size, device), failed


def test_chunks_in_order():
    for device in (torch.device("cpu"), CARD):
        with parallel_chunks():
            assert spans(100, device) == ([(0, 40), (40, 80), (80, 100)], [])


@pytest.mark.parametrize("device", [torch.device("cpu"), CARD], ids=str)
@pytest.mark.parametrize("n_rows", [1, 40, 41, 5000])
def test_sums_of_chunks_with_a_few_at_hand(n_rows, device):
    values = torch.randn(n_rows, 3, generator=torch.Generator().manual_seed(0))
    alive, most = weakref.WeakSet(), []

    def work(start, stop):
        part = values[start:stop].double().sum(0)
        alive.add(part)
        most.append(len(alive))
        return part

    plain = sum_chunks(work, n_rows, 40, device)
    torch.testing.assert_close(plain, values.double().sum(0))
    with parallel_chunks():
        assert torch.equal(sum_chunks(work, n_rows, 40, device), plain)
    # What is returned is not kept: of each thread the one at work and the one before.
    assert max(most) <= 2 * torch.get_num_threads()


def test_sums_of_chunks_that_are_halved():
    def work(start, stop):
        if stop - start > 10:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return torch.arange(start, stop).sum()

    with pytest.warns(RuntimeWarning, match="40 rows at a time were too many"):
        assert int(sum_chunks(work, 1000, 40, CARD)) == 999 * 500


def test_wide_sparse_data_are_fitted_without_sums_of_every_chunk(monkeypatch):
    n, p = 300, 40_000
    rng = np.random.default_rng(0)
    X = sp.csr_array(sp.random(n, p, density=1e-4, random_state=rng, dtype=np.float32))
    X.data[:] = 1
    largest = []
    stack = torch.stack

    def watched(tensors, *args, **options):
        result = stack(tensors, *args, **options)
        largest.append(result.nbytes)
        return result

    monkeypatch.setattr(torch, "stack", watched)
    ExpFamilyDEQ(1, family="poisson", max_iter=1, tol=1, random_state=0).fit(X)
    # It was a row of p numbers in float64 for every five rows.
    assert max(largest) <= 17 * 8 * p


class TestOutOfMemory:
    def test_chunks_are_halved_until_they_fit_and_stay_so(self):
        with pytest.warns(RuntimeWarning, match="40 rows at a time were too many for the memory"):
            results, failed = spans(15)
        assert failed == [(0, 40), (0, 20)]
        assert results == [(start, start + 10) for start in range(0, 100, 10)]

    def test_a_short_last_chunk_that_does_not_fit(self):
        calls = []

        def work(start, stop):
            calls.append((start, stop))
            if (start, stop) == (80, 100):
                raise torch.cuda.OutOfMemoryError
            return start, stop

        with pytest.warns(RuntimeWarning, match="20 rows at a time"):
            results = map_chunks(work, 100, 40, CARD)
        assert results == [(0, 40), (40, 80), (80, 90), (90, 100)]

    def test_remembered_and_said_once_within_a_method(self):
        with pytest.warns(RuntimeWarning) as said, parallel_chunks():
            assert spans(15)[1] == [(0, 40), (0, 20)]
            assert spans(15)[1] == []
            # Still less memory than before: smaller without another word.
            assert spans(7)[1] == [(0, 10)]
        assert len(said) == 1
        with pytest.warns(RuntimeWarning), parallel_chunks():
            assert spans(15)[1] == [(0, 40), (0, 20)]

    def test_a_row_that_does_not_fit_is_an_error(self):
        with pytest.warns(RuntimeWarning), pytest.raises(torch.cuda.OutOfMemoryError):
            spans(0)

    def test_other_errors_pass(self):
        def work(start, stop):
            raise RuntimeError("something else")

        with pytest.raises(RuntimeError, match="something else"):
            map_chunks(work, 100, 40, CARD)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def short_of_memory(monkeypatch, owner, name, most, rows_of):
    """Let a function fail, as on a card, whenever it is given more than ``most`` rows."""
    function, failures = getattr(owner, name), []

    def limited(*args, **options):
        if rows_of(*args) > most:
            failures.append(rows_of(*args))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return function(*args, **options)

    monkeypatch.setattr(owner, name, limited)
    return failures


@pytest.mark.parametrize("k", [2, 18])
@pytest.mark.parametrize("family", ["poisson", "bernoulli"])
def test_a_fit_short_of_memory_gives_the_same_results(family, k, monkeypatch, one_thread):
    X = sample(family, n=700, p=30)
    options = {"family": family, "max_iter": 5, "tol": 1.0, "random_state": 0, "device": "cpu"}
    expected = ExpFamilyDEQ(k, **options).fit(X)
    scores, likelihood = expected.transform(X), expected.score_samples(X)
    failures = short_of_memory(
        monkeypatch, MapProblem, "_accumulate", 100, lambda problem, z, rows: len(z)
    )
    with pytest.warns(RuntimeWarning, match="too many for the memory of cpu") as said:
        deq = ExpFamilyDEQ(k, **options).fit(X)
    assert len([one for one in said if one.category is RuntimeWarning]) == 1
    # The chunks of 700 rows were halved three times in a whole fit of dozens of passes.
    assert len(failures) == 3
    np.testing.assert_allclose(deq.loadings_, expected.loadings_, rtol=1e-6, atol=1e-8)
    with pytest.warns(RuntimeWarning, match="too many"):
        np.testing.assert_allclose(deq.transform(X), scores, rtol=1e-5, atol=1e-6)
    with pytest.warns(RuntimeWarning, match="too many"):
        np.testing.assert_allclose(deq.score_samples(X), likelihood, rtol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_location_and_scale_short_of_memory(weighted, monkeypatch, one_thread):
    values = torch.from_numpy(sample("gaussian", n=500, p=6))
    weight = torch.linspace(0.5, 2, 500) if weighted else None
    monkeypatch.setattr(precondition, "_CHUNK_ENTRIES", 6 * 200)
    expected = precondition.fit_preconditioner(values, weight)
    average = np.average(values, axis=0, weights=weight)
    np.testing.assert_allclose(expected.location, average, rtol=1e-10)
    monkeypatch.setattr(precondition, "_SHIFT_ROWS", 30)
    short_of_memory(
        monkeypatch, Observations, "dense_rows", 60, lambda rows, start, stop: stop - start
    )
    with pytest.warns(RuntimeWarning, match="200 rows at a time"):
        actual = precondition.fit_preconditioner(values, weight)
    np.testing.assert_allclose(actual.location, expected.location, rtol=1e-10)
    assert actual.scale == pytest.approx(expected.scale, rel=1e-10)


def test_encoding_short_of_memory(monkeypatch, one_thread):
    X = sample("gaussian", n=500, p=6)
    encoder = ImplicitEMEncoder(4, max_iter=2, random_state=0).fit(X)
    expected = encoder.transform(X)
    short_of_memory(monkeypatch, torch, "addmm", 100, lambda bias, rows, weights: len(rows))
    with pytest.warns(RuntimeWarning, match="500 rows at a time"):
        np.testing.assert_allclose(encoder.transform(X), expected, rtol=1e-12)


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_array])
def test_a_bad_entry_of_a_later_chunk_is_named(layout, monkeypatch):
    monkeypatch.setattr("skdeq._data.CHUNK_ENTRIES", 50)
    X = sample("poisson", n=100) + 1
    X[73, 4] = -2
    with pytest.raises(ValueError, match="row 73, column 4 of X is -2"):
        ExpFamilyDEQ(2, family="poisson").fit(layout(X))


class TestMemoryOfACard:
    @pytest.fixture(autouse=True)
    def card(self, monkeypatch):
        self.free, self.spare = 2**34, 0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, 2**36))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.spare + 100)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)

    def test_entries_follow_the_free_memory(self):
        def entries(itemsize=4):
            return working_entries(CARD, 2**26, 2**20, itemsize)

        # A sixteenth of 16 GiB would be 2**28 entries.
        assert entries() == 2**26
        self.free = 2**30
        assert entries() == 2**24
        assert entries(itemsize=8) == 2**23
        # A little more or less in use makes no difference to the results.
        self.free = 2**30 + 2**29
        assert entries() == 2**24
        self.free = 0
        assert entries() == 2**20
        # What torch holds without using it is free, too.
        self.spare = 2**30
        assert entries() == 2**24

    def test_rows_of_a_problem(self):
        def rows(free, n, q, r):
            design = Design(torch.ones(10, 2, dtype=torch.float64), None, None, False)
            design.matrix = SimpleNamespace(device=CARD)
            design._tile = working_entries(CARD, 2**26, 2**20, 8)
            design.q, design.r = q, r
            return design.chunk_rows(n)

        assert rows(self.free, 10**6, 1000, 2) == 2**26 // 1000
        assert rows(self.free, 500, 1000, 2) == 500
        # Many components: the Hessians are larger than the predictors.
        assert rows(self.free, 10**7, 100, 50) == 2**26 // 2500
        self.free = 2**30
        assert rows(self.free, 10**6, 1000, 2) == 2**23 // 1000


@pytest.mark.parametrize("device", [CUDA])
def test_a_card_that_is_short_of_memory(device, monkeypatch):
    X = sample("poisson", n=2000, p=50)
    options = {"family": "poisson", "max_iter": 5, "tol": 1.0, "random_state": 0}
    expected = ExpFamilyDEQ(2, device=device, **options).fit(X).loadings_
    short_of_memory(monkeypatch, MapProblem, "_accumulate", 300, lambda problem, z, rows: len(z))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        actual = ExpFamilyDEQ(2, device=device, **options).fit(X).loadings_
    assert [one.category for one in said].count(RuntimeWarning) == 1
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_farthest_row_short_of_memory(monkeypatch, one_thread):
    values = torch.from_numpy(sample("gaussian", n=500, p=6))
    values[230] = 1000
    monkeypatch.setattr(precondition, "_CHUNK_ENTRIES", 6 * 200)
    monkeypatch.setattr(precondition, "_SHIFT_ROWS", 30)
    short_of_memory(
        monkeypatch, Observations, "dense_rows", 60, lambda rows, start, stop: stop - start
    )
    with pytest.warns(RuntimeWarning, match="200 rows at a time"), parallel_chunks():
        found = precondition.fit_preconditioner(values, None)
    assert found.farthest == 230
    shift = values[:30].mean(0)
    distance = (values - shift).square().sum(1)
    assert found.its_share == pytest.approx(float(distance[230] / distance.sum()), rel=1e-9)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_what_is_worked_on_ahead_is_all_there_in_order(threads, count, one_thread):
    torch.set_num_threads(threads)
    with parallel_chunks():
        found = list(one_ahead(lambda a, b: (a, b), ((at, -at) for at in range(count))))
    assert found == [(at, -at) for at in range(count)]
