"""The equilibrium of one batch of rows in a layer: its solution, certificates and derivatives."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from skdeq._canonical import WIDTHS
from skdeq._chunks import parallel_chunks
from skdeq._family import CanonicalMap, Family
from skdeq._fixed_point_problem import FixedPointResult
from skdeq._hessian_systems import solve_hessians
from skdeq._hierarchy import (
    HiddenLayer,
    has_one_solution,
    hidden_energies,
    hidden_gradients,
    layer_family,
    split_layers,
)
from skdeq._inside import latents_inside, predictors_inside
from skdeq._latent_model import LatentModel
from skdeq._latents import LatentSolver, feature_variances, solve_latents
from skdeq._newton import LEAST_PIVOT, told_apart
from skdeq._observations import Observations
from skdeq._setting import Setting, latent_problem, row_problem
from skdeq.implicit import attach_factored, attach_solver, factored

__all__ = ["Equilibrium"]

# Width of the kinks of the energy whose stationary points the solver finds.
_WIDTH = WIDTHS[-1]


@dataclass(frozen=True)
class Equilibrium:
    """Equations of the latents of some rows under the parameters of a layer.

    Attributes
    ----------
    family : Family
    hidden_map : CanonicalMap
    alpha : float
    statistic : Tensor of shape (n, p)
        T(x), zero in the gaps.
    missing : Tensor of shape (n, p), bool, or None
        Where the gaps are, if there are any.
    offset : Tensor of shape (n,) or None
    loadings : Tensor of shape (p, h)
    intercept : Tensor of shape (p,)
    upper : tuple of HiddenLayer
        Layers above the first.
    """

    family: Family
    hidden_map: CanonicalMap
    alpha: float
    statistic: Tensor
    missing: Tensor | None
    offset: Tensor | None
    loadings: Tensor
    intercept: Tensor
    upper: tuple[HiddenLayer, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of latents of the layers, from the data to the top."""
        above = (layer.loadings.shape[1] for layer in self.upper)
        return self.loadings.shape[1], *above

    @property
    def is_convex(self) -> bool:
        """Whether the latents of a row are the one solution of a convex problem."""
        return has_one_solution(self.family, self.upper)

    @cached_property
    def _setting(self) -> Setting:
        return Setting(
            family=self.family,
            observations=Observations(self.statistic.detach(), self.missing),
            alpha=self.alpha,
            weight_decay=0.0,
            row_offset=None if self.offset is None else self.offset.detach(),
            hidden_map=self.hidden_map,
        )

    @cached_property
    def _model(self) -> LatentModel:
        """Loadings, intercept and the layers above, without gradients."""
        upper = (HiddenLayer(one.loadings.detach(), one.intercept.detach()) for one in self.upper)
        return LatentModel(self.loadings.detach(), self.intercept.detach(), upper=tuple(upper))

    @torch.no_grad()
    def solve(self, solver: LatentSolver, start: Tensor | None) -> FixedPointResult:
        """Solve for the latents of all layers, from starts (n, r) or from zero."""
        if not len(self.statistic):
            return self._of_no_rows()
        curvature = None
        start = self._start_inside(start)
        if start is not None and self.is_convex:
            # A closer guide than the bound of the variance that it stands for.
            model = replace(self._model, latents=start)
            curvature = partial(feature_variances, self._setting, model)
        with parallel_chunks():
            return solve_latents(
                self._setting,
                self._model,
                solver,
                curvature=curvature,
                start=start,
                check_start=True,
            )

    def _of_no_rows(self) -> FixedPointResult:
        nothing = self.loadings.detach().new_zeros(0)
        latents = nothing.view(0, sum(self.sizes))
        return FixedPointResult(latents, nothing, nothing.bool(), nothing.long())

    def _start_inside(self, start: Tensor | None) -> Tensor | None:
        """Replace starts outside the domain, as zero is where the intercept has left it."""
        domain = self.family.domain
        loadings, intercept = self._model.loadings, self._model.intercept
        if domain.is_real_line or bool(domain.contains(intercept).all()):
            return start
        inside = latents_inside(loadings, intercept, domain)
        if inside is None:
            return start
        inside = nn.functional.pad(inside, (0, sum(self.sizes[1:])))
        inside = inside.expand(len(self.statistic), -1)
        if start is None:
            return inside.clone()
        is_inside = domain.contains(torch.addmm(intercept, start[:, : self.sizes[0]], loadings.T))
        return torch.where(is_inside.all(1, keepdim=True), start, inside)

    def certified(self, result: FixedPointResult) -> FixedPointResult:
        """Withdraw the certificates of rows whose Hessians have too few digits."""
        return result if self._is_well_conditioned(result) else self._factored(result)[0]

    def differentiable(
        self, result: FixedPointResult, tol: float
    ) -> tuple[FixedPointResult, Tensor]:
        """Return what `certified` does, and the solutions with their derivatives."""
        if self._is_well_conditioned(result):
            gradient = partial(self._gradient, beyond=None)
            solve = self.solver_of_systems(result.value, tol)
            return result, attach_solver(result.value, gradient, solve)
        result, factor, definite, beyond = self._factored(result)
        gradient = partial(self._gradient, beyond=beyond)
        return result, attach_factored(result.value, gradient, factor, definite)

    @torch.no_grad()
    def _is_well_conditioned(self, result: FixedPointResult) -> bool:
        """Whether bounds alone say that each row is solved, and its Hessian has digits enough.

        There is then no need of one before the backward pass.
        """
        bound = self.family.variance_bound
        if bound is None or not self.is_convex:
            return False
        most = self.alpha + bound * self.loadings.square().sum(0).amax()
        least = LEAST_PIVOT * torch.finfo(most.dtype).eps * most
        return bool((least <= self.alpha) & result.converged.all())

    def solver_of_systems(self, latents: Tensor, tol: float) -> Callable[[Tensor], Tensor]:
        """Return a function that solves systems with the Hessians at latents, to ``tol``."""
        setting, model = self._setting, self._model

        def solve(right: Tensor) -> Tensor:
            if not len(right):
                return right
            # A backward pass may be asked for under autocast, too.
            with torch.autocast(right.device.type, enabled=False), parallel_chunks():
                problem = row_problem(setting, model)
                return solve_hessians(problem, latents, right, tol)

        return solve

    @torch.no_grad()
    def _factored(
        self, result: FixedPointResult
    ) -> tuple[FixedPointResult, Tensor, Tensor, Tensor | None]:
        """Factors of the Hessians at solutions, which are none where these have too few digits."""
        hessian, beyond = self._hessian(result.value)
        factor, definite = factored(hessian)
        certain = told_apart(factor, hessian.diagonal(dim1=1, dim2=2)) & definite
        if beyond is not None:
            certain &= ~beyond[:, 0]
        converged = result.converged & certain
        return replace(result, converged=converged), factor, definite, beyond

    def _hessian(self, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hessians, and the rows (n, 1) without any: zero is beyond the domain, or they overflow.

        Those are not solved. A gradient of zero keeps them from spoiling that of the others.
        """
        if not len(latents):
            return latents.new_zeros(0, latents.shape[1], latents.shape[1]), None
        problem = latent_problem(self._setting.smoothed(_WIDTH), self._model)
        rows = torch.arange(len(latents), device=latents.device)
        objective, gradient, hessian, _ = problem.derivatives(latents, rows)
        # What is no number in a Hessian is none on its diagonal.
        parts = (objective.unsqueeze(1), gradient, hessian.diagonal(dim1=1, dim2=2))
        beyond = ~torch.cat([torch.isfinite(part) for part in parts], dim=1).all(1, keepdim=True)
        if not bool(beyond.any()):
            return hessian, None
        identity = torch.eye(latents.shape[1], dtype=hessian.dtype, device=hessian.device)
        return torch.where(beyond.unsqueeze(2), identity, hessian), beyond

    def _gradient(self, latents: Tensor, beyond: Tensor | None) -> Tensor:
        """Gradient of the energy in the latents, differentiable in all else."""
        family, upper = self.family.smoothed(_WIDTH), self.upper
        parts = split_layers(latents, upper)
        predictor = torch.addmm(self.intercept, parts[0], self.loadings.T)
        if self.offset is not None:
            predictor = predictor + self.offset.unsqueeze(1)
        missing, left_out = self.missing, beyond
        if missing is not None:
            left_out = missing if beyond is None else missing | beyond
        if left_out is not None:
            # Their slopes are not used, but have to be numbers: nothing times infinity is none.
            predictor = torch.where(left_out, predictors_inside(self.family, predictor), predictor)
        statistic = self.statistic
        if beyond is not None:
            statistic = torch.where(beyond, 0.0, statistic)
        slope = family.slope(predictor, statistic)
        if missing is not None:
            slope = torch.where(missing, 0.0, slope)
        gradient = slope @ self.loadings + self.alpha * parts[0]
        if not upper:
            return gradient if beyond is None else torch.where(beyond, 0.0, gradient)
        hidden = layer_family(self.hidden_map.smoothed(_WIDTH))
        energies = hidden_energies(parts, upper, hidden)
        above = hidden_gradients(parts, upper, hidden, energies)
        above[0] = above[0] + gradient / self.alpha
        joint = self.alpha * torch.cat(above, dim=1)
        return joint if beyond is None else torch.where(beyond, 0.0, joint)
