# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Codes to audio while they are generated: streams, and what of their audio is given out."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from ..inference import check_codes, check_count, crossfade, decode_packed, model_device
from ..modeling_mimo_audio_tokenizer import MiMoAudioTokenizerModel
from .cached_decoder import CachedDecoder, Chunk, group_by


# What `StreamingDecoder.low_latency` chooses; docs/streaming.md says from which measurements.
LOW_LATENCY: Mapping[str, Any] = MappingProxyType(
    {
        "left_context": 250,
        "right_context": 5,
        "chunk_frames": 5,
        "crossfade_samples": 240,
        "cached": True,
        "vocoder_context": 40,
    }
)


def _low_latency_but_for(changes: Mapping[str, Any]) -> dict[str, Any]:
    """`LOW_LATENCY` with changes, and with what they leave of the options that depend on them."""
    options = {**LOW_LATENCY, **changes}
    right_context = check_count("right_context", options["right_context"], 0)
    cached = options["cached"] and options["chunk_frames"] is not None
    dependent = {
        "left_context": max(LOW_LATENCY["left_context"], right_context),
        "crossfade_samples": LOW_LATENCY["crossfade_samples"] if right_context else 0,
        "cached": cached,
        "vocoder_context": max(LOW_LATENCY["vocoder_context"], right_context) if cached else None,
    }
    return {**options, **dependent, **changes}  # what was asked for stays, and is refused where it cannot be


@dataclass
class _Stream:
    """One stream of codes on its way to audio. Frames are those of codes, counted from the stream's beginning."""

    row: int  # in the caches
    opened_for: int | None = None  # codebooks
    num_quantizers: int | None = None  # of the codes that it has had
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
        right_context = check_count("right_context", right_context, 0)
        left_context = check_count("left_context", left_context, right_context, "right_context")
        capacity = check_count("capacity", capacity, 1)
        if chunk_frames is not None:
            chunk_frames = check_count("chunk_frames", chunk_frames, 1)
        most = model.config.samples_per_frame if right_context else 0
        crossfade_samples = check_count("crossfade_samples", crossfade_samples, 0)
        if crossfade_samples > most:
            raise ValueError(f"crossfade_samples={crossfade_samples}; accepted: 0 to {most}")
        if cached and chunk_frames is None:
            raise ValueError("cached=True without chunk_frames; accepted: both, or neither")
        if vocoder_context is not None:
            vocoder_context = check_count("vocoder_context", vocoder_context, right_context, "right_context")
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
        self._cache: CachedDecoder | None = None
        if cached:
            contexts = (left_context, right_context, chunk_frames or 1, vocoder_context)
            device = model_device(model, model.decoder)
            self._cache = CachedDecoder(model, model.decoder, device, capacity, *contexts)

    @classmethod
    def low_latency(cls, model: MiMoAudioTokenizerModel, **changes: Any) -> StreamingDecoderPool:
        """With the options of `LOW_LATENCY`, but for these changes: first audio after 0.4 s of codes.

        Options that depend on a changed one and are not given themselves follow it: `chunk_frames=None` is not cached;
        what is not cached has no `vocoder_context`, and what has no `right_context` no crossfade; no context is
        shorter than `right_context`.
        """
        return cls(model, **_low_latency_but_for(changes))

    @property
    def streams(self) -> list[int]:
        """The streams that are open."""
        return list(self._streams)

    @property
    def first_audio_frames(self) -> int:
        """Frames that a stream gives its first audio after, where it does not end before, and they come one by one."""
        if self.cached:
            return self._first_chunk
        chunk = self.chunk_frames or 1
        return (self.right_context // chunk + 1) * chunk

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
        """Begins a stream anew: as it was when it was opened, for as many codebooks as then."""
        cleared = self._clear(stream)
        self._streams[stream] = _Stream(cleared.row, cleared.opened_for)

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
                codebooks than before, `last` streams that are not in `codes`. The message names the stream. Codes that
                are no mapping, `last` that is no collection.
            RuntimeError: a stream that has ended, or that an error has broken off; a model that was moved or cast
                after a cached pool was made.

        Everything is checked first: after these errors all streams are as they were. After one in the model's calls
        (out of memory, say) they are, too, unless caches were written to: then the streams that had a part in the
        calls are broken off, and take nothing until they are `reset`.
        """
        if not isinstance(codes, Mapping):
            raise ValueError(f"codes is a {type(codes).__name__}; accepted: a mapping of streams to their codes")
        checked = {name: self._check(name, chunk) for name, chunk in codes.items()}
        ending = _names("last", last)
        if unknown := [name for name in ending if name not in checked]:
            raise ValueError(f"last names {unknown}; accepted: streams that codes are given for")
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
        names = _names("streams", streams)
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
        # A copy: they may wait, and the caller may write its next ones to the same memory.
        chunk = check_codes(self.model, codes, f"codes of stream {name}").to("cpu", copy=True)
        accepted = stream.num_quantizers or stream.opened_for
        if accepted not in (None, chunk.shape[1]):
            raise ValueError(
                f"codes of stream {name} are of {chunk.shape[1]} codebooks; accepted: {accepted}, as before"
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
            return self._first_chunk
        return self.chunk_frames

    @property
    def _first_chunk(self) -> int:
        """Frames of a cached stream's first chunk.

        As many as are needed for audio: statistics of fewer would stay with their keys and values.
        """
        return (self.chunk_frames or 0) + self.right_context

    @torch.inference_mode()
    def _run(self, streams: list[_Stream]) -> list[torch.Tensor]:
        """The next chunk of each stream through the decoder; the samples that they give out."""
        chunks, rests = [], []
        for stream in streams:
            codes = torch.cat([torch.empty(0, stream.num_quantizers or 1, dtype=torch.long), *stream.pending])
            size = self._chunk_of(stream) or len(codes)
            # A cache has the end of a full chunk's audio from a run of its own, whether or not it is known by now that
            # nothing follows: the statistics would be others.
            chunks.append(Chunk(codes[:size], stream.ended and len(codes) < size + (not self.cached)))
            rests.append(codes[size:])
        if self._cache is None:
            decoded = self._decode_again(streams, chunks)
        else:
            decoded = self._cache.decode([stream.row for stream in streams], chunks)
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

    def _decode_again(self, streams: list[_Stream], chunks: list[Chunk]) -> list[torch.Tensor]:
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
        for indices in group_by(running, lambda index: buffers[index].shape[1]):
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


def _names(argument: str, streams: Iterable[int]) -> dict[int, None]:
    """The streams that an argument lists, in order, each once."""
    try:
        return dict.fromkeys(streams)
    except TypeError as error:  # no list, or one of what is no name
        raise ValueError(f"{argument}={streams!r}; accepted: streams, such as [0]") from error


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
        self._stream = self._pool.open(num_quantizers)

    @classmethod
    def low_latency(cls, model: MiMoAudioTokenizerModel, **changes: Any) -> StreamingDecoder:
        """With the options of `LOW_LATENCY`, but for these changes: as [`StreamingDecoderPool.low_latency`]."""
        return cls(model, **_low_latency_but_for(changes))

    @property
    def first_audio_frames(self) -> int:
        """Frames that the first audio comes after, where the stream does not end before, and they come one by one."""
        return self._pool.first_audio_frames

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
        self._pool.reset(self._stream)
