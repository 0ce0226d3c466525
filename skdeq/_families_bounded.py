"""Families whose variance is bounded over all natural parameters."""

import math
import numbers
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._families_positive import log_multiplicity
from ._family import Family
from ._interval import Interval

__all__ = ["Bernoulli", "Binomial", "ContinuousBernoulli", "Gaussian", "Rademacher"]

# Numbers between one half and one whose product is a normal float32.
_FACTORS = 112


def _softplus(eta: Tensor) -> Tensor:
    # torch's own threshold of 20 drops exp(-20), which float64 resolves; exp(-40) it does not.
    return F.softplus(eta, threshold=40)


class Gaussian(Family):
    """Real numbers with unit variance.

    Notes
    -----
    Support and natural parameter: all reals. Mean eta, variance 1, ``A = eta^2 / 2``,
    ``log h = -x^2 / 2 - log(2 pi) / 2``. Dropped constants: none.

    Examples
    --------
    >>> import torch
    >>> from skdeq.families import Gaussian
    >>> Gaussian().log_prob(torch.tensor([0.0]), torch.tensor([0.0]))
    tensor([-0.9189])
    """

    name = "gaussian"
    log_partition_formula = "{eta}^2 / 2"
    mean_formula = "{eta}"
    accepts = "finite real numbers"
    variance_bound = 1.0
    self_concordance = 0.0

    @property
    def is_location_family(self) -> bool:  # type: ignore[override]
        """True, unless a subclass has a statistic, a log-partition or a base of its own."""
        parts = ("sufficient", "log_partition", "mean", "log_base")
        return all(getattr(type(self), part) is getattr(Gaussian, part) for part in parts)

    def log_prob(self, x: Tensor, eta: Tensor) -> Tensor:
        """Return ``-(x - eta)^2 / 2 - log(2 pi) / 2``, with all digits however far from zero."""
        return self.log_base(x - eta) if self.is_location_family else super().log_prob(x, eta)

    def log_partition(self, eta: Tensor) -> Tensor:
        """Return ``eta^2 / 2``."""
        return eta.square() / 2

    def mean(self, eta: Tensor) -> Tensor:
        """Return a copy of eta."""
        return eta.clone()

    def variance(self, eta: Tensor) -> Tensor:
        """Return ones."""
        return torch.ones_like(eta)

    def link(self, mu: Tensor) -> Tensor:
        """Return a copy of `mu`."""
        return mu.clone()

    def log_base(self, x: Tensor) -> Tensor:
        """Return ``-x^2 / 2 - log(2 pi) / 2``."""
        return -x.square() / 2 - math.log(2 * math.pi) / 2

    def statistics_(
        self, eta: Tensor, *, log_partition: bool = False, variance: bool = False
    ) -> tuple[Tensor | Any, Tensor, Tensor | Any]:
        """Compute A, mean and variance; the mean is `eta` itself."""
        return (
            self.log_partition(eta) if log_partition else None,
            eta,
            self.variance(eta) if variance else None,
        )


class _Logistic(Family):
    """What Bernoulli and binomial share: a mean of ``n_trials * sigmoid(eta)``."""

    n_trials = 1
    # The third cumulant is variance * (1 - 2 sigmoid(eta)), whatever n_trials.
    self_concordance = 1.0

    def log_partition(self, eta: Tensor) -> Tensor:
        """Return ``n log(1 + exp(eta))``."""
        return self.n_trials * _softplus(eta)

    def mean(self, eta: Tensor) -> Tensor:
        """Return ``n sigmoid(eta)``."""
        return self.n_trials * torch.sigmoid(eta)

    def variance(self, eta: Tensor) -> Tensor:
        """Return ``n sigmoid(eta) sigmoid(-eta)``."""
        # sigmoid(eta) * (1 - sigmoid(eta)) would be 0 from eta = 37 on.
        return self.n_trials * torch.sigmoid(eta) * torch.sigmoid(-eta)

    def link(self, mu: Tensor) -> Tensor:
        """Return the log-odds of ``mu / n``."""
        return torch.logit(mu / self.n_trials)

    def statistics_(
        self, eta: Tensor, *, log_partition: bool = False, variance: bool = False
    ) -> tuple[Tensor | Any, Tensor, Tensor | Any]:
        """Compute A, mean and variance from one sigmoid in place."""
        a: Tensor | Any = eta.clamp(min=0) if log_partition else None
        mean = eta.sigmoid_()
        spare: Tensor | Any = torch.empty_like(mean) if log_partition or variance else None
        if log_partition:
            # softplus(eta) = max(eta, 0) - log sigmoid(|eta|): a third of the time of softplus.
            a.sub_(_larger_share(mean, spare).log_())
        if self.n_trials != 1:
            mean.mul_(self.n_trials)
            a = a.mul_(self.n_trials) if log_partition else None
        return a, mean, self._variance(mean, spare) if variance else None

    def summed_statistics_(
        self, eta: Tensor, *, variance: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | Any]:
        """Sum A over each row with one logarithm for a hundred entries or so.

        ``sum log(1 + exp(-|eta|)) = -log prod sigmoid(|eta|)``, and so many factors of at least
        one half are still far from underflow.
        """
        spare = eta.clamp(min=0)
        total = spare.sum(-1)
        mean = eta.sigmoid_()
        # In the same memory: that of a new tensor of this size has to be asked of the system.
        factors = _larger_share(mean, spare)
        groups = factors.shape[-1] // _FACTORS
        grouped, rest = factors.tensor_split([groups * _FACTORS], dim=-1)
        total -= grouped.unflatten(-1, (groups, _FACTORS)).prod(-1).log_().sum(-1)
        total -= rest.prod(-1).log_()
        if self.n_trials != 1:
            total.mul_(self.n_trials)
            mean.mul_(self.n_trials)
        return total, mean, self._variance(mean, spare) if variance else None

    def _variance(self, mean: Tensor, out: Tensor) -> Tensor:
        return torch.addcmul(mean, mean, mean, value=-1 / self.n_trials, out=out)


def _larger_share(mean: Tensor, out: Tensor) -> Tensor:
    """Return ``sigmoid(|eta|)`` from ``sigmoid(eta)``."""
    torch.sub(1, mean, out=out)
    return torch.maximum(mean, out, out=out)


class Bernoulli(_Logistic):
    """Yes/no answers coded 1 and 0; a fraction counts as that share of a yes.

    Notes
    -----
    Support: [0, 1]. Natural parameter: all reals, the log-odds. Mean ``sigmoid(eta)``, variance
    ``sigmoid(eta) sigmoid(-eta)``, ``A = log(1 + exp(eta))``, ``log h = 0``. Dropped constants:
    none. Probabilities sum to one over {0, 1}; for proportions that are truly continuous
    `ContinuousBernoulli` is the normalised density.

    Examples
    --------
    >>> import torch
    >>> from skdeq.families import Bernoulli
    >>> Bernoulli().mean(torch.tensor([-2.0, 0.0]))
    tensor([0.1192, 0.5000])
    """

    name = "bernoulli"
    log_partition_formula = "log(1 + exp({eta}))"
    mean_formula = "sigmoid({eta})"
    support = Interval(0, 1, True, True)
    accepts = "0, 1 or fractions between them"
    variance_bound = 0.25

    def log_base(self, x: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(x)


class Binomial(_Logistic):
    """Numbers of successes among a fixed number of trials.

    Parameters
    ----------
    n_trials : int, default=10
        Number of trials n behind every entry.

    Notes
    -----
    Support: [0, n]. Natural parameter: all reals, the log-odds. Mean ``n sigmoid(eta)``, variance
    ``n sigmoid(eta) sigmoid(-eta)``, ``A = n log(1 + exp(eta))``, log h the logarithm of the
    binomial coefficient. Dropped constants: none.

    Examples
    --------
    >>> import torch
    >>> from skdeq.families import Binomial
    >>> Binomial(n_trials=4).log_prob(torch.tensor([2.0]), torch.tensor([0.0])).exp()
    tensor([0.3750])
    """

    name = "binomial"
    log_partition_formula = "N log(1 + exp({eta}))"
    mean_formula = "N sigmoid({eta})"

    def __init__(self, n_trials: int = 10) -> None:
        if not isinstance(n_trials, numbers.Integral) or isinstance(n_trials, bool):
            raise TypeError(f"Binomial needs an integer as n_trials; got {n_trials!r}.")
        if n_trials < 1:
            raise ValueError(f"Binomial needs n_trials >= 1; got {n_trials!r}.")
        self.n_trials = int(n_trials)

    @property
    def support(self) -> Interval:  # type: ignore[override]
        """From no success to nothing but successes."""
        return Interval(0, self.n_trials, True, True)

    @property
    def accepts(self) -> str:  # type: ignore[override]
        """The support in words."""
        return f"numbers of successes from 0 to n_trials={self.n_trials}"

    @property
    def variance_bound(self) -> float:  # type: ignore[override]
        """The variance at even odds."""
        return self.n_trials / 4

    def log_base(self, x: Tensor) -> Tensor:
        """Return the logarithm of the binomial coefficient."""
        return log_multiplicity(x + 1, self.n_trials - x + 1)


def _bernoulli_number_ratios(count: int) -> list[float]:
    """Return B_2n / (2n)! for n = 1 to `count`, from ``x / (exp(x) - 1) = sum B_k x^k / k!``."""
    ratios = [Fraction(1)]
    for n in range(1, 2 * count + 1):
        terms = (ratio / math.factorial(n + 1 - k) for k, ratio in enumerate(ratios))
        ratios.append(-sum(terms, Fraction(0)))
    return [float(ratio) for ratio in ratios[2::2]]


# log(sinh(eta / 2) / (eta / 2)) = sum_n B_2n eta^2n / (2n (2n)!), which converges for
# |eta| < 2 pi. For |eta| <= 1 the first term left out, n = 12, is under 4e-17 of the variance.
_MEAN_SERIES = _bernoulli_number_ratios(11)
_LOG_PARTITION_SERIES = [c / (2 * n) for n, c in enumerate(_MEAN_SERIES, start=1)]
_VARIANCE_SERIES = [c * (2 * n - 1) for n, c in enumerate(_MEAN_SERIES, start=1)]


def _power_series(coefficients: list[float], x: Tensor, *, in_place: bool = False) -> Tensor:
    # In place, the partial sums share one tensor, through which autograd could not go back.
    # Six terms leave 2e-9 of the variance out, which only float64 resolves.
    if x.dtype != torch.float64:
        coefficients = coefficients[:6]
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        constant = x.new_full((), coefficient)
        total = torch.addcmul(constant, total, x, out=total if in_place else None)
    return total


class ContinuousBernoulli(Family):
    """Proportions, such as grey values, anywhere between 0 and 1.

    Notes
    -----
    Support: [0, 1]. Natural parameter: all reals. Mean ``1 / (1 - exp(-eta)) - 1 / eta``, variance
    ``1 / eta^2 - 1 / (4 sinh(eta / 2)^2)``, ``A = log((exp(eta) - 1) / eta)``, ``log h = 0``; at
    eta = 0 their limits 1/2, 1/12 and 0. Dropped constants: none.

    References
    ----------
    G. Loaiza-Ganem and J. P. Cunningham (2019). The continuous Bernoulli: fixing a pervasive
    error in variational autoencoders. NeurIPS 32.

    Examples
    --------
    >>> import torch
    >>> from skdeq.families import ContinuousBernoulli
    >>> ContinuousBernoulli().mean(torch.tensor([-700.0, 0.0, 700.0]))
    tensor([0.0014, 0.5000, 0.9986])
    """

    name = "continuous_bernoulli"
    log_partition_formula = "log((exp({eta}) - 1) / {eta})"
    mean_formula = "1 / (1 - exp(-{eta})) - 1 / {eta}"
    support = Interval(0, 1, True, True)
    accepts = "proportions between 0 and 1"
    unbounded_at = (0.0, 1.0)
    variance_bound = 1 / 12
    self_concordance = 1.0

    # The closed forms lose all digits at 0: |eta| < 1 uses the series. Each branch is evaluated
    # at arguments clamped to where it is finite, lest autograd multiply 0 by inf.

    @staticmethod
    def _far(eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = eta.abs().clamp(1, torch.finfo(eta.dtype).max)
        return size, torch.exp(-size), -torch.expm1(-size)

    def log_partition(self, eta: Tensor) -> Tensor:
        """Return ``log((exp(eta) - 1) / eta)``."""
        near = eta.clamp(-1, 1)
        square = near * near
        series = near / 2 + square * _power_series(_LOG_PARTITION_SERIES, square)
        size, _, complement = self._far(eta)
        return torch.where(
            eta.abs() < 1, series, eta.clamp(min=0) + torch.log(complement) - torch.log(size)
        )

    def mean(self, eta: Tensor) -> Tensor:
        """Return ``1 / (1 - exp(-eta)) - 1 / eta``."""
        near = eta.clamp(-1, 1)
        series = 0.5 + near * _power_series(_MEAN_SERIES, near * near)
        size, tail, complement = self._far(eta)
        far = torch.where(eta > 0, 1 / complement - 1 / size, 1 / size - tail / complement)
        return torch.where(eta.abs() < 1, series, far)

    def variance(self, eta: Tensor) -> Tensor:
        """Return ``1 / eta^2 - 1 / (4 sinh(eta / 2)^2)``."""
        series = _power_series(_VARIANCE_SERIES, eta.clamp(-1, 1).square())
        size, tail, complement = self._far(eta)
        far = (1 / size).square() - tail / complement.square()
        return torch.where(eta.abs() < 1, series, far)

    def statistics_(
        self, eta: Tensor, *, log_partition: bool = False, variance: bool = False
    ) -> tuple[Tensor | Any, Tensor, Tensor | Any]:
        """Compute A, mean and variance from one expm1 and one series."""
        # In absolute accuracy only mean - 1/2 needs a series near 0. From a clamped size all else
        # has its limit there, and at infinity no inf - inf.
        size = eta.abs().clamp_(1e-30, torch.finfo(eta.dtype).max)
        complement = size.neg().expm1_().neg_()
        a = (complement / size).log_().add_(eta.clamp(min=0)) if log_partition else None
        near = size < 1
        inverse = size.reciprocal()
        offset = complement.reciprocal_().sub_(0.5).sub_(inverse)
        series = _power_series(_MEAN_SERIES, size.square_(), in_place=True).div_(inverse)
        torch.where(near, series, offset, out=offset)
        v = None
        if variance:
            # 1 / eta^2 - (c^2 - 1/4) with c = coth(eta / 2) / 2 = offset + 1 / eta.
            v = inverse.mul_(2).add_(offset).mul_(offset).neg_().add_(0.25).clamp_(min=0)
        return a, torch.copysign(offset, eta, out=eta).add_(0.5), v

    def log_base(self, x: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(x)


class Rademacher(Family):
    """Yes/no answers coded 1 and -1.

    Notes
    -----
    Support: [-1, 1]. Natural parameter: all reals, half the log-odds. Mean ``tanh(eta)``, variance
    ``1 - tanh(eta)^2``, ``A = log(2 cosh(eta))``, ``log h = 0``. Dropped constants: none.
    Probabilities sum to one over {-1, 1}.

    Examples
    --------
    >>> import torch
    >>> from skdeq.families import Rademacher
    >>> Rademacher().log_prob(torch.tensor([-1.0, 1.0]), torch.tensor(0.5)).exp()
    tensor([0.2689, 0.7311])
    """

    name = "rademacher"
    log_partition_formula = "log(2 cosh({eta}))"
    mean_formula = "tanh({eta})"
    support = Interval(-1, 1, True, True)
    accepts = "-1, 1 or numbers between them"
    variance_bound = 1.0
    self_concordance = 2.0

    def log_partition(self, eta: Tensor) -> Tensor:
        """Return ``log(2 cosh(eta))``."""
        # Not by |eta|, whose second derivative autograd takes to be 0 at 0. The clamp leaves inf,
        # not inf - inf, where eta has overflowed.
        return _softplus(2 * eta) - eta.clamp(max=torch.finfo(eta.dtype).max)

    def mean(self, eta: Tensor) -> Tensor:
        """Return ``tanh(eta)``."""
        return torch.tanh(eta)

    def variance(self, eta: Tensor) -> Tensor:
        """Return ``1 - tanh(eta)^2``."""
        return 4 * torch.sigmoid(2 * eta) * torch.sigmoid(-2 * eta)

    def link(self, mu: Tensor) -> Tensor:
        """Return ``atanh(mu)``."""
        return torch.atanh(mu)

    def log_base(self, x: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(x)

    def statistics_(
        self, eta: Tensor, *, log_partition: bool = False, variance: bool = False
    ) -> tuple[Tensor | Any, Tensor, Tensor | Any]:
        """Compute A, mean and variance from one tanh in place."""
        a = torch.logaddexp(eta, -eta) if log_partition else None
        mean = eta.tanh_()
        return a, mean, mean.square().neg_().add_(1) if variance else None
