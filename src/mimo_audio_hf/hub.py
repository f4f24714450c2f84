# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Hub repositories that load without this package: weights, model code, configuration and a model card.

[`assemble_hub_repository`] makes one from a checkpoint, [`push_to_hub`] uploads one. The folder `hub_card/` of this
project's sources shows what is written beside weights and code for the released model; tests/test_hub.py keeps the two
alike and says how to renew it.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError, HTTPError
from jinja2 import UndefinedError
from safetensors import SafetensorError
from tqdm import tqdm
from transformers.utils import CONFIG_NAME, FEATURE_EXTRACTOR_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from yaml import YAMLError

from .configuration_mimo_audio_tokenizer import MiMoAudioTokenizerConfig
from .feature_extraction_mimo_audio_tokenizer import MiMoAudioTokenizerFeatureExtractor
from .files import read_json
from .modeling_mimo_audio_tokenizer import MiMoAudioTokenizerModel


CARD_NAME = "README.md"
# What a training run leaves beside the weights; see `training.Trainer`.
TRAINING_NAME = "training.json"
# Of the weights, if a checkpoint has them.
LICENSE_NAMES = ("LICENSE", "NOTICE")
LICENSE_FIELDS = ("license", "license_name", "license_link")
AUTO_CLASSES: dict[str, type] = {
    "AutoConfig": MiMoAudioTokenizerConfig,
    "AutoFeatureExtractor": MiMoAudioTokenizerFeatureExtractor,
    "AutoModel": MiMoAudioTokenizerModel,
    "AutoModelForAudioTokenization": MiMoAudioTokenizerModel,
}


def assemble_hub_repository(
    checkpoint: str | os.PathLike[str], output_dir: str | os.PathLike[str], *, released: bool = False
) -> Path:
    """Makes a checkpoint into a repository that transformers loads with `trust_remote_code=True`.

    The weights are checked against the configuration, without being kept in memory, and copied as they are. Files
    appear in `output_dir` only once all of them are complete.

    Args:
        checkpoint: Directory with a `config.json` and safetensors weights, in one file or sharded: upstream's own, or
            one that this package saved. A checkpoint without any decoder tensor gives a model that only encodes. If a
            training run wrote it, the model card tells of its data, recipe and metrics.
        output_dir: Where to write; a directory that is empty or does not exist.
        released: The weights are those that Xiaomi released, so the model card tells of them, with their published
            figures. Nothing else in a checkpoint says whose weights it holds: by default the card claims nothing of
            them.

    Returns:
        `output_dir`

    Raises:
        ValueError: `output_dir` is not empty; the checkpoint has no readable configuration or safetensors weights (a
            pickle is never read); its tensors are not those of its configuration (missing, unexpected and misshaped
            ones are named); or `released` is set and the configuration is not the released model's.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{output_dir} exists; accepted: an empty directory or a new one")
    fields = read_json(checkpoint / CONFIG_NAME)
    try:
        # On the meta device, loading is only the check of every tensor's name and shape.
        model = MiMoAudioTokenizerModel.from_pretrained(checkpoint, device_map="meta")
    except (OSError, SafetensorError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{checkpoint}: {reason}; accepted: weights in {SAFE_WEIGHTS_NAME}") from error
    if not model.config.has_decoder:
        fields["has_decoder"] = False
    training = read_json(checkpoint / TRAINING_NAME) if (checkpoint / TRAINING_NAME).is_file() else None
    if released and training is not None:
        raise ValueError(f"released=True, but {checkpoint} has a {TRAINING_NAME}: a training run made its weights")
    licences = [checkpoint / name for name in LICENSE_NAMES if (checkpoint / name).is_file()]
    try:
        overlay = overlay_files(fields, released=released, training=training, licence=_licence_of(checkpoint))
    except UndefinedError as error:
        raise ValueError(f"{checkpoint / TRAINING_NAME}: {error}; accepted: what a training run writes") from error

    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=output_dir) as temporary:
        repository = Path(temporary)
        for name, content in overlay.items():
            (repository / name).write_bytes(content)
        for source in (*licences, *_weight_files(checkpoint)):
            _copy(source, repository / source.name)
        # The configuration last: without it nothing takes the directory for a checkpoint.
        for path in sorted(repository.iterdir(), key=lambda path: path.name == CONFIG_NAME):
            path.replace(output_dir / path.name)
    return output_dir


def push_to_hub(
    checkpoint: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    released: bool = False,
) -> str:
    """Uploads a checkpoint as a repository that [`assemble_hub_repository`] makes, in one commit.

    What an interrupted upload has brought to the Hub is not sent again by the next one. Files of the repository that
    the checkpoint does not have stay as they are.

    Args:
        checkpoint, released: As in [`assemble_hub_repository`].
        repo_id: `owner/name`; made if it does not exist.
        private: Whether a repository that is made is private; by default as the owner's settings say.
        revision: The branch to commit to; made, from the main one, if it does not exist. By default the main one.
        token: Of the Hub; by default the one that `hf auth login` stored.

    Returns:
        The repository's address.

    Raises:
        ValueError: as [`assemble_hub_repository`]; or the Hub refuses the name, the model card or the upload, or
            cannot be reached.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        repository = assemble_hub_repository(checkpoint, Path(temporary, "repository"), released=released)
        try:
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            # Not upload_folder, which may take several commits.
            operations = [CommitOperationAdd(path.name, path) for path in sorted(repository.iterdir())]
            api.create_commit(repo_id, operations, commit_message="MiMo-Audio tokenizer", revision=revision)
        except (HTTPError, HFValidationError, RuntimeError) as error:  # RuntimeError: of large files
            reasons = [str(each) for each in (error, error.__cause__) if each is not None]
            raise ValueError(f"repo_id={repo_id!r}: {' '.join(' '.join(reasons).split())}") from error
    return str(address)


def overlay_files(
    fields: dict[str, Any],
    *,
    released: bool = False,
    training: dict[str, Any] | None = None,
    licence: dict[str, Any] | None = None,
) -> dict[str, bytes]:
    """Contents of all files of a Hub repository but the weights: the model's code, its configurations and its card.

    Args:
        fields: A checkpoint's `config.json`.
        released: As in [`assemble_hub_repository`].
        training: A checkpoint's `training.json`, if it has one.
        licence: What the card's metadata say of the weights' licence, if they say anything.

    Raises:
        ValueError: as [`assemble_hub_repository`], about the configuration.
    """
    config = MiMoAudioTokenizerConfig.from_dict(dict(fields))  # which older transformers add to
    if released:
        _require_released(config)
    sources = {name: Path(inspect.getfile(cls)) for name, cls in AUTO_CLASSES.items()}
    auto_map = {name: f"{sources[name].stem}.{cls.__name__}" for name, cls in AUTO_CLASSES.items()}
    model_fields = {
        "model_type": config.model_type,
        "architectures": [MiMoAudioTokenizerModel.__name__],
        "auto_map": auto_map,
    }
    extractor_fields = MiMoAudioTokenizerFeatureExtractor.from_config(config).to_dict()
    extractor_fields["auto_map"] = {"AutoFeatureExtractor": auto_map["AutoFeatureExtractor"]}
    return {
        CARD_NAME: f"{_model_card(config, released, training, licence or {})}\n".encode(),
        CONFIG_NAME: _to_json(fields | model_fields),
        FEATURE_EXTRACTOR_NAME: _to_json(extractor_fields),
        **{source.name: source.read_bytes() for source in sources.values()},
    }


def _to_json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2) + "\n").encode()


def _weight_files(checkpoint: Path) -> list[Path]:
    """The files that transformers reads: one of all weights, or else the index and its shards."""
    if (checkpoint / SAFE_WEIGHTS_NAME).is_file():
        return [checkpoint / SAFE_WEIGHTS_NAME]
    index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
    return [index, *(checkpoint / name for name in sorted(set(read_json(index)["weight_map"].values())))]


def _copy(source: Path, target: Path) -> None:
    """Copies, since training into a repository of hard links would overwrite the checkpoint; with a progress bar."""
    with (
        source.open("rb") as reader,
        target.open("wb") as writer,
        tqdm.wrapattr(reader, "read", total=source.stat().st_size, desc=source.name, disable=None) as counted,
    ):
        shutil.copyfileobj(counted, writer, 2**24)


def _require_released(config: MiMoAudioTokenizerConfig) -> None:
    default = MiMoAudioTokenizerConfig()
    for field in inspect.signature(MiMoAudioTokenizerConfig).parameters:
        if field != "kwargs" and getattr(config, field) != getattr(default, field):
            raise ValueError(
                f"released=True with {field}={getattr(config, field)!r}; accepted: {getattr(default, field)!r}, "
                "which the released model has"
            )


def _licence_of(checkpoint: Path) -> dict[str, Any]:
    """What the card beside a checkpoint's weights says of their licence, in the Hub's fields."""
    card = checkpoint / CARD_NAME
    if card.is_file():
        try:
            metadata = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
        except (ValueError, YAMLError) as error:
            raise ValueError(f"{card}: {error}; accepted: a model card, or none") from error
        if "license" in metadata:
            return {name: metadata[name] for name in LICENSE_FIELDS if name in metadata}
    if (checkpoint / LICENSE_NAMES[0]).is_file():
        return dict(zip(LICENSE_FIELDS, ("other", "see-license-file", LICENSE_NAMES[0]), strict=True))
    return {}


def _model_card(
    config: MiMoAudioTokenizerConfig, released: bool, training: dict[str, Any] | None, licence: dict[str, Any]
) -> ModelCard:
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "audio-to-audio" if config.has_decoder else "feature-extraction",
        "tags": ["audio", "speech", "audio-tokenizer", "neural-audio-codec", "residual-vector-quantization"],
    }
    if released:
        licence = {"license": "mit"}  # as Xiaomi labels the MiMo-Audio family
        metadata |= {"base_model": "XiaomiMiMo/MiMo-Audio-Tokenizer", "language": ["en", "zh"]}
    metadata |= licence
    started_from = str(training["config"]["model"]) if training and "config" in training else ""
    if _is_hub_id(started_from):
        metadata["base_model"] = started_from
    template = files(__package__).joinpath("model_card.md").read_text(encoding="utf-8")
    return ModelCard.from_template(
        ModelCardData(**metadata),
        template_str=template,
        config=config,
        released=released,
        training=training,
        licence=licence,
        # Names, not where things lay on somebody's machine.
        source_name=lambda source: source if _is_hub_id(source) else Path(source).name,
    )


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not Path(name).exists()
