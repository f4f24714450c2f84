# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""The training losses of the technical report (arXiv 2512.23808) that compare audio, real and decoded.

Every loss is a mean over the whole batch. Where a batch is spread over processes, each of them gets its share: the sum
over its own clips, divided by the number of terms of all clips. The shares of all processes add up to the loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..feature_extraction_mimo_audio_tokenizer import LOG_MEL_FLOOR, mel_filters
from ..kernels import kernels_take


# Of a discriminator, for each sub-discriminator: its layers' outputs, the last of which is the logits.
Features = list[list[torch.Tensor]]

# The report's sizes are for this rate; at others the windows keep their duration.
_REPORT_RATE = 24000


class MultiScaleMelLoss(nn.Module):
    """L1 distance of mel spectrograms, summed over several scales.

    Scale i has 2**i mel bins, a window of 15 * 2**(i - 1) samples and a hop of half a window, at 24 kHz. The
    spectrogram is the magnitude of a normalized STFT (divided by the window's L2 norm, so that scales weigh alike),
    with HTK triangles from 0 Hz to Nyquist, centred, with reflect padding at the clip's own ends.

    Args:
        sampling_rate: of the audio, in Hz.
        scales: the i above; 5, 6 and 7 in the report.
        log: compare natural logarithms of the spectrograms (floor 1e-7, or `log_floor`) instead of the spectrograms
            themselves. The report does not; it weighs quiet parts as much as loud ones.
        log_floor: what the logarithm is taken of at least.
    """

    def __init__(
        self,
        sampling_rate: int = _REPORT_RATE,
        scales: Sequence[int] = (5, 6, 7),
        log: bool = False,
        log_floor: float = LOG_MEL_FLOOR,
    ) -> None:
        super().__init__()
        if not scales or min(scales) < 2:
            raise ValueError(f"scales={list(scales)}; accepted: one or more integers from 2")
        self.sampling_rate = sampling_rate
        self.log = log
        self.log_floor = log_floor
        self.bins = [2**scale for scale in scales]
        self.hops = [round(15 * 2 ** (scale - 2) * sampling_rate / _REPORT_RATE) for scale in scales]

    @property
    def min_samples(self) -> int:
        """The shortest clip that reflect padding is defined for."""
        return max(self.hops) + 1

    def forward(
        self,
        predicted: torch.Tensor,
        target: torch.Tensor,
        lengths: Sequence[int] | None = None,
        batch_lengths: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """The loss, or this process's share of it.

        Args:
            predicted, target: padded waveforms (clips, samples); what stands past a clip's end is not read.
            lengths: samples of each clip; all of them by default.
            batch_lengths: samples of each clip of the whole batch, on all processes; `lengths` by default.

        Raises:
            ValueError: another shape, or a clip shorter than `min_samples`.
        """
        if predicted.ndim != 2 or predicted.shape != target.shape:
            raise ValueError(
                f"predicted and target have shapes {tuple(predicted.shape)} and {tuple(target.shape)}; "
                "accepted: (clips, samples), alike"
            )
        lengths = [predicted.shape[1]] * predicted.shape[0] if lengths is None else list(lengths)
        batch_lengths = lengths if batch_lengths is None else list(batch_lengths)
        if min(lengths) < self.min_samples or max(lengths) > predicted.shape[1]:
            raise ValueError(f"lengths={lengths}; accepted: {self.min_samples} to {predicted.shape[1]} samples a clip")
        signals = torch.cat([target, predicted]).float()
        loss = signals.new_zeros(())
        for bins, hop in zip(self.bins, self.hops, strict=True):
            reference, decoded = self._mel(signals, [*lengths, *lengths], bins, hop).chunk(2)
            frames = [1 + length // hop for length in lengths]
            difference = (decoded - reference).abs()
            if min(frames) != max(frames):
                ends = torch.tensor(frames).to(difference.device, non_blocking=True)
                inside = torch.arange(difference.shape[-1], device=difference.device) < ends[:, None, None]
                difference = torch.where(inside, difference, 0.0)
            loss = loss + difference.sum() / (bins * sum(1 + length // hop for length in batch_lengths))
        return loss

    def _mel(self, signals: torch.Tensor, lengths: list[int], bins: int, hop: int) -> torch.Tensor:
        """(clips, bins, frames); frames past a clip's own are of its reflection."""
        n_fft = 2 * hop
        longest = max(lengths)
        position = torch.arange(-hop, longest + hop, device=signals.device)
        ends = torch.tensor(lengths).to(signals.device, non_blocking=True)[:, None] - 1
        reflected = ends - (ends - position.abs()).abs()  # mirrored at the first sample, then at the last
        padded = signals.gather(1, reflected.clamp(min=0))
        window = torch.hann_window(n_fft, dtype=torch.float32, device=signals.device)
        spectrum = torch.stft(padded, n_fft, hop, window=window, center=False, return_complex=True)
        magnitude = spectrum.abs() / window.square().sum().sqrt()
        filters = mel_filters(self.sampling_rate, n_fft, bins, 0.0, self.sampling_rate / 2, signals.device)
        mel = filters @ magnitude
        return mel.clamp(min=self.log_floor).log() if self.log else mel


def discriminator_loss(real: Features, fake: Features) -> torch.Tensor:
    """Hinge loss of the discriminator, averaged over the sub-discriminators."""
    losses = [
        F.relu(1 - real_layers[-1].float()).mean() + F.relu(1 + fake_layers[-1].float()).mean()
        for real_layers, fake_layers in zip(real, fake, strict=True)
    ]
    return torch.stack(losses).mean()


def adversarial_loss(fake: Features) -> torch.Tensor:
    """Hinge loss of the generator, averaged over the sub-discriminators."""
    return torch.stack([F.relu(1 - layers[-1].float()).mean() for layers in fake]).mean()


def feature_matching_loss(real: Features, fake: Features) -> torch.Tensor:
    """L1 distance of the hidden layers' outputs, averaged over each sub-discriminator's layers, then over those.

    The logits do not count, and no gradient reaches `real`.
    """
    losses = [
        torch.stack(
            [
                _mean_distance(fake_layer, real_layer.detach())
                for real_layer, fake_layer in zip(real_layers[:-1], fake_layers[:-1], strict=True)
            ]
        ).mean()
        for real_layers, fake_layers in zip(real, fake, strict=True)
    ]
    return torch.stack(losses).mean()


def _mean_distance(fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference, added up in float32. Layers are large: nothing of their size is made in float32."""
    if kernels_take(fake) and _are_maps(fake, real):
        from .discriminator_kernels import distance  # which imports Triton

        return distance(fake, real) / fake.numel()
    difference = (fake - real).abs()
    return difference.sum(dtype=torch.promote_types(difference.dtype, torch.float32)) / difference.numel()


def _are_maps(*layers: torch.Tensor) -> bool:
    """Of one 4D shape, and rows that lie at equal distances: as the discriminators make them, cropped."""
    return all(
        layer.ndim == 4
        and layer.shape == layers[0].shape
        and layer.stride(3) == 1
        and layer.stride(2) == layer.shape[3]
        and layer.stride(0) == layer.shape[1] * layer.stride(1)
        for layer in layers
    )
