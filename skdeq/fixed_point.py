r"""Solvers for many small fixed-point problems at once, each row with its own stopping rule.

A *problem* holds ``n_rows`` independent minimisations in ``r`` unknowns whose stationary
points are the fixed points of a map ``f``. The answer of a row is the point where its own residual
was below the tolerance, and does not depend on the rows that were solved beside it; solved rows
are left out as soon as that costs less than to go on with them.

The three solvers are plain functions with one signature::

    solver(problem, start, *, tol, max_iter) -> FixedPointResult

and ask of the problem only what they use (see :class:`FixedPointProblem`). Adding a solver is
one function and one row of :data:`SOLVERS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ._fixed_point_problem import FixedPointProblem, FixedPointResult
from ._map_iterations import anderson, picard
from ._newton import newton

__all__ = [
    "SOLVERS",
    "FixedPointProblem",
    "FixedPointResult",
    "Solver",
    "anderson",
    "newton",
    "picard",
]


@dataclass(frozen=True)
class Solver:
    """A solver and what is to be known of it; called, it solves.

    Attributes
    ----------
    solve : callable
        Of the signature above.
    forms_hessians : bool
        Whether it forms the Hessian of every row: it works on fewer rows at a time, and has no
        use for a curvature that rows share.
    starts_from_zero : bool
        Whether it starts from zero, as the layer does, although a better start is known.

    Examples
    --------
    >>> from skdeq.fixed_point import SOLVERS
    >>> SOLVERS["newton"].forms_hessians
    True
    """

    solve: Callable[..., FixedPointResult]
    forms_hessians: bool = False
    starts_from_zero: bool = False

    def __call__(
        self, problem: Any, start: Tensor, *, tol: float, max_iter: int
    ) -> FixedPointResult:
        """Solve a problem."""
        return self.solve(problem, start, tol=tol, max_iter=max_iter)


SOLVERS: dict[str, Solver] = {
    "newton": Solver(newton, forms_hessians=True),
    "anderson": Solver(anderson),
    "picard": Solver(picard, starts_from_zero=True),
}
