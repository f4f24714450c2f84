# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""The picture of a training run: how losses and metrics went. It needs matplotlib (extra `train`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def training_figure(log: Iterable[Mapping[str, float]]) -> Figure:
    """Every loss and every validation metric over the steps, from the entries of a run's log."""
    from matplotlib.figure import Figure

    curves: dict[str, dict[float, float]] = {}
    for entry in log:
        for name, value in entry.items():
            if name.endswith("_loss") or (name.startswith("validation/") and name.count("/") == 1):
                curves.setdefault(name, {})[entry["step"]] = value
    names = list(dict.fromkeys(name.split("/")[1] for name in curves))
    columns = max(1, min(4, len(names)))
    rows = max(1, -(-len(names) // columns))
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, name in zip(panels, names, strict=False):
        for part in ("train", "validation"):
            curve = curves.get(f"{part}/{name}")
            if curve:
                panel.plot(list(curve), list(curve.values()), label=part, marker="o" if part == "validation" else None)
        panel.set(title=name, xlabel="step")
        panel.grid(alpha=0.3)
        panel.legend()
    for panel in panels[len(names) :]:
        panel.remove()
    return figure
