# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""A stage for Ray Data, for clusters: scheduling, back-pressure, retries and autoscaling are Ray's.

    clips = ray.data.read_binary_files("speech", include_paths=True)
    tokens = clips.map_batches(TokenizeAudio, batch_format="pyarrow", ...)

`docs/scale.md` has the whole example.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from datasets import Features

from .checkpoints import RELEASED_MODEL, load_model
from .dataset import Columns, Model, arrow_column, tokenize_audio, tokenized_features
from .optimization import optimize_for_inference
from .sources import value_of


class TokenizeAudio:
    """[`tokenize_audio`] as a callable class for `ray.data.Dataset.map_batches` with `batch_format="pyarrow"`.

    Every actor loads the model once, on the GPU that Ray gives it, or on the CPU.

    Args:
        model, device, dtype, attn_implementation: as in `load_model`.
        options: the other arguments of [`tokenize_audio`].

    Raises:
        ValueError: as [`tokenize_audio`]. With `on_error="record"` a bad clip does not stop the run.
    """

    def __init__(
        self,
        model: Model = RELEASED_MODEL,
        *,
        device: str | None = None,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        audio_column: str = "audio",
        **options: Any,
    ) -> None:
        loaded = load_model(model, device=device, dtype=dtype, attn_implementation=attn_implementation)
        self.model = optimize_for_inference(loaded)
        self.audio_column = audio_column
        self.options = options

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The batch with the columns of codes and of numbers of samples, and of errors if they are recorded."""
        columns = tokenize_audio(
            _columns(batch, self.audio_column), model=self.model, audio_column=self.audio_column, **self.options
        )
        names = {name: self.options[name] for name in _FEATURE_OPTIONS if name in self.options}
        if self.options.get("on_error") == "record":
            names.setdefault("error_column", "audio_error")
        else:
            names.pop("error_column", None)
        types = tokenized_features(Features(), self.model.config, **names).arrow_schema
        for field in types:
            batch = batch.append_column(field.name, arrow_column(columns[field.name], field.type))
        return batch


_FEATURE_OPTIONS = ("num_quantizers", "codes_column", "num_samples_column", "error_column")


def _columns(batch: pa.Table, name: str) -> Columns:
    if name not in batch.column_names:
        raise ValueError(f"there is no column {name!r}; accepted: {', '.join(map(repr, batch.column_names))}")
    return {name: [value_of(scalar) for scalar in batch[name]]}
