# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Training, alone or under `accelerate launch` and torchrun: `train`."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any

from ..training import Trainer, TrainingConfig
from ..training.config import read_yaml
from .options import Subparsers


def add_train(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a tokenizer, or fine-tune the decoder of one",
        description="Train as the technical report does, with options from a YAML file, flags, or both (flags win). "
        "Stage 2, the default, leaves the codes as they are. `accelerate launch -m mimo_audio_hf.cli train ...` runs "
        "it on many GPUs.",
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="options, as name: value")
    types = typing.get_type_hints(TrainingConfig)
    for option in dataclasses.fields(TrainingConfig):
        kind = str(types[option.name])
        default = "" if option.default in (None, "", dataclasses.MISSING) else f" (default: {option.default})"
        arguments: dict[str, Any] = {"help": option.metadata["help"] + default, "default": argparse.SUPPRESS}
        if "bool" in kind:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            arguments |= {"metavar": "V", "nargs": "*" if "list" in kind else None}
        parser.add_argument(f"--{option.name.replace('_', '-')}", **arguments)
    parser.set_defaults(run=run_train)


def run_train(args: argparse.Namespace) -> None:
    values = {} if args.config is None else read_yaml(args.config)
    names = {option.name for option in dataclasses.fields(TrainingConfig)}
    values |= {name: value for name, value in vars(args).items() if name in names}
    trainer = Trainer(TrainingConfig.from_values(values))
    first = trainer.step
    metrics = trainer.train()
    if trainer.accelerator.is_main_process:
        clips = trainer.train_clips
        print(
            f"stage {trainer.config.stage}, steps {first} to {trainer.step}, on {len(clips)} clips "
            f"({clips.seconds:.1f} s, {len(clips.skipped)} skipped) -> {trainer.newest_checkpoint}"
        )
        for name, value in metrics.items():
            if "/" not in name:
                print(f"{name} {value:.4f}")
    if trainer.accelerator.num_processes > 1:
        trainer.accelerator.state.destroy_process_group()
