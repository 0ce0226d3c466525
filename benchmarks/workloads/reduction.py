"""Dimension reduction of images: what the features cost and what they are good for."""

from functools import partial

import numpy as np
from sklearn.base import clone
from sklearn.decomposition import (
    NMF,
    PCA,
    FactorAnalysis,
    IncrementalPCA,
    MiniBatchDictionaryLearning,
    MiniBatchNMF,
)

from benchmarks import _common as common
from benchmarks._figures import trade_off
from benchmarks._suite import Case, Settings, Trial, Workload
from benchmarks.implicit_em.measures import DEFAULT_EPOCHS, as_floats, probe_accuracy
from benchmarks.workloads._autograd import AutogradEncoder, JointAdam, bernoulli_objective
from skdeq import ExpFamilyDEQ, ImplicitEMEncoder

BERNOULLI, CONTINUOUS = "ExpFamilyDEQ, Bernoulli", "ExpFamilyDEQ, continuous Bernoulli"
JOINT = "Adam on W, b and Z jointly, autograd"
# Densities of the same data, which may be compared.
WITH_DENSITY = (
    "PCA",
    "FactorAnalysis",
    "ExpFamilyDEQ, Gaussian",
    CONTINUOUS,
)
# Minutes each on all rows: those are for --large.
LONG = ("MiniBatchDictionaryLearning", CONTINUOUS, JOINT)


def models(k, device):
    """Return {method: unfitted model} with k components."""
    deq = partial(ExpFamilyDEQ, k, device=device, random_state=0)
    return {
        "PCA": PCA(k, random_state=0),
        "IncrementalPCA": IncrementalPCA(k),
        "NMF": NMF(k, init="nndsvda", random_state=0),
        "MiniBatchNMF": MiniBatchNMF(k, random_state=0),
        "FactorAnalysis": FactorAnalysis(k, random_state=0),
        "MiniBatchDictionaryLearning": MiniBatchDictionaryLearning(k, random_state=0),
        "ExpFamilyDEQ, Gaussian": deq(family="gaussian"),
        BERNOULLI: deq(family="bernoulli"),
        CONTINUOUS: deq(family="continuous_bernoulli"),
        JOINT: JointAdam(k),
        "ImplicitEMEncoder": ImplicitEMEncoder(
            k, max_iter=DEFAULT_EPOCHS, device=device, random_state=0
        ),
        "the encoder's loop by autograd": AutogradEncoder(k),
    }


def load(settings, n_rows):
    """Return MNIST with pixels as float32 in [0, 1]: the first rows, and the test rows."""
    mnist = common.load_mnist(settings.data)
    n_test = 200 if settings.quick else None
    mnist.X_train, mnist.y_train = as_floats(mnist.X_train[:n_rows]), mnist.y_train[:n_rows]
    mnist.X_test, mnist.y_test = as_floats(mnist.X_test[:n_test]), mnist.y_test[:n_test]
    return mnist


def warm_up(model, X):
    """Fit a few components to a few rows: late imports and thread pools are not the fit's."""
    few = clone(model).set_params(n_components=4)
    stop_after(few, 2)
    few.fit(X[:300]).transform(X[:300])


def stop_after(model, iterations):
    """Limit the iterations of a model that has any."""
    if "max_iter" in model.get_params():
        model.set_params(max_iter=iterations)


def reconstruct(model, codes):
    """Return the rows that codes stand for, or None where the model has no decoder."""
    if isinstance(model, ImplicitEMEncoder | AutogradEncoder):
        return None
    if hasattr(model, "inverse_transform"):
        return model.inverse_transform(codes)
    return codes @ model.components_ + getattr(model, "mean_", 0)


def objective(model, X):
    """Return the objective that ExpFamilyDEQ and the autograd loop share, on training rows."""
    if isinstance(model, JointAdam):
        parameters = model.parameters()
    else:
        parameters = model.loadings_, model.intercept_, model.map_latents(X).value
    return bernoulli_objective(X, *parameters, alpha=model.alpha, weight_decay=model.weight_decay)


def iterations(model):
    """Return the iterations that a fit took, if the model tells."""
    return {"iterations": model.n_iter_} if hasattr(model, "n_iter_") else {}


def prepare(settings: Settings, method: str, n_rows: int, k: int) -> Trial:
    """Make a method ready for so many rows."""
    mnist = load(settings, n_rows)
    model = models(k, settings.device)[method]
    if settings.quick:
        stop_after(model, 5)
    warm_up(model, mnist.X_train)

    def run():
        _, fit = common.seconds_of(model.fit, mnist.X_train)
        codes, transform = common.seconds_of(model.transform, mnist.X_test)
        return {"fit": fit, "transform": transform, **iterations(model)}, codes

    def judge(codes):
        train = model.transform(mnist.X_train)
        values = {"probe_accuracy": probe_accuracy(train, mnist.y_train, codes, mnist.y_test)}
        rows = reconstruct(model, codes)
        if rows is not None:
            values["reconstruction_error"] = np.square(rows - mnist.X_test).mean()
        if method in WITH_DENSITY:
            values["held_out_log_likelihood"] = model.score(mnist.X_test)
        if method in (BERNOULLI, JOINT):
            values["objective"] = objective(model, mnist.X_train)
        return values

    return Trial(run, judge)


def cases(settings: Settings) -> list[Case]:
    """Return every method on a part of the rows and, but for the slowest, on all."""
    sizes, k = ((400,), 8) if settings.quick else ((5_000, 60_000), 64)
    return [
        Case(f"MNIST, {n:,} rows", method, prepare, (method, n, k))
        for n in sizes
        for method in models(k, settings.device)
        if n == sizes[0] or settings.large or method not in LONG
    ]


WORKLOAD = Workload(
    name="reduction",
    title="Dimension reduction of images",
    note=(
        "MNIST, 784 pixels in [0, 1] as float32, 64 components, defaults; ImplicitEMEncoder with "
        f"max_iter={DEFAULT_EPOCHS}, as its loop by autograd; Adam on W, b and Z with 200 full-"
        "batch iterations of step 0.05. The slowest see all rows only with --large. Transform is "
        "that of the 10,000 test rows. Probe accuracy is that of standardised features and "
        "LogisticRegression(max_iter=300) on the test rows. "
        "The held-out mean squared error is that of the test rows decoded from their own codes. "
        "Log-likelihoods are given where the model has a density of such data, so that they can "
        "be compared; most pixels are exactly 0, which suits a density that can gather there, and "
        "a pixel that varies among the test rows alone counts without bound against a model that "
        "gave it next to no noise. The training objective is given where two methods minimise the "
        "same one."
    ),
    cases=cases,
    minutes=9,
    files=("mnist.npz",),
    figure=partial(trade_off, quality="probe_accuracy"),
)
