"""Distances of rows to the components of a trained encoder, chunk by chunk."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from skdeq._chunks import map_chunks, sum_chunks
from skdeq._host_data import fetched, is_away
from skdeq._observations import CompressedRows
from skdeq.objectives import Activation

__all__ = ["distance_variances", "encode"]

# Entries of the rows that are encoded at a time, and of their distances.
_CHUNK_ENTRIES = 2**21


def encode(
    rows: Tensor | CompressedRows,
    components: Tensor,
    intercept: Tensor,
    activation: Activation,
    device: torch.device,
) -> Tensor:
    """Distances (n, K) of rows as they came, in their own float type or float32.

    Parameters
    ----------
    rows : Tensor of shape (n, p), of any real type, or CompressedRows
    components : Tensor of shape (K, p)
    intercept : Tensor of shape (K,)
    activation : Activation
    device : torch.device
        Where to compute. Rows that lie elsewhere are brought there chunk by chunk, and their
        distances back.

    Returns
    -------
    Tensor of shape (n, K)
        On the device of the rows.
    """
    n, p = rows.shape
    work = _encoding(rows, components, intercept, activation, device)
    if isinstance(rows, CompressedRows) and not is_away(rows, device):
        return work(0, n)
    return torch.cat(map_chunks(work, n, _chunk_rows(p, components), device))


def distance_variances(
    rows: Tensor | CompressedRows,
    weight: Tensor | None,
    components: Tensor,
    intercept: Tensor,
    activation: Activation,
    device: torch.device,
) -> Tensor:
    """Variances (K,), float64, of distances over rows of weights (n,), none of which is kept.

    The other parameters are those of :func:`encode`.
    """
    n, p = rows.shape
    distances = _encoding(rows, components, intercept, activation, device)
    size = _chunk_rows(p, components)
    # Squares about a point among them lose no digits to a distant origin.
    shift = distances(0, min(n, size)).double().mean(0)

    def work(start: int, stop: int) -> Tensor:
        off = distances(start, stop).double().sub_(shift)
        ones = off.new_ones(len(off))
        by_row = ones if weight is None else weight[start:stop].to(ones)
        return torch.stack([by_row @ off, by_row @ off.square_()])

    first, second = sum_chunks(work, n, size, device)
    total = n if weight is None else weight.double().sum()
    return (second / total - (first / total).square()).clamp_min(0)


def _chunk_rows(p: int, components: Tensor) -> int:
    return max(1, _CHUNK_ENTRIES // max(p, len(components)))


def _encoding(
    rows: Tensor | CompressedRows,
    components: Tensor,
    intercept: Tensor,
    activation: Activation,
    device: torch.device,
) -> Callable[[int, int], Tensor]:
    """Return the function of first and last-plus-one row that encodes those between."""
    stored = rows.values if isinstance(rows, CompressedRows) else rows
    dtype = stored.dtype if stored.is_floating_point() else torch.float32
    weights = components.to(device, dtype).T.contiguous()
    bias = intercept.to(device, dtype)
    away = is_away(rows, device)

    def work(start: int, stop: int) -> Tensor:
        if isinstance(rows, CompressedRows):
            some = rows if stop - start == rows.shape[0] else rows.slice(start, stop)
            some = fetched(some, device) if away else some
            matrix = replace(some, values=some.values.to(dtype)).matrix
            distance = activation.value(matrix @ weights + bias)
        else:
            part = fetched(rows[start:stop], device) if away else rows[start:stop]
            distance = activation.value(torch.addmm(bias, part.to(dtype), weights))
        return distance.to(rows.device)

    return work
