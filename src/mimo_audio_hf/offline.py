# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Upstream's command `mimo_audio_tokenizer`, flag for flag: a list of clips to tokens, tokens to audio, or both.

    torchrun --nproc_per_node=8 $(which mimo_audio_tokenizer) --model_path M --data_list data.jsonl --batch_size 64

It runs alone or under torchrun and `accelerate launch`, on CPUs too. A line of the list is a JSON object with `key`
and, depending on the task, the paths `wav`, `quantized_tokens` and `reconstructed_wav`. A token file is
`{"quantized_tokens": [[...], ...], "info": {...}}`, frames first, the line and timings being its info. A batch
is made ready while the one before it runs, so the time that stands there is from the end of that one to its own end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .audio import load_audio, save_audio
from .checkpoints import load_model
from .files import replacing, require_regular_file
from .inference import check_codes, decode_stream, encode_stream
from .jobs import lost_processes_named
from .modeling_mimo_audio_tokenizer import MiMoAudioTokenizerModel
from .optimization import optimize_for_inference
from .quantization import QUANTIZATIONS
from .workers import available_cores, begun, give_way, worker_pool


# What a line of the list has to name: what is read and what is written.
TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "wav2token": ("wav", ("quantized_tokens",)),
    "token2wav": ("quantized_tokens", ("reconstructed_wav",)),
    "wav2token2wav": ("wav", ("quantized_tokens", "reconstructed_wav")),
}


# A batch of 64 clips of common lengths runs at once: fewer calls are less work for the process that makes them.
_MAX_BATCH_SECONDS = 600.0
# Processes that write files, beyond which a GPU has not been seen to need more.
_MAX_WRITERS = 8

_PROCESS_GROUP: dict[str, Any] = {"timeout": timedelta(days=30)} if "RANK" in os.environ else {}


@dataclass(frozen=True)
class Clip:
    """A line of the list, and what was read for it or why it could not be."""

    info: dict[str, Any]
    data: torch.Tensor | None = None
    error: str | None = None


@dataclass(frozen=True)
class _Packed:
    """Tensors on their way from one process to another, as one: each would take several system calls."""

    shapes: list[tuple[int, ...] | None]
    data: torch.Tensor

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor | None]) -> _Packed:
        there = [tensor.flatten() for tensor in tensors if tensor is not None]
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in tensors]
        return cls(shapes, torch.cat(there) if there else torch.empty(0))

    def pin_memory(self) -> _Packed:
        """Called by the data loader's own thread, which so also takes over what other processes hand on."""
        return replace(self, data=self.data.pin_memory())

    def unpacked(self) -> list[torch.Tensor | None]:
        parts = iter(self.data.split([math.prod(shape) for shape in self.shapes if shape is not None]))
        return [None if shape is None else next(parts).view(shape) for shape in self.shapes]


@dataclass(frozen=True)
class _Results:
    """What became of a batch, on its way to where it is written."""

    infos: list[dict[str, Any]]
    codes: _Packed
    waveforms: _Packed
    sampling_rate: int

    def save(self) -> list[str]:
        """Writes the files. Returns what could not be written."""
        failures = []
        for info, codes, waveform in zip(self.infos, self.codes.unpacked(), self.waveforms.unpacked(), strict=True):
            try:
                if codes is not None:
                    save_tokens(info["quantized_tokens"], codes, info)
                if waveform is not None:
                    save_audio(info["reconstructed_wav"], waveform, self.sampling_rate)
            except Exception as error:  # whatever is wrong with one clip is no reason to stop
                failures.append(_failure(info, error))
        return failures


def _failure(info: dict[str, Any], error: object) -> str:
    return f"{info['key']}: {' '.join(str(error).split()) or type(error).__name__}"


class _Clips(Dataset[Clip]):
    """Reads the clips' files, in the data loader's worker processes."""

    def __init__(self, lines: Sequence[dict[str, Any]], source: str, sampling_rate: int) -> None:
        self.lines = lines
        self.source = source
        self.sampling_rate = sampling_rate

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Clip:
        info = self.lines[index]
        try:
            path = info[self.source]
            data = load_audio(path, self.sampling_rate) if self.source == "wav" else load_tokens(path)
        except (ValueError, OSError) as error:
            return Clip(info, error=str(error))
        return Clip(info, data)


def load_tokens(path: str) -> torch.Tensor:
    """Codes (frames, codebooks) int64 of a token file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no token file; the message names it.
    """
    require_regular_file(path, "accepted: a token file")
    try:
        tokens = torch.tensor(json.loads(Path(path).read_text(encoding="utf-8"))["quantized_tokens"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:  # RuntimeError: beyond int64, or too deep
        raise ValueError(f"{path}: no token file ({error}); accepted: {{'quantized_tokens': [[...], ...]}}") from error
    if tokens.ndim != 2 or not tokens.numel() or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"{path}: quantized_tokens have shape {tuple(tokens.shape)}; accepted: (frames, codebooks)")
    return tokens


def save_tokens(path: str, codes: torch.Tensor, info: dict[str, Any]) -> None:
    """Write codes (frames, codebooks) as upstream does: indented by four spaces, a line for each number."""
    # As json.dumps writes them, which would hold up the other threads five times as long.
    number = _numbers(int(codes.max()).bit_length()).__getitem__
    frames = ["        [\n" + ",\n".join(map(number, frame)) + "\n        ]" for frame in codes.tolist()]
    rest = json.dumps({"info": info}, ensure_ascii=False, indent=4).removeprefix("{")
    with replacing(Path(path)) as temporary:
        temporary.write_text('{\n    "quantized_tokens": [\n' + ",\n".join(frames) + "\n    ]," + rest, "utf-8")


@lru_cache
def _numbers(bits: int) -> list[str]:
    """The lines of all numbers of so many bits."""
    return [f"            {number}" for number in range(1 << bits)]


def read_list(path: str | Path, task: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The usable lines of a JSON-lines list, and what is wrong with the others.

    Raises:
        OSError: the list cannot be read.
        ValueError: two lines write the same file.
    """
    source, targets = TASKS[task]
    lines: list[dict[str, Any]] = []
    problems: list[str] = []
    written: dict[str, int] = {}
    with open(path, "rb") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                line = _parse_line(text, ("key", source, *targets))
            except ValueError as error:
                problems.append(f"{path}, line {number}: {error}")
                continue
            for name in targets:
                target = os.path.realpath(line[name])
                other = written.setdefault(target, number)
                if other != number or (name != targets[0] and target == os.path.realpath(line[targets[0]])):
                    raise ValueError(f"{path}, lines {other} and {number} both write {line[name]}")
            lines.append(line)
    for line in lines:
        if os.path.realpath(line[source]) in written:
            raise ValueError(f"{path}: {line[source]} is to be read and written; accepted: other files to write")
    return lines, problems


def _parse_line(text: bytes, required: tuple[str, ...]) -> dict[str, Any]:
    """A line of the list: an object with a key and paths."""
    try:
        line = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{error}; accepted: a JSON object") from error
    for name in required:
        if not isinstance(line, dict) or not isinstance(line.get(name), str):
            raise ValueError(f"{name} is missing; accepted: {', '.join(required)}")
    for name in required[1:]:
        try:
            if b"\0" in os.fsencode(line[name]):
                raise ValueError("null byte")
        except ValueError as error:  # or half a surrogate pair
            raise ValueError(f"{name}={line[name]!r}: {error}; accepted: a path") from error
    return line


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command's options."""
    parser = argparse.ArgumentParser(prog="mimo_audio_tokenizer", description="A list of clips to tokens and back.")
    parser.add_argument("--model_path", required=True, help="directory or Hub id of the model")
    parser.add_argument("--data_list", required=True, help="JSON lines with key, wav, quantized_tokens, ...")
    parser.add_argument("--batch_size", required=True, type=int, help="clips at a time, in each process")
    parser.add_argument("--num_workers", type=int, default=4, help="processes that read files, for each process")
    parser.add_argument("--prefetch", type=int, default=5, help="batches that each of them reads ahead")
    parser.add_argument("--seed", type=int, default=1986, help="accepted for upstream's sake: nothing here is random")
    parser.add_argument("--num_quantizers", type=int, default=None, help="codebooks to use, from the first")
    parser.add_argument("--task", choices=list(TASKS), default="wav2token", help="what to do (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", *QUANTIZATIONS],
        help="of the weights (default: bfloat16 on CUDA, else float32); int8 on CPUs and fp8 on GPUs are less exact",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 1 if anything failed, or 130 if it was interrupted."""
    args = make_parser().parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        failures = run(args)
    except (ValueError, OSError) as error:
        print(f"mimo_audio_tokenizer: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mimo_audio_tokenizer: error: interrupted", file=sys.stderr)
        return 130  # as a shell counts it
    return 1 if failures else 0


@lost_processes_named()
def run(args: argparse.Namespace) -> int:
    """Do the work of this process. Returns the number of failures in all processes."""
    if args.batch_size < 1:
        raise ValueError(f"--batch_size {args.batch_size}; accepted: 1 or more")
    lines, problems = read_list(args.data_list, args.task)
    has_gpu = torch.cuda.is_available()
    with _writers(has_gpu) as writers:
        # Told of the CPU, for without a GPU it would not see the other processes. At the end they wait for the slowest
        # of them, for as long as it takes: a time-out would end its work, too.
        state = PartialState(cpu=not has_gpu, **_PROCESS_GROUP)
        failures = [*problems] if state.is_main_process else []
        model = _load(args, state.device)
        started = time.perf_counter()
        seconds, failed_here = _convert_list(model, lines[state.process_index :: state.num_processes], args, writers)
    failures += failed_here

    for failure in failures:
        print(f"mimo_audio_tokenizer: failed: {failure}", file=sys.stderr)
    # Together, for torchrun ends all processes as soon as one of them fails.
    everyone = gather_object([(len(failures), seconds)])
    failed = sum(number for number, _ in everyone)
    if state.is_main_process:
        elapsed = time.perf_counter() - started
        total = sum(audio for _, audio in everyone)
        done = len(lines) + len(problems) - failed
        print(f"{args.task}: {done} of {len(lines) + len(problems)} clips, {total:.1f} s of audio in {elapsed:.1f} s")
    if state.num_processes > 1:
        state.destroy_process_group()
    return failed


def _load(args: argparse.Namespace, device: torch.device) -> MiMoAudioTokenizerModel:
    if device.type == "cuda":
        # What is left to the CPU is small, and the threads would be in the way of the other processes.
        torch.set_num_threads(1)
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    model = optimize_for_inference(load_model(args.model_path, device=device, dtype=dtype))
    model.check_num_quantizers(args.num_quantizers)
    if "reconstructed_wav" in TASKS[args.task][1] and model.decoder is None:
        raise ValueError(f"--model_path {args.model_path} holds an encoder only; accepted for it: --task wav2token")
    return model


def _convert_list(
    model: MiMoAudioTokenizerModel, lines: Sequence[dict[str, Any]], args: argparse.Namespace, writers: Executor
) -> tuple[float, list[str]]:
    """Reads, converts and writes. Returns the seconds of audio that were done, and what failed.

    Clips that fail are set aside: a process that stopped here would leave the others waiting for it.
    """
    source, targets = TASKS[args.task]
    sampling_rate, frame_rate = model.config.sampling_rate, model.config.frame_rate
    limits: dict[str, Any] = {"max_batch_seconds": _MAX_BATCH_SECONDS, "max_batch_clips": args.batch_size}
    failures: list[str] = []
    started = batch_started = time.perf_counter()
    seconds = 0.0

    def fail(info: dict[str, Any], error: object) -> None:
        failures.append(_failure(info, error))
        bar.update()

    def read() -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        for clips, packed in _batches(model, lines, args):
            for clip, data in zip(clips, packed.unpacked(), strict=True):
                try:
                    if data is None:
                        raise ValueError(clip.error)
                    yield clip.info, data if source == "wav" else check_codes(model, data, clip.info[source])
                except ValueError as error:
                    fail(clip.info, error)

    def tokenized() -> Iterator[tuple[tuple[dict[str, Any], torch.Tensor], torch.Tensor]]:
        encoded = encode_stream(model, read(), args.num_quantizers, **limits) if source == "wav" else read()
        for info, codes in encoded:
            if isinstance(codes, torch.Tensor):
                yield (info, codes), codes
            else:
                fail(info, codes)

    def converted() -> Iterator[tuple[dict[str, Any], torch.Tensor, torch.Tensor | None]]:
        if "reconstructed_wav" not in targets:
            yield from ((info, codes, None) for (info, codes), _ in tokenized())
            return
        for (info, codes), waveform in decode_stream(model, tokenized(), **limits):
            if isinstance(waveform, torch.Tensor):
                yield info, codes, waveform
            else:
                fail(info, waveform)

    def write(infos: list[dict[str, Any]], codes: list[Any], waveforms: list[Any]) -> Future[list[str]]:
        packed = _Packed.of(codes if "quantized_tokens" in targets else [None] * len(codes))
        return writers.submit(_Results(infos, packed, _Packed.of(waveforms), sampling_rate).save)

    writing: deque[Future[Future[list[str]]]] = deque()
    with (
        ThreadPoolExecutor(max_workers=1) as packer,
        tqdm(total=len(lines), unit="clip", disable=None if PartialState().is_main_process else True) as bar,
    ):
        results = converted()
        while batch := [*itertools.islice(results, args.batch_size)]:
            infos, codes, waveforms = map(list, zip(*batch, strict=True))
            now = time.perf_counter()
            if source == "wav":
                timing = {"batch_size": len(batch), "model_inference_time": now - batch_started}
                infos = [info | {"timing_stats": timing} for info in infos]
            batch_started = now
            writing.append(packer.submit(write, infos, codes, waveforms))
            seconds += sum(map(len, codes)) / frame_rate
            bar.update(len(batch))
            bar.set_postfix_str(f"{seconds / (now - started):.0f} s of audio/s")
            if len(writing) > 2 * _MAX_WRITERS:  # so that memory is bounded
                failures += writing.popleft().result().result()
        for each in writing:
            failures += each.result().result()
    return seconds, failures


def _writers(has_gpu: bool) -> AbstractContextManager[Executor]:
    """What writes the files: processes, for threads of the one that launches a GPU's work would hold it up."""
    if not has_gpu:
        return ThreadPoolExecutor(max_workers=1)
    return worker_pool(max(1, min(_MAX_WRITERS, available_cores() // 2)))


def _batches(
    model: MiMoAudioTokenizerModel, lines: Sequence[dict[str, Any]], args: argparse.Namespace
) -> Iterator[tuple[list[Clip], _Packed]]:
    """Clips without their data, and that."""
    loader: DataLoader[Any] = DataLoader(
        _Clips(lines, TASKS[args.task][0], model.config.sampling_rate),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        prefetch_factor=args.prefetch if args.num_workers else None,
        collate_fn=_pack,
        pin_memory=model.device.type == "cuda",
        worker_init_fn=give_way,
    )
    return begun(loader)


def _pack(clips: list[Clip]) -> tuple[list[Clip], _Packed]:
    return [replace(clip, data=None) for clip in clips], _Packed.of([clip.data for clip in clips])


if __name__ == "__main__":
    sys.exit(main())
