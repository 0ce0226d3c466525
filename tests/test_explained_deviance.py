"""Explained deviances against their definition: exposures, gaps, weights and large data."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import sample
from numpy.testing import assert_allclose

from skdeq import ExpFamilyDEQ
from skdeq._explained_deviance import _drawn_rows, _Line, _quadrature, explained_deviance
from skdeq._observations import Observations
from skdeq._setting import Setting
from skdeq.families import get_family


@pytest.mark.parametrize("exposure", [None, "total"])
@pytest.mark.parametrize("gaps", [False, True])
def test_shares_are_the_integrals_of_the_slope(exposure, gaps):
    X = sample("poisson", n=150, p=12) + 0.0
    if gaps:
        X[np.random.default_rng(0).random(X.shape) < 0.1] = np.nan
    weight = np.random.default_rng(1).integers(1, 4, size=150).astype(float)
    deq = ExpFamilyDEQ(2, family="poisson", exposure=exposure, random_state=0)
    scores = deq.fit(X, sample_weight=weight).transform(X)
    seen = ~np.isnan(X)
    x, w = np.where(seen, X, 1.0), weight[:, None] * seen
    profile = (w * x).sum(0) / w.sum(0)
    size = (seen * x).sum(1) / (seen * profile).sum(1) if exposure else np.ones(150)
    offset = np.log(size)[:, None]
    null = np.log((w * x).sum(0) / (w * np.exp(offset)).sum(0)) + offset
    move = scores @ deq.components_ + deq.intercept_ + offset - null

    def deviance(eta):
        return (w * (np.exp(eta) - x * eta + x * np.log(x.clip(1e-9)) - x)).sum()

    parts = np.zeros(2)
    # The midpoint rule with so many points is good to seven digits.
    for share in (np.arange(2000) + 0.5) / 2000:
        slope = w * (np.exp(null + share * move) - x)
        parts -= ((slope @ deq.components_.T) * scores).sum(0)
    expected = parts / parts.sum() * (1 - deviance(null + move) / deviance(null))
    assert_allclose(deq.explained_deviance_ratio_, expected, rtol=1e-5)


def test_shares_of_many_entries_are_those_of_the_rows_drawn(monkeypatch):
    X = sample("poisson", n=600, p=20, k=3)
    X = X[np.argsort(X.sum(1))]  # the first rows are unlike the others
    monkeypatch.setattr("skdeq._explained_deviance._DEVIANCE_ENTRIES", 300 * 20)
    deq = ExpFamilyDEQ(3, family="poisson", random_state=0).fit(X)
    drawn = _drawn_rows(600, 300)
    # As many from each half as chance has it, which is within four standard deviations.
    assert len(drawn.unique()) == 300 and abs(int((drawn < 300).sum()) - 150) < 4 * 600**0.5 / 4
    law, some = get_family("poisson"), torch.from_numpy(X)[drawn]
    eta = torch.from_numpy(deq.natural_parameters(deq.transform(some.numpy())))
    null = law.deviance(some, torch.log(torch.from_numpy(X).mean(0)).expand_as(some)).sum()
    expected = 1 - float(law.deviance(some, eta).sum() / null)
    assert deq.explained_deviance_ratio_.sum() == pytest.approx(expected, abs=1e-6)


def test_what_the_rows_drawn_do_not_show_all_rows_do(monkeypatch):
    monkeypatch.setattr("skdeq._explained_deviance._DEVIANCE_ENTRIES", 1)
    monkeypatch.setattr("skdeq._explained_deviance._LEAST_ROWS", 50)
    X = np.ones((400, 6))
    others = np.setdiff1d(np.arange(400), _drawn_rows(400, 50).numpy())
    X[others[:200]] += sample("poisson", n=200, p=6)
    rows = torch.from_numpy(X)

    class Line(_Line):
        """Counts the rows and nodes that are looked at."""

        seen: ClassVar = []

        def _removed(self, rows, x, weights, nodes, shares):
            self.seen.append((len(rows), len(nodes)))
            return super()._removed(rows, x, weights, nodes, shares)

    monkeypatch.setattr("skdeq._explained_deviance._Line", Line)
    setting = Setting(get_family("poisson"), Observations(rows), alpha=1.0, weight_decay=0.1)
    null = rows.mean(0).log()
    loadings = torch.ones(6, 1, dtype=torch.float64)

    def shares(scores):
        Line.seen.clear()
        return explained_deviance(
            setting,
            lambda index: rows[index],
            lambda some: some @ loadings.T + null,
            null,
            scores,
        )

    scores = torch.zeros(400, 1, dtype=torch.float64)
    share, removed, largest = shares(scores)
    assert float(share) == removed == largest == 0
    # All of them at one node.
    assert Line.seen == [(50, 8), (400, 1)]
    scores[others[:200]] = (rows[others[:200]].mean(1, keepdim=True).log() - null.mean()) / 50
    share, removed, largest = shares(scores)
    assert 0 < largest < 0.1
    assert removed > 1e-3
    assert float(share) == pytest.approx(removed, rel=1e-6)
    assert Line.seen == [(50, 8), (400, 1), (400, 8)]
    share, removed, largest = shares(10 * scores)
    assert largest > 0.1
    assert Line.seen == [(50, 8), (400, 8)]


@pytest.mark.parametrize("largest", [1.0, 29.0, 100.0, 1e3, 1e5])
def test_nodes_resolve_predictors_that_move_far(largest):
    nodes, weights = _quadrature(largest)
    # The mean of counts along a line on which the predictor falls by so much.
    expected = -np.expm1(-largest) / largest
    assert weights @ np.exp(-largest * nodes) == pytest.approx(expected, rel=2e-3)
