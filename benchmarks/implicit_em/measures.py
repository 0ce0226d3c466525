"""Data, settings and measures of the encoder's tables."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks import _common as common
from skdeq import ImplicitEMEncoder
from skdeq._precondition import Preconditioner

N_COMPONENTS = 64
BATCH_SIZE = 128
DEFAULT_EPOCHS = 10  # of the estimator's own setting; the published runs take --epochs
ACTIVE = 0.01  # an activation of at most this size counts as zero


def load(options):
    """Return MNIST with pixels as float32 in [0, 1]."""
    mnist = common.load_mnist(options.data)
    if options.quick:
        mnist.X_train, mnist.y_train = mnist.X_train[::20], mnist.y_train[::20]
        mnist.X_test, mnist.y_test = mnist.X_test[::10], mnist.y_test[::10]
    mnist.X_train = as_floats(mnist.X_train)
    mnist.X_test = as_floats(mnist.X_test)
    return mnist


def in_double(mnist):
    """Return the same in float64."""
    wide = {"X_train": mnist.X_train.astype(float), "X_test": mnist.X_test.astype(float)}
    return SimpleNamespace(**{**vars(mnist), **wide})


def as_floats(pixels):
    """Scale pixels to [0, 1] without a float64 copy of them."""
    return np.divide(pixels, 255, dtype=np.float32)


def encoder(random_state, **options):
    """Make the estimator with K = 64."""
    return ImplicitEMEncoder(N_COMPONENTS, random_state=random_state, **options)


def fit_default(X, seed, epochs=DEFAULT_EPOCHS):
    """Fit ours with its defaults, but for the epochs."""
    return encoder(seed, max_iter=epochs).fit(X)


def rows_as_they_come():
    """Let fits in this context take rows as they come, with a bias as of torch.nn.Linear."""

    def leave(rows, sample_weight):
        zero = torch.zeros(rows.shape[1], dtype=torch.float64)
        return Preconditioner(zero, 1.0, torch.ones_like(zero, dtype=torch.bool), 1.0)

    return mock.patch("skdeq._encoder_base.fit_preconditioner", leave)


def probe_accuracy(train, y_train, test, y_test):
    """Return the accuracy, in %, of a logistic regression on standardised features."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    return 100 * probe.fit(train, y_train).score(test, y_test)


def judge(model, mnist):
    """Return (probe accuracy in %, density, seconds to transform the training rows)."""
    train, seconds = common.seconds_of(model.transform, mnist.X_train)
    test = model.transform(mnist.X_test)
    accuracy = probe_accuracy(train, mnist.y_train, test, mnist.y_test)
    return accuracy, float(np.mean(np.abs(test) > ACTIVE)), seconds


def redundancy(activations):
    """Return the sum of the squared correlations between distinct columns."""
    centred = activations - activations.mean(axis=0, dtype=np.float64)
    norms = np.linalg.norm(centred, axis=0)
    unit = centred / np.where(norms > 0, norms, 1)
    correlation = unit.T @ unit
    np.fill_diagonal(correlation, 0)
    return float((correlation**2).sum())


def mean_and_sd(values, digits=2):
    """Format one figure per seed as `mean +- standard deviation`."""
    values = list(values)
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} +- {np.std(values, ddof=1):.{digits}f}"


def seeds_of(options, published):
    """Return the seeds 1, 2, ...: as many as asked for, or as the paper has."""
    return range(1, 1 + (options.seeds or published))


def section(title, note, *tables):
    """Put the parts of a result under one heading."""
    return "\n\n".join([f"### {title}", note, *tables])
