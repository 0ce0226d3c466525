"""The equilibrium layer: gradients against gradcheck, unrolling and the estimator."""

import io

import numpy as np
import pytest
import torch
from conftest import CUDA, FAMILY_OBJECTS, sample
from torch import nn

from skdeq import ExpFamilyDEQ
from skdeq.families import get_family
from skdeq.nn import EquilibriumLayer

PAIRS = [
    *((family, "identity") for family in FAMILY_OBJECTS),
    ("gaussian", "tanh"),
    ("bernoulli", "softplus"),
    ("poisson", "softplus"),
]


def layer(family="poisson", canonical_map="identity", **options):
    """Layer with the loadings of a fitted model, so that no row is at the edge of the domain."""
    deq = ExpFamilyDEQ(
        2, family=family, canonical_map=canonical_map, random_state=0, whiten=True, **options
    )
    X = sample(family)
    module = deq.fit(X).to_module()
    module.tol = 1e-12
    return module, torch.from_numpy(X), deq


def as_function(module):
    """The module as a function of inputs, loadings and intercept."""

    def function(x, loadings, intercept):
        parameters = {"loadings": loadings, "intercept": intercept}
        return torch.func.functional_call(module, parameters, (x,))

    return function


def arguments(module, x):
    inputs = (x, module.loadings.detach(), module.intercept.detach())
    return tuple(one.clone().requires_grad_() for one in inputs)


@pytest.mark.parametrize(("family", "canonical_map"), PAIRS, ids=str)
def test_gradcheck_in_inputs_loadings_and_intercept(family, canonical_map):
    module, x, _ = layer(family, canonical_map)
    assert torch.autograd.gradcheck(as_function(module), arguments(module, x[:3]))


def test_gradcheck_with_missing_entries_and_exposure():
    module, x, _ = layer("poisson", exposure="total")
    x = x[:4] + 1
    holes = x.clone()
    holes[1, 3] = holes[2, 0] = torch.nan
    observed = ~torch.isnan(holes)

    def function(x, loadings, intercept):
        return as_function(module)(torch.where(observed, x, torch.nan), loadings, intercept)

    assert torch.autograd.gradcheck(function, arguments(module, x))
    module(holes).sum().backward()
    assert torch.isfinite(module.loadings.grad).all()


@pytest.mark.parametrize("family", ["bernoulli", "gaussian"])
def test_agrees_with_unrolling(family):
    module, x, _ = layer(family)
    x = x[:5]
    law = get_family(family)
    loadings, intercept = (one.detach() for one in (module.loadings, module.intercept))
    loadings = (0.3 * loadings).requires_grad_()
    z = torch.zeros(5, 2, dtype=x.dtype)
    for _ in range(200):
        # The map damped by half: it contracts for these loadings.
        z = 0.5 * z + 0.5 * (x - law.mean(z @ loadings.T + intercept)) @ loadings
    (unrolled,) = torch.autograd.grad(z.square().sum(), loadings)
    ours = as_function(module)(x, loadings, intercept)
    np.testing.assert_allclose(ours.detach(), z.detach(), atol=1e-10)
    (implicit,) = torch.autograd.grad(ours.square().sum(), loadings)
    np.testing.assert_allclose(implicit, unrolled, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("exposure", [None, "total"])
def test_module_of_an_estimator_is_its_transform(whiten, dtype, exposure):
    X = sample("poisson").astype(dtype)
    X[3, 2] = X[5] = np.nan
    deq = ExpFamilyDEQ(2, family="poisson", exposure=exposure, whiten=whiten, random_state=0)
    deq.fit(X)
    module = deq.to_module()
    out = module(torch.from_numpy(X))
    assert out.dtype == module.loadings.dtype
    tolerance = 1e-4 if dtype == np.float32 else 1e-6
    np.testing.assert_allclose(out.detach(), deq.transform(X), atol=tolerance)
    assert module.certify(torch.from_numpy(X)).converged.all()
    # Training the module leaves the estimator as it was.
    before = deq.loadings_.copy()
    with torch.no_grad():
        module.loadings += 1
    np.testing.assert_array_equal(deq.loadings_, before)


@pytest.mark.parametrize("canonical_map", ["relu", "softplus", "tanh"])
def test_module_through_a_map_is_the_transform(canonical_map):
    module, x, deq = layer("gaussian", canonical_map)
    module.tol = deq.fixed_point_tol
    np.testing.assert_allclose(module(x).detach(), deq.transform(x.numpy()), atol=1e-10)


def test_second_derivatives_are_refused():
    module, x, _ = layer("poisson")
    (slope,) = torch.autograd.grad(module(x).square().sum(), module.intercept, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_inputs_of_other_types_and_none_at_all():
    module, x, deq = layer("poisson")
    np.testing.assert_allclose(module(x.int()).detach(), module(x).detach())
    assert module(x[:0]).shape == (0, 2)
    assert module.certify(x[:0]).converged.shape == (0,)
    with pytest.raises(ValueError, match="x must have shape"):
        module(x[:0, 1:])
    fresh = EquilibriumLayer(9, 2, family="poisson").double()
    scores = deq.set_params(whiten=False).to_module()
    fresh.load_state_dict(scores.state_dict())
    np.testing.assert_allclose(fresh(x).detach(), scores(x).detach(), atol=1e-6)


def saved_bytes(module, x):
    """Bytes that autograd keeps between forward and backward."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(sizes)


def test_memory_of_backward_does_not_grow_with_the_iterations():
    module, x, _ = layer("poisson")
    module.max_iter, module.tol = 1, 0.0
    few = saved_bytes(module, x)
    module.max_iter = 40
    assert saved_bytes(module, x) == few


@pytest.mark.parametrize("family", FAMILY_OBJECTS, ids=str)
def test_trains_from_scratch_in_a_sequence(family):
    torch.manual_seed(0)
    x = torch.from_numpy(sample(family)).float()
    target = x.mean(1, keepdim=True)
    target = (target - target.mean()) / target.std()
    network = nn.Sequential(EquilibriumLayer(9, 3, family=family), nn.Linear(3, 1))
    optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = (network(x) - target).square().mean()
        loss.backward()
        assert all(torch.isfinite(one.grad).all() for one in network.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_saves_and_loads_by_state_dict():
    module, x, deq = layer("poisson", exposure="total")
    fresh = deq.to_module()
    with torch.no_grad():
        fresh.loadings.zero_()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file))
    np.testing.assert_allclose(fresh(x).detach(), module(x).detach(), atol=1e-6)
    assert set(module.state_dict()) == {"loadings", "intercept", "exposure_profile"}


def test_compiled_layer_gives_the_same_result():
    module, x, _ = layer("poisson")
    # The solver stays outside the graph; what surrounds it is traced.
    compiled = torch.compile(module, backend="eager")
    np.testing.assert_allclose(compiled(x).detach(), module(x).detach(), atol=1e-12)
    compiled(x).sum().backward()
    assert torch.isfinite(module.loadings.grad).all()


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_devices(device):
    module, x, _ = layer("poisson")
    expected = module(x).detach()
    out = module.to(device)(x.to(device))
    np.testing.assert_allclose(out.detach().cpu(), expected, atol=1e-8)
    out.sum().backward()


def test_bad_arguments_are_refused_in_words():
    with pytest.raises(ValueError, match="alpha, the prior precision"):
        EquilibriumLayer(4, 2, alpha=0.0)
    with pytest.raises(ValueError, match="Unknown family"):
        EquilibriumLayer(4, 2, family="poison")
    with pytest.raises(ValueError, match="fixed_point must be 'auto' or 'newton'; got 'picard'"):
        EquilibriumLayer(4, 2, fixed_point="picard")
    with pytest.raises(ValueError, match=r"x must have shape \(n, 4\); got \(3, 5\)"):
        EquilibriumLayer(4, 2)(torch.ones(3, 5))
    assert "family=Gamma(shape=1.0)" in repr(EquilibriumLayer(4, 2, family="gamma"))
