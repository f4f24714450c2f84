# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Hub repositories: `hub`."""

from __future__ import annotations

import argparse

from ..hub import assemble_hub_repository, is_assembled, push_to_hub, require_repo_id
from .options import Subparsers


def add_hub(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "hub",
        help="make a checkpoint into a Hub repository that loads without this package",
        description="Writes weights, model code, configuration and a model card to a directory that transformers "
        "loads with trust_remote_code=True, and publishes it if it is told to.",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="directory with config.json and safetensors weights, or tiny"
    )
    parser.add_argument(
        "output_dir",
        metavar="OUT",
        help="directory to write: new, empty, or what this made of CHECKPOINT before, which is left as it is",
    )
    parser.add_argument(
        "--released",
        action="store_true",
        help="these are the weights that Xiaomi released: write their model card, with the published figures",
    )
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload OUT to this repository of the Hub, made if it does not exist"
    )
    parser.add_argument(
        "--private",
        action="store_true",
        default=None,
        help="with --push: make the repository a private one; one that exists stays what it is",
    )
    parser.add_argument(
        "--revision", metavar="BRANCH", help="with --push: upload to this branch, made if it does not exist"
    )
    parser.set_defaults(run=run_hub)


def run_hub(args: argparse.Namespace) -> None:
    if args.push is not None:
        require_repo_id(args.push)
    for name in ("private", "revision"):
        if args.push is None and getattr(args, name) is not None:
            raise ValueError(f"--{name} without --push; accepted: --push OWNER/NAME with it")
    was_there = is_assembled(args.output_dir)
    repository = assemble_hub_repository(args.checkpoint, args.output_dir, released=args.released)
    contents = ", ".join(sorted(path.name for path in repository.iterdir()))
    print(f"{repository}: {contents}{' (left as it was)' if was_there else ''}")
    if args.push is not None:
        print(push_to_hub(repository, args.push, private=args.private, revision=args.revision))
