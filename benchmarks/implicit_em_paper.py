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

import sys
from pathlib import Path

if not __package__:  # run as a file: this folder, and not its parent, is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import _common as common
from benchmarks.implicit_em.accuracy import benchmark, dynamics, peers
from benchmarks.implicit_em.measures import fit_default, load
from benchmarks.implicit_em.speed import speed
from benchmarks.implicit_em.theory import ablation, theorem

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
