"""Sample weights on their way through scikit-learn's pipelines, searches and meta-estimators."""

import numpy as np
import pytest
from conftest import sample
from sklearn import config_context
from sklearn.base import clone
from sklearn.exceptions import UnsetMetadataPassedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, KFold, cross_validate
from sklearn.multioutput import MultiOutputRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from skdeq import DEQClassifier, DEQRegressor, ExpFamilyDEQ, ImplicitEMEncoder

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

ESTIMATORS = {
    "ExpFamilyDEQ": ExpFamilyDEQ(2, family="poisson", random_state=0, max_iter=20),
    "ImplicitEMEncoder": ImplicitEMEncoder(8, random_state=0, max_iter=3),
    "DEQClassifier": DEQClassifier(
        ExpFamilyDEQ(2, family="poisson", max_iter=20), random_state=0, max_iter=3
    ),
    "DEQRegressor": DEQRegressor(
        ExpFamilyDEQ(2, family="poisson", max_iter=20), random_state=0, max_iter=3
    ),
}
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)


@pytest.fixture(autouse=True)
def routing():
    with config_context(enable_metadata_routing=True):
        yield


def data():
    X = sample("poisson", n=90)
    weight = np.random.default_rng(0).uniform(0.1, 3, size=90)
    return X, np.arange(90) % 2, weight


def asking(estimator):
    return clone(estimator).set_fit_request(sample_weight=True)


def result(fitted, X):
    method = getattr(fitted, "transform", None) or fitted.predict_proba
    return method(X)


@every_estimator
def test_every_method_that_takes_weights_can_ask_for_them(estimator):
    requests = asking(estimator).get_metadata_routing()
    for method in ("fit", "partial_fit", "score"):
        assert "sample_weight" in getattr(requests, method).requests, method
    for method in ("predict", "transform", "inverse_transform"):
        assert "sample_weight" not in getattr(requests, method).requests


@every_estimator
def test_weights_reach_the_last_step_of_a_pipeline(estimator):
    X, y, weight = data()
    pipeline = make_pipeline(FunctionTransformer(), asking(estimator))
    pipeline.fit(X, y, sample_weight=weight)
    alone = clone(estimator).fit(X, y, sample_weight=weight)
    assert pipeline[-1].loss_curve_ == alone.loss_curve_
    assert alone.loss_curve_ != clone(estimator).fit(X, y).loss_curve_


@pytest.mark.parametrize("name", ["ExpFamilyDEQ", "ImplicitEMEncoder"])
def test_weights_reach_a_transformer_inside_a_pipeline(name):
    X, y, weight = data()
    pipeline = make_pipeline(asking(ESTIMATORS[name]), asking(LogisticRegression()))
    pipeline.fit(X, y, sample_weight=weight)
    latents = clone(ESTIMATORS[name]).fit_transform(X, sample_weight=weight)
    head = LogisticRegression().fit(latents, y, sample_weight=weight)
    np.testing.assert_allclose(pipeline.predict_proba(X), head.predict_proba(latents), atol=1e-6)
    # Of a step that was not asked, scikit-learn does not guess.
    with pytest.raises(UnsetMetadataPassedError, match="set_fit_request"):
        make_pipeline(clone(ESTIMATORS[name]), asking(LogisticRegression())).fit(
            X, y, sample_weight=weight
        )
    # What says no gets none.
    deaf = clone(ESTIMATORS[name]).set_fit_request(sample_weight=False)
    pipeline = make_pipeline(deaf, asking(LogisticRegression())).fit(X, y, sample_weight=weight)
    assert pipeline[0].loss_curve_ == clone(ESTIMATORS[name]).fit(X, y).loss_curve_


@every_estimator
def test_weights_reach_fits_and_scores_of_a_search(estimator):
    X, y, weight = data()
    folds = KFold(3)
    name = "random_state"
    search = GridSearchCV(
        asking(estimator).set_score_request(sample_weight=True), {name: [0, 1]}, cv=folds
    )
    search.fit(X, y, sample_weight=weight)
    expected = []
    for train, test in folds.split(X):
        fitted = clone(estimator).fit(X[train], y[train], sample_weight=weight[train])
        expected.append(fitted.score(X[test], y[test], sample_weight=weight[test]))
    got = [search.cv_results_[f"split{fold}_test_score"][0] for fold in range(3)]
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    best = clone(search.best_estimator_).fit(X, y, sample_weight=weight)
    assert search.best_estimator_.loss_curve_ == best.loss_curve_


@every_estimator
def test_weights_of_the_score_alone(estimator):
    X, y, weight = data()
    asked = clone(estimator).set_fit_request(sample_weight=False)
    asked.set_score_request(sample_weight=True)
    scores = cross_validate(asked, X, y, cv=KFold(2), params={"sample_weight": weight})
    train, test = next(iter(KFold(2).split(X)))
    fitted = clone(estimator).fit(X[train], y[train])
    weighted = fitted.score(X[test], y[test], sample_weight=weight[test])
    assert scores["test_score"][0] == pytest.approx(weighted, rel=1e-9)


def test_weights_reach_partial_fit_of_a_meta_estimator():
    X, y, weight = data()
    estimator = ESTIMATORS["DEQRegressor"]
    asked = clone(estimator).set_partial_fit_request(sample_weight=True)
    both = MultiOutputRegressor(asked)
    both.partial_fit(X, np.column_stack([y, 1.0 - y]), sample_weight=weight)
    alone = clone(estimator).partial_fit(X, y, sample_weight=weight)
    np.testing.assert_allclose(both.predict(X)[:, 0], alone.predict(X), atol=1e-9)


@pytest.mark.parametrize("name", ["ExpFamilyDEQ", "ImplicitEMEncoder"])
def test_integer_weights_of_a_score_equal_repetition(name):
    X, _, _ = data()
    times = np.arange(90) % 3
    fitted = clone(ESTIMATORS[name]).fit(X)
    weighted = fitted.score(X, sample_weight=times)
    assert weighted == pytest.approx(fitted.score(np.repeat(X, times, axis=0)), rel=1e-9)
    assert weighted != pytest.approx(fitted.score(X), rel=1e-6)
    with pytest.raises(ValueError, match="sample_weight"):
        fitted.score(X, sample_weight=times[:-1])
    with pytest.raises(ValueError, match="Negative values"):
        fitted.score(X, sample_weight=times - 1.0)


def test_terms_of_the_encoder_take_weights():
    X, _, _ = data()
    times = 1 + np.arange(90) % 3
    fitted = clone(ESTIMATORS["ImplicitEMEncoder"]).fit(X)
    weighted = fitted.loss_terms(X, sample_weight=times)
    assert weighted == pytest.approx(fitted.loss_terms(np.repeat(X, times, axis=0)), rel=1e-9)
    assert fitted.score(X, sample_weight=times) == pytest.approx(-sum(weighted.values()))


@every_estimator
def test_wrong_weights_are_named(estimator):
    X, y, weight = data()
    with pytest.raises(ValueError, match="sample_weight"):
        clone(estimator).fit(X, y, sample_weight=weight[:-1])
    with pytest.raises(ValueError, match="Negative values in data passed to `sample_weight`"):
        clone(estimator).fit(X, y, sample_weight=-weight)
