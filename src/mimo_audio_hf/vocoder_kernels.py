# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels of the decoder's parts that are traffic alone, for inference: group norm, and around the FFT."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .modeling_mimo_audio_tokenizer import MiMoAudioTokenizerDecoderLayout, MiMoAudioTokenizerISTFT, PackedSequences


@triton.jit
def _row_moments_kernel(states, means, variances, dim: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and variance of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    x = tl.load(states + row * dim + columns, inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / dim
    centered = tl.where(inside, x - mean, 0.0)
    tl.store(means + row, mean)
    tl.store(variances + row, tl.sum(centered * centered, axis=0) / dim)


@triton.jit
def _clip_moments_kernel(row_means, row_variances, cu_seqlens, means, scales, eps, BLOCK: tl.constexpr):
    """A clip's mean and the inverse of its deviation from those of its rows, which are of one size."""
    start = tl.load(cu_seqlens + tl.program_id(0))
    end = tl.load(cu_seqlens + tl.program_id(0) + 1)
    rows = tl.arange(0, BLOCK)
    summed = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        summed += tl.load(row_means + first + rows, first + rows < end, other=0.0)
    count = tl.maximum(end - start, 1)
    mean = tl.sum(summed, axis=0) / count
    summed = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        inside = first + rows < end
        centered = tl.load(row_means + first + rows, inside, other=0.0) - mean
        variance = tl.load(row_variances + first + rows, inside, other=0.0) + centered * centered
        summed += tl.where(inside, variance, 0.0)
    tl.store(means + tl.program_id(0), mean)
    tl.store(scales + tl.program_id(0), tl.rsqrt(tl.sum(summed, axis=0) / count + eps))


@triton.jit
def _scale_rows_kernel(
    states, sequence_ids, means, scales, weight, bias, output, dim: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    clip = tl.load(sequence_ids + row)
    x = tl.load(states + row * dim + columns, inside, other=0.0).to(tl.float32) - tl.load(means + clip)
    x *= tl.load(scales + clip) * tl.load(weight + columns, inside, other=0.0).to(tl.float32)
    tl.store(output + row * dim + columns, x + tl.load(bias + columns, inside, other=0.0).to(tl.float32), inside)


def group_norm(
    hidden_states: torch.Tensor, sequences: PackedSequences, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """Group norm with one group (total_frames, dim): statistics over all channels and frames of each clip."""
    total, dim = hidden_states.shape
    hidden_states = hidden_states.contiguous()
    output = torch.empty_like(hidden_states)
    row_means, row_variances = torch.empty(2, total, dtype=torch.float32, device=hidden_states.device)
    means, scales = torch.empty(2, len(sequences), dtype=torch.float32, device=hidden_states.device)
    block = triton.next_power_of_2(dim)
    with torch.cuda.device_of(hidden_states):
        _row_moments_kernel[(total,)](hidden_states, row_means, row_variances, dim=dim, BLOCK=block)
        _clip_moments_kernel[(len(sequences),)](
            row_means, row_variances, sequences.cu_seqlens, means, scales, eps, BLOCK=1024
        )
        _scale_rows_kernel[(total,)](
            hidden_states, sequences.sequence_ids, means, scales, weight, bias, output, dim=dim, BLOCK=block
        )
    return output


@triton.jit
def _spectrum_kernel(states, spectrum, log_limit, bins: tl.constexpr, BLOCK: tl.constexpr):
    """A frame's log-magnitudes and phases to its spectrum, real and imaginary parts in turn."""
    row = tl.program_id(0).to(tl.int64) * (2 * bins)
    columns = tl.arange(0, BLOCK)
    inside = columns < bins
    log_magnitude = tl.load(states + row + columns, inside, other=0.0).to(tl.float32)
    phase = tl.load(states + row + bins + columns, inside, other=0.0).to(tl.float32)
    magnitude = tl.exp(tl.where(log_magnitude > log_limit, log_limit, log_magnitude))
    tl.store(spectrum + row + 2 * columns, magnitude * tl.cos(phase), inside)
    tl.store(spectrum + row + 2 * columns + 1, magnitude * tl.sin(phase), inside)


@triton.jit(do_not_specialize=["pieces_total", "blocks"])
def _overlap_kernel(
    frames, index, output, pieces_total, blocks, size: tl.constexpr, pieces: tl.constexpr, TAPS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Blocks of samples: the frames' pieces that overlap in them, under Hann windows, over the windows' squares."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    summed = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for tap in range(TAPS):
        piece = tl.load(index + rows * TAPS + tap, rows < blocks, other=pieces_total)
        inside = (piece < pieces_total)[:, None] & (columns < size)[None, :]
        place = (piece % pieces)[:, None] * size + columns[None, :]
        window = 0.5 - 0.5 * tl.cos(place.to(tl.float32) * (6.283185307179586 / (size * pieces)))
        window = tl.where(inside, window, 0.0)
        summed += window * tl.load(frames + piece[:, None] * size + columns[None, :], inside, other=0.0)
        squares += window * window
    samples = summed / squares
    tl.store(
        output + rows[:, None] * size + columns[None, :], samples, (rows < blocks)[:, None] & (columns < size)[None, :]
    )


def synthesize(
    states: torch.Tensor, layout: MiMoAudioTokenizerDecoderLayout, istft: MiMoAudioTokenizerISTFT, max_magnitude: float
) -> torch.Tensor:
    """Log-magnitudes and phases (total_frames, n_fft + 2) to samples (total_blocks, block), float32."""
    total, width = states.shape
    bins, size, pieces = width // 2, istft.block, istft.n_fft // istft.block
    states = states.contiguous()
    spectrum = torch.empty(total, bins, 2, dtype=torch.float32, device=states.device)
    index = layout.audio_index
    blocks, taps = index.shape
    output = torch.empty(blocks, size, dtype=torch.float32, device=states.device)
    with torch.cuda.device_of(states):
        _spectrum_kernel[(total,)](
            states, spectrum, math.log(max_magnitude), bins=bins, BLOCK=triton.next_power_of_2(bins)
        )
        frames = torch.fft.irfft(torch.view_as_complex(spectrum), istft.n_fft)
        rows = 4
        _overlap_kernel[(triton.cdiv(blocks, rows),)](
            frames,
            index.contiguous(),
            output,
            total * pieces,
            blocks,
            size=size,
            pieces=pieces,
            TAPS=taps,
            ROWS=rows,
            BLOCK=triton.next_power_of_2(size),
        )
    return output
