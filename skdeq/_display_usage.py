"""ComponentUsageDisplay: how much each component is used, and which say the same."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import softmax
from sklearn.base import BaseEstimator
from sklearn.utils._optional_dependencies import check_matplotlib_support

from skdeq._display import (
    LINE_COLOR,
    MISSING_COLOR,
    PALETTE,
    check_component_indices,
    check_option,
    check_table,
    divide_axes,
    fitted_step,
    percent,
    rows_for,
    style,
)
from skdeq._encoder_fit import DEAD_VARIANCE
from skdeq._typing import MatrixLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ComponentUsageDisplay"]

_KINDS = {
    "mean": "Mean activation",
    "active": "Share of rows with activation",
    "responsibility": "Mean responsibility",
}


class ComponentUsageDisplay:
    """Usage of each component of an encoder, beside the correlations of their activations.

    Make one by `from_estimator`, or by `from_predictions` from activations that are there
    already. All parameters are stored as attributes.

    Parameters
    ----------
    mean_activation : ndarray of shape (n_components,)
        Mean activation of each component.

    active_share : ndarray of shape (n_components,)
        Share of the rows in which each component is active.

    responsibility : ndarray of shape (n_components,)
        Mean responsibility of each component; these sum to one.

    correlation : ndarray of shape (n_components, n_components)
        Correlation of the activations; NaN, drawn in grey, where a component is constant.

    dead_components : array-like of int, default=()
        Indices of the components to mark as dead.

    Attributes
    ----------
    bars_ : BarContainer
        The usage of each component.
    dead_marks_ : Line2D or None
        A mark under each dead component.
    equal_line_ : Line2D or None
        With ``kind="responsibility"``, an equal share.
    image_ : AxesImage
        The correlations.
    colorbar_ : Colorbar
        Their colour bar.
    axes_ : ndarray of two Axes
        The axes of the usage and of the correlations.
    bounding_ax_ : Axes or None
        The axes that were divided in two, if any.
    figure_ : Figure
        The figure that has them.

    See Also
    --------
    ComponentsDisplay : What the components are made of.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> from sklearn.datasets import load_digits
    >>> from skdeq import ImplicitEMEncoder
    >>> from skdeq.inspection import ComponentUsageDisplay
    >>> X, _ = load_digits(return_X_y=True)
    >>> encoder = ImplicitEMEncoder(16, lse_weight=2, random_state=0).fit(X)
    >>> display = ComponentUsageDisplay.from_estimator(encoder, X, kind="responsibility")
    >>> float(display.responsibility.sum().round(6))
    1.0
    >>> plt.close(display.figure_)
    """

    def __init__(
        self,
        *,
        mean_activation: ArrayLike,
        active_share: ArrayLike,
        responsibility: ArrayLike,
        correlation: ArrayLike,
        dead_components: ArrayLike | None = (),
    ) -> None:
        self.mean_activation = mean_activation
        self.active_share = active_share
        self.responsibility = responsibility
        self.correlation = correlation
        self.dead_components = dead_components

    @classmethod
    def from_estimator(
        cls,
        estimator: BaseEstimator,
        X: MatrixLike,
        *,
        threshold: float = 0.0,
        kind: str = "mean",
        ax: Axes | np.ndarray | None = None,
        bar_kwargs: dict[str, Any] | None = None,
        image_kwargs: dict[str, Any] | None = None,
    ) -> Self:
        """Encode rows and draw how their components are used.

        Parameters
        ----------
        estimator : estimator instance
            Fitted :class:`~skdeq.ImplicitEMEncoder`, or a pipeline that ends in one.
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Rows to encode, at least two.
        threshold : float, default=0.0
            Activation beyond which a component is active in a row. With the "softplus"
            activation, which is never zero, choose a larger one.
        kind : {"mean", "active", "responsibility"}, default="mean"
            Whether the bars show the mean activation, the share of rows in which a component is
            active, or its mean responsibility.
        ax : Axes or array of two Axes, default=None
            Axes to draw on; one is divided in two. None makes a new figure.
        bar_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.bar`.
        image_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.imshow`, of the correlations.

        Returns
        -------
        ComponentUsageDisplay
            The display, drawn. The dead components are those of `dead_components_`, found on
            the training rows.

        Raises
        ------
        ValueError
            If the estimator is no encoder, or if there are fewer than two rows.
        NotFittedError
            If the estimator is not fitted.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        step = fitted_step(estimator, ("responsibilities",), cls.__name__, "ImplicitEMEncoder")
        X = rows_for(estimator, step, X)
        encoder = copy.copy(step).set_params(output="activations")
        return cls.from_predictions(
            encoder.transform(X),
            dead_components=encoder.dead_components_,
            threshold=threshold,
            kind=kind,
            ax=ax,
            bar_kwargs=bar_kwargs,
            image_kwargs=image_kwargs,
        )

    @classmethod
    def from_predictions(
        cls,
        activations: MatrixLike,
        *,
        dead_components: ArrayLike | None = None,
        threshold: float = 0.0,
        kind: str = "mean",
        ax: Axes | np.ndarray | None = None,
        bar_kwargs: dict[str, Any] | None = None,
        image_kwargs: dict[str, Any] | None = None,
    ) -> Self:
        """Draw how components are used, given the activations of some rows.

        Parameters
        ----------
        activations : array-like of shape (n_samples, n_components)
            What `transform` of an encoder with ``output="activations"`` returned, at least two
            rows. The responsibilities are their ``softmax(-activations)``.
        dead_components : array-like of int, default=None
            Indices of dead components; None takes those whose activation has a variance under
            0.01 over these rows, as :class:`~skdeq.ImplicitEMEncoder` does in training.
        threshold : float, default=0.0
            Activation beyond which a component is active in a row.
        kind : {"mean", "active", "responsibility"}, default="mean"
            Whether the bars show the mean activation, the share of rows in which a component is
            active, or its mean responsibility.
        ax : Axes or array of two Axes, default=None
            Axes to draw on; one is divided in two. None makes a new figure.
        bar_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.bar`.
        image_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.imshow`, of the correlations.

        Returns
        -------
        ComponentUsageDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            If the activations are not a table of at least two rows of finite numbers, or if a
            dead component is none of theirs.
        """
        check_matplotlib_support(f"{cls.__name__}.from_predictions")
        activations = check_table(activations, "activations").astype(float)
        n, k = activations.shape
        if n < 2:
            raise ValueError(f"Correlations need at least two rows; there are {n}.")
        if dead_components is None:
            dead_components = np.flatnonzero(activations.var(axis=0) < DEAD_VARIANCE)
        # A constant component has no correlation, and rounding must not give it one.
        varying = np.ptp(activations, axis=0) > 0
        correlation = np.full((k, k), np.nan)
        if varying.any():
            correlation[np.ix_(varying, varying)] = np.corrcoef(
                activations[:, varying], rowvar=False
            )
        display = cls(
            mean_activation=activations.mean(axis=0),
            active_share=(activations > threshold).mean(axis=0),
            responsibility=softmax(-activations, axis=1).mean(axis=0),
            correlation=correlation,
            dead_components=dead_components,
        )
        return display.plot(ax, kind=kind, bar_kwargs=bar_kwargs, image_kwargs=image_kwargs)

    def plot(
        self,
        ax: Axes | np.ndarray | None = None,
        *,
        kind: str = "mean",
        bar_kwargs: dict[str, Any] | None = None,
        image_kwargs: dict[str, Any] | None = None,
    ) -> Self:
        """Draw usage and correlations.

        Parameters
        ----------
        ax : Axes or array of two Axes, default=None
            Axes to draw on; one is divided in two. None makes a new figure.
        kind : {"mean", "active", "responsibility"}, default="mean"
            Whether the bars show the mean activation, the share of rows in which a component is
            active, or its mean responsibility.
        bar_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.bar`.
        image_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.imshow`, of the correlations.

        Returns
        -------
        ComponentUsageDisplay
            The display itself.

        Raises
        ------
        ValueError
            If there is no such kind, or if a dead component is none of those there are.
        """
        check_matplotlib_support(f"{type(self).__name__}.plot")
        check_option("kind", kind, _KINDS)
        values = {
            "mean": self.mean_activation,
            "active": self.active_share,
            "responsibility": self.responsibility,
        }
        dead = self._dead()
        self.bounding_ax_, self.axes_ = divide_axes(ax, 2, 2, (10, 4), width_ratios=(1.3, 1))
        self.figure_ = self.axes_[0].figure
        self._plot_usage(self.axes_[0], np.asarray(values[kind]), dead, kind, bar_kwargs)
        self._plot_correlation(self.axes_[1], image_kwargs)
        return self

    def _dead(self) -> np.ndarray:
        """Validate the indices of the dead components, of which there may be none."""
        if self.dead_components is None or not np.size(self.dead_components):
            return np.empty(0, dtype=int)
        n_components = np.size(self.mean_activation)
        return check_component_indices(self.dead_components, n_components, "dead_components")

    def _plot_usage(self, ax, usage, dead, kind, bar_kwargs) -> None:
        from matplotlib.patches import Rectangle
        from matplotlib.ticker import MaxNLocator

        place = np.arange(len(usage))
        options = style(Rectangle, {"color": PALETTE[0]}, bar_kwargs)
        self.bars_ = ax.bar(place, usage, **options)
        self.dead_marks_ = self.equal_line_ = None
        if kind == "responsibility":
            self.equal_line_ = ax.axhline(
                1 / len(usage), color=LINE_COLOR, linestyle="--", label="equal share"
            )
        if dead.size:
            for index in dead:
                self.bars_[index].set(facecolor=MISSING_COLOR)
            (self.dead_marks_,) = ax.plot(
                dead,
                np.full(len(dead), 0.02),
                linestyle="",
                marker="x",
                color=PALETTE[2],
                transform=ax.get_xaxis_transform(),
                label=f"dead ({len(dead)} of {len(usage)})",
            )
        if kind != "mean":
            percent(ax.yaxis)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.set(xlabel="Component", ylabel=_KINDS[kind])
        ax.margins(x=0.01)
        named = [artist for artist in (self.equal_line_, self.dead_marks_) if artist is not None]
        if named:
            # Room for the legend above the bars.
            ax.margins(x=0.01, y=0.15)
            ax.legend(handles=named, loc="upper right", ncols=2, frameon=False)

    def _plot_correlation(self, ax, image_kwargs) -> None:
        from matplotlib.ticker import MaxNLocator

        default = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1, "interpolation": "nearest"}
        options = {**default, **(image_kwargs or {})}
        self.image_ = ax.imshow(self.correlation, **options)
        self.image_.set_cmap(self.image_.get_cmap().with_extremes(bad=MISSING_COLOR))
        self.colorbar_ = ax.figure.colorbar(self.image_, ax=ax)
        self.colorbar_.set_label("Correlation of activations")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.set(xlabel="Component", ylabel="Component")
