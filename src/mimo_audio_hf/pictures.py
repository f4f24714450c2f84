# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures of clips: waveforms, log-mel spectrograms and codes. They need matplotlib (extra `demo`, `eval`
or `train`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .codes import AudioCodes
from .feature_extraction_mimo_audio_tokenizer import MiMoAudioTokenizerFeatureExtractor
from .files import replacing


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of log-mels: what is shown below a clip's loudest place, in nepers (-80 dB).
_SHOWN_RANGE = 9.2

# The least peak that a waveform's scale is chosen for.
_LEAST_PEAK = 1e-4


def reconstruction_figure(
    recording: torch.Tensor,
    decoded: torch.Tensor,
    extractor: MiMoAudioTokenizerFeatureExtractor,
    codes: AudioCodes | None = None,
    num_quantizers: int | None = None,
) -> Figure:
    """Waveforms and log-mels of a recording and of what was decoded, (samples,) both, on the same scales.

    The scales are the recording's; where that is silent, those of what was decoded.

    Args:
        recording, decoded: waveforms at the extractor's sampling rate.
        extractor: makes the log-mels.
        codes: of the recording, to be shown below.
        num_quantizers: how many of their codebooks were decoded; the others are shown faded. All by default.
    """
    from matplotlib.figure import Figure

    seconds = len(recording) / extractor.sampling_rate
    mels = [extractor.log_mel_spectrogram(waveform.cpu()) for waveform in (recording, decoded)]
    peaks = [float(waveform.abs().max()) for waveform in (recording, decoded)]
    measure = 1 if peaks[0] < _LEAST_PEAK else 0
    loudest = float(mels[measure].max())
    peak = max(_LEAST_PEAK, peaks[measure])
    rows: list[Any] = [["recording", "decoded"], ["recording's mel", "decoded mel"], ["codes", "codes"]]
    rows = rows[: 2 if codes is None else 3]
    figure = Figure(figsize=(10, 5 if codes is None else 6.5), layout="constrained")
    panels = figure.subplot_mosaic(rows)
    times = torch.arange(len(recording)) / extractor.sampling_rate
    for column, waveform in enumerate((recording, decoded)):
        above, below = (panels[row[column]] for row in rows[:2])
        above.plot(times.numpy(), waveform.cpu().numpy(), linewidth=0.3)
        above.set(title=rows[0][column], xlim=(0, seconds), ylim=(-1.1 * peak, 1.1 * peak))
        below.imshow(
            mels[column].numpy(),
            origin="lower",
            aspect="auto",
            extent=(0, seconds, 0, len(mels[column])),
            vmin=loudest - _SHOWN_RANGE,
            vmax=loudest,
        )
        below.set(xlabel="s", ylabel="" if column else "mel bin")
        above.tick_params(labelbottom=False, labelleft=not column)
        below.tick_params(labelleft=not column)
    if codes is not None:
        _draw_codes(panels["codes"], codes, num_quantizers)
    return figure


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _draw_codes(panel: Axes, codes: AudioCodes, num_quantizers: int | None) -> None:
    """A colour for each code, from its codebook's first entry to its last: like colours do not mean like entries."""
    frames, books = codes.codes.shape
    decoded = books if num_quantizers is None else num_quantizers
    last = torch.tensor(codes.codebook_sizes) - 1
    shares = (codes.codes.cpu() / last.clamp(min=1)).t()
    seconds = frames * codes.samples_per_frame / codes.sampling_rate
    opacity = torch.where(torch.arange(books) < decoded, 1.0, 0.15)[:, None].expand(books, frames)
    panel.imshow(
        shares.numpy(),
        aspect="auto",
        interpolation="nearest",
        extent=(0, seconds, books + 0.5, 0.5),
        vmin=0,
        vmax=1,
        alpha=opacity.numpy(),
    )
    panel.axhline(decoded + 0.5, color="black", linewidth=0.8)
    panel.set(
        title=f"codes: {frames} frames, {decoded} of {books} codebooks decoded",
        xlabel="s",
        ylabel="codebook",
        yticks=sorted({1, *range(5, books + 1, 5), books}),
        ylim=(books + 0.5, 0.5),
    )
