# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Audio to codes while it is recorded: mel frames as they come, and encoders that look ahead or do not."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

import numpy as np
import torch

from ..caching import KeyValueCache
from ..feature_extraction_mimo_audio_tokenizer import MiMoAudioTokenizerFeatureExtractor
from ..inference import check_count, check_waveform, encode_packed_features, model_device
from ..modeling_mimo_audio_tokenizer import MiMoAudioTokenizerModel, PackedSequences


# A causal encoder runs at most so many frames of its layers at once (10 s): memory for their attention is bounded.
_MAX_ENCODER_FRAMES = 500

# Seconds of audio that a streaming encoder takes at once: memory for spectrograms is bounded.
_MAX_SECONDS = 60


class StreamingEncoder:
    """The encoder of one stream of audio, as it is recorded.

    An encoder whose layers never look ahead (those of MiMo-V2) runs on new frames only and gives the codes of the
    whole recording, each 20 ms after the end of its 40 ms: all of them in float32, nearly all in half precision, where
    sums are rounded in another order. (Past 60 s they are not those of [`encode_waveforms`], which cuts recordings
    into pieces of 60 s.) An encoder whose layers look ahead (the released one) runs again and again over windows that
    overlap, and gives nearly those codes; docs/streaming.md has the agreement.

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
            left_context = check_count("left_context", left_context, 1)
        if right_context is not None:
            right_context = check_count("right_context", right_context, 0)
        if chunk_frames is not None:
            chunk_frames = check_count("chunk_frames", chunk_frames, 1)
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
