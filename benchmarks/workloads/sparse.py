"""A large sparse count matrix, never made dense."""

from functools import partial

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import NMF
from sklearn.utils import gen_batches

from benchmarks import _common as common
from benchmarks import poisson_glmpca as glmpca
from benchmarks._figures import trade_off
from benchmarks._suite import Case, Result, Settings, Target, Trial, Workload

RANK = 10
DENSITY = 0.01
MAX_ITER = 15
MOST_MEMORY = 512.0  # MB above imports and data
OURS = f"ExpFamilyDEQ, Poisson, at most {MAX_ITER} iterations"


def shape(settings):
    """Return the rows and columns."""
    if settings.quick:
        return 300, 400
    return (100_000, 20_000) if settings.large else (4_000, 10_000)


def counts(n, p):
    """Draw CSR counts of low rank with about one entry in a hundred filled, as float32."""
    generator = np.random.default_rng(0)
    W = generator.normal(scale=0.5, size=(p, RANK))
    popularity = generator.normal(size=p)
    popularity += np.log(DENSITY) - np.log(np.exp(popularity).mean()) - W.shape[1] * 0.5**2 / 2
    blocks = []
    for rows in gen_batches(n, 500):
        latents = generator.normal(size=(rows.stop - rows.start, RANK))
        mean = np.exp(latents @ W.T + popularity)
        blocks.append(sp.csr_matrix(generator.poisson(mean).astype(np.float32)))
    X = sp.vstack(blocks, format="csr")
    # A row without any count says nothing of its size, which some peers divide by.
    return X[np.diff(X.indptr) > 0]


def fit_nmf(X):
    """Fit scikit-learn's model of a Poisson mean: factors that are not negative."""
    model = NMF(
        RANK,
        beta_loss="kullback-leibler",
        solver="mu",
        init="nndsvda",
        max_iter=100,
        random_state=0,
    )
    scores, seconds = common.seconds_of(model.fit_transform, X)
    tiny = np.finfo(np.float64).tiny
    return glmpca.Fit(
        lambda rows: np.log(np.maximum(scores[rows] @ model.components_, tiny)),
        model.n_iter_,
        seconds,
        seconds,
    )


def fits(settings):
    """Return {method: function of the counts}."""
    return {
        OURS: lambda X: glmpca.fit_skdeq(
            X, RANK, max_iter=MAX_ITER, device=settings.device, **glmpca.default_penalties()
        ),
        "NMF, Kullback-Leibler, 100 iterations": fit_nmf,
        "fastglmpca (PyPI), 40 s at most": lambda X: glmpca.fit_fastglmpca(
            X, RANK, time_limit=1.0 if settings.quick else 40.0
        ),
    }


def prepare(settings: Settings, method: str) -> Trial:
    """Make a method ready."""
    X = counts(*shape(settings))
    fit = fits(settings)[method]
    few = X[:100, np.asarray((X[:100] > 0).sum(axis=0)).ravel() > 2].tocsr()[:, :60]
    fit(few[np.diff(few.indptr) > 0])

    def run():
        fitted = fit(X)
        size = sum(array.nbytes for array in (X.data, X.indices, X.indptr))
        values = {
            "fit": fitted.seconds,
            "fit_and_scores": fitted.seconds_with_scores,
            "iterations": fitted.iterations,
            "data_memory": size / 2**20,
        }
        return values, fitted

    return Trial(run, lambda fitted: {"log_likelihood": glmpca.log_likelihood(X, fitted)})


def cases(settings: Settings) -> list[Case]:
    """Return the methods that take CSR."""
    n, p = shape(settings)
    return [
        Case(
            f"{n:,} x {p:,} CSR, 1 % filled, K = {RANK}",
            method,
            prepare,
            (method,),
            package="fastglmpca" if method.startswith("fastglmpca") else None,
        )
        for method in fits(settings)
    ]


def targets(results: list[Result]) -> list[Target]:
    """Judge the memory."""
    ours = results[0]
    if ours.failure:
        return []
    memory = ours.median("extra_memory")
    return [
        Target(
            f"{OURS}: peak memory above imports and data, {ours.data}",
            f"at most {MOST_MEMORY:g} MB",
            f"{memory:.0f} MB",
            memory <= MOST_MEMORY,
        )
    ]


WORKLOAD = Workload(
    name="sparse",
    title="Large sparse counts",
    note=(
        f"Poisson counts of rank {RANK}, made for the purpose: 4,000 x 10,000, or 100,000 x "
        "20,000 with --large; float32. Log-likelihoods of the training rows in float64, with all "
        "constants. ExpFamilyDEQ has its default penalties and the row totals as exposure."
    ),
    cases=cases,
    minutes=3,
    targets=targets,
    figure=partial(trade_off, quality="log_likelihood"),
)
