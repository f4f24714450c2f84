# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Batches of codes for a language model: extracted on the fly or stored, and delayed.

Models of several codebooks delay codebook q by q steps, so that a step's codes are known one after the other. Each
codebook has an entry more than the tokenizer's, the empty one, for steps at which it has no code. MiMo-Audio models
the first 8 codebooks, and delays them within patches of 4 frames: its large model sees a patch at a time, and a small
one writes each patch in 4 + 7 steps.
"""

from __future__ import annotations

import numbers
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from .checkpoints import load_model
from .configuration_mimo_audio_tokenizer import MiMoAudioTokenizerConfig
from .dataset import to_codes, to_waveform
from .feature_extraction_mimo_audio_tokenizer import MiMoAudioTokenizerFeatureExtractor
from .inference import (
    MAX_BATCH_SECONDS,
    MAX_PIECE_FRAMES,
    check_codes_of,
    check_waveform,
    encode_packed,
    encode_waveforms,
    group_by_seconds,
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
        ValueError: a number of codebooks for which there are no such values, or delays that are no integers from 0.
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

    Audio is encoded on the fly, where the tokenizer is, to the codes that [`encode_waveforms`] gives. Clips of up to a
    minute run several at once, in bounded memory, and nothing waits for the device; longer ones are cut into pieces of
    a minute as everywhere, and waited for. With a tokenizer on a GPU this belongs into the training process, not into
    a data loader's workers: let these read audio, with a collate function that returns its examples as they are, and
    call this in the loop.

    Args:
        tokenizer: the frozen model; what [`load_model`] takes for one; or its configuration, where all codes are
            stored.
        num_quantizers: how many codebooks to use, from the first.
        delays: as in [`delay_codes`].
        patch_frames: how many frames make a patch, within which codebooks are delayed; MiMo-Audio has 4. None: there
            are no patches, and codebooks are delayed over the whole clip.
        audio_column, codes_column: what examples are read from. One that has codes, (frames, num_quantizers or more),
            is not encoded. Audio is whatever [`tokenize_audio`] takes, or a waveform (samples,) at the model's rate.

    Raises:
        ValueError: more codebooks than the model has, other delays than that many, a number that is no integer, or
            something else than a tokenizer.
    """

    def __init__(
        self,
        tokenizer: MiMoAudioTokenizerModel | MiMoAudioTokenizerConfig | str | os.PathLike[str],
        num_quantizers: int = 8,
        delays: Sequence[int] | None = None,
        patch_frames: int | None = None,
        audio_column: str = "audio",
        codes_column: str = "audio_codes",
    ) -> None:
        if isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = load_model(tokenizer).freeze()
        self.model = tokenizer if isinstance(tokenizer, MiMoAudioTokenizerModel) else None
        config = tokenizer if self.model is None else self.model.config
        if not isinstance(config, MiMoAudioTokenizerConfig):
            raise ValueError(
                f"tokenizer is a {type(tokenizer).__name__}; accepted: a MiMoAudioTokenizerModel, a name that "
                "load_model takes, or a MiMoAudioTokenizerConfig"
            )
        self.config = config
        self._extractor = MiMoAudioTokenizerFeatureExtractor.from_config(config)
        if not _is_integer(num_quantizers) or not 1 <= num_quantizers <= config.num_quantizers:
            raise ValueError(f"num_quantizers={num_quantizers!r}; accepted: an integer, 1 to {config.num_quantizers}")
        if patch_frames is not None and (not _is_integer(patch_frames) or patch_frames < 1):
            raise ValueError(f"patch_frames={patch_frames!r}; accepted: an integer, 1 or more, or None")
        self.num_quantizers = int(num_quantizers)
        self.patch_frames = patch_frames
        self.empty = config.codebook_sizes[: self.num_quantizers]
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

            With `patch_frames` T counts patches, 1 + ceil(frames / patch_frames) of the longest clip, and `input_ids`
            and `labels` are (B, T, patch_frames + max(delays), num_quantizers): [`undelay_codes`] gives the patches
            themselves. The last one of a clip is filled with empty entries.

        Raises:
            ValueError: no examples; an example (named by its place) without audio and codes, or with bad ones.
        """
        if not examples:
            raise ValueError("no examples; accepted: one or more")
        delayed = [self._delayed(clip) for clip in self._codes(examples)]
        lengths = torch.tensor([len(clip) for clip in delayed], device=delayed[0].device)
        # Padded with -1, which is no code.
        ids = pad_sequence(delayed, batch_first=True, padding_value=-1)
        empty = ids.new_tensor(self.empty)
        input_ids = torch.where(ids < 0, empty, ids)
        places = torch.arange(ids.shape[1], device=ids.device)
        return {
            "input_ids": input_ids,
            "attention_mask": (places < lengths[:, None]).long(),
            "labels": input_ids.masked_fill(input_ids == empty, IGNORED),
        }

    def _delayed(self, codes: torch.Tensor) -> torch.Tensor:
        """A clip's codes (frames, num_quantizers) as steps or as patches of steps, the first one empty."""
        empty = codes.new_tensor([self.empty])
        if self.patch_frames is not None:
            missing = -len(codes) % self.patch_frames
            codes = torch.cat([codes, empty.expand(missing, -1)]).unflatten(0, (-1, self.patch_frames))
        delayed = delay_codes(codes, self.empty, self.delays)
        return torch.cat([empty.expand_as(delayed[:1]), delayed])

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
        codes |= self._encoded(waveforms, device)
        return [codes[index] for index in range(len(examples))]

    @torch.no_grad()
    def _encoded(self, waveforms: dict[int, torch.Tensor], device: torch.device) -> dict[int, torch.Tensor]:
        codes: dict[int, torch.Tensor] = {}
        if self.model is None:
            return codes
        frames = {index: self._extractor.num_frames(len(waveform)) for index, waveform in waveforms.items()}
        short = [index for index in waveforms if frames[index] <= MAX_PIECE_FRAMES]
        for group in group_by_seconds(
            short, lambda index: len(waveforms[index]) / self.config.sampling_rate, MAX_BATCH_SECONDS
        ):
            samples = torch.cat([waveforms[index] for index in group]).to(device, non_blocking=True)
            packed = encode_packed(
                self.model, samples, [len(waveforms[index]) for index in group], self.num_quantizers
            )
            lengths = self.model.encoder.code_lengths([frames[index] for index in group])
            codes |= zip(group, packed.split(lengths), strict=True)
        long = [index for index in waveforms if frames[index] > MAX_PIECE_FRAMES]
        found = encode_waveforms(self.model, [waveforms[index] for index in long], self.num_quantizers)
        return codes | {index: each.to(device) for index, each in zip(long, found, strict=True)}

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
    if len(delays) != books or not all(_is_integer(delay) and delay >= 0 for delay in delays):
        raise ValueError(f"delays={delays} for {books} codebooks; accepted: an integer from 0 for each")
    return [int(delay) for delay in delays]


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


__all__ = ["AudioCodesCollator", "delay_codes", "undelay_codes"]
