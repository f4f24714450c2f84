"""The documentation's site and the picture of the architecture."""

from __future__ import annotations

import os
import posixpath
import runpy
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse
from xml.etree import ElementTree

import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

import mimo_audio_hf


ROOT = Path(__file__).parent.parent


class Document(HTMLParser):
    """The anchors of a page, what it links to, and what a browser fetches to show it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attributes if value is not None}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload", "preconnect", "dns-prefetch"):
            self.fetched.append(values["href"])
        if tag in ("script", "img", "iframe", "audio", "video") and "src" in values:
            self.fetched.append(values["src"])


@dataclass(frozen=True)
class Site:
    """A folder, and its pages by their path in it."""

    folder: Path
    pages: dict[str, Document]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    """Built, without a warning."""
    folder = tmp_path_factory.mktemp("site")
    # The theme advertises its successor.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    environment |= {"PYTHONWARNINGS": "default::DeprecationWarning:mkdocs.structure.files"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr.lower()
    return Site(folder, {path.relative_to(folder).as_posix(): Document(path) for path in folder.rglob("*.html")})


def test_no_dead_links(site):
    found = 0
    for page, document in site.pages.items():
        if page == "404.html":  # served from any address
            continue
        for link in (*document.links, *document.fetched):
            address = urlparse(link)
            if address.scheme or address.netloc:
                continue
            path = unquote(address.path)
            target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
            assert (site.folder / target).exists(), f"{page}: {link}"
            if address.fragment and target in site.pages and not address.fragment.startswith("__"):  # the theme's own
                assert unquote(address.fragment) in site.pages[target].anchors, f"{page}: {link}"
            found += 1
    assert found > 1000


def test_a_notebooks_page_has_the_notebook(site):
    notebooks = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    for name in notebooks:
        page = f"notebooks/{name.removesuffix('.ipynb')}.html"
        assert f"../files/notebooks/{name}" in site.pages[page].links
        copy = site.folder / "files" / "notebooks" / name
        assert copy.read_bytes() == (ROOT / "notebooks" / name).read_bytes()
    assert notebooks


def test_nothing_is_fetched_from_elsewhere(site):
    for page, document in site.pages.items():
        assert not [link for link in document.fetched if urlparse(link).netloc], page


def test_the_reference_has_all_public_names(site):
    anchors = {anchor for name, page in site.pages.items() if name.startswith("api/") for anchor in page.anchors}
    documented = {anchor.rpartition(".")[2] for anchor in anchors}
    assert {*mimo_audio_hf.__all__} - {"__version__"} <= documented


def test_all_pages_are_in_the_navigation(site):
    """Those of the repository, too."""
    linked = {posixpath.normpath(link) for link in site.pages["index.html"].links}
    assert site.pages.keys() - {"404.html"} <= linked
    assert {"changelog.html", "recipes/tiny.html", "notebooks/quick_start.html", "api/commands.html"} <= linked


# --- The picture of the architecture ---


@pytest.fixture(scope="module")
def architecture() -> dict:
    return runpy.run_path(str(ROOT / "docs" / "architecture.py"))


def test_the_picture_is_what_is_imported(architecture):
    """And imports go one way: there is no picture otherwise."""
    picture = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    modules = architecture["imports_of_modules"]()
    assert architecture["draw"](modules) == picture, "run `python docs/architecture.py` to draw it anew"
    assert modules["codes"] == {"configuration_mimo_audio_tokenizer", "files"}
    assert "commands.train" in modules["cli"] and "metrics" in modules["training.trainer"]


@pytest.mark.parametrize("not_imported", [set(), {"checkpoints"}], ids=["as it is", "four boxes beside each other"])
def test_every_line_of_the_picture_is_inside_its_box(architecture, not_imported):
    style = {"title": {"size": 15, "weight": "bold"}, "modules": {"size": 12, "family": "monospace"}}
    modules = architecture["imports_of_modules"]()
    picture = ElementTree.fromstring(architecture["draw"](modules | {"hub": modules["hub"] - not_imported}))
    boxes = [
        {name: float(each.attrib[name]) for name in ("x", "y", "width", "height")}
        for each in picture.iter("{http://www.w3.org/2000/svg}rect")
        if each.get("class") == "box"
    ]
    lines = list(picture.iter("{http://www.w3.org/2000/svg}text"))
    assert len(lines) > 3 * len(boxes)
    places = set()
    for line in lines:
        assert line.text
        x, y = float(line.attrib["x"]), float(line.attrib["y"])
        (box,) = (b for b in boxes if b["x"] <= x < b["x"] + b["width"] and b["y"] <= y < b["y"] + b["height"])
        # Of a font that is wider than most.
        font = FontProperties(**{"family": "sans-serif", "size": 13} | style.get(line.attrib["class"], {}))
        assert x + TextPath((0, 0), line.text, prop=font).get_extents().width < box["x"] + box["width"], line.text
        places.add((x, y))
    assert len(places) == len(lines)


def test_the_model_files_stand_alone(architecture):
    modules = architecture["imports_of_modules"]()
    model = {name for name in modules if name.endswith("_mimo_audio_tokenizer")}
    assert len(model) == 3
    assert all(modules[name] <= model for name in model)


def test_imports_in_a_circle_are_found(architecture):
    modules = architecture["imports_of_modules"]()
    with pytest.raises(ValueError, match="circle among .*Model"):
        architecture["draw"](modules | {"modeling_mimo_audio_tokenizer": {"training.trainer"}})
    with pytest.raises(ValueError, match="^new has no place in the picture"):
        architecture["draw"](modules | {"new": set()})
