"""Every example is a gallery page: a title, prose, and a titled figure. The gallery runs them."""

import ast
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("plot_*.py"))
# What sets the text that stands for a figure where it cannot be seen.
TITLES = {"set_title", "suptitle"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_a_gallery_page(path):
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=path.name)
    over, title, under = ast.get_docstring(tree).splitlines()[:3]
    assert set(over) == {"="} and over == under, "the page must start with a title"
    assert title.strip() and len(title) <= len(over), "the title's lines must be as long as it"

    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    methods = [call.attr for call in calls if isinstance(call, ast.Attribute)]
    assert methods.count("show") >= 1, "the page must show a figure"
    assert TITLES & set(methods), "a figure without a title has no alternative text"


def test_there_are_examples():
    assert len(EXAMPLES) >= 8
