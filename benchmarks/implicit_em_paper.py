"""Every table of the paper behind ImplicitEMEncoder, its speed, and its peers, on MNIST.

Oursland (2026), Deriving Decoder-Free Sparse Autoencoders from First Principles,
arXiv:2601.06478; columns headed "paper" are its figures. Pixels are scaled to [0, 1], K = 64.
Probe accuracy is that of StandardScaler and LogisticRegression(max_iter=300), trained on the
activations of all training rows, on the test rows. Over the test rows: a component is dead if the
variance of its activation is under 0.01; density is the share of activations of a size over 0.01;
redundancy is the sum of the squared correlations between distinct components, where one that
never varies has none; entropy, in nats, and largest responsibility are means over the rows.

The paper sums its log-sum-exp over a batch and ImplicitEMEncoder takes the mean: `lse_weight` is
therefore the batch size here. ImplicitEMEncoder also trains on rows it centres and scales to a
mean squared norm of 100, next to a constant input of 3.6 for the bias, so that a learning rate is
not to the digit the paper's. The ablation is therefore also run on rows as they come.
"""

import warnings
from types import SimpleNamespace
from unittest import mock

import numpy as np
import scipy.sparse as sp
import torch
from scipy.special import entr
from sklearn.decomposition import (
    PCA,
    FactorAnalysis,
    FastICA,
    MiniBatchDictionaryLearning,
    MiniBatchNMF,
)
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skdeq import ImplicitEMEncoder
from skdeq._encoder_fit import DEAD_VARIANCE, start_weights
from skdeq._precondition import Preconditioner, fit_preconditioner
from skdeq.objectives import (
    VARIANCE_FLOOR,
    BatchObjective,
    ObjectiveWeights,
    log_sum_exp,
    responsibilities,
)

try:
    from benchmarks import _common as common
except ImportError:  # run as a file: this folder, and not its parent, is on the path
    import _common as common

N_COMPONENTS = 64
BATCH_SIZE = 128
DEFAULT_EPOCHS = 10  # of the estimator's own setting; the published runs take --epochs
ACTIVE = 0.01  # an activation of at most this size counts as zero

# --- data and measures --------------------------------------------------------------------------


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


def judge(model, mnist):
    """Return (probe accuracy in %, density, seconds to transform the training rows)."""
    train, seconds = common.seconds_of(model.transform, mnist.X_train)
    test = model.transform(mnist.X_test)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    accuracy = 100 * probe.fit(train, mnist.y_train).score(test, mnist.y_test)
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


# --- theorem ------------------------------------------------------------------------------------


def plain_objective(distance, weights):
    """Return the objective as its definition reads, for autograd."""
    centred = distance - distance.mean(0)
    covariance = centred.T @ centred / (len(distance) - 1)
    variance = covariance.diagonal() + VARIANCE_FLOOR
    deviation = variance.sqrt()
    correlation = covariance / torch.outer(deviation, deviation)
    return (
        weights.lse * log_sum_exp(distance).mean()
        - weights.variance * variance.log().sum()
        + weights.decorrelation * 2 * correlation.triu(1).square().sum()
    )


def gradient_error(objective, closed_form, seed, dtype):
    """Return (largest error of a closed form against autograd, largest entry)."""
    generator = torch.Generator().manual_seed(seed)
    distance = torch.randn(64, 128, generator=generator, dtype=torch.float64).to(dtype)
    leaf = distance.clone().requires_grad_()
    (expected,) = torch.autograd.grad(objective(leaf), leaf)
    return float((expected - closed_form(distance)).abs().max()), float(expected.abs().max())


def theorem(mnist, options):
    """Compare closed-form gradients with autograd's."""
    weights = ObjectiveWeights()

    def whole(distance):
        return BatchObjective(weights, *distance.shape, distance)(distance)

    def log_sum_exps(distance):
        return log_sum_exp(distance).sum()

    def plain(distance):
        return plain_objective(distance, weights)

    seeds = seeds_of(options, 10)
    rows = []
    for label, objective, closed_form, dtype, bound, paper in (
        ("log-sum-exp, float32", log_sum_exps, responsibilities, torch.float32, 1e-7, "4.47e-08"),
        ("log-sum-exp, float64", log_sum_exps, responsibilities, torch.float64, 1e-15, ""),
        ("whole objective, float64", plain, whole, torch.float64, "", ""),
    ):
        errors, entries = zip(
            *(gradient_error(objective, closed_form, seed, dtype) for seed in seeds), strict=True
        )
        rows.append([label, f"{max(errors):.2e}", bound, paper, f"{max(entries):.2e}"])
    header = ["gradient of", "largest error", "bound", "paper", "largest entry of the gradient"]
    note = (
        f"Autograd's gradient against the closed form, in {64 * 128:,} random normal distances "
        f"(64 x 128), the largest over {len(seeds)} seeds. Of the log-sum-exp the closed form is "
        "the responsibility; the whole objective has the default weights of its terms."
    )
    return section("Theorem: the gradient is the responsibility", note, common.table(header, rows))


# --- ablation -----------------------------------------------------------------------------------

ABLATION_BATCH_SIZE = 256
ABLATION = {
    # weights of the terms; then the paper's dead, redundancy, entropy and largest responsibility
    "LSE only": ((1, 0, 0), ("64", "0", "4.16", "0.02")),
    "LSE + variance": ((1, 1, 0), ("0", "1875.37", "3.77", "0.03")),
    "full": ((1, 1, 1), ("0", "29.26", "3.85", "0.02")),
    "variance + decorrelation": ((0, 1, 1), ("0", "27.57", "1.99", "0.17")),
}


def fit_ablated(terms, seed, mnist, options):
    """Fit with some of the terms in the published setting."""
    lse, variance, decorrelation = terms
    return encoder(
        seed,
        lse_weight=ABLATION_BATCH_SIZE * lse,
        variance_weight=variance,
        decorrelation_weight=decorrelation,
        solver="adam",
        learning_rate=0.001,
        batch_size=ABLATION_BATCH_SIZE,
        max_iter=options.epochs,
        tol=0.0,
    ).fit(mnist.X_train)


def collapse(model, X):
    """Return (dead components, redundancy, entropy, largest responsibility) over rows."""
    activations, shares = model.transform(X), model.responsibilities(X)
    return (
        int((activations.var(axis=0, dtype=np.float64) < DEAD_VARIANCE).sum()),
        redundancy(activations),
        float(entr(shares).sum(axis=1).mean()),
        float(shares.max(axis=1).mean()),
    )


def without_preconditioning(rows, sample_weight):
    """Take rows as they come, with a bias as of torch.nn.Linear."""
    return Preconditioner(torch.zeros(rows.shape[1], dtype=torch.float64), 1.0, 1.0)


def ablation(mnist, options):
    """Leave out terms of the objective."""
    seeds, rows = seeds_of(options, 3), []
    for label, (terms, paper) in ABLATION.items():
        for how, prepare in (
            ("preconditioned", fit_preconditioner),
            ("as they come", without_preconditioning),
        ):
            with mock.patch("skdeq._implicit_em.fit_preconditioner", prepare):
                models = [fit_ablated(terms, seed, mnist, options) for seed in seeds]
            measures = zip(*(collapse(model, mnist.X_test) for model in models), strict=True)
            row = [label, how]
            for values, digits, published in zip(measures, (1, 2, 2, 2), paper, strict=True):
                row += [mean_and_sd(values, digits), published]
            rows.append(row)
    header = ["objective", "rows"]
    for name in ("dead of 64", "redundancy", "entropy", "largest responsibility"):
        header += [name, "paper"]
    note = (
        f"Adam, learning rate 0.001, batches of {ABLATION_BATCH_SIZE}, {options.epochs} epochs; "
        f"mean +- standard deviation of {len(seeds)} seeds."
    )
    return section("Ablation", note, common.table(header, rows))


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


def fit_default(X, seed, epochs=DEFAULT_EPOCHS):
    """Fit ours with its defaults, but for the epochs."""
    return encoder(seed, max_iter=epochs).fit(X)


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
        f"ImplicitEMEncoder, defaults (SGD, {DEFAULT_EPOCHS} epochs)": (
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


# --- speed --------------------------------------------------------------------------------------

FIT_TARGET, ACCURACY_TARGET = 5, 93.4
AUTOGRAD_TARGET, PRODUCTS_TARGET = 0.33, 1.6  # times the epoch of each


def fits_table(mnist, options):
    """Return the table of whole fits, one per seed."""
    runs = []
    for seed in range(options.seeds or 5):
        model, seconds = common.seconds_of(fit_default, mnist.X_train, seed)
        runs.append((seconds, judge(model, mnist)[0]))
    seconds, accuracies = zip(*runs, strict=True)
    rows = [
        ["seconds to fit, median (min-max)", common.spread(seconds), f"{FIT_TARGET}"],
        ["probe accuracy, %, mean +- sd", mean_and_sd(accuracies), f"{ACCURACY_TARGET}"],
    ]
    return common.table(
        [f"defaults, max_iter={DEFAULT_EPOCHS}, {len(runs)} seeds", "", "target"], rows
    )


def training_loop(X):
    """Return (trainer, batches) as `fit` with the defaults makes them."""
    rows = torch.from_numpy(X)
    start = start_weights(N_COMPONENTS, X.shape[1], torch.Generator().manual_seed(0))
    return encoder(0)._trainer(rows, fit_preconditioner(rows, None), start, X.dtype)


def batches_of(n_rows):
    """Return shuffled row numbers and their batches, as one epoch of `fit` sees them."""
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(0))
    return order, order.tensor_split(-(-n_rows // BATCH_SIZE))


def autograd_epoch(X):
    """Return an epoch as one would write it: `backward` and torch's own SGD."""
    rows, weights = torch.from_numpy(X), ObjectiveWeights()
    torch.manual_seed(0)
    layer = torch.nn.Linear(X.shape[1], N_COMPONENTS)
    optimiser = torch.optim.SGD(layer.parameters(), lr=encoder(0).learning_rate)
    _, batches = batches_of(len(X))
    buffer = rows.new_empty(BATCH_SIZE, X.shape[1])

    def epoch():
        total = torch.zeros(())
        for index in batches:
            batch = torch.index_select(rows, 0, index, out=buffer[: len(index)])
            optimiser.zero_grad()
            loss = plain_objective(torch.relu(layer(batch)), weights)
            loss.backward()
            optimiser.step()
            total += loss.detach()
        return float(total) / len(batches)

    return epoch


def bare_products(X):
    """Return {part of the step: its matrix products, as a function of a batch}."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    n_rows, n_columns = BATCH_SIZE, X.shape[1]
    weights, quadratic = random(N_COMPONENTS, n_columns), random(N_COMPONENTS, N_COMPONENTS)
    distance, gradient = random(n_rows, N_COMPONENTS), random(n_rows, N_COMPONENTS)
    out, square = torch.empty_like(distance), torch.empty_like(quadratic)

    def project(x):
        torch.mm(x, weights.T, out=out[: len(x)])

    def objective(x):
        d = distance[: len(x)]
        torch.mm(d.T, d, out=square)
        torch.mm(d, quadratic, out=out[: len(x)])

    def pull_back(x):
        weights.addmm_(gradient[: len(x)].T, x, alpha=-1e-9)

    return {"projection": project, "objective": objective, "pull-back": pull_back}


def epochs_table(mnist, options):
    """Return (table of the time of an epoch, microseconds of one of our steps)."""
    X = mnist.X_train
    trainer, row_batches = training_loop(X)
    order, batches = batches_of(len(X))
    rows, products = torch.from_numpy(X), bare_products(X).values()

    def bare():
        for batch in rows.split(BATCH_SIZE):
            for product in products:
                product(batch)

    tasks = {
        "ours": lambda: trainer.epoch(row_batches, None, order),
        "autograd": autograd_epoch(X),
        "products": bare,
    }
    _, seconds = common.alternate(tasks, options.repeats)
    ours = np.median(seconds["ours"])

    def row(name, label, target):
        ratio = f"{ours / np.median(seconds[name]):.2f}" if target else ""
        return [label, common.spread(seconds[name], 3), ratio, target]

    header = ["one epoch", "seconds", "ours, times this", "target"]
    table = [
        row("ours", "ImplicitEMEncoder's loop", ""),
        row("autograd", "the same with autograd", AUTOGRAD_TARGET),
        row("products", "bare matrix products of the steps", PRODUCTS_TARGET),
    ]
    return common.table(header, table), 1e6 * ours / len(batches)


def parts_of_steps(mnist, options):
    """Return {part: seconds in each step}, and the same of its bare matrix products."""
    X = mnist.X_train
    trainer, row_batches = training_loop(X)
    weights, activation = trainer.weights, trainer.options.activation
    rows, products = torch.from_numpy(X), bare_products(X)
    _, batches = batches_of(len(X))
    parts = {name: [] for name in ("gather", "projection", "activation", "objective", "pull-back")}
    bare = {name: [] for name in products}

    def pull_back(gradient, batch):
        row_batches.pull_back_(
            gradient, batch, weights, beta=1, alpha=-trainer.options.learning_rate
        )

    for _ in range(options.repeats):
        for index in batches:
            preactivation, distance, objective = trainer._buffers_for(len(index))
            batch, gather = common.seconds_of(row_batches.gather, index)
            _, project = common.seconds_of(row_batches.project, batch, weights, preactivation)
            _, value = common.seconds_of(activation.value_into, preactivation, distance)
            gradient, terms = common.seconds_of(objective, distance)
            _, slope = common.seconds_of(
                activation.multiply_derivative_, gradient, preactivation, distance
            )
            _, pull = common.seconds_of(pull_back, gradient, batch)
            step = (gather, project, value + slope, terms, pull)
            for name, seconds in zip(parts, step, strict=True):
                parts[name].append(seconds)
        # Not between the steps: other data in the cache would slow them down.
        for batch in rows.split(BATCH_SIZE):
            for name, product in products.items():
                bare[name].append(common.seconds_of(product, batch)[1])
    return parts, bare


def steps_table(mnist, options, step_time):
    """Return the table of the parts of a step; `step_time` is that of whole ones, in us."""
    parts, bare = parts_of_steps(mnist, options)
    medians = {name: 1e6 * np.median(seconds) for name, seconds in parts.items()}
    rows = []
    for name, median in medians.items():
        product = f"{1e6 * np.median(bare[name]):.0f}" if name in bare else ""
        rows.append([name, f"{median:.0f}", product, f"{100 * median / step_time:.0f}"])
    left = step_time - sum(medians.values())
    rows.append(["left over", f"{left:.0f}", "", f"{100 * left / step_time:.0f}"])
    rows.append(["a step, from the epoch", f"{step_time:.0f}", "", "100"])
    header = ["part of a step", "us", "its bare products, us", "share, %"]
    return common.table(header, rows)


FORMS = {
    "uint8": lambda pixels: pixels,
    "float32": as_floats,
    "uint8, CSR": sp.csr_array,
    "float32, CSR": lambda pixels: sp.csr_array(as_floats(pixels)),
}


def peak_memory(form, options):
    """Fit here; return (MB of the matrix, peak extra MB)."""
    pixels = common.load_mnist(options.data).X_train
    X = FORMS[form](pixels[::20] if options.quick else pixels)
    # The thread pools and what torch loads late are not the fit's: a tiny fit brings them in.
    fit_default(X[:1000], 0, epochs=1)
    with common.PeakMemory() as memory:
        fit_default(X, 0, epochs=2)
    arrays = (X.data, X.indices, X.indptr) if sp.issparse(X) else (X,)
    return sum(array.nbytes for array in arrays) / 2**20, memory.extra_mb


def memory_table(options):
    """Return the table of peak extra memory, each form of the data in a fresh process."""
    rows = []
    for form in FORMS:
        size, extra = common.in_fresh_process(peak_memory, form, options)
        rows.append([form, f"{size:.0f}", f"{extra:.0f}"])
    return common.table(["rows", "their own MB", "peak extra memory of fit, MB"], rows)


def speed(mnist, options):
    """Time fits, epochs and parts of steps, and measure memory."""
    whole, (epoch, step_time) = fits_table(mnist, options), epochs_table(mnist, options)
    note = (
        f"{len(mnist.X_train):,} rows, float32. Epochs in batches of {BATCH_SIZE}: median "
        f"(min-max) of {options.repeats} alternated rounds, gathering of shuffled rows included "
        "except for the bare products; parts of a step: medians over all steps of "
        f"{options.repeats} epochs."
    )
    return section(
        "Speed", note, whole, epoch, steps_table(mnist, options, step_time), memory_table(options)
    )


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


# --- command line -------------------------------------------------------------------------------

TABLES = {
    "theorem": theorem,
    "ablation": ablation,
    "benchmark": benchmark,
    "dynamics": dynamics,
    "speed": speed,
    "peers": peers,
}


def main():
    """Make the tables asked for."""
    parser = common.parser(__doc__, data=True, repeats=5)
    parser.add_argument(
        "--table", choices=[*TABLES, "all"], default="all", help="default: %(default)s"
    )
    parser.add_argument(
        "--epochs", type=int, default=100, help="of the published runs (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int, help="of every table (default: the paper's count, dynamics 1)"
    )
    options = parser.parse_args()
    if options.quick:
        options.epochs = min(options.epochs, 3)
        options.seeds = options.seeds or 2
    mnist = load(options)
    parts = [common.environment()]
    with common.without_convergence_warnings():
        # The first optimiser of a process makes torch load its compiler, which takes seconds: a
        # tiny fit pays for that, and no timed one.
        fit_default(mnist.X_train[:1000], 0, epochs=1)
        for name, make in TABLES.items():
            if options.table in (name, "all"):
                parts.append(make(mnist, options))
    common.publish("\n\n".join(parts), options)


if __name__ == "__main__":
    main()
