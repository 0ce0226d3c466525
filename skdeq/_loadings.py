"""What is free in a model: all loadings, or the kernels of which they are made.

Whatever fits a model by its gradient moves a list of tensors, and asks here what they are.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from skdeq._convolution import Convolution
from skdeq._latent_model import LatentModel
from skdeq._rotation import orthonormal_scores

__all__ = ["FreeLoadings", "KernelLoadings", "Loadings", "Pins"]


@dataclass(frozen=True)
class Pins:
    """Columns that a fit leaves alone: no loadings, and an intercept that is given.

    Attributes
    ----------
    columns : Tensor of int, shape (m,)
    intercept : Tensor of shape (m,), float64
    """

    columns: Tensor
    intercept: Tensor

    def hold_(self, intercept: Tensor, loadings: Tensor | None = None) -> None:
        """Set the intercepts (p,) in place and, where they are free, the loadings (p, k)."""
        intercept[self.columns] = self.intercept.to(intercept.dtype)
        if loadings is not None:
            loadings[self.columns] = 0


@dataclass(frozen=True)
class FreeLoadings:
    """Dense loadings, each entry of which is free, of one layer or of several.

    The free parameters are loadings and intercept of each layer side by side (p, k + 1), from the
    data to the top.

    Attributes
    ----------
    convolution : None
        No convolution ties them.
    own : int
        Place, among the parameters, of those that each feature has to itself; those before serve
        all features, those after belong to the layers above.
    may_be_turned : bool
        Whether latents of one layer may be turned and stretched, and the loadings the other way.
    """

    convolution: ClassVar[None] = None
    own: ClassVar[int] = 0
    may_be_turned: ClassVar[bool] = True

    def __str__(self) -> str:
        return "dense"

    def n_latents(self, n_components: int) -> int:
        """Say how many latents so many components have."""
        return n_components

    def check_data(self, n_components: int, n: int, p: int, found: str) -> None:
        """Refuse more components than n rows of p features have; ``found`` names both."""
        if n_components > min(n, p):
            raise ValueError(
                f"n_components={n_components} is more than min(n_samples, n_features)="
                f"{min(n, p)} ({found})."
            )

    def parameters(self, model: LatentModel) -> list[Tensor]:
        """Return what is free in a model, in memory of its own."""
        return model.matrices()

    def model(self, parameters: list[Tensor]) -> LatentModel:
        """Make a model, still without latents, of its free parameters."""
        return LatentModel.of(parameters)

    def gradients(self, of_matrices: list[Tensor]) -> list[Tensor]:
        """Gradients in the parameters from those in the matrices (p, k + 1) of all layers."""
        return of_matrices

    def intercept(self, parameters: list[Tensor]) -> Tensor:
        """View of the intercepts (p,) next to the data."""
        return parameters[0][:, -1]

    def principal(
        self, loadings: Tensor, covariance: Tensor, jacobian: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Components and the map to scores, as :func:`orthonormal_scores` has them."""
        return orthonormal_scores(loadings, covariance, jacobian)

    def from_scores(self, to_scores: Tensor) -> Tensor:
        """Pseudo-inverse (k, k) of the map from latents to scores."""
        return torch.linalg.pinv(to_scores)

    def hold_(self, parameters: list[Tensor], pins: Pins) -> None:
        """Take back, in place, what the parameters of columns that are not fitted have moved."""
        pins.hold_(parameters[0][:, -1], parameters[0][:, :-1])


@dataclass(frozen=True)
class KernelLoadings:
    """Loadings that are a convolution with kernels.

    The free parameters are the kernels (K, weights) and the intercept (p,).

    Parameters
    ----------
    convolution : Convolution

    Attributes
    ----------
    own : int
    may_be_turned : bool
        As in :class:`FreeLoadings`.
    """

    convolution: Convolution
    own: ClassVar[int] = 1
    may_be_turned: ClassVar[bool] = False

    def __str__(self) -> str:
        return str(self.convolution)

    def n_latents(self, n_components: int) -> int:
        """Say how many latents so many components have, one at each place of each map."""
        return n_components * self.convolution.n_places

    def check_data(self, n_components: int, n: int, p: int, found: str) -> None:
        """Refuse rows that are no images of the shape; ``found`` is of no account."""
        pixels = self.convolution.n_pixels
        if pixels != p:
            channels, *shape = self.convolution.image_shape
            given = tuple(shape) if channels == 1 else (channels, *shape)
            raise ValueError(f"image_shape={given!r} has {pixels} pixels, but X has {p} features.")

    def parameters(self, model: LatentModel) -> list[Tensor]:
        """Return what is free in a model, in memory of its own."""
        return [self.convolution.kernels(model.loadings), model.intercept.clone()]

    def model(self, parameters: list[Tensor]) -> LatentModel:
        """Make a model, still without latents, of its free parameters."""
        kernels, intercept = parameters
        return LatentModel(self.convolution.matrix(kernels), intercept.clone())

    def gradients(self, of_matrices: list[Tensor]) -> list[Tensor]:
        """Gradients in the parameters from that in the matrix (p, k + 1) of the one layer."""
        (of_matrix,) = of_matrices
        return [self.convolution.pull(of_matrix[:, :-1]), of_matrix[:, -1]]

    def intercept(self, parameters: list[Tensor]) -> Tensor:
        """View of the intercepts (p,)."""
        return parameters[1]

    def principal(
        self, loadings: Tensor, covariance: Tensor, jacobian: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Components and the map to scores that turn the kernels, at all places alike.

        Parameters
        ----------
        loadings, covariance, jacobian : Tensor
            As :func:`orthonormal_scores` has them; of one layer the last is the identity.

        Returns
        -------
        components : Tensor of shape (K * places, p), float64
            Of orthonormal kernels.
        to_scores : Tensor of shape (K * places, K * places), float64
        """
        kernels = self.convolution.kernels(loadings)
        shared = self.convolution.shared(covariance)
        untouched = torch.eye(len(kernels), device="cpu").to(shared)
        turned, change = orthonormal_scores(kernels.T, shared, untouched)
        return self.convolution.matrix(turned).T, self.convolution.everywhere(change)

    def from_scores(self, to_scores: Tensor) -> Tensor:
        """Pseudo-inverse (K * places, K * places) of the map from latents to scores."""
        every = self.convolution.n_places
        change = to_scores[::every, ::every]
        return self.convolution.everywhere(torch.linalg.pinv(change))

    def hold_(self, parameters: list[Tensor], pins: Pins) -> None:
        """Take back, in place, what the intercepts that are not fitted have moved."""
        pins.hold_(parameters[1])


Loadings = FreeLoadings | KernelLoadings
