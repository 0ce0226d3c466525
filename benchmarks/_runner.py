"""Run the cases of a workload: each in a process of its own, taking turns."""

import gc
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby

import torch

from benchmarks import _common as common
from benchmarks._suite import Case, Result, Settings, Workload

# A case that has taken this many seconds is not repeated any more.
LONG_ENOUGH = 10.0
# What the processes have in common, imported once and inherited.
PRELOADED = ["skdeq", "sklearn.linear_model", "sklearn.decomposition", "benchmarks._common"]

# --- in the process of a case -------------------------------------------------------------------

_trial = None


def _prepare(case: Case, settings: Settings) -> None:
    global _trial
    # Of fits that are stopped early on purpose and of peers' own affairs; the figures show all.
    warnings.simplefilter("ignore")
    _trial = case.prepare(settings, *case.arguments)


def _repeat(first: bool) -> tuple[dict[str, float], float]:
    """Run once, judge if it is the first time; return the values and the seconds of the run."""
    gc.collect()
    start = time.perf_counter()
    with common.PeakMemory() as memory:
        values, fitted = _trial.run()
    seconds = time.perf_counter() - start
    values = {"peak_memory": common.peak_of_process(), **values}
    if first:
        # Later runs find memory that the process has kept.
        values = {"extra_memory": memory.extra_mb, **values, **_trial.judge(fitted)}
    return {name: float(value) for name, value in values.items()}, seconds


def _close() -> None:
    if _trial is not None:
        _trial.close()


# --- in the process of the report ---------------------------------------------------------------


def run_workload(
    workload: Workload, settings: Settings, say: Callable[[str], None]
) -> list[Result]:
    """Run every case; one that fails leaves a sentence in its result.

    The cases of a group are prepared together and then take turns, one repetition each a round,
    so that a slow spell of the machine falls on all of them. Their processes stay alive between
    the rounds, so that imports, data and first calls are paid for once.
    """
    if workload.setup:
        workload.setup(settings)
    results = list(workload.references(settings)) if workload.references else []
    cases = workload.cases(settings)
    for _, group in groupby(cases, key=lambda case: case.group or case.data):
        results += _run_group(workload.name, list(group), settings, say)
    return results


def _run_group(name, cases, settings, say) -> list[Result]:
    results = {case: Result(name, case.data, case.method) for case in cases}
    processes = {}
    for case, result in results.items():
        if case.package and not _installed(case.package):
            result.failure = f"left out: the package {case.package} is not installed"
        else:
            processes[case] = _process()
    try:
        pending = {
            case: process.submit(_prepare, case, settings) for case, process in processes.items()
        }
        for case, future in pending.items():
            _outcome(results[case], future.result)
        spent = dict.fromkeys(cases, 0.0)
        for case, repetition in _turns(results, spent, settings.repeats):
            outcome = _outcome(results[case], _call, processes[case], _repeat, repetition == 0)
            if outcome is None:
                continue
            values, seconds = outcome
            spent[case] += seconds
            for quantity, value in values.items():
                results[case].values.setdefault(quantity, []).append(value)
            say(f"  {case.data}: {case.method}: {seconds:.2f} s")
    finally:
        for case, process in processes.items():
            _outcome(results[case], _call, process, _close)
            process.shutdown(cancel_futures=True)
    for result in results.values():
        if result.failure:
            say(f"  {result.data}: {result.method}: {result.failure}")
    return list(results.values())


def _process() -> ProcessPoolExecutor:
    # A fork of a process that has only imported starts at once and has no threads to lose; what
    # cannot fork starts anew.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(PRELOADED)
    # skdeq gives a forked process one thread, as torch's others are gone; of a process that has
    # only imported none has begun.
    return ProcessPoolExecutor(
        max_workers=1,
        mp_context=context,
        initializer=torch.set_num_threads,
        initargs=(torch.get_num_threads(),),
    )


def _turns(
    results: dict[Case, Result], spent: dict[Case, float], repeats: int
) -> Iterator[tuple[Case, int]]:
    """Yield (case, repetition): round by round, without those that failed or took long."""
    for repetition in range(repeats):
        for case, result in results.items():
            if result.failure is None and spent[case] < LONG_ENOUGH:
                yield case, repetition


def _call(process: ProcessPoolExecutor, *task):
    """Run a function in another process; raises, too, if that process is no more."""
    return process.submit(*task).result()


def _outcome(result: Result, call: Callable, *arguments):
    """Return what a call returned; if it failed, say so in the result."""
    try:
        return call(*arguments)
    except Exception as error:
        # Of a peer, say: the report goes on without it.
        lines = str(error).strip().splitlines()
        result.failure = f"failed: {type(error).__name__}" + (f": {lines[0]}" if lines else "")
        return None


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
