"""ExpFamilyDEQ: principal component analysis for data that are not Gaussian."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from numbers import Integral, Real
from typing import TYPE_CHECKING, Literal, Self

import torch
from sklearn.base import _fit_context
from sklearn.utils import Tags
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _num_samples, check_is_fitted

from skdeq._architecture import Architecture, describe
from skdeq._base import VersionedMixin, stream_batch, to_tensor
from skdeq._chunks import parallel_chunks
from skdeq._expfam_fitted import narrowed
from skdeq._expfam_transform import LatentTransformer
from skdeq._hierarchy import has_one_solution
from skdeq._progress import CallbackSupportMixin, Progress, training
from skdeq._typing import MatrixLike, Output, RandomState, VectorLike
from skdeq.families import (
    CANONICAL_MAPS,
    FAMILIES,
    LINKS,
    CanonicalMap,
    Family,
    get_canonical_map,
    get_family,
)
from skdeq.fixed_point import SOLVERS

if TYPE_CHECKING:
    from skdeq.nn import EquilibriumLayer

__all__ = ["ExpFamilyDEQ"]


class ExpFamilyDEQ(CallbackSupportMixin, VersionedMixin, LatentTransformer):
    r"""Principal component analysis for counts, binary and other non-Gaussian data.

    Each row :math:`x_i` has a latent code :math:`z_i \sim N(0, \alpha^{-1} I)` and entries from
    an exponential family with canonical parameters :math:`\eta_i = R(\zeta_i)`,
    :math:`\zeta_i = W z_i + b + o_i`, where R is the identity unless `canonical_map` says
    otherwise. Its code is the maximum-a-posteriori (MAP) solution, which is the fixed point of the
    equilibrium layer

    .. math:: z = f(z) = \alpha^{-1} W^\top [m \circ R'(\zeta) \circ (T(x) - A'(R(\zeta)))],

    a one-layer deep equilibrium network whose activation :math:`A'` is set by the family
    (sigmoid for Bernoulli, exp for Poisson, the identity for Gaussian data) and in which a
    missing entry is an input that is dropped out (m = 0) [1]_. Loadings W and intercept b
    minimise

    .. math:: \frac{1}{\sum_i s_i} \sum_i s_i \left[ -\log p(x_i | z_i^*)
              + \tfrac{\alpha}{2} |z_i^*|^2 \right] + \tfrac{\text{weight\_decay}}{2} |W|^2 .

    With ``family="gaussian"`` and vanishing penalties the scores are those of
    :class:`~sklearn.decomposition.PCA`.

    With ``hidden_layer_sizes=(h_1, ..., h_{L-1})`` the latents form a hierarchy, whose joint
    density is

    .. math:: p(x, z_1, \dots, z_L) = p(x | z_1)
              \prod_{l=1}^{L-1} N(z_l;\, R_h(W_{l+1} z_{l+1} + b_{l+1}), \alpha^{-1} I)
              \; N(z_L;\, 0, \alpha^{-1} I),

    with R_h the `hidden_map`. The latents of all layers are solved for together, as one
    equilibrium in which each layer is pulled from below and from above; `transform` returns the
    top layer, `map_latents` all of them. The penalty is then that of the loadings of all layers.

    Parameters
    ----------
    n_components : int, default=2
        Dimension k of the latents; with dense loadings at most ``min(n_samples, n_features)``.

    family : str or Family, default="gaussian"
        Law of the entries: "gaussian", "bernoulli", "binomial" (10 trials), "poisson",
        "continuous_bernoulli", "negative_binomial" (dispersion 1), "gamma" (shape 1),
        "rademacher", or an object such as ``Binomial(n_trials=16)`` from
        :mod:`skdeq.families` or of your own.

    canonical_map : str or CanonicalMap, default="identity"
        Map R from the linear predictor to the canonical parameter: "identity", "log", "relu",
        "softplus", "tanh", or an object; its range must meet the domain of the family. "log" is
        the log link of counts and positive amounts, for which the mean is the exponential of the
        linear predictor. :class:`~skdeq.families.ReLU` takes an option for the mask of the layer.
        With "relu", "softplus", "tanh" and most maps of your own a row may have several
        solutions; the one reported is what Newton's method finds from zero.

    hidden_layer_sizes : tuple of int, default=()
        Sizes of the latent layers between the data and the top one, which has `n_components`;
        they must not grow on the way up. Deep models are fitted by "adam", from a start that
        fits one layer on top of the other. A row may have several solutions; the one reported is
        what the solver finds from zero.

    hidden_map : {"identity", "relu", "softplus", "tanh"}, default="tanh"
        Map R_h from the linear predictor of a hidden layer to its mean. Without hidden layers
        it has no effect.

    loadings : {"dense", "conv2d"}, default="dense"
        With "conv2d" the features are the pixels of images, and W is a convolution (transposed):
        `n_components` kernels, each with a map of latents that says how strongly it stands at
        every place. `transform` returns the maps side by side, ``n_components`` times
        ``ceil(height / stride) * ceil(width / stride)`` numbers a row. Fitted by "adam".

    image_shape : tuple of int or None, default=None
        (height, width) or (channels, height, width) of the images, for "conv2d".

    kernel_size : int or tuple of int, default=5
        Height and width of the kernels, for "conv2d". Whatever of a kernel falls outside the
        image is left out.

    stride : int, default=1
        Pixels between neighbouring places of the maps, for "conv2d".

    alpha : float, default=1.0
        Prior precision of the latents, > 0.

    weight_decay : float, default=0.03
        Penalty of the loadings, >= 0. With one layer only the product of `alpha` and
        `weight_decay` matters for the fitted predictors at the optimum: together they are a
        penalty on the nuclear norm of the matrix of predictors. Components that the penalty
        empties have scores of zero. The larger the information of an entry (trials, counts), the
        more penalty it bears: with binary data 1 is much, with 16 trials it is not. The default
        is for more rows than features; with more features than rows several times as much,
        about ``(1 + sqrt(n_features / n_samples))**2`` times, keeps noise out of the loadings.

    exposure : {"total"} or None, default=None
        With "total" (Poisson, or a family through its log link), the offset of a row is
        ``log(row total / mean training row total)``, computed from the row itself in `fit` and in
        `transform`. As the total is taken as given, `score` compares models with the same
        exposure only.

    whiten : bool, default=False
        If False, `transform` returns scores in an orthonormal basis, in order of decreasing
        variance, as PCA does. If True, it returns the latents z themselves, in units of their
        prior.

    solver : {"auto", "scoring", "adam"}, default="auto"
        "scoring" is alternating Fisher scoring over rows and columns: deterministic, all rows
        at once, for one layer of dense loadings; "adam" goes through minibatches. "auto" is
        "scoring" where that can be, "adam" elsewhere.

    max_iter : int, default=100
        Iterations of "scoring", epochs of "adam".

    tol : float, default=1e-5
        Stop once an iteration lowers the objective by less than this share of what the latents
        have gained over the intercept alone, or of fifty times the objective (above one)
        where that is less, twice in a row. With "adam" the share shrinks with
        the steps once they are shorter than a tenth of the first.

    learning_rate : float, default=0.02
        Step size of "adam", where it falls to zero along a cosine, and of `partial_fit`, where
        it falls like one over the square root of one plus a hundredth of the batches seen.

    batch_size : int or None, default=None
        Rows of a minibatch of "adam"; None is 256.

    fixed_point : {"auto", "newton", "anderson", "picard"}, default="auto"
        Solver of the latents, see :mod:`skdeq.fixed_point`. "auto" is "newton" for up to 16
        components, for Poisson, negative binomial and gamma data, with hidden layers, and through
        any canonical map but the identity; else "anderson", with
        "newton" for the rows it does not solve.

    fixed_point_max_iter : int, default=50
        Iterations of that solver, at most; through a map with kinks, for each of the widths over
        which they are rounded off in turn. Of several minima of a row, fewer may find another.

    fixed_point_tol : float, default=1e-6
        A row is solved once the largest entry of ``|f(z) - z|``, in units of a diagonal Newton
        step and relative to ``1 + max |z|``, is at most this, and the squared Newton decrement,
        twice what its objective still has to fall, is as well.

    warm_start : bool, default=False
        Whether `fit` starts from the loadings of the last fit, if their shapes agree.

    device : str or torch.device, default="auto"
        "cpu", "cuda", "cuda:1", or "auto" for CUDA where there is one. Fitted attributes are
        numpy arrays in any case.

    random_state : int, RandomState instance or None, default=None
        Seed of the randomised SVD at the start and of the minibatches.

    verbose : int, default=0
        1 prints the device, and a line for each iteration: the objective, the largest residual of
        a row's latents and the share of rows that are solved (where the iteration makes them
        known), and the time to `max_iter`. For progress bars see :ref:`progress`.

    Attributes
    ----------
    components_ : ndarray of shape (n_components, n_features)
        Orthonormal basis of the loadings, in order of decreasing variance of the scores. With
        hidden layers, of the average derivative of the linear predictor in the top latents. With
        ``loadings="conv2d"`` there is a row for each place of each of the kernels.
    intercept_ : ndarray of shape (n_features,)
        The intercept b. Of a feature that is at one end of the support wherever it is observed,
        such as a gene without a count, it is half an observation inside, and dense loadings are
        zero, with the identity or the log link as canonical map.
    loadings_ : ndarray of shape (n_features, n_components)
        The loadings W, in units of the prior of the latents; of the first layer, and of shape
        (n_features, h_1), with hidden layers; a column for each place of each of the kernels with
        ``loadings="conv2d"``.
    kernels_ : ndarray of shape (n_components, n_channels, kernel_height, kernel_width)
        With ``loadings="conv2d"``: orthonormal kernels, of which `components_` has a copy for
        each place, in order of decreasing variance of their maps.
    hidden_loadings_ : list of ndarray of shape (h_l, h_{l+1})
        Loadings of the layers above the first; empty with one layer.
    hidden_intercepts_ : list of ndarray of shape (h_l,)
        Their intercepts.
    explained_deviance_ratio_ : ndarray of shape (n_components,)
        Share of the deviance of the intercept-only model that each component removes; for
        Gaussian data PCA's explained variance ratio. They add up to the share that the model
        removes; one may be negative, and others exceed one, where components undo each other's
        work far from the intercept, as those of skewed data do: compare models, not shares, to
        choose their number. With more than 2e6 entries estimated from 256 or more random rows;
        after `partial_fit`, from the last batch.
    loss_curve_ : list of float
        Mean objective, with all constants of the likelihood: before the step of each iteration of
        "scoring", and after each epoch of "adam". Where rows may have several solutions the last
        is at those that `transform` finds (of a ReLU with its exact mask), with "adam" where that
        makes a hundredth of what was gained; it takes the place of the one that was printed, and
        may be above the one before, as may those of further steps that serve these solutions.
        `partial_fit` adds that of each later batch.
    n_iter_ : int
        Iterations run, and one for each later batch of a stream. Where the variance has no known
        bound (Poisson, negative binomial, gamma, and through a canonical map) two starts are first
        compared by four iterations each, on 4,096 rows at most, which are not counted.
    converged_ : bool
        Whether `tol` was met within `max_iter` iterations. After the first batch of `partial_fit`
        it is that of its fit, from the second on false, as a stream has no end. Of single rows
        `map_latents` tells.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of features seen during fit, if X has string names.

    See Also
    --------
    sklearn.decomposition.PCA : The Gaussian special case without penalties.
    sklearn.decomposition.NMF : Non-negative factors of non-negative data.

    References
    ----------
    .. [1] R. Tsuchida and C. S. Ong (2023). Deep equilibrium models as estimators for
       continuous latent variables. AISTATS, PMLR 206, 1646-1671. arXiv:2211.05943.

    Examples
    --------
    >>> import numpy as np
    >>> from skdeq import ExpFamilyDEQ
    >>> rng = np.random.default_rng(0)
    >>> latents = rng.normal(size=(200, 2))
    >>> X = rng.poisson(np.exp(latents @ rng.normal(size=(2, 30)) / 2))
    >>> model = ExpFamilyDEQ(2, family="poisson", random_state=0).fit(X)
    >>> model.transform(X).shape
    (200, 2)
    >>> bool(model.map_latents(X).converged.all())
    True
    """

    _parameter_constraints = {
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "family": [str, Family],
        "canonical_map": [StrOptions({*CANONICAL_MAPS, *LINKS}), CanonicalMap],
        "hidden_layer_sizes": ["array-like"],
        # Not objects: the solvers of hierarchies take it that slopes are at most one.
        "hidden_map": [StrOptions(set(CANONICAL_MAPS))],
        "loadings": [StrOptions({"dense", "conv2d"})],
        "image_shape": ["array-like", None],
        "kernel_size": [Interval(Integral, 1, None, closed="left"), "array-like"],
        "stride": [Interval(Integral, 1, None, closed="left")],
        "alpha": [Interval(Real, 0, None, closed="neither")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "exposure": "no_validation",
        "whiten": ["boolean"],
        "solver": [StrOptions({"auto", "scoring", "adam"})],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "batch_size": [Interval(Integral, 1, None, closed="left"), None],
        "fixed_point": [StrOptions({"auto", *SOLVERS})],
        "fixed_point_max_iter": [Interval(Integral, 1, None, closed="left")],
        "fixed_point_tol": [Interval(Real, 0, None, closed="left")],
        "warm_start": ["boolean"],
        "device": [str, torch.device],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        n_components: int = 2,
        *,
        family: str | Family = "gaussian",
        canonical_map: str | CanonicalMap = "identity",
        hidden_layer_sizes: Sequence[int] = (),
        hidden_map: str = "tanh",
        loadings: Literal["dense", "conv2d"] = "dense",
        image_shape: Sequence[int] | None = None,
        kernel_size: int | Sequence[int] = 5,
        stride: int = 1,
        alpha: float = 1.0,
        weight_decay: float = 0.03,
        exposure: Literal["total"] | None = None,
        whiten: bool = False,
        solver: Literal["auto", "scoring", "adam"] = "auto",
        max_iter: int = 100,
        tol: float = 1e-5,
        learning_rate: float = 0.02,
        batch_size: int | None = None,
        fixed_point: Literal["auto", "newton", "anderson", "picard"] = "auto",
        fixed_point_max_iter: int = 50,
        fixed_point_tol: float = 1e-6,
        warm_start: bool = False,
        device: str | torch.device = "auto",
        random_state: RandomState = None,
        verbose: int = 0,
    ) -> None:
        self.n_components = n_components
        self.family = family
        self.canonical_map = canonical_map
        self.hidden_layer_sizes = hidden_layer_sizes
        self.hidden_map = hidden_map
        self.loadings = loadings
        self.image_shape = image_shape
        self.kernel_size = kernel_size
        self.stride = stride
        self.alpha = alpha
        self.weight_decay = weight_decay
        self.exposure = exposure
        self.whiten = whiten
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.fixed_point = fixed_point
        self.fixed_point_max_iter = fixed_point_max_iter
        self.fixed_point_tol = fixed_point_tol
        self.warm_start = warm_start
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self, X: MatrixLike, y: object = None, sample_weight: VectorLike | None = None
    ) -> Self:
        """Fit loadings and intercept.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Observations in the support of the family; NaN where missing.
        y : Ignored
            Present for API consistency.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights; integer weights equal repeated rows, with ``solver="adam"`` as
            long as these fit into one minibatch.

        Returns
        -------
        self : ExpFamilyDEQ
            The fitted estimator.

        Raises
        ------
        ValueError
            For observations outside the support of the family, naming row and column, for a
            column without any observation, and for more components than rows or columns.

        Warns
        -----
        ConvergenceWarning
            Once, of a fit that is not what was asked for: that did not converge, or is left
            without components by the penalties. The message says what to change.
        """
        with self._fitting(X, y, sample_weight) as progress, parallel_chunks():
            self._fit(X, sample_weight, progress)
        return self

    @_fit_context(prefer_skip_nested_validation=True)
    def fit_transform(
        self, X: MatrixLike, y: object = None, sample_weight: VectorLike | None = None
    ) -> Output:
        """Fit and return the scores of the training rows.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Observations in the support of the family; NaN where missing.
        y : Ignored
            Present for API consistency.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights; integer weights equal repeated rows, with ``solver="adam"`` as
            long as these fit into one minibatch.

        Returns
        -------
        ndarray of shape (n_samples, n_components)
            Scores, or latents if ``whiten=True``.
        """
        with self._fitting(X, y, sample_weight) as progress, parallel_chunks():
            setting, model = self._fit(X, sample_weight, progress)
            left_out = setting.observations.shape[0] < _num_samples(X)
            several = not has_one_solution(setting.family, model.upper)
            if left_out or several or self._starts_from_zero:
                # Rows of zero weight took no part in the fit; and where the start makes a
                # difference, what `transform` finds is what to return.
                return self._output(self._codes(X), X)
            result = self._warned_of(self._latents(setting, model.latents))
            return self._output(narrowed(result, setting).value, X)

    def architecture(self) -> Architecture:
        """Describe the equilibrium layer that the parameters amount to.

        Needs no data: it is a matter of the parameters.

        Returns
        -------
        Architecture
            With the fields `family`, `canonical_map`, `sufficient_statistic`, `log_partition`,
            `canonical_parameter`, `activation`, `mask`, `loadings`, `hidden_layer_sizes`,
            `hidden_activation`, `hidden_mask` and `equilibrium`, the equations; printed, a table.

        Examples
        --------
        >>> from skdeq import ExpFamilyDEQ
        >>> ExpFamilyDEQ(family="bernoulli").architecture().activation
        'sigmoid(zeta)'
        """
        self._validate_params()
        self._family()
        return describe(
            get_family(self.family),
            get_canonical_map(self.canonical_map),
            loadings=str(self._loadings()),
            hidden_layer_sizes=self._sizes()[:-1],
            hidden_map=self._hidden_map(),
        )

    def to_module(self) -> EquilibriumLayer:
        """Return the fitted equilibrium layer as a torch module, to be trained further.

        Called on rows of a tensor it returns what `transform` returns, with gradients. It solves
        them by "newton" if `fixed_point` says so and by "auto" otherwise.

        Returns
        -------
        skdeq.nn.EquilibriumLayer
            In float64 or float32, whichever the model is worked on in, on the CPU.
        """
        check_is_fitted(self)
        self._check_law()
        # Here and not above: it imports torch's compiler, which takes as long as all the rest.
        from skdeq.nn import EquilibriumLayer, tie_to_kernels

        p, *_, k = self._layer_sizes()
        # What a new layer draws is thrown away, and must not move torch's global generator.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            layer = EquilibriumLayer(
                p,
                k,
                family=self.family,
                canonical_map=self.canonical_map,
                hidden_layer_sizes=self._layer_sizes()[1:-1],
                hidden_map=self.hidden_map,
                alpha=self.alpha,
                fixed_point="newton" if self.fixed_point == "newton" else "auto",
                tol=self.fixed_point_tol,
                max_iter=self.fixed_point_max_iter,
            )
        # Where float32 has too few digits for the data it has for the layer's certificates.
        layer.to(torch.float64 if self._in_double else to_tensor(self.loadings_).dtype)
        layers = [(self.loadings_, self.intercept_), *self._hidden()]
        for (loadings, intercept), arrays in zip(layer.pairs(), layers, strict=True):
            loadings.data.copy_(to_tensor(arrays[0]))
            intercept.data.copy_(to_tensor(arrays[1]))
        convolution = self._loadings().convolution
        if convolution is not None:
            tie_to_kernels(layer, convolution)
        if not self.whiten:
            layer.rotation = to_tensor(self._to_scores).to(layer.loadings.dtype, copy=True)
        if self.exposure is not None:
            layer.exposure_profile = to_tensor(self._exposure_profile).to(layer.loadings.dtype)
        return layer

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(
        self, X: MatrixLike, y: object = None, sample_weight: VectorLike | None = None
    ) -> Self:
        """Update the model by one batch of a stream.

        Memory does not grow with the stream, but for a number in `loss_curve_`. The first batch
        starts the model by a full fit of its own and needs at least as many
        rows as there are components; each later one takes one step of Adam along the gradient
        at its MAP latents. All batches have one floating point type. A batch that is refused
        leaves the model as it was, and its number in the stream is in the message.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            Observations in the support of the family; NaN where missing.
        y : Ignored
            Present for API consistency.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights: the step depends on their ratios within the batch, and their sum
            is what the batch counts in the axes of the scores.

        Returns
        -------
        self : ExpFamilyDEQ
            The updated estimator.
        """
        first = getattr(self, "components_", None) is None
        fitting = self._fitting(X, y, sample_weight, stream=not first)
        with stream_batch(self, sample_weight), fitting as progress, parallel_chunks():
            if first:
                self._fit(X, sample_weight, progress)
            else:
                self._update(X, sample_weight)
        return self

    def _fitting(
        self, X: MatrixLike, y: object, sample_weight: VectorLike | None, *, stream: bool = False
    ) -> AbstractContextManager[Progress]:
        """Context in which this estimator is fitted, or takes one step of a stream."""
        return training(
            self,
            X,
            y,
            sample_weight,
            most=0 if stream else int(self.max_iter),
            row_tol=float(self.fixed_point_tol),
        )

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.allow_nan = True
        named = isinstance(self.family, str) and self.family in FAMILIES
        if named or isinstance(self.family, Family):
            tags.input_tags.positive_only = get_family(self.family).support.low >= 0
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
