"""What ExpFamilyDEQ costs next to PCA, and what bounds it: MNIST, 60,000 x 784, k = 50.

Converged means the objective after `max_iter=300` with a tolerance of nothing; "within 0.5 %" is
timed on a fresh fit with the smallest `max_iter` whose objective is that close. The bounds are the
matrix products of one gradient pass over all rows and one elementwise pass of the mean function:
what no first-order iteration can go below.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA

from skdeq import ExpFamilyDEQ

if not __package__:  # run as a file: this folder, and not its parent, is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import _common as common

N_COMPONENTS = 50
CLOSE = 0.005  # relative distance to the converged objective
FIT_TARGET, TRANSFORM_TARGET = 20, 25  # times PCA
CHUNK = 1024  # rows whose linear predictor stays in cache
MEANS = {"bernoulli": torch.sigmoid_, "poisson": torch.exp_}


def load(family, options):
    """Return MNIST as float32: yes/no pixels, or counts of 0..15 for Poisson."""
    pixels = common.load_mnist(options.data).X_train
    if options.quick:
        pixels = pixels[:: max(1, len(pixels) // 2000)]
    return (pixels // 16 if family == "poisson" else pixels > 127).astype(np.float32)


def fit(X, family, **options):
    """Fit ExpFamilyDEQ, convergence warnings silenced."""
    with common.without_convergence_warnings():
        return ExpFamilyDEQ(N_COMPONENTS, family=family, random_state=0, **options).fit(X)


def iterations_to_come_close(X, family, long_run):
    """Find the smallest `max_iter` whose fresh fit is within `CLOSE` of the long run."""
    curve = np.asarray(long_run.loss_curve_)
    goal = curve[-1] + CLOSE * abs(curve[-1])
    guess = int(np.argmax(curve <= goal)) + 1
    return common.smallest_passing(
        lambda max_iter: fit(X, family, max_iter=max_iter, tol=0.0).loss_curve_[-1] <= goal,
        guess=guess,
        limit=long_run.max_iter,
    )


# --- what bounds it -----------------------------------------------------------------------------


def bounds(X, family):
    """Return {label: task} of the bare kernels of one pass over all rows, in cached chunks."""
    generator = torch.Generator().manual_seed(0)
    n, p = X.shape
    Z = torch.randn(n, N_COMPONENTS, generator=generator)
    W = torch.randn(p, N_COMPONENTS, generator=generator)
    eta, gradient = torch.empty(CHUNK, p), torch.empty(CHUNK, N_COMPONENTS)

    def products():
        for z in Z.split(CHUNK):
            torch.mm(z, W.T, out=eta[: len(z)])
            torch.mm(eta[: len(z)], W, out=gradient[: len(z)])

    def elementwise():
        # Refilled, as exp of exp of ... would overflow; the fill is cheap beside the function.
        for z in Z.split(CHUNK):
            MEANS[family](eta[: len(z)].fill_(0.3))

    return {
        "bound: Z W^T and residual W": products,
        f"bound: one {MEANS[family].__name__.strip('_')} pass": elementwise,
    }


# --- the table ----------------------------------------------------------------------------------


def compare(family, options):
    """Return the table rows of one family."""
    X = load(family, options)
    long_run = fit(X, family, max_iter=options.long_run, tol=0.0)
    needed = iterations_to_come_close(X, family, long_run)
    pca, default = PCA(N_COMPONENTS, random_state=0).fit(X), fit(X, family)
    tasks = {
        "PCA fit": lambda: PCA(N_COMPONENTS, random_state=0).fit(X),
        "PCA transform": lambda: pca.transform(X),
        "fit, defaults": lambda: fit(X, family),
        "fit, close": lambda: fit(X, family, max_iter=needed, tol=0.0),
        "transform": lambda: default.transform(X),
        **bounds(X, family),
    }
    _, seconds = common.alternate(tasks, options.repeats)
    converged = long_run.loss_curve_[-1]
    excess = 100 * (default.loss_curve_[-1] - converged) / abs(converged)
    labels = {
        "fit, defaults": f"ExpFamilyDEQ fit, defaults ({default.n_iter_} iterations, objective "
        f"{excess:+.2f} %)",
        "fit, close": f"ExpFamilyDEQ fit, within 0.5 % ({needed} iterations)",
        "transform": "ExpFamilyDEQ transform",
    }
    # What a row is measured against, and the ratio it should stay under.
    ratios = {
        "fit, defaults": ("PCA fit", ""),
        "fit, close": ("PCA fit", FIT_TARGET),
        "transform": ("PCA transform", TRANSFORM_TARGET),
    }
    rows = []
    for name, measured in seconds.items():
        ratio, target = "", ""
        if name in ratios:
            peer, target = ratios[name]
            ratio = f"{np.median(measured) / np.median(seconds[peer]):.1f}"
        rows.append([family, labels.get(name, name), common.spread(measured, 3), ratio, target])
    return rows


def main():
    """Run Bernoulli and Poisson."""
    parser = common.parser(__doc__, data=True, repeats=3)
    parser.add_argument(
        "--long-run",
        type=int,
        default=300,
        help="iterations of the converged run (default: %(default)s)",
    )
    parser.add_argument("--family", nargs="+", choices=MEANS, default=list(MEANS))
    options = parser.parse_args()
    if options.quick:
        options.long_run = min(options.long_run, 20)
    rows = [row for family in options.family for row in compare(family, options)]
    header = ["family", "what", "seconds", "times PCA", "target"]
    note = (
        f"k = {N_COMPONENTS}, float32; seconds: median (min-max) of {options.repeats} alternated "
        f"runs; objective against that of {options.long_run} iterations."
    )
    common.publish("\n\n".join([common.environment(), note, common.table(header, rows)]), options)


if __name__ == "__main__":
    main()
