# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Whole calls as CUDA graphs: an eager call of one clip takes a GPU longer to be told than to run.

A graph has fixed sizes. Totals are therefore rounded up to a bucket's, and what is over is one more clip, the filler:
nothing of any clip's depends on others, so the clips' results are those of their true lengths. Everything about
lengths is computed within the graph, from one small tensor.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
from transformers.utils import logging

from .feature_extraction_mimo_audio_tokenizer import MiMoAudioTokenizerFeatureExtractor
from .modeling_mimo_audio_tokenizer import (
    MiMoAudioTokenizerDecoder,
    MiMoAudioTokenizerModel,
    PackedSequences,
    gather_rows,
    not_finite_error,
)


logger = logging.get_logger(__name__)

# The most audio in a call that is run as a graph: longer ones keep a GPU busy by themselves.
MAX_GRAPH_SECONDS = 420.0
# Graphs that are kept, those used last.
MAX_GRAPHS = 128
# Buckets an octave, as powers of two: of small calls, whose time their size hardly changes, and of large ones, which
# pay for what is over. Large ones are batches of some duration, so that few of their buckets are used.
SMALL_BUCKETS, LARGE_BUCKETS = 3, 5
LARGE_SECONDS = 40.0
SMALLEST_BUCKET_SECONDS = 0.32


Outputs = tuple[torch.Tensor, torch.Tensor]
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Shape:
    """What a graph is recorded for."""

    inputs: str  # "waveforms", "features" or "codes"
    clips: int
    total: int  # mel or code frames
    longest: int
    num_quantizers: int


@dataclass
class _Program:
    inputs: torch.Tensor
    lengths: torch.Tensor
    run: Callable[[], Outputs]


def record_graph(
    body: Callable[[], Result], device: torch.device, pool: Any, stream: torch.cuda.Stream
) -> tuple[Result, Callable[[], Result]]:
    """Runs a computation and records it.

    Args:
        body: only queues work on the device, on the same tensors each time.
        device: a CUDA device.
        pool: of memory, shared with other graphs of which one is run after the other.
        stream: to record in.

    Returns:
        What the run gave, and what runs it again; the results of that are overwritten by the next one.
    """
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        first = body()  # kernels are built and libraries set up before anything is recorded
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on to use the GPU.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            outputs = body()
    torch.cuda.current_stream(device).wait_stream(stream)

    def replay() -> Result:
        graph.replay()
        return outputs

    return first, replay


class GraphRunner:
    """Runs `encode` and `decode` of a model by CUDA graphs, each recorded when its size comes the second time.

    Results are on the model's device and in the current stream. Calls from several threads take turns.

    Args:
        model: frozen, all of it on one CUDA device. It must not be moved, cast or trained afterwards.
        capture: whether to record graphs. Without them calls have the same sizes and run as usual, anywhere.
    """

    def __init__(self, model: MiMoAudioTokenizerModel, capture: bool = True) -> None:
        self._model = model
        self._extractor = MiMoAudioTokenizerFeatureExtractor.from_config(model.config)
        self._weight = model.encoder.conv1.weight
        self._data_ptr = self._weight.data_ptr()
        self._device = self._weight.device
        self._programs: OrderedDict[_Shape, _Program] = OrderedDict()
        self._seen: set[_Shape] = set()
        self._pool = torch.cuda.graph_pool_handle() if capture else None
        self._stream = torch.cuda.Stream(self._device) if capture else None
        self._done = torch.cuda.Event() if capture else None
        self._lock = threading.Lock()
        self._max_frames = int(MAX_GRAPH_SECONDS * model.config.sampling_rate / model.config.hop_length)
        self.recorded = 0  # graphs, so far

    def __deepcopy__(self, memo: object) -> None:
        """Copies of the model have weights of their own, and no graphs."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def takes(self, lengths: Sequence[int]) -> bool:
        """Whether clips of these lengths, in mel frames, may be run."""
        return sum(lengths) <= self._max_frames

    def takes_codes(self, lengths: Sequence[int]) -> bool:
        """Whether clips of these lengths, in code frames, may be run."""
        return sum(lengths) * self._mel_frames_per_code <= self._max_frames

    def encode_waveforms(self, samples: torch.Tensor, lengths: Sequence[int], num_quantizers: int) -> torch.Tensor:
        """Samples (total_samples,), clips end to end, and their lengths to codes (total_codes, num_quantizers)."""
        frames = [self._extractor.num_frames(length) for length in lengths]
        codes, _ = self._run("waveforms", samples, lengths, frames, num_quantizers)
        return codes[: sum(self._model.encoder.code_lengths(frames))].clone()

    def encode(self, input_features: torch.Tensor, lengths: Sequence[int], num_quantizers: int) -> torch.Tensor:
        """Log-mel frames (total_frames, n_mels) to codes (total_codes, num_quantizers).

        Raises:
            ValueError: a clip holds NaN or infinity.
        """
        codes, broken = self._run("features", input_features, lengths, lengths, num_quantizers)
        codes = codes[: sum(self._model.encoder.code_lengths(lengths))].clone()
        if broken[: len(lengths)].any():
            raise not_finite_error(int(broken.nonzero()[0]))
        return codes

    def decode(self, audio_codes: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Codes (total_codes, num_quantizers) to samples (total_samples,)."""
        samples, _ = self._run("codes", audio_codes, lengths, lengths, audio_codes.shape[1])
        return samples[: sum(lengths) * self._model.config.samples_per_frame].clone()

    def encode_padded(
        self, input_features: torch.Tensor, lengths: Sequence[int], num_quantizers: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-mels (clips, n_mels, frames) to codes (clips, num_quantizers, code_frames) and their mask."""
        packed = torch.cat([clip[:, :length].t() for clip, length in zip(input_features, lengths, strict=True)])
        codes = self.encode(packed, lengths, num_quantizers)
        padded, mask = self._pad(codes, self._model.encoder.code_lengths(lengths))
        return padded.transpose(1, 2).contiguous(), mask

    def decode_padded(self, audio_codes: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Codes (clips, num_quantizers, code_frames) to waveforms (clips, 1, samples)."""
        packed = torch.cat([clip[:, :length].t() for clip, length in zip(audio_codes, lengths, strict=True)])
        samples = self.decode(packed, lengths).view(sum(lengths), -1)
        return self._pad(samples, lengths)[0].flatten(1)[:, None]

    def _pad(self, packed: torch.Tensor, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(total, dim) to (clips, longest, dim), and the mask (clips, longest)."""
        ends = np.array(lengths)[:, None]
        frames = np.arange(max(lengths))
        mask = frames < ends
        if len(lengths) == 1:
            return packed[None], torch.ones(1, len(packed), dtype=torch.long, device=packed.device)
        index = np.where(mask, ends.cumsum(0) - ends + frames, len(packed))
        # In one copy to the device.
        index, mask = torch.from_numpy(np.stack([index, mask])).to(packed.device, non_blocking=True)
        return gather_rows(packed, index), mask

    def record(self, body: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
        """[`record_graph`] in this runner's memory, or without recording where it does not; results are one's own."""
        if self._stream is None:
            return body(), body
        with self._lock:
            first, replay = record_graph(body, self._device, self._pool, self._stream)

        def run_again() -> torch.Tensor:
            assert self._done is not None
            stream = torch.cuda.current_stream(self._device)
            with self._lock:
                stream.wait_event(self._done)  # the call before may be in another stream
                result = replay().clone()  # before another graph of the same memory runs
                self._done.record(stream)
            return result

        return first, run_again

    @property
    def _mel_frames_per_code(self) -> int:
        return self._model.config.samples_per_frame // self._model.config.hop_length

    def _run(
        self, inputs: str, data: torch.Tensor, lengths: Sequence[int], frames: Sequence[int], num_quantizers: int
    ) -> Outputs:
        """The outputs of a bucket, which the next call of its shape overwrites."""
        if self._weight is not self._model.encoder.conv1.weight or self._weight.data_ptr() != self._data_ptr:
            raise RuntimeError(
                "the model was moved, cast or loaded anew after optimize_for_inference; accepted: that comes last"
            )
        shape = self._shape_of(inputs, frames, num_quantizers)
        filled = torch.tensor([*lengths, *[0] * (shape.clips - len(lengths))])
        with self._lock, torch.no_grad():
            if self._done is not None:  # the call before may be in another stream
                torch.cuda.current_stream(self._device).wait_event(self._done)
            program = self._programs.get(shape)
            if program is None:
                # A size that never comes again is not worth a recording.
                program = self._prepare(shape, filled, record=shape in self._seen and self._stream is not None)
                if shape in self._seen:
                    self._programs[shape] = program
                self._seen.add(shape)
                if len(self._programs) > MAX_GRAPHS:
                    self._programs.popitem(last=False)
            else:
                self._programs.move_to_end(shape)
            program.inputs[: len(data)].copy_(data, non_blocking=True)
            program.lengths.copy_(filled, non_blocking=True)
            outputs = program.run()
            if self._done is not None:
                self._done.record(torch.cuda.current_stream(self._device))
            return outputs

    def _shape_of(self, inputs: str, frames: Sequence[int], num_quantizers: int) -> _Shape:
        config = self._model.config
        per_second = config.sampling_rate / config.hop_length
        if inputs == "codes":
            per_second /= self._mel_frames_per_code
        total = sum(frames)
        buckets = LARGE_BUCKETS if total > LARGE_SECONDS * per_second else SMALL_BUCKETS
        step = max(round(SMALLEST_BUCKET_SECONDS * per_second), 1 << max(0, total.bit_length() - 1 - buckets))
        bucket = -(-total // step) * step
        longest = max(*frames, bucket - total)
        return _Shape(
            inputs=inputs,
            clips=1 << (len(frames) - 1).bit_length(),
            total=bucket,
            longest=min(bucket, 1 << (longest - 1).bit_length()),
            num_quantizers=num_quantizers,
        )

    def _prepare(self, shape: _Shape, lengths: torch.Tensor, record: bool) -> _Program:
        hop, n_mels, device = self._extractor.hop_length, self._model.config.n_mels, self._device
        lengths = lengths.to(device)
        if shape.inputs == "codes":
            inputs = torch.zeros(shape.total, shape.num_quantizers, dtype=torch.long, device=device)
        else:
            size = (shape.total * hop,) if shape.inputs == "waveforms" else (shape.total, n_mels)
            inputs = torch.zeros(size, device=device)
        body = partial(self._decode if shape.inputs == "codes" else self._encode, shape, inputs, lengths)
        if not record:
            return _Program(inputs, lengths, body)
        self.recorded += 1
        assert self._stream is not None
        _, replay = record_graph(body, device, self._pool, self._stream)
        return _Program(inputs, lengths, replay)

    def _encode(self, shape: _Shape, inputs: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        encoder, config, clips = self._model.encoder, self._model.config, shape.clips
        is_there = lengths > 0
        mel_lengths = lengths
        if shape.inputs == "waveforms":
            mel_lengths = self._extractor.num_frames_of(lengths)
        frame_lengths = encoder.frame_length(mel_lengths)
        code_lengths = encoder.code_length(mel_lengths)
        # No fewer than clips of that many frames in all can have.
        frames_total = (
            shape.total + clips * max(0, config.stride_size + 2 - config.kernel_size)
        ) // config.stride_size
        frames_total += 1
        codes_total = (frames_total + clips * (config.avg_pooler - 1)) // config.avg_pooler
        totals = (shape.total, frames_total, codes_total)
        longest = (shape.longest, encoder.frame_length(shape.longest), encoder.code_length(shape.longest))
        mel, frames, codes = (
            _fill(torch.where(is_there, each, 0), total, min(total, most + clips + 1))
            for each, total, most in zip((mel_lengths, frame_lengths, code_lengths), totals, longest, strict=True)
        )
        if shape.inputs == "waveforms":
            nothing = lengths.new_zeros(1)
            inputs = self._extractor.log_mel_of_packed(
                inputs, torch.cat([lengths, nothing]), mel.lengths.long(), shape.total
            )
        broken = lengths.new_zeros(clips + 1).index_add_(0, mel.sequence_ids, (~inputs.isfinite().all(-1)).long())
        backend = self._model._attention_backend(inputs.device)
        dtype = self._model._weight_dtype
        features = encoder(inputs.to(dtype), encoder.layout_of(mel, frames, codes), backend)
        return encoder.quantizer.encode(features, shape.num_quantizers, dtype), broken

    def _decode(self, shape: _Shape, inputs: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        decoder = cast(MiMoAudioTokenizerDecoder, self._model.decoder)
        clips, device = shape.clips, inputs.device
        # What a clip has before the cut beyond what scales with it, the filler and missing ones may have as well.
        levels = zip(
            decoder.level_lengths(lengths),
            decoder.level_lengths(shape.total),
            decoder.level_lengths(shape.longest),
            strict=True,
        )
        beyond = decoder.level_lengths(0)[2] * clips
        sequences = []
        for number, (each, total, most) in enumerate(levels):
            total += beyond if number == 2 else 0
            sequences.append(_fill(torch.where(lengths > 0, each, 0), total, min(total, most + beyond)))
        dtype = self._model._weight_dtype
        features = self._model.encoder.quantizer.decode(inputs, dtype).to(dtype)
        backend = self._model._attention_backend(device)
        samples = decoder(features, decoder.layout_of(*sequences), backend).flatten()
        return samples, samples.new_zeros(())


def _fill(lengths: torch.Tensor, total: int, longest: int) -> PackedSequences:
    """Clips, and one more that takes what is left of `total`."""
    return PackedSequences.from_tensor(torch.cat([lengths, (total - lengths.sum())[None]]), total, longest)
