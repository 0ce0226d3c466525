r"""Solvers for many small fixed-point problems at once, each row with its own stopping rule.

A *problem* holds ``n_rows`` independent convex minimisations in ``r`` unknowns whose stationary
points are the fixed points of a map ``f``. A row is frozen as soon as its own residual is below
the tolerance, and from then on costs nothing: the answer of a row does not depend on the rows
that were solved beside it.

The three solvers are plain functions with one signature::

    solver(problem, start, *, tol, max_iter) -> FixedPointResult

and ask of the problem only what they use (see :class:`FixedPointProblem`). Adding a solver is
one function and one row of :data:`SOLVERS`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["SOLVERS", "FixedPointProblem", "FixedPointResult", "anderson", "newton", "picard"]

# Sufficient decrease, and how often a step may be cut, in the backtracking line search.
_ARMIJO = 1e-4
_CUT = 0.3
_MAX_CUTS = 40
# Above this many unknowns a Hessian costs so much that it is used for as many steps as it is good
# for: as long as each multiplies the Newton decrement by this at most.
_LEAST_RANK_TO_REPEAT = 40
_SHRINKAGE = 0.1
# Past iterates that Anderson acceleration combines. Measured on binarised MNIST (k = 50): 2 need
# 18 iterations, 3 need 14.1, 4 need 13.8, 10 need 13.2, and the cost of an iteration grows with
# the memory.
_MEMORY = 4
# Iterations between looks at the rows: who is solved, and who has to go back. A look costs about
# half of what else an iteration does besides its matrix products.
_LOOK = 2
# Share of the rows at work beyond which solved ones are not worth taking out.
_CROWDED = 0.8
# Looks between evaluations of the curvature that scales the residual.
_REFRESH = 4


@dataclass(frozen=True)
class FixedPointResult:
    """Solution of every row with its certificate of convergence.

    Attributes
    ----------
    value : Tensor or ndarray of shape (n_rows, r)
        The solutions.
    residual : Tensor or ndarray of shape (n_rows,)
        Scaled residual, see :meth:`FixedPointProblem.gradient`: of the returned value or, with
        Newton's method, of the point one step before it.
    converged : Tensor or ndarray of shape (n_rows,)
        Whether the residual is within the tolerance.
    n_iter : Tensor or ndarray of shape (n_rows,)
        Iterations that each row took part in.
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
    """What the solvers ask of a problem; ``rows`` are the indices of the rows still at work."""

    scale_is_bounded: bool
    """Whether the curvature that scales the residual has a bound, and so cannot go far astray
    between two evaluations."""

    terms: float
    """Weight of the terms that the objective of a row sums up: what its rounding grows with."""

    def objective(self, z: Tensor, rows: Tensor) -> Tensor:
        """Objective of each row, float64, shape (m,); infinite outside the domain."""

    def gradient(self, z: Tensor, rows: Tensor, fresh: bool = True) -> tuple[Tensor, Tensor]:
        """Gradient (m, r) and the scaled residual (m,) at ``z``.

        Unless ``fresh``, the scale may be the one of the last call for these rows.
        """

    def bare_gradient(self, z: Tensor, rows: Tensor) -> Tensor:
        """Gradient (m, r) alone."""

    def step(self, gradient: Tensor, rows: Tensor) -> Tensor:
        """Displacement ``f(z) - z`` (m, r) of the problem's own map, from the gradient."""

    def derivatives(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Objective (m,), gradient (m, r), Hessian (m, r, r) and scaled residual (m,)."""

    def select(self, index: Tensor) -> "FixedPointProblem":
        """Return the problem of some rows, in the order given."""

    def is_safe(self, step: Tensor, rows: Tensor) -> Tensor:
        """Where a full Newton step is known to decrease the objective, bool (m,)."""


def effective_tolerance(tol: float, dtype: torch.dtype) -> float:
    """Tolerance that arithmetic in ``dtype`` can meet."""
    return max(tol, 8 * torch.finfo(dtype).eps)


class NewtonSystems:
    """Factorised Hessians of many rows.

    A Hessian that is not positive definite in floating point (a separated GLM) is damped just as
    much as it takes; damping leaves the stationary point where it is. What cannot be factorised
    at all gives steps of zero: nothing but numbers is ever returned.

    Parameters
    ----------
    hessian : Tensor of shape (m, r, r)
    """

    def __init__(self, hessian: Tensor):
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        smallest = torch.finfo(hessian.dtype).tiny
        # Jacobi scaling, so that damping acts alike on features of very different scales.
        self.scale = diagonal.clamp_min(smallest).rsqrt()
        scaled = hessian * self.scale.unsqueeze(-1) * self.scale.unsqueeze(-2)
        self.factor, info = torch.linalg.cholesky_ex(scaled)
        # The pivots of a matrix with an entry that is no number are no numbers either.
        pivots = self.factor.diagonal(dim1=-2, dim2=-1)
        failed = (info != 0) | ~torch.isfinite(pivots).all(-1)
        damping = 1e3 * torch.finfo(hessian.dtype).eps
        while bool(failed.any()) and damping < 1:
            index = failed.nonzero().squeeze(-1)
            damped = scaled[index]
            damped.diagonal(dim1=-2, dim2=-1).add_(damping)
            factor, info = torch.linalg.cholesky_ex(damped)
            good = info == 0
            good &= torch.isfinite(factor.diagonal(dim1=-2, dim2=-1)).all(-1)
            self.factor[index[good]] = factor[good]
            failed[index[good]] = False
            damping *= 100
        self.scale[failed] = 0.0

    def __getitem__(self, index: Tensor) -> "NewtonSystems":
        part = copy.copy(self)
        part.scale, part.factor = self.scale[index], self.factor[index]
        return part

    def solve(self, gradient: Tensor) -> Tensor:
        """Solve ``hessian @ step = gradient`` in every row."""
        right = (gradient * self.scale).unsqueeze(-1)
        step = torch.cholesky_solve(right, self.factor).squeeze(-1) * self.scale
        return torch.where(torch.isfinite(step).all(-1, keepdim=True), step, 0.0)


def newton_step(
    problem: FixedPointProblem, z: Tensor, rows: Tensor, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Take one safeguarded Newton (Fisher scoring) step in every row whose residual exceeds tol.

    The step is cut, row by row, until the objective decreases; a row whose step provably
    decreases it is not evaluated again.

    Parameters
    ----------
    problem : FixedPointProblem
    z : Tensor of shape (m, r)
        Where to step from.
    rows : Tensor of shape (m,)
        Indices of the rows in the problem.
    tol : float
        Scaled residual up to which a row stays where it is.

    Returns
    -------
    z : Tensor of shape (m, r)
        The new point.
    objective : Tensor of shape (m,)
        Objective at the point given.
    residual : Tensor of shape (m,)
        Scaled residual at the point given.
    """
    objective, gradient, hessian, residual = problem.derivatives(z, rows)
    # The one look at the device that says which rows move, and whether any or all do.
    index = (residual > tol).nonzero().squeeze(-1)
    if not len(index):
        return z, objective, residual
    if len(index) < len(z):
        gradient, hessian = gradient[index], hessian[index]
    result = z.clone()
    result[index], *_ = _safeguarded_step(
        problem, NewtonSystems(hessian), z[index], rows[index], objective[index], gradient
    )
    return result, objective, residual


def _safeguarded_step(
    problem: FixedPointProblem,
    systems: NewtonSystems,
    z: Tensor,
    rows: Tensor,
    objective: Tensor,
    gradient: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Newton step in every row, checked where not known to be safe; (point, step, length)."""
    step = systems.solve(gradient)
    pending = ~problem.is_safe(step, rows)
    point, length = backtrack(problem, z, step, gradient, objective, rows, pending)
    return point, step, length


def backtrack(
    problem: FixedPointProblem,
    start: Tensor,
    step: Tensor,
    gradient: Tensor,
    objective: Tensor,
    rows: Tensor,
    pending: Tensor,
    length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Go from ``start`` along ``-step``, cutting the length row by row until f decreases.

    Parameters
    ----------
    problem : FixedPointProblem
    start, step, gradient : Tensor of shape (m, r)
    objective : Tensor of shape (m,)
        At the start.
    rows : Tensor of shape (m,)
    pending : Tensor of shape (m,), bool
        Rows whose step must be checked.
    length : Tensor of shape (m,), optional
        First lengths, 1 by default.

    Returns
    -------
    point : Tensor of shape (m, r)
        Only the rows that failed are evaluated again; a row that never decreases stays put.
    length : Tensor of shape (m,)
        Lengths taken.
    """
    length = start.new_ones(len(start)) if length is None else length.clone()
    slope = (gradient * step).sum(1).double()
    # Rounding of the objective must not be taken for an increase.
    slack = torch.finfo(start.dtype).eps * (8 * objective.abs() + problem.terms)
    point = start - length.unsqueeze(1) * step
    left = pending.nonzero().squeeze(1)
    for _ in range(_MAX_CUTS):
        if not len(left):
            break
        trial = problem.objective(point[left], rows[left])
        bound = objective[left] - _ARMIJO * length[left] * slope[left] + slack[left]
        left = left[~(trial <= bound)]
        length[left] *= _CUT
        point[left] = start[left] - length[left].unsqueeze(1) * step[left]
    point[left] = start[left]
    return point, length


def newton(
    problem: FixedPointProblem, start: Tensor, *, tol: float, max_iter: int
) -> FixedPointResult:
    """Solve by Newton's method with a line search in every row.

    Converges from any start of a convex problem, whether or not the fixed-point map contracts.
    The Hessian of a row is used again for as long as steps with it shrink quickly (the method of
    Shamanskii): near the solution a further digit then costs a gradient.

    Parameters
    ----------
    problem : FixedPointProblem
    start : Tensor of shape (n_rows, r)
    tol : float
        A row stops once its scaled residual is at most this.
    max_iter : int
        Steps at most.

    Returns
    -------
    FixedPointResult
    """
    tol = effective_tolerance(tol, start.dtype)
    value = start.clone()
    residual = start.new_full((len(start),), torch.inf)
    n_iter = torch.zeros(len(start), dtype=torch.long, device=start.device)
    rows = torch.arange(len(start), device=start.device)
    again = start.shape[1] > _LEAST_RANK_TO_REPEAT
    while len(rows) and max_iter:
        z = value[rows]
        objective, gradient, hessian, found = problem.derivatives(z, rows)
        systems = NewtonSystems(hessian)
        # Rows found solved here take the step they have paid for: it squares what error is left.
        z, step, length = _safeguarded_step(problem, systems, z, rows, objective, gradient)
        value[rows], residual[rows] = z, found
        unsolved = found > tol
        n_iter[rows] += unsolved
        if again:
            whole = (unsolved & (length == 1)).nonzero().squeeze(1)
            decrement = (gradient[whole] * step[whole]).sum(1)
            at = rows[whole]
            spare = max_iter - n_iter[at]
            value[at], residual[at], taken = _repeat(
                problem, systems[whole], decrement, z[whole], at, tol, spare
            )
            n_iter[at] += taken
        rows = rows[(residual[rows] > tol) & (n_iter[rows] < max_iter)]
    rows = (residual > tol).nonzero().squeeze(1)
    if len(rows):
        residual[rows] = problem.gradient(value[rows], rows)[1]
    return FixedPointResult(value, residual, residual <= tol, n_iter)


def _repeat(
    problem: FixedPointProblem,
    systems: NewtonSystems,
    decrement: Tensor,
    z: Tensor,
    rows: Tensor,
    tol: float,
    spare: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Step with the same Hessians for as long as the decrements shrink; (z, residual, steps).

    The residual is infinite where the row is not found solved. No Newton step will square the
    error that is left here, which may exceed a residual in units of a diagonal Newton step by the
    condition of the Hessian: so a row has to do better than the tolerance by a digit.
    """
    tol = effective_tolerance(0.1 * tol, z.dtype)
    z, decrement = z.clone(), decrement.clone()
    residual = torch.full_like(decrement, torch.inf)
    taken = torch.zeros_like(spare)
    before = z.clone()
    at = torch.arange(len(z), device=z.device)
    going = spare > 0
    left = int(going.sum())
    while left:
        if left <= _CROWDED * len(at):
            stay = going.nonzero().squeeze(1)
            at, systems, going = at[stay], systems[stay], going[stay]
        gradient, found = problem.gradient(z[at], rows[at])
        step = systems.solve(gradient)
        size = (gradient * step).sum(1)
        shrunk = going & (size <= _SHRINKAGE * decrement[at])
        worse = ~(size <= decrement[at])
        # Where an overshoot has made the curvature enormous the scaled residual proves nothing.
        solved = going & (found <= tol) & ~worse
        # The step that led here is taken back if it led astray, unless it was Newton's own.
        astray = at[going & worse]
        z[astray] = before[astray]
        residual[at[solved]] = found[solved]
        go = at[shrunk]
        before[go] = z[go]
        z[go] -= step[shrunk]
        decrement[go] = size[shrunk]
        going = shrunk & ~solved
        taken[at] += going
        going &= taken[at] < spare[at]
        left = int(going.sum())
    return z, residual, taken


class _Descent:
    """Rows still at work of a solver without a line search, and the best point of each.

    Points are compared by their gradients. The scaled residual would not do: where an overshoot
    has made the curvature enormous, it is small far from any solution. A row whose gradient
    doubles goes back to its best point and halves its step from then on.
    """

    # Of the rows at work, from the first evaluation on.
    gradient: Tensor
    failed: Tensor

    def __init__(self, problem: FixedPointProblem, start: Tensor, tol: float, max_iter: int):
        n_rows = len(start)
        self.problem, self.tol, self._last = problem, tol, max_iter
        # Where the curvature has no bound a step may go astray, and the next ones farther.
        self._interval = _LOOK if problem.scale_is_bounded else 1
        self.result = FixedPointResult(
            start.clone(),
            start.new_full((n_rows,), torch.inf),
            torch.zeros(n_rows, dtype=torch.bool, device=start.device),
            torch.zeros(n_rows, dtype=torch.long, device=start.device),
        )
        # Place of each row at work in the result, and its number in the problem at work.
        self._places = torch.arange(n_rows, device=start.device)
        self.rows = self._places
        self._open = torch.ones(n_rows, dtype=torch.bool, device=start.device)
        self._n_open = n_rows
        self.z = start.clone()
        self.damping = start.new_ones(n_rows, 1)
        self.any_failed = False
        self._best = start.clone()
        self._size = start.new_full((n_rows,), torch.inf)
        self._residual = self._size.clone()

    def evaluate(self, iteration: int) -> bool:
        """Evaluate the gradient at ``z``; return whether the rows have been looked at as well.

        If so, what got worse is sent back and marked as ``failed``.
        """
        looks, between = divmod(iteration, self._interval)
        if between and iteration < self._last:
            self.gradient = self.problem.bare_gradient(self.z, self.rows)
            return False
        fresh = looks % _REFRESH == 0
        self.gradient, residual = self.problem.gradient(self.z, self.rows, fresh)
        if not fresh:
            # A certificate is worth something only with the scale of the very point, and a scale
            # from outside the domain is worth nothing.
            claimed = ((residual <= self.tol) | ~torch.isfinite(residual)).nonzero().squeeze(1)
            if len(claimed):
                at = self.problem.gradient(self.z[claimed], self.rows[claimed])
                residual[claimed] = at[1]
        size = self.gradient.abs().amax(1)
        better = size < self._size
        self.failed = ~(size <= 2 * self._size)
        self._best = torch.where(better.unsqueeze(1), self.z, self._best)
        self._size = torch.where(better, size, self._size)
        self._residual = torch.where(better, residual, self._residual)
        back = self.failed.nonzero().squeeze(1)
        self.any_failed = len(back) > 0
        if self.any_failed:
            self.damping[back] *= 0.5
            self.z[back] = self._best[back]
            self.gradient[back] = self.problem.bare_gradient(self._best[back], self.rows[back])
        return True

    def retire(self) -> Tensor | None:
        """Write down the rows that are solved; return the others once it pays to leave them.

        A row that is written down may be worked on a little longer, until a fifth are: moving the
        others together costs more than that.
        """
        done = ((self._residual <= self.tol) & self._open).nonzero().squeeze(1)
        if not len(done):
            return None
        self._write(done)
        self._open[done] = False
        self._n_open -= len(done)
        if self._n_open > _CROWDED * len(self.rows):
            return None
        stay = self._open.nonzero().squeeze(1)
        for name in ("_places", "_open", "z", "damping", "gradient", "failed"):
            setattr(self, name, getattr(self, name)[stay])
        for name in ("_best", "_size", "_residual"):
            setattr(self, name, getattr(self, name)[stay])
        self.problem = self.problem.select(stay)
        self.rows = torch.arange(self._n_open, device=stay.device)
        return stay

    def count(self) -> None:
        """Count an iteration for the rows that are not solved."""
        self.result.n_iter[self._places] += self._open

    def finish(self) -> FixedPointResult:
        """Write down the rest."""
        self._write(self._open.nonzero().squeeze(1))
        return self.result

    def _write(self, which: Tensor) -> None:
        """Write down the rows at work with these indices."""
        places = self._places[which]
        self.result.value[places] = self._best[which]
        self.result.residual[places] = self._residual[which]
        self.result.converged[places] = self._residual[which] <= self.tol


def picard(
    problem: FixedPointProblem, start: Tensor, *, tol: float, max_iter: int
) -> FixedPointResult:
    """Solve by repeating the map, ``z <- f(z)``, as the equilibrium layer unrolled would.

    A row whose gradient is found doubled returns to its best point and halves its step from then
    on, so that a map that does not contract makes a row slow but not infinite.

    Parameters
    ----------
    problem : FixedPointProblem
    start : Tensor of shape (n_rows, r)
    tol : float
        A row stops once its scaled residual is at most this.
    max_iter : int
        Applications of the map at most.

    Returns
    -------
    FixedPointResult
    """
    state = _Descent(problem, start, effective_tolerance(tol, start.dtype), max_iter)
    for iteration in range(max_iter + 1):
        if state.evaluate(iteration):
            state.retire()
        if not len(state.rows) or iteration == max_iter:
            break
        state.z = state.z + state.damping * state.problem.step(state.gradient, state.rows)
        state.count()
    return state.finish()


def anderson(
    problem: FixedPointProblem, start: Tensor, *, tol: float, max_iter: int
) -> FixedPointResult:
    """Solve by Anderson acceleration of the map, with a memory of its own in every row.

    The differences of past steps are kept orthonormal, each with the change of the point that
    goes with it: the least-squares problem of an iteration is then a few dot products instead
    of a linear system per row. A row whose gradient doubles forgets its memory and restarts from
    its best point with half the step.

    Parameters
    ----------
    problem : FixedPointProblem
    start : Tensor of shape (n_rows, r)
    tol : float
        A row stops once its scaled residual is at most this.
    max_iter : int
        Applications of the map at most.

    Returns
    -------
    FixedPointResult
    """
    state = _Descent(problem, start, effective_tolerance(tol, start.dtype), max_iter)
    n_rows, r = start.shape
    memory = min(_MEMORY, r)
    # Orthonormal differences of steps, and what undoing one of them does to the next point.
    directions = start.new_zeros(memory, n_rows, r)
    responses = start.new_zeros(memory, n_rows, r)
    last_z = last_step = start
    smallest = torch.finfo(start.dtype).tiny
    for iteration in range(max_iter + 1):
        looked = state.evaluate(iteration)
        stay = state.retire() if looked else None
        if not len(state.rows) or iteration == max_iter:
            break
        if stay is not None:
            directions, responses = directions[:, stay], responses[:, stay]
            last_z, last_step = last_z[stay], last_step[stay]
        z, step = state.z, state.damping * state.problem.step(state.gradient, state.rows)
        state.z = z + step
        if iteration:
            if looked and state.any_failed:
                # What these rows remember belongs to another place.
                failed = state.failed.unsqueeze(1)
                directions.masked_fill_(failed, 0)
                responses.masked_fill_(failed, 0)
                last_z = torch.where(failed, z, last_z)
                last_step = torch.where(failed, step, last_step)
            slot = (iteration - 1) % memory
            directions[slot] = 0
            responses[slot] = 0
            change = step - last_step
            response = z - last_z + change
            known = (directions * change).sum(2, keepdim=True)
            before = change.square().sum(1, keepdim=True)
            change -= (known * directions).sum(0)
            response -= (known * responses).sum(0)
            size = change.square().sum(1, keepdim=True)
            # Nothing new: the slot stays empty.
            useful = size > 1e-8 * before
            scale = torch.where(useful, size.clamp_min(smallest).rsqrt(), torch.zeros_like(size))
            torch.mul(change, scale, out=directions[slot])
            torch.mul(response, scale, out=responses[slot])
            weights = (directions * step).sum(2, keepdim=True)
            state.z -= (weights * responses).sum(0)
        last_z, last_step = z, step
        state.count()
    return state.finish()


SOLVERS: dict[str, Callable[..., FixedPointResult]] = {
    "newton": newton,
    "anderson": anderson,
    "picard": picard,
}
