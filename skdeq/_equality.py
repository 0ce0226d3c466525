"""Objects that are equal when what they are made of is."""

import copy
import inspect
from types import FunctionType, MethodType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

__all__ = ["EqualByParameters"]


class EqualByParameters:
    """Objects that are their type and parameters: the public instance attributes."""

    def _parameters(self) -> tuple:
        return tuple((name, v) for name, v in vars(self).items() if not name.startswith("_"))

    def __repr__(self) -> str:
        written = ", ".join(f"{name}={v!r}" for name, v in self._parameters())
        return f"{type(self).__name__}({written})"

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return _Comparison().holds(self, other)

    def __hash__(self) -> int:
        # Parameters may change, and may be arrays.
        return hash(type(self))

    def __sklearn_clone__(self) -> Self:
        return copy.deepcopy(self)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the constructor's arguments by name, by which a search finds them.

        Parameters
        ----------
        deep : bool, default=True
            Without effect; estimators have it.

        Returns
        -------
        dict
            Those that are kept in attributes of the same names.
        """
        known = inspect.signature(type(self)).parameters
        return {name: getattr(self, name) for name in known if hasattr(self, name)}

    def set_params(self, **params: object) -> Self:
        """Change arguments of the constructor, as ``family__dispersion`` of an estimator does.

        Parameters
        ----------
        **params : object
            New values by name.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            For a name that the constructor does not have, and for a value that it refuses. The
            object is left as it was.
        """
        present = self.get_params()
        for name in params:
            if name not in present:
                known = ", ".join(map(repr, present)) or "none"
                raise ValueError(
                    f"{type(self).__name__} has no parameter {name!r}. Known are {known}."
                )
        vars(self).update(vars(type(self)(**{**present, **params})))
        return self


class _Comparison:
    """Of parameters that are equal, or one of which could be a copy of the other.

    Objects that are equal to themselves alone, and so not to their copies, are if they are of one
    type and what a pickle would hold of them is equal. Functions and classes, of which copies are
    the same, have to be one.
    """

    def __init__(self) -> None:
        # What holds itself is met again; kept, so that none takes the place of another in memory.
        self._met: dict[tuple[int, int], tuple[object, object]] = {}

    def holds(self, one: Any, other: Any) -> bool:
        """Whether the two are equal."""
        kind, pair = type(one), (id(one), id(other))
        if one is other or pair in self._met:
            return True
        if kind is not type(other):
            return _are_the_same(one, other)
        self._met[pair] = one, other
        if isinstance(one, EqualByParameters):
            return self.holds(one._parameters(), other._parameters())
        if isinstance(one, MethodType):
            return one.__func__ is other.__func__
        if isinstance(one, tuple | list):
            return len(one) == len(other) and all(map(self.holds, one, other))
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(
                self.holds(value, other[key]) for key, value in one.items()
            )
        if kind.__eq__ is object.__eq__ and not isinstance(one, type | FunctionType | np.ufunc):
            try:
                held = one.__reduce_ex__(2), other.__reduce_ex__(2)
            except TypeError:
                # What cannot be copied is not told from another of its type.
                return True
            return self.holds(*held)
        return _are_the_same(one, other)


def _are_the_same(one: Any, other: Any) -> bool:
    """Whether two objects say that they are equal, arrays and tensors as a whole."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and torch.equal(one.detach().cpu(), other.detach().cpu())
    try:
        return bool(one == other)
    except (ValueError, RuntimeError):
        return np.array_equal(one, other)
