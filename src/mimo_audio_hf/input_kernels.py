# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels for what a call does before its first layer: where clips lie at each frame rate, and log-mels.

All of it is small, and PyTorch takes the host a hundred launches for it, in which the GPU waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl

from .feature_extraction_mimo_audio_tokenizer import LOG_MEL_FLOOR, MiMoAudioTokenizerFeatureExtractor
from .modeling_mimo_audio_tokenizer import (
    MiMoAudioTokenizerDecoder,
    MiMoAudioTokenizerDecoderLayout,
    MiMoAudioTokenizerEncoder,
    MiMoAudioTokenizerEncoderLayout,
    PackedBounds,
    PackedSequences,
)


# Rows of each level that a program has; steps of the search for a row's clip, among a million of them.
ROWS = 256
STEPS = 20
# Sizes that are new in every call are no reason to build a kernel anew.
_SIZES = ["clips", "codes_total", "frames_total", "uncut_total", "mel_total", "audio_total"]


@triton.jit
def _clip_of(starts, row, clips, STEPS: tl.constexpr):
    """The clip of each row: the first that ends after it. Clips may be empty."""
    low = row * 0
    high = low + clips - 1
    for _ in range(STEPS):
        middle = (low + high) // 2
        is_after = tl.load(starts + middle + 1) <= row
        low = tl.where(is_after, tl.minimum(middle + 1, high), low)
        high = tl.where(is_after, high, middle)
    return low


@triton.jit
def _place_rows(starts, row, total, clips, positions, sequences, STEPS: tl.constexpr):
    """Stores each row's clip and its position there, and returns them."""
    clip = _clip_of(starts, row, clips, STEPS)
    position = row - tl.load(starts + clip)
    tl.store(positions + row, position, row < total)
    tl.store(sequences + row, clip.to(tl.int64), row < total)
    return clip, position


@triton.jit
def _conv_rows(
    starts, total, clip, position, row, inside, index, kernel: tl.constexpr, stride: tl.constexpr,
    padding: tl.constexpr,
):  # fmt: skip
    """As `PackedSequences.conv_index`."""
    start, end = tl.load(starts + clip), tl.load(starts + clip + 1)
    for tap in tl.static_range(kernel):
        source = position * stride + start + (tap - padding)
        source = tl.where((source >= start) & (source < end), source, total)
        tl.store(index + row * kernel + tap, source.to(tl.int64), inside)


@triton.jit
def _conv_transpose_rows(
    starts, total, clip, position, row, inside, index, kernel: tl.constexpr, stride: tl.constexpr,
    offset: tl.constexpr,
):  # fmt: skip
    """As `PackedSequences.conv_transpose_index`."""
    start, end = tl.load(starts + clip), tl.load(starts + clip + 1)
    taps: tl.constexpr = (kernel + stride - 1) // stride
    for step in tl.static_range(taps):
        source = (position + offset) // stride + start - step
        tap = (position + offset) % stride + step * stride
        is_there = (tap < kernel) & (source >= start) & (source < end)
        place = tl.where(is_there, source.to(tl.int64) * kernel + tap, total.to(tl.int64) * kernel)
        tl.store(index + row * taps + step, place, inside)


@triton.jit(do_not_specialize=_SIZES)
def _encoder_layout_kernel(
    mel_starts, frames_starts, codes_starts, mel_total, frames_total, codes_total, clips,
    mel_positions, mel_sequences, frames_positions, frames_sequences, codes_positions, codes_sequences,
    conv1_index, conv2_index, pool_index,
    kernel: tl.constexpr, stride: tl.constexpr, pooler: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    clip, position = _place_rows(mel_starts, row, mel_total, clips, mel_positions, mel_sequences, STEPS)
    _conv_rows(mel_starts, mel_total, clip, position, row, row < mel_total, conv1_index, kernel, 1, 1)
    clip, position = _place_rows(frames_starts, row, frames_total, clips, frames_positions, frames_sequences, STEPS)
    _conv_rows(mel_starts, mel_total, clip, position, row, row < frames_total, conv2_index, kernel, stride, 1)
    clip, position = _place_rows(codes_starts, row, codes_total, clips, codes_positions, codes_sequences, STEPS)
    _conv_rows(frames_starts, frames_total, clip, position, row, row < codes_total, pool_index, pooler, pooler, 0)


@triton.jit(do_not_specialize=_SIZES)
def _decoder_layout_kernel(
    codes_starts, frames_starts, uncut_starts, mel_starts, audio_starts,
    codes_total, frames_total, uncut_total, mel_total, audio_total, clips,
    codes_positions, codes_sequences, frames_positions, frames_sequences, uncut_positions, uncut_sequences,
    mel_positions, mel_sequences, audio_positions, audio_sequences,
    dconv1_index, dconv2_index, cut_index, audio_index,
    pooler: tl.constexpr, kernel: tl.constexpr, stride: tl.constexpr, pieces: tl.constexpr,
    blocks_a_hop: tl.constexpr, blocks_cut: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    _place_rows(codes_starts, row, codes_total, clips, codes_positions, codes_sequences, STEPS)
    clip, position = _place_rows(frames_starts, row, frames_total, clips, frames_positions, frames_sequences, STEPS)
    inside = row < frames_total
    _conv_transpose_rows(codes_starts, codes_total, clip, position, row, inside, dconv1_index, pooler, pooler, 0)
    clip, position = _place_rows(uncut_starts, row, uncut_total, clips, uncut_positions, uncut_sequences, STEPS)
    inside = row < uncut_total
    _conv_transpose_rows(frames_starts, frames_total, clip, position, row, inside, dconv2_index, kernel, stride, 0)
    clip, position = _place_rows(mel_starts, row, mel_total, clips, mel_positions, mel_sequences, STEPS)
    tl.store(cut_index + row, tl.load(uncut_starts + clip) + position, row < mel_total)
    clip, position = _place_rows(audio_starts, row, audio_total, clips, audio_positions, audio_sequences, STEPS)
    _conv_transpose_rows(
        mel_starts, mel_total, clip, position, row, row < audio_total, audio_index, pieces, blocks_a_hop, blocks_cut
    )


def _sequences(bounds: PackedBounds) -> PackedSequences:
    """To be filled in."""
    rows = bounds.cu_seqlens.new_empty(bounds.total)
    return PackedSequences(bounds.cu_seqlens, bounds.max_seqlen, rows, torch.empty_like(rows, dtype=torch.long))


def _index(sequences: PackedSequences, taps: int) -> torch.Tensor:
    return torch.empty(sequences.total, taps, dtype=torch.long, device=sequences.cu_seqlens.device)


def encoder_layout(
    encoder: MiMoAudioTokenizerEncoder, bounds: Sequence[PackedBounds]
) -> MiMoAudioTokenizerEncoderLayout:
    """As the encoder's own, of clips at 100, 50 and 25 Hz."""
    config = encoder.config
    mel, frames, codes = levels = [_sequences(each) for each in bounds]
    indices = _index(mel, config.kernel_size), _index(frames, config.kernel_size), _index(codes, config.avg_pooler)
    rows = max(level.total for level in levels)  # with a filler, later levels may have more than the first
    with torch.cuda.device_of(mel.cu_seqlens):
        _encoder_layout_kernel[(triton.cdiv(rows, ROWS),)](
            *(level.cu_seqlens for level in levels),
            *(level.total for level in levels),
            len(mel),
            *(rows for level in levels for rows in (level.position_ids, level.sequence_ids)),
            *indices,
            kernel=config.kernel_size,
            stride=config.stride_size,
            pooler=config.avg_pooler,
            ROWS=ROWS,
            STEPS=STEPS,
        )
    return MiMoAudioTokenizerEncoderLayout(mel, frames, codes, *indices)


def decoder_layout(
    decoder: MiMoAudioTokenizerDecoder, bounds: Sequence[PackedBounds]
) -> MiMoAudioTokenizerDecoderLayout:
    """As the decoder's own, of clips at the levels of `level_lengths`."""
    config, istft = decoder.config, decoder.vocoder.head.istft
    kernel, stride = config.decoder_kernel_size, config.decoder_stride_size
    pieces, blocks_a_hop = config.nfft // istft.block, config.hop_length // istft.block
    codes, frames, uncut, mel, audio = levels = [_sequences(each) for each in bounds]
    indices = (
        _index(frames, 1),
        _index(uncut, triton.cdiv(kernel, stride)),
        torch.empty_like(mel.position_ids),
        _index(audio, triton.cdiv(pieces, blocks_a_hop)),
    )
    rows = max(level.total for level in levels)
    with torch.cuda.device_of(mel.cu_seqlens):
        _decoder_layout_kernel[(triton.cdiv(rows, ROWS),)](
            *(level.cu_seqlens for level in levels),
            *(level.total for level in levels),
            len(mel),
            *(rows for level in levels for rows in (level.position_ids, level.sequence_ids)),
            *indices,
            pooler=config.avg_pooler,
            kernel=kernel,
            stride=stride,
            pieces=pieces,
            blocks_a_hop=blocks_a_hop,
            blocks_cut=istft.cut // istft.block,
            ROWS=ROWS,
            STEPS=STEPS,
        )
    return MiMoAudioTokenizerDecoderLayout(codes, frames, uncut, mel, audio, *indices)


@triton.jit(do_not_specialize=["clips"])
def _frames_kernel(
    samples, sample_starts, mel_starts, window, frames, clips,
    nfft: tl.constexpr, hop: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """A windowed STFT frame of its clip, which goes on as its mirror image at both ends."""
    row = tl.program_id(0)
    clip = _clip_of(mel_starts, row, clips, STEPS)
    start = tl.load(sample_starts + clip)
    length = tl.load(sample_starts + clip + 1) - start
    reach: tl.constexpr = nfft // 2
    last = tl.where(length <= reach, nfft, length) - 1
    columns = tl.arange(0, BLOCK)
    place = tl.abs((row - tl.load(mel_starts + clip)) * hop - reach + columns)
    place = last - tl.abs(last - place)
    inside = (columns < nfft) & (place >= 0) & (place < length)
    x = tl.load(samples + start.to(tl.int64) + place, inside, other=0.0)
    x *= tl.load(window + columns, columns < nfft, other=0.0)
    tl.store(frames + row.to(tl.int64) * nfft + columns, x, columns < nfft)


@cache  # for good: recorded graphs read it
def _window(size: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.hann_window(size, dtype=torch.float32, device=device)


def log_mel(
    extractor: MiMoAudioTokenizerFeatureExtractor, samples: torch.Tensor, clips: PackedBounds, mel: PackedBounds
) -> torch.Tensor:
    """As the encoder's own, for windows as long as the transform."""
    frames = samples.new_empty(mel.total, extractor.nfft)
    with torch.cuda.device_of(samples):
        _frames_kernel[(mel.total,)](
            samples,
            clips.cu_seqlens,
            mel.cu_seqlens,
            _window(extractor.nfft, samples.device),
            frames,
            len(mel.cu_seqlens) - 1,
            nfft=extractor.nfft,
            hop=extractor.hop_length,
            BLOCK=triton.next_power_of_2(extractor.nfft),
            STEPS=STEPS,
        )
    magnitudes = torch.fft.rfft(frames).abs()
    # The product as the extractor has it, whose sums are then in the same order.
    mels = extractor.mel_filters(samples.device) @ magnitudes.t()
    return mels.clamp_(min=LOG_MEL_FLOOR).log_().t().contiguous()
