"""Several fits at once: in processes, in threads, and in children of a process that has fitted."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time

import joblib
import numpy as np
import pytest
import torch
from conftest import sample
from sklearn.base import clone
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

import skdeq._chunks as chunks
from skdeq import DEQRegressor, ExpFamilyDEQ, ImplicitEMEncoder
from skdeq._chunks import parallel_chunks

X = sample("poisson", n=150, p=8)
Y = X.sum(1) + X[:, 0]
DEQ = ExpFamilyDEQ(2, family="poisson", max_iter=5, tol=1.0, random_state=0)
SEARCHES = {
    "deq": (DEQ, {"alpha": [0.5, 1.0, 2.0]}),
    "encoder": (
        make_pipeline(ImplicitEMEncoder(6, max_iter=3, random_state=0), Ridge()),
        {"implicitemencoder__lse_weight": [2.0, 8.0]},
    ),
    "regressor": (
        DEQRegressor(DEQ, max_iter=5, tol=1.0, n_iter_no_change=2, random_state=0),
        {"head_layer_sizes": [(), (10,)]},
    ),
}


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_searches_in_parallel_find_what_one_job_finds(name, backend, two_threads):
    estimator, grid = SEARCHES[name]
    one = GridSearchCV(clone(estimator), grid, cv=3).fit(X, Y)
    with joblib.parallel_backend(backend):
        two = GridSearchCV(clone(estimator), grid, cv=3, n_jobs=2).fit(X, Y)
    np.testing.assert_allclose(
        two.cv_results_["mean_test_score"], one.cv_results_["mean_test_score"], rtol=1e-9
    )
    assert two.best_params_ == one.best_params_
    # What was lent to the threads has been given back.
    assert torch.get_num_threads() == 2
    assert chunks._shared["inside"] == 0


def threads_in_use():
    """Threads that a method of an estimator would use here."""
    with parallel_chunks():
        pool = chunks._local.pool
        assert torch.get_num_threads() == 1
        return 1 if pool is None else pool._max_workers


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="asks Linux for the cores")
def test_processes_share_the_cores():
    cores = joblib.cpu_count()
    counts = joblib.Parallel(n_jobs=2, backend="loky")(
        joblib.delayed(threads_in_use)() for _ in range(4)
    )
    assert max(counts) <= max(1, cores // 2)


def test_threads_share_the_cores(two_threads):
    together = threading.Barrier(3)
    counts = []

    def work():
        with parallel_chunks():
            together.wait(timeout=30)
            pool = chunks._local.pool
            counts.append((torch.get_num_threads(), 0 if pool is None else pool._max_workers))
            together.wait(timeout=30)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    # One of them has the pool that torch's two threads are worth, the others none.
    assert sorted(counts) == [(1, 0), (1, 0), (1, 2)]
    assert torch.get_num_threads() == 2


def test_an_interrupt_while_threads_end_leaves_none(two_threads, monkeypatch):
    before, shutdown = threading.enumerate(), chunks.ThreadPoolExecutor.shutdown
    interrupts = iter([KeyboardInterrupt])

    def interrupted(pool, **options):
        for interrupt in interrupts:
            raise interrupt
        shutdown(pool, **options)

    monkeypatch.setattr(chunks.ThreadPoolExecutor, "shutdown", interrupted)
    with pytest.raises(KeyboardInterrupt), parallel_chunks():
        chunks.map_chunks(lambda *_: time.sleep(0.05), 4, 1, torch.device("cpu"))
    assert threading.enumerate() == before
    assert torch.get_num_threads() == 2


FORK = """
import multiprocessing, sys, warnings
import numpy as np, torch
from skdeq import ExpFamilyDEQ, ImplicitEMEncoder

warnings.simplefilter("ignore")
torch.set_num_threads(2)
X = np.random.default_rng(0).poisson(1.0, (2000, 300)).astype(float)

def deq():
    return ExpFamilyDEQ(3, family="poisson", max_iter=2, tol=1.0, random_state=0).fit(X).loadings_

def encoder():
    # Steps so large that torch splits them.
    options = {"lse_weight": 2.0, "batch_size": 1000, "max_iter": 1, "random_state": 0}
    return ImplicitEMEncoder(256, **options).fit(X).components_

expected = [deq(), encoder()]
torch.ones(1000, 1000) @ torch.ones(1000, 1000)
assert torch.get_num_threads() == 2
with multiprocessing.get_context("fork").Pool(1) as pool:
    for work, one in zip((deq, encoder), expected, strict=True):
        try:
            other = pool.apply_async(work).get(timeout=60)
        except multiprocessing.TimeoutError:
            sys.exit(f"{work.__name__} hangs in a forked process")
        np.testing.assert_allclose(other, one, rtol=1e-6, atol=1e-9)
    print("threads", pool.apply(torch.get_num_threads), torch.get_num_threads())
"""


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="needs processes that fork"
)
def test_a_forked_process_can_fit():
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    run = subprocess.run(
        [sys.executable, "-c", FORK], env=environment, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["threads", "1", "2"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_a_process_forked_in_the_middle_begins_anew(two_threads):
    with parallel_chunks():
        assert chunks._shared["inside"] == 1
        with multiprocessing.get_context("fork").Pool(1) as pool:
            state = pool.apply_async(_state).get(timeout=60)
        assert chunks._shared["inside"] == 1
    assert state == (0, False, 1)


def _state():
    return chunks._shared["inside"], chunks._local.pool is not None, threads_in_use()


def test_threads_and_inference_mode_go_together():
    X = np.random.default_rng(0).poisson(2, size=(6000, 200)).astype(float)
    model = ExpFamilyDEQ(2, family="poisson", exposure="total", tol=1.0, random_state=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = model.fit(X).transform(X)
        with torch.inference_mode():
            found = model.fit(X).transform(X)
            model.score(X)
            model.map_latents(X)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_allclose(found, expected, atol=1e-6)
