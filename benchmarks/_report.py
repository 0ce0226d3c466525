"""Write what was measured: Markdown and reStructuredText, CSV, JSON and figures.

File names do not depend on the run, so that a page of the documentation can include a stored one.
"""

import csv
import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import _common as common
from benchmarks._suite import QUANTITIES, Result, Settings, Target, Workload

# What `doc/benchmarks.rst` includes; not .rst, or Sphinx would take it for a page of its own.
MARKDOWN, RST, CSV, JSON = (f"benchmarks.{end}" for end in ("md", "rst.inc", "csv", "json"))
STORED = "/benchmarks"  # where the documentation keeps the figures, seen from its root
QUICK = "Tiny sizes (--quick): these figures mean nothing."


@dataclass
class Section:
    """What came of a workload."""

    workload: Workload
    results: list[Result]
    skipped: str | None = None
    seconds: float = 0.0

    def targets(self) -> list[Target]:
        """Return what was to be reached."""
        if self.workload.targets is None or not self.results:
            return []
        return self.workload.targets(self.results)

    def figure_name(self) -> str:
        """Return the file name of the figure."""
        return f"{self.workload.name}.png"


# --- tables -------------------------------------------------------------------------------------


def heading(quantity: str) -> str:
    """Return the heading of a column."""
    label, unit, _ = QUANTITIES[quantity]
    return f"{label}, {unit}" if unit else label


def cell(values: list[float], quantity: str) -> str:
    """Write a median and, if there are several values, the smallest and the largest."""
    digits = QUANTITIES[quantity].digits
    median, low, high = (f"{of(values):{digits}}" for of in (statistics.median, min, max))
    return median if low == high else f"{median} ({low} to {high})"


def measured_quantities(results: list[Result]) -> list[str]:
    """Return the quantities that occur, in the order of the report."""
    return [name for name in QUANTITIES if any(name in one.values for one in results)]


def table_of(results: list[Result]) -> list[list[str]]:
    """Return header and rows."""
    quantities = measured_quantities(results)
    rows = [["data", "method", "runs", *map(heading, quantities)]]
    for one in results:
        if one.failure:
            continue
        runs = max(map(len, one.values.values()))
        cells = [cell(one.values[name], name) if name in one.values else "" for name in quantities]
        rows.append([one.data, one.method, str(runs), *cells])
    return rows


def table_of_targets(targets: list[Target]) -> list[list[str]]:
    """Return header and rows."""
    rows = [[one.what, one.goal, one.measured, "yes" if one.met else "no"] for one in targets]
    return [["what", "target", "measured", "met"], *rows]


# --- text ---------------------------------------------------------------------------------------


class Markdown:
    """Blocks of text as Markdown."""

    def heading(self, text):
        return f"## {text}"

    def paragraph(self, text):
        return text

    def table(self, rows):
        return common.table(rows[0], rows[1:])

    def figure(self, name, text):
        return f"![{text}]({name})"


class Restructured:
    """Blocks of text as reStructuredText, for the documentation."""

    def heading(self, text):
        return f"{text}\n{'-' * len(text)}"

    def paragraph(self, text):
        return text.replace("`", "``").replace("|", "\\|").replace("*", "\\*")

    def table(self, rows):
        lines = [".. list-table::", "   :header-rows: 1", "   :class: benchmark-table", ""]
        for row in rows:
            for position, text in enumerate(row):
                lines.append(f"   {' ' if position else '*'} - {self.paragraph(text)}".rstrip())
        return "\n".join(lines)

    def figure(self, name, text):
        return f".. image:: {STORED}/{name}\n   :alt: {text}"


def compose(sections: list[Section], machine: dict, settings: Settings, markup) -> str:
    """Write the report in a markup."""
    blocks = [markup.paragraph(QUICK)] if settings.quick else []
    blocks.append(
        markup.paragraph(
            "Every method on every data set has a process of its own, so that its memory is its "
            "own; the methods on the same data take turns. Seconds are wall-clock time without "
            "imports, loading and a first small fit that fills caches and thread pools: median "
            "(smallest to largest) of the runs, of which there is one only where it is long. "
            "Quality is that of the first run. The peak memory of the process includes "
            "its imports and the data; the other column is what the first run adds to what was "
            "there just before it."
        )
    )
    blocks.append(markup.table([["what ran", ""], *map(list, machine.items())]))
    targets = [target for section in sections for target in section.targets()]
    if targets:
        blocks += [markup.heading("Targets"), markup.table(table_of_targets(targets))]
    for section in sections:
        blocks.append(markup.heading(section.workload.title))
        if section.skipped:
            blocks.append(markup.paragraph(section.skipped))
            continue
        blocks.append(markup.paragraph(section.workload.note))
        rows = table_of(section.results)
        if len(rows) > 1:
            blocks.append(markup.table(rows))
        blocks += [
            markup.paragraph(f"{one.data}, {one.method}: {one.failure}.")
            for one in section.results
            if one.failure
        ]
        if has_figure(section):
            blocks.append(markup.figure(section.figure_name(), section.workload.title))
    return "\n\n".join(blocks) + "\n"


# --- files --------------------------------------------------------------------------------------


def has_figure(section: Section) -> bool:
    """Tell whether there is something to draw."""
    done = [one for one in section.results if not one.failure]
    return section.workload.figure is not None and bool(done)


def write_figure(section: Section, folder: Path) -> None:
    """Draw the figure of a workload."""
    figure = section.workload.figure([one for one in section.results if not one.failure])
    figure.savefig(folder / section.figure_name(), dpi=120)


def tidy_rows(sections: list[Section]) -> list[dict]:
    """Return one row for each quantity of each case."""
    return [
        {
            "workload": one.workload,
            "data": one.data,
            "method": one.method,
            "quantity": quantity,
            "unit": QUANTITIES[quantity].unit,
            "runs": len(values),
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
        }
        for section in sections
        for one in section.results
        for quantity, values in one.values.items()
    ]


def as_json(sections: list[Section], machine: dict, settings: Settings) -> dict:
    """Return everything, every single value included."""
    return {
        "machine": machine,
        "quick": settings.quick,
        "large": settings.large,
        "repeats": settings.repeats,
        "workloads": [
            {
                "name": section.workload.name,
                "title": section.workload.title,
                "note": section.workload.note,
                "skipped": section.skipped,
                "seconds": section.seconds,
                "targets": [target._asdict() for target in section.targets()],
                "results": [asdict(one) for one in section.results],
            }
            for section in sections
        ],
    }


def finite(content):
    """Replace numbers that are not finite by their names."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    return content


def write(sections: list[Section], machine: dict, settings: Settings, folder: Path) -> str:
    """Write all files to a folder; return the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        if has_figure(section):
            write_figure(section, folder)
    markdown = compose(sections, machine, settings, Markdown())
    (folder / MARKDOWN).write_text(markdown, encoding="utf-8")
    restructured = compose(sections, machine, settings, Restructured())
    (folder / RST).write_text(restructured, encoding="utf-8")
    rows = tidy_rows(sections)
    with open(folder / CSV, "w", newline="", encoding="utf-8") as file:
        header = ["workload", "data", "method", "quantity", "unit", "runs", "median", "min", "max"]
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(rows)
    # Names for what is not finite, which JSON has no numbers for.
    content = json.dumps(finite(as_json(sections, machine, settings)), indent=1, allow_nan=False)
    (folder / JSON).write_text(content + "\n", encoding="utf-8")
    return markdown
