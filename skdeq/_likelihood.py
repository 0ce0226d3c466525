"""Likelihood of rows with their latents integrated out."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from skdeq._chunks import map_chunks
from skdeq._latent_model import LatentModel
from skdeq._setting import Setting, latent_problem

__all__ = ["laplace_log_likelihood"]

# Rows that are scored at a time, and entries of their Hessians, at most.
_SCORED_ROWS, _SCORED_ENTRIES = 1024, 2**23


def laplace_log_likelihood(setting: Setting, model: LatentModel, latents: Tensor) -> Tensor:
    r"""Laplace approximation of log p(x) of each row, less the sum of log h(x).

    ``log p(x | z*) + log p(z*) + k/2 log 2 pi - 1/2 log det H(z*)``, k the number of latents in
    all layers; exact for Gaussian rows, below the top through the identity.

    Returns
    -------
    Tensor of shape (n,), float64
    """
    exact = replace(setting, family=setting.family.exact)
    # Sums over a row lose whole units in float32. A chunk of the data is made wide at a time.
    wide = model.to(torch.float64)

    def work(low: int, high: int) -> Tensor:
        rows = torch.arange(high - low, device=latents.device)
        part = exact.take(rows + low).double()
        objective, _, hessian, _ = latent_problem(part, wide).derivatives(
            latents[low:high].double(), rows, observed=True
        )
        return -objective - 0.5 * _log_determinant(hessian, setting.alpha)

    n, k = latents.shape
    size = max(1, min(_SCORED_ROWS, _SCORED_ENTRIES // k**2))
    return torch.cat(map_chunks(work, n, size, latents.device)) + 0.5 * k * math.log(setting.alpha)


def _log_determinant(hessian: Tensor, least: float) -> Tensor:
    """Log determinants of Hessians; smaller eigenvalues than ``least`` are taken for that."""
    factor, info = torch.linalg.cholesky_ex(hessian)
    result = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
    # Rounding makes the Hessian of enormous loadings indefinite.
    failed = ((info != 0) | ~torch.isfinite(result)).nonzero().squeeze(1)
    if len(failed):
        matrices = torch.nan_to_num(hessian[failed])
        result[failed] = torch.linalg.eigvalsh(matrices).clamp_min(least).log().sum(1)
    return result
