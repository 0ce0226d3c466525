"""What a fit leaves behind beside the model."""

import math
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["MOST_LOST", "MUCH_LOST", "UNTOLD", "Trace", "telling_gain"]

# Share of what a fit has gained that may be lost at latents found from zero. To step without the
# latents at hand takes as long as ten iterations, and where less is lost half of the fits do not
# gain by it.
MOST_LOST = 0.08
# Share that is worth a warning: less is lost now and then of data whose unit is not to blame.
MUCH_LOST = 0.2
# Share of the gain up to which the last epoch may stand for the one that is kept.
UNTOLD = 1e-2
# Times the objective that a gain may be to be what its changes are held against. Of counts over
# decades it may be ten thousand times what is left to explain, and fits ended half way.
_MOST_GAINED = 50.0


def telling_gain(null_objective: float, objective: float) -> float:
    """Gain over the intercept alone that changes of the objective are held against."""
    return min(max(null_objective - objective, 0.0), _MOST_GAINED * max(abs(objective), 1.0))


@dataclass
class Trace:
    """What a fit leaves behind beside the model.

    Attributes
    ----------
    from_zero : float
        Objective at the latents that rows find from zero, where they have several solutions.
    lost : float
        Share of what the fit has gained that is lost there.
    """

    null_intercept: Tensor
    null_objective: float
    loss_curve: list[float] = field(default_factory=list)
    n_iter: int = 0
    converged: bool = False
    from_zero: float = math.nan
    lost: float = 0.0

    def end_at(self, from_zero: float, fitted: float, within: float = -math.inf) -> None:
        """End the losses at latents found from zero.

        Parameters
        ----------
        from_zero : float
            The objective there.
        fitted : float
            The one that was reached with the latents of the fit.
        within : float
            Share of the gain up to which the last loss stands.
        """
        gained = telling_gain(self.null_objective, fitted)
        self.from_zero = from_zero
        self.lost = (from_zero - fitted) / gained if gained > 0 else 0.0
        if self.lost > within:
            self.loss_curve = [*self.loss_curve[:-1], from_zero]
