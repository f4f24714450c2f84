# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""How much of a clip is kept, and of the codebooks used: plain functions, for evaluation and training.

PESQ and STOI are those of the packages `pesq` and `pystoi`, in the extra `eval`, imported where they are called.
"""

from __future__ import annotations

import importlib
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

from .audio import resample
from .feature_extraction_mimo_audio_tokenizer import MiMoAudioTokenizerFeatureExtractor


# Evaluations of speech codecs take both kinds of PESQ from audio at 16 kHz: ITU-T P.862 filters it to telephone band
# itself for the narrow-band kind, P.862.2 has no other rate.
PESQ_RATE = 16000

# A sine at full scale has a mel magnitude of about 200, rounding to 16 bits one of about 2e-4: below is only noise.
MEL_DISTANCE_FLOOR = 1e-3


@dataclass(frozen=True)
class CodebookUse:
    """How a codebook is used by some codes.

    Attributes:
        entries: its size.
        used: how many of its entries occur.
        perplexity: exp of the entropy of its entries' frequencies: from 1 to `entries`, all equally frequent.
    """

    entries: int
    used: int
    perplexity: float


def pesq(reference: torch.Tensor, degraded: torch.Tensor, sampling_rate: int, mode: str) -> float:
    """PESQ as MOS-LQO, about 1 (bad) to 4.5 (narrow band) or 4.6 (wide band).

    Args:
        reference, degraded: the recording and what became of it: (samples,), floating, equally long.
        sampling_rate: of both, in Hz; they are resampled to 16 kHz.
        mode: `"nb"`, ITU-T P.862.1, or `"wb"`, ITU-T P.862.2.

    Raises:
        ValueError: PESQ is not defined for these signals: less than a quarter of a second, or no speech found in them.
        ModuleNotFoundError: the package is not installed; the message names the extra.
    """
    if mode not in ("nb", "wb"):
        raise ValueError(f"mode={mode!r}; accepted: 'nb' or 'wb'")
    package = require_package("pesq")
    signals = [resample(signal, sampling_rate, PESQ_RATE).numpy() for signal in _pair(reference, degraded)]
    if not signals[0].any():
        raise ValueError("PESQ: the reference is silent")
    try:
        return float(package.pesq(PESQ_RATE, *signals, mode))
    except package.PesqError as error:
        reason = error.args[0] if error.args else error
        reason = reason.decode() if isinstance(reason, bytes) else reason
        raise ValueError(f"PESQ: {reason or type(error).__name__}") from error


def stoi(reference: torch.Tensor, degraded: torch.Tensor, sampling_rate: int) -> float:
    """Short-time objective intelligibility (Taal et al. 2011), at most 1.

    Args:
        reference, degraded: as for [`pesq`].
        sampling_rate: of both, in Hz; the package resamples to 10 kHz.

    Raises:
        ValueError: STOI is not defined for these signals: less than 0.4 s of the reference is not silent.
        ModuleNotFoundError: the package is not installed; the message names the extra.
    """
    package = require_package("pystoi")
    signals = [signal.double().numpy() for signal in _pair(reference, degraded)]
    if not signals[0].any():
        raise ValueError("STOI: the reference is silent")
    with warnings.catch_warnings():
        # The package warns, and returns 1e-5.
        warnings.filterwarnings("error", "Not enough STFT frames", RuntimeWarning)
        try:
            return float(package.stoi(*signals, sampling_rate))
        except (RuntimeWarning, ValueError) as error:
            raise ValueError("STOI: less than 0.4 s of the reference is not silent") from error


def mel_distance(reference: torch.Tensor, degraded: torch.Tensor, sampling_rate: int) -> float:
    """Mean absolute difference of log-mel spectrograms, in nepers.

    The mel spectrogram is the tokenizer's own (128 bands up to Nyquist, 40 ms windows every 10 ms at 24 kHz), with a
    higher floor under the logarithm (1e-3): at the tokenizer's own, silences would decide.

    Args:
        reference, degraded: as for [`pesq`]; on any device, of at least one sample.
        sampling_rate: of both, in Hz; the windows scale with it.
    """
    hop = max(1, sampling_rate // 100)
    extractor = MiMoAudioTokenizerFeatureExtractor(
        sampling_rate=sampling_rate, hop_length=hop, nfft=4 * hop, window_size=4 * hop
    )
    floor = math.log(MEL_DISTANCE_FLOOR)
    mels = [
        extractor.log_mel_spectrogram(signal.detach().float()).clamp(min=floor)
        for signal in _require_pair(reference, degraded)
    ]
    return (mels[0] - mels[1]).abs().mean().item()


def codebook_use(codes: Iterable[torch.Tensor], sizes: Sequence[int]) -> list[CodebookUse]:
    """The use of each codebook by all the codes together.

    Args:
        codes: clips (L, Q), integers; Q may differ between clips, and a codebook counts where it is present.
        sizes: entries of the codebooks.

    Raises:
        ValueError: codes have more codebooks than there are sizes, or are out of range.
    """
    counts = [torch.zeros(size, dtype=torch.long) for size in sizes]
    for clip in codes:
        if clip.ndim != 2 or clip.shape[1] > len(counts):
            shape = tuple(clip.shape)
            raise ValueError(f"codes have shape {shape}; accepted: (frames, 1 to {len(counts)} codebooks)")
        for book, column in enumerate(clip.long().cpu().t()):
            found = column.bincount(minlength=sizes[book])
            if len(found) != sizes[book]:
                raise ValueError(
                    f"codes hold {len(found) - 1} for codebook {book} (counted from 0); "
                    f"accepted: 0 to {sizes[book] - 1}"
                )
            counts[book] += found
    return [
        CodebookUse(
            entries=len(count),
            used=int(count.count_nonzero()),
            perplexity=torch.special.entr(count.double() / count.sum().clamp(min=1)).sum().exp().item(),
        )
        for count in counts
    ]


class SpeakerVerifier:
    """Speaker similarity: the cosine of two recordings' speaker embeddings.

    Args:
        model: a Hub id or a directory of one of transformers' x-vector models, such as `WavLMForXVector`, with
            safetensors weights and a feature extractor.
        device: where it runs.

    Raises:
        ValueError: there is no such model, or it is another kind of model.
    """

    def __init__(self, model: str | os.PathLike[str], device: torch.device | str = "cpu") -> None:
        self.name = os.fspath(model)
        try:
            self.feature_extractor = AutoFeatureExtractor.from_pretrained(model)
            loaded, report = AutoModelForAudioXVector.from_pretrained(
                model, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"speaker model {self.name!r}: {' '.join(str(error).split())} accepted: a Hub id or a directory with "
                "an x-vector model, such as WavLMForXVector, in safetensors and its feature extractor"
            ) from error
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise ValueError(
                f"speaker model {self.name!r} has no weights {missing[0]} (and {len(missing) - 1} more); accepted: "
                "a model that was trained for speaker verification"
            )
        self.model = loaded.to(device).eval()

    def similarity(self, reference: torch.Tensor, degraded: torch.Tensor, sampling_rate: int) -> float:
        """Cosine similarity, -1 to 1, of the speakers of two signals.

        Args:
            reference, degraded: as for [`pesq`].
            sampling_rate: of both, in Hz; they are resampled to the model's rate.

        Raises:
            ValueError: the signals are too short for the model.
        """
        one, other = (self._embedding(signal, sampling_rate) for signal in _pair(reference, degraded))
        return torch.nn.functional.cosine_similarity(one, other).item()

    @torch.inference_mode()
    def _embedding(self, signal: torch.Tensor, sampling_rate: int) -> torch.Tensor:
        """(1, xvector_output_dim) of one signal, alone: padding would not be nothing to every such model."""
        rate = self.feature_extractor.sampling_rate
        features = self.feature_extractor(
            resample(signal, sampling_rate, rate).numpy(), sampling_rate=rate, return_tensors="pt"
        ).to(self.model.device)
        try:
            return self.model(**features).embeddings
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            seconds = len(signal) / sampling_rate
            raise ValueError(f"speaker similarity: {seconds:.2f} s of audio is too short for {self.name}") from error


def require_package(name: str, extra: str = "eval") -> ModuleType:
    """A package of an extra.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the package {name} is not installed; accepted: pip install 'mimo-audio-hf[{extra}]'", name=name
        ) from error


def _pair(reference: torch.Tensor, degraded: torch.Tensor) -> list[torch.Tensor]:
    """Both on the CPU in float32, as the packages that compare them want them."""
    return [signal.detach().cpu().float() for signal in _require_pair(reference, degraded)]


def _require_pair(reference: torch.Tensor, degraded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if reference.ndim != 1 or reference.shape != degraded.shape or not len(reference):
        raise ValueError(
            f"reference and degraded have shapes {tuple(reference.shape)} and {tuple(degraded.shape)}; "
            "accepted: (samples,), equally long, not empty"
        )
    return reference, degraded
