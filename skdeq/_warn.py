"""Warnings that point at the line of the user."""

import sys
import warnings
from types import FrameType

__all__ = ["warn", "warn_of_convergence"]

# Between the user and us: wrappers of methods, and what reads saved models.
_BETWEEN = {
    *("skdeq", "sklearn", "torch", "joblib", "skops", "contextlib", "copy", "pickle"),
    *("threading", "concurrent", "multiprocessing", "runpy"),
}


def warn(message: str, category: type[Warning]) -> None:
    """Warn of something that the nearest caller outside the libraries in between can change.

    Parameters
    ----------
    message : str
    category : type of Warning
    """
    # Python 3.12 has `skip_file_prefixes` for it.
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and _package(frame) in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def warn_of_convergence(message: str) -> None:
    """Warn, as :func:`warn` does, of a solution that is not what was asked for."""
    # Not above: the mathematics that warns is on torch alone.
    from sklearn.exceptions import ConvergenceWarning

    warn(message, ConvergenceWarning)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
