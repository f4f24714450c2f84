"""The discriminators' kernels against PyTorch in float64, and discriminators with them against those without."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from kernel_device import needs_gpu

from mimo_audio_hf.training import discriminators, losses


pytestmark = [pytest.mark.gpu, needs_gpu]
pytest.importorskip("triton")
from mimo_audio_hf.training import discriminator_kernels as kernels  # noqa: E402 (which imports Triton)


DEVICE, DTYPE = "cuda", torch.bfloat16


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, device=DEVICE, dtype=DTYPE, generator=generator)


@pytest.mark.parametrize(
    ("shape", "width", "widened"),
    [((2, 3, 7, 4), 5, 6), ((3, 20, 68, 32), 65, 66), ((2, 1, 40, 300), 40, 48), ((5, 11, 33, 64), 33, 33)],
)
@pytest.mark.parametrize("outputs", ["padded", "seen", "both"])
def test_bias_leaky_relu(shape, width, widened, outputs):
    states, bias = draw(*shape), draw(shape[3], seed=1)
    gradients = draw(*shape[:2], widened, shape[3], seed=2), draw(*shape[:2], width, shape[3], seed=3)
    used = {"padded": [0], "seen": [1], "both": [0, 1]}[outputs]

    ours = states.clone().requires_grad_(), bias.clone().requires_grad_()
    results = kernels.bias_leaky_relu(*ours, 0.1, width, widened)
    torch.autograd.backward([results[i] for i in used], [gradients[i] for i in used])

    references = states.double().requires_grad_(), bias.double().requires_grad_()
    seen = F.leaky_relu(references[0][:, :, :width] + references[1], 0.1)
    expected = F.pad(seen, (0, 0, 0, widened - width)), seen
    torch.autograd.backward([expected[i] for i in used], [gradients[i].double() for i in used])

    for actual, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(actual.double(), reference, rtol=2**-8, atol=1e-6)
    # A sum that is rounded to zero or less has the other slope: a few of many.
    wrong = (ours[0].grad.double() - references[0].grad).abs() > 2**-7 * references[0].grad.abs() + 1e-6
    assert wrong.float().mean() < 1e-3
    error = (ours[1].grad.double() - references[1].grad).norm() / references[1].grad.norm()
    assert error < 1e-2


@pytest.mark.parametrize("whole", [True, False])
def test_distance(whole):
    fake, real = draw(3, 5, 70, 32).requires_grad_(), draw(3, 5, 70, 32, seed=1)
    real[0, 0] = fake[0, 0].detach()
    width = 70 if whole else 65
    loss = kernels.distance(fake[:, :, :width], real[:, :, :width])
    loss.backward(torch.tensor(0.5, device=DEVICE))
    expected = (fake[:, :, :width].double() - real[:, :, :width].double()).abs().sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(fake.grad[:, :, :width], 0.5 * (fake - real).detach().sign()[:, :, :width])
    assert fake.grad[:, :, width:].abs().sum() == 0


@pytest.mark.parametrize("shape", ["flat", "permuted", "unequal rows"])
def test_feature_matching_of_other_layers(shape):
    fake, real = draw(4, 6, 10, 8), draw(4, 6, 10, 8, seed=1)
    if shape == "flat":
        fake, real = fake.flatten(1), real.flatten(1)
    elif shape == "permuted":
        fake, real = fake.permute(0, 3, 1, 2), real.permute(0, 3, 1, 2)
    else:
        fake, real = fake[:, :4], real[:, :4]
    loss = losses.feature_matching_loss([[real, real]], [[fake, fake]])
    expected = (fake.double() - real.double()).abs().mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=0)


def test_discriminators_with_kernels_are_those_without(monkeypatch):
    torch.manual_seed(0)
    discriminator = discriminators.AudioDiscriminator(0.25).to(DEVICE)
    waveforms = draw(2, 2, 4801).float() * 0.3
    results = []
    for with_kernels in (True, False):
        for module in (discriminators, losses):
            monkeypatch.setattr(module, "kernels_take", lambda states, answer=with_kernels: answer)
        judge = copy.deepcopy(discriminator)
        real, fake = waveforms[0], waveforms[1].clone().requires_grad_()
        real_layers, fake_layers = judge(real, fake)
        matching = losses.feature_matching_loss(real_layers, fake_layers)
        loss = losses.adversarial_loss(fake_layers) + 2 * matching
        (gradient,) = torch.autograd.grad(loss, fake, retain_graph=True)
        losses.discriminator_loss(real_layers, fake_layers).backward(inputs=list(judge.parameters()))
        assert all(layer.shape == other.shape for layer, other in zip(real_layers[0], fake_layers[0], strict=True))
        results.append(
            [matching, gradient]
            + [layer for layers in fake_layers for layer in layers]
            + [parameter.grad for parameter in judge.parameters()]
        )
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape
        # TF32's rounding of a dozen layers' products, at most.
        assert (actual - expected).norm() < 1e-2 * expected.norm() + 1e-7
