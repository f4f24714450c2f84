# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""What a model or a code file is, and fresh models: `info` and `init`."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..checkpoints import PRESETS, init_checkpoint
from ..codes import AudioCodes
from ..metrics import codebook_use
from ..modeling_mimo_audio_tokenizer import MiMoAudioTokenizerModel
from ..quantization import quantization_of
from .options import Subparsers, add_placement_options, counted, load_placed_model


def add_info(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "info",
        help="what a model or a code file is",
        description="Sizes, rates and bitrates of a model, or of a code file, with its use of the codebooks.",
    )
    parser.add_argument("subject", metavar="MODEL_OR_CODES", help="a Hub id, a directory, tiny or a code file")
    add_placement_options(parser)
    parser.set_defaults(run=run_info)


def run_info(args: argparse.Namespace) -> None:
    if Path(args.subject).is_file():
        _print_codes_info(args.subject, AudioCodes.load(args.subject))
    else:
        args.model = args.subject
        _print_model_info(load_placed_model(args))


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
                ("bitrate", f"{config.bitrate(count):.0f} bit/s with {counted(count, 'codebook')}")
                for count in sorted({1, min(8, len(sizes)), len(sizes)})
            ),
            ("dtype", quantization_of(model) or str(model.dtype).removeprefix("torch.")),
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
