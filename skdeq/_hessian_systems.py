"""Linear systems with the Hessians of many rows, formed where that is cheap."""

import torch
from torch import Tensor

from skdeq._chunks import map_chunks
from skdeq._fixed_point_problem import effective_tolerance
from skdeq._map_geometry import CurvatureMap
from skdeq._map_problem import MapProblem
from skdeq.implicit import factored, solve_factored

__all__ = ["solve_hessians"]

# From this many unknowns on some twenty products with a Hessian cost less than to form it.
# Measured on binarised MNIST: at 32 unknowns half as much again, at 50 as much, at 64 two thirds.
_LEAST_RANK_TO_ITERATE = 50
# Products at most; a Hessian that takes more is formed after all.
_MAX_ITER = 40
# Iterations between looks at the device, but that rows with one Hessian are solved by the first.
_LOOK = 3


def solve_hessians(problem: MapProblem, latents: Tensor, right: Tensor, tol: float) -> Tensor:
    """Solve ``hessian(latents) @ solution = right`` in every row.

    Parameters
    ----------
    problem : MapProblem
        Convex, and well conditioned at the latents.
    latents, right : Tensor of shape (n, r)
    tol : float
        Relative error of what is solved by iterations.

    Returns
    -------
    Tensor of shape (n, r)
    """
    # Hessians of Gaussian rows differ in their gaps alone: one or two iterations.
    iterate = problem.r >= _LEAST_RANK_TO_ITERATE or problem.family.has_constant_variance

    def work(low: int, high: int) -> Tensor:
        part, z, b = problem.chunk(low, high), latents[low:high], right[low:high]
        solution, left = torch.zeros_like(b), torch.arange(high - low, device=b.device)
        if iterate:
            solution, solved = _conjugate_gradients(part, z, b, tol)
            left = left[~solved]
        for rows in left.split(problem.hessian_rows()):
            factor, _ = factored(part.derivatives(z[rows], rows)[2])
            solution[rows] = solve_factored(factor, b[rows])
        return solution

    size = problem.chunk_rows() if iterate else problem.hessian_rows()
    return torch.cat(map_chunks(work, len(right), size, right.device))


def _conjugate_gradients(
    problem: MapProblem, latents: Tensor, right: Tensor, tol: float
) -> tuple[Tensor, Tensor]:
    """Solve the systems of a chunk; return solutions (m, r) and which are found (m,).

    Preconditioned by the Hessian of the average row, scaled to the curvature of each.
    """
    design, rows = problem.design, torch.arange(len(latents), device=latents.device)
    variance = problem.variance(latents, rows)
    average = CurvatureMap(design, variance.mean(0), problem.penalty, len(latents))
    average.adapt(rows, variance @ design.square().mean(1))
    tiny = torch.finfo(right.dtype).tiny
    solution, residual = torch.zeros_like(right), right.clone()
    direction = -average.step(residual, rows)
    size = (residual * direction).sum(1, keepdim=True)
    goal = effective_tolerance(tol, right.dtype) ** 2 * size
    for iteration in range(_MAX_ITER):
        if (iteration == 1 or iteration % _LOOK == 0) and bool((size <= goal).all()):
            break
        image = torch.mm(direction, design.T).mul_(variance) @ design
        image.addcmul_(direction, problem.penalty)
        length = size / (direction * image).sum(1, keepdim=True).clamp_min(tiny)
        solution.addcmul_(direction, length)
        residual.addcmul_(image, length, value=-1)
        shaped = -average.step(residual, rows)
        last, size = size, (residual * shaped).sum(1, keepdim=True)
        direction = torch.addcmul(shaped, direction, size / last.clamp_min(tiny))
    return solution, (size <= goal).squeeze(1)
