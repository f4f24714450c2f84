# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""What commands share: arguments, the model they name, and how errors are said."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TypeAlias

import torch
from tqdm import tqdm

from ..audio import AUDIO_FORMATS
from ..checkpoints import RELEASED_MODEL, load_model
from ..inference import MAX_BATCH_SECONDS, encode_waveforms
from ..modeling_mimo_audio_tokenizer import ATTENTION_BACKENDS, MiMoAudioTokenizerModel
from ..optimization import optimize_for_inference
from ..quantization import QUANTIZATIONS


Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

OUTPUT_SUFFIXES = tuple(AUDIO_FORMATS)

OUT_OF_MEMORY = "out of memory; accepted: a smaller --batch-seconds, a shorter clip or --dtype bfloat16"


def report(error: Exception | str, culprit: Path | None = None) -> None:
    """One line on stderr, above a progress bar, which names the culprit if the error does not."""
    message = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    elif isinstance(error, torch.OutOfMemoryError):
        message = OUT_OF_MEMORY
    if culprit is not None and str(culprit) not in message:
        message = f"{culprit}: {message}"
    tqdm.write(f"mimo-audio: error: {' '.join(message.split())}", file=sys.stderr)


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# --- Arguments ---


def path_argument(text: str) -> Path:
    if text == "-":
        raise argparse.ArgumentTypeError("'-', standard input or output; accepted: names of files or folders")
    return Path(text)


def positive_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: 1 or more")
    return int(text)


def count_from_zero(text: str) -> int:
    return 0 if text == "0" else positive_count(text)


def positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number > 0:  # nan neither
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: a positive number")
    return number


def add_num_quantizers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-quantizers", type=positive_count, metavar="N", help="codebooks to use, from the first (default: all)"
    )


def add_batch_seconds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-seconds",
        type=positive_number,
        default=MAX_BATCH_SECONDS,
        metavar="S",
        help="seconds of audio to run at once, bounded by memory (default: %(default)g)",
    )


def add_model_options(parser: argparse.ArgumentParser, dtype: str = "the checkpoint's") -> None:
    parser.add_argument(
        "--model", default=RELEASED_MODEL, metavar="M", help="a Hub id, a directory or tiny (default: %(default)s)"
    )
    add_placement_options(parser, dtype)


def add_placement_options(parser: argparse.ArgumentParser, dtype: str = "the checkpoint's") -> None:
    parser.add_argument("--device", metavar="D", help="e.g. cuda:1 or cpu (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", *QUANTIZATIONS],
        help=f"of the weights; int8 on CPUs and fp8 on GPUs trade exactness for speed (default: {dtype})",
    )
    parser.add_argument(
        "--attn-implementation", choices=list(ATTENTION_BACKENDS), help="(default: the best for device and dtype)"
    )


# --- The model that they name ---


def load_placed_model(args: argparse.Namespace) -> MiMoAudioTokenizerModel:
    return load_model(
        args.model,
        device=args.device,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
    )


def load_converter(
    args: argparse.Namespace, num_quantizers: int | None = None, *, decodes: bool = False
) -> MiMoAudioTokenizerModel:
    """The model, if it does what is asked: said once here, not for every file."""
    model = load_placed_model(args)
    model.check_num_quantizers(num_quantizers)
    if decodes and model.decoder is None:
        name = model.config.name_or_path
        raise ValueError(f"{name} holds an encoder only: it cannot decode; accepted: a model with a decoder")
    if args.attn_implementation is not None:  # which may not run on this device or with this dtype
        encode_waveforms(model, [torch.zeros(1)], 1)
    return optimize_for_inference(model)
