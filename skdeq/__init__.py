"""Latent-variable models for scikit-learn users, backed by torch on CPU and CUDA."""

from skdeq._expfam_deq import ExpFamilyDEQ
from skdeq._fine_tune import DEQClassifier, DEQRegressor
from skdeq._implicit_em import ImplicitEMEncoder
from skdeq._show_versions import show_versions
from skdeq._version import __version__

__all__ = [
    "DEQClassifier",
    "DEQRegressor",
    "ExpFamilyDEQ",
    "ImplicitEMEncoder",
    "__version__",
    "show_versions",
]
