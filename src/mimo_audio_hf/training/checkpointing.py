# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""What a training run leaves on disk: checkpoints that load as models, with all that the run needs to go on.

    checkpoint-100/
        config.json, model.safetensors, preprocessor_config.json   the model, as `load_model` takes it
        training.json                                              configuration, versions, data, step, metrics
        trainer/                                                   state.json, and optimizers and discriminators

A checkpoint appears under its name once it is complete. There is no pickle in it.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)


TRAINER = "trainer"
STATE_NAME = f"{TRAINER}/state.json"
BEST = "best"

_NAME = re.compile(r"checkpoint-(\d+)")
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")
# Whole tensors by their names, whatever DDP or FSDP did to the module.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def path(directory: Path, step: int) -> Path:
    return directory / f"checkpoint-{step}"


def steps(directory: Path) -> list[int]:
    """The steps of a run's checkpoints, in order."""
    if not directory.is_dir():
        return []
    found = (_NAME.fullmatch(child.name) for child in directory.iterdir() if (child / STATE_NAME).is_file())
    return sorted(int(match[1]) for match in found if match)


def newest(directory: Path) -> Path | None:
    found = steps(directory)
    return path(directory, found[-1]) if found else None


def remove_old(directory: Path, kept: int) -> None:
    for step in steps(directory)[:-kept]:
        shutil.rmtree(_renamed_away(path(directory, step)))


def remove_leftovers(directory: Path) -> None:
    """Deletes what killed runs left under temporary names."""
    for found in [path for path in directory.rglob(".*.tmp") if _TEMPORARY.fullmatch(path.name)]:
        if found.is_dir():
            shutil.rmtree(found)
        else:
            found.unlink(missing_ok=True)


def _temporary_name(target: Path) -> Path:
    return target.with_name(f".{uuid.uuid4().hex}.tmp")


def _renamed_away(target: Path) -> Path:
    """So that nobody takes it for whole while it is deleted."""
    return target.rename(_temporary_name(target))


@contextmanager
def replacing_directory(target: Path) -> Iterator[Path]:
    """A directory under a temporary name that becomes `target` at the end; what stood there before goes only then.

    Directories cannot be exchanged in one go: a kill between the two renames leaves no `target`. Only `best` is ever
    replaced, before the checkpoint of its step, so that a resumed run writes it once more.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(target)
    temporary.mkdir()
    try:
        yield temporary
        old = _renamed_away(target) if target.exists() else None
        temporary.rename(target)
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def model_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's whole state on the CPU, by the names that it has without wrappers. Every process has to ask."""
    whole = get_model_state_dict(module, options=_WHOLE)
    return {name: cast(torch.Tensor, value).detach().cpu().contiguous() for name, value in whole.items()}


def optimizer_state(
    module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's whole state: its tensors, `WEIGHT/NAME`, and its groups' settings. Every process has to ask."""
    whole: dict[str, Any] = get_optimizer_state_dict(module, optimizer, options=_WHOLE)
    tensors = {
        f"{weight}/{name}": torch.as_tensor(value).contiguous()
        for weight, values in whole.get("state", {}).items()  # only the first process gets it
        for name, value in values.items()
    }
    return tensors, {"param_groups": whole.get("param_groups", [])}


def load_optimizer_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], settings: dict[str, Any]
) -> None:
    """Gives an optimizer back what `optimizer_state` took."""
    state: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        weight, name = key.rsplit("/", 1)
        state.setdefault(weight, {})[name] = tensor
    whole: dict[str, Any] = {"state": state, "param_groups": settings["param_groups"]}
    set_optimizer_state_dict(module, optimizer, whole, options=_WHOLE)


def save_tensors(checkpoint: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    file = checkpoint / TRAINER / f"{name}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    # Tied weights share their storage, which safetensors refuses.
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, {"format": "pt"})


def load_tensors(checkpoint: Path, name: str) -> dict[str, torch.Tensor]:
    """What `save_tensors` wrote.

    Raises:
        ValueError: the file is missing or damaged.
    """
    file = checkpoint / TRAINER / f"{name}.safetensors"
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}; accepted: a checkpoint of a training run") from error


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
