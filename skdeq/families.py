"""Exponential families and canonical maps, elementwise on torch tensors.

One object defines a family everywhere: the equilibrium map, the loss, the start value and the
score are all computed from it, so that they cannot disagree.
"""

import difflib
from collections.abc import Mapping
from typing import TypeVar

from ._canonical import Identity, LogLink, ReLU, Softplus, Tanh
from ._families_bounded import Bernoulli, Binomial, ContinuousBernoulli, Gaussian, Rademacher
from ._families_positive import Gamma, NegativeBinomial, Poisson
from ._family import CanonicalMap, Family
from ._family_checks import check_intervals
from ._interval import Interval

__all__ = [
    "CANONICAL_MAPS",
    "FAMILIES",
    "LINKS",
    "Bernoulli",
    "Binomial",
    "CanonicalMap",
    "ContinuousBernoulli",
    "Family",
    "Gamma",
    "Gaussian",
    "Identity",
    "Interval",
    "LogLink",
    "NegativeBinomial",
    "Poisson",
    "Rademacher",
    "ReLU",
    "Softplus",
    "Tanh",
    "get_canonical_map",
    "get_family",
]


FAMILIES: dict[str, type[Family]] = {
    family.name: family
    for family in (
        Gaussian,
        Bernoulli,
        Binomial,
        Poisson,
        ContinuousBernoulli,
        NegativeBinomial,
        Gamma,
        Rademacher,
    )
}

CANONICAL_MAPS: dict[str, type[CanonicalMap]] = {
    "identity": Identity,
    "relu": ReLU,
    "softplus": Softplus,
    "tanh": Tanh,
}

# Those that depend on the family, and that not every family has.
LINKS: dict[str, type[CanonicalMap]] = {"log": LogLink}


_Kind = TypeVar("_Kind", Family, CanonicalMap)


def _look_up(
    choice: object, kind: type[_Kind], registry: Mapping[str, type[_Kind]], what: str
) -> _Kind:
    if isinstance(choice, kind):
        check_intervals(choice)
        return choice
    if isinstance(choice, str):
        if choice in registry:
            return registry[choice]()
        nearest = difflib.get_close_matches(choice.lower(), registry, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        known = ", ".join(repr(name) for name in registry)
        raise ValueError(f"Unknown {what} {choice!r}.{hint} Known are {known}.")
    if isinstance(choice, type) and issubclass(choice, kind):
        raise TypeError(
            f"The {what} must be an object, not a class: write {choice.__name__}(...)."
        )
    raise TypeError(
        f"The {what} must be a string or a {kind.__name__} object; got {type(choice).__name__}."
    )


def get_family(family: str | Family) -> Family:
    """Return the family of that name with its default parameters, or the object given.

    Parameters
    ----------
    family : str or Family
        A key of `FAMILIES`, or a family object.

    Returns
    -------
    Family
        The family.

    Examples
    --------
    >>> from skdeq.families import get_family
    >>> get_family("binomial")
    Binomial(n_trials=10)
    """
    return _look_up(family, Family, FAMILIES, "family")


def get_hidden_map(hidden_map: str | CanonicalMap) -> CanonicalMap:
    """Return the map of hidden layers of that name, or the object given.

    Raises
    ------
    TypeError, ValueError
        For anything else, for the log link, which is for data, and for a mask other than that of
        the model, with which there is no joint density of the layers.
    """
    found = _look_up(hidden_map, CanonicalMap, CANONICAL_MAPS, "hidden map")
    if isinstance(found, LogLink):
        raise ValueError(
            "hidden_map cannot be the log link, which is for counts and positive amounts; hidden "
            "latents are real numbers."
        )
    if found.exact != found:
        raise ValueError(
            f"hidden_map={found!r} is not a map of the model: with such a mask the layers have no "
            f"joint density. Use {found.exact!r}, or the mask in the canonical map."
        )
    return found


def get_canonical_map(canonical_map: str | CanonicalMap) -> CanonicalMap:
    """Return the canonical map of that name, or the object given.

    Parameters
    ----------
    canonical_map : str or CanonicalMap
        A key of `CANONICAL_MAPS`, "log" for the log link of a family, or a map object.

    Returns
    -------
    CanonicalMap
        The map.

    Examples
    --------
    >>> from skdeq.families import get_canonical_map
    >>> get_canonical_map("identity")
    Identity()
    """
    return _look_up(canonical_map, CanonicalMap, {**CANONICAL_MAPS, **LINKS}, "canonical map")
