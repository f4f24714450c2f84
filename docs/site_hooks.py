# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""What the site has beyond the pages of this folder: the repository's own pages, notebooks, and the commands' help.

A page is written once, where a reader of the repository looks for it; links between pages are relative to that place.
Here they become links between pages of the site, or to copies of other files of the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from mimo_audio_hf.cli import make_parser


ROOT = Path(__file__).parent.parent

# Of the repository to the site; those that do not exist are left out.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "recipes/tiny/README.md": "recipes/tiny.md",
    "recipes/tiny/DATA.md": "recipes/tiny-data.md",
    "src/mimo_audio_hf/tiny/README.md": "recipes/tiny-card.md",
    "hub_card/space/README.md": "recipes/space.md",
}
# The order of the navigation; pages of the section's folder that are not named follow by name.
GUIDES = ("backends.md", "speed.md", "scale.md", "streaming.md", "training.md", "migrate.md", "comparison.md")
PROJECT = ("architecture.md", "contributing.md", "security.md", "changelog.md")
API = (
    "model",
    "inference",
    "streaming",
    "datasets",
    "language_model",
    "training",
    "evaluation",
    "compat",
    "hub",
    "demo",
)
COMMANDS = "api/commands.md"
RECIPES = {
    "recipes/space.md": "A Space",
    "recipes/tiny-card.md": "The tiny model",
    "recipes/tiny.md": "How it was trained",
    "recipes/tiny-data.md": "And on what",
}

_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    docs = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    pages = _pages()
    there = docs | {*pages.values()}

    def chosen(names: tuple[str, ...], others: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
        return [name for name in names if name in there] + sorted(others - {*names})

    config.nav = [
        {"Home": "index.md"},
        {"Guides": chosen(GUIDES, {name for name in docs if "/" not in name} - {*PROJECT})},
        {"Notebooks": sorted(name for name in there if name.startswith("notebooks/"))},
        {"Reference": [COMMANDS, *chosen(tuple(f"api/{name}.md" for name in API), {n for n in docs if "api/" in n})]},
        {"Recipes": [{RECIPES[name]: name} for name in RECIPES if name in there]},
        {"Project": chosen(PROJECT)},
    ]
    config.watch += [str(ROOT / source) for source in pages]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = _pages()
    for source, target in pages.items():
        files.append(File.generated(config, target, content=_text(source)))
    files.append(File.generated(config, COMMANDS, content=_commands()))
    docs = {f"docs/{file.src_uri}" for file in files.documentation_pages() if file.generated_by is None}
    for source in (*pages, *docs):
        for link in _LINK.findall(_text(source)):
            linked = _linked(source, link[1])
            if linked is None or linked.startswith("docs/") or (linked in pages and linked != source):
                continue
            path = ROOT / linked
            if path.is_file() and files.get_file_from_path(_copy_of(linked)) is None:
                files.append(File.generated(config, _copy_of(linked), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    pages = _pages()
    sources = {target: source for source, target in pages.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def in_site(match: re.Match[str]) -> str:
        linked = _linked(source, match[2])
        if linked is None or (linked.startswith("docs/") and source.startswith("docs/")):
            return match[0]
        if linked in pages and linked != source:  # what a notebook links to by its own name is the notebook
            target = pages[linked]
        else:
            target = linked.removeprefix("docs/") if linked.startswith("docs/") else _copy_of(linked)
        anchor = match[2][match[2].find("#") :] if "#" in match[2] else ""
        return match[1] + posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".") + anchor + match[3]

    return _LINK.sub(in_site, markdown)


def _pages() -> dict[str, str]:
    notebooks = {
        f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")
    }
    return {source: target for source, target in {**PAGES, **notebooks}.items() if (ROOT / source).is_file()}


def _linked(source: str, link: str) -> str | None:
    """The file of the repository that a link of a page leads to, if it leads to any."""
    path = link.partition("#")[0]
    if not path or ":" in path:
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), path))


def _copy_of(linked: str) -> str:
    # What has no extension would be taken for a folder by servers.
    return f"files/{linked}" if os.path.splitext(linked)[1] else f"files/{linked}.txt"


def _text(source: str) -> str:
    text = (ROOT / source).read_text(encoding="utf-8")
    if source.endswith(".ipynb"):
        return _notebook(source, text)
    return _FRONT_MATTER.sub("", text)


def _notebook(source: str, text: str) -> str:
    """A notebook's text and code. Its outputs are not stored."""
    parts = []
    for cell in json.loads(text)["cells"]:
        content = "".join(cell["source"])
        parts.append(content if cell["cell_type"] == "markdown" else f"```python\n{content}\n```")
        if len(parts) == 1:
            parts.append(f"This page is [a notebook]({Path(source).name}) without what it shows when it is run.")
    return "\n\n".join(parts)


def _commands() -> str:
    parser = make_parser()
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parts = ["# Commands", "What `mimo-audio COMMAND --help` prints."]
    for name, command in subparsers.choices.items():
        parts += [f"## {name}", f"```text\n{command.format_help()}```"]
    return "\n\n".join(parts)
