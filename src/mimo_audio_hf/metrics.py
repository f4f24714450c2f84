# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""How much of a clip is kept, and of the codebooks used: plain functions, for evaluation and training.

PESQ and STOI are those of the packages `pesq` and `pystoi`, in the extra `eval`, imported where they are called.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

from .audio import resample
from .feature_extraction_mimo_audio_tokenizer import MiMoAudioTokenizerFeatureExtractor


# Evaluations of speech codecs take both kinds of PESQ from audio at 16 kHz: ITU-T P.862 filters it to telephone band
# itself for the narrow-band kind, P.862.2 has no other rate.
PESQ_RATE = 16000

# The package keeps 50 utterances in arrays that it writes beyond for more: other scores, or a crash. An utterance and
# the pause after it last 0.4 s or more, so that these clips cannot have more.
PESQ_MAX_SECONDS = 20

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
        ValueError: PESQ is not defined for these signals: less than a quarter of a second, more than
            `PESQ_MAX_SECONDS`, silence, or no speech found in them.
        ModuleNotFoundError: the package is not installed; the message names the extra.
    """
    if mode not in ("nb", "wb"):
        raise ValueError(f"mode={mode!r}; accepted: 'nb' or 'wb'")
    package = require_package("pesq")
    signals = [resample(signal, sampling_rate, PESQ_RATE).numpy() for signal in _pair(reference, degraded)]
    if len(signals[0]) > PESQ_MAX_SECONDS * PESQ_RATE:
        raise ValueError(f"PESQ: longer than {PESQ_MAX_SECONDS} s")
    for name, signal in zip(("reference", "degraded signal"), signals, strict=True):
        if not signal.any():
            raise ValueError(f"PESQ: the {name} is silent")
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


# By name, what compares a recording and what became of it: (reference, degraded, sampling_rate), as `pesq` takes them.
Metric = Callable[[torch.Tensor, torch.Tensor, int], float]
METRICS: dict[str, Metric] = {
    "pesq_nb": functools.partial(pesq, mode="nb"),
    "pesq_wb": functools.partial(pesq, mode="wb"),
    "stoi": stoi,
    "mel_distance": mel_distance,
}
_PACKAGES = {"pesq_nb": "pesq", "pesq_wb": "pesq", "stoi": "pystoi"}


def require_metrics(names: Iterable[str]) -> None:
    """Check that metrics exist and that what computes them is installed.

    Raises:
        ValueError: there is no such metric.
        ModuleNotFoundError: a package is not installed; the message names the extra.
    """
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metric {name!r}; accepted: {', '.join(METRICS)}")
        if name in _PACKAGES:
            require_package(_PACKAGES[name])


class CodebookCounter:
    """Counts how often each entry of each codebook occurs, a clip at a time.

    Args:
        sizes: entries of the codebooks.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.counts = [torch.zeros(size, dtype=torch.long) for size in sizes]

    def add(self, codes: torch.Tensor) -> None:
        """Count one clip's codes.

        Args:
            codes: (L, Q), integers; Q may differ between clips, and a codebook counts where it is present.

        Raises:
            ValueError: there are more codebooks than sizes, or codes are out of range; nothing of them is counted.
        """
        if codes.ndim != 2 or codes.shape[1] > len(self.counts):
            shape = tuple(codes.shape)
            raise ValueError(f"codes have shape {shape}; accepted: (frames, 1 to {len(self.counts)} codebooks)")
        columns = codes.long().cpu().t()
        for book, (column, count) in enumerate(zip(columns, self.counts, strict=False)):
            outside = column[(column < 0) | (column >= len(count))]
            if len(outside):
                raise ValueError(
                    f"codes hold {outside[0]} for codebook {book} (counted from 0); accepted: 0 to {len(count) - 1}"
                )
        for column, count in zip(columns, self.counts, strict=False):
            count += column.bincount(minlength=len(count))

    def use(self) -> list[CodebookUse]:
        """The use of each codebook by all the codes together."""
        return [
            CodebookUse(
                entries=len(count),
                used=int(count.count_nonzero()),
                perplexity=torch.special.entr(count.double() / count.sum().clamp(min=1)).sum().exp().item(),
            )
            for count in self.counts
        ]


def codebook_use(codes: Iterable[torch.Tensor], sizes: Sequence[int]) -> list[CodebookUse]:
    """The use of each codebook by all of some clips' codes: see [`CodebookCounter`]."""
    counter = CodebookCounter(sizes)
    for clip in codes:
        counter.add(clip)
    return counter.use()


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
                model, use_safetensors=True, dtype=torch.float32, output_loading_info=True
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
        one, other = (self.embedding(signal, sampling_rate) for signal in _pair(reference, degraded))
        return torch.nn.functional.cosine_similarity(one, other, dim=0).item()

    @torch.inference_mode()
    def embedding(self, signal: torch.Tensor, sampling_rate: int) -> torch.Tensor:
        """The speaker of a signal (samples,), alone: padding would not be nothing to every such model.

        Returns:
            (xvector_output_dim,) float32, where the model runs.

        Raises:
            ValueError: the signal is too short for the model.
        """
        rate = self.feature_extractor.sampling_rate
        samples = resample(signal.detach().cpu().float(), sampling_rate, rate).numpy()
        features = self.feature_extractor(samples, sampling_rate=rate, return_tensors="pt").to(self.model.device)
        too_short = f"speaker similarity: the clip is too short for {self.name}"
        try:
            embedding = self.model(**features).embeddings[0]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(too_short) from error
        if not embedding.isfinite().all():  # a single frame has no standard deviation
            raise ValueError(too_short)
        return embedding


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
    if not (reference.isfinite().all() and degraded.isfinite().all()):
        raise ValueError("a signal has NaN or infinite samples; accepted: finite samples")
    return reference, degraded
