"""Check of families and canonical maps of the user's own, before a fit trips over them."""

import torch
from torch import Tensor

from ._family import CanonicalMap, Family
from ._interval import REALS, Interval

__all__ = ["check_intervals", "check_parts"]

# Linear predictors between this and its negative are tried.
_FARTHEST = 4.0
# Step of difference quotients, relative, and how well a derivative has to agree with them.
_STEP, _AGREEMENT = 1e-4, 1e-3


def check_intervals(part: Family | CanonicalMap) -> None:
    """Refuse a support, a domain or a range that is no interval.

    Raises
    ------
    TypeError
    """
    names = ("support", "domain") if isinstance(part, Family) else ("range",)
    for name in names:
        found = getattr(part, name)
        if not isinstance(found, Interval):
            raise TypeError(
                f"{name} of {type(part).__name__} must be an Interval, such as "
                "Interval(0, float('inf'), True, False) for the numbers from 0 upwards (from "
                f"skdeq.families import Interval); got {found!r}."
            )


def check_parts(family: Family, device: torch.device) -> None:
    """Refuse a family whose methods do not fit together, at a point inside its domain.

    Parameters
    ----------
    family : Family
        Seen through a canonical map or not.
    device : torch.device
        Where the arguments are.

    Raises
    ------
    TypeError
        For methods that do not return a tensor of the shape and type of their argument.
    ValueError
        For a log-partition that is not finite or a negative variance in the domain, for a map
        that leads out of it, and for a derivative that is not that of its function.
    """
    base = family.base
    eta = torch.full((2, 1), base.domain.inside(), dtype=torch.float64, device=device)
    log_partition = _value(base, "log_partition", eta)
    mean, variance = _value(base, "mean", eta), _value(base, "variance", eta)
    for method in ("sufficient", "log_base"):
        _value(base, method, mean)
    at = f"at eta = {float(eta[0]):g}, in its domain {base.domain}"
    if not bool(torch.isfinite(torch.cat([log_partition, mean, variance])).all()):
        raise ValueError(
            f"Family {type(base).__name__} is not finite {at}: log_partition is "
            f"{float(log_partition[0]):g}, mean {float(mean[0]):g}, variance "
            f"{float(variance[0]):g}. Where its canonical parameters end, `domain` must say so."
        )
    if float(variance[0]) < 0:
        raise ValueError(
            f"The variance of family {type(base).__name__} is {float(variance[0]):g} {at}: it "
            "must be the second derivative of log_partition, which is convex."
        )
    for function, derivative in (("log_partition", "mean"), ("mean", "variance")):
        _check_derivative(base, function, derivative, eta, base.domain)
    if not family.is_canonical:
        _check_map(family.canonical_map, base, eta)


def _check_map(canonical_map: CanonicalMap, base: Family, eta: Tensor) -> None:
    zeta = torch.linspace(-_FARTHEST, _FARTHEST, 9, device=eta.device).to(eta).unsqueeze(1)
    found = _value(canonical_map, "value", zeta)
    _value(canonical_map, "derivative", zeta)
    if not bool(base.domain.contains(found).any()):
        raise ValueError(
            f"Canonical map {type(canonical_map).__name__} leads out of the domain {base.domain} "
            f"of family {base.name!r}: linear predictors from {-_FARTHEST:g} to {_FARTHEST:g} go "
            f"to {float(found[0]):g} ... {float(found[-1]):g}."
        )

    # Off the places where maps usually have kinks.
    _check_derivative(canonical_map, "value", "derivative", zeta + 0.123, REALS)


def _check_derivative(
    part: Family | CanonicalMap, function: str, derivative: str, x: Tensor, domain: Interval
) -> None:
    """Hold a derivative against difference quotients at most points of a column (n, 1)."""
    step = _STEP * (1 + x.abs())
    low, high = x - step, x + step
    if not bool(domain.contains(low).all() & domain.contains(high).all()):
        return
    quotient = (_value(part, function, high) - _value(part, function, low)) / (2 * step)
    found = _value(part, derivative, x)
    largest = torch.maximum(quotient.abs(), found.abs())
    # What overflows or has a kink says nothing.
    differs = (quotient - found).abs() > _AGREEMENT * (1e-3 + largest)
    if differs.sum() * 2 <= len(x):
        return
    at = int(differs.int().argmax())
    raise ValueError(
        f"{derivative} of {type(part).__name__} is {float(found[at]):g} at {float(x[at]):g}, but "
        f"must be the derivative of {function}, which is {float(quotient[at]):g} there."
    )


def _value(part: Family | CanonicalMap, method: str, x: Tensor) -> Tensor:
    found = getattr(part, method)(x.clone())
    if isinstance(found, Tensor) and found.shape == x.shape and found.dtype == x.dtype:
        return found
    what = (
        f"a tensor of shape {tuple(found.shape)} and {found.dtype}"
        if isinstance(found, Tensor)
        else f"{found!r} of type {type(found).__name__}"
    )
    raise TypeError(
        f"{method} of {type(part).__name__} must return a tensor of the shape and type of its "
        f"argument, here {tuple(x.shape)} and {x.dtype}; got {what}."
    )
