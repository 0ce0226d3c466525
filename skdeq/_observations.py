"""Observed entries of a data matrix on a device, dense or sparse, with or without gaps."""

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skdeq._chunks import chunk_bounds, map_chunks, sum_chunks, tile_entries

# Entries that one thread multiplies at a time.
_PRODUCT_ENTRIES = 2**20

__all__ = ["CompressedRows", "Observations"]


@dataclass(frozen=True)
class CompressedRows:
    """Compressed sparse rows as three tensors; ``values`` is None where only the places matter."""

    indptr: Tensor
    indices: Tensor
    values: Tensor | Any
    shape: tuple[int, int]

    @property
    def device(self) -> torch.device:
        """Device that holds the rows."""
        return self.indptr.device

    @cached_property
    def matrix(self) -> Tensor:
        """The matrix in the sparse layout whose products this machine supports."""
        with warnings.catch_warnings():
            # That the layout is in beta is torch's business, not the user's.
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
            csr = torch.sparse_csr_tensor(
                self.indptr,
                self.indices,
                self.values,
                self.shape,
                device=self.values.device,
                check_invariants=False,
            )
        # Without MKL torch multiplies only coordinate tensors on the CPU.
        if self.values.device.type == "cpu" and not torch.backends.mkl.is_available():
            return csr.to_sparse_coo()
        return csr

    @property
    def T(self) -> "CompressedRows":
        """The transpose, kept once made."""
        # What this is the transpose of is not kept: the two would live until the collector comes.
        origin = self.__dict__.get("_origin", lambda: None)()
        if origin is not None:
            return origin
        if "_transpose" not in self.__dict__:
            on_host = self.device.type == "cpu"
            made = self._transposed_by_scipy if on_host else self._transposed_by_torch
            self._keep_transpose(CompressedRows(*made(), (self.shape[1], self.shape[0])))
        return self.__dict__["_transpose"]

    def _keep_transpose(self, transpose: "CompressedRows") -> None:
        self.__dict__["_transpose"] = transpose
        transpose.__dict__["_origin"] = weakref.ref(self)

    def _transposed_by_scipy(self) -> tuple[Tensor, Tensor, Tensor | None]:
        # Not above: the layer, which has no sparse rows, is on torch alone.
        import scipy.sparse as sp

        # On the host scipy counts where torch sorts: a fifth of the time and no more memory.
        bare = self.values is None
        values = np.ones(len(self.indices), np.int8) if bare else self.values.numpy()
        parts = values, self.indices.numpy(), self.indptr.numpy()
        columns = sp.csr_array(parts, shape=self.shape).tocsc()
        places = torch.from_numpy(columns.indptr), torch.from_numpy(columns.indices)
        return *places, None if bare else torch.from_numpy(columns.data)

    def _transposed_by_torch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        p = self.shape[1]
        order = torch.argsort(self.indices, stable=True)
        counts = torch.bincount(self.indices, minlength=p)
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(self.indptr.dtype)
        return ends, self.row_numbers()[order], None if self.values is None else self.values[order]

    def double(self) -> "CompressedRows":
        """Return the same in float64."""
        return replace(self, values=self.values.double())

    def to(self, device: torch.device, non_blocking: bool = False) -> "CompressedRows":
        """Return the same on a device."""
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "CompressedRows":
        """Return a copy on the host that a card can fetch while the host goes on."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, function: Callable[[Tensor], Tensor]) -> "CompressedRows":
        values = None if self.values is None else function(self.values)
        return CompressedRows(function(self.indptr), function(self.indices), values, self.shape)

    def row_numbers(self) -> Tensor:
        """Row of every stored entry."""
        rows = torch.arange(self.shape[0], dtype=self.indices.dtype, device=self.device)
        return torch.repeat_interleave(rows, self.indptr.diff())

    def with_values(self, values: Tensor, transposed: Tensor) -> "CompressedRows":
        """Return other values in the same places; those of the transpose are known, too."""
        result = replace(self, values=values)
        result._keep_transpose(replace(self.T, values=transposed))
        return result

    def slice(self, start: int, stop: int) -> "CompressedRows":
        """Return the rows ``start:stop``, sharing memory."""
        indptr = self.indptr[start : stop + 1]
        low, high = indptr[[0, -1]].tolist()
        values = None if self.values is None else self.values[low:high]
        shape = (stop - start, self.shape[1])
        return CompressedRows(indptr - low, self.indices[low:high], values, shape)

    def take(self, index: Tensor) -> "CompressedRows":
        """Return some rows, in the order given."""
        counts = self.indptr.diff()[index]
        indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=counts.dtype)])
        shift = torch.repeat_interleave(self.indptr[index] - indptr[:-1], counts)
        places = shift + torch.arange(len(shift), device=shift.device)
        values = None if self.values is None else self.values[places]
        return CompressedRows(indptr, self.indices[places], values, (len(index), self.shape[1]))

    def to_dense(self, out: Tensor | None = None) -> Tensor:
        """Dense matrix, written to ``out`` if given; entries that occur once each."""
        if out is None:
            out = self.values.new_empty(self.shape)
        out.zero_()
        out[self.row_numbers().long(), self.indices.long()] = self.values.to(out.dtype)
        return out

    def places(self, start: int, stop: int) -> Tensor:
        """Return the stored places of the rows ``start:stop`` as a boolean matrix."""
        part = self.slice(start, stop)
        mask = torch.zeros(part.shape, dtype=torch.bool, device=self.device)
        mask[part.row_numbers().long(), part.indices.long()] = True
        return mask


@dataclass(frozen=True)
class Observations:
    """Sufficient statistics T(x) of n rows and p features; a missing entry counts as zero here.

    Everything a solver of a canonical family needs of the data is two products and the places of
    the gaps, so that dense and sparse data share every line of the solvers. Through another map
    it needs the entries, some rows at a time.

    Attributes
    ----------
    values : Tensor of shape (n, p) or CompressedRows
        T(x), zero where missing.
    missing : Tensor of shape (n, p), CompressedRows or None
        Places of the missing entries; None when there are none.
    """

    values: Tensor | CompressedRows
    missing: Tensor | CompressedRows | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and of features."""
        n, p = self.values.shape
        return n, p

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type of the values."""
        values = self.values
        return values.values.dtype if isinstance(values, CompressedRows) else values.dtype

    @property
    def device(self) -> torch.device:
        """Device that holds the values."""
        return self.values.device

    @property
    def T(self) -> "Observations":
        """The same entries with features as rows."""
        missing = None if self.missing is None else self.missing.T
        return replace(self, values=self.values.T, missing=missing)

    def double(self) -> "Observations":
        """Return the same in float64."""
        return replace(self, values=self.values.double())

    def take(self, index: Tensor) -> "Observations":
        """Return some rows, in the order given."""

        def rows(part: Tensor | CompressedRows) -> Tensor | CompressedRows | Any:
            return part.take(index) if isinstance(part, CompressedRows) else part[index]

        return Observations(
            rows(self.values), None if self.missing is None else rows(self.missing)
        )

    def __matmul__(self, other: Tensor) -> Tensor:
        """Product with a dense matrix of shape (p, r)."""
        if isinstance(self.values, CompressedRows):
            return self.values.matrix @ other
        if self.device.type != "cpu":
            return self.values @ other
        values = self.values
        n, p = self.shape
        # Few long rows multiply faster than few columns: the product is formed transposed.
        right = other.T.contiguous()
        if n >= p:
            size = max(64, _PRODUCT_ENTRIES // p)
            product = values.new_empty(n, right.shape[0])

            def work(low: int, high: int) -> None:
                product[low:high] = (right @ values[low:high].T).T

            map_chunks(work, n, size, self.device)
            return product
        # Wide data, such as the transpose of tall: split the sum, and add up in order.
        size = max(64, _PRODUCT_ENTRIES // n)
        total = sum_chunks(
            lambda low, high: right[:, low:high] @ values[:, low:high].T, p, size, self.device
        )
        return total.T.contiguous()

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """T(x) of some rows as a dense matrix (stop - start, p)."""
        if isinstance(self.values, CompressedRows):
            return self.values.slice(start, stop).to_dense()
        return self.values[start:stop]

    def missing_rows(self, start: int, stop: int) -> Tensor | Any:
        """Places of the missing entries of some rows, bool (stop - start, p), or None."""
        if self.missing is None:
            return None
        if isinstance(self.missing, CompressedRows):
            return self.missing.places(start, stop)
        return self.missing[start:stop]

    def missing_product(self, other: Tensor) -> Tensor:
        """Product of the places of the missing entries with a matrix of shape (p, r)."""
        n, p = self.shape
        parts = [
            self.missing_rows(start, stop).to(other.dtype) @ other
            for start, stop in chunk_bounds(n, max(1, tile_entries(other) // max(p, 1)))
        ]
        return torch.cat(parts)
