# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""The packed batches of a training run, made of waveforms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..configuration_mimo_audio_tokenizer import MiMoAudioTokenizerConfig
from ..feature_extraction_mimo_audio_tokenizer import MiMoAudioTokenizerFeatureExtractor
from ..modeling_mimo_audio_tokenizer import (
    MiMoAudioTokenizerDecoderLayout,
    MiMoAudioTokenizerEncoderLayout,
    MiMoAudioTokenizerModel,
)


@dataclass(frozen=True)
class Batch:
    """One process's share of a batch: its clips packed end to end, with everything about lengths made beforehand.

    Attributes:
        waveforms: (samples,) float32.
        codes: (total_codes, Q) of the clips, or nothing where the encoder is to make them.
        encoder_layout, decoder_layout: the model's, for these clips; none of an encoder that does not run.
        segments: (clips,) first sample of each clip's segment for the discriminators.
        segment_samples: length of the segments, alike in all processes: no more than the shortest clip.
        text_ids, text_lengths: tokens of the clips' texts (tokens,), or nothing.
        keys, lengths, code_lengths: the clips' names, samples and code frames.
        clips: which clips of the dataset these are.
        batch_keys, batch_lengths: those of the whole batch, on all processes.
        counted: whether the clips count; they do not where there was none left for this process in a validation.
    """

    waveforms: torch.Tensor
    codes: torch.Tensor | None
    encoder_layout: MiMoAudioTokenizerEncoderLayout | None
    decoder_layout: MiMoAudioTokenizerDecoderLayout
    segments: torch.Tensor
    segment_samples: int
    text_ids: torch.Tensor | None
    text_lengths: list[int]
    keys: list[str]
    lengths: list[int]
    code_lengths: list[int]
    clips: list[int]
    batch_keys: list[str]
    batch_lengths: list[int]
    counted: bool

    def pin_memory(self) -> Batch:
        return _map_tensors(self, lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Batch:
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))


def _map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: _map_tensors(getattr(value, field.name), function) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value


class Collator:
    """Makes batches of waveforms; of the model it knows the configuration only, so that workers can have it.

    Args:
        config: the model's.
        max_segment_samples: the discriminators' segments' length, where all clips are long enough.
    """

    def __init__(self, config: MiMoAudioTokenizerConfig, max_segment_samples: int) -> None:
        self.max_segment_samples = max_segment_samples
        self.extractor = MiMoAudioTokenizerFeatureExtractor.from_config(config)
        with torch.device("meta"):
            self.model = MiMoAudioTokenizerModel(config)

    def code_lengths(self, lengths: Sequence[int]) -> list[int]:
        """Samples to code frames."""
        return self.model.encoder.code_lengths([self.extractor.num_frames(length) for length in lengths])

    def __call__(
        self,
        waveforms: Sequence[torch.Tensor],
        *,
        segments: Sequence[float] | None = None,
        keys: Sequence[str] | None = None,
        clips: Sequence[int] | None = None,
        texts: Sequence[list[int]] | None = None,
        codes: Sequence[torch.Tensor] | None = None,
        batch_keys: Sequence[str] | None = None,
        batch_lengths: Sequence[int] | None = None,
        counted: bool = True,
    ) -> Batch:
        """A batch, on the CPU.

        Args:
            waveforms: mono clips (samples,) float32.
            segments: where in each clip its segment for the discriminators lies, from 0 to 1; by default at its start.
            keys, clips: the clips' names and numbers.
            texts: the clips' tokens.
            codes: the clips' codes (L, Q), where they are there already.
            batch_keys, batch_lengths: of the whole batch on all processes, if this is but a share of it.
            counted: see [`Batch`].
        """
        lengths = [len(waveform) for waveform in waveforms]
        batch_lengths = lengths if batch_lengths is None else list(batch_lengths)
        keys = [str(number) for number in range(len(lengths))] if keys is None else list(keys)
        mel_lengths = [self.extractor.num_frames(length) for length in lengths]
        code_lengths = self.code_lengths(lengths) if codes is None else [len(clip) for clip in codes]
        segment_samples = min(self.max_segment_samples, *batch_lengths)
        places = [0.0] * len(lengths) if segments is None else segments
        return Batch(
            waveforms=torch.cat(list(waveforms)),
            codes=None if codes is None else torch.cat(list(codes)),
            encoder_layout=self.model.encoder_layout(mel_lengths, "cpu") if codes is None else None,
            decoder_layout=self.model.decoder_layout(code_lengths, "cpu"),
            segments=torch.tensor(
                [int(place * (length - segment_samples + 1)) for place, length in zip(places, lengths, strict=True)]
            ),
            segment_samples=segment_samples,
            text_ids=None if texts is None else torch.tensor([token for text in texts for token in text]),
            text_lengths=[] if texts is None else [len(text) for text in texts],
            keys=keys,
            lengths=lengths,
            code_lengths=code_lengths,
            clips=list(range(len(lengths))) if clips is None else list(clips),
            batch_keys=keys if batch_keys is None else list(batch_keys),
            batch_lengths=batch_lengths,
            counted=counted,
        )


def padded(packed: torch.Tensor, lengths: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    """(clips, longest) of packed samples, where a clip begins after the strides of those before it; then zeros."""
    clips = [clip[:length] for clip, length in zip(packed.split(list(strides)), lengths, strict=True)]
    return pad_sequence(clips, batch_first=True)
