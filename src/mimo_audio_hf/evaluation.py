# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""How well a tokenizer keeps speech, at several numbers of codebooks: the evaluation and its report.

    if __name__ == "__main__":  # workers import the script
        evaluation = evaluate(model, read_sources(["recordings"]), [8, 20])
        evaluation.save("evaluation")

The model runs in this process; PESQ, STOI and the mel distance, which take longer on a GPU's machine, in workers.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from .dataset import to_waveform
from .evaluation_clips import Clip as Clip
from .evaluation_clips import read_sources as read_sources
from .files import replacing
from .inference import MAX_BATCH_SECONDS, convert_each, decode_codes, encode_waveforms, group_by_seconds
from .metrics import (
    METRICS,
    CodebookCounter,
    CodebookUse,
    SpeakerVerifier,
    require_metrics,
    require_package,
)
from .modeling_mimo_audio_tokenizer import MiMoAudioTokenizerModel
from .quantization import quantization_of
from .workers import available_cores, worker_pool


Result = TypeVar("Result")
SPEAKER_SIMILARITY = "speaker_similarity"

_PACKAGES_REPORTED = ("mimo-audio-hf", "torch", "transformers", "numpy", "pesq", "pystoi")

# In the order of upstream's table: title, digits.
_COLUMNS: dict[str, tuple[str, int]] = {
    "pesq_nb": ("PESQ-NB", 2),
    "pesq_wb": ("PESQ-WB", 2),
    SPEAKER_SIMILARITY: ("speaker similarity", 2),
    "stoi": ("STOI", 2),
    "mel_distance": ("mel distance", 3),
}

# So many subsets stand beside each other in a table or a plot.
_MOST_COLUMNS = 4


# So many failures are told in the table's notes; evaluation.json has all.
_MOST_FAILURES = 10


@dataclass(frozen=True)
class ClipScores:
    """A clip's scores at one number of codebooks, and why it lacks some.

    Attributes:
        key, subset: as in [`Clip`].
        seconds: duration of its audio.
        num_quantizers: how many codebooks were decoded.
        scores: by metric.
        reasons: by metric, for those that are not defined for this clip.
    """

    key: str
    subset: str
    seconds: float
    num_quantizers: int
    scores: dict[str, float]
    reasons: dict[str, str]


@dataclass(frozen=True)
class Mean:
    """The mean of a metric over the `clips` of a subset for which it is defined; NaN if there are none."""

    value: float
    clips: int


@dataclass(frozen=True)
class Evaluation:
    """Scores of all clips, and what they were computed of and with.

    Attributes:
        model: name, dtype, device and attention backend.
        metrics: names of the metrics, in the table's order.
        speaker_model: name of the model behind the speaker similarity, or None.
        clips: scores of every clip at every number of codebooks.
        failures: by clip, why it could not be read, encoded or decoded.
        codebooks: use of each codebook by all clips.
        bitrates: bit/s by number of codebooks.
        real_time_factors: time of encoding and decoding, without reading, over that of the audio, by number of
            codebooks. Encoding is done once, with the largest number.
    """

    model: dict[str, str]
    metrics: list[str]
    speaker_model: str | None
    clips: list[ClipScores]
    failures: dict[str, str]
    codebooks: list[CodebookUse]
    bitrates: dict[int, float]
    real_time_factors: dict[int, float]
    versions: dict[str, str] = field(default_factory=lambda: _versions())

    @cached_property
    def subsets(self) -> list[str]:
        """Names of the subsets, in the order of the clips."""
        return list(dict.fromkeys(clip.subset for clip in self.clips))

    def mean(self, metric: str, subset: str | None, num_quantizers: int) -> Mean:
        """Over a subset, or over all clips (None)."""
        values = self._scores[metric, subset, num_quantizers]
        return Mean(math.fsum(values) / len(values) if values else math.nan, len(values))

    @cached_property
    def _scores(self) -> defaultdict[tuple[str, str | None, int], list[float]]:
        """By metric, subset (None: all clips) and number of codebooks."""
        scores = defaultdict(list)
        for clip in self.clips:
            for (metric, score), subset in itertools.product(clip.scores.items(), (None, clip.subset)):
                scores[metric, subset, clip.num_quantizers].append(score)
        return scores

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON. A mean over no clips is None; the subset None is all clips."""
        content = asdict(self)
        clips, failures = content.pop("clips"), content.pop("failures")
        means = [
            {"subset": subset, "num_quantizers": count}
            | {
                metric: {"mean": mean.value if mean.clips else None, "clips": mean.clips}
                for metric in self.metrics
                for mean in [self.mean(metric, subset, count)]
            }
            for subset, count in itertools.product([None, *self.subsets], self.bitrates)
        ]
        return content | {"means": means, "failures": failures, "clips": clips}

    def to_markdown(self) -> str:
        """A table, laid out like upstream's README where there are few subsets, and what it does not tell below."""
        subsets = self.subsets
        titles = [_COLUMNS[metric][0] for metric in self.metrics]
        if len(subsets) <= _MOST_COLUMNS:
            rows = [["codebooks", "bit/s", *(f"{subset}: {title}" for subset in subsets for title in titles), "RTF"]]
            for count in self.bitrates:
                first, *cells, last = self._cells(subsets, count)
                rows.append([str(count), first, *cells, last])
        else:
            rows = [["set", "codebooks", "bit/s", *titles, "RTF"]]
            for subset, count in itertools.product([None, *subsets], self.bitrates):
                rows.append([subset or "all", str(count), *self._cells([subset], count)])
        seconds = {(clip.subset, clip.key): clip.seconds for clip in self.clips}
        sizes = Counter(subset for subset, _ in seconds)
        notes = [
            f"{self.model['name']}, {self.model['dtype']}, {self.model['device']}; "
            + ", ".join(f"{subset}: {number} clip{'s'[: number != 1]}" for subset, number in sizes.items())
            + f"; {sum(seconds.values()):.1f} s of audio. RTF: encoding and decoding, without reading and metrics."
        ]
        if self.speaker_model is not None:
            notes.append(f"Speaker similarity: {self.speaker_model}.")
        missing = Counter(
            (_COLUMNS[metric][0], reason) for clip in self.clips for metric, reason in clip.reasons.items()
        )
        notes += [
            f"Without {title}: {number} of {len(self.clips)} decoded clips ({reason})."
            for (title, reason), number in missing.items()
        ]
        failures = [f"Failed: {error if key in error else f'{key}: {error}'}." for key, error in self.failures.items()]
        notes += failures[:_MOST_FAILURES]
        if len(failures) > _MOST_FAILURES:
            notes.append(f"Failed: {len(failures) - _MOST_FAILURES} more, in evaluation.json.")
        use = [["codebook", "entries", "used", "perplexity"]]
        use += [
            [str(book), str(each.entries), str(each.used), f"{each.perplexity:.1f}"]
            for book, each in enumerate(self.codebooks)
        ]
        return "\n\n".join([_markdown_table(rows), *notes, _markdown_table(use)]) + "\n"

    def _cells(self, subsets: Sequence[str | None], count: int) -> list[str]:
        """Bitrate, the means of subsets, and RTF at a number of codebooks."""
        means = []
        for subset, metric in itertools.product(subsets, self.metrics):
            mean = self.mean(metric, subset, count)
            means.append(f"{mean.value:.{_COLUMNS[metric][1]}f}" if mean.clips else "-")
        return [f"{self.bitrates[count]:.0f}", *means, f"{self.real_time_factors[count]:.4f}"]

    def save_plot(self, path: str | os.PathLike[str]) -> None:
        """A rate-quality plot in the format of the path's suffix: a panel for each metric, a line for each subset.

        Where there are many subsets, one line is for all clips.

        Raises:
            ModuleNotFoundError: matplotlib is not installed; the message names the extra.
        """
        require_package("matplotlib")
        from matplotlib.figure import Figure

        path = Path(path)
        figure = Figure(figsize=(3.2 * len(self.metrics), 3.2), layout="constrained")
        panels = figure.subplots(1, len(self.metrics), squeeze=False)[0]
        counts = sorted(self.bitrates)
        lines = self.subsets if len(self.subsets) <= _MOST_COLUMNS else [None]
        for panel, metric in zip(panels, self.metrics, strict=True):
            for subset in lines:
                values = [self.mean(metric, subset, count).value for count in counts]
                label = (subset or "all").replace("$", r"\$")  # no formula
                panel.plot([self.bitrates[count] / 1000 for count in counts], values, marker="o", label=label)
            panel.set(title=_COLUMNS[metric][0], xlabel="kbit/s")
            panel.grid(alpha=0.3)
        panels[0].legend()
        with replacing(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], dpi=150)

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write evaluation.json, evaluation.md and evaluation.png, and return their paths.

        Raises:
            ValueError: one of them exists.
            ModuleNotFoundError: matplotlib is not installed.
        """
        paths = require_free(directory)
        with replacing(paths[0]) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        with replacing(paths[1]) as temporary:
            temporary.write_text(self.to_markdown(), encoding="utf-8")
        self.save_plot(paths[2])
        return paths


def require_free(directory: str | os.PathLike[str]) -> list[Path]:
    """The files that [`Evaluation.save`] writes.

    Raises:
        ValueError: one of them exists already, or none can be written there.
    """
    paths = [Path(directory, f"evaluation.{suffix}") for suffix in ("json", "md", "png")]
    for path in paths:
        if path.exists():
            raise ValueError(f"{path} exists; accepted: a folder without the results of another evaluation")
    existing = next(folder for folder in paths[0].absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{existing}: cannot be written to; accepted: a folder, or a name for a new one")
    return paths


def evaluate(
    model: MiMoAudioTokenizerModel,
    clips: Iterable[Clip],
    num_quantizers: Sequence[int] | None = None,
    *,
    metrics: Sequence[str] = tuple(METRICS),
    speaker_verifier: SpeakerVerifier | None = None,
    num_workers: int | None = None,
    max_batch_seconds: float = MAX_BATCH_SECONDS,
    progress: bool | None = False,
) -> Evaluation:
    """Encode and decode clips, and compare what comes back with what went in.

    Args:
        model: a tokenizer with a decoder, in evaluation mode; runs where it is.
        clips: of [`read_sources`], or one's own; taken a batch at a time.
        num_quantizers: numbers of codebooks to decode; all of the model's by default.
        metrics: names in `METRICS`.
        speaker_verifier: gives the speaker similarity, which is left out by default.
        num_workers: processes that compute the metrics; by default one for each processor, less one where the model
            runs on a GPU.
        max_batch_seconds: seconds of audio that run at once.
        progress: shows a progress bar; None: on a terminal only.

    Returns:
        The scores. A clip that cannot be read, encoded or decoded is among its failures, the others are finished.

    Raises:
        ValueError: an argument is wrong, the model has no decoder, or no clip could be evaluated.
        ModuleNotFoundError: the package of a metric is not installed; found before anything is encoded.
        OSError: a worker process died.
    """
    counts = sorted(set(num_quantizers or [model.config.num_quantizers]))
    for count in counts:
        model.check_num_quantizers(count)
    if model.training:
        raise ValueError(
            "the model is in training mode, in which encoding changes its codebooks; accepted: model.eval()"
        )
    require_metrics(metrics)
    require_package("threadpoolctl")
    if not metrics and speaker_verifier is None:
        raise ValueError(f"there are no metrics; accepted: one or more of {', '.join(METRICS)}, or a speaker_verifier")
    num_workers = _num_workers(model.device) if num_workers is None else num_workers
    if num_workers < 1:
        raise ValueError(f"num_workers={num_workers}; accepted: 1 or more")

    sampling_rate = model.config.sampling_rate
    failures: dict[str, str] = {}
    scores: list[ClipScores] = []
    codebooks = CodebookCounter(model.config.codebook_sizes[: max(counts)])
    clock = _Clock()

    def encode(waveforms: list[torch.Tensor]) -> list[torch.Tensor]:
        return encode_waveforms(model, waveforms, max(counts), max_batch_seconds=max_batch_seconds)

    def decode(codes: list[torch.Tensor]) -> list[torch.Tensor]:
        return decode_codes(model, codes, max_batch_seconds=max_batch_seconds)

    decode(encode([torch.zeros(sampling_rate)]))  # the first run compiles and allocates: it is not to be timed

    def convert(
        work: str, function: Callable[[list[torch.Tensor]], list[torch.Tensor]], inputs: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Results by clip, of those that do not fail."""
        with clock.measure(work):
            results = convert_each(function, [*inputs.values()])
        found = dict(zip(inputs, results, strict=True))
        failures.update({key: _one_line(result) for key, result in found.items() if isinstance(result, Exception)})
        return {key: result for key, result in found.items() if isinstance(result, torch.Tensor)}

    def read(bar: tqdm) -> Iterator[tuple[Clip, torch.Tensor]]:
        keys: set[str] = set()
        for clip in clips:
            if clip.key in keys:
                raise ValueError(f"two clips have the key {clip.key!r}; accepted: different keys")
            keys.add(clip.key)
            try:
                if isinstance(clip.audio, Exception):
                    raise clip.audio
                yield clip, to_waveform(clip.audio, sampling_rate)
            except (ValueError, OSError) as error:
                failures[clip.key] = _one_line(error)
                bar.update()

    with (
        worker_pool(num_workers, __name__, _limit_threads) as pool,
        tqdm(
            desc="evaluated",
            total=len(clips) if isinstance(clips, Sized) else None,
            unit="clip",
            disable=None if progress is None else not progress,
        ) as bar,
    ):
        pending: list[_PendingScores] = []
        for group in group_by_seconds(read(bar), lambda entry: len(entry[1]) / sampling_rate, max_batch_seconds):
            codes = convert("encode", encode, {clip.key: waveform for clip, waveform in group})
            decoded: dict[int, dict[str, torch.Tensor]] = {}
            for count in counts:
                inputs = {key: each[:, :count] for key, each in codes.items() if key not in failures}
                decoded[count] = convert(f"decode {count}", decode, inputs)
            # Workers start once the batch is timed, and while they are busy a GPU goes on with the next one. On a CPU
            # they would slow the model down.
            submitted: list[_PendingScores] = []
            for clip, waveform in group:
                if clip.key in failures:
                    continue
                codebooks.add(codes[clip.key])
                clock.audio_seconds += len(waveform) / sampling_rate
                degraded = {count: decoded[count][clip.key][: len(waveform)] for count in counts}
                submitted += _submit_scores(pool, clip, waveform, degraded, sampling_rate, metrics, speaker_verifier)
            scores += [each.result() for each in pending]
            pending = submitted
            if model.device.type == "cpu":
                scores += [each.result() for each in pending]
                pending = []
            bar.update(len(group))
            bar.set_postfix_str(f"{clock.audio_seconds / clock.elapsed:.1f} s of audio/s")
        scores += [each.result() for each in pending]

    if not scores:
        key, error = next(iter(failures.items()), ("", "there are none; accepted: one or more"))
        raise ValueError(f"none of {len(failures)} clips could be evaluated; the first: {key}: {error}")
    names = [*metrics] if speaker_verifier is None else [*metrics, SPEAKER_SIMILARITY]
    return Evaluation(
        model={
            "name": model.config.name_or_path or "",
            "dtype": quantization_of(model) or str(model.dtype).removeprefix("torch."),
            "device": _device_name(model.device),
            "attention": model.attn_implementation,
        },
        metrics=[name for name in _COLUMNS if name in names],
        speaker_model=None if speaker_verifier is None else speaker_verifier.name,
        clips=scores,
        failures=failures,
        codebooks=codebooks.use(),
        bitrates={count: model.config.bitrate(count) for count in counts},
        real_time_factors={
            count: (clock.spent["encode"] + clock.spent[f"decode {count}"]) / clock.audio_seconds for count in counts
        },
    )


# --- Workers ---


@dataclass(frozen=True)
class _PendingScores:
    """Scores of a clip that a worker computes."""

    key: str
    subset: str
    seconds: float
    num_quantizers: int
    scores: Future[tuple[dict[str, float], dict[str, str]]]
    speaker_similarity: float | str | None

    def result(self) -> ClipScores:
        try:
            scores, reasons = self.scores.result()
        except BrokenProcessPool as error:
            raise OSError(
                f"a worker process died at or near {self.key}, perhaps of want of memory; accepted: fewer workers"
            ) from error
        if isinstance(self.speaker_similarity, str):
            reasons[SPEAKER_SIMILARITY] = self.speaker_similarity
        elif self.speaker_similarity is not None:
            scores[SPEAKER_SIMILARITY] = self.speaker_similarity
        return ClipScores(self.key, self.subset, self.seconds, self.num_quantizers, scores, reasons)


class _Clock:
    """Time spent on each kind of work, and the audio that it was spent on."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.audio_seconds = 0.0

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    @contextmanager
    def measure(self, work: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.spent[work] += time.perf_counter() - begun


def _num_workers(device: torch.device) -> int:
    cores = available_cores()
    return cores if device.type == "cpu" else max(1, cores - 1)  # one of them launches the model's kernels


def _limit_threads() -> None:
    """Of the libraries that the metrics use."""
    require_package("threadpoolctl").threadpool_limits(1)


def _submit_scores(
    pool: ProcessPoolExecutor,
    clip: Clip,
    reference: torch.Tensor,
    degraded: dict[int, torch.Tensor],
    sampling_rate: int,
    metrics: Sequence[str],
    speaker_verifier: SpeakerVerifier | None,
) -> list[_PendingScores]:
    """What is to be known of a clip at each number of codebooks. Speakers are compared at once."""
    similarities = (
        _speaker_similarities(speaker_verifier, reference, degraded, sampling_rate) if speaker_verifier else {}
    )
    return [
        _PendingScores(
            clip.key,
            clip.subset,
            len(reference) / sampling_rate,
            count,
            pool.submit(_score, reference.numpy(), signal.numpy(), sampling_rate, tuple(metrics)),
            similarities.get(count),
        )
        for count, signal in degraded.items()
    ]


def _speaker_similarities(
    verifier: SpeakerVerifier, reference: torch.Tensor, degraded: dict[int, torch.Tensor], sampling_rate: int
) -> dict[int, float | str]:
    """By number of codebooks, or why there is none."""
    expected = _attempt(verifier.embedding, reference, sampling_rate)
    if isinstance(expected, str):
        return dict.fromkeys(degraded, expected)

    def similarity(signal: torch.Tensor) -> float:
        found = verifier.embedding(signal, sampling_rate)
        return torch.nn.functional.cosine_similarity(expected, found, dim=0).item()

    return {count: _attempt(similarity, signal) for count, signal in degraded.items()}


def _score(
    reference: Any, degraded: Any, sampling_rate: int, metrics: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Scores by metric, and the reasons of those that the signals do not have."""
    signals = torch.from_numpy(reference), torch.from_numpy(degraded)
    outcomes = {metric: _attempt(METRICS[metric], *signals, sampling_rate) for metric in metrics}
    scores = {metric: outcome for metric, outcome in outcomes.items() if not isinstance(outcome, str)}
    return scores, {metric: outcome for metric, outcome in outcomes.items() if isinstance(outcome, str)}


def _attempt(function: Callable[..., Result], *arguments: Any) -> Result | str:
    """A result, or why there is none."""
    try:
        return function(*arguments)
    except (ValueError, torch.OutOfMemoryError) as error:
        return _one_line(error)


# --- Report ---


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = [[cell.replace("|", "\\|") for cell in cells] for cells in rows]
    lines = [header, ["---:"] * len(header), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES_REPORTED:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:  # importlib's PackageNotFoundError: a metric that was not asked for
            continue
    return found


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


def _one_line(error: Exception) -> str:
    message = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    return " ".join(message.split())
