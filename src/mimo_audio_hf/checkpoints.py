# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints: loading a model by name, and writing a fresh one."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .configuration_mimo_audio_tokenizer import MiMoAudioTokenizerConfig
from .feature_extraction_mimo_audio_tokenizer import MiMoAudioTokenizerFeatureExtractor
from .modeling_mimo_audio_tokenizer import MiMoAudioTokenizerModel
from .quantization import QUANTIZATIONS, REMAINDER_DTYPES, check_quantization, quantization_of, quantize


RELEASED_MODEL = "XiaomiMiMo/MiMo-Audio-Tokenizer"

# What differs from the configuration's defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "released": {},
    "tiny": {
        "d_model": 128,
        "encoder_layers": 4,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 512,
        "decoder_layers": 4,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 512,
        "vocoder_dim": 192,
        "vocoder_num_layers": 6,
        "vocoder_attention_heads": 6,
        "vocoder_intermediate_dim": 768,
        # As small models and the batches of one GPU need it to train.
        "initializer_range": 0.1,
        "threshold_ema_dead_code": 0.1,
    },
}

# The trained one of that size; recipes/tiny made it.
TINY_DIRECTORY = Path(__file__).with_name("tiny")

# Where a model lies in a repository: MiMo-V2's language models have theirs in a folder.
_SUBFOLDERS = ("", "audio_tokenizer")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_ACCEPTED = (
    "accepted: 'tiny', a Hub id (owner/name), or a directory that has config.json and model.safetensors, "
    "itself or in its folder audio_tokenizer"
)


def load_model(
    model: str | os.PathLike[str] | MiMoAudioTokenizerModel = RELEASED_MODEL,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    model_class: type[MiMoAudioTokenizerModel] = MiMoAudioTokenizerModel,
) -> MiMoAudioTokenizerModel:
    """Load a tokenizer, in evaluation mode.

    Args:
        model: a Hub id (`owner/name`); a directory, or a MiMo-V2 checkpoint with its tokenizer in the folder
            `audio_tokenizer` (either may be on the Hub, too); `"tiny"`, the small trained model in this package (a
            directory of this name is `"./tiny"`); or a loaded model, which is returned itself, its mode unchanged.
        device: where to put it; by default CUDA if there is any, else MPS, else the CPU. A loaded model stays where it
            is by default.
        dtype: the dtype of its weights, or its name (`"bfloat16"`); by default the checkpoint's, or the loaded
            model's. `"int8"`, on a CPU, and `"fp8"`, on a GPU that has it, round the transformer layers' products to 8
            bits; the rest is float32 and bfloat16.
        attn_implementation: one of `ATTENTION_BACKENDS`, e.g. `"sdpa"`; by default the best one for device and dtype.
        model_class: the class of the model that is made. A loaded model keeps its own.

    Raises:
        ValueError: there is no such model, its files are missing, damaged, a pickle, or another model's; the dtype is
            none of weights; or the device or the attention implementation is not available, or the device cannot do
            the dtype. The message names which.
    """
    quantization = dtype if isinstance(dtype, str) and dtype in QUANTIZATIONS else None
    weight_dtype: torch.dtype | None = None
    if quantization is not None:
        weight_dtype = REMAINDER_DTYPES[quantization]
    elif dtype is not None:
        weight_dtype = _weight_dtype(dtype)
    if isinstance(model, MiMoAudioTokenizerModel):
        loaded = model
        target = None if device is None else _available_device(device)
        found = quantization_of(loaded)
        if found is not None and (dtype not in (None, found) or target not in (None, loaded.device)):
            raise ValueError(f"the model is quantized to {found}; accepted: the dtype and the device that it has")
    else:
        target = _available_device(_default_device() if device is None else device)
        if quantization is not None:
            check_quantization(quantization, target)
        loaded = _read_checkpoint(TINY_DIRECTORY if model == "tiny" else model, weight_dtype, model_class)
        if model == "tiny":
            loaded.config.name_or_path = "tiny"
        loaded.eval()
    if attn_implementation is not None:
        try:
            loaded.set_attn_implementation(attn_implementation)
        except ImportError as error:
            raise ValueError(f"attn_implementation={attn_implementation!r} is not available: {error}") from error
    if quantization is not None and quantization_of(loaded) is not None:
        return loaded
    if target not in (None, loaded.device) or weight_dtype not in (None, loaded.dtype):
        loaded = loaded.to(device=target, dtype=weight_dtype)  # type: ignore[call-arg] # (transformers wraps it untyped)
    return loaded if quantization is None else quantize(loaded, quantization)


def load_config(model: str | os.PathLike[str] = RELEASED_MODEL) -> MiMoAudioTokenizerConfig:
    """The configuration of what [`load_model`] loads under a name, without its weights.

    Raises:
        ValueError: there is no such model, or its configuration is missing, damaged or another model's.
    """
    name, _ = _place_of(TINY_DIRECTORY if model == "tiny" else model)
    try:
        return _read_configuration(name, _find_subfolder(name))
    except OSError as error:
        raise ValueError(f"model={name!r}: {' '.join(str(error).split())} {_ACCEPTED}") from error


def init_checkpoint(directory: str | os.PathLike[str], preset: str, seed: int = 0) -> MiMoAudioTokenizerModel:
    """Write the checkpoint of a freshly initialized model: config.json, model.safetensors, preprocessor_config.json.

    Args:
        directory: where to; made if it does not exist.
        preset: one of `PRESETS`: `"tiny"` (23 MB) or `"released"` (the released model's size, 4.9 GB).
        seed: of the weights, which it determines; the global random number generators are left alone.

    Returns:
        The model, float32 on the CPU.

    Raises:
        ValueError: an unknown preset, a seed out of range, or a directory that already holds a checkpoint.
        OSError: the files cannot be written.
    """
    directory = Path(directory)
    present = sorted(file.name for pattern in ("*.safetensors", "*config.json") for file in directory.glob(pattern))
    if present:
        raise ValueError(f"{directory} already holds a checkpoint ({', '.join(present)}); accepted: another directory")
    model = _initialized_model(preset, seed)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=directory) as temporary:
        model.save_pretrained(temporary)
        MiMoAudioTokenizerFeatureExtractor.from_config(model.config).save_pretrained(temporary)
        # The configuration last: without it nothing takes the directory for a checkpoint.
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == "config.json"):
            shutil.copymode(Path(temporary, "config.json"), file)  # safetensors makes files that nobody else may read
            os.replace(file, directory / file.name)
    return model


def weights_digest(model: MiMoAudioTokenizerModel) -> str:
    """A fingerprint of the weights: of up to 256 values of each tensor, which training would not leave alone.

    It depends on the dtype, not on the device.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.flatten()
        sample = values[:: max(1, len(values) // 256)][:256].to(device="cpu", dtype=torch.float32)
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _initialized_model(preset: str, seed: int) -> MiMoAudioTokenizerModel:
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}; accepted: {', '.join(map(repr, PRESETS))}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed}; accepted: 0 to 2**63 - 1")
    # On the CPU and with its generator only, so that the weights do not depend on the machine.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return MiMoAudioTokenizerModel(MiMoAudioTokenizerConfig(**PRESETS[preset]))


def _read_checkpoint(
    model: str | os.PathLike[str], dtype: torch.dtype | None, model_class: type[MiMoAudioTokenizerModel]
) -> MiMoAudioTokenizerModel:
    name, is_directory = _place_of(model)
    options = {} if dtype is None else {"dtype": dtype}
    try:
        subfolder = _find_subfolder(name)
        _read_configuration(name, subfolder)
        if is_directory:
            _check_tensors(name, subfolder, model_class)
        return model_class.from_pretrained(name, subfolder=subfolder, **options)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"model={name!r}: {' '.join(str(error).split())} {_ACCEPTED}") from error


def _place_of(model: str | os.PathLike[str]) -> tuple[str, bool]:
    """A directory or Hub id, and whether it is a directory."""
    name = os.fspath(model)
    # A mistyped path must not be looked up on the Hub.
    is_directory = name != "" and Path(name).is_dir()
    if not is_directory and not (isinstance(model, str) and HUB_ID.fullmatch(name)):
        raise ValueError(f"model={name!r}: there is no such directory; {_ACCEPTED}")
    return name, is_directory


def _find_subfolder(name: str) -> str:
    """The folder of a directory or Hub repository whose config.json is this model's."""
    found = []
    for subfolder in _SUBFOLDERS:
        try:
            config, _ = PreTrainedConfig.get_config_dict(name, subfolder=subfolder)
        except TypeError:  # of older transformers, where the file holds no object
            continue
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets as deep
            raise ValueError(f"model={name!r}: config.json cannot be read: {error}; {_ACCEPTED}") from error
        if isinstance(config, dict) and config.keys() - {"_commit_hash"}:
            # The released config.json has no model_type.
            model_type = config.get("model_type", MiMoAudioTokenizerConfig.model_type)
            if model_type == MiMoAudioTokenizerConfig.model_type:
                return subfolder
            found.append(f"config.json of a {model_type!r} model")
    raise ValueError(f"model={name!r}: {', '.join(found) or 'no config.json'}; {_ACCEPTED}")


def _read_configuration(name: str, subfolder: str) -> MiMoAudioTokenizerConfig:
    """Raise a ValueError if the configuration is not this model's; at its own fields transformers fails anyhow."""
    try:
        config = MiMoAudioTokenizerConfig.from_pretrained(name, subfolder=subfolder)
        dtype = config.dtype
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"model={name!r}: config.json: {error}") from error
    if not isinstance(dtype, torch.dtype | None):
        raise ValueError(f"model={name!r}: config.json: dtype={dtype!r}; accepted: the name of a torch.dtype")
    return config


def _check_tensors(name: str, subfolder: str, model_class: type[MiMoAudioTokenizerModel]) -> None:
    """Raise a ValueError if the weights are not the configuration's, which may ask for more memory than there is.

    On the meta device, loading is only the check of every tensor's name and shape.
    """
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model_class.from_pretrained(name, subfolder=subfolder, device_map="meta")
    finally:
        if shows_progress:
            logging.enable_progress_bar()


def _weight_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype={dtype!r}; accepted: a floating torch.dtype or its name, such as 'bfloat16', 'int8' or 'fp8'"
        )
    return found


def _default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _available_device(device: torch.device | str) -> torch.device:
    try:
        available = torch.device(device)
        torch.empty(0, device=available)
    except (RuntimeError, AssertionError) as error:
        accepted = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        accepted += ["mps"] if torch.backends.mps.is_available() else []
        raise ValueError(f"device={str(device)!r} is not available here; accepted: {', '.join(accepted)}") from error
    return available
