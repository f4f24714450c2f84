# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures of a training run: what became of a clip, and how the losses went. They need matplotlib (extra `train`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..feature_extraction_mimo_audio_tokenizer import MiMoAudioTokenizerFeatureExtractor
from ..files import replacing
from .data import SILENCE


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of log-mels: what is shown below a clip's loudest place, in nepers (-80 dB).
_SHOWN_RANGE = 9.2


def reconstruction_figure(
    recording: torch.Tensor, decoded: torch.Tensor, extractor: MiMoAudioTokenizerFeatureExtractor
) -> Figure:
    """Waveforms and log-mels of a recording and of what was decoded, (samples,) both, on the same scales.

    The scales are the recording's; where that is silent, those of what was decoded.
    """
    from matplotlib.figure import Figure

    seconds = len(recording) / extractor.sampling_rate
    mels = [extractor.log_mel_spectrogram(waveform.cpu()) for waveform in (recording, decoded)]
    peaks = [float(waveform.abs().max()) for waveform in (recording, decoded)]
    measure = 1 if peaks[0] < SILENCE else 0
    loudest = float(mels[measure].max())
    peak = max(SILENCE, peaks[measure])
    figure = Figure(figsize=(10, 5), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    times = torch.arange(len(recording)) / extractor.sampling_rate
    for column, (title, waveform) in enumerate((("recording", recording), ("decoded", decoded))):
        panels[0, column].plot(times.numpy(), waveform.cpu().numpy(), linewidth=0.3)
        panels[0, column].set(title=title, ylim=(-1.1 * peak, 1.1 * peak))
        panels[1, column].imshow(
            mels[column].numpy(),
            origin="lower",
            aspect="auto",
            extent=(0, seconds, 0, len(mels[column])),
            vmin=loudest - _SHOWN_RANGE,
            vmax=loudest,
        )
        panels[1, column].set(xlabel="s")
    panels[1, 0].set(ylabel="mel bin")
    return figure


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


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
