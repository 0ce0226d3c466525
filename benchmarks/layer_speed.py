"""What the equilibrium layer costs next to `transform`: MNIST, forward and backward of a batch.

The layer is made by `to_module()` of a fitted model, and solves for the same latents of the same
rows. "Forward" is with gradients, from zero, as in the first epoch of training; backward is that
of the sum of all latents, to loadings and intercept.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from skdeq import ExpFamilyDEQ

if not __package__:  # run as a file: this folder, and not its parent, is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import _common as common

TARGETS = {"forward": 3, "backward": 2}  # times transform
MAX_ITER = 15  # of the fit: the loadings need not be converged
OF_PIXELS = {
    "gaussian": lambda pixels: pixels / 255,
    "bernoulli": lambda pixels: pixels > 127,
    "poisson": lambda pixels: pixels // 16,
}


def compare(family, n_components, pixels, options):
    """Return the table rows of one family and number of components."""
    X = OF_PIXELS[family](pixels).astype(np.float32)
    with common.without_convergence_warnings():
        model = ExpFamilyDEQ(n_components, family=family, max_iter=MAX_ITER, random_state=0)
        layer = model.fit(X).to_module()
    batch = X[: options.rows]
    x = torch.from_numpy(batch)

    def backward():
        layer.zero_grad()
        solved.pop().sum().backward()

    solved = []
    tasks = {
        "transform": lambda: model.transform(batch),
        "forward without gradients": torch.no_grad()(lambda: layer(x)),
        "forward": lambda: solved.append(layer(x)),
        "backward": backward,
    }
    _, seconds = common.alternate(tasks, options.repeats)
    reference = np.median(seconds["transform"])
    return [
        [
            family,
            n_components,
            name,
            common.spread(1000 * np.asarray(measured), 1),
            f"{np.median(measured) / reference:.2f}",
            TARGETS.get(name, ""),
        ]
        for name, measured in seconds.items()
    ]


def main():
    """Run each family with each number of components."""
    parser = common.parser(__doc__, data=True, repeats=7)
    parser.add_argument("--rows", type=int, default=4096, help="of the batch")
    parser.add_argument("--components", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--family", nargs="+", choices=OF_PIXELS, default=list(OF_PIXELS))
    options = parser.parse_args()
    # The loadings are those of as many rows as the batch has, or a few more.
    pixels = common.load_mnist(options.data).X_train[: max(options.rows, 10_000)]
    if options.quick:
        pixels, options.rows = pixels[:600], min(options.rows, 300)
    rows = [
        row
        for family in options.family
        for n_components in options.components
        for row in compare(family, n_components, pixels, options)
    ]
    header = ["family", "k", "what", "milliseconds", "times transform", "target"]
    note = (
        f"{options.rows} rows x {pixels.shape[1]}, float32; milliseconds: median (min-max) of "
        f"{options.repeats} alternated runs."
    )
    common.publish("\n\n".join([common.environment(), note, common.table(header, rows)]), options)


if __name__ == "__main__":
    main()
