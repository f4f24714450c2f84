# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Draws docs/architecture.svg from the imports in the source: `python docs/architecture.py`.

A test holds the picture to the source, and the source to what the picture is to show: imports that go one way.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "mimo_audio_hf"
PICTURE = Path(__file__).with_name("architecture.svg")

# Every module has its place in a box. A name that ends in a dot stands for a subpackage.
BOXES: dict[str, tuple[str, ...]] = {
    "Model": (
        "configuration_mimo_audio_tokenizer",
        "feature_extraction_mimo_audio_tokenizer",
        "modeling_mimo_audio_tokenizer",
    ),
    "Files and processes": ("files", "audio", "workers"),
    "Speed": (
        "input_kernels",
        "attention_kernels",
        "product_kernels",
        "vocoder_kernels",
        "fused",
        "kernels",
        "quantization",
        "graphs",
        "optimization",
    ),
    "Code files": ("codes",),
    "Pictures": ("pictures",),
    "Inference": ("inference", "caching", "streaming."),
    "Checkpoints": ("checkpoints",),
    "Hub": ("hub",),
    "Datasets": ("dataset",),
    "Language models": ("language_model",),
    "Upstream's interface": ("compat",),
    "Jobs": ("sources", "shards", "jobs", "offline", "ray"),
    "Evaluation": ("metrics", "evaluation", "evaluation_clips"),
    "Training": ("training.",),
    "Demo": ("demo",),
    "Command line": ("commands.", "cli"),
}
# The package itself, which offers names of many modules, and what imports nothing.
_NOT_SHOWN = ("", "version")

# In the picture's units, rounded up.
_CHARACTER_WIDTH = 8

Graph = dict[str, set[str]]


def imports_of_modules(package: Path = PACKAGE) -> Graph:
    """What each module of the package imports of it, anywhere in its source; names are relative to the package."""
    paths = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: Graph = {}
    for module, path in paths.items():
        parents = path.relative_to(package).parts[:-1]
        graph[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            source = [*parents[: len(parents) + 1 - node.level], *(node.module.split(".") if node.module else ())]
            for alias in node.names:
                name = ".".join([*source, alias.name])
                graph[module].add(name if name in paths else ".".join(source))
        graph[module].discard(module)
    return graph


def imports_of_boxes(modules: Mapping[str, Iterable[str]]) -> Graph:
    """What each box imports of others.

    Raises:
        ValueError: a module has no box.
    """
    graph: Graph = {}
    for module, imported in modules.items():
        if module not in _NOT_SHOWN:
            box = _box_of(module)
            others = {_box_of(other) for other in imported if other not in _NOT_SHOWN}
            graph.setdefault(box, set()).update(others - {box})
    return graph


def layers_of(graph: Graph) -> list[list[str]]:
    """The boxes from the bottom up, each in the lowest layer that is above all that it imports.

    Raises:
        ValueError: imports go round in a circle.
    """
    layers: list[list[str]] = []
    placed: set[str] = set()
    while len(placed) < len(graph):
        layer = [box for box in BOXES if box in graph and box not in placed and graph[box] <= placed]
        if not layer:
            raise ValueError(f"imports go round in a circle among {', '.join(sorted(graph.keys() - placed))}")
        layers.append(layer)
        placed.update(layer)
    return layers


def without_detours(graph: Graph) -> Graph:
    """Only those imports of each box that do not follow from those of the boxes that it imports."""

    def below(box: str) -> set[str]:
        return graph[box].union(*(below(other) for other in graph[box]))

    return {box: others - set().union(*(below(other) for other in others)) for box, others in graph.items()}


def draw(modules: Graph) -> str:
    """The picture, as SVG."""
    graph = imports_of_boxes(modules)
    layers = layers_of(graph)
    reduced = without_detours(graph)
    contents: dict[str, list[str]] = {box: [] for box in graph}
    for module in modules:
        if module not in _NOT_SHOWN:
            contents[_box_of(module)].append(module)

    width, margin, gap, line_height = 960, 40, 16, 17
    body: list[str] = []
    y = gap
    for layer in reversed(layers):
        box_width = (width - margin - gap * len(layer)) / len(layer)
        length = int(box_width - 24) // _CHARACTER_WIDTH
        lines = {box: _wrapped(_names_in(box, contents[box]), length) for box in layer}
        uses = {box: _wrapped(f"uses {', '.join(_in_order(reduced[box]))}", length) for box in layer if reduced[box]}
        height = max(len(lines[box]) + len(uses.get(box, [])) for box in layer) * line_height + 41
        for column, box in enumerate(layer):
            x = margin + column * (box_width + gap)
            body.append(f'<rect x="{x:.0f}" y="{y}" width="{box_width:.0f}" height="{height}" rx="6" class="box"/>')
            body.append(f'<text x="{x + 12:.0f}" y="{y + 22}" class="title">{escape(box)}</text>')
            for number, line in enumerate(lines[box]):
                text_y = y + 42 + number * line_height
                body.append(f'<text x="{x + 12:.0f}" y="{text_y}" class="modules">{escape(line)}</text>')
            for number, line in enumerate(reversed(uses.get(box, []))):
                text_y = y + height - 10 - number * line_height
                body.append(f'<text x="{x + 12:.0f}" y="{text_y}" class="uses">{escape(line)}</text>')
        y += height + gap
    arrow = f"M 20 {gap} V {y - gap - 8} m -6 -8 l 6 10 l 6 -10"
    style = (
        "text { font-family: sans-serif; font-size: 13px; fill: #1f2937 } "
        ".title { font-weight: bold; font-size: 15px } "
        ".modules { font-family: monospace; font-size: 12px } "
        ".uses { fill: #4f46e5 } "
        ".box { fill: #eef2ff; stroke: #818cf8 } "
        ".arrow { fill: none; stroke: #6b7280; stroke-width: 2 }"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" role="img">',
            "<title>The modules of mimo_audio_hf; imports go down</title>",
            f"<style>{style}</style>",
            f'<rect width="{width}" height="{y}" fill="white"/>',
            f'<path d="{arrow}" class="arrow"/>',
            *body,
            "</svg>\n",
        ]
    )


def _box_of(module: str) -> str:
    for box, names in BOXES.items():
        for name in names:
            if module == name or (name.endswith(".") and f"{module}.".startswith(name)):
                return box
    raise ValueError(f"{module} has no place in the picture; accepted: a box for it in BOXES of docs/architecture.py")


def _in_order(boxes: set[str]) -> list[str]:
    return [name for name in BOXES if name in boxes]


def _names_in(box: str, modules: Iterable[str]) -> str:
    """A box's modules, in its order; a subpackage's without its name."""
    subpackages = [name for name in BOXES[box] if name.endswith(".")]
    found = sorted(modules, key=lambda module: (BOXES[box].index(module) if module in BOXES[box] else -1, module))
    names = [name for name in found if f"{name}." not in subpackages]
    for subpackage in subpackages:
        inside = [name.removeprefix(subpackage) for name in names if name.startswith(subpackage)]
        names = [f"{subpackage}{{{', '.join(inside)}}}", *(name for name in names if not name.startswith(subpackage))]
    return ", ".join(names)


def _wrapped(text: str, length: int) -> list[str]:
    return textwrap.wrap(text, length, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    try:
        PICTURE.write_text(draw(imports_of_modules()), encoding="utf-8")
    except ValueError as error:
        sys.exit(str(error))
    print(PICTURE)
