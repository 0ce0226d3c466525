"""From latents to scores: an orthonormal basis in order of variance, and what it explains."""

import torch
from torch import Tensor

from skdeq._chunks import map_chunks
from skdeq._model import LatentModel, Setting

__all__ = [
    "explained_deviance",
    "fix_signs",
    "latent_covariance",
    "orthonormal_scores",
    "pooled_covariance",
]

# Entries times components up to which explained deviances use every row.
_DEVIANCE_BUDGET = 5e7
_DEVIANCE_ROWS = 1024


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


def orthonormal_scores(loadings: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Basis of the column space of the loadings in which the scores are principal.

    Parameters
    ----------
    loadings : Tensor of shape (p, k)
    covariance : Tensor of shape (k, k), float64
        Of the latents.

    Returns
    -------
    components : Tensor of shape (k, p), float64
        Orthonormal rows; scores along them have decreasing variances and no correlation, and
        the entry of largest magnitude of each row is positive, as in scikit-learn's PCA.
    to_scores : Tensor of shape (k, k), float64
        Scores are ``latents @ to_scores``, and ``scores @ components = latents @ loadings.T``.
    """
    basis, triangle = torch.linalg.qr(loadings.double())
    _, vectors = torch.linalg.eigh(triangle @ covariance @ triangle.T)
    vectors = vectors.flip(1)
    components = (basis @ vectors).T
    columns = components.abs().argmax(1, keepdim=True)
    signs = torch.sign(components.gather(1, columns))
    return components * signs, triangle.T @ vectors * signs.T


def explained_deviance(
    setting: Setting,
    x_rows,
    components: Tensor,
    intercept: Tensor,
    null_intercept: Tensor,
    scores: Tensor,
) -> Tensor:
    """Share of the null deviance that each component removes, in the order of the components.

    Parameters
    ----------
    setting : Setting
    x_rows : callable
        ``x_rows(index)`` gives some rows of the data (m, p), NaN where missing.
    components : Tensor of shape (k, p)
    intercept, null_intercept : Tensor of shape (p,)
        Of the model, and of the model without latents.
    scores : Tensor of shape (n, k)

    Returns
    -------
    Tensor of shape (k,), float64
        Sums to one minus the residual deviance over the null deviance. With more than 5e7
        entries times components, estimated from 1,024 evenly spaced rows.
    """
    family = setting.family
    n, k = scores.shape
    p = len(intercept)
    every = 1
    if 1.0 * n * p * k > _DEVIANCE_BUDGET:
        every = max(1, n // _DEVIANCE_ROWS)
    index = torch.arange(0, n, every, device=scores.device)
    weight = setting.sample_weight

    def work(low: int, high: int) -> Tensor:
        rows = index[low:high]
        x = x_rows(rows)
        observed = ~torch.isnan(x)
        saturated = family.saturated(x)
        statistic = family.sufficient(x)
        best = statistic * saturated - family.log_partition(saturated)
        offset = 0.0 if setting.row_offset is None else setting.row_offset[rows].unsqueeze(1)
        weights = 1.0 if weight is None else weight[rows].double()

        def deviance(eta: Tensor) -> Tensor:
            log_partition = family.statistics_(eta.clone(), log_partition=True)[0]
            gap = best - statistic * eta + log_partition
            return (2 * torch.where(observed, gap, 0.0).double().sum(1) * weights).sum()

        eta = intercept + offset + torch.zeros_like(x)
        values = [deviance(null_intercept + offset + torch.zeros_like(x))]
        for component in range(k):
            eta = torch.addr(eta, scores[rows, component], components[component])
            values.append(deviance(eta))
        return torch.stack(values)

    size = max(1, 2**19 // p)
    total = torch.stack(map_chunks(work, len(index), size, scores.device)).sum(0)
    # The first components alone may leave the domain of a family that has one; what they gain is
    # then told only together with the next.
    places = torch.arange(k + 1)
    finite = torch.isfinite(total).cpu()
    known = total.cpu()[finite]
    right = torch.searchsorted(places[finite], places).clamp(1, max(len(known) - 1, 1))
    if len(known) < 2:
        return torch.zeros(k, dtype=torch.float64)
    low, high = places[finite][right - 1], places[finite][right]
    share = (places - low) / (high - low)
    total = torch.lerp(known[right - 1], known[right], share.double())
    null = total[0]
    if not float(null) > 0:
        return torch.zeros(k, dtype=torch.float64)
    return -total.diff() / null
