"""ConvergenceDisplay: the objective by iteration, and what is left of each row's fixed point."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.utils._optional_dependencies import check_matplotlib_support

from skdeq._display import (
    LINE_COLOR,
    PALETTE,
    check_option,
    divide_axes,
    fitted_step,
    rows_for,
    style,
)
from skdeq._expfam_deq import ExpFamilyDEQ
from skdeq._implicit_em import ImplicitEMEncoder
from skdeq._typing import MatrixLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ConvergenceDisplay"]

_KINDS = ("objective", "gap")
# Bins of the histogram over the range of the residuals.
_BINS = 30
# Rows that are not solved up to which each has a mark of its own.
_MOST_MARKS = 100


class ConvergenceDisplay:
    """Objective by iteration and, for ExpFamilyDEQ, the residual of every row.

    Make one by `from_estimator`. All parameters are stored as attributes.

    Parameters
    ----------
    loss_curve : array-like of shape (n_iterations,)
        Objective at each iteration.

    residuals : array-like of shape (n_samples,), default=None
        Residual of the fixed point of each row, as `map_latents` returns it.

    converged : array-like of bool of shape (n_samples,), default=None
        Whether each row is solved; None compares the residuals to `tol`.

    tol : float, default=None
        Residual at which a row counts as solved, `fixed_point_tol`.

    fit_converged : bool, default=None
        Whether the fit met its own tolerance, `converged_`; None says nothing about it.

    loss_name : str, default="Objective"
        What the curve shows.

    iteration_name : str, default="Iteration"
        What its entries are.

    Attributes
    ----------
    line_ : Line2D
        The objective.
    end_ : Line2D or None
        The mark of the last iteration: full if the fit converged, hollow if not.
    histogram_ : list of two BarContainer, or None
        Residuals of the rows that are solved and, on top, of those that are not.
    tolerance_line_ : Line2D or None
        The tolerance.
    unsolved_ : Line2D or None
        A mark for each row that is not solved, if these are at most 100.
    axes_ : ndarray of Axes
        The axes of the objective and, with residuals, of those.
    bounding_ax_ : Axes or None
        The axes that were divided in two, if any.
    figure_ : Figure
        The figure that has them.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> from sklearn.datasets import load_digits
    >>> from skdeq import ExpFamilyDEQ
    >>> from skdeq.families import Binomial
    >>> from skdeq.inspection import ConvergenceDisplay
    >>> X, _ = load_digits(return_X_y=True)
    >>> model = ExpFamilyDEQ(2, family=Binomial(16), random_state=0).fit(X[:500])
    >>> display = ConvergenceDisplay.from_estimator(model, X[:500])
    >>> bool(display.converged.all())
    True
    >>> plt.close(display.figure_)
    """

    loss_curve: Any
    histogram_: Any

    def __init__(
        self,
        *,
        loss_curve: ArrayLike,
        residuals: ArrayLike | None = None,
        converged: ArrayLike | None = None,
        tol: float | None = None,
        fit_converged: bool | None = None,
        loss_name: str = "Objective",
        iteration_name: str = "Iteration",
    ) -> None:
        self.loss_curve = loss_curve
        self.residuals = residuals
        self.converged = converged
        self.tol = tol
        self.fit_converged = fit_converged
        self.loss_name = loss_name
        self.iteration_name = iteration_name

    @classmethod
    def from_estimator(
        cls,
        estimator: BaseEstimator,
        X: MatrixLike = None,
        *,
        kind: str = "objective",
        ax: Axes | np.ndarray | None = None,
        line_kwargs: dict[str, Any] | None = None,
        histogram_kwargs: dict[str, Any] | None = None,
    ) -> Self:
        """Draw how a fit converged and, given rows, how far each of them is solved.

        Parameters
        ----------
        estimator : estimator instance
            Fitted :class:`~skdeq.ExpFamilyDEQ`, :class:`~skdeq.ImplicitEMEncoder`,
            :class:`~skdeq.DEQClassifier`, :class:`~skdeq.DEQRegressor` or another estimator with
            a `loss_curve_`, or a pipeline that ends in one.
        X : {array-like, sparse matrix} of shape (n_samples, n_features), default=None
            Rows to solve, with ExpFamilyDEQ only.
        kind : {"objective", "gap"}, default="objective"
            Whether to draw the objective, or on a logarithmic axis its distance to the lowest
            value that was reached.
        ax : Axes or array of two Axes, default=None
            Axes to draw on; with X, one is divided in two. None makes a new figure.
        line_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.plot`, of the objective.
        histogram_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.hist`, with two colours.

        Returns
        -------
        ConvergenceDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            If the estimator keeps no loss curve, or if X is given and it solves no rows.
        NotFittedError
            If the estimator is not fitted.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        step = fitted_step(
            estimator,
            ("loss_curve_",),
            cls.__name__,
            "ExpFamilyDEQ, ImplicitEMEncoder, DEQClassifier or DEQRegressor",
        )
        rows = {}
        if X is not None:
            fitted_step(estimator, ("map_latents",), f"{cls.__name__} with X", "ExpFamilyDEQ")
            result = step.map_latents(rows_for(estimator, step, X))
            rows = {
                "residuals": result.residual,
                "converged": result.converged,
                "tol": step.fixed_point_tol,
            }
        display = cls(
            loss_curve=np.asarray(step.loss_curve_, dtype=float),
            fit_converged=getattr(step, "converged_", None),
            loss_name=_loss_name(step),
            iteration_name=_iteration_name(step),
            **rows,
        )
        return display.plot(
            ax, kind=kind, line_kwargs=line_kwargs, histogram_kwargs=histogram_kwargs
        )

    def plot(
        self,
        ax: Axes | np.ndarray | None = None,
        *,
        kind: str = "objective",
        line_kwargs: dict[str, Any] | None = None,
        histogram_kwargs: dict[str, Any] | None = None,
    ) -> Self:
        """Draw the objective, and the residuals if there are any.

        Parameters
        ----------
        ax : Axes or array of two Axes, default=None
            Axes to draw on; with residuals, one is divided in two. None makes a new figure.
        kind : {"objective", "gap"}, default="objective"
            Whether to draw the objective, or on a logarithmic axis its distance to the lowest
            value that was reached.
        line_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.plot`, of the objective.
        histogram_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.hist`, with two colours.

        Returns
        -------
        ConvergenceDisplay
            The display itself.
        """
        check_matplotlib_support(f"{type(self).__name__}.plot")
        check_option("kind", kind, _KINDS)
        curve = np.asarray(self.loss_curve, dtype=float)
        if curve.ndim != 1 or not curve.size:
            raise ValueError(
                "loss_curve must be one-dimensional, with a value for each iteration; got an "
                f"array of shape {curve.shape}."
            )
        rows = None if self.residuals is None else self._rows()
        n_panels = 1 if rows is None else 2
        size = (6.4, 4.2) if n_panels == 1 else (10, 4)
        self.bounding_ax_, self.axes_ = divide_axes(ax, n_panels, n_panels, size)
        self.figure_ = self.axes_[0].figure
        self._plot_curve(self.axes_[0], curve, kind, line_kwargs)
        self.histogram_ = self.tolerance_line_ = self.unsolved_ = None
        if rows is not None:
            self._plot_residuals(self.axes_[1], *rows, histogram_kwargs)
        return self

    def _plot_curve(self, ax, curve, kind, line_kwargs) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.ticker import MaxNLocator

        iteration, label = np.arange(1, len(curve) + 1), self.loss_name
        end, place = curve[-1], {}
        if kind == "gap":
            gap = curve - np.nanmin(curve)
            iteration, curve = iteration[gap > 0], gap[gap > 0]
            label += " above its lowest value"
            ax.set_yscale("log")
            end = gap[-1]
            if end == 0:
                # Nothing has no place on a logarithmic axis but its lower edge.
                place = {"transform": ax.get_xaxis_transform(), "clip_on": False}
        default = {"color": PALETTE[0], "marker": "." if len(curve) <= 50 else ""}
        (self.line_,) = ax.plot(iteration, curve, **style(Line2D, default, line_kwargs))
        self.end_ = None
        if self.fit_converged is not None:
            color = self.line_.get_color()
            (self.end_,) = ax.plot(
                [len(self.loss_curve)],
                [end],
                linestyle="",
                marker="o",
                color=color,
                markerfacecolor=color if self.fit_converged else "white",
                markersize=7,
                label="converged" if self.fit_converged else "stopped before it converged",
                **place,
            )
            ax.legend(loc="best", frameon=False)
        ax.set(xlabel=self.iteration_name, ylabel=label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))

    def _plot_residuals(self, ax, residuals, solved, histogram_kwargs) -> None:
        from matplotlib.patches import Rectangle

        finite = np.isfinite(residuals)
        # A residual of zero has no place on a logarithmic axis: it goes to the left end.
        positive = residuals[finite & (residuals > 0)]
        least = positive.min() if positive.size else self.tol or np.finfo(float).eps
        shown = np.where(residuals > 0, residuals, least)
        default = {"color": [PALETTE[0], PALETTE[2]]}
        options = style(Rectangle, default, histogram_kwargs)
        edges = options.pop("bins", None)
        if edges is None:
            edges = _edges(shown[finite], self.tol)
        _, _, self.histogram_ = ax.hist(
            [shown[finite & solved], shown[finite & ~solved]], bins=edges, stacked=True, **options
        )
        self.histogram_ = list(self.histogram_)
        ax.set_xscale("log")
        n_left = int((~solved).sum())
        self.histogram_[0].set_label(f"solved ({len(solved) - n_left} rows)")
        handles = [self.histogram_[0]]
        if n_left:
            self.histogram_[1].set_label(f"not solved ({n_left} rows)")
            handles.append(self.histogram_[1])
        if 0 < n_left <= _MOST_MARKS:
            # A bar that is one row high would be overlooked.
            places = shown[finite & ~solved]
            (self.unsolved_,) = ax.plot(
                places,
                np.full(len(places), 0.02),
                linestyle="",
                marker="|",
                markersize=12,
                markeredgewidth=1.5,
                color=PALETTE[2],
                transform=ax.get_xaxis_transform(),
            )
        if self.tol:
            self.tolerance_line_ = ax.axvline(
                self.tol, color=LINE_COLOR, linestyle="--", label=f"tolerance {self.tol:g}"
            )
            handles.append(self.tolerance_line_)
        ax.set(xlabel="Residual of the fixed point", ylabel="Rows")
        ax.legend(handles=handles, loc="best")

    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        residuals = np.asarray(self.residuals, dtype=float)
        if self.converged is not None:
            solved = np.asarray(self.converged, dtype=bool)
        elif self.tol is not None:
            solved = residuals <= self.tol
        else:
            raise ValueError("Residuals need converged, or a tol to compare them to.")
        if residuals.ndim != 1 or not residuals.size or solved.shape != residuals.shape:
            raise ValueError(
                "residuals and converged must be one-dimensional and of one length, with an entry "
                f"for each row; they have shapes {residuals.shape} and {solved.shape}."
            )
        return residuals, solved


def _loss_name(step) -> str:
    if isinstance(step, ExpFamilyDEQ):
        return "Mean objective of a row"
    return "Mean objective of a minibatch" if isinstance(step, ImplicitEMEncoder) else "Mean loss"


def _iteration_name(step) -> str:
    return "Iteration" if isinstance(step, ExpFamilyDEQ) and step._is_scoring() else "Epoch"


def _edges(residuals: np.ndarray, tol: float | None) -> np.ndarray:
    """Edges of equal bins on a logarithmic axis, one of them at the tolerance."""
    logs = np.log10(residuals)
    anchor = np.log10(tol) if tol else logs.min(initial=0.0)
    low, high = logs.min(initial=anchor), logs.max(initial=anchor)
    width = max(high - low, 1.0) / _BINS
    # One bin more on either side, so that rounding leaves no row out.
    below, above = np.floor((low - anchor) / width), np.ceil((high - anchor) / width)
    return 10 ** (anchor + width * np.arange(below - 1, above + 2))
