"""LatentMapDisplay: rows in the plane of two components, coloured by a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.utils._optional_dependencies import check_matplotlib_support

from skdeq._display import (
    MISSING_COLOR,
    PALETTE,
    check_component_indices,
    check_table,
    component_title,
    fitted_step,
    new_axes,
    style,
)
from skdeq._display_target import Labels, read_target
from skdeq._expfam_deq import ExpFamilyDEQ
from skdeq._implicit_em import ImplicitEMEncoder
from skdeq._typing import MatrixLike, VectorLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LatentMapDisplay"]

# Points beyond which a vector graphic keeps them as an image.
_MANY_POINTS = 10_000
_ENCODER_OUTPUTS = {"activations": "Activation", "responsibilities": "Responsibility"}


class LatentMapDisplay:
    """Map of rows by two of their components, coloured by a target.

    Make one by `from_estimator`, or by `from_predictions` from scores that are there already.
    All parameters are stored as attributes.

    Parameters
    ----------
    scores : ndarray of shape (n_samples, n_components)
        What `transform` returns.

    y : array-like of shape (n_samples,), default=None
        Labels or numbers that colour the points. Those that are missing (None or NaN) are grey.

    component_indices : pair of int, default=(0, 1)
        Components on the horizontal and on the vertical axis, counted from 0.

    target_type : {"auto", "categorical", "continuous"}, default="auto"
        Whether y is shown by a legend or by a colour bar. "auto" takes numbers for labels if
        there are at most 20 different ones, all whole.

    target_name : str, default=None
        Title of the legend or label of the colour bar.

    xlabel, ylabel : str, default=None
        Labels of the axes; None names the component.

    Attributes
    ----------
    scatter_ : PathCollection
        The points, in the order of the rows.
    legend_ : Legend or None
        The legend of a categorical target.
    colorbar_ : Colorbar or None
        The colour bar of a continuous target.
    ax_ : Axes
        The axes.
    figure_ : Figure
        The figure that has them.

    See Also
    --------
    ExplainedDevianceDisplay : How much each component explains.
    ComponentsDisplay : What the components are made of.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> from sklearn.datasets import load_digits
    >>> from skdeq import ExpFamilyDEQ
    >>> from skdeq.families import Binomial
    >>> from skdeq.inspection import LatentMapDisplay
    >>> X, y = load_digits(return_X_y=True)
    >>> model = ExpFamilyDEQ(2, family=Binomial(16), random_state=0).fit(X[:500])
    >>> display = LatentMapDisplay.from_estimator(model, X[:500], y[:500])
    >>> display.scatter_.get_offsets().shape
    (500, 2)
    >>> plt.close(display.figure_)
    """

    legend_: Any
    colorbar_: Any

    def __init__(
        self,
        *,
        scores: MatrixLike,
        y: VectorLike | None = None,
        component_indices: ArrayLike = (0, 1),
        target_type: str = "auto",
        target_name: str | None = None,
        xlabel: str | None = None,
        ylabel: str | None = None,
    ) -> None:
        self.scores = scores
        self.y = y
        self.component_indices = component_indices
        self.target_type = target_type
        self.target_name = target_name
        self.xlabel = xlabel
        self.ylabel = ylabel

    @classmethod
    def from_estimator(
        cls,
        estimator: BaseEstimator,
        X: MatrixLike,
        y: VectorLike | None = None,
        *,
        component_indices: ArrayLike = (0, 1),
        target_type: str = "auto",
        target_name: str | None = None,
        ax: Axes | None = None,
        colors: Sequence[Any] | str | None = None,
        scatter_kwargs: dict[str, Any] | None = None,
        legend_kwargs: dict[str, Any] | None = None,
    ) -> Self:
        """Transform rows and draw their map.

        Parameters
        ----------
        estimator : estimator instance
            Fitted transformer, such as :class:`~skdeq.ExpFamilyDEQ`,
            :class:`~skdeq.ImplicitEMEncoder` or :class:`~sklearn.decomposition.PCA`, or a
            pipeline that ends in one.
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Rows to transform.
        y : array-like of shape (n_samples,), default=None
            Labels or numbers that colour the points.
        component_indices : pair of int, default=(0, 1)
            Components on the horizontal and on the vertical axis, counted from 0.
        target_type : {"auto", "categorical", "continuous"}, default="auto"
            Whether y is shown by a legend or by a colour bar.
        target_name : str, default=None
            Title of the legend or label of the colour bar; None takes the name of a pandas
            Series.
        ax : Axes, default=None
            Axes to draw on; None makes a new figure.
        colors : list of color or str, default=None
            One for each label in sorted order, or the name of a colour map.
        scatter_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.scatter`.
        legend_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.legend`.

        Returns
        -------
        LatentMapDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            If the estimator does not transform, if there are fewer than two components or not
            the ones asked for, or if y has another length than X.
        NotFittedError
            If the estimator is not fitted.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        step = fitted_step(
            estimator,
            ("transform",),
            cls.__name__,
            "ExpFamilyDEQ, ImplicitEMEncoder or other transformer",
        )
        scores = check_table(estimator.transform(X), "The output of transform")
        pair = _check_pair(component_indices, scores.shape[1])
        xlabel, ylabel = (_axis_label(step, index, scores.shape[1]) for index in pair)
        return cls.from_predictions(
            scores,
            y,
            component_indices=component_indices,
            target_type=target_type,
            target_name=target_name,
            xlabel=xlabel,
            ylabel=ylabel,
            ax=ax,
            colors=colors,
            scatter_kwargs=scatter_kwargs,
            legend_kwargs=legend_kwargs,
        )

    @classmethod
    def from_predictions(
        cls,
        scores: MatrixLike,
        y: VectorLike | None = None,
        *,
        component_indices: ArrayLike = (0, 1),
        target_type: str = "auto",
        target_name: str | None = None,
        xlabel: str | None = None,
        ylabel: str | None = None,
        ax: Axes | None = None,
        colors: Sequence[Any] | str | None = None,
        scatter_kwargs: dict[str, Any] | None = None,
        legend_kwargs: dict[str, Any] | None = None,
    ) -> Self:
        """Draw the map of scores that are there already.

        Parameters
        ----------
        scores : array-like of shape (n_samples, n_components)
            What `transform` returned.
        y : array-like of shape (n_samples,), default=None
            Labels or numbers that colour the points.
        component_indices : pair of int, default=(0, 1)
            Components on the horizontal and on the vertical axis, counted from 0.
        target_type : {"auto", "categorical", "continuous"}, default="auto"
            Whether y is shown by a legend or by a colour bar.
        target_name : str, default=None
            Title of the legend or label of the colour bar; None takes the name of a pandas
            Series.
        xlabel, ylabel : str, default=None
            Labels of the axes; None names the component.
        ax : Axes, default=None
            Axes to draw on; None makes a new figure.
        colors : list of color or str, default=None
            One for each label in sorted order, or the name of a colour map.
        scatter_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.scatter`.
        legend_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.legend`.

        Returns
        -------
        LatentMapDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            If there are fewer than two components or not the ones asked for, or if y has
            another length than the scores.
        """
        check_matplotlib_support(f"{cls.__name__}.from_predictions")
        display = cls(
            scores=check_table(scores, "scores"),
            y=y,
            component_indices=component_indices,
            target_type=target_type,
            target_name=getattr(y, "name", None) if target_name is None else target_name,
            xlabel=xlabel,
            ylabel=ylabel,
        )
        return display.plot(
            ax, colors=colors, scatter_kwargs=scatter_kwargs, legend_kwargs=legend_kwargs
        )

    def plot(
        self,
        ax: Axes | None = None,
        *,
        colors: Sequence[Any] | str | None = None,
        scatter_kwargs: dict[str, Any] | None = None,
        legend_kwargs: dict[str, Any] | None = None,
    ) -> Self:
        """Draw the map.

        Parameters
        ----------
        ax : Axes, default=None
            Axes to draw on; None makes a new figure.
        colors : list of color or str, default=None
            One for each label in sorted order, or the name of a colour map.
        scatter_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.scatter`.
        legend_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.legend`. The legend is beside the points where the
            layout of the figure makes room for it (``layout="constrained"``), else among them.

        Returns
        -------
        LatentMapDisplay
            The display itself.
        """
        check_matplotlib_support(f"{type(self).__name__}.plot")
        from matplotlib.collections import PathCollection

        scores = check_table(self.scores, "scores")
        pair = _check_pair(self.component_indices, scores.shape[1])
        points = scores[:, pair]
        given = style(PathCollection, {}, scatter_kwargs)
        colored = not {"c", "color", "facecolor"}.isdisjoint(given)
        target = None
        if self.y is not None:
            target = read_target(self.y, len(points), self.target_type, colors)
            if colored:
                raise ValueError(
                    "y sets the colours of the points: choose them by colors and not by "
                    "scatter_kwargs, which has one of c, color and facecolor."
                )
        elif not colored:
            given["color"] = PALETTE[0]
        options = {
            "s": float(np.clip(450 / np.sqrt(max(len(points), 1)), 5, 36)),
            "alpha": 0.8,
            "linewidth": 0,
            "rasterized": len(points) > _MANY_POINTS,
            **given,
        }
        ax = new_axes(ax)
        self.legend_ = self.colorbar_ = None
        if target is None:
            self.scatter_ = ax.scatter(*points.T, **options)
        elif isinstance(target, Labels):
            self._scatter_labels(ax, points, target, options, legend_kwargs)
        else:
            self._scatter_numbers(ax, points, target, options)
        labels = zip((self.xlabel, self.ylabel), pair, strict=True)
        xlabel, ylabel = (f"Component {i}" if label is None else label for label, i in labels)
        ax.set(xlabel=xlabel, ylabel=ylabel)
        self.ax_, self.figure_ = ax, ax.figure
        return self

    def _scatter_labels(self, ax, points, target, options, legend_kwargs) -> None:
        # One collection in the order of the rows: label by label, the last would hide the others.
        self.scatter_ = ax.scatter(*points.T, c=target.point_colors, **options)
        if "marker" not in options:
            self.scatter_.set_paths(target.point_paths())
        handles = target.legend_handles(options.get("marker"))
        place: dict[str, Any] = {"loc": "best"}
        if ax.figure.get_layout_engine() is not None:
            place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "frameon": False}
        default = {
            "title": self.target_name,
            "ncols": max(1, -(-len(handles) // 20)),
            "handletextpad": 0.2,
            **place,
        }
        self.legend_ = ax.legend(handles=handles, **{**default, **(legend_kwargs or {})})

    def _scatter_numbers(self, ax, points, target, options) -> None:
        options = {"cmap": target.cmap, **options}
        self.scatter_ = ax.scatter(*points.T, c=target.values, plotnonfinite=True, **options)
        self.scatter_.set_cmap(self.scatter_.get_cmap().with_extremes(bad=MISSING_COLOR))
        self.colorbar_ = ax.figure.colorbar(self.scatter_, ax=ax)
        self.colorbar_.solids.set_alpha(1)
        if self.target_name is not None:
            self.colorbar_.set_label(self.target_name)


def _check_pair(indices, n_components: int) -> np.ndarray:
    if n_components < 2:
        raise ValueError(
            f"A map needs two components, and there is {n_components}: fit with "
            "n_components=2 or more."
        )
    pair = check_component_indices(indices, n_components)
    if len(pair) != 2:
        raise ValueError(
            f"component_indices must be a pair, one component for each axis; got {indices!r}."
        )
    return pair


def _axis_label(step, index: int, n_columns: int) -> str:
    # Whitened latents are in a basis of their own, of which no component tells the share.
    if isinstance(step, ExpFamilyDEQ) and step.whiten:
        return f"Latent {index}"
    if isinstance(step, ImplicitEMEncoder):
        return f"{_ENCODER_OUTPUTS[step.output]} of component {index}"
    title, share = component_title(step, index, n_columns, of_what=True)
    return f"{title} ({share})" if share else title
