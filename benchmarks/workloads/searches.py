"""Grid searches in parallel: do jobs and torch's threads get in each other's way?"""

import atexit
import time
from contextlib import nullcontext

import joblib
import numpy as np
from joblib.externals.loky import get_reusable_executor
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks import _common as common
from benchmarks._suite import Case, Result, Settings, Target, Trial, Workload
from skdeq import ExpFamilyDEQ
from skdeq.families import Binomial

ONE, AGAIN = "1 job", "1 job, again"
# Method: joblib's backend and the number of jobs.
JOBS = {
    ONE: (None, 1),
    "2 jobs, loky": ("loky", 2),
    "2 jobs, threading": ("threading", 2),
    AGAIN: (None, 1),
}


def search(settings, n_jobs):
    """Return the unfitted search over the number of components."""
    deq = ExpFamilyDEQ(family=Binomial(n_trials=16), device=settings.device, random_state=0)
    pipeline = make_pipeline(deq, StandardScaler(), LogisticRegression(max_iter=1000))
    components = [2, 3] if settings.quick else [2, 4, 6, 8, 10, 12]
    folds = StratifiedKFold(2 if settings.quick else 4)
    grid = {"expfamilydeq__n_components": components}
    return GridSearchCV(pipeline, grid, cv=folds, n_jobs=n_jobs)


def prepare(settings: Settings, method: str) -> Trial:
    """Make a search ready, loky's processes included."""
    backend, n_jobs = JOBS[method]
    X, y = load_digits(return_X_y=True)
    if settings.quick:
        X, y = X[:200], y[:200]

    def parallel():
        return joblib.parallel_config(backend) if backend else nullcontext()

    with parallel():
        search(settings, n_jobs).set_params(cv=2).fit(X[:200], y[:200])

    def run():
        # Loky's workers are processes of their own, whose memory is part of the search's; they
        # are there before it, so that what it adds to them says little.
        with parallel(), common.PeakMemory(interval=0.05, children=True) as memory:
            start = time.perf_counter()
            fitted = search(settings, n_jobs).fit(X, y)
            seconds = time.perf_counter() - start
        values = {"search": seconds, "peak_memory": memory.peak_mb}
        return {**values, "extra_memory": memory.extra_mb}, fitted

    def close():
        if backend == "loky":
            # Its idle processes would keep this one from ending, which, being one of
            # multiprocessing's, ends without the handlers that remove joblib's folders.
            get_reusable_executor().shutdown(wait=True)
            atexit._run_exitfuncs()

    return Trial(run, lambda fitted: {"best_score": fitted.best_score_}, close)


def cases(settings: Settings) -> list[Case]:
    """Return one job, two jobs in both ways, and one job again."""
    X, _ = load_digits(return_X_y=True)
    rows = 200 if settings.quick else len(X)
    return [Case(f"digits, {rows:,} rows", method, prepare, (method,)) for method in JOBS]


def targets(results: list[Result]) -> list[Target]:
    """Judge that two jobs find the same as one, and are not slower."""
    one = results[0]
    made = []
    for result in results[1:-1]:
        if one.failure or result.failure:
            continue
        times = one.median("search") / result.median("search")
        same = np.isclose(one.median("best_score"), result.median("best_score"), rtol=1e-12)
        made.append(
            Target(
                f"{result.method} against {ONE}",
                "no slower, and the same score",
                f"{times:.2f} times as fast, {'the same' if same else 'another'} score",
                bool(times >= 1 and same),
            )
        )
    return made


WORKLOAD = Workload(
    name="searches",
    title="Searches in parallel",
    note=(
        "GridSearchCV over six numbers of components and four folds of a pipeline of ExpFamilyDEQ "
        "(binomial), StandardScaler and LogisticRegression. A single job is run twice, to show "
        "how far two equal measurements are apart. Torch shares the cores within one job too, so "
        "that two jobs on two cores gain only what it leaves idle."
    ),
    cases=cases,
    minutes=1.5,
    targets=targets,
)
