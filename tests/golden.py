"""Reference checkpoints and outputs; see fixtures/golden/README.md."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from mimo_audio_hf import MiMoAudioTokenizerModel


GOLDEN = Path(__file__).parent / "fixtures" / "golden"
CHECKPOINTS = ["base", "no_skip_windowed", "causal_hybrid_encoder"]


def load_golden(name: str, **kwargs) -> MiMoAudioTokenizerModel:
    return MiMoAudioTokenizerModel.from_pretrained(GOLDEN / name, **kwargs).eval()


@lru_cache
def expected_clips(name: str) -> list[dict[str, torch.Tensor]]:
    """For each clip its `mel`, `features`, `codes` and, but for the encoder-only family, `audio` and `audio_nq3`."""
    clips: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(GOLDEN / name / "expected.safetensors").items():
        clip, field = key.split(".")
        clips.setdefault(int(clip), {})[field] = tensor
    return [clips[clip] for clip in sorted(clips)]


def pad_features(mels: list[torch.Tensor], padding: float = float("nan")) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-mels (128, T) to (clips, 128, longest T), with `padding` past each clip's end, and the mask."""
    frames = max(mel.shape[1] for mel in mels)
    features = torch.full((len(mels), mels[0].shape[0], frames), padding)
    mask = torch.zeros(len(mels), frames, dtype=torch.long)
    for clip, mel in enumerate(mels):
        features[clip, :, : mel.shape[1]] = mel
        mask[clip, : mel.shape[1]] = 1
    return features, mask


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()
