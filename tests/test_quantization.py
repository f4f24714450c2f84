"""Layers in 8 bits: how far they are from those in float32, and where they are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_device import needs_gpu
from torch import nn

from mimo_audio_hf import decode_codes, encode_waveforms, load_audio, load_model
from mimo_audio_hf.metrics import stoi
from mimo_audio_hf.quantization import QuantizedLinear, quantization_of, round_rows


SPEECH = Path(__file__).parent / "fixtures" / "audio" / "prompt_speech_en_m.wav"


def test_rows_are_rounded_to_their_own_largest():
    states = torch.randn(5, 40) * torch.tensor([1e-6, 1.0, 0.0, 1e4, 3.0])[:, None]
    rounded, scale = round_rows(states, torch.int8)
    assert (rounded.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (5, 1))
    largest = states.abs().amax(1)
    assert ((rounded * scale - states).abs().amax(1) <= largest / 254 * (1 + 1e-5)).all()
    assert (rounded.abs().amax(1) == torch.tensor([127, 127, 0, 127, 127])).all()
    # FP8 has three bits after the first, and its smallest numbers are 2**-9 of its scale.
    rounded, scale = round_rows(states, torch.float8_e4m3fn)
    error = (rounded.float() * scale - states).abs()
    assert (error <= states.abs() / 16 * (1 + 1e-5) + scale * 2**-10).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frames", [1, 70])
def test_a_layer(bias, dtype, frames):
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias).to(dtype)
    states = torch.randn(frames, 96, dtype=dtype)
    weight, weight_scale = round_rows(linear.weight.detach(), torch.int8)
    rounded, scale = round_rows(states, torch.int8)
    expected = (rounded.double() * scale) @ (weight.double() * weight_scale).t()
    if bias:
        expected = expected + linear.bias.double()
    with torch.inference_mode():
        actual = QuantizedLinear.from_linear(linear, torch.int8)(states)
        assert (actual.double() - linear(states).double()).norm() < 0.02 * expected.norm()
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-2)


def test_int8_speech_is_as_intelligible():
    waveform = load_audio(SPEECH)
    model, quantized = load_model("tiny", device="cpu"), load_model("tiny", device="cpu", dtype="int8")
    assert (quantization_of(model), quantization_of(quantized)) == (None, "int8")
    assert {layer.fc1.weight.dtype for layer in quantized.encoder.layers} == {torch.int8}
    (expected,), (actual,) = encode_waveforms(model, [waveform]), encode_waveforms(quantized, [waveform])
    agreement = (actual == expected).float().mean(0)
    assert agreement[0] > 0.9 and agreement.mean() > 0.7
    audio, exact = decode_codes(quantized, [expected])[0], decode_codes(model, [expected])[0]
    assert 10 * torch.log10(exact.square().sum() / (audio - exact).square().sum()) > 20  # dB
    recovered = decode_codes(quantized, [actual])[0][: len(waveform)]
    assert stoi(waveform, recovered, 24000) > 0.9


def test_what_is_quantized_stays_so(tmp_path):
    model = load_model("tiny", device="cpu", dtype="int8")
    assert load_model(model, dtype="int8") is load_model(model) is model
    with pytest.raises(ValueError, match="is quantized to int8; accepted: the dtype and the device that it has"):
        load_model(model, dtype="float32")
    with pytest.raises(ValueError, match="quantized to int8, which is not saved; accepted: the model it was made of"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_loaded_model_is_quantized_in_place():
    model = load_model("tiny", device="cpu")
    assert load_model(model, dtype="int8") is model
    assert quantization_of(model) == "int8"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_fp8_needs_a_gpu():
    with pytest.raises(ValueError, match="dtype='fp8' on cpu; accepted: a GPU of compute capability 8.9 or more"):
        load_model("tiny", device="cpu", dtype="fp8")


@pytest.mark.gpu
@needs_gpu
def test_fp8():
    waveform = load_audio(SPEECH)
    with pytest.raises(ValueError, match="dtype='int8' on cuda:0; accepted: on a CPU"):
        load_model("tiny", device="cuda:0", dtype="int8")
    if torch.cuda.get_device_capability() < (8, 9):
        with pytest.raises(ValueError, match="accepted: a GPU of compute capability 8.9"):
            load_model("tiny", device="cuda", dtype="fp8")
        return
    model = load_model("tiny", device="cuda", dtype="fp8")
    (codes,) = encode_waveforms(model, [waveform])
    assert stoi(waveform, decode_codes(model, [codes])[0][: len(waveform)].cpu(), 24000) > 0.88
