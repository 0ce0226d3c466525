r"""Several layers of latents as one equilibrium.

The layer next to the data is that of the one-layer model, but the prior mean of its latents is
set by the layer above it, and so on to the top:

.. math:: E(z_1, \dots, z_L) = -\log p(x | z_1)
          + \tfrac{\alpha}{2} \sum_{l=1}^{L-1} |z_l - R_h(W_{l+1} z_{l+1} + b_{l+1})|^2
          + \tfrac{\alpha}{2} |z_L|^2 .

Multiplied out, the square is the ridge of :math:`z_l` and alpha times the energy of a Gaussian
family seen through :math:`R_h`, with :math:`z_l` as its statistic: each layer is the problem of
the layer below once more, and what is new is only that its data are latents.
"""

import copy
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skdeq._canonical import through
from skdeq._family import CanonicalMap, Family
from skdeq._fixed_point_problem import certified_residual, scaled_residual, usable_hessian
from skdeq._map_problem import MapProblem
from skdeq.families import Gaussian

__all__ = [
    "HiddenLayer",
    "HierarchyProblem",
    "has_kinks",
    "has_one_solution",
    "hidden_energies",
    "hidden_gradients",
    "layer_family",
    "mean_jacobian",
    "mean_from_top",
    "split_layers",
]

# Entries of the Hessians of a chunk of rows.
_HESSIAN_ENTRIES = 2**22


@dataclass(frozen=True)
class HiddenLayer:
    """Mean of the latents of one layer given those above.

    Attributes
    ----------
    loadings : Tensor of shape (h, r)
    intercept : Tensor of shape (h,)
    """

    loadings: Tensor
    intercept: Tensor

    def predictor(self, above: Tensor) -> Tensor:
        """Linear predictor (n, h) of latents (n, r)."""
        return torch.addmm(self.intercept, above, self.loadings.T)

    def to(self, *args: Any, **kwargs: Any) -> "HiddenLayer":
        """Return the same in another type or on another device, as a tensor's ``to`` does."""
        return HiddenLayer(self.loadings.to(*args, **kwargs), self.intercept.to(*args, **kwargs))


def layer_family(hidden_map: CanonicalMap) -> Family:
    """Law of latents given their linear predictor, in units of their precision."""
    return through(Gaussian(), hidden_map)


def has_one_solution(family: Family, upper: Sized) -> bool:
    """Whether the latents of a row are the one solution of a convex problem."""
    return family.is_convex and not len(upper)


def has_kinks(family: Family, upper: Sized, hidden_map: CanonicalMap) -> bool:
    """Whether the energy of a row has kinks, rounded off or not."""
    return family.has_kinks or (len(upper) > 0 and hidden_map.has_kinks)


def split_layers(latents: Tensor, upper: tuple[HiddenLayer, ...]) -> list[Tensor]:
    """Latents of each layer, from the data to the top, as views of all of them (n, K)."""
    above = [layer.loadings.shape[1] for layer in upper]
    return list(latents.split([latents.shape[1] - sum(above), *above], dim=1))


def mean_from_top(top: Tensor, upper: tuple[HiddenLayer, ...], hidden_map: CanonicalMap) -> Tensor:
    """Latents next to the data that the prior expects below those of the top layer."""
    for layer in reversed(upper):
        top = hidden_map.value(layer.predictor(top))
    return top


def mean_jacobian(
    top: Tensor, upper: tuple[HiddenLayer, ...], hidden_map: CanonicalMap, weight: Tensor | None
) -> Tensor:
    """Average over rows the derivative (h, k) of :func:`mean_from_top` in the top latents.

    Through the identity it is the same everywhere; through other maps the slopes of each layer
    are replaced by their weighted means over the rows.
    """
    result = torch.eye(top.shape[1], dtype=torch.float64, device=top.device)
    shares = torch.full_like(top[:, 0], 1 / len(top)) if weight is None else weight / weight.sum()
    for layer in reversed(upper):
        zeta = layer.predictor(top)
        slope = shares.double() @ hidden_map.derivative(zeta).double()
        result = slope.unsqueeze(1) * layer.loadings.double() @ result
        top = hidden_map.value(zeta)
    return result


def _slope(family: Family, zeta: Tensor) -> Tensor:
    """Return the derivative of the map through which the family is seen."""
    return torch.ones_like(zeta) if family.is_canonical else family.canonical_map.derivative(zeta)


def hidden_energies(
    parts: list[Tensor],
    upper: tuple[HiddenLayer, ...],
    family: Family,
    observed: bool = False,
    steps: list[Tensor] | None = None,
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Predictor, loss, slope and curvature of the latents of each layer but the top.

    With ``steps`` they are those at ``part - step`` of each layer, see
    :meth:`HierarchyProblem.residual_after`.
    """
    energies = []
    for at, (layer, here, above) in enumerate(zip(upper, parts, parts[1:], strict=False)):
        zeta = layer.predictor(above)
        if steps is not None:
            here = here - steps[at]
            zeta = torch.addmm(zeta, steps[at + 1], layer.loadings.T, alpha=-1)
        energies.append((zeta, *family.energy(zeta, here, observed=observed)))
    return energies


def hidden_gradients(
    parts: list[Tensor],
    upper: tuple[HiddenLayer, ...],
    family: Family,
    energies: list[tuple[Tensor, Tensor, Tensor, Tensor]],
) -> list[Tensor]:
    """Gradient in each layer's latents of the hidden layers' energies, in units of alpha.

    The ridge of the first layer is left out: it belongs to the problem next to the data.
    """
    gradients = [torch.zeros_like(parts[0]), *parts[1:]]
    for at, (layer, (zeta, _, slope, _)) in enumerate(zip(upper, energies, strict=True)):
        gradients[at] = gradients[at] - family.canonical(zeta)
        gradients[at + 1] = gradients[at + 1] + slope @ layer.loadings
    return gradients


class HierarchyProblem:
    """Latents of all layers of every row; implements ``FixedPointProblem``.

    Parameters
    ----------
    bottom : MapProblem
        Of the layer next to the data, with its ridge.
    upper : tuple of HiddenLayer
        From the one whose mean is that of the first latents to the top.
    hidden_map : CanonicalMap
        The map R_h.
    alpha : float
        Precision of the latents given those above.
    """

    def __init__(
        self,
        bottom: MapProblem,
        upper: tuple[HiddenLayer, ...],
        hidden_map: CanonicalMap,
        alpha: float,
    ):
        self.bottom, self.upper, self.alpha = bottom, upper, alpha
        self.hidden_map, self.family = hidden_map, layer_family(hidden_map)
        self.sizes = [bottom.r, *(layer.loadings.shape[1] for layer in upper)]
        self.r = sum(self.sizes)
        self.n_rows = bottom.n_rows
        # The maps have slopes of at most one.
        self.scale_is_bounded = bottom.scale_is_bounded
        self._squares = [layer.loadings.square().sum(1) for layer in upper]
        self._inverses = None
        if bottom.has_curvature:
            # Slopes of at most one bound the curvature of each layer. A matrix of blocks in which
            # only neighbours meet is at most twice its diagonal blocks: hence the half.
            grams = [layer.loadings.double().T @ layer.loadings.double() for layer in upper]
            for gram in grams:
                gram.diagonal().add_(1.0)
            self._inverses = [
                (0.5 / alpha * torch.linalg.inv(gram)).to(like)
                for gram, like in zip(grams, self._squares, strict=True)
            ]

    def smooth(self, width: float) -> None:
        """Round off the kinks of the maps."""
        self.bottom.smooth(width)
        self.family = layer_family(self.hidden_map.smoothed(width))

    def hessian_rows(self) -> int:
        """Rows whose Hessians are to be held at a time."""
        return max(1, min(self.bottom.chunk_rows(), _HESSIAN_ENTRIES // self.r**2))

    def chunk_rows(self) -> int:
        """Rows to be worked on at a time, few enough for Hessians to be looked at."""
        return self.hessian_rows()

    def chunk(self, start: int, stop: int) -> "HierarchyProblem":
        """Return the problem of the rows ``start:stop``."""
        return self._with(self.bottom.chunk(start, stop))

    def select(self, index: Tensor) -> "HierarchyProblem":
        """Return the problem of some rows, in the order given."""
        return self._with(self.bottom.select(index))

    def _with(self, bottom: MapProblem) -> "HierarchyProblem":
        part = copy.copy(self)
        part.bottom, part.n_rows = bottom, bottom.n_rows
        return part

    def _parts(self, z: Tensor) -> list[Tensor]:
        return list(z.split(self.sizes, dim=1))

    def _value(self, bottom: Tensor, parts: list[Tensor], energies: list) -> Tensor:
        """Add the energies of the hidden layers to the objective next to the data."""
        ridge = sum(part.double().square().sum(1) for part in parts[1:])
        loss = sum(loss.double().sum(1) for _, loss, _, _ in energies)
        value = bottom + self.alpha * (loss + 0.5 * ridge)
        return torch.nan_to_num(value, nan=torch.inf, posinf=torch.inf)

    def _gradient(self, bottom: Tensor, parts: list[Tensor], energies: list) -> Tensor:
        hidden = hidden_gradients(parts, self.upper, self.family, energies)
        gradient = self.alpha * torch.cat(hidden, dim=1)
        gradient[:, : self.sizes[0]] += bottom
        return gradient

    def _residual(
        self, gradient: Tensor, parts: list[Tensor], energies: list, size: Tensor
    ) -> Tensor:
        """Largest of the layers' scaled residuals, each that of a problem of its own."""
        residuals = []
        pieces = self._parts(gradient)
        sizes = [size]
        for square, (_, _, _, curvature) in zip(self._squares, energies, strict=True):
            sizes.append(self.alpha * (curvature @ square))
        for piece, part, one in zip(pieces, parts, sizes, strict=True):
            residuals.append(scaled_residual(piece, part, self.alpha + one / part.shape[1]))
        return torch.stack(residuals).amax(0)

    def objective(self, z: Tensor, rows: Tensor) -> Tensor:
        """Objective of each row, float64; infinite outside the domain of the family."""
        parts = self._parts(z)
        energies = hidden_energies(parts, self.upper, self.family)
        return self._value(self.bottom.objective(parts[0], rows), parts, energies)

    def gradient(self, z: Tensor, rows: Tensor, fresh: bool = True) -> tuple[Tensor, Tensor]:
        """Gradient and scaled residual of each row."""
        parts = self._parts(z)
        energies = hidden_energies(parts, self.upper, self.family)
        bottom, size = self.bottom.gradient_and_size(parts[0], rows, fresh)
        gradient = self._gradient(bottom, parts, energies)
        residual = self._residual(gradient, parts, energies, size)
        if self._inverses is not None:
            decrement = -(gradient * self.shaped_step(gradient, rows)).sum(1)
            rounding = self.rounding(torch.zeros_like(residual, dtype=torch.float64), z, rows)
            residual = certified_residual(residual, decrement, rounding)
        return gradient, residual

    @property
    def has_kinks(self) -> bool:
        """Whether a map has kinks, rounded off or not."""
        return has_kinks(self.bottom.family, self.upper, self.hidden_map)

    def residual_after(self, z: Tensor, step: Tensor, rows: Tensor) -> Tensor:
        """Scaled residual of each row at ``z - step``, its predictors moved from those at z."""
        steps, after = self._parts(step), self._parts(z - step)
        energies = hidden_energies(self._parts(z), self.upper, self.family, steps=steps)
        bottom, size = self.bottom.gradient_after(self._parts(z)[0], steps[0], rows)
        gradient = self._gradient(bottom, after, energies)
        return self._residual(gradient, after, energies, size)

    def rounding(self, objective: Tensor, z: Tensor, rows: Tensor) -> Tensor:
        """Error that rounding may have made in the objectives at ``z``."""
        bottom = self.bottom.rounding(objective, self._parts(z)[0], rows)
        return bottom + torch.finfo(z.dtype).eps * self.r

    def extent(self, z: Tensor) -> Tensor:
        """Return what the predictors of each row (m,) come to at ``z`` in the least layer."""
        parts = self._parts(z)
        hidden = [
            layer.predictor(above).abs().amax(1)
            for layer, above in zip(self.upper, parts[1:], strict=True)
        ]
        return torch.stack([self.bottom.extent(parts[0]), *hidden]).amin(0)

    def bare_gradient(self, z: Tensor, rows: Tensor) -> Tensor:
        """Gradient of each row and nothing else."""
        parts = self._parts(z)
        energies = hidden_energies(parts, self.upper, self.family)
        return self._gradient(self.bottom.bare_gradient(parts[0], rows), parts, energies)

    def derivatives(
        self, z: Tensor, rows: Tensor, observed: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Objective, gradient, Hessian and scaled residual of each row.

        The Hessian is the observed one where that is positive definite, or if ``observed``; else
        the expected one, in which the curvature of the maps is left out.
        """
        parts = self._parts(z)
        energies = hidden_energies(parts, self.upper, self.family)
        value, bottom, block, _ = self.bottom.derivatives_of_kind(parts[0], rows, observed=False)
        gradient = self._gradient(bottom, parts, energies)
        size = block.diagonal(dim1=1, dim2=2).sum(1) - self.alpha * self.sizes[0]
        residual = self._residual(gradient, parts, energies, size)
        hessian = self._hessian(block, energies)
        if not (self.family.is_canonical and self.bottom.family.is_canonical):
            # Of all layers together: of one alone it may be definite where that of all is not.
            if not self.bottom.family.is_canonical:
                block = self.bottom.observed_hessian(parts[0], rows)
            bent = hidden_energies(parts, self.upper, self.family, observed=True)
            exact = self._hessian(block, bent)
            hessian = exact if observed else usable_hessian(exact, hessian)
        return self._value(value, parts, energies), gradient, hessian, residual

    def _hessian(self, block: Tensor, energies: list) -> Tensor:
        """Assemble the blocks: each layer meets the one above and the one below."""
        first = self.sizes[0]
        hessian = block.new_zeros(len(block), self.r, self.r)
        hessian[:, :first, :first] = block
        low = 0
        for layer, (zeta, _, _, curvature) in zip(self.upper, energies, strict=True):
            h, r = layer.loadings.shape
            here, above = slice(low, low + h), slice(low + h, low + h + r)
            slope = self.alpha * _slope(self.family, zeta)
            cross = -slope.unsqueeze(2) * layer.loadings
            hessian[:, here, above] = cross
            hessian[:, above, here] = cross.transpose(1, 2)
            pairs = (layer.loadings.unsqueeze(2) * layer.loadings.unsqueeze(1)).reshape(h, r * r)
            inner = (curvature @ pairs).reshape(-1, r, r)
            inner.diagonal(dim1=1, dim2=2).add_(1.0)
            hessian[:, above, above] = self.alpha * inner
            low += h
        return hessian

    def step(self, gradient: Tensor, rows: Tensor) -> Tensor:
        """Displacement f(z) - z of the equilibrium layer."""
        return -gradient / self.alpha

    def shaped_step(self, gradient: Tensor, rows: Tensor) -> Tensor:
        """Displacement of the map that the curvatures shape, if one is given."""
        if self._inverses is None:
            return self.step(gradient, rows)
        first, *above = self._parts(gradient)
        steps = [0.5 * self.bottom.shaped_step(first, rows)]
        steps += [-(one @ inverse) for one, inverse in zip(above, self._inverses, strict=True)]
        return torch.cat(steps, dim=1)

    def is_safe(self, step: Tensor, rows: Tensor) -> Tensor:
        """No step is known to decrease an objective that is not convex."""
        return torch.zeros(len(step), dtype=torch.bool, device=step.device)
