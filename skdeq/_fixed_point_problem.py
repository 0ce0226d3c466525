"""What a fixed-point problem offers its solvers, and what they return."""

from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Protocol, Self

import torch
from torch import Tensor

__all__ = [
    "CROWDED",
    "OF_ROWS",
    "FixedPointProblem",
    "FixedPointResult",
    "LatentProblem",
    "certified_residual",
    "effective_tolerance",
    "scaled_residual",
    "usable_hessian",
]

# Share of the rows at work beyond which solved ones are not worth taking out.
CROWDED = 0.8
# Fields of a result that have one entry or row for each row.
OF_ROWS = ("value", "residual", "converged", "n_iter")


@dataclass(frozen=True)
class FixedPointResult:
    """Solution of every row with its certificate of convergence.

    Attributes
    ----------
    value : Tensor or ndarray of shape (n_rows, r)
        The solutions.
    residual : Tensor or ndarray of shape (n_rows,)
        The larger of scaled residual and squared Newton decrement. It is that of the value
        returned or, with Newton's method, of the point one step before; of a row that is solved
        it may be an upper bound. It is 0 where only rounding is left of the decrement.
    converged : Tensor or ndarray of shape (n_rows,)
        Whether the residual is within the tolerance, and, where Hessians were formed, that of the
        row has digits enough to tell its unknowns apart.
    n_iter : Tensor or ndarray of shape (n_rows,)
        Iterations until each row was solved. Newton's method takes one more step, unseen.
    layers : tuple of Tensor or ndarray of shape (n_rows, r_l)
        The unknowns of each layer, from the data to the top, where there are several layers: a
        view of `value`. With one layer it is `value` alone.
    layer_sizes : tuple of int
        Numbers of unknowns of the layers; empty stands for one layer.
    """

    value: Tensor
    residual: Tensor
    converged: Tensor
    n_iter: Tensor
    layer_sizes: tuple[int, ...] = field(default=(), repr=False)

    def to(self, dtype: torch.dtype) -> "FixedPointResult":
        """Return the same result in another floating point type."""
        return replace(self, value=self.value.to(dtype), residual=self.residual.to(dtype))

    def take(self, rows: Tensor) -> "FixedPointResult":
        """Return the result of some rows, in the order given."""
        return replace(self, **{name: getattr(self, name)[rows] for name in OF_ROWS})

    def put_(self, rows: Tensor, other: "FixedPointResult") -> None:
        """Replace the result of some rows, in place."""
        for name in OF_ROWS:
            getattr(self, name)[rows] = getattr(other, name)

    @property
    def layers(self) -> tuple[Tensor, ...]:
        """Unknowns of each layer, from the data to the top."""
        if not self.layer_sizes:
            return (self.value,)
        ends = list(accumulate(self.layer_sizes))
        return tuple(
            self.value[:, end - size : end]
            for end, size in zip(ends, self.layer_sizes, strict=True)
        )


class FixedPointProblem(Protocol):
    """What the solvers ask of a problem.

    ``rows`` are the indices of the rows still at work, in increasing order and once each.
    """

    scale_is_bounded: bool
    """Whether the curvature that scales the residual has a bound, and so cannot go far astray
    between two evaluations."""

    @property
    def has_kinks(self) -> bool:
        """Whether slopes change within so little that rounding of a point tells in them."""

    def objective(self, z: Tensor, rows: Tensor) -> Tensor:
        """Objective of each row, float64, shape (m,); infinite outside the domain."""

    def rounding(self, objective: Tensor, z: Tensor, rows: Tensor) -> Tensor:
        """Error (m,) that rounding may have made in the objectives at ``z``."""

    def gradient(self, z: Tensor, rows: Tensor, fresh: bool = True) -> tuple[Tensor, Tensor]:
        """Gradient (m, r) and the scaled residual (m,) at ``z``.

        Unless ``fresh``, the residual may be a bound of it, from the scale of the last call for
        these rows that was.
        """

    def bare_gradient(self, z: Tensor, rows: Tensor) -> Tensor:
        """Gradient (m, r) alone."""

    def step(self, gradient: Tensor, rows: Tensor) -> Tensor:
        """Displacement ``f(z) - z`` (m, r) of the problem's own map, from the gradient."""

    def shaped_step(self, gradient: Tensor, rows: Tensor) -> Tensor:
        """Displacement (m, r) of a map with the same fixed points that contracts faster.

        It is that of `step` where nothing is known of the curvature.
        """

    def derivatives(
        self, z: Tensor, rows: Tensor, observed: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Objective (m,), gradient (m, r), Hessian (m, r, r) and scaled residual (m,).

        The Hessian is one that Newton's method can use, or with ``observed`` the second
        derivatives themselves, definite or not.
        """

    def residual_after(self, z: Tensor, step: Tensor, rows: Tensor) -> Tensor:
        """Scaled residual (m,) at ``z - step``, where there are kinks.

        The step moves the predictors, which are then known to more digits than of the point.
        """

    def select(self, index: Tensor) -> "FixedPointProblem":
        """Return the problem of some rows, in the order given."""

    def is_safe(self, step: Tensor, rows: Tensor) -> Tensor:
        """Where a full Newton step is known to decrease the objective, bool (m,)."""


class LatentProblem(FixedPointProblem, Protocol):
    """Latents of rows that can be solved some at a time.

    Attributes
    ----------
    n_rows, r : int
        Numbers of rows and of unknowns of each.
    """

    n_rows: int
    r: int

    def chunk(self, start: int, stop: int) -> Self:
        """Return the problem of the rows ``start:stop``."""

    def select(self, index: Tensor) -> Self:
        """Return the problem of some rows, in the order given."""

    def chunk_rows(self) -> int:
        """Rows to be worked on at a time."""

    def hessian_rows(self) -> int:
        """Rows whose Hessians are to be held at a time."""

    def smooth(self, width: float) -> None:
        """Round off the kinks of the maps, if there are any, over a width."""

    def extent(self, z: Tensor) -> Tensor:
        """Return what the linear predictors of each row (m,) come to at most at ``z``."""


def scaled_residual(gradient: Tensor, z: Tensor, stiffness: Tensor) -> Tensor:
    r"""Largest entry of ``|f(z) - z|`` in units of a diagonal Newton step, (m,).

    The raw residual ``gradient / penalty`` has no scale: with a weak prior it is huge at points
    that are exact to the last digit. Dividing by the mean stiffness instead of the penalty, and
    by ``1 + max |z|``, makes it an estimate of the relative error of z.

    Parameters
    ----------
    gradient, z : Tensor of shape (m, r)
    stiffness : Tensor of shape (m,)
        Penalty plus curvature, averaged over the unknowns.
    """
    scale = stiffness * (1 + z.abs().amax(1))
    residual = gradient.abs().amax(1) / scale
    # Outside the domain the curvature is infinite, and nothing is solved.
    return torch.where(torch.isfinite(scale), residual, torch.inf)


def certified_residual(
    residual: Tensor, decrement: Tensor, rounding: Tensor, caution: float = 1.0
) -> Tensor:
    """Return the larger of residual and squared decrement (m,); 0 where rounding explains it.

    In units of a diagonal step an error along a direction that the data say little of is too small
    to be seen, and so is any error of latents that are all far below one.

    Parameters
    ----------
    residual : Tensor of shape (m,)
        Scaled residual.
    decrement : Tensor of shape (m,)
        Squared Newton decrement.
    rounding : Tensor of shape (m,)
        Of the objective; not finite where nothing is known.
    caution : float
        Times what it is here that the decrement may be.
    """
    decrement = torch.nan_to_num(decrement, nan=torch.inf, posinf=torch.inf)
    # Of a term of the gradient, of size t with a variance of about that size, an error of e t adds
    # e^2 t. A step of zero where the Hessian could not be factorised tells nothing.
    noise = torch.finfo(decrement.dtype).eps * rounding
    is_noise = (decrement > 0) & (decrement <= noise) & torch.isfinite(noise)
    return torch.where(is_noise, 0.0, torch.maximum(residual, caution * decrement))


def effective_tolerance(tol: float, dtype: torch.dtype) -> float:
    """Tolerance that arithmetic in ``dtype`` can meet."""
    return max(tol, 8 * torch.finfo(dtype).eps)


def usable_hessian(exact: Tensor, expected: Tensor) -> Tensor:
    """Observed Hessians where they are positive definite, expected ones elsewhere."""
    usable = torch.linalg.cholesky_ex(exact)[1] == 0
    return torch.where(usable[:, None, None], exact, expected)
