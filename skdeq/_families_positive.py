"""Families of counts and positive amounts, whose variance grows with their mean."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._canonical import Identity
from ._family import CanonicalMap, Family
from ._interval import Interval

__all__ = ["Gamma", "NegativeBinomial", "Poisson", "log_multiplicity"]

_NEGATIVE = Interval(-math.inf, 0, False, False)


def _positive_number(owner: str, name: str, value: object) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{owner} needs a number as {name}; got {value!r}.")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{owner} needs a finite {name} > 0; got {value!r}.")
    return float(value)


def _below_zero(function: Callable[[Tensor], Tensor], eta: Tensor) -> Tensor:
    """Evaluate `function` where eta < 0, or is no number, and return +inf elsewhere."""
    # The inner `where` keeps autograd from meeting 0 * inf in the branch that is not taken.
    outside = eta >= 0
    return torch.where(outside, math.inf, function(torch.where(outside, -1.0, eta)))


def _stirling_remainder(z: Tensor) -> Tensor:
    """Return what Stirling's formula lacks of lgamma(z); below 2e-16 off for z >= 15."""
    w = 1 / (z * z)
    return (1 / 12 - w * (1 / 360 - w * (1 / 1260 - w * (1 / 1680 - w / 1188)))) / z


def log_multiplicity(p: Tensor, q: Tensor) -> Tensor:
    """Return lgamma(p + q - 1) - lgamma(p) - lgamma(q) for positive p and q.

    The three may be of size 1e9 where the result is of size 1. The larger of p and q is therefore
    taken from p + q - 1 by the difference of their Stirling formulas, in which the large terms
    cancel on paper.
    """
    large, small = torch.maximum(p, q), torch.minimum(p, q)
    a, d = large.clamp(min=16), small - 1
    stirling = (
        d * torch.log(a + d)
        - d
        + (a - 0.5) * torch.log1p(d / a)
        + (_stirling_remainder(a + d) - _stirling_remainder(a))
    )
    direct = torch.lgamma((large - 1) + small) - torch.lgamma(large)
    return torch.where(large >= 16, stirling, direct) - torch.lgamma(small)


class Poisson(Family):
    """Counts whose variance equals their mean.

    Notes
    -----
    Support: [0, inf). Natural parameter: all reals, the log of the mean. Mean, variance and A:
    ``exp(eta)``. ``log h = -lgamma(x + 1)``. Dropped constants: none.

    Examples
    --------
    >>> import torch
    >>> from skdeq.families import Poisson
    >>> Poisson().link(torch.tensor([0.0, 1.0, 10.0]))
    tensor([  -inf, 0.0000, 2.3026])
    """

    name = "poisson"
    log_partition_formula = "exp({eta})"
    mean_formula = "exp({eta})"
    support = Interval(0, math.inf, True, False)
    accepts = "counts or other non-negative numbers"
    scales_with_exposure = True
    self_concordance = 1.0

    def log_partition(self, eta: Tensor) -> Tensor:
        """Return ``exp(eta)``."""
        return torch.exp(eta)

    def mean(self, eta: Tensor) -> Tensor:
        """Return ``exp(eta)``."""
        return torch.exp(eta)

    def variance(self, eta: Tensor) -> Tensor:
        """Return ``exp(eta)``."""
        return torch.exp(eta)

    def link(self, mu: Tensor) -> Tensor:
        """Return ``log(mu)``."""
        return torch.log(mu)

    def log_base(self, x: Tensor) -> Tensor:
        """Return ``-lgamma(x + 1)``."""
        return -torch.lgamma(x + 1)

    def log_link(self) -> CanonicalMap:
        """Return the identity: eta is the log of the mean."""
        return Identity()

    def statistics_(
        self, eta: Tensor, *, log_partition: bool = False, variance: bool = False
    ) -> tuple[Tensor | Any, Tensor, Tensor | Any]:
        """Compute A, mean and variance: all three are one tensor, in the memory of `eta`."""
        mean = eta.exp_()
        return mean if log_partition else None, mean, mean if variance else None


class NegativeBinomial(Family):
    """Counts whose variance exceeds their mean.

    Parameters
    ----------
    dispersion : float, default=1.0
        Excess of the variance over the mean, relative to the squared mean; r = 1 / dispersion.

    Notes
    -----
    Support: [0, inf). Natural parameter: eta < 0, the log of mean / (mean + r). Mean
    ``mu = r / (exp(-eta) - 1)``, variance ``mu + dispersion mu^2``, ``A = -r log(1 - exp(eta))``,
    ``log h = lgamma(x + r) - lgamma(r) - lgamma(x + 1)``. Dropped constants: none.

    Examples
    --------
    >>> import torch
    >>> from skdeq.families import NegativeBinomial
    >>> family = NegativeBinomial(dispersion=0.5)
    >>> family.variance(family.link(torch.tensor([2.0])))
    tensor([4.])
    """

    name = "negative_binomial"
    log_partition_formula = "-r log(1 - exp({eta}))"
    mean_formula = "r / (exp(-{eta}) - 1)"
    support = Interval(0, math.inf, True, False)
    accepts = "counts or other non-negative numbers"
    domain = _NEGATIVE

    def __init__(self, dispersion: float = 1.0) -> None:
        self.dispersion = _positive_number("NegativeBinomial", "dispersion", dispersion)

    def log_partition(self, eta: Tensor) -> Tensor:
        """Return ``-r log(1 - exp(eta))``, +inf for eta >= 0."""

        def inside(eta: Tensor) -> Tensor:
            # Below -log 2 the digits of exp(eta) survive in log1p, above it those of expm1.
            split = -math.log(2)
            near = torch.log(-torch.expm1(eta.clamp(min=split)))
            far = torch.log1p(-torch.exp(eta.clamp(max=split)))
            return -torch.where(eta > split, near, far) / self.dispersion

        return _below_zero(inside, eta)

    def mean(self, eta: Tensor) -> Tensor:
        """Return ``r exp(eta) / (1 - exp(eta))``, +inf for eta >= 0."""
        return _below_zero(lambda t: torch.exp(t) / -torch.expm1(t) / self.dispersion, eta)

    def variance(self, eta: Tensor) -> Tensor:
        """Return ``r exp(eta) / (1 - exp(eta))^2``, +inf for eta >= 0."""
        return _below_zero(
            lambda t: torch.exp(t) / torch.expm1(t) / torch.expm1(t) / self.dispersion, eta
        )

    def link(self, mu: Tensor) -> Tensor:
        """Return ``log(mu / (mu + r))``."""
        return -torch.log1p(1 / (self.dispersion * mu))

    def log_base(self, x: Tensor) -> Tensor:
        """Return ``lgamma(x + r) - lgamma(r) - lgamma(x + 1)``."""
        return log_multiplicity(x + 1, torch.full_like(x, 1 / self.dispersion))

    def log_link(self) -> CanonicalMap:
        """Return ``-log(1 + r exp(-zeta))``."""
        return _NegativeBinomialLog(self.dispersion)

    def statistics_(
        self, eta: Tensor, *, log_partition: bool = False, variance: bool = False
    ) -> tuple[Tensor | Any, Tensor, Tensor | Any]:
        """Compute A, mean and variance from one expm1 in place."""
        # Clamped to 0, an eta outside the domain gives the +inf of all three by itself.
        mean = eta.clamp_(max=0).abs_().expm1_().mul_(self.dispersion).reciprocal_()
        # 1 / (1 - exp(eta)) is 1 + dispersion mean, of which no digit is lost at either end.
        a = None
        if log_partition:
            a = torch.mul(mean, self.dispersion).log1p_().div_(self.dispersion)
        v = torch.addcmul(mean, mean, mean, value=self.dispersion) if variance else None
        return a, mean, v


class Gamma(Family):
    """Positive amounts whose standard deviation is proportional to their mean.

    Parameters
    ----------
    shape : float, default=1.0
        The inverse squared coefficient of variation; 1 is the exponential distribution.

    Notes
    -----
    Support: (0, inf). Natural parameter: eta < 0, minus the rate. Mean ``-shape / eta``, variance
    ``shape / eta^2``, ``A = -shape log(-eta)``, ``log h = (shape - 1) log x - lgamma(shape)``.
    Dropped constants: none.

    Examples
    --------
    >>> import torch
    >>> from skdeq.families import Gamma
    >>> Gamma(shape=3.0).mean(torch.tensor([-2.0, 1.0]))
    tensor([1.5000,    inf])
    """

    name = "gamma"
    log_partition_formula = "-shape log(-{eta})"
    mean_formula = "-shape / {eta}"
    support = Interval(0, math.inf, False, False)
    accepts = "positive numbers"
    domain = _NEGATIVE

    def __init__(self, shape: float = 1.0) -> None:
        self.shape = _positive_number("Gamma", "shape", shape)

    def log_partition(self, eta: Tensor) -> Tensor:
        """Return ``-shape log(-eta)``, +inf for eta >= 0."""
        # Held to the largest float, eta = -inf gives no -inf that a minimiser would run after.
        largest = torch.finfo(eta.dtype).max
        return _below_zero(lambda t: -self.shape * torch.log((-t).clamp(max=largest)), eta)

    def mean(self, eta: Tensor) -> Tensor:
        """Return ``-shape / eta``, +inf for eta >= 0."""
        return _below_zero(lambda t: -self.shape / t, eta)

    def variance(self, eta: Tensor) -> Tensor:
        """Return ``shape / eta^2``, +inf for eta >= 0."""
        return _below_zero(lambda t: self.shape / t / t, eta)

    def link(self, mu: Tensor) -> Tensor:
        """Return ``-shape / mu``."""
        return -self.shape / mu

    def log_base(self, x: Tensor) -> Tensor:
        """Return ``(shape - 1) log x - lgamma(shape)``."""
        return torch.xlogy(self.shape - 1, x) - math.lgamma(self.shape)

    def log_link(self) -> CanonicalMap:
        """Return ``-shape exp(-zeta)``."""
        return _GammaLog(self.shape)

    def statistics_(
        self, eta: Tensor, *, log_partition: bool = False, variance: bool = False
    ) -> tuple[Tensor | Any, Tensor, Tensor | Any]:
        """Compute A, mean and variance from one reciprocal in place."""
        rate = eta.clamp_(min=torch.finfo(eta.dtype).min, max=0).abs_()
        a = rate.log().mul_(-self.shape) if log_partition else None
        mean = rate.reciprocal_().mul_(self.shape)
        return a, mean, mean.square().div_(self.shape) if variance else None


class _LogOfFamily(CanonicalMap):
    """What the log links have in common."""

    range = _NEGATIVE
    mean_formula = "exp(zeta)"
    is_convex = scales_with_exposure = True

    def __repr__(self) -> str:
        return "LogLink()"

    def of(self, family: Family) -> CanonicalMap:
        """Return this map for the family that it is of.

        Raises
        ------
        ValueError
            For another, such as one of another dispersion.
        """
        if family.log_link() != self:
            raise ValueError(
                f"The canonical map is the log link of another family than {family!r}; "
                "canonical_map='log' is that of whichever family is fitted."
            )
        return self


class _NegativeBinomialLog(_LogOfFamily):
    """Log link of the negative binomial family.

    With ``u = zeta + log(dispersion)`` the energy is ``(x + r) softplus(u) - x u`` and a constant:
    that of a logistic regression, which overflows nowhere.
    """

    formula, derivative_formula = "-log(1 + r exp(-zeta))", "r / (r + exp(zeta))"

    def __init__(self, dispersion: float) -> None:
        self.dispersion = dispersion

    def _logit(self, zeta: Tensor) -> Tensor:
        """Log-odds of mean against r."""
        return zeta + math.log(self.dispersion)

    def value(self, zeta: Tensor) -> Tensor:
        """Return ``-log(1 + r exp(-zeta))``."""
        logit = self._logit(zeta)
        return -torch.logaddexp(-logit, torch.zeros_like(logit))

    def derivative(self, zeta: Tensor) -> Tensor:
        """Return ``r / (r + exp(zeta))``."""
        return torch.sigmoid(-self._logit(zeta))

    def second_derivative(self, zeta: Tensor) -> Tensor:
        """Return minus the derivative of the logistic function."""
        logit = self._logit(zeta)
        return -torch.sigmoid(logit) * torch.sigmoid(-logit)

    def inverse(self, eta: Tensor) -> Tensor:
        """Return the log of the mean."""
        return -torch.log(torch.expm1(-eta)) - math.log(self.dispersion)

    def energy(
        self, family: Family, zeta: Tensor, statistic: Tensor, *, observed: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute loss, slope and curvature with few passes over the entries."""
        r, logit = 1 / self.dispersion, self._logit(zeta)
        # r softplus(u) + x softplus(-u), and the same of its slope: of (x + r) softplus(u) - x u
        # a large x or r would take the digits.
        tail = torch.log1p(torch.exp(-logit.abs()))
        loss = (tail + logit.clamp(min=0)).mul_(r).add_((tail - logit.clamp(max=0)) * statistic)
        share, rest = torch.sigmoid(logit), torch.sigmoid(-logit)
        slope = (r * share).sub_(statistic * rest)
        return loss, slope, (share * rest).mul_(statistic + r) if observed else r * share


class _GammaLog(_LogOfFamily):
    """Log link of the gamma family."""

    formula, derivative_formula = "-shape exp(-zeta)", "shape exp(-zeta)"

    def __init__(self, shape: float) -> None:
        self.shape = shape

    def value(self, zeta: Tensor) -> Tensor:
        """Return ``-shape exp(-zeta)``."""
        return -self.shape * torch.exp(-zeta)

    def derivative(self, zeta: Tensor) -> Tensor:
        """Return ``shape exp(-zeta)``."""
        return self.shape * torch.exp(-zeta)

    def second_derivative(self, zeta: Tensor) -> Tensor:
        """Return ``-shape exp(-zeta)``."""
        return self.value(zeta)

    def inverse(self, eta: Tensor) -> Tensor:
        """Return the log of the mean."""
        return math.log(self.shape) - torch.log(-eta)

    def energy(
        self, family: Family, zeta: Tensor, statistic: Tensor, *, observed: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute loss, slope and curvature from one exponential."""
        # x over the mean, times the shape.
        relative = self.shape * statistic * torch.exp(-zeta)
        loss = self.shape * (zeta - math.log(self.shape)) + relative
        curvature = relative if observed else torch.full_like(zeta, self.shape)
        return loss, self.shape - relative, curvature
