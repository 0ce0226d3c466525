"""
=====================================================
Freeze the features, or train through the equilibrium
=====================================================

:class:`~skdeq.ExpFamilyDEQ` chooses its latents to explain the data, and what explains
handwriting best need not tell digits apart. :class:`~skdeq.DEQClassifier` puts a network on top
and trains both, with the gradient taken through the equilibrium. Whether that pays depends on how
narrow the latents are and how many labels there are.
"""

# %%
# The setting
# -----------
# Of 1,797 digits 600 are for testing. All the others are known to every method; labels are known
# of 50, of 300, or of all. Features number 2, 5 or 10.

import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier, NeighborhoodComponentsAnalysis
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skdeq import DEQClassifier, ExpFamilyDEQ
from skdeq.families import Binomial

ink, digit = load_digits(return_X_y=True)
sizes, label_counts, n_splits = [2, 5, 10], [50, 300, 1197], 2

# %%
# The methods
# -----------
# Backbones are fitted to all training rows without labels. Then PCA and the frozen model get the
# same heads: logistic regression, or a network with one layer of 100 units. Fine-tuning starts
# from the same backbone and has the same network as head. For comparison there is a method that
# learns features with labels, from the labelled rows alone: neighbourhood components analysis,
# with five nearest neighbours. Networks train for a fixed number of epochs, after which most
# still improve a little; that they say so is switched off. So few epochs learn nothing by heart:
# both kinds of network have next to no decay of their weights.

warnings.simplefilter("ignore", ConvergenceWarning)


def classifiers(size, rows, seed):
    """Pairs of a map to features and an estimator to be fitted to labelled ones, by name."""
    pca = PCA(size, svd_solver="full").fit(rows)
    model = ExpFamilyDEQ(size, family=Binomial(n_trials=16), random_state=0).fit(rows)
    logistic = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    network = make_pipeline(StandardScaler(), MLPClassifier(max_iter=200, random_state=seed))
    neighbourhood = NeighborhoodComponentsAnalysis(size, max_iter=30, random_state=seed)
    trained = DEQClassifier(model, weight_decay=1e-4, max_iter=20, random_state=seed)
    return {
        "PCA, logistic": (pca.transform, logistic),
        "PCA, network": (pca.transform, network),
        "frozen, logistic": (model.transform, logistic),
        "frozen, network": (model.transform, network),
        "fine-tuned, network": (np.asarray, trained),
        "NCA, 5 neighbours": (
            np.asarray,
            make_pipeline(StandardScaler(), neighbourhood, KNeighborsClassifier(5)),
        ),
    }


accuracy = {}
for seed in range(n_splits):
    rows, test_rows, labels, test_labels = train_test_split(
        ink, digit, test_size=600, stratify=digit, random_state=seed
    )
    order = np.random.default_rng(seed).permutation(len(rows))
    for size in sizes:
        for name, (features, estimator) in classifiers(size, rows, seed).items():
            for place, count in enumerate(label_counts):
                some = order[:count]
                estimator.fit(features(rows[some]), labels[some])
                table = accuracy.setdefault((size, name), np.empty((len(label_counts), n_splits)))
                table[place, seed] = estimator.score(features(test_rows), test_labels)

names = list(dict.fromkeys(name for _, name in accuracy))
print("test accuracy           " + "".join(f"{f'{size} features':>24s}" for size in sizes))
print("labels                  " + "".join(f"{count:8d}" for count in label_counts) * len(sizes))
for name in names:
    means = np.concatenate([accuracy[size, name].mean(axis=1) for size in sizes])
    print(f"{name:24s}" + "".join(f"{value:8.3f}" for value in means))
spread = [np.ptp(values, axis=1) for values in accuracy.values()]
print(f"the two splits differ by {np.mean(spread):.3f} on average")

# %%
# What training through the equilibrium does to a map
# ---------------------------------------------------
# Two latents, all labels. ``backbone_`` is the model as trained along; its ``transform`` gives
# the features, still the most probable latents of a row under a binomial model. That model is now
# a compromise, and worse as a model of the data: its log-likelihood tells by how much.

rows, test_rows, labels, test_labels = train_test_split(
    ink, digit, test_size=600, stratify=digit, random_state=0
)
model = ExpFamilyDEQ(2, family=Binomial(n_trials=16), random_state=0).fit(rows)
trained = DEQClassifier(model, weight_decay=1e-4, max_iter=20, random_state=0)
trained.fit(rows, labels)
maps = {
    "PCA": PCA(2, svd_solver="full").fit(rows).transform,
    "ExpFamilyDEQ": model.transform,
    "ExpFamilyDEQ, fine-tuned": trained.backbone_.transform,
}
print(f"log-likelihood of a test row {model.score(test_rows):.1f}", end=", ")
print(f"after fine-tuning {trained.backbone_.score(test_rows):.1f}")
certificate = trained.backbone_.map_latents(test_rows)
print(f"rows solved after fine-tuning: {certificate.converged.sum()} of {len(test_rows)}")

# %%
# The same layer in a network of one's own
# ----------------------------------------
# ``to_module`` gives the equilibrium as a torch module. Its gradient is that of the solution, by
# one small linear system per row: a finite difference agrees, however many iterations the solver
# took.

torch.manual_seed(0)
layer = model.to_module()
whole = torch.nn.Sequential(layer, torch.nn.Linear(2, 10).double())
batch, target = torch.from_numpy(rows[:50]), torch.from_numpy(labels[:50])


def loss():
    """Cross-entropy of the network on a few rows."""
    return torch.nn.functional.cross_entropy(whole(batch), target)


loss().backward()
direction = torch.randn_like(layer.loadings)
implicit = float((layer.loadings.grad * direction).sum())
with torch.no_grad():
    step = 1e-4
    layer.loadings += step * direction
    ahead = float(loss())
    layer.loadings -= 2 * step * direction
    difference = (ahead - float(loss())) / (2 * step)
print(f"slope of the loss along a direction: implicit {implicit:.6f}, difference {difference:.6f}")

# %%
# The figure
# ----------

looks = {
    "PCA, logistic": ("#000000", "s", ":"),
    "PCA, network": ("#000000", "s", "-"),
    "frozen, network": ("#0072B2", "^", "-"),
    "fine-tuned, network": ("#D55E00", "o", "-"),
    "NCA, 5 neighbours": ("#009E73", "v", "--"),
}
digit_colors = [
    "#332288", "#117733", "#CC6677", "#88CCEE", "#000000",
    "#882255", "#44AA99", "#B8860B", "#AA4499", "#999933",
]  # fmt: skip
fig = plt.figure(figsize=(10, 7.4), layout="constrained")
fig.suptitle("Digits with few features: frozen, or trained through the equilibrium")
above, below = fig.subfigures(2, 1, height_ratios=[1, 1.05])
axes = above.subplots(1, 3)
for ax, size in zip(axes, sizes, strict=True):
    for name, (color, marker, style) in looks.items():
        values = accuracy[size, name].mean(axis=1)
        ax.plot(label_counts, values, style, color=color, marker=marker, label=name)
    ax.set_xscale("log")
    ax.set_xticks(label_counts, label_counts)
    ax.minorticks_off()
    ax.set_xlabel("labels")
    ax.set_title(f"{size} features")
    ax.grid(color="#dddddd", lw=0.6)
axes[0].set_ylabel("test accuracy")
axes[2].legend(frameon=False, loc="lower right", fontsize=9)

for ax, (name, transform) in zip(below.subplots(1, 3), maps.items(), strict=True):
    drawn = transform(test_rows)
    nearest = KNeighborsClassifier(5).fit(transform(rows), labels)
    for value, color in enumerate(digit_colors):
        ax.scatter(
            *drawn[test_labels == value].T, marker=f"${value}$", color=color, s=26, linewidths=0.2
        )
    ax.set_title(name)
    ax.set_xlabel(f"5 neighbours: {nearest.score(drawn, test_labels):.0%} correct")
    ax.set_xticks([])
    ax.set_yticks([])
plt.show()

# %%
# What it amounts to
# ------------------
# * **Narrow latents and enough labels: train through.** With two features and all labels
#   fine-tuning gains eight points on the same network over frozen features, with five features
#   three and a half.
# * **Wide latents: little to gain.** With ten features it is a point with all labels.
# * **Few labels: a gain, but not the best.** With 50 labels the gain is two points with two and
#   with five features and four with ten. A head on PCA's scores is better than either with two
#   and with ten features.
# * **Neighbourhood components analysis wants labels.** With 50 of them it is 6 to 22 points behind
#   the fine-tuned network. With two features it is ahead of it by three points with 300 labels and
#   by four with all; with five and ten features the two are within a point there.
# * **Frozen, the model has no clear lead on PCA here.** It is ahead with five features under
#   logistic regression, by one to two points; it is behind with two features under the network, by
#   two to five points, and by five with ten features and 50 labels: see also
#   :ref:`sphx_glr_auto_examples_plot_drop_in_pca.py`. The two splits differ by two points on
#   average, so that differences of a point mean little.
# * **The model of the data pays for it.** The likelihood of test rows falls by far when two
#   latents have to serve the labels. They are still latents of the model, each row with its
#   certificate.
