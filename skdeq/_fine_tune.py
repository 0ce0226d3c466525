"""DEQClassifier and DEQRegressor: a network on top of the equilibrium, trained through it."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from scipy.special import log_softmax, softmax
from sklearn.base import ClassifierMixin, RegressorMixin, _fit_context
from sklearn.metrics import accuracy_score, mean_squared_error
from sklearn.preprocessing import LabelEncoder
from sklearn.utils import Tags, check_array, column_or_1d
from sklearn.utils.multiclass import check_classification_targets

from skdeq._base import host_array, returned, stream_batch
from skdeq._chunks import parallel_chunks
from skdeq._fine_tune_base import FineTuned, ScoredOnHost
from skdeq._typing import MatrixLike, Output, VectorLike

__all__ = ["DEQClassifier", "DEQRegressor"]

_PARAMETERS = """
    Parameters
    ----------
    backbone : ExpFamilyDEQ, FrozenEstimator of one, or None, default=None
        The model of X below the head. A fitted one is copied and trained further; one that is
        not, or whose parameters ask for another model since, is fitted first, without the
        targets. None is a Gaussian one of 16 components, or of fewer: one for every four rows,
        and as many as there are features; to choose its parameters, or search over them, give one.
        Cloning, as
        cross-validation and grid searches do, unfits it like any other parameter, unless it is
        in a :class:`~sklearn.frozen.FrozenEstimator`.

    head_layer_sizes : tuple of int, default=(100,)
        Units of the ReLU layers between the centred and scaled latents and the output; () is a
        linear head.

    fine_tune : bool, default=True
        Whether loadings and intercept of the backbone are trained with the head, by implicit
        differentiation of the equilibrium. If not, the head sees frozen latents.

    dropout : float, default=0.0
        Share of the entries, in [0, 1), that each visit to a row in training leaves out at random:
        the equilibrium takes them as missing. It keeps the network from learning the training
        rows by heart; prediction sees all entries.

    learning_rate : float, default=0.01
        Step size of Adam for the head.

    backbone_learning_rate : float or None, default=None
        Step size of Adam for the backbone; None is a third of `learning_rate`, since it
        knows the data already.

    weight_decay : float or None, default=None
        Decoupled decay of the head's weights: each step takes this times `learning_rate` off as
        a share of them. None is 4 divided by the number of minibatches in an epoch, so that an
        epoch takes off as much whatever the number of rows, 4 % at the default rate (a step never
        more than half); and 1e-4 in streams.

    batch_size : int, default=128
        Rows of a minibatch at most.

    max_iter : int, default=100
        Epochs.

    tol : float, default=1e-4
        Least progress of the loss, or of the validation score, that counts as such; where that
        score stays the same, of the loss on the rows held out.

    n_iter_no_change : int, default=10
        Epochs in a row without progress that end the training.

    early_stopping : bool, default=False
        Whether to hold rows out, watch the score on them and keep the parameters that were best,
        of equal scores those with the lowest loss there.

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
        1 prints the device, and a line for each epoch: the loss, the score on the rows held out,
        and the time to `max_iter`. The backbone has a `verbose` of its own. For progress bars see
        :ref:`progress`.
"""

_ATTRIBUTES = """
    Attributes
    ----------
    backbone_ : ExpFamilyDEQ
        The backbone as trained; its `transform` gives the features. After fine-tuning it has no
        `explained_deviance_ratio_`; its `loss_curve_`, `n_iter_` and `converged_` are those of
        its own fit.
    coefs_ : list of ndarray of shape (n_in, n_out)
        Weights of the head's layers.
    intercepts_ : list of ndarray of shape (n_out,)
        Their biases.
    loss_curve_ : list of float
        Mean loss of each epoch; infinite if all of its steps were taken back.
    validation_scores_ : list of float or None
        Score on the rows held out after each epoch, with ``early_stopping=True``.
    n_iter_ : int
        Epochs run.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of features seen during fit, if X has string names.
"""


class DEQClassifier(ScoredOnHost, ClassifierMixin, FineTuned):
    __doc__ = f"""Classifier on the latents of an exponential-family model, trained end to end.

    The latents of each row are the equilibrium of :class:`~skdeq.ExpFamilyDEQ`; a small network
    on top of them predicts the class. Both are trained on the cross-entropy together, the first
    by implicit differentiation [1]_ (Section 5).
{_PARAMETERS}{_ATTRIBUTES}    classes_ : ndarray of shape (n_classes,)
        The labels.

    See Also
    --------
    DEQRegressor : The same for numbers to be predicted.
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

    @_fit_context(prefer_skip_nested_validation=False)
    def partial_fit(
        self,
        X: MatrixLike,
        y: VectorLike,
        classes: VectorLike | None = None,
        sample_weight: VectorLike | None = None,
    ) -> Self:
        """Go once through some rows of a stream, in minibatches in the order given.

        The first call fits the backbone, if need be, to its rows. A batch that is refused leaves
        the model as it was, and its number in the stream is in the message.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
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

        Raises
        ------
        ValueError
            If parameters that shape the model are no longer those it has.
        """
        fitting = self._fitting(X, y, sample_weight, stream=True)
        with stream_batch(self, sample_weight), fitting as progress, parallel_chunks():
            going_on, classes = hasattr(self, "coefs_"), host_array(classes, "classes")
            if not going_on and classes is None:
                raise ValueError("classes must be given in the first call of partial_fit.")
            if (
                going_on
                and classes is not None
                and not np.array_equal(np.unique(classes), self.classes_)
            ):
                raise ValueError(
                    f"classes={np.unique(classes).tolist()} are not those of the first call, "
                    f"{self.classes_.tolist()}."
                )
            labels = None if going_on else column_or_1d(np.asarray(classes))
            self._pass_once(X, y, sample_weight, progress, labels=labels)
        return self

    def predict_proba(self, X: MatrixLike) -> Output:
        """Probabilities of the classes.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Observations in the support of the backbone's family; NaN where missing.

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            In the order of `classes_`.
        """
        return returned(softmax(self._outputs(X), axis=1), X)

    def predict_log_proba(self, X: MatrixLike) -> Output:
        """Logarithms of the probabilities of the classes.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Observations in the support of the backbone's family; NaN where missing.

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            In the order of `classes_`; finite where probabilities round to zero.
        """
        return returned(log_softmax(self._outputs(X), axis=1), X)

    def predict(self, X: MatrixLike) -> Output:
        """Most probable class of each row.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Observations in the support of the backbone's family; NaN where missing.

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        outputs = self._outputs(X)
        return returned(self.classes_[np.argmax(outputs, axis=1)], X)

    def _check_y(self, y):
        check_classification_targets(y)
        return column_or_1d(y, warn=True)

    def _learn_targets(self, given, y, sample_weight) -> None:
        """Take note of the labels, those that are only of rows without weight among them."""
        self.classes_ = np.unique(given)
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

    def _settled(self, targets):
        return np.zeros(len(self.classes_), dtype=bool)

    def _strata(self, targets):
        return targets

    def _loss(self):
        return torch.nn.CrossEntropyLoss(reduction="none")

    def _metric(self, targets, outputs, weight) -> float:
        return accuracy_score(targets, outputs.argmax(axis=1), sample_weight=weight)


class DEQRegressor(ScoredOnHost, RegressorMixin, FineTuned):
    __doc__ = f"""Regressor on the latents of an exponential-family model, trained end to end.

    The latents of each row are the equilibrium of :class:`~skdeq.ExpFamilyDEQ`; a small network
    on top of them predicts a number, or several. Both are trained on the squared error together,
    the first by implicit differentiation [1]_ (Section 5).
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

    @_fit_context(prefer_skip_nested_validation=False)
    def partial_fit(
        self, X: MatrixLike, y: VectorLike, sample_weight: VectorLike | None = None
    ) -> Self:
        """Go once through some rows of a stream, in minibatches in the order given.

        The first call fits the backbone, if need be, and settles number, location and scale of
        the targets. A batch that is refused leaves the model as it was, and its number in the
        stream is in the message.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Observations in the support of the backbone's family; NaN where missing.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            Numbers.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights.

        Returns
        -------
        self : DEQRegressor
            The updated estimator.

        Raises
        ------
        ValueError
            If parameters that shape the model are no longer those it has.
        """
        fitting = self._fitting(X, y, sample_weight, stream=True)
        with stream_batch(self, sample_weight), fitting as progress, parallel_chunks():
            self._pass_once(X, y, sample_weight, progress)
        return self

    def predict(self, X: MatrixLike) -> Output:
        """Predicted numbers of each row.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Observations in the support of the backbone's family; NaN where missing.

        Returns
        -------
        ndarray of shape (n_samples,) or (n_samples, n_outputs)
            As y was in fit, float64: numbers may have more digits, or be larger, than X.
        """
        # Before numpy 2 a product with a float64 scalar keeps float32.
        outputs = self._outputs(X).astype(np.float64)
        values = outputs if self._target_mean.ndim else outputs[:, 0]
        return returned(values * self._target_scale + self._target_mean, X)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _check_y(self, y):
        y = check_array(
            y, ensure_2d=False, dtype=np.float64, ensure_all_finite=False, input_name="y"
        )
        if y.ndim != 2 or y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        if not np.isfinite(y).all():
            row, *column = np.argwhere(~np.isfinite(y))[0].tolist()
            place = f"row {row}" + "".join(f", column {one}" for one in column)
            raise ValueError(f"Input y contains NaN or infinity: {place} is {y[row, *column]}.")
        return y

    def _learn_targets(self, given, y, sample_weight) -> None:
        """Take note of location and scale."""
        largest = np.abs(y).max(axis=0)
        # Of zeros there is no scale, and later targets may have any.
        largest = np.where(largest > 0, largest, 1.0)
        mean = np.average(y / largest, axis=0, weights=sample_weight)
        spread = np.sqrt(np.average(np.square(y / largest - mean), axis=0, weights=sample_weight))
        # Of a constant only rounding is left.
        constant = spread <= 8 * np.finfo(float).eps
        self._target_mean = np.asarray(mean * largest)
        self._target_scale = np.asarray(np.where(constant, 1.0, spread) * largest)

    def _target_units(self) -> tuple[np.ndarray, np.ndarray]:
        return self._target_mean, self._target_scale

    def _knows(self, y) -> bool:
        return y.shape[1:] == self._target_mean.shape

    def _encode_targets(self, y):
        if not self._knows(y):
            now, before = np.prod(y.shape[1:], dtype=int), self._n_outputs()
            raise ValueError(
                f"y has {now} target(s) for each row, but it had {before} in the first call."
            )
        return (y - self._target_mean) / self._target_scale

    def _n_outputs(self) -> int:
        return self._target_mean.size

    def _settled(self, targets):
        """Say which outputs have targets that do not differ."""
        return ~np.atleast_2d(targets.T).any(axis=1)

    def _strata(self, targets):
        return None

    def _loss(self):
        return _half_squared_error

    def _metric(self, targets, outputs, weight) -> float:
        # As r2_score, but relative to the spread of all training targets, which is one.
        targets = targets.reshape(outputs.shape)
        return 1 - mean_squared_error(targets, outputs, sample_weight=weight)


def _half_squared_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return 0.5 * (outputs - targets.reshape(outputs.shape)).square().mean(dim=1)
