# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Upstream's command `mimo_audio_tokenizer`, flag for flag: a list of clips to tokens, tokens to audio, or both.

    torchrun --nproc_per_node=8 $(which mimo_audio_tokenizer) --model_path M --data_list data.jsonl --batch_size 64

It runs alone or under torchrun and `accelerate launch`, on CPUs too. A line of the list is a JSON object with `key`
and, depending on the task, the paths `wav`, `quantized_tokens` and `reconstructed_wav`. A token file is
`{"quantized_tokens": [[...], ...], "info": {...}}`, frames first, the line and timings being its info. On a GPU two
batches are under way at a time, so that the time of one may hold some of another's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .audio import load_audio, save_audio
from .checkpoints import load_model
from .files import replacing
from .inference import check_codes, convert_each, decode_codes, encode_waveforms
from .jobs import lost_processes_named
from .optimization import optimize_for_inference
from .quantization import QUANTIZATIONS


# What a line of the list has to name: what is read and what is written.
TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "wav2token": ("wav", ("quantized_tokens",)),
    "token2wav": ("quantized_tokens", ("reconstructed_wav",)),
    "wav2token2wav": ("wav", ("quantized_tokens", "reconstructed_wav")),
}


Item = TypeVar("Item")
Result = TypeVar("Result")

_PROCESS_GROUP: dict[str, Any] = {"timeout": timedelta(days=30)} if "RANK" in os.environ else {}


@dataclass(frozen=True)
class Clip:
    """A line of the list, and what was read for it or why it could not be."""

    info: dict[str, Any]
    data: torch.Tensor | None = None
    error: str | None = None


@dataclass(frozen=True)
class _Read:
    """Clips on their way from the process that read them, as one tensor: each would take several system calls."""

    clips: list[Clip]  # without their data
    shapes: list[tuple[int, ...] | None]
    data: torch.Tensor

    @classmethod
    def of(cls, clips: list[Clip]) -> _Read:
        data = [clip.data.flatten() for clip in clips if clip.data is not None]
        shapes = [None if clip.data is None else tuple(clip.data.shape) for clip in clips]
        return cls([replace(clip, data=None) for clip in clips], shapes, torch.cat(data) if data else torch.empty(0))

    def unpacked(self) -> list[Clip]:
        parts = iter(self.data.split([math.prod(shape) for shape in self.shapes if shape is not None]))
        return [
            clip if shape is None else replace(clip, data=next(parts).view(shape))
            for clip, shape in zip(self.clips, self.shapes, strict=True)
        ]


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
    """Run the command line. Returns the exit status: 0, or 1 if anything failed."""
    args = make_parser().parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        failures = run(args)
    except (ValueError, OSError) as error:
        print(f"mimo_audio_tokenizer: error: {error}", file=sys.stderr)
        return 1
    return 1 if failures else 0


@lost_processes_named()
def run(args: argparse.Namespace) -> int:
    """Do the work of this process. Returns the number of failures in all processes."""
    if args.batch_size < 1:
        raise ValueError(f"--batch_size {args.batch_size}; accepted: 1 or more")
    lines, problems = read_list(args.data_list, args.task)
    # Told of the CPU, for without a GPU it would not see the other processes. At the end they wait for the slowest of
    # them, for as long as it takes: a time-out would end its work, too.
    state = PartialState(cpu=not torch.cuda.is_available(), **_PROCESS_GROUP)
    failures = [*problems] if state.is_main_process else []
    source, targets = TASKS[args.task]

    device = state.device
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    model = optimize_for_inference(load_model(args.model_path, device=device, dtype=dtype))
    sampling_rate = model.config.sampling_rate
    model.check_num_quantizers(args.num_quantizers)
    if "reconstructed_wav" in targets and model.decoder is None:
        raise ValueError(f"--model_path {args.model_path} holds an encoder only; accepted for it: --task wav2token")

    def check(clip: Clip) -> Clip:
        """The clip, or why its codes cannot be decoded."""
        if clip.data is None or source == "wav":
            return clip
        try:
            return Clip(clip.info, check_codes(model, clip.data, clip.info[source]))
        except ValueError as error:
            return Clip(clip.info, error=str(error))

    def convert(data: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        codes = encode_waveforms(model, data, args.num_quantizers) if source == "wav" else data
        if "reconstructed_wav" not in targets:
            return [(clip_codes, None) for clip_codes in codes]
        return list(zip(codes, decode_codes(model, codes), strict=True))

    def run_model(clips: list[Clip]) -> tuple[list[Clip], list[Any], dict[str, Any]]:
        """Clips, the results or errors of those that could be read, and what is told of the batch."""
        clips = [check(clip) for clip in clips]
        data = [clip.data for clip in clips if clip.data is not None]
        begun = time.perf_counter()
        results = convert_each(convert, data)
        return clips, results, {"batch_size": len(data), "model_inference_time": time.perf_counter() - begun}

    def save(info: dict[str, Any], codes: torch.Tensor, waveform: torch.Tensor | None) -> None:
        if "quantized_tokens" in targets:
            save_tokens(info["quantized_tokens"], codes, info)
        if waveform is not None:
            save_audio(info["reconstructed_wav"], waveform, sampling_rate)

    started = time.perf_counter()
    mine = lines[state.process_index :: state.num_processes]
    seconds = 0.0
    saving: list[tuple[str, Future[None]]] = []
    with (
        ThreadPoolExecutor(max_workers=min(8, args.batch_size)) as writer,
        # Two batches at a time: one is made ready, or its results are taken, while a GPU is busy with the other.
        _converter(device) as converter,
        tqdm(total=len(mine), unit="clip", disable=None if state.is_main_process else True) as bar,
    ):
        # Clips that fail are set aside: a process that stopped here would leave the others waiting for it below.
        for clips, results, timing in _in_turn(converter, run_model, _batches(mine, source, sampling_rate, args)):
            failures += [f"{clip.info['key']}: {clip.error}" for clip in clips if clip.error is not None]
            infos = [clip.info for clip in clips if clip.data is not None]
            for info, result in zip(infos, results, strict=True):
                if isinstance(result, Exception):
                    failures.append(f"{info['key']}: {' '.join(str(result).split())}")
                    continue
                clip_codes, waveform = result
                described = info | {"timing_stats": timing} if source == "wav" else info
                saving.append((info["key"], writer.submit(save, described, clip_codes, waveform)))
                seconds += len(clip_codes) * model.config.samples_per_frame / sampling_rate
            bar.update(len(clips))
            bar.set_postfix_str(f"{seconds / (time.perf_counter() - started):.0f} s of audio/s")
    failures += [f"{key}: {error}" for key, future in saving if (error := future.exception()) is not None]

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


def _converter(device: torch.device) -> ThreadPoolExecutor:
    if device.type != "cuda":
        return ThreadPoolExecutor(max_workers=1)
    # Which GPU is current is each thread's own matter; "cuda" without a number is this thread's.
    index = torch.cuda.current_device() if device.index is None else device.index
    return ThreadPoolExecutor(max_workers=2, initializer=torch.cuda.set_device, initargs=(index,))


def _in_turn(
    executor: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterator[Item]
) -> Iterator[Result]:
    """The results in order; at most three items are under way, so that memory is bounded."""
    running: deque[Future[Result]] = deque()
    for item in items:
        running.append(executor.submit(function, item))
        if len(running) > 2:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _batches(
    lines: Sequence[dict[str, Any]], source: str, sampling_rate: int, args: argparse.Namespace
) -> Iterator[list[Clip]]:
    loader: DataLoader[Any] = DataLoader(
        _Clips(lines, source, sampling_rate),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        prefetch_factor=args.prefetch if args.num_workers else None,
        collate_fn=_Read.of,
    )
    return (read.unpacked() for read in loader)


if __name__ == "__main__":
    sys.exit(main())
