"""What the parameters of ExpFamilyDEQ say of its law and its layers, before there are data."""

import copy
from collections.abc import Callable
from itertools import pairwise
from numbers import Integral
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator

from skdeq._canonical import through
from skdeq._convolution import Convolution
from skdeq._family import CanonicalMap, Family
from skdeq._loadings import FreeLoadings, KernelLoadings, Loadings
from skdeq.families import get_canonical_map, get_family, get_hidden_map

__all__ = ["LatentLayout", "changed_law", "changed_parameters", "parameters_of_the_fit"]


def _as_tuple(value: Any) -> tuple:
    """Return one value, or several in whichever kind of sequence, as a tuple."""
    return tuple(np.ravel(value).tolist())


def _as_pair(value: Any) -> tuple:
    """Return the sides of a kernel, of which one stands for both."""
    sides = _as_tuple(value)
    return sides * 2 if len(sides) == 1 else sides


def _as_image(value: Any) -> tuple:
    """Return channels, height and width, of which the channels may be left out."""
    shape = _as_tuple(value)
    return (1, *shape) if len(shape) == 2 else shape


# Parameters that make another model, and as what they are compared.
_OF_THE_MODEL: dict[str, Callable] = {
    "n_components": _as_tuple,
    "family": get_family,
    "canonical_map": get_canonical_map,
    "hidden_layer_sizes": _as_tuple,
    "hidden_map": get_hidden_map,
    "loadings": _as_tuple,
    "image_shape": _as_image,
    "kernel_size": _as_pair,
    "stride": _as_tuple,
    "exposure": _as_tuple,
    "alpha": _as_tuple,
}
_OF_CONVOLUTIONS = ("image_shape", "kernel_size", "stride")
# Parameters that make another optimum, though a stream may go on from where it is.
_OF_THE_OPTIMUM: dict[str, Callable] = {**_OF_THE_MODEL, "weight_decay": _as_tuple}
# Parameters that only a fit asks for: the arrays that are fitted say how many there are.
_OF_THE_SHAPES = ("n_components", "hidden_layer_sizes", "loadings")


def parameters_of_the_fit(parameters: dict[str, Any]) -> dict[str, Any]:
    """Copy those of an estimator's parameters that say what is fitted, to what optimum."""
    return {name: copy.deepcopy(parameters[name]) for name in _OF_THE_OPTIMUM}


def changed_parameters(
    asked: dict[str, Any], there: dict[str, Any], *, optimum: bool = False
) -> dict[str, tuple[Any, Any]]:
    """Parameters that ask for another model than there is: what they are, and were.

    If ``optimum``, those that ask for another optimum as well.
    """
    idle = set(_OF_CONVOLUTIONS) if asked["loadings"] == "dense" else set()
    if not _as_tuple(asked["hidden_layer_sizes"]):
        idle.add("hidden_map")
    forms = _OF_THE_OPTIMUM if optimum else _OF_THE_MODEL
    return {
        name: (asked[name], there[name])
        for name, form in forms.items()
        # Saved by an older version, a model does not know of all.
        if name not in idle and name in there and form(asked[name]) != form(there[name])
    }


def changed_law(asked: dict[str, Any], there: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Parameters that ask for another law of the rows than was fitted: what they are, and were."""
    return changed_parameters({**asked, **{name: there[name] for name in _OF_THE_SHAPES}}, there)


class LatentLayout(BaseEstimator):
    """Private methods of :class:`~skdeq.ExpFamilyDEQ` that validate parameters alone."""

    def _family(self) -> Family:
        canonical_map = get_canonical_map(self.canonical_map)
        family = through(get_family(self.family), canonical_map)
        if not (self.exposure is None or isinstance(self.exposure, str)):
            raise TypeError(
                f"exposure must be 'total' or None; got an object of type "
                f"{type(self.exposure).__name__}. Exposures that were measured cannot be given: "
                "'total' estimates those of rows from their totals."
            )
        if self.exposure not in (None, "total"):
            raise ValueError(f"exposure must be 'total' or None; got {self.exposure!r}.")
        if self.exposure is not None and not family.scales_with_exposure:
            detail = "" if family.is_canonical else f" with canonical_map={canonical_map!r}"
            has_link = family.is_canonical and family.log_link() is not None
            advice = "; canonical_map='log' gives it one" if has_link else ""
            raise ValueError(
                f"exposure={self.exposure!r} needs a family whose mean it multiplies, such as "
                f"'poisson'; family {family.name!r}{detail} has no such offset{advice}."
            )
        return family

    def _loadings(self) -> Loadings:
        """Say what of the loadings is fitted; validate the geometry of convolutional ones."""
        if self.loadings == "dense":
            return FreeLoadings()
        if self.image_shape is None:
            raise ValueError(
                "loadings='conv2d' needs image_shape=(height, width) or (channels, height, width)."
            )
        shape = _integers("image_shape", self.image_shape, (2, 3))
        kernel = self.kernel_size
        kernel = (kernel, kernel) if isinstance(kernel, Integral) else kernel
        convolution = Convolution(
            (1, *shape) if len(shape) == 2 else shape,
            _integers("kernel_size", kernel, (2,)),
            int(self.stride),
        )
        if self.n_components > convolution.n_weights:
            raise ValueError(
                f"n_components={self.n_components} is more than the {convolution.n_weights} "
                f"weights of a kernel of size {convolution.kernel_size} on "
                f"{convolution.image_shape[0]} channels."
            )
        if len(tuple(self.hidden_layer_sizes)):
            raise ValueError(
                "loadings='conv2d' is for one layer of latents; got "
                f"hidden_layer_sizes={self.hidden_layer_sizes!r}."
            )
        return KernelLoadings(convolution)

    def _is_scoring(self) -> bool:
        """Whether `fit` is by alternating Fisher scoring, and not by minibatches."""
        dense = self.loadings == "dense" and not len(tuple(self.hidden_layer_sizes))
        return dense and self.solver != "adam"

    def _sizes(self) -> tuple[int, ...]:
        """Validate the numbers of latents of the layers, from the data to the top."""
        loadings = self._loadings()
        hidden = self.hidden_layer_sizes
        sizes = tuple(hidden)
        if not all(isinstance(size, Integral) and int(size) >= 1 for size in sizes):
            raise ValueError(
                "hidden_layer_sizes must be integers of at least 1, one for each layer between "
                f"the data and the top; got {hidden!r}."
            )
        if self.solver == "scoring" and not self._is_scoring():
            raise ValueError(
                "solver='scoring' is for one layer of dense loadings; use 'adam' or 'auto' with "
                f"hidden_layer_sizes={hidden!r} and loadings={self.loadings!r}."
            )
        top = loadings.n_latents(int(self.n_components))
        sizes = (*(int(size) for size in sizes), top)
        if any(below < above for below, above in pairwise(sizes)):
            raise ValueError(
                f"hidden_layer_sizes={hidden!r} with n_components={self.n_components}: sizes "
                "must not grow from the data to the top."
            )
        return sizes

    def _check_sizes(self, sizes: tuple[int, ...], n: int, p: int, found: str) -> None:
        """Refuse more latents than n rows of p features can tell apart; ``found`` names both."""
        if len(sizes) > 1 and sizes[0] > min(n, p):
            raise ValueError(
                f"hidden_layer_sizes={self.hidden_layer_sizes!r}: the first is more than "
                f"min(n_samples, n_features)={min(n, p)} ({found})."
            )
        self._loadings().check_data(int(self.n_components), n, p, found)

    def _hidden_map(self) -> CanonicalMap:
        return get_hidden_map(self.hidden_map)


def _integers(name: str, values: Any, lengths: tuple[int, ...]) -> tuple[Any, ...]:
    """Validate a tuple of positive integers."""
    given = tuple(values) if isinstance(values, list | tuple | np.ndarray) else ()
    if len(given) not in lengths or not all(
        isinstance(v, Integral) and int(v) >= 1 for v in given
    ):
        count = " or ".join(str(length) for length in lengths)
        raise ValueError(f"{name} must be {count} integers of at least 1; got {values!r}.")
    return tuple(int(value) for value in given)
