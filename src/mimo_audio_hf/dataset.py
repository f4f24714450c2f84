# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Token columns beside audio columns: functions for the `map` of Hugging Face datasets.

    dataset = dataset.map(tokenize_audio, batched=True, fn_kwargs={"model": "owner/name"})

They are plain functions of a batch, so `num_proc`, caching and streaming are `datasets`' own. A process loads a model
once. With several GPUs, `with_rank=True, num_proc=N` gives each process one of them; once the calling process has used
CUDA itself, its children can only use it after `multiprocess.set_start_method("spawn")`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Features, List, Value

from .audio import as_tensor, load_audio, require_plausible_rate, resample
from .checkpoints import RELEASED_MODEL, load_model
from .codes import code_dtype
from .configuration_mimo_audio_tokenizer import MiMoAudioTokenizerConfig
from .inference import (
    MAX_BATCH_SECONDS,
    check_codes,
    convert_each,
    decode_codes,
    encode_waveforms,
)
from .modeling_mimo_audio_tokenizer import MiMoAudioTokenizerModel
from .optimization import optimize_for_inference


# The most channels that audio is believed to have.
MAX_CHANNELS = 64

Model = str | os.PathLike[str] | MiMoAudioTokenizerModel
Columns = dict[str, list[Any]]

_ACCEPTED = (
    "accepted: a path, bytes, a file's {'bytes', 'path'}, decoded {'array', 'sampling_rate'}, or an AudioDecoder"
)


def tokenize_audio(
    batch: Mapping[str, Sequence[Any]],
    rank: int | None = None,
    *,
    model: Model = RELEASED_MODEL,
    audio_column: str = "audio",
    codes_column: str = "audio_codes",
    num_samples_column: str = "num_samples",
    num_quantizers: int | None = None,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    max_batch_seconds: float = MAX_BATCH_SECONDS,
    num_threads: int | None = None,
    on_error: str = "raise",
    error_column: str = "audio_error",
) -> Columns:
    """Encode a batch of rows, for `dataset.map(tokenize_audio, batched=True)`.

    Args:
        batch: columns, of which `audio_column` holds audio: `datasets.Audio`, decoded or not, torchcodec decoders,
            `{"array", "sampling_rate"}`, paths or bytes, of any sampling rates and numbers of channels; or None.
        rank: number of this process, from `with_rank=True`; it chooses the GPU.
        model: a Hub id, a directory or a loaded model.
        audio_column, codes_column, num_samples_column, error_column: names of columns.
        num_quantizers: how many codebooks to use, from the first; all by default.
        device, dtype, attn_implementation: as in `load_model`.
        max_batch_seconds: seconds of audio that run at once.
        num_threads: threads that read and decode; by default one where the model runs on the CPU, else one for each
            core, but no more than 8.
        on_error: `"raise"`, or `"record"`: a row that cannot be tokenized gets no codes, and the reason in
            `error_column`.

    Returns:
        The new columns. Codes are (frames, num_quantizers) arrays of the smallest integer type that fits; the number
        of samples is at the model's sampling rate. Both are None where the audio is. [`tokenized_features`] declares
        them.

    Raises:
        ValueError: a row's audio is bad (named by its place in the batch), a column is missing, or an option is wrong.
    """
    if on_error not in ("raise", "record"):
        raise ValueError(f"on_error={on_error!r}; accepted: 'raise' or 'record'")
    loaded = _loaded_model(model, rank, device, dtype, attn_implementation)
    config = loaded.config
    waveforms: dict[int, torch.Tensor] = {}
    errors: dict[int, str] = {}
    values = _column(batch, audio_column)

    def read(value: Any) -> torch.Tensor | Exception | None:
        try:
            return None if value is None else to_waveform(value, config.sampling_rate)
        except (ValueError, OSError) as error:
            return error

    with ThreadPoolExecutor(_decoding_threads(loaded) if num_threads is None else num_threads) as threads:
        for row, found in enumerate(threads.map(read, values)):
            if isinstance(found, torch.Tensor):
                waveforms[row] = found
            elif found is not None and on_error == "raise":
                raise ValueError(f"{audio_column}[{row}]: {found}") from found
            elif found is not None:
                errors[row] = str(found)

    def encode(clips: list[torch.Tensor]) -> list[torch.Tensor]:
        return encode_waveforms(loaded, clips, num_quantizers, max_batch_seconds=max_batch_seconds)

    loaded.check_num_quantizers(num_quantizers)
    clips = list(waveforms.values())
    stored = _stored_dtype(config, num_quantizers)
    codes: dict[int, np.ndarray] = {}
    for row, result in zip(
        list(waveforms), encode(clips) if on_error == "raise" else convert_each(encode, clips), strict=True
    ):
        if isinstance(result, Exception):
            errors[row] = str(result)
            del waveforms[row]
        else:
            codes[row] = result.to(stored).numpy()
    rows = range(len(values))
    columns: Columns = {
        codes_column: [codes.get(row) for row in rows],
        num_samples_column: [len(waveforms[row]) if row in waveforms else None for row in rows],
    }
    if on_error == "record":
        columns[error_column] = [errors.get(row) for row in rows]
    return columns


def detokenize_audio(
    batch: Mapping[str, Sequence[Any]],
    rank: int | None = None,
    *,
    model: Model = RELEASED_MODEL,
    codes_column: str = "audio_codes",
    audio_column: str = "audio",
    num_samples_column: str = "num_samples",
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    max_batch_seconds: float = MAX_BATCH_SECONDS,
) -> Columns:
    """Decode a batch of rows, for `dataset.map(detokenize_audio, batched=True)`: the inverse of [`tokenize_audio`].

    Args:
        batch: columns, of which `codes_column` holds codes (frames, codebooks) or None, and `num_samples_column`, if
            it is there, the lengths to cut the audio to.
        rank, model, device, dtype, attn_implementation, max_batch_seconds: as in [`tokenize_audio`].
        codes_column, audio_column, num_samples_column: names of columns.

    Returns:
        The new column: `{"array", "sampling_rate"}` with float32 samples, or None where the codes are.

    Raises:
        ValueError: codes are bad (named by their place in the batch), a column is missing, or an option is wrong.
    """
    loaded = _loaded_model(model, rank, device, dtype, attn_implementation)
    values = _column(batch, codes_column)
    lengths: Sequence[Any] = batch[num_samples_column] if num_samples_column in batch else [None] * len(values)
    codes: dict[int, torch.Tensor] = {}
    for row, value in enumerate(values):
        if value is None:
            continue
        codes[row] = check_codes(loaded, to_codes(value, f"{codes_column}[{row}]"), f"{codes_column}[{row}]")
        if lengths[row] is not None and lengths[row] < 1:
            raise ValueError(f"{num_samples_column}[{row}]={lengths[row]}; accepted: 1 or more")
    decoded = decode_codes(loaded, list(codes.values()), max_batch_seconds=max_batch_seconds)
    audio = {
        row: {"array": waveform[: lengths[row]].numpy(), "sampling_rate": loaded.config.sampling_rate}
        for row, waveform in zip(codes, decoded, strict=True)
    }
    return {audio_column: [audio.get(row) for row in range(len(values))]}


def tokenized_features(
    features: Features,
    config: MiMoAudioTokenizerConfig,
    *,
    num_quantizers: int | None = None,
    codes_column: str = "audio_codes",
    num_samples_column: str = "num_samples",
    error_column: str | None = None,
) -> Features:
    """The features of a dataset after [`tokenize_audio`], for `map(..., features=...)`.

    Without them `datasets` infers the types from the first rows that it writes, which fails where these are all None.
    `error_column` is to be given with `on_error="record"`.
    """
    stored = str(_stored_dtype(config, num_quantizers)).removeprefix("torch.")
    added = Features({codes_column: List(List(Value(stored))), num_samples_column: Value("int64")})
    if error_column is not None:
        added[error_column] = Value("string")
    return Features({**features, **added})


def arrow_column(values: Sequence[Any], column_type: pa.DataType) -> pa.Array:
    """Values of a column; of codes, arrays (frames, codebooks) or None, without making Python numbers of them."""
    arrays = [value for value in values if value is not None]
    if not arrays or not isinstance(arrays[0], np.ndarray):
        return pa.array(values, column_type)
    widths = np.repeat([array.shape[1] for array in arrays], [len(array) for array in arrays])
    starts = np.concatenate([[0], widths.cumsum()]).astype(np.int32)
    frames = pa.ListArray.from_arrays(starts, pa.array(np.concatenate([array.reshape(-1) for array in arrays])))
    lengths = [0 if value is None else len(value) for value in values]
    nulls = pa.array([value is None for value in values])
    clips = pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths], dtype=np.int32)), frames, mask=nulls)
    return clips.cast(column_type)


def to_waveform(value: Any, sampling_rate: int) -> torch.Tensor:
    """One value of an audio column as mono float32 samples (samples,) at `sampling_rate`.

    Raises:
        FileNotFoundError: there is no file at the path.
        ValueError: the value is of no accepted kind, or its audio is bad.
    """
    if isinstance(value, Mapping):
        if value.get("array") is not None and value.get("sampling_rate") is not None:
            return _decoded_waveform(value["array"], int(value["sampling_rate"]), sampling_rate)
        source = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if source is None:
            raise ValueError(f"holds {sorted(value)}; {_ACCEPTED}")
        value = source
    try:
        return load_audio(value, sampling_rate)
    except TypeError as error:
        raise ValueError(f"{type(value).__name__}; {_ACCEPTED}") from error
    except RuntimeError as error:  # torchcodec's, of a damaged file
        raise ValueError(f"{type(value).__name__}: {error}") from error


def to_codes(value: Any, name: str = "codes") -> torch.Tensor:
    """One value of a column of codes, lists or an array (frames, codebooks), as a tensor.

    Raises:
        ValueError: it is nothing of the kind; the message begins with `name`.
    """
    try:
        return as_tensor(name, value if isinstance(value, torch.Tensor) else np.asarray(value))
    except ValueError as error:
        raise ValueError(f"{name}: {error}; accepted: (frames, codebooks)") from error


def _decoded_waveform(array: Any, array_rate: int, sampling_rate: int) -> torch.Tensor:
    samples = as_tensor("array", array if isinstance(array, torch.Tensor) else np.asarray(array))
    shape = tuple(samples.shape)
    # More channels than this are samples: (samples, channels), as soundfile has them.
    if len(shape) not in (1, 2) or 0 in shape or (len(shape) == 2 and shape[0] > MAX_CHANNELS):
        raise ValueError(f"array has shape {shape}; accepted: (samples,) or (channels, samples), not empty")
    if not samples.is_floating_point():
        raise ValueError(f"array has dtype {samples.dtype}; accepted: floats in [-1, 1]")
    samples = samples.float()
    if samples.ndim == 2:
        samples = samples.mean(0)
    if not samples.isfinite().all():
        raise ValueError("array holds NaN or infinite samples; accepted: finite samples")
    require_plausible_rate("array", array_rate)
    return resample(samples, array_rate, sampling_rate)


def _decoding_threads(model: MiMoAudioTokenizerModel) -> int:
    return 1 if model.device.type == "cpu" else min(8, os.cpu_count() or 1)


def _column(batch: Mapping[str, Sequence[Any]], name: str) -> Sequence[Any]:
    if name not in batch:
        raise ValueError(f"there is no column {name!r}; accepted: {', '.join(map(repr, batch))}")
    return batch[name]


def _stored_dtype(config: MiMoAudioTokenizerConfig, num_quantizers: int | None) -> torch.dtype:
    return code_dtype(config.codebook_sizes[:num_quantizers])


def _loaded_model(
    model: Model,
    rank: int | None,
    device: str | None,
    dtype: torch.dtype | str | None,
    attn_implementation: str | None,
) -> MiMoAudioTokenizerModel:
    if device is None and rank is not None and torch.cuda.is_available():
        device = f"cuda:{rank % torch.cuda.device_count()}"
    if isinstance(model, MiMoAudioTokenizerModel):
        return load_model(model, device=device, dtype=dtype, attn_implementation=attn_implementation)
    return _model_of_this_process(os.fspath(model), device, dtype, attn_implementation)


@lru_cache(maxsize=1)
def _model_of_this_process(
    model: str, device: str | None, dtype: torch.dtype | str | None, attn_implementation: str | None
) -> MiMoAudioTokenizerModel:
    loaded = load_model(model, device=device, dtype=dtype, attn_implementation=attn_implementation)
    return optimize_for_inference(loaded)
