"""The network on top of the latents, as it is kept and as it predicts."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

__all__ = ["Head", "outputs_of"]

Values = TypeVar("Values", np.ndarray, torch.Tensor)


@dataclass
class Head:
    """ReLU network on centred and scaled latents, as numpy arrays.

    Attributes
    ----------
    centre, scale : ndarray of shape (k,)
        Means of the latents before training, and the root mean square deviation of all.
    coefs : list of ndarray of shape (n_in, n_out)
    intercepts : list of ndarray of shape (n_out,)
    """

    centre: np.ndarray
    scale: np.ndarray
    coefs: list[np.ndarray]
    intercepts: list[np.ndarray]

    @classmethod
    def start(
        cls,
        latents: np.ndarray,
        sample_weight: np.ndarray | None,
        hidden: tuple[int, ...],
        n_outputs: int,
        generator: torch.Generator,
    ) -> "Head":
        """Head before training, its weights drawn as those of ``torch.nn.Linear`` are."""
        centre = np.average(latents, axis=0, weights=sample_weight)
        # One scale for all latents: they share a prior and their rotation is arbitrary, so that to
        # stretch each to unit variance would make what says little as loud as what says much.
        spread = np.average(np.square(latents - centre), axis=0, weights=sample_weight).mean()
        scale = np.full_like(centre, np.sqrt(spread if spread > 1e-12 else 1.0))
        sizes = (latents.shape[1], *hidden, n_outputs)
        coefs, intercepts = [], []
        for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True):
            drawn = torch.rand(
                n_in + 1, n_out, generator=generator, dtype=torch.float64, device="cpu"
            )
            drawn = ((2 * drawn - 1) / n_in**0.5).numpy().astype(latents.dtype)
            coefs.append(drawn[:-1])
            intercepts.append(drawn[-1])
        return cls(centre, scale, coefs, intercepts)

    def silence(self, outputs: np.ndarray) -> None:
        """Set some outputs, bool (n_outputs,), to zero: they stay there while their targets do."""
        self.coefs[-1][:, outputs] = 0
        self.intercepts[-1][outputs] = 0

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """Compute the outputs (n, n_outputs)."""
        values = (latents - self.centre) / self.scale
        return outputs_of(values, self.coefs, self.intercepts).astype(latents.dtype)

    def modules(
        self, mean: np.ndarray, unit: np.ndarray, dtype: torch.dtype
    ) -> list[torch.nn.Module]:
        """Make torch modules of it that take latents as they are.

        Parameters
        ----------
        mean, unit : ndarray of shape (n_outputs,) or ()
            What is added to the outputs, after they have been multiplied by the unit.
        dtype : torch.dtype

        Returns
        -------
        list of Linear and ReLU, in turn
        """
        coefs = [coef.astype(np.float64) for coef in self.coefs]
        intercepts = [intercept.astype(np.float64) for intercept in self.intercepts]
        coefs[0] = coefs[0] / self.scale[:, np.newaxis]
        intercepts[0] = intercepts[0] - self.centre @ coefs[0]
        coefs[-1], intercepts[-1] = coefs[-1] * unit, intercepts[-1] * unit + mean
        made: list[torch.nn.Module] = []
        for coef, intercept in zip(coefs, intercepts, strict=True):
            # Its weights are not drawn, which would move torch's global generator.
            linear = torch.nn.utils.skip_init(torch.nn.Linear, *coef.shape, dtype=dtype)
            linear.weight.data.copy_(torch.from_numpy(coef.T))
            linear.bias.data.copy_(torch.from_numpy(intercept))
            made += [linear, torch.nn.ReLU()]
        return made[:-1]


def outputs_of(values: Values, coefs: list[Values], intercepts: list[Values]) -> Values:
    """Compute the outputs (n, n_outputs) of a ReLU network, of arrays or tensors (n, k)."""
    for coef, intercept in zip(coefs[:-1], intercepts[:-1], strict=True):
        values = (values @ coef + intercept).clip(min=0)
    return values @ coefs[-1] + intercepts[-1]
