# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Hub repositories: `hub`."""

from __future__ import annotations

import argparse

from ..hub import assemble_hub_repository, push_to_hub
from .options import Subparsers


def add_hub(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "hub",
        help="make a checkpoint into a Hub repository that loads without this package",
        description="Writes weights, model code, configuration and a model card to a directory that transformers "
        "loads with trust_remote_code=True, and publishes it if it is told to.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="directory with config.json and safetensors weights")
    parser.add_argument("output_dir", metavar="OUT", help="directory to write, new or empty")
    parser.add_argument(
        "--released",
        action="store_true",
        help="these are the weights that Xiaomi released: write their model card, with the published figures",
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="also upload it to this repository of the Hub")
    parser.add_argument("--private", action="store_true", default=None, help="which is private, if it is new")
    parser.add_argument("--revision", metavar="BRANCH", help="and to this branch of it, made if it does not exist")
    parser.set_defaults(run=run_hub)


def run_hub(args: argparse.Namespace) -> None:
    repository = assemble_hub_repository(args.checkpoint, args.output_dir, released=args.released)
    print(f"{repository}: {', '.join(sorted(path.name for path in repository.iterdir()))}")
    if args.push is not None:
        address = push_to_hub(
            args.checkpoint, args.push, private=args.private, revision=args.revision, released=args.released
        )
        print(address)
