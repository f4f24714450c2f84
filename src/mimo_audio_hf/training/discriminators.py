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
from torch.nn.utils.parametrize import cached

from .losses import Features


class SpectralNormConv2d(nn.Conv2d):
    """2D convolution (segments, height, width, channels) whose weight, as a matrix of (outputs, the rest), is divided
    by its largest singular value. It keeps the height, and divides the width by the stride.

    GPUs are slow at strided convolutions, most of all at their gradients, and at those of few channels. So groups of
    `stride * block` neighbours along the width count as channels, and `block` outputs come from each, by a
    convolution without stride whose weight has the taps at their places and zeros elsewhere.

    Args:
        stride: along the width.
        dilation: along the height.
        block: how many outputs are computed together.
    """

    placement: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: int = 1,
        dilation: int = 1,
        block: int = 1,
    ) -> None:
        rows, taps = kernel_size
        padding = (dilation * (rows - 1) // 2, (taps - 1) // 2)
        super().__init__(in_channels, out_channels, kernel_size, (1, stride), padding, (dilation, 1))
        spectral_norm(self)
        self.block, self.group = block, stride * block
        self.before = -(-padding[1] // self.group)  # groups
        after = (stride * (block - 1) + taps - 1 - padding[1]) // self.group
        # (groups, group, block, taps): 1 where a tap of an output lies
        slots = torch.arange(-self.before * self.group, (after + 1) * self.group).unflatten(0, (-1, self.group))
        places = torch.arange(block)[:, None] * stride + torch.arange(taps) - padding[1]
        placement = (slots[..., None, None] == places).float()
        self.register_buffer("placement", placement, persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # The power iteration needs float32; only the convolution runs in what autocast asks for.
        with torch.autocast(hidden_states.device.type, enabled=False):
            weight = self.weight
            if self.group > 1:
                weight = torch.einsum("oihk,gqjk->joqihg", weight, self.placement).flatten(2, 3).flatten(0, 1)
        width = hidden_states.shape[2]
        if width % self.group:
            hidden_states = F.pad(hidden_states, (0, 0, 0, -width % self.group))
        hidden_states = hidden_states.unflatten(2, (-1, self.group)).flatten(3)
        outputs = F.conv2d(
            hidden_states.permute(0, 3, 1, 2),  # channels last, as tensor cores want it
            weight.contiguous(memory_format=torch.channels_last),
            self.bias.repeat(self.block),
            padding=(self.padding[0], self.before),
            dilation=self.dilation,
        )
        outputs = outputs.permute(0, 2, 3, 1).unflatten(3, (self.block, -1)).flatten(2, 3)
        return outputs[:, :, : -(-width // self.stride[1])]


def _run_convs(convs: nn.ModuleList, hidden_states: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of the layers, with a leaky ReLU after all but the last."""
    outputs = []
    for conv in convs[:-1]:
        hidden_states = F.leaky_relu(conv(hidden_states), 0.1)
        outputs.append(hidden_states)
    return [*outputs, convs[-1](hidden_states)]


# Outputs computed together where one side of a convolution has a channel or two.
FEW_CHANNELS_BLOCK = 8


class PeriodDiscriminator(nn.Module):
    """Looks at every `period`-th sample (HiFi-GAN, arXiv 2010.05646): convolutions along time, the period apart."""

    def __init__(self, period: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.period = period
        sizes = [1, *channels]
        last = len(channels) - 1
        self.convs = nn.ModuleList(
            SpectralNormConv2d(
                sizes[i], sizes[i + 1], (1, 5), stride=3 if i < last else 1, block=1 if i else FEW_CHANNELS_BLOCK
            )
            for i in range(len(channels))
        )
        self.convs.append(SpectralNormConv2d(sizes[-1], 1, (1, 3), block=FEW_CHANNELS_BLOCK))

    def forward(self, waveforms: torch.Tensor) -> list[torch.Tensor]:
        """Segments (segments, samples) to the layers' outputs (segments, period, times, channels); samples past the
        last whole period are left out."""
        whole = waveforms.shape[1] // self.period * self.period
        return _run_convs(self.convs, waveforms[:, :whole].unflatten(1, (-1, self.period)).transpose(1, 2)[..., None])


class STFTDiscriminator(nn.Module):
    """Looks at real and imaginary part of a normalized STFT (EnCodec, arXiv 2210.13438): (2, frames, bins)."""

    def __init__(self, n_fft: int, channels: int) -> None:
        super().__init__()
        self.n_fft = n_fft
        self.convs = nn.ModuleList([SpectralNormConv2d(2, channels, (3, 9), block=4)])
        self.convs.extend(
            SpectralNormConv2d(channels, channels, (3, 9), stride=2, dilation=dilation) for dilation in (1, 2, 4)
        )
        self.convs.append(SpectralNormConv2d(channels, channels, (3, 3)))
        self.convs.append(SpectralNormConv2d(channels, 1, (3, 3), block=4))

    def forward(self, waveforms: torch.Tensor) -> list[torch.Tensor]:
        """Segments (segments, samples) to the layers' outputs (segments, frames, bins, channels); no frame reaches
        beyond its segment."""
        waveforms = waveforms.float()
        window = torch.hann_window(self.n_fft, dtype=torch.float32, device=waveforms.device)
        window = window / window.square().sum().sqrt()
        spectrum = torch.stft(waveforms, self.n_fft, self.n_fft // 4, window=window, center=False, return_complex=True)
        return _run_convs(self.convs, torch.view_as_real(spectrum).transpose(1, 2))


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

    def forward(self, *waveforms: torch.Tensor) -> list[Features]:
        """Of each batch of segments (segments, samples) of at least `min_samples`, the layers' outputs of each
        sub-discriminator. Batches that are given together share a power iteration, and have graphs of their own."""
        for batch in waveforms:
            if batch.ndim != 2 or batch.shape[1] < self.min_samples:
                raise ValueError(
                    f"waveforms have shape {tuple(batch.shape)}; accepted: (segments, {self.min_samples} samples or "
                    "more)"
                )
        with cached():
            return [[*self.periods(batch), *self.stft(batch)] for batch in waveforms]
