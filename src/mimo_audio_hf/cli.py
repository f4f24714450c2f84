# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""The command `mimo-audio`.

Each command is a pair: `add_X(subparsers)`, listed in `COMMANDS`, declares its arguments; `run_X(args)` does the work
and returns the exit status, or None for success. A ValueError or OSError becomes one line on stderr and status 1.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn, TypeAlias, TypeVar

import huggingface_hub.utils
import torch
import transformers
from accelerate import PartialState
from tqdm import tqdm

from . import codes as code_files
from .audio import AUDIO_FORMATS, AUDIO_SUFFIXES, load_audio, save_audio
from .checkpoints import PRESETS, RELEASED_MODEL, init_checkpoint, load_model
from .codes import AudioCodes
from .evaluation import METRICS, evaluate, read_sources, require_free, require_metrics
from .hub import add_hub_command
from .inference import (
    MAX_BATCH_SECONDS,
    convert_each,
    decode_codes,
    encode_waveforms,
    group_by_seconds,
)
from .jobs import JobOptions, Summary, detokenize_job, tokenize_job
from .metrics import SpeakerVerifier, codebook_use, require_package
from .modeling_mimo_audio_tokenizer import ATTENTION_BACKENDS, MiMoAudioTokenizerModel
from .version import __version__


logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

OUTPUT_SUFFIXES = tuple(AUDIO_FORMATS)

# Files are loaded this many batches at a time: enough to sort by length, little enough to hold in memory.
_BATCHES_LOADED = 4

_OUT_OF_MEMORY = "out of memory; accepted: a smaller --batch-seconds, a shorter clip or --dtype bfloat16"


def add_encode(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "encode",
        help="audio files to code files",
        description="Encode audio files to code files (codes, sampling rate, sample count and model name in one "
        "safetensors file each). Existing code files are overwritten, other files never.",
    )
    _add_files(parser, "audio files", "NAME.safetensors for each NAME.wav", "also a name ending in .safetensors")
    _add_num_quantizers(parser)
    _add_model_options(parser)
    _add_batch_seconds(parser)
    parser.set_defaults(run=run_encode)


def run_encode(args: argparse.Namespace) -> int:
    files = _plan_outputs(args.inputs, args.output, AUDIO_SUFFIXES, (code_files.SUFFIX,), code_files.SUFFIX)
    for target in files:
        code_files.require_writable(target)
    model = _load_converter(args, args.num_quantizers)

    def save(target: Path, waveform: torch.Tensor, codes: torch.Tensor) -> None:
        AudioCodes.of_model(model.config, codes, num_samples=len(waveform)).save(target)

    return _convert_files(
        "encoded",
        files,
        args,
        load=lambda path: load_audio(path, model.config.sampling_rate),
        seconds=lambda waveform: len(waveform) / model.config.sampling_rate,
        convert=lambda waveforms: encode_waveforms(
            model, waveforms, args.num_quantizers, max_batch_seconds=args.batch_seconds
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
    _add_model_options(parser)
    _add_batch_seconds(parser)
    parser.set_defaults(run=run_decode)


def run_decode(args: argparse.Namespace) -> int:
    suffixes = OUTPUT_SUFFIXES if args.format is None else (f".{args.format}",)
    files = _plan_outputs(args.inputs, args.output, (code_files.SUFFIX,), suffixes, suffixes[0])
    model = _load_converter(args, decodes=True)
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
        convert=lambda clips: decode_codes(
            model, [clip.codes for clip in clips], max_batch_seconds=args.batch_seconds
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
    parser.add_argument("input", type=_path, metavar="IN", help="audio file")
    parser.add_argument(
        "output", type=_path, metavar="OUT", help=f"audio file to write: a name ending in {', '.join(OUTPUT_SUFFIXES)}"
    )
    _add_num_quantizers(parser)
    _add_model_options(parser)
    parser.set_defaults(run=run_roundtrip, batch_seconds=MAX_BATCH_SECONDS)


def run_roundtrip(args: argparse.Namespace) -> int:
    if args.output.suffix.lower() not in OUTPUT_SUFFIXES:
        raise ValueError(f"{args.output}: accepted: a file name ending in {', '.join(OUTPUT_SUFFIXES)}")
    if args.output.exists() and args.input.exists() and args.output.samefile(args.input):
        raise ValueError(f"{args.output} is the input itself; accepted: another file")
    model = _load_converter(args, args.num_quantizers, decodes=True)
    sampling_rate = model.config.sampling_rate
    return _convert_files(
        "encoded and decoded",
        {args.output: args.input},
        args,
        load=lambda path: load_audio(path, sampling_rate),
        seconds=lambda waveform: len(waveform) / sampling_rate,
        convert=lambda waveforms: decode_codes(model, encode_waveforms(model, waveforms, args.num_quantizers)),
        save=lambda target, waveform, decoded: save_audio(target, decoded[: len(waveform)], sampling_rate),
    )


def add_info(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "info",
        help="what a model or a code file is",
        description="Sizes, rates and bitrates of a model, or of a code file, with its use of the codebooks.",
    )
    parser.add_argument("subject", metavar="MODEL_OR_CODES", help="a Hub id, a directory, tiny or a code file")
    _add_placement_options(parser)
    parser.set_defaults(run=run_info)


def run_info(args: argparse.Namespace) -> None:
    if Path(args.subject).is_file():
        _print_codes_info(args.subject, AudioCodes.load(args.subject))
    else:
        args.model = args.subject
        _print_model_info(_load_model(args))


def add_init(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "init",
        help="a fresh checkpoint",
        description="Write a randomly initialized checkpoint. A directory that holds one already is refused.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory to write; made if it does not exist")
    parser.add_argument("--preset", choices=list(PRESETS), required=True, help="size of the model")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: %(default)s)")
    parser.set_defaults(run=run_init)


def run_init(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    model = init_checkpoint(args.directory, args.preset, args.seed)
    print(
        f"initialized {_size(model)} ({args.preset}, seed {args.seed}) in {time.perf_counter() - started:.1f} s "
        f"-> {args.directory}"
    )


def add_tokenize(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "tokenize",
        help="a dataset's audio to Parquet shards of codes",
        description="Tokenize all clips of a source: a folder of audio, .parquet or .tar (WebDataset) files, a "
        "dataset directory, a JSON-lines list, or a Hub id. The shards load with load_dataset(OUT). The same command "
        "again does what is missing. Under torchrun or accelerate launch the processes share the work.",
    )
    _add_job_options(parser)
    _add_num_quantizers(parser)
    parser.set_defaults(run=run_tokenize)


def run_tokenize(args: argparse.Namespace) -> int:
    return _report_job("tokenized", args, tokenize_job(args.source, args.output, _job_options(args)))


def add_detokenize(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "detokenize",
        help="a dataset's codes to Parquet shards of audio",
        description="Decode all clips of a source: a directory that tokenize wrote, other .parquet files, a dataset "
        "directory, a JSON-lines list with codes, or a Hub id. Otherwise like tokenize.",
    )
    _add_job_options(parser)
    parser.add_argument(
        "--format",
        choices=[suffix[1:] for suffix in OUTPUT_SUFFIXES],
        default="flac",
        help="of the audio in the shards (default: %(default)s)",
    )
    parser.set_defaults(run=run_detokenize, num_quantizers=None)


def run_detokenize(args: argparse.Namespace) -> int:
    summary = detokenize_job(args.source, args.output, _job_options(args), args.format)
    return _report_job("decoded", args, summary)


def add_evaluate(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="what a model keeps of speech: PESQ, STOI, speaker similarity, codebook use",
        description="Encode and decode clips and compare what comes back with what went in, at any numbers of "
        "codebooks. Writes evaluation.json (every clip's scores), evaluation.md (tables) and evaluation.png (a "
        "rate-quality plot). Needs the packages of mimo-audio-hf[eval].",
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a .lst file in the format of Seed-TTS-Eval's meta.lst, or whatever tokenize reads",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=_path,
        required=True,
        metavar="OUT",
        help="folder to write to; made if it does not exist",
    )
    parser.add_argument(
        "--num-quantizers",
        type=_positive_count,
        nargs="+",
        metavar="N",
        help="numbers of codebooks to evaluate, each from the first (default: all)",
    )
    parser.add_argument(
        "--metrics", nargs="+", choices=list(METRICS), default=list(METRICS), help="what to compute (default: all)"
    )
    parser.add_argument(
        "--speaker-model",
        metavar="M",
        help="for the speaker similarity: a Hub id or a directory of an x-vector model of transformers, such as "
        "microsoft/wavlm-base-plus-sv (default: not computed)",
    )
    parser.add_argument("--column", metavar="C", help="column of the audio (default: found by its name)")
    parser.add_argument("--config", metavar="C", help="configuration of a dataset on the Hub")
    parser.add_argument("--split", metavar="S", help="split of a dataset (default: all of one on disk)")
    parser.add_argument(
        "--list-audio",
        choices=["prompt", "target"],
        default="prompt",
        help="which audio of a list: the prompts, each once, or the recordings of the texts (default: %(default)s)",
    )
    parser.add_argument(
        "--num-workers",
        type=_positive_count,
        metavar="N",
        help="processes for the metrics (default: one per core, less one for a GPU)",
    )
    _add_model_options(parser)
    _add_batch_seconds(parser)
    parser.set_defaults(run=run_evaluate)


def run_evaluate(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    require_free(args.output)
    try:
        require_metrics(args.metrics)
        require_package("matplotlib")
    except ModuleNotFoundError as error:
        raise ValueError(error) from error
    clips = read_sources(
        args.sources, column=args.column, config=args.config, split=args.split, list_audio=args.list_audio
    )
    model = _load_converter(args, None if args.num_quantizers is None else max(args.num_quantizers), decodes=True)
    verifier = None if args.speaker_model is None else SpeakerVerifier(args.speaker_model, model.device)
    evaluation = evaluate(
        model,
        clips,
        args.num_quantizers,
        metrics=args.metrics,
        speaker_verifier=verifier,
        num_workers=args.num_workers,
        max_batch_seconds=args.batch_seconds,
        progress=None,
    )
    for name, reason in evaluation.failures.items():
        _report(reason if name in reason else f"{name}: {reason}")
    print(evaluation.to_markdown())
    paths = evaluation.save(args.output)
    print(
        f"evaluated {len(clips) - len(evaluation.failures)} of {_count(len(clips), 'clip')} in "
        f"{time.perf_counter() - started:.1f} s -> {', '.join(map(str, paths))}"
    )
    return 1 if evaluation.failures else 0


COMMANDS: tuple[Callable[[Subparsers], object], ...] = (
    add_encode,
    add_decode,
    add_roundtrip,
    add_tokenize,
    add_detokenize,
    add_info,
    add_init,
    add_evaluate,
    add_hub_command,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, by default this process's.

    Returns:
        The exit status: 0, or 1 if anything failed. Bad usage exits with 2, as argparse does.
    """
    parser: argparse.ArgumentParser = _Parser(
        prog="mimo-audio", description="MiMo-Audio tokenizer: audio to codes and back."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_command in COMMANDS:
        add_command(subparsers)
    args = parser.parse_args(argv)

    logging.basicConfig(format="mimo-audio: %(message)s")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # disables the Hub's as well
    huggingface_hub.utils.enable_progress_bars()
    try:
        return args.run(args) or 0
    except (ValueError, OSError) as error:
        _report(error)
    except torch.OutOfMemoryError:
        _report(_OUT_OF_MEMORY)
    return 1


class _Parser(argparse.ArgumentParser):
    """Reports bad usage in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _report(error: Exception | str, culprit: Path | None = None) -> None:
    """One line on stderr, above a progress bar, which names the culprit if the error does not."""
    message = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    elif isinstance(error, torch.OutOfMemoryError):
        message = _OUT_OF_MEMORY
    if culprit is not None and str(culprit) not in message:
        message = f"{culprit}: {message}"
    tqdm.write(f"mimo-audio: error: {' '.join(message.split())}", file=sys.stderr)


# --- Arguments that commands share ---


def _path(text: str) -> Path:
    if text == "-":
        raise argparse.ArgumentTypeError("'-', standard input or output; accepted: names of files or folders")
    return Path(text)


def _positive_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: 1 or more")
    return int(text)


def _count_from_zero(text: str) -> int:
    return 0 if text == "0" else _positive_count(text)


def _positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number > 0:  # nan neither
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: a positive number")
    return number


def _add_files(parser: argparse.ArgumentParser, inputs: str, folder_gets: str, one_file: str) -> None:
    parser.add_argument(
        "inputs", nargs="+", type=_path, metavar="IN", help=f"{inputs}, or folders to be searched for them"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=_path,
        required=True,
        metavar="OUT",
        help=f"a folder, which gets {folder_gets} and the inputs' subfolders; for one input file {one_file}",
    )


def _add_job_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="what to read")
    parser.add_argument("output", metavar="OUT", help="directory of the shards; one that was begun is completed")
    _add_model_options(parser, dtype="bfloat16 on a GPU, else float32")
    _add_batch_seconds(parser)
    parser.add_argument("--column", metavar="C", help="column of the audio or the codes (default: found by its name)")
    parser.add_argument(
        "--key-column",
        metavar="C",
        help="column that names the clips (default: key if there is one, else their place)",
    )
    parser.add_argument("--config", metavar="C", help="configuration of a dataset on the Hub")
    parser.add_argument("--split", metavar="S", help="split of a dataset")
    parser.add_argument(
        "--num-workers",
        type=_count_from_zero,
        metavar="N",
        help="processes that read and decode, for each process of the job (default: its share of the cores less two; "
        "1 where the model runs on the CPU)",
    )
    parser.add_argument(
        "--shard-clips",
        type=_positive_count,
        default=JobOptions.shard_clips,
        metavar="N",
        help="clips in a shard, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--shard-minutes",
        type=_positive_number,
        default=JobOptions.shard_minutes,
        metavar="M",
        help="write a shard after so many minutes, full or not (default: %(default)g)",
    )


def _job_options(args: argparse.Namespace) -> JobOptions:
    return JobOptions(**{option.name: getattr(args, option.name) for option in fields(JobOptions)})


def _report_job(done: str, args: argparse.Namespace, summary: Summary) -> int:
    if PartialState().is_main_process:
        before = f", {summary.finished} were there already" if summary.finished else ""
        failed = f"; {summary.failed} failed: see {Path(args.output, 'errors.jsonl')}" if summary.failed else ""
        hours = summary.audio_seconds / 3600
        speed = summary.audio_seconds / summary.seconds
        print(
            f"{done} {summary.clips} of {_count(summary.missing, 'clip')}{before}: {hours:.3f} h of audio in "
            f"{summary.seconds:.1f} s ({speed:.1f} s/s) -> {args.output}{failed}"
        )
    return 1 if summary.failed else 0


def _add_num_quantizers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-quantizers", type=_positive_count, metavar="N", help="codebooks to use, from the first (default: all)"
    )


def _add_batch_seconds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-seconds",
        type=_positive_number,
        default=MAX_BATCH_SECONDS,
        metavar="S",
        help="seconds of audio to run at once, bounded by memory (default: %(default)g)",
    )


def _add_model_options(parser: argparse.ArgumentParser, dtype: str = "the checkpoint's") -> None:
    parser.add_argument(
        "--model", default=RELEASED_MODEL, metavar="M", help="a Hub id, a directory or tiny (default: %(default)s)"
    )
    _add_placement_options(parser, dtype)


def _add_placement_options(parser: argparse.ArgumentParser, dtype: str = "the checkpoint's") -> None:
    parser.add_argument("--device", metavar="D", help="e.g. cuda:1 or cpu (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help=f"of the weights (default: {dtype})"
    )
    parser.add_argument(
        "--attn-implementation", choices=list(ATTENTION_BACKENDS), help="(default: the best for device and dtype)"
    )


def _load_model(args: argparse.Namespace) -> MiMoAudioTokenizerModel:
    return load_model(
        args.model,
        device=args.device,
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
        attn_implementation=args.attn_implementation,
    )


def _load_converter(
    args: argparse.Namespace, num_quantizers: int | None = None, *, decodes: bool = False
) -> MiMoAudioTokenizerModel:
    """The model, if it does what is asked: said once here, not for every file."""
    model = _load_model(args)
    model.check_num_quantizers(num_quantizers)
    if decodes and model.decoder is None:
        name = model.config.name_or_path
        raise ValueError(f"{name} holds an encoder only: it cannot decode; accepted: a model with a decoder")
    if args.attn_implementation is not None:  # which may not run on this device or with this dtype
        encode_waveforms(model, [torch.zeros(1)], 1)
    return model


# --- Many files ---


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
    convert: Callable[[list[Item]], list[Result]],
    save: Callable[[Path, Item, Result], None],
) -> int:
    """Load, convert and save files, a few batches of them in memory at a time, and say what was done.

    A file that cannot be loaded, converted or saved is reported and left out.

    Args:
        done: what happens to the files, for people.
        files: output to input.
        load, seconds, convert, save: of one input, its duration, of many of them, and of one output.

    Returns:
        The exit status: 1 if a file was left out.
    """
    started = time.perf_counter()
    converted, total = 0, 0.0

    with tqdm(desc=done, total=len(files), unit="file", disable=None) as bar:

        def load_all() -> Iterator[tuple[Path, Item]]:
            for target, source in files.items():
                try:
                    item = load(source)
                except (OSError, ValueError) as error:
                    _report(error)
                    bar.update()
                else:
                    yield target, item

        budget = _BATCHES_LOADED * args.batch_seconds
        for chunk in group_by_seconds(load_all(), lambda entry: seconds(entry[1]), budget):
            results = convert_each(convert, [item for _, item in chunk])
            for (target, item), result in zip(chunk, results, strict=True):
                bar.update()
                if isinstance(result, Exception):
                    _report(result, files[target])
                    continue
                try:
                    save(target, item, result)
                except (OSError, ValueError) as error:
                    _report(error, target)
                    continue
                converted += 1
                total += seconds(item)
            bar.set_postfix_str(f"{total:.1f} s of audio")

    if converted:
        elapsed = time.perf_counter() - started
        first = next(iter(files))
        print(
            f"{done} {converted} of {_count(len(files), 'clip')}, {total:.2f} s of audio in {elapsed:.2f} s "
            f"({total / elapsed:.1f} s/s) -> {first if len(files) == 1 else args.output}"
        )
    return 0 if converted == len(files) else 1


# --- What info prints ---


def _print_model_info(model: MiMoAudioTokenizerModel) -> None:
    config = model.config
    sizes = config.codebook_sizes
    heads, decoder_heads = config.encoder_attention_heads, config.decoder_attention_heads
    decoder = f"{config.decoder_layers} layers, {decoder_heads} heads of {config.d_model // decoder_heads}"
    vocoder = f"{config.vocoder_num_layers} layers of width {config.vocoder_dim}"
    _print_table(
        [
            ("model", config.name_or_path or ""),
            ("size", _size(model)),
            ("encoder", f"{config.encoder_layers} layers, {heads} heads of {config.d_model // heads}"),
            ("decoder", "none: encodes only" if model.decoder is None else f"{decoder}; vocoder of {vocoder}"),
            ("audio", f"{config.sampling_rate} Hz, mono"),
            ("codes", f"{config.frame_rate:g} frames/s, {config.samples_per_frame} samples each"),
            ("codebooks", f"{len(sizes)}: {', '.join(_runs(sizes))} entries"),
            *(
                ("bitrate", f"{config.bitrate(count):.0f} bit/s with {_count(count, 'codebook')}")
                for count in sorted({1, min(8, len(sizes)), len(sizes)})
            ),
            ("dtype", str(model.dtype).removeprefix("torch.")),
            ("device", str(model.device)),
            ("attention", model.attn_implementation),
        ]
    )


def _print_codes_info(path: str, codes: AudioCodes) -> None:
    frames, codebooks = codes.codes.shape
    _print_table(
        [
            ("codes", path),
            ("model", codes.model),
            ("audio", f"{codes.seconds:.3f} s ({codes.num_samples} samples at {codes.sampling_rate} Hz)"),
            ("frames", f"{frames} at {codes.sampling_rate / codes.samples_per_frame:g} frames/s"),
            ("codebooks", str(codebooks)),
            ("bitrate", f"{codes.bitrate:.0f} bit/s"),
        ]
    )
    print("\ncodebook  entries  used  perplexity")
    for book, use in enumerate(codebook_use([codes.codes], codes.codebook_sizes)):
        print(f"{book:8}  {use.entries:7}  {use.used:4}  {use.perplexity:10.1f}")


def _print_table(rows: Iterable[tuple[str, str]]) -> None:
    for name, value in rows:
        print(f"{name:<10} {value}")


def _size(model: MiMoAudioTokenizerModel) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tensors = [*model.parameters(), *model.buffers()]
    megabytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6
    return f"{parameters / 1e6:.1f} M parameters, {megabytes:.1f} MB with the codebooks"


def _runs(sizes: Iterable[int]) -> Iterator[str]:
    """Equal neighbours together: 128, 128 is "2 x 128"."""
    for size, run in itertools.groupby(sizes):
        yield f"{len(list(run))} x {size}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(main())
