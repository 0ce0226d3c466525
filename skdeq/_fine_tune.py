"""DEQClassifier and DEQRegressor: a network on top of the equilibrium, trained through it."""

import copy
import warnings
from numbers import Integral, Real

import numpy as np
import torch
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, _fit_context, clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score, mean_squared_error
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import LabelEncoder
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils._param_validation import Interval
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted

from skdeq._base import Versioned, check_observations, resolve_device, unchanged_on_error
from skdeq._chunks import parallel_chunks
from skdeq._expfam_deq import ExpFamilyDEQ
from skdeq._head_training import Head, HeadOptions, HeadTrainer, TrainingRows
from skdeq.families import get_family

__all__ = ["DEQClassifier", "DEQRegressor"]


class _FineTuned(Versioned, BaseEstimator):
    """What classifier and regressor share; a subclass has a loss, a score and its targets."""

    _parameter_constraints = {
        "backbone": [ExpFamilyDEQ, None],
        "head_layer_sizes": ["array-like"],
        "fine_tune": ["boolean"],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
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

    _doc_link_module = "skdeq"
    _doc_link_template = (
        "https://skdeq.github.io/skdeq/generated/{estimator_module}.{estimator_name}.html"
    )

    def __init__(
        self,
        backbone=None,
        *,
        head_layer_sizes=(100,),
        fine_tune=True,
        learning_rate=0.01,
        weight_decay=1e-4,
        batch_size=128,
        max_iter=100,
        tol=1e-4,
        n_iter_no_change=10,
        early_stopping=False,
        validation_fraction=0.1,
        warm_start=False,
        device="auto",
        random_state=None,
        verbose=0,
    ):
        self.backbone = backbone
        self.head_layer_sizes = head_layer_sizes
        self.fine_tune = fine_tune
        self.learning_rate = learning_rate
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

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y, sample_weight=None):
        """Pretrain the backbone unless it is fitted, and train it and the head together.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Observations in the support of the backbone's family; NaN where missing.
        y : array-like of shape (n_samples,)
            Targets.
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
        with unchanged_on_error(self), parallel_chunks():
            X, y, sample_weight = self._validated(X, y, sample_weight, reset=True)
            going_on = self.warm_start and self._fits_together(X.shape[1], y)
            if not going_on:
                self._learn_targets(y, sample_weight)
            targets = self._encode_targets(y)
            self._train(X, targets, sample_weight, going_on=going_on, stream=False)
        return self

    def _validated(self, X, y, sample_weight, *, reset: bool):
        self._check_head()
        family = get_family((self._backbone() if reset else self.backbone_).family)
        y = self._check_y(y)
        X = check_observations(self, X, family, reset=reset)
        if len(y) != X.shape[0]:
            raise ValueError(
                f"Found input variables with inconsistent numbers of samples: X has {X.shape[0]}, "
                f"y has {len(y)}."
            )
        if sample_weight is not None:
            sample_weight = _check_sample_weight(
                sample_weight, X, dtype=X.dtype, ensure_non_negative=True
            )
            kept = np.flatnonzero(sample_weight)
            X, y, sample_weight = X[kept], y[kept], sample_weight[kept]
        return X, y, sample_weight

    def _check_head(self) -> None:
        for size in self.head_layer_sizes:
            if not (isinstance(size, Integral) and size >= 1):
                raise ValueError(
                    "head_layer_sizes must be integers of at least 1; got "
                    f"{tuple(self.head_layer_sizes)!r}."
                )

    def _fits_together(self, n_features: int, y) -> bool:
        """Whether what is fitted has the shapes and the law that the parameters ask for."""
        if not hasattr(self, "coefs_"):
            return False
        asked, there = self._backbone(), self.backbone_
        laws = ("n_components", "family", "canonical_map", "exposure", "alpha")
        sizes = [coef.shape[1] for coef in self.coefs_[:-1]]
        return (
            all(getattr(asked, name) == getattr(there, name) for name in laws)
            and there.n_features_in_ == n_features
            and sizes == list(self.head_layer_sizes)
            and self._knows(y)
        )

    def _backbone(self) -> ExpFamilyDEQ:
        return ExpFamilyDEQ() if self.backbone is None else self.backbone

    def _pretrained(self, X, sample_weight, seed: int) -> ExpFamilyDEQ:
        """Copy of the backbone, fitted."""
        backbone = self._backbone()
        if hasattr(backbone, "components_"):
            if backbone.n_features_in_ != X.shape[1]:
                raise ValueError(
                    f"X has {X.shape[1]} features, but the backbone was fitted on "
                    f"{backbone.n_features_in_}."
                )
            names = getattr(backbone, "feature_names_in_", None)
            seen = getattr(self, "feature_names_in_", None)
            if names is not None and seen is not None and not np.array_equal(names, seen):
                raise ValueError(
                    "The feature names of X are not those that the backbone was fitted with, or "
                    f"in another order: {seen.tolist()} instead of {names.tolist()}."
                )
            return copy.deepcopy(backbone)
        backbone = clone(backbone)
        # The features were named when X was a data frame still.
        if backbone.random_state is None:
            backbone.set_params(random_state=seed)
        backbone.fit(X, sample_weight=sample_weight)
        if hasattr(self, "feature_names_in_"):
            backbone.feature_names_in_ = self.feature_names_in_
        return backbone

    def _latents(self, X) -> np.ndarray:
        """MAP latents of validated rows."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="X does not have valid feature names")
            return self.backbone_.map_latents(X).value

    def _train(self, X, targets, sample_weight, *, going_on: bool, stream: bool) -> None:
        random_state = check_random_state(self.random_state)
        seeds = random_state.randint(np.iinfo(np.int32).max, size=3)
        device = resolve_device(self.device)
        if not going_on:
            self.backbone_ = self._pretrained(X, sample_weight, int(seeds[0]))
            latents = self._latents(X)
            head = Head.start(
                latents,
                sample_weight,
                tuple(self.head_layer_sizes),
                self._n_outputs(),
                torch.Generator().manual_seed(int(seeds[1])),
            )
        else:
            latents = self._latents(X)
            head = Head(self._centre, self._scale, self.coefs_, self.intercepts_)
        train, held_out = np.arange(X.shape[0]), None
        if self.early_stopping and not stream:
            train, held_out = self._split(targets, int(seeds[2]))
        rows = TrainingRows(X, targets, sample_weight, latents, device)
        trainer = HeadTrainer(
            self.backbone_.to_module(), head, self._head_options(), rows, self._loss()
        )
        if stream:
            trainer.load_state(self._solver_state if going_on else None)
            trainer.pass_once(train)
            converged = True
        else:
            score = None
            if held_out is not None:

                def score() -> float:
                    outputs = trainer.outputs(held_out)
                    weight = None if sample_weight is None else sample_weight[held_out]
                    return self._metric(targets[held_out], outputs, weight)

            generator = torch.Generator().manual_seed(int(seeds[2]))
            converged = trainer.fit(train, generator, score)
        self._store(trainer, going_on and stream)
        if trainer.taken_back:
            warnings.warn(
                f"{trainer.taken_back} steps of {type(self).__name__} left the domain of family "
                f"{self.backbone_.family!r} or the finite numbers and were taken back: lower "
                f"learning_rate={self.learning_rate:g}.",
                ConvergenceWarning,
                stacklevel=4,
            )
        elif not converged:
            what = "loss" if held_out is None else "validation score"
            warnings.warn(
                f"{type(self).__name__} did not converge: within max_iter={self.max_iter} epochs "
                f"the {what} never stood still, to within tol={self.tol:g}, for "
                f"n_iter_no_change={self.n_iter_no_change} of them; increase max_iter or tol.",
                ConvergenceWarning,
                stacklevel=4,
            )

    def _head_options(self) -> HeadOptions:
        return HeadOptions(
            fine_tune=bool(self.fine_tune),
            learning_rate=float(self.learning_rate),
            weight_decay=float(self.weight_decay),
            batch_size=int(self.batch_size),
            max_iter=int(self.max_iter),
            tol=float(self.tol),
            n_iter_no_change=int(self.n_iter_no_change),
            name=type(self).__name__,
            verbose=int(self.verbose),
        )

    def _split(self, targets, seed: int):
        # One row alone has no score, and a class with one row cannot be on both sides.
        n_held_out = max(2, round(self.validation_fraction * len(targets)))
        if n_held_out > len(targets) - 2:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} of {len(targets)} rows leaves "
                "too few to train on or to validate; set early_stopping=False."
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

    def _store(self, trainer: HeadTrainer, append: bool) -> None:
        head = trainer.head_arrays()
        if self.fine_tune:
            # Not in place: what went wrong later on could not be undone.
            self.backbone_ = copy.copy(self.backbone_)
            self.backbone_._replace_parameters(
                *trainer.backbone_arrays(), trainer.rows.sample_weight
            )
        self.coefs_, self.intercepts_ = head.coefs, head.intercepts
        self._centre, self._scale = head.centre, head.scale
        past = self.loss_curve_ if append else []
        self.loss_curve_ = [*past, *trainer.loss_curve]
        self.n_iter_ = len(self.loss_curve_)
        self.validation_scores_ = trainer.scores if trainer.scores else None
        self._solver_state = trainer.state()

    def _outputs(self, X) -> np.ndarray:
        """Compute the outputs of the head (n, n_outputs)."""
        check_is_fitted(self)
        X = check_observations(self, X, get_family(self.backbone_.family), reset=False)
        head = Head(self._centre, self._scale, self.coefs_, self.intercepts_)
        return head(self._latents(X))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        backbone = self._backbone().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.allow_nan = True
        tags.input_tags.positive_only = backbone.input_tags.positive_only
        return tags


_PARAMETERS = """
    Parameters
    ----------
    backbone : ExpFamilyDEQ or None, default=None
        The model of X below the head. A fitted one is copied and trained further; one that is
        not is fitted first, without the targets. None is ``ExpFamilyDEQ()``. Cloning, as a grid
        search does, unfits it like any other parameter.

    head_layer_sizes : tuple of int, default=(100,)
        Units of the ReLU layers between the standardised latents and the output; () is a linear
        head.

    fine_tune : bool, default=True
        Whether loadings and intercept of the backbone are trained with the head, by implicit
        differentiation of the equilibrium. If not, the head sees frozen latents.

    learning_rate : float, default=0.01
        Step size of Adam, for head and backbone.

    weight_decay : float, default=1e-4
        Decoupled decay of the head's weights.

    batch_size : int, default=128
        Rows of a minibatch at most.

    max_iter : int, default=100
        Epochs.

    tol : float, default=1e-4
        Least progress of the loss, or of the validation score, that counts as such.

    n_iter_no_change : int, default=10
        Epochs in a row without progress that end the training.

    early_stopping : bool, default=False
        Whether to hold rows out, watch the score on them and keep the parameters that were best.

    validation_fraction : float, default=0.1
        Share of the rows held out then.

    warm_start : bool, default=False
        Whether `fit` goes on from the backbone and the head of the last fit, if they have the
        shapes, the law and the classes asked for.

    device : str or torch.device, default="auto"
        "cpu", "cuda", "cuda:1", or "auto" for CUDA where there is one.

    random_state : int, RandomState instance or None, default=None
        Seed of the head's first weights, of the minibatches, of the rows held out, and of a
        backbone that has none.

    verbose : int, default=0
        1 prints a line for each epoch.
"""

_ATTRIBUTES = """
    Attributes
    ----------
    backbone_ : ExpFamilyDEQ
        The backbone as trained; its `transform` gives the features. After fine-tuning it has no
        `explained_deviance_ratio_`.
    coefs_ : list of ndarray of shape (n_in, n_out)
        Weights of the head's layers.
    intercepts_ : list of ndarray of shape (n_out,)
        Their biases.
    loss_curve_ : list of float
        Mean loss of each epoch.
    validation_scores_ : list of float or None
        Score on the rows held out after each epoch, with ``early_stopping=True``.
    n_iter_ : int
        Epochs run.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of features seen during fit, if X has string names.
"""


class DEQClassifier(ClassifierMixin, _FineTuned):
    __doc__ = f"""Classifier on the latents of an exponential-family model, trained end to end.

    The latents of each row are the equilibrium of :class:`~skdeq.ExpFamilyDEQ`; a small network
    on top of them predicts the class. Both are trained on the cross-entropy together, the first
    by implicit differentiation [1]_ (Section 5).
{_PARAMETERS}{_ATTRIBUTES}    classes_ : ndarray of shape (n_classes,)
        The labels.

    See Also
    --------
    DEQRegressor : The same for a number to be predicted.
    skdeq.nn.EquilibriumLayer : The layer, for networks of your own.

    References
    ----------
    .. [1] R. Tsuchida and C. S. Ong (2023). Deep equilibrium models as estimators for
       continuous latent variables. AISTATS, PMLR 206, 1646-1671. arXiv:2211.05943.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skdeq import DEQClassifier, ExpFamilyDEQ
    >>> from skdeq.families import Binomial
    >>> X, y = load_digits(return_X_y=True)
    >>> classifier = DEQClassifier(
    ...     ExpFamilyDEQ(10, family=Binomial(16)), max_iter=5, tol=1, n_iter_no_change=3,
    ...     random_state=0,
    ... )
    >>> bool(classifier.fit(X[:1000], y[:1000]).score(X[1000:], y[1000:]) > 0.85)
    True
    """

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X, y, classes=None, sample_weight=None):
        """Go once through some rows of a stream, in minibatches in the order given.

        The first call fits the backbone, if need be, to its rows.

        Parameters
        ----------
        X : {{array-like, sparse matrix}} of shape (n_samples, n_features)
            Observations in the support of the backbone's family; NaN where missing.
        y : array-like of shape (n_samples,)
            Labels.
        classes : array-like of shape (n_classes,), default=None
            All labels that will ever occur; needed in the first call.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights.

        Returns
        -------
        self : DEQClassifier
            The updated estimator.
        """
        with unchanged_on_error(self), parallel_chunks():
            going_on = hasattr(self, "coefs_")
            if not going_on and classes is None:
                raise ValueError("classes must be given in the first call of partial_fit.")
            if (
                going_on
                and classes is not None
                and not np.array_equal(np.unique(classes), self.classes_)
            ):
                raise ValueError(
                    f"classes={list(classes)} are not those of the first call, "
                    f"{self.classes_.tolist()}."
                )
            X, y, sample_weight = self._validated(X, y, sample_weight, reset=not going_on)
            if not going_on:
                self._learn_targets(column_or_1d(np.asarray(classes)), None)
            targets = self._encode_targets(y)
            self._train(X, targets, sample_weight, going_on=going_on, stream=True)
        return self

    def predict_proba(self, X):
        """Probabilities of the classes.

        Parameters
        ----------
        X : {{array-like, sparse matrix}} of shape (n_samples, n_features)
            Observations in the support of the backbone's family; NaN where missing.

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            In the order of `classes_`.
        """
        return softmax(self._outputs(X), axis=1)

    def predict(self, X):
        """Most probable class of each row.

        Parameters
        ----------
        X : {{array-like, sparse matrix}} of shape (n_samples, n_features)
            Observations in the support of the backbone's family; NaN where missing.

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        outputs = self._outputs(X)
        return self.classes_[np.argmax(outputs, axis=1)]

    def _check_y(self, y):
        check_classification_targets(y)
        return column_or_1d(y, warn=True)

    def _learn_targets(self, y, sample_weight) -> None:
        """Take note of the labels."""
        self.classes_ = np.unique(y)
        if len(self.classes_) < 2:
            raise ValueError(
                f"{type(self).__name__} needs at least two classes; y has one class, "
                f"{self.classes_.tolist()[0]!r}."
            )

    def _knows(self, y) -> bool:
        return np.array_equal(np.unique(y), self.classes_)

    def _encode_targets(self, y):
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(
                f"y has the label {unknown.tolist()[0]!r}, which is not among the classes of the "
                f"first call, {self.classes_.tolist()}."
            )
        encoder = LabelEncoder()
        encoder.classes_ = self.classes_
        return encoder.transform(y)

    def _n_outputs(self) -> int:
        return len(self.classes_)

    def _strata(self, targets):
        return targets

    def _loss(self):
        return torch.nn.CrossEntropyLoss(reduction="none")

    def _metric(self, targets, outputs, weight) -> float:
        return accuracy_score(targets, outputs.argmax(axis=1), sample_weight=weight)


class DEQRegressor(RegressorMixin, _FineTuned):
    __doc__ = f"""Regressor on the latents of an exponential-family model, trained end to end.

    The latents of each row are the equilibrium of :class:`~skdeq.ExpFamilyDEQ`; a small network
    on top of them predicts a number. Both are trained on the squared error together, the first
    by implicit differentiation [1]_ (Section 5).
{_PARAMETERS}{_ATTRIBUTES}
    See Also
    --------
    DEQClassifier : The same for classes.
    skdeq.nn.EquilibriumLayer : The layer, for networks of your own.

    References
    ----------
    .. [1] R. Tsuchida and C. S. Ong (2023). Deep equilibrium models as estimators for
       continuous latent variables. AISTATS, PMLR 206, 1646-1671. arXiv:2211.05943.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from sklearn.preprocessing import scale
    >>> from skdeq import DEQRegressor, ExpFamilyDEQ
    >>> X, y = load_diabetes(return_X_y=True)
    >>> regressor = DEQRegressor(ExpFamilyDEQ(4), tol=1e-2, random_state=0).fit(scale(X), y)
    >>> bool(regressor.score(scale(X), y) > 0.4)
    True
    """

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X, y, sample_weight=None):
        """Go once through some rows of a stream, in minibatches in the order given.

        The first call fits the backbone, if need be, and settles location and scale of y.

        Parameters
        ----------
        X : {{array-like, sparse matrix}} of shape (n_samples, n_features)
            Observations in the support of the backbone's family; NaN where missing.
        y : array-like of shape (n_samples,)
            Numbers.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights.

        Returns
        -------
        self : DEQRegressor
            The updated estimator.
        """
        with unchanged_on_error(self), parallel_chunks():
            going_on = hasattr(self, "coefs_")
            X, y, sample_weight = self._validated(X, y, sample_weight, reset=not going_on)
            if not going_on:
                self._learn_targets(y, sample_weight)
            targets = self._encode_targets(y)
            self._train(X, targets, sample_weight, going_on=going_on, stream=True)
        return self

    def predict(self, X):
        """Predicted number of each row.

        Parameters
        ----------
        X : {{array-like, sparse matrix}} of shape (n_samples, n_features)
            Observations in the support of the backbone's family; NaN where missing.

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        outputs = self._outputs(X)
        return outputs[:, 0] * self._target_scale + self._target_mean

    def _check_y(self, y):
        y = column_or_1d(y, warn=True)
        y = np.asarray(y, dtype=np.float64)
        if not np.isfinite(y).all():
            place = np.flatnonzero(~np.isfinite(y))[0]
            raise ValueError(f"Input y contains NaN or infinity: row {place} is {y[place]}.")
        return y

    def _learn_targets(self, y, sample_weight) -> None:
        """Take note of location and scale."""
        largest = max(float(np.abs(y).max()), np.finfo(float).tiny)
        mean = np.average(y / largest, weights=sample_weight)
        spread = np.sqrt(np.average(np.square(y / largest - mean), weights=sample_weight))
        # Of a constant only rounding is left.
        constant = spread <= 8 * np.finfo(float).eps
        self._target_mean = mean * largest
        self._target_scale = largest if constant else spread * largest

    def _knows(self, y) -> bool:
        return True

    def _encode_targets(self, y):
        return (y - self._target_mean) / self._target_scale

    def _n_outputs(self) -> int:
        return 1

    def _strata(self, targets):
        return None

    def _loss(self):
        return _half_squared_error

    def _metric(self, targets, outputs, weight) -> float:
        # As r2_score, but relative to the spread of all training targets, which is one.
        return 1 - mean_squared_error(targets, outputs[:, 0], sample_weight=weight)


def _half_squared_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return 0.5 * (outputs.squeeze(1) - targets).square()
