"""How good the features are: against a sparse autoencoder, at other steps, against peers."""

import warnings

import numpy as np
import torch
from sklearn.decomposition import (
    PCA,
    FactorAnalysis,
    FastICA,
    MiniBatchDictionaryLearning,
    MiniBatchNMF,
)

from benchmarks import _common as common
from benchmarks.implicit_em.measures import (
    BATCH_SIZE,
    DEFAULT_EPOCHS,
    N_COMPONENTS,
    encoder,
    fit_default,
    in_double,
    judge,
    mean_and_sd,
    rows_as_they_come,
    section,
    seeds_of,
)
from skdeq import ImplicitEMEncoder

# --- benchmark ----------------------------------------------------------------------------------


class SparseAutoencoder(torch.nn.Module):
    """The standard one: ReLU code, linear decoder, L1 penalty on the code."""

    def __init__(self, n_features):
        super().__init__()
        self.encoder = torch.nn.Linear(n_features, N_COMPONENTS)
        self.decoder = torch.nn.Linear(N_COMPONENTS, n_features)

    def forward(self, x):
        return torch.relu(self.encoder(x))

    def loss(self, x):
        code = self(x)
        error = torch.nn.functional.mse_loss(self.decoder(code), x)
        return error + 0.01 * code.abs().mean()

    @torch.no_grad()
    def transform(self, X):
        return self(torch.from_numpy(X)).numpy()


def fit_autoencoder(X, seed, epochs):
    """Train the standard sparse autoencoder."""
    torch.manual_seed(seed)
    rows = torch.from_numpy(X)
    model = SparseAutoencoder(X.shape[1])
    optimiser = torch.optim.Adam(model.parameters(), lr=0.001)
    for _ in range(epochs):
        for index in torch.randperm(len(rows)).split(BATCH_SIZE):
            optimiser.zero_grad()
            model.loss(rows[index]).backward()
            optimiser.step()
    return model


def fit_published(X, seed, epochs):
    """Fit ours in the published setting."""
    return encoder(
        seed,
        lse_weight=BATCH_SIZE,
        solver="adam",
        learning_rate=0.001,
        batch_size=BATCH_SIZE,
        max_iter=epochs,
        tol=0.0,
    ).fit(X)


def fit_raw(X, seed, epochs):
    """Fit ours in the published setting to rows as they come, as the published code does."""
    with rows_as_they_come():
        return fit_published(X, seed, epochs)


def n_parameters(model):
    """Count the numbers that were trained."""
    if isinstance(model, ImplicitEMEncoder):
        return model.components_.size + model.intercept_.size
    return sum(parameter.numel() for parameter in model.parameters())


def benchmark(mnist, options):
    """Compare with a standard sparse autoencoder; within a seed the methods take turns."""
    methods = {
        f"ImplicitEMEncoder as published (Adam, {options.epochs} epochs)": (
            lambda X, seed: fit_published(X, seed, options.epochs),
            ("93.43 +- 0.38", "0.268", "50,240"),
        ),
        f"the same on rows as they come (Adam, {options.epochs} epochs)": (
            lambda X, seed: fit_raw(X, seed, options.epochs),
            ("93.43 +- 0.38", "0.268", "50,240"),
        ),
        f"ImplicitEMEncoder, defaults but max_iter={DEFAULT_EPOCHS} (SGD)": (
            fit_default,
            ("", "", ""),
        ),
        f"sparse autoencoder (Adam, {options.epochs} epochs)": (
            lambda X, seed: fit_autoencoder(X, seed, options.epochs),
            ("90.26 +- 0.32", "0.503", "101,200"),
        ),
    }
    seeds = seeds_of(options, 5)
    runs = {label: [] for label in methods}
    for seed in seeds:
        for label, (fit, _) in methods.items():
            model, seconds = common.seconds_of(fit, mnist.X_train, seed)
            accuracy, density, _ = judge(model, mnist)
            runs[label].append((accuracy, density, n_parameters(model), seconds))
    rows = []
    for label, (_, (paper_accuracy, paper_density, paper_parameters)) in methods.items():
        accuracies, densities, parameters, seconds = zip(*runs[label], strict=True)
        rows.append(
            [
                label,
                mean_and_sd(accuracies),
                paper_accuracy,
                mean_and_sd(densities, 3),
                paper_density,
                f"{parameters[0]:,}",
                paper_parameters,
                common.spread(seconds),
            ]
        )
    header = ["method", "probe accuracy, %", "paper", "density", "paper", "parameters", "paper"]
    note = (
        f"Batches of {BATCH_SIZE}; mean +- standard deviation of {len(seeds)} seeds, seconds to "
        "fit: median (min-max)."
    )
    return section("Benchmark", note, common.table([*header, "seconds"], rows))


# --- dynamics -----------------------------------------------------------------------------------

DYNAMICS = {
    # learning rate: the paper's final loss and probe accuracy
    "adam": {
        1e-4: ("-745", "92.9"),
        1e-3: ("-999", "93.5"),
        1e-2: ("-1215", "93.5"),
        1e-1: ("-1420", "93.1"),
    },
    "sgd": {
        1e-4: ("-520", "92.2"),
        1e-3: ("-676", "92.6"),
        1e-2: ("-795", "93.6"),
        1e-1: ("-967", "93.5"),
    },
}


def dynamics(mnist, options):
    """Try both solvers at learning rates a thousandfold apart."""
    seeds, rows = seeds_of(options, 1), []
    for solver, published in DYNAMICS.items():
        for learning_rate, (paper_loss, paper_accuracy) in published.items():
            runs = []
            for seed in seeds:
                model = encoder(
                    seed,
                    solver=solver,
                    learning_rate=learning_rate,
                    lse_weight=BATCH_SIZE,
                    batch_size=BATCH_SIZE,
                    max_iter=options.epochs,
                    tol=0.0,
                )
                _, seconds = common.seconds_of(model.fit, mnist.X_train)
                # A run that diverges in its first epoch is left with its random weights.
                loss = model.loss_curve_[-1] if model.loss_curve_ else np.nan
                runs.append((loss, judge(model, mnist)[0], model.n_iter_, seconds))
            losses, accuracies, epochs, all_seconds = zip(*runs, strict=True)
            rows.append(
                [
                    solver,
                    f"{learning_rate:g}",
                    mean_and_sd(losses, 0),
                    paper_loss,
                    mean_and_sd(accuracies, 1),
                    paper_accuracy,
                    common.spread(epochs, 0),
                    common.spread(all_seconds, 1),
                ]
            )
    header = ["solver", "learning rate", "final loss", "paper", "probe accuracy, %", "paper"]
    note = (
        f"Batches of {BATCH_SIZE}, {options.epochs} epochs at most; mean +- standard deviation of "
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}, the paper's of 3. Seconds are of the fit. A "
        "run with fewer epochs diverged in the next one or stopped falling."
    )
    return section("Dynamics", note, common.table([*header, "epochs", "seconds"], rows))


# --- peers --------------------------------------------------------------------------------------


def peers(mnist, options):
    """Compare with scikit-learn's decompositions."""
    # Raised for row after row: a learned dictionary may hold an atom twice.
    warnings.filterwarnings("ignore", message="Orthogonal matching pursuit ended prematurely")
    rows = []
    for model in (
        PCA(N_COMPONENTS, random_state=0),
        FactorAnalysis(N_COMPONENTS, random_state=0),
        FastICA(N_COMPONENTS, random_state=0),
        MiniBatchNMF(N_COMPONENTS, random_state=0),
        MiniBatchDictionaryLearning(N_COMPONENTS, random_state=0),
        encoder(0, max_iter=DEFAULT_EPOCHS),
    ):
        # Its whitening fails in float32, where some pixels never vary.
        data = in_double(mnist) if isinstance(model, FastICA) else mnist
        _, fit_seconds = common.seconds_of(model.fit, data.X_train)
        accuracy, density, transform_seconds = judge(model, data)
        rows.append(
            [
                type(model).__name__,
                f"{fit_seconds:.2f}",
                f"{transform_seconds:.2f}",
                f"{accuracy:.2f}",
                f"{density:.3f}",
            ]
        )
    header = ["method", "fit, s", "transform, s", "probe accuracy, %", "density"]
    note = (
        f"Defaults, random_state=0, K = {N_COMPONENTS}, ImplicitEMEncoder with "
        f"max_iter={DEFAULT_EPOCHS}; one run each on {len(mnist.X_train):,} rows."
    )
    return section("Peers", note, common.table(header, rows))
