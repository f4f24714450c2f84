# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""The command `mimo-audio`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import huggingface_hub.utils
import torch
import transformers

from .commands.demo import add_demo
from .commands.evaluate import add_evaluate
from .commands.files import add_decode, add_encode, add_roundtrip
from .commands.hub import add_hub
from .commands.jobs import add_detokenize, add_tokenize
from .commands.models import add_info, add_init
from .commands.options import OUT_OF_MEMORY, Subparsers, report
from .commands.stream import add_stream
from .commands.train import add_train
from .version import __version__


COMMANDS: tuple[Callable[[Subparsers], object], ...] = (
    add_encode,
    add_decode,
    add_roundtrip,
    add_stream,
    add_tokenize,
    add_detokenize,
    add_info,
    add_init,
    add_evaluate,
    add_hub,
    add_train,
    add_demo,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, by default this process's.

    Returns:
        The exit status: 0, 1 if anything failed, or 130 if it was interrupted. Bad usage exits with 2, as argparse
        does.
    """
    args = make_parser().parse_args(argv)

    logging.basicConfig(format="mimo-audio: %(message)s")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # disables the Hub's as well
    huggingface_hub.utils.enable_progress_bars()
    try:
        return args.run(args) or 0
    except (ValueError, OSError, ModuleNotFoundError) as error:
        report(error)
    except torch.OutOfMemoryError:
        report(OUT_OF_MEMORY)
    except KeyboardInterrupt:
        report("interrupted")
        return 130  # as a shell counts it
    return 1


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands. What it parses has the function to call as `run`."""
    parser: argparse.ArgumentParser = _Parser(
        prog="mimo-audio", description="MiMo-Audio tokenizer: audio to codes and back."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_command in COMMANDS:
        add_command(subparsers)
    return parser


class _Parser(argparse.ArgumentParser):
    """Reports bad usage in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


if __name__ == "__main__":
    sys.exit(main())
