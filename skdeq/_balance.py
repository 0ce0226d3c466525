"""Change of coordinates of latents and loadings that leaves the predictors as they are."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from skdeq._latent_model import LatentModel
from skdeq._setting import Setting

__all__ = ["balance"]

# Shares of the mean moment of the latents that make it definite. Of latents in fewer directions
# than there are components rounding leaves negative ones, the larger the fewer digits it has.
_RIDGES = (1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2)


def balance(setting: Setting, model: LatentModel) -> Callable[[LatentModel], LatentModel]:
    r"""Affine change of latent coordinates that minimises both penalties at fixed predictors.

    ``W z + b`` is unchanged by ``z -> C^{-1} (z - m)``, ``W -> W C``, ``b -> b + W m``. The mean
    m of the latents is the best shift. For the best C, with ``G_z`` the weighted second moment
    of the centred latents and ``G_w = W^T W``, whiten ``G_z`` and rotate to the eigenvectors of
    the product; component by component ``alpha c^2 + weight_decay d^2 / c^2`` is then least at
    ``c^4 = weight_decay d^2 / alpha``. Loadings come out orthogonal, latents uncorrelated, both
    in decreasing order: the nuclear-norm solution.

    Returns
    -------
    Callable
        The transformation, to be applied to this model and to the one it is extrapolated from.
    """
    dtype = model.latents.dtype
    weight = setting.sample_weight
    latents = model.latents
    total = setting.total_weight
    weighted = latents if weight is None else latents * weight.unsqueeze(1)
    mean = weighted.double().sum(0) / total
    limits = setting.intercept_limits
    if limits is not None:
        mean *= _share_inside(model, mean.to(dtype), *limits)
    centred = latents - mean.to(dtype)
    weighted = centred if weight is None else centred * weight.unsqueeze(1)
    moment = (weighted.T @ centred).double() / total
    gram = (model.loadings.T @ model.loadings).double()
    # Many small steps, which a card would wait for one by one.
    moment, gram = torch.stack([moment, gram]).cpu().unbind()
    forward, backward = _balancing(moment, gram, setting.weight_decay / setting.alpha)
    forward, backward = forward.to(latents), backward.to(latents)

    def apply(other: LatentModel) -> LatentModel:
        shift = mean.to(dtype)
        return replace(
            other,
            loadings=other.loadings @ backward,
            intercept=other.intercept + other.loadings @ shift,
            latents=(other.latents - shift) @ forward,
        )

    return apply


def _balancing(moment: Tensor, gram: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Change of coordinates of latents and that of loadings, whose product is the identity.

    Parameters
    ----------
    moment, gram : Tensor of shape (k, k), float64
        Of the latents and of the loadings.
    ratio : float
        ``weight_decay / alpha``; with zero nothing changes.
    """
    k = len(gram)
    identity = torch.eye(k, dtype=gram.dtype, device=gram.device)
    size = float(moment.trace()) * float(gram.trace())
    if ratio == 0 or not 0 < size < torch.inf:
        return identity, identity
    for ridge in _RIDGES:
        root, failed = torch.linalg.cholesky_ex(moment + ridge * moment.trace() / k * identity)
        if not bool(failed):
            break
    values, vectors = torch.linalg.eigh(root.T @ gram @ root)
    vectors = vectors.flip(1)
    strength = values.flip(0).clamp_min(1e-16 * float(values[-1]) + 1e-300).sqrt()
    scale = ratio**0.25 * strength.sqrt()
    inverse = torch.linalg.solve_triangular(root, identity, upper=False).T
    return inverse @ vectors * scale, root @ vectors / scale


def _share_inside(model: LatentModel, shift: Tensor, low: Tensor, high: Tensor) -> float:
    """Share of a shift of the latents (k,) that leaves all intercepts between their limits."""
    move = model.loadings @ shift
    room = torch.where(move > 0, high, low) - model.intercept
    share = torch.where(move == 0, 1.0, room / move)
    return float(share.clamp(0.0, 1.0).min())
