"""Lines of progress, scikit-learn's callbacks, and what an interrupted fit leaves behind."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import warnings

import joblib
import numpy as np
import pytest
import torch
from conftest import sample
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skdeq import DEQClassifier, DEQRegressor, ExpFamilyDEQ, ImplicitEMEncoder, _progress
from skdeq._encoder_fit import EncoderTrainer
from skdeq._head_training import HeadTrainer

# Fits that are cut short on purpose say so.
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

MAKE = {
    "scoring": lambda **options: ExpFamilyDEQ(2, random_state=0, max_iter=6, **options),
    "poisson": lambda **options: ExpFamilyDEQ(
        2, family="poisson", random_state=0, max_iter=6, **options
    ),
    "shared curvature": lambda **options: ExpFamilyDEQ(
        20, family="bernoulli", random_state=0, max_iter=6, **options
    ),
    "deep": lambda **options: ExpFamilyDEQ(
        2, hidden_layer_sizes=(4,), random_state=0, max_iter=6, **options
    ),
    "adam": lambda **options: ExpFamilyDEQ(
        2, solver="adam", random_state=0, max_iter=6, **options
    ),
    "encoder": lambda **options: ImplicitEMEncoder(16, random_state=0, max_iter=6, **options),
    "classifier": lambda **options: DEQClassifier(random_state=0, max_iter=6, **options),
    "dropout": lambda **options: DEQClassifier(dropout=0.5, random_state=0, max_iter=6, **options),
    "regressor": lambda **options: DEQRegressor(
        random_state=0, max_iter=6, early_stopping=True, **options
    ),
}
every_estimator = pytest.mark.parametrize("name", MAKE)


@pytest.fixture(autouse=True)
def large_problem(request, monkeypatch):
    if "shared curvature" in request.node.name:
        monkeypatch.setattr("skdeq._scoring._HESSIAN_FLOPS", 0)


def data(name):
    X = sample("bernoulli", n=120, p=24, k=3)
    return X, np.arange(120) % 2


def result(estimator, X):
    return estimator.transform(X) if hasattr(estimator, "transform") else estimator.predict(X)


class Recorder:
    """Writes down what it is told; may interrupt or stop a fit in one of its iterations."""

    def __init__(self, interrupt=None, stop=None, when="end"):
        self.interrupt, self.stop, self.when = interrupt, stop, when
        self.events, self.tasks, self.fitted = [], [], []

    def setup(self, estimator, context):
        self.events.append("setup")

    def teardown(self, estimator, context):
        self.events.append("teardown")

    def on_fit_task_begin(self, estimator, context, *, X=None, y=None, metadata=None):
        self.events.append("begin")
        self.tasks.append((context.estimator_name, context.task_name))
        self.seen = (X, y, metadata)
        if self.when == "begin":
            self._raise(context)

    def on_fit_task_end(self, estimator, context, *, fitted_estimator=None):
        self.events.append("end")
        self.fitted.append(fitted_estimator)
        if self.when == "end":
            self._raise(context)
        if self.when == "root" and context.parent is None:
            raise KeyboardInterrupt
        return context.task_id == self.stop and context.parent is not None

    def _raise(self, context):
        if context.parent is not None and context.task_id == self.interrupt:
            raise KeyboardInterrupt


@every_estimator
def test_verbose_says_what_is_left(name, capsys):
    X, y = data(name)
    estimator = MAKE[name](verbose=1).fit(X, y)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"[{type(estimator).__name__}] on cpu"
    assert len(lines) == estimator.n_iter_ > 1
    unit = "iteration" if name in ("scoring", "poisson", "shared curvature") else "epoch"
    for number, line in enumerate(lines, start=1):
        assert line.startswith(f"[{type(estimator).__name__}] {unit} {number:4d}  objective ")
        shown = float(re.search(r"objective (\S+)", line)[1])
        assert shown == pytest.approx(estimator.loss_curve_[number - 1], rel=1e-6)
        # The residuals are those that Newton's method or the solver of the latents finds anyway.
        assert ("residual" in line) == (name in ("scoring", "poisson", "adam", "deep"))
        assert ("validation score" in line) == (name == "regressor")
        each, left = map(float, re.search(r"  (\S+) s each, at most (\S+) s left$", line).groups())
        assert left == pytest.approx(each * (6 - number), rel=0.1, abs=0.06)


def test_residuals_shown_are_those_of_the_latents(capsys):
    X, _ = data("poisson")
    tight = {"fixed_point_tol": 1e-4, "tol": 1e-12}
    ExpFamilyDEQ(2, family="poisson", max_iter=300, verbose=1, **tight).fit(X)
    shares = [int(share) for share in re.findall(r"\((\d+) % of rows", capsys.readouterr().out)]
    # At the optimum the latents are at rest, too.
    assert shares[0] < 50 and shares[-1] == 100
    ExpFamilyDEQ(2, family="poisson", max_iter=3, solver="adam", verbose=1, **tight).fit(X)
    # Between steps it solves them to what a step can use, 1e-3.
    shown = re.findall(r"residual (\S+) \(100 % of rows solved\)", capsys.readouterr().out)
    assert len(shown) == 3 and all(float(residual) <= 1e-3 for residual in shown)


def test_the_residual_shown_is_the_largest(monkeypatch, capsys):
    end, largest = _progress.Progress.end, []

    def spy(self, *args, residual, **options):
        if self.verbose:  # the trials of a start have a progress of their own
            largest.append(f"residual {residual.numpy().max():.1e} (")
        return end(self, *args, residual=residual, **options)

    monkeypatch.setattr(_progress.Progress, "end", spy)
    X, _ = data("poisson")
    ExpFamilyDEQ(2, family="poisson", max_iter=3, verbose=1).fit(X)
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line, expected in zip(lines, largest, strict=True):
        assert expected in line


@every_estimator
def test_callbacks_see_every_iteration(name):
    pytest.importorskip("sklearn.callback")
    X, y = data(name)
    weight = np.ones(len(X))
    recorder = Recorder()
    estimator = MAKE[name]().set_callbacks(recorder).fit(X, y, sample_weight=weight)
    assert recorder.events[0] == "setup" and recorder.events[-1] == "teardown"
    assert recorder.events.count("begin") == recorder.events.count("end")
    assert recorder.events[1:3] == ["begin", "begin"] and recorder.events[-3:-1] == ["end", "end"]
    tasks = [task for who, task in recorder.tasks if who == type(estimator).__name__]
    unit = "iteration" if name in ("scoring", "poisson", "shared curvature") else "epoch"
    assert tasks.count(unit) == estimator.n_iter_
    assert ("pretrain" in tasks) == (name in ("classifier", "dropout", "regressor"))
    assert recorder.seen[0] is X and recorder.seen[1] is y
    assert recorder.seen[2]["sample_weight"] is weight
    # scikit-learn's books are closed.
    assert not [key for key in vars(estimator) if "callback" in key and key != "_skl_callbacks"]
    plain = MAKE[name]().fit(X, y, sample_weight=weight)
    assert plain.loss_curve_ == estimator.loss_curve_
    np.testing.assert_array_equal(result(plain, X), result(estimator, X))


@every_estimator
def test_fitted_estimator_of_a_callback_is_a_fit_that_ends_there(name):
    pytest.importorskip("sklearn.callback")
    X, y = data(name)
    recorder = Recorder()
    fitted = MAKE[name](tol=0).set_callbacks(recorder).fit(X, y)
    snapshots = [one for one in recorder.fitted if one is not None][:-1]
    # Complete Gaussian data start at their optimum and are done in half as many.
    assert len(snapshots) == fitted.n_iter_ == (3 if name == "scoring" else 6)
    for number in (1, 3, fitted.n_iter_):
        snapshot = snapshots[number - 1]
        assert snapshot.n_iter_ == len(snapshot.loss_curve_) == number
        if name in ("adam", "deep"):
            # The schedule of the steps depends on max_iter.
            assert np.isfinite(result(snapshot, X)).all()
            continue
        shorter = MAKE[name](tol=0).set_params(max_iter=number).fit(X, y)
        np.testing.assert_allclose(result(snapshot, X), result(shorter, X), atol=1e-6)
        assert snapshot.loss_curve_ == shorter.loss_curve_


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fitted_estimator_of_a_callback_has_the_best_parameters_so_far(dropout):
    pytest.importorskip("sklearn.callback")
    X, y = data("classifier")
    options = {"early_stopping": True, "tol": 0, "learning_rate": 0.1, "dropout": dropout}
    recorder = Recorder()
    MAKE["classifier"](**options).set_callbacks(recorder).fit(X, y)
    snapshots = [one for one in recorder.fitted if one is not None][:-1]
    scores = snapshots[-1].validation_scores_
    assert int(np.argmax(scores)) < 5, "the last epoch must not be the best"
    for number, snapshot in enumerate(snapshots, start=1):
        shorter = MAKE["classifier"](**options).set_params(max_iter=number).fit(X, y)
        assert snapshot.validation_scores_ == shorter.validation_scores_
        np.testing.assert_allclose(snapshot.predict_proba(X), shorter.predict_proba(X), atol=1e-8)
        # The state of the solver belongs to it, too.
        for each in (snapshot, shorter):
            each.partial_fit(X, y)
        np.testing.assert_allclose(snapshot.predict_proba(X), shorter.predict_proba(X), atol=1e-8)


@every_estimator
def test_callback_may_stop_a_fit(name):
    pytest.importorskip("sklearn.callback")
    X, y = data(name)
    stop = 3 if name in ("classifier", "dropout", "regressor") else 2
    with warnings.catch_warnings():
        # What was stopped on purpose has not failed to converge.
        warnings.simplefilter("error", ConvergenceWarning)
        options = {"backbone": ExpFamilyDEQ(2, tol=0.1)} if stop == 3 else {}
        estimator = MAKE[name](tol=0, **options).set_callbacks(Recorder(stop=stop)).fit(X, y)
    assert estimator.n_iter_ == 3
    assert np.isfinite(result(estimator, X)).all()


def check_nothing_is_left(estimator, before, threads, X, y):
    assert vars(estimator) == before
    assert torch.get_num_threads() == threads[0]
    assert threading.enumerate() == threads[1]
    # The estimator and the pool of threads serve another fit.
    estimator.fit(X, y)


@pytest.mark.parametrize("when", ["begin", "end", "root"])
@every_estimator
def test_interrupt_in_a_callback_leaves_nothing_behind(name, when):
    pytest.importorskip("sklearn.callback")
    X, y = data(name)
    before_all = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        recorder = Recorder(interrupt=2, when=when)
        estimator = MAKE[name]().set_callbacks(recorder)
        before, threads = dict(vars(estimator)), (2, threading.enumerate())
        with pytest.raises(KeyboardInterrupt):
            estimator.fit(X, y)
        assert recorder.events[-1] == "teardown"
        recorder.interrupt = recorder.when = None
        check_nothing_is_left(estimator, before, threads, X, y)
        # A model that was there is still there.
        before, threads = dict(vars(estimator)), (2, threading.enumerate())
        recorder.interrupt, recorder.when = 2, when
        with pytest.raises(KeyboardInterrupt):
            estimator.fit(X, y)
        recorder.interrupt = recorder.when = None
        check_nothing_is_left(estimator, before, threads, X, y)
    finally:
        torch.set_num_threads(before_all)


@every_estimator
def test_interrupt_while_reporting_leaves_nothing_behind(name, monkeypatch):
    X, y = data(name)
    estimator = MAKE[name]()
    before, threads = dict(vars(estimator)), (torch.get_num_threads(), threading.enumerate())

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(_progress.Progress, "end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        estimator.fit(X, y)
    monkeypatch.undo()
    check_nothing_is_left(estimator, before, threads, X, y)


INTERRUPTED = """
import signal, threading
import numpy as np, torch
from skdeq import DEQClassifier, ExpFamilyDEQ, ImplicitEMEncoder

# Whoever starts the tests in the background may have had it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
X = np.random.default_rng(0).poisson(1.0, size=(10_000, 40)).astype(float)
y = np.arange(len(X)) % 2
options = {{"max_iter": 100_000, "tol": 0, "verbose": 1}}
estimator = {estimator}
threads = torch.get_num_threads()
try:
    estimator.fit(X, y)
except KeyboardInterrupt:
    print("INTERRUPTED", sorted(key for key in vars(estimator) if key.endswith("_")),
          torch.get_num_threads() == threads, len(threading.enumerate()), flush=True)
estimator.set_params(max_iter=2).fit(X[:500], y[:500])
print("FITTED", estimator.n_iter_, flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="sends the signal of Ctrl-C to another process")
@pytest.mark.parametrize(
    "estimator",
    [
        'ExpFamilyDEQ(2, family="poisson", **options)',
        "ImplicitEMEncoder(16, **options)",
        "DEQClassifier(ExpFamilyDEQ(2, max_iter=2), n_iter_no_change=100_000, **options)",
    ],
)
def test_interrupt_from_the_keyboard(estimator):
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", INTERRUPTED.format(estimator=estimator)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    # A child that never says a word is not waited for longer than its import may take.
    patience = threading.Timer(120, process.kill)
    patience.start()
    try:
        device, first = process.stdout.readline(), process.stdout.readline()
    finally:
        patience.cancel()
    if " objective " not in first:
        process.kill()
    assert " objective " in first, (device, first, process.communicate())
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "INTERRUPTED [] True 1\n" in output
    assert output.endswith("FITTED 2\n")
    assert not errors


def test_scoring_monitor_follows_the_score():
    callback = pytest.importorskip("sklearn.callback")
    X, y = data("poisson")

    def score(estimator, X, y, sample_weight=None):
        return {"score": estimator.score(X, y, sample_weight=sample_weight)}

    monitor = callback.ScoringMonitor(scoring=score)
    weight = np.linspace(0.5, 2, len(X))
    estimator = MAKE["poisson"]().set_callbacks(monitor).fit(X, y, sample_weight=weight)
    log = [row["score"] for row in monitor.get_logs().data if row["task_name"] == "iteration"]
    assert len(log) == estimator.n_iter_
    assert log[-1] == pytest.approx(estimator.score(X, sample_weight=weight), rel=1e-9)
    monitor = callback.ScoringMonitor(scoring="accuracy")
    classifier = MAKE["classifier"]().set_callbacks(monitor).fit(X, y)
    log = [row["accuracy"] for row in monitor.get_logs().data if row["task_name"] == "epoch"]
    assert len(log) == classifier.n_iter_
    assert log[-1] == pytest.approx(classifier.score(X, y))


@every_estimator
def test_progress_bars(name, capsys):
    pytest.importorskip("rich")
    callback = pytest.importorskip("sklearn.callback")
    X, y = data(name)
    estimator = MAKE[name]().set_callbacks(callback.ProgressBar())
    estimator.fit(X, y)
    shown = capsys.readouterr().out
    assert f"{type(estimator).__name__} - fit" in shown and "100%" in shown
    # The backbone is fitted inside, and has a bar of its own.
    assert ("ExpFamilyDEQ - fit" in shown) == (not name == "encoder")


def test_callbacks_in_pipelines_searches_and_processes(capsys):
    pytest.importorskip("rich")
    callback = pytest.importorskip("sklearn.callback")
    X, y = data("scoring")
    pipeline = make_pipeline(StandardScaler(), MAKE["scoring"](), MAKE["classifier"]())
    pipeline.set_callbacks(callback.ProgressBar(max_propagation_depth=None)).fit(X, y)
    shown = capsys.readouterr().out
    for part in ("StandardScaler", "ExpFamilyDEQ", "DEQClassifier"):
        assert f"{part} - fit" in shown
    search = GridSearchCV(MAKE["encoder"](), {"n_components": [8, 16]}, cv=2, n_jobs=2)
    search.set_callbacks(callback.ProgressBar(max_propagation_depth=None)).fit(X)
    assert "ImplicitEMEncoder - fit" in capsys.readouterr().out


def test_callbacks_are_kept_by_clones_and_pickles(tmp_path):
    pytest.importorskip("sklearn.callback")
    X, y = data("scoring")
    recorder = Recorder()
    copy = clone(MAKE["scoring"]().set_callbacks(recorder)).fit(X)
    assert recorder.events[-1] == "teardown"
    joblib.dump(copy, tmp_path / "model.joblib")
    np.testing.assert_array_equal(
        joblib.load(tmp_path / "model.joblib").transform(X), copy.transform(X)
    )
    with pytest.raises(TypeError, match="FitCallback"):
        copy.set_callbacks("progress")


@every_estimator
def test_partial_fit_is_one_task(name):
    pytest.importorskip("sklearn.callback")
    X, y = data(name)
    estimator = MAKE[name]()
    stream = {"classes": [0, 1]} if name in ("classifier", "dropout") else {}
    estimator.partial_fit(X, y, **stream)
    recorder = Recorder()
    estimator.set_callbacks(recorder).partial_fit(X, y)
    assert recorder.events == ["setup", "begin", "end", "teardown"]
    np.testing.assert_array_equal(result(recorder.fitted[0], X), result(estimator, X))
    recorder.when, before = "root", dict(vars(estimator))
    with pytest.raises(KeyboardInterrupt):
        estimator.partial_fit(X, y)
    assert vars(estimator) == before


def test_without_the_callbacks_of_scikit_learn(monkeypatch, capsys):
    # As scikit-learn 1.8, which has none.
    monkeypatch.setitem(sys.modules, "sklearn.callback", None)
    spec = importlib.util.spec_from_file_location("progress_without_callbacks", _progress.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Counter(module.CallbackSupportMixin, BaseEstimator):
        verbose, device = 1, "cpu"

        def fit(self, X, y=None):
            with module.training(self, X, y, None, most=2) as progress:
                with progress.part("first", ExpFamilyDEQ()):
                    pass
                for objective in (3.0, 2.0):
                    progress.begin()
                    assert not progress.end(objective, lambda: None)
                self.n_iter_ = 2
            return self

    counter = Counter().fit([[0.0]])
    assert counter.n_iter_ == 2 and not hasattr(counter, "set_callbacks")
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2


def test_what_a_callback_is_given_has_no_data_of_its_own(monkeypatch):
    pytest.importorskip("sklearn.callback")
    ended, shared = HeadTrainer.ended, []

    def watched(self, kept):
        copied = ended(self, kept)
        names = ("rows", "_rows_at_hand", "_targets")
        shared.append([getattr(copied, name) is getattr(self, name) for name in names])
        return copied

    monkeypatch.setattr(HeadTrainer, "ended", watched)
    X, y = data("classifier")
    MAKE["classifier"]().set_callbacks(Recorder()).fit(X, y)
    assert shared
    assert all(map(all, shared))


def test_callback_may_stop_a_fit_in_an_epoch_that_is_undone(monkeypatch):
    pytest.importorskip("sklearn.callback")
    X, _ = data("encoder")
    epoch, epochs = EncoderTrainer.epoch, []

    def counted(self, *args):
        epochs.append(epoch(self, *args))
        return epochs[-1]

    monkeypatch.setattr(EncoderTrainer, "epoch", counted)
    encoder = MAKE["encoder"](learning_rate=1e300, activation="identity", batch_size=40)
    encoder.set_callbacks(Recorder(stop=0)).fit(X)
    assert len(epochs) == 1 and not np.isfinite(epochs[0])


def test_callback_may_stop_a_fit_that_would_go_on_from_zero():
    pytest.importorskip("sklearn.callback")
    X = 10 * np.random.default_rng(2).normal(size=(40, 10))
    model = ExpFamilyDEQ(2, canonical_map="softplus", random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        whole = clone(model).fit(X)
        stops = range(whole.n_iter_)
        fits = [clone(model).set_callbacks(Recorder(stop=stop)).fit(X) for stop in stops]
    assert [fitted.n_iter_ for fitted in fits] == [stop + 1 for stop in stops]
    # Whoever lets it go on has no worse a model.
    assert whole.loss_curve_[-1] <= min(fitted.loss_curve_[-1] for fitted in fits[-3:]) + 1e-9
