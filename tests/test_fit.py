"""How a fit goes: the size of its minibatches, when it ends, and what the seed decides."""

import numpy as np
import pytest
import torch
from conftest import sample
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LinearRegression

import skdeq._fit as fit
from skdeq import ExpFamilyDEQ
from skdeq._balance import _balancing, _share_inside
from skdeq._latent_model import LatentModel
from skdeq._observations import Observations
from skdeq._scoring import Scoring
from skdeq._setting import Setting, null_model
from skdeq._trace import Trace
from skdeq.families import get_family


@pytest.mark.parametrize("batch_size", [5, 7, None])
def test_minibatches_have_the_size_asked_for(batch_size, monkeypatch):
    sizes, step = [], fit.solve_and_step

    def spy(batch, *args, **options):
        sizes.append(batch.observations.shape[0])
        return step(batch, *args, **options)

    monkeypatch.setattr(fit, "solve_and_step", spy)
    X = sample("gaussian", n=300)
    options = {"solver": "adam", "max_iter": 2, "tol": 1.0, "random_state": 0}
    deq = ExpFamilyDEQ(2, batch_size=batch_size, **options).fit(X)
    size = batch_size or 256
    assert sizes == deq.n_iter_ * [min(size, 300 - low) for low in range(0, 300, size)]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_fit_to_counts_over_decades_does_not_end_early():
    # Next to what the first iterations gain, what is left of the objective is next to nothing.
    rng = np.random.default_rng(1)
    latents = rng.normal(size=(300, 3))
    X = rng.poisson(np.exp(1.5 * latents @ rng.normal(size=(3, 30)))).astype(float)
    deq = ExpFamilyDEQ(3, family="poisson", random_state=0).fit(X)
    scores = deq.transform(X)
    assert LinearRegression().fit(scores, latents).score(scores, latents) > 0.98


def test_some_rows_are_enough_to_choose_a_start(monkeypatch):
    rng = np.random.default_rng(1)
    latents = rng.normal(size=(800, 3))
    X = rng.poisson(np.exp(1.5 * latents @ rng.normal(size=(3, 30)))).astype(float)
    deq = ExpFamilyDEQ(3, family="poisson", max_iter=300, tol=1e-8, random_state=0)
    objective = deq.fit(X).loss_curve_[-1]
    monkeypatch.setattr(fit, "_TRIAL_ROWS", 150)
    rows = []
    run = Scoring.run

    def spy(scoring, *args):
        rows.append(scoring.setting.observations.shape[0])
        return run(scoring, *args)

    monkeypatch.setattr(Scoring, "run", spy)
    assert deq.fit(X).loss_curve_[-1] == pytest.approx(objective, rel=1e-5)
    assert rows == [134, 134, 800]


def test_epochs_over_counts_over_decades_do_not_end_early():
    rng = np.random.default_rng(1)
    latents = rng.normal(size=(300, 3))
    X = rng.poisson(np.exp(1.5 * latents @ rng.normal(size=(3, 40)))).astype(float)
    deq = ExpFamilyDEQ(3, family="poisson", solver="adam", max_iter=60, random_state=0)
    # By then changes of half a percent of the objective are 1e-5 of the gain.
    with pytest.warns(ConvergenceWarning, match="increase max_iter or tol"):
        assert deq.fit(X).n_iter_ == 60


def test_rounding_of_large_centred_data_is_no_want_of_convergence():
    for seed in range(8):
        rng = np.random.default_rng(seed)
        X = 100 * rng.normal(size=(400, 2)) @ rng.normal(size=(2, 30)) + rng.normal(size=(400, 30))
        assert ExpFamilyDEQ(5, random_state=0).fit(X).converged_


@pytest.mark.parametrize("tol", [1e-2, 1e-4])
def test_a_fit_ends_when_two_iterations_in_a_row_gained_less_than_tol(tol):
    X = sample("poisson")
    deq = ExpFamilyDEQ(2, family="poisson", tol=tol, random_state=0).fit(X)
    curve = np.array(deq.loss_curve_)
    null = -stats.poisson.logpmf(X, X.mean(axis=0)).sum(axis=1).mean()
    still = curve[:-1] - curve[1:] <= tol * (null - curve[1:])
    twice = still[1:] & still[:-1]
    assert twice[-1] and not twice[:-1].any()


def test_the_seed_decides_on_the_start_of_large_data(monkeypatch):
    # Beyond so many entries the start is made from random directions, which no longer span all.
    monkeypatch.setattr("skdeq._spectral._EXACT_ENTRIES", 1000)
    X = np.random.default_rng(0).normal(size=(100, 40))
    one, two, three = (
        ExpFamilyDEQ(2, max_iter=1, tol=1.0, random_state=seed).fit(X).loadings_
        for seed in (0, 0, 1)
    )
    assert one.tobytes() == two.tobytes() != three.tobytes()
    assert np.abs(one - three).max() > 1e-6


@pytest.mark.parametrize("n_components", [9, 10])
def test_without_weight_decay_components_beyond_the_rank_are_empty(n_components):
    X = np.random.default_rng(0).normal(size=(100, 10))
    X[:, 4] = 1
    deq = ExpFamilyDEQ(n_components, alpha=1e-8, weight_decay=0).fit(X)
    scores = PCA(n_components).fit_transform(X)
    np.testing.assert_allclose(np.abs(deq.transform(X)), np.abs(scores), atol=1e-6)


@pytest.mark.parametrize("scale", [1e2, 1e3, 1e6])
def test_rounding_of_large_data_is_no_want_of_convergence(scale):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        X = rng.normal(size=(100, 20)) @ rng.normal(size=(20, 20)) * scale
        assert ExpFamilyDEQ(3, random_state=0).fit(X).converged_


def test_a_step_out_of_the_domain_is_not_taken_for_rounding():
    X = torch.from_numpy(sample("gamma", n=20, p=4))
    setting = Setting(get_family("gamma"), Observations(X), 1.0, 0.03)
    latents = torch.ones(20, 1, dtype=X.dtype)
    loadings, intercept = torch.zeros(4, 1, dtype=X.dtype), -torch.ones(4, dtype=X.dtype)
    loadings[0] = 2.0
    beyond = LatentModel(loadings, intercept, latents)
    scoring = Scoring(setting, Trace(*null_model(setting)), 1, 0.0)
    assert 0 < scoring._rounding(beyond, 5.0) < 1e-12


def test_balancing_of_latents_in_few_directions_makes_both_penalties_equal():
    generator = torch.Generator().manual_seed(0)
    latents, loadings = (
        torch.randn(50, k, generator=generator, dtype=torch.float64) for k in (2, 5)
    )
    latents = latents @ torch.randn(2, 5, generator=generator, dtype=torch.float64)
    # What rounding makes of zeros in float32.
    moment = latents.T @ latents / 50 - 1e-7 * torch.eye(5, dtype=torch.float64)
    assert torch.linalg.eigvalsh(moment)[0] < 0
    gram, ratio = loadings.T @ loadings, 0.1
    forward, backward = _balancing(moment, gram, ratio)
    identity = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(forward @ backward.T, identity, rtol=0, atol=1e-9)
    of_latents, of_loadings = forward.T @ moment @ forward, backward.T @ gram @ backward
    torch.testing.assert_close(of_latents, ratio * of_loadings, rtol=0, atol=1e-2)
    sizes = of_loadings.diagonal()
    torch.testing.assert_close(of_loadings, torch.diag(sizes), rtol=0, atol=1e-9)
    assert (sizes.diff() < 0).all()


def test_latents_are_centred_as_far_as_intercepts_stay_within_their_limits():
    generator = torch.Generator().manual_seed(0)
    loadings = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    intercept = torch.zeros(6, dtype=torch.float64)
    low, high = torch.full_like(intercept, -0.3), torch.full_like(intercept, 0.1)
    model = LatentModel(loadings, intercept, torch.zeros(1, 2, dtype=torch.float64))
    for shift in (torch.tensor([1.0, 2.0]).double(), torch.tensor([-3.0, 1.0]).double()):
        share = _share_inside(model, shift, low, high)
        moved = share * (loadings @ shift)
        assert 0 < share < 1
        # To where the first of them meets its limit.
        assert float(torch.maximum(moved / high, moved / low).max()) == pytest.approx(1)
    assert _share_inside(model, 1e-3 * shift, low, high) == 1
