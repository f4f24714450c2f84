# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Jobs: a source's clips to a directory of shards, on any number of processes and machines, resumable at any time.

The first process lists the source and writes down what is missing in the directory; then every process takes units of
that list, a few clips each, until none is left. Reading processes decode and resample ahead, the device always has its
next batch, and shards are written beside it. What is in no shard when a run ends, for whatever reason, is missing for
the next one: that is all there is to resuming.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from accelerate import PartialState
from datasets import Audio, Features, Value
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from .audio import AUDIO_SUFFIXES, encode_audio
from .checkpoints import RELEASED_MODEL, load_model, weights_digest
from .codes import code_dtype
from .dataset import to_codes, to_waveform, tokenized_features
from .files import replacing
from .inference import MAX_BATCH_SECONDS, check_codes, decode_stream, encode_stream
from .modeling_mimo_audio_tokenizer import MiMoAudioTokenizerModel
from .optimization import optimize_for_inference
from .shards import ShardDirectory, ShardWriter, first_repeated
from .sources import AUDIO_COLUMNS, Problem, Row, Source, open_source
from .workers import available_cores, begun, give_way


CODES_COLUMNS = ("audio_codes",)

# A reading process hands on what it has once it has decoded this much, whatever the unit: memory stays bounded.
_CHUNK_ELEMENTS = 600 * 24000

_LISTED = pa.schema({"key": pa.large_string(), "file": pa.string(), "at": pa.list_(pa.int64())})
_REPORT_SECONDS = 0.25


@dataclass(frozen=True)
class JobOptions:
    """How a job is run.

    Attributes:
        model: a Hub id or a directory.
        device: by default this process's GPU, or the CPU.
        dtype: of the weights; by default bfloat16 on a GPU, float32 elsewhere.
        attn_implementation: as in `load_model`.
        num_quantizers: codebooks to use, from the first; all by default.
        batch_seconds: seconds of audio that run at once.
        num_workers: processes that read and decode, for each process of the job; by default as many as there are cores
            for it, less two, and one where the model itself runs on the CPU.
        shard_clips, shard_minutes: a shard is written after so many clips or minutes.
        column, key_column, config, split: of the source.
    """

    model: str = RELEASED_MODEL
    device: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    num_quantizers: int | None = None
    batch_seconds: float = MAX_BATCH_SECONDS
    num_workers: int | None = None
    shard_clips: int = 10_000
    shard_minutes: float = 10.0
    column: str | None = None
    key_column: str | None = None
    config: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Summary:
    """What a run of a job did, in all its processes.

    Attributes:
        clips: that were done, of `missing`.
        missing: clips that no shard had when the run began.
        finished: clips that shards had.
        failed: clips, lines or files that could not be done.
        audio_seconds: of the clips that were done.
        seconds: that it took, loading included.
    """

    clips: int
    missing: int
    finished: int
    failed: int
    audio_seconds: float
    seconds: float


class Conversion(ABC):
    """What a job makes of each clip."""

    task: str
    columns: Sequence[str]
    suffixes: Sequence[str]
    model: MiMoAudioTokenizerModel

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the results depend on."""

    @abstractmethod
    def features(self, carried: Features) -> Features:
        """The columns of the results, given those that are carried along."""

    @abstractmethod
    def reader(self) -> Callable[[Any], torch.Tensor]:
        """Makes a tensor of what the source has; for the reading processes, without the model."""

    @abstractmethod
    def stream(self, clips: Iterable[tuple[_Clip, torch.Tensor]]) -> Iterator[tuple[_Clip, torch.Tensor | Exception]]:
        """Runs the model."""

    @abstractmethod
    def row(self, clip: _Clip, result: torch.Tensor) -> tuple[dict[str, Any], float]:
        """The columns of a result, and its seconds of audio."""

    @abstractmethod
    def null_row(self) -> dict[str, Any]:
        """The columns of a clip that the source has a null for."""

    def finisher(self) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
        """What is to be done to a row beside the other work, if anything."""
        return None


@dataclass(frozen=True)
class Tokenization(Conversion):
    """Audio to codes."""

    model: MiMoAudioTokenizerModel
    options: JobOptions

    task = "tokenize"
    columns = AUDIO_COLUMNS
    suffixes = AUDIO_SUFFIXES

    def settings(self) -> dict[str, Any]:
        self.model.check_num_quantizers(self.options.num_quantizers)
        config = self.model.config
        return {
            "codebook_sizes": list(config.codebook_sizes[: self.options.num_quantizers]),
            "sampling_rate": config.sampling_rate,
            "samples_per_frame": config.samples_per_frame,
        }

    def features(self, carried: Features) -> Features:
        return tokenized_features(carried, self.model.config, num_quantizers=self.options.num_quantizers)

    def reader(self) -> Callable[[Any], torch.Tensor]:
        return partial(to_waveform, sampling_rate=self.model.config.sampling_rate)

    def stream(self, clips: Iterable[tuple[_Clip, torch.Tensor]]) -> Iterator[tuple[_Clip, torch.Tensor | Exception]]:
        def noted() -> Iterator[tuple[_Clip, torch.Tensor]]:
            for clip, waveform in clips:
                clip.num_samples = len(waveform)
                yield clip, waveform

        return encode_stream(
            self.model, noted(), self.options.num_quantizers, max_batch_seconds=self.options.batch_seconds
        )

    def row(self, clip: _Clip, result: torch.Tensor) -> tuple[dict[str, Any], float]:
        sizes = self.model.config.codebook_sizes[: self.options.num_quantizers]
        # A copy, which is much smaller than the tensor that it would hold until its shard is written.
        codes = result.to(code_dtype(sizes)).numpy().copy()
        row = {"audio_codes": codes, "num_samples": clip.num_samples}
        return row, clip.num_samples / self.model.config.sampling_rate

    def null_row(self) -> dict[str, Any]:
        return {"audio_codes": None, "num_samples": None}


@dataclass(frozen=True)
class Detokenization(Conversion):
    """Codes to audio, in files of a format inside the shards."""

    model: MiMoAudioTokenizerModel
    options: JobOptions
    format: str = "flac"

    task = "detokenize"
    columns = CODES_COLUMNS
    suffixes = ()

    def settings(self) -> dict[str, Any]:
        if self.model.decoder is None:
            raise ValueError(f"{self.model.config.name_or_path} holds an encoder only; accepted: one with a decoder")
        return {"format": self.format}

    def features(self, carried: Features) -> Features:
        return Features({**carried, "audio": Audio(sampling_rate=self.model.config.sampling_rate)})

    def reader(self) -> Callable[[Any], torch.Tensor]:
        return to_codes

    def stream(self, clips: Iterable[tuple[_Clip, torch.Tensor]]) -> Iterator[tuple[_Clip, torch.Tensor | Exception]]:
        bad: list[tuple[_Clip, Exception]] = []

        def good() -> Iterator[tuple[_Clip, torch.Tensor]]:
            for clip, codes in clips:
                try:
                    codes = check_codes(self.model, codes)
                    span = len(codes) * self.model.config.samples_per_frame
                    num_samples = clip.carried.get("num_samples")
                    if num_samples is None:
                        num_samples = span
                    if not isinstance(num_samples, int) or not 1 <= num_samples <= span:
                        raise ValueError(f"num_samples={num_samples!r}; accepted: 1 to {span}, the codes' span")
                    clip.num_samples = num_samples
                except ValueError as error:
                    bad.append((clip, error))
                else:
                    yield clip, codes

        for decoded in decode_stream(self.model, good(), max_batch_seconds=self.options.batch_seconds):
            yield decoded
            while bad:
                yield bad.pop()
        yield from bad

    def row(self, clip: _Clip, result: torch.Tensor) -> tuple[dict[str, Any], float]:
        waveform = result[: clip.num_samples].clone()
        if not waveform.isfinite().all():
            raise ValueError("NaN or infinite samples were decoded")
        return {"audio": waveform}, len(waveform) / self.model.config.sampling_rate

    def null_row(self) -> dict[str, Any]:
        return {"audio": None}

    def finisher(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return self._encode

    def _encode(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["audio"] is None:
            return row
        data = encode_audio(row["audio"], self.model.config.sampling_rate, self.format)
        return {**row, "audio": {"bytes": data, "path": f"{row['key']}.{self.format}"}}


def tokenize_job(source: str, out: str | os.PathLike[str], options: JobOptions) -> Summary:
    """Tokenize all clips of a source; what `mimo-audio tokenize` runs. Under a launcher, one of its processes' part.

    Args:
        source: as in `open_source`.
        out: directory of the shards; one that an earlier run left is completed.

    Returns:
        What all processes did together. Clips that failed are in `out/errors.jsonl`.

    Raises:
        ValueError: bad options, a source or a directory that does not suit.
        OSError: something could not be read or written; what was done before is in the shards.
    """
    return _run(Tokenization, source, out, options)


def detokenize_job(
    source: str, out: str | os.PathLike[str], options: JobOptions, audio_format: str = "flac"
) -> Summary:
    """Decode all clips of a source; what `mimo-audio detokenize` runs. As [`tokenize_job`]."""
    return _run(partial(Detokenization, format=audio_format), source, out, options)


@contextmanager
def lost_processes_named() -> Iterator[None]:
    """Says in one line, as an OSError, which process was lost: torch notices in any place, in its own words."""
    try:
        yield
    except dist.DistError as error:
        raise OSError(f"the launcher or the first process is gone ({_one_line(error)})") from error
    except BrokenProcessPool as error:
        raise OSError(f"a process was lost, perhaps for want of memory ({_one_line(error)})") from error
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise _reading_process_killed(error) from error
        if "shared memory" in str(error):
            raise OSError(
                f"{_one_line(error)}; accepted: more of it (/dev/shm, docker's --shm-size) or smaller batches"
            ) from error
        raise


def _reading_process_killed(error: Exception) -> OSError:
    text = f"a reading process was killed, perhaps for want of memory ({_one_line(error)}); accepted: fewer of them"
    return OSError(text)


@lost_processes_named()
def _run(
    make_conversion: Callable[[MiMoAudioTokenizerModel, JobOptions], Conversion],
    source_path: str,
    out: str | os.PathLike[str],
    options: JobOptions,
) -> Summary:
    started = time.perf_counter()
    has_accelerator = torch.cuda.is_available() or torch.backends.mps.is_available()
    # Told of the CPU, for without a GPU it would not see the other processes.
    state = PartialState(cpu=options.device == "cpu" or not has_accelerator)
    store = _shared_store(state)
    device = state.device if options.device is None else torch.device(options.device)
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if device.type == "cuda":
        # What is left to the CPU is small, and the threads would be in the way of the reading processes.
        torch.set_num_threads(1)
    model = load_model(options.model, device=device, dtype=dtype, attn_implementation=options.attn_implementation)
    digest = weights_digest(model)
    conversion = make_conversion(optimize_for_inference(model), options)
    settings = {
        "task": conversion.task,
        "source": os.path.realpath(source_path) if os.path.exists(source_path) else source_path,
        **{name: getattr(options, name) for name in ("config", "split", "column", "key_column")},
        "model": model.config.name_or_path,
        "weights": digest,
        "dtype": dtype,
        **conversion.settings(),
    }
    directory = ShardDirectory(out, settings)
    with ExitStack() as stack:
        if state.is_main_process:
            stack.enter_context(directory.opened())
            source = open_source(
                source_path,
                conversion.columns if options.column is None else [options.column],
                key_column=options.key_column,
                config=options.config,
                split=options.split,
                suffixes=conversion.suffixes,
                ignored=out,
            )
            plan = _make_plan(source, directory)
            directory.check_columns(_all_features(conversion, source))
            store.set("plan", json.dumps(plan))
        else:
            plan = json.loads(_await(store, "plan"))
            stack.enter_context(directory.joined(state.process_index))
            source = Source.from_dict(plan["source"])
        progress = _Progress(store, plan["missing"], shown=state.is_main_process)
        stack.enter_context(progress)
        features = _all_features(conversion, source)
        _convert(conversion, source, directory, plan, features, options, state, store, progress)
        progress.report()
        store.add("ended", 1)
        if state.is_main_process:
            while store.add("ended", 0) < state.num_processes:
                progress.report()
                time.sleep(_REPORT_SECONDS)
            progress.report()
            failed = directory.write_errors()
            unaccounted = plan["missing"] - store.add("done", 0) - failed
            directory.write_manifest(complete=failed == unaccounted == 0, failed=failed)
            if unaccounted:
                raise OSError(f"{unaccounted} clips were neither done nor did they fail; the same command does them")
            store.set("failed", str(failed))
        failed = int(_await(store, "failed"))
        done, milliseconds = store.add("done", 0), store.add("milliseconds", 0)
        if state.num_processes > 1:
            # The store may live in one of the processes, which waits for the others to have read from it.
            store.add("left", 1)
            while state.is_main_process and store.add("left", 0) < state.num_processes:
                time.sleep(_REPORT_SECONDS)
            state.destroy_process_group()
    return Summary(
        clips=done,
        missing=plan["missing"],
        finished=plan["finished"],
        failed=failed,
        audio_seconds=milliseconds / 1000,
        seconds=time.perf_counter() - started,
    )


def _all_features(conversion: Conversion, source: Source) -> Features:
    for name in conversion.null_row().keys() & source.features.keys():
        if not (name == "num_samples" and conversion.task == "detokenize"):
            raise ValueError(f"{source.path} has a column {name!r}, as the result has; accepted: a source without it")
    return conversion.features(Features({"key": Value("string"), **source.features}))


def _convert(
    conversion: Conversion,
    source: Source,
    directory: ShardDirectory,
    plan: dict[str, Any],
    features: Features,
    options: JobOptions,
    state: PartialState,
    store: dist.Store,
    progress: _Progress,
) -> None:
    """This process's part of the work."""
    writer = ShardWriter(
        directory,
        features,
        take_number=lambda: plan["next_shard"] + store.add("shards", 1) - 1,
        finish=conversion.finisher(),
        max_clips=options.shard_clips,
        max_seconds=options.shard_minutes * 60,
    )

    def fail(key: str, error: str) -> None:
        directory.add_error(state.process_index, key, error)
        progress.add(failed=1)

    def clips() -> Generator[tuple[_Clip, torch.Tensor], None, None]:
        units = iter(lambda: store.add("units", 1) - 1, -1)
        reader = _Reader(source, plan["list"], conversion.reader())
        device = conversion.model.device
        num_workers = _num_workers(device) if options.num_workers is None else options.num_workers
        missing = _below(plan["units"], units)
        for chunk in _read_ahead(reader, missing, num_workers, pin_memory=device.type == "cuda"):
            for key, error in chunk.failures:
                fail(key, error)
            for clip in chunk.nulls:
                writer.add({**clip.carried, **conversion.null_row(), "key": clip.key}, clip.num_bytes, 0.0)
                progress.add(done=1)
            yield from chunk.clips()

    with _terminated_as_interrupted(), closing(clips()) as reading:
        try:
            for clip, result in conversion.stream(reading):
                if not isinstance(result, torch.Tensor):
                    fail(clip.key, _one_line(result))
                    continue
                try:
                    row, seconds = conversion.row(clip, result)
                except ValueError as error:
                    fail(clip.key, _one_line(error))
                    continue
                writer.add({**clip.carried, **row, "key": clip.key}, clip.num_bytes + result.nbytes, seconds)
                progress.add(done=1, seconds=seconds)
        except BaseException:
            # What is done is kept; what keeps it from being written is the error already under way.
            with suppress(OSError):
                writer.close()
            raise
        writer.close()


# --- What is to be done ---


def _make_plan(source: Source, directory: ShardDirectory) -> dict[str, Any]:
    """List the source, and write the clips that no shard has to a file, a record batch for each unit.

    Raises:
        ValueError: two clips have the same key.
    """
    directory.forget_errors()
    listing, missing = (directory.job / name for name in ("listing.arrow", "missing.arrow"))
    problems = _list_clips(source, directory, listing)
    finished = directory.finished_keys()
    with pa.memory_map(str(listing)) as mapped:
        batches = pa.ipc.open_file(mapped)
        keys = batches.read_all()["key"]
        repeated = first_repeated(keys)
        if repeated is not None:
            raise ValueError(f"{source.path}: two clips have the key {repeated!r}; accepted: keys of one clip each")
        wanted = pc.invert(pc.is_in(keys, value_set=finished.cast(pa.large_string())))
        units = _write_missing(batches, wanted, missing)
        missing_clips = pc.sum(wanted).as_py() or 0
    directory.write_manifest(complete=False)
    return {
        "source": source.to_dict(),
        "list": str(missing),
        "units": units,
        "missing": missing_clips + problems,
        "finished": len(finished),
        "next_shard": directory.next_shard(),
    }


def _list_clips(source: Source, directory: ShardDirectory, path: Path) -> int:
    """Write the rows of a source, a record batch for each unit. What is no row is an error; returns how many are."""
    problems = 0
    with (
        replacing(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_file(file, _LISTED) as writer,
    ):
        for unit in source.units():
            rows = []
            for row in unit:
                if isinstance(row, Problem):
                    problems += 1
                    directory.add_error(0, row.key, row.error)
                else:
                    rows.append(row)
            columns = [[row.key for row in rows], [row.file for row in rows], [row.at for row in rows]]
            writer.write_batch(pa.record_batch(columns, schema=_LISTED))
    return problems


def _write_missing(batches: pa.RecordBatchFileReader, wanted: pa.ChunkedArray, path: Path) -> int:
    """Write what is wanted of the listed units, and return how many units have any of it."""
    units = first = 0
    with (
        replacing(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_file(file, _LISTED) as writer,
    ):
        for index in range(batches.num_record_batches):
            batch = batches.get_batch(index)
            left = batch.filter(wanted.slice(first, len(batch)).combine_chunks())
            first += len(batch)
            if len(left):
                writer.write_batch(left)
                units += 1
    return units


def _below(number: int, counter: Iterable[int]) -> Iterator[int]:
    for value in counter:
        if value >= number:
            return
        yield value


# --- Reading ---


@dataclass
class _Clip:
    """A clip on its way through the job."""

    key: str
    carried: dict[str, Any]
    shape: torch.Size
    num_bytes: int
    num_samples: int = 0


@dataclass
class _Chunk:
    """What a reading process has read: clips end to end in one tensor, which is cheap to hand over."""

    members: list[_Clip] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    nulls: list[_Clip] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    rest: list[Row] = field(default_factory=list)

    def pin_memory(self) -> _Chunk:
        """Called by the data loader's own thread, which so also takes over what other processes hand on."""
        self.tensors = [tensor.pin_memory() for tensor in self.tensors]
        return self

    def clips(self) -> Iterator[tuple[_Clip, torch.Tensor]]:
        if self.members:
            (packed,) = self.tensors
            pieces = packed.split([clip.shape.numel() for clip in self.members])
            for clip, piece in zip(self.members, pieces, strict=True):
                yield clip, piece.view(clip.shape)


class _Reader(TorchDataset[_Chunk]):
    """Reads units of the list of missing clips, or rows of it, in the data loader's processes."""

    def __init__(self, source: Source, path: str, read: Callable[[Any], torch.Tensor]) -> None:
        self.source = source
        self.path = path
        self.read = read

    def __getitem__(self, unit: int | list[Row]) -> _Chunk:
        rows = unit if isinstance(unit, list) else self._rows(unit)
        chunk = _Chunk()
        elements = 0
        for index, (row, (value, carried)) in enumerate(zip(rows, self._values(rows), strict=True)):
            if elements >= _CHUNK_ELEMENTS:
                chunk.rest = rows[index:]
                break
            try:
                if isinstance(value, Exception):
                    raise value
                if value is None:
                    chunk.nulls.append(_Clip(row.key, carried, torch.Size(), _size(carried)))
                    continue
                tensor = self.read(value)
            except Exception as error:  # whatever is wrong with one clip is no reason to stop
                chunk.failures.append((row.key, _one_line(error)))
                continue
            chunk.members.append(_Clip(row.key, carried, tensor.shape, _size(carried)))
            chunk.tensors.append(tensor.reshape(-1))
            elements += tensor.numel()
        if chunk.tensors:
            chunk.tensors = [torch.cat(chunk.tensors)]
        return chunk

    def _rows(self, unit: int) -> list[Row]:
        batch = self._list.get_batch(unit).to_pylist()
        return [Row(row["key"], row["file"], tuple(row["at"])) for row in batch]

    @cached_property
    def _list(self) -> pa.RecordBatchFileReader:
        return pa.ipc.open_file(pa.memory_map(self.path))

    def _values(self, rows: Sequence[Row]) -> Iterator[tuple[Any, dict[str, Any]]]:
        """What the source has for each row; where it fails as a whole, its error for all that are left."""
        values = self.source.read(rows)
        failure: Exception | None = None
        for _ in rows:
            try:
                value = next(values) if failure is None else (failure, {})
            except Exception as error:
                failure = error
                value = failure, {}
            yield value


def _read_ahead(reader: _Reader, units: Iterable[int], num_workers: int, pin_memory: bool) -> Iterator[_Chunk]:
    """Chunks as they are ready, in no order."""
    rests: list[list[Row]] = []
    units = iter(units)

    def work() -> Iterator[int | list[Row]]:
        for unit in units:
            while rests:
                yield rests.pop()
            yield unit
        while rests:
            yield rests.pop()

    while True:
        loader: DataLoader[_Chunk] = DataLoader(
            reader,
            batch_size=None,
            sampler=work(),  # type: ignore[arg-type] # (any iterable will do)
            num_workers=num_workers,
            prefetch_factor=2 if num_workers else None,
            collate_fn=_as_it_is,  # type: ignore[arg-type] # (called without batches)
            in_order=False,
            pin_memory=pin_memory,
            worker_init_fn=give_way,
        )
        try:
            for chunk in begun(loader):
                if chunk.rest:
                    rests.append(chunk.rest)
                yield chunk
        except (EOFError, ConnectionError) as error:  # in the middle of what it handed on
            raise _reading_process_killed(error) from error
        # What was left over after the loader had asked for the last work.
        if not rests:
            return


def _size(value: Any) -> int:
    """About the bytes that a value from a table takes."""
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 8


def _as_it_is(chunk: _Chunk) -> _Chunk:
    return chunk


def _num_workers(device: torch.device) -> int:
    if device.type == "cpu":
        return 1  # the model needs the cores itself
    return max(1, available_cores() - 2)


# --- Processes ---


def _shared_store(state: PartialState) -> dist.Store:
    """Counters and values that all processes of the job share."""
    if state.num_processes == 1:
        return dist.HashStore()
    # The launcher's, or the first process's.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"mimo-audio/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _await(store: dist.Store, name: str) -> str:
    """A value once it is set, however long that takes."""
    while not store.check([name]):
        time.sleep(_REPORT_SECONDS)
    return store.get(name).decode()


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """A scheduler that takes the machine back sends SIGTERM: time enough to write what is done."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # where Python has no signals
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Progress:
    """Counts for all processes; the first one shows them."""

    def __init__(self, store: dist.Store, total: int, shown: bool) -> None:
        self.store = store
        self.shown = shown
        self.bar = tqdm(total=total, unit="clip", disable=None if shown else True, file=sys.stderr)
        self.started = self.reported = time.monotonic()
        self.counts = {"done": 0, "failed clips": 0, "milliseconds": 0}

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *args: object) -> None:
        self.bar.close()

    def add(self, done: int = 0, failed: int = 0, seconds: float = 0.0) -> None:
        self.counts["done"] += done
        self.counts["failed clips"] += failed
        self.counts["milliseconds"] += round(seconds * 1000)
        if time.monotonic() - self.reported >= _REPORT_SECONDS:
            self.report()

    def report(self) -> None:
        self.reported = time.monotonic()
        totals = {name: self.store.add(name, count) for name, count in self.counts.items()}
        self.counts = dict.fromkeys(self.counts, 0)
        if self.shown:
            seconds = totals["milliseconds"] / 1000
            speed = seconds / max(1e-9, self.reported - self.started)
            failed = f", {totals['failed clips']} failed" if totals["failed clips"] else ""
            self.bar.set_postfix_str(f"{seconds / 3600:.2f} h of audio, {speed:.0f} s/s{failed}", refresh=False)
            self.bar.update(totals["done"] + totals["failed clips"] - self.bar.n)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"
