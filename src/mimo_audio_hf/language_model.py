# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Batches of codes for a language model: extracted on the fly or stored, each codebook delayed.

MiMo-Audio models the first 8 codebooks, codebook q delayed by q steps, so that a step's codes are known one after the
other; within patches of 4 frames, for which there is [`delay_codes`]. [`AudioCodesCollator`] delays over the whole
clip. Each codebook has an entry more than the tokenizer's, the empty one, for steps at which it has no code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from .configuration_mimo_audio_tokenizer import MiMoAudioTokenizerConfig
from .dataset import to_codes, to_waveform
from .feature_extraction_mimo_audio_tokenizer import MiMoAudioTokenizerFeatureExtractor
from .inference import (
    MAX_PIECE_FRAMES,
    check_codes_of,
    check_waveform,
    encode_packed,
    encode_waveforms,
    model_device,
)
from .modeling_mimo_audio_tokenizer import MiMoAudioTokenizerModel


# Of what is no target: torch.nn.functional.cross_entropy ignores it.
IGNORED = -100


def delay_codes(codes: torch.Tensor, empty: Sequence[int], delays: Sequence[int] | None = None) -> torch.Tensor:
    """Shifts each codebook by its delay.

    Args:
        codes: (..., frames, Q). MiMo-Audio delays within patches of 4 frames: `codes.unflatten(-2, (-1, 4))`.
        empty: for each of the Q codebooks, what stands where it has no code; in MiMo-Audio its size.
        delays: for each of the Q codebooks, its steps; by default 0, 1, 2, ..., as in MiMo-Audio.

    Returns:
        (..., frames + max(delays), Q): step t holds of codebook q the code of frame t - delays[q].

    Raises:
        ValueError: a number of codebooks for which there are no such values, or negative delays.
    """
    delays = _check_delays(codes, delays)
    if len(empty) != codes.shape[-1]:
        raise ValueError(f"empty={[*empty]} for {codes.shape[-1]} codebooks; accepted: a value for each")
    frames = codes.shape[-2]
    delayed = torch.tensor(empty, dtype=codes.dtype, device=codes.device).repeat(
        *codes.shape[:-2], frames + max(delays), 1
    )
    for book, delay in enumerate(delays):
        delayed[..., delay : delay + frames, book] = codes[..., book]
    return delayed


def undelay_codes(delayed: torch.Tensor, delays: Sequence[int] | None = None) -> torch.Tensor:
    """The inverse of [`delay_codes`]: (..., steps, Q) to (..., steps - max(delays), Q).

    Raises:
        ValueError: a number of codebooks for which there are no such delays, or fewer steps than delays.
    """
    delays = _check_delays(delayed, delays)
    frames = delayed.shape[-2] - max(delays)
    if frames < 0:
        raise ValueError(f"{delayed.shape[-2]} steps with delays {delays}; accepted: {max(delays)} or more")
    return torch.stack([delayed[..., delay : delay + frames, book] for book, delay in enumerate(delays)], dim=-1)


class AudioCodesCollator:
    """Makes examples with audio or stored codes into a language model's batch.

    Audio is encoded on the fly, in one call, where the tokenizer is; codes stay there. They are those that
    [`encode_waveforms`] gives: clips of more than 60 s are cut, and go through the host. With a tokenizer on a GPU
    this belongs into the training process, not into a data loader's workers: let these read audio, with a collate
    function that returns its examples as they are, and call this in the loop.

    Args:
        tokenizer: the frozen model; or its configuration, where all codes are stored.
        num_quantizers: how many codebooks to use, from the first.
        delays: as in [`delay_codes`].
        audio_column, codes_column: what examples are read from. One that has codes, (frames, num_quantizers or more),
            is not encoded. Audio is whatever [`tokenize_audio`] takes, or a waveform (samples,) at the model's rate.

    Raises:
        ValueError: more codebooks than the model has, or other delays than that many.
    """

    def __init__(
        self,
        tokenizer: MiMoAudioTokenizerModel | MiMoAudioTokenizerConfig,
        num_quantizers: int = 8,
        delays: Sequence[int] | None = None,
        audio_column: str = "audio",
        codes_column: str = "audio_codes",
    ) -> None:
        if not isinstance(tokenizer, (MiMoAudioTokenizerModel, MiMoAudioTokenizerConfig)):
            raise ValueError(
                f"tokenizer={tokenizer!r}; accepted: a model, as `load_model` gives it, or a configuration"
            )
        self.model = tokenizer if isinstance(tokenizer, MiMoAudioTokenizerModel) else None
        self.config = tokenizer if isinstance(tokenizer, MiMoAudioTokenizerConfig) else tokenizer.config
        self._extractor = MiMoAudioTokenizerFeatureExtractor.from_config(self.config)
        if type(num_quantizers) is not int or not 1 <= num_quantizers <= self.config.num_quantizers:
            raise ValueError(f"num_quantizers={num_quantizers!r}; accepted: 1 to {self.config.num_quantizers}")
        self.num_quantizers = num_quantizers
        self.empty = self.config.codebook_sizes[:num_quantizers]
        self.delays = _check_delays(torch.empty(0, num_quantizers), delays)
        self.audio_column = audio_column
        self.codes_column = codes_column

    @property
    def vocabulary_sizes(self) -> list[int]:
        """Of each codebook, with the empty entry, which is the last one."""
        return [size + 1 for size in self.empty]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Examples to a batch.

        Returns:
            `input_ids` (B, T, num_quantizers), int64: a step of empty entries to begin with, the delayed codes, empty
            entries after a clip's end; `attention_mask` (B, T); `labels`, `input_ids` with -100 for what is empty,
            not shifted, as transformers' models take them. T is 1 + frames + max(delays) of the longest clip.

        Raises:
            ValueError: no examples; one (named by its place) without audio and codes, or with bad ones.
        """
        if not examples:
            raise ValueError("a batch of no examples; accepted: one or more")
        codes = self._codes(examples)
        delayed = [delay_codes(clip, self.empty, self.delays) for clip in codes]
        begin = delayed[0].new_tensor([self.empty])
        delayed = [torch.cat([begin, clip]) for clip in delayed]
        lengths = torch.tensor([len(clip) for clip in delayed], device=begin.device)
        # Padded with -1, which is no code.
        ids = pad_sequence(delayed, batch_first=True, padding_value=-1)
        input_ids = torch.where(ids < 0, begin, ids)
        steps = torch.arange(ids.shape[1], device=begin.device)
        return {
            "input_ids": input_ids,
            "attention_mask": (steps < lengths[:, None]).long(),
            "labels": input_ids.masked_fill(input_ids == begin, IGNORED),
        }

    def _codes(self, examples: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
        """Each example's codes (frames, num_quantizers), int64, where the tokenizer is."""
        device = torch.device("cpu") if self.model is None else model_device(self.model, self.model.encoder)
        codes: dict[int, torch.Tensor] = {}
        waveforms: dict[int, torch.Tensor] = {}
        for index, example in enumerate(examples):
            if (stored := example.get(self.codes_column)) is not None:
                name = f"{self.codes_column} of example {index}"
                checked = check_codes_of(self.config.codebook_sizes, to_codes(stored, name), name)
                if checked.shape[1] < self.num_quantizers:
                    raise ValueError(
                        f"{name} are of {checked.shape[1]} codebooks; accepted: {self.num_quantizers} or more"
                    )
                codes[index] = checked[:, : self.num_quantizers].to(device)
                continue
            waveforms[index] = self._waveform(
                example.get(self.audio_column), f"{self.audio_column} of example {index}"
            )
        codes |= self._encode(waveforms, device)
        return [codes[index] for index in range(len(examples))]

    def _encode(self, waveforms: dict[int, torch.Tensor], device: torch.device) -> dict[int, torch.Tensor]:
        if not waveforms:
            return {}
        assert self.model is not None
        frames = {index: self._extractor.num_frames(len(waveform)) for index, waveform in waveforms.items()}
        long = [index for index in waveforms if frames[index] > MAX_PIECE_FRAMES]
        short = [index for index in waveforms if frames[index] <= MAX_PIECE_FRAMES]
        codes: dict[int, torch.Tensor] = {}
        if long:
            cut = encode_waveforms(self.model, [waveforms[index] for index in long], self.num_quantizers)
            codes |= zip(long, (clip.to(device) for clip in cut), strict=True)
        if short:
            lengths = self.model.encoder.code_lengths([frames[index] for index in short])
            with torch.no_grad():
                samples = torch.cat([waveforms[index] for index in short]).to(device, non_blocking=True)
                sizes = [len(waveforms[index]) for index in short]
                packed = encode_packed(self.model, samples, sizes, self.num_quantizers)
            codes |= zip(short, packed.split(lengths), strict=True)
        return codes

    def _waveform(self, audio: Any, name: str) -> torch.Tensor:
        if self.model is None or audio is None:
            missing = "a tokenizer" if self.model is None else self.audio_column
            raise ValueError(f"{name}: no {self.codes_column}, and without {missing} none can be made; accepted: one")
        try:
            if not isinstance(audio, (torch.Tensor, np.ndarray)):
                audio = to_waveform(audio, self.config.sampling_rate)
            return check_waveform(audio, name).float()
        except (ValueError, OSError) as error:
            raise ValueError(str(error) if name in str(error) else f"{name}: {error}") from error


def _check_delays(codes: torch.Tensor, delays: Sequence[int] | None) -> list[int]:
    books = codes.shape[-1]
    delays = [*range(books)] if delays is None else [*delays]
    if len(delays) != books or not all(type(delay) is int and delay >= 0 for delay in delays):
        raise ValueError(f"delays={delays} for {books} codebooks; accepted: an integer from 0 for each")
    return delays


__all__ = ["AudioCodesCollator", "delay_codes", "undelay_codes"]
