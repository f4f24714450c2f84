# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""The discriminators of the technical report's second stage (arXiv 2512.23808), with spectral norm on every layer.

They look at segments of one length, so there is no padding of clips in them, and return the outputs of all their
layers: the feature-matching loss compares these, and the last one is the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from .losses import Features


class SpectralNormConv2d(nn.Conv2d):
    """2D convolution whose weight, as a matrix of (outputs, the rest), is divided by its largest singular value."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
    ) -> None:
        padding = [step * (size - 1) // 2 for size, step in zip(kernel_size, dilation, strict=True)]
        super().__init__(in_channels, out_channels, kernel_size, stride, (padding[0], padding[1]), dilation)
        spectral_norm(self)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # The power iteration needs float32; only the convolution runs in what autocast asks for.
        with torch.autocast(hidden_states.device.type, enabled=False):
            weight = self.weight
        return self._conv_forward(hidden_states, weight, self.bias)


def _run_convs(convs: nn.ModuleList, hidden_states: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of the layers, with a leaky ReLU after all but the last."""
    outputs = []
    # As tensor cores want it: cuDNN would transpose before and after each layer.
    hidden_states = hidden_states.contiguous(memory_format=torch.channels_last)
    for conv in convs[:-1]:
        hidden_states = F.leaky_relu(conv(hidden_states), 0.1)
        outputs.append(hidden_states)
    return [*outputs, convs[-1](hidden_states)]


class PeriodDiscriminator(nn.Module):
    """Looks at every `period`-th sample (HiFi-GAN, arXiv 2010.05646): convolutions along time, the period apart."""

    def __init__(self, period: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.period = period
        sizes = [1, *channels]
        last = len(channels) - 1
        self.convs = nn.ModuleList(
            SpectralNormConv2d(sizes[i], sizes[i + 1], (5, 1), stride=(3 if i < last else 1, 1))
            for i in range(len(channels))
        )
        self.convs.append(SpectralNormConv2d(sizes[-1], 1, (3, 1)))

    def forward(self, waveforms: torch.Tensor) -> list[torch.Tensor]:
        """Segments (segments, samples) to the layers' outputs; samples past the last whole period are left out."""
        whole = waveforms.shape[1] // self.period * self.period
        return _run_convs(self.convs, waveforms[:, :whole].unflatten(1, (-1, self.period))[:, None])


class STFTDiscriminator(nn.Module):
    """Looks at real and imaginary part of a normalized STFT (EnCodec, arXiv 2210.13438): (2, frames, bins)."""

    def __init__(self, n_fft: int, channels: int) -> None:
        super().__init__()
        self.n_fft = n_fft
        self.convs = nn.ModuleList([SpectralNormConv2d(2, channels, (3, 9))])
        self.convs.extend(
            SpectralNormConv2d(channels, channels, (3, 9), stride=(1, 2), dilation=(dilation, 1))
            for dilation in (1, 2, 4)
        )
        self.convs.append(SpectralNormConv2d(channels, channels, (3, 3)))
        self.convs.append(SpectralNormConv2d(channels, 1, (3, 3)))

    def forward(self, waveforms: torch.Tensor) -> list[torch.Tensor]:
        """Segments (segments, samples) to the layers' outputs; no frame reaches beyond its segment."""
        waveforms = waveforms.float()
        window = torch.hann_window(self.n_fft, dtype=torch.float32, device=waveforms.device)
        window = window / window.square().sum().sqrt()
        spectrum = torch.stft(waveforms, self.n_fft, self.n_fft // 4, window=window, center=False, return_complex=True)
        return _run_convs(self.convs, torch.view_as_real(spectrum).permute(0, 3, 2, 1))


class MultiPeriodDiscriminator(nn.Module):
    """A [`PeriodDiscriminator`] for each of several periods without a common divisor."""

    def __init__(
        self, periods: Sequence[int] = (2, 3, 5, 7, 11), channels: Sequence[int] = (32, 128, 512, 1024, 1024)
    ) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(PeriodDiscriminator(period, channels) for period in periods)

    def forward(self, waveforms: torch.Tensor) -> Features:
        return [discriminator(waveforms) for discriminator in self.discriminators]


class MultiScaleSTFTDiscriminator(nn.Module):
    """An [`STFTDiscriminator`] for each of several windows, in samples."""

    def __init__(self, n_ffts: Sequence[int] = (2048, 1024, 512, 256, 128), channels: int = 32) -> None:
        super().__init__()
        self.n_ffts = list(n_ffts)
        self.discriminators = nn.ModuleList(STFTDiscriminator(n_fft, channels) for n_fft in n_ffts)

    def forward(self, waveforms: torch.Tensor) -> Features:
        return [discriminator(waveforms) for discriminator in self.discriminators]


class AudioDiscriminator(nn.Module):
    """The report's two: multi-period and multi-scale STFT. Their sub-discriminators count alike in the losses.

    Args:
        width: of the report's size, to scale the numbers of channels with: a small model trains with a small one.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        if not width > 0:
            raise ValueError(f"width={width}; accepted: a positive number")

        def scaled(channels: int) -> int:
            return max(4, round(channels * width))

        self.periods = MultiPeriodDiscriminator(channels=[scaled(size) for size in (32, 128, 512, 1024, 1024)])
        self.stft = MultiScaleSTFTDiscriminator(channels=scaled(32))

    @property
    def min_samples(self) -> int:
        """The shortest segment that every sub-discriminator can look at."""
        return max(self.stft.n_ffts)

    def forward(self, waveforms: torch.Tensor) -> Features:
        """Segments (segments, samples) of at least `min_samples` to the layers' outputs of each sub-discriminator."""
        if waveforms.ndim != 2 or waveforms.shape[1] < self.min_samples:
            raise ValueError(
                f"waveforms have shape {tuple(waveforms.shape)}; accepted: (segments, {self.min_samples} samples or "
                "more)"
            )
        return [*self.periods(waveforms), *self.stft(waveforms)]
