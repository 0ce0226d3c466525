"""Share of the deviance that each component removes."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from skdeq._chunks import map_chunks
from skdeq._setting import Setting

__all__ = ["NEXT_TO_NOTHING", "explained_deviance"]

# Entries up to which explained deviances use every row, rows that they use at least, and points
# of their quadrature.
_DEVIANCE_ENTRIES = 2e6
_LEAST_ROWS = 256
_NODES = 8
# Change of a predictor along the line that the nodes resolve; where it is larger they are repeated
# on intervals, each so many times as long as the one before.
_RESOLVED = 30.0
_LONGER = 4.0
_MOST_INTERVALS = 12
_CHUNK_ENTRIES = 2**19
# One node is enough for a look where predictors change by no more than this.
_NEXT_TO_STRAIGHT, _MIDPOINT = 0.1, (np.array([0.5]), np.array([1.0]))
# Share of the deviance that is next to nothing, rounding apart.
NEXT_TO_NOTHING = 1e-6


def explained_deviance(
    setting: Setting,
    x_rows: Callable[[Tensor], Tensor],
    predict: Callable[[Tensor], Tensor],
    null_intercept: Tensor,
    scores: Tensor,
) -> tuple[Tensor, float, float]:
    r"""Share of the null deviance that each component removes.

    The deviance falls from that of the intercept-only model to that of the model along the
    straight line between their predictors, which never leaves the domain of the family; of the
    slope at each point of the line every component has its part,
    ``2 sum (A'(eta) - T(x)) s_k c_k``. The parts, integrated by Gauss-Legendre quadrature and
    scaled to add up to the whole, do not depend on the order of the components. For Gaussian
    data they are the explained variances. Where predictors are not linear in the scores, the
    line is that of the scores, and c_k is the derivative there.

    Parameters
    ----------
    setting : Setting
    x_rows : callable
        ``x_rows(index)`` gives some rows of the data (m, p), NaN where missing.
    predict : callable
        Linear predictors (m, p) of scores (m, k).
    null_intercept : Tensor of shape (p,)
        Of the model without latents.
    scores : Tensor of shape (n, k)

    Returns
    -------
    shares : Tensor of shape (k,), float64
        Sums to one minus the residual deviance over the null deviance, or zeros where that is
        negative. With more than 2e6 entries, estimated from rows drawn at random, always the same
        ones, of which there are 256 or more.
    removed : float
        Share that the scores remove: next to nothing if they hardly move the predictors.
    largest : float
        Largest change of a predictor by the scores; 0 where the variance is constant.
    """
    n, k = scores.shape
    p = len(null_intercept)
    line = _Line(setting, x_rows, predict, null_intercept, scores)
    most = max(_LEAST_ROWS, int(_DEVIANCE_ENTRIES / p))
    fall = line.fall(_drawn_rows(n, most))
    if fall.is_nothing and n > most:
        # That there is nothing is for all rows to say; in an eighth of the time, if they do.
        fall = line.fall(_drawn_rows(n, n), roughly=True)
        if not fall.is_nothing and fall.largest < _NEXT_TO_STRAIGHT:
            fall = line.fall(_drawn_rows(n, n))
    removed, largest, parts = fall.removed, fall.largest, fall.parts
    if fall.is_nothing or not fall.explained > 0:
        return torch.zeros(k, dtype=torch.float64, device="cpu"), removed, largest
    if not 0 < removed < torch.inf:
        # Far out the intercept does what the scores undo, and no part is a component's own.
        parts = scores.double().var(0, correction=0)
    if not float(parts.sum()) > 0:  # rows of a batch that are all the same
        parts = torch.ones_like(parts)
    return parts * (fall.explained / parts.sum()), removed, largest


class _Fall(NamedTuple):
    """Fall of the deviance of some rows along the line.

    Attributes
    ----------
    null, residual : float
        Deviance at both ends.
    parts : Tensor of shape (k,), float64
        What each component removes on the way.
    largest : float
        Largest change of a predictor by the scores.
    """

    null: float
    residual: float
    parts: Tensor
    largest: float

    @property
    def explained(self) -> float:
        """Share of the deviance by which its ends differ."""
        return 0.0 if self.null <= 0 else 1 - self.residual / self.null

    @property
    def removed(self) -> float:
        """Share of the deviance that the parts add up to."""
        return 0.0 if self.null <= 0 else float(self.parts.sum()) / self.null

    @property
    def is_nothing(self) -> bool:
        """Whether next to nothing is removed; what is no number is not nothing."""
        return abs(self.removed) < NEXT_TO_NOTHING


class _Line:
    """Line between the predictors of the intercept-only model and those of the model.

    The parameters are those of :func:`explained_deviance`.
    """

    def __init__(
        self,
        setting: Setting,
        x_rows: Callable[[Tensor], Tensor],
        predict: Callable[[Tensor], Tensor],
        null_intercept: Tensor,
        scores: Tensor,
    ):
        self._setting, self._x_rows, self._predict, self._scores = setting, x_rows, predict, scores
        self._family = setting.family.exact
        self._at_zero = predict(torch.zeros_like(scores[:1]))
        self._gap_at_zero = null_intercept - self._at_zero
        self._chunk_rows = max(1, _CHUNK_ENTRIES // len(null_intercept))

    def _over_chunks(self, work: Callable[[Tensor], Tensor], index: Tensor) -> Tensor:
        """Stack what ``work`` makes of chunks of the rows ``index``."""
        parts = map_chunks(
            lambda low, high: work(index[low:high]), len(index), self._chunk_rows, index.device
        )
        return torch.stack(parts)

    def longest(self, index: Tensor) -> float:
        """Largest change of a predictor by the scores of some rows.

        Zero where the variance is constant: the slope is linear, and one interval exact.
        """
        if self._family.has_constant_variance:
            return 0.0

        def work(rows: Tensor) -> Tensor:
            return (self._predict(self._scores[rows]) - self._at_zero).abs().amax()

        return float(self._over_chunks(work, index).amax())

    def fall(self, index: Tensor, *, roughly: bool = False) -> _Fall:
        """Integrate along the line of some rows.

        If ``roughly``, by its midpoint, where the line is next to straight.
        """
        index = index.to(self._scores.device)
        largest = self.longest(index)
        is_straight = roughly and largest < _NEXT_TO_STRAIGHT
        nodes, shares = _MIDPOINT if is_straight else _quadrature(largest)

        def work(rows: Tensor) -> Tensor:
            weight = self._setting.sample_weight
            x = self._x_rows(rows).to(self._scores.dtype)
            weights = torch.ones_like(x[:, 0]) if weight is None else weight[rows]
            parts = self._removed(rows, x, weights, nodes, shares)
            return torch.cat([self._at_ends(rows, x, weights), parts])

        total = self._over_chunks(work, index).sum(0)
        return _Fall(float(total[0]), float(total[1]), total[2:], largest)

    def _along(self, rows: Tensor, share: float, scores: Tensor) -> Tensor:
        """Predictors of some rows at a point of the line, from their scores there."""
        predictor = self._predict(scores) + (1 - share) * self._gap_at_zero
        offset = self._setting.row_offset
        return predictor if offset is None else predictor + offset[rows].unsqueeze(1)

    def _at_ends(self, rows: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        """Deviance at both ends (2,)."""
        family, scores = self._family, self._scores[rows]
        statistic = family.sufficient(x)
        saturated = family.base.saturated(x)
        best = statistic * saturated - family.base.log_partition(saturated)

        def log_likelihood(predictor: Tensor) -> Tensor:
            log_partition = family.statistics_(predictor.clone(), log_partition=True)[0]
            return statistic * family.canonical(predictor) - log_partition

        ends = [
            log_likelihood(self._along(rows, 0.0, torch.zeros_like(scores))),
            log_likelihood(self._along(rows, 1.0, scores)),
        ]
        # A density without a bound may be higher there than where the saturated one is cut off.
        best = torch.maximum(best, torch.maximum(*ends))
        observed = ~torch.isnan(x)
        gaps = [torch.where(observed, best - one, 0.0).sum(1) * weights for one in ends]
        return 2 * torch.stack(gaps).double().sum(1)

    def _removed(
        self, rows: Tensor, x: Tensor, weights: Tensor, nodes: np.ndarray, shares: np.ndarray
    ) -> Tensor:
        """Deviance that each component removes along the line (k,)."""
        family, scores, observed = self._family, self._scores[rows], ~torch.isnan(x)
        statistic = family.sufficient(x)
        parts = torch.zeros(scores.shape[1], dtype=torch.float64, device=x.device)
        for node, share in zip(nodes, shares, strict=True):
            with torch.enable_grad():
                values = (float(node) * scores).requires_grad_()
                predictor = self._along(rows, float(node), values)
                slope = family.slope_(predictor.detach().clone(), statistic)
                slope = torch.where(observed, slope, 0.0)
                # Of a scalar: to look at a gradient that is given torch imports sympy, which takes
                # half a second.
                (pulled,) = torch.autograd.grad((predictor * slope).sum(), values)
            change = pulled * scores * weights.unsqueeze(1)
            parts -= 2 * float(share) * change.double().sum(0)
        return parts


def _drawn_rows(n: int, most: int) -> torch.Tensor:
    """Draw so many of n rows at random, in order, or take all."""
    if n <= most:
        return torch.arange(n, device="cpu")
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randperm(n, generator=generator, device="cpu")[:most].sort().values


def _quadrature(largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [0, 1] for functions of predictors that move by so much at most."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    edges = [1.0]
    while _RESOLVED < largest * edges[0] < np.inf and len(edges) < _MOST_INTERVALS:
        edges.insert(0, edges[0] / _LONGER)
    low, length = np.r_[0.0, edges[:-1]][:, None], np.diff(edges, prepend=0.0)[:, None]
    return (low + length * (nodes + 1) / 2).ravel(), (length * weights / 2).ravel()
