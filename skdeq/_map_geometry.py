"""What a design matrix lends to the solvers: its outer products, and a map shaped by curvature."""

import copy
import threading
from typing import Any

import torch
from torch import Tensor

__all__ = ["CurvatureMap", "OuterProducts"]


class OuterProducts:
    """Products of pairs of columns of a design, which variances turn into Hessians.

    Parameters
    ----------
    weighted, plain : Tensor of shape (r, q)
        The columns of the design as rows, with the weights of the entries and without.
    most : int
        Entries that may be held at a time.

    Attributes
    ----------
    pairs : int
        Number of pairs, ``r (r + 1) / 2``.
    """

    def __init__(self, weighted: Tensor, plain: Tensor, most: int):
        self._weighted, self._plain, self._most = weighted, plain, most
        r, self._q = plain.shape
        self._r, self.pairs = r, r * (r + 1) // 2
        first, second = torch.triu_indices(r, r, device=plain.device)
        places = torch.empty(r, r, dtype=torch.long, device=plain.device)
        places[first, second] = places[second, first] = torch.arange(
            self.pairs, device=plain.device
        )
        # Of each entry of a matrix among the pairs.
        self._places = places.flatten()
        # Made when the first thread asks for it.
        self._all: Tensor | None = None
        self._lock = threading.Lock()

    def tile_columns(self, width: int) -> int:
        """Return how many features a tile may have for which ``width`` is asked."""
        return width if self._are_kept else max(16, min(width, self._most // self.pairs))

    @property
    def _are_kept(self) -> bool:
        return self.pairs * self._q <= self._most

    def of(self, columns: slice) -> Tensor:
        """Return the products for some features, (r (r + 1) / 2, some of q)."""
        if not self._are_kept:
            return self._products(columns)
        with self._lock:
            if self._all is None:
                self._all = self._products(slice(None))
        return self._all[:, columns]

    def _products(self, columns: slice) -> Tensor:
        weighted, plain = self._weighted[:, columns], self._plain[:, columns]
        products = plain.new_empty(self.pairs, plain.shape[1])
        low = 0
        # Row by row into place: gathering both factors first takes three times as long.
        for one in range(self._r):
            high = low + self._r - one
            torch.mul(weighted[one], plain[one:], out=products[low:high])
            low = high
        return products

    def symmetric(self, bend: Tensor) -> Tensor:
        """Matrices (m, r, r) from their upper triangles (r (r + 1) / 2, m)."""
        # Whole rows are fetched, and the matrices are a view across them.
        return bend.index_select(0, self._places).T.unflatten(1, (self._r, self._r))


class CurvatureMap:
    """Steps by the inverse of a typical Hessian, which all rows share up to a factor.

    Parameters
    ----------
    design : Tensor of shape (q, r)
    variance : Tensor of shape (q,)
        Typical variances of the entries, times their weights.
    penalty : Tensor of shape (r,)
        Ridge penalties.
    n_rows : int or None
        Number of rows that scale the curvature to their own mean; None if they take it as it is.
    """

    def __init__(self, design: Tensor, variance: Tensor, penalty: Tensor, n_rows: int | None):
        # A decomposition as small as this takes a card longer than the host.
        shared = ((design * variance.unsqueeze(1)).T @ design).cpu()
        values, vectors = torch.linalg.eigh(shared.double())
        values = values.clamp_min(0)
        self._basis, self._spectrum = vectors.to(design), values.to(design)
        self._penalty = penalty.amax()
        self._typical = max(float(shared.diagonal().mean()), 1e-30)
        # Minus the inverse Hessian of all rows.
        self._shared_step: Tensor | Any = None
        # Mean curvature of each row, in units of the typical one.
        self._relative: Tensor | Any = None
        if n_rows is None:
            inner = values + float(penalty.amax())
            self._shared_step = -(_over(vectors, inner) @ vectors.T).to(design)
        else:
            self._relative = design.new_ones(n_rows)

    @property
    def adapts(self) -> bool:
        """Whether rows scale the curvature to their own."""
        return self._relative is not None

    def __getitem__(self, index: slice | Tensor) -> "CurvatureMap":
        part = copy.copy(self)
        if self.adapts:
            part._relative = self._relative[index].clone()
        return part

    def adapt(self, rows: Tensor, curvature: Tensor) -> None:
        """Take over the mean curvatures (m,) of some rows."""
        if self.adapts:
            self._relative[rows] = (curvature / self._typical).clamp(1e-3, 1e3)

    def step(self, gradient: Tensor, rows: Tensor) -> Tensor:
        """Return minus the inverse times the gradient (m, r)."""
        if not self.adapts:
            return gradient @ self._shared_step
        inner = self._penalty + self._relative[rows].unsqueeze(1) * self._spectrum
        return -_over(gradient @ self._basis, inner) @ self._basis.T


def _over(numerator: Tensor, curvature: Tensor) -> Tensor:
    """Divide; without penalty and without curvature there is nothing to go for."""
    return torch.where(curvature > 0, numerator / curvature, 0.0)
