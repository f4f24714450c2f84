# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""What a job reads: folders, JSON-lines lists, datasets, Parquet files and WebDataset tars.

A source is listed once, by one process, and then read anywhere: a row says where its clip is to be found. Nothing is
decoded here.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import posixpath
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Audio, Dataset, Features, Value, load_dataset, load_from_disk

from .audio import AUDIO_SUFFIXES
from .checkpoints import HUB_ID


Item = TypeVar("Item")

# Clips that a process takes at a time, where a source does not suggest another number.
ROWS_PER_UNIT = 32

# A unit of a Parquet file is read whole, and a large one's row group as often as it has units.
_PARQUET_UNIT_ROWS = 256
_PARQUET_UNIT_BYTES = 64 * 2**20

# Where audio is looked for; in a table, in a column of type Audio before that.
AUDIO_COLUMNS = ("audio", "wav", "audio_filepath", "path")

_LINES_PER_INFERENCE = 1000
_TAR_DAMAGED = "{}: what comes before was read; accepted: whole, uncompressed tar files"
_TEXT_MEMBERS = (".txt", ".json", ".cls", ".lang")
_SOURCES = (
    "accepted: a folder of audio, .parquet or .tar files, a dataset directory, one .jsonl, .parquet or .tar file, or "
    "a Hub id (owner/name)"
)


@dataclass(frozen=True)
class Row:
    """One clip of a source.

    Attributes:
        key: what it is called, in every run.
        file: of the source's files, the one that holds it; empty if there is one only.
        at: where it is there; what that means is the source's own matter.
    """

    key: str
    file: str = ""
    at: tuple[int, ...] = ()


@dataclass(frozen=True)
class Problem:
    """What was found in the place of a row, and what is wrong with it."""

    key: str
    error: str


@dataclass
class Source(ABC):
    """Rows of audio, or of codes. The fields are what JSON can hold: [`to_dict`] and [`from_dict`] carry a source on.

    Attributes:
        path: the folder, file or Hub id.
        columns: names of which the first that a table has is the column of the audio. Once the source is listed there
            is only that one.
        key_column: the column of the keys; None for one named "key" or, if there is none, the rows' places.
        ignored: a folder within `path` that is not looked into.
        features: of the columns that are carried along with each row, known once the source is listed.
    """

    kind: ClassVar[str]

    path: str
    columns: list[str]
    key_column: str | None = None
    ignored: str | None = None
    features: Features = dataclasses.field(default_factory=Features)

    @abstractmethod
    def units(self) -> Iterator[list[Row | Problem]]:
        """All rows, in lists of those that are best read together; always in the same order."""

    @abstractmethod
    def read(self, rows: Sequence[Row]) -> Iterator[tuple[Any, dict[str, Any]]]:
        """For each row of one unit the audio, as `to_waveform` takes it, or None, and its other columns.

        What cannot be read has the exception, a ValueError or OSError, in the place of its audio.
        """

    @property
    def column(self) -> str:
        """The column of the audio, once it is known."""
        (name,) = self.columns
        return name

    def to_dict(self) -> dict[str, Any]:
        """What [`from_dict`] takes."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"kind": self.kind, "features": self.features.to_dict()}

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Source:
        """The source of which [`to_dict`] told."""
        (source_class,) = (each for each in _KINDS if each.kind == fields["kind"])
        features = Features.from_dict(fields["features"])
        return source_class(**{name: fields[name] for name in fields.keys() - {"kind", "features"}}, features=features)


@dataclass
class FolderSource(Source):
    """The files with certain suffixes in a folder and its subfolders. Keys are paths within the folder.

    Attributes:
        suffixes: of the files, in lower case.
    """

    kind: ClassVar[str] = "folder"
    suffixes: list[str] = dataclasses.field(default_factory=lambda: list(AUDIO_SUFFIXES))

    def units(self) -> Iterator[list[Row | Problem]]:
        yield from _in_lists(map(self._row, _files_in(self.path, self.suffixes, self.ignored)), ROWS_PER_UNIT)

    def read(self, rows: Sequence[Row]) -> Iterator[tuple[Any, dict[str, Any]]]:
        for row in rows:
            yield os.path.join(self.path, row.key), {}

    @staticmethod
    def _row(name: str) -> Row | Problem:
        try:
            name.encode()
        except UnicodeEncodeError:
            return Problem(ascii(name), "the file's name is not UTF-8; accepted: names that are")
        return Row(name)


@dataclass
class JsonLinesSource(Source):
    """A JSON object a line. Where the column is a path, it is absolute or relative to the list's own folder."""

    kind: ClassVar[str] = "JSON lines"

    def units(self) -> Iterator[list[Row | Problem]]:
        types: dict[str, pa.DataType] = {}
        started = False
        for lines in _in_lists(self._lines(), _LINES_PER_INFERENCE):
            fields = [line for _, line in lines if line is not None]
            if fields and not started:
                names = list(dict.fromkeys(name for line in fields for name in line))
                self.columns = [_choose_column(self.path, names, self.columns)]
                self.key_column = self.key_column or ("key" if "key" in names else self.column)
                started = True
            self._infer_types(types, fields)
            yield from _in_lists((self._row(found, line) for found, line in lines), ROWS_PER_UNIT)
        self.features = _features_of(self.path, pa.schema(types))

    def read(self, rows: Sequence[Row]) -> Iterator[tuple[Any, dict[str, Any]]]:
        folder = os.path.dirname(os.path.abspath(self.path))
        with open(self.path, "rb") as file:
            for row in rows:
                offset, length = row.at
                file.seek(offset)
                fields = json.loads(file.read(length).decode("utf-8-sig"))
                value = fields[self.column]
                if isinstance(value, str):
                    value = os.path.join(folder, value)
                yield value, {name: fields.get(name) for name in self.features}

    def _lines(self) -> Iterator[tuple[Row | Problem, dict[str, Any] | None]]:
        """Where each line is, and its fields; or what is wrong with it."""
        offset = 0
        with open(self.path, "rb") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    try:
                        fields = json.loads(text.decode("utf-8-sig"))
                        if not isinstance(fields, dict):
                            raise ValueError("no object")
                        if b"\\ud" in text.lower():  # half a surrogate pair is no text
                            json.dumps(fields, ensure_ascii=False).encode()
                        yield Row(f"line {number}", at=(offset, len(text))), fields
                    except (ValueError, RecursionError) as error:
                        yield Problem(f"line {number}", f"{error}; accepted: a JSON object a line"), None
                offset += len(text)

    def _row(self, found: Row | Problem, fields: dict[str, Any] | None) -> Row | Problem:
        if fields is None or isinstance(found, Problem):
            return found
        key = str(self.key_column)
        for name in (key, self.column):
            if fields.get(name) is None:
                return Problem(found.key, f"{name!r} is missing; accepted: lines that have {name!r}")
        # Without a column of keys a clip is called by its path, or, if it has none, by its place.
        named = self.key_column != self.column or isinstance(fields[key], str)
        return Row(str(fields[key]) if named else found.key, at=found.at)

    def _infer_types(self, types: dict[str, pa.DataType], lines: list[dict[str, Any]]) -> None:
        # Of the audio's column its path is carried along.
        carried = {name for line in lines for name in line} - {"key", self.key_column}
        if not all(isinstance(line.get(self.column), str | None) for line in lines):
            carried.discard(self.column)
        for name in sorted(carried):
            try:
                found = pa.array([line.get(name) for line in lines]).type
                field = pa.unify_schemas(
                    [pa.schema({name: types.get(name, pa.null())}), pa.schema({name: found})],
                    promote_options="permissive",
                )
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
                raise ValueError(f"{self.path}: {name!r} has several types ({error}); accepted: one type") from error
            types[name] = field.field(name).type


@dataclass
class _TableSource(Source):
    """A source with columns."""

    def _choose_columns(self, features: Features) -> None:
        typed = [name for name, feature in features.items() if isinstance(feature, Audio)]
        candidates = self.columns if self.columns != list(AUDIO_COLUMNS) else [*typed, *self.columns]
        self.columns = [_choose_column(self.path, features, candidates)]
        if self.key_column is None and "key" in features:
            self.key_column = "key"
        if self.key_column is not None and self.key_column not in features:
            accepted = ", ".join(map(repr, features))
            raise ValueError(f"{self.path} has no column {self.key_column!r}; accepted: {accepted}")
        used = (self.column, self.key_column, "key")  # which the keys themselves are called
        self.features = Features({name: feature for name, feature in features.items() if name not in used})

    def _row(self, key: Any, place: str, file: str = "", at: tuple[int, ...] = ()) -> Row | Problem:
        if key is None:
            return Problem(place, f"{self.key_column!r} is null; accepted: keys")
        return Row(str(key), file, at)

    def _rows_of(self, table: pa.Table) -> Iterator[tuple[Any, dict[str, Any]]]:
        carried = list(self.features)
        others = table.select(carried).to_pylist() if carried else [{}] * len(table)
        for scalar, other in zip(table[self.column], others, strict=True):
            yield value_of(scalar), other


@dataclass
class DatasetSource(_TableSource):
    """A dataset that `datasets` loads: a directory of `save_to_disk`, or a Hub id.

    Attributes:
        config: which of a Hub repository's configurations.
        split: which split; None if there is but one.
    """

    kind: ClassVar[str] = "dataset"
    config: str | None = None
    split: str | None = None

    def units(self) -> Iterator[list[Row | Problem]]:
        table = self._dataset.with_format("arrow")
        self._choose_columns(table.features)
        for start in range(0, len(table), ROWS_PER_UNIT):
            indices = range(start, min(start + ROWS_PER_UNIT, len(table)))
            keys: Iterable[Any] = indices
            if self.key_column is not None:
                keys = table.select_columns(self.key_column)[indices][self.key_column].to_pylist()
            yield [self._row(key, f"row {index}", at=(index,)) for key, index in zip(keys, indices, strict=True)]

    def read(self, rows: Sequence[Row]) -> Iterator[tuple[Any, dict[str, Any]]]:
        table = self._dataset.with_format("arrow")[[row.at[0] for row in rows]]
        yield from self._rows_of(table)

    @cached_property
    def _dataset(self) -> Dataset:
        if Path(self.path).is_dir():
            dataset = load_from_disk(self.path)
        else:
            dataset = load_dataset(self.path, self.config, split=self.split)
        if isinstance(dataset, Dataset):
            if Path(self.path).is_dir() and (self.split is not None or self.config is not None):
                raise ValueError(f"{self.path} has no configurations and splits; accepted: no --config and --split")
            return dataset
        split = self.split if self.split is not None or len(dataset) > 1 else next(iter(dataset))
        if split not in dataset:
            raise ValueError(f"{self.path}: --split is {split!r}; accepted: {', '.join(map(repr, dataset))}")
        return dataset[split]


@dataclass
class ParquetSource(_TableSource):
    """Parquet files, all of one schema."""

    kind: ClassVar[str] = "Parquet"

    def units(self) -> Iterator[list[Row | Problem]]:
        schema: pa.Schema | None = None
        for name in _files_in(self.path, [".parquet"], self.ignored):
            with _open_parquet(self._file(name)) as file:
                if schema is None:
                    schema = file.schema_arrow
                    self._choose_columns(_features_of(self.path, schema))
                elif not file.schema_arrow.equals(schema):
                    raise ValueError(f"{self._file(name)}: other columns or types than the files before it")
                yield from self._units_of(name, file)

    def read(self, rows: Sequence[Row]) -> Iterator[tuple[Any, dict[str, Any]]]:
        for (name, group), members in itertools.groupby(rows, key=lambda row: (row.file, row.at[0])):
            with _open_parquet(self._file(name)) as file:
                table = file.read_row_group(group, columns=[self.column, *self.features])
            yield from self._rows_of(table.take([row.at[1] for row in members]))

    def _file(self, name: str) -> str:
        return os.path.join(self.path, name) if name else self.path

    def _units_of(self, name: str, file: pq.ParquetFile) -> Iterator[list[Row | Problem]]:
        first = 0
        for group in range(file.num_row_groups):
            metadata = file.metadata.row_group(group)
            count = metadata.num_rows
            places = [f"{name or os.path.basename(self.path)}:{first + row}" for row in range(count)]
            keys = places
            if self.key_column is not None:
                keys = file.read_row_group(group, columns=[self.key_column])[self.key_column].to_pylist()
            first += count
            each = max(1, metadata.total_byte_size // max(1, count))
            rows = (
                self._row(key, place, name, (group, row))
                for row, (key, place) in enumerate(zip(keys, places, strict=True))
            )
            yield from _in_lists(rows, max(1, min(_PARQUET_UNIT_ROWS, _PARQUET_UNIT_BYTES // each)))


@dataclass
class WebDatasetSource(Source):
    """Tar files in which neighbours with the same name up to its first dot are one sample.

    The sample's audio is its one member with an audio suffix; members with .txt, .json, .cls and .lang are carried
    along as text. Keys are the tar's name and the sample's.
    """

    kind: ClassVar[str] = "WebDataset"

    def units(self) -> Iterator[list[Row | Problem]]:
        # All of them, there or not: a tar that is added later has no other columns.
        self.features = Features({suffix[1:]: Value("string") for suffix in _TEXT_MEMBERS})
        for name in _files_in(self.path, [".tar"], self.ignored):
            yield from _in_lists(self._rows_of(name), ROWS_PER_UNIT)

    def read(self, rows: Sequence[Row]) -> Iterator[tuple[Any, dict[str, Any]]]:
        for name, members in itertools.groupby(rows, key=lambda row: row.file):
            with open(self._file(name), "rb") as file:
                for row in members:
                    start, stop = row.at
                    file.seek(start)
                    yield self._sample(file.read(stop - start))

    def _file(self, name: str) -> str:
        return os.path.join(self.path, name) if name else self.path

    def _rows_of(self, name: str) -> Iterator[Row | Problem]:
        tar_name = name or os.path.basename(self.path)
        try:
            with tarfile.open(self._file(name), "r:") as tar:
                files = filter(_is_part_of_sample, tar)
                for sample, members in itertools.groupby(files, key=lambda member: _sample_name(member.name)):
                    parts = list(members)
                    suffixes = [os.path.splitext(part.name)[1].lower() for part in parts]
                    sounds = sum(suffix in AUDIO_SUFFIXES for suffix in suffixes)
                    key = f"{tar_name}/{sample}"
                    stop = parts[-1].offset_data + -(-parts[-1].size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    if sounds != 1:
                        names = ", ".join(part.name for part in parts)
                        yield Problem(key, f"{sounds or 'no'} audio files among {names}; accepted: one")
                    else:
                        yield Row(key, name, (parts[0].offset, stop))
                if not _ends(self._file(name), tar.offset):
                    yield Problem(tar_name, _TAR_DAMAGED.format("its end is missing"))
        except tarfile.TarError as error:
            yield Problem(tar_name, _TAR_DAMAGED.format(error))

    def _sample(self, data: bytes) -> tuple[Any, dict[str, Any]]:
        texts: dict[str, Any] = dict.fromkeys(self.features)
        audio: Any = None
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                for member in filter(_is_part_of_sample, tar):
                    suffix = os.path.splitext(member.name)[1].lower()
                    content = tar.extractfile(member)
                    if content is not None and suffix in AUDIO_SUFFIXES and audio is None:
                        audio = content.read()
                    elif content is not None and suffix[1:] in texts:
                        texts[suffix[1:]] = content.read().decode("utf-8")
        except (tarfile.TarError, UnicodeDecodeError) as error:
            return ValueError(f"damaged in its tar file: {error}"), texts
        if audio is None:
            return ValueError("no audio; accepted: files that do not change during a job"), texts
        return audio, texts


_IN_FOLDERS = (".parquet", ".tar")
_TABLES: dict[str, type[Source]] = {
    ".jsonl": JsonLinesSource,
    ".ndjson": JsonLinesSource,
    ".json": JsonLinesSource,
    ".parquet": ParquetSource,
    ".tar": WebDatasetSource,
}
_KINDS: tuple[type[Source], ...] = (FolderSource, JsonLinesSource, DatasetSource, ParquetSource, WebDatasetSource)


def open_source(
    path: str,
    columns: Sequence[str] = AUDIO_COLUMNS,
    *,
    key_column: str | None = None,
    config: str | None = None,
    split: str | None = None,
    suffixes: Sequence[str] = AUDIO_SUFFIXES,
    ignored: str | os.PathLike[str] | None = None,
) -> Source:
    """The source that a path or a Hub id stands for.

    Args:
        path: a folder of audio, Parquet or tar files; a directory of `save_to_disk`; a JSON-lines list; one Parquet or
            tar file; or, where nothing of that name is on disk, a Hub id.
        columns, key_column, ignored: as in [`Source`].
        config, split: of a dataset.
        suffixes: of the files that are looked for in a folder.

    Raises:
        ValueError: it stands for nothing, or for several sources; or it has no such options.
    """
    place = Path(path)
    is_dataset = (place / "state.json").is_file() or (place / "dataset_dict.json").is_file()
    if is_dataset or (not place.exists() and HUB_ID.fullmatch(path)):
        return DatasetSource(path, list(columns), key_column, config=config, split=split)
    if config is not None or split is not None:
        raise ValueError(f"{path} has no configurations and splits; accepted with them: a dataset directory, a Hub id")
    if not place.exists():
        raise ValueError(f"{path}: there is no such file or folder; {_SOURCES}")
    if not place.is_dir() and not place.is_file():
        raise ValueError(f"{path}: no regular file; {_SOURCES}")
    skipped = None if ignored is None else os.path.realpath(ignored)
    suffix = _suffix_in(path, suffixes, skipped) if place.is_dir() else place.suffix.lower()
    if suffix in _TABLES:
        return _TABLES[suffix](path, list(columns), key_column, skipped)
    if not place.is_dir():
        raise ValueError(f"{path}: nothing to read many clips from; {_SOURCES}")
    return FolderSource(path, list(columns), key_column, skipped, suffixes=list(suffixes))


def _suffix_in(path: str, suffixes: Sequence[str], ignored: str | None) -> str:
    """The suffix of a folder's files: .parquet, .tar or any of `suffixes`, which may be mixed."""
    first: str | None = None
    for name in _files_in(path, [*_IN_FOLDERS, *suffixes], ignored):
        first = first or name
        ours, its = (posixpath.splitext(each)[1].lower() for each in (first, name))
        if ours != its and {ours, its}.intersection(_IN_FOLDERS):
            raise ValueError(f"{path} holds {first} and {name}; accepted: a folder with files of one kind")
    if first is None:
        raise ValueError(f"{path}: no files to read; {_SOURCES}")
    return posixpath.splitext(first)[1].lower()


def _files_in(path: str, suffixes: Sequence[str], ignored: str | None = None) -> Iterator[str]:
    """Names of files within a folder, hidden ones left out, in order; an empty name for a path that is a file."""
    if os.path.isfile(path):
        yield ""
        return

    def fail(error: OSError) -> None:
        raise error

    seen = {ignored, os.path.realpath(path)}  # links may lead in circles
    for folder, folders, files in os.walk(path, onerror=fail, followlinks=True):
        inside = [(name, os.path.realpath(os.path.join(folder, name))) for name in sorted(folders)]
        folders[:] = [name for name, real in inside if not name.startswith(".") and real not in seen]
        seen.update(real for _, real in inside)
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                yield os.path.relpath(os.path.join(folder, name), path).replace(os.sep, "/")


def _in_lists(items: Iterable[Item], length: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while taken := list(itertools.islice(iterator, length)):
        yield taken


def _ends(path: str, offset: int) -> bool:
    """Whether a tar file has its end mark at an offset: tarfile takes a damaged header for the end, too."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _is_part_of_sample(member: tarfile.TarInfo) -> bool:
    return member.isfile() and not posixpath.basename(member.name).startswith(".")


def _sample_name(member: str) -> str:
    folder, name = posixpath.split(posixpath.normpath(member))
    return posixpath.join(folder, name.split(".", 1)[0])


def _choose_column(path: str, columns: Iterable[str], candidates: Sequence[str]) -> str:
    present = list(columns)
    for name in candidates:
        if name in present:
            return name
    listed = ", ".join(map(repr, present))
    raise ValueError(f"{path} has no column {' or '.join(map(repr, candidates))}; accepted as --column: {listed}")


def _features_of(path: str, schema: pa.Schema) -> Features:
    """The features of columns as Python reads them: of a dictionary, its values."""
    for index, field in enumerate(schema):
        if pa.types.is_dictionary(field.type):
            schema = schema.set(index, field.with_type(field.type.value_type))
    try:
        return Features.from_arrow_schema(schema)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"{path}: a column that datasets cannot hold ({error}); accepted: others") from error


@contextmanager
def _open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: no Parquet file ({error})") from error
    with file:
        yield file


def value_of(scalar: pa.Scalar) -> Any:
    """What a cell holds; long lists of numbers as arrays."""
    if isinstance(scalar, pa.StructScalar) and scalar.is_valid and "array" in scalar.type.names:
        return {name: value_of(scalar[name]) for name in scalar.type.names}
    if isinstance(scalar, (pa.ListScalar, pa.LargeListScalar)) and scalar.is_valid:
        values = scalar.values
        if pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
            return values.to_numpy(zero_copy_only=False)
        if pa.types.is_list(values.type) and pa.types.is_integer(values.type.value_type):
            lengths = set(values.value_lengths().to_pylist())
            if len(lengths) == 1:
                return values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), -1)
    return scalar.as_py()
