# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""The discriminators of the technical report's second stage (arXiv 2512.23808), with spectral norm on every layer.

They look at segments of one length, so there is no padding of clips in them, and return the outputs of all their
layers: the feature-matching loss compares these, and the last one is the logits. Each of the two kinds looks at the
segments in several ways, by sub-discriminators of one shape.

They are small beside the decoder, and would take as long if written plainly: sixty power iterations of a dozen small
kernels each, and convolutions of the forms that GPUs are slowest at. Hence [`SpectralNormConvs`].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import kernels_take
from .losses import Features


SLOPE = 0.1


class SpectralNormConvs(nn.Module):
    """The same layer of several sub-discriminators: 2D convolutions whose weights, as matrices of (outputs, the rest),
    are divided by their largest singular values. They keep the height and divide the width by the stride.

    The power iterations (one a call of [`normalized`] in training mode, as torch's parametrization does it) run for
    all of them together. And strided convolutions are slow, most of all their gradients, as are those of few
    channels: so groups of `stride * block` neighbours along the width count as channels, and `block` outputs come
    from each, by a convolution without stride whose weight has the taps at their places and zeros elsewhere.

    Args:
        count: of sub-discriminators.
        kernel_size: height and width, odd.
        stride: along the width.
        dilation: along the height.
        block: how many outputs are computed together.
    """

    placement: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    def __init__(
        self,
        count: int,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: int = 1,
        dilation: int = 1,
        block: int = 1,
    ) -> None:
        super().__init__()
        rows, taps = kernel_size
        self.stride, self.dilation, self.block, self.group = stride, dilation, block, stride * block
        self.padding = (dilation * (rows - 1) // 2, (taps - 1) // 2)
        fan_in = in_channels * rows * taps
        bound = fan_in**-0.5  # as nn.Conv2d begins
        self.weight = nn.Parameter(torch.empty(count, out_channels, in_channels, rows, taps).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, out_channels).uniform_(-bound, bound))
        self.register_buffer("left", F.normalize(torch.randn(count, out_channels), dim=1))
        self.register_buffer("right", F.normalize(torch.randn(count, fan_in), dim=1))
        for _ in range(15):
            self._iterate()

        self.before = -(-self.padding[1] // self.group)  # groups
        after = (stride * (block - 1) + taps - 1 - self.padding[1]) // self.group
        # (groups, group, block, taps): 1 where a tap of an output lies
        slots = torch.arange(-self.before * self.group, (after + 1) * self.group).unflatten(0, (-1, self.group))
        places = torch.arange(block)[:, None] * stride + torch.arange(taps) - self.padding[1]
        placement = (slots[..., None, None] == places).float()
        self.register_buffer("placement", placement, persistent=False)

    @torch.no_grad()
    def _iterate(self) -> None:
        matrices = self.weight.flatten(2)
        self.left.copy_(F.normalize((matrices @ self.right[..., None])[..., 0], dim=1))
        self.right.copy_(F.normalize((self.left[:, None] @ matrices)[:, 0], dim=1))

    def normalized(self) -> torch.Tensor:
        """The weights (count, out_channels, in_channels, rows, taps), each over its largest singular value."""
        if self.training:
            self._iterate()
        # Clones, for the next iteration may come before the gradient.
        left, right = self.left.clone(), self.right.clone()
        norms = left[:, None] @ (self.weight.flatten(2) @ right[..., None])
        return self.weight / norms[..., None, None]

    def convolutions(self) -> list[Convolution]:
        """Each sub-discriminator's, in what autocast asks for; the norms are computed in float32."""
        device_type = self.weight.device.type
        with torch.autocast(device_type, enabled=False):
            weight = self.normalized()
            if self.group > 1:
                weight = torch.einsum("noihk,gqjk->njohgqi", weight, self.placement).flatten(5).flatten(1, 2)
            else:
                weight = weight.permute(0, 1, 3, 4, 2)
        weight, bias = weight.contiguous(), cast(torch.Tensor, self.bias)
        if torch.is_autocast_enabled(device_type):  # once for all that the weights are used for
            dtype = torch.get_autocast_dtype(device_type)
            weight, bias = weight.to(dtype), bias.to(dtype)
        weights = weight.movedim(4, 2).unbind()
        return [Convolution(self, *each) for each in zip(weights, bias.unbind(), strict=True)]


class Convolution(NamedTuple):
    """One sub-discriminator's layer, with the weight that it has in this step."""

    layer: SpectralNormConvs
    weight: torch.Tensor
    bias: torch.Tensor

    def width(self, width: int) -> int:
        """Of the outputs."""
        return -(-width // self.layer.stride)

    def widened(self, width: int) -> int:
        """A width in whole groups."""
        return -(-width // self.layer.group) * self.layer.group

    def grouped(self, hidden_states: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Of inputs that are zero where they are widened; as wide as the groups' outputs are."""
        layer = self.layer
        outputs = F.conv2d(
            hidden_states.unflatten(2, (-1, layer.group)).flatten(3).permute(0, 3, 1, 2),  # channels last
            self.weight,
            None if bias is None else bias.repeat(layer.block),
            padding=(layer.padding[0], layer.before),
            dilation=(layer.dilation, 1),
        )
        return outputs.permute(0, 2, 3, 1).unflatten(3, (layer.block, -1)).flatten(2, 3)

    def __call__(self, hidden_states: torch.Tensor, width: int | None = None) -> torch.Tensor:
        """(segments, height, width, in_channels), which may be widened already, to (segments, height, ceil(width /
        stride), out_channels)."""
        width = hidden_states.shape[2] if width is None else width
        hidden_states = self.widen(hidden_states)
        return self.grouped(hidden_states, self.bias)[:, :, : self.width(width)]

    def widen(self, hidden_states: torch.Tensor) -> torch.Tensor:
        missing = self.widened(hidden_states.shape[2]) - hidden_states.shape[2]
        return F.pad(hidden_states, (0, 0, 0, missing)) if missing else hidden_states


class SubDiscriminators(nn.Module):
    """Base of the two kinds: `convs`, each the same layer of all sub-discriminators."""

    convs: nn.ModuleList

    def views(self, waveforms: torch.Tensor) -> list[torch.Tensor]:
        """What each sub-discriminator looks at, (segments, height, width, channels)."""
        raise NotImplementedError

    def forward(self, *waveforms: torch.Tensor) -> list[Features]:
        """Of each batch of segments (segments, samples), each sub-discriminator's layers' outputs, (segments, height,
        width, channels), after a leaky ReLU but for the last."""
        layers = [cast(SpectralNormConvs, conv).convolutions() for conv in self.convs]
        discriminators = list(zip(*layers, strict=True))
        return [
            [_outputs(discriminator, view) for discriminator, view in zip(discriminators, views, strict=True)]
            for views in map(self.views, waveforms)
        ]


def _outputs(layers: Sequence[Convolution], hidden_states: torch.Tensor) -> list[torch.Tensor]:
    if kernels_take(hidden_states):
        return _outputs_of_kernels(layers, hidden_states)
    outputs = []
    for layer in layers[:-1]:
        hidden_states = F.leaky_relu(layer(hidden_states), SLOPE)
        outputs.append(hidden_states)
    return [*outputs, layers[-1](hidden_states)]


def _outputs_of_kernels(layers: Sequence[Convolution], hidden_states: torch.Tensor) -> list[torch.Tensor]:
    """The same; between two convolutions a map is touched once."""
    from .discriminator_kernels import bias_leaky_relu  # which imports Triton

    outputs = []
    width = hidden_states.shape[2]
    hidden_states = layers[0].widen(hidden_states)
    for layer, following in pairwise(layers):
        width = layer.width(width)
        grouped = layer.grouped(hidden_states).contiguous()
        hidden_states, seen = bias_leaky_relu(grouped, layer.bias, SLOPE, width, following.widened(width))
        outputs.append(seen)
    return [*outputs, layers[-1](hidden_states, width)]


class MultiPeriodDiscriminator(SubDiscriminators):
    """For each of several periods without a common divisor, looks at every `period`-th sample (HiFi-GAN, arXiv
    2010.05646): (period, times), convolved along time. Samples past the last whole period are left out."""

    def __init__(
        self, periods: Sequence[int] = (2, 3, 5, 7, 11), channels: Sequence[int] = (32, 128, 512, 1024, 1024)
    ) -> None:
        super().__init__()
        self.periods = list(periods)
        sizes, count = [1, *channels], len(self.periods)
        self.convs = nn.ModuleList([SpectralNormConvs(count, 1, sizes[1], (1, 5), stride=3, block=8)])
        self.convs.extend(
            SpectralNormConvs(count, sizes[i], sizes[i + 1], (1, 5), stride=3) for i in range(1, len(channels) - 1)
        )
        self.convs.append(SpectralNormConvs(count, sizes[-2], sizes[-1], (1, 5)))
        self.convs.append(SpectralNormConvs(count, sizes[-1], 1, (1, 3), block=8))

    def views(self, waveforms: torch.Tensor) -> list[torch.Tensor]:
        whole = [waveforms[:, : waveforms.shape[1] // period * period] for period in self.periods]
        return [
            each.unflatten(1, (-1, period)).transpose(1, 2)[..., None]
            for each, period in zip(whole, self.periods, strict=True)
        ]


class MultiScaleSTFTDiscriminator(SubDiscriminators):
    """For each of several windows, in samples, looks at real and imaginary part of a normalized STFT (EnCodec, arXiv
    2210.13438): (frames, bins). No frame reaches beyond its segment."""

    def __init__(self, n_ffts: Sequence[int] = (2048, 1024, 512, 256, 128), channels: int = 32) -> None:
        super().__init__()
        self.n_ffts = list(n_ffts)
        count = len(self.n_ffts)
        self.convs = nn.ModuleList([SpectralNormConvs(count, 2, channels, (3, 9), block=4)])
        self.convs.extend(
            SpectralNormConvs(count, channels, channels, (3, 9), stride=2, dilation=dilation) for dilation in (1, 2, 4)
        )
        self.convs.append(SpectralNormConvs(count, channels, channels, (3, 3)))
        self.convs.append(SpectralNormConvs(count, channels, 1, (3, 3), block=4))

    def views(self, waveforms: torch.Tensor) -> list[torch.Tensor]:
        return [self._spectrum(waveforms.float(), n_fft) for n_fft in self.n_ffts]

    @staticmethod
    def _spectrum(waveforms: torch.Tensor, n_fft: int) -> torch.Tensor:
        window = torch.hann_window(n_fft, dtype=torch.float32, device=waveforms.device)
        window = window / window.square().sum().sqrt()
        spectrum = torch.stft(waveforms, n_fft, n_fft // 4, window=window, center=False, return_complex=True)
        return torch.view_as_real(spectrum).transpose(1, 2)


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
        periods, stft = self.periods(*waveforms), self.stft(*waveforms)
        return [[*first, *second] for first, second in zip(periods, stft, strict=True)]
