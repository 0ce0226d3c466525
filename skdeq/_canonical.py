"""Canonical maps, and families seen through one: as functions of the linear predictor."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._family import CanonicalMap, Family
from ._interval import Interval

__all__ = [
    "TRAINING_WIDTH",
    "WIDTHS",
    "Identity",
    "LogLink",
    "MappedFamily",
    "ReLU",
    "Softplus",
    "Tanh",
    "through",
]

# A linear predictor at which a map of limited range is as good as at its end, and at which a
# fit can still start.
_NEAR_THE_END = 4.0
_LEAST_RELU_START = 0.1
# Widths over which kinks are rounded off, one after another, on the way to the latents of a row.
WIDTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
# The one at which models are trained.
TRAINING_WIDTH = 1e-2


class Identity(CanonicalMap):
    """The map of an ordinary generalised linear model: eta is the linear predictor.

    Examples
    --------
    >>> import torch
    >>> from skdeq.families import Identity
    >>> Identity().derivative(torch.tensor([0.5, -2.0]))
    tensor([1., 1.])
    """

    formula, derivative_formula = "zeta", "1"

    def value(self, zeta: Tensor) -> Tensor:
        """Return `zeta` itself."""
        return zeta

    def derivative(self, zeta: Tensor) -> Tensor:
        """Return ones."""
        return torch.ones_like(zeta)

    def second_derivative(self, zeta: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(zeta)

    def inverse(self, eta: Tensor) -> Tensor:
        """Return `eta` itself."""
        return eta


class ReLU(CanonicalMap):
    """``max(zeta, 0)``; its derivative is a mask that drops out inputs of the layer.

    Parameters
    ----------
    mask : {"latents", "inputs", "off"}, default="latents"
        Where the multiplicative mask R' of the equilibrium layer comes from. "latents" is the
        exact one, ``zeta > 0``: the fixed point is a stationary point of the log joint, one of
        several. "inputs" is ``T(x) > 0``, dropout decided by the data, and "off" is no mask: the
        layer of an ordinary network. Both make the fixed point that of a convex problem, whose
        log-partition is the integral of the activation ``A'(max(zeta, 0))``, and not a MAP
        solution of the model.

    Examples
    --------
    >>> import torch
    >>> from skdeq.families import ReLU
    >>> ReLU().derivative(torch.tensor([0.5, -2.0]))
    tensor([1., 0.])
    """

    range = Interval(0, math.inf, True, False)
    masks = ("latents", "inputs", "off")
    formula = "max(zeta, 0)"

    def __init__(self, mask: str = "latents") -> None:
        if mask not in self.masks:
            raise ValueError(f"mask must be one of {self.masks}; got {mask!r}.")
        self.mask = mask
        self._width = 0.0

    @property
    def has_kinks(self) -> bool:  # type: ignore[override]
        """Whether the energy has kinks, which those of the other masks have not."""
        return self.mask == "latents"

    @property
    def derivative_formula(self) -> str:  # type: ignore[override]
        """The mask as text."""
        return {"latents": "1[zeta > 0]", "inputs": "1[T(x) > 0]", "off": "1"}[self.mask]

    def smoothed(self, width: float) -> "ReLU":
        """Return the map with the kink rounded off over ``[0, width]`` by a parabola.

        A minimum of the log joint may lie on a kink, where the mask has no value that would make
        it a fixed point. There the limit of the rounded maps has one, between 0 and 1.
        """
        if not self.has_kinks:
            return self
        result = copy.copy(self)
        result._width = width
        return result

    def _parameters(self) -> tuple:
        known = super()._parameters()
        return (*known, ("width", self._width)) if self._width else known

    def value(self, zeta: Tensor) -> Tensor:
        """Return the positive part."""
        width = self._width
        if width == 0:
            return zeta.clamp_min(0)
        ramp = zeta.clamp(0, width)
        return ramp.square() / (2 * width) + (zeta - ramp).clamp_min(0)

    def derivative(self, zeta: Tensor) -> Tensor:
        """Return 1 where `zeta` is positive, else 0."""
        if self._width == 0:
            return (zeta > 0).to(zeta.dtype)
        return (zeta / self._width).clamp(0, 1)

    def second_derivative(self, zeta: Tensor) -> Tensor:
        """Return zeros, as it is everywhere but at the kink."""
        if self._width == 0:
            return torch.zeros_like(zeta)
        return ((zeta > 0) & (zeta < self._width)).to(zeta.dtype) / self._width

    def inverse(self, eta: Tensor) -> Tensor:
        """Return `eta`, kept a little above 0, where there is a gradient."""
        return eta.clamp_min(_LEAST_RELU_START)

    def energy(
        self, family: Family, zeta: Tensor, statistic: Tensor, *, observed: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the terms of the energy whose stationary point the layer's fixed point is."""
        if self.mask == "latents":
            return super().energy(family, zeta, statistic, observed=observed)
        eta, open_ = zeta.clamp_min(0), zeta > 0
        at_zero = family.mean(torch.zeros_like(zeta[:1, :1]))
        # The integral of A'(max(zeta, 0)): A to the right of 0, a straight line to the left.
        loss = family.log_partition(eta) + at_zero * zeta.clamp_max(0) - statistic * zeta
        slope = family.mean(eta) - statistic
        weight = family.variance(eta) * open_
        if self.mask == "inputs":
            kept = statistic > 0
            loss, slope, weight = loss * kept, slope * kept, weight * kept
        return loss, slope, weight

    @property
    def exact(self) -> "ReLU":
        """The same map with the mask of the model."""
        result = copy.copy(self)
        result.mask, result._width = "latents", 0.0
        return result


class Softplus(CanonicalMap):
    """``log(1 + exp(zeta))``, a smooth ReLU: natural parameters above 0.

    Examples
    --------
    >>> import torch
    >>> from skdeq.families import Softplus
    >>> Softplus().value(torch.tensor([0.0, 30.0]))
    tensor([ 0.6931, 30.0000])
    """

    range = Interval(0, math.inf, False, False)
    formula, derivative_formula = "log(1 + exp(zeta))", "sigmoid(zeta)"

    def value(self, zeta: Tensor) -> Tensor:
        """Return ``log(1 + exp(zeta))``."""
        return torch.logaddexp(zeta, torch.zeros_like(zeta))

    def derivative(self, zeta: Tensor) -> Tensor:
        """Return the logistic function."""
        return torch.sigmoid(zeta)

    def second_derivative(self, zeta: Tensor) -> Tensor:
        """Return the derivative of the logistic function."""
        return torch.sigmoid(zeta) * torch.sigmoid(-zeta)

    def inverse(self, eta: Tensor) -> Tensor:
        """Return ``log(exp(eta) - 1)``, near and beyond the end a value near it."""
        least = math.log1p(math.exp(-_NEAR_THE_END))
        eta = eta.clamp_min(least)
        return eta + torch.log(-torch.expm1(-eta))


class Tanh(CanonicalMap):
    """``tanh(zeta)``: natural parameters between -1 and 1.

    Examples
    --------
    >>> import torch
    >>> from skdeq.families import Tanh
    >>> Tanh().derivative(torch.tensor([0.0, 1.0]))
    tensor([1.0000, 0.4200])
    """

    range = Interval(-1, 1, False, False)
    formula, derivative_formula = "tanh(zeta)", "1 - tanh(zeta)^2"

    def value(self, zeta: Tensor) -> Tensor:
        """Return ``tanh(zeta)``."""
        return torch.tanh(zeta)

    def derivative(self, zeta: Tensor) -> Tensor:
        """Return ``1 - tanh(zeta)^2``."""
        return 1 / torch.cosh(zeta).square()

    def second_derivative(self, zeta: Tensor) -> Tensor:
        """Return ``-2 tanh(zeta) (1 - tanh(zeta)^2)``."""
        return -2 * torch.tanh(zeta) * self.derivative(zeta)

    def inverse(self, eta: Tensor) -> Tensor:
        """Return ``atanh(eta)``, near the ends and beyond a value near them."""
        most = math.tanh(_NEAR_THE_END / 2)
        return torch.atanh(eta.clamp(-most, most))


class LogLink(CanonicalMap):
    """The map for which the mean is ``exp(zeta)``, so that effects multiply it.

    For counts and positive amounts: the identity of the Poisson family, and what takes its place
    for overdispersed counts and for amounts. The problem of a row is convex, the linear predictor
    has no end, and ``exposure`` may be used; of amounts the unit does not matter but for the
    intercept. Which map it is the family says, see :meth:`Family.log_link`.

    Examples
    --------
    >>> import torch
    >>> from skdeq.families import LogLink, NegativeBinomial
    >>> family = NegativeBinomial(dispersion=0.5)
    >>> eta = LogLink().of(family).value(torch.tensor([0.0, 3.0]))
    >>> family.mean(eta)
    tensor([ 1.0000, 20.0855])
    """

    formula, derivative_formula = "link(exp(zeta))", "exp(zeta) / A''(eta)"
    mean_formula = "exp(zeta)"
    is_convex = scales_with_exposure = True

    def of(self, family: Family) -> CanonicalMap:
        """Return the log link of a family.

        Raises
        ------
        ValueError
            For a family that has none.
        TypeError
            For one whose `log_link` returns something else.
        """
        link = family.log_link()
        if link is None:
            raise ValueError(
                "canonical_map='log' is for positive means of any size: 'poisson', "
                "'negative_binomial', 'gamma' and families of your own that define log_link; "
                f"family {family.name!r} has no log link."
            )
        is_map = isinstance(link, CanonicalMap) and not isinstance(link, LogLink)
        if not (is_map and (link.scales_with_exposure or link == Identity())):
            raise TypeError(
                f"log_link of {type(family).__name__} must return a CanonicalMap with "
                f"scales_with_exposure = True, or Identity(); got {link!r}."
            )
        return link

    def value(self, zeta: Tensor) -> Tensor:
        """Not known before the family is."""
        raise TypeError("The log link depends on the family: LogLink().of(family) is a map.")

    derivative = value


def through(family: Family, canonical_map: CanonicalMap) -> Family:
    """Return the family as a function of the linear predictor."""
    of_family = canonical_map.of(family)
    return family if of_family == Identity() else MappedFamily(family, of_family)


def _preimage(domain: Interval, canonical_map: CanonicalMap) -> Interval:
    """Linear predictors that an increasing map takes to the domain; all, for any other map."""

    def at(function: Callable[[Tensor], Tensor], x: float) -> Tensor:
        return function(torch.tensor([x], dtype=torch.float64, device="cpu"))

    low, high = -math.inf, math.inf
    if canonical_map.range.low < domain.low:
        low = float(at(canonical_map.inverse, domain.low))
    if domain.high < canonical_map.range.high:
        high = float(at(canonical_map.inverse, domain.high))
    if (low, high) == (-math.inf, math.inf) or not low < high:
        return Family.domain
    found = Interval(low, high, domain.low_inclusive, domain.high_inclusive)
    keeps_to_it = domain.contains(at(canonical_map.value, found.inside()))
    return found if bool(keeps_to_it) else Family.domain


class MappedFamily(Family):
    """A family as a function of the linear predictor, through a canonical map.

    ``p(x | zeta) = h(x) exp(T(x) R(zeta) - A(R(zeta)))`` is not an exponential family in zeta:
    the statistic does not enter linearly, and `mean` and `variance` are those of T(x) and, for
    the second, the expected curvature R'^2 A''.

    Parameters
    ----------
    base : Family
    canonical_map : CanonicalMap
    """

    is_canonical = False

    def __init__(self, base: Family, canonical_map: CanonicalMap):
        low = max(base.domain.low, canonical_map.range.low)
        high = min(base.domain.high, canonical_map.range.high)
        if not low < high:
            raise ValueError(
                f"canonical_map={canonical_map!r} gives canonical parameters in "
                f"{canonical_map.range}, but those of family {base.name!r} are in {base.domain}."
            )
        self._base, self.canonical_map = base, canonical_map
        self.domain = _preimage(base.domain, canonical_map)
        self.name, self.support, self.accepts = base.name, base.support, base.accepts

    def _parameters(self) -> tuple:
        return ("base", self._base), ("canonical_map", self.canonical_map)

    @property
    def is_convex(self) -> bool:  # type: ignore[override]
        """Whether the energy of every observation is convex in zeta."""
        return self.canonical_map.is_convex

    @property
    def scales_with_exposure(self) -> bool:  # type: ignore[override]
        """Whether adding o to zeta multiplies the mean by exp(o)."""
        return self.canonical_map.scales_with_exposure

    @property
    def base(self) -> Family:
        """The family in its canonical parameter."""
        return self._base

    @property
    def has_kinks(self) -> bool:  # type: ignore[override]
        """Whether the map has kinks."""
        return self.canonical_map.has_kinks

    def smoothed(self, width: float) -> "MappedFamily":
        """Return the family through the smoothed map."""
        if not self.has_kinks:
            return self
        return MappedFamily(self._base, self.canonical_map.smoothed(width))

    @property
    def exact(self) -> "MappedFamily":
        """The law itself, whatever the layer's mask."""
        return MappedFamily(self._base, self.canonical_map.exact)

    def canonical(self, zeta: Tensor) -> Tensor:
        """Return R(zeta)."""
        return self.canonical_map.value(zeta)

    def sufficient(self, x: Tensor) -> Tensor:
        """Return T(x)."""
        return self._base.sufficient(x)

    def log_base(self, x: Tensor) -> Tensor:
        """Return log h(x)."""
        return self._base.log_base(x)

    def log_partition(self, zeta: Tensor) -> Tensor:
        """Return A(R(zeta))."""
        return self._base.log_partition(self.canonical(zeta))

    def log_prob(self, x: Tensor, zeta: Tensor) -> Tensor:
        """Return log p(x | R(zeta)) with all constants."""
        return self._base.log_prob(x, self.canonical(zeta))

    def deviance(self, x: Tensor, zeta: Tensor) -> Tensor:
        """Return the deviance of the base family at R(zeta)."""
        return self._base.deviance(x, self.canonical(zeta))

    def mean(self, zeta: Tensor) -> Tensor:
        """Return the mean of T(x)."""
        return self._base.mean(self.canonical(zeta))

    def variance(self, zeta: Tensor) -> Tensor:
        """Return the expected curvature in zeta."""
        # It does not depend on the statistic, of which one passes any mask.
        return self.energy(zeta, torch.ones_like(zeta))[2]

    def link(self, mu: Tensor) -> Tensor:
        """Return a zeta whose mean is `mu`, or near it where no mean is."""
        return self.canonical_map.inverse(self._base.link(mu))

    def energy(
        self, zeta: Tensor, statistic: Tensor, *, observed: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, slope and curvature of each entry in zeta."""
        return self.canonical_map.energy(self._base, zeta, statistic, observed=observed)

    def slope(self, zeta: Tensor, statistic: Tensor) -> Tensor:
        """Return the slope of `energy`."""
        return self.energy(zeta, statistic)[1]

    def slope_(self, zeta: Tensor, statistic: Tensor) -> Tensor:
        """Return the slope of `energy`."""
        return self.slope(zeta, statistic)
