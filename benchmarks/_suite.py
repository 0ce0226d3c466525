"""What the report is made of: workloads, the cases they compare, and what running one gives."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True)
class Settings:
    """What the command line asks for.

    Attributes
    ----------
    data : Path or None
        Folder of `mnist.npz` and `pbmc_facs.npz`.
    device : str
        Of skdeq's estimators.
    quick : bool
        Tiny sizes, for trying out the benchmarks themselves.
    large : bool
        Sizes that take an hour rather than a minute, where a workload has them.
    repeats : int
        Repetitions of a case, at most.
    scratch : Path or None
        Folder for files of a workload, removed after the run.
    """

    data: Path | None = None
    device: str = "cpu"
    quick: bool = False
    large: bool = False
    repeats: int = 3
    scratch: Path | None = None


class Trial(NamedTuple):
    """A case that is ready to be timed: data in memory, thread pools and late imports paid for.

    Attributes
    ----------
    run : callable
        Does the work once; returns ({quantity: value}, what was fitted).
    judge : callable
        Takes what was fitted and returns {quantity: value}: how good it is.
    close : callable
        Ends what the trial started, other processes say.
    """

    run: Callable[[], tuple[dict[str, float], object]]
    judge: Callable[[object], dict[str, float]] = lambda fitted: {}
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Case:
    """One method on one data set; it gets a process of its own.

    Attributes
    ----------
    data, method : str
        What the report calls them.
    prepare : callable
        ``prepare(settings, *arguments)`` returns the Trial; a module-level function, because the
        process finds it by name.
    arguments : tuple
    package : str or None
        Distribution that has to be installed.
    group : str or None
        Cases of a group take turns; by default those on the same data.
    """

    data: str
    method: str
    prepare: Callable[..., Trial]
    arguments: tuple = ()
    package: str | None = None
    group: str | None = None


@dataclass
class Result:
    """What came of a case.

    Attributes
    ----------
    workload, data, method : str
    values : dict of list
        Values of each quantity, one for each repetition; quality is judged once.
    failure : str or None
        Why there are none, as a sentence.
    """

    workload: str
    data: str
    method: str
    values: dict[str, list[float]] = field(default_factory=dict)
    failure: str | None = None

    def median(self, quantity: str) -> float:
        """Return the median of a quantity, NaN if it was not measured."""
        values = self.values.get(quantity)
        return statistics.median(values) if values else float("nan")


class Target(NamedTuple):
    """What a workload was meant to reach, and whether it did."""

    what: str
    goal: str
    measured: str
    met: bool


@dataclass(frozen=True)
class Workload:
    """A question, the cases that answer it, and how the answer is shown.

    Attributes
    ----------
    name : str
        Of the command line and of the files.
    title, note : str
        Heading, and what a reader must know to read the table.
    cases : callable
        ``cases(settings)`` returns the list of cases.
    minutes : float
        What it takes on two cores, roughly.
    files : tuple of str
        What must be in the data folder.
    setup : callable or None
        ``setup(settings)`` is called once before the cases.
    references : callable or None
        ``references(settings)`` returns results that others have published.
    targets : callable or None
        ``targets(results)`` returns the list of targets.
    figure : callable or None
        ``figure(results)`` returns a matplotlib figure, or None if there is nothing to draw.
    unavailable : callable or None
        ``unavailable(settings)`` says why the workload cannot run here, or returns None.
    """

    name: str
    title: str
    note: str
    cases: Callable[[Settings], list[Case]]
    minutes: float
    files: tuple[str, ...] = ()
    setup: Callable[[Settings], None] | None = None
    references: Callable[[Settings], list[Result]] | None = None
    targets: Callable[[list[Result]], list[Target]] | None = None
    figure: Callable[[list[Result]], object] | None = None
    unavailable: Callable[[Settings], str | None] | None = None

    def obstacle(self, settings: Settings) -> str | None:
        """Say in a sentence why the workload cannot run, or return None."""
        if self.files and settings.data is None:
            return f"Skipped: it needs {' and '.join(self.files)}; name their folder by --data."
        missing = [name for name in self.files if not (settings.data / name).is_file()]
        if missing:
            return f"Skipped: {' and '.join(missing)} not found in the folder given by --data."
        return self.unavailable(settings) if self.unavailable else None


class Quantity(NamedTuple):
    """How the report names and writes a measured quantity."""

    label: str
    unit: str
    digits: str  # of a format specification


# In the order of the report's columns.
QUANTITIES = {
    "fit": Quantity("fit", "s", ".3g"),
    "transform": Quantity("transform", "s", ".3g"),
    "fit_and_scores": Quantity("fit and scores of its rows", "s", ".3g"),
    "search": Quantity("search", "s", ".3g"),
    "iterations": Quantity("iterations", "", ".0f"),
    "peak_memory": Quantity("peak memory of the process", "MB", ",.0f"),
    "extra_memory": Quantity("peak above imports and data", "MB", ",.0f"),
    "device_memory": Quantity("peak memory of the device", "MB", ",.0f"),
    "data_memory": Quantity("the data", "MB", ",.1f"),
    "probe_accuracy": Quantity("probe accuracy", "%", ".2f"),
    "reconstruction_error": Quantity("held-out mean squared error", "", ".4f"),
    "log_likelihood": Quantity("log-likelihood", "", ",.0f"),
    "against_published": Quantity("against the published one", "", "+,.0f"),
    "held_out_log_likelihood": Quantity("held-out log-likelihood of a row", "", ",.2f"),
    "entry_log_likelihood": Quantity("log-likelihood of a held-out entry", "", ".4f"),
    "objective": Quantity("training objective of a row", "", ",.2f"),
    "latent_r2": Quantity("R2 of the true latents", "", ".4f"),
    "best_score": Quantity("best score of the search", "", ".5f"),
    "pass": Quantity("one pass", "s", ".3g"),
    "flops": Quantity("arithmetic", "GFLOP", ".3g"),
    "memory_traffic": Quantity("main memory traffic", "GB", ".3g"),
    "tile_traffic": Quantity("cache traffic", "GB", ".3g"),
    "gemm_rate": Quantity("matrix product rate", "GFLOP/s", ".3g"),
    "narrow_gemm_rate": Quantity("the same in the shapes of the pass", "GFLOP/s", ".3g"),
    "mean_rate": Quantity("rate of the mean function", "G/s", ".3g"),
    "bandwidth": Quantity("main memory bandwidth", "GB/s", ".3g"),
    "tile_bandwidth": Quantity("cache bandwidth", "GB/s", ".3g"),
    "bound": Quantity("bound from the rates", "s", ".3g"),
    "share": Quantity("share of the bound", "%", ".0f"),
    "narrow_share": Quantity("share, shapes of the pass", "%", ".0f"),
}
