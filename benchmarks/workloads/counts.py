"""Poisson GLM-PCA of single-cell counts, against the packages of PyPI and the published run."""

from functools import partial

import numpy as np

from benchmarks import _common as common
from benchmarks import poisson_glmpca as glmpca
from benchmarks._figures import trade_off
from benchmarks._suite import Case, Result, Settings, Target, Trial, Workload

DENSE, SPARSE = "3,000 genes, dense, K = 2", "all genes, CSR, K = 10"
PUBLISHED = "R fastglmpca, as published"
TO_PUBLISHED = "ExpFamilyDEQ, to the published log-likelihood"
TO_PEER = "ExpFamilyDEQ, to that of fastglmpca (PyPI)"
PEER = "fastglmpca (PyPI), defaults"
FASTER = 8  # times, to a better likelihood
MAX_ITER = 500
PEERS = ("fastglmpca", "glmpca-fast")
# At most, for one fit to the genes of the published run, and to all.
DENSE_SECONDS, SPARSE_SECONDS, QUICK_SECONDS = 300.0, 30.0, 1.0

# --- the fits -----------------------------------------------------------------------------------


def fit_to_reach(log_likelihood, X, counts, device):
    """Return a fit that stops past a log-likelihood; the iterations are sought here, untimed."""
    needed = glmpca.iterations_to_reach(log_likelihood, X, counts, MAX_ITER)
    if needed is None:
        raise RuntimeError(f"did not reach {log_likelihood:,.2f} in {MAX_ITER} iterations")
    return partial(glmpca.fit_skdeq, X, 2, max_iter=needed, tol=0.0, device=device)


def fit_to_reach_peer(X, counts, device):
    """Return a fit that stops past the log-likelihood of the peer."""
    reached = glmpca.log_likelihood(counts, glmpca.fit_fastglmpca(X, 2))
    return fit_to_reach(reached, X, counts, device)


def fit_defaults(X, k, device):
    """Fit with the default penalties."""
    return glmpca.fit_skdeq(X, k, device=device, **glmpca.default_penalties())


def dense_fits(X, counts, published, device, limit):
    """Return {method: function that makes the fit ready}; `limit` is the peer's, in seconds."""
    fastglmpca = partial(glmpca.fit_fastglmpca, time_limit=limit)
    return {
        TO_PUBLISHED: lambda: fit_to_reach(published, X, counts, device),
        TO_PEER: lambda: fit_to_reach_peer(X, counts, device),
        "ExpFamilyDEQ, to convergence (tol=1e-7)": lambda: partial(
            glmpca.fit_skdeq, X, 2, max_iter=MAX_ITER, tol=1e-7, device=device
        ),
        "ExpFamilyDEQ, default penalties": lambda: partial(fit_defaults, X, 2, device),
        PEER: lambda: partial(fastglmpca, X, 2),
        "fastglmpca (PyPI), 3 factors": lambda: partial(fastglmpca, X, 3),
        "glmpca-fast, defaults": lambda: partial(glmpca.fit_glmpca_fast, X, 2),
        "glmpca-fast, 3 factors": lambda: partial(glmpca.fit_glmpca_fast, X, 3),
    }


def sparse_fits(counts, device, limit):
    """Return {method: function that makes the fit ready}; `limit` is the peer's, in seconds."""
    return {
        "ExpFamilyDEQ, default penalties": lambda: partial(fit_defaults, counts, 10, device),
        f"fastglmpca (PyPI), defaults, {SPARSE_SECONDS:g} s at most": lambda: partial(
            glmpca.fit_fastglmpca, counts, 10, time_limit=limit
        ),
    }


def package_of(method):
    """Return the distribution that a method needs, None for our own."""
    if method == TO_PEER:
        return "fastglmpca"
    return next((name for name in PEERS if method.startswith(name)), None)


# --- the cases ----------------------------------------------------------------------------------


def load(settings, dense):
    """Return (CSR counts, the published log-likelihood, published seconds)."""
    pbmc = common.load_pbmc(settings.data)
    progress = pbmc.reference_progress
    counts = pbmc.counts[:, pbmc.reference_genes] if dense else pbmc.counts
    published = progress[:, 1].max()
    if settings.quick:
        counts = counts[::8].tocsc()[:, ::8].tocsr()
        counts = counts[:, np.asarray(counts.sum(axis=0)).ravel() > 0]
        if dense:
            fit = glmpca.fit_skdeq(counts.toarray(), 2, max_iter=5)
            published = glmpca.log_likelihood(counts, fit)
    return counts.tocsr(), published, progress[:, 2].sum()


def prepare(settings: Settings, method: str, dense: bool) -> Trial:
    """Make a method ready for the dense genes or for all of them."""
    counts, published, _ = load(settings, dense)
    limit = QUICK_SECONDS if settings.quick else DENSE_SECONDS if dense else SPARSE_SECONDS
    if dense:
        fits = dense_fits(counts.toarray(), counts, published, settings.device, limit)
    else:
        fits = sparse_fits(counts, settings.device, limit)
    fit = fits[method]()

    def run():
        fitted = fit()
        values = {
            "fit": fitted.seconds,
            "fit_and_scores": fitted.seconds_with_scores,
            "iterations": fitted.iterations,
        }
        return values, fitted

    def judge(fitted):
        value = glmpca.log_likelihood(counts, fitted)
        against = {"against_published": value - published} if dense else {}
        return {"log_likelihood": value, **against}

    return Trial(run, judge)


def cases(settings: Settings) -> list[Case]:
    """Return the fits to the published genes, and to all genes."""
    return [
        Case(data, method, prepare, (method, dense), package_of(method))
        for data, dense, methods in (
            (DENSE, True, dense_fits(*[None] * 5)),
            (SPARSE, False, sparse_fits(*[None] * 3)),
        )
        for method in methods
    ]


def references(settings: Settings) -> list[Result]:
    """Return the published run, on its authors' machine."""
    if settings.quick:
        return []
    _, published, seconds = load(settings, dense=True)
    iterations = len(common.load_pbmc(settings.data).reference_progress)
    values = {"fit": [seconds], "log_likelihood": [published], "iterations": [iterations]}
    return [Result("counts", DENSE, PUBLISHED, values)]


def targets(results: list[Result]) -> list[Target]:
    """Compare with the package of PyPI."""
    done = {one.method: one for one in results if one.data == DENSE and not one.failure}
    made = []
    for method in (TO_PEER, TO_PUBLISHED):
        if not {method, PEER} <= done.keys():
            continue
        times = done[PEER].median("fit") / done[method].median("fit")
        gain = done[method].median("log_likelihood") - done[PEER].median("log_likelihood")
        made.append(
            Target(
                f"{method}, against {PEER}: time to fit, at a better log-likelihood",
                f"{FASTER} times faster",
                f"{times:.1f} times faster, log-likelihood {gain:+,.0f}",
                times >= FASTER and gain > 0,
            )
        )
    return made


WORKLOAD = Workload(
    name="counts",
    title="Single-cell counts",
    note=(
        "3,774 cells; Poisson with the size factors as offset, log-likelihoods in float64 with "
        "all constants from each method's own fitted mean. " + glmpca.PENALTY_NOTE + " The rows "
        "with default penalties have those instead. The published seconds are of its authors' "
        "machine."
    ),
    cases=cases,
    minutes=6,
    files=("pbmc_facs.npz",),
    references=references,
    targets=targets,
    figure=partial(trade_off, quality="log_likelihood"),
)
