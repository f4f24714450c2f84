# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Whole calls as CUDA graphs: an eager call of one clip takes a GPU longer to be told than to run.

A graph has fixed sizes. Totals are therefore rounded up to a bucket's, and what is over is one more clip, the filler:
nothing of any clip's depends on others, so the clips' results are those of their true lengths. Everything about
lengths is computed within the graph, from one small tensor.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
from transformers.utils import logging

from .feature_extraction_mimo_audio_tokenizer import MiMoAudioTokenizerFeatureExtractor, upload
from .modeling_mimo_audio_tokenizer import (
    MiMoAudioTokenizerDecoder,
    MiMoAudioTokenizerModel,
    PackedBounds,
    gather_rows,
    not_finite_error,
)


logger = logging.get_logger(__name__)

# The most audio in a call that is run as a graph. With a slow host and an H200, launching took as long as the work of
# some 100 s in encoding and 160 s in decoding; but sizes are rounded up, by 10% on average, and graphs cost memory.
MAX_GRAPH_SECONDS = 96.0
# Graphs that are kept, those used last: more than there are sizes of single clips.
MAX_GRAPHS = 256
# Totals are rounded up to a quarter of an octave, from this one. Few sizes are soon all recorded, and small calls take
# about the same time whatever their size.
SMALLEST_BUCKET_SECONDS = 0.64
BUCKETS_AN_OCTAVE = 4


# What a call gives, and of mel frames how many of each clip are not finite.
Outputs = tuple[torch.Tensor, torch.Tensor | None]
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Shape:
    """What a graph is recorded for."""

    inputs: str  # "waveforms", "features" or "codes"
    clips: int
    total: int  # mel or code frames
    longest: int
    num_quantizers: int


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


@dataclass(eq=False)
class _Recorded:
    """A graph that others hold, until it is given back."""

    replay: Callable[[], torch.Tensor] | None


class GraphRunner:
    """Runs `encode` and `decode` of a model by CUDA graphs, each recorded when its size comes the second time.

    Results are on the model's device and in the current stream. Calls from several threads take turns. What is
    recorded does not look at hooks again, nor at anything else that changes how the model runs.

    Args:
        model: frozen, all of it on one CUDA device. It is not kept alive.
        capture: whether to record graphs. Without them calls have the same sizes and run as usual, anywhere.
    """

    def __init__(self, model: MiMoAudioTokenizerModel, capture: bool = True) -> None:
        self._model_reference = weakref.ref(model)  # which has this
        self._extractor = MiMoAudioTokenizerFeatureExtractor.from_config(model.config)
        self._weight = model.encoder.conv1.weight
        self._data_ptr = self._weight.data_ptr()
        self._device = self._weight.device
        self._programs: OrderedDict[_Shape, Callable[[], Outputs]] = OrderedDict()
        self._seen: set[_Shape] = set()
        # Where calls find their input, for those of all sizes: they take turns.
        self._inputs: dict[str, torch.Tensor] = {}
        self._pool = torch.cuda.graph_pool_handle() if capture else None
        self._stream = torch.cuda.Stream(self._device) if capture else None
        self._done = torch.cuda.Event() if capture else None
        self._lock = threading.Lock()
        self._max_frames = int(MAX_GRAPH_SECONDS * model.config.sampling_rate / model.config.hop_length)
        self.recorded = 0  # graphs, so far
        # Another one once graphs are given back, also those of `record`.
        self.recording: object = object()
        self._recorded: weakref.WeakSet[_Recorded] = weakref.WeakSet()

    def __deepcopy__(self, memo: object) -> None:
        """Copies of the model have weights of their own, and no graphs."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def takes(self, lengths: Sequence[int]) -> bool:
        """Whether clips of these lengths, in mel frames, may be run here and now."""
        return sum(lengths) <= self._max_frames and not torch.is_autocast_enabled(self._device.type)

    def takes_codes(self, lengths: Sequence[int]) -> bool:
        """Whether clips of these lengths, in code frames, may be run here and now."""
        return self.takes([length * self._mel_frames_per_code for length in lengths])

    def clear(self) -> None:
        """Gives back the memory of all graphs."""
        with self._lock:
            if self._stream is not None:
                torch.cuda.synchronize(self._device)
                self._pool = torch.cuda.graph_pool_handle()
            self._programs.clear()
            self._seen.clear()
            self._inputs.clear()
            self.recording = object()
            for each in self._recorded:
                each.replay = None
            self._recorded.clear()

    def encode_waveforms(self, samples: torch.Tensor, lengths: Sequence[int], num_quantizers: int) -> torch.Tensor:
        """Samples (total_samples,), clips end to end, and their lengths to codes (total_codes, num_quantizers)."""
        frames = [self._extractor.num_frames(length) for length in lengths]
        size = sum(self._model.encoder.code_lengths(frames))
        return self._run("waveforms", samples, lengths, frames, num_quantizers, size)[0]

    def encode(self, input_features: torch.Tensor, lengths: Sequence[int], num_quantizers: int) -> torch.Tensor:
        """Log-mel frames (total_frames, n_mels) to codes (total_codes, num_quantizers).

        Raises:
            ValueError: a clip holds NaN or infinity.
        """
        size = sum(self._model.encoder.code_lengths(lengths))
        codes, broken = self._run("features", input_features, lengths, lengths, num_quantizers, size)
        if broken is not None and broken.any():
            raise not_finite_error(int(broken.nonzero()[0]))
        return codes

    def decode(self, audio_codes: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Codes (total_codes, num_quantizers) to samples (total_samples,)."""
        size = sum(lengths) * self._model.config.samples_per_frame
        return self._run("codes", audio_codes, lengths, lengths, audio_codes.shape[1], size)[0]

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
        index, mask = upload(torch.from_numpy(np.stack([index, mask])), packed.device)
        return gather_rows(packed, index), mask

    @property
    def _model(self) -> MiMoAudioTokenizerModel:
        model = self._model_reference()
        assert model is not None
        return model

    def record(self, body: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
        """[`record_graph`] in this runner's memory, or without recording where it does not; results are one's own.

        What runs it again does so until this runner's graphs are given back (`recording` is another one then).
        """
        if self._stream is None:
            first, recorded = body(), _Recorded(body)
        else:
            with self._lock:
                first, replay = record_graph(body, self._device, self._pool, self._stream)
            recorded = _Recorded(replay)
        self._recorded.add(recorded)

        def run_again() -> torch.Tensor:
            with self._lock:
                if recorded.replay is None:
                    raise RuntimeError("the graph was given back; accepted: to record it again")
                if self._done is None:
                    return recorded.replay()
                stream = torch.cuda.current_stream(self._device)
                stream.wait_event(self._done)  # the call before may be in another stream
                result = recorded.replay().clone()  # before another graph of the same memory runs
                self._done.record(stream)
            return result

        return first, run_again

    def check_weights(self) -> None:
        """Raises RuntimeError where graphs would read what are not the model's weights any more."""
        if self._weight is not self._model.encoder.conv1.weight or self._weight.data_ptr() != self._data_ptr:
            raise RuntimeError(
                "a part of the model was moved or cast after optimize_for_inference; accepted: the whole, or none"
            )

    @property
    def _mel_frames_per_code(self) -> int:
        return self._model.config.samples_per_frame // self._model.config.hop_length

    def _run(
        self,
        inputs: str,
        data: torch.Tensor,
        lengths: Sequence[int],
        frames: Sequence[int],
        num_quantizers: int,
        size: int,
    ) -> Outputs:
        """The first `size` rows of a bucket's outputs."""
        self.check_weights()
        shape = self._shape_of(inputs, frames, num_quantizers)
        filled = torch.tensor([*lengths, *[0] * (shape.clips - len(lengths))])
        # Not in inference mode: what is kept here would be closed to calls outside of it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._done is not None:  # the call before may be in another stream
                torch.cuda.current_stream(self._device).wait_event(self._done)
            place, places = self._input(shape), self._input_lengths(shape)
            place[: len(data)].copy_(data, non_blocking=True)
            place[len(data) :].zero_()  # the filler's: what is there may be out of range in another call's shape
            places.copy_(upload(filled, self._device))
            outputs, broken = self._program(shape, place, places)()
            # Copied before the next call, which overwrites them.
            outputs, broken = outputs[:size].clone(), None if broken is None else broken[: len(lengths)].clone()
            if self._done is not None:
                self._done.record(torch.cuda.current_stream(self._device))
        return outputs, broken

    def _shape_of(self, inputs: str, frames: Sequence[int], num_quantizers: int) -> _Shape:
        config = self._model.config
        per_second = config.sampling_rate / config.hop_length
        if inputs == "codes":
            per_second /= self._mel_frames_per_code
        smallest = round(SMALLEST_BUCKET_SECONDS * per_second)
        total = sum(frames)
        octave = max(0, (-(-total // smallest) - 1).bit_length() - 1)
        step = -(-(smallest << octave) // BUCKETS_AN_OCTAVE)
        bucket = max(smallest, -(-total // step) * step)
        clips = 1 if len(frames) == 1 else 4 ** -(-(len(frames) - 1).bit_length() // 2)
        # Of a batch, twice a clip's share or anything: few batches have much longer clips.
        share = -(-2 * bucket // clips)
        is_even = clips > 1 and max(*frames, bucket - total) <= share
        return _Shape(inputs, clips, bucket, share if is_even else bucket, num_quantizers)

    def _program(self, shape: _Shape, inputs: torch.Tensor, lengths: torch.Tensor) -> Callable[[], Outputs]:
        """What runs a shape; recorded, if it is not the first time."""
        if shape in self._programs:
            self._programs.move_to_end(shape)
            return self._programs[shape]
        program: Callable[[], Outputs] = partial(
            self._decode if shape.inputs == "codes" else self._encode, shape, inputs, lengths
        )
        if shape not in self._seen:  # a size that never comes again is not worth a recording
            self._seen.add(shape)
            return program
        if self._stream is not None:
            _, program = record_graph(program, self._device, self._pool, self._stream)
        self.recorded += 1
        self._programs[shape] = program
        if len(self._programs) > MAX_GRAPHS:
            oldest, _ = self._programs.popitem(last=False)
            self._seen.discard(oldest)
        return program

    def _input(self, shape: _Shape) -> torch.Tensor:
        """Where calls find their waveforms (samples,), features (frames, n_mels) or codes (frames, codebooks)."""
        widths = {
            "waveforms": self._extractor.hop_length,
            "features": self._model.config.n_mels,
            "codes": shape.num_quantizers,
        }
        width = widths[shape.inputs]
        if shape.inputs not in self._inputs:
            # A bucket may be a step larger than the largest call; codes have fewer frames.
            size = self._max_frames * 2 * max(width, self._model.config.num_quantizers)
            dtype = torch.long if shape.inputs == "codes" else torch.float32
            self._inputs[shape.inputs] = torch.zeros(size, dtype=dtype, device=self._device)
        flat = self._inputs[shape.inputs][: shape.total * width]
        return flat if shape.inputs == "waveforms" else flat.view(shape.total, width)

    def _input_lengths(self, shape: _Shape) -> torch.Tensor:
        name = f"lengths of {shape.clips}"
        if name not in self._inputs:
            self._inputs[name] = torch.zeros(shape.clips, dtype=torch.long, device=self._device)
        return self._inputs[name]

    def _encode(self, shape: _Shape, inputs: torch.Tensor, lengths: torch.Tensor) -> Outputs:
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
        bounds = [
            _fill(torch.where(is_there, each, 0), total, min(total, most + clips + 1))
            for each, total, most in zip((mel_lengths, frame_lengths, code_lengths), totals, longest, strict=True)
        ]
        layout = encoder.layout_of(*bounds)
        if shape.inputs == "waveforms":
            filled = torch.cat([lengths, lengths.new_zeros(1)])  # the filler has no samples
            inputs = encoder.log_mel(inputs, PackedBounds.of_tensor(filled, len(inputs), len(inputs)), bounds[0])
        broken = lengths.new_zeros(clips + 1).index_add_(
            0, layout.mel.sequence_ids, (~inputs.isfinite().all(-1)).long()
        )
        backend = self._model.attention_backend(inputs.device)
        dtype = self._model.weight_dtype
        features = encoder(inputs.to(dtype), layout, backend)
        return encoder.quantizer.encode(features, shape.num_quantizers, dtype), broken

    def _decode(self, shape: _Shape, inputs: torch.Tensor, lengths: torch.Tensor) -> Outputs:
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
        bounds = []
        for number, (each, total, most) in enumerate(levels):
            total += beyond if number == 2 else 0
            bounds.append(_fill(torch.where(lengths > 0, each, 0), total, min(total, most + beyond)))
        dtype = self._model.weight_dtype
        features = self._model.encoder.quantizer.decode(inputs, dtype).to(dtype)
        backend = self._model.attention_backend(device)
        samples = decoder(features, decoder.layout_of(*bounds), backend).flatten()
        return samples, None


def _fill(lengths: torch.Tensor, total: int, longest: int) -> PackedBounds:
    """Clips, and one more that takes what is left of `total`."""
    return PackedBounds.of_tensor(torch.cat([lengths, (total - lengths.sum())[None]]), total, longest)
