# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""From a dataset to the packed batches of a training run.

What a batch holds is a function of the seed and its number alone: clips are shuffled, those of like lengths put
together, cropped and shared out between the processes without any state, so a run goes on where it stopped by
counting, and two processes see what one would see.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ..audio import AUDIO_SUFFIXES
from ..dataset import to_codes, to_waveform
from ..inference import check_codes_of
from ..workers import begun
from .batch import Batch, Collator


# A clip that never gets louder than this (-80 dB of full scale) is silent.
SILENCE = 1e-4

# Where the octaves of the equalizer begin, in Hz.
LOWEST_OCTAVE = 60.0

# Batches that are shuffled together and then sorted by length: enough for like lengths, few enough to stay random.
_POOL_BATCHES = 50

_LOADERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def open_dataset(source: str, split: str, audio_column: str = "audio") -> datasets.Dataset:
    """A dataset by name.

    Args:
        source: a directory that `save_to_disk` wrote; a folder of audio files, in which a `metadata.csv` or
            `metadata.jsonl` may name them (`file_name`) and add columns, as for `datasets`' audiofolder; a .jsonl,
            .json, .csv or .parquet file with a column of paths, absolute or relative to its folder; or a Hub id.
        split: which part of it, where it has parts.
        audio_column: the column of paths.

    Raises:
        ValueError: there is no such dataset, or it has no such split.
    """
    path = Path(source)
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(source)
        elif path.is_dir():
            loaded = _open_folder(path)
        elif path.is_file() and path.suffix.lower() in _LOADERS:
            (table,) = datasets.load_dataset(_LOADERS[path.suffix.lower()], data_files=source).values()
            loaded = _with_whole_paths(table, audio_column, path.parent)
        elif path.exists() or source.count("/") != 1:
            raise ValueError("no such dataset; accepted: a folder, a .jsonl, .csv or .parquet file, or a Hub id")
        else:
            loaded = datasets.load_dataset(source)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"data {source}: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise ValueError(f"data {source}: {error}") from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded and len(loaded) > 1:
        raise ValueError(f"data {source} has no split {split!r}; accepted: {', '.join(loaded)}")
    return loaded[split] if split in loaded else next(iter(loaded.values()))


def _open_folder(folder: Path) -> datasets.Dataset:
    """`datasets`' own audiofolder decodes every file, for which it needs torchcodec."""
    for name in ("metadata.jsonl", "metadata.csv"):
        if (folder / name).is_file():
            kind = _LOADERS[Path(name).suffix]
            (table,) = datasets.load_dataset(kind, data_files=str(folder / name)).values()
            if "file_name" not in table.column_names:
                raise ValueError(f"{name} has no column 'file_name'; accepted: one with the files' names")
            return _with_whole_paths(table.rename_column("file_name", "audio"), "audio", folder)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"no audio files; accepted in a folder: {', '.join(AUDIO_SUFFIXES)}")
    return datasets.Dataset.from_dict({"audio": [str(path) for path in files]})


def _with_whole_paths(table: datasets.Dataset, column: str, folder: Path) -> datasets.Dataset:
    """Paths that are relative to a folder from here, where the column holds paths."""
    if table.features.get(column) != datasets.Value("string"):
        return table
    paths = [None if path is None else str(folder / path) for path in table[column]]
    # A table of its own: one with a column added cannot be shared out between processes.
    return datasets.Dataset.from_dict(table[:] | {column: paths}, features=table.features)


@dataclass(frozen=True)
class Clips:
    """The usable clips of a dataset, found by reading each of them once.

    Attributes:
        dataset: with its audio column undecoded.
        audio_column, text_column, codes_column: names; no column of what is not wanted.
        sampling_rate: that of the lengths, in Hz.
        rows, keys, lengths: of each usable clip its row, its name and its samples.
        skipped: what was wrong with the others, by name.
        fingerprint: SHA-256 of the names and samples (and texts) of all usable clips.
    """

    dataset: datasets.Dataset
    audio_column: str
    text_column: str | None
    codes_column: str | None
    sampling_rate: int
    rows: list[int]
    keys: list[str]
    lengths: list[int]
    skipped: dict[str, str]
    fingerprint: str

    @classmethod
    def inspect(
        cls,
        dataset: datasets.Dataset,
        name: str,
        sampling_rate: int,
        *,
        audio_column: str = "audio",
        text_column: str | None = None,
        codes_column: str | None = None,
        collator: Collator | None = None,
        key_column: str | None = None,
        min_samples: int = 1,
        num_workers: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> Clips:
        """Read every clip once; each process reads its share, and all are told of all clips.

        `datasets` caches what was found in datasets that hold their audio. Files are read each time: they may have
        changed under their names.

        Args:
            dataset: with `audio_column`, of any kind that `tokenize_audio` takes.
            name: of the dataset, for errors and for clips that have no name themselves; of a folder, its path.
            sampling_rate: what the audio is brought to, in Hz.
            text_column: with it, a clip without text is not usable.
            codes_column: with it, a clip whose codes cannot be its own is not usable.
            collator: of the model whose codes these are; needed with them.
            key_column: the clips' names; by default those of their files, from the folder on. What several clips are
                called gets their rows' numbers.
            min_samples: shorter clips are not usable. Neither are silent ones, and those that cannot be read.
            num_workers: processes that read, for each process.
            process_index, num_processes: this process among those that share the work; all have to ask.

        Raises:
            ValueError: a column is missing, or no clip is usable.
        """
        columns = [column for column in (audio_column, text_column, codes_column, key_column) if column is not None]
        for column in columns:
            if column not in dataset.column_names:
                raise ValueError(f"data {name}: no column {column!r}; accepted: {', '.join(dataset.column_names)}")
        dataset = dataset.select_columns(columns)
        if isinstance(dataset.features[audio_column], datasets.Audio):
            dataset = dataset.cast_column(audio_column, datasets.Audio(decode=False))
        share = dataset.shard(num_processes, process_index, contiguous=True)
        with _single_threaded():
            found = share.map(
                _inspect_clip,
                remove_columns=columns,
                num_proc=num_workers if 1 < num_workers < len(share) else None,
                load_from_cache_file=not isinstance(dataset.features[audio_column], datasets.Value),
                desc=f"reading {name}",
                fn_kwargs={
                    "name": name,
                    "sampling_rate": sampling_rate,
                    "audio_column": audio_column,
                    "text_column": text_column,
                    "codes_column": codes_column,
                    "key_column": key_column,
                    "codebook_sizes": [] if collator is None else collator.model.config.codebook_sizes,
                    "min_samples": min_samples,
                },
            ).to_list()
        if num_processes > 1:
            found = gather_object(found)
        if collator is not None and codes_column is not None:
            expected = collator.code_lengths([clip["num_samples"] for clip in found])
            for clip, frames in zip(found, expected, strict=True):
                if not clip["problem"] and clip["num_codes"] != frames:
                    clip["problem"] = f"{clip['num_codes']} frames of codes, not {frames} as its audio"
        keys = [clip["key"] or f"{name}[{row}]" for row, clip in enumerate(found)]
        called = Counter(keys)
        keys = [key if called[key] == 1 else f"{key}[{row}]" for row, key in enumerate(keys)]
        rows = [row for row, clip in enumerate(found) if not clip["problem"]]
        skipped = {keys[row]: clip["problem"] for row, clip in enumerate(found) if clip["problem"]}
        if not rows:
            reasons = "; ".join(f"{key}: {problem}" for key, problem in list(skipped.items())[:5])
            raise ValueError(f"data {name}: none of {len(found)} clips can be used ({reasons})")
        contents = "\n".join(f"{found[row]['digest']} {keys[row]}" for row in rows)
        return cls(
            dataset=dataset,
            audio_column=audio_column,
            text_column=text_column,
            codes_column=codes_column,
            sampling_rate=sampling_rate,
            rows=rows,
            keys=[keys[row] for row in rows],
            lengths=[found[row]["num_samples"] for row in rows],
            skipped=skipped,
            fingerprint=hashlib.sha256(contents.encode()).hexdigest(),
        )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def seconds(self) -> float:
        return sum(self.lengths) / self.sampling_rate

    def load(self, clip: int) -> tuple[torch.Tensor, str | None, torch.Tensor | None]:
        """Samples (samples,) float32, text and codes (L, Q) of a usable clip."""
        row = self.dataset[self.rows[clip]]
        try:
            waveform = to_waveform(row[self.audio_column], self.sampling_rate)
        except (ValueError, OSError) as error:
            raise ValueError(f"clip {self.keys[clip]}: {error}") from error
        if len(waveform) != self.lengths[clip]:
            raise ValueError(
                f"clip {self.keys[clip]} has {len(waveform)} samples and had {self.lengths[clip]} when the run "
                "started; accepted: data that stay as they are"
            )
        text = None if self.text_column is None else row[self.text_column]
        return waveform, text, None if self.codes_column is None else to_codes(row[self.codes_column])


@contextlib.contextmanager
def _single_threaded() -> Iterator[None]:
    """For processes that are forked: OpenMP's threads do not survive a fork, and are waited for forever."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _inspect_clip(
    row: dict[str, Any],
    *,
    name: str,
    sampling_rate: int,
    audio_column: str,
    text_column: str | None,
    codes_column: str | None,
    key_column: str | None,
    codebook_sizes: Sequence[int],
    min_samples: int,
) -> dict[str, Any]:
    value = row[audio_column]
    path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
    key = ""
    if key_column is not None:
        key = str(row[key_column])
    elif path is not None:
        key = Path(path).relative_to(name).as_posix() if Path(path).is_relative_to(name) else Path(path).name
    found: dict[str, Any] = {"key": key, "num_samples": 0, "num_codes": 0, "digest": "", "problem": ""}
    codes = None
    try:
        waveform = to_waveform(value, sampling_rate)
        if codes_column is not None:
            if row[codes_column] is None:
                raise ValueError(f"no codes in the column {codes_column!r}")
            codes = _all_codes(row[codes_column], codes_column, codebook_sizes)
            found["num_codes"] = len(codes)
    except (ValueError, OSError) as error:
        return found | {"problem": " ".join(str(error).split())}
    found["num_samples"] = len(waveform)
    text = None if text_column is None else row[text_column]
    if not waveform.isfinite().all():
        found["problem"] = "NaN or infinite samples"
    elif len(waveform) < min_samples:
        seconds = len(waveform) / sampling_rate
        found["problem"] = f"{seconds:.3f} s, shorter than {min_samples / sampling_rate:g} s"
    elif waveform.abs().max() < SILENCE:
        found["problem"] = "silent"
    elif text_column is not None and not (isinstance(text, str) and text.strip()):
        found["problem"] = f"no text in the column {text_column!r}"
    else:
        content = hashlib.sha256(waveform.numpy().tobytes())
        content.update(str(text).encode())
        if codes is not None:
            content.update(codes.numpy().tobytes())
        found["digest"] = content.hexdigest()
    return found


def _all_codes(value: Any, name: str, codebook_sizes: Sequence[int]) -> torch.Tensor:
    """A clip's codes (L, Q), of all of these codebooks."""
    codes = check_codes_of(codebook_sizes, to_codes(value, name), name)
    if codes.shape[1] != len(codebook_sizes):
        raise ValueError(f"{name} has {codes.shape[1]} codebooks; accepted: all {len(codebook_sizes)}")
    return codes


@dataclass(frozen=True)
class PlannedBatch:
    """Which clips a batch holds, on all processes."""

    epoch: int
    clips: list[int]


def plan_epoch(
    lengths: Sequence[int], max_samples: int, num_processes: int, seed: int | None, epoch: int
) -> list[PlannedBatch]:
    """All clips, in batches of about `max_samples` samples on each process, clips of like lengths together.

    A batch is no longer than `num_processes * max_samples`, whoever reads it: how it is shared out does not change it.

    Args:
        lengths: samples of each clip, at most `max_samples`.
        max_samples: of one process's share of a batch.
        num_processes: among which a batch is shared out; it has a clip for each, so fewer than that, the last ones of
            some thousand, may be left out.
        seed: of the shuffle; None for the clips in order of length, none left out.
        epoch: how many times all clips were seen before.
    """
    order = list(range(len(lengths)))
    if seed is not None:
        random.Random(f"order {seed} {epoch}").shuffle(order)
    limit = max_samples * num_processes
    pools: list[list[int]] = [[]]
    pooled = 0
    for clip in order:
        if seed is not None and pooled + lengths[clip] > limit * _POOL_BATCHES:
            pools.append([])
            pooled = 0
        pools[-1].append(clip)
        pooled += lengths[clip]
    batches: list[list[int]] = []
    for pool in pools:
        pool.sort(key=lambda clip: -lengths[clip])
        # As few batches as hold the pool, filled alike, so that none is left with a rest.
        target = sum(lengths[clip] for clip in pool) / -(-sum(lengths[clip] for clip in pool) // limit)
        batch: list[int] = []
        held = 0
        for clip in pool:
            full = held >= target and (seed is None or len(batch) >= num_processes)
            if batch and (full or held + lengths[clip] > limit):
                batches.append(batch)
                batch, held = [], 0
            batch.append(clip)
            held += lengths[clip]
        batches.append(batch)
    if seed is not None:
        batches = [batch for batch in batches if len(batch) >= num_processes]
        random.Random(f"batches {seed} {epoch}").shuffle(batches)
    return [PlannedBatch(epoch, batch) for batch in batches]


def plan_run(lengths: Sequence[int], max_samples: int, num_processes: int, seed: int) -> Iterator[PlannedBatch]:
    """The batches of one epoch after the other, without end.

    Raises:
        ValueError: there are fewer clips than processes.
    """
    if len(lengths) < num_processes:
        raise ValueError(f"{len(lengths)} clips for {num_processes} processes; accepted: a clip for each")
    epoch = 0
    while True:
        yield from plan_epoch(lengths, max_samples, num_processes, seed, epoch)
        epoch += 1


class BatchReader(TorchDataset["Batch | ValueError"]):
    """Reads this process's share of planned batches, in the data loader's workers.

    A clip that cannot be read any more gives the error in place of the batch, for the run to say.
    """

    def __init__(
        self,
        clips: Clips,
        collator: Collator,
        *,
        crop_samples: int,
        gain_db: float,
        equalizer_db: float,
        seed: int,
        process_index: int,
        num_processes: int,
        tokenize: Callable[[str], list[int]] | None = None,
    ) -> None:
        self.clips = clips
        self.collator = collator
        self.crop_samples = crop_samples
        self.gain_db = gain_db
        self.equalizer_db = equalizer_db
        self.seed = seed
        self.process_index = process_index
        self.num_processes = num_processes
        self.tokenize = tokenize

    def used_samples(self, clip: int) -> int:
        """Samples of a clip that a batch holds: of a long one, a crop."""
        length = self.clips.lengths[clip]
        if length <= self.crop_samples:
            return length
        return self.crop_samples // self._crop_step * self._crop_step

    @property
    def _crop_step(self) -> int:
        """Where codes are read, crops begin and end with one of them."""
        return 1 if self.clips.codes_column is None else self.collator.model.config.samples_per_frame

    def _equalized(self, waveform: torch.Tensor, generator: random.Random) -> torch.Tensor:
        """Octaves louder or softer, with no step between them and no phase of their own."""
        if self.equalizer_db == 0:
            return waveform
        size = len(waveform) + self.clips.sampling_rate // 20  # what a filter moves over the end is cut off
        octaves = torch.fft.rfftfreq(size, 1 / self.clips.sampling_rate).clamp(min=LOWEST_OCTAVE).div(LOWEST_OCTAVE)
        octaves = octaves.log2()
        gains = torch.tensor([generator.uniform(-1, 1) for _ in range(int(octaves[-1]) + 2)]) * self.equalizer_db
        below = octaves.long()
        curve = torch.lerp(gains[below], gains[below + 1], octaves - below)
        return torch.fft.irfft(torch.fft.rfft(waveform, size) * 10 ** (curve / 20), size)[: len(waveform)]

    def _amplified(self, waveform: torch.Tensor, generator: random.Random) -> torch.Tensor:
        """Louder or softer, but never so loud that samples leave [-1, 1]."""
        gain = 10 ** (generator.uniform(-self.gain_db, self.gain_db) / 20)
        loudest = max(float(waveform.abs().max()), SILENCE)
        # What was recorded louder than that stays so, but for what the equalizer made of it.
        return waveform * min(gain, 1 / loudest if self.equalizer_db else max(1.0, 1 / loudest))

    def __getitem__(self, planned: PlannedBatch) -> Batch | ValueError:  # type: ignore[override]
        mine = planned.clips[self.process_index :: self.num_processes]
        counted = bool(mine)
        waveforms, segments, texts, all_codes = [], [], [], []
        try:
            for clip in mine or planned.clips[:1]:
                waveform, text, codes = self.clips.load(clip)
                # Of the clip, not of the process that it falls to.
                generator = random.Random(f"crop {self.seed} {planned.epoch} {clip}")
                samples = self.used_samples(clip)
                step = self._crop_step
                start = generator.randint(0, (len(waveform) - samples) // step) * step
                segments.append(generator.random())
                crop = self._equalized(waveform[start : start + samples], generator)
                waveforms.append(self._amplified(crop, generator))
                if self.tokenize is not None:
                    texts.append(self.tokenize(str(text)))
                if codes is not None:
                    whole = samples == len(waveform)
                    all_codes.append(codes if whole else codes[start // step : (start + samples) // step])
        except ValueError as error:
            return error
        return self.collator(
            waveforms,
            segments=segments,
            keys=[self.clips.keys[clip] for clip in mine or planned.clips[:1]],
            clips=mine or planned.clips[:1],
            texts=texts if self.tokenize is not None else None,
            codes=all_codes or None,
            batch_keys=[self.clips.keys[clip] for clip in planned.clips],
            batch_lengths=[self.used_samples(clip) for clip in planned.clips],
            counted=counted,
        )

    def loader(self, plan: Iterator[PlannedBatch] | Sequence[PlannedBatch], num_workers: int) -> Iterator[Batch]:
        """The batches of a plan, read ahead by `num_workers` processes.

        Raises:
            ValueError: a clip cannot be read any more, or is not what it was.
        """
        loader: DataLoader[Batch | ValueError] = DataLoader(
            self,
            sampler=plan,  # type: ignore[arg-type] # (any iterable will do)
            batch_size=None,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in begun(loader):
            if isinstance(batch, ValueError):
                raise batch
            yield batch
