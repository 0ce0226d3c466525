"""Parts of pages that are made when the documentation is built, in ``generated/parts``.

The table from statistics to architecture, the figure of the landing page, and BibTeX entries from
CITATION.cff.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import yaml
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression

from skdeq import ExpFamilyDEQ
from skdeq._architecture import correspondence_table

PANEL = """
   .. grid-item::

      .. image:: /generated/parts/{file}
         :alt: {alt}
         :class: dark-light

      **{title}** |br| {caption}
"""

GRID = """.. |br| raw:: html

   <br>

.. grid:: 2 2 4 4
   :gutter: 2
   :class-container: landing-figure
"""


def spiral_counts():
    """Counts of 1,500 rows and 50 features whose log means are linear in a spiral."""
    rng = np.random.default_rng(1)
    angle = rng.uniform(0.2, 1, 1500) * 3 * np.pi
    spiral = np.column_stack([angle * np.cos(angle), angle * np.sin(angle)])
    spiral += 0.25 * rng.normal(size=spiral.shape)
    spiral /= spiral.std()
    loadings = rng.normal(size=(2, 50))
    intercept = 0.7 * rng.normal(size=50) - 0.5
    return spiral, angle, rng.poisson(np.exp(spiral @ loadings + intercept))


def draw(points, colour, path):
    """Scatter plot on a transparent ground, in colours that show on white and on black."""
    figure, ax = plt.subplots(figsize=(3, 3), layout="constrained")
    ax.scatter(*points.T, c=colour, cmap="plasma", vmin=-2, vmax=10.5, s=7, linewidths=0)
    ax.set_axis_off()
    ax.set_aspect("equal", adjustable="datalim")
    figure.savefig(path, transparent=True, dpi=160)
    plt.close(figure)


def landing_figure(folder: Path) -> str:
    """Draw the figure of the landing page and return the reST that shows it."""
    spiral, angle, counts = spiral_counts()
    maps = {
        "PCA": ("``PCA(2)``", PCA(2).fit_transform(counts)),
        "PCA of log(1 + x)": ("after ``log1p``", PCA(2).fit_transform(np.log1p(counts))),
        "ExpFamilyDEQ": (
            '``family="poisson"``',
            ExpFamilyDEQ(2, family="poisson", random_state=0).fit_transform(counts),
        ),
    }
    draw(spiral, angle, folder / "landing_0.png")
    panels = [
        PANEL.format(
            file="landing_0.png",
            alt="Two latent variables of 1,500 rows, which lie on a spiral.",
            title="What is behind the rows",
            caption="50 counts each",
        )
    ]
    for number, (name, (code, scores)) in enumerate(maps.items(), start=1):
        # Turned and scaled onto the spiral: no method knows its orientation.
        regression = LinearRegression().fit(scores, spiral)
        r2 = regression.score(scores, spiral)
        file = f"landing_{number}.png"
        draw(regression.predict(scores), angle, folder / file)
        alt = f"The spiral as {name} recovers it from the counts; R2 {r2:.2f}."
        panels.append(PANEL.format(file=file, alt=alt, title=name, caption=f"{code}, R² {r2:.2f}"))
    return GRID + "".join(panels)


def bibtex(citation: dict) -> str:
    """Return the entry of a work of CITATION.cff."""
    kinds = {"software": "software", "conference-paper": "inproceedings", "article": "article"}
    people = [
        author.get("name") or f"{author['family-names']}, {author['given-names']}"
        for author in citation["authors"]
    ]
    journal = citation.get("identifiers", [{}])[0].get("value")
    pages = f"{citation['start']}--{citation['end']}" if "start" in citation else None
    fields = {
        "title": f"{{{citation['title']}}}",
        # In two pairs of braces a name is not taken apart.
        "author": " and ".join(f"{{{name}}}" if "," not in name else name for name in people),
        "booktitle": citation.get("collection-title", "").strip(),
        "journal": journal if kinds[citation["type"]] == "article" else None,
        "volume": citation.get("volume"),
        "pages": pages,
        "year": citation.get("year"),
        "url": citation.get("url") or citation.get("repository-code"),
    }
    first = citation["authors"][0].get("family-names", "skdeq").lower()
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    entry = [f"@{kinds[citation['type']]}{{{first}{citation.get('year', '')},", *lines, "}"]
    return "\n".join(entry)


def citations(path: Path) -> str:
    """Return the BibTeX entries of the software and the papers, as reST."""
    software = yaml.safe_load(path.read_text(encoding="utf-8"))
    parts = []
    for citation in [software, *software["references"]]:
        entry = bibtex(citation).replace("\n", "\n   ")
        parts.append(f".. code-block:: bibtex\n\n   {entry}\n")
    return "\n".join(parts)


def write_parts(app) -> None:
    """Write everything that pages include."""
    folder = Path(app.srcdir) / "generated" / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "architecture.rst": correspondence_table(),
        "landing_figure.rst": landing_figure(folder),
        "citation.rst": citations(Path(app.srcdir).parent / "CITATION.cff"),
    }
    for name, text in parts.items():
        path = folder / name
        # An unchanged file is left alone, or Sphinx would read its page again.
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def setup(app):
    """Connect to Sphinx."""
    app.connect("builder-inited", write_parts, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
