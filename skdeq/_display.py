"""What the displays share: the estimators they take, their axes, their colours."""

from collections.abc import Iterable, Sequence

import numpy as np
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

__all__ = [
    "LINE_COLOR",
    "MISSING_COLOR",
    "NEGATIVE_COLOR",
    "PALETTE",
    "POSITIVE_COLOR",
    "check_component_indices",
    "check_option",
    "check_table",
    "columns_of_grid",
    "component_title",
    "divide_axes",
    "explained_ratio",
    "fitted_step",
    "new_axes",
    "percent",
    "rows_for",
    "style",
]

# Ten colours that people with any of the common colour vision deficiencies can tell apart, in an
# order that keeps the first few furthest apart: M. A. Petroff (2021), arXiv:2107.02270.
PALETTE = (
    "#3f90da",
    "#ffa90e",
    "#bd1f01",
    "#94a4a2",
    "#832db6",
    "#a96b59",
    "#e76300",
    "#b9ac70",
    "#717581",
    "#92dadd",
)
MISSING_COLOR = "#d0d0d0"
LINE_COLOR = "#333333"
# The ends of the colour map RdBu_r, so that bars and images say the same.
POSITIVE_COLOR, NEGATIVE_COLOR = "#b2182b", "#2166ac"


def fitted_step(estimator, attributes: Sequence[str], display: str, accepted: str):
    """Return the fitted estimator with one of some attributes: a pipeline's last step, or itself.

    Raises
    ------
    ValueError
        If it has none of them, naming what was given and what is accepted.
    NotFittedError
        If it is not fitted.
    """

    def serves(candidate) -> bool:
        return any(hasattr(candidate, attribute) for attribute in attributes)

    needs = f"{display} needs a fitted {accepted}, or a pipeline that ends in one; got"
    if isinstance(estimator, type):
        raise ValueError(f"{needs} the class {estimator.__name__}, not an instance of it.")
    if not hasattr(estimator, "fit"):
        raise ValueError(f"{needs} {type(estimator).__name__}, which is no estimator.")
    check_is_fitted(estimator)
    if not isinstance(estimator, Pipeline):
        step, given = estimator, type(estimator).__name__
    else:
        step = estimator[-1]
        last = repr(step) if isinstance(step, str) else type(step).__name__
        given = f"{type(estimator).__name__} that ends in {last}"
    if serves(step):
        return step
    advice = [
        f" Pass its {inside}."
        for inside in ("best_estimator_", "backbone_")
        if serves(getattr(step, inside, None))
    ]
    if "explained_deviance_ratio_" in attributes and hasattr(step, "loadings_"):
        advice.append(
            " Fine-tuning changed what its components explain, and does not measure it anew: "
            "pass the backbone as it was fitted before."
        )
    if step is not estimator and len(estimator) > 1 and serves(estimator[-2]):
        advice.append(" Pass the steps before it, pipeline[:-1].")
    raise ValueError(f"{needs} {given}, which has no {' or '.join(attributes)}.{''.join(advice)}")


def rows_for(estimator, step, X):
    """Return rows of data as the last step of a pipeline sees them."""
    return X if step is estimator or len(estimator) == 1 else estimator[:-1].transform(X)


def check_option(name: str, value, allowed: Iterable[str]) -> None:
    """Refuse an option that there is not.

    Raises
    ------
    ValueError
        Naming those that there are.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}.")


def explained_ratio(step) -> tuple[np.ndarray, str] | None:
    """Share that each component explains, and of what; None where the estimator has no such."""
    for name in ("deviance", "variance"):
        ratio = getattr(step, f"explained_{name}_ratio_", None)
        if ratio is not None:
            return np.asarray(ratio), name
    return None


def component_title(step, column: int, n_columns: int, of_what: bool) -> tuple[str, str]:
    """Name of a column of scores, and what its component explains, empty where that is not known.

    A component of a convolution has a column for each of its places, and one share.
    """
    kernels = getattr(step, "kernels_", None)
    n_places = 1 if kernels is None else n_columns // len(kernels)
    component, place = divmod(column, n_places)
    title = f"Component {component}" + (f", place {place}" if n_places > 1 else "")
    explained = explained_ratio(step)
    if explained is None:
        return title, ""
    ratio, quantity = explained
    share = f"{ratio[component]:.1%}" + (f" of {quantity}" if of_what else "")
    return title, share + (" at all places" if n_places > 1 else "")


def check_component_indices(
    indices, n_components: int, name: str = "component_indices"
) -> np.ndarray:
    """Component indices as integers; None stands for all of them.

    Raises
    ------
    ValueError
        If one is not an integer from 0 to ``n_components - 1``.
    """
    if indices is None:
        return np.arange(n_components)
    checked = np.atleast_1d(np.asarray(indices))
    whole = checked.ndim == 1 and checked.size and np.issubdtype(checked.dtype, np.integer)
    if not (whole and 0 <= checked.min() and checked.max() < n_components):
        raise ValueError(
            f"{name} must be integers from 0 to {n_components - 1}, as there are "
            f"{n_components} components; got {indices!r}."
        )
    return checked


def check_table(table, name: str) -> np.ndarray:
    """Return a two-dimensional array of finite numbers.

    Raises
    ------
    ValueError
        If it is not one.
    """
    checked = np.asarray(table)
    if checked.ndim != 2 or not np.issubdtype(checked.dtype, np.number):
        raise ValueError(
            f"{name} must be a two-dimensional array of numbers; got an array of shape "
            f"{checked.shape} and type {checked.dtype}."
        )
    if not np.isfinite(checked).all():
        raise ValueError(f"{name} must be finite, and has NaN or infinite entries.")
    return checked


def style(artist: type, default: dict, given: dict | None) -> dict:
    """Return the default keywords, overruled by those given under whichever of their names."""
    from matplotlib.cbook import normalize_kwargs

    return {**default, **normalize_kwargs(given or {}, artist)}


def percent(axis) -> None:
    """Write the ticks of an axis of shares as percentages, without idle zeros."""
    axis.set_major_formatter(lambda share, _: f"{100 * share:g}%")


def columns_of_grid(n_panels: int, ideal: int, most: int) -> int:
    """Return the number of columns that leaves fewest places empty, near the ideal one."""
    candidates = range(min(n_panels, max(2, ideal - 1)), min(n_panels, most) + 1)
    return min(candidates, key=lambda columns: (-n_panels % columns, abs(columns - ideal)))


def new_axes(ax, **options):
    """Return the axes given, or those of a new figure whose layout makes room for labels."""
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained", **options)[1] if ax is None else ax


def divide_axes(
    ax,
    n_panels: int,
    n_columns: int,
    figsize: tuple[float, float],
    width_ratios: Sequence[float] | None = None,
) -> tuple:
    """Return the bounding axes (or None) and the axes of each panel (n_panels,).

    As in :class:`~sklearn.inspection.PartialDependenceDisplay`: axes that are given are blanked
    and divided, and an array of them is used as it is. A single panel takes them whole.
    """
    from matplotlib.axes import Axes
    from matplotlib.gridspec import GridSpecFromSubplotSpec

    if ax is not None and not isinstance(ax, Axes):
        axes = np.asarray(ax, dtype=object).ravel()
        if len(axes) != n_panels or not all(isinstance(panel, Axes) for panel in axes):
            raise ValueError(
                f"ax must be one axes or an array of {n_panels}, one for each panel; got "
                f"{len(axes)} objects."
            )
        return None, axes
    ax = new_axes(ax, figsize=figsize)
    if n_panels == 1:
        return None, np.array([ax], dtype=object)
    if ax.get_subplotspec() is None:
        raise ValueError(
            "ax is not part of a grid of subplots and cannot be divided into "
            f"{n_panels} panels; pass one made by plt.subplots, or an array of {n_panels} axes."
        )
    if not ax.axison:
        raise ValueError(
            "ax has been divided by a display before; to draw into the same panels again pass "
            "ax=display.axes_."
        )
    ax.set_axis_off()
    grid = GridSpecFromSubplotSpec(
        -(-n_panels // n_columns),
        n_columns,
        subplot_spec=ax.get_subplotspec(),
        width_ratios=width_ratios,
    )
    panels = [ax.figure.add_subplot(grid[place]) for place in range(n_panels)]
    return ax, np.array(panels, dtype=object)
