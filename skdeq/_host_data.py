"""Data that stay on the host because a card has not the memory for them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from skdeq._chunks import chunks_in_turn, tile_entries
from skdeq._observations import CompressedRows, Observations

__all__ = ["HostObservations", "fetched", "is_away"]


def is_away(values: Tensor | CompressedRows, device: torch.device) -> bool:
    """Whether data lie on the host and are worked on elsewhere."""
    return values.device.type != device.type


def fetched(part: Tensor | CompressedRows, device: torch.device) -> Any:
    """Bring something from the host to a device, without waiting until it is there."""
    # Torch gives pinned memory out again only when the copy from it is done.
    pinned = part.pin_memory() if device.type == "cuda" else part
    return pinned.to(device, non_blocking=True)


@dataclass(frozen=True)
class HostObservations(Observations):
    """Observations on the host, of which a device fetches a block at a time.

    What is computed from them is on the device. A product goes over all the data once, and the
    host copies the next block into pinned memory while the device multiplies the one before.

    Attributes
    ----------
    worked_on : torch.device
        The device.
    widened : bool
        Whether float32 is turned into float64 on the device.
    """

    worked_on: torch.device = field(kw_only=True)
    widened: bool = field(default=False, kw_only=True)

    @property
    def device(self) -> torch.device:
        """Device that works on the values."""
        return self.worked_on

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type of the values on the device."""
        return torch.float64 if self.widened else super().dtype

    def double(self) -> "HostObservations":
        """Return the same in float64, without a copy of the data."""
        return replace(self, widened=True)

    def take(self, index: Tensor) -> Observations:
        """Return some rows, in the order given, on the device."""
        some = Observations(self.values, self.missing).take(index.to(self.values.device))
        missing = None if some.missing is None else fetched(some.missing, self.device)
        return Observations(self._typed(fetched(some.values, self.device)), missing)

    def __matmul__(self, other: Tensor) -> Tensor:
        """Product with a dense matrix of shape (p, r) on the device."""
        values = self.values
        if isinstance(values, CompressedRows) or values.stride(1) == 1:
            parts = self._over_blocks(values, lambda block, _: Observations(block) @ other, other)
            return torch.cat(list(parts))
        # The transpose of rows that lie side by side: whole rows are fetched, and summed over.
        product = other.new_zeros(self.shape[0], other.shape[1])
        for part in self._over_blocks(values.T, lambda rows, at: rows.T @ other[at], other):
            product += part
        return product

    def _over_blocks(
        self, values: Tensor | CompressedRows, work: Callable[[Any, slice], Tensor], like: Tensor
    ) -> Iterator[Tensor]:
        """Yield ``work(block, where)`` for one block of rows after the other."""
        n, p = values.shape
        stored = len(values.indices) if isinstance(values, CompressedRows) else n * p
        size = max(1, tile_entries(like) * n // max(stored, 1))

        def of_block(low: int, high: int) -> Tensor:
            return work(self._typed(_block(values, low, high, self.device)), slice(low, high))

        return chunks_in_turn(of_block, n, size, self.device)

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """T(x) of some rows as a dense matrix (stop - start, p) on the device."""
        rows = self._typed(_block(self.values, start, stop, self.device))
        return rows.to_dense() if isinstance(rows, CompressedRows) else rows

    def _typed(self, values: Any) -> Any:
        return values.double() if self.widened else values

    def missing_rows(self, start: int, stop: int) -> Tensor | None:
        """Places of the missing entries of some rows on the device, or None."""
        if self.missing is None:
            return None
        rows = _block(self.missing, start, stop, self.device)
        return rows.places(0, stop - start) if isinstance(rows, CompressedRows) else rows


def _block(part: Tensor | CompressedRows, start: int, stop: int, device: torch.device) -> Any:
    """Fetch the rows ``start:stop``; of a transpose they are gathered from all over the memory."""
    if isinstance(part, CompressedRows):
        return fetched(part.slice(start, stop), device)
    # What is pinned is the memory from the first to the last entry, gaps and all.
    return fetched(part[start:stop].contiguous(), device)
