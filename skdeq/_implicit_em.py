"""ImplicitEMEncoder: sparse features from one linear layer, without a decoder."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Literal, Self

import torch
from sklearn.base import (
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    _fit_context,
)
from sklearn.utils import Tags
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from skdeq._base import (
    VersionedMixin,
    resolve_device,
    returned,
    stream_batch,
    to_tensor,
)
from skdeq._data import to_rows
from skdeq._encoder_base import EncoderBase
from skdeq._encoder_fit import (
    OPTIMISERS,
)
from skdeq._progress import CallbackSupportMixin, training
from skdeq._typing import MatrixLike, Output, RandomState, VectorLike
from skdeq._validation import (
    check_codes,
    check_rows,
)
from skdeq.objectives import (
    ACTIVATIONS,
    Activation,
    BatchObjective,
    ObjectiveWeights,
    responsibilities,
    weight_redundancy,
)

__all__ = ["ImplicitEMEncoder"]


class ImplicitEMEncoder(
    CallbackSupportMixin,
    VersionedMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    EncoderBase,
):
    r"""Sparse features without a decoder: one linear layer trained by implicit EM.

    Each component measures a distance ``d_j = phi(w_j^T x + b_j)`` of a row, low where it
    matches. Training minimises, over minibatches,

    .. math:: \lambda_{lse} \, \overline{-\log \sum_j e^{-d_j}}
              - \lambda_{var} \sum_j \log(\mathrm{Var}(d_j) + 10^{-6})
              + \lambda_{dec} \sum_{i \neq j} \mathrm{Corr}(d)_{ij}^2 .

    The gradient of the first term in a distance is exactly the component's responsibility
    ``softmax(-d)_j`` for the row, so that gradient descent performs expectation-maximisation
    implicitly; the second term keeps every component alive and the third keeps them distinct
    [1]_ (Equation 7). Features are sparse, and cost half the parameters of a sparse autoencoder.
    A zero means that the component claims the row, as most do of most rows: what tells is a
    distance. Weights point away from what is claimed: look at the negative of `components_`.

    Read more in the :ref:`User Guide <implicit_em>`.

    Parameters
    ----------
    n_components : int, default=64
        Number of components K; it may exceed the number of features. With fewer than 32 or so
        a smaller `lse_weight` (2, say) makes better features.

    activation : {"relu", "softplus", "identity", "abs"} or pair of callables, default="relu"
        phi, elementwise. "abs" is a Mahalanobis distance along one direction. A pair is the
        function and its derivative, both of a tensor that they leave as it is. Only with "abs"
        has the objective a lower bound: see `score`.

    lse_weight : float, default=128.0
        Weight of the log-sum-exp term, a mean over rows. The published runs sum it over batches
        of 128 rows: the same balance. It makes most distances exactly zero, so that a component
        is told by the few rows it is far from; with weights below 10 it is told by those it
        claims.

    variance_weight : float, default=1.0
        Weight of the variance term. With 0 all components die.

    decorrelation_weight : float, default=1.0
        Weight of the decorrelation term. With 0 all components become alike.

    weight_redundancy : float, default=0.0
        Weight of a penalty on the squared cosines between the rows of `components_`.

    solver : {"sgd", "adam"}, default="sgd"
        Optimiser of the minibatches, with a constant step.

    learning_rate : float, default=0.01
        Step size, for rows of any scale: see Notes. For "adam" 0.001 is a good value. Where
        it makes the loss run away upwards, or keeps it above that of the random start, epochs are
        undone and the rest of the fit goes on with a tenth of it.

    momentum : float, default=0.0
        Momentum of "sgd", in [0, 1).

    batch_size : int, default=128
        Rows of a minibatch at most. Variances and correlations are those of a minibatch, so it
        should exceed `n_components`.

    max_iter : int, default=20
        Epochs, a budget and no promise of convergence: features are usually good long before
        the objective is at rest. What counts are steps, some thousands of them: with few rows
        take more epochs.

    tol : float, default=1e-4
        Stop once five epochs in a row have not lowered the objective by this share of its
        magnitude, or of one where that is less; 0 runs all epochs.

    revive_dead : bool, default=False
        Whether components that hardly vary in an epoch of `fit` get new random weights before
        the next. The objective stays the published one; the trajectory does not.

    output : {"activations", "responsibilities"}, default="activations"
        What `transform` returns: the distances d, or ``softmax(-d)``, whose rows sum to one. The
        first make better features for a linear model, the second are for reading.

    warm_start : bool, default=False
        Whether `fit` starts from the weights of the last fit, if their shapes agree.

    device : str or torch.device, default="auto"
        "cpu", "cuda", "cuda:1", or "auto" for CUDA where there is one. Fitted attributes are
        numpy arrays in any case.

    random_state : int, RandomState instance or None, default=None
        Seed of the first weights and of the minibatches.

    verbose : int, default=0
        1 prints the device, and a line for each epoch: the objective, and the time to `max_iter`.
        For progress bars see :ref:`progress`.

    Attributes
    ----------
    components_ : ndarray of shape (n_components, n_features)
        Weights w, for rows as they come; zero for features that never varied in training.
    intercept_ : ndarray of shape (n_components,)
        Biases b.
    loss_curve_ : list of float
        Mean objective of the minibatches of each epoch that was not undone.
    n_iter_ : int
        How many these are.
    dead_components_ : ndarray of shape (n_dead,)
        Indices of components whose distance has a variance under 0.01 over the training rows
        (after `partial_fit`, over those of the last call).
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of features seen during fit, if X has string names.

    See Also
    --------
    ExpFamilyDEQ : Latents of an exponential-family model.
    sklearn.decomposition.MiniBatchDictionaryLearning : Sparse codes with a decoder.

    Notes
    -----
    Training sees rows that are centred by feature and divided by one number, so that their mean
    squared norm is 100 whatever the units of X; location and scale are folded back into
    `components_` and `intercept_`. Features of very different units still want a
    :class:`~sklearn.preprocessing.StandardScaler` first, as they do for PCA.

    Rows of booleans, uint8, int8 and int16 are trained in float32 batch by batch, without a copy
    of the matrix as floats; other integers in float64.

    References
    ----------
    .. [1] A. Oursland (2026). Deriving Decoder-Free Sparse Autoencoders from First Principles.
       arXiv:2601.06478.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skdeq import ImplicitEMEncoder
    >>> X, _ = load_digits(return_X_y=True)
    >>> encoder = ImplicitEMEncoder(32, random_state=0).fit(X)
    >>> encoder.transform(X).shape
    (1797, 32)
    >>> float(encoder.responsibilities(X)[0].sum().round(6))
    1.0
    """

    _parameter_constraints = {
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "activation": [StrOptions(set(ACTIVATIONS)), Activation, tuple, list],
        "lse_weight": [Interval(Real, 0, None, closed="left")],
        "variance_weight": [Interval(Real, 0, None, closed="left")],
        "decorrelation_weight": [Interval(Real, 0, None, closed="left")],
        "weight_redundancy": [Interval(Real, 0, None, closed="left")],
        "solver": [StrOptions(set(OPTIMISERS))],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "momentum": [Interval(Real, 0, 1, closed="left")],
        "batch_size": [Interval(Integral, 2, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "revive_dead": ["boolean"],
        "output": [StrOptions({"activations", "responsibilities"})],
        "warm_start": ["boolean"],
        "device": [str, torch.device],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        n_components: int = 64,
        *,
        activation: str | Activation | tuple[Callable, Callable] = "relu",
        lse_weight: float = 128.0,
        variance_weight: float = 1.0,
        decorrelation_weight: float = 1.0,
        weight_redundancy: float = 0.0,
        solver: Literal["sgd", "adam"] = "sgd",
        learning_rate: float = 0.01,
        momentum: float = 0.0,
        batch_size: int = 128,
        max_iter: int = 20,
        tol: float = 1e-4,
        revive_dead: bool = False,
        output: Literal["activations", "responsibilities"] = "activations",
        warm_start: bool = False,
        device: str | torch.device = "auto",
        random_state: RandomState = None,
        verbose: int = 0,
    ) -> None:
        self.n_components = n_components
        self.activation = activation
        self.lse_weight = lse_weight
        self.variance_weight = variance_weight
        self.decorrelation_weight = decorrelation_weight
        self.weight_redundancy = weight_redundancy
        self.solver = solver
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.tol = tol
        self.revive_dead = revive_dead
        self.output = output
        self.warm_start = warm_start
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self, X: MatrixLike, y: object = None, sample_weight: VectorLike | None = None
    ) -> Self:
        """Train weights and biases.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Finite rows; at least two.
        y : Ignored
            Present for API consistency.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights; of those with a mean below one only the ratios count. Integer
            weights equal repeated rows as long as these fit into one minibatch. Beyond, they
            still say how much rows count among each other, but repeated rows make more
            minibatches, and so more steps.

        Returns
        -------
        self : ImplicitEMEncoder
            The fitted estimator.

        Raises
        ------
        ValueError
            For entries that are not finite, naming row and column, and for fewer than two rows.
        """
        with training(
            self, X, y, sample_weight, unit="epoch", most=int(self.max_iter)
        ) as progress:
            self._fit(X, sample_weight, progress)
        return self

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(
        self, X: MatrixLike, y: object = None, sample_weight: VectorLike | None = None
    ) -> Self:
        """Go once through some rows of a stream, in minibatches in the order given.

        The first call settles location and scale for good; memory does not grow with the stream.
        All batches are computed with in one floating point type. A batch that is refused leaves
        the model as it was, and its number in the stream is in the message. A later batch of one
        row, which has no variance to learn from, leaves it as it was with a warning.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Finite rows; at least two, which differ, in the first call.
        y : Ignored
            Present for API consistency.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights.

        Returns
        -------
        self : ImplicitEMEncoder
            The updated estimator.
        """
        with stream_batch(self, sample_weight), training(self, X, y, sample_weight):
            self._update(X, sample_weight)
        return self

    def transform(self, X: MatrixLike) -> Output:
        """Distances of rows to every component, or responsibilities.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Finite rows.

        Returns
        -------
        ndarray of shape (n_samples, n_components)
            What `output` says. A tensor on the device of X where X is a tensor and
            ``array_api_dispatch=True``.
        """
        distance = self._distances(X)
        if self.output == "responsibilities":
            distance = responsibilities(distance)
        return returned(distance, X, self)

    def responsibilities(self, X: MatrixLike) -> Output:
        """Share of each component in each row, ``softmax(-d)``.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Finite rows.

        Returns
        -------
        ndarray of shape (n_samples, n_components)
            Rows sum to one.
        """
        return returned(responsibilities(self._distances(X)), X)

    def inverse_transform(self, D: VectorLike) -> Output:
        """Pseudo-decoder: the transposed weights applied to a code.

        Nothing trains it to reconstruct X, and its scale has no meaning. Applied to distances its
        direction is that of centred rows; applied to responsibilities it is the opposite one.

        Parameters
        ----------
        D : array-like of shape (n_samples, n_components)
            What `transform` returns.

        Returns
        -------
        ndarray of shape (n_samples, n_features)
            ``D @ components_``.
        """
        check_is_fitted(self)
        codes = check_codes(D, len(self.components_), "D")
        components = to_tensor(self.components_, codes.device)
        dtype = torch.promote_types(codes.dtype, components.dtype)
        return returned((codes.to(dtype) @ components.to(dtype)).to(codes.dtype), D)

    def loss_terms(
        self, X: MatrixLike, sample_weight: VectorLike | None = None
    ) -> dict[str, float]:
        """Terms of the objective on rows taken as one batch, each with its weight.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Finite rows; at least two.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights, as in `fit`.

        Returns
        -------
        dict of str to float
            "lse", "variance", "decorrelation" and "weight_redundancy"; they sum to the objective.
        """
        check_is_fitted(self)
        X = check_rows(self, X, reset=False, min_rows=2)
        X, kept = self._weighted(X, sample_weight)
        device = resolve_device(self.device, X)
        distance = self._encode(to_rows(X, device), device)
        weights = self._objective_weights()
        n, k = distance.shape
        objective = BatchObjective(weights, n, k, distance)
        weight = None if kept is None else to_tensor(kept).to(distance)
        objective(distance, weight)
        redundancy, _ = weight_redundancy(to_tensor(self.components_).double())
        terms = [*objective.terms.double().cpu(), redundancy]
        values = weights.vector * torch.stack(terms)
        return dict(zip(ObjectiveWeights.__dataclass_fields__, values.tolist(), strict=True))

    def score(
        self, X: MatrixLike, y: object = None, sample_weight: VectorLike | None = None
    ) -> float:
        """Objective with its sign changed, for model selection by cross-validation.

        Models with different weights of the terms have different objectives, and their scores
        say nothing about each other. Nor do those of different `solver`, `learning_rate` or
        `max_iter`: but for ``activation="abs"`` the objective has no lower bound, since weights of
        any length gain by being longer once every row is at distance zero from a component. What
        serves comes to light in a pipeline with the estimator that the features are for.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Finite rows; at least two.
        y : Ignored
            Present for API consistency.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights, as in `fit`.

        Returns
        -------
        float
            Greater is better.
        """
        return -sum(self.loss_terms(X, sample_weight).values())

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
