"""The equilibrium layer as a torch module, to be trained within a network."""

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn
from torch.nn.utils import parametrize

from skdeq._canonical import through
from skdeq._convolution import Convolution
from skdeq._exposure import log_exposure
from skdeq._hierarchy import (
    HiddenLayer,
    hidden_energies,
    hidden_gradients,
    layer_family,
    split_layers,
)
from skdeq._inside import latents_inside
from skdeq._latents import solve_latents, typical_variance
from skdeq._layer_checks import (
    check_input,
    check_numbers,
    check_type,
    checked_sizes,
    checked_start,
)
from skdeq._model import LatentModel, Setting, latent_problem
from skdeq._observations import Observations
from skdeq._warn import warn
from skdeq.families import CanonicalMap, Family, get_canonical_map, get_family
from skdeq.fixed_point import FixedPointResult
from skdeq.implicit import attach_factored, factored

__all__ = ["EquilibriumLayer"]

_Kinked = TypeVar("_Kinked", Family, CanonicalMap)

# Least share of a latent's own curvature that the other latents may leave of it, in units of the
# precision. Where a row has fewer observed entries than latents, and next to no prior, less is
# left, and in float32 outputs are off by multiples of their size. From this share on by a percent.
_LEAST_PIVOT = 100.0

# The second where they are made from kernels.
_LOADINGS_IN_STATE = ("loadings", "parametrizations.loadings.original")


@dataclass(frozen=True)
class _Batch:
    """Rows as the layer sees them: statistics with zeros in the gaps, and the gaps."""

    statistic: Tensor
    observed: Tensor | None
    offset: Tensor | None


class EquilibriumLayer(nn.Module):
    r"""Maximum-a-posteriori latents of rows, as a layer with an implicit backward pass.

    Forward it solves the equilibrium of :class:`~skdeq.ExpFamilyDEQ`,

    .. math:: z = f(z) = \alpha^{-1} W^\top [m \circ R'(\zeta) \circ (T(x) - A'(R(\zeta)))],
              \qquad \zeta = W z + b + o,

    row by row. Backward it solves one k x k system per row: the memory it takes does not depend
    on the number of iterations, of which nothing is kept [1]_ (Section 3). The gradient reaches
    loadings, intercept and the inputs. There is no second derivative: a backward pass with
    ``create_graph=True`` raises a RuntimeError. Transforms of ``torch.func`` are not supported.

    It computes in the type of its loadings, float32 or float64, under ``torch.autocast``, too.
    Where float32 has too few digits, as of rows with fewer observed entries than latents under a
    prior that is next to flat, the row counts as not solved.

    Parameters
    ----------
    in_features : int
        Number of features p.
    n_components : int
        Number of latents k.
    family : str or Family, default="gaussian"
        Law of the entries.
    canonical_map : str or CanonicalMap, default="identity"
        Map R from the linear predictor to the canonical parameter. A map that may end on a kink
        (ReLU with its exact mask) has no derivative there: the one used is that of a neighbour.
    hidden_layer_sizes : tuple of int, default=()
        Sizes of the latent layers between the data and the one that is returned, see
        :class:`~skdeq.ExpFamilyDEQ`; all are solved for together.
    hidden_map : {"identity", "relu", "softplus", "tanh"} or CanonicalMap, default="tanh"
        Map between latent layers.
    alpha : float, default=1.0
        Prior precision of the latents, positive.
    fixed_point : {"auto", "newton"}, default="auto"
        How the equilibrium is solved, see :class:`~skdeq.ExpFamilyDEQ`: the two ways that leave
        no row of a convex problem unsolved. Of a row that is not solved the gradient is wrong, and
        a ConvergenceWarning says so.
    tol : float, default=1e-6
        Scaled residual at which a row is solved, see :mod:`skdeq.fixed_point`. Gradients are those
        of the exact equilibrium, to about the same relative error.
    max_iter : int, default=50
        Iterations of the solver.
    device : torch.device or str, optional
        Where the parameters are made; torch's default device by default.
    dtype : torch.dtype, optional
        Type of the parameters, torch's default type by default.

    Attributes
    ----------
    loadings : Parameter of shape (p, k)
        With hidden layers, of shape (p, h) with h the size of the first.
    intercept : Parameter of shape (p,)
    hidden_loadings : ParameterList
        Loadings of the layers above the first, of shape (h, r) each.
    hidden_intercepts : ParameterList
        Their intercepts, of shape (h,) each.
    rotation : Tensor of shape (k, k) or None
        What latents are multiplied by on the way out; of a module made by
        :meth:`skdeq.ExpFamilyDEQ.to_module` with ``whiten=False``, the map to its scores.
    exposure_profile : Tensor of shape (p,) or None
        Mean of each feature in training; where given, the offset of a row is the logarithm of
        its total over the total expected of its observed entries.

    See Also
    --------
    skdeq.ExpFamilyDEQ.to_module : The layer of a fitted estimator.

    References
    ----------
    .. [1] R. Tsuchida and C. S. Ong (2023). Deep equilibrium models as estimators for
       continuous latent variables. AISTATS, PMLR 206, 1646-1671. arXiv:2211.05943.

    Examples
    --------
    >>> import torch
    >>> from skdeq.nn import EquilibriumLayer
    >>> _ = torch.manual_seed(0)
    >>> network = torch.nn.Sequential(
    ...     EquilibriumLayer(20, 3, family="poisson"), torch.nn.Linear(3, 2)
    ... )
    >>> counts = torch.poisson(torch.full((8, 20), 2.0))
    >>> network(counts).square().sum().backward()
    >>> network[0].loadings.grad.shape
    torch.Size([20, 3])
    """

    rotation: Tensor | None
    exposure_profile: Tensor | None

    def __init__(
        self,
        in_features: int,
        n_components: int,
        *,
        family: str | Family = "gaussian",
        canonical_map: str | CanonicalMap = "identity",
        hidden_layer_sizes: tuple[int, ...] = (),
        hidden_map: str | CanonicalMap = "tanh",
        alpha: float = 1.0,
        fixed_point: str = "auto",
        tol: float = 1e-6,
        max_iter: int = 50,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = checked_sizes(in_features, hidden_layer_sizes, n_components)
        check_numbers(alpha, tol, max_iter)
        if fixed_point not in ("auto", "newton"):
            raise ValueError(f"fixed_point must be 'auto' or 'newton'; got {fixed_point!r}.")
        self.fixed_point = fixed_point
        self.family = through(get_family(family), get_canonical_map(canonical_map))
        self.alpha, self.tol, self.max_iter = float(alpha), float(tol), int(max_iter)
        self.hidden_map = get_canonical_map(hidden_map)
        empty = partial(torch.empty, device=device, dtype=dtype)
        self.loadings = nn.Parameter(empty(sizes[0], sizes[1]))
        self.intercept = nn.Parameter(empty(sizes[0]))
        self.hidden_loadings = nn.ParameterList(
            empty(low, high) for low, high in pairwise(sizes[1:])
        )
        self.hidden_intercepts = nn.ParameterList(empty(size) for size in sizes[1:-1])
        self.register_buffer("rotation", None)
        self.register_buffer("exposure_profile", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw small loadings, and an intercept inside the domain of the family."""
        for loadings, intercept in self.pairs():
            nn.init.normal_(loadings, std=1 / math.sqrt(len(loadings)))
            nn.init.zeros_(intercept)
        if parametrize.is_parametrized(self, "loadings"):
            # What was drawn above is a function of the parameters that are there.
            drawn = torch.randn_like(self.loadings) / math.sqrt(len(self.loadings))
            setattr(self, "loadings", drawn)  # noqa: B010 (mypy takes it for the parameter)
        self.intercept.copy_(self._inside(self.intercept))

    def _inside(self, like: Tensor) -> Tensor:
        """Predictors well inside the domain of the family."""
        inside = torch.full_like(like, self.family.base.domain.inside(), requires_grad=False)
        return inside if self.family.is_canonical else self.family.canonical_map.inverse(inside)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return loadings and intercept of each layer, from the data to the top."""
        hidden = zip(self.hidden_loadings, self.hidden_intercepts, strict=True)
        return [(self.loadings, self.intercept), *hidden]

    @property
    def is_convex(self) -> bool:
        """Whether the latents of a row are the one solution of a convex problem."""
        return self.family.is_canonical and not len(self.hidden_loadings)

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        sizes = [len(self.loadings), *(loadings.shape[1] for loadings, _ in self.pairs())]
        text = f"in_features={sizes[0]}, n_components={sizes[-1]}, family={self.family.base!r}"
        if sizes[1:-1]:
            text += f", hidden_layer_sizes={tuple(sizes[1:-1])}, hidden_map={self.hidden_map!r}"
        if not self.family.is_canonical:
            text += f", canonical_map={self.family.canonical_map!r}"
        return f"{text}, alpha={self.alpha}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The two buffers may be there in one layer and not in another. What brings no loadings is
        # a part of a state, and says nothing of them.
        own = dict(self.named_parameters())
        given = [name for name in _LOADINGS_IN_STATE if prefix + name in state_dict]
        fits = all(
            name not in own or own[name].shape == state_dict[prefix + name].shape for name in given
        )
        # What does not fit is for torch to refuse.
        if given and fits:
            like = self.loadings.detach()
            k = self._layer_sizes()[-1]
            for name, shape in (("rotation", (k, k)), ("exposure_profile", (len(like),))):
                value = state_dict.get(prefix + name)
                if value is None or value.shape == shape:
                    setattr(self, name, None if value is None else like.new_empty(shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, start: Tensor | None = None) -> Tensor:
        """Latents of rows.

        Parameters
        ----------
        x : Tensor of shape (n, p)
            Observations in the support of the family, which is not checked; NaN where missing.
        start : Tensor of shape (n, k), optional
            Latents to start from, those of all layers side by side, such as those of the last
            visit; zero by default, and in rows where they are not finite or, if the variance of
            the family has no bound and the problem is convex, worse than zero.

        Returns
        -------
        Tensor of shape (n, k)
            Latents of the top layer, or scores where there is a rotation.

        Warns
        -----
        ConvergenceWarning
            If rows are not solved.
        """
        latents, result = self._attached(x, start)
        self._warn_if_unsolved(result)
        return latents

    def _attached(self, x: Tensor, start: Tensor | None = None) -> tuple[Tensor, FixedPointResult]:
        """Latents of rows as :meth:`forward` returns them, and their certificates, unwarned."""
        check_input(x)
        # In fewer digits than the loadings have, the residuals that certify would be false.
        with torch.autocast(x.device.type, enabled=False):
            batch = self._batch(x)
            if start is not None:
                shape = (len(x), sum(self._layer_sizes()))
                start = checked_start(start, shape, self.loadings)
            result = self._solve(batch, start)
            latents = result.value
            if torch.is_grad_enabled():
                result, factor, definite, beyond = self._factored(batch, result)
                latents = attach_factored(
                    latents, lambda z: self._gradient(batch, z, beyond), factor, definite
                )
            latents = split_layers(latents, self._upper())[-1]
            if self.rotation is not None:
                latents = latents @ self.rotation
        return latents, result

    def certify(self, x: Tensor) -> FixedPointResult:
        """Latents of rows with their certificates of convergence, without gradients.

        Parameters
        ----------
        x : Tensor of shape (n, p)

        Returns
        -------
        FixedPointResult
        """
        check_input(x)
        with torch.autocast(x.device.type, enabled=False):
            batch = self._batch(x)
            result = self._solve(batch)
            if len(x):
                result = self._factored(batch, result)[0]
        return replace(result, layer_sizes=self._layer_sizes())

    def _layer_sizes(self) -> tuple[int, ...]:
        return tuple(loadings.shape[1] for loadings, _ in self.pairs())

    @torch.compiler.disable
    def _warn_if_unsolved(self, result: FixedPointResult) -> None:
        left = int((~result.converged).sum())
        if not left:
            return
        domain = self.family.domain
        advice = (
            f"Increase max_iter={self.max_iter}, lower the learning rate if training made the "
            "loadings this large"
        )
        if result.value.dtype == torch.float32:
            advice += ", or convert the layer to float64"
        if not (domain.is_real_line or bool(domain.contains(self.intercept.detach()).all())):
            advice += (
                f". The intercept has left the domain of {self.family.base!r}, {domain}: where no "
                "latents bring all features back into it there is no solution; clamp it after "
                "each step"
            )
        warn(
            f"{left} of {len(result.converged)} rows of EquilibriumLayer are not solved to "
            f"tol={self.tol:g} (largest residual {float(result.residual.max()):.1e}), so that "
            "their latents are off and their gradients wrong; certify says which they are. "
            f"{advice}.",
            ConvergenceWarning,
        )

    def _upper(self) -> tuple[HiddenLayer, ...]:
        return tuple(HiddenLayer(*pair) for pair in self.pairs()[1:])

    def _detached(self) -> tuple[Tensor, Tensor, tuple[HiddenLayer, ...]]:
        pairs = [(loadings.detach(), intercept.detach()) for loadings, intercept in self.pairs()]
        return *pairs[0], tuple(HiddenLayer(*pair) for pair in pairs[1:])

    def _batch(self, x: Tensor) -> _Batch:
        dtype, n_features = self.loadings.dtype, len(self.intercept)
        check_type(dtype)
        if x.dim() != 2 or x.shape[1] != n_features:
            raise ValueError(f"x must have shape (n, {n_features}); got {tuple(x.shape)}.")
        x = x.to(dtype)
        missing = torch.isnan(x)
        gaps = bool(missing.any())
        filled = torch.where(missing, torch.ones_like(x), x) if gaps else x
        statistic = self.family.sufficient(filled)
        if gaps:
            statistic = torch.where(missing, 0.0, statistic)
        observed = (~missing).to(x.dtype) if gaps else None
        offset = None
        if self.exposure_profile is not None:
            profile = self.exposure_profile
            expected = profile.sum() if observed is None else observed @ profile
            total = torch.where(missing, 0.0, x).sum(1)
            offset = log_exposure(total, expected, profile.sum())
        return _Batch(statistic, observed, offset)

    def _setting(self, batch: _Batch) -> Setting:
        gaps = None if batch.observed is None else batch.observed == 0
        return Setting(
            family=self.family,
            observations=Observations(batch.statistic.detach(), gaps),
            alpha=self.alpha,
            weight_decay=0.0,
            row_offset=None if batch.offset is None else batch.offset.detach(),
            hidden_map=self.hidden_map,
        )

    @torch.compiler.disable
    @torch.no_grad()
    def _solve(self, batch: _Batch, start: Tensor | None = None) -> FixedPointResult:
        if not len(batch.statistic):
            return self._of_no_rows()
        setting, (loadings, intercept, upper) = self._setting(batch), self._detached()
        curvature = None
        start = self._start_inside(start, len(batch.statistic))
        if start is not None and self.is_convex:
            # A closer guide than the bound of the variance that it stands for.
            model = LatentModel(loadings, intercept, start)
            curvature = partial(typical_variance, setting, model, "rows")
        return solve_latents(
            setting,
            loadings,
            intercept,
            upper,
            method=self.fixed_point,
            tol=self.tol,
            max_iter=self.max_iter,
            curvature=curvature,
            start=start,
            check_start=True,
        )

    def _start_inside(self, start: Tensor | None, n: int) -> Tensor | None:
        """Replace starts outside the domain, as zero is where the intercept has left it."""
        domain, (loadings, intercept, _) = self.family.domain, self._detached()
        if domain.is_real_line or bool(domain.contains(intercept).all()):
            return start
        inside = latents_inside(loadings, intercept, domain)
        if inside is None:
            return start
        first = loadings.shape[1]
        inside = nn.functional.pad(inside, (0, sum(self._layer_sizes()) - first)).expand(n, -1)
        if start is None:
            return inside.clone()
        is_inside = domain.contains(torch.addmm(intercept, start[:, :first], loadings.T))
        return torch.where(is_inside.all(1, keepdim=True), start, inside)

    def _of_no_rows(self) -> FixedPointResult:
        nothing = self.loadings.new_zeros(0)
        latents = nothing.view(0, sum(self._layer_sizes()))
        return FixedPointResult(latents, nothing, nothing.bool(), nothing.long())

    @torch.compiler.disable
    @torch.no_grad()
    def _factored(
        self, batch: _Batch, result: FixedPointResult
    ) -> tuple[FixedPointResult, Tensor, Tensor, Tensor | None]:
        """Factors of the Hessians at solutions, which are none where these have too few digits."""
        hessian, beyond = self._hessian(batch, result.value)
        factor, definite = factored(hessian)
        pivots = factor.diagonal(dim1=1, dim2=2).square()
        least = _LEAST_PIVOT * torch.finfo(hessian.dtype).eps
        told_apart = (pivots >= least * hessian.diagonal(dim1=1, dim2=2)).all(1) & definite
        converged = result.converged & (
            told_apart if beyond is None else told_apart & ~beyond[:, 0]
        )
        return replace(result, converged=converged), factor, definite, beyond

    def _hessian(self, batch: _Batch, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hessians, and the rows (n, 1) without any: zero is beyond the domain, or they overflow.

        Those are not solved. A gradient of zero keeps them from spoiling that of the others.
        """
        if not len(latents):
            return latents.new_zeros(0, latents.shape[1], latents.shape[1]), None
        setting = replace(
            self._setting(batch), family=_smooth(self.family), hidden_map=_smooth(self.hidden_map)
        )
        problem = latent_problem(setting, *self._detached())
        rows = torch.arange(len(latents), device=latents.device)
        objective, gradient, hessian, _ = problem.derivatives(latents, rows)
        # What is no number in a Hessian is none on its diagonal.
        parts = (objective.unsqueeze(1), gradient, hessian.diagonal(dim1=1, dim2=2))
        beyond = ~torch.cat([torch.isfinite(part) for part in parts], dim=1).all(1, keepdim=True)
        if not bool(beyond.any()):
            return hessian, None
        identity = torch.eye(latents.shape[1], dtype=hessian.dtype, device=hessian.device)
        return torch.where(beyond.unsqueeze(2), identity, hessian), beyond

    def _gradient(self, batch: _Batch, latents: Tensor, beyond: Tensor | None) -> Tensor:
        """Gradient of the energy in the latents, differentiable in all else."""
        family, upper = _smooth(self.family), self._upper()
        parts = split_layers(latents, upper)
        predictor = torch.addmm(self.intercept, parts[0], self.loadings.T)
        if batch.offset is not None:
            predictor = predictor + batch.offset.unsqueeze(1)
        left_out = beyond
        if batch.observed is not None:
            missing = batch.observed == 0
            left_out = missing if beyond is None else missing | beyond
        if left_out is not None:
            # Their slopes are not used, but have to be numbers: nothing times infinity is none.
            predictor = torch.where(left_out, self._inside(predictor), predictor)
        slope = family.energy(predictor, batch.statistic)[1]
        if batch.observed is not None:
            slope = torch.where(missing, 0.0, slope)
        gradient = slope @ self.loadings + self.alpha * parts[0]
        if not upper:
            return gradient if beyond is None else torch.where(beyond, 0.0, gradient)
        hidden = layer_family(_smooth(self.hidden_map))
        energies = hidden_energies(parts, upper, hidden)
        above = hidden_gradients(parts, upper, hidden, energies)
        above[0] = above[0] + gradient / self.alpha
        joint = self.alpha * torch.cat(above, dim=1)
        return joint if beyond is None else torch.where(beyond, 0.0, joint)


class _Kernels(nn.Module):
    """Loadings as a function of the kernels that they are made from."""

    def __init__(self, convolution: Convolution):
        super().__init__()
        self.convolution = convolution

    def forward(self, kernels: Tensor) -> Tensor:
        return self.convolution.matrix(kernels)

    def right_inverse(self, loadings: Tensor) -> Tensor:
        return self.convolution.kernels(loadings)


def tie_to_kernels(layer: EquilibriumLayer, convolution: Convolution) -> None:
    """Make the loadings of a layer those of a convolution, with its kernels as parameter."""
    parametrize.register_parametrization(layer, "loadings", _Kernels(convolution))


def _smooth(kinked: _Kinked) -> _Kinked:
    """Return the family or map whose stationary points the solver finds."""
    return kinked.smoothed(kinked.widths[-1]) if kinked.widths else kinked
