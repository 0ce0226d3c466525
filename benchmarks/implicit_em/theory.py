"""What the objective does: its gradient, and what each of its terms is for."""

from contextlib import nullcontext

import numpy as np
import torch
from scipy.special import entr

from benchmarks import _common as common
from benchmarks.implicit_em.measures import (
    encoder,
    mean_and_sd,
    redundancy,
    rows_as_they_come,
    section,
    seeds_of,
)
from skdeq._encoder_fit import DEAD_VARIANCE
from skdeq.objectives import (
    VARIANCE_FLOOR,
    BatchObjective,
    ObjectiveWeights,
    log_sum_exp,
    responsibilities,
)

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


def ablation(mnist, options):
    """Leave out terms of the objective."""
    seeds, rows = seeds_of(options, 3), []
    for label, (terms, paper) in ABLATION.items():
        for how, prepare in (
            ("preconditioned", nullcontext),
            ("as they come", rows_as_they_come),
        ):
            with prepare():
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
