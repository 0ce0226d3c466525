"""Principal components of yes/no data, against the logistic PCA of PyPI."""

from functools import partial

import numpy as np
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split

from benchmarks import _common as common
from benchmarks._figures import trade_off
from benchmarks._suite import Case, Settings, Trial, Workload
from benchmarks.implicit_em.measures import probe_accuracy
from benchmarks.workloads.reduction import iterations, stop_after, warm_up
from skdeq import ExpFamilyDEQ

DIGITS, MNIST = "digits, 1,797 x 64, k = 10", "MNIST, 3,000 x 784, k = 16"
HIDDEN = 0.2  # share of the test entries that are hidden and then predicted
LEAST = 1e-6  # a predicted probability is kept so far off 0 and 1, which may be wrong


def load_data(name, settings):
    """Return (training rows, their classes, test rows, their classes), entries 0 and 1."""
    if name == DIGITS:
        X, y = load_digits(return_X_y=True)
        X = (X > 7).astype(np.float32)
        parts = train_test_split(X, y, test_size=1 / 3, random_state=0, stratify=y)
        return parts[0], parts[2], parts[1], parts[3]
    mnist = common.load_mnist(settings.data)
    n_train, n_test = (200, 100) if settings.quick else (3000, 1000)
    X_train, X_test = (
        (X > 127).astype(np.float32) for X in (mnist.X_train[:n_train], mnist.X_test[:n_test])
    )
    return X_train, mnist.y_train[:n_train], X_test, mnist.y_test[:n_test]


def models(k, device):
    """Return {method: unfitted model}; logisticpca is imported only where it is used."""

    def logistic_pca():
        from logisticpca import LogisticPCA

        return LogisticPCA(k)

    return {
        "PCA": lambda: PCA(k, random_state=0),
        "logisticpca (PyPI)": logistic_pca,
        "ExpFamilyDEQ, Bernoulli": lambda: ExpFamilyDEQ(
            k, family="bernoulli", device=device, random_state=0
        ),
    }


def probabilities_of_hidden(model, X, hidden):
    """Predict the entries of the mask from the rest of their rows."""
    if isinstance(model, ExpFamilyDEQ):
        return model.inverse_transform(model.transform(np.where(hidden, np.nan, X)))[hidden]
    if isinstance(model, PCA):
        # PCA takes no gaps: they get the mean of their column.
        means = np.broadcast_to(model.mean_, X.shape)
        codes = model.transform(np.where(hidden, means, X))
        return model.inverse_transform(codes)[hidden]
    return model.inverse_transform(model.transform_partial(X, ~hidden))[hidden]


def prepare(settings: Settings, data: str, method: str) -> Trial:
    """Make a method ready for a data set."""
    X, y, X_test, y_test = load_data(data, settings)
    k = 16 if data == MNIST else 10
    model = models(k, settings.device)[method]()
    if settings.quick:
        stop_after(model, 5)
    warm_up(model, X)
    hidden = np.random.default_rng(0).random(X_test.shape) < HIDDEN

    def run():
        _, fit = common.seconds_of(model.fit, X)
        codes, transform = common.seconds_of(model.transform, X_test)
        return {"fit": fit, "transform": transform, **iterations(model)}, codes

    def judge(codes):
        truth = X_test[hidden]
        predicted = probabilities_of_hidden(model, X_test, hidden).astype(np.float64)
        predicted = predicted.clip(LEAST, 1 - LEAST)
        likelihood = np.log(np.where(truth > 0, predicted, 1 - predicted)).mean()
        accuracy = probe_accuracy(model.transform(X), y, codes, y_test)
        return {"entry_log_likelihood": likelihood, "probe_accuracy": accuracy}

    return Trial(run, judge)


def cases(settings: Settings) -> list[Case]:
    """Return every method on the digits and, where it is at hand, on MNIST."""
    mnist = settings.data is not None and (settings.data / "mnist.npz").is_file()
    return [
        Case(data, method, prepare, (data, method), package(method))
        for data in ([DIGITS, MNIST] if mnist else [DIGITS])
        for method in models(1, settings.device)
    ]


def package(method):
    """Return the distribution that a method needs."""
    return "logisticpca" if method.startswith("logisticpca") else None


WORKLOAD = Workload(
    name="binary",
    title="Yes/no data",
    note=(
        "scikit-learn's digits (> 7 of 16) and, with --data, MNIST (> 127); defaults, transform "
        "of the test rows (599; 1,000). The log-likelihood is that of a fifth of the test entries "
        "drawn at random and hidden: each method predicts them from the rest of their rows, "
        "logisticpca by its transform_partial, PCA with the mean in the gaps. Predictions are "
        f"kept {LEAST:g} off 0 and 1."
    ),
    cases=cases,
    minutes=2,
    figure=partial(trade_off, quality="entry_log_likelihood"),
)
