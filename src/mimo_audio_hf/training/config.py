# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""What a training run is told, from a YAML file or flags."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..checkpoints import RELEASED_MODEL


# Values in messages: a few lines of YAML can stand for gigabytes.
_SHORTENED = reprlib.Repr()
_SHORTENED.maxstring = _SHORTENED.maxother = 200
_SHORTENED.maxlevel = 2

RECONSTRUCTION = "reconstruction_loss"

# Of transformers' schedules, those that need nothing but the steps.
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)


def _option(default: Any, help_text: str) -> Any:
    """A field of the configuration, whose help the command shows."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help_text})
    return field(default=default, metadata={"help": help_text})


@dataclass
class TrainingConfig:
    """What a run does. Names are those of transformers' `TrainingArguments` where it has the thing."""

    output_dir: str = _option("", "directory of the run")
    train_data: str | None = _option(
        None, "save_to_disk directory, folder of audio files, .jsonl/.csv/.parquet file, or Hub dataset"
    )
    validation_data: str | None = _option(None, "likewise, to validate on")
    train_split: str = _option("train", "split of the training data")
    validation_split: str = _option("validation", "split of the validation data")
    audio_column: str = _option("audio", "column of the audio")
    text_column: str = _option("text", "column of the text, which the audio-to-text loss needs")
    codes_column: str | None = _option(
        None, "stage 2: column of the clips' codes, as tokenize_audio makes them, so that the encoder need not run"
    )
    key_column: str | None = _option(None, "column of the clips' names (default: their files' names)")

    model: str = _option(RELEASED_MODEL, "checkpoint to start from; `mimo-audio init` makes a fresh one")
    stage: int = _option(2, "1: everything is trained; 2: decoder and vocoder only, the codes stay what they are")
    text_model: str | None = _option(None, "pretrained causal language model of the audio-to-text loss")
    text_model_config: dict[str, Any] | None = _option(None, "configuration of a fresh one instead, as JSON")
    text_tokenizer: str | None = _option(None, "its tokenizer (default: the pretrained model's, or bytes)")
    discriminator_width: float = _option(1.0, "of the report's number of channels")
    attn_implementation: str | None = _option(None, "attention backend (default: the best)")

    batch_seconds: float = _option(60.0, "seconds of audio in a batch, on each process")
    crop_seconds: float = _option(6.0, "longer clips are cropped")
    min_seconds: float = _option(0.5, "shorter clips are skipped")
    gain_db: float = _option(0.0, "clips are made louder or softer by up to so many dB, at random")
    equalizer_db: float = _option(0.0, "octaves of clips are made louder or softer by up to so many dB, at random")
    discriminator_seconds: float = _option(0.5, "length of the segments that the discriminators look at")
    dataloader_num_workers: int = _option(2, "processes that read, for each process")

    audio_to_text_weight: float = _option(10.0, "stage 1: of the audio-to-text loss; 0 leaves it out")
    commitment_weight: float = _option(1.0, "stage 1: of the commitment loss")
    reconstruction_weight: float = _option(1.0, "of the multi-scale mel loss")
    adversarial_weight: float = _option(1.0, "stage 2: of the adversarial loss")
    feature_matching_weight: float = _option(2.0, "stage 2: of the feature-matching loss")
    mel_scales: list[int] = _option(
        [5, 6, 7], "of the mel loss: 2**scale bins, a window of 15 * 2**(scale - 1) samples"
    )
    log_mel_loss: bool = _option(False, "compare log-mels, not mels as the report does")
    log_mel_floor: float = _option(1e-5, "least magnitude that the logarithm is taken of")
    quantizer_dropout: float = _option(0.0, "share of the steps that use a random number of codebooks")

    max_steps: int = _option(100_000, "steps of the optimizers")
    learning_rate: float = _option(1e-4, "of the tokenizer (and the language model)")
    discriminator_learning_rate: float = _option(1e-4, "of the discriminators")
    lr_scheduler_type: str = _option("cosine", f"transformers' schedule of both: {', '.join(SCHEDULES)}")
    warmup_steps: int = _option(1000, "steps until the learning rates are reached")
    adam_beta1: float = _option(0.8, "of AdamW")
    adam_beta2: float = _option(0.99, "of AdamW")
    weight_decay: float = _option(0.01, "of the tokenizer's matrices; the discriminators have none")
    max_grad_norm: float = _option(1.0, "to which gradients are clipped, tokenizer and discriminators each")
    gradient_accumulation_steps: int = _option(1, "batches in a step")
    mixed_precision: str | None = _option(None, "no or bf16 (default: accelerate's configuration)")
    torch_compile: bool = _option(False, "compile the transformer layers")
    seed: int = _option(0, "of everything that is random")

    logging_steps: int = _option(10, "steps between two looks at the losses")
    eval_steps: int = _option(1000, "steps between two validations")
    save_steps: int = _option(1000, "steps between two checkpoints")
    save_total_limit: int = _option(2, "checkpoints that are kept, the newest; the best one is kept besides")
    metrics: list[str] = _option([], "more metrics of a validation: mel_distance, stoi, pesq_nb, pesq_wb")
    metric_for_best_model: str = _option(RECONSTRUCTION, "which one says what the best checkpoint is")
    validation_clips: int = _option(64, "clips to validate on, at most; of long ones, batch_seconds")
    validation_samples: int = _option(4, "clips of which a validation writes audio and pictures")
    report_to: list[str] = _option([], "accelerate's trackers, such as tensorboard")
    resume: bool = _option(False, "go on from the newest checkpoint of output_dir")

    def __post_init__(self) -> None:
        def require(good: bool, name: str, accepted: str) -> None:
            if not good:
                raise ValueError(f"{name}={_SHORTENED.repr(getattr(self, name))}; accepted: {accepted}")

        require(bool(self.output_dir), "output_dir", "a directory to write")
        require(self.stage in (1, 2), "stage", "1 or 2")
        require(self.lr_scheduler_type in SCHEDULES, "lr_scheduler_type", ", ".join(SCHEDULES))
        require(self.mixed_precision in (None, "no", "bf16"), "mixed_precision", "no or bf16")
        for name in (
            "batch_seconds",
            "crop_seconds",
            "min_seconds",
            "discriminator_seconds",
            "learning_rate",
            "discriminator_learning_rate",
            "max_grad_norm",
            "log_mel_floor",
            "discriminator_width",
        ):
            require(0 < getattr(self, name) < math.inf, name, "a positive number")
        for name in (
            "max_steps",
            "gradient_accumulation_steps",
            "logging_steps",
            "eval_steps",
            "save_steps",
            "save_total_limit",
            "validation_clips",
        ):
            require(getattr(self, name) >= 1, name, "1 or more")
        for name in ("warmup_steps", "dataloader_num_workers", "validation_samples"):
            require(getattr(self, name) >= 0, name, "0 or more")
        for name in (weight.name for weight in dataclasses.fields(self) if weight.name.endswith("_weight")):
            require(0 <= getattr(self, name) < math.inf, name, "0 or more")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, "0 to 1")
        for name in ("gain_db", "equalizer_db"):
            require(0 <= getattr(self, name) < math.inf, name, "0 or more")
            as_they_are = self.codes_column is None or getattr(self, name) == 0
            require(as_they_are, name, "0 with codes, which are of clips as they are")
        require(
            bool(self.mel_scales) and 2 <= min(self.mel_scales) <= max(self.mel_scales) <= 10,
            "mel_scales",
            "one or more integers from 2 to 10",
        )
        require(self.codes_column is None or self.stage == 2, "codes_column", "nothing in stage 1, which makes codes")
        require(0 <= self.quantizer_dropout <= 1, "quantizer_dropout", "0 to 1")
        require(self.crop_seconds <= self.batch_seconds, "crop_seconds", f"at most batch_seconds={self.batch_seconds}")

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """A configuration of values as YAML or a command line gives them: text where there should be a number.

        Raises:
            ValueError: there is no such option, or a value is not of its kind.
        """
        types = typing.get_type_hints(cls)
        for name in values:
            if name not in types:
                raise ValueError(f"{name} is no option of a training run; accepted: {', '.join(types)}")
        return cls(**{name: _converted(name, value, types[name]) for name, value in values.items()})

    @property
    def may_change(self) -> set[str]:
        """Options that may differ when a run is resumed."""
        return _FREE_TO_CHANGE | ({"max_steps"} if self.lr_scheduler_type.startswith("constant") else set())

    @property
    def uses_discriminators(self) -> bool:
        return self.stage == 2 and (self.adversarial_weight > 0 or self.feature_matching_weight > 0)

    @property
    def uses_text(self) -> bool:
        return self.stage == 1 and self.audio_to_text_weight > 0


# What may differ when a run is resumed: how far it goes and what is said of it, but not what it computes.
_FREE_TO_CHANGE = {
    "output_dir",
    "train_data",
    "validation_data",
    "resume",
    "dataloader_num_workers",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "metrics",
    "metric_for_best_model",
    "validation_clips",
    "validation_samples",
    "report_to",
}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, LookupError, AttributeError, RecursionError, yaml.YAMLError) as error:
        # Of these, YAML's own tags for numbers, truth values and dates raise what they like.
        raise ValueError(f"{path} cannot be read: {error}; accepted: a YAML file of options") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; accepted: options, name: value")
    return values


def _converted(name: str, value: Any, annotation: Any) -> Any:
    kinds = typing.get_args(annotation) if type(None) in typing.get_args(annotation) else (annotation,)
    if value is None and type(None) in kinds:
        return None
    kind = next(kind for kind in kinds if kind is not type(None))
    items = typing.get_args(kind)
    kind = typing.get_origin(kind) or kind
    if kind is list:
        value = [value] if isinstance(value, (str, int)) else value
        if isinstance(value, list):
            return [_converted(name, item, *items) for item in value]
    try:
        if kind is dict and isinstance(value, str):
            value = json.loads(value)
        elif kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            value = kind(value) if kind is float or isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}={_SHORTENED.repr(value)}: {error}") from error
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{name}={_SHORTENED.repr(value)}; accepted: {kind.__name__}")
    return value
