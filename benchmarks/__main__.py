"""Run the workloads and write one report of quality, seconds and memory against the peers.

`--all --data DIR --output DIR` runs everything. Scripts beside this one answer further questions;
README.md lists them.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import _common as common
from benchmarks import _report as report
from benchmarks._runner import run_workload
from benchmarks._suite import Settings
from benchmarks.workloads import WORKLOADS

PEERS = ("fastglmpca", "glmpca-fast", "logisticpca")
QUICK_MINUTES = 0.2  # of a workload


def parser() -> argparse.ArgumentParser:
    """Make the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--all", action="store_true", help="run every workload")
    what.add_argument(
        "--only", nargs="+", choices=WORKLOADS, metavar="NAME", help="run these workloads"
    )
    what.add_argument("--list", action="store_true", help="list the workloads and stop")
    made.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of mnist.npz and pbmc_facs.npz"
    )
    made.add_argument("--output", type=Path, metavar="DIR", help="folder to write the report to")
    made.add_argument("--quick", action="store_true", help="tiny sizes; the figures mean nothing")
    made.add_argument("--large", action="store_true", help="5,000,000 rows on disk and the like")
    made.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="repetitions at most; a long case has one (default: %(default)s)",
    )
    made.add_argument(
        "--device", default="cpu", help="of skdeq's estimators (default: %(default)s)"
    )
    return made


def listing() -> str:
    """Describe the workloads."""
    rows = [
        [one.name, one.title, " ".join(one.files) or "none", f"{one.minutes:g}"]
        for one in WORKLOADS.values()
    ]
    return common.table(["name", "what", "files it needs", "minutes on two cores"], rows)


def say(text: str) -> None:
    """Tell of the progress, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def run(names: list[str], settings: Settings) -> list[report.Section]:
    """Run workloads one after the other."""
    sections = []
    for name in names:
        workload = WORKLOADS[name]
        obstacle = workload.obstacle(settings)
        if obstacle:
            say(f"{name}: {obstacle}")
            sections.append(report.Section(workload, [], obstacle))
            continue
        minutes = QUICK_MINUTES if settings.quick else workload.minutes
        say(f"{name}: {workload.title}, about {minutes:g} min")
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            results = run_workload(workload, replace(settings, scratch=Path(scratch)), say)
        seconds = time.perf_counter() - start
        say(f"{name}: done in {seconds / 60:.1f} min")
        sections.append(report.Section(workload, results, seconds=seconds))
    return sections


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    made = parser()
    options = made.parse_args(arguments)
    if options.list:
        print(listing())
        return
    if options.repeats < 1:
        made.error(f"--repeats must be at least 1; got {options.repeats}.")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        made.error(f"--device={options.device}, but torch finds no CUDA device here.")
    settings = Settings(
        data=options.data,
        device=options.device,
        quick=options.quick,
        large=options.large,
        repeats=options.repeats,
    )
    names = list(WORKLOADS) if options.all else options.only
    minutes = sum(
        QUICK_MINUTES if settings.quick else WORKLOADS[name].minutes
        for name in names
        if not WORKLOADS[name].obstacle(settings)
    )
    say(f"{len(names)} workloads, about {minutes:g} minutes on two cores")
    machine = common.machine(options.device, PEERS)
    sections = run(names, settings)
    if options.output:
        print(report.write(sections, machine, settings, options.output))
    else:
        print(report.compose(sections, machine, settings, report.Markdown()))


if __name__ == "__main__":
    main()
