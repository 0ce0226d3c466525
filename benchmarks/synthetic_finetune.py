"""What fine-tuning the equilibrium adds: the supervised half of the paper's synthetic study.

Tsuchida and Ong (2023), Section 5: the latents (z1, z2) are rows of the figure of
`synthetic_latents.py`, drawn without replacement; the 50 features are Bernoulli, Poisson or
Gaussian at eta = Z W^T, or ReLU-Gaussian: max(Z W^T + b, 0) plus unit noise, b standard normal.
With `--layers 2` (50-30-2) thirty latents tanh(Z W2^T / 2 + b2) plus noise of variance 1/4 stand
between, and the equilibrium has a hidden layer of thirty.
The target is z1 + z2, without noise. A head of 100 ReLU units predicts it from two features: those
of PCA, of UMAP, of the frozen equilibrium, of the equilibrium trained with the head, and the true
latents. All features are fitted without the target, on the training rows alone. The head, its
centred and scaled inputs, its minibatches, its first weights and its Adam are DEQRegressor's for
every method; the step size falls linearly over the epochs, since what is left to win is less than
the noise of steps of one size. UMAP is skipped where umap-learn (PyPI) is not installed.

The row "Bayes rule" is no method but the bound: the mean of the target given x under the law that
made the data, its loadings and the figure known. One layer only.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from scipy.special import softmax
from sklearn.decomposition import PCA

from skdeq import DEQRegressor, ExpFamilyDEQ
from skdeq.families import get_family

if not __package__:  # run as a file: this folder, and not its parent, is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import _common as common
from benchmarks import synthetic_latents as study
from benchmarks._heads import train_head, train_network

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from umap import UMAP
except ImportError:
    UMAP = None

LAWS = {
    "Bernoulli": {"family": "bernoulli"},
    "Poisson": {"family": "poisson"},
    "Gaussian": {"family": "gaussian"},
    "ReLU-Gaussian": {"family": "gaussian", "canonical_map": "relu"},
}
# Latents of the layer between, the precision of its noise, and the standard deviation of eta that
# its loadings aim at.
N_HIDDEN, HIDDEN_ALPHA, ETA_SCALE = 30, 4.0, 2.0
FROZEN, TUNED, TRUE = "frozen equilibrium", "fine-tuned equilibrium", "true latents"
BAYES = "Bayes rule"
METHODS = ("PCA", *(["UMAP"] if UMAP else []), FROZEN, TUNED, BAYES, TRUE)

# --- the data -----------------------------------------------------------------------------------


def draw_predictor(law, generator, options):
    """Return (latents, eta) of one layer; the study of the latents has no ReLU."""
    latents, eta = study.draw_predictor(LAWS[law]["family"], generator, options)
    if law == "ReLU-Gaussian":
        eta = np.maximum(eta + generator.normal(size=study.N_FEATURES), 0)
    return latents, eta


def draw_relu(seed, options):
    """Return (X, latents) of the law that `synthetic_latents.py` does not have."""
    generator = np.random.default_rng(seed)
    latents, mean = draw_predictor("ReLU-Gaussian", generator, options)
    return generator.normal(mean).astype(np.float32), latents


def draw_two_layers(law, seed, options):
    """Return (X, latents) of a model with a layer of latents between."""
    generator = np.random.default_rng(seed)
    latents = study.figure(study.GRID_SIDE)
    W = generator.normal(scale=np.sqrt(0.5), size=(2, N_HIDDEN))
    hidden = np.tanh(latents @ W / 2 + generator.normal(scale=0.3, size=N_HIDDEN))
    hidden = generator.normal(hidden, 1 / np.sqrt(HIDDEN_ALPHA))
    loadings = generator.normal(size=(N_HIDDEN, study.N_FEATURES))
    eta = ETA_SCALE * hidden @ loadings / np.sqrt(N_HIDDEN * hidden.var())
    if law == "Bernoulli":
        X = generator.random(eta.shape) < 1 / (1 + np.exp(-eta))
    elif law == "Poisson":
        X = generator.poisson(np.exp(options.poisson_scale * eta / ETA_SCALE))
    else:
        X = generator.normal(np.maximum(eta, 0) if law == "ReLU-Gaussian" else eta)
    return X.astype(np.float32), latents


def draw(law, seed, options):
    """Return (X, latents, target) of the training rows, and of the test rows."""
    if options.layers == 2:
        X, latents = draw_two_layers(law, seed, options)
    elif law == "ReLU-Gaussian":
        X, latents = draw_relu(seed, options)
    else:
        X, latents = study.draw_data(LAWS[law]["family"], seed, options)
    order = np.random.default_rng(seed).permutation(len(X))
    # Few rows of a --quick figure are better split than none left to test on.
    n_test = min(options.test_rows, len(X) // 3)
    chosen = order[n_test : n_test + options.train_rows], order[:n_test]
    target = latents.sum(axis=1)
    return [(X[rows], latents[rows].astype(np.float32), target[rows]) for rows in chosen]


# --- the methods --------------------------------------------------------------------------------


def errors_of_head(train, test, options, seed):
    """Return the test error after each epoch of a head on features that are given."""
    (features, target), (test_features, test_target) = train, test
    mean, scale = target.mean(), target.std()
    network = DEQRegressor(random_state=seed)
    heads = train_head(network, features, (target - mean) / scale, 1, options.epochs)
    return [
        np.mean(np.square(head(test_features)[:, 0] * scale + mean - test_target))
        for head in heads
    ]


def error_of_bayes_rule(law, test, options, seed):
    """Return the test error of the mean of the target given x, all else known."""
    X, target = test
    latents, eta = draw_predictor(law, np.random.default_rng(seed), options)
    log_partition = get_family(LAWS[law]["family"]).log_partition(torch.from_numpy(eta))
    predicted = [
        softmax(rows @ eta.T - log_partition.sum(1).numpy(), axis=1) @ latents.sum(axis=1)
        # The figure has so many points that not all rows are weighed at a time.
        for rows in np.array_split(X.astype(np.float64), -(-len(X) // 500))
    ]
    return np.mean(np.square(np.concatenate(predicted) - target))


def errors_of_network(network, train, test, options):
    """Return the test error after each epoch of DEQRegressor."""
    X_test, target = test
    return [
        np.mean(np.square(trained.predict(X_test) - target))
        for trained in train_network(network, *train, options.epochs)
    ]


def curves(law, seed, options):
    """Return {method: test error after each epoch} for one draw."""
    (X, latents, target), (X_test, latents_test, test_target) = draw(law, seed, options)
    made, threads = {}, torch.get_num_threads()
    reductions = {"PCA": PCA(2)}
    if UMAP:
        # The neighbours of heavy-tailed counts fall apart into so many components that the
        # spectral start, its default, does not end within an hour.
        reductions["UMAP"] = UMAP(2, init="pca", random_state=seed, n_jobs=1)
    features = {
        name: (reduction.fit_transform(X), reduction.transform(X_test))
        for name, reduction in reductions.items()
    }
    # UMAP's compiler shares its OpenMP with torch, and leaves it all cores whatever was asked for.
    torch.set_num_threads(threads)
    features[TRUE] = latents, latents_test
    for name, (seen, unseen) in features.items():
        made[name] = errors_of_head((seen, target), (unseen, test_target), options, seed)
    depth = {}
    if options.layers == 2:
        depth = {"hidden_layer_sizes": (N_HIDDEN,), "alpha": HIDDEN_ALPHA, "max_iter": 20}
    backbone = ExpFamilyDEQ(2, random_state=seed, **depth, **LAWS[law]).fit(X)
    for name in (FROZEN, TUNED):
        network = DEQRegressor(backbone, fine_tune=name == TUNED, random_state=seed)
        made[name] = errors_of_network(network, (X, target), (X_test, test_target), options)
    if options.layers == 1:
        bound = error_of_bayes_rule(law, (X_test, test_target), options, seed)
        made[BAYES] = [bound] * options.epochs
    return made


# --- the table and the figure -------------------------------------------------------------------


def mean_and_sd(values):
    """Format one figure per seed as `mean +- standard deviation`."""
    mean = f"{np.mean(values):.3g}"
    return mean if len(values) == 1 else f"{mean} +- {np.std(values, ddof=1):.2g}"


def table_rows(law, runs):
    """Return the table rows of one law, given {method: errors (seeds, epochs)}."""
    last = {name: errors[:, -1] for name, errors in runs.items()}
    reference = last[TRUE].mean()
    return [
        [law, name, mean_and_sd(errors), f"{errors.mean() / reference:.3g}"]
        for name, errors in last.items()
    ]


def draw_figure(results, file):
    """Plot the test error by epoch, one panel per law."""
    # The table alone needs no plotting library.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(results), 3.2), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for panel, (law, runs) in zip(panels, results.items(), strict=True):
        for name, errors in runs.items():
            mean = errors.mean(axis=0)
            panel.plot(
                np.arange(1, len(mean) + 1),
                mean,
                label=name,
                # What there is to beat and what cannot be beaten recede behind the network.
                linewidth=2 if name == TUNED else 1,
                linestyle="--" if name in (BAYES, TRUE) else "-",
            )
        panel.set(title=law, xlabel="epoch", yscale="log")
    panels[0].set_ylabel("test mean squared error")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(file, dpi=150)


def main():
    """Run the study for every law."""
    parser = common.parser(__doc__)
    parser.add_argument("--law", nargs="+", choices=LAWS, default=list(LAWS))
    for name, default, what in (
        ("layers", 1, "latent layers of the data and of the model, 1 or 2"),
        ("seeds", 3, "draws of loadings, rows and data"),
        ("epochs", 20, "of the head, and of the network"),
        ("train-rows", 20000, "rows to train on"),
        ("test-rows", 5000, "rows to test on"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{what} (default: %(default)s)"
        )
    parser.add_argument(
        "--poisson-scale", type=float, default=1.0, help="factor of eta (default: %(default)s)"
    )
    parser.add_argument("--figure", metavar="FILE", help="plot the test error by epoch to it")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.epochs = min(options.seeds, 2), min(options.epochs, 3)
        options.train_rows, options.test_rows = 600, 300
    environment = common.environment(["umap-learn"] if UMAP else [])
    results = {}
    with common.without_convergence_warnings():
        for law in options.law:
            draws = [curves(law, seed, options) for seed in range(options.seeds)]
            results[law] = {
                name: np.array([one[name] for one in draws])
                for name in METHODS
                if name in draws[0]
            }
    note = (
        f"Test mean squared error of z1 + z2 after {options.epochs} epochs: mean +- standard "
        f"deviation of {options.seeds} draws; {options.layers} latent layers, "
        f"{options.train_rows:,} training and {options.test_rows:,} test rows, "
        f"Poisson eta scaled by {options.poisson_scale:g}, float32. The last column divides means."
    )
    parts = [environment, note]
    if UMAP is None:
        parts.append("UMAP is left out: umap-learn is not installed.")
    header = ["law", "features", "test MSE", "times that of the true latents"]
    rows = [row for law, runs in results.items() for row in table_rows(law, runs)]
    parts.append(common.table(header, rows))
    common.publish("\n\n".join(parts), options)
    if options.figure:
        draw_figure(results, options.figure)


if __name__ == "__main__":
    main()
