"""Figures of fitted models, in the manner of scikit-learn's display objects.

Each display is made by `from_estimator`, which computes what is drawn and draws it, or from
arrays that are there already. It keeps them as attributes, and `plot` draws them again.
Components are numbered from 0, as in `components_`. matplotlib is imported on first use.
"""

from skdeq._display_components import ComponentsDisplay
from skdeq._display_convergence import ConvergenceDisplay
from skdeq._display_explained import ExplainedDevianceDisplay
from skdeq._display_latents import LatentMapDisplay
from skdeq._display_usage import ComponentUsageDisplay

__all__ = [
    "ComponentUsageDisplay",
    "ComponentsDisplay",
    "ConvergenceDisplay",
    "ExplainedDevianceDisplay",
    "LatentMapDisplay",
]
