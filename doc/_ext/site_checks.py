"""Checks of the finished site, which fail the build.

Sphinx checks its own references. Here every link from page to page is followed in the HTML, raw
ones and those of the gallery included, and every image must say in words what it shows.
"""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Alternative text that says nothing: the name of a file.
_FILE_ENDINGS = (".png", ".svg", ".jpg", ".gif")


class Page(HTMLParser):
    """The links, anchors and images of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.anchors, self.images = [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        """Note what matters of a tag."""
        attributes = dict(attributes)
        self.anchors.update(attributes[name] for name in ("id", "name") if attributes.get(name))
        if tag in ("a", "link") and attributes.get("href"):
            self.links.append(attributes["href"])
        elif tag == "img":
            self.images.append((attributes.get("src", ""), attributes.get("alt")))


def broken_links(pages: dict[Path, Page]) -> list[str]:
    """Links within the site that lead to no file, or to no place in it."""
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link == "#":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                broken.append(f"{path.name}: {link} leads nowhere")
            elif parts.fragment and target in pages:
                if unquote(parts.fragment) not in pages[target].anchors:
                    broken.append(f"{path.name}: {link} is no place of that page")
    return broken


def silent_images(pages: dict[Path, Page]) -> list[str]:
    """Images whose alternative text is missing, or is the name of a file.

    A thumbnail of the gallery stands within a link that has the example's title, and is rightly
    passed over by a screen reader: its text must be there and empty.
    """
    silent = []
    for path, page in pages.items():
        for source, text in page.images:
            thumbnail = Path(source).name.startswith("sphx_glr_") and source.endswith("_thumb.png")
            good = text is not None if thumbnail else bool(text and text.strip())
            if not good or (text or "").strip().lower().endswith(_FILE_ENDINGS):
                silent.append(f"{path.name}: {source} has the alternative text {text!r}")
    return silent


def check_site(app, exception) -> None:
    """Check the pages of a build that succeeded."""
    if exception is not None or app.builder.format != "html":
        return
    root = Path(app.outdir).resolve()
    pages = {
        path: Page(path)
        for path in root.rglob("*.html")
        if not path.relative_to(root).parts[0].startswith("_")
    }
    problems = {*broken_links(pages), *silent_images(pages)}
    if problems:
        # The checks themselves are tested where there is no Sphinx.
        from sphinx.errors import SphinxError

        raise SphinxError("\n".join(["the finished site has faults:", *sorted(problems)]))


def setup(app):
    """Connect to Sphinx."""
    app.connect("build-finished", check_site, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
