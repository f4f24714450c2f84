# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Codes to audio while they are generated, and audio to codes while it is recorded.

Everything that a stream remembers belongs to the stream, and is bounded (but for encoders that look back without a
bound, see [`StreamingEncoder`]): it may run for days.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from .caching import KeyValueCache, RunningGroupNorm, StreamRows
from .feature_extraction_mimo_audio_tokenizer import MiMoAudioTokenizerFeatureExtractor
from .inference import check_codes, check_waveform, crossfade, decode_packed, encode_packed_features, model_device
from .modeling_mimo_audio_tokenizer import (
    MiMoAudioTokenizerDecoder,
    MiMoAudioTokenizerLayer,
    MiMoAudioTokenizerModel,
    PackedSequences,
)


# What `StreamingDecoder.low_latency` chooses; docs/streaming.md says from which measurements.
LOW_LATENCY: Mapping[str, Any] = {
    "left_context": 250,
    "right_context": 5,
    "chunk_frames": 5,
    "crossfade_samples": 240,
    "cached": True,
    "vocoder_context": 40,
}

# A causal encoder runs at most so many frames of its layers at once (10 s): memory for their attention is bounded.
_MAX_ENCODER_FRAMES = 500


# Seconds of audio that a streaming encoder takes at once: memory for spectrograms is bounded.
_MAX_SECONDS = 60


# --- Decoder ---


@dataclass
class _Stream:
    """One stream of codes on its way to audio. Frames are those of codes, counted from the stream's beginning."""

    row: int  # in the caches
    num_quantizers: int | None = None
    pending: list[torch.Tensor] = field(default_factory=list)  # codes that wait for their chunk to be full
    buffer: torch.Tensor | None = None  # upstream's: codes that the decoder ran on last
    received: int = 0  # frames that the decoder has run on
    emitted: int = 0
    fading: torch.Tensor | None = None  # samples after the emitted ones, to go over from
    ended: bool = False
    broken: bool = False  # by an error after which its caches hold more than it has given out


class StreamingDecoderPool:
    """Decoders of many streams, each at its own position, that share the model's calls.

    Args:
        model: the tokenizer; runs where it is, without gradients.
        left_context: how many frames of codes back the decoder sees.
        right_context: how many frames have to follow on those whose audio is given out: the latency.
        chunk_frames: how many new frames the decoder runs on at a time. Codes wait until there are as many, so that
            the audio does not depend on how they were cut into pushes. None: as upstream, every push is a chunk.
        crossfade_samples: over how many samples the audio of a chunk goes over into that of the next; at most a frame,
            and none without right context. Upstream has none.
        cached: keep keys and values instead of running the decoder again on all that it sees: a chunk costs what a
            chunk costs, whatever the context. What was normalized with the statistics of the stream so far is not
            normalized again with later ones, which is where the results differ. Needs `chunk_frames`.
        vocoder_context: over how many frames of codes before a chunk the vocoder, which looks ahead, runs again in a
            cached decoder; as many as it can see by default.
        capacity: streams that caches have room for at first; there can be more.

    Raises:
        ValueError: a model without decoder, or options that are out of range or do not go together.

    Two streams never touch: a stream gives what it gives alone, to rounding. Not to be used by two threads at once.
    """

    def __init__(
        self,
        model: MiMoAudioTokenizerModel,
        *,
        left_context: int = 250,
        right_context: int = 40,
        chunk_frames: int | None = None,
        crossfade_samples: int = 0,
        cached: bool = False,
        vocoder_context: int | None = None,
        capacity: int = 1,
    ) -> None:
        if model.decoder is None:
            name = model.config.name_or_path or "this model"
            raise ValueError(f"{name} holds an encoder only; accepted: a model with a decoder")
        right_context = _check_count("right_context", right_context, 0)
        left_context = _check_count("left_context", left_context, right_context, "right_context")
        capacity = _check_count("capacity", capacity, 1)
        if chunk_frames is not None:
            chunk_frames = _check_count("chunk_frames", chunk_frames, 1)
        most = model.config.samples_per_frame if right_context else 0
        crossfade_samples = _check_count("crossfade_samples", crossfade_samples, 0)
        if crossfade_samples > most:
            raise ValueError(f"crossfade_samples={crossfade_samples}; accepted: 0 to {most}")
        if cached and chunk_frames is None:
            raise ValueError("cached=True without chunk_frames; accepted: both, or neither")
        if vocoder_context is not None:
            vocoder_context = _check_count("vocoder_context", vocoder_context, right_context, "right_context")
            if not cached:
                raise ValueError(f"vocoder_context={vocoder_context} without cached=True; accepted: both, or neither")
        self.model = model
        self.left_context = left_context
        self.right_context = right_context
        self.chunk_frames = chunk_frames
        self.crossfade_samples = crossfade_samples
        self.cached = cached
        self._samples_per_frame = model.config.samples_per_frame
        self._streams: dict[int, _Stream] = {}
        self._free = [*range(capacity)]
        self._opened = 0
        self._cache: _DecoderCache | None = None
        if cached:
            contexts = (left_context, right_context, chunk_frames or 1, vocoder_context)
            device = model_device(model, model.decoder)
            self._cache = _DecoderCache(model, model.decoder, device, capacity, *contexts)

    @classmethod
    def low_latency(cls, model: MiMoAudioTokenizerModel, **changes: Any) -> StreamingDecoderPool:
        """With the options of `LOW_LATENCY`, but for these changes: first audio after 0.4 s of codes."""
        return cls(model, **{**LOW_LATENCY, **changes})

    @property
    def streams(self) -> list[int]:
        """The streams that are open."""
        return list(self._streams)

    def open(self, num_quantizers: int | None = None) -> int:
        """A new stream.

        Args:
            num_quantizers: codebooks that its codes have; by default as many as its first ones.

        Returns:
            What it is called here.
        """
        if num_quantizers is not None:
            self.model.check_num_quantizers(num_quantizers)
        if not self._free:
            rows = len(self._streams)
            if self._cache is not None:
                self._cache.add_rows(rows)
            self._free = [*range(rows, 2 * rows)]
        stream, self._opened = self._opened, self._opened + 1
        # The lowest row: rows from the first one on need not be gathered.
        self._streams[stream] = _Stream(heapq.heappop(self._free), num_quantizers)
        return stream

    def close(self, stream: int) -> None:
        """Forgets a stream, whether it has ended or not."""
        heapq.heappush(self._free, self._clear(stream).row)
        del self._streams[stream]

    def reset(self, stream: int) -> None:
        """Begins a stream anew: as one that was just opened, for any number of codebooks."""
        self._streams[stream] = _Stream(self._clear(stream).row)

    def push(
        self, codes: Mapping[int, torch.Tensor | np.ndarray], last: Collection[int] = ()
    ) -> dict[int, torch.Tensor]:
        """Gives codes to some of the streams, and gives out their audio as far as it is known.

        Args:
            codes: for each stream its next frames (frames, codebooks), integers; none are allowed.
            last: which of these streams end with them and are given out to their end. With `chunk_frames` that is the
                audio that `flush` after it gives, without a run for it; only a cached stream that ends with a full
                chunk takes one more. Without, `flush` is an empty chunk, and the audio's last frames see less.

        Returns:
            For each stream in `codes` its next samples (samples,), float32 on the CPU, which may be none.

        Raises:
            ValueError: a stream that is not open, codes of wrong shape or dtype, out of range, or of another number of
                codebooks than before, `last` streams that are not in `codes`. The message names the stream.
            RuntimeError: a stream that has ended, or that an error has broken off; a model that was moved or cast
                after a cached pool was made.

        Everything is checked first: after these errors all streams are as they were. After one in the model's calls
        (out of memory, say) they are, too, unless caches were written to: then the streams that had a part in the
        calls are broken off, and take nothing until they are `reset`.
        """
        checked = {name: self._check(name, chunk) for name, chunk in codes.items()}
        ending = set(last)
        if unknown := ending - set(codes):
            raise ValueError(f"last names {sorted(unknown)}; accepted: streams that codes are given for")
        if self._cache is not None:
            self._cache.check()
        before = {name: replace(stream, pending=[*stream.pending]) for name, stream in self._streams.items()}
        audio: dict[int, list[torch.Tensor]] = {name: [] for name in checked}
        ran: set[int] = set()
        try:
            for name, chunk in checked.items():
                stream = self._streams[name]
                if len(chunk):
                    stream.num_quantizers = chunk.shape[1]
                    stream.pending.append(chunk)
                stream.ended = name in ending
            # One chunk of each stream at a time: all chunks together would take memory without bound.
            names = list(checked)
            while names := [name for name in names if self._is_ready(self._streams[name])]:
                ran.update(names)
                for name, samples in zip(names, self._run([self._streams[name] for name in names]), strict=True):
                    audio[name].append(samples)
        except BaseException:
            self._streams = before
            for name in ran:
                before[name].broken = self._cache is not None and self._cache.touched
            raise
        return {name: torch.cat(samples) if samples else torch.empty(0) for name, samples in audio.items()}

    def flush(self, streams: Iterable[int]) -> dict[int, torch.Tensor]:
        """Ends streams: the rest of their audio. As `push` of nothing to all of them, being the last.

        After this they take no more codes until they are `reset`.
        """
        names = list(streams)
        return self.push({name: torch.empty(0, 1, dtype=torch.long) for name in names}, last=names)

    # --- Inside ---

    def _stream(self, name: int) -> _Stream:
        if name not in self._streams:
            raise ValueError(f"stream {name!r} is not open; accepted: {', '.join(map(str, self._streams)) or 'none'}")
        return self._streams[name]

    def _clear(self, name: int) -> _Stream:
        stream = self._stream(name)
        if self._cache is not None:
            self._cache.reset(stream.row)
        return stream

    def _check(self, name: int, codes: Any) -> torch.Tensor:
        """New codes of a stream (frames, codebooks), int64 on the CPU."""
        stream = self._stream(name)
        if stream.broken:
            raise RuntimeError(f"stream {name} was broken off by an error in a call; accepted: codes after a reset")
        if stream.ended:
            raise RuntimeError(f"stream {name} has ended; accepted: codes after a reset")
        shape = tuple(getattr(codes, "shape", ()))
        if len(shape) == 2 and shape[0] == 0:
            return torch.empty(0, shape[1], dtype=torch.long)
        chunk = check_codes(self.model, codes, f"codes of stream {name}").cpu()
        if stream.num_quantizers not in (None, chunk.shape[1]):
            raise ValueError(
                f"codes of stream {name} are of {chunk.shape[1]} codebooks; "
                f"accepted: {stream.num_quantizers}, as before"
            )
        return chunk

    def _is_ready(self, stream: _Stream) -> bool:
        """Whether there is something for the decoder to run on, or audio that it has not given out."""
        waiting = sum(map(len, stream.pending))
        if stream.ended:
            return waiting + stream.received > stream.emitted
        return waiting >= (self._chunk_of(stream) or 1)

    def _chunk_of(self, stream: _Stream) -> int | None:
        """How many frames a stream's next chunk has; None: as many as there are."""
        if self.cached and stream.received == 0:
            # Of as many as are needed for audio: statistics of fewer would stay with their keys and values.
            return (self.chunk_frames or 0) + self.right_context
        return self.chunk_frames

    @torch.inference_mode()
    def _run(self, streams: list[_Stream]) -> list[torch.Tensor]:
        """The next chunk of each stream through the decoder; the samples that they give out."""
        chunks, rests = [], []
        for stream in streams:
            codes = torch.cat([torch.empty(0, stream.num_quantizers or 1, dtype=torch.long), *stream.pending])
            size = self._chunk_of(stream) or len(codes)
            # A cache has the end of a full chunk's audio from a run of its own, whether or not it is known by now that
            # nothing follows: the statistics would be others.
            chunks.append(_Chunk(codes[:size], stream.ended and len(codes) < size + (not self.cached)))
            rests.append(codes[size:])
        decoded = (self._decode_again if self._cache is None else self._cache.decode)(streams, chunks)
        wanted = []
        for stream, chunk, rest, samples in zip(streams, chunks, rests, decoded, strict=True):
            stream.pending = [rest] if len(rest) else []
            stream.received += len(chunk.codes)
            wanted.append(self._wanted(stream, samples, chunk.is_last))
        # The only time that a GPU is waited for.
        on_cpu = torch.cat(wanted).cpu().split([*map(len, wanted)])
        return [
            self._emit(stream, samples, chunk.is_last)
            for stream, chunk, samples in zip(streams, chunks, on_cpu, strict=True)
        ]

    def _decode_again(self, streams: list[_Stream], chunks: list[_Chunk]) -> list[torch.Tensor]:
        """Upstream's way: the decoder runs on everything that it sees. The samples of that, for each stream."""
        buffers = []
        for stream, chunk in zip(streams, chunks, strict=True):
            seen = chunk.codes[:0] if stream.buffer is None else stream.buffer
            # Where nothing follows on a full chunk, what it saw is seen again, for the rest of its audio.
            if len(chunk.codes) or self.chunk_frames is None:
                seen = torch.cat([seen[max(0, len(seen) - self.left_context) :], chunk.codes])
            buffers.append(seen)
        device = model_device(self.model, self.model.decoder)
        decoded = [torch.empty(0, device=device)] * len(streams)
        # Those that cannot give anything yet need not run.
        running = [
            index
            for index, (buffer, chunk) in enumerate(zip(buffers, chunks, strict=True))
            if chunk.is_last or len(buffer) > self.right_context
        ]
        for indices in _groups(running, lambda index: buffers[index].shape[1]):
            lengths = [len(buffers[index]) for index in indices]
            packed = torch.cat([buffers[index] for index in indices]).to(device)
            sizes = [length * self._samples_per_frame for length in lengths]
            clips = decode_packed(self.model, packed, lengths).split(sizes)
            for index, clip in zip(indices, clips, strict=True):
                decoded[index] = clip
        for stream, buffer in zip(streams, buffers, strict=True):
            stream.buffer = buffer
        return decoded

    def _stop(self, stream: _Stream, is_last: bool) -> int:
        """The frame to which a stream's audio is given out."""
        return max(stream.emitted, stream.received - (0 if is_last else self.right_context))

    def _wanted(self, stream: _Stream, samples: torch.Tensor, is_last: bool) -> torch.Tensor:
        """Of samples that reach to the last frame received those to be given out, and those to go over from."""
        stop = self._stop(stream, is_last)
        if stop == stream.emitted:
            return samples[:0]
        start, end = (
            len(samples) - (stream.received - frame) * self._samples_per_frame for frame in (stream.emitted, stop)
        )
        return samples[start : end if is_last else end + self.crossfade_samples]

    def _emit(self, stream: _Stream, samples: torch.Tensor, is_last: bool) -> torch.Tensor:
        """What is given out of the samples that are wanted; the rest is kept to go over from."""
        stop = self._stop(stream, is_last)
        if stop == stream.emitted:
            return torch.empty(0)
        length = (stop - stream.emitted) * self._samples_per_frame
        audio = samples[:length].clone()
        if stream.fading is not None:
            audio[: len(stream.fading)] = crossfade(stream.fading, audio)
        stream.fading = samples[length:].clone() if len(samples) > length else None
        stream.emitted = stop
        return audio


class StreamingDecoder:
    """The decoder of one stream of codes, as they are generated.

    By default exactly upstream's streaming decoder: every `push` is a chunk, the decoder runs again on all that it
    sees, and audio comes 40 frames (1.6 s) after its codes. With `chunk_frames` the audio does not depend on how codes
    are cut into pushes; [`low_latency`] gives audio after 0.4 s and costs less.

    Args:
        model, left_context, right_context, chunk_frames, crossfade_samples, cached, vocoder_context:
            as in [`StreamingDecoderPool`].
        num_quantizers: codebooks that the codes have; by default as many as the first ones.

    Raises:
        ValueError: as [`StreamingDecoderPool`]; more codebooks than the model has.
    """

    def __init__(
        self,
        model: MiMoAudioTokenizerModel,
        *,
        left_context: int = 250,
        right_context: int = 40,
        num_quantizers: int | None = None,
        chunk_frames: int | None = None,
        crossfade_samples: int = 0,
        cached: bool = False,
        vocoder_context: int | None = None,
    ) -> None:
        self._pool = StreamingDecoderPool(
            model,
            left_context=left_context,
            right_context=right_context,
            chunk_frames=chunk_frames,
            crossfade_samples=crossfade_samples,
            cached=cached,
            vocoder_context=vocoder_context,
        )
        self._num_quantizers = num_quantizers
        self._stream = self._pool.open(num_quantizers)

    @classmethod
    def low_latency(cls, model: MiMoAudioTokenizerModel, **changes: Any) -> StreamingDecoder:
        """With the options of `LOW_LATENCY`, but for these changes: first audio after 0.4 s of codes."""
        return cls(model, **{**LOW_LATENCY, **changes})

    def push(self, codes: torch.Tensor | np.ndarray, last: bool = False) -> torch.Tensor:
        """Takes the next codes and gives out the audio that is known by now.

        Args:
            codes: (frames, codebooks), integers; no frames are allowed.
            last: whether they are the last ones, so that all audio is given out; as upstream's `last_chunk`.

        Returns:
            The next samples (samples,), float32 on the CPU, which may be none.

        Raises:
            ValueError: codes of wrong shape or dtype, out of range, or of another number of codebooks than before;
                the stream is as it was.
            RuntimeError: the stream has ended.
        """
        return self._pool.push({self._stream: codes}, last=[self._stream] if last else [])[self._stream]

    def flush(self) -> torch.Tensor:
        """Ends the stream: the rest of its audio. After this it takes no more codes until it is `reset`."""
        return self._pool.flush([self._stream])[self._stream]

    def reset(self) -> None:
        """Begins anew, whether the stream has ended or not."""
        self._pool.close(self._stream)
        self._stream = self._pool.open(self._num_quantizers)


@dataclass(frozen=True)
class _Chunk:
    """Codes (frames, codebooks) that a decoder runs on next, which may be none, and whether the stream ends there."""

    codes: torch.Tensor
    is_last: bool


class _DecoderCache:
    """The decoder on new frames only.

    Decoder layers see their own earlier keys and values. The vocoder, which looks ahead, runs again over what it sees:
    it is small. Group norms have the statistics of the stream up to now, the second one for all that the vocoder sees.
    """

    def __init__(
        self,
        model: MiMoAudioTokenizerModel,
        decoder: MiMoAudioTokenizerDecoder,
        device: torch.device,
        rows: int,
        left_context: int,
        right_context: int,
        chunk_frames: int,
        vocoder_context: int | None,
    ) -> None:
        if any(weight.is_meta for weight in decoder.parameters()):
            raise ValueError("cached=True with offloaded weights; accepted: a model whose weights are on its devices")
        config = model.config
        self.model = model
        self.decoder = decoder
        self.device = device
        self.right_context = right_context
        self.layers = KeyValueCache(
            decoder,
            rows=rows,
            max_frames=(chunk_frames + right_context) * config.avg_pooler,
            limit=left_context * config.avg_pooler,
            device=device,
            dtype=decoder.dconv1.conv.weight.dtype,
        )
        self.norm1, self.norm2 = (
            RunningGroupNorm(each.norm, rows=rows, device=device) for each in (decoder.dconv1, decoder.dconv2)
        )
        dtype = decoder.dconv2.conv.weight.dtype
        # The last frames of the layers, whose products the transposed convolution adds to the next ones': zeros before
        # the first frame, as if there were none.
        overlap = -(-config.decoder_kernel_size // config.decoder_stride_size) - 1
        self.tails = torch.zeros(rows, overlap, config.d_model, device=device, dtype=dtype)
        # The last frames that the vocoder takes, before their norm, and what is no stream's before a stream's first.
        self.mels_per_code = config.avg_pooler * config.decoder_stride_size
        context = left_context if vocoder_context is None else min(left_context, vocoder_context)
        if all(left >= 0 for left, _ in decoder.vocoder.windows):
            reach = sum(cast(MiMoAudioTokenizerLayer, layer).self_attn.window[0] for layer in decoder.vocoder.layers)
            reach += config.nfft // config.hop_length  # the inverse STFT's
            context = min(context, right_context - (-reach // self.mels_per_code))
        self.mels = torch.zeros(rows, context * self.mels_per_code, config.n_mels, device=device, dtype=dtype)
        self._programs: dict[tuple[int, int, int, bool], _Program] = {}
        self._seen: set[tuple[int, int, int, bool]] = set()
        self._recording: Any = None  # what programs were recorded by
        self.touched = False  # since the last `check`

    def check(self) -> None:
        """Raises RuntimeError where what is kept is not what the decoder takes."""
        self.touched = False
        weight = self.decoder.dconv1.conv.weight
        if (weight.dtype, weight.device) != (self.tails.dtype, self.tails.device):
            raise RuntimeError(
                f"the model was moved or cast to {weight.dtype} on {weight.device} after a cached decoder was made "
                f"for {self.tails.dtype} on {self.tails.device}; accepted: a new decoder"
            )

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that is remembered."""
        yield from self.layers.tensors()
        for norm in (self.norm1, self.norm2):
            yield from (norm.mean, norm.variance)
        yield from (self.tails, self.mels)

    def reset(self, row: int) -> None:
        with torch.inference_mode():
            for part in (self.layers, self.norm1, self.norm2):
                part.reset(row)
            self.tails[row] = self.mels[row] = 0

    def add_rows(self, rows: int) -> None:
        self._forget_programs()  # which write to what is replaced
        with torch.inference_mode():
            for part in (self.layers, self.norm1, self.norm2):
                part.add_rows(rows)
            self.tails, self.mels = (
                torch.cat([each, each.new_zeros(rows, *each.shape[1:])]) for each in (self.tails, self.mels)
            )

    def _forget_programs(self) -> None:
        self._programs.clear()
        self._seen.clear()

    def decode(self, streams: list[_Stream], chunks: list[_Chunk]) -> list[torch.Tensor]:
        """Samples of the last frames of each stream, with the chunks'."""
        decoded: list[torch.Tensor] = [self.norm1.mean[:0]] * len(streams)
        # What is alike runs at once.
        for indices in _groups(range(len(streams)), lambda i: (chunks[i].codes.shape, chunks[i].is_last)):
            indices.sort(key=lambda index: streams[index].row)
            rows = [streams[index].row for index in indices]
            codes = torch.cat([chunks[index].codes for index in indices])
            is_last = chunks[indices[0]].is_last
            frames = len(codes) // len(rows) * self.model.config.avg_pooler
            for index, samples in zip(indices, self._run(codes, rows, is_last), strict=False):
                decoded[index] = samples
            self.layers.advance(rows, frames)
        return decoded

    def _run(self, codes: torch.Tensor, rows: list[int], is_last: bool) -> torch.Tensor:
        """[`_step`], as a CUDA graph where the model runs as graphs and a call of the size comes again.

        As many graphs are kept as there are sizes: of chunks that are not the last, in powers of two of streams.
        """
        stream_rows = self.layers.rows(rows)
        graphs = self.model.graphs
        recording = None if graphs is None else graphs.recording
        if self._recording is not recording:
            self._forget_programs()
            self._recording = recording
        if graphs is None or not graphs.takes([]) or is_last or not self.layers.is_bounded:
            return self._step(codes.to(self.device), stream_rows, is_last)
        graphs.check_weights()
        self.touched = True
        # Some of the streams twice over, which then do the same twice.
        missing = (1 << (len(rows) - 1).bit_length()) - len(rows)
        filled = [*rows, *[rows[-1]] * missing]
        frames = len(codes) // len(rows)
        codes = torch.cat([codes, codes[-frames:].repeat(missing, 1)])
        table = self.layers.table(filled)
        key = (len(filled), *codes.shape, stream_rows.are_first and not missing)
        program = self._programs.get(key)
        if program is not None:
            program.codes.copy_(codes)
            program.table.copy_(table)
            return program.replay()
        inputs = codes.to(self.device), table.to(self.device)
        body = partial(self._step, inputs[0], StreamRows(inputs[1], key[-1], stream_rows.end), False)
        if key not in self._seen:
            self._seen.add(key)
            return body()
        samples, replay = graphs.record(body)
        self._programs[key] = _Program(*inputs, replay)
        return samples

    def _step(self, codes: torch.Tensor, rows: StreamRows, is_last: bool) -> torch.Tensor:
        """New codes (streams * frames, codebooks), which may be none, to samples (streams, samples).

        The samples reach to the end of the new frames, from `right_context` frames before them.
        """
        config, decoder, streams = self.model.config, self.decoder, len(rows)
        length = len(codes) // streams
        # Everything that is kept is written at the end: before that, an error leaves all as it was.
        mean2, variance2 = rows.take(self.norm2.mean), rows.take(self.norm2.variance)
        window = rows.take(self.mels)
        if length:
            hidden_states, mean1, variance1 = self._layers(codes, rows)
            mel, tails = self._upsample(hidden_states.unflatten(0, (streams, -1)), rows)
            # A whole clip's statistics are over what is cut from its end, too.
            kept = length * self.mels_per_code
            counted = mel if is_last else mel[:, :kept]
            mean2, variance2 = self.norm2.include(counted, rows, rows.positions * config.decoder_stride_size)
            window = torch.cat([window, mel[:, :kept]], dim=1)

        frames = window.shape[1] // self.mels_per_code
        known = (rows.positions // config.avg_pooler + length).clamp(max=frames)
        # What is before a stream's first frame is a clip of its own, which nobody hears.
        levels = zip(
            decoder.level_lengths(torch.stack([frames - known, known], dim=1).flatten()),
            decoder.level_lengths(frames * streams),
            decoder.level_lengths(frames),
            strict=True,
        )
        code, frame, _, mel_frame, block = (PackedSequences.from_tensor(*level) for level in levels)
        layout = decoder.layout_of(code, frame, mel_frame, mel_frame, block)  # nothing has to be cut any more
        backend = self.model._attention_backend(self.device)
        normed = self.norm2.normalize(window, mean2, variance2)
        samples = decoder.vocoder(normed.flatten(0, 1), layout, backend).view(streams, -1)

        if length:
            self.touched = True
            self.norm1.keep(rows, mean1, variance1)
            self.norm2.keep(rows, mean2, variance2)
            self.tails[rows.index] = tails
            self.mels[rows.index] = window[:, kept:]
        return samples[:, -(length + self.right_context) * config.samples_per_frame :]

    def _layers(self, codes: torch.Tensor, rows: StreamRows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes to what the layers give (streams * frames, dim); mean and variance (streams,) of the first norm."""
        decoder, streams, dtype = self.decoder, len(rows), self.tails.dtype
        length = len(codes) // streams
        features = self.model.encoder.quantizer.decode(codes, dtype).to(self.device, dtype)
        code_lengths = rows.index.new_full((streams,), length)
        pooler = self.model.config.avg_pooler
        clips = PackedSequences.from_tensor(code_lengths, len(codes), length)
        frames = PackedSequences.from_tensor(code_lengths * pooler, len(codes) * pooler, length * pooler)
        hidden_states = decoder.dconv1.conv(features, clips.conv_transpose_index(frames, pooler, pooler))
        hidden_states = hidden_states.unflatten(0, (streams, -1))
        mean, variance = self.norm1.include(hidden_states, rows, rows.positions)
        hidden_states = self.norm1.normalize(hidden_states, mean, variance)
        return self.layers.run(hidden_states.flatten(0, 1), rows), mean, variance

    def _upsample(self, hidden_states: torch.Tensor, rows: StreamRows) -> tuple[torch.Tensor, torch.Tensor]:
        """(streams, frames, dim) to mel frames (streams, stride * frames + kernel - stride, n_mels) and next tails."""
        config, streams = self.model.config, len(rows)
        kernel, stride, overlap = config.decoder_kernel_size, config.decoder_stride_size, self.tails.shape[1]
        tailed = torch.cat([rows.take(self.tails), hidden_states], dim=1)
        inputs, outputs = (
            PackedSequences.from_tensor(rows.index.new_full((streams,), length), streams * length, length)
            for length in (tailed.shape[1], (tailed.shape[1] - 1) * stride + kernel)
        )
        index = inputs.conv_transpose_index(outputs, kernel, stride)
        mel = self.decoder.dconv2.conv(tailed.flatten(0, 1), index).unflatten(0, (streams, -1))
        return mel[:, overlap * stride :], tailed[:, tailed.shape[1] - overlap :]


@dataclass(frozen=True)
class _Program:
    """A recorded step, and where it reads from."""

    codes: torch.Tensor
    table: torch.Tensor
    replay: Callable[[], torch.Tensor]


# --- Encoder ---


class StreamingEncoder:
    """The encoder of one stream of audio, as it is recorded.

    An encoder whose layers never look ahead (those of MiMo-V2) runs on new frames only and gives the codes of the
    whole recording, each 20 ms after the end of its 40 ms: all of them in float32, nearly all in half precision, where
    sums are rounded in another order. (Past 60 s they are not those of [`encode_waveforms`], which cuts recordings
    into pieces of 60 s. A stream that is to give those ends at each border, and is reset.) An encoder whose layers
    look ahead (the released one) runs again and again over windows that overlap, and gives nearly those codes;
    docs/streaming.md has the agreement.

    Args:
        model: the tokenizer; runs where it is, without gradients.
        num_quantizers: how many codebooks to use, from the first; all by default.
        left_context: how many frames of codes back the encoder sees. Where layers do not look ahead, None is
            everything, in memory that grows by 50 frames of keys and values of every layer without a window a second;
            this bounds it, and ends the equality with the whole recording's codes. Else None is 250.
        right_context: how many frames of codes an encoder sees that looks ahead: the latency. None is 25.
        chunk_frames: how many new frames of codes such an encoder gives out at a time, which is how often it runs.
            None is 25.

    Raises:
        ValueError: options that are out of range, or the last two for an encoder that does not look ahead.

    Not to be used by two threads at once.
    """

    def __init__(
        self,
        model: MiMoAudioTokenizerModel,
        *,
        num_quantizers: int | None = None,
        left_context: int | None = None,
        right_context: int | None = None,
        chunk_frames: int | None = None,
    ) -> None:
        self._extractor = MiMoAudioTokenizerFeatureExtractor.from_config(model.config)
        self._model = model
        self._num_quantizers = model.check_num_quantizers(num_quantizers)
        if left_context is not None:
            left_context = _check_count("left_context", left_context, 1)
        if right_context is not None:
            right_context = _check_count("right_context", right_context, 0)
        if chunk_frames is not None:
            chunk_frames = _check_count("chunk_frames", chunk_frames, 1)
        self.looks_ahead = self.looks_ahead_in(model)
        if self.looks_ahead:
            left_context = 250 if left_context is None else left_context
            right_context = 25 if right_context is None else right_context
            chunk_frames = 25 if chunk_frames is None else chunk_frames
        elif right_context is not None or chunk_frames is not None:
            raise ValueError(
                f"right_context={right_context}, chunk_frames={chunk_frames} with an encoder that does not look "
                "ahead; accepted: None, it needs neither"
            )
        self.left_context = left_context
        self.right_context = right_context
        self.chunk_frames = chunk_frames
        self.reset()

    @staticmethod
    def looks_ahead_in(model: MiMoAudioTokenizerModel) -> bool:
        """Whether a model's encoder looks ahead, so that the last two options are for it."""
        return any(right != 0 for _, right in model.encoder.windows)

    def reset(self) -> None:
        """Begins anew, whether the stream has ended or not."""
        self._ended = self._broken = False
        self._device = model_device(self._model, self._model.encoder)
        self._dtype = self._model.encoder.conv1.weight.dtype
        self._mel = _StreamingMel(self._extractor, self._device)
        self._encoding: _CausalEncoding | _WindowedEncoding
        if self.looks_ahead:
            contexts = (self.left_context or 0, self.right_context or 0, self.chunk_frames or 1)
            self._encoding = _WindowedEncoding(self._model, self._device, self._num_quantizers, *contexts)
        else:
            self._encoding = _CausalEncoding(self._model, self._device, self._num_quantizers, self.left_context)

    @property
    def look_ahead(self) -> int:
        """Samples that have to follow on the last frame of codes that a `push` gives out."""
        if self.right_context is None:
            return self._extractor.nfft // 2
        samples = self.right_context * self._model.config.samples_per_frame
        return samples + self._extractor.nfft // 2 - self._extractor.hop_length

    def push(self, samples: torch.Tensor | np.ndarray, last: bool = False) -> torch.Tensor:
        """Takes the next samples and gives out the codes that are known by now.

        Args:
            samples: (samples,), mono floats in [-1, 1] at the model's sampling rate, as many as there are.
            last: whether they are the last ones, so that all codes are given out.

        Returns:
            The next codes (frames, num_quantizers), int64 on the CPU, which may be none. A whole stream of N samples
            has as many as `encode_waveforms` gives for them, and none if N is 0.

        Raises:
            ValueError: samples that are not mono, not floating point, NaN or infinite; the stream is as it was.
            RuntimeError: the stream has ended; the model was moved since the stream began, or cast where layers do not
                look ahead; the stream was broken off: an error in the model's calls (out of memory, say) leaves one
                that looks ahead as it was, but others not.
        """
        if self._broken:
            raise RuntimeError("the stream was broken off by an error in a call; accepted: samples after a reset")
        if self._ended:
            raise RuntimeError("the stream has ended; accepted: samples after a reset")
        weight = self._model.encoder.conv1.weight
        made_for = (weight.dtype if self.looks_ahead else self._dtype, self._device)
        if not weight.is_meta and (weight.dtype, weight.device) != made_for:
            raise RuntimeError(
                f"the model was moved or cast to {weight.dtype} on {weight.device} after the stream began with "
                f"{self._dtype} on {self._device}; accepted: samples after a reset"
            )
        if tuple(getattr(samples, "shape", ())) != (0,):
            samples = check_waveform(samples, "samples").float()
        else:
            samples = torch.empty(0)
        pieces = samples.split(_MAX_SECONDS * self._model.config.sampling_rate)
        codes = [torch.empty(0, self._num_quantizers, dtype=torch.long)]
        before = copy(self._mel), copy(self._encoding)
        try:
            with torch.inference_mode():
                for number, piece in enumerate(pieces, start=1):
                    is_last = last and number == len(pieces)
                    codes += [found.cpu() for found in self._encoding.push(self._mel.push(piece, is_last), is_last)]
        except BaseException:
            self._mel, self._encoding = before
            self._broken = not self.looks_ahead  # keys and values may have been written
            raise
        self._ended = last
        return torch.cat(codes)

    def flush(self) -> torch.Tensor:
        """Ends the stream: the rest of its codes. After this it takes no more samples until it is `reset`."""
        return self.push(torch.empty(0), last=True)


class _StreamingMel:
    """Log-mel frames of samples that come in pieces: those of all samples at once."""

    def __init__(self, extractor: MiMoAudioTokenizerFeatureExtractor, device: torch.device) -> None:
        self.extractor = extractor
        self.device = device
        self.samples = torch.empty(0)  # those that later frames still need
        self.received = 0
        self.frames = 0

    def push(self, samples: torch.Tensor, last: bool) -> torch.Tensor:
        """The next frames (frames, n_mels)."""
        extractor = self.extractor
        self.samples = torch.cat([self.samples, samples.cpu()])
        self.received += len(samples)
        # Frame t reaches half a window beyond sample t * hop_length. The first one's mirror image needs a sample more.
        beyond = self.received - extractor.nfft // 2
        stop = beyond // extractor.hop_length + 1 if beyond > 0 else 0
        if last and self.received:
            stop = extractor.num_frames(self.received)
        if stop <= self.frames:
            return torch.empty(0, extractor.feature_size, device=self.device)
        held = self.received - len(self.samples)
        first, end = extractor.samples_of_frames(self.frames, stop, self.received)
        section = self.samples[first - held : end - held].to(self.device)
        skipped = self.frames - first // extractor.hop_length
        mel = extractor.packed_log_mel_spectrogram([section])[skipped : skipped + stop - self.frames]
        self.frames = stop
        needed, _ = extractor.samples_of_frames(stop, stop + 1, self.received)
        self.samples = self.samples[needed - held :].clone()
        return mel


class _CausalEncoding:
    """An encoder that does not look ahead, on new frames only."""

    def __init__(
        self, model: MiMoAudioTokenizerModel, device: torch.device, num_quantizers: int, left_context: int | None
    ) -> None:
        config = model.config
        self.model = model
        self.num_quantizers = num_quantizers
        self.dtype = model.encoder.conv1.weight.dtype
        self.cache = KeyValueCache(
            model.encoder,
            rows=1,
            max_frames=_MAX_ENCODER_FRAMES,
            limit=None if left_context is None else left_context * config.avg_pooler,
            device=device,
            dtype=self.dtype,
        )
        self.mel = torch.empty(0, config.n_mels, device=device, dtype=self.dtype)  # what the convolutions still need
        self.received = 0
        self.frames = 0  # of the layers, done
        self.unpooled = torch.empty(0, config.d_model, device=device, dtype=self.dtype)

    def push(self, mel: torch.Tensor, last: bool) -> Iterator[torch.Tensor]:
        """The next codes (frames, num_quantizers)."""
        encoder, config = self.model.encoder, self.model.config
        kernel, stride = config.kernel_size, config.stride_size
        self.mel = torch.cat([self.mel, mel.to(self.dtype)])
        self.received += len(mel)
        # The second convolution's output n begins at n * stride - 1 of the first one's, and those one before that.
        ahead = 2 * (kernel - 2)
        ready = max(0, (self.received - 1 - ahead) // stride + 1)
        if last and self.received:
            ready = encoder.frame_length(self.received)
        while self.frames < ready:
            stop = min(self.frames + _MAX_ENCODER_FRAMES, ready)
            # From before the first output that is wanted, so that the window's own edge does not reach it.
            first = max(0, self.frames - -(-2 // stride))
            held = self.received - len(self.mel)
            end = self.received if last and stop == ready else (stop - 1) * stride + ahead + 1
            window = self.mel[first * stride - held : end - held]
            layout = encoder.layout([len(window)], window.device)
            hidden_states = encoder.stem(window, layout.conv1_index, layout.conv2_index)
            hidden_states = hidden_states[self.frames - first : stop - first]
            hidden_states = self.cache.run(hidden_states, self.cache.rows([0]), config.encoder_skip_layer_id)
            self.cache.advance([0], stop - self.frames)
            self.frames = stop
            yield self._codes(hidden_states, last and stop == ready)
        kept = max(0, self.frames - -(-2 // stride)) * stride
        self.mel = self.mel[kept - (self.received - len(self.mel)) :].clone()

    def _codes(self, hidden_states: torch.Tensor, last: bool) -> torch.Tensor:
        pooler = self.model.config.avg_pooler
        hidden_states = torch.cat([self.unpooled, hidden_states])
        whole = len(hidden_states) if last else len(hidden_states) // pooler * pooler
        self.unpooled = hidden_states[whole:].clone()
        if not whole:
            return torch.empty(0, self.num_quantizers, dtype=torch.long)
        frames, codes = (
            PackedSequences.from_lengths([length], hidden_states.device) for length in (whole, -(-whole // pooler))
        )
        index = frames.conv_index(codes, pooler, stride=pooler, padding=0)
        features = self.model.encoder.pool(hidden_states[:whole], index)
        return self.model.encoder.quantizer.encode(features, self.num_quantizers, self.dtype)


class _WindowedEncoding:
    """An encoder that looks ahead, over windows of (left, right) frames of codes around the new ones."""

    def __init__(
        self,
        model: MiMoAudioTokenizerModel,
        device: torch.device,
        num_quantizers: int,
        left_context: int,
        right_context: int,
        chunk_frames: int,
    ) -> None:
        self.model = model
        self.num_quantizers = num_quantizers
        self.left_context = left_context
        self.right_context = right_context
        self.chunk_frames = chunk_frames
        self.mels_per_code = model.config.stride_size * model.config.avg_pooler
        self.mel = torch.empty(0, model.config.n_mels, device=device)  # from the window's beginning
        self.received = 0
        self.codes = 0  # done

    def push(self, mel: torch.Tensor, last: bool) -> Iterator[torch.Tensor]:
        """The next codes (frames, num_quantizers)."""
        self.mel = torch.cat([self.mel, mel])
        self.received += len(mel)
        total = self.model.encoder.code_length(self.received) if self.received else 0
        while self.codes < total:
            stop, end = self.codes + self.chunk_frames, self.received
            beyond = stop + self.right_context
            if not last or beyond < total:
                end = beyond * self.mels_per_code
                if end > self.received:
                    return
            else:
                stop = total
            held = self.received - len(self.mel)
            window = self.mel[: end - held]
            codes = encode_packed_features(self.model, window, [len(window)], self.num_quantizers)
            first = held // self.mels_per_code
            yield codes[self.codes - first : stop - first]
            self.codes = stop
            kept = max(0, stop - self.left_context) * self.mels_per_code
            self.mel = self.mel[min(kept - held, len(self.mel)) :].clone()


def _check_count(name: str, value: Any, least: int, why: str = "") -> int:
    try:
        count = operator.index(value)
    except TypeError:
        count = least - 1
    if isinstance(value, bool) or count < least:
        raise ValueError(f"{name}={value!r}; accepted: {least}{f' ({why})' if why else ''} or more, an integer")
    return count


def _groups(indices: Iterable[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    """Indices of the same key together."""
    groups: dict[Hashable, list[int]] = {}
    for index in indices:
        groups.setdefault(key(index), []).append(index)
    return [*groups.values()]
