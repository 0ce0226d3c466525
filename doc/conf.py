# Build the documentation, the example gallery included, with
#
#     sphinx-build -W doc doc/_build/html
#
# It links into the documentation of the packages below, so it needs the network.

from pathlib import Path

import skdeq
from skdeq._architecture import correspondence_table

project = "skdeq"
author = "the skdeq developers"
copyright = "2026, the skdeq developers"
version = release = skdeq.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "numpydoc",
    "sphinx_gallery.gen_gallery",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_architecture.rst"]

autosummary_generate = True
# The class template lists the members; numpydoc would list them a second time.
numpydoc_show_class_members = False

intersphinx_mapping = {
    "python": ("https://docs.python.org/3", None),
    "numpy": ("https://numpy.org/doc/stable", None),
    "scipy": ("https://docs.scipy.org/doc/scipy", None),
    "sklearn": ("https://scikit-learn.org/stable", None),
    "torch": ("https://docs.pytorch.org/docs/stable", None),
}

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "doc_module": ("skdeq",),
    "reference_url": {"skdeq": None},
    "backreferences_dir": "generated/backreferences",
    "abort_on_example_error": True,
}

# The table of the guide comes from the families themselves.
Path(__file__).with_name("_architecture.rst").write_text(correspondence_table())

html_theme = "pydata_sphinx_theme"
html_title = "skdeq"
html_theme_options = {"github_url": "https://github.com/skdeq/skdeq"}
