"""The objective of the encoder against autograd, mpmath and numpy."""

import mpmath
import numpy as np
import pytest
import torch

from skdeq.objectives import (
    ACTIVATIONS,
    VARIANCE_FLOOR,
    BatchObjective,
    ObjectiveWeights,
    PairActivation,
    log_sum_exp,
    responsibilities,
    weight_redundancy,
)

PAIR = PairActivation(torch.square, lambda a: 2 * a)
ALL_ACTIVATIONS = [*ACTIVATIONS.values(), PAIR]
WEIGHTS = ObjectiveWeights(lse=7.0, variance=1.3, decorrelation=0.7)


def plain_terms(distance, sample_weight=None):
    """Terms as they are defined, for autograd: repetition by weights, n - 1, correlations."""
    n = len(distance)
    weight = distance.new_ones(n) if sample_weight is None else sample_weight
    total = weight.sum()
    centred = distance - weight @ distance / total
    covariance = (centred * weight.unsqueeze(1)).T @ centred / (total - 1)
    variance = covariance.diagonal() + VARIANCE_FLOOR
    correlation = covariance / torch.outer(variance, variance).sqrt()
    off = correlation - torch.diag(correlation.diagonal())
    lse = -(weight @ torch.logsumexp(-distance, 1)) / total
    return torch.stack([lse, -variance.log().sum(), off.square().sum()])


def plain_loss(distance, weights, sample_weight=None):
    return plain_terms(distance, sample_weight) @ weights.vector[:3].to(distance)


def distances(n=40, k=7, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator, dtype=torch.float64).mul(2).abs().to(dtype)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-7), (torch.float64, 1e-15)], ids=["single", "double"]
)
@pytest.mark.parametrize("seed", range(3))
def test_gradient_of_log_sum_exp_is_the_responsibility(dtype, bound, seed):
    distance = torch.randn(
        64, 128, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)
    distance.requires_grad_()
    (gradient,) = torch.autograd.grad(log_sum_exp(distance).sum(), distance)
    share = responsibilities(distance.detach())
    assert float((gradient - share).abs().max()) < bound
    np.testing.assert_allclose(share.sum(1), 1, rtol=10 * bound)


def test_log_sum_exp_agrees_with_mpmath_at_extremes():
    rows = [[0.0, 0.0, 0.0], [1e4, 1e4 + 1, 2e4], [-700.0, 5.0, 900.0], [1e-9, 1e-12, 0.0]]
    ours = log_sum_exp(torch.tensor(rows, dtype=torch.float64))
    with mpmath.workdps(50):
        exact = [float(-mpmath.log(sum(mpmath.exp(-mpmath.mpf(d)) for d in row))) for row in rows]
    np.testing.assert_allclose(ours, exact, rtol=1e-14)


@pytest.mark.parametrize("weighted", [False, True])
def test_terms_and_gradient_agree_with_autograd(weighted):
    distance = distances().requires_grad_()
    weight = None
    if weighted:
        weight = torch.linspace(0.5, 3, len(distance), dtype=torch.float64)
    (expected,) = torch.autograd.grad(plain_loss(distance, WEIGHTS, weight), distance)
    objective = BatchObjective(WEIGHTS, *distance.shape, distance.detach())
    gradient = objective(distance.detach(), weight)
    terms = plain_terms(distance.detach(), weight)
    np.testing.assert_allclose(objective.terms, terms, rtol=1e-13)
    assert float((gradient - expected).abs().max()) < 1e-12


@pytest.mark.parametrize("activation", ALL_ACTIVATIONS, ids=lambda activation: activation.name)
@pytest.mark.parametrize("single", ["lse", "variance", "decorrelation", "all"])
def test_gradient_in_the_weights_agrees_with_autograd(activation, single):
    weights = WEIGHTS
    if single != "all":
        weights = ObjectiveWeights(**dict.fromkeys(["lse", "variance", "decorrelation"], 0.0))
        weights = ObjectiveWeights(**{**weights.__dict__, single: 1.7})
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    layer = torch.randn(9, 6, generator=generator, dtype=torch.float64).requires_grad_()
    loss = plain_loss(activation.value(rows @ layer.T), weights)
    (expected,) = torch.autograd.grad(loss, layer)
    with torch.no_grad():
        preactivation = rows @ layer.T
        distance = torch.empty_like(preactivation)
        activation.value_into(preactivation, distance)
        gradient = BatchObjective(weights, *distance.shape, distance)(distance)
        activation.multiply_derivative_(gradient, preactivation, distance)
    assert float((gradient.T @ rows - expected).abs().max()) < 1e-10 * max(
        1, float(expected.abs().max())
    )


@pytest.mark.parametrize("activation", ALL_ACTIVATIONS, ids=lambda activation: activation.name)
def test_derivative_of_the_activation_agrees_with_autograd(activation):
    a = torch.tensor([[-800.0, -30.0, -1.0, -1e-9, 1e-9, 0.3, 30.0, 800.0]], dtype=torch.float64)
    a.requires_grad_()
    (expected,) = torch.autograd.grad(activation.value(a).sum(), a)
    np.testing.assert_allclose(activation.derivative(a.detach()), expected, rtol=1e-14, atol=0)
    out = torch.empty_like(a)
    activation.value_into(a.detach(), out)
    np.testing.assert_array_equal(out, activation.value(a.detach()))


def test_softplus_agrees_with_mpmath_where_torch_cuts_it_off():
    a = torch.tensor([[-40.0, -1.0, 0.0, 19.0, 21.0, 35.0]], dtype=torch.float64)
    exact = [float(mpmath.log1p(mpmath.exp(value))) for value in a[0].tolist()]
    np.testing.assert_allclose(ACTIVATIONS["softplus"].value(a)[0], exact, rtol=1e-13)


def test_dead_component_has_a_finite_loss_and_no_gradient_of_its_own():
    distance = distances()
    distance[:, 3] = 0
    objective = BatchObjective(ObjectiveWeights(0.0, 1.0, 1.0), *distance.shape, distance)
    gradient = objective(distance)
    assert torch.isfinite(gradient).all()
    assert torch.isfinite(objective.terms).all()
    assert not gradient[:, 3].any()
    alive = [0, 1, 2, 4, 5, 6]
    rest = BatchObjective(ObjectiveWeights(0.0, 1.0, 1.0), 40, 6, distance)
    np.testing.assert_allclose(gradient[:, alive], rest(distance[:, alive]), atol=1e-12)
    np.testing.assert_allclose(
        objective.terms[1] - rest.terms[1], -np.log(VARIANCE_FLOOR), rtol=1e-12
    )


def test_weights_equal_repetition():
    distance = distances(12)
    weight = torch.tensor([1, 2, 3, 1, 1, 4, 2, 1, 1, 1, 2, 3])
    repeated = distance.repeat_interleave(weight, 0)
    one = BatchObjective(WEIGHTS, *distance.shape, distance, longest=0.3)
    two = BatchObjective(WEIGHTS, *repeated.shape, repeated, longest=0.3)
    gradient = one(distance, weight.double())
    summed = torch.zeros_like(gradient)
    summed.index_add_(0, torch.arange(12).repeat_interleave(weight), two(repeated))
    np.testing.assert_allclose(one.terms, two.terms, rtol=1e-13)
    np.testing.assert_allclose(gradient, summed, atol=1e-13)


def test_weights_that_sum_to_one_are_a_distribution():
    distance = distances()
    share = torch.full((40,), 1 / 40, dtype=torch.float64)
    objective = BatchObjective(WEIGHTS, *distance.shape, distance)
    gradient = objective(distance, share).clone()
    assert torch.isfinite(gradient).all()
    plain = BatchObjective(WEIGHTS, *distance.shape, distance)
    np.testing.assert_allclose(gradient, plain(distance), atol=1e-5)


def test_longest_bounds_the_gradient_of_each_component_and_no_other():
    distance = distances()
    free = BatchObjective(WEIGHTS, *distance.shape, distance)(distance).clone()
    norm = free.norm(dim=0)
    limit = float(norm.median())
    cut = BatchObjective(WEIGHTS, *distance.shape, distance, longest=limit)(distance)
    expected = free * (limit / norm).clamp_max(1)
    np.testing.assert_allclose(cut, expected, atol=1e-14)
    assert (norm > limit).any()


def test_weight_redundancy_agrees_with_autograd_and_numpy():
    weights = distances(9, 6) - 1
    value, gradient = weight_redundancy(weights)
    unit = weights.numpy() / np.linalg.norm(weights.numpy(), axis=1, keepdims=True)
    expected = np.linalg.norm(unit @ unit.T - np.eye(9)) ** 2
    np.testing.assert_allclose(value, expected, rtol=1e-13)
    leaf = weights.clone().requires_grad_()
    normalised = torch.nn.functional.normalize(leaf, dim=1)
    gap = normalised @ normalised.T - torch.eye(9, dtype=torch.float64)
    (slope,) = torch.autograd.grad(gap.square().sum(), leaf)
    np.testing.assert_allclose(gradient, slope, atol=1e-12)
    value, gradient = weight_redundancy(torch.zeros(3, 2))
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_elementwise_in_any_shape(name):
    activation, a = ACTIVATIONS[name], torch.linspace(-3, 3, 8, dtype=torch.float64)
    for function in (activation.value, activation.derivative):
        assert function(a[0]).shape == ()
        np.testing.assert_array_equal(function(a), function(a.view(2, 2, 2)).flatten())
