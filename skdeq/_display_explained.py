"""ExplainedDevianceDisplay: what each component explains, and all up to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.utils._optional_dependencies import check_matplotlib_support

from skdeq._display import (
    LINE_COLOR,
    PALETTE,
    explained_ratio,
    fitted_step,
    new_axes,
    percent,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ExplainedDevianceDisplay"]


class ExplainedDevianceDisplay:
    """Share of the deviance that each component explains, and their running sum.

    Make one by `from_estimator`. All parameters are stored as attributes.

    Parameters
    ----------
    explained_ratio : array-like of shape (n_components,)
        Share of each component, such as `explained_deviance_ratio_`.

    quantity : str, default="deviance"
        What it is a share of.

    Attributes
    ----------
    bars_ : BarContainer
        The bars, one for each component.
    line_ : Line2D
        The running sum.
    legend_ : Legend
        The legend.
    ax_ : Axes
        The axes.
    figure_ : Figure
        The figure that has them.

    See Also
    --------
    LatentMapDisplay : The rows in the plane of two components.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> from sklearn.datasets import load_digits
    >>> from skdeq import ExpFamilyDEQ
    >>> from skdeq.families import Binomial
    >>> from skdeq.inspection import ExplainedDevianceDisplay
    >>> X, _ = load_digits(return_X_y=True)
    >>> model = ExpFamilyDEQ(5, family=Binomial(16), random_state=0).fit(X[:500])
    >>> display = ExplainedDevianceDisplay.from_estimator(model)
    >>> len(display.bars_)
    5
    >>> plt.close(display.figure_)
    """

    line_: Any

    def __init__(self, *, explained_ratio: ArrayLike, quantity: str = "deviance") -> None:
        self.explained_ratio = explained_ratio
        self.quantity = quantity

    @classmethod
    def from_estimator(
        cls,
        estimator: BaseEstimator,
        *,
        ax: Axes | None = None,
        bar_kwargs: dict[str, Any] | None = None,
        line_kwargs: dict[str, Any] | None = None,
    ) -> Self:
        """Draw what the components of a fitted estimator explain.

        Parameters
        ----------
        estimator : estimator instance
            Fitted :class:`~skdeq.ExpFamilyDEQ`, :class:`~sklearn.decomposition.PCA` (whose
            share is one of the variance) or another with either ratio, or a pipeline that ends
            in one.
        ax : Axes, default=None
            Axes to draw on; None makes a new figure.
        bar_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.bar`.
        line_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.plot`, of the running sum.

        Returns
        -------
        ExplainedDevianceDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            If the estimator does not say what its components explain.
        NotFittedError
            If it is not fitted.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        attributes = ("explained_deviance_ratio_", "explained_variance_ratio_")
        step = fitted_step(estimator, attributes, cls.__name__, "ExpFamilyDEQ or PCA")
        ratio, quantity = explained_ratio(step)  # type: ignore[misc]
        display = cls(explained_ratio=ratio, quantity=quantity)
        return display.plot(ax, bar_kwargs=bar_kwargs, line_kwargs=line_kwargs)

    def plot(
        self,
        ax: Axes | None = None,
        *,
        bar_kwargs: dict[str, Any] | None = None,
        line_kwargs: dict[str, Any] | None = None,
    ) -> Self:
        """Draw bars and running sum.

        Parameters
        ----------
        ax : Axes, default=None
            Axes to draw on; None makes a new figure.
        bar_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.bar`.
        line_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.plot`, of the running sum.

        Returns
        -------
        ExplainedDevianceDisplay
            The display itself.
        """
        check_matplotlib_support(f"{type(self).__name__}.plot")
        from matplotlib.lines import Line2D
        from matplotlib.patches import Rectangle
        from matplotlib.ticker import MaxNLocator

        ratio = np.asarray(self.explained_ratio, dtype=float)
        if ratio.ndim != 1 or not ratio.size:
            raise ValueError(
                "explained_ratio must be one-dimensional, with a share for each component; got "
                f"an array of shape {ratio.shape}."
            )
        ax = new_axes(ax)
        place = np.arange(len(ratio))
        bar_options = {"color": PALETTE[0], "label": "each component"}
        self.bars_ = ax.bar(place, ratio, **style(Rectangle, bar_options, bar_kwargs))
        line_options = {
            "color": LINE_COLOR,
            "marker": "o",
            "markersize": 4,
            "label": "cumulative",
        }
        options = style(Line2D, line_options, line_kwargs)
        (self.line_,) = ax.plot(place, np.cumsum(ratio), **options)
        ax.set(xlabel="Component", ylabel=f"Share of {self.quantity} explained")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        percent(ax.yaxis)
        self.legend_ = ax.legend(handles=[self.bars_, self.line_], loc="best", frameon=False)
        self.ax_, self.figure_ = ax, ax.figure
        return self
