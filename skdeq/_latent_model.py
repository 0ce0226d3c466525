"""Parameters of a model, with the latents that go with them."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from skdeq._hierarchy import HiddenLayer, split_layers

__all__ = ["LatentModel"]


@dataclass
class LatentModel:
    """Parameters of the model and the training latents that go with them.

    Attributes
    ----------
    loadings : Tensor of shape (p, k)
    intercept : Tensor of shape (p,)
    latents : Tensor of shape (n, k)
        Of all layers side by side, from the data to the top, where there are several. None
        where they are of no interest.
    upper : tuple of HiddenLayer
        The layers above the first.
    """

    loadings: Tensor
    intercept: Tensor
    latents: Tensor | Any = None
    upper: tuple[HiddenLayer, ...] = ()

    @classmethod
    def of(cls, matrices: list[Tensor], latents: Tensor | None = None) -> "LatentModel":
        """Model of loadings and intercept side by side (p, k + 1), one matrix for each layer."""
        pairs = [(one[:, :-1].contiguous(), one[:, -1].clone()) for one in matrices]
        upper = tuple(HiddenLayer(*pair) for pair in pairs[1:])
        return cls(*pairs[0], latents, upper)

    def to(self, *args: Any, **kwargs: Any) -> "LatentModel":
        """Return the same in another type or on another device, as a tensor's ``to`` does."""
        latents = self.latents
        return LatentModel(
            self.loadings.to(*args, **kwargs),
            self.intercept.to(*args, **kwargs),
            None if latents is None else latents.to(*args, **kwargs),
            tuple(layer.to(*args, **kwargs) for layer in self.upper),
        )

    def predictor(self, bottom: Tensor) -> Tensor:
        """Linear predictors (n, p) of latents next to the data (n, k), at unit exposure."""
        return torch.addmm(self.intercept, bottom, self.loadings.T)

    def matrices(self) -> list[Tensor]:
        """Put loadings and intercept side by side, one matrix for each layer."""
        layers: list[LatentModel | HiddenLayer] = [self, *self.upper]
        return [torch.cat([one.loadings, one.intercept.unsqueeze(1)], dim=1) for one in layers]

    @property
    def bottom(self) -> "LatentModel":
        """The layer next to the data as a model of its own."""
        if not self.upper:
            return self
        first = split_layers(self.latents, self.upper)[0].contiguous()
        return LatentModel(self.loadings, self.intercept, first)

    def extrapolate(self, previous: "LatentModel", amount: float) -> "LatentModel":
        """Go on from ``previous`` to this model and beyond by ``amount`` of the way."""

        def beyond(new: Tensor, old: Tensor) -> Tensor:
            return torch.add(new, new - old, alpha=amount)

        return replace(
            self,
            loadings=beyond(self.loadings, previous.loadings),
            intercept=beyond(self.intercept, previous.intercept),
            latents=beyond(self.latents, previous.latents),
        )
