# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels for what lies between the discriminators' convolutions.

Their maps are large and their channels few, so a step moves more than it computes. Each of these passes over a map
once, forward and backward, where PyTorch does so for the bias, the activation, the crop, the padding, each of their
gradients and the sum of two of those.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable


BLOCK = 2048  # elements of a program
TILE = 2048  # elements that a gradient's program has at a time
PROGRAMS = 1056  # of a gradient, about


@triton.jit
def _leaky_relu_kernel(
    states, bias, output, total, width, wide, widened, slope, channels: tl.constexpr, BLOCK: tl.constexpr
):
    """Of rows of `wide` columns to rows of `widened`, zero from `width` on."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = place % channels
    column = place // channels % widened
    row = place // channels // widened
    seen = (place < total) & (column < width)
    x = tl.load(states + (row * wide + column) * channels + channel, seen, other=0.0).to(tl.float32)
    x += tl.load(bias + channel, seen, other=0.0).to(tl.float32)
    tl.store(output + place, tl.where(x > 0, x, x * slope), place < total)


@triton.jit
def _leaky_relu_gradient_kernel(
    output,
    padded_gradient,
    seen_gradient,
    gradient,
    sums,
    columns,
    width,
    wide,
    widened,
    slope,
    rows,
    channels: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    SEEN: tl.constexpr,
):
    """Of `rows` columns of `wide` the gradient, and its sum over them."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    added = tl.zeros([CHANNELS], tl.float32)
    for start in range(0, rows, ROWS):
        place = tl.program_id(0).to(tl.int64) * rows + start + tl.arange(0, ROWS)
        column = place % wide
        row = place // wide
        inside = (place < columns)[:, None] & (channel < channels)[None, :]
        seen = inside & (column < width)[:, None]
        padded = (row * widened + column)[:, None] * channels + channel[None, :]
        g = tl.zeros([ROWS, CHANNELS], tl.float32)
        if PADDED:
            g += tl.load(padded_gradient + padded, seen, other=0.0).to(tl.float32)
        if SEEN:
            cropped = (row * width + column)[:, None] * channels + channel[None, :]
            g += tl.load(seen_gradient + cropped, seen, other=0.0).to(tl.float32)
        # What is positive was so before.
        g = tl.where(tl.load(output + padded, seen, other=0.0) > 0, g, g * slope)
        tl.store(gradient + place[:, None] * channels + channel[None, :], g, inside)
        added += tl.sum(g, axis=0)
    tl.store(sums + tl.program_id(0) * channels + channel, added, channel < channels)


class _LeakyReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, bias: torch.Tensor, slope: float, width: int, widened: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, height, wide, channels = states.shape
        output = states.new_empty(batch, height, widened, channels)
        _leaky_relu_kernel[(triton.cdiv(output.numel(), BLOCK),)](
            states, bias, output, output.numel(), width, wide, widened, slope, channels=channels, BLOCK=BLOCK
        )
        ctx.save_for_backward(output)
        ctx.set_materialize_grads(False)
        ctx.slope, ctx.width, ctx.wide, ctx.bias_dtype = slope, width, wide, bias.dtype
        return output, output[:, :, :width]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, padded: torch.Tensor | None, seen: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        (output,) = ctx.saved_tensors
        batch, height, widened, channels = output.shape
        columns = batch * height * ctx.wide
        gradient = output.new_empty(batch, height, ctx.wide, channels)
        tile_channels = min(triton.next_power_of_2(channels), 256)
        tile_rows = TILE // tile_channels
        groups = triton.cdiv(channels, tile_channels)
        rows = max(1, columns * groups // PROGRAMS // tile_rows) * tile_rows
        programs = triton.cdiv(columns, rows)
        sums = torch.empty(programs, channels, dtype=torch.float32, device=output.device)
        _leaky_relu_gradient_kernel[(programs, groups)](
            output,
            None if padded is None else padded.contiguous(),
            None if seen is None else seen.contiguous(),
            gradient,
            sums,
            columns,
            ctx.width,
            ctx.wide,
            widened,
            ctx.slope,
            rows,
            channels=channels,
            ROWS=tile_rows,
            CHANNELS=tile_channels,
            PADDED=padded is not None,
            SEEN=seen is not None,
        )
        return gradient, sums.sum(0).to(ctx.bias_dtype), None, None, None


def bias_leaky_relu(
    states: torch.Tensor, bias: torch.Tensor, slope: float, width: int, widened: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A leaky ReLU of `states + bias`, cropped to a width, and padded to another.

    Args:
        states: (batch, height, at least `width`, channels), contiguous.
        bias: (channels,).
        width: what is seen of the states' own.
        widened: at least `width`.

    Returns:
        (batch, height, widened, channels), zero from `width` on, and of that (batch, height, width, channels).
    """
    with torch.cuda.device_of(states):
        return _LeakyReLU.apply(states, bias, slope, width, widened)


@triton.jit
def _distance_kernel(fake, real, sums, total, inner, fake_stride, real_stride, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = place // inner
    column = place % inner
    f = tl.load(fake + row * fake_stride + column, place < total, other=0.0).to(tl.float32)
    r = tl.load(real + row * real_stride + column, place < total, other=0.0).to(tl.float32)
    tl.store(sums + tl.program_id(0), tl.sum(tl.abs(f - r), axis=0))


@triton.jit
def _distance_gradient_kernel(
    fake, real, outer, gradient, total, inner, fake_stride, real_stride, BLOCK: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = place // inner
    column = place % inner
    f = tl.load(fake + row * fake_stride + column, place < total, other=0.0).to(tl.float32)
    r = tl.load(real + row * real_stride + column, place < total, other=0.0).to(tl.float32)
    g = tl.load(outer)
    tl.store(gradient + place, tl.where(f > r, g, tl.where(f < r, -g, 0.0)), place < total)


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(fake, real)
        programs = triton.cdiv(fake.numel(), BLOCK)
        sums = torch.empty(programs, dtype=torch.float32, device=fake.device)
        _distance_kernel[(programs,)](fake, real, sums, *_rows(fake, real), BLOCK=BLOCK)
        return sums.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        fake, real = ctx.saved_tensors
        gradient = torch.empty(fake.shape, dtype=fake.dtype, device=fake.device)
        _distance_gradient_kernel[(triton.cdiv(fake.numel(), BLOCK),)](
            fake, real, gradients[0], gradient, *_rows(fake, real), BLOCK=BLOCK
        )
        return gradient, None


def _rows(fake: torch.Tensor, real: torch.Tensor) -> tuple[int, int, int, int]:
    return fake.numel(), fake.shape[2] * fake.shape[3], fake.stride(1), real.stride(1)


def distance(fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The sum, in float32, of absolute differences between two maps (batch, height, width, channels) whose rows are
    contiguous and equally far apart; the second has no gradient."""
    with torch.cuda.device_of(fake):
        return _Distance.apply(fake, real)
