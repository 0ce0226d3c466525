"""Iterations of the equilibrium map itself: plain, and with Anderson acceleration."""

import torch
from torch import Tensor

from skdeq._fixed_point_problem import (
    CROWDED,
    FixedPointProblem,
    FixedPointResult,
    effective_tolerance,
)

__all__ = ["anderson", "picard"]

# Past iterates that Anderson acceleration combines. Measured on binarised MNIST (k = 50): 2 need
# 18 iterations, 3 need 14.1, 4 need 13.8, 10 need 13.2, and the cost of an iteration grows with
# the memory.
_MEMORY = 3
# Iterations between looks at the rows: who is solved, and who has to go back. A look costs about
# half of what else an iteration does besides its matrix products.
_LOOK = 2
# Looks without a better point after which a row goes back to its best one: it may go round in a
# circle in which no gradient doubles.
_PATIENCE = 8
# Looks between evaluations of the curvature that scales the residual.
_REFRESH = 4


class _Descent:
    """Rows still at work of a solver without a line search, and the best point of each.

    Points are compared by their gradients. The scaled residual would not do: where an overshoot
    has made the curvature enormous, it is small far from any solution. A row whose gradient
    doubles, or does not get smaller for long, goes back to its best point and halves its step
    from then on.
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
        self._n_iter = 0
        # Looks since the best point was found.
        self._stale = torch.zeros_like(self._places)

    def evaluate(self, iteration: int) -> bool:
        """Evaluate the gradient at ``z``; return whether the rows have been looked at as well.

        If so, what got worse is sent back and marked as ``failed``. ``iteration`` counts those
        that have led here.
        """
        self._n_iter = iteration
        looks, between = divmod(iteration, self._interval)
        if between and iteration < self._last:
            self.gradient = self.problem.bare_gradient(self.z, self.rows)
            return False
        self.gradient, residual = self.problem.gradient(
            self.z, self.rows, fresh=looks % _REFRESH == 0
        )
        size = self.gradient.abs().amax(1)
        better = size < self._size
        self._stale = torch.where(better, 0, self._stale + 1)
        self.failed = ~(size <= 2 * self._size) | (self._stale >= _PATIENCE)
        self._stale.masked_fill_(self.failed, 0)
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
        if self._n_open > CROWDED * len(self.rows):
            return None
        stay = self._open.nonzero().squeeze(1)
        at_work = ("z", "gradient", "damping", "failed")
        for name in ("_places", "_open", "_best", "_size", "_residual", "_stale", *at_work):
            setattr(self, name, getattr(self, name)[stay])
        self.problem = self.problem.select(stay)
        self.rows = torch.arange(self._n_open, device=stay.device)
        return stay

    def finish(self) -> FixedPointResult:
        """Write down the rest, with the residuals of their very points."""
        rest = self._open.nonzero().squeeze(1)
        if len(rest):
            point, rows = self._best[rest], self.rows[rest]
            self._residual[rest] = self.problem.gradient(point, rows)[1]
        self._write(rest)
        return self.result

    def _write(self, which: Tensor) -> None:
        """Write down the rows at work with these indices."""
        places = self._places[which]
        self.result.value[places] = self._best[which]
        self.result.residual[places] = self._residual[which]
        self.result.n_iter[places] = self._n_iter
        self.result.converged[places] = self._residual[which] <= self.tol


def picard(
    problem: FixedPointProblem, start: Tensor, *, tol: float, max_iter: int
) -> FixedPointResult:
    """Solve by repeating the map, ``z <- f(z)``, as the equilibrium layer unrolled would.

    A row whose gradient is found doubled, or no smaller for long, returns to its best point and
    halves its step from then on, so that a map that does not contract makes a row slow but
    neither infinite nor go round for ever.

    Parameters
    ----------
    problem : FixedPointProblem
    start : Tensor of shape (n_rows, r)
    tol : float
        A row stops once what certifies it is at most this, see :class:`FixedPointResult`.
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
    return state.finish()


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(1, keepdim=True)


class _Memory:
    """Differences of the past steps of every row, orthonormal, and what goes with each.

    The least-squares problem of an iteration of Anderson acceleration is then a few dot products
    instead of a linear system per row.

    Parameters
    ----------
    most : int
        Differences at most.
    """

    def __init__(self, most: int):
        self._most = most
        self._directions: list[Tensor] = []
        # What undoing one of them does to the next point, and how much of it the last step has.
        self._responses: list[Tensor] = []
        self._weights: list[Tensor] = []

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        for kept in (self._directions, self._responses, self._weights):
            kept[:] = [one[rows] for one in kept]

    def forget(self, rows: Tensor) -> None:
        """Forget what rows (m, 1), bool, remember."""
        for one in (*self._directions, *self._responses, *self._weights):
            one.masked_fill_(rows, 0)

    def learn(self, step: Tensor, change: Tensor, response: Tensor) -> None:
        """Take in the last step, how it changed, and what the next point has of the change.

        Both differences are written over.
        """
        if len(self._directions) == self._most:
            for kept in (self._directions, self._responses, self._weights):
                del kept[0]
        before = _dot(change, change)
        for direction, undone, weight in zip(
            self._directions, self._responses, self._weights, strict=True
        ):
            known = _dot(direction, change)
            change.addcmul_(direction, known, value=-1)
            response.addcmul_(undone, known, value=-1)
            weight.add_(known)
        size = _dot(change, change)
        # Nothing new: the slot stays empty.
        useful = size > 1e-8 * before
        smallest = torch.finfo(size.dtype).tiny
        scale = torch.where(useful, size.clamp_min(smallest).rsqrt(), torch.zeros_like(size))
        self._directions.append(change.mul_(scale))
        self._responses.append(response.mul_(scale))
        self._weights.append(_dot(change, step))

    def correct_(self, z: Tensor) -> None:
        """Undo, in the next point, what of the last step is known to be undone."""
        for undone, weight in zip(self._responses, self._weights, strict=True):
            z.addcmul_(undone, weight, value=-1)


def anderson(
    problem: FixedPointProblem, start: Tensor, *, tol: float, max_iter: int
) -> FixedPointResult:
    """Solve by Anderson acceleration of the map, with a memory of its own in every row.

    A row whose gradient doubles forgets its memory and restarts from its best point with half the
    step.

    Parameters
    ----------
    problem : FixedPointProblem
    start : Tensor of shape (n_rows, r)
    tol : float
        A row stops once what certifies it is at most this, see :class:`FixedPointResult`.
    max_iter : int
        Applications of the map at most.

    Returns
    -------
    FixedPointResult
    """
    state = _Descent(problem, start, effective_tolerance(tol, start.dtype), max_iter)
    memory = _Memory(min(_MEMORY, start.shape[1]))
    last_z = last_step = start
    for iteration in range(max_iter + 1):
        looked = state.evaluate(iteration)
        stay = state.retire() if looked else None
        if not len(state.rows) or iteration == max_iter:
            break
        if stay is not None:
            memory.keep(stay)
            last_z, last_step = last_z[stay], last_step[stay]
        z = state.z
        step = state.damping * state.problem.shaped_step(state.gradient, state.rows)
        state.z = z + step
        if iteration:
            if looked and state.any_failed:
                # What these rows remember belongs to another place.
                failed = state.failed.unsqueeze(1)
                memory.forget(failed)
                last_z = torch.where(failed, z, last_z)
                last_step = torch.where(failed, step, last_step)
            change = step - last_step
            memory.learn(step, change, torch.sub(z, last_z).add_(change))
            memory.correct_(state.z)
        last_z, last_step = z, step
    return state.finish()
