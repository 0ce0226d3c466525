"""What is given of a model, and the problems that its two halves are."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from skdeq._canonical import Identity
from skdeq._chunks import map_chunks
from skdeq._family import CanonicalMap, Family
from skdeq._hierarchy import HierarchyProblem, layer_family
from skdeq._latent_model import LatentModel
from skdeq._loadings import FreeLoadings, Loadings, Pins
from skdeq._map_problem import MapProblem
from skdeq._observations import Observations
from skdeq.fixed_point import newton

__all__ = [
    "Setting",
    "column_problem",
    "hidden_setting",
    "latent_problem",
    "layer_settings",
    "null_model",
    "row_problem",
]


# Share of the way from an end of the domain to the intercept of the model without latents.
_MARGIN = 1e-3


@dataclass(frozen=True)
class Setting:
    """What is given and stays fixed during a fit.

    Attributes
    ----------
    family : Family
    observations : Observations of shape (n, p)
    alpha : float
        Prior precision of the latents.
    weight_decay : float
        Penalty of the loadings in the mean objective.
    sample_weight : Tensor of shape (n,) or None
    row_offset : Tensor of shape (n,) or None
    log_base : float
        Weighted sum of log h(x), the part of the log-likelihood that no parameter enters.
    hidden_map : CanonicalMap
        From the linear predictor of latents to their mean, where there are several layers.
    loadings : FreeLoadings or KernelLoadings
        What of the loadings is fitted.
    narrow : torch.dtype or None
        Type of the data, where it is not that in which they are worked on.
    pins : Pins or None
        Columns that are not fitted.
    origin : Tensor of shape (p,), float64, or None
        What has been taken off the data, and off the intercept.
    """

    family: Family
    observations: Observations
    alpha: float
    weight_decay: float
    sample_weight: Tensor | None = None
    row_offset: Tensor | None = None
    log_base: float = 0.0
    hidden_map: CanonicalMap = Identity()
    loadings: Loadings = FreeLoadings()
    narrow: torch.dtype | None = None
    pins: Pins | None = None
    origin: Tensor | None = None

    def take(self, index: Tensor) -> "Setting":
        """Return the same for some rows; the log base is left out."""
        weight, offset = self.sample_weight, self.row_offset
        return replace(
            self,
            observations=self.observations.take(index),
            sample_weight=None if weight is None else weight[index],
            row_offset=None if offset is None else offset[index],
            log_base=0.0,
        )

    def inwards(self, model: LatentModel) -> LatentModel:
        """Return a model of data as they come for data that the origin has been taken off."""
        if self.origin is None:
            return model
        return replace(model, intercept=(model.intercept - self.origin).to(model.intercept))

    def outwards(self, model: LatentModel) -> LatentModel:
        """Return a model of data that the origin has been taken off for data as they come."""
        if self.origin is None:
            return model
        return replace(model, intercept=(model.intercept + self.origin).to(model.intercept))

    def smoothed(self, width: float) -> "Setting":
        """Return the same with the kinks of its maps rounded off over a width; 0 is not at all."""
        return replace(
            self, family=self.family.smoothed(width), hidden_map=self.hidden_map.smoothed(width)
        )

    def double(self) -> "Setting":
        """Return the same in float64."""
        weight, offset = self.sample_weight, self.row_offset
        return replace(
            self,
            observations=self.observations.double(),
            sample_weight=None if weight is None else weight.double(),
            row_offset=None if offset is None else offset.double(),
            narrow=self.narrow or self.observations.dtype,
        )

    @cached_property
    def intercept_limits(self) -> tuple[Tensor, Tensor] | None:
        """Least and largest intercepts (p,); None where the domain is the whole line.

        The rows are solved from zero, where their predictors are the intercepts. From nearer to
        an end of the domain than this Newton's method takes its time.
        """
        domain = self.family.domain
        if domain.is_real_line:
            return None
        null, _ = null_model(self)
        low, high = (
            end + _MARGIN * (null - end) if math.isfinite(end) else torch.full_like(null, end)
            for end in (domain.low, domain.high)
        )
        return low, high

    @cached_property
    def total_weight(self) -> float:
        """Sum of the sample weights."""
        if self.sample_weight is None:
            return float(self.observations.shape[0])
        return float(self.sample_weight.double().sum())

    def weighted_sum(self, values: Tensor) -> float:
        """Sum over rows under the sample weights, in float64."""
        values = values.double()
        if self.sample_weight is None:
            return float(values.sum())
        return float(values @ self.sample_weight.double())


def row_problem(
    setting: Setting,
    model: LatentModel,
    curvature: Tensor | None = None,
    shared_map: bool = False,
) -> MapProblem:
    """Latents of every row in the first layer, given its loadings."""
    penalty = model.loadings.new_full((model.loadings.shape[1],), setting.alpha)
    return MapProblem(
        setting.family,
        model.loadings,
        setting.observations,
        penalty,
        offset=model.intercept,
        row_offset=setting.row_offset,
        curvature=curvature,
        shared_map=shared_map,
    )


def latent_problem(
    setting: Setting,
    model: LatentModel,
    curvature: Tensor | None = None,
    shared_map: bool = False,
) -> MapProblem | HierarchyProblem:
    """Latents of every row in all layers, given their loadings."""
    bottom = row_problem(setting, model, curvature, shared_map)
    if not model.upper:
        return bottom
    return HierarchyProblem(bottom, model.upper, setting.hidden_map, setting.alpha)


def layer_settings(setting: Setting, layers: list[Tensor]) -> list[Setting]:
    """Say what is given of each layer, the latents of the one below being its data.

    Parameters
    ----------
    setting : Setting
    layers : list of Tensor of shape (n, k)
        Latents of each layer, from the data to the top.

    Returns
    -------
    list of Setting
        Objectives of all but the first are in units of alpha.
    """
    return [setting, *(hidden_setting(setting, below) for below in layers[:-1])]


def hidden_setting(setting: Setting, latents: Tensor) -> Setting:
    """Say what is given of the layer above some latents (n, k), in units of alpha."""
    return replace(
        setting,
        family=layer_family(setting.hidden_map),
        observations=Observations(latents.contiguous()),
        alpha=1.0,
        weight_decay=setting.weight_decay / setting.alpha,
        row_offset=None,
        log_base=0.0,
        pins=None,
        origin=None,
    )


def column_problem(
    setting: Setting,
    latents: Tensor,
    curvature: Tensor | None = None,
    shared_map: bool = False,
) -> MapProblem:
    """Set up loadings and intercept of every feature given the latents (n, r), r >= 0."""
    design = torch.cat([latents, latents.new_ones(len(latents), 1)], dim=1)
    penalty = design.new_full((design.shape[1],), setting.weight_decay * setting.total_weight)
    penalty[-1] = 0
    return MapProblem(
        setting.family,
        design,
        setting.observations.T,
        penalty,
        offset=setting.row_offset,
        weight=setting.sample_weight,
        curvature=curvature,
        shared_map=shared_map,
    )


def null_model(setting: Setting) -> tuple[Tensor, float]:
    """Fit the intercept of the model without latents; also return its mean objective."""
    start, total, counts = _intercept_of_means(setting)
    if setting.row_offset is not None:
        return _intercept_of_offsets(setting, start)
    # The mean decides; a column at the edge stays half an observation inside.
    family = setting.family
    terms = counts * family.log_partition(start) - total * family.canonical(start)
    objective = float(terms.sum()) - setting.log_base
    return start.to(setting.observations.dtype), objective / setting.total_weight


def _intercept_of_means(setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """Make intercepts of the means of the columns; also their totals and weights, (p,), float64.

    A column at the edge of the mean space (all zeros) has no finite optimum: its intercept is half
    an observation inside.
    """
    observations, family, weight = setting.observations, setting.family, setting.sample_weight
    n, p = observations.shape
    if weight is None:
        weight = torch.ones(n, dtype=observations.dtype, device=observations.device)
    transposed = observations.T
    total = (transposed @ weight.unsqueeze(1)).squeeze(1).double()
    counts = weight.double().sum().expand(p)
    if observations.missing is not None:
        gaps = transposed.missing_product(weight.unsqueeze(1).double()).squeeze(1)
        counts = (counts - gaps).clamp_min(torch.finfo(torch.float64).tiny)
    mean = total / counts
    grand = float(total.sum() / counts.sum())
    start = family.link(mean)
    half = 0.5 * weight.double().mean()
    pulled = (mean * counts + half * grand) / (counts + half)
    start = torch.where(torch.isfinite(start), start, family.link(pulled))
    domain = family.domain
    inside = domain.inside()
    high = inside + 1 if domain.high == math.inf else inside
    low = inside - 1 if domain.low == -math.inf else inside
    start = torch.nan_to_num(start, nan=inside, posinf=high, neginf=low)
    if setting.pins is not None:
        setting.pins.hold_(start)
    return start, total, counts


def _intercept_of_offsets(setting: Setting, start: Tensor) -> tuple[Tensor, float]:
    """Fit the intercepts of rows with offsets by Newton's method; also their mean objective."""
    observations = setting.observations
    n, p = observations.shape
    begin = start.to(observations.dtype).unsqueeze(1)
    problem = column_problem(setting, begin.new_zeros(n, 0))
    fixed = torch.zeros_like(begin, dtype=torch.bool)
    if setting.pins is not None:
        fixed[setting.pins.columns] = True

    def work(low: int, high: int) -> tuple[Tensor, Tensor]:
        part = problem.chunk(low, high)
        value = newton(part, begin[low:high], tol=1e-6, max_iter=10).value
        value = torch.where(fixed[low:high], begin[low:high], value)
        rows = torch.arange(high - low, device=begin.device)
        return value, part.objective(value, rows)

    parts = map_chunks(work, p, problem.chunk_rows(), observations.device)
    intercept = torch.cat([one for one, _ in parts]).squeeze(1)
    objective = float(torch.cat([two for _, two in parts]).sum())
    return intercept, (objective - setting.log_base) / setting.total_weight
