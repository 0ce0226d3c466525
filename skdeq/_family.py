"""What families and canonical maps are, before any particular one."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ._equality import EqualByParameters
from ._interval import REALS, Interval, invert_increasing

__all__ = ["CanonicalMap", "Family"]


# Stands for an infinite natural parameter: exp(-40) is below the rounding of float64.
_AS_GOOD_AS_INFINITE = 40.0


class Family(EqualByParameters, ABC):
    """Exponential family ``p(x | eta) = h(x) exp(T(x) eta - A(eta))`` with scalar x and eta.

    A family of your own needs four methods, `log_partition`, `mean`, `variance` and `log_base`;
    what it inherits is right for most: T(x) = x, eta on the whole real line, and a `link` that
    inverts the mean numerically. Where eta is outside `domain`, `log_partition`, `mean` and
    `variance` must be +inf, so that a line search refuses such a point. Constructor parameters
    are kept in attributes of the same names; two families are equal when those are, and a search
    finds them as ``family__<name>``.

    Attributes
    ----------
    name : str
        What error messages call the family.
    unbounded_at : tuple of float
        Observations whose density grows without bound as eta does; none by default.
    support : Interval
        Observations that are accepted.
    accepts : str
        The same as a phrase for error messages, e.g. "counts or other non-negative numbers".
    domain : Interval
        Natural parameters eta for which A(eta) is finite; all reals by default.
    scales_with_exposure : bool
        Whether adding o to eta multiplies the mean by exp(o), as it does for counts.
    is_location_family : bool
        Whether x - c is as probable under eta - c as x under eta, so that data far from zero may
        be worked on with their means taken off.
    variance_bound : float or None
        Supremum of the variance over eta, None where there is none.
    self_concordance : float or None
        A constant M with ``|A'''(eta)| <= M A''(eta)`` for every eta, None where there is none or
        none is known. A change d of eta then alters the variance by a factor of at most
        ``exp(M |d|)``, so that a solver can do without the line search for a Newton step that
        changes the linear predictor little (generalised self-concordance [1]_ [2]_). A variable
        of range c has M = c at most, since its third central moment is at most c times its
        variance.

    References
    ----------
    .. [1] F. Bach (2010). Self-concordant analysis for logistic regression. Electronic Journal of
       Statistics 4, 384-414.
    .. [2] T. Sun and Q. Tran-Dinh (2019). Generalized self-concordant functions: a recipe for
       Newton-type methods. Mathematical Programming 178, 145-213.

    Examples
    --------
    Counts that are only recorded when positive, for which the mean has no inverse in closed
    form:

    >>> import torch
    >>> from skdeq.families import Family, Interval
    >>> class ZeroTruncatedPoisson(Family):
    ...     name = "zero-truncated Poisson"
    ...     support = Interval(1, float("inf"), True, False)
    ...     accepts = "counts from 1 upwards"
    ...
    ...     def log_partition(self, eta: Tensor) -> Tensor:
    ...         rate = eta.exp()
    ...         return rate + torch.log(-torch.expm1(-rate))
    ...
    ...     def mean(self, eta: Tensor) -> Tensor:
    ...         rate = eta.exp()
    ...         return rate / -torch.expm1(-rate)
    ...
    ...     def variance(self, eta: Tensor) -> Tensor:
    ...         mean = self.mean(eta)
    ...         return mean * (1 + eta.exp() - mean)
    ...
    ...     def log_base(self, x: Tensor) -> Tensor:
    ...         return -torch.lgamma(x + 1)
    >>> family = ZeroTruncatedPoisson()
    >>> family.link(family.mean(torch.tensor([-1.0, 0.5, 3.0])))
    tensor([-1.0000,  0.5000,  3.0000])
    """

    name: str = "user-defined"
    support: Interval = REALS
    accepts: str = "real numbers"
    unbounded_at: tuple[float, ...] = ()
    domain: Interval = REALS
    scales_with_exposure: bool = False
    is_location_family: bool = False
    variance_bound: float | None = None
    self_concordance: float | None = None
    is_canonical = True
    # Whether the energy of every observation is convex in the linear predictor.
    is_convex = True
    # For people: A and A' as text, with {eta} for the argument.
    log_partition_formula = "A({eta})"
    mean_formula = "A'({eta})"
    # Whether it is seen through a map with kinks.
    has_kinks: bool = False
    # Of a family that is seen through a map.
    canonical_map: "CanonicalMap"

    @property
    def has_constant_variance(self) -> bool:
        """Whether the variance is the same for every linear predictor: of least squares."""
        return self.self_concordance == 0

    @property
    def sufficient_formula(self) -> str:
        """T(x) as text: x itself, unless a class has a statistic of its own."""
        return "x" if type(self).sufficient is Family.sufficient else "T(x)"

    def log_link(self) -> "CanonicalMap | None":
        """Return the map through which the mean is the exponential of the linear predictor.

        None unless the family overrides it, as those of counts and positive amounts do. The map
        has `scales_with_exposure`, and `is_convex` if it is.
        """
        return None

    @property
    def base(self) -> "Family":
        """The family in its canonical parameter: this one."""
        return self

    @property
    def exact(self) -> "Family":
        """The law itself: this one."""
        return self

    def smoothed(self, width: float) -> "Family":
        """Return the family with the kinks of its map rounded off: this one has none."""
        return self

    def canonical(self, zeta: Tensor) -> Tensor:
        """Return the canonical parameter of a linear predictor: itself."""
        return zeta

    def energy(
        self, zeta: Tensor, statistic: Tensor, *, observed: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute ``A(zeta) - T zeta`` and its first two derivatives."""
        loss = self.log_partition(zeta) - statistic * zeta
        return loss, self.slope(zeta, statistic), self.variance(zeta)

    def slope(self, zeta: Tensor, statistic: Tensor) -> Tensor:
        """Return the slope of `energy`."""
        return self.mean(zeta) - statistic

    def slope_(self, zeta: Tensor, statistic: Tensor) -> Tensor:
        """Compute the slope of `energy`, in the memory of `zeta` where that pays."""
        return self.statistics_(zeta)[1] - statistic

    @abstractmethod
    def log_partition(self, eta: Tensor) -> Tensor:
        """Return A(eta)."""

    @abstractmethod
    def mean(self, eta: Tensor) -> Tensor:
        """Return the mean of T(x), A'(eta)."""

    @abstractmethod
    def variance(self, eta: Tensor) -> Tensor:
        """Return the variance of T(x), A''(eta)."""

    @abstractmethod
    def log_base(self, x: Tensor) -> Tensor:
        """Return log h(x) for x in the support, which is not checked."""

    def sufficient(self, x: Tensor) -> Tensor:
        """Return the sufficient statistic T(x)."""
        return x

    def link(self, mu: Tensor) -> Tensor:
        """Return the eta whose mean is `mu`; an end of `domain` for the least or largest mean."""
        return invert_increasing(self.mean, self.variance, mu, self.domain)

    def log_prob(self, x: Tensor, eta: Tensor) -> Tensor:
        """Return log p(x | eta) with all constants; -inf for eta outside the domain."""
        # An infinite eta, such as the link of a count of 0, is as good as a number whose products
        # are just finite.
        most = torch.finfo(eta.dtype).max ** 0.5
        finite = eta.clamp(-most, most)
        result = self.sufficient(x) * finite - self.log_partition(finite) + self.log_base(x)
        unknown = torch.isnan(eta) | torch.isnan(x)
        return torch.where(torch.isnan(result) & ~unknown, -math.inf, result)

    def saturated(self, x: Tensor) -> Tensor:
        """Return the eta at which the likelihood of `x` is greatest, `link` of T(x), made finite.

        Where the likelihood only approaches its supremum as eta grows, as that of a Poisson count
        of 0 does, the result is 40 or -40: A(eta) stays finite and the rest, exp(-40), is below
        rounding. Where the likelihood has no supremum, as that of a continuous Bernoulli at 0 and
        1, the same value merely caps it.
        """
        eta = self.link(self.sufficient(x))
        # Counted from the end of a half-line where that leaves 40 or -40 outside the domain.
        low = min(0.0, self.domain.high) - _AS_GOOD_AS_INFINITE
        high = max(0.0, self.domain.low) + _AS_GOOD_AS_INFINITE
        eta = torch.nan_to_num(eta, nan=math.nan, neginf=low, posinf=high)
        # A link that is inverted numerically may end where the formula of the mean overflows.
        at_an_end = (x <= self.support.low) | (x >= self.support.high)
        return torch.where(at_an_end, eta.clamp(low, high), eta)

    def deviance(self, x: Tensor, eta: Tensor) -> Tensor:
        """Return ``2 (log p(x | saturated(x)) - log p(x | eta))``, never negative."""
        # Without log h(x), which cancels, and by the difference of the two eta, which loses fewer
        # digits than that of the two products.
        saturated = self.saturated(x)
        linear = self.sufficient(x) * (saturated - eta)
        excess = linear - (self.log_partition(saturated) - self.log_partition(eta))
        return (2 * excess).clamp(min=0)

    def statistics_(
        self, eta: Tensor, *, log_partition: bool = False, variance: bool = False
    ) -> tuple[Tensor | Any, Tensor, Tensor | Any]:
        """Compute A(eta), mean and variance together, in the memory of `eta` where that pays.

        This is for inner loops without autograd. It may overwrite `eta`, and what it returns may
        share memory with `eta` and among itself: consume the log-partition and the variance
        before altering the mean, and alter nothing of which another is still needed.

        Parameters
        ----------
        eta : Tensor
            Natural parameters; consider them lost.
        log_partition, variance : bool
            Whether to compute these; the mean always is.

        Returns
        -------
        log_partition, variance : Tensor or None
            None unless asked for. As the methods of those names, but accurate to rounding in
            absolute terms only: the relative accuracy may be lost where they are close to 0.
        mean : Tensor
            As the method of that name, with the same reservation.
        """
        return (
            self.log_partition(eta) if log_partition else None,
            self.mean(eta),
            self.variance(eta) if variance else None,
        )

    def summed_statistics_(
        self, eta: Tensor, *, variance: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | Any]:
        """Compute the sum of A(eta) over each row, shape (m,), mean and variance.

        Like `statistics_`, but the sum may be cheaper than its terms; it is as accurate as they
        are.
        """
        log_partition, mean, variances = self.statistics_(
            eta, log_partition=True, variance=variance
        )
        return log_partition.sum(-1), mean, variances


class CanonicalMap(EqualByParameters, ABC):
    """Elementwise map R from the linear predictor zeta to the natural parameter eta.

    A map of your own needs `value` and `derivative`; the rest follows from them.

    Attributes
    ----------
    range : Interval
        Values that R takes; all reals by default.
    is_convex : bool
        Whether ``A(R(zeta)) - T(x) R(zeta)`` is convex in zeta for every observation of the family
        that the map is for, so that the latents of a row are its one solution; False by default.
    scales_with_exposure : bool
        Whether adding o to zeta multiplies the mean by exp(o); False by default.
    """

    range: Interval = REALS
    is_convex: bool = False
    scales_with_exposure: bool = False
    # For people: R and R' as text.
    formula = "R(zeta)"
    derivative_formula = "R'(zeta)"
    # A'(R(zeta)) as text, where it is simpler than that of A' and R.
    mean_formula = ""
    # Whether the energy has a slope that jumps; `smoothed` then rounds that off.
    has_kinks: bool = False

    def of(self, family: Family) -> "CanonicalMap":
        """Return the map for a family: this one, for most maps do not depend on it."""
        return self

    def smoothed(self, width: float) -> "CanonicalMap":
        """Return the map with its kinks rounded off over a width: this one has none."""
        return self

    @abstractmethod
    def value(self, zeta: Tensor) -> Tensor:
        """Return R(zeta)."""

    @abstractmethod
    def derivative(self, zeta: Tensor) -> Tensor:
        """Return R'(zeta)."""

    def second_derivative(self, zeta: Tensor) -> Tensor:
        """Return R''(zeta), by automatic differentiation of `derivative`."""
        with torch.enable_grad():
            leaf = zeta.detach().requires_grad_()
            slope = self.derivative(leaf)
            if not slope.requires_grad:
                return torch.zeros_like(zeta)
            return torch.autograd.grad(slope.sum(), leaf)[0]

    def inverse(self, eta: Tensor) -> Tensor:
        """Return a zeta with R(zeta) near `eta`, where a fit can start."""
        return invert_increasing(self.value, self.derivative, eta, REALS)

    def energy(
        self, family: "Family", zeta: Tensor, statistic: Tensor, *, observed: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the terms of the energy whose stationary point the layer's fixed point is.

        Parameters
        ----------
        family : Family
        zeta, statistic : Tensor of shape (m, q)
            Linear predictors, and T(x).
        observed : bool, default=False
            Whether the curvature is the second derivative itself. If not it is its expectation,
            ``R'^2 A''``, which is never negative.

        Returns
        -------
        loss, slope, curvature : Tensor of shape (m, q)
            ``A(R) - T R`` and its first and second derivative in zeta.
        """
        eta, first = self.value(zeta), self.derivative(zeta)
        gap = family.mean(eta) - statistic
        curvature = first.square() * family.variance(eta)
        if observed:
            curvature = curvature + self.second_derivative(zeta) * gap
        return family.log_partition(eta) - statistic * eta, first * gap, curvature

    @property
    def exact(self) -> "CanonicalMap":
        """The map as the model has it, where the layer may take liberties."""
        return self
