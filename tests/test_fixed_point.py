"""Fixed-point solvers: agreement with each other and with scipy, safeguards, row independence."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import sample
from scipy.optimize import minimize

from skdeq import ExpFamilyDEQ
from skdeq._fixed_point_problem import certified_residual
from skdeq._latent_starts import _gradient_at_zero
from skdeq._map_problem import MapProblem
from skdeq._newton import NewtonSystems
from skdeq._observations import CompressedRows, Observations
from skdeq.families import FAMILIES, Bernoulli, Gamma, Gaussian, Poisson, get_family
from skdeq.fixed_point import (
    SOLVERS,
    FixedPointResult,
    anderson,
    newton,
    picard,
)


def make_problem(family="bernoulli", n=30, p=9, k=2, alpha=1.0, scale=1.0, curvature=None, **more):
    """Problem of the latents for data of that family, loadings of the given scale."""
    generator = torch.Generator().manual_seed(1)
    family = get_family(family)
    X = torch.from_numpy(sample(family, n, p, k))
    loadings = scale * torch.randn(p, k, generator=generator, dtype=torch.float64)
    offset = family.link(X.mean(0))
    if not family.domain.contains(torch.zeros(1)).item():
        loadings = 0.1 * loadings
    penalty = torch.full((k,), alpha, dtype=torch.float64)
    return MapProblem(
        family, loadings, Observations(X), penalty, offset=offset, curvature=curvature, **more
    )


def zeros(problem):
    return torch.zeros(problem.n_rows, problem.r, dtype=torch.float64)


def every(problem):
    return torch.arange(problem.n_rows)


@pytest.mark.parametrize("name", FAMILIES)
def test_solvers_agree_where_the_map_contracts(name):
    # A strong prior makes the equilibrium layer a contraction for every family.
    problem = make_problem(name, alpha=60.0, scale=0.5)
    results = {
        solver: SOLVERS[solver](problem, zeros(problem), tol=1e-13, max_iter=2000)
        for solver in SOLVERS
    }
    for solver, result in results.items():
        assert isinstance(result, FixedPointResult)
        assert result.converged.all(), solver
        torch.testing.assert_close(result.value, results["newton"].value, rtol=0, atol=1e-11)


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-6])
@pytest.mark.parametrize("solver", [anderson, picard])
@pytest.mark.parametrize("family", ["bernoulli", "poisson"])
def test_certificates_hold_at_the_very_point(family, solver, tol):
    # Far from the start the curvature, which is the scale, is a fraction of what it was there.
    curvature = torch.full((60,), 0.25, dtype=torch.float64) if family == "bernoulli" else None
    options = {"alpha": 0.1, "scale": 3.0} if family == "bernoulli" else {"alpha": 30.0}
    problem = make_problem(family, 100, 60, 20, curvature=curvature, shared_map=True, **options)
    result = solver(problem, zeros(problem), tol=tol, max_iter=1000)
    _, residual = problem.gradient(result.value, every(problem))
    assert result.converged.any()
    assert (residual[result.converged] <= tol * (1 + 1e-9)).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_newton_where_the_map_does_not_contract(name):
    problem = make_problem(name, alpha=1e-3, scale=3.0)
    result = newton(problem, zeros(problem), tol=1e-10, max_iter=100)
    assert result.converged.all()
    gradient, residual = problem.gradient(result.value, every(problem))
    # The point returned is one Newton step beyond the certificate.
    assert (residual <= 1e-10).all()
    # The plain map does not contract here: its Jacobian at the solution exceeds one.
    hessian = problem.derivatives(result.value, every(problem))[2]
    curvature = torch.linalg.eigvalsh(hessian)[:, -1] - 1e-3
    assert (curvature / 1e-3 > 1).any()


@pytest.mark.parametrize("name", FAMILIES)
def test_solution_is_the_minimum_scipy_finds(name):
    problem = make_problem(name, n=4)
    result = newton(problem, zeros(problem), tol=1e-12, max_iter=100)
    for row in range(4):
        index = torch.tensor([row])

        def fun(z, index=index):
            z = torch.from_numpy(z[None])
            value = problem.objective(z, index)
            gradient, _ = problem.gradient(z, index)
            return min(float(value[0]), 1e300), np.nan_to_num(gradient[0].numpy())

        reference = minimize(fun, np.zeros(2), jac=True, method="BFGS", options={"gtol": 1e-10})
        np.testing.assert_allclose(result.value[row], reference.x, atol=1e-7)
        assert float(problem.objective(result.value[index], index)) <= reference.fun + 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_do_not_depend_on_their_neighbours(solver):
    problem = make_problem("poisson", alpha=20.0, scale=0.5)
    together = SOLVERS[solver](problem, zeros(problem), tol=1e-9, max_iter=500)
    for row in (0, 7, 29):
        alone = problem.chunk(row, row + 1)
        result = SOLVERS[solver](alone, zeros(alone), tol=1e-9, max_iter=500)
        torch.testing.assert_close(result.value[0], together.value[row], rtol=0, atol=1e-13)
        assert result.n_iter[0] == together.n_iter[row]


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solved_row_costs_nothing_more(solver, monkeypatch):
    problem = make_problem("poisson", alpha=20.0, scale=0.5)
    start = newton(problem, zeros(problem), tol=1e-12, max_iter=100).value
    start[5] = 3.0
    asked = []
    original = MapProblem._accumulate

    def spy(self, z, rows, **what):
        asked.append(len(rows))
        return original(self, z, rows, **what)

    monkeypatch.setattr(MapProblem, "_accumulate", spy)
    result = SOLVERS[solver](problem, start, tol=1e-8, max_iter=500)
    assert asked[0] == 30
    assert max(asked[1:]) == 1
    assert result.n_iter[5] > 0
    assert result.n_iter.sum() == result.n_iter[5]


def test_anderson_needs_fewer_iterations_than_picard():
    problem = make_problem("bernoulli", alpha=8.0)
    slow = picard(problem, zeros(problem), tol=1e-10, max_iter=1000)
    fast = anderson(problem, zeros(problem), tol=1e-10, max_iter=1000)
    assert slow.converged.all() and fast.converged.all()
    assert fast.n_iter.double().mean() < 0.7 * slow.n_iter.double().mean()


def test_picard_is_damped_where_the_map_expands():
    problem = make_problem("gaussian", alpha=0.5, scale=1.0)
    result = picard(problem, zeros(problem), tol=1e-8, max_iter=5000)
    assert result.converged.all()
    exact = newton(problem, zeros(problem), tol=1e-12, max_iter=10)
    torch.testing.assert_close(result.value, exact.value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_running_out_of_iterations_is_reported(solver):
    problem = make_problem("poisson", alpha=1e-4, scale=3.0)
    result = SOLVERS[solver](problem, zeros(problem), tol=1e-12, max_iter=2)
    assert not result.converged.all()
    assert torch.isfinite(result.value).all()
    # The best point is returned, never one worse than the start.
    at_start = problem.gradient(zeros(problem), every(problem))[1]
    assert (result.residual <= at_start).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_shared_curvature_changes_the_path_not_the_solution(name):
    curvature = torch.full((9,), 0.2, dtype=torch.float64)
    problem = make_problem(name, alpha=1.0, scale=0.5, curvature=curvature)
    result = anderson(problem, zeros(problem), tol=1e-12, max_iter=500)
    exact = newton(problem, zeros(problem), tol=1e-12, max_iter=100)
    assert result.converged.all()
    torch.testing.assert_close(result.value, exact.value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_derivatives_match_autograd(name):
    problem = make_problem(name, n=5)
    family = problem.family
    design, offset = problem.design, problem._design.expand[problem.r]
    X = problem.observations.values
    z = 0.1 * torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def objective(point):
        eta = point @ design.T + offset
        terms = family.log_partition(eta) - X * eta
        return terms.sum(1) + 0.5 * point.square().sum(1)

    value, gradient, hessian, _ = problem.derivatives(z, torch.arange(5))
    torch.testing.assert_close(value, objective(z), rtol=1e-12, atol=1e-10)
    point = z.clone().requires_grad_()
    expected = torch.autograd.grad(objective(point).sum(), point)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)
    for row in range(5):
        exact = torch.autograd.functional.hessian(
            lambda one, row=row: objective(torch.cat([z[:row], one[None], z[row + 1 :]]))[row],
            z[row],
        )
        torch.testing.assert_close(hessian[row], exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("curvature", [None, 0.25])
@pytest.mark.parametrize("name", FAMILIES)
def test_entries_without_loadings_only_add_to_the_objective(name, curvature):
    # They are left out of every pass over the data; next to nothing for a loading keeps them in.
    family, X = get_family(name), torch.from_numpy(sample(name, 20, 9))
    generator = torch.Generator().manual_seed(0)
    loadings = 0.1 * torch.randn(9, 3, generator=generator, dtype=torch.float64)
    loadings[[0, 5]] = 0
    offset, penalty = family.link(X.mean(0)), torch.ones(3, dtype=torch.float64)
    kept = loadings.clone()
    kept[[0, 5], 0] = 1e-200
    problems = [
        MapProblem(
            family,
            design,
            Observations(X),
            penalty,
            offset=offset,
            curvature=None if curvature is None else torch.full_like(offset, curvature),
            shared_map=True,
        )
        for design in (loadings, kept)
    ]
    assert [len(problem.design) for problem in problems] == [7, 9]
    z = 0.3 * torch.randn(20, 3, generator=generator, dtype=torch.float64)
    rows = torch.arange(20)
    for one, other in zip(*(problem.derivatives(z, rows) for problem in problems), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    steps = [problem.shaped_step(problem.bare_gradient(z, rows), rows) for problem in problems]
    torch.testing.assert_close(*steps, rtol=1e-12, atol=1e-12)


def test_fixed_point_of_the_equilibrium_layer():
    problem = make_problem("bernoulli", alpha=2.0)
    z = newton(problem, zeros(problem), tol=1e-13, max_iter=50).value
    mean = Bernoulli().mean(z @ problem.design.T + problem._design.expand[2])
    layer = (problem.observations.values - mean) @ problem.design / 2.0
    torch.testing.assert_close(z, layer, rtol=0, atol=1e-12)
    step = problem.step(problem.gradient(z + 0.1, every(problem))[0], every(problem))
    mean = Bernoulli().mean((z + 0.1) @ problem.design.T + problem._design.expand[2])
    layer = (problem.observations.values - mean) @ problem.design / 2.0
    torch.testing.assert_close(z + 0.1 + step, layer, rtol=0, atol=1e-12)


def test_full_step_taken_unseen_decreases_the_objective():
    problem = make_problem("poisson", n=200, alpha=1e-2, scale=0.3)
    rows = every(problem)
    generator = torch.Generator().manual_seed(0)
    z = 0.5 * torch.randn(200, 2, dtype=torch.float64, generator=generator)
    objective, gradient, hessian, _ = problem.derivatives(z, rows)
    step = NewtonSystems(hessian).solve(gradient)
    safe = problem.is_safe(step, rows)
    assert 0 < safe.sum() < 200
    decrease = objective - problem.objective(z - step, rows)
    promised = 0.28 * (gradient * step).sum(1)
    assert (decrease[safe] >= promised[safe]).all()


def test_singular_newton_system_is_damped():
    hessian = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[2.0, 0.0], [0.0, 1.0]]])
    gradient = torch.tensor([[1.0, 1.0], [2.0, 3.0]])
    step = NewtonSystems(hessian).solve(gradient)
    assert torch.isfinite(step).all()
    torch.testing.assert_close(step[1], torch.tensor([1.0, 3.0]))
    torch.testing.assert_close((hessian[0] @ step[0]), gradient[0], rtol=1e-2, atol=1e-2)
    assert torch.equal(
        NewtonSystems(torch.full((1, 2, 2), torch.nan)).solve(gradient[:1]), torch.zeros(1, 2)
    )


def test_missing_and_sparse_observations_give_the_same_problem():
    generator = torch.Generator().manual_seed(0)
    X = torch.poisson(torch.ones(20, 7, dtype=torch.float64), generator=generator)
    gaps = torch.rand(20, 7, generator=generator) < 0.3
    dense = torch.where(gaps, 0.0, X)

    def compress(places, values):
        counts = places.sum(1)
        indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        found = places.nonzero()
        picked = None if values is None else values[places]
        return CompressedRows(indptr, found[:, 1], picked, tuple(places.shape))

    sparse = Observations(compress(dense != 0, dense), compress(gaps, None))
    full = Observations(dense, gaps)
    other = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(sparse @ other, full @ other)
    torch.testing.assert_close(sparse.T @ dense, full.T @ dense)
    assert torch.equal(sparse.missing_rows(3, 9), gaps[3:9])
    assert torch.equal(sparse.T.missing_rows(1, 4), gaps.T[1:4])
    index = torch.tensor([4, 0, 11])
    torch.testing.assert_close(sparse.take(index) @ other, full.take(index) @ other)
    assert torch.equal(sparse.take(index).missing_rows(0, 3), gaps[index])
    penalty = torch.ones(3, dtype=torch.float64)
    results = [
        newton(
            MapProblem(Poisson(), other, observations, penalty),
            torch.zeros(20, 3, dtype=torch.float64),
            tol=1e-10,
            max_iter=50,
        ).value
        for observations in (full, sparse)
    ]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)


def test_tiles_do_not_change_the_result(monkeypatch):
    import skdeq._chunks
    import skdeq._design

    problem = make_problem("poisson", p=200)
    rows = every(problem)
    z = 0.1 * torch.ones(30, 2, dtype=torch.float64)
    whole = problem.derivatives(z, rows)
    assert problem._design.tile_columns(30) == 200
    monkeypatch.setattr(skdeq._chunks, "_TILE_ENTRIES", 64 * 30)
    tiled = make_problem("poisson", p=200)
    assert tiled._design.tile_columns(30) == 64
    for one, two in zip(tiled.derivatives(z, rows), whole, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    # Nor does it matter whether the products of pairs of loadings are kept.
    monkeypatch.setattr(skdeq._design, "_HESSIAN_ENTRIES", 100)
    tiled = make_problem("poisson", p=200)
    for one, two in zip(tiled.derivatives(z, rows), whole, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["gaussian", "bernoulli", "poisson"])
def test_rounding_of_the_objective_is_bounded_where_its_sums_cancel(family):
    generator = torch.Generator().manual_seed(0)
    loadings = 0.5 * torch.randn(40, 3, generator=generator)
    z = torch.randn(5000, 3, generator=generator)
    law = get_family(family)
    mean = law.mean(z @ loadings.T + 1)
    draw = {"poisson": torch.poisson, "bernoulli": torch.bernoulli, "gaussian": torch.normal}
    X = draw[family](mean, generator=generator)
    rows = torch.arange(len(z))

    def problem(dtype):
        penalty, offset = torch.ones(3, dtype=dtype), torch.ones(40, dtype=dtype)
        return MapProblem(
            law, loadings.to(dtype), Observations(X.to(dtype)), penalty, offset=offset
        )

    single = problem(torch.float32)
    objective = single.objective(z, rows)
    if family == "poisson":
        assert (objective.abs() < 5).sum() > 100
    error = (objective - problem(torch.float64).objective(z.double(), rows)).abs()
    assert (error <= single.rounding(objective, z, rows)).all()


@pytest.mark.parametrize("places", [torch.int32, torch.int64])
@pytest.mark.parametrize("pattern", [False, True])
def test_transpose_of_compressed_rows_is_scipys(places, pattern):
    X = np.random.default_rng(0).random((40, 15))
    X[X < 0.8] = 0
    X[3] = 0
    X = sp.csr_array(X)
    parts = torch.from_numpy(X.indptr).to(places), torch.from_numpy(X.indices).to(places)
    rows = CompressedRows(*parts, None if pattern else torch.from_numpy(X.data), X.shape)
    expected = X.T.tocsr()
    np.testing.assert_array_equal(rows.T.indptr, expected.indptr)
    np.testing.assert_array_equal(rows.T.indices, expected.indices)
    assert rows.T.shape == (15, 40)
    assert rows.T.T is rows
    # What a card does, where there is no scipy.
    for one, two in zip(
        rows._transposed_by_torch(), (rows.T.indptr, rows.T.indices, rows.T.values), strict=True
    ):
        if two is not None:
            np.testing.assert_array_equal(one, two)
    if pattern:
        assert rows.T.values is None
        np.testing.assert_array_equal(rows.T.places(2, 9), expected[2:9].toarray() != 0)
    else:
        np.testing.assert_array_equal(rows.T.values, expected.data)
        np.testing.assert_array_equal(
            rows.T.take(torch.tensor([8, 2])).to_dense(), expected[[8, 2]].toarray()
        )


def test_start_does_not_depend_on_a_row_of_another_size():
    X = torch.poisson(torch.full((200, 50), 3.0), generator=torch.Generator().manual_seed(0))
    loadings = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))

    def at_zero(X):
        problem = MapProblem(Poisson(), loadings, Observations(X), torch.ones(3))
        return _gradient_at_zero(problem)

    small = at_zero(X)
    torch.testing.assert_close(small, (1 - X) @ loadings, rtol=0, atol=1e-4)
    X[0] *= 1e6
    torch.testing.assert_close(at_zero(X)[1:], small[1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", [anderson, picard])
@pytest.mark.parametrize("family", ["bernoulli", "poisson"])
def test_residuals_of_rows_cut_short_are_those_of_their_points(solver, family):
    problem = make_problem(
        family, n=50, p=60, k=6, curvature=torch.full((60,), 0.25, dtype=torch.float64)
    )
    for max_iter in (2, 3, 5):
        result = solver(problem, zeros(problem), tol=1e-9, max_iter=max_iter)
        _, residual = problem.gradient(result.value, every(problem))
        left = ~result.converged
        assert left.any()
        torch.testing.assert_close(result.residual[left], residual[left])


class CountedProblem:
    """A problem that counts the rows whose Hessians it is asked for."""

    def __init__(self, problem):
        self.problem, self.hessians = problem, 0

    def __getattr__(self, name):
        return getattr(self.problem, name)

    def derivatives(self, z, rows):
        self.hessians += len(rows)
        return self.problem.derivatives(z, rows)


@pytest.mark.parametrize("family", ["poisson", "bernoulli", "gamma"])
def test_using_hessians_again_changes_the_path_and_not_the_solution(family, monkeypatch):
    import skdeq._newton as module

    assert module._LEAST_RANK_TO_REPEAT < 48
    problem = make_problem(family, n=40, p=90, k=48, alpha=0.5, scale=0.2)
    again, fresh = CountedProblem(problem), CountedProblem(problem)
    repeated = newton(again, zeros(problem), tol=1e-13, max_iter=50)
    monkeypatch.setattr(module, "_LEAST_RANK_TO_REPEAT", 48)
    plain = newton(fresh, zeros(problem), tol=1e-13, max_iter=50)
    assert repeated.converged.all() and plain.converged.all()
    torch.testing.assert_close(repeated.value, plain.value, rtol=0, atol=1e-9)
    assert again.hessians < 0.7 * fresh.hessians
    # The budget is one of steps, of either kind.
    monkeypatch.setattr(module, "_LEAST_RANK_TO_REPEAT", 0)
    for steps in (0, 1, 3):
        short = newton(problem, zeros(problem), tol=1e-14, max_iter=steps)
        assert (short.n_iter <= steps).all()
        assert not short.converged.all()
        _, gradient, hessian, residual = problem.derivatives(short.value, every(problem))
        decrement = (gradient * torch.linalg.solve(hessian, gradient)).sum(1)
        left = ~short.converged
        expected = torch.maximum(residual, decrement)[left]
        torch.testing.assert_close(short.residual[left], expected)


def test_rows_are_alone_with_hessians_used_again():
    problem = make_problem("poisson", n=40, p=90, k=48, alpha=0.5, scale=0.3)
    together = newton(problem, zeros(problem), tol=1e-11, max_iter=50)
    for row in (0, 17, 39):
        alone = newton(
            problem.select(torch.tensor([row])), zeros(problem)[:1], tol=1e-11, max_iter=50
        )
        torch.testing.assert_close(alone.value[0], together.value[row], rtol=0, atol=1e-12)
        assert alone.n_iter[0] == together.n_iter[row]


def test_gaussian_is_solved_by_one_newton_step():
    problem = make_problem("gaussian", alpha=0.7)
    result = newton(problem, zeros(problem), tol=1e-12, max_iter=5)
    assert isinstance(problem.family, Gaussian)
    assert (result.n_iter == 1).all()


def decrement_of(family, loadings, intercept, X, latents):
    """Squared Newton decrements, with the model written out for a canonical family."""
    eta = latents @ loadings.T + intercept
    gradient = (family.mean(eta) - family.sufficient(X)) @ loadings + latents
    weighted = loadings.T * family.variance(eta).unsqueeze(1)
    hessian = weighted @ loadings + torch.eye(loadings.shape[1])
    return (gradient * torch.linalg.solve(hessian, gradient)).sum(1)


@pytest.mark.parametrize("scale", [1.0, 1e5, 1e9])
def test_the_certificate_knows_no_units(scale):
    # The latents of amounts in large units are small, and so is any error of theirs.
    rng = np.random.default_rng(2)
    shape = np.exp(rng.normal(size=(60, 1)) @ rng.normal(size=(1, 6)))
    X = scale * rng.gamma(2, 1, (60, 6)) * shape
    model = ExpFamilyDEQ(2, family=Gamma(2.0), random_state=0)
    scores = model.fit_transform(X)
    np.testing.assert_allclose(model.transform(X), scores, rtol=0, atol=1e-6 * scores.std())
    certificate = model.map_latents(X)
    assert certificate.converged.all()
    decrement = decrement_of(
        Gamma(2.0),
        torch.from_numpy(model.loadings_),
        torch.from_numpy(model.intercept_),
        torch.from_numpy(X),
        torch.from_numpy(certificate.value),
    )
    # The last step of Newton's method has squared it.
    assert decrement.max() < 1e-9


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weak_directions_are_certified(dtype):
    rng = np.random.default_rng(3)
    latents, loadings = rng.normal(size=(80, 3)), 1.5 * rng.normal(size=(3, 10))
    mean = np.exp(latents @ loadings + 3 * rng.normal(size=10))
    X = rng.poisson(mean).astype(dtype)
    model = ExpFamilyDEQ(3, family="poisson", random_state=0)
    scores = model.fit_transform(X)
    if dtype == np.float64:
        np.testing.assert_allclose(
            model.transform(X), scores, rtol=0, atol=1e-6 * np.abs(scores).max()
        )
    certificate = model.map_latents(X)
    assert certificate.converged.all()
    values = [model.loadings_, model.intercept_, X, certificate.value]
    double = [torch.from_numpy(np.asarray(one, dtype=np.float64)) for one in values]
    decrement = decrement_of(Poisson(), *double)
    # A row of ten million counts tells more of its latents than float32 resolves.
    assert decrement.max() < (1e-9 if dtype == np.float64 else 0.1)


def test_huge_counts_are_solved_in_float32():
    X = np.random.default_rng(0).poisson(1e6, (200, 20)).astype(np.float32)
    model = ExpFamilyDEQ(3, family="poisson", random_state=0).fit(X)
    certificate = model.map_latents(X)
    assert certificate.converged.all()
    assert certificate.n_iter.max() < 10


@pytest.mark.parametrize("family", ["gamma", "negative_binomial", "poisson"])
def test_what_cannot_be_evaluated_is_not_certified(family):
    problem = make_problem(family)
    # Far outside the domain, or where the mean overflows.
    loadings = problem.design
    towards = torch.linalg.lstsq(loadings, torch.full_like(loadings[:, :1], 1e4)).solution.T
    start = towards.expand(problem.n_rows, -1).contiguous()
    assert not torch.isfinite(problem.objective(start, every(problem))).any()
    result = newton(problem, start, tol=1e-6, max_iter=3)
    _, gradient, hessian, _ = problem.derivatives(result.value, every(problem))
    decrement = (gradient * torch.linalg.solve_ex(hessian, gradient)[0]).sum(1)
    solved = torch.isfinite(decrement) & (decrement < 1e-6)
    assert (solved | ~result.converged).all()
    assert not result.converged.all()


def test_float32_is_certified_as_far_as_it_goes():
    # By Anderson acceleration, whose steps do not square what error is left.
    X = np.random.default_rng(0).integers(0, 4095, (300, 200)).astype(np.float32)
    model = ExpFamilyDEQ(20, random_state=0, max_iter=3, tol=1.0, fixed_point="anderson").fit(X)
    certificate = model.map_latents(X)
    assert certificate.converged.all()
    assert certificate.n_iter.max() < 5


def test_no_number_is_no_certificate():
    residual = torch.tensor([1e-9, 1e-9, 1e-9, 1e-9, 1e-9])
    decrement = torch.tensor([torch.nan, torch.inf, 0.0, 1e-12, 1e-3])
    rounding = torch.tensor([1.0, torch.inf, torch.inf, 1e-3, 1e-3])
    found = certified_residual(residual, decrement, rounding)
    expected = torch.tensor([torch.inf, torch.inf, 1e-9, 0.0, 1e-3])
    torch.testing.assert_close(found, expected)


def test_picard_does_not_go_round_for_ever():
    rng = np.random.default_rng(0)
    eta = 2 * rng.normal(size=(200, 2)) @ rng.normal(size=(2, 40))
    X = (rng.random((200, 40)) < 1 / (1 + np.exp(-eta))).astype(float)
    deq = ExpFamilyDEQ(2, family="bernoulli", alpha=0.7, weight_decay=0.05, random_state=0).fit(X)
    exact = deq.map_latents(X).value
    result = deq.set_params(fixed_point="picard", fixed_point_max_iter=500).map_latents(X)
    # The map contracts in a third of the rows; in the others steps have to become shorter first.
    assert result.converged.mean() > 0.9
    np.testing.assert_allclose(
        result.value[result.converged], exact[result.converged], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("family", "alpha"), [("bernoulli", 60.0), ("poisson", 1e-4)])
def test_the_start_is_left_as_it_was(solver, family, alpha):
    problem = make_problem(family, alpha=alpha, scale=3.0)
    start = torch.randn(problem.n_rows, problem.r, dtype=torch.float64)
    before = start.clone()
    SOLVERS[solver](problem, start, tol=1e-9, max_iter=30)
    assert torch.equal(start, before)


def test_slices_of_compressed_rows_are_scipys():
    X = sp.csr_array(sp.random(40, 7, density=0.3, random_state=np.random.default_rng(0)))
    parts = (torch.from_numpy(part) for part in (X.indptr, X.indices, X.data))
    part, expected = CompressedRows(*parts, X.shape).slice(10, 30), X[10:30]
    np.testing.assert_array_equal(part.indptr, expected.indptr)
    np.testing.assert_array_equal(part.slice(5, 9).to_dense(), expected[5:9].toarray())
    index = torch.tensor([3, 0, 3, 19])
    np.testing.assert_array_equal(part.take(index).to_dense(), expected[index.numpy()].toarray())
    np.testing.assert_array_equal(part.T.to_dense(), expected.T.toarray())
    right = torch.eye(7, dtype=torch.float64)
    np.testing.assert_allclose(part.matrix @ right, expected.toarray())
