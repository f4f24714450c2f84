# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""How well a tokenizer keeps speech, at several numbers of codebooks: sources of clips, the evaluation and its report.

    clips, problems = read_sources(["recordings"])
    evaluation = evaluate(model, clips, [8, 20])
    evaluation.save("evaluation")

The model runs in this process; PESQ, STOI and the mel distance, which take longer on a GPU's machine, in workers.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from tqdm import tqdm

from .audio import AUDIO_SUFFIXES
from .codes import code_dtype
from .dataset import to_waveform
from .files import replacing
from .inference import MAX_BATCH_SECONDS, convert_each, decode_codes, encode_waveforms, group_by_seconds
from .metrics import (
    CodebookUse,
    SpeakerVerifier,
    codebook_use,
    mel_distance,
    pesq,
    require_package,
    stoi,
)
from .modeling_mimo_audio_tokenizer import MiMoAudioTokenizerModel


Metric = Callable[[torch.Tensor, torch.Tensor, int], float]

# What workers compute, of the reference, what became of it, and their sampling rate.
METRICS: dict[str, Metric] = {
    "pesq_nb": functools.partial(pesq, mode="nb"),
    "pesq_wb": functools.partial(pesq, mode="wb"),
    "stoi": stoi,
    "mel_distance": mel_distance,
}
SPEAKER_SIMILARITY = "speaker_similarity"

_PACKAGES = {"pesq_nb": "pesq", "pesq_wb": "pesq", "stoi": "pystoi"}
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

_ACCEPTED = (
    "accepted: a folder of audio files, a dataset (a directory that datasets saved, or of Parquet files), or a list "
    "in the format of Seed-TTS-Eval's meta.lst"
)


@dataclass(frozen=True)
class Clip:
    """A clip to evaluate.

    Attributes:
        key: its name, unique.
        subset: what it is averaged with: a language or a set.
        read: gives its audio, as `to_waveform` takes it: a path or a value of a dataset's column.
    """

    key: str
    subset: str
    read: Callable[[], Any]


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

    @property
    def subsets(self) -> list[str]:
        """Names of the subsets, in the order of the clips."""
        return list(dict.fromkeys(clip.subset for clip in self.clips))

    def mean(self, metric: str, subset: str | None, num_quantizers: int) -> Mean:
        """Over a subset, or over all clips (None)."""
        values = [
            clip.scores[metric]
            for clip in self.clips
            if subset in (None, clip.subset) and clip.num_quantizers == num_quantizers and metric in clip.scores
        ]
        return Mean(sum(values) / len(values) if values else float("nan"), len(values))

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
            + ", ".join(f"{subset}: {number} clips" for subset, number in sizes.items())
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
        notes += [f"Failed: {key}: {error}." for key, error in self.failures.items()]
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
                panel.plot(
                    [self.bitrates[count] / 1000 for count in counts], values, marker="o", label=subset or "all"
                )
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
        ValueError: one of them exists already.
    """
    paths = [Path(directory, f"evaluation.{suffix}") for suffix in ("json", "md", "png")]
    for path in paths:
        if path.exists():
            raise ValueError(f"{path} exists; accepted: a folder without the results of another evaluation")
    return paths


def evaluate(
    model: MiMoAudioTokenizerModel,
    clips: Sequence[Clip],
    num_quantizers: Sequence[int] | None = None,
    *,
    metrics: Sequence[str] = tuple(METRICS),
    speaker_verifier: SpeakerVerifier | None = None,
    workers: int | None = None,
    max_batch_seconds: float = MAX_BATCH_SECONDS,
    progress: bool | None = False,
) -> Evaluation:
    """Encode and decode clips, and compare what comes back with what went in.

    Args:
        model: a tokenizer with a decoder, in evaluation mode; runs where it is.
        clips: what [`read_sources`] gives; read when they are needed, a batch at a time.
        num_quantizers: numbers of codebooks to decode; all of the model's by default.
        metrics: names in `METRICS`.
        speaker_verifier: gives the speaker similarity, which is left out by default.
        workers: processes that compute the metrics; as many as there are processors by default.
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
    if model.decoder is None:
        name = model.config.name_or_path
        raise ValueError(f"{name} holds an encoder only: it cannot decode; accepted: a model with a decoder")
    if model.training:
        raise ValueError(
            "the model is in training mode, in which encoding changes its codebooks; accepted: model.eval()"
        )
    require_metrics(metrics)
    if not clips:
        raise ValueError("there are no clips to evaluate; accepted: one or more")
    workers = os.cpu_count() or 1 if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers={workers}; accepted: 1 or more")

    sampling_rate = model.config.sampling_rate
    failures: dict[str, str] = {}
    scored: list[ClipScores] = []
    all_codes: list[torch.Tensor] = []
    stored = code_dtype(model.config.codebook_sizes)
    clock = _Clock()
    _warm_up(model, counts)

    def read(bar: tqdm) -> Iterator[tuple[Clip, torch.Tensor]]:
        for clip in clips:
            try:
                yield clip, to_waveform(clip.read(), sampling_rate)
            except (ValueError, OSError) as error:
                failures[clip.key] = _one_line(error)
                bar.update()

    with (
        _worker_pool(min(workers, len(clips))) as pool,
        tqdm(
            desc="evaluated", total=len(clips), unit="clip", disable=None if progress is None else not progress
        ) as bar,
    ):
        pending: list[_PendingScores] = []
        for group in group_by_seconds(read(bar), lambda entry: len(entry[1]) / sampling_rate, max_batch_seconds):
            codes = clock.time(
                "encode",
                convert_each,
                lambda waveforms: encode_waveforms(model, waveforms, max(counts), max_batch_seconds=max_batch_seconds),
                [waveform for _, waveform in group],
            )
            converted: list[tuple[Clip, torch.Tensor, torch.Tensor]] = []
            for (clip, waveform), result in zip(group, codes, strict=True):
                if isinstance(result, Exception):
                    failures[clip.key] = _one_line(result)
                else:
                    converted.append((clip, waveform, result))
            submitted: list[_PendingScores] = []
            for count in counts:
                decoded = clock.time(
                    f"decode {count}",
                    convert_each,
                    lambda clips: decode_codes(model, clips, max_batch_seconds=max_batch_seconds),
                    [clip_codes[:, :count] for _, _, clip_codes in converted],
                )
                for (clip, waveform, _), result in zip(converted, decoded, strict=True):
                    if isinstance(result, Exception):
                        failures[clip.key] = _one_line(result)
                        continue
                    degraded = result[: len(waveform)]
                    submitted.append(
                        _PendingScores(
                            clip,
                            len(waveform) / sampling_rate,
                            count,
                            pool.submit(_score, waveform.numpy(), degraded.numpy(), sampling_rate, tuple(metrics)),
                            _try(speaker_verifier.similarity, waveform, degraded, sampling_rate)
                            if speaker_verifier is not None
                            else None,
                        )
                    )
            all_codes += [clip_codes.to(stored) for clip, _, clip_codes in converted if clip.key not in failures]
            # The workers are busy while a GPU goes on. On a CPU they would slow it down and spoil its figures.
            scored += [each.result() for each in pending]
            pending = submitted
            if model.device.type == "cpu":
                scored += [each.result() for each in pending]
                pending = []
            clock.audio_seconds += sum(len(waveform) for _, waveform, _ in converted) / sampling_rate
            bar.update(len(group))
            bar.set_postfix_str(f"{clock.audio_seconds / clock.elapsed:.1f} s of audio/s")
        scored += [each.result() for each in pending]

    scored = [clip for clip in scored if clip.key not in failures]
    if not scored:
        key, error = next(iter(failures.items()))
        raise ValueError(f"none of {len(clips)} clips could be evaluated; the first: {key}: {error}")
    names = [*metrics] if speaker_verifier is None else [*metrics, SPEAKER_SIMILARITY]
    return Evaluation(
        model={
            "name": model.config.name_or_path or "",
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": _device_name(model.device),
            "attention": model.attn_implementation,
        },
        metrics=[name for name in _COLUMNS if name in names],
        speaker_model=None if speaker_verifier is None else speaker_verifier.name,
        clips=scored,
        failures=failures,
        codebooks=codebook_use(all_codes, model.config.codebook_sizes[: max(counts)]),
        bitrates={count: model.config.bitrate(count) for count in counts},
        real_time_factors={
            count: (clock.spent["encode"] + clock.spent[f"decode {count}"]) / clock.audio_seconds for count in counts
        },
    )


def require_metrics(metrics: Iterable[str]) -> None:
    """Check that metrics exist and that their packages, and matplotlib for the plot, are there.

    Raises:
        ValueError: there is no such metric.
        ModuleNotFoundError: a package is not installed; the message names the extra.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"metric {metric!r}; accepted: {', '.join(METRICS)}")
        if metric in _PACKAGES:
            require_package(_PACKAGES[metric])


# --- Sources of clips ---


def read_sources(
    sources: Sequence[str | os.PathLike[str]], *, audio_column: str = "audio", list_audio: str = "prompt"
) -> tuple[list[Clip], dict[str, str]]:
    """The clips of folders, datasets and lists; no audio is read yet.

    A folder is searched for audio files; files in its subfolders are averaged by the first of these (`zh/a.wav` with
    `zh/b/c.wav`). A dataset is what `save_to_disk` wrote, or a directory of Parquet files; its clips are averaged by
    the column `language` where there is one, else by split (`train` if nothing names it), and named by the column
    `key` or `id`. A list has lines
    `name|prompt text|prompt audio|text` or, with one field more, `...|audio`, as Seed-TTS-Eval's meta.lst; paths are
    relative to it, and its clips are averaged under the name of its folder, which is their language there.

    Args:
        sources: any number of these.
        audio_column: of datasets.
        list_audio: which audio of a list: `"prompt"`, each once though several lines name it (so counts upstream:
            1010 in Chinese, 666 in English), or `"target"`, the recording of the text, by default `wavs/name.wav`.

    Returns:
        The clips, and by place (file and line) what is wrong with others.

    Raises:
        ValueError: a source is none of these or has no clips, two of them have clips of one key, or a dataset has no
            such column.
        OSError: a list cannot be read.
    """
    if list_audio not in ("prompt", "target"):
        raise ValueError(f"list_audio={list_audio!r}; accepted: 'prompt' or 'target'")
    clips: dict[str, Clip] = {}
    problems: dict[str, str] = {}
    for source in map(Path, sources):
        if source.is_dir():
            dataset = _open_dataset(source)
            found = _folder_clips(source) if dataset is None else _dataset_clips(source, dataset, audio_column)
        elif source.is_file():
            found = _list_clips(source, list_audio, problems)
        else:
            raise ValueError(f"{source}: no such file or directory; {_ACCEPTED}")
        before = len(clips) + len(problems)
        for clip in found:
            if clip.key in clips:
                raise ValueError(f"{source}: two clips have the key {clip.key!r}; accepted: different keys")
            clips[clip.key] = clip
        if len(clips) + len(problems) == before:
            raise ValueError(f"{source}: no clips; {_ACCEPTED}")
    return list(clips.values()), problems


def _folder_clips(folder: Path) -> Iterator[Clip]:
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES):
        if path.is_file():
            place = path.relative_to(folder)
            subset = place.parts[0] if len(place.parts) > 1 else folder.resolve().name
            yield Clip(str(path), subset, functools.partial(str, path))


def _open_dataset(directory: Path) -> datasets.DatasetDict | None:
    """A dataset by its splits, or None of a directory that is none."""
    if (directory / "dataset_dict.json").is_file() or (directory / "state.json").is_file():
        loaded = datasets.load_from_disk(directory)
        if isinstance(loaded, datasets.Dataset):
            return datasets.DatasetDict({str(loaded.split or directory.resolve().name): loaded})
        return loaded
    if next(directory.rglob("*.parquet"), None) is not None:
        return datasets.load_dataset("parquet", data_dir=str(directory))
    return None


def _dataset_clips(source: Path, splits: datasets.DatasetDict, audio_column: str) -> Iterator[Clip]:
    for split, dataset in splits.items():
        if audio_column not in dataset.column_names:
            columns = ", ".join(map(repr, dataset.column_names))
            raise ValueError(f"{source}: there is no column {audio_column!r}; accepted: {columns}")
        if isinstance(dataset.features[audio_column], datasets.Audio):
            dataset = dataset.cast_column(audio_column, datasets.Audio(decode=False))
        key_column = next((name for name in ("key", "id") if name in dataset.column_names), None)
        others = dataset.select_columns([name for name in (key_column, "language") if name in dataset.column_names])
        audio = dataset.select_columns([audio_column])
        for row in range(len(dataset)):
            fields = others[row] if others.column_names else {}
            key = str(row) if key_column is None else str(fields[key_column])
            yield Clip(
                f"{source}:{split}:{key}",
                str(fields.get("language") or split),
                functools.partial(_dataset_value, audio, row, audio_column),
            )


def _dataset_value(dataset: datasets.Dataset, row: int, column: str) -> Any:
    return dataset[row][column]


def _list_clips(path: Path, list_audio: str, problems: dict[str, str]) -> Iterator[Clip]:
    subset = path.resolve().parent.name
    seen: set[Path] = set()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8; {_ACCEPTED}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        fields = line.strip().split("|")
        if len(fields) not in (4, 5):
            problems[f"{path}, line {number}"] = (
                f"{len(fields)} fields; accepted: name|prompt text|prompt audio|text, or with |audio at the end"
            )
            continue
        target = fields[4] if len(fields) == 5 else f"wavs/{fields[0]}.wav"
        audio = path.parent / (fields[2] if list_audio == "prompt" else target)
        if audio not in seen:
            seen.add(audio)
            yield Clip(str(audio), subset, functools.partial(str, audio))


# --- Workers ---


@dataclass(frozen=True)
class _PendingScores:
    """Scores of a clip that a worker computes."""

    clip: Clip
    seconds: float
    num_quantizers: int
    scores: Future[tuple[dict[str, float], dict[str, str]]]
    speaker_similarity: float | str | None

    def result(self) -> ClipScores:
        try:
            scores, reasons = self.scores.result()
        except BrokenProcessPool as error:
            raise OSError(
                f"a worker process died at or near {self.clip.key}, perhaps of want of memory; accepted: fewer workers"
            ) from error
        if isinstance(self.speaker_similarity, str):
            reasons[SPEAKER_SIMILARITY] = self.speaker_similarity
        elif self.speaker_similarity is not None:
            scores[SPEAKER_SIMILARITY] = self.speaker_similarity
        return ClipScores(self.clip.key, self.clip.subset, self.seconds, self.num_quantizers, scores, reasons)


class _Clock:
    """Time spent on each kind of work."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.audio_seconds = 0.0

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def time(self, work: str, function: Callable[..., Any], *arguments: Any) -> Any:
        begun = time.perf_counter()
        result = function(*arguments)
        self.spent[work] += time.perf_counter() - begun
        return result


def _worker_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that share nothing with this one: neither its threads nor its CUDA context survive a fork."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))


def _score(
    reference: Any, degraded: Any, sampling_rate: int, metrics: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Scores by metric, and the reasons of those that the signals do not have."""
    signals = torch.from_numpy(reference), torch.from_numpy(degraded)
    outcomes = {metric: _try(METRICS[metric], *signals, sampling_rate) for metric in metrics}
    scores = {metric: outcome for metric, outcome in outcomes.items() if not isinstance(outcome, str)}
    return scores, {metric: outcome for metric, outcome in outcomes.items() if isinstance(outcome, str)}


def _try(metric: Metric, reference: torch.Tensor, degraded: torch.Tensor, sampling_rate: int) -> float | str:
    """A score, or why there is none."""
    try:
        return metric(reference, degraded, sampling_rate)
    except ValueError as error:
        return str(error)


def _warm_up(model: MiMoAudioTokenizerModel, counts: Sequence[int]) -> None:
    """The first run of everything, which compiles and allocates, is not to be timed."""
    (codes,) = encode_waveforms(model, [torch.zeros(model.config.sampling_rate)], max(counts))
    decode_codes(model, [codes])


# --- Report ---


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
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
