"""Latent-variable models for scikit-learn users, backed by torch on CPU and CUDA."""

import importlib
from types import ModuleType

from skdeq._expfam_deq import ExpFamilyDEQ
from skdeq._fine_tune import DEQClassifier, DEQRegressor
from skdeq._implicit_em import ImplicitEMEncoder
from skdeq._show_versions import show_versions
from skdeq._version import __version__

_SUBMODULES = (
    "families",
    "fixed_point",
    "implicit",
    "inspection",
    "model_selection",
    "nn",
    "objectives",
)

__all__ = [
    "DEQClassifier",
    "DEQRegressor",
    "ExpFamilyDEQ",
    "ImplicitEMEncoder",
    "__version__",
    "show_versions",
    *_SUBMODULES,
]


def __getattr__(name: str) -> ModuleType:
    # Submodules are imported when they are asked for: skdeq.nn needs torch's compiler, whose
    # import takes as long as everything else.
    if name in _SUBMODULES:
        return importlib.import_module(f"skdeq.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
