"""Bad input to the model and its configuration: a ValueError that names the culprit."""

from __future__ import annotations

import pytest
import torch
from golden import load_golden

from mimo_audio_hf import MiMoAudioTokenizerConfig, MiMoAudioTokenizerModel


@pytest.fixture(scope="module")
def model() -> MiMoAudioTokenizerModel:
    return load_golden("base")


def features(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


NAN = torch.full((2, 128, 10), 0.0).index_fill(0, torch.tensor(1), float("nan"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((features(128, 10),), r"input_features have shape \(128, 10\)"),
        ((features(1, 80, 10),), r"input_features have shape \(1, 80, 10\); accepted: \(batch_size, 128, frames\)"),
        ((features(1, 128, 0),), r"input_features have shape \(1, 128, 0\)"),
        ((features(1, 128, 10).long(),), "input_features are torch.int64"),
        ((NAN,), "input_features of clip 1 are NaN or infinite"),
        ((features(2, 128, 10), torch.ones(2, 9)), r"attention_mask has shape \(2, 9\); accepted: \(2, 10\)"),
        ((features(1, 128, 4), torch.tensor([[0, 1, 1, 1]])), "attention_mask of clip 0 is not a prefix of ones"),
        ((features(1, 128, 4), torch.tensor([[1, 1, 2, 0]])), "attention_mask of clip 0 is not a prefix of ones"),
        ((features(2, 128, 2), torch.tensor([[1, 1], [0, 0]])), "attention_mask of clip 1 is not a prefix of ones"),
        ((features(1, 128, 10), None, 7), "num_quantizers=7; accepted: 1 to 6"),
        ((features(1, 128, 10), None, 0), "num_quantizers=0"),
        ((features(1, 128, 10), None, 2.5), "num_quantizers=2.5"),
        (("speech.wav",), "input_features"),
    ],
)
@pytest.mark.parametrize("method", ["encode", "forward"])
def test_encode_and_forward(model, method, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(*arguments)


def codes(*shape: int, value: int = 0) -> torch.Tensor:
    return torch.full(shape, value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((codes(6, 10),), r"audio_codes have shape \(6, 10\)"),
        ((codes(1, 6, 0),), r"audio_codes have shape \(1, 6, 0\)"),
        ((codes(1, 0, 6),), r"audio_codes have shape \(1, 0, 6\)"),
        ((codes(1, 7, 10),), r"audio_codes hold 7 codebooks \(shape \(1, 7, 10\)\); accepted: 1 to 6"),
        ((codes(1, 6, 10).float(),), "audio_codes are torch.float32"),
        ((codes(1, 6, 10, value=-1),), "audio_codes of clip 0 hold -1 for codebook 0"),
        ((codes(1, 6, 10, value=16),), r"hold 16 for codebook 2 \(counted from 0\); accepted: 0 to 15"),
        ((codes(1, 1, 10, value=64),), "hold 64 for codebook 0"),
        ((codes(1, 6, 3), torch.tensor([[1, 0, 1]])), "audio_codes_mask of clip 0 is not a prefix"),
        ((codes(1, 6, 3), torch.ones(2, 3)), r"audio_codes_mask has shape \(2, 3\)"),
    ],
)
def test_decode(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.decode(*arguments)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_every_integer_type_of_codes_is_accepted(model, dtype):
    expected = model.decode(codes(1, 6, 4, value=15)).audio_values
    assert torch.equal(model.decode(codes(1, 6, 4, value=15).to(dtype)).audio_values, expected)


@pytest.mark.parametrize("lengths", [[], [3, 0], [-1]])
def test_layout_lengths(model, lengths):
    with pytest.raises(ValueError, match="lengths="):
        model.encoder_layout(lengths)
    with pytest.raises(ValueError, match="lengths="):
        model.decoder_layout(lengths)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("d_model", "1280"),
        ("encoder_layers", 3.0),
        ("codebook_size", "abc"),
        ("fmax", "x"),
        ("activation_function", [1]),
        ("encoder_attn_window_size", 5),
        ("encoder_attn_window_size", []),
        ("encoder_attn_window_size", [1.5, 2]),
        ("activation_function", "nonsense"),
        ("stride_size", 0),
        ("window_size", 2000),
        ("fmin", 12001.0),
        ("rope_theta", "x"),
        ("decoder_causal", "no"),
        ("decoder_kernel_size", 1),
        ("hop_length", 960),
        ("vocoder_padding", "center"),
        ("rope_type", "yarn"),
        ("ln_type", "BatchNorm"),
        ("encoder_attention_heads", 7),
        ("vocoder_attention_heads", 0),
        ("decoder_attn_window_size", [3]),
        ("encoder_attn_window_size", [-2, 3]),
        ("num_quantizers", 0),
        ("codebook_size", [16, 0]),
        ("codebook_size", []),
        ("encoder_skip_layer_id", 33),
        ("hybrid_attention", True),
        ("hop_length", 241),
    ],
)
def test_configuration(field, value):
    with pytest.raises(ValueError, match="swa_per_block" if field == "hybrid_attention" else field):
        MiMoAudioTokenizerConfig(**{field: value})
