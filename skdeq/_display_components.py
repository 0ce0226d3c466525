"""ComponentsDisplay: components as images, or by their largest entries."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.pipeline import Pipeline
from sklearn.utils._optional_dependencies import check_matplotlib_support

from skdeq._display import (
    LINE_COLOR,
    NEGATIVE_COLOR,
    POSITIVE_COLOR,
    check_component_indices,
    check_table,
    columns_of_grid,
    component_title,
    divide_axes,
    fitted_step,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ComponentsDisplay"]


class ComponentsDisplay:
    """Components as images or, without an image shape, by the features that weigh most.

    Make one by `from_estimator`. All parameters are stored as attributes.

    Parameters
    ----------
    components : ndarray of shape (n_components, n_features)
        The components to draw.

    image_shape : pair of int, default=None
        Height and width of the image that the features are the pixels of, row by row. None
        draws horizontal bars of the largest entries.

    feature_names : array-like of str of shape (n_features,), default=None
        Names of the features; None counts them, "x0", "x1" and so on.

    titles : list of str of length n_components, default=None
        Titles of the panels; None counts the components.

    Attributes
    ----------
    images_ : list of AxesImage, or None
        The images.
    bars_ : list of BarContainer, or None
        The bars, largest entry first.
    colorbar_ : Colorbar or None
        The colour bar of images that share a scale.
    axes_ : ndarray of Axes of shape (n_components,)
        The axes of the components.
    bounding_ax_ : Axes or None
        The axes that were divided, if any.
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
    >>> from skdeq.inspection import ComponentsDisplay
    >>> X, _ = load_digits(return_X_y=True)
    >>> model = ExpFamilyDEQ(3, family=Binomial(16), random_state=0).fit(X[:500])
    >>> display = ComponentsDisplay.from_estimator(model, image_shape=(8, 8))
    >>> len(display.images_)
    3
    >>> plt.close(display.figure_)
    """

    images_: Any
    bars_: Any
    colorbar_: Any

    def __init__(
        self,
        *,
        components: ArrayLike,
        image_shape: tuple[int, int] | None = None,
        feature_names: ArrayLike | None = None,
        titles: ArrayLike | None = None,
    ) -> None:
        self.components = components
        self.image_shape = image_shape
        self.feature_names = feature_names
        self.titles = titles

    @classmethod
    def from_estimator(
        cls,
        estimator: BaseEstimator,
        *,
        component_indices: ArrayLike | None = None,
        image_shape: tuple[int, int] | None = None,
        feature_names: ArrayLike | None = None,
        n_top_features: int = 10,
        shared_scale: bool = True,
        n_columns: int | None = None,
        ax: Axes | np.ndarray | None = None,
        image_kwargs: dict[str, Any] | None = None,
        bar_kwargs: dict[str, Any] | None = None,
    ) -> Self:
        """Draw components of a fitted estimator.

        Parameters
        ----------
        estimator : estimator instance
            Fitted :class:`~skdeq.ExpFamilyDEQ`, :class:`~skdeq.ImplicitEMEncoder`,
            :class:`~sklearn.decomposition.PCA` or another estimator with `components_`, or a
            pipeline that ends in one. Along a component of the encoder the distance grows: what
            it claims is the negative, ``ComponentsDisplay(components=-encoder.components_)``.
        component_indices : int or array-like of int, default=None
            Components to draw, counted from 0; None draws all.
        image_shape : pair of int, default=None
            Height and width of the image that the features are the pixels of, row by row. None
            draws horizontal bars of the largest entries.
        feature_names : array-like of str of shape (n_features,), default=None
            Names of the features; None takes those that the estimator was fitted with.
        n_top_features : int, default=10
            Bars of each component.
        shared_scale : bool, default=True
            Whether all components share the range of colours or of the bars' axis.
        n_columns : int, default=None
            Panels beside each other; None chooses.
        ax : Axes or array of Axes of shape (n_components,), default=None
            Axes to draw on; one is divided. None makes a new figure.
        image_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.imshow`.
        bar_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.barh`.

        Returns
        -------
        ComponentsDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            If the estimator has no components or not those asked for, or if image shape or
            feature names do not fit the number of features.
        NotFittedError
            If the estimator is not fitted.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        step = fitted_step(
            estimator, ("components_",), cls.__name__, "ExpFamilyDEQ, ImplicitEMEncoder or PCA"
        )
        components = np.asarray(step.components_)
        indices = check_component_indices(component_indices, len(components))
        if feature_names is None:
            feature_names = _names_of_features(estimator, step)
        named = [
            component_title(step, int(index), len(components), image_shape is None)
            for index in indices
        ]
        titles = ["\n".join(filter(None, both)) for both in named]
        display = cls(
            components=components[indices],
            image_shape=image_shape,
            feature_names=feature_names,
            titles=titles,
        )
        return display.plot(
            ax,
            n_top_features=n_top_features,
            shared_scale=shared_scale,
            n_columns=n_columns,
            image_kwargs=image_kwargs,
            bar_kwargs=bar_kwargs,
        )

    def plot(
        self,
        ax: Axes | np.ndarray | None = None,
        *,
        n_top_features: int = 10,
        shared_scale: bool = True,
        n_columns: int | None = None,
        image_kwargs: dict[str, Any] | None = None,
        bar_kwargs: dict[str, Any] | None = None,
    ) -> Self:
        """Draw the components.

        Parameters
        ----------
        ax : Axes or array of Axes of shape (n_components,), default=None
            Axes to draw on; one is divided. None makes a new figure.
        n_top_features : int, default=10
            Bars of each component.
        shared_scale : bool, default=True
            Whether all components share the range of colours or of the bars' axis.
        n_columns : int, default=None
            Panels beside each other; None chooses.
        image_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.imshow`.
        bar_kwargs : dict, default=None
            Keywords for `matplotlib.axes.Axes.barh`.

        Returns
        -------
        ComponentsDisplay
            The display itself.
        """
        check_matplotlib_support(f"{type(self).__name__}.plot")
        components = check_table(self.components, "components")
        titles = [f"Component {index}" for index in range(len(components))]
        if self.titles is not None:
            titles = np.asarray(self.titles, dtype=object).tolist()
        if len(titles) != len(components):
            raise ValueError(
                f"titles must have one entry for each of the {len(components)} components; it "
                f"has {len(titles)}."
            )
        for name, count in (("n_top_features", n_top_features), ("n_columns", n_columns)):
            if count is not None and not (isinstance(count, Integral) and count >= 1):
                raise ValueError(f"{name} must be an integer of at least 1; got {count!r}.")
        self.images_ = self.bars_ = self.colorbar_ = None
        if self.image_shape is None:
            self._plot_bars(ax, components, n_top_features, shared_scale, n_columns, bar_kwargs)
        else:
            self._plot_images(ax, components, titles, shared_scale, n_columns, image_kwargs)
        for panel, title in zip(self.axes_, titles, strict=True):
            panel.set_title(title, fontsize="medium" if self.image_shape is None else "small")
        self.figure_ = self.axes_[0].figure
        return self

    def _plot_images(self, ax, components, titles, shared_scale, n_columns, image_kwargs) -> None:
        shape = _check_image_shape(self.image_shape, components.shape[1])
        n = len(components)
        ideal = max(4, round(np.sqrt(1.6 * n)))
        n_columns = min(n, n_columns or columns_of_grid(n, ideal, ideal + 2))
        height, width = np.array(shape) / min(shape)
        title = 0.2 + 0.15 * max(text.count("\n") for text in titles)
        size = (1.1 * width * n_columns + 0.9, (1.1 * height + title) * -(-n // n_columns))
        self.bounding_ax_, self.axes_ = divide_axes(ax, n, n_columns, size)
        given = image_kwargs or {}
        self.images_ = []
        for panel, component in zip(self.axes_, components, strict=True):
            default = _color_scale(components, components if shared_scale else component)
            if "norm" in given:
                default = {"cmap": default["cmap"]}
            image = component.reshape(shape)
            options = {**default, "interpolation": "nearest", **given}
            self.images_.append(panel.imshow(image, **options))
            panel.set(xticks=[], yticks=[])
        if shared_scale:
            # Half of many rows is long enough to read.
            self.colorbar_ = self.axes_[0].figure.colorbar(
                self.images_[0],
                ax=list(self.axes_),
                label="Weight",
                shrink=0.9 if n <= n_columns else 0.6,
                aspect=12 if n <= n_columns else 20,
                fraction=0.5 / size[0],
            )

    def _plot_bars(
        self, ax, components, n_top_features, shared_scale, n_columns, bar_kwargs
    ) -> None:
        from matplotlib.patches import Rectangle

        n, p = components.shape
        given = self.feature_names
        numbered = [f"x{feature}" for feature in range(p)]
        names = np.asarray(numbered if given is None else given, object)
        if names.shape != (p,):
            raise ValueError(
                f"feature_names must have one entry for each of the {p} features; it has the "
                f"shape {names.shape}."
            )
        n_columns = min(n, n_columns or columns_of_grid(n, 3, 3))
        n_bars = min(n_top_features, p)
        width = 1.8 + 0.075 * max(len(str(name)) for name in names)
        size = (width * n_columns, (0.24 * n_bars + 0.9) * -(-n // n_columns))
        self.bounding_ax_, self.axes_ = divide_axes(ax, n, n_columns, size)
        self.bars_, place = [], np.arange(n_bars)
        for panel, component in zip(self.axes_, components, strict=True):
            order = np.argsort(-np.abs(component), kind="stable")[:n_bars]
            default = {"color": np.where(component[order] < 0, NEGATIVE_COLOR, POSITIVE_COLOR)}
            bars = panel.barh(place, component[order], **style(Rectangle, default, bar_kwargs))
            self.bars_.append(bars)
            panel.set_yticks(place, names[order])
            panel.invert_yaxis()
            panel.axvline(0, color=LINE_COLOR, linewidth=0.8)
            if shared_scale:
                panel.set_xlim(*_bar_range(components))
        for panel in self.axes_[-n_columns:]:
            panel.set_xlabel("Weight")


def _names_of_features(estimator, step) -> np.ndarray | None:
    names = getattr(step, "feature_names_in_", None)
    if names is None and isinstance(estimator, Pipeline) and len(estimator) > 1:
        try:
            names = estimator[:-1].get_feature_names_out()
        except (AttributeError, ValueError):
            # A step before the last does not name what it returns.
            return None
    return names


def _check_image_shape(image_shape, n_features: int) -> tuple[int, int]:
    shape = np.asarray(image_shape)
    pair = shape.shape == (2,) and np.issubdtype(shape.dtype, np.integer) and shape.min() >= 1
    if not pair or shape.prod() != n_features:
        raise ValueError(
            "image_shape must be a height and a width that multiply to the number of features, "
            f"{n_features}; got {image_shape!r}" + (f", {shape.prod()} pixels." if pair else ".")
        )
    return int(shape[0]), int(shape[1])


def _color_scale(everything: np.ndarray, shown: np.ndarray) -> dict:
    """Colour map by the signs of everything, and its range by what is shown."""
    bound = float(np.abs(shown).max()) or 1.0
    if everything.min() < 0 < everything.max():
        return {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound}
    if everything.min() < 0:
        return {"cmap": "Greys_r", "vmin": -bound, "vmax": 0.0}
    return {"cmap": "Greys", "vmin": 0.0, "vmax": bound}


def _bar_range(components: np.ndarray) -> tuple[float, float]:
    bound = 1.05 * (float(np.abs(components).max()) or 1.0)
    return (-bound if components.min() < 0 else 0.0), (bound if components.max() > 0 else 0.0)
