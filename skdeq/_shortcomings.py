"""What a fit of ExpFamilyDEQ is not, in a sentence that says what to change."""

from typing import TYPE_CHECKING

import numpy as np

from skdeq._explained_deviance import NEXT_TO_NOTHING
from skdeq._family import Family
from skdeq._trace import MUCH_LOST

if TYPE_CHECKING:
    from skdeq._expfam_base import LatentVariableEstimator

__all__ = ["shortcoming_of"]


def shortcoming_of(
    fitted: "LatentVariableEstimator", family: Family, lost: float, *, stopped: bool
) -> str | None:
    """Say what is not as was asked for.

    Parameters
    ----------
    fitted : LatentVariableEstimator
    family : Family
        Its family, seen through the map.
    lost : float
        Share of the gain that is lost with the latents that `transform` finds.
    stopped : bool
        Whether a callback ended the fit, which then is not said to have ended too early.

    Returns
    -------
    str or None
        The first of the shortcomings, None where there is none.
    """
    if fitted._is_endless:
        return (
            f"{_name(fitted)} did not converge: with weight_decay=0 these data have no finite "
            "optimum, and the components are as long as the iterations made them. Any positive "
            "weight_decay gives them one."
        )
    is_empty = not fitted._to_scores.any()
    if lost > MUCH_LOST and (fitted.converged_ or not is_empty):
        unit = "divide X by a constant, or " if family.base.has_constant_variance else ""
        return (
            f"Rows have several solutions, and with those that transform finds {_name(fitted)} "
            f"has lost {lost:.0%} of what the fit had gained (loss_curve_ ends with them): "
            f"{unit}raise weight_decay, or take another canonical_map."
        )
    if is_empty:
        return _of_empty_components(fitted, family)
    if fitted.explained_deviance_ratio_.sum() < NEXT_TO_NOTHING:
        return _of_what_explains_nothing(fitted)
    if fitted.converged_ or stopped:
        return None
    return _of_iterations(fitted)


def _name(fitted: "LatentVariableEstimator") -> str:
    return type(fitted).__name__


def _penalties(fitted: "LatentVariableEstimator") -> str:
    return f"alpha={fitted.alpha:g} and weight_decay={fitted.weight_decay:g}"


def _of_empty_components(fitted: "LatentVariableEstimator", family: Family) -> str:
    advice = ""
    if family.base.has_constant_variance:
        advice = "; the family has a fixed variance, so that X may have to be scaled to more"
    elif family.scales_with_exposure and family.base.support.low_inclusive:
        advice = "; of counts, that they are no fractions, which tell less"
    elif family.is_canonical and family.log_link() is not None:
        advice = "; or take canonical_map='log', which does not depend on the unit of X"
    return (
        f"All {fitted.n_components} components of {_name(fitted)} are zero: the penalties "
        f"{_penalties(fitted)} outweigh all that the rows tell. Lower weight_decay, or check that "
        f"the rows differ{advice}."
    )


def _of_what_explains_nothing(fitted: "LatentVariableEstimator") -> str:
    advice = f"With {_penalties(fitted)} the fit has gone too far out; raise them."
    if fitted._hidden():
        advice = (
            "Next to the data latents are not where the top layer expects them: take another "
            "hidden_map or weight_decay, or fewer layers."
        )
    return (
        f"The components of {_name(fitted)} explain less than none: the deviance is larger than "
        f"that of the intercept alone. {advice}"
    )


def _of_iterations(fitted: "LatentVariableEstimator") -> str:
    if fitted.n_iter_ < fitted.max_iter:
        is_narrow = fitted.components_.dtype == np.float32 and not fitted._in_double
        digits = "float64 data have more digits to go by; or raise" if is_narrow else "raise"
        return (
            f"{_name(fitted)} did not converge: after {fitted.n_iter_} iterations no step lowered "
            f"the objective any further; {digits} {_penalties(fitted)}."
        )
    advice = ""
    if fitted.weight_decay == 0:
        advice = ", or weight_decay: without it the optimum may lie at infinity"
    return (
        f"{_name(fitted)} did not converge: the objective still changed by more than "
        f"tol={fitted.tol:g} of its gain after max_iter={fitted.max_iter} iterations; increase "
        f"max_iter or tol{advice}."
    )
