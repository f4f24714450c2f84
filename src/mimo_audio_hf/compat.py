# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""The interface of upstream's own package, over this package's model.

Upstream's quick start runs with only its import changed to `import mimo_audio_hf.compat as mimo_audio_tokenizer`.
Lengths are given and returned as integer tensors, and codes stand frames first, where the rest of this package has
masks and codebooks first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from . import checkpoints
from .audio import load_audio
from .configuration_mimo_audio_tokenizer import MiMoAudioTokenizerConfig
from .feature_extraction_mimo_audio_tokenizer import MiMoAudioTokenizerFeatureExtractor
from .modeling_mimo_audio_tokenizer import MiMoAudioTokenizerModel


Timings = dict[str, float]


class MiMoAudioTokenizer(MiMoAudioTokenizerModel):
    """[`MiMoAudioTokenizerModel`] whose `encode` and `decode` take and return what upstream's do.

    Everything else is inherited: `from_pretrained`, `config`, `freeze()`, upstream's state dict keys, and `forward`,
    which keeps the arguments and the output class of [`MiMoAudioTokenizerModel`].
    """

    # Not inference_mode: its tensors may not take part in the training of a surrounding model.
    @torch.no_grad()
    def encode(  # type: ignore[override]
        self, mels: torch.Tensor, lens: torch.Tensor | Sequence[int] | int, n_q: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Timings]:
        """Log-mel spectrograms to codes, without gradient. A clip's codes do not depend on its neighbours.

        Args:
            mels: (batch, n_mels, frames) float; or one clip, (n_mels, frames), which is a batch of one.
            lens: (batch,) integers: frames of each clip. What stands past them is not read.
            n_q: How many codebooks to use, from the first; all by default.

        Returns:
            Codes (batch, code_frames, n_q) int64, zero past each clip's end; the clips' lengths in code frames
            (batch,) int64; and `{"encode": seconds}`: how long the call took on the host. A GPU may still be working
            then, it is not waited for.

        Raises:
            ValueError: `mels` of a wrong shape or dtype, NaN or infinite; `lens` that do not fit `mels`; or `n_q`
                that is not in 1 to `config.num_quantizers`.
        """
        start = time.perf_counter()
        mels = _as_batch("mels", mels, "(batch, n_mels, frames)")
        mask = _length_mask(lens, batch=mels.shape[0], frames=mels.shape[2])
        output = super().encode(mels, mask, n_q, return_dict=True)
        codes = output.audio_codes.transpose(1, 2).contiguous()
        return codes, output.audio_codes_mask.sum(-1), {"encode": time.perf_counter() - start}

    @torch.no_grad()
    def decode(  # type: ignore[override]
        self, codes: torch.Tensor, lens: torch.Tensor | Sequence[int] | int
    ) -> tuple[torch.Tensor, torch.Tensor, Timings]:
        """Codes to waveforms, without gradient. A clip's waveform does not depend on its neighbours.

        Args:
            codes: (batch, code_frames, n_q) integers, of the first `n_q` codebooks; or one clip, (code_frames, n_q),
                which is a batch of one.
            lens: (batch,) integers: code frames of each clip. What stands past them is not read.

        Returns:
            Waveforms (batch, 1, config.samples_per_frame * code_frames) float32 in [-1, 1], nominally, and zero past
            each clip's end; the clips' lengths in samples (batch,) int64; and `{"decode": seconds}`, as `encode`.

        Raises:
            ValueError: `codes` of a wrong shape or dtype, out of range for their codebook, or of more codebooks than
                the model has; `lens` that do not fit `codes`; or a model without decoder.
        """
        start = time.perf_counter()
        codes = _as_batch("codes", codes, "(batch, code_frames, n_q)")
        mask = _length_mask(lens, batch=codes.shape[0], frames=codes.shape[1])
        output = super().decode(codes.transpose(1, 2), mask, return_dict=True)
        return output.audio_values, output.audio_lengths, {"decode": time.perf_counter() - start}

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As [`MiMoAudioTokenizerModel`]'s, and as if this were one: config.json names the class that saves."""
        with torch.device("meta"):
            plain = MiMoAudioTokenizerModel(self.config)
        plain.load_state_dict(self.state_dict(), assign=True)  # the same tensors, not copies
        plain.save_pretrained(save_directory, *args, **kwargs)


def load_model(model_name_or_path: str | os.PathLike[str]) -> MiMoAudioTokenizer:
    """The model of a directory, Hub id or `"tiny"`, on the CPU and in evaluation mode.

    Raises:
        ValueError: as `mimo_audio_hf.checkpoints.load_model`.
    """
    model = checkpoints.load_model(model_name_or_path, device="cpu", model_class=MiMoAudioTokenizer)
    return cast(MiMoAudioTokenizer, model)


def mel_spectrogram(wav: torch.Tensor | np.ndarray, config: MiMoAudioTokenizerConfig) -> torch.Tensor:
    """Log-mel spectrogram (n_mels, frames) of mono audio (samples,) or (1, samples) at `config.sampling_rate`.

    `wav` holds floats in [-1, 1]. The spectrogram is float32, computed on the device of `wav`.

    Raises:
        ValueError: `wav` is empty, not mono, not floating point, NaN or infinite.
    """
    waveform = torch.as_tensor(wav)
    if waveform.ndim == 2 and waveform.shape[0] == 1:
        waveform = waveform[0]
    if waveform.ndim != 1:
        raise ValueError(f"wav has shape {tuple(waveform.shape)}; accepted: mono, (samples,) or (1, samples)")
    extractor = MiMoAudioTokenizerFeatureExtractor.from_config(config)
    return extractor(waveform, config.sampling_rate, device=waveform.device)["input_features"][0]


def padding(mels: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-mel spectrograms (n_mels, frames) of several clips as one batch.

    Returns:
        (batch, n_mels, frames of the longest clip), zero past each clip's end, and the clips' frames (batch,) int64,
        on the device of `mels`.

    Raises:
        ValueError: `mels` is empty or holds anything but (n_mels, frames) tensors of one `n_mels`.
    """
    shapes = [tuple(mel.shape) for mel in mels]
    if not shapes or any(len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(f"mels have shapes {shapes}; accepted: one or more (n_mels, frames) with the same n_mels")
    batch = pad_sequence([mel.transpose(0, 1) for mel in mels], batch_first=True).transpose(1, 2)
    return batch, torch.tensor([frames for _, frames in shapes], device=batch.device)


def _as_batch(name: str, tensor: torch.Tensor, accepted: str) -> torch.Tensor:
    if tensor.ndim not in (2, 3):
        raise ValueError(f"{name} have shape {tuple(tensor.shape)}; accepted: {accepted}, or one clip without batch")
    return tensor[None] if tensor.ndim == 2 else tensor


def _length_mask(lens: torch.Tensor | Sequence[int] | int, batch: int, frames: int) -> torch.Tensor:
    """(batch, frames) bool, True for each clip's first `lens` frames; on the host, where the model needs lengths."""
    lengths = torch.as_tensor(lens).cpu().reshape(-1)
    integers = not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)
    if not integers or lengths.shape != (batch,) or not ((lengths >= 1) & (lengths <= frames)).all():
        raise ValueError(
            f"lens are {lengths.tolist()} ({lengths.dtype}); accepted: ({batch},) integers, one for each clip, "
            f"from 1 to {frames}, the frames of the batch"
        )
    return torch.arange(frames) < lengths[:, None]


__all__ = ["MiMoAudioTokenizer", "load_audio", "load_model", "mel_spectrogram", "padding"]
