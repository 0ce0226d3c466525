"""Intervals of the real line, and the inversion of increasing functions on them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["REALS", "Interval", "invert_increasing"]


@dataclass(frozen=True)
class Interval:
    """An interval of the real line, each end of which may belong to it or not.

    Parameters
    ----------
    low, high : float
        The ends, with ``low < high``; either may be infinite.
    low_inclusive, high_inclusive : bool
        Whether the ends belong to the interval.

    Examples
    --------
    >>> import torch
    >>> from skdeq.families import Interval
    >>> counts = Interval(0, float("inf"), True, False)
    >>> print(counts)
    [0, inf)
    >>> counts.contains(torch.tensor([-1.0, 0.0, 3.5]))
    tensor([False,  True,  True])
    """

    low: float
    high: float
    low_inclusive: bool
    high_inclusive: bool

    def __post_init__(self) -> None:
        """Refuse an empty interval."""
        if not self.low < self.high:
            raise ValueError(
                f"An interval needs low < high; got low={self.low} and high={self.high}."
            )

    @property
    def is_real_line(self) -> bool:
        """Whether every real number lies in the interval."""
        return self.low == -math.inf and self.high == math.inf

    def contains(self, x: Tensor) -> Tensor:
        """Say elementwise whether `x` lies in the interval; NaN does not."""
        above = x >= self.low if self.low_inclusive else x > self.low
        below = x <= self.high if self.high_inclusive else x < self.high
        return above & below

    def inside(self) -> float:
        """Return a number well inside: 0 if that is, else the middle, or one unit from the end."""
        if self.low < 0 < self.high:
            return 0.0
        if self.low > -math.inf and self.high < math.inf:
            return (self.low + self.high) / 2
        return self.low + 1.0 if self.low > -math.inf else self.high - 1.0

    def __str__(self) -> str:
        """Write the interval as a mathematician would, e.g. ``(0, 1]``."""
        opening = "[" if self.low_inclusive else "("
        closing = "]" if self.high_inclusive else ")"
        return f"{opening}{self.low}, {self.high}{closing}"


REALS = Interval(-math.inf, math.inf, False, False)


def _from_real_line(t: Tensor, interval: Interval) -> Tensor:
    """Map the real line onto `interval`, increasing, with resolution where floats have it."""
    low, high = interval.low, interval.high
    if math.isinf(low) and math.isinf(high):
        return torch.sinh(t)
    if math.isinf(low):
        return high - torch.exp(-t)
    if math.isinf(high):
        return low + torch.exp(t)
    return low + (high - low) * torch.sigmoid(t)


@torch.no_grad()
def invert_increasing(
    function: Callable[[Tensor], Tensor],
    derivative: Callable[[Tensor], Tensor],
    value: Tensor,
    interval: Interval,
) -> Tensor:
    """Solve ``function(x) = value`` for x in `interval`, elementwise.

    Parameters
    ----------
    function, derivative : callable
        An increasing function on `interval` and its derivative, elementwise on tensors.
    value : Tensor
        Where the function never gets below (above) `value`, the answer is the lower (upper)
        end of the interval, infinite ends included.
    interval : Interval
        Where to look.

    Returns
    -------
    Tensor
        Same shape and dtype as `value`; NaN where `value` is NaN.
    """
    # Bisection goes first because Newton's method alone creeps in an exponential tail (one unit
    # a step) and leaps out of the domain on a flat one. It runs in t, in which the whole range
    # of floats is about 1,400 wide, so that 32 halvings leave a bracket of 3e-7.
    limit = math.log(torch.finfo(value.dtype).max)
    low_t, high_t = torch.full_like(value, -limit), torch.full_like(value, limit)
    for _ in range(32):
        t = (low_t + high_t) / 2
        reached = function(_from_real_line(t, interval))
        # A tie is pushed outwards: a function that has saturated in floating point (a mean of
        # exactly 1, say) has its root at the end of the interval, not where rounding set in.
        # A NaN is an overflow of the function's formula far out, hence pushed inwards.
        raise_low = (reached < value) | ((reached == value) & (t > 0))
        raise_low |= reached.isnan() & (t < 0)
        low_t, high_t = torch.where(raise_low, t, low_t), torch.where(raise_low, high_t, t)

    low, high = _from_real_line(low_t, interval), _from_real_line(high_t, interval)
    x = _from_real_line((low_t + high_t) / 2, interval)
    for _ in range(5):
        excess = function(x) - value
        low, high = torch.where(excess < 0, x, low), torch.where(excess > 0, x, high)
        step = excess / derivative(x)
        # At the root itself rounding may step an ulp out of the bracket, hence clamped to it
        # and not thrown back to its middle, which is for a derivative that has vanished.
        newton = torch.minimum(torch.maximum(x - step, low), high)
        x = torch.where(step.isfinite(), newton, low / 2 + high / 2)

    x = torch.where(low_t == -limit, interval.low, x)
    x = torch.where(high_t == limit, interval.high, x)
    return torch.where(value.isnan(), value, x)
