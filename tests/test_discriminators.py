"""The discriminators against float64 computations of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mimo_audio_hf.training.discriminators import AudioDiscriminator, PeriodDiscriminator, STFTDiscriminator


SAMPLES = 600


def convolution(x: np.ndarray, layer: nn.Conv2d) -> np.ndarray:
    """(clips, in, height, width) to (clips, out, height, width), with the weight over its largest singular value."""
    weight = layer.parametrizations.weight.original.detach().double().numpy()
    weight = weight / np.linalg.svd(weight.reshape(len(weight), -1), compute_uv=False)[0]
    (up, side), (row_stride, column_stride), (dilation, _) = layer.padding, layer.stride, layer.dilation
    x = np.pad(x, ((0, 0), (0, 0), (up, up), (side, side)))
    height, width = weight.shape[2:]
    reach = dilation * (height - 1) + 1
    windows = np.lib.stride_tricks.sliding_window_view(x, (reach, width), axis=(2, 3))
    windows = windows[:, :, ::row_stride, ::column_stride, ::dilation]
    return np.einsum("nchwij,ocij->nohw", windows, weight) + layer.bias.detach().double().numpy()[:, None, None]


def outputs(x: np.ndarray, convs: nn.ModuleList) -> list[np.ndarray]:
    found = []
    for conv in convs[:-1]:
        x = convolution(x, conv)
        x = np.where(x > 0, x, 0.1 * x)
        found.append(x)
    return [*found, convolution(x, convs[-1])]


def converged(discriminator: nn.Module, waveforms: torch.Tensor) -> nn.Module:
    """Its power iterations run each time it looks at something in training mode."""
    with torch.no_grad():
        for module in discriminator.modules():
            if isinstance(module, nn.Conv2d):
                module.bias.normal_()
        for _ in range(300):
            discriminator.train()(waveforms)
    return discriminator.eval()


def waveforms(samples: int = SAMPLES) -> torch.Tensor:
    return torch.randn(2, samples, generator=torch.Generator().manual_seed(1)) * 0.3


@pytest.mark.parametrize("period", [2, 7])
def test_period_discriminator(period):
    torch.manual_seed(0)
    clips = waveforms()
    discriminator = converged(PeriodDiscriminator(period, (4, 6, 8)), clips)
    whole = SAMPLES // period * period
    x = clips.double().numpy()[:, :whole].reshape(2, 1, -1, period).swapaxes(2, 3)
    with torch.no_grad():
        actual = discriminator(clips)
    expected = outputs(x, discriminator.convs)
    assert len(actual) == len(expected) == 4
    for found, wanted in zip(actual, expected, strict=True):
        np.testing.assert_allclose(found.permute(0, 3, 1, 2).numpy(), wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_stft_discriminator():
    torch.manual_seed(0)
    clips = waveforms()
    discriminator = converged(STFTDiscriminator(128, 4), clips)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(128) / 128)
    window = window / np.sqrt((window**2).sum())
    frames = np.stack([clips.double().numpy()[:, start : start + 128] for start in range(0, SAMPLES - 127, 32)], 1)
    spectrum = np.fft.rfft(frames * window, axis=-1)
    with torch.no_grad():
        actual = discriminator(clips)
    expected = outputs(np.stack([spectrum.real, spectrum.imag], 1), discriminator.convs)
    assert len(actual) == len(expected) == 6
    for found, wanted in zip(actual, expected, strict=True):
        np.testing.assert_allclose(found.permute(0, 3, 1, 2).numpy(), wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_all_layers_have_spectral_norm():
    torch.manual_seed(0)
    discriminator = AudioDiscriminator(0.2)
    convs = [module for module in discriminator.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 5 * 6 + 5 * 6
    with torch.no_grad():
        for conv in convs:
            for _ in range(30):
                weight = conv.weight
            # Power iterations come from below, and slowly where singular values lie close together.
            assert 0.98 < torch.linalg.matrix_norm(weight.flatten(1), 2) < 1.05


def test_the_reports_sizes():
    with torch.device("meta"):
        discriminator = AudioDiscriminator()
    periods, stft = discriminator.periods.discriminators, discriminator.stft.discriminators
    assert [each.period for each in periods] == [2, 3, 5, 7, 11]
    assert [each.n_fft for each in stft] == [2048, 1024, 512, 256, 128]
    for each in periods:
        assert [conv.out_channels for conv in each.convs] == [32, 128, 512, 1024, 1024, 1]
    for each in stft:
        assert [conv.out_channels for conv in each.convs] == [32] * 5 + [1]


def test_segments_do_not_see_each_other():
    torch.manual_seed(0)
    discriminator = AudioDiscriminator(0.1).eval()
    clips = waveforms(4096)
    with torch.no_grad():
        together, alone = discriminator(clips, clips[1:])
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one[-1][1:], other[-1])


def test_bfloat16_rounds_activations_but_not_the_norm():
    torch.manual_seed(0)
    discriminator = AudioDiscriminator(0.1).eval()
    clips = waveforms(4096)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (half,) = discriminator(clips)
        weights = [module.weight.dtype for module in discriminator.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        (full,) = discriminator(clips)
    assert half[0][-1].dtype == torch.bfloat16
    for one, other in zip(half, full, strict=True):
        # Six layers, each rounded to 8 bits.
        assert (one[-1].float() - other[-1]).norm() / other[-1].norm() < 0.03
    assert set(weights) == {torch.float32}


def test_segments_that_are_too_short():
    with pytest.raises(ValueError, match="2048 samples or more"):
        AudioDiscriminator(0.1)(waveforms(2047))
    with pytest.raises(ValueError, match="accepted: a positive number"):
        AudioDiscriminator(0)
