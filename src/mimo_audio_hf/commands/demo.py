# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""A page in the browser to try a model on: `demo`."""

from __future__ import annotations

import argparse
import socket

from .options import Subparsers, add_model_options, load_converter, path_argument, positive_number


def add_demo(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="a page in the browser: record or upload, see and hear what the tokenizer keeps",
        description="Serve a page on this machine: record or upload audio, see waveform, mel spectrogram and codes, "
        "and listen to what comes back from any number of codebooks. Needs the packages of mimo-audio-hf[demo].",
    )
    parser.add_argument("examples", nargs="*", type=path_argument, metavar="AUDIO", help="audio files to offer there")
    add_model_options(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0 lets other machines in (default: %(default)s)",
    )
    parser.add_argument("--port", type=_port, metavar="P", help="port (default: from 7860 the first free one)")
    parser.add_argument(
        "--max-seconds",
        type=positive_number,
        default=60.0,
        metavar="S",
        help="longer audio is refused (default: %(default)g)",
    )
    parser.set_defaults(run=run_demo)


def run_demo(args: argparse.Namespace) -> None:
    from ..demo import Demo, serve  # which imports gradio

    _require_free(args.host, args.port)
    demo = Demo(load_converter(args, decodes=True), args.max_seconds)
    serve(demo, args.examples, server_name=args.host, server_port=args.port)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: 1 to 65535")
    return int(text)


def _require_free(host: str, port: int | None) -> None:
    """That a server may listen there: gradio says of any host and port that it finds none that is free.

    Raises:
        ValueError: it may not.
    """
    host = host.removeprefix("[").removesuffix("]")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port or 0), family=family).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: of names that no host has
        asked = f"--host {host}" + ("" if port is None else f" --port {port}")
        raise ValueError(f"{asked}: {error}; accepted: an address of this machine and a port that is free") from error
