"""Upstream's results, clip by clip and in a batch."""

from __future__ import annotations

import pytest
import torch
from golden import CHECKPOINTS, expected_clips, load_golden, pad_features, relative_error

from mimo_audio_hf import MiMoAudioTokenizerModel


# Upstream's float32 kernels and ours differ by rounding only: about 1e-6 was seen through 32 matrix products.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=CHECKPOINTS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request, name) -> MiMoAudioTokenizerModel:
    return load_golden(name, attn_implementation=request.param)


@torch.no_grad()
def test_encode_alone(model, name):
    for clip in expected_clips(name):
        output = model.encode(clip["mel"][None], output_latents=True)
        assert relative_error(output.latents[0], clip["features"]) < TOLERANCE
        assert torch.equal(output.audio_codes[0].T, clip["codes"].long())


@torch.no_grad()
def test_encode_in_a_batch_with_nan_padding(model, name):
    clips = expected_clips(name)
    output = model.encode(*pad_features([clip["mel"] for clip in clips]), output_latents=True)
    for index, clip in enumerate(clips):
        length = clip["codes"].shape[0]
        assert output.audio_codes_mask[index].sum() == length
        assert relative_error(output.latents[index, :length], clip["features"]) < TOLERANCE
        assert torch.equal(output.audio_codes[index, :, :length].T, clip["codes"].long())
        assert not output.audio_codes[index, :, length:].any()


@torch.no_grad()
@pytest.mark.parametrize(("field", "num_quantizers"), [("audio", 6), ("audio_nq3", 3)])
def test_decode(model, name, field, num_quantizers):
    clips = [clip for clip in expected_clips(name) if field in clip]
    if not clips:
        pytest.skip("upstream has no decoder for this family of encoders")
    longest = max(len(clip["codes"]) for clip in clips)
    codes = torch.full((len(clips), num_quantizers, longest), -1)  # padding is not read
    for index, clip in enumerate(clips):
        codes[index, :, : len(clip["codes"])] = clip["codes"][:, :num_quantizers].T
    batch = model.decode(codes, (codes[:, 0] >= 0).long())
    for index, clip in enumerate(clips):
        samples = clip[field].numel()
        alone = model.decode(clip["codes"][None, :, :num_quantizers].transpose(1, 2)).audio_values
        assert alone.shape == (1, 1, samples)
        assert batch.audio_lengths[index] == samples
        assert relative_error(alone[0, 0], clip[field]) < TOLERANCE
        assert relative_error(batch.audio_values[index, 0, :samples], clip[field]) < TOLERANCE
        assert not batch.audio_values[index, 0, samples:].any()


@torch.no_grad()
def test_forward_is_encode_then_decode(name):
    model = load_golden(name)
    inputs = pad_features([clip["mel"] for clip in expected_clips(name)])
    output = model(*inputs, num_quantizers=4, output_latents=True)
    encoded = model.encode(*inputs, num_quantizers=4, output_latents=True)
    decoded = model.decode(encoded.audio_codes, encoded.audio_codes_mask)
    for field in ("audio_codes", "audio_codes_mask", "latents"):
        assert torch.equal(output[field], encoded[field])
    for field in ("audio_values", "audio_lengths"):
        assert torch.equal(output[field], decoded[field])
    assert output.loss is None
