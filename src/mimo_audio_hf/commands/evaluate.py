# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""What a model keeps of speech: `evaluate`."""

from __future__ import annotations

import argparse
import time

from ..evaluation import METRICS, evaluate, read_sources, require_free, require_metrics
from ..metrics import SpeakerVerifier, require_package
from .options import (
    Subparsers,
    add_batch_seconds,
    add_model_options,
    counted,
    load_converter,
    path_argument,
    positive_count,
    report,
)


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
        type=path_argument,
        metavar="SOURCE",
        help="a folder of audio files, a dataset (a directory that datasets saved, or of Parquet files), or a list in "
        "the format of Seed-TTS-Eval's meta.lst",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=path_argument,
        required=True,
        metavar="OUT",
        help="folder to write to; made if it does not exist",
    )
    parser.add_argument(
        "--num-quantizers",
        type=positive_count,
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
    parser.add_argument("--audio-column", default="audio", metavar="C", help="of datasets (default: %(default)s)")
    parser.add_argument(
        "--list-audio",
        choices=["prompt", "target"],
        default="prompt",
        help="which audio of a list: the prompts, each once, or the recordings of the texts (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=positive_count, metavar="N", help="processes for the metrics (default: one per processor)"
    )
    add_model_options(parser)
    add_batch_seconds(parser)
    parser.set_defaults(run=run_evaluate)


def run_evaluate(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    require_free(args.output)
    try:
        require_metrics(args.metrics)
        require_package("matplotlib")
    except ModuleNotFoundError as error:
        raise ValueError(error) from error
    clips, problems = read_sources(args.sources, audio_column=args.audio_column, list_audio=args.list_audio)
    model = load_converter(args, None if args.num_quantizers is None else max(args.num_quantizers), decodes=True)
    verifier = None if args.speaker_model is None else SpeakerVerifier(args.speaker_model, model.device)
    evaluation = evaluate(
        model,
        clips,
        args.num_quantizers,
        metrics=args.metrics,
        speaker_verifier=verifier,
        workers=args.workers,
        max_batch_seconds=args.batch_seconds,
        progress=None,
    )
    failures = problems | evaluation.failures
    for name, reason in failures.items():
        report(reason if name in reason else f"{name}: {reason}")
    paths = evaluation.save(args.output)
    print(evaluation.to_markdown())
    done = len(clips) - len(evaluation.failures)
    print(
        f"evaluated {done} of {counted(len(clips) + len(problems), 'clip')} in {time.perf_counter() - started:.1f} s "
        f"-> {', '.join(map(str, paths))}"
    )
    return 1 if failures else 0
