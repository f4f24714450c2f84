# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""What a model keeps of speech: `evaluate`."""

from __future__ import annotations

import argparse
import time

from ..evaluation import evaluate, read_sources, require_free
from ..metrics import METRICS, SpeakerVerifier, require_metrics, require_package
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
        metavar="SOURCE",
        help="a .lst file in the format of Seed-TTS-Eval's meta.lst, or whatever tokenize reads",
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
        type=positive_count,
        metavar="N",
        help="processes for the metrics (default: one per core, less one for a GPU)",
    )
    add_model_options(parser)
    add_batch_seconds(parser)
    parser.set_defaults(run=run_evaluate)


def run_evaluate(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    require_free(args.output)
    require_metrics(args.metrics)
    for package in ("matplotlib", "threadpoolctl"):
        require_package(package)
    clips = read_sources(
        args.sources, column=args.column, config=args.config, split=args.split, list_audio=args.list_audio
    )
    model = load_converter(args, None if args.num_quantizers is None else max(args.num_quantizers), decodes=True)
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
        report(reason if name in reason else f"{name}: {reason}")
    print(evaluation.to_markdown())
    paths = evaluation.save(args.output)
    print(
        f"evaluated {len(clips) - len(evaluation.failures)} of {counted(len(clips), 'clip')} in "
        f"{time.perf_counter() - started:.1f} s -> {', '.join(map(str, paths))}"
    )
    return 1 if evaluation.failures else 0
