"""Small data sets made from the models themselves, one for each family."""

import os

import numpy as np
import pytest
import torch

from skdeq.families import (
    FAMILIES,
    Binomial,
    Gamma,
    NegativeBinomial,
    get_canonical_map,
    get_family,
)

if "PYTEST_XDIST_WORKER" in os.environ:
    # One core for each worker; more threads than cores hold each other up.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Let what a test draws from the global generators be the same in every run."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002, random_state=None is that generator


CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


def sample(family, n=80, p=9, k=2, seed=0):
    """Observations from a model of rank k in the family's natural parameters."""
    rng = np.random.default_rng(seed)
    family = get_family(family)
    eta = rng.normal(size=(n, k)) @ rng.normal(size=(k, p)) * 0.6 + 0.3 * rng.normal(size=p)
    if isinstance(family, NegativeBinomial | Gamma):
        eta = -np.exp(0.5 * eta)
    mean = family.mean(torch.from_numpy(eta)).numpy()
    name = family.name
    if name == "gaussian":
        return eta + rng.normal(size=(n, p))
    if name == "bernoulli":
        return (rng.random((n, p)) < mean).astype(float)
    if name == "binomial":
        return rng.binomial(family.n_trials, mean / family.n_trials).astype(float)
    if name == "poisson":
        return rng.poisson(mean).astype(float)
    if name == "continuous_bernoulli":
        return np.clip(mean + 0.1 * rng.normal(size=(n, p)), 0, 1)
    if name == "negative_binomial":
        size = 1 / family.dispersion
        return rng.negative_binomial(size, size / (size + mean)).astype(float)
    if name == "gamma":
        return rng.gamma(family.shape, mean / family.shape) + 1e-6
    assert name == "rademacher"
    return np.where(rng.random((n, p)) < (1 + mean) / 2, 1.0, -1.0)


def layers_of(model):
    """Loadings and intercepts of every layer as tensors."""
    pairs = [(model.loadings_, model.intercept_)]
    pairs += zip(model.hidden_loadings_, model.hidden_intercepts_, strict=True)
    return [tuple(map(torch.from_numpy, pair)) for pair in pairs]


def log_joint(model, x, *parts):
    """Log joint density of rows and their latents in each layer, with torch's normal law."""
    (loadings, intercept), *upper = layers_of(model)
    family = get_family(model.family)
    canonical_map = get_canonical_map(model.canonical_map).of(family)
    eta = canonical_map.value(parts[0] @ loadings.T + intercept)
    seen = ~torch.isnan(x)
    terms = family.log_prob(torch.where(seen, x, 1.0), eta)
    total = torch.where(seen, terms, 0.0).sum(-1)
    above = get_canonical_map(model.hidden_map).value
    means = [above(z @ W.T + b) for (W, b), z in zip(upper, parts[1:], strict=True)]
    means.append(torch.zeros_like(parts[-1]))
    for part, mean in zip(parts, means, strict=True):
        total = total + torch.distributions.Normal(mean, model.alpha**-0.5).log_prob(part).sum(-1)
    return total


FAMILY_OBJECTS = [
    *(name for name in FAMILIES),
    Binomial(n_trials=3),
    NegativeBinomial(dispersion=0.5),
    Gamma(shape=2.0),
]
