"""What to paste into a report of a problem: versions, cores and devices."""

import os
from importlib.metadata import PackageNotFoundError, version

import sklearn
import torch

from skdeq._version import __version__

__all__ = ["show_versions"]

# What scikit-learn's own list, which follows, does not have.
_OPTIONAL = ("polars", "rich", "skops")


def show_versions() -> None:
    """Print the versions, cores and devices that a report of a problem should state.

    First what skdeq adds, torch with its threads and CUDA devices, then what
    :func:`sklearn.show_versions` prints: Python, the platform, the other dependencies and the
    BLAS and OpenMP libraries that are loaded.

    Examples
    --------
    >>> import skdeq
    >>> skdeq.show_versions()  # doctest: +ELLIPSIS
    <BLANKLINE>
    skdeq:
            skdeq: ...
    """
    sections: dict[str, dict[str, object]] = {
        "skdeq": {"skdeq": __version__, "torch": torch.__version__}
        | {name: _installed(name) for name in _OPTIONAL},
        "Cores and devices": {
            "cores": f"{_usable_cores()} usable of {os.cpu_count()}",
            "torch threads": torch.get_num_threads(),
            "CUDA": _cuda(),
        },
    }
    for title, entries in sections.items():
        print(f"\n{title}:")
        for name, value in entries.items():
            print(f"{name:>13}: {value}")
    sklearn.show_versions()


def _installed(name: str) -> str | None:
    """Version of an installed package, without importing it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _usable_cores() -> int:
    # Not every platform can bind a process to some of the cores.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _cuda() -> str:
    """Name the CUDA (or ROCm) that torch was built with, and the devices it sees."""
    built = torch.version.cuda or torch.version.hip
    if built is None:
        return "torch was built without it"
    if not torch.cuda.is_available():
        return f"{built}, no device available"
    count = torch.cuda.device_count()
    return f"{built}, " + ", ".join(
        f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(count)
    )
