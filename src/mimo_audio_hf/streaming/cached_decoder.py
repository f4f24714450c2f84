# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""The decoder on new frames only, for streams of codes: what it remembers of them, and its calls as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch

from ..caching import KeyValueCache, RunningGroupNorm, StreamRows
from ..modeling_mimo_audio_tokenizer import (
    MiMoAudioTokenizerDecoder,
    MiMoAudioTokenizerLayer,
    MiMoAudioTokenizerModel,
    PackedBounds,
    PackedSequences,
)


@dataclass(frozen=True)
class Chunk:
    """Codes (frames, codebooks) that a decoder runs on next, which may be none, and whether the stream ends there."""

    codes: torch.Tensor
    is_last: bool


class CachedDecoder:
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

    def decode(self, rows: Sequence[int], chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        """Samples of the last frames of the streams in these rows, with the chunks'."""
        decoded: list[torch.Tensor] = [self.norm1.mean[:0]] * len(rows)
        # What is alike runs at once.
        for indices in group_by(range(len(rows)), lambda i: (chunks[i].codes.shape, chunks[i].is_last)):
            indices.sort(key=lambda index: rows[index])
            running = [rows[index] for index in indices]
            codes = torch.cat([chunks[index].codes for index in indices])
            is_last = chunks[indices[0]].is_last
            frames = len(codes) // len(running) * self.model.config.avg_pooler
            for index, samples in zip(indices, self._run(codes, running, is_last), strict=False):
                decoded[index] = samples
            self.layers.advance(running, frames)
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
        code, frame, _, mel_frame, block = (PackedBounds.of_tensor(*level) for level in levels)
        layout = decoder.layout_of(code, frame, mel_frame, mel_frame, block)  # nothing has to be cut any more
        backend = self.model.attention_backend(self.device)
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


def group_by(indices: Iterable[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    """Indices of the same key together."""
    groups: dict[Hashable, list[int]] = {}
    for index in indices:
        groups.setdefault(key(index), []).append(index)
    return [*groups.values()]
