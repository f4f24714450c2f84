"""A clip's results do not depend on what stands beside it."""

from __future__ import annotations

import random

import pytest
import torch
from golden import load_golden, pad_features, relative_error


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_200_random_batches(attn_implementation):
    # 1 to 16 clips of 1 to 800 frames, drawn from a pool so that each clip has to be encoded alone only once.
    chosen, generator = random.Random(0), torch.Generator().manual_seed(0)
    model = load_golden("base", attn_implementation=attn_implementation)
    lengths = [1, 2, 3, 4, 5, 799, 800] + [chosen.randint(1, 800) for _ in range(41)]
    mels = [torch.randn(128, length, generator=generator) * 2 - 5 for length in lengths]
    codes = [model.encode(mel[None]).audio_codes for mel in mels]
    audio = [model.decode(each).audio_values[0, 0] for each in codes]

    differing = total = 0
    worst_audio = 0.0
    for _ in range(200 if attn_implementation == "sdpa" else 20):
        batch = [chosen.randrange(len(mels)) for _ in range(chosen.randint(1, 16))]
        encoded = model.encode(*pad_features([mels[clip] for clip in batch]))
        clean = torch.zeros_like(encoded.audio_codes)
        for row, clip in enumerate(batch):
            length = codes[clip].shape[-1]
            assert encoded.audio_codes_mask[row].sum() == length
            differing += (encoded.audio_codes[row, :, :length] != codes[clip][0]).sum().item()
            total += codes[clip].numel()
            clean[row, :, :length] = codes[clip][0]
        decoded = model.decode(clean, encoded.audio_codes_mask)
        for row, clip in enumerate(batch):
            samples = audio[clip].numel()
            assert decoded.audio_lengths[row] == samples
            worst_audio = max(worst_audio, relative_error(decoded.audio_values[row, 0, :samples], audio[clip]))
    assert differing <= total / 100_000  # two entries may tie within rounding
    assert worst_audio < 1e-5
