"""Poisson GLM-PCA on single-cell counts, against R fastglmpca and two packages from PyPI.

Every log-likelihood is computed here, in float64 with all constants, from the method's own fitted
mean. Table 1: the 3,000 genes of the published run of R fastglmpca, dense, K = 2. Table 2: all
genes, sparse, K = 10, each method in a process of its own so that its memory is its own.
"""

import sys
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import gammaln
from sklearn.utils import gen_batches

from skdeq import ExpFamilyDEQ

if not __package__:  # run as a file: this folder, and not its parent, is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import _common as common

PENALTY = 1e-5  # on the summed objective: next to none, as maximum likelihood has none
PENALTY_NOTE = (
    "ExpFamilyDEQ: alpha=1e-5, weight_decay=1e-5/n, exposure='total', float32. "
    "fastglmpca (PyPI) has no fitted gene intercept and glmpca-fast no size factors, so each is "
    "also given a third factor to make up for that."
)


@dataclass
class Fit:
    """One fitted model: its linear predictor per slice of rows, and what it cost."""

    linear_predictor: Callable[[slice], np.ndarray]
    iterations: int
    seconds: float  # of fitting
    seconds_with_scores: float  # of fitting and the training rows' scores


def log_likelihood(counts, fit):
    """Return the Poisson log-likelihood of CSR `counts`, float64, all constants kept."""
    total = -gammaln(counts.data.astype(np.float64) + 1).sum()
    for rows in gen_batches(counts.shape[0], 256):
        eta = np.asarray(fit.linear_predictor(rows), dtype=np.float64)
        total += (counts[rows].toarray() * eta).sum() - np.exp(eta).sum()
    return total


# --- the methods --------------------------------------------------------------------------------


def fit_skdeq(X, n_components, **options):
    """Fit ExpFamilyDEQ, by default with next to no penalty."""
    options = {"alpha": PENALTY, "weight_decay": PENALTY / X.shape[0], **options}
    model = ExpFamilyDEQ(
        n_components, family="poisson", exposure="total", random_state=0, **options
    )
    with common.without_convergence_warnings():
        _, seconds = common.seconds_of(model.fit, X)
        scores, scoring_seconds = common.seconds_of(model.transform, X)
    totals = np.asarray(X.sum(axis=1), dtype=np.float64).ravel()
    offset = np.log(totals / totals.mean())[:, None]
    scores = scores.astype(np.float64)
    return Fit(
        lambda rows: model.natural_parameters(scores[rows]) + offset[rows],
        model.n_iter_,
        seconds,
        seconds + scoring_seconds,
    )


def default_penalties():
    """Return the penalties that ExpFamilyDEQ has by default."""
    defaults = ExpFamilyDEQ().get_params()
    return {name: defaults[name] for name in ("alpha", "weight_decay")}


def fit_fastglmpca(X, n_components, tol=1e-4, time_limit=600.0):
    """Fit fastglmpca from PyPI; `time_limit` seconds end it after the iteration they fall in."""
    from fastglmpca import PoissonGLMPCA

    start = time.perf_counter()

    def until_time_limit(iterations):
        for iteration in iterations:
            if time.perf_counter() - start > time_limit:
                return
            yield iteration

    with warnings.catch_warnings(), global_generators_kept():
        warnings.simplefilter("ignore")
        model = PoissonGLMPCA(n_pcs=n_components, tol=tol, device="cpu", progress_bar=False)
        model.fit(X, custom_iterator=until_time_limit)
    seconds = time.perf_counter() - start
    scores, loadings = model.X.astype(np.float64), model.B.astype(np.float64)
    row_offset = model.row_offset.numpy().astype(np.float64)[:, None]
    gene_offset = model.col_offset.numpy().astype(np.float64)
    return Fit(
        # The package clips its linear predictor like this wherever it takes the exponential.
        lambda rows: np.clip(scores[rows] @ loadings.T + row_offset[rows] + gene_offset, -20, 20),
        len(model.loglik_history_) - 1,
        seconds,
        seconds,
    )


def fit_glmpca_fast(X, n_components):
    """Fit glmpca-fast with its defaults."""
    from glmpca_fast import fit_poisson

    result, seconds = common.seconds_of(fit_poisson, X, n_components)
    scores, loadings, intercept = (
        result[name].astype(np.float64) for name in ("factors", "loadings", "intercept")
    )
    return Fit(
        lambda rows: scores[rows] @ loadings.T + intercept, result["n_iter"], seconds, seconds
    )


@contextmanager
def global_generators_kept():
    """Restore numpy's and torch's global generators, which fastglmpca reseeds."""
    import torch

    numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)


# --- table 1 ------------------------------------------------------------------------------------


def iterations_to_reach(target, X, counts, limit):
    """Find the smallest `max_iter` whose fresh fit has at least the log-likelihood `target`."""
    return common.smallest_passing(
        lambda max_iter: (
            log_likelihood(counts, fit_skdeq(X, 2, max_iter=max_iter, tol=0.0)) >= target
        ),
        guess=8,
        limit=limit,
    )


def methods_of_table_1(X, counts, published, options):
    """Return {label: task} of the fits to be timed."""
    tasks = {}
    needed = iterations_to_reach(published, X, counts, options.max_iter)
    if needed is not None:
        tasks[f"ExpFamilyDEQ, to the published log-likelihood (max_iter={needed})"] = lambda: (
            fit_skdeq(X, 2, max_iter=needed, tol=0.0)
        )
    tasks[f"ExpFamilyDEQ, to convergence (tol={options.tol:g})"] = lambda: fit_skdeq(
        X, 2, max_iter=options.max_iter, tol=options.tol
    )
    limit = options.peer_seconds
    tasks["fastglmpca (PyPI), defaults"] = lambda: fit_fastglmpca(X, 2, time_limit=limit)
    tasks["fastglmpca (PyPI), tol=1e-7"] = lambda: fit_fastglmpca(X, 2, 1e-7, limit)
    tasks["fastglmpca (PyPI), 3 factors"] = lambda: fit_fastglmpca(X, 3, time_limit=limit)
    tasks["glmpca-fast, defaults"] = lambda: fit_glmpca_fast(X, 2)
    tasks["glmpca-fast, 3 factors"] = lambda: fit_glmpca_fast(X, 3)
    return tasks


def table_1(pbmc, options):
    """Run the published setting: 3,000 genes, K = 2."""
    counts = pbmc.counts[:, pbmc.reference_genes].tocsr()
    progress = pbmc.reference_progress
    published, published_seconds = progress[:, 1].max(), progress[:, 2].sum()
    if options.quick:
        counts = counts[::8]
        published = log_likelihood(counts, fit_skdeq(counts.toarray(), 2, max_iter=5))
    X = counts.toarray()
    fits = {}
    # Repeated here, not by `common.alternate`: a fit reports two times of its own.
    tasks = methods_of_table_1(X, counts, published, options)
    for _ in range(options.repeats):
        for name, task in tasks.items():
            fits.setdefault(name, []).append(task())
    reached = any("to the published" in name for name in fits)
    rows = [
        [
            "R fastglmpca, as published",
            len(progress),
            f"{published:,.2f}",
            "",
            f"{published_seconds:.1f} (its authors' machine)",
            "",
        ]
    ]
    for name, runs in fits.items():
        value = log_likelihood(counts, runs[-1])
        rows.append(
            [
                name,
                runs[-1].iterations,
                f"{value:,.2f}",
                f"{value - published:+,.0f}",
                common.spread(run.seconds for run in runs),
                common.spread(run.seconds_with_scores for run in runs),
            ]
        )
    lines = [
        f"### {X.shape[0]:,} cells x {X.shape[1]:,} genes, dense, K = 2",
        "",
        f"Seconds: median (min-max) of {options.repeats} alternated runs.",
        "",
        common.table(
            [
                "method",
                "iterations",
                "log-likelihood",
                "against published",
                "seconds to fit",
                "and the scores of its rows",
            ],
            rows,
        ),
    ]
    if not reached:
        lines += ["", f"ExpFamilyDEQ did not reach {published:,.2f} in {options.max_iter}."]
    return "\n".join(lines)


# --- table 2 ------------------------------------------------------------------------------------

# Module-level, because a fresh process finds them by name.


def sparse_skdeq_like_table_1(X, options):
    """Fit with next to no penalty."""
    return fit_skdeq(X, 10)


def sparse_skdeq_defaults(X, options):
    """Fit with the default penalties."""
    return fit_skdeq(X, 10, **default_penalties())


def sparse_fastglmpca(X, options):
    """Fit with the defaults, up to the time limit."""
    return fit_fastglmpca(X, 10, time_limit=options.peer_seconds)


def measure(method, options):
    """Fit `method` to all genes here; return (iterations, log-likelihood, seconds, extra MB)."""
    counts = common.load_pbmc(options.data).counts
    if options.quick:
        counts = counts[::8, ::8]
        counts = counts[np.asarray(counts.sum(axis=1)).ravel() > 0]
    # The imports' memory and the thread pools are not the fit's: a tiny fit brings them in.
    method(counts[:60, np.asarray(counts[:60].sum(axis=0)).ravel() > 20], options)
    with common.PeakMemory() as memory:
        fit = method(counts, options)
    return (
        fit.iterations,
        log_likelihood(counts, fit),
        fit.seconds,
        fit.seconds_with_scores,
        memory.extra_mb,
    )


def table_2(pbmc, options):
    """Run all genes as CSR, K = 10, each method once in a fresh process."""
    rows = []
    for label, method in {
        "ExpFamilyDEQ, penalties as above": sparse_skdeq_like_table_1,
        "ExpFamilyDEQ, default penalties": sparse_skdeq_defaults,
        f"fastglmpca (PyPI), defaults, {options.peer_seconds:g} s at most": sparse_fastglmpca,
    }.items():
        iterations, value, seconds, with_scores, megabytes = common.in_fresh_process(
            measure, method, options
        )
        rows.append(
            [
                label,
                iterations,
                f"{value:,.0f}",
                f"{seconds:.1f}",
                f"{with_scores:.1f}",
                f"{megabytes:,.0f}",
            ]
        )
    n_cells, n_genes = pbmc.counts.shape
    header = [
        "method",
        "iterations",
        "log-likelihood",
        "seconds to fit",
        "and the scores of its rows",
        "peak extra memory, MB",
    ]
    return "\n".join(
        [
            f"### {n_cells:,} cells x {n_genes:,} genes, sparse, K = 10",
            "",
            f"The counts themselves are {pbmc.counts.nnz * 8 / 2**20:.0f} MB; "
            f"as a dense float32 array they would be {n_cells * n_genes * 4 / 2**20:.0f} MB.",
            "",
            common.table(header, rows),
        ]
    )


def main():
    """Run both tables."""
    parser = common.parser(__doc__, data=True, repeats=3)
    parser.add_argument(
        "--max-iter", type=int, default=500, help="of ExpFamilyDEQ (default: %(default)s)"
    )
    parser.add_argument(
        "--tol", type=float, default=1e-8, help="of the run to convergence (default: %(default)s)"
    )
    parser.add_argument(
        "--peer-seconds",
        type=float,
        default=600.0,
        help="time limit of one fastglmpca run (default: %(default)s)",
    )
    parser.add_argument("--table", type=int, choices=(1, 2), help="run only this table")
    options = parser.parse_args()
    pbmc = common.load_pbmc(options.data)
    parts = [common.environment(("fastglmpca", "glmpca-fast")), PENALTY_NOTE]
    if options.table != 2:
        parts.append(table_1(pbmc, options))
    if options.table != 1:
        parts.append(table_2(pbmc, options))
    common.publish("\n\n".join(parts), options)


if __name__ == "__main__":
    main()
