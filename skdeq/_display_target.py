"""How a target colours points: as labels, each with a colour and a shape, or as numbers."""

from dataclasses import dataclass

import numpy as np
from sklearn.utils import column_or_1d
from sklearn.utils._missing import is_pandas_na

from skdeq._display import MISSING_COLOR, PALETTE, check_option

__all__ = ["Labels", "Numbers", "read_target"]

# Shapes and their areas in matplotlib's units, to draw them all with the area of the first.
_MARKERS = {
    "o": np.pi / 4,
    "s": 1.0,
    "^": 0.5,
    "D": 1.0,
    "v": 0.5,
    "P": 0.556,
    "X": 0.625,
    "<": 0.5,
    ">": 0.5,
    "*": 0.281,
}
# Distinct whole numbers up to which a numeric target is taken for labels.
_MOST_NUMERIC_LABELS = 20
_TYPES = ("auto", "categorical", "continuous")


@dataclass(frozen=True)
class Labels:
    """Labels in order, the code of each point among them, -1 where missing, and their looks."""

    labels: list
    codes: np.ndarray
    colors: list
    markers: list[str]

    @property
    def point_colors(self) -> list:
        """Colour of each point."""
        # The last one has the place -1.
        colors = [*self.colors, MISSING_COLOR]
        return [colors[code] for code in self.codes]

    def point_paths(self) -> list:
        """Shape of each point, all of the same area."""
        from matplotlib.markers import MarkerStyle
        from matplotlib.transforms import Affine2D

        paths = []
        for marker in (*self.markers, "o"):
            shape = MarkerStyle(marker)
            scaled = Affine2D().scale((_MARKERS["o"] / _MARKERS[marker]) ** 0.5)
            paths.append(shape.get_path().transformed(shape.get_transform() + scaled))
        return [paths[code] for code in self.codes]

    def legend_handles(self, marker=None) -> list:
        """Entries of the legend, with one shape for all if it is given."""
        from matplotlib.lines import Line2D

        shown = [*zip(self.labels, self.colors, self.markers, strict=True)]
        if (self.codes < 0).any():
            shown.append(("missing", MISSING_COLOR, "o"))
        return [
            Line2D(
                [],
                [],
                linestyle="",
                color=color,
                marker=shape if marker is None else marker,
                markersize=6 * (_MARKERS["o"] / _MARKERS[shape]) ** 0.5 if marker is None else 6,
                label=str(label),
            )
            for label, color, shape in shown
        ]


@dataclass(frozen=True)
class Numbers:
    """Number of each point, NaN where missing, and the name of a colour map."""

    values: np.ndarray
    cmap: str


def read_target(y, n_rows: int, target_type: str, colors) -> Labels | Numbers:
    """Labels or numbers of points.

    Raises
    ------
    ValueError
        If y has another length, if it is not what `target_type` says, or if the colours do not
        fit.
    """
    categories = getattr(getattr(y, "cat", y), "categories", None)
    values = column_or_1d(y)
    if len(values) != n_rows:
        raise ValueError(
            f"y must have one entry for each of the {n_rows} rows; it has {len(values)}."
        )
    check_option("target_type", target_type, _TYPES)
    if target_type == "categorical" or (target_type == "auto" and _looks_categorical(values)):
        return _labels(values, categories, colors)
    return _numbers(values, colors)


def _looks_categorical(values: np.ndarray) -> bool:
    if values.dtype.kind not in "iuf":
        return True
    numbers = np.unique(values[np.isfinite(values)])
    return len(numbers) <= _MOST_NUMERIC_LABELS and bool(np.all(numbers == np.round(numbers)))


def _known(values: np.ndarray) -> list:
    """Entries as Python objects, None where one is missing."""
    return [
        None if is_pandas_na(value) or (isinstance(value, float) and value != value) else value
        for value in values.tolist()
    ]


def _labels(values: np.ndarray, categories, colors) -> Labels:
    entries = _known(values)
    present = {entry for entry in entries if entry is not None}
    if categories is not None:
        labels = [label for label in categories if label in present]
    else:
        try:
            labels = sorted(present)
        except TypeError:
            labels = sorted(present, key=str)
    most = len(PALETTE) * len(_MARKERS)
    if len(labels) > most:
        raise ValueError(
            f"y has {len(labels)} different labels, and no more than {most} can be told apart; "
            "pass target_type='continuous' if they are numbers."
        )
    places = {label: place for place, label in enumerate(labels)}
    codes = np.array([places.get(entry, -1) for entry in entries], dtype=int)
    # Shapes help where colours are alike in print; the shift keeps pairs from coming again.
    shapes = [code + code // len(PALETTE) for code in range(len(labels))]
    markers = [list(_MARKERS)[shape % len(_MARKERS)] for shape in shapes]
    return Labels(labels, codes, _label_colors(colors, len(labels)), markers)


def _label_colors(colors, n_labels: int) -> list:
    import matplotlib as mpl

    if colors is None:
        return [PALETTE[code % len(PALETTE)] for code in range(n_labels)]
    if isinstance(colors, str):
        cmap = mpl.colormaps[colors]
        # The first colours of a map made for labels, and an even choice from any other.
        qualitative = n_labels <= cmap.N <= 20
        return list(cmap(np.arange(n_labels) if qualitative else np.linspace(0, 1, n_labels)))
    if len(colors) != n_labels:
        raise ValueError(
            f"colors must have one entry for each of the {n_labels} labels of y; it has "
            f"{len(colors)}."
        )
    return list(colors)


def _numbers(values: np.ndarray, colors) -> Numbers:
    if colors is not None and not isinstance(colors, str):
        raise ValueError(
            f"colors of a continuous y must be the name of a colour map; got {colors!r}."
        )
    try:
        # None becomes NaN.
        numbers = np.array(_known(values), dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "y is to be shown as continuous, but not all of it is numbers; pass "
            "target_type='categorical' for labels."
        ) from error
    return Numbers(np.where(np.isfinite(numbers), numbers, np.nan), colors or "viridis")
