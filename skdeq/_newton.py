"""Newton's method for many small problems at once, with a line search in every row."""

import copy

import torch
from torch import Tensor

from skdeq._fixed_point_problem import (
    CROWDED,
    FixedPointProblem,
    FixedPointResult,
    certified_residual,
    effective_tolerance,
)

__all__ = [
    "LEAST_PIVOT",
    "NewtonSystems",
    "backtrack",
    "confirm",
    "newton",
    "newton_step",
    "told_apart",
]

# Least share of an unknown's own curvature that the others may leave of it, in units of the
# precision. Where a row has fewer observed entries than latents, and next to no prior, less is
# left, and in float32 solutions are off by multiples of their size. From this share on by a
# percent.
LEAST_PIVOT = 100.0

# Sufficient decrease, and how often a step may be cut, in the backtracking line search.
_ARMIJO = 1e-4
_CUT = 0.3
_MAX_CUTS = 40
# Above this many unknowns a Hessian costs so much that it is used for as many steps as it is good
# for: as long as each multiplies the Newton decrement by this at most.
_LEAST_RANK_TO_REPEAT = 40
_SHRINKAGE = 0.1
# Near a solution, where the squared decrement is at most this, or this share of the objective, a
# Newton step leaves next to nothing of it, unless it is rounding.
_NEAR, _NEAR_SHARE = 1e-2, 1e-8
_STALLED = 0.5


def told_apart(factor: Tensor, diagonal: Tensor | float) -> Tensor:
    """Whether there are digits enough to tell the unknowns of each row apart, (m,), bool.

    Parameters
    ----------
    factor : Tensor of shape (m, r, r)
        Cholesky factors of Hessians.
    diagonal : Tensor of shape (m, r) or float
        Diagonals of the Hessians.
    """
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    return (pivots >= LEAST_PIVOT * torch.finfo(factor.dtype).eps * diagonal).all(-1)


class NewtonSystems:
    """Factorised Hessians of many rows.

    A Hessian that is not positive definite in floating point (a separated GLM) is damped just as
    much as it takes; damping leaves the stationary point where it is. What cannot be factorised
    at all gives steps of zero: nothing but numbers is ever returned.

    Parameters
    ----------
    hessian : Tensor of shape (m, r, r)

    Attributes
    ----------
    told_apart : Tensor of shape (m,), bool
        Whether there are digits enough for the unknowns of a row, see :func:`told_apart`.
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
        self.told_apart = told_apart(self.factor, 1.0) & ~failed
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
        for name in ("scale", "factor", "told_apart"):
            setattr(part, name, getattr(self, name)[index])
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
    result, step = z.clone(), NewtonSystems(hessian).solve(gradient)
    result[index], _ = _safeguarded(
        problem, z[index], step, gradient, objective[index], rows[index]
    )
    return result, objective, residual


def _safeguarded(
    problem: FixedPointProblem,
    z: Tensor,
    step: Tensor,
    gradient: Tensor,
    objective: Tensor,
    rows: Tensor,
    most: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take Newton steps, checked where they are not known to be safe; (point, length)."""
    pending = ~problem.is_safe(step, rows)
    return backtrack(problem, z, step, gradient, objective, rows, pending, most)


class _Look:
    """What Newton's method knows of some rows at a point.

    Attributes
    ----------
    objective, gradient : Tensor of shape (m,), (m, r)
    systems : NewtonSystems
    step : Tensor of shape (m, r)
        What to subtract from the point.
    decrement : Tensor of shape (m,)
        Squared Newton decrement: twice what the step is expected to gain.
    rounding : Tensor of shape (m,)
        Of the objective.
    scaled, residual : Tensor of shape (m,)
        Scaled residual, and what is certified, see :func:`certified_residual`.
    """

    def __init__(self, problem: FixedPointProblem, z: Tensor, rows: Tensor):
        self.objective, self.gradient, hessian, self.scaled = problem.derivatives(z, rows)
        self.systems = NewtonSystems(hessian)
        self.step = self.systems.solve(self.gradient)
        self.decrement = (self.gradient * self.step).sum(1)
        self.rounding = problem.rounding(self.objective, z, rows)
        self.residual = certified_residual(self.scaled, self.decrement, self.rounding)

    def residual_after(self, problem: FixedPointProblem, z: Tensor, rows: Tensor) -> Tensor:
        """Certify the rows (m,) at the ends of their whole steps from ``z``.

        A minimum on a kink is one with some slope between those of its two sides. On a ramp that
        steep a point has too few digits to say which, and the gradient there is all rounding: it
        neither vanishes nor has to. The step says what the slope comes to.
        """
        scaled = problem.residual_after(z, self.step, rows)
        return certified_residual(scaled, self.decrement, self.rounding)

    def __getitem__(self, index: Tensor) -> "_Look":
        part = copy.copy(self)
        part.systems = self.systems[index]
        for name in vars(self).keys() - {"systems"}:
            setattr(part, name, getattr(self, name)[index])
        return part


def backtrack(
    problem: FixedPointProblem,
    start: Tensor,
    step: Tensor,
    gradient: Tensor,
    objective: Tensor,
    rows: Tensor,
    pending: Tensor,
    most: Tensor | None = None,
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
    most : Tensor of shape (m,), optional
        What the objectives are to fall below; by default what those at the start are with all
        their rounding, which must not be taken for an increase.

    Returns
    -------
    point : Tensor of shape (m, r)
        Only the rows that failed are evaluated again; a row that never decreases stays put.
    length : Tensor of shape (m,)
        Lengths taken; next to none of those that stay put.
    """
    length, point = start.new_ones(len(start)), start - step
    left = pending.nonzero().squeeze(1)
    if not len(left):
        return point, length
    slope = (gradient * step).sum(1).double()
    if most is None:
        most = objective + problem.rounding(objective, start, rows)
    for _ in range(_MAX_CUTS):
        if not len(left):
            break
        trial = problem.objective(point[left], rows[left])
        bound = most[left] - _ARMIJO * length[left] * slope[left]
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
        A row stops once what certifies it is at most this, see :class:`FixedPointResult`.
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
    certain = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    rows = torch.arange(len(start), device=start.device)
    # Squared decrement before the last step, where that was a whole one.
    last = torch.full_like(residual, torch.inf)
    # What no step may lead above. Far out the rounding of one point is an increase at another.
    ceiling = torch.full_like(residual, torch.inf, dtype=torch.float64)
    again = start.shape[1] > _LEAST_RANK_TO_REPEAT
    while len(rows) and max_iter:
        z = value[rows]
        look = _Look(problem, z, rows)
        certain[rows] = look.systems.told_apart
        most = torch.minimum(ceiling[rows], look.objective + look.rounding)
        ceiling[rows] = most
        # Rows found solved here take the step they have paid for: it squares what error is left.
        z, length = _safeguarded(problem, z, look.step, look.gradient, look.objective, rows, most)
        # A whole step that gained nothing on the one before is down to what rounding leaves.
        near = look.decrement <= _NEAR + _NEAR_SHARE * look.objective.abs()
        stalled = near & (look.scaled <= tol) & (look.decrement >= _STALLED * last[rows])
        last[rows] = torch.where(length == 1, look.decrement, torch.inf)
        found = torch.where(stalled, look.scaled, look.residual)
        if problem.has_kinks:
            close = ~(found <= tol) & (length == 1) & (look.decrement <= tol)
            left = close.nonzero().squeeze(1)
            found[left] = look[left].residual_after(problem, value[rows[left]], rows[left])
        value[rows], residual[rows] = z, found
        unsolved = ~(found <= tol)
        n_iter[rows] += unsolved
        if again:
            whole = (unsolved & (length == 1)).nonzero().squeeze(1)
            at = rows[whole]
            spare = max_iter - n_iter[at]
            value[at], residual[at], taken = _repeat(
                problem, look[whole], z[whole], at, tol, spare
            )
            n_iter[at] += taken
        rows = rows[~(residual[rows] <= tol) & (n_iter[rows] < max_iter)]
    rows = (~(residual <= tol)).nonzero().squeeze(1)
    if len(rows):
        look = _Look(problem, value[rows], rows)
        residual[rows], certain[rows] = look.residual, look.systems.told_apart
    return FixedPointResult(value, residual, (residual <= tol) & certain, n_iter)


def confirm(
    problem: FixedPointProblem, result: FixedPointResult, *, tol: float, batch_rows: int
) -> None:
    """Look with their own Hessians at the rows that another solver calls solved, in place.

    Where curvatures have no bound, one that rows share may say little of a row's own.

    Parameters
    ----------
    problem : FixedPointProblem
    result : FixedPointResult
        Rows that are not solved after all are marked as such.
    tol : float
        That of the solver.
    batch_rows : int
        Rows whose Hessians are to be held at a time.
    """
    tol = effective_tolerance(tol, result.value.dtype)
    for rows in result.converged.nonzero().squeeze(1).split(batch_rows):
        look = _Look(problem, result.value[rows], rows)
        result.residual[rows] = torch.maximum(look.residual, result.residual[rows])
        result.converged[rows] = (look.residual <= tol) & look.systems.told_apart


def _repeat(
    problem: FixedPointProblem,
    look: _Look,
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
    z, decrement = z.clone(), look.decrement.clone()
    residual = torch.full_like(decrement, torch.inf)
    taken = torch.zeros_like(spare)
    before = z.clone()
    at = torch.arange(len(z), device=z.device)
    going = spare > 0
    left = int(going.sum())
    while left:
        if left <= CROWDED * len(at):
            stay = going.nonzero().squeeze(1)
            at, look, going = at[stay], look[stay], going[stay]
        gradient, found = problem.gradient(z[at], rows[at])
        step = look.systems.solve(gradient)
        size = (gradient * step).sum(1)
        found = certified_residual(found, size, look.rounding)
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
