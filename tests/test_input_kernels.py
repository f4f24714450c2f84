"""Kernels before the first layer against what PyTorch computes; with TRITON_INTERPRET=1 without a GPU, too."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from kernel_device import DEVICE, needs_kernels

from mimo_audio_hf import MiMoAudioTokenizerConfig, MiMoAudioTokenizerFeatureExtractor, MiMoAudioTokenizerModel
from mimo_audio_hf import modeling_mimo_audio_tokenizer as modeling


pytestmark = [pytest.mark.gpu, needs_kernels]
pytest.importorskip("triton")
from mimo_audio_hf import input_kernels  # noqa: E402 (which imports Triton)


LENGTHS = ([1], [1, 2, 3, 4, 5, 6], [700, 1, 33, 256], [5] * 70)
CONFIGS = ({}, {"kernel_size": 5, "stride_size": 4, "avg_pooler": 3, "decoder_kernel_size": 4})


def make_model(**options) -> MiMoAudioTokenizerModel:
    sizes = {
        "d_model": 64,
        "encoder_layers": 1,
        "encoder_skip_layer_id": None,
        "decoder_layers": 1,
        "vocoder_num_layers": 1,
    }
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1, "codebook_size": [8], "num_quantizers": 1}
    return MiMoAudioTokenizerModel(MiMoAudioTokenizerConfig(**sizes, **heads, **options)).to(DEVICE)


def check_equal(found, expected) -> None:
    assert type(found) is type(expected)
    for field in fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(other, modeling.PackedSequences):
            check_equal(one, other)
        elif isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype, field.name
            assert torch.equal(one, other), field.name
        else:
            assert one == other, field.name


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("options", CONFIGS)
def test_layouts(lengths, options):
    model = make_model(**options)
    expected = model.encoder_layout(lengths, DEVICE), model.decoder_layout(lengths, DEVICE)
    model.encoder.optimized_layout = input_kernels.encoder_layout
    model.decoder.optimized_layout = input_kernels.decoder_layout
    check_equal(model.encoder_layout(lengths, DEVICE), expected[0])
    check_equal(model.decoder_layout(lengths, DEVICE), expected[1])


def test_layouts_with_empty_clips_of_lengths_that_the_device_alone_knows():
    model = make_model()
    lengths = torch.tensor([0, 4, 0, 0, 300, 0], device=DEVICE)
    bounds = [
        modeling.PackedBounds.of_tensor(each, int(each.sum()), 1 + int(each.max()))
        for each in model.decoder.level_lengths(lengths)
    ]
    check_equal(input_kernels.decoder_layout(model.decoder, bounds), model.decoder.layout_of(*bounds))
    bounds = [
        modeling.PackedBounds.of_tensor(each, int(each.sum()), int(each.max())) for each in (lengths, lengths, lengths)
    ]
    check_equal(input_kernels.encoder_layout(model.encoder, bounds), model.encoder.layout_of(*bounds))


def test_layouts_whose_later_levels_have_more_frames():
    """As a filler can make them."""
    model = make_model()
    lengths = torch.tensor([[3, 0, 7], [300, 5, 600], [1, 900, 70]], device=DEVICE)
    bounds = [modeling.PackedBounds.of_tensor(each, int(each.sum()), int(each.max())) for each in lengths]
    check_equal(input_kernels.encoder_layout(model.encoder, bounds), model.encoder.layout_of(*bounds))


def test_log_mel():
    """Of clips of all kinds: short ones, that end in the middle of a hop, without samples."""
    model = make_model()
    extractor = MiMoAudioTokenizerFeatureExtractor()
    sizes = [1, 480, 481, 0, 959, 960, 24000, 12345]
    torch.manual_seed(0)
    samples = torch.randn(sum(sizes), device=DEVICE) * 0.1
    frames = [extractor.num_frames(size) for size in sizes]
    frames[3] = 9  # of silence
    bounds = modeling.PackedBounds.of_levels(torch.tensor([sizes, frames]), DEVICE)
    expected = model.encoder.log_mel(samples, *bounds)
    model.encoder.optimized_log_mel = input_kernels.log_mel
    # Sums in another order. (The samples are loud enough for every bin: the logarithm does not magnify much.)
    torch.testing.assert_close(model.encoder.log_mel(samples, *bounds), expected, rtol=0, atol=2e-4)
    alone = [extractor.log_mel_spectrogram(clip).t() for clip in samples.split(sizes) if len(clip)]
    silence = torch.full((9, 128), 1e-7, device=DEVICE).log()
    alone.insert(3, silence)
    torch.testing.assert_close(expected, torch.cat(alone), rtol=0, atol=2e-4)
