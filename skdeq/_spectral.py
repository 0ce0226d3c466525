"""Start of a fit: leading left singular vectors of the residuals of the intercept-only model."""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from skdeq._chunks import map_chunks, sum_chunks, tile_entries
from skdeq._family import Family
from skdeq._latent_model import LatentModel
from skdeq._observations import CompressedRows
from skdeq._setting import Setting

__all__ = ["spectral_start"]

_OVERSAMPLING = 8
_POWER_ITERATIONS = 3
# Up to this size the decomposition is exact, and the seed does not matter.
_EXACT_ENTRIES = 4e6
_EXACT_FLOPS = 2e9
# Of complete Gaussian data the exact one is the answer but for its shrinkage. It costs as much as
# three iterations of the fit for so many rows or features, if fewer, to each component, and saves
# most of them: of MNIST (k = 64) 19 of 22.
_EXACT_SHARE = 16
# Pearson residuals are divided by the standard deviation of their feature, but no feature is
# taken to vary less than this share of the average: rare features would otherwise fill the
# leading directions with single entries.
_LEAST_SHARE = 0.1
# Residuals on the scale of the link: features are weighted by their variance, as the likelihood
# does, but by no more than this times the median variance, lest a few features of enormous
# counts decide.
_MOST_OF_MEDIAN = 3.0
# Rows of residuals that are formed at a time, at least: each time leaves sums as wide as the data.
_LEAST_ROWS = 256
# The same for each column of the sums, which are then an eighth of the data at most.
_LEAST_ROWS_PER_SUM = 8
# Share of the weights below which a column counts as not seen: rounding of a difference, which
# may be one of float32.
_LEAST_SEEN = 1e-6


class _Residuals(ABC):
    """Residuals R of the model without latents, (n, p): known through products alone.

    Parameters
    ----------
    setting : Setting
    intercept : Tensor of shape (p,)
    on_link_scale : bool
        Pearson's residuals, or else, for each entry, the change of the canonical parameter that
        it asks for, half way to the mean: ``link((x + mu) / 2) - link(mu / 2)`` is linear in x
        for x near the mean mu, zero for x = 0, and grows like log x, where Pearson's residuals of
        counts that range over decades would be nothing but the largest of them.

    Attributes
    ----------
    exposure, weight : Tensor of shape (n,)
        Exponentials of the row offsets, and the sample weights.
    """

    def __init__(self, setting: Setting, intercept: Tensor, on_link_scale: bool):
        family, observations = setting.family, setting.observations
        self.family, self.observations = family, observations
        self.on_link_scale = on_link_scale
        self.mean = family.mean(intercept)
        variance = family.variance(intercept)
        ones = self.mean.new_ones(observations.shape[0])
        self.exposure = ones if setting.row_offset is None else setting.row_offset.exp()
        self.weight = ones if setting.sample_weight is None else setting.sample_weight
        # R = root (T - profile centre) scale, by rows and columns; T(x), or what stands for it.
        if on_link_scale:
            most = _MOST_OF_MEDIAN * float(variance.median())
            self._scale, self._root = variance.clamp_max(most).sqrt(), self.exposure.sqrt()
            self._profile, self._centre = ones, self._average()
        else:
            # Of the statistic, which the residuals are of, and not of the predictor.
            variance = family.base.variance(family.canonical(intercept))
            least = _LEAST_SHARE * float(variance.mean()) + 1e-30
            self._scale, self._root = variance.clamp_min(least).rsqrt(), self.exposure.rsqrt()
            self._profile, self._centre = self.exposure, self.mean

    @abstractmethod
    def _average(self) -> Tensor:
        """Weighted mean of the observed entries of each column on the scale of the link, (p,)."""

    def _mean_of(self, sums: Tensor, counts: Tensor) -> Tensor:
        # A column may be seen in rows of next to no weight alone.
        return torch.where(counts > _LEAST_SEEN * self.weight.sum(), sums / counts, 0.0)

    @abstractmethod
    def times(self, matrix: Tensor) -> Tensor:
        """Return R M, (n, r), for a matrix M (p, r)."""

    @abstractmethod
    def normal(self, matrix: Tensor) -> Tensor:
        """Return R^T S R M, (p, r), for sample weights S and a matrix M (p, r)."""


def _change_of_link(entries: Tensor, expected: Tensor, family: Family) -> Tensor:
    moved = family.link((entries + expected).div_(2)).sub_(family.link(expected / 2))
    return moved.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


class _DenseResiduals(_Residuals):
    """Of dense data: formed a block of rows at a time and never kept."""

    def _entries(self, low: int, high: int) -> Tensor:
        rows = self.observations.dense_rows(low, high)
        if not self.on_link_scale:
            return rows
        return _change_of_link(rows, self.exposure[low:high].unsqueeze(1) * self.mean, self.family)

    def _rows(self, low: int, high: int) -> Tensor:
        profile = self._profile[low:high].unsqueeze(1)
        rows = torch.addcmul(self._entries(low, high), profile, self._centre, value=-1)
        rows.mul_(self._scale).mul_(self._root[low:high].unsqueeze(1))
        gaps = self.observations.missing_rows(low, high)
        return rows if gaps is None else rows.masked_fill_(gaps, 0)

    def _chunks(self, sums: int = 1) -> tuple[int, int, torch.device]:
        """Return how many rows there are and go into a chunk, of so many sums, and the device."""
        n, p = self.observations.shape
        least = max(_LEAST_ROWS, _LEAST_ROWS_PER_SUM * sums)
        return n, max(least, tile_entries(self.mean) // p), self.mean.device

    def _average(self) -> Tensor:
        def work(low: int, high: int) -> Tensor:
            entries, weight = self._entries(low, high), self.weight[low:high]
            gaps = self.observations.missing_rows(low, high)
            if gaps is None:
                return torch.stack([weight @ entries, weight.sum().expand(len(self.mean))])
            return torch.stack(
                [weight @ entries.masked_fill(gaps, 0), weight @ (~gaps).to(weight)]
            )

        return self._mean_of(*sum_chunks(work, *self._chunks()))

    def times(self, matrix: Tensor) -> Tensor:
        """Return R M."""

        def work(low: int, high: int) -> Tensor:
            return self._rows(low, high) @ matrix

        return torch.cat(map_chunks(work, *self._chunks()))

    def normal(self, matrix: Tensor) -> Tensor:
        """Return R^T S R M."""

        def work(low: int, high: int) -> Tensor:
            rows = self._rows(low, high)
            return rows.T @ (rows @ matrix).mul_(self.weight[low:high].unsqueeze(1))

        return sum_chunks(work, *self._chunks(matrix.shape[1]))


class _SparseResiduals(_Residuals):
    """Of sparse data: the data minus a matrix of rank one."""

    def __init__(self, setting: Setting, intercept: Tensor, on_link_scale: bool):
        self._transformed = setting.observations
        super().__init__(setting, intercept, on_link_scale)

    def _average(self) -> Tensor:
        observations = self.observations
        values: Any = observations.values
        moved = values.with_values(
            self._moved(values, self.exposure, self.mean),
            self._moved(values.T, self.mean, self.exposure),
        )
        self._transformed = replace(observations, values=moved)
        weight = self.weight.unsqueeze(1)
        counts = self.weight.sum().expand(len(self.mean))
        if observations.missing is not None:
            counts = counts - observations.T.missing_product(weight).squeeze(1)
        return self._mean_of((self._transformed.T @ weight).squeeze(1), counts)

    def _moved(self, places: CompressedRows, by_row: Tensor, by_column: Tensor) -> Tensor:
        # Not in parts put together, which would be in memory twice.
        result = torch.empty_like(places.values)
        # Where the places are, which may be the host.
        by_row, by_column = by_row.to(result.device), by_column.to(result.device)

        def work(low: int, high: int) -> None:
            bounds = places.indptr[low : high + 1]
            where = slice(*bounds[[0, -1]].tolist())
            expected = torch.repeat_interleave(by_row[low:high], bounds.diff())
            expected *= by_column.index_select(0, places.indices[where])
            result[where] = _change_of_link(places.values[where], expected, self.family)

        n = places.shape[0]
        width = max(1, len(result) // max(n, 1))
        map_chunks(work, n, max(1, tile_entries(result) // width), result.device)
        return result

    def times(self, matrix: Tensor) -> Tensor:
        """Return R M."""
        scaled = matrix * self._scale.unsqueeze(1)
        product = self._transformed @ scaled
        product.addr_(self._profile, self._centre @ scaled, alpha=-1)
        if self._transformed.missing is not None:
            gaps = self._transformed.missing_product(self._centre.unsqueeze(1) * scaled)
            product.addcmul_(self._profile.unsqueeze(1), gaps)
        return product.mul_(self._root.unsqueeze(1))

    def normal(self, matrix: Tensor) -> Tensor:
        """Return R^T S R M."""
        scaled = self.times(matrix).mul_((self._root * self.weight).unsqueeze(1))
        transposed = self._transformed.T
        product = transposed @ scaled
        product.addr_(self._centre, self._profile @ scaled, alpha=-1)
        if transposed.missing is not None:
            gaps = transposed.missing_product(scaled.mul_(self._profile.unsqueeze(1)))
            product.addcmul_(self._centre.unsqueeze(1), gaps)
        return product.mul_(self._scale.unsqueeze(1))


def spectral_start(
    setting: Setting,
    intercept: Tensor,
    n_components: int,
    generator: torch.Generator,
    on_link_scale: bool = False,
) -> LatentModel:
    """Latents with unit second moments from an SVD; loadings are still zero.

    The SVD is exact for small data and, where that pays, for Gaussian data, else randomised.

    Parameters
    ----------
    setting : Setting
    intercept : Tensor of shape (p,)
        Intercept of the model without latents.
    n_components : int
    generator : torch.Generator
        Draws the test matrix, on the CPU: (p, k + 8), or (p, n) where few rows of many features
        are decomposed exactly.
    on_link_scale : bool
        Which residuals to decompose, see :class:`_Residuals`.

    Returns
    -------
    LatentModel
    """
    n, p = setting.observations.shape
    sparse = isinstance(setting.observations.values, CompressedRows)
    residuals = (_SparseResiduals if sparse else _DenseResiduals)(
        setting, intercept, on_link_scale
    )
    exact = n * p <= _EXACT_ENTRIES and n * p * min(n, p) <= _EXACT_FLOPS
    if setting.family.has_constant_variance and setting.observations.missing is None:
        exact |= min(n, p) <= _EXACT_SHARE * n_components
    if exact and p <= n:
        basis = torch.eye(p, dtype=intercept.dtype, device=intercept.device)
    else:
        # As many random directions as there are rows, once multiplied, span what is in them.
        size = n if exact else min(n_components + _OVERSAMPLING, n, p)
        basis = torch.randn(p, size, generator=generator, dtype=torch.float64, device="cpu")
        basis = basis.to(intercept)
        for _ in range(1 if exact else _POWER_ITERATIONS):
            basis = residuals.normal(torch.linalg.qr(basis)[0])
            # Powers of large or tiny residuals must not leave the range of float32.
            basis = basis / basis.abs().max().clamp_min(torch.finfo(basis.dtype).tiny)
        basis = torch.linalg.qr(basis)[0]
    gram = (basis.T @ residuals.normal(basis)).double()
    _, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    leading = vectors.flip(1)[:, :n_components].to(basis.dtype)
    # Both scalings of the rows stand for a weight of root of the exposure.
    latents = residuals.times(basis @ leading)
    latents *= residuals.exposure.rsqrt().unsqueeze(1)
    moment = (
        torch.stack([residuals.weight.double() @ column.double().square() for column in latents.T])
        / setting.total_weight
    )
    # A direction without any variance is left at zero rather than blown up to unit size.
    largest = float(moment.max())
    moment = torch.where(moment > 1e-24 * largest, moment, torch.inf)
    latents *= moment.rsqrt().to(latents.dtype)
    return LatentModel(intercept.new_zeros(p, n_components), intercept.clone(), latents)
