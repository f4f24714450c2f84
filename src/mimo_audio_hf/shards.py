# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""What a job writes: a directory of Parquet shards that `load_dataset` reads.

    OUT/data/train-00000.parquet ...   the shards; each appears whole
    OUT/manifest.json                  what they are made of, and how much there is
    OUT/errors.jsonl                   the clips that failed, if any, as {"key": ..., "error": ...}
    OUT/README.md                      tells `load_dataset` which files are data
    OUT/damaged/                       files that an earlier run could not have left like this
    OUT/.job/                          what a running job needs: locks and the list of clips; later, an empty lock

A shard's own metadata repeat what it is made of, so that none is ever taken for another job's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Features
from filelock import FileLock, Timeout

from .dataset import arrow_column
from .files import replacing


logger = logging.getLogger(__name__)

FORMAT = "mimo_audio_dataset"
VERSION = 1

# A shard is written when it holds this much, whatever else is asked for.
MAX_SHARD_BYTES = 256 * 2**20

# Bounds what writing and reading take.
_ROWS_PER_GROUP = 1000

_METADATA = b"mimo_audio_hf"
_LOCK_SECONDS = 60.0
_README = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
  description: shards {digest}
---

Written by `mimo-audio {task}`: see manifest.json.
"""
_README_WRITER = "\nWritten by `mimo-audio "

Settings = Mapping[str, Any]


class ShardDirectory:
    """The directory of a job's results.

    Args:
        path: where it is; made if it does not exist.
        settings: what the results depend on, as JSON can hold it. A directory that was begun with others is refused.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Settings) -> None:
        self.path = Path(path)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.data = self.path / "data"
        self.job = self.path / ".job"
        self.manifest = self.path / "manifest.json"
        self.errors = self.path / "errors.jsonl"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Holds the directory for this job, whose first process this is, after what is there has been checked.

        Raises:
            ValueError: it belongs to another job, by its settings or because that is still running, or is no directory
                of a job at all.
            OSError: it cannot be written to.
        """
        if self.path.is_dir() and not self.job.exists() and not self.manifest.exists() and any(self.path.iterdir()):
            raise ValueError(f"{self.path} holds other files; accepted: a new or empty directory, or a job's own")
        self.job.mkdir(parents=True, exist_ok=True)
        with _locked(self.job / "first.lock", self.path):
            # The other processes of an earlier run may outlive its first one.
            for lock in self.job.glob("process-*.lock"):
                with _locked(lock, self.path):
                    pass
            self._check_manifest()
            for folder in (self.path, self.data):
                for leftover in folder.glob(".*.tmp"):
                    leftover.unlink()
            yield
            # But for the lock: another job may be waiting for it.
            for file in self.job.iterdir():
                if file.name != "first.lock":
                    file.unlink(missing_ok=True)

    @contextmanager
    def joined(self, process: int) -> Iterator[None]:
        """Tells later runs that this process, not the first one, still writes to the directory."""
        with _locked(self.job / f"process-{process:05}.lock", self.path):
            yield

    def finished(self) -> list[tuple[Path, pq.FileMetaData]]:
        """The shards that are there. Damaged ones are moved out of the way, which is said.

        Raises:
            ValueError: a Parquet file that is not this job's.
        """
        shards = []
        for path in sorted(self.data.glob("*.parquet")):
            try:
                metadata = pq.read_metadata(path)
            except (pa.ArrowException, OSError) as error:
                self._set_aside(path, f"{error}: its clips are done again")
                continue
            described = json.loads((metadata.metadata or {}).get(_METADATA, b"{}"))
            if described.get("format") != FORMAT:
                raise ValueError(f"{path} is not this job's; accepted: a directory with its shards only")
            self._check_settings(described["settings"], path)
            shards.append((path, metadata))
        return shards

    def finished_keys(self) -> pa.ChunkedArray:
        """The keys of all clips in the shards.

        Raises:
            ValueError: two shards hold the same clip.
        """
        chunks: list[pa.Array] = []
        for path, _ in self.finished():
            try:
                chunks += pq.read_table(path, columns=["key"])["key"].chunks
            except (pa.ArrowException, OSError) as error:
                self._set_aside(path, f"{error}: its clips are done again")
        keys = pa.chunked_array(chunks, type=pa.string())
        repeated = first_repeated(keys)
        if repeated is not None:
            raise ValueError(f"{self.data}: {repeated!r} is in the shards twice; accepted: shards as a job wrote them")
        return keys

    def check_columns(self, features: Features) -> None:
        """Raise a ValueError if the shards that are there have other columns or types."""
        for path, _ in self.finished()[:1]:
            found, wanted = pq.read_schema(path), features.arrow_schema
            if not found.equals(wanted):
                raise ValueError(
                    f"{path} has the columns {_described(found)}, now they would be {_described(wanted)}; accepted: "
                    "the same columns, or another directory"
                )

    def next_shard(self) -> int:
        """A number above those of all shards, whole or damaged."""
        names = [path.name for folder in (self.data, self.path / "damaged") for path in folder.glob("*.parquet*")]
        numbers = [name.removeprefix("train-").split(".")[0] for name in names]
        return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)

    def shard_path(self, number: int) -> Path:
        return self.data / f"train-{number:05}.parquet"

    def write_shard(self, number: int, table: pa.Table, seconds: float) -> None:
        """Write one shard, which then lies on the disk for good."""
        described = {"format": FORMAT, "version": VERSION, "settings": self.settings, "seconds": seconds}
        metadata = {**(table.schema.metadata or {}), _METADATA: json.dumps(described).encode()}
        with replacing(self.shard_path(number)) as temporary, open(temporary, "wb") as file:
            table = table.replace_schema_metadata(metadata)
            pq.write_table(table, file, compression="zstd", row_group_size=_ROWS_PER_GROUP)
            file.flush()
            os.fsync(file.fileno())

    def write_manifest(self, *, complete: bool, failed: int | None = None) -> dict[str, Any]:
        """Write what is in the directory now, and return it."""
        shards = [
            {
                "file": str(path.relative_to(self.path)),
                "clips": metadata.num_rows,
                "hours": round(json.loads(metadata.metadata[_METADATA])["seconds"] / 3600, 6),
                "bytes": path.stat().st_size,
            }
            for path, metadata in self.finished()
        ]
        document = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings,
            "complete": complete,
            "clips": sum(shard["clips"] for shard in shards),
            "hours": round(sum(shard["hours"] for shard in shards), 6),
            "failed": failed,
            "shards": shards,
        }
        with replacing(self.manifest) as temporary:
            temporary.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        self._write_readme()
        return document

    def _write_readme(self) -> None:
        """Or write it anew, unless somebody else has put another one there.

        `datasets` caches what it reads of such a directory under the directory's last name and what its README says,
        not under the files: without a digest of them it would answer with what lay there before, or in another job's
        directory of that name.
        """
        found = sorted((path.name, path.stat()) for path in self.data.glob("*.parquet"))
        described = [(name, status.st_size, status.st_mtime_ns) for name, status in found]
        digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
        text = _README.format(task=self.settings["task"], digest=digest)
        readme = self.path / "README.md"
        present = readme.read_text(encoding="utf-8") if readme.exists() else None
        if present is None or (_README_WRITER in present and present != text):
            with replacing(readme) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def add_error(self, process: int, key: str, error: str) -> None:
        """Note that a clip failed."""
        with open(self.job / f"errors-{process:05}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "error": error}, ensure_ascii=False) + "\n")

    def forget_errors(self) -> None:
        """Those that a run noted which did not come to its end: it left the clips undone."""
        for path in self.job.glob("errors-*.jsonl"):
            path.unlink()

    def write_errors(self) -> int:
        """Write down all that was noted, in place of what an earlier run had, and return how many there are."""
        noted = [path.read_text(encoding="utf-8") for path in sorted(self.job.glob("errors-*.jsonl"))]
        lines = sorted(line for text in noted for line in text.split("\n") if line)
        if lines:
            with replacing(self.errors) as temporary:
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        else:
            self.errors.unlink(missing_ok=True)
        return len(lines)

    def _check_manifest(self) -> None:
        if not self.manifest.exists():
            return
        try:
            document = json.loads(self.manifest.read_text(encoding="utf-8"))
            settings = document["settings"] if document["format"] == FORMAT else None
            if not isinstance(settings, dict | None):
                raise TypeError("settings are no object")
        except (ValueError, KeyError, TypeError) as error:
            self._set_aside(self.manifest, f"{type(error).__name__}: {error}: it is made anew from the shards")
            return
        if settings is None:
            raise ValueError(f"{self.manifest} is not a job's; accepted: a new or empty directory, or a job's own")
        self._check_settings(settings, self.manifest)

    def _check_settings(self, found: Settings, where: Path) -> None:
        # What the model is called may change with the directory that one stands in; its weights may not.
        differences = [
            f"{name}={found.get(name)!r}, not {self.settings.get(name)!r}"
            for name in dict.fromkeys((*self.settings, *found))
            if name != "model" and found.get(name) != self.settings.get(name)
        ]
        if differences:
            raise ValueError(
                f"{where} was made with {'; '.join(differences)}; accepted: the same settings, or another directory"
            )

    def _set_aside(self, path: Path, why: str) -> None:
        # Under a name that nothing takes for data.
        target = self.path / "damaged" / f"{path.name}.damaged"
        while target.exists():
            target = target.with_name(target.name + "~")
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
        logger.warning(f"{path} is damaged ({why}); moved to {target}")


class ShardWriter:
    """Gathers rows and writes them in shards, beside the work of the thread that adds them.

    Args:
        directory: where to.
        features: of the rows.
        take_number: gives a number that no other shard has.
        finish: what is still to be done to a row before it is written, if anything; several run at once, in threads.
        max_clips, max_seconds: a shard is written when it has so many clips, or was begun so many seconds ago.
    """

    def __init__(
        self,
        directory: ShardDirectory,
        features: Features,
        take_number: Callable[[], int],
        finish: Callable[[dict[str, Any]], dict[str, Any]] | None,
        max_clips: int,
        max_seconds: float,
    ) -> None:
        self.directory = directory
        self.schema = features.arrow_schema
        self.take_number = take_number
        self.finish = finish
        self.max_clips = max_clips
        self.max_seconds = max_seconds
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0
        self._seconds = 0.0
        self._begun = 0.0
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._finishers = ThreadPoolExecutor()
        self._writing: Future[None] | None = None

    def add(self, row: dict[str, Any], num_bytes: int, seconds: float) -> None:
        """Add a row.

        Args:
            row: its columns.
            num_bytes: about how much memory it takes.
            seconds: of its audio.

        Raises:
            OSError: an earlier shard could not be written.
        """
        if not self._rows:
            self._begun = time.monotonic()
        self._rows.append(row)
        self._bytes += num_bytes
        self._seconds += seconds
        if (
            len(self._rows) >= self.max_clips
            or self._bytes >= MAX_SHARD_BYTES
            or time.monotonic() - self._begun >= self.max_seconds
        ):
            self._flush()

    def close(self) -> None:
        """Write what is left, and wait until it is there."""
        try:
            self._flush()
            self._wait()
        finally:
            self._writer.shutdown()
            self._finishers.shutdown()

    def _flush(self) -> None:
        self._wait()
        if self._rows:
            # Taken before they are handed on: a signal in between may leave rows undone, but never has them twice.
            rows, seconds = self._rows, self._seconds
            self._rows, self._bytes, self._seconds = [], 0, 0.0
            self._writing = self._writer.submit(self._write, rows, seconds)

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, rows: list[dict[str, Any]], seconds: float) -> None:
        if self.finish is not None:
            rows = list(self._finishers.map(self.finish, rows))
        columns = [arrow_column([row[field.name] for row in rows], field.type) for field in self.schema]
        table = pa.Table.from_arrays(columns, schema=self.schema)
        self.directory.write_shard(self.take_number(), table, seconds)


def _described(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def first_repeated(keys: pa.ChunkedArray) -> str | None:
    """A key that is there more than once."""
    counts = keys.value_counts()
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    return repeated[0]["values"].as_py() if len(repeated) else None


@contextmanager
def _locked(path: Path, directory: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning(f"{directory}: waiting for the processes of another run to end")
            lock.acquire(timeout=_LOCK_SECONDS)
    except Timeout as error:
        raise ValueError(f"{directory} is being written to by another job; accepted: one at a time") from error
    try:
        yield
    finally:
        lock.release()
