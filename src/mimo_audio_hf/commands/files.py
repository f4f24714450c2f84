# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Files to code files and back: `encode`, `decode` and `roundtrip`."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from .. import codes as code_files
from ..audio import AUDIO_SUFFIXES, load_audio, save_audio
from ..codes import AudioCodes
from ..inference import MAX_BATCH_SECONDS, Progress, convert_each, decode_codes, encode_waveforms, group_by_seconds
from .options import (
    OUTPUT_SUFFIXES,
    Subparsers,
    add_batch_seconds,
    add_model_options,
    add_num_quantizers,
    counted,
    load_converter,
    path_argument,
    report,
)


logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

# Files are loaded this many batches at a time: enough to sort by length, little enough to hold in memory.
_BATCHES_LOADED = 4


def add_encode(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "encode",
        help="audio files to code files",
        description="Encode audio files to code files (codes, sampling rate, sample count and model name in one "
        "safetensors file each). Existing code files are overwritten, other files never.",
    )
    _add_files(parser, "audio files", "NAME.safetensors for each NAME.wav", "also a name ending in .safetensors")
    add_num_quantizers(parser)
    add_model_options(parser)
    add_batch_seconds(parser)
    parser.set_defaults(run=run_encode)


def run_encode(args: argparse.Namespace) -> int:
    files = _plan_outputs(args.inputs, args.output, AUDIO_SUFFIXES, (code_files.SUFFIX,), code_files.SUFFIX)
    for target in files:
        code_files.require_writable(target)
    model = load_converter(args, args.num_quantizers)

    def save(target: Path, waveform: torch.Tensor, codes: torch.Tensor) -> None:
        AudioCodes.of_model(model.config, codes, num_samples=len(waveform)).save(target)

    return _convert_files(
        "encoded",
        files,
        args,
        load=lambda path: load_audio(path, model.config.sampling_rate),
        seconds=lambda waveform: len(waveform) / model.config.sampling_rate,
        convert=lambda waveforms, progress: encode_waveforms(
            model, waveforms, args.num_quantizers, max_batch_seconds=args.batch_seconds, progress=progress
        ),
        save=save,
    )


def add_decode(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "decode",
        help="code files to audio files",
        description="Decode code files to audio files, each as long as the audio that was encoded. Existing files are "
        "overwritten.",
    )
    names = f"also a name ending in {', '.join(OUTPUT_SUFFIXES)}"
    _add_files(parser, "code files", "NAME.wav for each NAME.safetensors", names)
    parser.add_argument(
        "--format",
        choices=[suffix[1:] for suffix in OUTPUT_SUFFIXES],
        help="format of the files in a folder (wav by default); a file name has its own",
    )
    add_model_options(parser)
    add_batch_seconds(parser)
    parser.set_defaults(run=run_decode)


def run_decode(args: argparse.Namespace) -> int:
    suffixes = OUTPUT_SUFFIXES if args.format is None else (f".{args.format}",)
    files = _plan_outputs(args.inputs, args.output, (code_files.SUFFIX,), suffixes, suffixes[0])
    model = load_converter(args, decodes=True)
    other_models: set[str] = set()

    def load(path: Path) -> AudioCodes:
        codes = AudioCodes.load(path)
        try:
            codes.require_decodable(model.config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        name = model.config.name_or_path
        if codes.model not in {name, *other_models}:
            other_models.add(codes.model)
            logger.warning(f"{path}: codes of the model {codes.model!r} are decoded with {name!r}")
        return codes

    return _convert_files(
        "decoded",
        files,
        args,
        load=load,
        seconds=lambda codes: codes.seconds,
        convert=lambda clips, progress: decode_codes(
            model, [clip.codes for clip in clips], max_batch_seconds=args.batch_seconds, progress=progress
        ),
        save=lambda target, codes, waveform: save_audio(target, waveform[: codes.num_samples], codes.sampling_rate),
    )


def add_roundtrip(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "roundtrip",
        help="an audio file through the tokenizer and back",
        description="Encode an audio file and decode its codes: what the tokenizer keeps of it, with as many samples "
        "as it has at the model's sampling rate. An existing OUT is overwritten.",
    )
    parser.add_argument("input", type=path_argument, metavar="IN", help="audio file")
    parser.add_argument(
        "output",
        type=path_argument,
        metavar="OUT",
        help=f"audio file to write: a name ending in {', '.join(OUTPUT_SUFFIXES)}",
    )
    add_num_quantizers(parser)
    add_model_options(parser)
    parser.set_defaults(run=run_roundtrip, batch_seconds=MAX_BATCH_SECONDS)


def run_roundtrip(args: argparse.Namespace) -> int:
    if args.output.suffix.lower() not in OUTPUT_SUFFIXES:
        raise ValueError(f"{args.output}: accepted: a file name ending in {', '.join(OUTPUT_SUFFIXES)}")
    if args.output.exists() and args.input.exists() and args.output.samefile(args.input):
        raise ValueError(f"{args.output} is the input itself; accepted: another file")
    model = load_converter(args, args.num_quantizers, decodes=True)
    sampling_rate = model.config.sampling_rate

    def convert(waveforms: list[torch.Tensor], progress: Progress) -> list[torch.Tensor]:
        def half(seconds: float) -> None:
            progress(seconds / 2)

        return decode_codes(
            model, encode_waveforms(model, waveforms, args.num_quantizers, progress=half), progress=half
        )

    return _convert_files(
        "encoded and decoded",
        {args.output: args.input},
        args,
        load=lambda path: load_audio(path, sampling_rate),
        seconds=lambda waveform: len(waveform) / sampling_rate,
        convert=convert,
        save=lambda target, waveform, decoded: save_audio(target, decoded[: len(waveform)], sampling_rate),
    )


def _add_files(parser: argparse.ArgumentParser, inputs: str, folder_gets: str, one_file: str) -> None:
    parser.add_argument(
        "inputs", nargs="+", type=path_argument, metavar="IN", help=f"{inputs}, or folders to be searched for them"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=path_argument,
        required=True,
        metavar="OUT",
        help=f"a folder, which gets {folder_gets} and the inputs' subfolders; for one input file {one_file}",
    )


def _plan_outputs(
    inputs: Sequence[Path],
    output: Path,
    input_suffixes: Sequence[str],
    output_suffixes: Sequence[str],
    folder_suffix: str,
) -> dict[Path, Path]:
    """Which file is made of which: output to input.

    Args:
        inputs: files, or folders to be searched for files with one of `input_suffixes`.
        output: for one input file a name with one of `output_suffixes`; else a folder, whose files get
            `folder_suffix`.

    Raises:
        ValueError: an input that does not exist, a folder without files, an `output` that does not suit the inputs, or
            two inputs for one output file.
    """
    found: list[tuple[Path, Path]] = []  # a file, and its place in the output folder
    for given in inputs:
        if given.is_dir():
            files = sorted(
                path for path in given.rglob("*") if path.suffix.lower() in input_suffixes and path.is_file()
            )
            if not files:
                raise ValueError(f"{given}: no files to read; accepted in a folder: {', '.join(input_suffixes)}")
            found += [(path, path.relative_to(given)) for path in files]
        elif given.exists():
            found.append((given, Path(given.name)))
        else:
            raise ValueError(f"{given}: no such file or folder")

    if not output.is_dir():
        one_file = len(inputs) == 1 and not inputs[0].is_dir()
        if one_file and output.suffix.lower() in output_suffixes:
            return {output: inputs[0]}
        if one_file and (output.exists() or output.suffix):
            raise ValueError(f"output {output}: accepted: a folder, or a name ending in {', '.join(output_suffixes)}")
        if output.exists() or output.suffix.lower() in output_suffixes:
            raise ValueError(f"output {output} is one file for many inputs; accepted: a folder")

    files_by_target: dict[Path, Path] = {}
    for source, place in found:
        target = output / place.with_suffix(folder_suffix)
        other = files_by_target.setdefault(target, source)
        if other != source:
            raise ValueError(f"{other} and {source} would both be written to {target}; accepted: different names")
    return files_by_target


def _convert_files(
    done: str,
    files: dict[Path, Path],
    args: argparse.Namespace,
    *,
    load: Callable[[Path], Item],
    seconds: Callable[[Item], float],
    convert: Callable[[list[Item], Progress], list[Result]],
    save: Callable[[Path, Item, Result], None],
) -> int:
    """Load, convert and save files, a few batches of them in memory at a time, and say what was done.

    A file that cannot be loaded, converted or saved is reported and left out.

    Args:
        done: what happens to the files, for people.
        files: output to input.
        load, seconds, convert, save: of one input, its duration, of many of them, and of one output. `convert` tells
            how many seconds of audio it has done.

    Returns:
        The exit status: 1 if a file was left out.
    """
    started = time.perf_counter()
    converted, total, processed = 0, 0.0, 0.0

    with tqdm(desc=done, total=len(files), unit="file", disable=None) as bar:

        def load_all() -> Iterator[tuple[Path, Item]]:
            for target, source in files.items():
                try:
                    item = load(source)
                except (OSError, ValueError) as error:
                    report(error)
                    bar.update()
                else:
                    yield target, item

        def advance(seconds: float) -> None:
            nonlocal processed
            processed += seconds
            rate = processed / (time.perf_counter() - started)
            bar.set_postfix_str(f"{processed:.1f} s of audio, {rate:.1f} s/s")

        budget = _BATCHES_LOADED * args.batch_seconds
        for chunk in group_by_seconds(load_all(), lambda entry: seconds(entry[1]), budget):
            results = convert_each(lambda items: convert(items, advance), [item for _, item in chunk])
            for (target, item), result in zip(chunk, results, strict=True):
                bar.update()
                if isinstance(result, Exception):
                    report(result, files[target])
                    continue
                try:
                    save(target, item, result)
                except (OSError, ValueError) as error:
                    report(error, target)
                    continue
                converted += 1
                total += seconds(item)

    if converted:
        elapsed = time.perf_counter() - started
        first = next(iter(files))
        print(
            f"{done} {converted} of {counted(len(files), 'clip')}, {total:.2f} s of audio in {elapsed:.2f} s "
            f"({total / elapsed:.1f} s/s) -> {first if len(files) == 1 else args.output}"
        )
    return 0 if converted == len(files) else 1
