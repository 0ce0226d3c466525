"""What the equilibrium layer checks of its arguments."""

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_input", "check_numbers", "check_type", "checked_sizes", "checked_start"]


def checked_sizes(in_features: Any, hidden: Any, n_components: Any) -> tuple[int, ...]:
    """Validate the numbers of features and of latents of each layer, from the data to the top."""
    if not isinstance(hidden, list | tuple):
        raise TypeError(f"hidden_layer_sizes must be a tuple of integers; got {hidden!r}.")
    sizes = (in_features, *hidden, n_components)
    if not all(isinstance(size, Integral) and int(size) >= 1 for size in sizes):
        raise ValueError(
            "in_features, hidden_layer_sizes and n_components must be integers of at least 1; got "
            f"{in_features!r}, {tuple(hidden)!r} and {n_components!r}."
        )
    return tuple(int(size) for size in sizes)


def check_numbers(alpha: Any, tol: Any, max_iter: Any) -> None:
    """Validate the prior precision and when the solver is to stop."""
    if not (isinstance(alpha, Real) and 0 < float(alpha) < math.inf):
        raise ValueError(
            "alpha, the prior precision of the latents, must be a finite number > 0; got "
            f"{alpha!r}."
        )
    if not (isinstance(tol, Real) and float(tol) >= 0):
        raise ValueError(f"tol, the residual of a solved row, must be a number >= 0; got {tol!r}.")
    if not (isinstance(max_iter, Integral) and int(max_iter) >= 1):
        raise ValueError(f"max_iter must be an integer of at least 1; got {max_iter!r}.")


def check_input(x: Any) -> None:
    """Refuse what holds no rows of real numbers."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor; got {type(x).__name__}.")
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense tensor; got one of layout {x.layout}: use to_dense().")
    if x.is_complex():
        raise TypeError(f"x must hold real numbers; got a tensor of {x.dtype}.")
    if x.is_meta:
        raise TypeError("x is a tensor of device 'meta', which holds no numbers to solve for.")


def check_type(dtype: torch.dtype) -> None:
    """Refuse loadings of a type that torch solves no linear systems in."""
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(
            "EquilibriumLayer computes in float32 or float64, but its loadings are "
            f"{dtype}: convert it by float() or double()."
        )


def checked_start(start: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Bring a start to the type and device of ``like``, with zero in rows that are not finite."""
    if not isinstance(start, Tensor):
        raise TypeError(f"start must be a tensor; got {type(start).__name__}.")
    if start.shape != shape:
        raise ValueError(
            f"start must have shape {shape}, one row for each of x and the latents of all "
            f"layers side by side; got {tuple(start.shape)}."
        )
    start = start.detach().to(like)
    return torch.where(torch.isfinite(start).all(-1, keepdim=True), start, 0.0)
