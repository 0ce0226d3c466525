"""What a fit costs: seconds, epochs, parts of a step, memory."""

import numpy as np
import scipy.sparse as sp
import torch

from benchmarks import _common as common
from benchmarks.implicit_em.measures import (
    BATCH_SIZE,
    DEFAULT_EPOCHS,
    N_COMPONENTS,
    as_floats,
    encoder,
    fit_default,
    judge,
    mean_and_sd,
    section,
)
from benchmarks.implicit_em.theory import plain_objective
from skdeq._encoder_fit import start_weights
from skdeq._precondition import fit_preconditioner
from skdeq.objectives import ObjectiveWeights

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
        [f"defaults but max_iter={DEFAULT_EPOCHS}, {len(runs)} seeds", "", "target"], rows
    )


def training_loop(X):
    """Return the trainer that `fit` with the defaults makes."""
    rows = torch.from_numpy(X)
    preconditioner = fit_preconditioner(rows, None)
    generator = torch.Generator().manual_seed(0)
    start = start_weights(N_COMPONENTS, preconditioner.varying, generator)
    return encoder(0)._trainer(rows, rows.device, preconditioner, start, X.dtype)


def batches_of(n_rows):
    """Return shuffled row numbers and their batches, as one epoch of `fit` sees them."""
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(0))
    return order, order.tensor_split(-(-n_rows // BATCH_SIZE))


def autograd_epoch(X, n_components=N_COMPONENTS):
    """Return (layer, epoch that trains it) as one would write it: `backward`, torch's own SGD."""
    rows, weights = torch.from_numpy(X), ObjectiveWeights()
    torch.manual_seed(0)
    layer = torch.nn.Linear(X.shape[1], n_components)
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

    return layer, epoch


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
    trainer = training_loop(X)
    order, batches = batches_of(len(X))
    rows, products = torch.from_numpy(X), bare_products(X).values()

    def ours():
        with trainer._threads():
            trainer.epoch(None, order)

    def bare():
        for batch in rows.split(BATCH_SIZE):
            for product in products:
                product(batch)

    tasks = {
        "ours": ours,
        "autograd": autograd_epoch(X)[1],
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
    trainer = training_loop(X)
    row_batches = trainer.rows
    weights, activation = trainer.weights, trainer.options.activation
    rows, products = torch.from_numpy(X), bare_products(X)
    _, batches = batches_of(len(X))
    parts = {name: [] for name in ("gather", "projection", "activation", "objective", "pull-back")}
    bare = {name: [] for name in products}

    def pull_back(gradient, batch):
        row_batches.pull_back_(
            gradient, batch, weights, beta=1, alpha=-trainer.options.learning_rate
        )

    def one_epoch():
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

    for _ in range(options.repeats):
        # Its own threads: the rows, which another one fetches in `fit`, are fetched in turn.
        with trainer._threads():
            one_epoch()
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
