"""Convolutional loadings, against torch's own convolutions and the model with dense loadings."""

import copy

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import log_joint
from scipy.stats import multivariate_normal
from sklearn.datasets import load_digits
from torch.nn import functional

from skdeq import DEQClassifier, ExpFamilyDEQ
from skdeq._convolution import Convolution
from skdeq._data import to_observations
from skdeq._fit import _working_residuals
from skdeq._latents import LatentSolver, solve_latents
from skdeq._loadings import KernelLoadings
from skdeq._observations import Observations
from skdeq._setting import Setting
from skdeq._stochastic import envelope_gradient
from skdeq.families import get_family

GEOMETRIES = [
    ((1, 8, 8), (3, 3), 1),
    ((1, 8, 8), (4, 4), 4),
    ((1, 8, 6), (3, 5), 2),
    ((2, 7, 9), (5, 3), 2),
    ((3, 5, 5), (2, 2), 3),
]


def convolve(convolution, kernels, latents):
    """The images of some maps by torch's transposed convolution, cropped."""
    channels, height, width = convolution.image_shape
    kernel = convolution.kernel_size
    rows, columns = convolution.map_shape
    images = functional.conv_transpose2d(
        latents.reshape(len(latents), len(kernels), rows, columns),
        kernels.reshape(len(kernels), channels, *kernel),
        stride=convolution.stride,
    )
    # Kernels may leave a margin uncovered, or hang over by as much on either side.
    over = [max(0, images.shape[2] - height) // 2, max(0, images.shape[3] - width) // 2]
    images = functional.pad(images, (0, width, 0, height))
    images = images[:, :, over[0] : over[0] + height, over[1] : over[1] + width]
    return images.reshape(len(latents), -1)


@pytest.mark.parametrize(("image_shape", "kernel_size", "stride"), GEOMETRIES)
def test_matrix_is_a_transposed_convolution_and_pull_its_adjoint(image_shape, kernel_size, stride):
    convolution = Convolution(image_shape, kernel_size, stride)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    kernels = draw(3, convolution.n_weights)
    W = convolution.matrix(kernels)
    z, y = draw(4, W.shape[1]), draw(4, W.shape[0])
    torch.testing.assert_close(z @ W.T, convolve(convolution, kernels, z))
    # <W z, y> = <z, W^T y>, with torch's derivative of its convolution as W^T.
    z.requires_grad_()
    (adjoint,) = torch.autograd.grad(convolve(convolution, kernels, z), z, y)
    torch.testing.assert_close(y @ W, adjoint)
    torch.testing.assert_close(
        (convolve(convolution, kernels, z.detach()) * y).sum(), (z.detach() * (y @ W)).sum()
    )
    # The matrix as a function of the kernels has `pull` as its adjoint.
    other = draw(*W.shape)
    torch.testing.assert_close((W * other).sum(), (kernels * convolution.pull(other)).sum())
    covered = convolution.kernels(W)
    inside = convolution.kernels(torch.ones_like(W)) > 0
    torch.testing.assert_close(covered[inside], kernels[inside])


def digits(n=300):
    X, y = load_digits(return_X_y=True)
    return (X[:n] > 7).astype(float), y[:n]


def fitted(
    family="bernoulli", X=None, k=2, kernel_size=3, stride=2, image_shape=(8, 8), **options
):
    options = {"max_iter": 10, "tol": 1e-2, "random_state": 0, **options}
    model = ExpFamilyDEQ(
        k,
        family=family,
        loadings="conv2d",
        image_shape=image_shape,
        kernel_size=kernel_size,
        stride=stride,
        **options,
    )
    return model.fit(digits()[0] if X is None else X)


@pytest.mark.parametrize("family", ["gaussian", "bernoulli", "poisson"])
def test_latents_are_stationary_points_with_torch_convolutions(family):
    X = np.round(load_digits().data[:120]) if family != "bernoulli" else digits(120)[0]
    model = fitted(family, X, fixed_point_tol=1e-10, whiten=True)
    result = model.map_latents(X)
    assert result.converged.all()
    z = torch.from_numpy(result.value).requires_grad_()
    convolution = Convolution((1, 8, 8), (3, 3), 2)
    kernels = convolution.kernels(torch.from_numpy(model.loadings_))
    eta = convolve(convolution, kernels, z) + torch.from_numpy(model.intercept_)
    joint = get_family(family).log_prob(torch.from_numpy(X), eta).sum() - z.square().sum() / 2
    (gradient,) = torch.autograd.grad(joint, z)
    assert float(gradient.abs().max()) < 1e-6


def test_score_of_gaussian_images_is_that_of_their_normal_law():
    X = load_digits().data[:150] / 4
    model = fitted("gaussian", X, alpha=0.8)
    W = model.loadings_
    law = multivariate_normal(model.intercept_, W @ W.T / 0.8 + np.eye(64))
    np.testing.assert_allclose(model.score_samples(X), law.logpdf(X), rtol=1e-8)


def test_gradient_in_the_kernels_is_that_of_the_minimised_objective():
    convolution = Convolution((1, 6, 5), (3, 3), 2)
    rng = np.random.default_rng(0)
    X = torch.from_numpy(rng.poisson(1.0, size=(9, 30)).astype(float))
    free = KernelLoadings(convolution)
    setting = Setting(get_family("poisson"), Observations(X), 1.2, 0.3, loadings=free)
    parameters = [torch.from_numpy(rng.normal(size=shape) / 2) for shape in ((2, 9), (30,))]

    def objective():
        solved = solve_latents(setting, free.model(parameters), LatentSolver("newton", 1e-13, 99))
        return envelope_gradient(setting, parameters, solved.value)

    gradients, _ = objective()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        for place in ((0,) * parameter.dim(), (-1,) * parameter.dim()):
            ends = []
            for sign in (1, -1):
                parameter[place] += sign * 1e-5
                ends.append(objective()[1])
                parameter[place] -= sign * 1e-5
            numeric = (ends[0] - ends[1]) / 2e-5
            assert float(gradient[place]) == pytest.approx(numeric, rel=1e-5, abs=1e-8)


def test_kernels_are_recovered_from_images_made_with_them():
    convolution = Convolution((1, 9, 9), (3, 3), 3)
    rng = np.random.default_rng(0)
    kernels = np.linalg.qr(rng.normal(size=(9, 2)))[0].T * 3
    W = convolution.matrix(torch.from_numpy(kernels)).numpy()
    X = rng.normal(size=(600, W.shape[1])) @ W.T + rng.normal(size=(600, 81))
    model = fitted("gaussian", X, image_shape=(9, 9), stride=3, max_iter=60, tol=1e-5)
    found = model.kernels_.reshape(2, 9)
    np.testing.assert_allclose(found @ found.T, np.eye(2), atol=1e-12)
    cosines = np.linalg.svd(found @ kernels.T / 3, compute_uv=False)
    assert cosines.min() > 0.98


def test_scores_are_maps_in_the_basis_of_the_kernels():
    X, _ = digits()
    model = fitted()
    scores = model.transform(X)
    assert scores.shape == (300, 2 * 4 * 4)
    assert model.kernels_.shape == (2, 1, 3, 3)
    assert model.components_.shape == (32, 64)
    assert len(model.get_feature_names_out()) == 32
    convolution = Convolution((1, 8, 8), (3, 3), 2)
    kernels = torch.from_numpy(model.kernels_.reshape(2, -1))
    images = convolve(convolution, kernels, torch.from_numpy(scores)).numpy()
    latents = model.map_latents(X).value
    np.testing.assert_allclose(images, latents @ model.loadings_.T, atol=1e-9)
    np.testing.assert_allclose(
        model.inverse_transform(scores), 1 / (1 + np.exp(-images - model.intercept_)), rtol=1e-9
    )
    variances = scores.reshape(300, 2, 16).var(0).mean(1)
    assert variances[0] >= variances[1]


def test_shares_of_the_kernels_add_up_to_what_their_images_explain():
    X = load_digits().data[:150]
    model = fitted("gaussian", X)
    assert len(model.explained_deviance_ratio_) == 2
    left = np.square(X - model.inverse_transform(model.transform(X))).sum()
    expected = 1 - left / np.square(X - X.mean(axis=0)).sum()
    assert model.explained_deviance_ratio_.sum() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_array])
def test_gaps_and_sparse_rows(layout):
    X = np.round(load_digits().data[:120])
    X[np.random.default_rng(0).random(X.shape) < 0.1] = np.nan
    X[7] = np.nan
    options = {"fixed_point_tol": 1e-10, "alpha": 1.3, "whiten": True}
    expected = fitted("poisson", X, **options)
    model = fitted("poisson", layout(X), **options)
    # Sums in another order: what a dozen steps of Adam make of rounding.
    np.testing.assert_allclose(model.loadings_, expected.loadings_, atol=1e-7)
    result = model.map_latents(layout(X))
    assert result.converged.all()
    assert not result.value[7].any()
    assert np.isfinite(model.score_samples(layout(X))).all()
    # Rows are at rest under what is seen of them alone.
    z, x = torch.from_numpy(result.value).requires_grad_(), torch.from_numpy(X)
    (gradient,) = torch.autograd.grad(log_joint(model, x, z).sum(), z)
    assert float(gradient.abs().max()) < 1e-8


def test_gaps_say_nothing_of_the_first_kernels():
    X = torch.from_numpy(np.round(load_digits().data[:120]))
    holes = X.masked_fill(torch.rand(X.shape) < 0.2, torch.nan)
    mean = holes.nanmean(0).clamp_min(0.1)
    # An entry at its mean has no residual.
    filled = torch.where(torch.isnan(holes), mean, holes)
    family, convolution = get_family("poisson"), Convolution((1, 8, 8), (3, 3), 2)
    kernels = [
        first_kernels(family, convolution, one, mean.log(), None) for one in (holes, filled)
    ]
    torch.testing.assert_close(*kernels)


def first_kernels(family, convolution, X, intercept, weight, offset=None):
    observations = to_observations(X, family, X.device)
    setting = Setting(family, observations, 1.0, 0.1, weight, offset)
    return convolution.start(_working_residuals(setting, intercept), weight, 2)


def test_first_kernels_are_those_at_unit_exposure():
    X = torch.from_numpy(np.round(load_digits().data[:120]))
    family, convolution = get_family("poisson"), Convolution((1, 8, 8), (3, 3), 2)
    intercept = X.mean(0).clamp_min(0.1).log()
    exposure = torch.linspace(0.1, 10, 120, dtype=X.dtype)
    kernels = [
        first_kernels(family, convolution, X, intercept, None),
        first_kernels(
            family, convolution, X * exposure.unsqueeze(1), intercept, None, exposure.log()
        ),
    ]
    torch.testing.assert_close(*kernels)


def test_first_kernels_are_of_rows_from_all_over(monkeypatch):
    # Sorted by digit, the first hundred would be zeros and ones alone.
    digits = load_digits()
    X = digits.data[np.argsort(digits.target, kind="stable")]
    residuals, start = [], Convolution.start

    def spy(convolution, residual, *args):
        residuals.append(residual)
        return start(convolution, residual, *args)

    monkeypatch.setattr(Convolution, "start", spy)
    monkeypatch.setattr("skdeq._fit._PATCHED_ROWS", 100)
    fitted("gaussian", X=X, max_iter=1)
    expected = (X[::18] - X.mean(0)) / 2
    np.testing.assert_allclose(residuals[0].numpy(), expected, atol=1e-4)


def test_weights_of_a_minibatch_are_repetition():
    X = digits(60)[0]
    weight = np.random.default_rng(0).integers(1, 4, size=60)
    # One minibatch, in which the order of the rows does not count, and from the same kernels: the
    # first ones are those of the rows without their weights.
    start = fitted(X=X, batch_size=200, max_iter=4, tol=1.0, warm_start=True)
    weighted, repeated = copy.deepcopy(start), copy.deepcopy(start)
    weighted.fit(X, sample_weight=weight)
    repeated.fit(np.repeat(X, weight, axis=0))
    assert np.abs(weighted.loadings_ - start.loadings_).max() > 1e-3
    np.testing.assert_allclose(weighted.loadings_, repeated.loadings_, atol=1e-7)
    np.testing.assert_allclose(weighted.transform(X), repeated.transform(X), atol=1e-6)
    np.testing.assert_allclose(
        weighted.explained_deviance_ratio_, repeated.explained_deviance_ratio_, atol=1e-7
    )
    expected = np.repeat(weighted.score_samples(X), weight).mean()
    assert weighted.score(X, sample_weight=weight) == pytest.approx(expected, rel=1e-10)


def test_module_keeps_the_kernels_tied_in_training():
    X, y = digits()
    backbone = fitted(fixed_point="newton")
    layer = backbone.to_module()
    names = {name for name, _ in layer.named_parameters()}
    assert names == {"intercept", "parametrizations.loadings.original"}
    output = layer(torch.from_numpy(X)).detach().numpy()
    np.testing.assert_allclose(output, backbone.transform(X), atol=1e-9)
    classifier = DEQClassifier(backbone, max_iter=3, head_layer_sizes=(), random_state=0)
    with pytest.warns(UserWarning, match="did not converge"):
        classifier.fit(X, y)
    tuned = classifier.backbone_
    convolution = Convolution((1, 8, 8), (3, 3), 2)
    trained = torch.from_numpy(tuned.loadings_)
    torch.testing.assert_close(convolution.matrix(convolution.kernels(trained)), trained)
    assert np.abs(tuned.loadings_ - backbone.loadings_).max() > 1e-4
    assert classifier.loss_curve_[-1] < classifier.loss_curve_[0]
    # Of ten classes, after three epochs.
    assert classifier.score(X, y) > 0.5


def test_streams_and_warm_starts_keep_the_kernels_tied():
    X, _ = digits()
    model = fitted(warm_start=True, learning_rate=0.005)
    before = model.loss_curve_[-1]
    for _ in range(5):
        model.partial_fit(X)
    convolution = Convolution((1, 8, 8), (3, 3), 2)
    W = torch.from_numpy(model.loadings_)
    torch.testing.assert_close(convolution.matrix(convolution.kernels(W)), W)
    assert model.loss_curve_[-1] < before
    assert model.set_params(max_iter=2, tol=1.0).fit(X).loss_curve_[0] < before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_shape": None}, "needs image_shape"),
        ({"image_shape": (8, 9)}, "has 72 pixels, but X has 64 features"),
        ({"image_shape": (64,)}, "must be 2 or 3 integers"),
        ({"image_shape": (8.0, 8)}, "must be 2 or 3 integers"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size must be 2 integers"),
        ({"k": 10}, "more than the 9 weights of a kernel"),
        ({"hidden_layer_sizes": (4,)}, "is for one layer of latents"),
        ({"solver": "scoring"}, "one layer of dense loadings"),
        ({"kernel_size": 0}, "kernel_size"),
    ],
)
def test_bad_geometry_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        fitted(**options)


def test_weights_of_the_first_kernels_are_repetition():
    X = torch.from_numpy(np.round(load_digits().data[:60]))
    weight = torch.from_numpy(np.random.default_rng(0).integers(1, 4, 60))
    family, convolution = get_family("poisson"), Convolution((1, 8, 8), (3, 3), 2)
    repeated = X.repeat_interleave(weight, 0)
    intercept = repeated.mean(0).clamp_min(0.1).log()
    kernels = [
        first_kernels(family, convolution, one, intercept, w)
        for one, w in ((X, weight.double()), (repeated, None))
    ]
    torch.testing.assert_close(*kernels)


def test_the_way_back_from_scores_is_that_of_the_whole_matrix():
    convolution = Convolution((1, 6, 6), (3, 3), 2)
    change = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    change[:, 2] = 0
    to_scores = convolution.everywhere(change)
    expected = torch.linalg.pinv(to_scores)
    found = KernelLoadings(convolution).from_scores(to_scores)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_first_kernels_do_not_depend_on_the_patches_at_a_time(monkeypatch):
    convolution = Convolution((1, 6, 6), (3, 3), 1)
    residual = torch.randn(50, 36, generator=torch.Generator().manual_seed(0))
    weight = torch.rand(50, generator=torch.Generator().manual_seed(1))
    whole = convolution.start(residual, weight, 3)
    monkeypatch.setattr("skdeq._convolution._PATCH_ENTRIES", 1000)
    torch.testing.assert_close(convolution.start(residual, weight, 3), whole)
