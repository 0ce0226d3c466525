"""What the benchmarks share: data, timing, memory, tables and the command line."""

import argparse
import multiprocessing
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import scipy.sparse as sp
import torch
from sklearn.exceptions import ConvergenceWarning

from skdeq._show_versions import _usable_cores as usable_cores

PACKAGES = ("skdeq", "numpy", "scipy", "scikit-learn", "torch")


# --- data ---------------------------------------------------------------------------------------


def load_mnist(folder):
    """Read `mnist.npz`: `X_train`, `y_train`, `X_test`, `y_test`, pixels as uint8."""
    with np.load(Path(folder) / "mnist.npz") as archive:
        return SimpleNamespace(**{name: archive[name] for name in archive.files})


def load_pbmc(folder):
    """Read `pbmc_facs.npz`: `counts` as float32 CSR, and its other arrays under their names."""
    with np.load(Path(folder) / "pbmc_facs.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    parts = (arrays.pop("data").astype(np.float32), arrays.pop("indices"), arrays.pop("indptr"))
    counts = sp.csr_matrix(parts, shape=tuple(arrays.pop("shape")))
    return SimpleNamespace(counts=counts, **arrays)


# --- timing -------------------------------------------------------------------------------------


def seconds_of(task: Callable, *arguments):
    """Call `task(*arguments)` and return (its result, the wall-clock seconds it took)."""
    start = time.perf_counter()
    result = task(*arguments)
    return result, time.perf_counter() - start


def alternate(tasks: dict[str, Callable], repeats: int):
    """Run every task once per round, `repeats` rounds.

    Rounds, and not one task's repetitions in a row, so that a slow spell of the machine falls on
    all of them. Returns (last result of each, list of seconds of each).
    """
    results, seconds = {}, {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            results[name], elapsed = seconds_of(task)
            seconds[name].append(elapsed)
    return results, seconds


def smallest_passing(passes: Callable[[int], bool], guess: int, limit: int):
    """Return the smallest count in 1..`limit` that `passes`, or None if `limit` itself fails.

    `passes` is taken to be monotone. The search widens its steps away from `guess`, then bisects,
    so that a good guess costs few calls.
    """
    low, high, step = 0, limit + 1, 1  # low fails, high passes or lies beyond the limit
    count = min(max(guess, 1), limit)
    if passes(count):
        high = count
        while high - step > low and passes(high - step):
            high, step = high - step, 2 * step
        low = max(high - step, low)
    else:
        low = count
        while low + step < high and not passes(low + step):
            low, step = low + step, 2 * step
        high = min(low + step, high)
    while high - low > 1:
        middle = (low + high) // 2
        if passes(middle):
            high = middle
        else:
            low = middle
    return high if high <= limit else None


@contextmanager
def without_convergence_warnings():
    """Silence warnings about fits that a benchmark stops early on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


# --- memory -------------------------------------------------------------------------------------


class PeakMemory:
    """Peak resident memory above that at entry, sampled by a thread.

    Afterwards it is `.extra_mb`, and the peak itself `.peak_mb`. With `children` the memory of the
    processes that this one has started is added.
    """

    def __init__(self, interval=0.005, children=False):
        self.interval, self.children = interval, children
        self.peak_mb = self.extra_mb = 0.0

    def __enter__(self):
        self._process = psutil.Process()
        self._before = self._peak = self._resident()
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def _resident(self):
        resident = self._process.memory_info().rss
        if self.children:
            for child in self._process.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    resident += child.memory_info().rss
        return resident

    def _sample(self):
        while not self._stop.wait(self.interval):
            self._peak = max(self._peak, self._resident())

    def __exit__(self, *exception):
        self._stop.set()
        self._sampler.join()
        self._peak = max(self._peak, self._resident())
        self.peak_mb = self._peak / 2**20
        self.extra_mb = (self._peak - self._before) / 2**20


def peak_of_process() -> float:
    """Return the most memory, in MB, that this process has had at a time."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def in_fresh_process(function: Callable, *arguments):
    """Call a module-level function in a new interpreter, so that its memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


# --- tables -------------------------------------------------------------------------------------


def spread(values: Iterable[float], digits=2):
    """Format repeated measurements as `median (min-max)`."""
    values = list(values)
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    median = statistics.median(values)
    return f"{median:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def table(header: list[str], rows: list[list]):
    """Format a Markdown table, columns padded so that it reads as plain text too."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def environment(extra_packages: Iterable[str] = ()):
    """Describe in a line what ran: package versions, cores and threads."""
    versions = ", ".join(f"{name} {_version(name)}" for name in (*PACKAGES, *extra_packages))
    return f"{versions}; cores: {usable_cores()}, threads: {torch.get_num_threads()}"


def machine(device: str, peers: Iterable[str] = ()):
    """Describe what ran where and when, as {what: text}."""
    versions = {name: _version(name) for name in (*PACKAGES, *peers)}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "Python": platform.python_version(),
        **{name: version or "not installed" for name, version in versions.items()},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": str(usable_cores()),
        "threads of torch": str(torch.get_num_threads()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
    }


def processor():
    """Return the name of the processor, as far as the platform tells."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def commit():
    """Return the commit of this source tree, and whether it was changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"
    name = head.stdout.decode().strip()[:12]
    return f"{name} and changes that are not committed" if changed.stdout.strip() else name


def _version(package):
    """Return the version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        # A source tree on the path has no metadata; its module may still know.
        with suppress(ImportError):
            return getattr(__import__(package), "__version__", None)


# --- command line -------------------------------------------------------------------------------


def parser(description: str, data=False, repeats: int | None = None):
    """Make the argument parser that all benchmarks start from."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if data:
        made.add_argument("--data", required=True, metavar="DIR", help="folder of the .npz files")
    if repeats is not None:
        made.add_argument(
            "--repeats", type=int, default=repeats, help="timing rounds (default: %(default)s)"
        )
    made.add_argument("--output", metavar="FILE", help="also write the result to this file")
    # For developing the benchmarks themselves (see README.md): its figures mean nothing.
    made.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    return made


def publish(text: str, options):
    """Print the result and, if asked, write it to `options.output`."""
    if options.quick:
        text = "**--quick: a subsample; these figures mean nothing.**\n\n" + text
    print(text)
    if options.output:
        Path(options.output).write_text(text + "\n", encoding="utf-8")
