"""DEQClassifier and DEQRegressor: what fine-tuning gains, and scikit-learn's manners."""

import copy
import itertools
import pickle
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import CUDA, sample
from scipy.special import softmax
from sklearn.base import clone, is_classifier
from sklearn.datasets import load_digits, load_iris
from sklearn.exceptions import ConvergenceWarning, DataConversionWarning, NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import accuracy_score, log_loss, mean_squared_error, r2_score
from sklearn.model_selection import (
    GridSearchCV,
    StratifiedKFold,
    cross_val_predict,
    cross_val_score,
    cross_validate,
    train_test_split,
)

from skdeq import DEQClassifier, DEQRegressor, ExpFamilyDEQ
from skdeq._head_training import HeadTrainer
from skdeq.families import Binomial, Poisson

# Training that is cut short on purpose says so.
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def data(family="poisson", n=400, seed=0):
    """Rows of a model of rank 2, with classes and numbers that depend on the latents."""
    X = sample(family, n=n, p=12, seed=seed)
    latents = ExpFamilyDEQ(2, family=family, random_state=0).fit_transform(X)
    number = np.sin(2 * latents[:, 0]) + latents[:, 1]
    return X, np.array(["low", "high"])[(number > np.median(number)).astype(int)], number


def classifier(family="poisson", **options):
    backbone = ExpFamilyDEQ(2, family=family)
    return DEQClassifier(backbone, **{"random_state": 0, "max_iter": 15, **options})


def regressor(family="poisson", **options):
    backbone = ExpFamilyDEQ(2, family=family)
    return DEQRegressor(backbone, **{"random_state": 0, "max_iter": 15, **options})


@pytest.mark.parametrize("family", ["gaussian", "poisson", "bernoulli", "gamma"])
def test_learns_and_predicts(family):
    X, label, number = data(family)
    fitted = classifier(family, max_iter=60).fit(X[:300], label[:300])
    # The labels come from latents that twelve noisy entries only hint at.
    assert fitted.score(X[300:], label[300:]) > 0.7
    probability = fitted.predict_proba(X[300:])
    np.testing.assert_allclose(probability.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(fitted.classes_[probability.argmax(1)], fitted.predict(X[300:]))
    assert (
        regressor(family, max_iter=60).fit(X[:300], number[:300]).score(X[300:], number[300:])
        > 0.6
    )
    assert fitted.loss_curve_[-1] < fitted.loss_curve_[0]


def test_fine_tuning_changes_the_backbone_and_helps():
    X, label = load_digits(return_X_y=True)
    backbone = ExpFamilyDEQ(6, family="poisson", random_state=0).fit(X[:1000])
    before = backbone.loadings_.copy()
    scores = {}
    for fine_tune in (False, True):
        fitted = DEQClassifier(backbone, fine_tune=fine_tune, max_iter=30, random_state=0)
        fitted.fit(X[:1000], label[:1000])
        scores[fine_tune] = fitted.score(X[1000:], label[1000:])
        moved = np.abs(fitted.backbone_.loadings_ - before).max()
        assert (moved > 0.01) == fine_tune
        np.testing.assert_allclose(
            fitted.backbone_.components_ @ fitted.backbone_.components_.T, np.eye(6), atol=1e-8
        )
    assert scores[True] > scores[False] + 0.02
    np.testing.assert_array_equal(backbone.loadings_, before)


def test_backbone_has_a_step_size_of_its_own():
    X, label, _ = data()
    backbone = ExpFamilyDEQ(2, family="poisson", random_state=0).fit(X)
    moved = {}
    for rate in (None, 1e-3, 3e-3):
        # One minibatch: the first step of Adam is as long as its step size in every entry.
        fitted = classifier(
            max_iter=1, batch_size=400, learning_rate=3e-3, backbone_learning_rate=rate
        ).set_params(backbone=backbone)
        fitted.fit(X, label)
        change = np.abs(fitted.backbone_.intercept_ - backbone.intercept_)
        moved[rate] = np.median(change)
    np.testing.assert_allclose(moved[None], moved[1e-3], rtol=1e-12)
    np.testing.assert_allclose(moved[1e-3], 1e-3, rtol=1e-6)
    np.testing.assert_allclose(moved[3e-3], 3e-3, rtol=1e-6)
    with pytest.raises(ValueError, match="'backbone_learning_rate' parameter"):
        classifier(backbone_learning_rate=0.0).fit(X, label)


@pytest.mark.parametrize("fine_tune", [True, False])
def test_dropout_leaves_entries_out_as_missing_ones(fine_tune):
    X, label, _ = data()
    backbone = ExpFamilyDEQ(2, family="poisson", random_state=0).fit(X)
    options = {"max_iter": 1, "batch_size": 400, "learning_rate": 1e-9, "fine_tune": fine_tune}
    losses = {}
    for dropout in (0.0, 0.5, 1 - 1e-12):
        fitted = classifier(dropout=dropout, **options).set_params(backbone=backbone)
        losses[dropout] = fitted.fit(X, label).loss_curve_[0]
        # Neither prediction nor what the backbone keeps of its rows leaves anything out.
        probability = fitted.predict_proba(X)
        codes = (label == fitted.classes_[1]).astype(int)
        expected = -np.log(probability[np.arange(len(X)), codes]).mean()
        np.testing.assert_allclose(losses[0.0], expected, rtol=1e-5)
        if fine_tune:
            np.testing.assert_allclose(
                fitted.backbone_.transform(X), backbone.transform(X), atol=1e-4
            )
    assert abs(losses[0.5] - losses[0.0]) > 1e-3
    # Rows of which nothing is seen have the latents zero, and the head says the same of all.
    head = fitted._outputs(np.full((1, X.shape[1]), np.nan))
    shares = np.array([(label == fitted.classes_[0]).mean(), (label == fitted.classes_[1]).mean()])
    logits = np.array([0.0, head.item()]) if head.size == 1 else head.ravel()
    expected = -shares @ (logits - np.log(np.exp(logits).sum()))
    np.testing.assert_allclose(losses[1 - 1e-12], expected, rtol=1e-5)


def test_dropout_leaves_out_others_in_each_batch_of_a_stream():
    X, label, _ = data(n=60)
    options = {"dropout": 0.5, "learning_rate": 1e-12, "fine_tune": False, "batch_size": 60}
    stream = classifier(**options)
    for _ in range(5):
        stream.partial_fit(X, label, classes=["high", "low"])
    # The network stands still: its losses differ by what is left out.
    assert len(set(np.round(stream.loss_curve_, 9))) == 5


def test_dropout_helps_where_labels_are_few():
    X, label = load_digits(return_X_y=True)
    X = X.astype(np.float32)
    backbone = ExpFamilyDEQ(10, family=Binomial(16), random_state=0).fit(X)
    # Of what else keeps a network from learning rows by heart next to nothing.
    options = {"weight_decay": 1e-4, "max_iter": 30, "n_iter_no_change": 30}
    scores = {0.0: [], 0.25: []}
    for seed, dropout in itertools.product(range(2), scores):
        train, test, y_train, y_test = train_test_split(
            X, label, train_size=600, random_state=seed, stratify=label
        )
        fitted = DEQClassifier(backbone, dropout=dropout, random_state=seed, **options)
        scores[dropout].append(fitted.fit(train, y_train).score(test, y_test))
    assert np.mean(scores[0.25]) > np.mean(scores[0.0])


@pytest.mark.parametrize("make", [classifier, regressor])
def test_dropout_is_reproducible_and_streams_go_on_bit_for_bit(make):
    X, label, number = data()
    y = label if make is classifier else number
    one, two = (make(dropout=0.3, max_iter=3).fit(X, y) for _ in range(2))
    np.testing.assert_array_equal(one.coefs_[0], two.coefs_[0])
    first = {"classes": np.unique(y)} if make is classifier else {}
    one = make(dropout=0.3).partial_fit(X[:200], y[:200], **first)
    two = pickle.loads(pickle.dumps(one))
    for each in (one, two):
        each.partial_fit(X[200:], y[200:])
    np.testing.assert_array_equal(one.coefs_[0], two.coefs_[0])
    with pytest.raises(ValueError, match="'dropout' parameter"):
        make(dropout=1.0).fit(X, y)


def test_rows_of_minibatches_that_are_not_solved_are_not_warned_of():
    X, label, _ = data()
    backbone = ExpFamilyDEQ(2, family="poisson", random_state=0).fit(X)
    # So few steps that no minibatch is solved.
    backbone.set_params(fixed_point_max_iter=1, fixed_point_tol=1e-12)
    network = DEQClassifier(backbone, dropout=0.5, max_iter=2, random_state=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* rows of EquilibriumLayer")
        network.fit(X, label)
    with pytest.warns(ConvergenceWarning, match="rows of EquilibriumLayer are not solved"):
        network.backbone_.to_module()(torch.from_numpy(X))


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ({}, {}),
        ({"exposure": "total"}, {"head_layer_sizes": (7, 5)}),
        ({"whiten": True}, {"head_layer_sizes": (), "fine_tune": False}),
        ({"hidden_layer_sizes": (4,), "max_iter": 5}, {}),
    ],
)
def test_the_network_is_a_torch_module_as_well(backbone, options):
    X, label, number = data()
    X[::7, 2] = np.nan
    backbone = ExpFamilyDEQ(2, family="poisson", random_state=0, **backbone)
    options = {"max_iter": 3, "random_state": 0, **options}
    rows = torch.from_numpy(X)
    fitted = DEQClassifier(backbone, **options).fit(X, label)
    before = torch.get_rng_state()
    module = fitted.to_module()
    assert torch.equal(torch.get_rng_state(), before)
    probability = torch.softmax(module(rows), dim=1)
    np.testing.assert_allclose(probability.detach(), fitted.predict_proba(X), rtol=1e-4)
    targets = np.column_stack([1e4 * number + 1e5, number])
    fitted = DEQRegressor(backbone, **options).fit(X, targets)
    predicted = fitted.to_module()(rows)
    np.testing.assert_allclose(predicted.detach(), fitted.predict(X), rtol=1e-4, atol=1e-4)
    predicted.sum().backward()
    narrow = DEQRegressor(backbone, **options).fit(X.astype(np.float32), number)
    predicted = narrow.to_module()(rows.float())
    assert predicted.dtype == torch.float32
    np.testing.assert_allclose(
        predicted[:, 0].detach(), narrow.predict(X.astype(np.float32)), rtol=1e-3, atol=1e-3
    )
    with pytest.raises(NotFittedError):
        DEQClassifier().to_module()


def test_the_first_loss_is_the_log_loss_of_the_network():
    X, label, _ = data()
    fitted = classifier(max_iter=1, batch_size=400, learning_rate=1e-9).fit(X, label)
    probability = fitted.predict_proba(X)
    codes = (label == fitted.classes_[1]).astype(int)
    expected = -np.log(probability[np.arange(len(X)), codes]).mean()
    np.testing.assert_allclose(fitted.loss_curve_[0], expected, rtol=1e-5)


@pytest.mark.parametrize("make", [classifier, regressor])
def test_early_stopping_keeps_the_best_epoch(make):
    X, label, number = data()
    y = label if make is classifier else number
    fitted = make(early_stopping=True, validation_fraction=0.25, max_iter=200, n_iter_no_change=5)
    fitted.fit(X, y)
    scores = fitted.validation_scores_
    assert len(scores) == fitted.n_iter_ < 200
    best = int(np.argmax(scores))
    assert len(scores) - 1 - best <= 5
    # A fit that ends there keeps the same, though it never sees what comes after.
    shorter = make(early_stopping=True, validation_fraction=0.25, max_iter=best + 1).fit(X, y)
    np.testing.assert_array_equal(shorter.coefs_[0], fitted.coefs_[0])
    np.testing.assert_array_equal(shorter.backbone_.loadings_, fitted.backbone_.loadings_)
    assert make(max_iter=2).fit(X, y).validation_scores_ is None


@pytest.mark.parametrize("make", [classifier, regressor])
def test_validation_scores_are_those_of_the_rows_held_out(make):
    X = sample("poisson", n=200)
    number = np.log1p(X[:, 0]) + X[:, 1]
    y = (number > np.quantile(number, 0.8)).astype(int) if make is classifier else number
    weight = np.random.default_rng(0).uniform(0.1, 3, size=200)
    network = make(early_stopping=True, validation_fraction=0.25, max_iter=3)
    network.fit(X, y, sample_weight=weight)
    # By scikit-learn's own split, with the third of the seeds that a fit draws.
    seed = np.random.RandomState(0).randint(np.iinfo(np.int32).max, size=3)[2]
    strata = y if make is classifier else None
    _, rows = train_test_split(
        np.arange(200), test_size=50, random_state=int(seed), stratify=strata
    )
    truth, predicted, w = y[rows], network.predict(X[rows]), weight[rows]
    if make is classifier:
        expected = accuracy_score(truth, predicted, sample_weight=w)
    else:
        # The error is relative to the spread of all targets.
        spread = np.average((y - np.average(y, weights=weight)) ** 2, weights=weight)
        expected = 1 - mean_squared_error(truth, predicted, sample_weight=w) / spread
    assert max(network.validation_scores_) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("patience", [1, 3])
def test_training_ends_after_epochs_that_gained_less_than_tol(patience):
    X, label, _ = data(n=60)
    options = {"n_iter_no_change": patience, "max_iter": 12}
    assert classifier(tol=10.0, **options).fit(X, label).n_iter_ == patience + 1
    assert classifier(tol=0.0, **options).fit(X, label).n_iter_ == 12


@pytest.mark.parametrize(
    "options", [{}, {"early_stopping": True, "n_iter_no_change": 5}, {"dropout": 0.3}]
)
@pytest.mark.parametrize("hidden", [(), (4,)])
def test_scores_of_a_tuned_backbone_are_principal(options, hidden):
    X, label, _ = data()
    backbone = ExpFamilyDEQ(3, family="poisson", hidden_layer_sizes=hidden, max_iter=20)
    fitted = DEQClassifier(backbone, learning_rate=0.05, random_state=0, max_iter=10, **options)
    scores = fitted.fit(X, label).backbone_.transform(X)
    covariance = np.cov(scores, rowvar=False)
    variances = np.diag(covariance)
    assert (np.diff(variances) < 0).all()
    if not hidden:
        np.testing.assert_allclose(covariance, np.diag(variances), atol=1e-6 * variances[0])


def test_scores_of_a_tuned_backbone_are_principal_under_the_weights():
    X, label, _ = data(n=200)
    weight = np.random.default_rng(0).uniform(0.01, 10, size=200)
    network = DEQClassifier(ExpFamilyDEQ(3, family="poisson"), max_iter=3, random_state=0)
    scores = network.fit(X, label, sample_weight=weight).backbone_.transform(X)
    covariance = np.cov(scores, rowvar=False, aweights=weight)
    variances = np.diag(covariance)
    np.testing.assert_allclose(covariance, np.diag(variances), atol=1e-6 * variances[0])


def test_scores_of_a_tuned_stream_are_principal_over_all_batches():
    X, label, _ = data(n=2000)
    network = classifier(learning_rate=1e-3, backbone_learning_rate=1e-4)
    for rows in np.array_split(np.arange(2000), 10):
        network.partial_fit(X[rows], label[rows], classes=["high", "low"])
    scores = network.backbone_.transform(X)
    # Exact for parameters that stand still; these hardly move.
    assert abs(np.corrcoef(scores, rowvar=False)[0, 1]) < 0.02


def test_the_first_loss_is_weighted():
    X, label, _ = data()
    weight = np.random.default_rng(0).uniform(0.01, 10, size=400)
    fitted = classifier(max_iter=1, batch_size=400, learning_rate=1e-9)
    fitted.fit(X, label, sample_weight=weight)
    expected = log_loss(label, fitted.predict_proba(X), sample_weight=weight)
    np.testing.assert_allclose(fitted.loss_curve_[0], expected, rtol=1e-5)


def test_the_first_loss_of_several_targets_is_their_mean():
    X, _, number = data()
    targets = np.column_stack([number, 100 * number**2])
    fitted = regressor(max_iter=1, batch_size=400, learning_rate=1e-9).fit(X, targets)
    error = (fitted.predict(X) - targets) / targets.std(axis=0)
    np.testing.assert_allclose(fitted.loss_curve_[0], (error**2).mean() / 2, rtol=1e-5)


def test_weight_decay_is_for_the_coefficients_and_not_the_intercepts():
    X, label, _ = data()
    label = np.where(np.arange(400) % 4, label, "low")
    options = {"fine_tune": False, "head_layer_sizes": (), "learning_rate": 0.01}
    options |= {"batch_size": 400, "tol": 0.0, "n_iter_no_change": 300, "max_iter": 300}
    fitted = classifier(weight_decay=100.0, **options).fit(X, label)
    # A step size that takes all of them away leaves the coefficients one step from zero.
    assert np.abs(fitted.coefs_[0]).max() < 1.1 * 0.01
    # With intercepts at their optimum, probabilities are the shares of the classes on average.
    share = (label == fitted.classes_[1]).mean()
    assert share > 0.6
    assert fitted.predict_proba(X)[:, 1].mean() == pytest.approx(share, abs=1e-3)
    free = classifier(weight_decay=0.0, **options).fit(X, label)
    assert np.abs(free.coefs_[0]).max() > 0.5


def test_an_epoch_takes_as_much_off_the_weights_whatever_its_number_of_minibatches():
    # Of targets that are all the same only the decay moves the weights.
    X, _, _ = data()
    shares = []
    for batch_size in (400, 100, 25):
        fits = [
            regressor(
                head_layer_sizes=(4,),
                fine_tune=False,
                batch_size=batch_size,
                weight_decay=weight_decay,
                tol=0.0,
                max_iter=15,
                n_iter_no_change=15,
            ).fit(X, np.ones(len(X)))
            for weight_decay in (None, 0.0)
        ]
        decayed, free = (np.abs(fitted.coefs_[0]).sum() for fitted in fits)
        shares.append(decayed / free)
    assert shares == pytest.approx([0.96**15] * 3, rel=0.02)
    streams = [
        regressor(weight_decay=weight_decay, batch_size=25).partial_fit(X, X[:, 0])
        for weight_decay in (None, 1e-4)
    ]
    np.testing.assert_array_equal(streams[0].coefs_[0], streams[1].coefs_[0])


@pytest.mark.parametrize("make", [classifier, regressor])
def test_another_seed_is_another_network(make):
    X, label, number = data()
    y = label if make is classifier else number
    backbone = ExpFamilyDEQ(2, family="poisson", random_state=0)
    one, two, three = (
        make(max_iter=1, random_state=seed).set_params(backbone=backbone).fit(X, y).coefs_[0]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, two)
    assert np.abs(one - three).max() > 0.01


@pytest.mark.parametrize("make", [classifier, regressor])
def test_weights_equal_repetition_up_to_a_batch(make):
    X, label, number = data(n=40)
    y = label if make is classifier else number
    weight = np.random.default_rng(0).integers(0, 4, size=40)
    weighted = make(max_iter=5).fit(X, y, sample_weight=weight)
    repeated = make(max_iter=5).fit(np.repeat(X, weight, axis=0), np.repeat(y, weight))
    np.testing.assert_allclose(weighted.coefs_[0], repeated.coefs_[0], atol=1e-5)
    zero = make(max_iter=5).fit(X[weight > 0], y[weight > 0], sample_weight=weight[weight > 0])
    np.testing.assert_array_equal(weighted.coefs_[0], zero.coefs_[0])


def test_weights_count_in_large_data():
    X, label, _ = data()
    weight = np.where(label == "low", 20.0, 1.0)
    even = classifier().fit(X, label)
    uneven = classifier().fit(X, label, sample_weight=weight)
    assert (uneven.predict(X) == "low").mean() > (even.predict(X) == "low").mean()


@pytest.mark.parametrize("make", [classifier, regressor])
def test_partial_fit_and_warm_start_go_on(make):
    X, label, number = data()
    y = label if make is classifier else number
    options = {"classes": np.unique(label)} if make is classifier else {}
    stream = make()
    stream.partial_fit(X[:100], y[:100], **options)
    for _ in range(16):
        for start in range(0, 400, 100):
            stream.partial_fit(X[start : start + 100], y[start : start + 100])
    assert stream.n_iter_ == len(stream.loss_curve_) == 65
    assert stream.score(X, y) > (0.8 if make is classifier else 0.5)
    again = pickle.loads(pickle.dumps(stream))
    again.partial_fit(X[:100], y[:100])
    stream.partial_fit(X[:100], y[:100])
    np.testing.assert_array_equal(again.coefs_[0], stream.coefs_[0])
    warm = make(warm_start=True, max_iter=5).fit(X, y)
    first = warm.loss_curve_[0]
    assert warm.fit(X, y).loss_curve_[0] < first


def test_partial_fit_wants_the_classes_first():
    X, label, _ = data()
    with pytest.raises(ValueError, match="classes must be given"):
        classifier().partial_fit(X, label)
    fitted = classifier().partial_fit(X, label, classes=["high", "low", "other"])
    assert fitted.predict_proba(X).shape == (400, 3)
    with pytest.raises(ValueError, match="label 'new', which is not among"):
        fitted.partial_fit(X, np.where(label == "low", "new", label))


def test_missing_sparse_and_float32():
    X, label, _ = data()
    dense = classifier(max_iter=3).fit(X, label)
    sparse = classifier(max_iter=3).fit(sp.csr_array(X), label)
    np.testing.assert_allclose(sparse.coefs_[0], dense.coefs_[0], atol=1e-6)
    np.testing.assert_allclose(
        sparse.predict_proba(sp.csr_array(X)), dense.predict_proba(X), atol=1e-5
    )
    gaps = X.copy()
    gaps[::4, 3] = np.nan
    assert classifier().fit(gaps, label).score(gaps, label) > 0.8
    single = classifier(max_iter=3).fit(X.astype(np.float32), label)
    assert single.coefs_[0].dtype == np.float32
    # Rounding of 6e-8 a number, over the steps of three epochs; 1e-6 is what comes of it.
    np.testing.assert_allclose(single.predict_proba(X), dense.predict_proba(X), atol=2e-5)


def test_numbers_keep_digits_and_size_that_float32_rows_have_not():
    X, _, y = data()
    X = X.astype(np.float32)
    for targets in (1.7e9 + y, 1e40 * y):
        predicted = regressor().fit(X, targets).predict(X)
        assert r2_score(targets, predicted) > 0.5


def test_same_seed_same_bytes_and_global_generators_left_alone():
    X, label, _ = data()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two = (classifier(max_iter=3).fit(X, label) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert one.coefs_[0].tobytes() == two.coefs_[0].tobytes()
    assert one.backbone_.loadings_.tobytes() == two.backbone_.loadings_.tobytes()


def test_search_pickles_and_clones():
    X, label, _ = data()
    grid = {"backbone__n_components": [1, 2], "head_layer_sizes": [(), (20,)]}
    search = GridSearchCV(classifier(max_iter=5), grid, cv=2).fit(X, label)
    assert search.best_score_ > 0.7
    fitted = search.best_estimator_
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(fitted)).predict_proba(X), fitted.predict_proba(X)
    )
    assert not hasattr(clone(fitted), "coefs_")


def test_backbone_that_is_fitted_is_used_as_it_is():
    pd = pytest.importorskip("pandas")
    X, label, _ = data()
    frame = pd.DataFrame(X, columns=[f"gene {i}" for i in range(12)])
    backbone = ExpFamilyDEQ(2, family="poisson", random_state=0).fit(frame)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = DEQClassifier(backbone, fine_tune=False, max_iter=3).fit(frame, label)
        fitted.predict(frame)
    np.testing.assert_array_equal(fitted.backbone_.loadings_, backbone.loadings_)
    linear = LogisticRegression().fit(backbone.transform(frame), label)
    assert fitted.set_params(max_iter=30).fit(frame, label).score(frame, label) > (
        linear.score(backbone.transform(frame), label) - 0.05
    )
    with pytest.raises(ValueError, match="X has 5 features, but the backbone was fitted on 12"):
        DEQClassifier(backbone).fit(X[:, :5], label)


def test_bad_input_is_a_sentence_and_changes_nothing():
    X, label, number = data()
    fitted = classifier(max_iter=2).fit(X, label)
    before = dict(vars(fitted))
    negative = X.copy()
    negative[7, 3] = -1
    for bad_X, bad_y, message in [
        (negative, label, "row 7, column 3 of X is -1"),
        (X, label[:-1], "X has 400, y has 399"),
        (X, np.repeat("one", 400), "needs at least two classes"),
        (X, number, "Unknown label type"),
    ]:
        with pytest.raises(ValueError, match=message):
            fitted.fit(bad_X, bad_y)
        assert vars(fitted) == before
    with pytest.raises(ValueError, match="Input y contains NaN or infinity: row 5"):
        regressor().fit(X, np.where(np.arange(400) == 5, np.nan, number))
    with pytest.raises(ValueError, match="'backbone' parameter"):
        DEQClassifier(LogisticRegression()).fit(X, label)
    with pytest.raises(NotFittedError):
        classifier().predict(X)
    with pytest.warns(ConvergenceWarning, match="did not converge: within max_iter=2 epochs"):
        classifier(max_iter=2).fit(X, label)


@pytest.mark.parametrize("family", ["gamma", "poisson"])
def test_steps_that_go_astray_are_taken_back_with_a_warning(family):
    X, label, _ = data(family)
    with pytest.warns(ConvergenceWarning, match="were taken back: lower learning_rate"):
        fitted = classifier(family, learning_rate=1e6, max_iter=5).fit(X, label)
    assert np.isfinite(fitted.predict_proba(X)).all()
    assert np.isfinite(fitted.backbone_.loadings_).all()
    assert fitted.backbone_.map_latents(X).converged.mean() > 0.9


def test_loss_of_an_epoch_is_that_of_the_batches_that_were_taken():
    X, label, _ = data("gamma")
    fitted = classifier("gamma", learning_rate=1e2, batch_size=200, max_iter=8).fit(X, label)
    losses = np.array(fitted.loss_curve_)
    # With steps this long no epoch is better than knowing nothing, and each counts what it took.
    assert np.isfinite(losses).all()
    assert (losses > 0.9 * np.log(2)).all()
    # Of one batch an epoch is nothing, where it is taken back, or begins where the first did.
    start = classifier("gamma", learning_rate=1e-9, batch_size=400, max_iter=1).fit(X, label)
    nothing = classifier("gamma", learning_rate=1e6, batch_size=400, max_iter=4).fit(X, label)
    losses = np.array(nothing.loss_curve_)
    taken = np.isfinite(losses)
    assert 0 < taken.sum() < 4 and np.isposinf(losses[~taken]).all()
    np.testing.assert_allclose(losses[taken], start.loss_curve_[0], rtol=1e-6)


def test_steps_that_are_taken_back_do_not_end_the_training():
    rng = np.random.default_rng(0)
    Z = rng.normal(size=(200, 3))
    X = rng.poisson(np.exp(0.6 * Z @ rng.normal(size=(3, 10)))) + 0.1
    label = Z[:, 0] + 0.7 * rng.normal(size=200) > 0
    backbone = ExpFamilyDEQ(3, family="gamma", random_state=0)
    fitted = DEQClassifier(backbone, random_state=0, max_iter=40).fit(X, label)
    assert fitted.n_iter_ == 40
    # The first step of all went astray.
    assert min(fitted.loss_curve_[:2]) > 0.5


def test_parameters_that_went_astray_are_not_the_best():
    X, label, _ = data("gamma")
    options = {"early_stopping": True, "batch_size": 400, "learning_rate": 1e4, "max_iter": 6}
    fitted = classifier("gamma", **options).fit(X, label)
    before = classifier("gamma", early_stopping=True, max_iter=1, learning_rate=1e-9)
    np.testing.assert_allclose(
        fitted.predict_proba(X), before.fit(X, label).predict_proba(X), atol=1e-6
    )


@pytest.mark.parametrize("canonical_map", ["tanh", "relu"])
def test_predicts_with_the_network_that_was_trained(canonical_map):
    X = 2 * sample("gaussian", n=100)
    label = (X[:, 0] > 0).astype(int)
    backbone = ExpFamilyDEQ(2, canonical_map=canonical_map, random_state=0)
    fitted = DEQClassifier(backbone, max_iter=1, learning_rate=1e-9, random_state=0)
    fitted.fit(X, label)
    expected = -np.log(fitted.predict_proba(X)[np.arange(len(X)), label]).mean()
    np.testing.assert_allclose(fitted.loss_curve_[0], expected, rtol=1e-4)


def test_warm_start_begins_anew_where_the_parameters_ask_for_another_model():
    X, label, _ = data()
    fitted = classifier(warm_start=True, max_iter=2).fit(X, label)
    fitted.set_params(backbone__n_components=3).fit(X, label)
    assert fitted.backbone_.n_components == 3
    fitted.set_params(head_layer_sizes=(20,)).fit(X, label)
    assert fitted.coefs_[0].shape == (3, 20)
    assert fitted.fit(X[:, :8], label).backbone_.n_features_in_ == 8
    with pytest.raises(ValueError, match="are not those of the first call"):
        fitted.partial_fit(X[:, :8], label, classes=["a", "b"])


OTHER_MODELS = {
    "head_layer_sizes": (5,),
    "backbone__n_components": 3,
    "backbone__family": "gaussian",
    "backbone__canonical_map": "tanh",
    "backbone__hidden_layer_sizes": (4,),
    "backbone__loadings": "conv2d",
    "backbone__exposure": "total",
    "backbone__alpha": 2.0,
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_stream_that_is_asked_for_another_model_is_refused(name):
    X, label, number = data(n=60)
    for make, y, first in (
        (classifier, label, {"classes": np.unique(label)}),
        (regressor, number, {}),
    ):
        stream = make().partial_fit(X, y, **first).set_params(**{name: OTHER_MODELS[name]})
        before = dict(vars(stream))
        with pytest.raises(
            ValueError, match=f"^{name}=.*, but partial_fit goes on with the model"
        ):
            stream.partial_fit(X, y)
        assert vars(stream) == before


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_warm_start_begins_anew_with_another_architecture(name):
    X, label, _ = data(n=60)
    fitted = classifier(warm_start=True, max_iter=1).fit(X, label)
    if name == "backbone__loadings":
        fitted.set_params(backbone__image_shape=(3, 4), backbone__kernel_size=3)
    fitted.set_params(**{name: OTHER_MODELS[name]}).fit(X, label)
    anew = clone(fitted).fit(X, label)
    np.testing.assert_array_equal(fitted.predict_proba(X), anew.predict_proba(X))


def test_the_same_model_in_other_words_goes_on():
    X, label, _ = data(n=60)
    stream = classifier(head_layer_sizes=[20]).partial_fit(X, label, classes=np.unique(label))
    # Of no effect without hidden layers and convolutions.
    idle = {"hidden_map": "relu", "kernel_size": (3, 3), "stride": 2}
    same = ExpFamilyDEQ(2, family=Poisson(), hidden_layer_sizes=[], alpha=1, **idle)
    stream.set_params(backbone=same, head_layer_sizes=(20,)).partial_fit(X, label)
    assert stream.n_iter_ == 2


def test_failures_and_shallow_copies_leave_the_backbone_alone():
    X, label, _ = data()
    fitted = classifier(warm_start=True, max_iter=2).fit(X, label)
    before = fitted.predict_proba(X)
    copy.copy(fitted).partial_fit(X, label)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConvergenceWarning):
            fitted.fit(X, label)
    np.testing.assert_array_equal(fitted.predict_proba(X), before)


def test_feature_names_reach_the_backbone():
    pd = pytest.importorskip("pandas")
    X, label, _ = data()
    frame = pd.DataFrame(X, columns=[f"gene {i}" for i in range(12)])
    fitted = classifier(max_iter=2).fit(frame, label)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted.backbone_.transform(frame)
        fitted.predict(frame)
    with pytest.raises(ValueError, match="in another order"):
        DEQClassifier(fitted.backbone_).fit(frame[frame.columns[::-1]], label)


@pytest.mark.parametrize("scale", [1e-200, 1e-3, 1e160])
def test_targets_of_any_scale(scale):
    X, _, number = data()
    expected = regressor().fit(X, number).predict(X)
    np.testing.assert_allclose(
        regressor().fit(X, number * scale).predict(X) / scale, expected, rtol=1e-6, atol=1e-6
    )


def test_few_rows_and_rare_classes():
    X, label, number = data()
    few = regressor(early_stopping=True, max_iter=3).fit(X[:10], number[:10])
    assert np.isfinite(few.validation_scores_).all()
    rare = np.where(np.arange(400) == 7, "rare", label)
    assert len(classifier(early_stopping=True, max_iter=3).fit(X, rare).classes_) == 3
    with pytest.raises(ValueError, match="validation_fraction=0.1 of n_samples=3 "):
        classifier(early_stopping=True).fit(X[:3], ["low", "high", "low"])
    for sizes in [(-1,), (8.5,), (0,)]:
        with pytest.raises(ValueError, match="head_layer_sizes must be integers"):
            classifier(head_layer_sizes=sizes).fit(X, label)


def test_verbose_prints_a_line_for_each_epoch(capsys):
    X, label, _ = data(n=60)
    classifier(verbose=1, max_iter=3).fit(X, label)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("[DEQClassifier] epoch")]) == 3


@pytest.mark.parametrize("device", [CUDA])
def test_devices_agree(device):
    X, label, _ = data()
    expected = classifier(max_iter=3, device="cpu").fit(X, label)
    fitted = classifier(max_iter=3, device=device).fit(X, label)
    np.testing.assert_allclose(fitted.predict_proba(X), expected.predict_proba(X), atol=1e-4)


def test_a_frozen_backbone_survives_cloning():
    X, label, _ = data()
    everything = np.concatenate([X, sample("poisson", n=600, p=12, seed=0)])
    backbone = ExpFamilyDEQ(2, family="poisson", random_state=0).fit(everything)
    network = DEQClassifier(FrozenEstimator(backbone), max_iter=2, fine_tune=False, random_state=0)
    found = cross_validate(network, X, label, cv=3, return_estimator=True)
    for one in found["estimator"]:
        np.testing.assert_array_equal(one.backbone_.loadings_, backbone.loadings_)
    tuned = clone(network).set_params(fine_tune=True, warm_start=True).fit(X, label).fit(X, label)
    assert not np.array_equal(tuned.backbone_.loadings_, backbone.loadings_)
    with pytest.raises(ValueError, match="FrozenEstimator of LogisticRegression"):
        DEQClassifier(FrozenEstimator(LogisticRegression())).fit(X, label)
    unfitted = DEQClassifier(FrozenEstimator(ExpFamilyDEQ()))
    assert is_classifier(unfitted)
    with pytest.raises(NotFittedError):
        unfitted.fit(X, label)
    # Of a stream's first rows alone there would be one direction left.
    stream = DEQClassifier(backbone).partial_fit(X[:2], label[:2], classes=["high", "low"])
    assert (stream.backbone_.transform(X).std(axis=0) > 0.1).all()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_fits_where_the_caller_wants_no_gradients(context):
    X, label, _ = data()
    expected = classifier(max_iter=2).fit(X, label)
    with context():
        rows = torch.from_numpy(X)
        found = classifier(max_iter=2).fit(rows, label)
        found.partial_fit(rows, label)
        deep = ExpFamilyDEQ(2, hidden_layer_sizes=(3,), max_iter=2).fit(rows)
        assert deep.partial_fit(rows).transform(rows).shape == (400, 2)
        found = classifier(max_iter=2).fit(rows, label)
    np.testing.assert_array_equal(found.coefs_[0], expected.coefs_[0])


def test_several_targets_at_once():
    X, _, number = data()
    frozen = {"fine_tune": False, "head_layer_sizes": (), "learning_rate": 0.1}
    alone = regressor(**frozen).fit(X, number)
    targets = np.column_stack([number, -3 * number + 1, np.ones(len(X))])
    fitted = regressor(max_iter=60).fit(X, targets)
    predicted = fitted.predict(X)
    assert predicted.shape == targets.shape and fitted.predict(X[:1]).shape == (1, 3)
    assert [coef.shape for coef in fitted.coefs_] == [(2, 100), (100, 3)]
    assert r2_score(targets[:, :2], predicted[:, :2]) > 0.6
    np.testing.assert_allclose(predicted[:, 2], 1, atol=0.2)
    # A linear head on frozen latents has a least-squares solution for each target of its own.
    linear = LinearRegression().fit(alone.backbone_.transform(X), targets)
    options = {**frozen, "max_iter": 300, "weight_decay": 0.0, "tol": 0.0, "batch_size": 400}
    options |= {"learning_rate": 0.03, "n_iter_no_change": 300}
    fitted = regressor(**options).fit(X, targets)
    np.testing.assert_allclose(
        fitted.predict(X), linear.predict(alone.backbone_.transform(X)), atol=1e-3
    )
    expected = r2_score(targets[:, :2], linear.predict(alone.backbone_.transform(X))[:, :2])
    assert fitted.score(X, targets) == pytest.approx(
        r2_score(targets, fitted.predict(X)), abs=1e-12
    )
    assert r2_score(targets[:, :2], fitted.predict(X)[:, :2]) == pytest.approx(expected, abs=1e-4)


def test_several_targets_in_streams_and_restarts():
    X, _, number = data()
    targets = np.column_stack([number, number**2])
    stream = regressor().partial_fit(X[:200], targets[:200]).partial_fit(X[200:], targets[200:])
    before = stream.predict(X)
    with pytest.raises(ValueError, match=r"has 1 target.* had 2 .*batch 3"):
        stream.partial_fit(X, number)
    np.testing.assert_array_equal(stream.predict(X), before)
    again = regressor(warm_start=True, max_iter=3).fit(X, targets)
    # Another number of targets is another network.
    assert again.fit(X, number).predict(X).shape == (400,)
    held_out = regressor(early_stopping=True, max_iter=5).fit(X, targets)
    assert len(held_out.validation_scores_) == held_out.n_iter_
    assert cross_val_predict(regressor(max_iter=2), X, targets, cv=2).shape == (400, 2)
    with pytest.warns(DataConversionWarning, match="column-vector"):
        column = regressor().fit(X, number[:, np.newaxis])
    np.testing.assert_array_equal(column.predict(X), regressor().fit(X, number).predict(X))
    targets[7, 1] = np.inf
    with pytest.raises(ValueError, match="row 7, column 1 is inf"):
        regressor().fit(X, targets)


@pytest.mark.parametrize("learning_rate", [1.0, 10.0, 100.0])
def test_training_that_runs_away_is_undone(learning_rate):
    X, label, number = data("gaussian")
    options = {"learning_rate": learning_rate, "max_iter": 40}
    advice = rf"each time\. Lower learning_rate={learning_rate:g}\.$"
    with pytest.warns(ConvergenceWarning, match=f"DEQClassifier was set back .* {advice}"):
        fitted = classifier("gaussian", **options).fit(X, label)
    assert fitted.score(X, label) > 0.8
    assert max(fitted.loss_curve_) > 2 * np.log(2) > 2 * fitted.loss_curve_[-1]
    with pytest.warns(ConvergenceWarning, match=f"DEQRegressor was set back .* {advice}"):
        fitted = regressor("gaussian", **options).fit(X, number)
    assert fitted.score(X, number) > 0.6


@pytest.mark.parametrize("stream", [True, False])
def test_targets_of_zero_leave_a_scale_for_later_ones(stream):
    X = sample("gaussian", n=90, p=5)
    y = X @ np.arange(5.0)
    network = DEQRegressor(ExpFamilyDEQ(2, random_state=0), random_state=0, warm_start=not stream)
    learn = network.partial_fit if stream else network.set_params(max_iter=30).fit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        learn(X, np.zeros(90))
        for _ in range(100 if stream else 1):
            learn(X, y)
    assert np.isfinite(network.loss_curve_).all()
    assert network.score(X, y) > 0.3


def test_a_constant_target_is_predicted_exactly():
    X, _, number = data()
    fitted = regressor().fit(X, np.full(len(X), 1000.0))
    np.testing.assert_array_equal(fitted.predict(X), 1000.0)
    both = regressor(max_iter=60).fit(X, np.column_stack([number, np.full(len(X), -7.0)]))
    np.testing.assert_array_equal(both.predict(X)[:, 1], -7.0)
    assert r2_score(number, both.predict(X)[:, 0]) > 0.6
    # A stream may begin with one, and learn what comes after it.
    stream = regressor().partial_fit(X, np.full(len(X), 1.0))
    np.testing.assert_array_equal(stream.predict(X), 1.0)
    for _ in range(20):
        stream.partial_fit(X, number)
    assert stream.score(X, number) > 0.5


def test_probabilities_that_round_to_zero_have_logarithms():
    X, label, _ = data()
    fitted = classifier(max_iter=3).fit(X, label)
    np.testing.assert_allclose(np.exp(fitted.predict_log_proba(X)), fitted.predict_proba(X))
    fitted.coefs_[-1] = 1e6 * fitted.coefs_[-1]
    assert (fitted.predict_proba(X) == 0).any()
    assert np.isfinite(fitted.predict_log_proba(X)).all()


def test_a_fitted_backbone_that_is_asked_for_anew_is_fitted_anew():
    X, label, _ = data()
    backbone = ExpFamilyDEQ(2, family="poisson", random_state=0).fit(X)
    fitted = classifier(max_iter=1, backbone_learning_rate=1e-12)
    fitted.set_params(backbone=backbone).fit(X, label)
    np.testing.assert_allclose(fitted.backbone_.loadings_, backbone.loadings_, atol=1e-9)
    for k in (3, 5):
        fitted.set_params(backbone__n_components=k).fit(X, label)
        assert fitted.backbone_.components_.shape == (k, 12)
        assert fitted.coefs_[0].shape == (k, 100)
    # What makes no other model is no reason to.
    backbone = ExpFamilyDEQ(2, family="poisson", max_iter=2).fit(X)
    loadings = backbone.loadings_
    fitted.set_params(backbone=backbone, backbone__max_iter=50).fit(X, label)
    np.testing.assert_allclose(fitted.backbone_.loadings_, loadings, atol=1e-9)


def test_the_default_backbone_has_the_components_that_the_data_allow():
    X, y = load_digits(return_X_y=True)
    fitted = DEQClassifier(random_state=0, warm_start=True).fit(X[:900], y[:900])
    assert fitted.backbone_.components_.shape == (16, 64)
    assert fitted.score(X[900:], y[900:]) > 0.9
    head = fitted.coefs_[0]
    fitted.set_params(max_iter=1, learning_rate=1e-12).fit(X[:900], y[:900])
    np.testing.assert_allclose(fitted.coefs_[0], head, atol=1e-9)  # went on from there
    few = DEQClassifier(max_iter=1)
    assert few.fit(X[:7], y[:7]).backbone_.components_.shape == (2, 64)
    assert few.fit(X[:40], y[:40]).backbone_.components_.shape == (10, 64)
    weight = np.arange(40) % 3 + 1
    assert few.fit(X[:40], y[:40], weight).backbone_.components_.shape == (16, 64)
    assert few.fit(X[:150, 2:5], y[:150]).backbone_.components_.shape == (3, 3)


def test_equal_scores_of_few_rows_are_told_apart_by_their_loss():
    X, y = load_iris(return_X_y=True)
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    early = DEQClassifier(ExpFamilyDEQ(4), early_stopping=True, random_state=0)
    # With the score alone, on twelve rows held out, it was below 0.9.
    assert cross_val_score(early, X, y, cv=folds).mean() > 0.93


def test_a_warm_start_from_what_is_wrong_goes_on():
    X, label, number = data("gaussian")
    other = np.where(label == "low", "high", "low")
    flipped = classifier("gaussian", warm_start=True, max_iter=60).fit(X, label).fit(X, other)
    assert flipped.score(X, other) > 0.8
    smaller = regressor("gaussian", warm_start=True, max_iter=60).fit(X, 10 * number)
    assert smaller.fit(X, number).score(X, number) > 0.6


def test_a_frozen_backbone_stays_what_it_is():
    X, label, _ = data()
    backbone = ExpFamilyDEQ(2, family="poisson", random_state=0).fit(X)
    loadings = backbone.loadings_
    backbone.set_params(weight_decay=5.0)
    frozen = DEQClassifier(FrozenEstimator(backbone), fine_tune=False, max_iter=1).fit(X, label)
    np.testing.assert_array_equal(frozen.backbone_.loadings_, loadings)


def test_predictions_warn_of_rows_that_are_not_solved():
    X, label, _ = data()
    backbone = ExpFamilyDEQ(2, family="poisson", fixed_point_max_iter=1, random_state=0)
    with pytest.warns(ConvergenceWarning):
        fitted = DEQClassifier(backbone, fine_tune=False, max_iter=2, random_state=0).fit(X, label)
    for method in (fitted.predict, fitted.predict_proba):
        with pytest.warns(ConvergenceWarning, match="rows are not solved to fixed_point_tol"):
            method(X)


def test_a_stream_raises_the_kind_of_error_that_fit_does():
    X, label, _ = data()
    unfitted = DEQClassifier(FrozenEstimator(ExpFamilyDEQ(family="poisson")))
    with pytest.raises(NotFittedError, match="It is batch 1 of this stream"):
        unfitted.partial_fit(X, label, classes=np.unique(label))


def test_a_device_is_that_of_the_backbone_too():
    X, label, _ = data()
    fitted = classifier(max_iter=1, device="cpu").fit(X, label)
    assert fitted.backbone_.device == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="CUDA"):
            fitted.set_params(device="cuda").predict(X)


def test_a_backbone_that_went_blind_begins_again_with_shorter_steps():
    X, y = load_digits(n_class=3, return_X_y=True)
    X, y = X[:150], y[:150]
    backbone = ExpFamilyDEQ(3, family="poisson", random_state=0).fit(X)
    network = DEQClassifier(
        backbone,
        backbone_learning_rate=5.0,
        max_iter=40,
        n_iter_no_change=4,
        random_state=0,
    )
    message = "was set back .* or none with less than its loss.* or backbone_learning_rate=5\\.$"
    with pytest.warns(ConvergenceWarning, match=message):
        network.fit(X, y)
    assert network.score(X, y) > 0.8


@pytest.mark.parametrize("Estimator", [DEQClassifier, DEQRegressor])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", -1),
        ("weight_decay", -1),
        ("n_components", 0),
        ("n_components", 2.5),
        ("solver", "foo"),
        ("fixed_point", "foo"),
        ("max_iter", 0),
        ("tol", -1),
    ],
)
def test_parameters_of_the_backbone_are_validated(Estimator, name, value):
    X, y = load_iris(return_X_y=True)
    backbone = ExpFamilyDEQ(2, random_state=0)
    message = f"The '{name}' parameter of ExpFamilyDEQ"
    with pytest.raises(ValueError, match=message):
        Estimator(clone(backbone).set_params(**{name: value})).fit(X, y)
    first = {"classes": [0, 1, 2]} if Estimator is DEQClassifier else {}
    with pytest.raises(ValueError, match=message):
        Estimator(clone(backbone).set_params(**{name: value})).partial_fit(X, y, **first)
    # One that is fitted is not fitted again.
    fitted = backbone.fit(X).set_params(**{name: value})
    with pytest.raises(ValueError, match=message):
        Estimator(fitted).fit(X, y)


def test_classes_of_rows_without_weight_stay_classes():
    X, label, _ = data()
    label = np.where(np.arange(400) % 5, label, "unweighted")
    weight = (label != "unweighted").astype(float)
    fitted = classifier(max_iter=2, tol=10.0, n_iter_no_change=1).fit(X, label, weight)
    reference = LogisticRegression().fit(X, label, weight)
    np.testing.assert_array_equal(fitted.classes_, reference.classes_)
    assert fitted.predict_proba(X).shape == (400, 3)
    assert "unweighted" not in fitted.predict(X)


def test_a_fitted_backbone_of_another_penalty_is_fitted_anew():
    X, label, _ = data()
    backbone = ExpFamilyDEQ(2, family="poisson", random_state=0).fit(X)
    options = {"fine_tune": False, "max_iter": 2, "tol": 10.0, "n_iter_no_change": 1}
    kept = DEQClassifier(backbone, random_state=0, **options).fit(X, label).backbone_
    np.testing.assert_array_equal(kept.loadings_, backbone.loadings_)
    backbone.set_params(weight_decay=0.3)
    anew = DEQClassifier(backbone, random_state=0, **options).fit(X, label).backbone_
    expected = clone(backbone).fit(X).loadings_
    np.testing.assert_array_equal(anew.loadings_, expected)


def test_validation_sees_whole_rows_where_training_leaves_entries_out():
    X, label, _ = data(n=200)
    backbone = ExpFamilyDEQ(2, family="poisson", random_state=0).fit(X)
    options = {"early_stopping": True, "validation_fraction": 0.5, "max_iter": 5}
    network = classifier(dropout=0.8, fine_tune=False, **options).set_params(backbone=backbone)
    network.fit(X, label)
    seed = np.random.RandomState(0).randint(np.iinfo(np.int32).max, size=3)[2]
    _, rows = train_test_split(
        np.arange(200), test_size=100, random_state=int(seed), stratify=label
    )
    assert max(network.validation_scores_) == network.score(X[rows], label[rows])


@pytest.mark.parametrize("fine_tune", [True, False])
def test_a_step_that_is_taken_back_leaves_the_ones_before_it(fine_tune, monkeypatch):
    X, label, _ = data(n=60)
    backbone = ExpFamilyDEQ(2, family="poisson", random_state=0).fit(X)
    options = {"backbone": backbone, "fine_tune": fine_tune, "batch_size": 60}
    expected = classifier(max_iter=2).set_params(**options).fit(X, label)
    gradient, calls = HeadTrainer._gradient, []

    def astray_at_the_end(self, index, factor):
        calls.append(index)
        value = gradient(self, index, factor)
        return value if len(calls) < 4 else None

    monkeypatch.setattr(HeadTrainer, "_gradient", astray_at_the_end)
    with pytest.warns(ConvergenceWarning, match="1 steps of DEQClassifier .* were taken back"):
        fitted = classifier(max_iter=3).set_params(**options).fit(X, label)
    assert len(calls) == 4
    np.testing.assert_allclose(fitted.coefs_[0], expected.coefs_[0], rtol=1e-12)
    np.testing.assert_allclose(fitted.backbone_.intercept_, expected.backbone_.intercept_)


@pytest.mark.parametrize("make", [classifier, regressor])
def test_losses_that_epochs_are_judged_by_are_weighted(make, monkeypatch):
    X, label, number = data(n=200)
    y = label if make is classifier else number
    weight = np.random.default_rng(0).uniform(0.01, 10, size=200)
    n_outputs = 2 if make is classifier else 1
    mean_loss, of_nothing, seen = HeadTrainer.mean_loss, HeadTrainer.loss_of_nothing, []

    def spy(self, outputs, index):
        seen.append((outputs, index, mean_loss(self, outputs, index)))
        return seen[-1][-1]

    def spy_on_nothing(self, index):
        seen.append((np.zeros((len(index), n_outputs)), index.numpy(), of_nothing(self, index)))
        return seen[-1][-1]

    monkeypatch.setattr(HeadTrainer, "mean_loss", spy)
    monkeypatch.setattr(HeadTrainer, "loss_of_nothing", spy_on_nothing)
    network = make(early_stopping=True, fine_tune=False, max_iter=2)
    network.fit(X, y, sample_weight=weight)
    mean = np.average(number, weights=weight)
    scaled = (number - mean) / np.average((number - mean) ** 2, weights=weight) ** 0.5
    for outputs, index, found in seen:
        if make is classifier:
            shares = softmax(outputs, axis=1)
            expected = log_loss(label[index], shares, sample_weight=weight[index])
        else:
            errors = (outputs.ravel() - scaled[index]) ** 2 / 2
            expected = np.average(errors, weights=weight[index])
        assert found == pytest.approx(expected, rel=1e-5)
    assert len(seen) == 3


@pytest.mark.parametrize("learning_rate", [0.4, 0.5, 10.0])
def test_more_than_twice_the_loss_of_nothing_is_undone_to_before_the_step(learning_rate):
    X, label, _ = data("gaussian", n=200)
    options = {"fine_tune": False, "weight_decay": 1e-4, "batch_size": 200, "max_iter": 3}
    network = classifier("gaussian", learning_rate=learning_rate, **options).fit(X, label)
    start, astray, after = np.array(network.loss_curve_) / np.log(2)
    if learning_rate < 0.5:
        assert start < astray < 2 and after != pytest.approx(start, rel=1e-3)
    else:
        assert astray > 2 and after == pytest.approx(start, rel=1e-6)
    assert learning_rate != 0.5 or astray < 5


@pytest.mark.parametrize("fine_tune", [True, False])
def test_a_stream_that_trains_other_parameters_begins_with_new_moments(fine_tune):
    X, label, _ = data(n=60)
    stream = classifier(fine_tune=fine_tune, batch_size=60)
    for _ in range(2):
        stream.partial_fit(X, label, classes=["high", "low"])
    stream.set_params(fine_tune=not fine_tune).partial_fit(X, label)
    assert {float(one["step"]) for one in stream._solver_state} == {1}


def test_a_stream_from_a_fitted_backbone_is_principal_over_what_that_has_seen():
    X, label, _ = data(n=400)
    backbone = ExpFamilyDEQ(2, family="poisson", random_state=0).fit(X)
    stream = classifier(learning_rate=1e-9).set_params(backbone=backbone)
    stream.partial_fit(X[:40], label[:40], classes=["high", "low"])
    scores = stream.backbone_.transform(np.vstack([X, X[:40]]))
    assert abs(np.corrcoef(scores, rowvar=False)[0, 1]) < 1e-4
    assert abs(np.corrcoef(scores[400:], rowvar=False)[0, 1]) > 1e-2


def test_no_step_takes_more_than_half_of_the_weights():
    X, _, _ = data()
    options = {"fine_tune": False, "head_layer_sizes": (4,), "batch_size": 400, "max_iter": 1}
    network = regressor(learning_rate=5.0, tol=10.0, **options).fit(X, np.ones(len(X)))
    # Of constant targets nothing else moves them.
    none = regressor(learning_rate=5.0, weight_decay=0.0, tol=10.0, **options)
    first = none.fit(X, np.ones(len(X))).coefs_[0]
    np.testing.assert_allclose(network.coefs_[0], first / 2, rtol=1e-6)
