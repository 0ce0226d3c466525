"""Points inside the domain of a family, where zero is not: latents, and linear predictors."""

import numpy as np
import torch
from torch import Tensor

from skdeq._family import Family
from skdeq._interval import Interval

__all__ = ["latents_inside", "predictors_inside"]

# Radius of the ball of latents inside the domain that is looked for, in prior units at most.
_ROOM = 1.0


def latents_inside(loadings: Tensor, intercept: Tensor, domain: Interval) -> Tensor | None:
    """Centre of a ball of latents (k,) that are inside the domain; None if there is none.

    It is the largest such ball up to a radius of one, by linear programming.

    Parameters
    ----------
    loadings : Tensor of shape (p, k)
    intercept : Tensor of shape (p,)
    domain : Interval
        Of every entry of ``loadings @ z + intercept``.
    """
    W, b = (one.detach().double().cpu().numpy() for one in (loadings, intercept))
    if not (np.isfinite(W).all() and np.isfinite(b).all()):
        return None
    length = np.linalg.norm(W, axis=1, keepdims=True)
    sides, room = [], []
    for end, sign in ((domain.high, 1.0), (domain.low, -1.0)):
        if np.isfinite(end):
            sides.append(np.hstack([sign * W, length]))
            room.append(sign * (end - b))
    k = W.shape[1]
    # Not above: the layer, which asks for this next to never, is on torch alone.
    from scipy.optimize import linprog

    found = linprog(
        np.r_[np.zeros(k), -1.0],
        A_ub=np.vstack(sides),
        b_ub=np.concatenate(room),
        bounds=[(None, None)] * k + [(0.0, _ROOM)],
    )
    if found.x is None:
        return None
    latents = torch.tensor(found.x[:-1], device="cpu").to(loadings)
    is_inside = domain.contains(torch.addmv(intercept.detach(), loadings.detach(), latents))
    return latents if bool(is_inside.all()) else None


def predictors_inside(family: Family, like: Tensor) -> Tensor:
    """Linear predictors of this shape well inside the domain of a family."""
    if family.domain.is_real_line:
        return torch.zeros_like(like, requires_grad=False)
    inside = torch.full_like(like, family.base.domain.inside(), requires_grad=False)
    return inside if family.is_canonical else family.canonical_map.inverse(inside)
