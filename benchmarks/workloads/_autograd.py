"""The two models as one would write them in torch without skdeq: autograd and its optimisers."""

import numpy as np
import torch
from sklearn.base import BaseEstimator
from torch.nn import functional as F

from benchmarks.implicit_em.measures import DEFAULT_EPOCHS
from benchmarks.implicit_em.speed import autograd_epoch


class JointAdam(BaseEstimator):
    """Bernoulli model with latents, loadings and intercept as parameters of one Adam.

    The objective is that of `ExpFamilyDEQ`: the mean negative log-likelihood of a row and the two
    penalties.
    """

    def __init__(
        self, n_components=2, *, alpha=1.0, weight_decay=0.03, max_iter=200, learning_rate=0.05
    ):
        self.n_components = n_components
        self.alpha, self.weight_decay = alpha, weight_decay
        self.max_iter, self.learning_rate = max_iter, learning_rate

    def fit(self, X):
        rows = torch.from_numpy(X)
        n, p = rows.shape
        generator = torch.Generator().manual_seed(0)
        frequency = rows.mean(0).clamp(0.5 / n, 1 - 0.5 / n)
        self.intercept = torch.logit(frequency).requires_grad_()
        self.loadings = torch.randn(p, self.n_components, generator=generator)
        self.loadings = self.loadings.mul_(0.1).requires_grad_()
        self.latents = torch.randn(n, self.n_components, generator=generator)
        self.latents = self.latents.mul_(0.1).requires_grad_()
        self._minimise(rows, self.latents, [self.latents, self.loadings, self.intercept])
        self.n_iter_ = self.max_iter
        return self

    def transform(self, X):
        """Descend in the latents alone."""
        self.loadings.requires_grad_(False)
        self.intercept.requires_grad_(False)
        latents = torch.zeros(len(X), self.n_components, requires_grad=True)
        self._minimise(torch.from_numpy(X), latents, [latents])
        return latents.detach().numpy()

    def _minimise(self, rows, latents, parameters):
        optimiser = torch.optim.Adam(parameters, lr=self.learning_rate)
        for _ in range(self.max_iter):
            optimiser.zero_grad()
            eta = torch.addmm(self.intercept, latents, self.loadings.T)
            loss = F.binary_cross_entropy_with_logits(eta, rows, reduction="sum")
            loss = (loss + 0.5 * self.alpha * latents.square().sum()) / len(rows)
            loss = loss + 0.5 * self.weight_decay * self.loadings.square().sum()
            loss.backward()
            optimiser.step()

    def inverse_transform(self, Z):
        eta = torch.addmm(self.intercept, torch.from_numpy(Z), self.loadings.T)
        return torch.sigmoid(eta).detach().numpy()

    def parameters(self):
        """Return loadings, intercept and training latents as arrays."""
        parts = (self.loadings, self.intercept, self.latents)
        return tuple(one.detach().numpy() for one in parts)


class AutogradEncoder(BaseEstimator):
    """The encoder's linear layer and ReLU, trained by `backward` and torch's SGD."""

    def __init__(self, n_components=64, *, max_iter=DEFAULT_EPOCHS):
        self.n_components, self.max_iter = n_components, max_iter

    def fit(self, X):
        self.layer, epoch = autograd_epoch(X, self.n_components)
        for _ in range(self.max_iter):
            epoch()
        self.n_iter_ = self.max_iter
        return self

    @torch.no_grad()
    def transform(self, X):
        return torch.relu(self.layer(torch.from_numpy(X))).numpy()


def bernoulli_objective(X, loadings, intercept, latents, *, alpha, weight_decay):
    """Return the penalised negative log-likelihood of a row, in float64."""
    total = 0.0
    for start in range(0, len(X), 1000):
        rows = slice(start, start + 1000)
        eta = (latents[rows] @ loadings.T + intercept).astype(np.float64)
        total += np.logaddexp(0, eta).sum() - (X[rows] * eta).sum()
    total += 0.5 * alpha * np.square(latents, dtype=np.float64).sum()
    return total / len(X) + 0.5 * weight_decay * np.square(loadings, dtype=np.float64).sum()
