"""What DEQClassifier and DEQRegressor share: validate, pretrain, train the two together, store."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from numbers import Integral, Real
from typing import Self

import numpy as np
import torch
from sklearn import config_context
from sklearn.base import _fit_context
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import train_test_split
from sklearn.utils import Tags, check_random_state
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import check_is_fitted

from skdeq._base import VersionedMixin, host_array, resolve_device
from skdeq._chunks import parallel_chunks
from skdeq._expfam_deq import ExpFamilyDEQ
from skdeq._fine_tune_backbone import WithBackbone
from skdeq._head import Head
from skdeq._head_epochs import train_head
from skdeq._head_training import HeadOptions, HeadTrainer, TrainingRows
from skdeq._optimiser_state import OptimiserState
from skdeq._progress import CallbackSupportMixin, Progress, training
from skdeq._typing import MatrixLike, RandomState, VectorLike
from skdeq._validation import (
    check_observations,
    check_stream_type,
    refuse_changes,
    weighted_rows,
)
from skdeq._warn import warn_of_convergence
from skdeq.families import get_family

__all__ = ["FineTuned", "ScoredOnHost"]


class ScoredOnHost:
    """Compute scikit-learn's score from arrays on the host, wherever rows and targets are."""

    def score(
        self, X: MatrixLike, y: VectorLike, sample_weight: VectorLike | None = None
    ) -> float:
        """Score of the predictions: accuracy of a classifier, R2 of a regressor.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Observations in the support of the backbone's family; NaN where missing.
        y : array-like of shape (n_samples,)
            True labels or numbers; of a regressor also (n_samples, n_outputs).
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights.

        Returns
        -------
        float
        """
        with config_context(array_api_dispatch=False):
            weight = host_array(sample_weight, "sample_weight")
            return super().score(X, host_array(y, "y"), weight)  # type: ignore[misc]


# How many times as slowly as the head the backbone learns by default. As fast is at times worse
# than frozen (gamma data of rank 2: 0.82 of the labels right, frozen 0.90, a third 0.94), and a
# tenth takes long to gain anything (digits, k = 6, 30 epochs: 0.88; a third 0.89, as fast 0.91).
_SLOWER = 3
# Default of the decay of the weights, times the minibatches of an epoch: with a fixed decay for
# each step an epoch of few rows, who need it most, would take next to nothing off.
_DECAY_OF_AN_EPOCH = 4.0
# Share of the weights that it takes off in one step at most, whatever the rate.
_MOST_OF_A_STEP = 0.5
# The same in a stream, of which nobody knows how many rows are to come.
_DECAY_OF_A_STREAM = 1e-4


class FineTuned(CallbackSupportMixin, VersionedMixin, WithBackbone):
    """What classifier and regressor share; a subclass has a loss, a score and its targets."""

    loss_curve_: list[float]
    _solver_state: OptimiserState

    _parameter_constraints = {
        "backbone": [ExpFamilyDEQ, FrozenEstimator, None],
        "head_layer_sizes": ["array-like"],
        "fine_tune": ["boolean"],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "backbone_learning_rate": [Interval(Real, 0, None, closed="neither"), None],
        "weight_decay": [Interval(Real, 0, None, closed="left"), None],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "warm_start": ["boolean"],
        "device": [str, torch.device],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        backbone: ExpFamilyDEQ | FrozenEstimator | None = None,
        *,
        head_layer_sizes: Sequence[int] = (100,),
        fine_tune: bool = True,
        dropout: float = 0.0,
        learning_rate: float = 0.01,
        backbone_learning_rate: float | None = None,
        weight_decay: float | None = None,
        batch_size: int = 128,
        max_iter: int = 100,
        tol: float = 1e-4,
        n_iter_no_change: int = 10,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        warm_start: bool = False,
        device: str | torch.device = "auto",
        random_state: RandomState = None,
        verbose: int = 0,
    ) -> None:
        self.backbone = backbone
        self.head_layer_sizes = head_layer_sizes
        self.fine_tune = fine_tune
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.backbone_learning_rate = backbone_learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.tol = tol
        self.n_iter_no_change = n_iter_no_change
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.warm_start = warm_start
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=False)
    def fit(self, X: MatrixLike, y: VectorLike, sample_weight: VectorLike | None = None) -> Self:
        """Pretrain the backbone unless it is fitted, and train it and the head together.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Observations in the support of the backbone's family; NaN where missing.
        y : array-like of shape (n_samples,)
            Targets; of a regressor also (n_samples, n_outputs).
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights.

        Returns
        -------
        self : object
            The fitted estimator.

        Raises
        ------
        ValueError
            For observations outside the support of the family, naming row and column.
        """
        with self._fitting(X, y, sample_weight) as progress, parallel_chunks():
            given, X, y, sample_weight = self._validated(X, y, sample_weight, reset=True)
            going_on = self.warm_start and self._fits_together(X.shape[1], given)
            if not going_on:
                self._learn_targets(given, y, sample_weight)
            targets = self._encode_targets(y)
            self._train(X, targets, sample_weight, progress, going_on=going_on, stream=False)
            self._n_batches = 0
        return self

    def _fitting(
        self,
        X: MatrixLike,
        y: VectorLike,
        sample_weight: VectorLike | None,
        *,
        stream: bool = False,
    ) -> AbstractContextManager[Progress]:
        """Context in which this estimator is fitted, or takes in some rows of a stream."""
        most = 0 if stream else int(self.max_iter)
        # The backbone, which is pretrained first, is a fit of its own.
        return training(self, X, y, sample_weight, unit="epoch", most=most, parts=1)

    def _pass_once(self, X, y, sample_weight, progress: Progress, *, labels=None) -> None:
        """Go once through some rows; of the first call learn the targets, or take the labels."""
        going_on = hasattr(self, "coefs_")
        given, X, y, sample_weight = self._validated(X, y, sample_weight, reset=not going_on)
        if going_on:
            check_stream_type(X, self.coefs_[0])
            refuse_changes(self._changes())
        else:
            self._learn_targets(given if labels is None else labels, y, sample_weight)
        targets = self._encode_targets(y)
        self._train(X, targets, sample_weight, progress, going_on=going_on, stream=True)

    def _validated(self, X, y, sample_weight, *, reset: bool):
        """Validate; return all targets, and rows, targets and weights of positive weight."""
        self._check_head()
        self._check_backbone()
        family = get_family((self._backbone() if reset else self.backbone_).family)
        if y is None:
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None."
            )
        y = self._check_y(host_array(y, "y"))
        X = check_observations(self, X, family, reset=reset)
        if len(y) != X.shape[0]:
            raise ValueError(
                f"Found input variables with inconsistent numbers of samples: X has {X.shape[0]}, "
                f"y has {len(y)}."
            )
        sample_weight, X, kept = weighted_rows(sample_weight, X, y)
        return y, X, kept, sample_weight

    def _check_head(self) -> None:
        for size in self.head_layer_sizes:
            if not (isinstance(size, Integral) and int(size) >= 1):
                raise ValueError(
                    "head_layer_sizes must be integers of at least 1; got "
                    f"{tuple(self.head_layer_sizes)!r}."
                )

    def _fits_together(self, n_features: int, y) -> bool:
        """Whether what is fitted has the shapes and the law that the parameters ask for."""
        if not hasattr(self, "coefs_"):
            return False
        same_columns = self.backbone_.n_features_in_ == n_features
        return same_columns and not self._changes() and self._knows(y)

    def _train(
        self, X, targets, sample_weight, progress: Progress, *, going_on: bool, stream: bool
    ) -> None:
        random_state = check_random_state(self.random_state)
        seeds = [int(one) for one in random_state.randint(np.iinfo(np.int32).max, size=3)]
        if going_on:
            head, latents = self._head(), self._latents(X)
        else:
            head, latents = self._begin(X, targets, sample_weight, progress, seeds)
        train, held_out = np.arange(X.shape[0]), None
        if self.early_stopping and not stream:
            train, held_out = self._split(targets, seeds[2])
        rows = TrainingRows(X, targets, sample_weight, latents, resolve_device(self.device, X))
        # In a stream every batch leaves out others.
        past = len(self.loss_curve_) if going_on and stream else 0
        generator = torch.Generator("cpu").manual_seed(seeds[2] + past)
        layer = self.backbone_.to_module()
        options = self._head_options(None if stream else len(train))
        trainer = HeadTrainer(layer, head, options, rows, self._loss(), generator)
        if stream:
            trainer.load_state(self._solver_state if going_on else [])
            trainer.pass_once(train)
            converged = True
        else:
            progress.store = FineTuned._store
            score = None if held_out is None else self._score_on(trainer, held_out)
            converged = train_head(trainer, train, progress, score, going_on) or progress.stopped
        # A backbone that was fitted before has seen more than this batch.
        pooled = stream and (going_on or self._is_pretrained())
        self._store(trainer, append=going_on and stream, pooled=pooled)
        self._warn_of_training(
            trainer, converged, "loss" if held_out is None else "validation score"
        )

    def _begin(
        self, X, targets, sample_weight, progress: Progress, seeds: list[int]
    ) -> tuple[Head, np.ndarray]:
        """Fit the backbone, if need be, and draw a head for its latents; both of them."""
        self.backbone_ = self._pretrained(X, sample_weight, progress, seeds[0])
        latents = self._latents(X)
        head = Head.start(
            latents,
            sample_weight,
            tuple(self.head_layer_sizes),
            self._n_outputs(),
            torch.Generator("cpu").manual_seed(seeds[1]),
        )
        head.silence(self._settled(targets))
        return head, latents

    def _score_on(
        self, trainer: HeadTrainer, held_out: np.ndarray
    ) -> Callable[[], tuple[float, float]]:
        """Score of rows, and their mean loss with its sign changed, at what is trained so far."""
        targets, weight = trainer.rows.targets[held_out], trainer.rows.sample_weight
        weight = None if weight is None else weight[held_out]

        def score() -> tuple[float, float]:
            outputs = trainer.outputs(held_out)
            merit = self._metric(targets, outputs, weight)
            return merit, -trainer.mean_loss(outputs, held_out)

        return score

    def _warn_of_training(self, trainer: HeadTrainer, converged: bool, watched: str) -> None:
        lower = f"learning_rate={self.learning_rate:g}"
        if self.fine_tune and self.backbone_learning_rate is not None:
            lower += f" or backbone_learning_rate={self.backbone_learning_rate:g}"
        if trainer.taken_back:
            warn_of_convergence(
                f"{trainer.taken_back} steps of {type(self).__name__} left the domain of family "
                f"{self.backbone_.family!r} or the finite numbers and were taken back: lower "
                f"{lower}."
            )
        elif trainer.undone:
            times = "once" if trainer.undone == 1 else f"{trainer.undone} times"
            warn_of_convergence(
                f"{type(self).__name__} was set back {times}, since an epoch ended with more than "
                "twice the loss of a prediction that knows nothing of the rows, or none with less "
                "than its loss; the training went on with a tenth of the step each time. Lower "
                f"{lower}."
            )
        elif not converged:
            early = ", or end where rows held out are predicted best, by early_stopping=True"
            warn_of_convergence(
                f"{type(self).__name__} did not converge: within max_iter={self.max_iter} epochs "
                f"the {watched} never stood still, to within tol={self.tol:g}, for "
                f"n_iter_no_change={self.n_iter_no_change} of them; increase max_iter or tol"
                f"{'' if self.early_stopping else early}."
            )

    def _head_options(self, n_rows: int | None = None) -> HeadOptions:
        """Options of a fit to so many rows; None in a stream, where nobody knows."""
        weight_decay = self.weight_decay
        if weight_decay is None:
            weight_decay = _DECAY_OF_A_STREAM
            if n_rows is not None:
                weight_decay = _DECAY_OF_AN_EPOCH / -(-n_rows // int(self.batch_size))
                weight_decay = min(weight_decay, _MOST_OF_A_STEP / float(self.learning_rate))
        backbone_learning_rate = self.backbone_learning_rate
        if backbone_learning_rate is None:
            backbone_learning_rate = self.learning_rate / _SLOWER
        return HeadOptions(
            fine_tune=bool(self.fine_tune),
            dropout=float(self.dropout),
            learning_rate=float(self.learning_rate),
            backbone_learning_rate=float(backbone_learning_rate),
            weight_decay=float(weight_decay),
            batch_size=int(self.batch_size),
            max_iter=int(self.max_iter),
            tol=float(self.tol),
            n_iter_no_change=int(self.n_iter_no_change),
        )

    def _split(self, targets, seed: int):
        # One row alone has no score, and a class with one row cannot be on both sides.
        n_held_out = max(2, round(self.validation_fraction * len(targets)))
        if n_held_out > len(targets) - 2:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} of n_samples={len(targets)} "
                "leaves too few to train on or to validate; set early_stopping=False."
            )
        strata = self._strata(targets)
        if strata is not None:
            counts = np.bincount(strata)
            counts = counts[counts > 0]
            if counts.min() < 2 or len(counts) > min(n_held_out, len(targets) - n_held_out):
                strata = None
        return train_test_split(
            np.arange(len(targets)), test_size=n_held_out, random_state=seed, stratify=strata
        )

    def _store(self, trainer: HeadTrainer, append: bool = False, pooled: bool = False) -> None:
        head = trainer.head_arrays()
        if self.fine_tune:
            # Not in place: what went wrong later on could not be undone.
            self.backbone_ = copy.copy(self.backbone_)
            rows = trainer.rows
            self.backbone_._replace_parameters(
                trainer.layer,
                rows.X,
                rows.sample_weight,
                start=trainer.near_latents(),
                of_stream=pooled,
            )
        self.coefs_, self.intercepts_ = head.coefs, head.intercepts
        self._centre, self._scale = head.centre, head.scale
        past = self.loss_curve_ if append else []
        self.loss_curve_ = [*past, *trainer.loss_curve]
        self.n_iter_ = len(self.loss_curve_)
        self.validation_scores_ = list(trainer.scores) if trainer.scores else None
        self._solver_state = trainer.state()

    def _outputs(self, X) -> np.ndarray:
        """Compute the outputs of the head (n, n_outputs)."""
        check_is_fitted(self)
        X = check_observations(self, X, get_family(self.backbone_.family), reset=False)
        return self._head()(self._latents(X, checked=True))

    def to_module(self) -> torch.nn.Sequential:
        """Return the network as a torch module, to go on with outside of scikit-learn.

        Returns
        -------
        torch.nn.Sequential
            The equilibrium layer, which here gives latents and not scores, and the head; location
            and scale of latents and targets are in the weights. It returns the logits
            (n, n_classes) of a classifier, in the order of `classes_`, or the predictions
            (n, n_outputs) of a regressor, in the type of the backbone, on the CPU.
        """
        check_is_fitted(self)
        layer = self.backbone_.to_module()
        layer.rotation = None
        head = self._head().modules(*self._target_units(), layer.loadings.dtype)
        return torch.nn.Sequential(layer, *head)

    def _target_units(self) -> tuple[np.ndarray, np.ndarray]:
        """Location and scale that outputs have to be brought to; of logits none."""
        return np.zeros(()), np.ones(())

    def _head(self) -> Head:
        return Head(self._centre, self._scale, self.coefs_, self.intercepts_)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        backbone = self._backbone().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.allow_nan = True
        tags.input_tags.positive_only = backbone.input_tags.positive_only
        return tags
