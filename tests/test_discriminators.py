"""The discriminators against float64 computations of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from mimo_audio_hf.training.discriminators import (
    AudioDiscriminator,
    MultiPeriodDiscriminator,
    MultiScaleSTFTDiscriminator,
    SpectralNormConvs,
)


SAMPLES = 600


def convolution(x: np.ndarray, layer: SpectralNormConvs) -> np.ndarray:
    """(clips, height, width, in) to (clips, height, width, out), with the weight over its largest singular value."""
    weight = layer.weight[0].detach().double().numpy()
    weight = weight / np.linalg.svd(weight.reshape(len(weight), -1), compute_uv=False)[0]
    height, width = weight.shape[2:]
    reach = layer.dilation * (height - 1) + 1
    x = np.pad(x, ((0, 0), (reach // 2, reach // 2), (width // 2, width // 2), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (reach, width), axis=(1, 2))
    windows = windows[:, :, :: layer.stride, :, :: layer.dilation]
    return np.einsum("nhwcij,ocij->nhwo", windows, weight) + layer.bias[0].detach().double().numpy()


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
        for conv in discriminator.convs:
            conv.bias.normal_()
        for _ in range(300):
            discriminator.train()(waveforms)
    return discriminator.eval()


def waveforms(samples: int = SAMPLES) -> torch.Tensor:
    return torch.randn(2, samples, generator=torch.Generator().manual_seed(1)) * 0.3


@pytest.mark.parametrize("period", [2, 7])
def test_period_discriminator(period):
    torch.manual_seed(0)
    clips = waveforms()
    discriminator = converged(MultiPeriodDiscriminator([period], (4, 6, 8)), clips)
    whole = SAMPLES // period * period
    x = clips.double().numpy()[:, :whole].reshape(2, -1, period, 1).swapaxes(1, 2)
    with torch.no_grad():
        ((actual,),) = discriminator(clips)
    expected = outputs(x, discriminator.convs)
    assert len(actual) == len(expected) == 4
    for found, wanted in zip(actual, expected, strict=True):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_stft_discriminator():
    torch.manual_seed(0)
    clips = waveforms()
    discriminator = converged(MultiScaleSTFTDiscriminator([128], 4), clips)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(128) / 128)
    window = window / np.sqrt((window**2).sum())
    frames = np.stack([clips.double().numpy()[:, start : start + 128] for start in range(0, SAMPLES - 127, 32)], 1)
    spectrum = np.fft.rfft(frames * window, axis=-1)
    with torch.no_grad():
        ((actual,),) = discriminator(clips)
    expected = outputs(np.stack([spectrum.real, spectrum.imag], -1), discriminator.convs)
    assert len(actual) == len(expected) == 6
    for found, wanted in zip(actual, expected, strict=True):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_all_layers_have_spectral_norm():
    torch.manual_seed(0)
    discriminator = AudioDiscriminator(0.2)
    convs = [module for module in discriminator.modules() if isinstance(module, SpectralNormConvs)]
    assert [len(conv.weight) for conv in convs] == [5] * 12
    assert sum(parameter.numel() for conv in convs for parameter in conv.parameters()) == sum(
        parameter.numel() for parameter in discriminator.parameters()
    )
    with torch.no_grad():
        for conv in convs:
            for _ in range(30):
                weights = conv.normalized()
            # Power iterations come from below, and slowly where singular values lie close together.
            norms = torch.linalg.matrix_norm(weights.flatten(2), 2)
            assert norms.min() > 0.98 and norms.max() < 1.05


def test_spectral_norm_is_torchs():
    torch.manual_seed(0)
    conv = SpectralNormConvs(2, 3, 4, (1, 5))
    plain = [spectral_norm(nn.Conv2d(3, 4, (1, 5))) for _ in range(2)]
    for i, each in enumerate(plain):
        with torch.no_grad():
            each.parametrizations.weight.original.copy_(conv.weight[i])
            each.parametrizations.weight[0]._u.copy_(conv.left[i])
            each.parametrizations.weight[0]._v.copy_(conv.right[i])
    expected, actual = torch.stack([each.weight for each in plain]), conv.normalized()
    torch.testing.assert_close(actual, expected)
    gradient = torch.randn_like(expected)
    (expected * gradient).sum().backward()
    (actual * gradient).sum().backward()
    gradients = torch.stack([each.parametrizations.weight.original.grad for each in plain])
    torch.testing.assert_close(conv.weight.grad, gradients)


def test_the_reports_sizes():
    with torch.device("meta"):
        discriminator = AudioDiscriminator()
    assert discriminator.periods.periods == [2, 3, 5, 7, 11]
    assert discriminator.stft.n_ffts == [2048, 1024, 512, 256, 128]
    sizes = [conv.weight.shape[1] for conv in discriminator.periods.convs]
    assert sizes == [32, 128, 512, 1024, 1024, 1]
    assert [conv.weight.shape[1] for conv in discriminator.stft.convs] == [32] * 5 + [1]


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
        weights = [module.normalized().dtype for module in discriminator.modules() if hasattr(module, "normalized")]
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
