"""Start of a fit: leading left singular vectors of the residuals of the intercept-only model."""

import torch
from torch import Tensor

from skdeq._model import LatentModel, Setting

__all__ = ["spectral_start"]

_OVERSAMPLING = 8
_POWER_ITERATIONS = 3
# Up to this size the decomposition is exact, and the seed does not matter.
_EXACT_ENTRIES = 4e6
_EXACT_FLOPS = 2e9
# Residuals are divided by the standard deviation of their feature, as Pearson residuals are, but
# no feature is taken to vary less than this share of the average: rare features would otherwise
# fill the leading directions with single entries.
_LEAST_SHARE = 0.1


def spectral_start(
    setting: Setting, intercept: Tensor, n_components: int, generator: torch.Generator
) -> LatentModel:
    """Latents with unit second moments from an SVD; loadings are still zero.

    The SVD is exact for small data and randomised for large. The residual matrix of large data is
    never formed: it is the data minus a matrix of rank one, and enters through products only.

    Parameters
    ----------
    setting : Setting
    intercept : Tensor of shape (p,)
        Intercept of the model without latents.
    n_components : int
    generator : torch.Generator
        Draws the test matrix (p, k + 8), on the CPU.

    Returns
    -------
    LatentModel
    """
    observations, family = setting.observations, setting.family
    n, p = observations.shape
    dtype, device = observations.dtype, observations.device
    mean = family.mean(intercept)
    variance = family.variance(intercept)
    scale = variance.clamp_min(_LEAST_SHARE * float(variance.mean()) + 1e-30).rsqrt()
    exposure = torch.ones(n, dtype=dtype, device=device)
    if setting.row_offset is not None:
        exposure = setting.row_offset.exp()
    root = exposure.rsqrt()
    weight = setting.sample_weight
    weight = torch.ones_like(root) if weight is None else weight

    def residuals(matrix: Tensor) -> Tensor:
        scaled = matrix * scale.unsqueeze(1)
        expected = (mean @ scaled).expand(n, -1)
        if observations.missing is not None:
            expected = expected - observations.missing_product(mean.unsqueeze(1) * scaled)
        return root.unsqueeze(1) * (observations @ scaled - exposure.unsqueeze(1) * expected)

    transposed = observations.T

    def adjoint(matrix: Tensor) -> Tensor:
        scaled = matrix * (root * weight).unsqueeze(1)
        weighted = scaled * exposure.unsqueeze(1)
        expected = weighted.sum(0).expand(p, -1)
        if observations.missing is not None:
            expected = expected - transposed.missing_product(weighted)
        return scale.unsqueeze(1) * (transposed @ scaled - mean.unsqueeze(1) * expected)

    if n * p <= _EXACT_ENTRIES and n * p * p <= _EXACT_FLOPS:
        basis = torch.eye(p, dtype=dtype, device=device)
    else:
        size = min(n_components + _OVERSAMPLING, n, p)
        basis = torch.randn(p, size, generator=generator, dtype=torch.float64)
        basis = basis.to(device, dtype)
        for _ in range(_POWER_ITERATIONS):
            basis = adjoint(residuals(torch.linalg.qr(basis)[0]))
            # Powers of large or tiny residuals must not leave the range of float32.
            basis = basis / basis.abs().max().clamp_min(torch.finfo(dtype).tiny)
        basis = torch.linalg.qr(basis)[0]
    left = residuals(basis)
    gram = (left * weight.unsqueeze(1)).T @ left
    _, vectors = torch.linalg.eigh(gram.double())
    leading = vectors.flip(1)[:, :n_components].to(dtype)
    # Undo the row scaling only: dividing by the exposure once more gives the latents themselves.
    latents = (left @ leading) * root.unsqueeze(1)
    moment = (latents.square() * weight.unsqueeze(1)).double().sum(0) / setting.total_weight
    # A direction without any variance is left at zero rather than blown up to unit size.
    largest = float(moment.max())
    moment = torch.where(moment > 1e-24 * largest, moment, torch.inf)
    latents = latents * moment.rsqrt().to(dtype)
    return LatentModel(intercept.new_zeros(p, n_components), intercept.clone(), latents)
