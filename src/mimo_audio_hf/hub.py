# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Hub repositories that load without this package: weights, model code, configuration and a model card.

[`assemble_hub_repository`] makes one from a checkpoint, [`push_to_hub`] uploads one. The folder `hub_card/` of this
project's sources shows what is written beside weights and code for the released model; tests/test_hub.py keeps the two
alike and says how to renew it.
"""

from __future__ import annotations

import filecmp
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
from huggingface_hub.errors import BadRequestError, HTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id
from jinja2 import UndefinedError
from safetensors import SafetensorError
from tqdm import tqdm
from transformers.utils import CONFIG_NAME, FEATURE_EXTRACTOR_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from yaml import YAMLError

from .checkpoints import HUB_ID, RELEASED_MODEL, TINY_DIRECTORY
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
            one that this package saved; or `"tiny"`, the model in this package. A checkpoint without any decoder
            tensor gives a model that only encodes. A model card that lies beside the weights is kept, and told how
            the model is loaded if it does not say so; without one, the card tells of the data, recipe and metrics of
            the training run that wrote the checkpoint, if one did.
        output_dir: Where to write; a directory that is empty or does not exist. One that was assembled of the same
            checkpoint before is left as it is, with what was edited of its model card.
        released: The weights are those that Xiaomi released, so the model card tells of them, with their published
            figures. Nothing else in a checkpoint says whose weights it holds: by default the card claims nothing of
            them.

    Returns:
        `output_dir`

    Raises:
        ValueError: `output_dir` holds something else; the checkpoint has no readable configuration or safetensors
            weights (a pickle is never read); its tensors are not those of its configuration (missing, unexpected and
            misshaped ones are named); or `released` is set and the configuration is not the released model's.
    """
    checkpoint, output_dir = TINY_DIRECTORY if checkpoint == "tiny" else Path(checkpoint), Path(output_dir)
    is_there = is_assembled(output_dir)
    if not is_there and output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{output_dir} exists; accepted: an empty directory or a new one")
    fields = read_json(checkpoint / CONFIG_NAME)
    if not _checked_config(checkpoint).has_decoder:
        fields["has_decoder"] = False
    document = checkpoint / TRAINING_NAME
    training = read_json(document, {"config.model": str}) if document.is_file() else None
    if released and training is not None:
        raise ValueError(f"released=True, but {checkpoint} has a {TRAINING_NAME}: a training run made its weights")
    licences = [checkpoint / name for name in LICENSE_NAMES if (checkpoint / name).is_file()]
    own_card = None if released else _card_in(checkpoint)
    licence = _licence_of(checkpoint, own_card)
    try:
        overlay = overlay_files(fields, released=released, training=training, licence=licence, own_card=own_card)
    except UndefinedError as error:
        raise ValueError(f"{document}: {error}; accepted: what a training run writes") from error
    copied = [*licences, *_weight_files(checkpoint)]
    if is_there:
        _require_same(output_dir, checkpoint, overlay, copied)
        return output_dir

    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=output_dir) as temporary:
        repository = Path(temporary)
        for name, content in overlay.items():
            (repository / name).write_bytes(content)
        for source in copied:
            _copy(source, repository / source.name)
        # The configuration last: without it nothing takes the directory for a checkpoint.
        for path in sorted(repository.iterdir(), key=lambda path: path.name == CONFIG_NAME):
            path.replace(output_dir / path.name)
    return output_dir


def is_assembled(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory is what [`assemble_hub_repository`] makes: a checkpoint with the model's code and a card."""
    names = (CONFIG_NAME, CARD_NAME, *(Path(inspect.getfile(cls)).name for cls in AUTO_CLASSES.values()))
    return all(Path(directory, name).is_file() for name in names)


def push_to_hub(
    checkpoint: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    released: bool = False,
) -> str:
    """Uploads a repository that [`assemble_hub_repository`] made, or makes of a checkpoint, in one commit.

    What an interrupted upload has brought to the Hub is not sent again by the next one. Files of the repository that
    are not among those uploaded stay as they are; the model card is among them and takes the place of one that was
    edited on the Hub. Nothing is written to the Hub before the name and the card are known to be good.

    Args:
        checkpoint: A directory that [`assemble_hub_repository`] made, which is uploaded as it is, with what was edited
            of its model card and what was added, but for hidden files; or a checkpoint as it takes one.
        repo_id: `owner/name`; made if it does not exist.
        private: Whether a repository that is made is private; by default as the owner's settings say.
        revision: The branch to commit to; made, from the main one, if it does not exist. By default the main one.
        token: Of the Hub; by default the one that `hf auth login` stored.
        released: As in [`assemble_hub_repository`], of a checkpoint.

    Returns:
        The repository's address.

    Raises:
        ValueError: as [`assemble_hub_repository`]; `released` is set for an assembled directory, whose card says
            already whose weights it holds; or the Hub refuses the name, the model card or the upload, or cannot be
            reached.
    """
    require_repo_id(repo_id)
    if checkpoint == "tiny" or not is_assembled(checkpoint):
        with tempfile.TemporaryDirectory() as temporary:
            repository = assemble_hub_repository(checkpoint, Path(temporary, "repository"), released=released)
            return _upload(repository, repo_id, private, revision, token)
    if released:
        raise ValueError(f"released=True, but {checkpoint} is assembled already; accepted: released=False")
    _checked_config(Path(checkpoint))
    return _upload(Path(checkpoint), repo_id, private, revision, token)


def require_repo_id(repo_id: str) -> None:
    """Raises a ValueError if it is no name of a repository with its owner's."""
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"repo_id={repo_id!r}: {error}") from error
    if "/" not in repo_id:
        raise ValueError(f"repo_id={repo_id!r}; accepted: owner/name")


def is_hub_id(name: str) -> bool:
    """Whether a name is that of a model or dataset on the Hub: there is no file or directory of that name here."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def overlay_files(
    fields: dict[str, Any],
    *,
    released: bool = False,
    training: dict[str, Any] | None = None,
    licence: dict[str, Any] | None = None,
    own_card: ModelCard | None = None,
) -> dict[str, bytes]:
    """Contents of all files of a Hub repository but the weights: the model's code, its configurations and its card.

    Args:
        fields: A checkpoint's `config.json`.
        released: As in [`assemble_hub_repository`].
        training: A checkpoint's `training.json`, if it has one.
        licence: What the card's metadata say of the weights' licence, if they say anything.
        own_card: The checkpoint's own, if it has one. Its text, unless there is none, and its metadata are kept.

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
    card = _model_card(config, released, training, licence or {})
    if own_card is not None and own_card.text.strip():
        card = _with_usage(own_card, card)
    return {
        CARD_NAME: f"{card}\n".encode(),
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


def _checked_config(checkpoint: Path) -> MiMoAudioTokenizerConfig:
    """The configuration, if the weights are its own.

    Raises:
        ValueError: they are not, or cannot be read.
    """
    try:
        # On the meta device, loading is only the check of every tensor's name and shape.
        return MiMoAudioTokenizerModel.from_pretrained(checkpoint, device_map="meta").config
    except (OSError, SafetensorError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{checkpoint}: {reason}; accepted: weights in {SAFE_WEIGHTS_NAME}") from error


def _require_same(repository: Path, checkpoint: Path, overlay: dict[str, bytes], copied: list[Path]) -> None:
    """That a repository is what is assembled of a checkpoint, whatever was edited of its card."""
    different = []
    for name, content in overlay.items():
        target = repository / name
        if name != CARD_NAME and not (target.is_file() and target.read_bytes() == content):
            different.append(name)
    for source in copied:
        target = repository / source.name
        if not (target.is_file() and filecmp.cmp(source, target, shallow=False)):
            different.append(source.name)
    if different:
        raise ValueError(
            f"{repository} exists, and is not what is assembled of {checkpoint} ({', '.join(different)}); "
            "accepted: an empty directory, a new one, or one assembled of the same checkpoint"
        )


def _upload(repository: Path, repo_id: str, private: bool | None, revision: str | None, token: str | None) -> str:
    paths = sorted(path for path in repository.rglob("*") if path.is_file())
    names = {path.relative_to(repository): path for path in paths}
    # Not upload_folder, which may take several commits.
    operations = [
        CommitOperationAdd(name.as_posix(), path)
        for name, path in names.items()
        if not any(part.startswith(".") for part in name.parts)
    ]
    api = HfApi(token=token)
    try:
        _require_valid_card(api, (repository / CARD_NAME).read_text(encoding="utf-8"))
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.create_commit(repo_id, operations, commit_message="MiMo-Audio tokenizer", revision=revision)
    # ConnectionError: HF_HUB_OFFLINE is set; RuntimeError: of large files.
    except (HTTPError, ConnectionError, ValueError, RuntimeError) as error:
        reasons = [str(each) for each in (error, error.__cause__) if each is not None]
        raise ValueError(f"repo_id={repo_id!r}: {' '.join(' '.join(reasons).split())}") from error
    return str(address)


def _require_valid_card(api: HfApi, content: str) -> None:
    """The Hub's own check, which a commit makes as well: but only once there is a repository.

    Raises:
        ValueError: the Hub refuses the card.
        HTTPError: it cannot be asked.
    """
    response = get_session().post(
        f"{api.endpoint}/api/validate-yaml",
        json={"content": content, "repoType": "model"},
        headers=build_hf_headers(token=api.token),
    )
    try:
        hf_raise_for_status(response)
    except BadRequestError as error:
        raise ValueError(f"{CARD_NAME}: {error}") from error


def _card_in(checkpoint: Path) -> ModelCard | None:
    """The model card beside a checkpoint's weights."""
    card = checkpoint / CARD_NAME
    if not card.is_file():
        return None
    try:
        return ModelCard.load(card, ignore_metadata_errors=True)
    except (ValueError, YAMLError) as error:
        raise ValueError(f"{card}: {error}; accepted: a model card, or none") from error


def _licence_of(checkpoint: Path, card: ModelCard | None) -> dict[str, Any]:
    """What a checkpoint says of its weights' licence, in the Hub's fields."""
    metadata = {} if card is None else card.data.to_dict()
    if "license" in metadata:
        return {name: metadata[name] for name in LICENSE_FIELDS if name in metadata}
    if (checkpoint / LICENSE_NAMES[0]).is_file():
        return dict(zip(LICENSE_FIELDS, ("other", "see-license-file", LICENSE_NAMES[0]), strict=True))
    return {}


def _with_usage(own: ModelCard, generated: ModelCard) -> ModelCard:
    """A checkpoint's own card, with what the Hub and a reader need to load the model."""
    metadata = ModelCardData(**(generated.data.to_dict() | own.data.to_dict()))
    text = own.text.strip()
    usage = re.search(r"^## Use\n.*?(?=^## )", generated.text, re.DOTALL | re.MULTILINE)
    if "trust_remote_code" not in text and usage is not None:
        text = f"{text}\n\n{usage[0].strip()}"
    return ModelCard(f"---\n{metadata}\n---\n\n{text}")


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
        metadata |= {"base_model": RELEASED_MODEL, "language": ["en", "zh"]}
    metadata |= licence
    options = {} if training is None else training["config"]
    from_hub = [] if training is None else _options_from_hub(training)
    if "model" in from_hub:
        metadata["base_model"] = options["model"]
    if "train_data" in from_hub:
        metadata["datasets"] = [options["train_data"]]

    def source_name(option: str) -> str:
        """A name, not where a thing lay on somebody's machine."""
        source = options.get(option) or "(no name)"
        return source if option in from_hub else Path(str(source)).name

    template = files(__package__).joinpath("model_card.md").read_text(encoding="utf-8")
    return ModelCard.from_template(
        ModelCardData(**metadata),
        template_str=template,
        config=config,
        released=released,
        training=training,
        licence=licence,
        source_name=source_name,
    )


def _options_from_hub(training: dict[str, Any]) -> list[str]:
    """The options of a training run that name repositories of the Hub.

    Runs from before this was noted say it of none, and a name alone cannot tell: but the released model is one.
    """
    noted = training.get("from_hub")
    if isinstance(noted, list):
        return noted
    return ["model"] if training["config"]["model"] == RELEASED_MODEL else []
