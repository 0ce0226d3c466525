"""What all rows of a problem share: a design, and how large the pieces are that it is used on."""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from skdeq._chunks import tile_entries
from skdeq._map_geometry import OuterProducts

__all__ = ["Design"]

_LEAST_ROWS, _MOST_ROWS = 1024, 16384
# Entries of the Hessians of a chunk, and of the products of pairs of columns of the design: with
# up to 50 unknowns no fewer rows than else.
_HESSIAN_ENTRIES = 2**24
# Chunks that a problem is cut into at least, so that threads can share it, unless they would have
# fewer entries than it takes to keep a thread from waiting for Python.
_LEAST_CHUNKS = 4
_LEAST_ENTRIES = 2**18
# Features of a tile at least.
_LEAST_COLUMNS = 64


class Sizes(NamedTuple):
    """How large a design is.

    Attributes
    ----------
    total_weight : float
        Sum of the weights.
    spread : float
        Sum of `square`: the curvature, over all unknowns, of entries of unit variance.
    longest : float
        Largest norm of a row of the matrix.
    furthest : float
        Largest magnitude of an offset.
    """

    total_weight: float
    spread: float
    longest: float
    furthest: float


class Design:
    """Design matrix with offsets and weights, as the sums over the entries of a row want them.

    Rows of what is kept are columns of the design: a product with few rows of long contiguous
    memory is several times faster than one with few columns.

    Parameters
    ----------
    matrix : Tensor of shape (q, r)
    offset : Tensor of shape (q,), optional
        Of the entries of every row.
    weight : Tensor of shape (q,), optional
        Of the entries of every row.
    has_row_offset : bool
        Whether whole rows have offsets, too.

    Attributes
    ----------
    q, r : int
        Numbers of entries and of unknowns.
    expand : Tensor of shape (r + offsets, q)
        What unknowns, followed by a one and the offset of the row as far as there are, are
        multiplied by to give linear predictors.
    collect : Tensor of shape (r + 1, q)
        What values of the entries are summed with: the weights, and the columns under them.
    square : Tensor of shape (q,)
        Weights times squared norms of the rows of the matrix.
    outer : OuterProducts
        Of pairs of its columns.
    """

    def __init__(
        self, matrix: Tensor, offset: Tensor | None, weight: Tensor | None, has_row_offset: bool
    ):
        self.matrix, self.weight, self._offset = matrix, weight, offset
        self.q, self.r = matrix.shape
        ones = torch.ones_like(matrix[:, :1].T)
        offsets = [] if offset is None else [offset.unsqueeze(0)]
        if has_row_offset:
            offsets.append(ones)
        both = torch.cat([ones, matrix.T, *offsets])
        self.expand, self.collect = both[1:], both[: self.r + 1]
        if weight is not None:
            self.collect = self.collect * weight
        self._row_norms = matrix.square().sum(1)
        self.square = self.collect[0] * self._row_norms
        self.outer = OuterProducts(self.collect[1:], self.expand[: self.r], _HESSIAN_ENTRIES)
        self._tile = tile_entries(matrix)

    def weighted(self) -> Tensor:
        """Make what statistics are multiplied by to enter the problem (r + offsets, q)."""
        return self.expand if self.weight is None else self.expand * self.weight

    @cached_property
    def sizes(self) -> Sizes:
        """Numbers that say how large it is."""
        norms, offset = self._row_norms, self._offset
        longest = norms.max() if self.q else norms.sum()
        furthest = longest.new_zeros(()) if offset is None or not self.q else offset.abs().max()
        # Read together: each of them makes the host wait for the device.
        numbers = torch.stack([self.collect[0].sum(), self.square.sum(), longest.sqrt(), furthest])
        return Sizes(*numbers.tolist())

    def tile_columns(self, rows: int, arrays: int = 1) -> int:
        """Return how many features a tile of so many rows has, so that it stays in the cache.

        Several arrays of its size may have to; rows of fewer features than the least that is
        returned take longer to be read.
        """
        columns = self._tile // max(arrays * rows, 1)
        return max(1, min(self.q, max(_LEAST_COLUMNS, columns)))

    def chunk_rows(self, n: int) -> int:
        """Rows of n to be worked on at a time, whatever the number of threads."""
        if self.matrix.device.type != "cpu":
            # A card has no cache to stay in and no threads to share with, only its memory.
            return max(1, min(n, self._tile // max(self.q, self.r**2)))
        rows = min(max(_LEAST_ROWS, self._tile // self.q), _MOST_ROWS)
        chunks = max(-(-n // rows), min(_LEAST_CHUNKS, -(-n * self.q // _LEAST_ENTRIES)), 1)
        return max(1, -(-n // chunks))

    def hessian_rows(self, n: int) -> int:
        """Rows of n whose Hessians are to be held at a time."""
        if self.matrix.device.type != "cpu":
            return self.chunk_rows(n)
        return max(1, min(self.chunk_rows(n), _HESSIAN_ENTRIES // self.r**2))
