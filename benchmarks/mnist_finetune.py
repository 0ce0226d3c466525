"""What fine-tuning the equilibrium adds to a classifier: MNIST, 60,000 x 784 binary, k = 64.

The same head of 100 ReLU units, trained by the same code, sits on the equilibrium trained with it,
with and without dropout, on the frozen equilibrium and on PCA; next to them a plain network with
one hidden layer, as wide as makes its parameters about as many, with scikit-learn's step size and
with the head's first. The steps of the heads and of the equilibrium become shorter from epoch to
epoch. The question is asked twice: with all labels, and with a stratified draw of few of them. The
features are fitted without labels on all training rows in either case; the plain network sees the
labelled rows alone.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

from skdeq import DEQClassifier, ExpFamilyDEQ

if not __package__:  # run as a file: this folder, and not its parent, is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import _common as common
from benchmarks._heads import train_head, train_network

N_COMPONENTS, N_CLASSES, STEP_SIZE, DROPOUT = 64, 10, 0.005, 0.5


@dataclass
class Result:
    """What one method did, one entry of each list per seed."""

    accuracy: list = field(default_factory=list)
    seconds: list = field(default_factory=list)
    n_parameters: int = 0


# --- the data -----------------------------------------------------------------------------------


def load(options):
    """Return MNIST with yes/no pixels as float32."""
    mnist = common.load_mnist(options.data)
    step = 30 if options.quick else 1
    mnist.X_train = (mnist.X_train[::step] > 127).astype(np.float32)
    mnist.X_test = (mnist.X_test[::step] > 127).astype(np.float32)
    mnist.y_train, mnist.y_test = (
        y[::step].astype(np.int64) for y in (mnist.y_train, mnist.y_test)
    )
    return mnist


def labelled_rows(y, n_labels, seed):
    """Draw the rows whose labels are known, stratified; None is all of them."""
    rows = np.arange(len(y))
    if n_labels is None:
        return rows
    return train_test_split(rows, train_size=n_labels, random_state=seed, stratify=y)[0]


# --- the methods --------------------------------------------------------------------------------


class HeadOnPCA:
    """The head of a DEQClassifier on the scores of a fitted PCA."""

    def __init__(self, pca, network, epochs):
        self.pca, self.network, self.epochs = pca, network, epochs

    def fit(self, X, y):
        """Train for all epochs, as the network does."""
        scores = self.pca.transform(X)
        *_, self.head = train_head(self.network, scores, y, N_CLASSES, self.epochs)
        self.coefs_, self.intercepts_ = self.head.coefs, self.head.intercepts
        return self

    def score(self, X, y):
        """Return the accuracy."""
        return np.mean(self.head(self.pca.transform(X)).argmax(axis=1) == y)


class Network:
    """A DEQClassifier whose steps become shorter from epoch to epoch."""

    def __init__(self, network, epochs):
        self.network, self.epochs = network, epochs

    def fit(self, X, y):
        """Train for all epochs."""
        classes = np.arange(N_CLASSES)
        *_, network = train_network(self.network, X, y, self.epochs, classes=classes)
        self.coefs_, self.intercepts_ = network.coefs_, network.intercepts_
        self.score = network.score
        return self


def methods(features, epochs, seed):
    """Return {label: (classifier, arrays of its features)}."""
    backbone, pca = features["equilibrium"], features["PCA"]
    tuned = DEQClassifier(backbone, learning_rate=STEP_SIZE, random_state=seed)
    # A clone forgets that its backbone is fitted.
    dropping = clone(tuned).set_params(dropout=DROPOUT, backbone=backbone)
    frozen = clone(tuned).set_params(fine_tune=False, backbone=backbone)
    encoder = [backbone.loadings_, backbone.intercept_]
    made = {
        f"fine-tuned equilibrium, dropout={DROPOUT}": (Network(dropping, epochs), encoder),
        "fine-tuned equilibrium": (Network(tuned, epochs), encoder),
        "frozen equilibrium": (Network(frozen, epochs), encoder),
        "PCA": (HeadOnPCA(pca, clone(tuned), epochs), [pca.components_, pca.mean_]),
    }
    # Every method has all its epochs, whether or not the loss still falls.
    schedule = {"max_iter": epochs, "tol": 0.0, "n_iter_no_change": epochs, "random_state": seed}
    width = plain_width(backbone.n_features_in_, tuned.head_layer_sizes[0])
    for step in (0.001, STEP_SIZE):
        plain = MLPClassifier(
            width, learning_rate_init=step, batch_size=tuned.batch_size, **schedule
        )
        made[f"plain network, {width} units, step {step:g}"] = plain, []
    return made


def plain_width(n_features, head_units):
    """Return the hidden units of a plain network with about as many parameters."""
    backbone = n_features * (N_COMPONENTS + 1)
    head = head_units * (N_COMPONENTS + 1) + N_CLASSES * (head_units + 1)
    return round((backbone + head - N_CLASSES) / (n_features + 1 + N_CLASSES))


# --- the tables ---------------------------------------------------------------------------------


def fit_features(mnist):
    """Fit what needs no labels; return {name: model} and {name: seconds}."""
    models = {
        "equilibrium": ExpFamilyDEQ(N_COMPONENTS, family="bernoulli", max_iter=10, random_state=0),
        "PCA": PCA(N_COMPONENTS, random_state=0),
    }
    seconds = {
        name: common.seconds_of(model.fit, mnist.X_train)[1] for name, model in models.items()
    }
    return models, seconds


def compare(mnist, features, n_labels, epochs, options):
    """Return the table rows of one number of labels."""
    results = {}
    for seed in range(options.seeds):
        rows = labelled_rows(mnist.y_train, n_labels, seed)
        X, y = mnist.X_train[rows], mnist.y_train[rows]
        for name, (classifier, encoder) in methods(features, epochs, seed).items():
            _, seconds = common.seconds_of(classifier.fit, X, y)
            result = results.setdefault(name, Result())
            result.accuracy.append(classifier.score(mnist.X_test, mnist.y_test))
            result.seconds.append(seconds)
            arrays = (*encoder, *classifier.coefs_, *classifier.intercepts_)
            result.n_parameters = sum(array.size for array in arrays)
    return [
        [
            f"{len(rows):,}",
            epochs,
            name,
            common.spread(result.accuracy, 4),
            common.spread(result.seconds),
            f"{result.n_parameters:,}",
        ]
        for name, result in results.items()
    ]


def main():
    """Run with all labels and with few."""
    parser = common.parser(__doc__, data=True)
    for name, default, what in (
        ("epochs", 8, "epochs with all labels"),
        ("labels", 1000, "rows with a label where those are few"),
        ("few-epochs", 30, "epochs with few labels"),
        ("seeds", 1, "draws of labelled rows, first weights and minibatches"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{what} (default: %(default)s)"
        )
    options = parser.parse_args()
    if options.quick:
        options.epochs, options.few_epochs = min(options.epochs, 2), min(options.few_epochs, 5)
        options.labels = min(options.labels, 300)
    mnist = load(options)
    parts = [common.environment()]
    with common.without_convergence_warnings():
        # The first optimiser of a process makes torch load its compiler, which takes seconds: a
        # tiny fit pays for that, and no timed one.
        DEQClassifier(max_iter=1).fit(mnist.X_train[:100], mnist.y_train[:100])
        features, unsupervised = fit_features(mnist)
        table = [
            *compare(mnist, features, None, options.epochs, options),
            *compare(mnist, features, options.labels, options.few_epochs, options),
        ]
    parts.append(
        f"{len(mnist.X_train):,} training rows for the features, fitted once without labels: "
        f"{unsupervised['equilibrium']:.1f} s for the equilibrium, {unsupervised['PCA']:.1f} s "
        f"for PCA. The seconds below are the training with labels, the latents of its rows "
        f"included. Accuracy on {len(mnist.X_test):,} test rows after the last epoch"
        + (f"; median (min-max) of {options.seeds} seeds." if options.seeds > 1 else ".")
    )
    header = ["labels", "epochs", "features", "test accuracy", "seconds", "parameters"]
    parts.append(common.table(header, table))
    common.publish("\n\n".join(parts), options)


if __name__ == "__main__":
    main()
