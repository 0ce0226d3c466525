"""The equilibrium layer as a torch module, to be trained within a network."""

import copy
import math
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from skdeq._canonical import through
from skdeq._convolution import Convolution
from skdeq._hierarchy import HiddenLayer, has_kinks, has_one_solution, split_layers
from skdeq._inside import predictors_inside
from skdeq._latents import LatentSolver
from skdeq._layer_checks import (
    check_input,
    check_numbers,
    check_type,
    checked_sizes,
    checked_start,
)
from skdeq._layer_equilibrium import Equilibrium
from skdeq._size_factors import log_exposure
from skdeq._warn import warn, warn_of_convergence
from skdeq.families import CanonicalMap, Family, get_canonical_map, get_family, get_hidden_map
from skdeq.fixed_point import FixedPointResult

__all__ = ["EquilibriumLayer"]

# The second where they are made from kernels.
_LOADINGS_IN_STATE = ("loadings", "parametrizations.loadings.original")
# First intercepts where maps have kinks at zero: half of a unit's rows move it across, not all.
_OFF_THE_KINK = 0.1


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
        of the exact equilibrium, to a relative error of some ten times as much.
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
        # Copies: whoever changes the arguments of a family has not trained this layer with them.
        self.family = copy.deepcopy(through(get_family(family), get_canonical_map(canonical_map)))
        self.alpha, self.tol, self.max_iter = float(alpha), float(tol), int(max_iter)
        self.hidden_map = copy.deepcopy(get_hidden_map(hidden_map))
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
            # At zero, where the latents start, all predictors would lie on a kink together.
            nn.init.constant_(intercept, _OFF_THE_KINK if self._has_kinks else 0.0)
        if parametrize.is_parametrized(self, "loadings"):
            # What was drawn above is a function of the parameters that are there.
            drawn = torch.randn_like(self.loadings) / math.sqrt(len(self.loadings))
            setattr(self, "loadings", drawn)  # noqa: B010 (mypy takes it for the parameter)
        if not self.family.domain.is_real_line:
            self.intercept.copy_(predictors_inside(self.family, self.intercept))

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return loadings and intercept of each layer, from the data to the top."""
        hidden = zip(self.hidden_loadings, self.hidden_intercepts, strict=True)
        return [(self.loadings, self.intercept), *hidden]

    @property
    def _has_kinks(self) -> bool:
        return has_kinks(self.family, self.hidden_loadings, self.hidden_map)

    @property
    def is_convex(self) -> bool:
        """Whether the latents of a row are the one solution of a convex problem."""
        return has_one_solution(self.family, self.hidden_loadings)

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
            k = self.pairs()[-1][0].shape[1]
            for name, shape in (("rotation", (k, k)), ("exposure_profile", (len(like),))):
                value = state_dict.get(prefix + name)
                if value is None or value.shape == shape:
                    setattr(self, name, None if value is None else like.new_empty(shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    # The steps of the solver depend on the data: each look at them would break a traced graph,
    # with a warning.
    @torch.compiler.disable
    def forward(self, x: Tensor, start: Tensor | None = None) -> Tensor:
        """Latents of rows.

        Parameters
        ----------
        x : Tensor of shape (..., p)
            Observations in the support of the family, which is not checked; NaN where missing.
            Each row is on its own, however many dimensions there are in front.
        start : Tensor of shape (..., k), optional
            Latents to start from, those of all layers side by side, such as those of the last
            visit; zero by default, and in rows where they are not finite or, if the variance of
            the family has no bound and the problem is convex, worse than zero.

        Returns
        -------
        Tensor of shape (..., k)
            Latents of the top layer, or scores where there is a rotation.

        Warns
        -----
        ConvergenceWarning
            If rows are not solved.
        RuntimeWarning
            If ``x`` was computed with gradients and has NaN, which means missing.
        """
        latents, result = self._attached(x, start)
        self._warn_if_unsolved(result)
        return latents.reshape(*x.shape[:-1], latents.shape[1])

    def _attached(self, x: Tensor, start: Tensor | None = None) -> tuple[Tensor, FixedPointResult]:
        """Latents (n, k) of rows in turn, and their certificates, unwarned."""
        check_input(x)
        # In fewer digits than the loadings have, the residuals that certify would be false.
        with torch.autocast(x.device.type, enabled=False):
            equilibrium = self._equilibrium(x)
            if start is not None:
                shape = (*x.shape[:-1], sum(equilibrium.sizes))
                start = checked_start(start, shape, equilibrium.loadings).reshape(-1, shape[-1])
            result = self._solved(equilibrium, start)
            latents = result.value
            if torch.is_grad_enabled():
                result, latents = equilibrium.differentiable(result, self.tol)
            elif latents.dtype != torch.float64:
                result = equilibrium.certified(result)
            latents = split_layers(latents, equilibrium.upper)[-1].to(self.loadings.dtype)
            if self.rotation is not None:
                latents = latents @ self.rotation
        return latents, result.to(self.loadings.dtype)

    @torch.compiler.disable
    def certify(self, x: Tensor) -> FixedPointResult:
        """Latents of rows with their certificates of convergence, without gradients.

        Parameters
        ----------
        x : Tensor of shape (..., p)

        Returns
        -------
        FixedPointResult
            Of the rows in turn.
        """
        check_input(x)
        with torch.autocast(x.device.type, enabled=False):
            equilibrium = self._equilibrium(x)
            result = equilibrium.certified(self._solved(equilibrium))
        return replace(result.to(self.loadings.dtype), layer_sizes=equilibrium.sizes)

    def _solved(self, equilibrium: Equilibrium, start: Tensor | None = None) -> FixedPointResult:
        solver = LatentSolver(self.fixed_point, self.tol, self.max_iter)
        return equilibrium.solve(solver, start)

    def _equilibrium(self, x: Tensor) -> Equilibrium:
        """Equations of some rows."""
        (loadings, intercept), *above = self.pairs()
        check_type(loadings.dtype)
        if x.dim() == 0 or x.shape[-1] != len(intercept):
            raise ValueError(f"x must have shape (..., {len(intercept)}); got {tuple(x.shape)}.")
        is_computed = x.grad_fn is not None
        x = x.reshape(-1, x.shape[-1])
        # Next to a kink float32 cannot tell the sides apart.
        working = torch.float64 if self._has_kinks else loadings.dtype
        x = x.to(working)
        profile, offset = self.exposure_profile, None
        is_missing = torch.isnan(x)
        gaps = bool(is_missing.any())
        if gaps and is_computed:
            rows = is_missing.any(1)
            warn(
                f"{int(rows.sum())} of {len(x)} rows that a network made for EquilibriumLayer "
                f"have NaN, the first row {int(rows.int().argmax())}, and NaN means missing: that "
                "a network has diverged goes unseen in the loss. If it has, lower the learning "
                "rate or clip gradients.",
                RuntimeWarning,
            )
        # Any value will do: what comes of it is not used.
        statistic = self.family.sufficient(torch.where(is_missing, 1.0, x) if gaps else x)
        if gaps:
            statistic = torch.where(is_missing, 0.0, statistic)
        if profile is not None:
            profile = profile.to(working)
            total = torch.where(is_missing, 0.0, x).sum(1)
            expected = torch.where(is_missing, 0.0, profile).sum(1)
            offset = log_exposure(total, expected, profile.sum())
        upper = tuple(HiddenLayer(one.to(working), two.to(working)) for one, two in above)
        return Equilibrium(
            self.family,
            self.hidden_map,
            self.alpha,
            statistic,
            is_missing if gaps else None,
            offset,
            loadings.to(working),
            intercept.to(working),
            upper,
        )

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
        warn_of_convergence(
            f"{left} of {len(result.converged)} rows of EquilibriumLayer are not solved to "
            f"tol={self.tol:g} (largest residual {float(result.residual.max()):.1e}), so that "
            "their latents are off and their gradients wrong; certify says which they are. "
            f"{advice}."
        )


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
