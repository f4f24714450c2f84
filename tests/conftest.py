"""What several test modules share: a small model, and audio files that are made where they are needed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"  # read on import: no test may look anything up
os.environ["OMP_NUM_THREADS"] = "1"  # in other processes, too

import pytest
import soundfile
import torch

from mimo_audio_hf import MiMoAudioTokenizerModel
from mimo_audio_hf.checkpoints import init_checkpoint, load_model


WriteAudio = Callable[..., Path]

# Models this small gain nothing from more, and on a busy machine the threads wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny preset, randomly initialized. Not to be changed."""
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny"
    init_checkpoint(directory, "tiny", seed=0)
    return directory


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path) -> MiMoAudioTokenizerModel:
    """The model of `tiny_checkpoint`, float32 on the CPU. Not to be changed."""
    return load_model(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="session")
def write_audio() -> WriteAudio:
    """Writes noise of `num_samples` samples to a path, whose parents are made, and returns the path."""

    def write(path: Path, num_samples: int, sampling_rate: int = 24000, seed: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = torch.randn(num_samples, generator=torch.Generator().manual_seed(seed)) * 0.1
        soundfile.write(path, noise.clamp(-1, 1).numpy(), sampling_rate)
        return path

    return write
