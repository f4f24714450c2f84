"""Upstream's interface: its quick start, and the tokenizer inside a model that is trained on its codes."""

from __future__ import annotations

import json

import pytest
import soundfile
import torch
from kernel_device import needs_gpu
from torch import nn

import mimo_audio_hf.compat as mimo_audio_tokenizer
from mimo_audio_hf import MiMoAudioTokenizerFeatureExtractor, MiMoAudioTokenizerModel, decode_codes, encode_waveforms


SAMPLES = (9600, 4000)  # 41 and 17 mel frames, 11 and 5 code frames


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint, tmp_path_factory):
    """The tiny checkpoint with the fields that upstream's own configuration file has."""
    directory = tmp_path_factory.mktemp("checkpoint")
    (directory / "model.safetensors").symlink_to(tiny_checkpoint / "model.safetensors")
    fields = json.loads((tiny_checkpoint / "config.json").read_text())
    for name in ("model_type", "architectures", "has_decoder"):
        fields.pop(name)
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


@pytest.fixture
def tokenizer(checkpoint):
    return mimo_audio_tokenizer.load_model(checkpoint)


@pytest.fixture(scope="module")
def clips():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(samples, generator=generator) * 0.1 for samples in SAMPLES]


@pytest.fixture
def batch(clips, tokenizer):
    return mimo_audio_tokenizer.padding(
        [mimo_audio_tokenizer.mel_spectrogram(clip, tokenizer.config) for clip in clips]
    )


def test_quick_start_gives_what_the_model_gives(checkpoint, clips, tmp_path):
    paths = []
    for number, clip in enumerate(clips):
        paths.append(tmp_path / f"{number}.wav")
        soundfile.write(paths[-1], clip.numpy(), 24000, subtype="FLOAT")

    tokenizer = mimo_audio_tokenizer.load_model(str(checkpoint))
    spectrograms = []
    for path in paths:
        wav = mimo_audio_tokenizer.load_audio(path, tokenizer.config.sampling_rate)
        spectrograms.append(mimo_audio_tokenizer.mel_spectrogram(wav, tokenizer.config))
    mels, mels_lens = mimo_audio_tokenizer.padding(spectrograms)
    codes, codes_lens, encode_timings = tokenizer.encode(mels, mels_lens)
    wavs, wavs_lens, decode_timings = tokenizer.decode(codes, codes_lens)

    extractor = MiMoAudioTokenizerFeatureExtractor.from_config(tokenizer.config)
    model = MiMoAudioTokenizerModel.from_pretrained(checkpoint)
    for i, clip in enumerate(clips):
        inputs = extractor(clip, sampling_rate=24000)
        expected = model.encode(**inputs).audio_codes
        torch.testing.assert_close(mels[i : i + 1, :, : mels_lens[i]], inputs["input_features"])
        assert torch.equal(codes[i, : codes_lens[i].item()], expected[0].T)
        with torch.no_grad():
            audio = model.decode(expected).audio_values[0]
        torch.testing.assert_close(wavs[i, :, : wavs_lens[i].item()], audio)

    assert mels.shape == (2, 128, 41) and mels_lens.tolist() == [41, 17]
    assert codes.shape == (2, 11, 20) and codes_lens.tolist() == [11, 5]
    assert wavs.shape == (2, 1, 960 * 11) and wavs_lens.tolist() == [960 * 11, 960 * 5]
    assert codes.dtype == torch.int64 and not codes[1, 5:].any()
    assert not wavs[1, :, 960 * 5 :].any()
    for timings in (encode_timings, decode_timings):
        assert timings and all(isinstance(seconds, float) and seconds > 0 for seconds in timings.values())


@pytest.mark.gpu
@needs_gpu
def test_quick_start_on_a_gpu(tokenizer, batch):
    tokenizer = tokenizer.bfloat16().cuda()
    mels, mels_lens = (tensor.cuda() for tensor in batch)
    codes, codes_lens, _ = tokenizer.encode(mels, mels_lens)
    wavs, wavs_lens, _ = tokenizer.decode(codes, codes_lens)
    assert {tensor.device.type for tensor in (codes, codes_lens, wavs, wavs_lens)} == {"cuda"}
    assert codes_lens.tolist() == [11, 5] and wavs_lens.tolist() == [960 * 11, 960 * 5]
    assert wavs.dtype == torch.float32 and wavs.isfinite().all()


def test_first_codebooks_only(tokenizer, batch):
    codes, lens, _ = tokenizer.encode(*batch)
    first, _, _ = tokenizer.encode(*batch, n_q=2)
    assert torch.equal(first, codes[..., :2])
    wavs, _, _ = tokenizer.decode(first, lens)
    assert wavs.shape == (2, 1, 960 * 11)


def test_one_clip_is_a_batch_of_one(tokenizer, batch):
    mels, lens = batch
    codes, codes_lens, _ = tokenizer.encode(*batch)
    alone, alone_lens, _ = tokenizer.encode(mels[1, :, : lens[1]], int(lens[1]))
    assert torch.equal(alone[0], codes[1, :5]) and alone_lens.tolist() == [5]
    wavs, _, _ = tokenizer.decode(codes, codes_lens)
    wav, wav_lens, _ = tokenizer.decode(alone[0], alone_lens)
    torch.testing.assert_close(wav[0], wavs[1, :, : 960 * 5])
    assert wav_lens.tolist() == [960 * 5]


def test_mel_spectrogram_takes_a_channel_dimension(tokenizer, clips):
    flat = mimo_audio_tokenizer.mel_spectrogram(clips[0], tokenizer.config)
    assert torch.equal(mimo_audio_tokenizer.mel_spectrogram(clips[0][None], tokenizer.config), flat)
    assert torch.equal(mimo_audio_tokenizer.mel_spectrogram(clips[0].numpy(), tokenizer.config), flat)


def test_forward_is_the_models(tokenizer, checkpoint, batch):
    mels, lens = batch
    mask = torch.arange(mels.shape[2]) < lens[:, None]
    model = MiMoAudioTokenizerModel.from_pretrained(checkpoint)
    with torch.no_grad():
        output, expected = tokenizer(mels, mask), model(mels, mask)
    assert torch.equal(output.audio_codes, expected.audio_codes)
    assert torch.equal(output.audio_values, expected.audio_values)


class AudioLanguageModel(nn.Module):
    def __init__(self, path):
        super().__init__()
        self.audio_tokenizer = mimo_audio_tokenizer.load_model(path)
        self.audio_tokenizer.freeze()
        self.embedding = nn.Embedding(1024, 8)

    def forward(self, mels, lens):
        codes, codes_lens, _ = self.audio_tokenizer.encode(mels, lens)
        mask = torch.arange(codes.shape[1]) < codes_lens[:, None]
        return (self.embedding(codes).sum(2) * mask[..., None]).square().mean()


def test_frozen_inside_a_model_in_training(checkpoint, batch):
    expected, _, _ = mimo_audio_tokenizer.load_model(checkpoint).encode(*batch)
    model = AudioLanguageModel(checkpoint).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(*batch).backward()
        optimizer.step()

    assert model.training and not model.audio_tokenizer.training
    assert torch.equal(model.audio_tokenizer.encode(*batch)[0], expected)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"embedding.weight"}
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == {"embedding.weight"}


def test_parts_of_a_surrounding_model(checkpoint, batch):
    model = AudioLanguageModel(checkpoint)
    upstream_keys = MiMoAudioTokenizerModel.from_pretrained(checkpoint).state_dict().keys()
    keys = {name.removeprefix("audio_tokenizer.") for name in model.state_dict() if name != "embedding.weight"}
    assert keys == upstream_keys

    # The codes of a model that was bfloat16 from the start, by whatever way it became so.
    expected = MiMoAudioTokenizerModel.from_pretrained(checkpoint, dtype=torch.bfloat16).encode(batch[0][:1])
    codes, codes_lens, _ = model.to("cpu").bfloat16().audio_tokenizer.encode(*batch)
    assert torch.equal(codes[0].T, expected.audio_codes[0])
    wavs, _, _ = model.audio_tokenizer.decode(codes, codes_lens)
    assert wavs.dtype == torch.float32 and wavs.isfinite().all()


def test_without_freezing_results_carry_no_gradient(tokenizer, batch):
    tokenizer.train()
    codes, codes_lens, _ = tokenizer.encode(*batch)
    wavs, _, _ = tokenizer.decode(codes, codes_lens)
    assert not wavs.requires_grad and not wavs.is_inference() and not codes.is_inference()
    assert torch.equal(tokenizer.eval().encode(*batch)[0], codes)


def test_saved_model_loads_as_either_class(tokenizer, tmp_path, batch):
    tokenizer.save_pretrained(tmp_path)
    expected, _, _ = tokenizer.encode(*batch)
    assert torch.equal(mimo_audio_tokenizer.load_model(tmp_path).encode(*batch)[0], expected)
    codes = MiMoAudioTokenizerModel.from_pretrained(tmp_path).encode(batch[0][:1]).audio_codes
    assert torch.equal(codes[0].T, expected[0])
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["MiMoAudioTokenizerModel"]


def test_this_packages_functions_take_the_model(tokenizer, checkpoint, clips):
    assert type(tokenizer) is type(mimo_audio_tokenizer.load_model("tiny")) is mimo_audio_tokenizer.MiMoAudioTokenizer
    model = MiMoAudioTokenizerModel.from_pretrained(checkpoint)
    codes, expected = encode_waveforms(tokenizer, clips), encode_waveforms(model, clips)
    for clip, reference in zip(codes, expected, strict=True):
        assert torch.equal(clip, reference)
    for clip, reference in zip(decode_codes(tokenizer, codes), decode_codes(model, codes), strict=True):
        assert torch.equal(clip, reference)


@pytest.mark.parametrize(
    ("lens", "message"),
    [
        ([41], r"lens are \[41\].*\(2,\) integers"),
        ([41, 0], r"lens are \[41, 0\].*from 1 to 41"),
        ([42, 17], r"lens are \[42, 17\].*from 1 to 41"),
        ([41.0, 17.0], r"lens are .*float32.*integers"),
    ],
)
def test_wrong_lengths_are_refused(tokenizer, batch, lens, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(batch[0], torch.tensor(lens))


def test_bad_input_is_refused(tokenizer, batch, clips):
    mels, lens = batch
    codes, codes_lens, _ = tokenizer.encode(mels, lens)
    nan = mels.clone()
    nan[1, 0, 3] = torch.nan
    for call, message in (
        (lambda: tokenizer.encode(mels[0, 0], 41), r"mels have shape \(41,\)"),
        (lambda: tokenizer.encode(mels[:, :5], lens), r"\(2, 5, 41\).*128"),
        (lambda: tokenizer.encode(nan, lens), "clip 1.*NaN"),
        (lambda: tokenizer.encode(mels, lens, n_q=21), "21; accepted: 1 to 20"),
        (lambda: tokenizer.decode(codes[0, 0], 1), r"codes have shape \(20,\)"),
        (lambda: tokenizer.decode(codes + 1024, codes_lens), "codebook 0.*0 to 1023"),
        (lambda: tokenizer.decode(codes, codes_lens + 1), "lens are"),
        (lambda: mimo_audio_tokenizer.mel_spectrogram(torch.zeros(2, 960), tokenizer.config), r"wav.*\(2, 960\)"),
        (lambda: mimo_audio_tokenizer.mel_spectrogram(clips[0].int(), tokenizer.config), "int32"),
        (lambda: mimo_audio_tokenizer.mel_spectrogram(clips[0][:0], tokenizer.config), "empty"),
        (lambda: mimo_audio_tokenizer.padding([]), "mels"),
        (lambda: mimo_audio_tokenizer.padding([mels[0], mels[0, :5]]), r"\(5, 41\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
