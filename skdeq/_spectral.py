"""Start of a fit: leading left singular vectors of the residuals of the intercept-only model."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from skdeq._chunks import map_chunks
from skdeq._family import Family
from skdeq._model import LatentModel, Setting
from skdeq._observations import CompressedRows, Observations

__all__ = ["spectral_start"]

_OVERSAMPLING = 8
_POWER_ITERATIONS = 3
# Up to this size the decomposition is exact, and the seed does not matter.
_EXACT_ENTRIES = 4e6
_EXACT_FLOPS = 2e9
# Pearson residuals are divided by the standard deviation of their feature, but no feature is
# taken to vary less than this share of the average: rare features would otherwise fill the
# leading directions with single entries.
_LEAST_SHARE = 0.1
# Residuals on the scale of the link: features are weighted by their variance, as the likelihood
# does, but by no more than this times the median variance, lest a few features of enormous
# counts decide.
_MOST_OF_MEDIAN = 3.0


def _on_link_scale(setting: Setting, mean: Tensor, exposure: Tensor) -> Observations:
    """Change of the canonical parameter that each entry asks for, half way to the mean.

    ``link((x + mu) / 2) - link(mu / 2)`` is linear in x for x near the mean mu, zero for x = 0,
    and grows like log x, where Pearson residuals of counts that range over decades would be
    nothing but the largest of them.
    """
    observations, family = setting.observations, setting.family
    values = observations.values
    moved = _moved(values, exposure, mean, family)
    if isinstance(values, CompressedRows):
        # The transpose from that of the data, which is at hand: its places are the same.
        moved.__dict__["T"] = _moved(values.T, mean, exposure, family)
    return replace(observations, values=moved)


def _moved(
    values: Tensor | CompressedRows, by_row: Tensor, by_column: Tensor, family: Family
) -> Tensor | CompressedRows:
    """Residuals on the scale of the link about the product of two vectors."""
    n, p = values.shape
    places = values if isinstance(values, CompressedRows) else None
    entries: Any = values if places is None else places.values
    # Not in parts put together, which would be in memory twice.
    result = torch.empty_like(entries)

    def work(low: int, high: int) -> None:
        scale, expected = by_row[low:high].unsqueeze(1), by_column
        where = slice(low, high)
        if places is not None:
            bounds = places.indptr[low : high + 1]
            where = slice(*bounds[[0, -1]].tolist())
            scale = torch.repeat_interleave(by_row[low:high], bounds.diff())
            expected = by_column[places.indices[where]]
        expected = scale * expected
        moved = family.link((entries[where] + expected) / 2) - family.link(expected / 2)
        torch.nan_to_num(moved, nan=0.0, posinf=0.0, neginf=0.0, out=result[where])

    width = p if places is None else max(1, len(entries) // max(n, 1))
    map_chunks(work, n, max(1, 2**20 // width), entries.device)
    return result if places is None else replace(places, values=result)


def spectral_start(
    setting: Setting,
    intercept: Tensor,
    n_components: int,
    generator: torch.Generator,
    on_link_scale: bool = False,
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
    on_link_scale : bool
        Whether the residuals are those of :func:`_on_link_scale` rather than Pearson's.

    Returns
    -------
    LatentModel
    """
    family = setting.family
    n, p = setting.observations.shape
    dtype, device = setting.observations.dtype, setting.observations.device
    mean = family.mean(intercept)
    variance = family.variance(intercept)
    ones = torch.ones(n, dtype=dtype, device=device)
    exposure = ones if setting.row_offset is None else setting.row_offset.exp()
    weight = ones if setting.sample_weight is None else setting.sample_weight
    if not on_link_scale:
        observations, centre, profile = setting.observations, mean, exposure
        least = _LEAST_SHARE * float(variance.mean()) + 1e-30
        scale, root = variance.clamp_min(least).rsqrt(), exposure.rsqrt()
    else:
        observations = _on_link_scale(setting, mean, exposure)
        counts = weight.sum().expand(p)
        if observations.missing is not None:
            counts = counts - observations.T.missing_product(weight.unsqueeze(1)).squeeze(1)
        centre = (observations.T @ weight.unsqueeze(1)).squeeze(1) / counts
        profile = ones
        scale = variance.clamp_max(_MOST_OF_MEDIAN * float(variance.median())).sqrt()
        root = exposure.sqrt()

    def residuals(matrix: Tensor) -> Tensor:
        scaled = matrix * scale.unsqueeze(1)
        expected = (centre @ scaled).expand(n, -1)
        if observations.missing is not None:
            expected = expected - observations.missing_product(centre.unsqueeze(1) * scaled)
        return root.unsqueeze(1) * (observations @ scaled - profile.unsqueeze(1) * expected)

    transposed = observations.T

    def adjoint(matrix: Tensor) -> Tensor:
        scaled = matrix * (root * weight).unsqueeze(1)
        weighted = scaled * profile.unsqueeze(1)
        expected = weighted.sum(0).expand(p, -1)
        if observations.missing is not None:
            expected = expected - transposed.missing_product(weighted)
        return scale.unsqueeze(1) * (transposed @ scaled - centre.unsqueeze(1) * expected)

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
    # Both scalings of the rows stand for a weight of root of the exposure.
    latents = (left @ leading) * exposure.rsqrt().unsqueeze(1)
    moment = (latents.square() * weight.unsqueeze(1)).double().sum(0) / setting.total_weight
    # A direction without any variance is left at zero rather than blown up to unit size.
    largest = float(moment.max())
    moment = torch.where(moment > 1e-24 * largest, moment, torch.inf)
    latents = latents * moment.rsqrt().to(dtype)
    return LatentModel(intercept.new_zeros(p, n_components), intercept.clone(), latents)
