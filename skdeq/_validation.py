"""What estimators check of their input: scikit-learn's rules and the support of the family."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from sklearn import config_context
from sklearn.utils import check_array
from sklearn.utils.validation import _check_sample_weight, validate_data
from torch import Tensor

from skdeq._base import (
    LARGEST_WEIGHT,
    detached,
    host_array,
    numpy_dtype,
    resolve_device,
    to_tensor,
    torch_dtype,
)
from skdeq._data import columns_at, missing_per_column, take_rows
from skdeq._family import Family
from skdeq._support import place_of, stored_values, within_support
from skdeq._warn import warn

__all__ = [
    "check_codes",
    "check_columns",
    "check_observations",
    "check_rows",
    "check_stream_type",
    "check_weights",
    "refuse_changes",
    "refuse_other_law",
    "warn_of_ends",
    "weighted_rows",
]

_FLOATS = (np.float64, np.float32)
# Types that need no copy as floats: batches of them are converted as they are used.
_ROW_TYPES = (*_FLOATS, np.uint8, np.int8, np.int16, np.bool_)


def check_observations(estimator, X, family: Family, *, reset: bool):
    """Validate X against scikit-learn's rules and the support of the family.

    Returns
    -------
    Tensor or CSR array of shape (n, p)
        float32 or float64; NaN marks missing entries. A tensor stays on the device of X, and
        shares memory with X where that is dense, of such a type, in rows and writable.

    Raises
    ------
    ValueError
        If an entry is infinite or outside the support, naming family, row and column; in
        fitting, also if a column has no observed entry.
    """
    X = _validated(estimator, _unmasked(X), _FLOATS, reset=reset)
    X = within_support(estimator, X, family)
    if reset:
        check_columns(estimator, X)
    return X


def _unmasked(X):
    """Make NaN of the masked entries of an array, which scikit-learn would take as they are."""
    if not isinstance(X, np.ma.MaskedArray):
        return X
    return np.ma.filled(X.astype(X.dtype if X.dtype in _FLOATS else np.float64), np.nan)


def check_columns(estimator, X, rows: str = "rows") -> None:
    """Refuse validated data with a column of which nothing is known; ``rows`` says what they are.

    Raises
    ------
    ValueError
        If a column has no observed entry, naming it.
    """
    empty = np.flatnonzero(missing_per_column(X) == X.shape[0])
    if len(empty):
        raise ValueError(
            f"Column {empty[0]} of X has no observed entry, every one of its {X.shape[0]} {rows} "
            f"is NaN ({len(empty)} such columns in all); drop such columns "
            f"before {type(estimator).__name__}.fit."
        )


def warn_of_ends(X, family: Family) -> None:
    """Warn of columns of which the family has no largest likelihood."""
    if not family.base.unbounded_at:
        return
    for end in family.base.unbounded_at:
        columns = columns_at(X, end)
        if len(columns):
            warn(
                f"Column {columns[0]} of X is {end:g} wherever it is observed ({len(columns)} "
                f"such columns in all). There the density of {family.base!r} grows without "
                "bound: no intercept is the most likely one, and the objective and score depend "
                f"on the one that is taken. Drop such columns, clip X to values short of {end:g}, "
                "or use family='bernoulli'.",
                UserWarning,
            )


def check_rows(estimator, X, *, reset: bool, min_rows: int = 1):
    """Validate rows of finite real numbers against scikit-learn's rules.

    Returns
    -------
    Tensor or CSR array of shape (n, p)
        Floats, small integers or booleans as they came, all else as float64.

    Raises
    ------
    ValueError
        If an entry is not finite, naming row and column, or there are too few rows.
    """
    X = _validated(estimator, _unmasked(X), _ROW_TYPES, reset=reset, min_rows=min_rows)
    values = stored_values(X)
    # Rounding to infinity is possible, a finite sum of anything else is not.
    if not values.is_floating_point() or bool(torch.isfinite(values.sum())):
        return X
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        place = (~finite).nonzero()[0].tolist()
        value = float(values[tuple(place)])
        row, column = place_of(X, place[0]) if sp.issparse(X) else place
        raise ValueError(
            f"Input X contains {'NaN' if np.isnan(value) else 'infinity'}: row {row}, column "
            f"{column} of X is {value}. {type(estimator).__name__} accepts finite numbers only; "
            "sklearn.impute has estimators that fill in missing values."
        )
    return X


def check_weights(sample_weight, X) -> np.ndarray:
    """Validate the weights of rows that were validated; an array of their floating point type.

    Only the ratios of weights count: they are divided by a power of two where they, or their
    products, would leave the numbers of that type.
    """
    dtype = np.result_type(numpy_dtype(X), np.float32)
    with config_context(array_api_dispatch=False):
        sample_weight = _check_sample_weight(
            host_array(sample_weight, "sample_weight"),
            X,
            dtype=np.float64,
            ensure_non_negative=True,
        )
    # Which scikit-learn looks for from 1.9 on.
    if not sample_weight.any():
        raise ValueError(
            "sample_weight must contain at least one non-zero number; all "
            f"{len(sample_weight)} of them are zero."
        )
    largest = sample_weight.max()
    if not 1 / LARGEST_WEIGHT <= largest <= LARGEST_WEIGHT:
        sample_weight = np.ldexp(sample_weight, -np.frexp(largest)[1])
    return sample_weight.astype(dtype, copy=False)


def weighted_rows(sample_weight, X, *others: np.ndarray) -> tuple:
    """Validate weights; return them, X and the others without the rows that have none.

    Such rows take no part in anything, not even by leaving the domain of a family.
    """
    if sample_weight is None:
        return None, X, *others
    sample_weight = check_weights(sample_weight, X)
    kept = np.flatnonzero(sample_weight)
    if len(kept) == len(sample_weight):
        return sample_weight, X, *others
    return sample_weight[kept], take_rows(X, kept), *(one[kept] for one in others)


def refuse_changes(changes: dict[str, tuple[Any, Any]]) -> None:
    """Refuse to go on with a model that is not the one asked for.

    Parameters
    ----------
    changes : dict
        Of each parameter that asks for another one what it is, and what it was.

    Raises
    ------
    ValueError
        If there are changes; of one of them.
    """
    if changes:
        name, (asked, there) = next(iter(changes.items()))
        raise ValueError(
            f"{name}={asked!r}, but partial_fit goes on with the model there is, of "
            f"{name}={there!r}; call fit to start anew."
        )


def refuse_other_law(estimator, changes: dict[str, tuple[Any, Any]]) -> None:
    """Refuse to apply a model under another law than it was fitted with.

    Parameters
    ----------
    estimator : estimator
    changes : dict
        As :func:`refuse_changes` has them.

    Raises
    ------
    ValueError
        If there are changes; of one of them.
    """
    if changes:
        name, (asked, there) = next(iter(changes.items()))
        raise ValueError(
            f"{type(estimator).__name__} was not fitted with {name}={asked!r} but with {there!r}; "
            "call fit again, or set it back."
        )


def check_stream_type(X, fitted: np.ndarray) -> None:
    """Refuse a batch that would be computed with in another type than the batches before.

    Raises
    ------
    ValueError
        If the type that X is computed with is not the one of fitted parameters.
    """
    dtype = np.result_type(numpy_dtype(X), np.float32)
    if dtype != fitted.dtype:
        raise ValueError(
            f"X is computed with in {dtype}, but what was learned before is {fitted.dtype}: "
            f"convert the batches to {fitted.dtype}, or begin anew with fit."
        )


def check_codes(codes, n_components: int, name: str) -> Tensor:
    """Validate what `transform` returned; a tensor (n, n_components) where the codes lie.

    Raises
    ------
    ValueError
        If they are not finite or have the wrong number of columns.
    """
    if isinstance(codes, Tensor) and codes.device.type != "cpu":
        codes = _accepted(codes, _FLOATS, name)
        check_array(_stand_in(codes), input_name=name)
        if not bool(torch.isfinite(codes).all()):
            raise ValueError(f"Input {name} contains NaN or infinity.")
    else:
        codes = host_array(codes, name)
        with config_context(array_api_dispatch=False):
            codes = to_tensor(check_array(codes, dtype=list(_FLOATS), input_name=name))
    if codes.shape[1] != n_components:
        raise ValueError(
            f"{name} has {codes.shape[1]} columns, but this model has {n_components} components."
        )
    return codes


def _validated(estimator, X, dtypes: Sequence[type], *, reset: bool, min_rows: int = 1):
    """Let scikit-learn look at X; return a tensor where it is dense, else canonical CSR."""
    options = {
        "reset": reset,
        "accept_sparse": "csr",
        "ensure_all_finite": False,
        "ensure_min_samples": min_rows,
    }
    if isinstance(X, Tensor):
        X = _accepted(X, dtypes, "X")
        if X.device.type != "cpu":
            # To the device of the estimator, mostly the one where it lies; it is not brought to
            # the host to be looked at.
            X = X.to(resolve_device(estimator.device, X))
        if X.device.type != "cpu":
            validate_data(estimator, _stand_in(X), dtype=None, **options)
            return X.contiguous()
        X = X.numpy()
    # With dispatch scikit-learn would hand back what it was given, in types that are not ours.
    with config_context(array_api_dispatch=False):
        try:
            X = validate_data(estimator, X, dtype=list(dtypes), order="C", **options)
        except (TypeError, ValueError) as error:
            _refuse_what_is_no_number(estimator, X, error)
            raise
    if not sp.issparse(X):
        return to_tensor(X)
    if not X.has_canonical_format:
        given, X = X, X.copy()
        X.sum_duplicates()
        if X.nnz < given.nnz and X.dtype.kind in "iu":
            # The sums may not fit into so small a type.
            X = given.astype(np.result_type(given.dtype, np.float32))
            X.sum_duplicates()
    return X


def _refuse_what_is_no_number(estimator, X, error: TypeError | ValueError) -> None:
    """Say where text or an object is that could not be read as a number, if that was the error."""
    if isinstance(error, ValueError) and "could not convert string to float" not in str(error):
        return
    entries = np.asarray(X, dtype=object)
    if entries.ndim != 2:
        return
    for row, column in np.ndindex(entries.shape):
        value = entries[row, column]
        try:
            # A missing entry that is None is read as NaN.
            float(np.nan if value is None else value)
        except (TypeError, ValueError):
            is_text = isinstance(value, str)
            what = "text" if is_text else f"objects of type {type(value).__name__}"
            raise (ValueError if is_text else TypeError)(
                f"{type(estimator).__name__} accepts numbers, and not {what}: row {row}, column "
                f"{column} of X is {value!r} ({error}). Encode such columns as numbers first, "
                "with NaN for missing entries, or leave them out."
            ) from error


def _accepted(X: Tensor, dtypes: Sequence[type], name: str) -> Tensor:
    """Dense tensor without a gradient, as float64 unless its type is one of those accepted."""
    if X.layout != torch.strided:
        raise TypeError(
            f"{name} is a tensor of layout {X.layout}; dense tensors are accepted, and sparse "
            "data as SciPy's CSR arrays."
        )
    X = detached(X, name)
    fits = {torch_dtype(one) for one in dtypes}
    # scikit-learn has a sentence for complex numbers.
    return X if X.dtype in fits or X.is_complex() else X.double()


def _stand_in(X: Tensor) -> np.ndarray:
    """Array of the shape and type of a tensor that takes no memory."""
    return np.broadcast_to(np.zeros((), numpy_dtype(X)), tuple(X.shape))
