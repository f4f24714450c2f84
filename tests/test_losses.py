"""The training losses against float64 computations of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from mimo_audio_hf.training.audio_to_text import AudioToTextLoss, load_language_model
from mimo_audio_hf.training.losses import (
    MultiScaleMelLoss,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
)


LENGTHS = [4000, 2401, 3999]


def signals(seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.normal(scale=0.1, size=length).astype(np.float32) for length in LENGTHS]


def padded(clips: list[np.ndarray], padding: float) -> torch.Tensor:
    rows = torch.full((len(clips), max(map(len, clips))), padding)
    for row, clip in zip(rows, clips, strict=True):
        row[: len(clip)] = torch.from_numpy(clip)
    return rows


def mel64(clip: np.ndarray, scale: int) -> np.ndarray:
    """(2**scale, frames), from the definition."""
    bins, window_size, hop = 2**scale, 15 * 2 ** (scale - 1), 15 * 2 ** (scale - 2)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window_size) / window_size)
    extended = np.pad(clip.astype(np.float64), window_size // 2, mode="reflect")
    starts = range(0, len(extended) - window_size + 1, hop)
    frames = np.stack([extended[start : start + window_size] * window for start in starts], axis=-1)
    magnitude = np.abs(np.fft.rfft(frames, axis=0)) / np.sqrt((window**2).sum())
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 12000 / 700), bins + 2) / 2595) - 1)
    hertz = np.linspace(0, 12000, window_size // 2 + 1)
    filters = np.stack(
        [
            np.clip(np.minimum((hertz - low) / (center - low), (high - hertz) / (high - center)), 0, None)
            for low, center, high in zip(edges, edges[1:], edges[2:], strict=False)
        ]
    )
    return filters @ magnitude


@pytest.mark.parametrize("log", [False, True])
def test_mel_loss(log):
    predicted, target = signals(0), signals(1)
    expected = 0.0
    for scale in (5, 6, 7):
        differences = []
        for one, other in zip(predicted, target, strict=True):
            pair = [mel64(clip, scale) for clip in (one, other)]
            pair = [np.log(np.maximum(mel, 1e-5)) for mel in pair] if log else pair
            differences.append(np.abs(pair[0] - pair[1]).ravel())
        expected += np.concatenate(differences).mean()
    # Padding is NaN: it is not read.
    loss = MultiScaleMelLoss(log=log, log_floor=1e-5)(
        padded(predicted, np.nan), padded(target, np.nan), lengths=LENGTHS
    )
    assert loss.item() == pytest.approx(expected, rel=2e-6)


def test_shares_of_the_mel_loss_add_up_with_their_gradients():
    loss = MultiScaleMelLoss()
    target = padded(signals(1), 0.0)
    whole = padded(signals(0), 0.0).requires_grad_()
    expected = loss(whole, target, LENGTHS)
    expected.backward()
    shares = []
    for rows in (slice(0, 1), slice(1, 3)):
        lengths = LENGTHS[rows]
        part = whole.detach()[rows, : max(lengths)].clone().requires_grad_()
        share = loss(part, target[rows, : max(lengths)], lengths, batch_lengths=LENGTHS)
        share.backward()
        torch.testing.assert_close(part.grad, whole.grad[rows, : max(lengths)])
        shares.append(share.item())
    assert sum(shares) == pytest.approx(expected.item())


def test_silence_has_a_finite_gradient():
    for log in (False, True):
        predicted = torch.zeros(1, 4800, requires_grad=True)
        MultiScaleMelLoss(log=log)(predicted, torch.zeros(1, 4800)).backward()
        assert predicted.grad.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "lengths", "message"),
    [
        ((2, 3, 100), None, "accepted: \\(clips, samples\\)"),
        ((2, 480), None, "accepted: 481 to 480"),
        ((1, 999), [1000], "to 999"),
    ],
)
def test_bad_input_of_the_mel_loss(shape, lengths, message):
    with pytest.raises(ValueError, match=message):
        MultiScaleMelLoss()(torch.zeros(shape), torch.zeros(shape), lengths)


@pytest.fixture
def layers():
    """Layers' outputs of three sub-discriminators of unequal depth, real and fake."""
    generator = torch.Generator().manual_seed(0)

    def outputs() -> list[list[torch.Tensor]]:
        return [
            [torch.randn(2, 3, 5 + layer, generator=generator) * 2 for layer in range(depth)] for depth in (3, 4, 2)
        ]

    return outputs(), outputs()


def test_adversarial_losses(layers):
    real, fake = layers
    logits = [(r[-1].double().numpy(), f[-1].double().numpy()) for r, f in zip(real, fake, strict=True)]
    expected = np.mean([np.maximum(0, 1 - r).mean() + np.maximum(0, 1 + f).mean() for r, f in logits])
    assert discriminator_loss(real, fake).item() == pytest.approx(expected, rel=1e-6)
    expected = np.mean([np.maximum(0, 1 - f).mean() for _, f in logits])
    assert adversarial_loss(fake).item() == pytest.approx(expected, rel=1e-6)


def test_feature_matching_loss(layers):
    real, fake = layers
    real[0][0].requires_grad_()
    fake[0][0].requires_grad_()
    means = []
    for real_layers, fake_layers in zip(real, fake, strict=True):
        pairs = zip(real_layers[:-1], fake_layers[:-1], strict=True)
        means.append(np.mean([(one.detach().double() - other.detach().double()).abs().mean() for one, other in pairs]))
    expected = np.mean(means)
    loss = feature_matching_loss(real, fake)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert real[0][0].grad is None and fake[0][0].grad.any()


def test_feature_matching_of_large_layers():
    """Layers of a training step have tens of millions of elements: added up one by one, float32 would stand still."""
    layer = torch.full((20_000_000,), 0.1)
    loss = feature_matching_loss([[layer, layer]], [[layer + 0.3, layer]])
    assert loss.item() == pytest.approx(0.3, rel=1e-5)


FAMILIES = {
    "qwen2": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
              "intermediate_size": 24},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_audio_to_text_loss(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=50, **FAMILIES[family])
    loss = AudioToTextLoss(AutoModelForCausalLM.from_config(config, dtype=torch.float32), 8).eval()
    lengths, text_lengths = [5, 12, 7], [4, 1, 9]
    features = torch.randn(sum(lengths), 8, requires_grad=True)
    text_ids = torch.randint(50, (sum(text_lengths),))
    total = loss(features, lengths, text_ids, text_lengths)
    total.backward()

    # Each clip by itself, without padding, in float64.
    double = loss.double()
    exact = features.detach().double().requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for clip, ids in zip(exact.split(lengths), text_ids.split(text_lengths), strict=True):
        text = double.language_model.get_input_embeddings()(ids)
        inputs = torch.cat([double.projection(clip), text])[None]
        probabilities = double.language_model(inputs_embeds=inputs).logits[0].softmax(-1)
        predicted = probabilities[len(clip) - 1 : -1]
        expected = expected - predicted[torch.arange(len(ids)), ids].log().sum()
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(features.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_language_models_by_configuration(tmp_path):
    fields = {"model_type": "qwen2", **FAMILIES["qwen2"]}
    model, tokenizer = load_language_model(None, fields, None)
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer("né", add_special_tokens=False).input_ids == [byte + 3 for byte in "né".encode()]  # ByT5's
    model.save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"[UNK]": 0, "</s>": 1, "yes": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path / "words")
    again, saved = load_language_model(str(tmp_path), None, str(tmp_path / "words"))
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert saved("yes").input_ids == [2]
    for arguments, message in (
        ((None, None, None), "text_model or text_model_config"),
        ((str(tmp_path), fields, None), "text_model or text_model_config"),
        ((None, {"hidden_size": 8}, None), "no model_type"),
        ((None, {"model_type": "no-such-model"}, None), "no-such-model"),
        ((str(tmp_path / "none"), None, None), "none"),
    ):
        with pytest.raises(ValueError, match=message):
            load_language_model(*arguments)
