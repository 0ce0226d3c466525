"""Choice of a model by entries that were held out, wherever they are in the matrix."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.base import clone
from sklearn.model_selection import BaseCrossValidator, BaseShuffleSplit, KFold, check_cv
from sklearn.utils.parallel import Parallel, delayed
from torch import Tensor

from skdeq._base import to_numpy, to_tensor
from skdeq._chunks import parallel_chunks
from skdeq._expfam_deq import ExpFamilyDEQ
from skdeq._typing import MatrixLike, RandomState, VectorLike
from skdeq._validation import check_columns, check_observations, weighted_rows

__all__ = ["entrywise_cross_val_score"]


def entrywise_cross_val_score(
    estimator: ExpFamilyDEQ,
    X: MatrixLike,
    *,
    sample_weight: VectorLike | None = None,
    cv: int | BaseCrossValidator | BaseShuffleSplit | Iterable = 5,
    random_state: RandomState = None,
    n_jobs: int | None = None,
) -> np.ndarray:
    """Evaluate a model by its predictions of entries that were hidden from it.

    Entries here and there in the matrix are made missing, the model is fitted to the rest, the
    latents of each row come from what is left of it, and the score is the log-likelihood of what
    was hidden. A superfluous component fits noise and predicts worse.
    :meth:`~skdeq.ExpFamilyDEQ.score` integrates the latents of whole new rows over their prior;
    this asks for predictions alone, so that components of unequal strength, or a penalty that is
    not quite that of the data, do not decide about the number of components.

    Parameters
    ----------
    estimator : ExpFamilyDEQ
        The model, fitted or not. It is cloned and left as it is.
    X : {array-like, sparse matrix} of shape (n_samples, n_features)
        Observations in the support of the family; NaN where missing, which is never held out.
    sample_weight : array-like of shape (n_samples,), default=None
        Non-negative weights of the rows, in the fits and in the mean of the held-out entries.
    cv : int, splitter or iterable, default=5
        The number of folds, in random order and each held out once; or a splitter of
        scikit-learn's, such as :class:`~sklearn.model_selection.ShuffleSplit`, or an iterable of
        pairs of arrays, which split the observed entries as if they were samples, row by row in
        the order of X, those of rows without weight left out.
    random_state : int, RandomState instance or None, default=None
        Shuffles the entries if ``cv`` is a number. Pass an int to compare models on the same
        folds.
    n_jobs : int, default=None
        Splits at a time, in processes of their own; None is one.

    Returns
    -------
    ndarray of shape (n_splits,), float64
        Mean log-likelihood of a held-out entry in each split, with all constants. Minus infinity
        where a prediction is outside the domain of a gamma or negative binomial family without a
        log link.

    Raises
    ------
    TypeError
        If the estimator is not an `ExpFamilyDEQ`, such as a pipeline: its other steps would see
        what is held out.
    ValueError
        For observations outside the support of the family, and if a split leaves a column without
        any observation.

    Notes
    -----
    Sparse matrices are made dense, as a good part of the zeros is held out, too. Each split at
    work has a copy of X.

    References
    ----------
    .. [1] S. Wold, "Cross-validatory estimation of the number of components in factor and
       principal components models", Technometrics 20(4), 1978.
    .. [2] A. B. Owen and P. O. Perry, "Bi-cross-validation of the SVD and the nonnegative matrix
       factorization", Annals of Applied Statistics 3(2), 2009.

    Examples
    --------
    >>> import numpy as np
    >>> from skdeq import ExpFamilyDEQ
    >>> from skdeq.model_selection import entrywise_cross_val_score
    >>> rng = np.random.default_rng(0)
    >>> X = rng.poisson(np.exp(rng.normal(size=(300, 3)) @ rng.normal(size=(3, 40)) / 2))
    >>> scores = {}
    >>> for k in range(1, 6):
    ...     model = ExpFamilyDEQ(k, family="poisson", random_state=0)
    ...     scores[k] = entrywise_cross_val_score(model, X, random_state=0).mean()
    >>> max(scores, key=scores.get)
    3
    """
    if not isinstance(estimator, ExpFamilyDEQ):
        raise TypeError(
            f"entrywise_cross_val_score takes an ExpFamilyDEQ, got {type(estimator).__name__}: "
            "what is held out has to be missing from all that a model sees, so transform X "
            "first, entry by entry."
        )
    estimator = clone(estimator)
    X = check_observations(estimator, X, estimator._family().exact, reset=True)
    n_given = X.shape[0]
    sample_weight, X = weighted_rows(sample_weight, X)
    if X.shape[0] < n_given:
        check_columns(estimator, X, "rows of positive weight")
    X = to_tensor(X.toarray()) if sp.issparse(X) else X.contiguous()
    observed = torch.isnan(X).logical_not_().flatten().nonzero().squeeze(1)
    if isinstance(cv, numbers.Integral):
        cv = KFold(int(cv), shuffle=True, random_state=random_state)
    places = to_numpy(observed)
    splits = [places[held] for _, held in check_cv(cv).split(places)]
    n_observed = np.bincount(places % X.shape[1], minlength=X.shape[1])
    for number, held in enumerate(splits):
        _check_split(held, n_observed, number)
    scores = Parallel(n_jobs=n_jobs)(
        delayed(_score_of_held_out)(clone(estimator), X, sample_weight, held) for held in splits
    )
    return np.array(scores)


def _check_split(held: np.ndarray, n_observed: np.ndarray, number: int) -> None:
    """Refuse to hold out nothing, or all that is observed of a column."""
    if not len(held):
        raise ValueError(f"Split {number} of cv holds no entry out.")
    n_held = np.bincount(held % len(n_observed), minlength=len(n_observed))
    empty = np.flatnonzero(n_held == n_observed)
    if len(empty):
        raise ValueError(
            f"Split {number} of cv holds out all {n_held[empty[0]]} observed entries of column "
            f"{empty[0]} of X ({len(empty)} such columns in all): drop such columns, or let cv "
            "have more splits."
        )


def _score_of_held_out(
    estimator: ExpFamilyDEQ, X: Tensor, sample_weight: Any, held: np.ndarray
) -> float:
    """Fit to X without some entries, given by their places in all of it, and score these."""
    at_hand, rest = to_tensor(held, X.device), X.clone()
    rest.view(-1)[at_hand] = torch.nan
    estimator.fit(rest, sample_weight=sample_weight)
    with parallel_chunks():
        predictors = estimator._predictors_given(rest)
    values = X.view(-1)[at_hand].to(predictors.device, torch.float64)
    of_held = predictors.reshape(-1)[to_tensor(held, predictors.device)].double()
    likelihood = estimator._family().exact.log_prob(values, of_held)
    weight = None if sample_weight is None else sample_weight[held // X.shape[1]]
    return float(np.average(to_numpy(likelihood), weights=weight))
