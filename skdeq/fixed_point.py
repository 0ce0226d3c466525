r"""Solvers for many small fixed-point problems at once, each row with its own stopping rule.

A *problem* holds ``n_rows`` independent minimisations in ``r`` unknowns whose stationary
points are the fixed points of a map ``f``. The answer of a row is the point where its own residual
was below the tolerance, and does not depend on the rows that were solved beside it; solved rows
are left out as soon as that costs less than to go on with them.

The three solvers are plain functions with one signature::

    solver(problem, start, *, tol, max_iter) -> FixedPointResult

and ask of the problem only what they use (see :class:`FixedPointProblem`). Adding a solver is
one function and one row of :data:`SOLVERS`, and its name in one of the sets below where it forms
Hessians or must start from zero.
"""

from collections.abc import Callable

from ._fixed_point_problem import FixedPointProblem, FixedPointResult
from ._map_iterations import anderson, picard
from ._newton import newton

__all__ = [
    "SOLVERS",
    "SOLVERS_FROM_ZERO",
    "SOLVERS_WITH_HESSIANS",
    "FixedPointProblem",
    "FixedPointResult",
    "anderson",
    "newton",
    "picard",
]

SOLVERS: dict[str, Callable[..., FixedPointResult]] = {
    "newton": newton,
    "anderson": anderson,
    "picard": picard,
}

# Those that form the Hessian of every row: they work on fewer rows at a time, and have no use for
# a curvature that rows share.
SOLVERS_WITH_HESSIANS = frozenset({"newton"})
# Those that start from zero, as the layer does, although a better start is known.
SOLVERS_FROM_ZERO = frozenset({"picard"})
