# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""The clips of an evaluation: from folders, datasets and Seed-TTS-Eval's lists."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Features

from .files import read_json
from .sources import AUDIO_COLUMNS, FolderSource, Problem, Row, Source, open_source


_LIST_SUFFIX = ".lst"
# A file of a dataset as `datasets` exports them: the split, and which of its files it is.
_SPLIT_FILE = re.compile(r"(.+)-\d+-of-\d+\.\w+")


@dataclass(frozen=True)
class Clip:
    """A clip to evaluate.

    Attributes:
        key: its name, unique.
        subset: what it is averaged with: a language or a set.
        audio: as `to_waveform` takes it: a path, bytes, decoded audio; or the error met in reading it.
    """

    key: str
    subset: str
    audio: Any


class SourceClips:
    """The clips of sources: listed once, read whenever they are iterated over, a few at a time."""

    def __init__(self) -> None:
        self._units: list[tuple[Source, list[Row | Problem]]] = []
        self._keys: set[str] = set()

    def add(self, source: Source) -> None:
        """List a source.

        Raises:
            ValueError: it has no clips, or one with the key of another.
            OSError: it cannot be read.
        """
        before = len(self)
        for unit in source.units():
            for row in unit:
                key = _key(source, row)
                if key in self._keys:
                    raise ValueError(f"{source.path}: two clips have the key {key!r}; accepted: different keys")
                self._keys.add(key)
            self._units.append((source, unit))
        if len(self) == before:
            raise ValueError(f"{source.path}: no clips; accepted: sources with one or more")
        # Nothing else is to be read with each clip.
        source.features = Features({name: source.features[name] for name in source.features if name == "language"})

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Clip]:
        for source, unit in self._units:
            for problem in unit:
                if isinstance(problem, Problem):
                    yield Clip(_key(source, problem), _subset(source), ValueError(problem.error))
            rows = [row for row in unit if isinstance(row, Row)]
            for row, (audio, columns) in zip(rows, _read_rows(source, rows), strict=True):
                yield Clip(_key(source, row), str(columns.get("language") or _subset(source, row)), audio)


@dataclass
class SeedTTSEvalList(Source):
    """A list in the format of Seed-TTS-Eval's meta.lst: `name|prompt text|prompt audio|text`, or with `|audio`.

    Keys are the paths of the audio, relative to the list's folder as in the list.

    Attributes:
        audio: `"prompt"`, or `"target"`: the audio of the text, `wavs/name.wav` where the line does not tell.
    """

    kind = "Seed-TTS-Eval list"
    audio: str = "prompt"

    def units(self) -> Iterator[list[Row | Problem]]:
        seen: set[str] = set()
        with open(self.path, encoding="utf-8-sig") as file:
            try:
                for number, line in enumerate(file, start=1):
                    fields = [field.strip() for field in line.split("|")]
                    if len(fields) < 4 and line.strip():
                        reason = "accepted: name|prompt text|prompt audio|text, or with |audio at the end"
                        yield [Problem(f"line {number}", f"{len(fields)} fields; {reason}")]
                    elif line.strip():
                        target = fields[4] if len(fields) > 4 else f"wavs/{fields[0].removesuffix('.wav')}.wav"
                        path = fields[2] if self.audio == "prompt" else target
                        if path not in seen:
                            yield [Row(path)]
                        seen.add(path)
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.path}: not a text file in UTF-8; accepted: a list that is one") from error

    def read(self, rows: Sequence[Row]) -> Iterator[tuple[Any, dict[str, Any]]]:
        for row in rows:
            yield _key(self, row), {}


def read_sources(
    sources: Iterable[str | os.PathLike[str]],
    *,
    column: str | None = None,
    config: str | None = None,
    split: str | None = None,
    list_audio: str = "prompt",
) -> SourceClips:
    """The clips of folders, datasets and lists.

    A source is anything that `mimo_audio_hf.sources.open_source` takes (a folder of audio, .parquet or .tar files, a
    JSON-lines list, a directory of `save_to_disk`, a Hub id), or a list of Seed-TTS-Eval, a .lst file. Clips are
    averaged by the column `language` where there is one; else by the first subfolder (`zh/a.wav` with `zh/b/c.wav`),
    or the split that a file's name tells (`test-00000-of-00002.parquet`); else all of a source together. A list's are
    averaged under the name of its folder, which is their language there. All splits of a saved dataset are read if
    none is named.

    Args:
        sources: any number of these.
        column: of the audio; by default found by its type or name.
        config, split: of the datasets among the sources.
        list_audio: which audio of a list: `"prompt"`, each once though several lines name it, or `"target"`, the
            recording of the text, by default `wavs/name.wav`.

    Raises:
        ValueError: a source is none of these or has no clips, two clips have one key, or there is no such column.
        OSError: a source cannot be read.
    """
    if list_audio not in ("prompt", "target"):
        raise ValueError(f"list_audio={list_audio!r}; accepted: 'prompt' or 'target'")
    columns = AUDIO_COLUMNS if column is None else [column]
    clips = SourceClips()
    for source in sources:
        path = os.fspath(source)
        splits = Path(path, "dataset_dict.json")
        if path.endswith(_LIST_SUFFIX):
            clips.add(SeedTTSEvalList(path, [], audio=list_audio))
        elif splits.is_file() and split is None:
            for name in _splits(splits):
                clips.add(open_source(os.path.join(path, name), columns, config=config))
        else:
            clips.add(open_source(path, columns, config=config, split=split))
    return clips


def _splits(file: Path) -> list[str]:
    """Names of a saved dataset's parts."""
    names = read_json(file, {"splits": list})["splits"]
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: splits are {names}; accepted: one or more names")
    return names


def _key(source: Source, row: Row | Problem) -> str:
    place = source.path
    if isinstance(source, SeedTTSEvalList) and isinstance(row, Row):
        place = os.path.dirname(place)
    return os.path.join(place, row.key)


def _subset(source: Source, row: Row | None = None) -> str:
    path = Path(source.path).resolve()
    if isinstance(source, SeedTTSEvalList):
        return path.parent.name
    place = "" if row is None else row.key if isinstance(source, FolderSource) else row.file
    folder, _, rest = place.partition("/")
    if rest:
        return folder
    split = _SPLIT_FILE.fullmatch(place or path.name)
    return split[1] if split else path.stem if path.is_file() else path.name


def _read_rows(source: Source, rows: Sequence[Row]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """What the source has for each row; where it fails as a whole, its error for all that are left."""
    done = 0
    try:
        for value in source.read(rows):
            done += 1
            yield value
    except (ValueError, OSError) as error:
        for _ in rows[done:]:
            yield error, {}
