"""From latents to scores: an orthonormal basis in order of variance."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from skdeq._latent_model import LatentModel

__all__ = [
    "Moments",
    "fix_signs",
    "orthonormal_scores",
]


# Entries that differ in magnitude by less than this share are equally large: among those rounding,
# and with it the order of the rows, would choose.
_EQUALLY_LARGE = 1e-5


def fix_signs(model: LatentModel) -> LatentModel:
    """Turn each component so that its loading of largest magnitude is positive."""
    signs = _signs(model.loadings.T)
    return replace(model, loadings=model.loadings * signs, latents=model.latents * signs)


def _signs(components: Tensor) -> Tensor:
    """Sign (k,) of the entry of largest magnitude of each row, the first where some are equal."""
    size = components.abs()
    largest = size >= (1 - _EQUALLY_LARGE) * size.amax(1, keepdim=True)
    signs = components.gather(1, largest.int().argmax(1, keepdim=True)).squeeze(1).sign()
    return torch.where(signs == 0, torch.ones_like(signs), signs)


class Moments(NamedTuple):
    """First and second moments of latents.

    Attributes
    ----------
    mean : Tensor of shape (k,), float64
    covariance : Tensor of shape (k, k), float64
    weight : float
        Sum of the sample weights.
    """

    mean: Tensor
    covariance: Tensor
    weight: float

    @classmethod
    def of(cls, latents: Tensor, sample_weight: Tensor | None) -> "Moments":
        """Weighted moments of some latents (n, k)."""
        latents = latents.double()
        weight = torch.ones_like(latents[:, 0])
        weight = weight if sample_weight is None else sample_weight.double()
        total = weight.sum()
        mean = (weight @ latents) / total
        centred = latents - mean
        return cls(mean, (centred * weight.unsqueeze(1)).T @ centred / total, float(total))

    def pooled(self, other: "Moments") -> "Moments":
        """Moments of two groups together."""
        total = float(self.weight + other.weight)
        share = float(other.weight) / total
        gap = other.mean - self.mean
        covariance = (1 - share) * self.covariance + share * other.covariance
        covariance = covariance + share * (1 - share) * torch.outer(gap, gap)
        return Moments(self.mean + share * gap, covariance, total)


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
    signs = _signs(components)
    to_scores = triangle.T @ vectors * signs
    # What the penalties have emptied is zero, and not dust for a StandardScaler to blow up.
    least = torch.finfo(loadings.dtype).eps * variances[0]
    return components * signs.unsqueeze(1), torch.where(variances > least, to_scores, 0.0)
