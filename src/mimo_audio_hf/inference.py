# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Waveforms to codes and back with a loaded model, for any number of clips of any length.

The clips are run in batches of bounded duration, packed end to end, so that a batch costs no padding and every clip
gives what it gives alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from .audio import as_tensor
from .feature_extraction_mimo_audio_tokenizer import MiMoAudioTokenizerFeatureExtractor
from .modeling_mimo_audio_tokenizer import MiMoAudioTokenizerModel


Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[float], object]

# Enough to keep a large GPU busy. The released model's largest activations, of its feed-forward layers, then take
# 0.25 GB each in float32.
MAX_BATCH_SECONDS = 240.0


def encode_waveforms(
    model: MiMoAudioTokenizerModel,
    waveforms: Sequence[torch.Tensor | np.ndarray],
    num_quantizers: int | None = None,
    *,
    max_batch_seconds: float = MAX_BATCH_SECONDS,
    progress: Progress | None = None,
) -> list[torch.Tensor]:
    """Encode waveforms.

    Args:
        model: the tokenizer; runs where it is, without gradients.
        waveforms: clips (samples,), mono floats in [-1, 1] at the model's sampling rate, on any device; tensors or
            arrays.
        num_quantizers: how many codebooks to use, from the first; all by default.
        max_batch_seconds: seconds of audio that run at once. A longer clip runs alone, in one piece.
        progress: called after every batch with its seconds of audio.

    Returns:
        For each clip, in the order given, its codes (L, num_quantizers), int64 on the CPU.

    Raises:
        ValueError: a clip (named by its index) that is no tensor or array, empty, not mono, not floating point, NaN or
            infinite, or more codebooks than the model has, found before anything is encoded; a `max_batch_seconds`
            that is not positive.
    """
    model.check_num_quantizers(num_quantizers)
    clips = [_checked_waveform(waveform, f"waveforms[{index}]") for index, waveform in enumerate(waveforms)]
    extractor = MiMoAudioTokenizerFeatureExtractor.from_config(model.config)
    seconds = [len(clip) / extractor.sampling_rate for clip in clips]
    device = _device(model, model.encoder)
    codes: dict[int, torch.Tensor] = {}
    for batch in _batches(range(len(clips)), seconds, max_batch_seconds):
        mels = [_log_mel(extractor, clips[index], device) for index in batch]
        lengths = [len(mel) for mel in mels]
        with torch.inference_mode():
            layout = model.encoder_layout(lengths, device)
            # This class's own: that of `compat` has other arguments.
            output = MiMoAudioTokenizerModel.encode(
                model, torch.cat(mels), num_quantizers=num_quantizers, layout=layout
            )
            packed = output.audio_codes
        codes.update(zip(batch, _split(packed, model.encoder.code_lengths(lengths)), strict=True))
        if progress is not None:
            progress(sum(seconds[index] for index in batch))
    return [codes[index] for index in range(len(clips))]


def decode_codes(
    model: MiMoAudioTokenizerModel,
    codes: Sequence[torch.Tensor | np.ndarray],
    *,
    max_batch_seconds: float = MAX_BATCH_SECONDS,
    progress: Progress | None = None,
) -> list[torch.Tensor]:
    """Decode codes to waveforms.

    Args:
        model: the tokenizer; runs where it is, without gradients.
        codes: clips (L, Q), integers, of the first Q codebooks; Q may differ between clips. Tensors or arrays.
        max_batch_seconds: seconds of audio that run at once. A longer clip runs alone, in one piece.
        progress: called after every batch with its seconds of audio.

    Returns:
        For each clip, in the order given, its waveform (samples_per_frame * L,), float32 on the CPU, at the model's
        sampling rate. The released model has 960 samples a frame.

    Raises:
        ValueError: a clip (named by its index) that is no tensor or array, of wrong shape or dtype, with codes out of
            range or more codebooks than the model has, found before anything is decoded; a model without decoder; a
            `max_batch_seconds` that is not positive.
    """
    clips = [check_codes(model, clip, f"codes[{index}]") for index, clip in enumerate(codes)]
    device = _device(model, model.decoder)
    samples_per_frame = model.config.samples_per_frame
    seconds = [len(clip) * samples_per_frame / model.config.sampling_rate for clip in clips]
    waveforms: dict[int, torch.Tensor] = {}

    def codebooks(index: int) -> int:
        return clips[index].shape[1]

    for _, indices in itertools.groupby(sorted(range(len(clips)), key=codebooks), key=codebooks):
        for batch in _batches(indices, seconds, max_batch_seconds):
            lengths = [len(clips[index]) for index in batch]
            with torch.inference_mode():
                layout = model.decoder_layout(lengths, device)
                packed = torch.cat([clips[index].to(device) for index in batch])
                samples = MiMoAudioTokenizerModel.decode(model, packed, layout=layout).audio_values
            pieces = _split(samples, [length * samples_per_frame for length in lengths])
            waveforms.update(zip(batch, pieces, strict=True))
            if progress is not None:
                progress(sum(seconds[index] for index in batch))
    return [waveforms[index] for index in range(len(clips))]


def check_codes(model: MiMoAudioTokenizerModel, codes: Any, name: str = "codes") -> torch.Tensor:
    """One clip's codes (L, Q) as int64, if the model can decode them.

    Raises:
        ValueError: they are no tensor or array, of wrong shape or dtype, out of range, or of more codebooks than the
            model has; the message begins with `name`.
    """
    codes = as_tensor(name, codes)
    accepted = model.config.num_quantizers
    if codes.ndim != 2 or not len(codes) or not 1 <= codes.shape[1] <= accepted:
        shape = tuple(codes.shape)
        raise ValueError(f"{name} has shape {shape}; accepted: (frames, 1 to {accepted} codebooks), not empty")
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(f"{name} is {codes.dtype}; accepted: integers")
    codes = codes.long()
    try:
        model.check_codes(codes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return codes


def convert_each(
    convert: Callable[[list[Item]], list[Result]], items: list[Item]
) -> list[Result | ValueError | torch.OutOfMemoryError]:
    """`convert(items)`; where that fails, item by item, with the error in place of the result of those that fail."""
    try:
        return [*convert(items)]
    except (ValueError, torch.OutOfMemoryError) as error:
        if len(items) == 1:
            # Its traceback would keep the failed batch in memory.
            return [error.with_traceback(None)]
    return [result for item in items for result in convert_each(convert, [item])]


def group_by_seconds(
    items: Iterable[Item], seconds: Callable[[Item], float], max_seconds: float
) -> Iterator[list[Item]]:
    """Consecutive items in lists of at most `max_seconds` in all; a longer item stands alone.

    Nothing is taken from `items` beyond the first item that does not fit.
    """
    group: list[Item] = []
    total = 0.0
    for item in items:
        if group and total + seconds(item) > max_seconds:
            yield group
            group, total = [], 0.0
        group.append(item)
        total += seconds(item)
    if group:
        yield group


def _batches(indices: Iterable[int], seconds: Sequence[float], max_batch_seconds: float) -> Iterator[list[int]]:
    """Clips of like lengths together, for attention backends that pad; the longest first, for memory to fail early."""
    if not max_batch_seconds > 0:
        raise ValueError(f"max_batch_seconds={max_batch_seconds}; accepted: a positive number of seconds")
    longest_first = sorted(indices, key=seconds.__getitem__, reverse=True)
    return group_by_seconds(longest_first, seconds.__getitem__, max_batch_seconds)


def _split(packed: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """The clips of a packed tensor on the CPU, as copies: they neither hold their batch nor are inference tensors."""
    return [piece.clone() for piece in packed.cpu().split(list(lengths))]


def _device(model: MiMoAudioTokenizerModel, part: torch.nn.Module | None) -> torch.device:
    """Where a part of the model runs. Weights that accelerate has offloaded are on "meta" and run where others are."""
    weights = itertools.chain(model.parameters() if part is None else part.parameters(), model.parameters())
    return next((weight.device for weight in weights if not weight.is_meta), torch.device("cpu"))


def _log_mel(
    extractor: MiMoAudioTokenizerFeatureExtractor, waveform: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """(frames, n_mels) of one clip."""
    features = extractor([waveform], sampling_rate=extractor.sampling_rate, device=device)
    return features["input_features"][0].t()


def _checked_waveform(waveform: Any, name: str) -> torch.Tensor:
    waveform = as_tensor(name, waveform)
    if waveform.ndim != 1 or not len(waveform):
        shape = tuple(waveform.shape)
        raise ValueError(f"{name} has shape {shape}; accepted: mono, (samples,), not empty")
    if not waveform.is_floating_point():
        raise ValueError(f"{name} is {waveform.dtype}; accepted: floats in [-1, 1]")
    if not waveform.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite samples; accepted: finite samples")
    return waveform
