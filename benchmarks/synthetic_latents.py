"""Recovery of known two-dimensional latents: the paper's synthetic study.

The latents are the points of a regular grid on [-5, 5]^2, 316 to a side, that lie in a figure of
three parts: the disc of radius 3 about (2, 2), the disc of radius 2 about (-3, -3) and the diamond
of radius 1 about (4, -4); that keeps 42,453 of them. The 50 x 2 loadings W are normal with
variance 1/2, eta = Z W^T, and x is drawn from the family at eta (Gaussian: unit variance). In
the paper's setting the Poisson mean reaches 1e6 in the tails; `--poisson-scale 0.5` halves eta.
Recovery is the R2 of a linear regression of the true latents on the recovered ones, averaged over
the two coordinates: 1 means equal up to an affine map.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression

from skdeq import ExpFamilyDEQ

if not __package__:  # run as a file: this folder, and not its parent, is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import _common as common

GRID_SIDE, N_FEATURES = 316, 50
TARGETS = {"bernoulli": "0.930", "poisson": "0.990", "gaussian": "PCA's"}
WEIGHT_DECAYS = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)

# --- the data -----------------------------------------------------------------------------------


def figure(side):
    """Return the grid points inside the two discs and the diamond."""
    axis = np.linspace(-5, 5, side)
    points = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    large_disc = np.linalg.norm(points - (2, 2), axis=1) < 3
    small_disc = np.linalg.norm(points - (-3, -3), axis=1) < 2
    diamond = np.abs(points - (4, -4)).sum(axis=1) < 1
    return points[large_disc | small_disc | diamond]


def draw_predictor(family, generator, options):
    """Return (latents, eta): every point of the figure, and its canonical parameters."""
    latents = figure(GRID_SIDE // 5 if options.quick else GRID_SIDE)
    eta = latents @ generator.normal(scale=np.sqrt(0.5), size=(2, N_FEATURES))
    return latents, options.poisson_scale * eta if family == "poisson" else eta


def draw_data(family, seed, options):
    """Return (X as float32, the latents that made it); the seed is that of the loadings too."""
    generator = np.random.default_rng(seed)
    latents, eta = draw_predictor(family, generator, options)
    if family == "bernoulli":
        X = generator.random(eta.shape) < 1 / (1 + np.exp(-eta))
    elif family == "poisson":
        X = generator.poisson(np.exp(eta))
    else:
        X = generator.normal(eta)
    return X.astype(np.float32), latents


# --- the study ----------------------------------------------------------------------------------


def recovery(latents, recovered):
    """Return the mean R2 of the latents given the recovered ones."""
    return LinearRegression().fit(recovered, latents).score(recovered, latents)


def fit_transform(model, X):
    """Fit and transform, convergence warnings silenced."""
    with common.without_convergence_warnings():
        return model.fit(X).transform(X)


def compare(family, options):
    """Run one family: PCA and ExpFamilyDEQ with its defaults, alternated, on several draws."""
    r2, seconds = {"pca": [], "deq": []}, {"pca": [], "deq": []}
    for seed in range(options.repeats):
        X, latents = draw_data(family, seed, options)
        for name, model in {
            "pca": PCA(2),
            "deq": ExpFamilyDEQ(2, family=family, random_state=0),
        }.items():
            recovered, elapsed = common.seconds_of(fit_transform, model, X)
            r2[name].append(recovery(latents, recovered))
            seconds[name].append(elapsed)
    return [
        family,
        common.spread(r2["pca"], 4),
        common.spread(r2["deq"], 4),
        TARGETS[family],
        common.spread(seconds["pca"], 3),
        common.spread(seconds["deq"], 3),
    ]


def sweep(family, options):
    """Return the recovery of one family at every `weight_decay`, on the same draws."""
    row = [family]
    draws = [draw_data(family, seed, options) for seed in range(options.repeats)]
    for weight_decay in WEIGHT_DECAYS:
        model = ExpFamilyDEQ(2, family=family, weight_decay=weight_decay, random_state=0)
        r2 = [recovery(latents, fit_transform(model, X)) for X, latents in draws]
        row.append(f"{np.median(r2):.4f}")
    return row


def main():
    """Run the study for every family."""
    parser = common.parser(__doc__, repeats=5)
    parser.add_argument(
        "--weight-decay", action="store_true", help="sweep weight_decay instead of timing"
    )
    parser.add_argument(
        "--poisson-scale", type=float, default=1.0, help="factor of eta (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.weight_decay:
        header = ["R2 at weight_decay =", *(f"{value:g}" for value in WEIGHT_DECAYS)]
        rows = [sweep(family, options) for family in TARGETS]
        note = (
            f"Linear R2 of the true latents, median of {options.repeats} draws; the default "
            f"weight_decay is {ExpFamilyDEQ().weight_decay}."
        )
    else:
        header = ["family", "PCA R2", "ExpFamilyDEQ R2", "target", "PCA s", "ExpFamilyDEQ s"]
        rows = [compare(family, options) for family in TARGETS]
        note = (
            "Linear R2 of the true latents and seconds of fit and transform: median (min-max) of "
            f"{options.repeats} draws of loadings and data; defaults throughout, float32."
        )
    n_rows = len(figure(GRID_SIDE))
    title = (
        f"### {n_rows:,} rows, {N_FEATURES} features, 2 latents; "
        f"Poisson eta scaled by {options.poisson_scale:g}"
    )
    parts = [common.environment(), title, note, common.table(header, rows)]
    common.publish("\n\n".join(parts), options)


if __name__ == "__main__":
    main()
