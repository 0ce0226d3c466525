"""Implicit differentiation of minimisers: gradients without unrolling a solver."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["attach_gradient"]


def attach_gradient(
    solution: Tensor, gradient: Callable[[Tensor], Tensor], hessian: Tensor
) -> Tensor:
    r"""Give minimisers the derivative that the implicit function theorem says they have.

    Where ``g(z*, theta) = 0``, the derivative of z* is ``-H^{-1} dg/dtheta`` with
    ``H = dg/dz``. One Newton step ``z* - H^{-1} g(z*, theta)`` with z* and H held constant has
    that derivative; its value is left at z*. Backward it solves one linear system
    per row, and keeps nothing of the iterations that led to z*. There is no second derivative: a
    backward pass with ``create_graph=True`` raises a RuntimeError.

    Parameters
    ----------
    solution : Tensor of shape (n, k)
        The minimisers z*, however found.
    gradient : callable
        ``gradient(z)`` (n, k), differentiable in whatever the derivative is wanted of.
    hessian : Tensor of shape (n, k, k)
        Symmetric and positive definite, at the solution. A row where it is not positive definite
        is given no derivative.

    Returns
    -------
    Tensor of shape (n, k)

    Examples
    --------
    The minimiser of ``z^2 / 2 - a z`` is a:

    >>> import torch
    >>> from skdeq.implicit import attach_gradient
    >>> a = torch.tensor([[3.0]], requires_grad=True)
    >>> z = attach_gradient(torch.tensor([[3.0]]), lambda z: z - a, torch.ones(1, 1, 1))
    >>> z.backward()
    >>> a.grad
    tensor([[1.]])
    """
    return attach_factored(solution, gradient, *factored(hessian))


def factored(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors of Hessians (n, k, k), and which of them (n,) have one.

    The others have the identity for it.
    """
    factor, info = torch.linalg.cholesky_ex(hessian.detach())
    identity = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    definite = info == 0
    return torch.where(definite[:, None, None], factor, identity), definite


def solve_factored(factor: Tensor, right: Tensor) -> Tensor:
    """Solve the systems (n, k, k) with these Cholesky factors for right-hand sides (n, k)."""
    return torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)


def attach_factored(
    solution: Tensor, gradient: Callable[[Tensor], Tensor], factor: Tensor, definite: Tensor
) -> Tensor:
    """Do as :func:`attach_gradient` does, with what :func:`factored` returns."""
    solution = solution.detach()
    step = torch.where(definite.unsqueeze(1), _newton_step(gradient(solution), factor), 0.0)
    return solution - step


def attach_solver(
    solution: Tensor, gradient: Callable[[Tensor], Tensor], solve: Callable[[Tensor], Tensor]
) -> Tensor:
    """Do as :func:`attach_gradient` does, with Hessians that nothing is done for until backward.

    There ``solve(right)`` is to solve their systems for right-hand sides (n, k).
    """
    solution = solution.detach()
    return solution - _SolveLater.apply(gradient(solution), solve)


# Not traced by torch.compile, which would settle once and for all whether a graph is asked for.
@torch.compiler.allow_in_graph
def _newton_step(gradient: Tensor, factor: Tensor) -> Tensor:
    return _Solve.apply(gradient, factor)


class _Solve(torch.autograd.Function):
    """The Newton step from a minimiser, which is zero, with its derivative in the gradient."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return torch.zeros_like(gradient)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        _refuse_second_derivative()
        (factor,) = ctx.saved_tensors
        return solve_factored(factor, outer), None


class _SolveLater(torch.autograd.Function):
    """The same with a function that solves the systems."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.solve = solve
        return torch.zeros_like(gradient)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        _refuse_second_derivative()
        return ctx.solve(outer), None


def _refuse_second_derivative() -> None:
    # True in a backward pass under create_graph alone. The solution and its Hessian are held
    # constant, so that the graph that is asked for would be that of another function.
    if torch.is_grad_enabled():
        raise RuntimeError(
            "An equilibrium has no second derivative: create_graph=True asks for one of "
            "skdeq.implicit.attach_gradient or skdeq.nn.EquilibriumLayer, whose backward "
            "pass can be taken without create_graph only."
        )
