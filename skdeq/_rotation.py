"""From latents to scores: an orthonormal basis in order of variance, and what it explains."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from skdeq._chunks import map_chunks
from skdeq._model import LatentModel, Setting

__all__ = [
    "NEXT_TO_NOTHING",
    "explained_deviance",
    "fix_signs",
    "latent_covariance",
    "orthonormal_scores",
    "pooled_covariance",
]

# Entries up to which explained deviances use every row, rows that they use at least, and points
# of their quadrature.
_DEVIANCE_ENTRIES = 2e6
_LEAST_ROWS = 256
_NODES = 8
# Change of a predictor along the line that the nodes resolve; where it is larger they are repeated
# on intervals, each so many times as long as the one before.
_RESOLVED = 30.0
_LONGER = 4.0
_MOST_INTERVALS = 12
# Share of the deviance that is next to nothing, rounding apart.
NEXT_TO_NOTHING = 1e-6


def fix_signs(model: LatentModel) -> LatentModel:
    """Turn each component so that its loading of largest magnitude is positive."""
    rows = model.loadings.abs().argmax(0)
    signs = torch.sign(model.loadings.gather(0, rows.unsqueeze(0))).squeeze(0)
    signs = torch.where(signs == 0, torch.ones_like(signs), signs)
    return LatentModel(model.loadings * signs, model.intercept, model.latents * signs)


def latent_covariance(
    latents: Tensor, sample_weight: Tensor | None
) -> tuple[Tensor, Tensor, float]:
    """Weighted mean (k,) and covariance (k, k) of latents, float64, and their total weight."""
    latents = latents.double()
    weight = torch.ones_like(latents[:, 0]) if sample_weight is None else sample_weight.double()
    total = weight.sum()
    mean = (weight @ latents) / total
    centred = latents - mean
    return mean, (centred * weight.unsqueeze(1)).T @ centred / total, float(total)


def pooled_covariance(one: tuple, two: tuple) -> tuple[Tensor, Tensor, float]:
    """Mean, covariance and weight of two groups together."""
    total = float(one[2] + two[2])
    share = float(two[2]) / total
    gap = two[0] - one[0]
    covariance = (1 - share) * one[1] + share * two[1]
    return one[0] + share * gap, covariance + share * (1 - share) * torch.outer(gap, gap), total


def orthonormal_scores(
    loadings: Tensor, covariance: Tensor, jacobian: Tensor
) -> tuple[Tensor, Tensor]:
    """Basis of the column space of the loadings in which the scores are principal.

    Parameters
    ----------
    loadings : Tensor of shape (p, h)
    covariance : Tensor of shape (k, k), float64
        Of the top latents.
    jacobian : Tensor of shape (h, k), float64
        What the loadings' latents are to the top ones, to first order; the identity with one
        layer.

    Returns
    -------
    components : Tensor of shape (k, p), float64
        Orthonormal rows; scores along them have decreasing variances and no correlation, and
        the entry of largest magnitude of each row is positive, as in scikit-learn's PCA.
    to_scores : Tensor of shape (k, k), float64
        Scores are ``latents @ to_scores``, and with one layer ``scores @ components`` is
        ``latents @ loadings.T``.
        A component whose standard deviation is below the root of the machine epsilon of the
        first is zero.
    """
    basis, triangle = torch.linalg.qr(loadings.double() @ jacobian)
    variances, vectors = torch.linalg.eigh(triangle @ covariance @ triangle.T)
    variances, vectors = variances.flip(0), vectors.flip(1)
    components = (basis @ vectors).T
    columns = components.abs().argmax(1, keepdim=True)
    signs = torch.sign(components.gather(1, columns))
    to_scores = triangle.T @ vectors * signs.T
    # What the penalties have emptied is zero, and not dust for a StandardScaler to blow up.
    least = torch.finfo(loadings.dtype).eps * variances[0]
    return components * signs, torch.where(variances > least, to_scores, 0.0)


def explained_deviance(
    setting: Setting,
    x_rows: Callable[[Tensor], Tensor],
    predict: Callable[[Tensor], Tensor],
    null_intercept: Tensor,
    scores: Tensor,
) -> tuple[Tensor, float, float]:
    r"""Share of the null deviance that each component removes.

    The deviance falls from that of the intercept-only model to that of the model along the
    straight line between their predictors, which never leaves the domain of the family; of the
    slope at each point of the line every component has its part,
    ``2 sum (A'(eta) - T(x)) s_k c_k``. The parts, integrated by Gauss-Legendre quadrature and
    scaled to add up to the whole, do not depend on the order of the components. For Gaussian
    data they are the explained variances. Where predictors are not linear in the scores, the
    line is that of the scores, and c_k is the derivative there.

    Parameters
    ----------
    setting : Setting
    x_rows : callable
        ``x_rows(index)`` gives some rows of the data (m, p), NaN where missing.
    predict : callable
        Linear predictors (m, p) of scores (m, k).
    null_intercept : Tensor of shape (p,)
        Of the model without latents.
    scores : Tensor of shape (n, k)

    Returns
    -------
    shares : Tensor of shape (k,), float64
        Sums to one minus the residual deviance over the null deviance, or zeros where that is
        negative. With more than 2e6 entries, estimated from rows drawn at random, always the same
        ones, of which there are 256 or more.
    removed : float
        Share that the scores remove: next to nothing if they hardly move the predictors.
    largest : float
        Largest change of a predictor by the scores; 0 where the variance is constant.
    """
    family = setting.family.exact
    n, k = scores.shape
    p = len(null_intercept)
    weight = setting.sample_weight

    def moved(low: int, high: int) -> Tensor:
        some = scores[index[low:high]]
        return (predict(some) - predict(torch.zeros_like(some[:1]))).abs().amax()

    def work(low: int, high: int) -> Tensor:
        rows = index[low:high]
        x = x_rows(rows).to(scores.dtype)
        observed = ~torch.isnan(x)
        statistic = family.sufficient(x)
        saturated = family.base.saturated(x)
        best = statistic * saturated - family.base.log_partition(saturated)
        offset = 0.0 if setting.row_offset is None else setting.row_offset[rows].unsqueeze(1)
        weights = torch.ones_like(x[:, 0]) if weight is None else weight[rows]
        some = scores[rows]
        gap_at_zero = null_intercept - predict(torch.zeros_like(some[:1]))

        def along(share: float, values: Tensor) -> Tensor:
            return predict(values) + offset + (1 - share) * gap_at_zero

        def log_likelihood(predictor: Tensor) -> Tensor:
            log_partition = family.statistics_(predictor.clone(), log_partition=True)[0]
            return statistic * family.canonical(predictor) - log_partition

        parts = torch.zeros(k, dtype=torch.float64, device=x.device)
        for node, share in zip(nodes, shares, strict=True):
            with torch.enable_grad():
                values = (float(node) * some).requires_grad_()
                predictor = along(float(node), values)
            slope = family.slope_(predictor.detach().clone(), statistic)
            slope = torch.where(observed, slope, 0.0)
            (pulled,) = torch.autograd.grad(predictor, values, slope)
            change = pulled * some * weights.unsqueeze(1)
            parts -= 2 * float(share) * change.double().sum(0)
        ends = [
            log_likelihood(along(0.0, torch.zeros_like(some))),
            log_likelihood(along(1.0, some)),
        ]
        # A density without a bound may be higher there than where the saturated one is cut off.
        best = torch.maximum(best, torch.maximum(*ends))
        gaps = [torch.where(observed, best - one, 0.0).sum(1) * weights for one in ends]
        return torch.cat([2 * torch.stack(gaps).double().sum(1), parts])

    size = max(1, 2**19 // p)
    largest = 0.0
    # That there is nothing is for all rows to say.
    for most in (max(_LEAST_ROWS, int(_DEVIANCE_ENTRIES / p)), n):
        index = _drawn_rows(n, most).to(scores.device)
        # Where the variance is constant the slope is linear, and one interval exact.
        if not (family.is_canonical and family.base.self_concordance == 0):
            largest = float(torch.stack(map_chunks(moved, len(index), size, scores.device)).amax())
        nodes, shares = _quadrature(largest)
        total = torch.stack(map_chunks(work, len(index), size, scores.device)).sum(0)
        null, residual, parts = float(total[0]), float(total[1]), total[2:]
        # What is no number is not nothing.
        explained = 0.0 if null <= 0 else 1 - residual / null
        removed = 0.0 if null <= 0 else float(parts.sum()) / null
        if abs(removed) >= NEXT_TO_NOTHING or most >= n:
            break
    if abs(removed) < NEXT_TO_NOTHING or not explained > 0:
        return torch.zeros(k, dtype=torch.float64, device="cpu"), removed, largest
    if not 0 < removed < torch.inf:
        # Far out the intercept does what the scores undo, and no part is a component's own.
        parts = scores.double().var(0, correction=0)
    if not float(parts.sum()) > 0:  # rows of a batch that are all the same
        parts = torch.ones_like(parts)
    return parts * (explained / parts.sum()), removed, largest


def _drawn_rows(n: int, most: int) -> torch.Tensor:
    """Draw so many of n rows at random, in order, or take all."""
    if n <= most:
        return torch.arange(n, device="cpu")
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randperm(n, generator=generator, device="cpu")[:most].sort().values


def _quadrature(largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [0, 1] for functions of predictors that move by so much at most."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    edges = [1.0]
    while _RESOLVED < largest * edges[0] < np.inf and len(edges) < _MOST_INTERVALS:
        edges.insert(0, edges[0] / _LONGER)
    low, length = np.r_[0.0, edges[:-1]][:, None], np.diff(edges, prepend=0.0)[:, None]
    return (low + length * (nodes + 1) / 2).ravel(), (length * weights / 2).ravel()
