"""The pages of doc/: their code runs, and no public name is left out of the reference."""

import doctest
import importlib
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import skdeq

DOC = Path(__file__).parents[1] / "doc"
PAGES = [
    path
    for path in sorted(DOC.rglob("*.rst"))
    if path.relative_to(DOC).parts[0] not in ("_build", "auto_examples", "generated")
    and ">>> " in path.read_text(encoding="utf-8")
]
PUBLIC_MODULES = ["skdeq"] + [
    f"skdeq.{module.name}"
    for module in pkgutil.iter_modules(skdeq.__path__)
    if not module.name.startswith("_")
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOC)))
def test_code_of_a_page_runs(page, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    text = page.read_text(encoding="utf-8")
    needed = re.match(r"\.\. requires: (.*)", text)
    for package in needed[1].split() if needed else []:
        pytest.importorskip(package)
    result = doctest.testfile(
        str(page),
        module_relative=False,
        optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS,
        encoding="utf-8",
    )
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    assert result.attempted and not result.failed


def reference():
    """Names that the pages of the API reference list, fully qualified."""
    module, names = None, set()
    for line in (DOC / "api.rst").read_text(encoding="utf-8").splitlines():
        if current := re.match(r"\.\. currentmodule:: (\S+)", line):
            module = current[1]
        elif described := re.match(r"\.\. automodule:: (\S+)", line):
            names.add(described[1])
        elif listed := re.match(r"\.\. data:: (\w+)|   (\w+)$", line):
            names.add(f"{module}.{listed[1] or listed[2]}")
    return names


def test_reference_has_every_public_name_and_no_other():
    public = {
        f"{module}.{name}"
        for module in PUBLIC_MODULES
        for name in importlib.import_module(module).__all__
    }
    assert reference() == public


@pytest.fixture
def site_checks(monkeypatch):
    monkeypatch.syspath_prepend(str(DOC / "_ext"))
    yield importlib.import_module("site_checks")
    del sys.modules["site_checks"]


@pytest.mark.parametrize(
    ("html", "fault"),
    [
        ('<a href="b.html#there">x</a> <a href="https://example.org/gone">x</a>', None),
        ('<a href="c.html">x</a>', "leads nowhere"),
        ('<a href="b.html#here">x</a>', "is no place of that page"),
        ('<a href="#here">x</a>', "is no place of that page"),
        ('<img src="a.png" alt="A line that rises">', None),
        ('<img src="a.png">', "alternative text None"),
        ('<img src="a.png" alt=" ">', "alternative text ' '"),
        ('<img src="a.png" alt="a.png">', "alternative text 'a.png'"),
        ('<img src="sphx_glr_plot_a_thumb.png" alt="">', None),
    ],
)
def test_faults_of_a_site_are_found(site_checks, tmp_path, html, fault):
    (tmp_path / "a.html").write_text(html)
    (tmp_path / "b.html").write_text('<h1 id="there">There</h1>')
    pages = {path: site_checks.Page(path) for path in tmp_path.resolve().glob("*.html")}
    found = site_checks.broken_links(pages) + site_checks.silent_images(pages)
    assert len(found) == (fault is not None)
    assert fault is None or fault in found[0]
