from __future__ import annotations

import numpy as np
import pytest
import torch
from golden import GOLDEN
from safetensors.torch import load_file

from mimo_audio_hf import MiMoAudioTokenizerConfig, MiMoAudioTokenizerFeatureExtractor


@pytest.fixture
def extractor() -> MiMoAudioTokenizerFeatureExtractor:
    return MiMoAudioTokenizerFeatureExtractor()


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(samples, generator=torch.Generator().manual_seed(seed)) - 0.5


@pytest.mark.parametrize("name", ["mono_8k_ulaw", "stereo_44k1"])
def test_log_mels_are_torchaudios(extractor, name):
    expected = load_file(GOLDEN.parent / "audio" / "log_mel.safetensors")
    output = extractor(expected[f"{name}.audio_24k"], sampling_rate=24000)
    assert output.input_features.dtype == torch.float32
    # The filters are torchaudio's to the bit; what is left is the order of a sum.
    torch.testing.assert_close(output.input_features[0], expected[f"{name}.log_mel"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 239, 480, 481, 959, 960, 961, 24000])
def test_frames(extractor, samples):
    frames = 5 if samples <= 480 else 1 + samples // 240  # too short to reflect: zero-padded to 960 samples
    output = extractor(noise(samples), sampling_rate=24000)
    assert output.input_features.shape == (1, 128, frames)
    assert output.attention_mask.tolist() == [[1] * frames]
    if samples <= 480:
        padded = torch.nn.functional.pad(noise(samples), (0, 960 - samples))
        assert torch.equal(output.input_features, extractor(padded, sampling_rate=24000).input_features)


def test_a_batch_is_its_clips(extractor):
    clips = [noise(5000), noise(100, 1), noise(2400, 2)]
    output = extractor(clips, sampling_rate=24000)
    assert output.input_features.shape == (3, 128, 21)
    for row, mask, clip in zip(output.input_features, output.attention_mask, clips, strict=True):
        alone = extractor(clip, sampling_rate=24000).input_features[0]
        assert mask.sum() == alone.shape[1]
        assert torch.equal(row[:, : alone.shape[1]], alone)
        assert not row[:, alone.shape[1] :].any()


def test_kinds_of_input(extractor):
    clip = noise(1000)
    expected = extractor(clip, sampling_rate=24000).input_features
    for raw_audio in (
        clip.numpy(),
        clip.double(),
        clip.tolist(),
        [clip],
        [clip.tolist()],
        clip[None],
        clip.numpy()[None],
    ):
        torch.testing.assert_close(extractor(raw_audio, sampling_rate=24000).input_features, expected)
    reversed_view = clip.numpy()[::-1]
    torch.testing.assert_close(
        extractor(reversed_view, sampling_rate=24000).input_features, extractor(clip.flip(0), 24000).input_features
    )
    assert torch.equal(extractor(list(clip.numpy()), sampling_rate=24000).input_features, expected)
    assert extractor([clip.numpy(), clip], sampling_rate=24000).input_features.shape[0] == 2


def test_inference_mode_leaves_nothing_behind_that_training_trips_over():
    extractor = MiMoAudioTokenizerFeatureExtractor(feature_size=17)  # filters that no other test has cached
    with torch.inference_mode():
        extractor(noise(1000), sampling_rate=24000)
    waveform = noise(1000).requires_grad_()
    extractor.log_mel_spectrogram(waveform).sum().backward()
    assert waveform.grad.abs().sum() > 0


def test_numpy_output(extractor):
    output = extractor(noise(1000), sampling_rate=24000, return_tensors="np")
    assert isinstance(output["input_features"], np.ndarray)
    assert isinstance(output["attention_mask"], np.ndarray)


def test_padding(extractor):
    clips = [noise(5000), noise(2400)]
    output = extractor(clips, sampling_rate=24000, padding="max_length", max_length=30)
    assert output.input_features.shape == (2, 128, 30)
    assert output.attention_mask.sum(1).tolist() == [21, 11]
    same = extractor([noise(5000), noise(5001)], sampling_rate=24000, padding=False)
    assert same.input_features.shape == (2, 128, 21)
    with pytest.raises(ValueError, match="padding=False"):
        extractor(clips, sampling_rate=24000, padding=False)
    with pytest.raises(ValueError, match="max_length=20"):
        extractor(clips, sampling_rate=24000, padding="max_length", max_length=20)
    with pytest.raises(ValueError, match="padding='left'"):
        extractor(clips, sampling_rate=24000, padding="left")


@pytest.mark.parametrize(
    ("raw_audio", "message"),
    [
        ([], "no clips"),
        ([np.zeros(100, np.float32), []], "clip 1: empty"),
        ([np.zeros(100, np.float32), np.array([0.0, np.nan])], "clip 1: NaN or infinite"),
        ([0.0, float("inf")], "clip 0: NaN or infinite"),
        (np.array([0.0, 1e300]), "clip 0: NaN or infinite"),
        (np.zeros(100, np.int16), "clip 0: dtype torch.int16"),
        (np.zeros((1, 2, 100)), "clip 0: shape \\(2, 100\\)"),
        (["speech.wav"], "clip 0"),
        ("speech.wav", "raw_audio is a str"),
    ],
)
def test_bad_audio(extractor, raw_audio, message):
    with pytest.raises(ValueError, match=message):
        extractor(raw_audio, sampling_rate=24000)


@pytest.mark.parametrize("sampling_rate", [None, 16000, 48000])
def test_sampling_rate_is_never_guessed(extractor, sampling_rate):
    with pytest.raises(ValueError, match="sampling_rate"):
        extractor(noise(1000), sampling_rate=sampling_rate)


def test_save_and_load(extractor, tmp_path):
    MiMoAudioTokenizerFeatureExtractor(hop_length=120, fmax=8000.0).save_pretrained(tmp_path)
    loaded = MiMoAudioTokenizerFeatureExtractor.from_pretrained(tmp_path)
    assert (loaded.hop_length, loaded.fmax, loaded.nfft) == (120, 8000.0, 960)


def test_a_repository_with_only_a_config(extractor, tmp_path):
    loaded = MiMoAudioTokenizerFeatureExtractor.from_pretrained(GOLDEN / "base")
    assert loaded.to_dict() == extractor.to_dict()
    MiMoAudioTokenizerConfig(n_mels=80, fmin=20.0).save_pretrained(tmp_path)
    loaded = MiMoAudioTokenizerFeatureExtractor.from_pretrained(tmp_path)
    assert (loaded.feature_size, loaded.fmin) == (80, 20.0)
    (tmp_path / "preprocessor_config.json").write_text("{damaged")
    with pytest.raises(OSError, match="preprocessor_config.json"):
        MiMoAudioTokenizerFeatureExtractor.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="nothing_here"):
        MiMoAudioTokenizerFeatureExtractor.from_pretrained(tmp_path / "nothing_here")
