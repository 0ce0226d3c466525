r"""Loadings that are a convolution: the same few weights at every place of an image.

An image is a sum of kernels, each placed wherever its map of latents says and as strongly,
:math:`W z = \sum_k \sum_s z_{ks}\, w_k(\cdot - s)`. W has one row for each pixel and one column
for each kernel and place, so that all equations of the model hold as they stand; that its entries
are shared only matters where they are fitted. The matrix itself is made and used, so that every
solver, certificate and likelihood applies. With no more latents than pixels its products take no
longer than torch's convolutions: for 784 pixels, on one core, half as long with 392 latents, as
long with 784, and twice as long with 3,136.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skdeq._chunks import sum_chunks

__all__ = ["Convolution"]

# Entries of the patches that are cut out at a time.
_PATCH_ENTRIES = 2**20


class _Places(NamedTuple):
    """Where each weight of a kernel falls: for each pair of a place and a weight inside."""

    pixel: Tensor
    place: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Convolution:
    """Geometry of kernels on an image; whatever falls outside the image is left out.

    Parameters
    ----------
    image_shape : tuple of int
        Channels, height and width of the image; features are its pixels in this order.
    kernel_size : tuple of int
        Height and width of the kernels.
    stride : int
        Pixels between neighbouring places of the maps of latents. The places are such that the
        kernels hang over the image by as much on either side, one pixel less on the first.
    """

    image_shape: tuple[int, int, int]
    kernel_size: tuple[int, int]
    stride: int

    def __str__(self) -> str:
        channels, height, width = self.image_shape
        of = f"{channels} x " if channels > 1 else ""
        return (
            f"convolution of {of}{height} x {width} pixels with kernels of "
            f"{self.kernel_size[0]} x {self.kernel_size[1]}, stride {self.stride}"
        )

    @property
    def n_pixels(self) -> int:
        """Features: pixels of all channels."""
        channels, height, width = self.image_shape
        return channels * height * width

    @property
    def n_weights(self) -> int:
        """Weights of one kernel."""
        return self.image_shape[0] * self.kernel_size[0] * self.kernel_size[1]

    @property
    def map_shape(self) -> tuple[int, int]:
        """Height and width of a map of latents."""
        _, height, width = self.image_shape
        return -(-height // self.stride), -(-width // self.stride)

    @property
    def n_places(self) -> int:
        """Latents of one map."""
        return self.map_shape[0] * self.map_shape[1]

    @cached_property
    def _places(self) -> _Places:
        channels, height, width = self.image_shape

        def along(size: int, kernel: int, count: int) -> Tensor:
            """Coordinate of each weight at each place (count, kernel)."""
            overhang = max(0, (count - 1) * self.stride + kernel - size)
            first = torch.arange(count, device="cpu") * self.stride - overhang // 2
            return first.unsqueeze(1) + torch.arange(kernel, device="cpu")

        rows = along(height, self.kernel_size[0], self.map_shape[0])[:, None, None, :, None]
        columns = along(width, self.kernel_size[1], self.map_shape[1])[None, :, None, None, :]
        channel = torch.arange(channels, device="cpu")[None, None, :, None, None]
        pixel = (channel * height + rows) * width + columns
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        inside = inside.expand_as(pixel).reshape(self.n_places, self.n_weights)
        place, weight = inside.nonzero(as_tuple=True)
        return _Places(pixel.reshape(self.n_places, self.n_weights)[inside], place, weight)

    def matrix(self, kernels: Tensor) -> Tensor:
        """Make loadings (p, K * places) of kernels (K, weights), a map's places side by side."""
        places = _places_on(kernels.device, self)
        matrix = kernels.new_zeros(self.n_pixels, self.n_places, len(kernels))
        index = (places.pixel, places.place)
        matrix = matrix.index_put(index, kernels.T[places.weight])
        return matrix.transpose(1, 2).reshape(self.n_pixels, -1)

    def pull(self, matrix: Tensor) -> Tensor:
        """Sum entries of a matrix (p, K * places) over those that share a weight (K, weights)."""
        places = _places_on(matrix.device, self)
        by_place = matrix.reshape(len(matrix), -1, self.n_places).transpose(1, 2)
        shared = by_place[places.pixel, places.place]
        total = matrix.new_zeros(self.n_weights, shared.shape[1])
        return total.index_add(0, places.weight, shared).T

    def kernels(self, matrix: Tensor) -> Tensor:
        """Kernels (K, weights) of loadings made by :meth:`matrix`."""
        counts = torch.bincount(self._places.weight, minlength=self.n_weights)
        return self.pull(matrix) / counts.to(matrix).clamp_min(1)

    def shared(self, covariance: Tensor) -> Tensor:
        """Covariance (K, K) of the maps, averaged over places, of that of all latents."""
        by_map = covariance.reshape(
            -1, self.n_places, len(covariance) // self.n_places, self.n_places
        )
        return by_map.diagonal(dim1=1, dim2=3).mean(2)

    def everywhere(self, change: Tensor) -> Tensor:
        """Apply a change of maps (K, K) at every place: the matrix (K * places, K * places)."""
        return torch.kron(change, torch.eye(self.n_places, device="cpu").to(change))

    def start(self, residual: Tensor, weight: Tensor | None, n_kernels: int) -> Tensor:
        """First kernels (n_kernels, weights): principal axes of patches of residuals (m, p).

        Rows have weights (m,); the residuals are those of the linear predictors.
        """
        rows = len(residual)
        total: Any = rows
        if weight is not None:
            residual = residual * weight.sqrt().unsqueeze(1)
            total = weight.double().sum()
        places = _places_on(residual.device, self)

        def squares(start: int, stop: int) -> Tensor:
            patches = residual.new_zeros(stop - start, self.n_places, self.n_weights).double()
            patches[:, places.place, places.weight] = residual[start:stop, places.pixel].double()
            patches = patches.reshape(-1, self.n_weights)
            return patches.T @ patches

        size = max(1, _PATCH_ENTRIES // (self.n_places * self.n_weights))
        gram = sum_chunks(squares, rows, size, residual.device)
        values, vectors = torch.linalg.eigh(gram / (total * self.n_places))
        values, vectors = values.flip(0)[:n_kernels], vectors.flip(1)[:, :n_kernels]
        # Each pixel is under this many places of a kernel, which share the work.
        cover = self.kernel_size[0] * self.kernel_size[1] / self.stride**2
        scale = (values.clamp_min(1e-8 * values[0]) / cover).sqrt()
        return (vectors * scale).T.to(residual.dtype).contiguous()


@lru_cache(maxsize=8)
def _places_on(device: torch.device, convolution: Convolution) -> _Places:
    return _Places(*(one.to(device) for one in convolution._places))
