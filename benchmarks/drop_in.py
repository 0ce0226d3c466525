"""Held-out accuracy of a linear classifier on k components: ExpFamilyDEQ in the place of PCA.

Every method is fitted without the labels on the training part of a split; its scores are
standardised, for all methods alike, and classified by `LogisticRegression(max_iter=1000)`.
"""

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.decomposition import NMF, PCA, FactorAnalysis
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import RepeatedStratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from skdeq import ExpFamilyDEQ
from skdeq.families import Binomial

if not __package__:  # run as a file: this folder, and not its parent, is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import _common as common

N_VARIABLE = 1000  # genes


@dataclass
class Task:
    """One data set, its splits, and what is compared on it."""

    name: str
    X: np.ndarray
    y: np.ndarray
    splits: list  # of (training rows, test rows)
    n_components: int
    models: dict[str, dict]  # label -> options of ExpFamilyDEQ
    counts: bool  # log1p means something
    cells: bool = False  # so does the normalisation of single-cell analysis


@dataclass
class Result:
    """What one method did on one task."""

    values: list = field(default_factory=list)  # accuracy per fold; of one split, hit per test row
    seconds: list = field(default_factory=list)  # of fitting and transforming, per split


# --- the methods --------------------------------------------------------------------------------


def per_ten_thousand(X):
    """Scale the rows to a total of 10,000 (CP10k)."""
    return X * (1e4 / X.sum(axis=1, keepdims=True))


def pca_variants(task):
    """Return {label: factory} of the ways people prepare such data for PCA.

    No log1p for yes/no data: it would only multiply them by log 2.
    """

    def pca(*steps):
        return make_pipeline(*steps, PCA(task.n_components, random_state=0))

    variants = {"PCA": pca, "PCA after StandardScaler": lambda: pca(StandardScaler())}
    if task.counts:
        variants["PCA after log1p"] = lambda: pca(FunctionTransformer(np.log1p))
    if task.cells:
        variants["PCA after CP10k, log1p"] = lambda: pca(
            FunctionTransformer(per_ten_thousand), FunctionTransformer(np.log1p)
        )
    return variants


def other_methods(task):
    """Return {label: factory} of scikit-learn's other linear decompositions."""
    k = task.n_components
    return {
        "NMF": lambda: NMF(k, init="nndsvda", random_state=0),
        "FactorAnalysis": lambda: FactorAnalysis(k, random_state=0),
    }


def deq_methods(task):
    """Return {label: factory} of ExpFamilyDEQ with the families that suit the data."""

    def factory(options) -> Callable:
        return lambda: ExpFamilyDEQ(task.n_components, random_state=0, **options)

    return {label: factory(options) for label, options in task.models.items()}


# --- the data sets ------------------------------------------------------------------------------


def digits_tasks(options):
    """Return the tasks on scikit-learn's digits: binarised, and as counts of 0..16."""
    X, y = load_digits(return_X_y=True)
    X = X.astype(np.float32)
    splits = repeated_folds(X, y, 1 if options.quick else 2)
    return [
        Task(
            "digits binarised (> 7), k = 10",
            (X > 7).astype(np.float32),
            y,
            splits,
            10,
            {"ExpFamilyDEQ bernoulli": {"family": "bernoulli"}},
            counts=False,
        ),
        Task(
            "digits as counts, k = 10",
            X,
            y,
            splits,
            10,
            {
                "ExpFamilyDEQ binomial(16)": {"family": Binomial(n_trials=16)},
                "ExpFamilyDEQ poisson": {"family": "poisson"},
            },
            counts=True,
        ),
    ]


def most_variable(counts):
    """Return the genes whose variance is the largest multiple of their mean."""
    mean = np.asarray(counts.mean(axis=0)).ravel()
    square = np.asarray(counts.multiply(counts).mean(axis=0)).ravel()
    ratio = (square - mean**2) / np.where(mean > 0, mean, 1.0)
    return np.sort(np.argsort(-ratio, kind="stable")[:N_VARIABLE])


def pbmc_tasks(options):
    """Return the tasks on single-cell counts of the 3,000 reference genes."""
    return cell_tasks(options, "pbmc", lambda pbmc: pbmc.reference_genes)


def variable_tasks(options):
    """Return the tasks on single-cell counts of the genes that vary most."""
    return cell_tasks(options, "pbmc, variable genes,", lambda pbmc: most_variable(pbmc.counts))


def cell_tasks(options, name, choose):
    """Return the tasks on single-cell counts of chosen genes: two sets of classes."""
    pbmc = common.load_pbmc(options.data)
    kept = slice(None, None, 8 if options.quick else 1)
    X = pbmc.counts[:, choose(pbmc)][kept].toarray()
    poisson = {"ExpFamilyDEQ poisson": {"family": "poisson", "exposure": "total"}}
    return [
        Task(
            f"{name} {target}, k = 10",
            X,
            y[kept],
            repeated_folds(X, y[kept], 1),
            10,
            poisson,
            counts=True,
            cells=True,
        )
        for target, y in (("subpopulation", pbmc.subpopulation), ("celltype", pbmc.celltype))
    ]


def mnist_tasks(options):
    """Return the task on binarised MNIST, with its own split."""
    mnist = common.load_mnist(options.data)
    n_train = len(mnist.X_train)
    train, test = np.arange(n_train), np.arange(n_train, n_train + len(mnist.X_test))
    if options.quick:
        train, test = train[:: max(1, n_train // 1000)], test[:: max(1, len(test) // 500)]
    return [
        Task(
            "MNIST binarised (> 127), k = 50",
            (np.vstack([mnist.X_train, mnist.X_test]) > 127).astype(np.float32),
            np.concatenate([mnist.y_train, mnist.y_test]),
            [(train, test)],
            50,
            {"ExpFamilyDEQ bernoulli": {"family": "bernoulli"}},
            counts=False,
        )
    ]


def repeated_folds(X, y, n_repeats):
    """Return the splits of a repeated stratified 5-fold cross-validation."""
    folds = RepeatedStratifiedKFold(n_splits=5, n_repeats=n_repeats, random_state=0)
    return list(folds.split(X, y))


DATA_SETS = {
    "digits": digits_tasks,
    "pbmc": pbmc_tasks,
    "variable": variable_tasks,
    "mnist": mnist_tasks,
}

# --- the comparison -----------------------------------------------------------------------------


def scores_of(method, X_train, X_test):
    """Fit on the training rows and return the scores of both parts."""
    return method.fit_transform(X_train), method.transform(X_test)


def hits(train_scores, y_train, test_scores, y_test):
    """Tell which test rows the standardised scores classify correctly."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return classifier.fit(train_scores, y_train).predict(test_scores) == y_test


def run_task(task):
    """Return {label: Result}; the methods take turns within every split."""
    methods = {**pca_variants(task), **other_methods(task), **deq_methods(task)}
    results = {label: Result() for label in methods}
    for train, test in task.splits:
        X_train, X_test = task.X[train], task.X[test]
        for label, factory in methods.items():
            (train_scores, test_scores), seconds = common.seconds_of(
                scores_of, factory(), X_train, X_test
            )
            hit = hits(train_scores, task.y[train], test_scores, task.y[test])
            results[label].seconds.append(seconds)
            results[label].values.extend([hit.mean()] if len(task.splits) > 1 else hit)
    return results


def mean_and_error(values):
    """Return the mean and its standard error; both kinds of `Result.values` obey it."""
    values = np.asarray(values, dtype=float)
    return values.mean(), values.std(ddof=1) / np.sqrt(len(values))


def rows_of(task, results):
    """Return (table rows, number of ExpFamilyDEQ rows at least as good as the best PCA)."""
    accuracy = {label: mean_and_error(result.values)[0] for label, result in results.items()}
    best = max(accuracy.values())
    best_pca = max(pca_variants(task), key=accuracy.get)
    rows, n_good = [], 0
    for label, result in results.items():
        mean, error = mean_and_error(result.values)
        shown = f"{100 * mean:.2f} +- {100 * error:.2f}"
        against_pca = ""
        if label in task.models:
            n_good += mean >= accuracy[best_pca]
            # Paired, as both saw the same splits.
            gain, gain_error = mean_and_error(
                np.subtract(result.values, results[best_pca].values, dtype=float)
            )
            against_pca = f"{100 * gain:+.2f} +- {100 * gain_error:.2f}"
        rows.append(
            [
                task.name,
                label,
                f"**{shown}**" if mean == best else shown,
                against_pca,
                common.spread(result.seconds, 3),
            ]
        )
    return rows, n_good


def main():
    """Run the data sets asked for."""
    parser = common.parser(__doc__, data=True)
    parser.add_argument(
        "--only", nargs="+", choices=DATA_SETS, default=list(DATA_SETS), help="default: all"
    )
    options = parser.parse_args()
    rows, n_good, n_compared = [], 0, 0
    with warnings.catch_warnings():
        # Stopping at the default max_iter is part of a default; the accuracy shows if it hurts.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for name in options.only:
            for task in DATA_SETS[name](options):
                task_rows, good = rows_of(task, run_task(task))
                rows += task_rows
                n_good += good
                n_compared += len(task.models)
    header = ["data", "method", "accuracy, %", "against the best PCA", "fit + transform, s"]
    note = (
        "Accuracy: mean and standard error over the folds (digits: 2 x 5, pbmc: 5; MNIST: "
        "over the test rows); best in bold. Against the best PCA: paired difference and its "
        "standard error. Seconds: median (min-max) over the splits."
    )
    verdict = (
        f"ExpFamilyDEQ is at least as good as the best PCA variant in {n_good} of {n_compared} "
        "comparisons."
    )
    parts = [common.environment(), note, common.table(header, rows), verdict]
    common.publish("\n\n".join(parts), options)


if __name__ == "__main__":
    main()
