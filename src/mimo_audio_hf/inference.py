# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Waveforms to codes and back with a loaded model, for any number of clips of any length.

On a GPU the clips are run in batches of bounded duration, packed end to end, so that a batch costs no padding and
every clip gives what it gives alone.
"""

from __future__ import annotations

import itertools
import logging
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch

from .audio import as_tensor, is_finite
from .feature_extraction_mimo_audio_tokenizer import MiMoAudioTokenizerFeatureExtractor
from .modeling_mimo_audio_tokenizer import MiMoAudioTokenizerModel, PackedBounds, check_code_range


logger = logging.getLogger(__name__)

Key = TypeVar("Key")
Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[float], object]

# Enough to keep a large GPU busy. The released model's largest activations, of its feed-forward layers, then take
# 0.25 GB each in bfloat16.
MAX_BATCH_SECONDS = 240.0

# Longer audio is encoded in pieces of this many mel frames (60 s), each on its own, as upstream does.
MAX_PIECE_FRAMES = 6000

# Codes of more than these frames (5 minutes) are decoded in pieces, as upstream's streaming decoder does with chunks
# of 60 s and its own contexts: nothing that the model was trained on is as long, and memory stays bounded.
MAX_WHOLE_FRAMES = 7500
PIECE_CHUNK = 1500
PIECE_LEFT_CONTEXT = 250
PIECE_RIGHT_CONTEXT = 40
# Samples (10 ms) over which one piece goes over into the next.
PIECE_CROSSFADE = 240


def encode_waveforms(
    model: MiMoAudioTokenizerModel,
    waveforms: Sequence[torch.Tensor | np.ndarray],
    num_quantizers: int | None = None,
    *,
    overlap_seconds: float = 0.0,
    max_batch_seconds: float = MAX_BATCH_SECONDS,
    progress: Progress | None = None,
) -> list[torch.Tensor]:
    """Encode waveforms.

    Args:
        model: the tokenizer; runs where it is, without gradients.
        waveforms: clips (samples,), mono floats in [-1, 1] at the model's sampling rate, on any device; tensors or
            arrays. Of a clip of more than 60 s, pieces of 60 s of its mel spectrogram are encoded each on its own, as
            upstream does.
        num_quantizers: how many codebooks to use, from the first; all by default.
        overlap_seconds: how far each of these pieces also sees into its neighbours, whose codes it does not give. Not
            as upstream: codes near the pieces' ends are then nearer to those of the whole.
        max_batch_seconds: seconds of audio that run at once; fewer where a GPU's memory does not suffice. On the CPU,
            which gains nothing from batches, every clip runs alone: its codes are those of the clip alone to the bit.
        progress: called after every batch with its seconds of audio.

    Returns:
        For each clip, in the order given, its codes (L, num_quantizers), int64 on the CPU.

    Raises:
        ValueError: a clip (named by its index) that is no tensor or array, empty, not mono, not floating point, NaN or
            infinite, or more codebooks than the model has, found before anything is encoded; a `max_batch_seconds`
            that is not positive; a negative `overlap_seconds`.
        torch.OutOfMemoryError: the memory does not suffice for a single clip, or 60 s of it.
    """
    clips = [check_waveform(waveform, f"waveforms[{index}]") for index, waveform in enumerate(waveforms)]
    stream = encode_stream(
        model,
        ((index, clips[index]) for index in _longest_first(clips)),
        num_quantizers,
        overlap_seconds=overlap_seconds,
        max_batch_seconds=max_batch_seconds,
        progress=progress,
    )
    return _in_order(stream)


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
            A clip of more than 5 minutes is decoded in pieces of 60 s with upstream's contexts when streaming (10 s
            before, 1.6 s after) and crossfades of 10 ms.
        max_batch_seconds: seconds of audio that run at once, fewer where a GPU's memory does not suffice. A longer
            clip runs alone. On the CPU every clip runs alone.
        progress: called after every batch with its seconds of audio.

    Returns:
        For each clip, in the order given, its waveform (samples_per_frame * L,), float32 on the CPU, at the model's
        sampling rate. The released model has 960 samples a frame.

    Raises:
        ValueError: a clip (named by its index) that is no tensor or array, of wrong shape or dtype, with codes out of
            range or more codebooks than the model has, found before anything is decoded; a model without decoder; a
            `max_batch_seconds` that is not positive.
        torch.OutOfMemoryError: the memory does not suffice for a single clip.
    """
    clips = [check_codes(model, clip, f"codes[{index}]") for index, clip in enumerate(codes)]
    # Those with the same number of codebooks together: only they share a batch.
    order = sorted(_longest_first(clips), key=lambda index: clips[index].shape[1])
    stream = decode_stream(
        model, ((index, clips[index]) for index in order), max_batch_seconds=max_batch_seconds, progress=progress
    )
    return _in_order(stream)


def encode_packed(
    model: MiMoAudioTokenizerModel, samples: torch.Tensor, lengths: Sequence[int], num_quantizers: int | None = None
) -> torch.Tensor:
    """Encode clips end to end, in one call, without waiting for the device.

    Args:
        model: the tokenizer.
        samples: (total_samples,) float32 where the model is, finite, at its sampling rate.
        lengths: of the clips, in samples; from 1.
        num_quantizers: how many codebooks to use, from the first; all by default.

    Returns:
        (total_codes, num_quantizers) int64. Nothing is cut into pieces.
    """
    extractor = MiMoAudioTokenizerFeatureExtractor.from_config(model.config)
    books = model.check_num_quantizers(num_quantizers)
    frames = [extractor.num_frames(length) for length in lengths]
    if model.graphs is not None and model.graphs.takes(frames):
        return model.graphs.encode_waveforms(samples, lengths, books)
    sizes, mel_frames = torch.tensor([[*lengths], frames], device="cpu")
    levels = torch.stack([sizes, *model.encoder.level_lengths(mel_frames)])
    clips, *bounds = PackedBounds.of_levels(levels, samples.device)
    mels = model.encoder.log_mel(samples, clips, bounds[0])  # first, so that the GPU has something to do
    layout = model.encoder.layout_of(*bounds)
    # This class's own: that of `compat` has other arguments.
    return MiMoAudioTokenizerModel.encode(model, mels, num_quantizers=books, layout=layout).audio_codes


def encode_packed_features(
    model: MiMoAudioTokenizerModel, input_features: torch.Tensor, lengths: Sequence[int], num_quantizers: int
) -> torch.Tensor:
    """Encode log-mel spectrograms end to end, in one call.

    Args:
        model: the tokenizer.
        input_features: (total_frames, n_mels) float32 where the model is, finite.
        lengths: of the clips, in mel frames; from 1.
        num_quantizers: how many codebooks to use, from the first.

    Returns:
        (total_codes, num_quantizers) int64.
    """
    if model.graphs is not None and model.graphs.takes(lengths):
        return model.graphs.encode(input_features, lengths, num_quantizers)
    layout = model.encoder_layout(lengths, input_features.device)
    # This class's own: that of `compat` has other arguments.
    output = MiMoAudioTokenizerModel.encode(model, input_features, num_quantizers=num_quantizers, layout=layout)
    return output.audio_codes


def decode_packed(model: MiMoAudioTokenizerModel, codes: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Decode clips end to end, in one call, without waiting for the device.

    Args:
        model: the tokenizer.
        codes: (total_codes, num_quantizers) int64 where the model is, in range.
        lengths: of the clips, in code frames; from 1.

    Returns:
        (samples_per_frame * total_codes,) float32.
    """
    if model.graphs is not None and model.graphs.takes_codes(lengths):
        return model.graphs.decode(codes, lengths)
    layout = model.decoder_layout(lengths, codes.device)
    return MiMoAudioTokenizerModel.decode(model, codes, layout=layout).audio_values


def encode_stream(
    model: MiMoAudioTokenizerModel,
    clips: Iterable[tuple[Key, torch.Tensor]],
    num_quantizers: int | None = None,
    *,
    overlap_seconds: float = 0.0,
    max_batch_seconds: float = MAX_BATCH_SECONDS,
    max_batch_clips: int | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[Key, torch.Tensor | torch.OutOfMemoryError]]:
    """Encode clips as they come: [`encode_waveforms`] for a stream that need not end or fit into memory.

    Args:
        clips: pairs of anything that tells clips apart and a waveform as [`check_waveform`] passes it. They are taken
            as batches are filled.
        max_batch_clips: clips, or pieces of long ones, that run at once; any number by default.
        model, num_quantizers, overlap_seconds, max_batch_seconds, progress: as in [`encode_waveforms`].

    Yields:
        The same keys in the same order with the clips' codes (L, num_quantizers), int64 on the CPU, or with the error
        of those for which a GPU's memory does not suffice.
    """
    books = model.check_num_quantizers(num_quantizers)
    if not 0 <= overlap_seconds < math.inf:
        raise ValueError(f"overlap_seconds={overlap_seconds}; accepted: 0 or more")
    extractor = MiMoAudioTokenizerFeatureExtractor.from_config(model.config)
    device = model_device(model, model.encoder)
    mels_per_code = model.config.stride_size * model.config.avg_pooler
    overlap = round(overlap_seconds * model.config.frame_rate) * mels_per_code

    def pieces() -> Iterator[_Piece]:
        for key, waveform in clips:
            frames = extractor.num_frames(len(waveform))
            for start in range(0, frames, MAX_PIECE_FRAMES):
                stop = min(start + MAX_PIECE_FRAMES, frames)
                yield _Piece(key, waveform, start, stop, max(0, start - overlap), min(stop + overlap, frames), frames)

    def launch(batch: list[_Piece]) -> Callable[[], list[torch.Tensor]]:
        bounds = [extractor.samples_of_frames(piece.first, piece.last, len(piece.data)) for piece in batch]
        samples = [piece.data[first:last].float() for piece, (first, last) in zip(batch, bounds, strict=True)]
        packed, sizes = _to_device(samples, device), [*map(len, samples)]
        frames = [extractor.num_frames(size) for size in sizes]
        lengths = [piece.last - piece.first for piece in batch]
        code_lengths = model.encoder.code_lengths(lengths)
        if frames == lengths:
            return _collector(encode_packed(model, packed, sizes, books), code_lengths)
        # Sections of pieces of clips reach beyond them.
        mels = extractor.packed_log_mel_spectrogram(packed.split(sizes))
        kept = []
        for length, piece, (first, _), mel in zip(lengths, batch, bounds, mels.split(frames), strict=True):
            skipped = piece.first - first // extractor.hop_length
            kept.append(mel[skipped : skipped + length])
        mels = torch.cat(kept)
        layout = model.encoder_layout(lengths, device)
        # This class's own: that of `compat` has other arguments.
        output = MiMoAudioTokenizerModel.encode(model, mels, num_quantizers=books, layout=layout)
        return _collector(output.audio_codes, code_lengths)

    def without_overlap(piece: _Piece, codes: torch.Tensor) -> torch.Tensor:
        length = model.encoder.code_length(piece.stop - piece.start)
        skipped = (piece.start - piece.first) // mels_per_code
        return codes[skipped : skipped + length]

    def seconds(piece: _Piece) -> float:
        start, stop = (frame * extractor.hop_length for frame in (piece.start, piece.stop))
        return (min(stop, len(piece.data)) - start) / extractor.sampling_rate

    done: list[torch.Tensor] = []
    failure: torch.OutOfMemoryError | None = None
    for piece, result in _run_in_batches(
        model, launch, pieces(), seconds, max_batch_seconds, device, progress, max_batch_clips
    ):
        if isinstance(result, torch.Tensor):
            done.append(without_overlap(piece, result) if overlap else result)
        else:
            failure = result
        if piece.is_last:
            yield piece.key, failure or (torch.cat(done) if len(done) > 1 else done[0])
            done, failure = [], None


def decode_stream(
    model: MiMoAudioTokenizerModel,
    clips: Iterable[tuple[Key, torch.Tensor]],
    *,
    max_batch_seconds: float = MAX_BATCH_SECONDS,
    max_batch_clips: int | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[Key, torch.Tensor | torch.OutOfMemoryError]]:
    """Decode clips as they come: [`decode_codes`] for a stream that need not end or fit into memory.

    Args:
        clips: pairs of anything that tells clips apart and codes (L, Q) as [`check_codes`] returns them. They are
            taken as batches are filled; neighbours with the same number of codebooks share a batch.
        max_batch_clips: clips, or pieces of long ones, that run at once; any number by default.
        model, max_batch_seconds, progress: as in [`decode_codes`].

    Yields:
        The same keys in the same order with the clips' waveforms (samples_per_frame * L,), float32 on the CPU, or with
        the error of those for which a GPU's memory does not suffice.
    """
    device = model_device(model, model.decoder)
    samples_per_frame = model.config.samples_per_frame

    def pieces(group: Iterable[tuple[Key, torch.Tensor]]) -> Iterator[_Piece]:
        for key, codes in group:
            if len(codes) <= MAX_WHOLE_FRAMES:
                yield _Piece(key, codes, 0, len(codes), 0, len(codes), len(codes))
                continue
            for window in decoding_windows(len(codes), PIECE_CHUNK, PIECE_LEFT_CONTEXT, PIECE_RIGHT_CONTEXT):
                yield _Piece(key, codes, *window, len(codes))

    def launch(batch: list[_Piece]) -> Callable[[], list[torch.Tensor]]:
        lengths = [piece.last - piece.first for piece in batch]
        packed = _to_device([piece.data[piece.first : piece.last] for piece in batch], device)
        samples = decode_packed(model, packed, lengths)
        return _collector(samples, [length * samples_per_frame for length in lengths])

    def seconds(piece: _Piece) -> float:
        return (piece.stop - piece.start) * samples_per_frame / model.config.sampling_rate

    for _, group in itertools.groupby(clips, key=lambda clip: clip[1].shape[1]):
        whole: torch.Tensor | None = None
        failure: torch.OutOfMemoryError | None = None
        for piece, result in _run_in_batches(
            model, launch, pieces(group), seconds, max_batch_seconds, device, progress, max_batch_clips
        ):
            if not isinstance(result, torch.Tensor):
                failure = result
            elif piece.start == 0 and piece.is_last:
                whole = result
            else:
                if whole is None:
                    whole = result.new_empty(piece.total * samples_per_frame)
                start, first = piece.start * samples_per_frame, piece.first * samples_per_frame
                end = piece.stop * samples_per_frame + (0 if piece.is_last else PIECE_CROSSFADE)
                samples = result[start - first : end - first]
                if start > 0:
                    samples[:PIECE_CROSSFADE] = crossfade(whole[start : start + PIECE_CROSSFADE], samples)
                whole[start:end] = samples
            if piece.is_last:
                yield piece.key, failure or cast(torch.Tensor, whole)
                whole, failure = None, None


def decoding_windows(
    frames: int, chunk_frames: int, left_context: int, right_context: int
) -> Iterator[tuple[int, int, int, int]]:
    """What a streaming decoder runs on that gets `frames` frames of codes in chunks, the last one shorter.

    Yields:
        The first and last frame (exclusive) of samples to keep, and those of the codes that are decoded for them.
    """
    emitted = 0
    for begin in range(0, frames, chunk_frames):
        end = min(begin + chunk_frames, frames)
        stop = end if end == frames else end - right_context
        if stop > emitted:
            yield emitted, stop, max(0, begin - left_context), end
            emitted = stop


def crossfade(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """What goes over from `before` (samples,) to the beginning of `after`, which may go on longer."""
    weight = torch.arange(1, len(before) + 1, device=before.device) / (len(before) + 1)
    return torch.lerp(before, after[: len(before)], weight)


def check_codes(model: MiMoAudioTokenizerModel, codes: Any, name: str = "codes") -> torch.Tensor:
    """One clip's codes (L, Q) as int64, if the model can decode them; otherwise the errors of [`check_codes_of`]."""
    return check_codes_of(model.config.codebook_sizes, codes, name)


def check_codes_of(codebook_sizes: Sequence[int], codes: Any, name: str = "codes") -> torch.Tensor:
    """One clip's codes (L, Q) as int64, if they are of the first Q of these codebooks.

    Raises:
        ValueError: they are no tensor or array, of wrong shape or dtype, out of range, or of more codebooks than there
            are; the message begins with `name`.
    """
    codes = as_tensor(name, codes)
    accepted = len(codebook_sizes)
    if codes.ndim != 2 or not len(codes) or not 1 <= codes.shape[1] <= accepted:
        also = ", not empty" if codes.ndim == 2 and not len(codes) else ""
        raise ValueError(f"{name} has shape {tuple(codes.shape)}; accepted: (frames, 1 to {accepted} codebooks){also}")
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(f"{name} is {codes.dtype}; accepted: integers")
    try:
        check_code_range(codes, codebook_sizes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return codes.long()


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
    items: Iterable[Item], seconds: Callable[[Item], float], max_seconds: float, max_items: int | None = None
) -> Iterator[list[Item]]:
    """Consecutive items in lists of at most `max_items`, and of `max_seconds` in all; a longer item stands alone.

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
        if len(group) == max_items:
            yield group
            group, total = [], 0.0
    if group:
        yield group


def check_count(name: str, value: Any, least: int, why: str = "") -> int:
    """An option that counts, as an int.

    Raises:
        ValueError: it is no integer, or less than `least`; `why` says what decides that.
    """
    try:
        count = operator.index(value)
    except TypeError:
        count = least - 1
    if isinstance(value, bool) or count < least:
        raise ValueError(f"{name}={value!r}; accepted: {least}{f' ({why})' if why else ''} or more, an integer")
    return count


def check_waveform(waveform: Any, name: str = "waveform") -> torch.Tensor:
    """One clip's waveform (samples,), if the model can encode it.

    Raises:
        ValueError: it is no tensor or array, empty, not mono, not floating point, NaN or infinite; the message begins
            with `name`.
    """
    waveform = as_tensor(name, waveform)
    if waveform.ndim != 1 or not len(waveform):
        shape = tuple(waveform.shape)
        raise ValueError(f"{name} has shape {shape}; accepted: mono, (samples,), not empty")
    if not waveform.is_floating_point():
        raise ValueError(f"{name} is {waveform.dtype}; accepted: floats in [-1, 1]")
    if not is_finite(torch.stack(waveform.aminmax()).float()):  # float64 may be finite beyond float32
        raise ValueError(f"{name} holds NaN or infinite samples; accepted: finite samples")
    return waveform


@dataclass(frozen=True)
class _Piece:
    """Frames of a clip that run at once, `first` to `last`, and of what they give the frames to keep, `start` to
    `stop`: all of them, or as many of a long clip as run in one piece.

    Frames are those of the mel spectrogram of a waveform, or of codes.
    """

    key: Any
    data: torch.Tensor
    start: int
    stop: int
    first: int
    last: int
    total: int

    @property
    def is_last(self) -> bool:
        return self.stop == self.total


def _run_in_batches(
    model: MiMoAudioTokenizerModel,
    launch: Callable[[list[Item]], Callable[[], list[Result]]],
    items: Iterable[Item],
    seconds: Callable[[Item], float],
    max_batch_seconds: float,
    device: torch.device,
    progress: Progress | None,
    max_batch_clips: int | None = None,
) -> Iterator[tuple[Item, Result | torch.OutOfMemoryError]]:
    """Items with their results, in order. A batch is prepared and launched while the one before it still runs.

    Args:
        model: whose graphs make room where memory does not suffice.
        launch: starts the computation of a batch on the device, and returns what waits for its results.
        items: taken as batches are filled.
        seconds: the duration of an item.
        max_batch_seconds: the most in a batch. Where memory does not suffice, batches are halved from there on; an
            item that does not fit alone gets the error for a result.
        max_batch_clips: the most items in a batch.
    """
    if not max_batch_seconds > 0:
        raise ValueError(f"max_batch_seconds={max_batch_seconds}; accepted: a positive number of seconds")
    if max_batch_clips is not None:
        check_count("max_batch_clips", max_batch_clips, 1)
    limit = max_batch_seconds if _gains_from_batches(device) else 0.0
    running: tuple[list[Item], Callable[[], list[Result]]] | None = None

    def finished() -> Iterator[tuple[Item, Result]]:
        nonlocal running
        if running is None:
            return
        batch, collect = running
        results = collect()
        running = None
        if progress is not None:
            progress(sum(map(seconds, batch)))
        yield from zip(batch, results, strict=True)

    for group in group_by_seconds(items, seconds, limit, max_batch_clips):
        parts = [group]
        while parts:
            # A group that was filled before the limit fell is cut to it.
            batch, *rest = group_by_seconds(parts.pop(), seconds, limit)
            parts += reversed(rest)
            failure = None
            try:
                with torch.inference_mode():
                    started = launch(batch)
            except torch.OutOfMemoryError as error:
                failure = error.with_traceback(None)  # which would keep the failed batch in memory
            if failure is None:
                yield from finished()
                running = batch, started
                continue
            yield from finished()
            if model.graphs is not None:
                model.graphs.clear()
            torch.cuda.empty_cache()
            if len(batch) == 1:
                yield batch[0], failure
                continue
            limit = sum(map(seconds, batch)) / 2
            logger.warning(f"out of memory with {2 * limit:g} s of audio at once: going on with {limit:g} s")
            parts.append(batch)
    yield from finished()


def _gains_from_batches(device: torch.device) -> bool:
    return device.type != "cpu"


def _to_device(clips: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Clips end to end on the device. To a GPU through pinned memory: other copies wait until its work is done."""
    pinned = device.type == "cuda" and not any(clip.is_cuda for clip in clips)
    shape = (sum(map(len, clips)), *clips[0].shape[1:])
    if pinned and clips[0].is_pinned() and _lie_end_to_end(clips):
        whole = clips[0].as_strided((math.prod(shape),), (1,))
        return whole.view(shape).to(device, non_blocking=True)
    packed = torch.empty(shape, dtype=clips[0].dtype, pin_memory=True) if pinned else None
    return torch.cat(list(clips), out=packed).to(device, non_blocking=pinned)


def _lie_end_to_end(clips: Sequence[torch.Tensor]) -> bool:
    """Whether they are contiguous parts of one tensor, in their order, as processes that read hand them on."""
    memory = clips[0].untyped_storage().data_ptr()
    place = clips[0].data_ptr()
    for clip in clips:
        if not clip.is_contiguous() or clip.untyped_storage().data_ptr() != memory or clip.data_ptr() != place:
            return False
        place += clip.nbytes
    return True


def _collector(packed: torch.Tensor, lengths: Sequence[int]) -> Callable[[], list[torch.Tensor]]:
    """What waits for a packed result and cuts it into the clips' own, on the CPU.

    These are copies: they neither hold their batch nor are inference tensors.
    """
    copy = packed.to("cpu", non_blocking=True)
    copied = torch.cuda.Event() if packed.is_cuda else None
    if copied is not None:
        copied.record(torch.cuda.current_stream(packed.device))

    def collect() -> list[torch.Tensor]:
        if copied is not None:
            copied.synchronize()
        return [piece.clone() for piece in copy.split(list(lengths))]

    return collect


def _longest_first(clips: Sequence[torch.Tensor]) -> list[int]:
    """Clips of like lengths beside each other, for attention backends that pad; if memory fails, it fails early."""
    return sorted(range(len(clips)), key=lambda index: len(clips[index]), reverse=True)


def _in_order(stream: Iterable[tuple[int, torch.Tensor | torch.OutOfMemoryError]]) -> list[torch.Tensor]:
    """The results of clips 0, 1, ..., whatever order they come in. Raises the error of one that failed."""
    results: dict[int, torch.Tensor] = {}
    for index, result in stream:
        if not isinstance(result, torch.Tensor):
            raise result
        results[index] = result
    return [results[index] for index in range(len(results))]


def model_device(model: MiMoAudioTokenizerModel, part: torch.nn.Module | None) -> torch.device:
    """Where a part of the model runs. Weights that accelerate has offloaded are on "meta" and run where others are."""
    weights = itertools.chain(model.parameters() if part is None else part.parameters(), model.parameters())
    return next((weight.device for weight in weights if not weight.is_meta), torch.device("cpu"))
