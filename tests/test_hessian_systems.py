"""Systems with the Hessians of rows, against Hessians by autograd and dense solutions."""

import numpy as np
import pytest
import torch
from conftest import sample

from skdeq._hessian_systems import solve_hessians
from skdeq._latent_model import LatentModel
from skdeq._observations import Observations
from skdeq._setting import Setting, row_problem
from skdeq.families import get_family
from skdeq.nn import EquilibriumLayer


def problem_and_hessians(family, rank, alpha, gaps, n=12, p=70):
    """A problem, latents of its rows, and their Hessians (n, k, k) by autograd."""
    law, draw = get_family(family), torch.Generator().manual_seed(0)
    normal = {"generator": draw, "dtype": torch.float64}
    loadings, latents = torch.randn(p, rank, **normal) / 3, torch.randn(n, rank, **normal)
    intercept, offset = torch.randn(p, **normal), torch.randn(n, **normal)
    missing = torch.rand(n, p, generator=draw) < gaps
    data = torch.from_numpy(sample(family, n=n, p=p))
    observations = Observations(torch.where(missing, 0.0, data), missing if gaps else None)
    setting = Setting(law, observations, alpha, 0.0, row_offset=offset)

    def energy(z, offset, missing):
        terms = law.log_partition(loadings @ z + intercept + offset)
        return torch.where(missing, 0.0, terms).sum() + alpha / 2 * z @ z

    hessians = [
        torch.autograd.functional.hessian(lambda z, row=row: energy(z, *row), at)
        for at, *row in zip(latents, offset, missing, strict=True)
    ]
    return row_problem(setting, LatentModel(loadings, intercept)), latents, torch.stack(hessians)


@pytest.mark.parametrize("family", ["bernoulli", "gaussian", "rademacher"])
@pytest.mark.parametrize("rank", [3, 60])
@pytest.mark.parametrize("gaps", [0.0, 0.4])
# Of so flat a prior hardly any row is solved by forty iterations where entries are missing.
@pytest.mark.parametrize("alpha", [1.0, 1e-7])
def test_solves_as_dense_solutions_do(family, rank, gaps, alpha):
    problem, latents, hessians = problem_and_hessians(family, rank, alpha, gaps)
    right = torch.randn_like(latents)
    right[3] = 0
    expected = torch.linalg.solve(hessians, right)
    found = solve_hessians(problem, latents, right, 1e-12)
    error, size = (found - expected).norm(dim=1), expected.norm(dim=1)
    # The Hessians of the flat prior have condition numbers up to 1e9.
    assert (error <= (1e-10 if alpha == 1 else 1e-5) * size).all()


@pytest.mark.parametrize(
    ("family", "rank"), [("bernoulli", 60), ("bernoulli", 20), ("gaussian", 4)]
)
@pytest.mark.parametrize("gaps", [0.0, 0.2])
def test_gradcheck_of_layers_whose_systems_wait_for_the_backward_pass(family, rank, gaps):
    torch.manual_seed(0)
    module = EquilibriumLayer(70, rank, family=family, tol=1e-12, dtype=torch.float64)
    with torch.no_grad():
        module.loadings.mul_(2)
        module.intercept.normal_()
    x = torch.from_numpy(sample(family, n=4, p=70))
    missing = torch.rand(x.shape) < gaps

    def function(x, loadings, intercept):
        parameters = {"loadings": loadings, "intercept": intercept}
        x = torch.where(missing, torch.nan, x)
        return torch.func.functional_call(module, parameters, (x,))

    inputs = (x, module.loadings, module.intercept)
    inputs = tuple(one.detach().clone().requires_grad_() for one in inputs)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("rank", [10, 60])
def test_a_backward_pass_under_autocast_solves_in_all_digits(rank):
    torch.manual_seed(0)
    module = EquilibriumLayer(70, rank, family="bernoulli")
    x = torch.from_numpy(sample("bernoulli", p=70)).float()
    equilibrium = module._equilibrium(x)
    solve = equilibrium.solver_of_systems(module(x).detach(), module.tol)
    right = torch.randn(len(x), rank)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = solve(right)
    np.testing.assert_array_equal(found, solve(right))
