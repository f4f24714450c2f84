# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Log-mel front end of the MiMo-Audio tokenizer."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature

from .configuration_mimo_audio_tokenizer import single_auto_classes


# Floor under the logarithm, as upstream has it.
LOG_MEL_FLOOR = 1e-7


@cache  # for good: recorded CUDA graphs read them
def mel_filters(
    sampling_rate: int, nfft: int, n_mels: int, fmin: float, fmax: float, device: torch.device
) -> torch.Tensor:
    """HTK triangles without normalization, (n_mels, nfft // 2 + 1).

    Computed in float32 on the CPU step by step as torchaudio does: the released model was trained on those filters,
    and filters computed in float64 (transformers' `mel_filter_bank`) move its log-mels by up to 5e-5.
    """
    cpu: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the default dtype and device are
    mel_min, mel_max = (2595.0 * math.log10(1.0 + hz / 700.0) for hz in (fmin, fmax))
    # Not an inference tensor, whatever the first caller's mode: a later one may want gradients through it.
    with torch.inference_mode(False):
        edges = 700.0 * (10.0 ** (torch.linspace(mel_min, mel_max, n_mels + 2, **cpu) / 2595.0) - 1.0)
        bins = torch.linspace(0, sampling_rate // 2, nfft // 2 + 1, **cpu)
        widths = edges.diff()
        distances = edges[:, None] - bins
        rising = -distances[:-2] / widths[:-1, None]
        falling = distances[2:] / widths[1:, None]
        return torch.minimum(rising, falling).clamp(min=0.0).to(device)


def upload(tensor: torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
    """A small tensor from the host; to a GPU through pinned memory, for other copies wait until its work is done."""
    if device is None or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class MiMoAudioTokenizerFeatureExtractor(SequenceFeatureExtractor):
    r"""
    Turns 24 kHz mono audio into the log-mel spectrograms that [`MiMoAudioTokenizerModel`] encodes.

    Args:
        feature_size (`int`, defaults to 128): Number of mel bins.
        sampling_rate (`int`, defaults to 24000): Sampling rate of the audio, in Hz.
        padding_value (`float`, defaults to 0.0): What stands in `input_features` past a clip's end.
        hop_length, nfft, window_size (`int`, defaults to 240, 960 and 960): The STFT, in samples.
        fmin (`float`, defaults to 0.0), fmax (`float`, *optional*, Nyquist by default): Range of the filters, in Hz.
    """

    model_input_names = ["input_features", "attention_mask"]

    def __init__(
        self,
        feature_size: int = 128,
        sampling_rate: int = 24000,
        padding_value: float = 0.0,
        hop_length: int = 240,
        nfft: int = 960,
        window_size: int = 960,
        fmin: float = 0.0,
        fmax: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.hop_length = hop_length
        self.nfft = nfft
        self.window_size = window_size
        self.fmin = fmin
        self.fmax = fmax

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> MiMoAudioTokenizerFeatureExtractor:
        """The feature extractor that belongs to a model's configuration."""
        return cls(**cls._fields_of(vars(config)))  # to_dict() copies all of it, in every call of the model

    @staticmethod
    def _fields_of(config: dict[str, Any]) -> dict[str, Any]:
        names = {"feature_size": "n_mels"} | {
            name: name for name in ("sampling_rate", "hop_length", "nfft", "window_size", "fmin", "fmax")
        }
        return {name: config[source] for name, source in names.items() if source in config}

    @classmethod
    def get_feature_extractor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        # The released repository has a config.json and no preprocessor_config.json.
        try:
            return super().get_feature_extractor_dict(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            if "valid JSON" in str(error):  # it is there, but damaged
                raise
            config, kwargs = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
            if not config:
                raise
            return cls._fields_of(config), kwargs

    def to_dict(self) -> dict[str, Any]:
        return single_auto_classes(super().to_dict())

    def num_frames(self, num_samples: int) -> int:
        """Mel frames of a clip of `num_samples` samples."""
        return 1 + max(num_samples, self.nfft if num_samples <= self.nfft // 2 else 0) // self.hop_length

    def num_frames_of(self, num_samples: torch.Tensor) -> torch.Tensor:
        """[`num_frames`] of many clips (clips,)."""
        return 1 + torch.where(num_samples <= self.nfft // 2, self.nfft, num_samples) // self.hop_length

    def samples_of_frames(self, start: int, stop: int, num_samples: int) -> tuple[int, int]:
        """Which samples of a clip decide its mel frames `start` to `stop`: from the first to before the last.

        The first one is a multiple of `hop_length`: the spectrogram of these samples alone has the frames as well,
        from its frame `start - first // hop_length` on.
        """
        # Half a window to both sides, and a frame more than that: reflection at the clip's end has to have enough.
        reach = self.nfft // 2
        first = max(0, start - -(-reach // self.hop_length) - 1) * self.hop_length
        return first, min(stop * self.hop_length + reach, num_samples)

    def log_mel_spectrogram(self, waveform: torch.Tensor) -> torch.Tensor:
        """Log-mel spectrogram of one clip: (samples,) float32 to (n_mels, 1 + samples // hop_length).

        A clip too short for the reflect padding (480 samples or less) is zero-padded at its end to `nfft` first.
        """
        return self._log_mel(self._reflected(waveform))

    def packed_log_mel_spectrogram(self, waveforms: Sequence[torch.Tensor]) -> torch.Tensor:
        """Log-mel spectrograms of clips end to end, in one pass.

        Args:
            waveforms: Clips (samples,) float32, on one device.

        Returns:
            (total_frames, n_mels), the frames of each clip as [`num_frames`] counts them.
        """
        lengths = [len(waveform) for waveform in waveforms]
        samples = torch.cat(list(waveforms))
        frames = [self.num_frames(length) for length in lengths]
        lengths, frame_lengths = upload(torch.tensor([lengths, frames]), samples.device)
        return self.log_mel_of_packed(samples, lengths, frame_lengths, sum(frames))

    def log_mel_of_packed(
        self, samples: torch.Tensor, lengths: torch.Tensor, frame_lengths: torch.Tensor, total_frames: int
    ) -> torch.Tensor:
        """As [`packed_log_mel_spectrogram`], of clips whose lengths their device alone knows.

        Args:
            samples: (total_samples,) float32, clips end to end.
            lengths: (clips,) in samples; may be 0.
            frame_lengths: (clips,), as [`num_frames`] counts them. What a clip has more is silence.
            total_frames: their sum.

        Returns:
            (total_frames, n_mels).
        """
        # Every clip with half a window of its mirror image at both ends, in whole hops. Spectra over the seams between
        # clips are nobody's.
        seam = -(-self.nfft // self.hop_length) - 1
        ends = (frame_lengths + seam).cumsum(0)
        hop = torch.arange(total_frames + seam * len(lengths), device=samples.device)
        clip = torch.searchsorted(ends, hop, right=True)
        reach = self.nfft // 2
        padded = torch.where(lengths <= reach, self.nfft, lengths)
        first = (hop - (ends - frame_lengths - seam)[clip]) * self.hop_length - reach
        # What follows is of every sample: 32 bits where they suffice.
        index = torch.int32 if (len(hop) + seam) * self.hop_length < 2**30 else torch.int64
        first, last = first[:, None].to(index), (padded[clip, None] - 1).to(index)
        starts, lengths = (lengths.cumsum(0) - lengths)[clip, None].to(index), lengths[clip, None].to(index)
        place = first + torch.arange(self.hop_length, device=samples.device, dtype=index)
        place = last - (last - place.abs_()).abs_()
        inside = (place >= 0) & (place < lengths)
        rows = (place + starts).clamp_(0, len(samples) - 1)
        mel = self._log_mel(torch.where(inside, samples[rows], 0.0).flatten())
        frame = torch.arange(total_frames, device=samples.device)
        clip = torch.searchsorted(frame_lengths.cumsum(0), frame, right=True)
        return mel.t()[frame + seam * clip]

    def _reflected(self, waveform: torch.Tensor) -> torch.Tensor:
        """One clip with half a window of its mirror image at both ends."""
        reach = self.nfft // 2
        if waveform.shape[-1] <= reach:
            waveform = nn.functional.pad(waveform, (0, self.nfft - waveform.shape[-1]))
        return nn.functional.pad(waveform[None], (reach, reach), mode="reflect")[0]

    def _log_mel(self, samples: torch.Tensor) -> torch.Tensor:
        """(samples,) to (n_mels, 1 + (samples - nfft) // hop_length)."""
        spectrogram = torch.stft(
            samples,
            n_fft=self.nfft,
            hop_length=self.hop_length,
            win_length=self.window_size,
            window=torch.hann_window(self.window_size, dtype=torch.float32, device=samples.device),
            center=False,
            return_complex=True,
        ).abs()
        return (self.mel_filters(samples.device) @ spectrogram).clamp(min=LOG_MEL_FLOOR).log()

    def mel_filters(self, device: torch.device) -> torch.Tensor:
        """(n_mels, nfft // 2 + 1), see [`mel_filters`]."""
        fmax = self.sampling_rate / 2 if self.fmax is None else self.fmax
        return mel_filters(self.sampling_rate, self.nfft, self.feature_size, self.fmin, fmax, device)

    def __call__(
        self,
        raw_audio: np.ndarray | torch.Tensor | Sequence[Any],
        sampling_rate: int | None = None,
        padding: bool | str = True,
        max_length: int | None = None,
        return_tensors: str | None = "pt",
        device: str | torch.device = "cpu",
    ) -> BatchFeature:
        """Log-mel spectrograms of one or many clips.

        Args:
            raw_audio: One clip (samples,) or many: a list of clips or an array (clips, samples). Mono floats in
                [-1, 1] as numpy arrays, torch tensors or lists.
            sampling_rate: Sampling rate of `raw_audio` in Hz. It must be given and equal the extractor's:
                audio is never resampled here (`mimo_audio_hf.load_audio` does that).
            padding: `True` or `"longest"` pads to the longest clip; `"max_length"` to `max_length` frames;
                `False` to nothing, so all clips must be of one length.
            max_length: Frames to pad to with `padding="max_length"`; nothing is ever truncated.
            return_tensors: `"pt"` (default) or `"np"`.
            device: Where the spectrograms are computed and returned (`return_tensors="pt"`).

        Returns:
            [`BatchFeature`] with `input_features` (clips, n_mels, frames) float32 and `attention_mask`
            (clips, frames) int64, 1 for a clip's frames and 0 for padding. N samples give
            1 + N // hop_length frames.

        Raises:
            ValueError: a wrong or missing sampling rate; audio that is empty, not mono, not floating point, NaN or
                infinite; clips of several lengths without padding. The message names the clip.
        """
        if sampling_rate is None:
            raise ValueError(
                f"sampling_rate is missing: pass sampling_rate={self.sampling_rate} with audio at that rate"
            )
        if sampling_rate != self.sampling_rate:
            raise ValueError(
                f"sampling_rate={sampling_rate} Hz; accepted: {self.sampling_rate} Hz (resample the audio first, "
                "e.g. with mimo_audio_hf.load_audio)"
            )
        if return_tensors not in ("pt", "np", None):
            raise ValueError(f"return_tensors={return_tensors!r}; accepted: 'pt' or 'np'")
        if padding not in (True, False, "longest", "max_length"):
            raise ValueError(f"padding={padding!r}; accepted: True, 'longest', 'max_length' or False")

        clips = [self._check_clip(clip, index) for index, clip in enumerate(_split_clips(raw_audio))]
        if not clips:
            raise ValueError("raw_audio holds no clips")
        features = [self.log_mel_spectrogram(clip.to(device)) for clip in clips]
        lengths = [feature.shape[-1] for feature in features]
        frames = max(lengths)
        if padding is False and min(lengths) != frames:
            raise ValueError(f"padding=False with clips of {min(lengths)} to {frames} frames; pass padding=True")
        if padding == "max_length":
            if max_length is None or max_length < frames:
                raise ValueError(f"max_length={max_length}; accepted: at least {frames}, the longest clip's frames")
            frames = max_length

        input_features = features[0].new_full((len(clips), self.feature_size, frames), self.padding_value)
        for row, feature in zip(input_features, features, strict=True):
            row[:, : feature.shape[-1]] = feature
        attention_mask = torch.arange(frames) < torch.tensor(lengths)[:, None]
        batch = BatchFeature(
            {"input_features": input_features, "attention_mask": attention_mask.long().to(input_features.device)}
        )
        if return_tensors == "np":
            batch.update({name: tensor.cpu().numpy() for name, tensor in batch.items()})
        return batch

    @staticmethod
    def _check_clip(clip: Any, index: int) -> torch.Tensor:
        try:
            # A copy of an array, since torch has no read-only tensors and no negative strides.
            waveform = (
                torch.from_numpy(np.array(clip, order="C")) if isinstance(clip, np.ndarray) else torch.as_tensor(clip)
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"raw_audio, clip {index}: {error}; accepted: an array of floats") from error
        if waveform.ndim != 1:
            raise ValueError(f"raw_audio, clip {index}: shape {tuple(waveform.shape)}; accepted: mono, (samples,)")
        if waveform.numel() == 0:
            raise ValueError(f"raw_audio, clip {index}: empty; accepted: one sample or more")
        if not waveform.is_floating_point():
            raise ValueError(f"raw_audio, clip {index}: dtype {waveform.dtype}; accepted: floats in [-1, 1]")
        waveform = waveform.detach().to(torch.float32)
        if not torch.isfinite(waveform).all():
            raise ValueError(f"raw_audio, clip {index}: NaN or infinite samples; accepted: finite floats")
        return waveform


def _split_clips(raw_audio: Any) -> list[Any]:
    """One clip or many, as a list of clips."""
    if isinstance(raw_audio, (np.ndarray, torch.Tensor)):
        return list(raw_audio) if raw_audio.ndim > 1 else [raw_audio]
    if not isinstance(raw_audio, (list, tuple)):
        raise ValueError(f"raw_audio is a {type(raw_audio).__name__}; accepted: arrays, tensors or lists of them")
    if raw_audio and isinstance(raw_audio[0], numbers.Real):
        return [raw_audio]
    return list(raw_audio)


__all__ = ["MiMoAudioTokenizerFeatureExtractor"]
