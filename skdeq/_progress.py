"""What a fit tells of itself while it runs: lines of text, and scikit-learn's callbacks."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from skdeq._base import resolve_device, unchanged_on_error
from skdeq._chunks import out_of_inference_mode

__all__ = ["CallbackSupportMixin", "Progress", "training"]


class _NoCallbacks:
    """Context of a fit that nobody listens to."""

    def subcontext(self, **_) -> "_NoCallbacks":
        return self

    def call_on_fit_task_begin(self, **_) -> "_NoCallbacks":
        return self

    def call_on_fit_task_end(self, **_) -> bool:
        return False

    @contextmanager
    def propagate_callback_context(self, sub_estimator) -> Iterator[None]:
        yield


try:
    from sklearn.callback import CallbackSupportMixin
except ImportError:  # scikit-learn 1.8 has no callbacks.

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stands in for the mixin of scikit-learn 1.9."""

        def _init_callback_context(self, **_) -> _NoCallbacks:
            return _NoCallbacks()


class Progress:
    """The iterations of one fit, as printed lines and callbacks see them.

    Parameters
    ----------
    unit : str
        What an iteration is called: "iteration" or "epoch".
    most : int
        Iterations at most.
    row_tol : float
        Residual at which a row counts as solved.
    name : str
        What is fitted.
    verbose : bool
        Whether to print.
    context : sklearn.callback.CallbackContext or the like, optional
        Of the whole fit.
    arguments : dict, optional
        What every hook is called with: estimator, X, y and metadata.

    Attributes
    ----------
    store : callable
        ``store(estimator, state)`` gives an estimator the attributes of a fit that ends with the
        state of the solver; the state is what the solver hands to :meth:`end`.
    stopped : bool
        Whether a callback has asked the iterations to stop.
    """

    def __init__(
        self,
        unit: str = "iteration",
        most: int = 0,
        row_tol: float = 0.0,
        *,
        name: str = "",
        verbose: bool = False,
        context=None,
        arguments: dict | None = None,
    ):
        self.unit, self.most, self.row_tol = unit, most, row_tol
        self.name, self.verbose = name, verbose
        self._root = _NoCallbacks() if context is None else context
        self._arguments = {} if arguments is None else arguments
        self._task = self._root
        self._number, self._started = 0, 0.0
        self.store: Callable[[Any, Any], None]
        self.stopped = False

    def begin(self) -> None:
        """Say that an iteration begins."""
        if not self._number:
            self._started = time.perf_counter()
            if self.verbose:
                print(f"[{self.name}] on {self._device()}", flush=True)
        self._task = self._root.subcontext(task_name=self.unit)
        self._task.call_on_fit_task_begin(**self._arguments)

    def end(
        self,
        objective: float,
        state: Callable[[], object],
        *,
        residual: Tensor | None = None,
        score: float | None = None,
    ) -> bool:
        """Say that the iteration has ended; return whether a callback asks to stop.

        Parameters
        ----------
        objective : float
        state : callable
            Returns the state of the solver, for a callback that wants a fitted estimator.
        residual : Tensor of shape (n,), optional
            Of every row.
        score : float, optional
            On rows held out.

        Returns
        -------
        bool
        """
        self._number += 1
        if self.verbose:
            print(self._line(objective, residual, score), flush=True)

        def attributes() -> dict:
            fitted = copy.copy(self._arguments["estimator"])
            self.store(fitted, state())
            return vars(fitted)

        self.stopped = self._task.call_on_fit_task_end(
            **self._arguments, reconstruction_attributes=attributes
        )
        return self.stopped

    @contextmanager
    def part(self, task: str, estimator) -> Iterator[None]:
        """Fit another estimator inside as a part of this fit; callbacks go along."""
        context = self._root.subcontext(task_name=task)
        with context.propagate_callback_context(estimator):
            context.call_on_fit_task_begin(**self._arguments)
            yield
            context.call_on_fit_task_end(**self._arguments)

    def _device(self) -> str:
        """Device of the fit, with the name of the card if it is one."""
        device = resolve_device(self._arguments["estimator"].device, self._arguments["X"])
        card = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
        return f"{device}{card}"

    def _line(self, objective: float, residual: Tensor | None, score: float | None) -> str:
        parts = [f"[{self.name}] {self.unit} {self._number:4d}", f"objective {objective:.8g}"]
        if residual is not None:
            solved = 100 * float((residual <= self.row_tol).double().mean())
            parts.append(f"residual {float(residual.max()):.1e} ({solved:.0f} % of rows solved)")
        if score is not None:
            parts.append(f"validation score {score:.4g}")
        seconds = (time.perf_counter() - self._started) / self._number
        left = seconds * (self.most - self._number)
        parts.append(f"{seconds:.2g} s each, at most {left:.1f} s left")
        return "  ".join(parts)


@contextmanager
def training(
    estimator,
    X,
    y,
    sample_weight,
    *,
    unit: str = "iteration",
    most: int = 0,
    row_tol: float = 0.0,
    parts: int = 0,
) -> Iterator[Progress]:
    """Fit the estimator inside this block; if that fails, it is left as it was.

    Parameters
    ----------
    estimator : estimator
        With :class:`CallbackSupportMixin` among its bases.
    X, y, sample_weight
        What it is fitted to, as given.
    unit : str
        What an iteration is called.
    most : int
        Iterations at most.
    row_tol : float
        Residual at which a row counts as solved.
    parts : int
        Fits of other estimators at most that belong to this one, see :meth:`Progress.part`.

    Yields
    ------
    Progress
        To be told of every iteration.
    """
    # Outside the block below: scikit-learn keeps its books in the estimator's attributes, and
    # ends every callback by them when the fit has failed, too.
    context = estimator._init_callback_context(max_subtasks=most + parts)
    metadata = None if sample_weight is None else {"sample_weight": sample_weight}
    arguments = {"estimator": estimator, "X": X, "y": y, "metadata": metadata}
    progress = Progress(
        unit,
        most,
        row_tol,
        name=type(estimator).__name__,
        verbose=bool(estimator.verbose),
        context=context,
        arguments=arguments,
    )
    with unchanged_on_error(estimator), out_of_inference_mode():
        context.call_on_fit_task_begin(**arguments)
        yield progress
        context.call_on_fit_task_end(**arguments, reconstruction_attributes={})
