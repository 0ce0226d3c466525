# Build the documentation, the example gallery included, with
#
#     sphinx-build -W -j 2 doc doc/_build/html
#
# `-D plot_gallery=0` leaves the examples unrun, which is what takes the time. `-t linked` makes
# links of the names of other projects' classes, for which the network is needed; without it they
# are plain text.

import importlib.util
import sys
from pathlib import Path

import skdeq

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "skdeq"
author = "the skdeq developers"
copyright = "2026, the skdeq developers"
version = release = skdeq.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "myst_parser",
    "numpydoc",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    # Of this folder's _ext: parts of pages that skdeq computes, and checks of the finished site.
    "generated_parts",
    "site_checks",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "generated/parts", "benchmarks/*"]

# Quotes and ellipses, but no dashes out of the two hyphens of an option.
smartquotes_action = "qe"
autosummary_generate = True
autodoc_typehints = "none"  # numpydoc's sections say the types, in words and with shapes.
maximum_signature_line_length = 88
# The class template lists the members; numpydoc would list them a second time.
numpydoc_show_class_members = False

copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"

# Every reference must lead somewhere. Without `-t linked` those into other projects are excused.
nitpicky = True
_LINKED = {
    "python": "https://docs.python.org/3",
    "numpy": "https://numpy.org/doc/stable",
    "scipy": "https://docs.scipy.org/doc/scipy",
    "sklearn": "https://scikit-learn.org/stable",
    "torch": "https://docs.pytorch.org/docs/stable",
}
if tags.has("linked"):  # noqa: F821 (Sphinx puts it there)
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {name: (address, None) for name, address in _LINKED.items()}
else:
    nitpick_ignore_regex = [("py:.*", rf"({'|'.join(_LINKED)})\..*")]
# Base classes that are no part of the public interface, or of the standard library.
nitpick_ignore = [("py:class", "ABC"), ("py:class", "Protocol")]

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "doc_module": ("skdeq",),
    "reference_url": {"skdeq": None},
    "backreferences_dir": "generated/backreferences",
    "abort_on_example_error": True,
    "parallel": True,  # as many examples at once as `-j` says
    "show_memory": False,
    "download_all_examples": False,
}

html_theme = "pydata_sphinx_theme"
html_title = "skdeq"
# Formulas are set by a copy of MathJax that lies beside the pages, so that they read without the
# network. The package's own hook is left alone: it would keep the build from running in parallel.
_mathjax = importlib.util.find_spec("sphinx-mathjax-offline")
html_static_path = ["_static", str(Path(_mathjax.origin).parent / "static")]
mathjax_path = "mathjax/tex-chtml.js"
html_css_files = ["custom.css"]
html_show_sourcelink = False
# Pages without others beside them have the full width, and so have those with code in columns.
html_sidebars = {
    page: []
    for page in (
        "index",
        "installation",
        "getting_started",
        "coming_from/*",
        "benchmarks",
        "benchmark_report",
        "changelog",
        "contributing",
        "citing",
    )
}
html_theme_options = {
    "github_url": "https://github.com/skdeq/skdeq",
    "logo": {"text": "skdeq"},
    "header_links_before_dropdown": 5,
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
