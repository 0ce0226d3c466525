"""The equilibrium layer: gradients against gradcheck, unrolling and the estimator."""

import copy
import io
import logging
import math
import warnings

import numpy as np
import pytest
import torch
from conftest import CUDA, FAMILY_OBJECTS, sample
from sklearn.exceptions import ConvergenceWarning
from torch import nn
from torch.utils.checkpoint import checkpoint

from skdeq import ExpFamilyDEQ
from skdeq.families import Binomial, CanonicalMap, Interval, ReLU, get_family
from skdeq.implicit import attach_gradient
from skdeq.nn import EquilibriumLayer

PAIRS = [
    *((family, "identity") for family in FAMILY_OBJECTS),
    ("gaussian", "tanh"),
    ("bernoulli", "softplus"),
    ("poisson", "softplus"),
    ("negative_binomial", "log"),
    ("gamma", "log"),
]
ALPHA = 1.3


def layer(family="poisson", canonical_map="identity", **options):
    """Layer with the loadings of a fitted model, so that no row is at the edge of the domain."""
    # At a precision of one, what multiplies and what divides by it are the same.
    options = {"random_state": 0, "whiten": True, "alpha": ALPHA, **options}
    deq = ExpFamilyDEQ(2, family=family, canonical_map=canonical_map, **options)
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
        z = 0.5 * z + 0.5 * (x - law.mean(z @ loadings.T + intercept)) @ loadings / ALPHA
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


@pytest.mark.parametrize("hidden", [(), (4,)])
def test_module_has_the_options_of_the_estimator(hidden):
    X = sample("poisson")
    options = {"alpha": 3.0, "fixed_point_tol": 1e-9, "fixed_point_max_iter": 77}
    options |= {"hidden_layer_sizes": hidden, "max_iter": 5, "tol": 1.0, "random_state": 0}
    deq = ExpFamilyDEQ(2, family="poisson", **options).fit(X)
    module = deq.to_module()
    assert (module.alpha, module.tol, module.max_iter) == (3.0, 1e-9, 77)
    # Both solve their rows to 1e-9.
    out = module(torch.from_numpy(X)).detach()
    np.testing.assert_allclose(out, deq.transform(X), atol=1e-7)


@pytest.mark.parametrize("canonical_map", ["relu", "softplus", "tanh"])
def test_module_through_a_map_is_the_transform(canonical_map):
    module, x, deq = layer("gaussian", canonical_map)
    module.tol = deq.fixed_point_tol
    np.testing.assert_allclose(module(x).detach(), deq.transform(x.numpy()), atol=1e-10)


@pytest.mark.parametrize("compiled", [False, True])
def test_second_derivatives_are_refused(compiled):
    module, x, _ = layer("poisson")
    function = torch.compile(module, backend="eager") if compiled else module
    x.requires_grad_()
    # The gradient that comes in may depend on nothing, or on the output.
    for power in (1, 2):
        with pytest.raises(RuntimeError, match="has no second derivative: create_graph=True asks"):
            torch.autograd.grad((function(x) ** power).sum(), x, create_graph=True)
        (slope,) = torch.autograd.grad((function(x) ** power).sum(), x)
        assert not slope.requires_grad


def test_minimisers_are_derived_within_a_compiled_graph():
    a = torch.tensor([[3.0]], requires_grad=True)

    def minimiser(a):
        return attach_gradient(torch.tensor([[3.0]]), lambda z: z - a, torch.ones(1, 1, 1)) ** 2

    compiled = torch.compile(minimiser, backend="eager", fullgraph=True)
    (slope,) = torch.autograd.grad(compiled(a).sum(), a)
    assert slope.tolist() == [[6.0]]
    with pytest.raises(RuntimeError, match="has no second derivative: create_graph=True asks"):
        torch.autograd.grad(compiled(a).sum(), a, create_graph=True)


def test_first_derivatives_by_checkpoint_and_jacobian():
    module, x, _ = layer("poisson")
    x = x[:3].requires_grad_()
    (expected,) = torch.autograd.grad(module(x).sum(), x)
    for use_reentrant in (False, True):
        out = checkpoint(module, x, use_reentrant=use_reentrant)
        out.sum().backward()
        np.testing.assert_array_equal(x.grad, expected)
        x.grad = None
    jacobian = torch.autograd.functional.jacobian(module, x)
    np.testing.assert_allclose(jacobian.sum((0, 1)), expected, atol=1e-12)


def test_autocast_changes_nothing():
    module, x, _ = layer("poisson", exposure="total", whiten=False)
    module, x = module.float(), x.float()
    expected = module(x)
    (slope,) = torch.autograd.grad(expected.sum(), module.loadings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, certified = module(x), module.certify(x)
    assert out.dtype == torch.float32
    np.testing.assert_array_equal(out.detach(), expected.detach())
    np.testing.assert_array_equal(certified.value, module.certify(x).value)
    np.testing.assert_array_equal(torch.autograd.grad(out.sum(), module.loadings)[0], slope)


def test_inputs_of_other_types_and_none_at_all():
    module, x, deq = layer("poisson")
    np.testing.assert_allclose(module(x.int()).detach(), module(x).detach())
    assert module(x[:0]).shape == (0, 2)
    assert module.certify(x[:0]).converged.shape == (0,)
    with pytest.raises(ValueError, match="x must have shape"):
        module(x[:0, 1:])
    fresh = EquilibriumLayer(9, 2, family="poisson", alpha=ALPHA).double()
    scores = deq.set_params(whiten=False).to_module()
    fresh.load_state_dict(scores.state_dict())
    np.testing.assert_allclose(fresh(x).detach(), scores(x).detach(), atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"canonical_map": "softplus"}, {"hidden_layer_sizes": (4,)}], ids=str
)
def test_no_rows_at_all_have_gradients_of_zero(options):
    module = EquilibriumLayer(9, 2, family="bernoulli", **options)
    module(torch.ones(0, 9)).sum().backward()
    assert all(one.grad.eq(0).all() for one in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_types_are_refused_in_words(dtype):
    module = EquilibriumLayer(9, 2, family="bernoulli").to(dtype)
    for method in (module, module.certify):
        with pytest.raises(TypeError, match=f"float32 or float64, but its loadings are {dtype}"):
            method(torch.ones(3, 9))


@pytest.mark.parametrize("compiled", [False, True])
def test_rows_that_are_not_solved_are_warned_of_once(compiled):
    torch.manual_seed(0)
    options = {"canonical_map": "softplus", "hidden_layer_sizes": (4,)}
    module = EquilibriumLayer(10, 3, family="bernoulli", **options).double()
    x = (torch.rand(20, 10) > 0.5).double()
    function = torch.compile(module, backend="eager") if compiled else module
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        function(x)
        module.max_iter = 2
        left = int((~module.certify(x).converged).sum())
    assert 0 < left < 20
    with pytest.warns(ConvergenceWarning, match=f"{left} of 20 rows .* max_iter=2") as caught:
        function(x)
    assert sum(one.category is ConvergenceWarning for one in caught) == 1


@pytest.mark.parametrize("family", ["poisson", "gaussian", "gamma"])
@pytest.mark.parametrize("far", [-300.0, 100.0, 300.0, 1e30, torch.inf, torch.nan])
def test_a_start_that_is_far_off_does_not_lead_astray(family, far):
    module, x, _ = layer(family)
    expected = module(x).detach()
    start = expected.clone()
    # Only some rows: those beside them start where they were told to.
    start[::2] = far
    np.testing.assert_allclose(module(x, start).detach(), expected, atol=1e-8)


@pytest.mark.parametrize("lead", [(), (1,), (6,), (2, 3), (2, 0), (1, 3, 2)], ids=str)
def test_rows_stand_in_any_number_of_dimensions(lead):
    """As those of ``torch.nn.Linear``."""
    module, x, _ = layer("poisson")
    x = x[: math.prod(lead)].clone()
    x[:1, 0] = torch.nan
    expected, slopes = module(x), []
    together = x.reshape(*lead, x.shape[1]).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for start in (None, expected.detach().reshape(*lead, 2)):
            found = module(together, start)
            assert found.shape == (*lead, 2)
            np.testing.assert_allclose(found.detach().reshape(-1, 2), expected.detach(), atol=1e-8)
            slopes.append(torch.autograd.grad(found.sum(), module.loadings)[0])
    np.testing.assert_array_equal(module.certify(together).value, module.certify(x).value)
    slope = torch.autograd.grad(expected.sum(), module.loadings)[0]
    np.testing.assert_allclose(slopes[0], slope, atol=1e-12)
    np.testing.assert_allclose(slopes[1], slope, atol=1e-6)


def test_start_is_converted_and_its_shape_checked():
    module, x, _ = layer("poisson")
    single = module(x).detach().float()
    np.testing.assert_allclose(module(x, single).detach(), module(x).detach(), atol=1e-10)
    np.testing.assert_allclose(module(x, single.int()).detach(), module(x).detach(), atol=1e-10)
    message = rf"start must have shape \({len(x)}, 2\), one row for each of x .* got \(3, 2\)"
    with pytest.raises(ValueError, match=message):
        module(x, single[:3])
    deep = EquilibriumLayer(9, 2, hidden_layer_sizes=(3,)).double()
    with pytest.raises(ValueError, match=r"the latents of all layers side by side; got"):
        deep(x, single)
    assert deep(x, torch.zeros(len(x), 5)).shape == (len(x), 2)


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
    with pytest.warns(ConvergenceWarning, match="are not solved"):
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


def test_states_of_another_type_are_loaded_in_the_layers_own():
    module, x, _ = layer("poisson", exposure="total", whiten=False)
    fresh = EquilibriumLayer(9, 2, family="poisson", alpha=ALPHA)
    fresh.load_state_dict(module.state_dict())
    assert {value.dtype for value in fresh.state_dict().values()} == {torch.float32}
    np.testing.assert_allclose(fresh(x).detach(), module(x).detach(), atol=1e-4)


def test_a_part_of_a_state_leaves_the_rest_alone():
    module, x, _ = layer("poisson", exposure="total", whiten=False)
    kept = module.rotation.clone(), module.exposure_profile.clone()
    module.load_state_dict({"intercept": torch.zeros(9)}, strict=False)
    assert torch.equal(module.rotation, kept[0])
    assert torch.equal(module.exposure_profile, kept[1])
    # A whole state without them takes them away.
    module.load_state_dict(EquilibriumLayer(9, 2).state_dict())
    assert module.rotation is None
    assert module.exposure_profile is None


@pytest.mark.parametrize("whiten", [False, True])
def test_the_state_of_a_convolution_decides_about_the_rotation(whiten):
    X = sample("poisson", p=16)
    options = {"loadings": "conv2d", "image_shape": (4, 4), "kernel_size": 2, "stride": 2}
    model = ExpFamilyDEQ(2, family="poisson", max_iter=3, tol=1, random_state=0, **options).fit(X)
    fresh = model.to_module()
    module = model.set_params(whiten=whiten).to_module()
    fresh.load_state_dict(module.state_dict())
    assert (fresh.rotation is None) == whiten
    x = torch.from_numpy(X)
    np.testing.assert_allclose(fresh(x).detach(), module(x).detach(), atol=1e-10)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_network_gives_the_same_result_without_a_word(backend, caplog):
    module, x, _ = layer("poisson")
    network = nn.Sequential(nn.Softplus(), module, nn.Linear(2, 3, dtype=x.dtype), nn.Tanh())
    # The layer stays outside the graph; what surrounds it is traced.
    compiled = torch.compile(network, backend=backend)
    np.testing.assert_allclose(compiled(x).detach(), network(x).detach(), atol=1e-12)
    (expected,) = torch.autograd.grad(network(x).sum(), module.loadings)
    compiled(x).sum().backward()
    np.testing.assert_allclose(module.loadings.grad, expected, atol=1e-12)
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_devices(device):
    module, x, _ = layer("poisson")
    expected = module(x).detach()
    out = module.to(device)(x.to(device))
    np.testing.assert_allclose(out.detach().cpu(), expected, atol=1e-8)
    out.sum().backward()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"in_features": 2.5}, ValueError, "integers of at least 1; got 2.5, \\(\\) and 2"),
        ({"n_components": 0}, ValueError, "integers of at least 1; got 4, \\(\\) and 0"),
        ({"hidden_layer_sizes": (3, 2.5)}, ValueError, "integers of at least 1"),
        ({"hidden_layer_sizes": 3}, TypeError, "must be a tuple of integers; got 3"),
        ({"alpha": float("inf")}, ValueError, "alpha, the prior precision .* got inf"),
        ({"alpha": "1"}, ValueError, "alpha, the prior precision .* got '1'"),
        ({"tol": float("nan")}, ValueError, "tol, the residual of a solved row, .* got nan"),
        ({"tol": -1}, ValueError, "tol, the residual of a solved row, .* got -1"),
        ({"max_iter": 0}, ValueError, "max_iter must be an integer of at least 1; got 0"),
        ({"max_iter": -3}, ValueError, "max_iter must be an integer of at least 1; got -3"),
        ({"max_iter": 2.5}, ValueError, "max_iter must be an integer of at least 1; got 2.5"),
    ],
    ids=str,
)
def test_bad_numbers_are_refused_in_words(options, error, message):
    with pytest.raises(error, match=message):
        EquilibriumLayer(**{"in_features": 4, "n_components": 2, **options})


def test_bad_arguments_are_refused_in_words():
    with pytest.raises(ValueError, match="alpha, the prior precision"):
        EquilibriumLayer(4, 2, alpha=0.0)
    with pytest.raises(ValueError, match="Unknown family"):
        EquilibriumLayer(4, 2, family="poison")
    with pytest.raises(ValueError, match="fixed_point must be 'auto' or 'newton'; got 'picard'"):
        EquilibriumLayer(4, 2, fixed_point="picard")
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 4\); got \(3, 5\)"):
        EquilibriumLayer(4, 2)(torch.ones(3, 5))
    with pytest.raises(TypeError, match="x must be a tensor; got ndarray"):
        EquilibriumLayer(4, 2)(np.ones((3, 4)))
    assert "family=Gamma(shape=1.0)" in repr(EquilibriumLayer(4, 2, family="gamma"))


def beyond(family="gamma"):
    """Layer whose intercept has left the domain, where zero is no start, and rows for it."""
    torch.manual_seed(0)
    module = EquilibriumLayer(10, 3, family=family, dtype=torch.float64)
    with torch.no_grad():
        module.intercept[0] = 0.01
    return module, torch.rand(6, 10, dtype=torch.float64) + 0.1


@pytest.mark.parametrize("family", ["gamma", "negative_binomial"])
def test_finds_a_start_inside_the_domain_where_zero_is_outside(family):
    module, x = beyond(family)
    latents = module(x)
    predictor = latents @ module.loadings.T + module.intercept
    assert bool((predictor < 0).all())
    energy = -module.family.log_prob(x, predictor).sum(1) + 0.5 * latents.square().sum(1)
    (slope,) = torch.autograd.grad(energy.sum(), latents)
    assert slope.abs().max() < 1e-8
    # From anywhere else it is the same, outside the domain as inside.
    elsewhere = module(x, start=latents.detach() + 0.1 * torch.randn(6, 3))
    torch.testing.assert_close(elsewhere, latents, atol=1e-6, rtol=0)
    torch.testing.assert_close(module(x, start=100 * latents.detach()), latents)
    # With layers above, too.
    options = {"hidden_layer_sizes": (3,), "dtype": torch.float64}
    deep = EquilibriumLayer(10, 2, family=family, **options)
    deep.loadings.data.copy_(module.loadings.data)
    deep.intercept.data.copy_(module.intercept.data)
    assert bool(deep.certify(x).converged.all())
    with torch.no_grad():
        torch.testing.assert_close(module(x), latents)
    assert torch.autograd.gradcheck(as_function(module), arguments(module, x), atol=1e-4)


def test_rows_beyond_the_domain_leave_the_gradients_of_the_others_alone():
    module, x = beyond()
    with torch.no_grad():
        module.loadings[0] = 0
    x[1:, 0] = torch.nan
    with pytest.warns(ConvergenceWarning, match=r"1 of 6 .*left the domain of Gamma.*clamp"):
        latents = module(x)
    assert bool(torch.isfinite(latents).all())
    latents.sum().backward()
    gradient = module.loadings.grad.clone()
    module.zero_grad()
    module(x[1:]).sum().backward()
    torch.testing.assert_close(module.loadings.grad, gradient)
    assert gradient.abs().max() > 0
    deep, x = beyond()
    deep = EquilibriumLayer(10, 3, hidden_layer_sizes=(4,), family="gamma", dtype=torch.float64)
    with torch.no_grad():
        deep.intercept[0], deep.loadings[0] = 0.01, 0.0
    x[1:, 0] = torch.nan
    (of_all,) = torch.autograd.grad(deep(x).sum(), deep.hidden_intercepts[0])
    (of_good,) = torch.autograd.grad(deep(x[1:]).sum(), deep.hidden_intercepts[0])
    torch.testing.assert_close(of_all, of_good)
    poisson = EquilibriumLayer(10, 3, family="poisson")
    with torch.no_grad():
        poisson.intercept[0] = 100.0
    x = x.float()
    x[:, 0] = torch.nan
    # Nothing is wrong with rows that do not see the feature.
    poisson(x).sum().backward()
    assert bool(torch.isfinite(poisson.loadings.grad).all())
    assert poisson.loadings.grad.abs().max() > 0
    with pytest.warns(ConvergenceWarning, match="not solved"):
        poisson(x.float().nan_to_num(1.0)).sum().backward()
    assert bool(torch.isfinite(poisson.loadings.grad).all())


@pytest.mark.parametrize("family", ["gamma", "negative_binomial"])
def test_training_beyond_the_domain_stays_finite(family):
    torch.manual_seed(0)
    network = nn.Sequential(EquilibriumLayer(10, 3, family=family), nn.Linear(3, 1))
    x = torch.exp(torch.randn(64, 10))
    x = x if family == "gamma" else x.round()
    label = (x[:, :1] > x[:, 1:2]).float()
    optimiser = torch.optim.Adam(network.parameters(), lr=0.03)
    losses = []
    for _ in range(200):
        loss = nn.functional.binary_cross_entropy_with_logits(network(x), label)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    ("alpha", "size", "family"),
    [(1e-7, 1.0, "gaussian"), (1e-9, 1.0, "poisson"), (1e-3, 100.0, "gaussian")],
)
def test_rows_for_which_float32_has_too_few_digits_are_not_certified(alpha, size, family):
    torch.manual_seed(0)
    single = EquilibriumLayer(20, 5, alpha=alpha, family=family)
    with torch.no_grad():
        single.loadings *= size
    double = copy.deepcopy(single).double()
    x = torch.poisson(torch.ones(16, 20))
    x[:8, 3:] = torch.nan
    with pytest.warns(ConvergenceWarning, match=r"8 of 16 rows .*convert the layer to float64"):
        latents = single(x)
    with (
        torch.no_grad(),
        pytest.warns(ConvergenceWarning, match="8 of 16 rows .*convert the layer to float64"),
    ):
        single(x)
    certificate = single.certify(x)
    np.testing.assert_array_equal(certificate.converged, np.arange(16) >= 8)
    expected = double(x.double())
    assert bool(double.certify(x.double()).converged.all())
    good = certificate.converged
    torch.testing.assert_close(latents[good].double(), expected[good], rtol=1e-3, atol=1e-3)


def test_parameters_are_drawn_anew_whatever_they_are_made_from():
    torch.manual_seed(0)
    X = (sample("bernoulli", n=100, p=64) > 0).astype(float)
    options = {"loadings": "conv2d", "image_shape": (8, 8), "kernel_size": 4, "stride": 4}
    with pytest.warns(ConvergenceWarning):
        model = ExpFamilyDEQ(4, family="bernoulli", max_iter=1, **options).fit(X)
    tied = model.to_module()
    normed = nn.utils.parametrizations.weight_norm(EquilibriumLayer(9, 2), "loadings")
    for module in (tied, normed):
        before = module.loadings.detach().clone()
        module.reset_parameters()
        assert (module.loadings - before).abs().max() > 0.01
        assert 0 < module.loadings.std() < 1


def test_a_state_that_is_refused_leaves_the_layer_usable():
    small, large = (EquilibriumLayer(20, k, family="poisson") for k in (2, 3))
    large.rotation = torch.eye(3)
    x = torch.ones(3, 20)
    expected = small(x)
    with pytest.raises(RuntimeError, match="size mismatch"):
        small.load_state_dict(large.state_dict())
    torch.testing.assert_close(small(x), expected)
    rotation = large.rotation
    with pytest.raises(RuntimeError, match="size mismatch"):
        large.load_state_dict(small.state_dict())
    assert large.rotation is rotation


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.to_sparse(), "to_dense"),
        (lambda x: x + 1j, "real numbers; got a tensor of torch.complex64"),
        (lambda x: x.to("meta"), "no numbers"),
    ],
)
def test_inputs_without_rows_of_real_numbers_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        EquilibriumLayer(4, 2)(make(torch.ones(3, 4)))
    with pytest.raises(TypeError, match=message):
        EquilibriumLayer(4, 2).certify(make(torch.ones(3, 4)))


def test_is_made_where_and_in_the_type_that_is_asked_for():
    module = EquilibriumLayer(4, 3, hidden_layer_sizes=(2,), dtype=torch.float64, device="meta")
    assert {(one.dtype, one.device.type) for one in module.parameters()} == {
        (torch.float64, "meta")
    }


def test_a_map_that_decreases_starts_from_zero():
    class LogRate(CanonicalMap):
        range = Interval(-math.inf, 0, False, False)

        def value(self, zeta):
            return -torch.exp(zeta)

        def derivative(self, zeta):
            return -torch.exp(zeta)

    module = EquilibriumLayer(10, 2, family="gamma", canonical_map=LogRate())
    assert not module.intercept.any()
    x = torch.rand(5, 10) + 0.5
    assert torch.isfinite(module(x)).all()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("options", [{}, {"hidden_layer_sizes": (3,)}], ids=str)
@pytest.mark.parametrize("family", ["poisson", "gaussian", "gamma"])
def test_a_row_with_an_infinite_entry_leaves_the_gradients_of_the_others(family, options):
    torch.manual_seed(0)
    module = EquilibriumLayer(4, 2, family=family, **options).double()
    x = torch.rand(8, 4, dtype=torch.float64) + 0.5
    module(x[1:]).square().sum().backward()
    expected = [one.grad.clone() for one in module.parameters()]
    x[0, 0] = torch.inf
    module.zero_grad()
    module(x)[1:].square().sum().backward()
    for one, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(one.grad, gradient)


@pytest.mark.parametrize("family", ["gaussian", "poisson", "bernoulli"])
@pytest.mark.parametrize(
    "options", [{"canonical_map": "relu"}, {"hidden_layer_sizes": (4,), "hidden_map": "relu"}]
)
def test_a_new_layer_does_not_start_on_a_kink(options, family):
    torch.manual_seed(0)
    layer = EquilibriumLayer(10, 2, family=family, **options).double()
    x = torch.from_numpy(sample(family, n=20, p=10))
    z = layer(x)
    assert (z != 0).any(1).sum() > 15
    z.sum().backward()
    assert max(float(one.grad.abs().max()) for one in layer.parameters()) < 1e3


def test_a_network_that_has_diverged_does_not_pass_for_missing_entries():
    torch.manual_seed(0)
    stem, layer = nn.Linear(4, 10), EquilibriumLayer(10, 2)
    x = torch.randn(6, 4)
    layer(stem(x))
    gaps = torch.randn(6, 10)
    gaps[3, 2] = torch.nan
    layer(gaps)
    layer(gaps.requires_grad_())
    with pytest.warns(RuntimeWarning, match="1 of 6 rows .* NaN, the first row 3, and NaN means"):
        layer(2 * gaps)
    with torch.no_grad():
        stem.weight[0, 0] = torch.nan
    with pytest.warns(RuntimeWarning, match="6 of 6 rows that a network made"):
        layer(stem(x))


@pytest.mark.parametrize("mask", ["off", "inputs"])
def test_layers_above_have_the_mask_of_the_model_alone(mask):
    with pytest.raises(ValueError, match=r"no joint density\. Use ReLU\(mask='latents'\)"):
        EquilibriumLayer(10, 2, hidden_layer_sizes=(4,), hidden_map=ReLU(mask))
    EquilibriumLayer(10, 2, hidden_layer_sizes=(4,), hidden_map=ReLU())


def test_float32_tells_the_sides_of_a_kink_apart():
    torch.manual_seed(0)
    layer = EquilibriumLayer(10, 2, canonical_map="relu")
    wide = copy.deepcopy(layer).double()
    x = torch.randn(50, 10)
    result = layer.certify(x)
    assert result.converged.all() and result.value.dtype == torch.float32
    z, exact = layer(x), wide(x.double())
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.double(), exact, rtol=1e-5, atol=1e-6)
    z.sum().backward()
    exact.sum().backward()
    for one, other in zip(layer.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-4)


def test_a_layer_keeps_the_law_that_it_was_made_with():
    X = sample("binomial")
    model = ExpFamilyDEQ(2, family=Binomial(20), random_state=0).fit(X)
    layer = model.to_module()
    before = layer(torch.from_numpy(X))
    model.set_params(family__n_trials=400)
    torch.testing.assert_close(layer(torch.from_numpy(X)), before, rtol=0, atol=0)
