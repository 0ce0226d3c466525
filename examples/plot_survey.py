"""
=================================================
Attitudes behind a survey with yes and no answers
=================================================

A survey asks a thousand people 24 yes/no questions, and a quarter of the answers are missing.
Behind the answers there are a few attitudes. A Bernoulli :class:`~skdeq.ExpFamilyDEQ`, which is
known as logistic PCA or as a multidimensional item-response model, finds them, says what each
question measures, and predicts the answers not given. The survey is simulated, so all of this can
be checked; the last part shows a kind of non-response that no such model repairs.
"""

# %%
# The survey
# ----------
# Three attitudes, each measured by eight questions, half of them worded the other way round. Some
# questions discriminate well, some hardly, and nearly everyone agrees with some.

import matplotlib.pyplot as plt
import numpy as np
from scipy.special import expit
from sklearn.decomposition import PCA
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV

from skdeq import ExpFamilyDEQ

questions = {
    "trust": [
        "Courts are fair",
        "Officials listen",
        "Most experts mean well",
        "Papers check facts",
        "Elections change nothing",
        "Police hide mistakes",
        "Taxes are wasted",
        "Statistics are made up",
    ],
    "nature": [
        "Would pay more for green power",
        "Fewer flights",
        "Protect wolves",
        "Ban pesticides",
        "Cars belong in towns",
        "Growth comes first",
        "Climate talk is overdone",
        "Meat every day",
    ],
    "novelty": [
        "Tries new apps early",
        "Would ride a driverless bus",
        "Pays by phone",
        "Robots in care are fine",
        "Prefers cash",
        "Screens harm us",
        "Old ways are best",
        "Misses letters",
    ],
}
names = [question for block in questions.values() for question in block]
n_people, n_attitudes = 1000, 3
rng = np.random.default_rng(0)
attitudes = rng.normal(size=(n_people, n_attitudes))
discrimination = rng.uniform(0.6, 2.4, size=len(names)) * np.tile(np.repeat([1, -1], 4), 3)
true_loadings = np.repeat(np.eye(n_attitudes), 8, axis=0) * discrimination[:, None]
probability = expit(attitudes @ true_loadings.T + rng.normal(size=len(names)))
answers = rng.binomial(1, probability).astype(float)

# %%
# Some people skip more than others, for reasons that have nothing to do with the questions.

skips = rng.random(answers.shape) < rng.beta(1, 3, size=(n_people, 1))
given = np.where(skips, np.nan, answers)
unanswered = skips.sum(axis=1)
print(
    f"{skips.mean():.0%} of the answers are missing; {np.mean(unanswered == 0):.0%} of the people"
)
print(f"answered everything, {np.sum(unanswered > 12)} people less than half")

# %%
# How many attitudes?
# -------------------
# The held-out log-likelihood decides about their number and about the penalty together.

grid = {"n_components": [1, 2, 3, 4, 5], "weight_decay": [0.01, 0.03, 0.1]}
search = GridSearchCV(ExpFamilyDEQ(family="bernoulli", random_state=0), grid, cv=5).fit(given)
model = search.best_estimator_
results = search.cv_results_["mean_test_score"].reshape(5, 3)
print("log-likelihood per person; rows: attitudes, columns: weight_decay", grid["weight_decay"])
for k, row in zip(grid["n_components"], results, strict=True):
    print(f"  {k}  " + "  ".join(f"{value:.3f}" for value in row))
print("chosen:", search.best_params_)

# %%
# The answers not given
# ---------------------
# The simulation knows what people would have said. Other ways to predict it are the share of yes
# to the question, PCA of zeros and ones with gaps filled in by turns, ten nearest neighbours, and
# regression of each question on the others. These may say 0 or 1 or leave that range. They are
# clipped, at the bound of five that is best in hindsight, and PCA is there with three numbers of
# components, so that neither is to blame.


def fill_by_pca(given, n_components, n_rounds=30):
    """Reconstruction by PCA, with gaps replaced by it in turns."""
    gaps = np.isnan(given)
    filled = np.where(gaps, np.nanmean(given, axis=0), given)
    pca = PCA(n_components, svd_solver="full")
    for _ in range(n_rounds):
        reconstruction = pca.inverse_transform(pca.fit_transform(filled))
        filled = np.where(gaps, reconstruction, given)
    return reconstruction


scores = model.transform(given)
predictions = {
    "share of yes": np.broadcast_to(np.nanmean(given, axis=0), given.shape),
    **{f"PCA, k = {k}": fill_by_pca(given, k) for k in (1, 2, 3)},
    "10 nearest neighbours": KNNImputer(n_neighbors=10).fit_transform(given),
    "IterativeImputer": IterativeImputer(max_iter=20, random_state=0).fit_transform(given),
    "ExpFamilyDEQ": model.inverse_transform(scores),
    "true probabilities": probability,
}
truth = answers[skips]


def loss_and_share(predicted):
    """Log loss, at the best of five bounds, and share of correct predictions."""
    predicted = predicted[skips]
    bounds = [0.001, 0.02, 0.05, 0.1, 0.2]
    loss = min(log_loss(truth, np.clip(predicted, bound, 1 - bound)) for bound in bounds)
    return loss, np.mean((predicted > 0.5) == truth)


print("method                  log loss  correct")
losses = {}
for method, predicted in predictions.items():
    losses[method], correct = loss_and_share(predicted)
    print(f"{method:22s} {losses[method]:9.3f} {correct:8.1%}")

# %%
# What the questions measure
# --------------------------
# Loadings are determined up to a rotation. Varimax looks for the one in which every question has
# few large loadings, and turns the attitudes with it; the order and the signs are then those of
# the simulated attitudes. The model has not been told which questions belong together.


def varimax(loadings, n_rounds=100):
    """Orthogonal rotation with the largest variance of the squared loadings."""
    rotation = np.eye(loadings.shape[1])
    for _ in range(n_rounds):
        turned = loadings @ rotation
        target = turned**3 - turned * np.mean(turned**2, axis=0)
        left, _, right = np.linalg.svd(loadings.T @ target)
        rotation = left @ right
    return rotation


rotation = varimax(model.loadings_)
latents = model.map_latents(given).value @ rotation
overlap = np.corrcoef(attitudes.T, latents.T)[:n_attitudes, n_attitudes:]
order = np.abs(overlap).argmax(axis=1)
signs = np.sign(overlap[range(n_attitudes), order])
loadings = model.loadings_ @ rotation[:, order] * signs
latents = latents[:, order] * signs
for number, attitude in enumerate(questions):
    recovered = np.corrcoef(attitudes[:, number], latents[:, number])[0, 1]
    print(f"{attitude:8s} correlation of its loadings with the true ones", end=" ")
    print(f"{np.corrcoef(loadings[:, number], true_loadings[:, number])[0, 1]:.3f}", end=", ")
    print(f"of the latents with the attitudes {recovered:.3f}")

# %%
# When silence means something
# ----------------------------
# So far people skipped at random. Suppose now that those who would say yes skip more, in two
# ways. In the first it is the attitude that makes them skip, whatever the answer: who distrusts,
# skips what distrust would affirm. In the second it is the answer itself. The question is then
# what share of all people would say yes, from the answers given and from a table completed by the
# model.

toward_yes = attitudes @ np.sign(true_loadings).T
reasons = {
    "chance": np.full(answers.shape, -1.0),
    "the attitude": -1.4 + 1.5 * toward_yes,
    "the answer": -2.6 + 2.6 * answers,
}
bias = {}
print("skipping follows   missing   error of the share of yes, points (mean over the questions)")
print("                             of answers given     completed by the model")
for reason, logit in reasons.items():
    quiet = rng.random(answers.shape) < expit(logit)
    partial = np.where(quiet, np.nan, answers)
    completed = model.inverse_transform(model.fit_transform(partial))
    estimates = [np.nanmean(partial, axis=0), np.where(quiet, completed, answers).mean(axis=0)]
    bias[reason] = [100 * np.mean(estimate - answers.mean(axis=0)) for estimate in estimates]
    print(f"{reason:17s} {quiet.mean():8.0%} {bias[reason][0]:+13.1f} {bias[reason][1]:+23.1f}")

# %%
# The figure
# ----------
# Bars are the loadings, black marks the true ones of the simulation.

block_colors = {"trust": "#0072B2", "nature": "#009E73", "novelty": "#D55E00"}
fig = plt.figure(figsize=(9, 9.5), layout="constrained")
fig.suptitle("Three attitudes behind 24 yes/no questions, a quarter unanswered")
above, below = fig.subfigures(2, 1, height_ratios=[2, 1])
colors = np.repeat(list(block_colors.values()), 8)
axes = above.subplots(1, 3, sharex=True, sharey=True)
for ax, (number, attitude) in zip(axes, enumerate(questions), strict=True):
    ax.barh(names, loadings[:, number], color=colors)
    ax.plot(true_loadings[:, number], names, "k|", ms=9, mew=1.5)
    ax.axvline(0, color="black", lw=0.8)
    ax.set_title(attitude)
    ax.set_xlabel("loading")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)
axes[0].set_ylim(len(names) - 0.4, -0.6)

ax, right = below.subplots(1, 2)
for row, (method, loss) in enumerate(losses.items()):
    own = method == "ExpFamilyDEQ"
    ax.plot(loss, row, "o" if own else "s", color="#D55E00" if own else "#000000")
    ax.annotate(f"{loss:.3f}", (loss, row), (7, 0), textcoords="offset points", va="center")
ax.set_yticks(range(len(losses)), list(losses))
ax.set_ylim(len(losses) - 0.4, -0.6)
ax.set_xlim(0.45, 0.65)
ax.set_xlabel("log loss")
ax.set_title("Predicting the answers not given")
ax.grid(axis="x", color="#dddddd", lw=0.6)

places = np.arange(len(bias))
given_bias, model_bias = np.transpose(list(bias.values()))
right.barh(places - 0.18, given_bias, 0.34, color="#888888", label="from answers given")
right.barh(places + 0.18, model_bias, 0.34, color="#D55E00", label="completed by the model")
right.set_yticks(places, list(bias))
right.set_ylim(2.6, -0.6)
right.axvline(0, color="black", lw=0.8)
right.set_xlabel("error of the share of yes, points")
right.set_title("If skipping follows ...")
right.legend(frameon=False, loc="upper left")
plt.show()

# %%
# What it amounts to
# ------------------
# * **The number of attitudes is found,** with a clear maximum of the held-out likelihood, and the
#   loadings show which questions belong together and which are worded the other way round.
# * **They are shrunk.** The largest loadings come out smaller than they are, and people with few
#   answers are drawn to the middle: that is what the penalties do.
# * **Answers not given are predicted best by the model,** but its lead on regressing each
#   question on all others (``IterativeImputer``) is small. Nothing comes near the true
#   probabilities: eighteen answers do not tell three attitudes exactly.
# * **Non-response may follow the attitudes.** What was answered then tells of what was not, and
#   more than half of the bias goes.
# * **It must not follow the answer itself.** Then most of the bias stays, with the model as with
#   everything else that learns from the answers given, and nothing in the data says so.
