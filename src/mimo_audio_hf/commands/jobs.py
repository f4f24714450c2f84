# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Whole datasets: `tokenize` and `detokenize`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from accelerate import PartialState

from ..jobs import JobOptions, Summary, detokenize_job, tokenize_job
from .options import (
    OUTPUT_SUFFIXES,
    Subparsers,
    add_batch_seconds,
    add_model_options,
    add_num_quantizers,
    count_from_zero,
    counted,
    positive_count,
    positive_number,
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
    add_num_quantizers(parser)
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


def _add_job_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="what to read")
    parser.add_argument("output", metavar="OUT", help="directory of the shards; one that was begun is completed")
    add_model_options(parser, dtype="bfloat16 on a GPU, else float32")
    add_batch_seconds(parser)
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
        type=count_from_zero,
        metavar="N",
        help="processes that read and decode, for each process of the job (default: its share of the cores less two; "
        "1 where the model runs on the CPU)",
    )
    parser.add_argument(
        "--shard-clips",
        type=positive_count,
        default=JobOptions.shard_clips,
        metavar="N",
        help="clips in a shard, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--shard-minutes",
        type=positive_number,
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
            f"{done} {summary.clips} of {counted(summary.missing, 'clip')}{before}: {hours:.3f} h of audio in "
            f"{summary.seconds:.1f} s ({speed:.1f} s/s) -> {args.output}{failed}"
        )
    return 1 if summary.failed else 0
