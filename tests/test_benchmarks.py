"""The report of the benchmarks: every case runs, and what is written is well-formed."""

import csv
import importlib
import json
import math
import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("psutil", reason="the benchmarks measure memory with psutil")
if sys.platform == "win32":
    pytest.skip("the benchmarks measure memory as POSIX systems do", allow_module_level=True)

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not beside the tests", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from benchmarks import _report as report  # noqa: E402
from benchmarks import _runner as runner  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks._suite import QUANTITIES, Case, Result, Settings, Trial  # noqa: E402
from benchmarks.implicit_em import speed  # noqa: E402
from benchmarks.workloads import WORKLOADS, roofline, scaling, searches  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder with small files in the form of the real ones."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    y = rng.integers(10, size=300)
    centres = rng.uniform(0, 255, size=(10, 784)) * (rng.random((10, 784)) < 0.2)
    X = np.clip(centres[y] + rng.normal(scale=20, size=(300, 784)), 0, 255).astype(np.uint8)
    np.savez(
        folder / "mnist.npz", X_train=X[:200], y_train=y[:200], X_test=X[200:], y_test=y[200:]
    )
    mean = np.exp(rng.normal(size=(400, 2)) @ rng.normal(scale=0.5, size=(2, 640)))
    counts = sp.csr_matrix(rng.poisson(mean).astype(np.int32))
    np.savez(
        folder / "pbmc_facs.npz",
        data=counts.data,
        indices=counts.indices,
        indptr=counts.indptr,
        shape=counts.shape,
        reference_genes=np.arange(320),
        reference_progress=np.array([[1, -5e5, 0.5], [2, -4e5, 0.5]]),
    )
    return folder


def installed(package):
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in WORKLOADS if name != "cuda"])
def test_every_case_of_a_workload_measures_something(name, data, tmp_path, monkeypatch):
    """Each case gives finite values of known quantities, and a row of the table."""
    monkeypatch.setattr(roofline, "LONG_ENOUGH", 0.0)
    # Processes of loky import everything anew, which takes longer than all else here.
    monkeypatch.delitem(searches.JOBS, "2 jobs, loky")
    workload = WORKLOADS[name]
    settings = Settings(data=data, quick=True, scratch=tmp_path)
    assert workload.obstacle(settings) is None
    if workload.setup:
        workload.setup(settings)
    results = []
    cases = workload.cases(settings)
    assert len(set(cases)) == len(cases) > 1
    for case in cases:
        if case.package and not installed(case.package):
            continue
        trial = case.prepare(settings, *case.arguments)
        try:
            values, fitted = trial.run()
            values = {**values, **trial.judge(fitted)}
        finally:
            trial.close()
        assert values and values.keys() <= QUANTITIES.keys()
        # A peer may fail on data as small as these, and scikit-learn 1.8's NMF does.
        if case.package is None and not case.method.startswith("NMF"):
            assert all(np.isfinite(value) for value in values.values()), (case.method, values)
        timed = [values[one] for one in ("fit", "transform", "search", "pass") if one in values]
        assert timed and min(timed) > 0
        results.append(
            Result(name, case.data, case.method, {one: [values[one]] for one in values})
        )
    section = report.Section(workload, results)
    assert len(report.table_of(results)) == len(results) + 1
    assert all(isinstance(one.met, bool | np.bool_) and one.measured for one in section.targets())
    if workload.figure:
        report.write_figure(section, tmp_path)
        assert (tmp_path / section.figure_name()).stat().st_size > 1000


def test_report_is_written_and_well_formed(tmp_path, capsys, monkeypatch):
    """One command writes Markdown, CSV, JSON and figures that tell the same."""
    pytest.importorskip("matplotlib")
    # Else a machine that is busy would be spared the second run.
    monkeypatch.setattr("benchmarks._runner.LONG_ENOUGH", np.inf)
    names = ["out_of_core", "reduction"]
    main(["--quick", "--only", *names, "--repeats", "2", "--output", str(tmp_path)])
    markdown = (tmp_path / report.MARKDOWN).read_text()
    assert capsys.readouterr().out.strip() == markdown.strip()
    content = json.loads((tmp_path / report.JSON).read_text())
    assert [one["name"] for one in content["workloads"]] == names
    done, skipped = content["workloads"]
    assert skipped["skipped"].startswith("Skipped: it needs mnist.npz") and not skipped["results"]
    assert skipped["skipped"] in markdown
    assert content["machine"]["cores"].isdigit() and content["quick"] is True
    assert len(done["results"]) == 3 and not any(one["failure"] for one in done["results"])
    with open(tmp_path / report.CSV, newline="") as file:
        rows = list(csv.DictReader(file))
    for one in done["results"]:
        # Each run in a process of its own, which has imported what it needs.
        assert min(one["values"]["peak_memory"]) > 50
        assert len(one["values"]["fit"]) == 2 and len(one["values"]["latent_r2"]) == 1
        for quantity, values in one["values"].items():
            (row,) = (
                row
                for row in rows
                if (row["method"], row["quantity"]) == (one["method"], quantity)
            )
            assert int(row["runs"]) == len(values)
            assert float(row["min"]) == min(values) and float(row["max"]) == max(values)
            assert float(row["min"]) <= float(row["median"]) <= float(row["max"])
    assert len(rows) == sum(len(one["values"]) for one in done["results"])
    assert (tmp_path / "out_of_core.png").is_file() and not (tmp_path / "reduction.png").exists()


def test_restructured_text_parses():
    """The documentation can include the report."""
    core = pytest.importorskip("docutils.core")
    results = [
        Result("binary", "a * b", "of `x`", {"fit": [1.0, 2.0]}),
        Result("binary", "a * b", "other", failure="failed: ValueError: |x|"),
    ]
    section = report.Section(WORKLOADS["binary"], results)
    text = report.compose([section], {"cores": "2"}, Settings(), report.Restructured())
    strict = {"report_level": 2, "halt_level": 2, "file_insertion_enabled": False}
    document = core.publish_doctree(text, settings_overrides=strict).astext()
    assert "1.5 (1 to 2)" in document and "failed: ValueError: |x|." in document


def test_missing_files_and_failures_are_sentences(tmp_path):
    """What cannot run says why, and does not end the report."""
    counts = WORKLOADS["counts"]
    assert "--data" in counts.obstacle(Settings())
    assert "pbmc_facs.npz not found" in counts.obstacle(Settings(data=tmp_path))
    failed = Result("counts", "data", "method", failure="failed: ValueError: no")
    text = report.compose(
        [report.Section(counts, [failed])], {"cores": "2"}, Settings(), report.Markdown()
    )
    assert "data, method: failed: ValueError: no." in text


def test_values_that_are_not_finite_stay_valid_json():
    """JSON has no number for them."""
    content = report.finite({"a": [1.0, -math.inf], "b": {"c": math.nan}})
    assert json.loads(json.dumps(content, allow_nan=False)) == {
        "a": [1, "-inf"],
        "b": {"c": "nan"},
    }


def test_targets_of_scaling_judge_the_slope_in_rows():
    """Linear time meets the target and quadratic time does not."""

    def results(power):
        return [
            Result(
                "scaling",
                scaling.label("n", n),
                "ours",
                {"fit": [n**power], "extra_memory": [n / 1e4], "data_memory": [n / 1e4]},
            )
            for n in (10_000, 100_000, 1_000_000)
        ]

    linear, quadratic = (scaling.targets(results(power)) for power in (1, 2))
    assert [one.met for one in linear] == [True, True]
    assert json.dumps([one.met for one in linear]) == "[true, true]"
    assert [one.met for one in quadratic] == [False, True]
    assert quadratic[0].measured == "2.00"


def test_operations_of_a_pass_are_counted_as_torch_counts_them():
    """The products of the pass and nothing else."""

    def product_in_place(out, left, right, **_):
        return 2 * left[0] * left[1] * right[1]

    in_place = {torch.ops.aten.addmm_: product_in_place}
    n, p, k = 50, 40, 3
    for kind in roofline.PASSES:
        method = roofline.PASSES[kind]
        shape = roofline.Shape(n, p, k, hessians=method == "derivatives")
        problem, latents = roofline.make_problem("poisson", shape)
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            roofline.one_pass(problem, latents, method)
        assert counter.get_total_flops() == shape.products()


def test_processes_of_cases_have_as_many_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with runner._process() as process:
            assert process.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(threads)


def _trial_that_runs(settings):
    return Trial(lambda: ({"fit": 1.0}, None))


def _trial_that_dies(settings):
    return Trial(lambda: os._exit(1))


def test_a_process_that_dies_does_not_take_the_report_along():
    cases = [Case("data", "dies", _trial_that_dies), Case("data", "runs", _trial_that_runs)]
    done = runner._run_group("name", cases, Settings(repeats=2), lambda _: None)
    assert done[0].failure.startswith("failed: BrokenProcessPool")
    assert done[1].failure is None and done[1].values["fit"] == [1.0, 1.0]


def test_list_names_every_workload(capsys):
    """Listing runs nothing."""
    main(["--list"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in WORKLOADS)


@pytest.mark.filterwarnings("ignore")
def test_study_of_fine_tuning_compares_every_method(monkeypatch, capsys, tmp_path):
    from benchmarks import synthetic_finetune as study

    pytest.importorskip("matplotlib")
    # UMAP compiles for half a minute.
    monkeypatch.setattr(study, "UMAP", None)
    figure = tmp_path / "curves.png"
    arguments = ["--quick", "--law", "Bernoulli", "--seeds", "1", "--figure", str(figure)]
    monkeypatch.setattr(sys, "argv", ["synthetic_finetune", *arguments])
    study.main()
    table = capsys.readouterr().out
    errors = {}
    for line in table.splitlines():
        if line.startswith("| Bernoulli"):
            _, _, method, error, _, _ = line.split("|")
            errors[method.strip()] = float(error)
    assert errors.keys() == {"PCA", study.FROZEN, study.TUNED, study.BAYES, study.TRUE}
    # The bound of all that see the features alone.
    assert errors[study.BAYES] < min(errors[name] for name in ("PCA", study.FROZEN, study.TUNED))
    assert figure.stat().st_size > 1000


@pytest.mark.filterwarnings("ignore")
def test_fine_tuning_on_images_compares_every_method(data, monkeypatch, capsys):
    from benchmarks import _common as common
    from benchmarks import mnist_finetune as study

    def load(options):
        mnist = common.load_mnist(options.data)
        mnist.X_train, mnist.X_test = (
            (X > 127).astype(np.float32) for X in (mnist.X_train, mnist.X_test)
        )
        return mnist

    monkeypatch.setattr(study, "load", load)
    arguments = ["--quick", "--data", str(data), "--labels", "60"]
    monkeypatch.setattr(sys, "argv", ["mnist_finetune", *arguments])
    study.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 2 * 6
    assert all(0 <= float(row.split("|")[4]) <= 1 for row in rows)


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run a script as from the command line; return the rows of its tables as lists of cells."""

    def run(name, *arguments):
        script = importlib.import_module(f"benchmarks.{name}")
        monkeypatch.setattr(sys, "argv", [name, "--quick", *arguments])
        script.main()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    return run


def check_table(rows):
    """Assert that there are rows under the header and the rule, and numbers in them."""
    assert len(rows) > 3
    assert not [row for row in rows if re.search(r"\b(nan|inf)\b", " ".join(row))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("table", ["theorem", "ablation", "benchmark", "dynamics", "speed"])
def test_every_table_of_the_encoder_is_made(table, data, run_script, monkeypatch):
    # Each form of the data takes a fresh process.
    monkeypatch.setattr(speed, "FORMS", {"uint8": speed.FORMS["uint8"]})
    arguments = ["--table", table, "--epochs", "1", "--seeds", "1"]
    check_table(run_script("implicit_em_paper", "--data", str(data), *arguments))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "arguments", "needs_data"),
    [
        ("mnist_speed", ["--long-run", "3"], True),
        ("layer_speed", ["--components", "3"], True),
        ("drop_in", ["--only", "mnist"], True),
        ("synthetic_latents", [], False),
    ],
)
def test_every_script_makes_its_tables(name, arguments, needs_data, data, run_script):
    check_table(run_script(name, *arguments, *(["--data", str(data)] if needs_data else [])))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["--all", "--quick", "--device", "cuda"])
    assert "--device=cuda, but torch finds no CUDA device" in capsys.readouterr().err
