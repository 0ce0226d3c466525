"""What estimators check of their input: scikit-learn's rules and the support of the family."""

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
import torch
from sklearn import config_context
from sklearn.utils import check_array
from sklearn.utils.validation import _check_sample_weight, validate_data
from torch import Tensor

from skdeq._base import (
    detached,
    host_array,
    numpy_dtype,
    resolve_device,
    to_tensor,
    torch_dtype,
)
from skdeq._chunks import map_chunks
from skdeq._data import CHUNK_ENTRIES, chunk_rows, columns_at, missing_per_column
from skdeq._family import Family
from skdeq._warn import warn

__all__ = [
    "check_codes",
    "check_columns",
    "check_observations",
    "check_rows",
    "check_stream_type",
    "check_weights",
    "warn_of_ends",
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
    if sp.issparse(X):
        _check_sparse(estimator, X, family)
    else:
        bad = _first_outside(X, family)
        if bad is not None:
            X = _unrounded(X, family)
            bad = _first_outside(X, family)
        if bad is not None:
            _refuse(estimator, family, *bad)
    _check_size(X, family)
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
                "bound, and the intercept, the objective and score with it: drop such columns, "
                f"clip X to values short of {end:g}, or use family='bernoulli'.",
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
    values = to_tensor(X.data) if sp.issparse(X) else X
    # Rounding to infinity is possible, a finite sum of anything else is not.
    if not values.is_floating_point() or bool(torch.isfinite(values.sum())):
        return X
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        place = (~finite).nonzero()[0].tolist()
        value = float(values[tuple(place)])
        row, column = _place(X, place[0]) if sp.issparse(X) else place
        raise ValueError(
            f"Input X contains {'NaN' if np.isnan(value) else 'infinity'}: row {row}, column "
            f"{column} of X is {value}. {type(estimator).__name__} accepts finite numbers only; "
            "sklearn.impute has estimators that fill in missing values."
        )
    return X


def check_weights(sample_weight, X) -> np.ndarray:
    """Validate the weights of rows that were validated; an array of their floating point type."""
    dtype = np.result_type(numpy_dtype(X), np.float32)
    with config_context(array_api_dispatch=False):
        return _check_sample_weight(
            host_array(sample_weight, "sample_weight"), X, dtype=dtype, ensure_non_negative=True
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
        except ValueError as error:
            _refuse_text(estimator, X, error)
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


def _refuse_text(estimator, X, error: ValueError) -> None:
    """Say where the text is that could not be read as a number, if that was the error."""
    if "could not convert string to float" not in str(error):
        return
    entries = np.asarray(X, dtype=object)
    for place in np.ndindex(entries.shape):
        try:
            float(entries[place])
        except (TypeError, ValueError):
            if entries.ndim == 2 and isinstance(entries[place], str):
                raise ValueError(
                    f"{type(estimator).__name__} accepts numbers, and not text: row {place[0]}, "
                    f"column {place[1]} of X is {entries[place]!r} (could not convert string to "
                    "float). Encode such columns as numbers first, or leave them out."
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


def _per_chunk(X: Tensor, function) -> Tensor:
    """Results of a function of some rows, stacked; nothing waits for a device in between."""
    size = chunk_rows(X)
    return torch.stack(
        map_chunks(lambda start, stop: function(X[start:stop]), len(X), size, X.device)
    )


def _check_size(X, family: Family) -> None:
    """Refuse finite values whose sums of squares overflow."""
    values = to_tensor(X.data).unsqueeze(1) if sp.issparse(X) else X
    if not values.numel() or np.isfinite(family.support.high - family.support.low):
        return
    limit = (torch.finfo(values.dtype).max / max(X.shape[0] * X.shape[1], 1e6)) ** 0.5
    ends = _per_chunk(values, lambda rows: torch.stack(torch.aminmax(rows)))
    if bool(torch.isnan(ends).any()):
        ends = _per_chunk(values, lambda rows: torch.stack(torch.aminmax(rows.nan_to_num(0.0))))
    largest = float(ends.abs().max())
    if largest > limit:
        name = "float32" if values.dtype == torch.float32 else "float64"
        raise ValueError(
            f"X has values as large as {largest:.1e}; sums of their squares overflow {name}. "
            f"Rescale X below {limit:.0e}" + (" or pass float64." if name == "float32" else ".")
        )


def _outside(values: Tensor, family: Family) -> Tensor:
    inside = family.support.contains(values) & torch.isfinite(values)
    return ~inside & ~torch.isnan(values)


def _first_outside(X: Tensor, family: Family) -> tuple[int, int, float] | None:
    ends = _per_chunk(X, lambda rows: torch.stack(torch.aminmax(rows)))
    # Chunks whose extremes are outside the support, or NaN.
    inside = torch.isfinite(ends) & family.support.contains(ends)
    suspicious = (~inside.all(1)).nonzero().squeeze(1)
    size = chunk_rows(X)
    for start in (size * suspicious).tolist():
        outside = _outside(X[start : start + size], family)
        if bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            return start + row, column, float(X[start + row, column])
    return None


def _unrounded(X: Tensor, family: Family) -> Tensor:
    """Put back onto an end of the support what rounding has taken beyond it, in a copy.

    What a MinMaxScaler makes of a column's maximum may be 1 + 2e-16.
    """
    slack = 8 * torch.finfo(X.dtype).eps
    for end in (family.support.low, family.support.high):
        if not np.isfinite(end):
            continue
        near = (X - end).abs() <= slack * max(1.0, abs(end))
        X = torch.where(near & ~family.support.contains(X), end, X)
    return X


def _check_sparse(estimator, X, family: Family) -> None:
    for start in range(0, len(X.data), CHUNK_ENTRIES):
        outside = _outside(to_tensor(X.data[start : start + CHUNK_ENTRIES]), family)
        if bool(outside.any()):
            place = start + int(outside.nonzero()[0])
            _refuse(estimator, family, *_place(X, place), float(X.data[place]))
    zero = torch.zeros(1, dtype=torch.float64, device="cpu")
    if X.nnz < X.shape[0] * X.shape[1]:
        if not bool(family.support.contains(zero)):
            row = int(np.flatnonzero(np.diff(X.indptr) < X.shape[1])[0])
            taken = X.indices[X.indptr[row] : X.indptr[row + 1]]
            column = int(np.setdiff1d(np.arange(X.shape[1]), taken)[0])
            _refuse(estimator, family, row, column, 0.0)
        if float(family.sufficient(zero)) != 0:
            raise ValueError(
                f"Sparse X needs a family with T(0) = 0; that of {family!r} is "
                f"{float(family.sufficient(zero))}. Pass X.toarray()."
            )


def _place(X, stored: int) -> tuple[int, int]:
    """Row and column of a stored entry of a CSR array."""
    return int(np.searchsorted(X.indptr, stored, side="right")) - 1, int(X.indices[stored])


def _refuse(estimator, family: Family, row: int, column: int, value: float) -> None:
    name = type(estimator).__name__
    where = f"row {row}, column {column} of X"
    if np.isinf(value):
        raise ValueError(
            f"Input X contains infinity: {where} is {value}. {name} accepts finite numbers, and "
            "NaN for missing entries."
        )
    # "Negative values in data" is what scikit-learn's own estimators say.
    negative = value < 0 <= family.support.low
    prefix = "Negative values in data passed to" if negative else "Unsuitable value in data for"
    raise ValueError(
        f"{prefix} {name}: {where} is {value:g}, but family {family.name!r} accepts "
        f"{family.accepts}, {family.support}."
    )
