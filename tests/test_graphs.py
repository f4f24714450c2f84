"""Calls as graphs run them, in buckets with a filler, without recording any: results are those of the plain calls."""

from __future__ import annotations

import copy
import pickle
import random
from threading import Thread

import pytest
import torch
from golden import load_golden

from mimo_audio_hf import (
    MiMoAudioTokenizerFeatureExtractor,
    decode_codes,
    encode_waveforms,
    load_model,
    optimize_for_inference,
)
from mimo_audio_hf import graphs as graphs_module
from mimo_audio_hf.graphs import GraphRunner


@pytest.fixture(params=["base", "no_skip_windowed", "causal_hybrid_encoder", "tiny"])
def model(request):
    return load_model("tiny", device="cpu") if request.param == "tiny" else load_golden(request.param)


@pytest.fixture
def runner(model):
    return GraphRunner(model.freeze(), capture=False)


def random_clips(count: int, seed: int) -> list[torch.Tensor]:
    generator = random.Random(seed)
    lengths = [generator.choice((1, 239, 480, 481, generator.randrange(481, 40000))) for _ in range(count)]
    noise = torch.Generator().manual_seed(seed)
    return [torch.randn(length, generator=noise) * 0.1 for length in lengths]


def features_of(model, clips: list[torch.Tensor]) -> list[torch.Tensor]:
    extractor = MiMoAudioTokenizerFeatureExtractor.from_config(model.config)
    return [extractor.log_mel_spectrogram(clip).t() for clip in clips]


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_clips_give_what_they_give_alone(model, runner, count):
    for seed in range(3):
        clips = random_clips(count, seed)
        features = features_of(model, clips)
        lengths = [len(each) for each in features]
        num_quantizers = random.Random(seed).randint(1, model.config.num_quantizers)
        expected = torch.cat(
            [model.encode(each.t()[None], num_quantizers=num_quantizers).audio_codes[0].t() for each in features]
        )
        assert torch.equal(runner.encode(torch.cat(features), lengths, num_quantizers), expected)
        samples = torch.cat(clips)
        assert torch.equal(runner.encode_waveforms(samples, [*map(len, clips)], num_quantizers), expected)
        if model.decoder is None:
            continue
        code_lengths = model.encoder.code_lengths(lengths)
        decoded = torch.cat(
            [model.decode(codes.t()[None]).audio_values.flatten() for codes in expected.split(code_lengths)]
        )
        actual = runner.decode(expected, code_lengths)
        torch.testing.assert_close(actual, decoded, rtol=0, atol=1e-5 * decoded.abs().max().item())


@torch.no_grad()
def test_padded_calls_of_a_model_with_a_runner(model, runner):
    features = features_of(model, random_clips(5, 0))
    lengths = torch.tensor([len(each) for each in features])
    padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True, padding_value=torch.nan).transpose(1, 2)
    mask = (torch.arange(padded.shape[2]) < lengths[:, None]).long()
    for batch in ((padded, mask), (features[0].t()[None], None)):
        model.graphs = None
        encoded = model.encode(*batch)
        decoded = None if model.decoder is None else model.decode(encoded.audio_codes, encoded.audio_codes_mask)
        model.graphs = runner
        before = len(runner._seen)
        again = model.encode(*batch)
        assert len(runner._seen) > before
        assert torch.equal(again.audio_codes, encoded.audio_codes)
        assert torch.equal(again.audio_codes_mask, encoded.audio_codes_mask)
        if decoded is not None:
            waveforms = model.decode(again.audio_codes, again.audio_codes_mask)
            scale = decoded.audio_values.abs().max().item()
            torch.testing.assert_close(waveforms.audio_values, decoded.audio_values, rtol=0, atol=1e-5 * scale)
            assert torch.equal(waveforms.audio_lengths, decoded.audio_lengths)
    hidden = model.encode(padded, mask, output_latents=True)
    assert hidden.latents is not None  # not by a graph


def test_what_is_not_finite_is_named(model, runner):
    model.graphs = runner
    features = torch.zeros(3, model.config.n_mels, 50)
    features[1, 3, 20] = torch.nan
    with pytest.raises(ValueError, match="clip 1 are NaN"):
        model.encode(features)
    # What that call has left behind is nobody's.
    features[1] = 0
    assert torch.equal(*(model.encode(each).audio_codes[0] for each in (features, features[:1])))


def test_long_calls_are_not_taken(runner, monkeypatch):
    assert runner.takes([1000, 1000])
    assert not runner.takes([42001])
    assert not runner.takes_codes([10501])


def test_few_shapes(runner):
    shapes = set()
    generator = random.Random(0)
    for _ in range(2000):
        frames = [generator.randint(200, 1000) for _ in range(64)]
        shapes.add(runner._shape_of("features", frames, 20))
        for shape in (runner._shape_of("features", frames[:1], 20), runner._shape_of("waveforms", frames, 20)):
            assert shape.total >= sum(frames[:1]) and shape.longest <= shape.total
    batches = [[1000] * 23 + [generator.randint(1, 1000)] for _ in range(100)]  # of up to 240 s, as jobs make them
    assert len(shapes) < 40
    assert len({runner._shape_of("waveforms", batch, 20) for batch in batches}) <= 3
    single = {runner._shape_of("codes", [frames], 20) for frames in range(1, 1000)}
    assert len(single) < 80


def test_old_graphs_go(runner, model, monkeypatch):
    monkeypatch.setattr(graphs_module, "MAX_GRAPHS", 2)
    sizes = 10, 100, 200, 400
    for frames in (*sizes, *sizes):
        runner.encode(torch.zeros(frames, model.config.n_mels), [frames], 1)
    assert len(runner._seen) == 4
    assert [shape.total >= size for shape, size in zip(runner._programs, (200, 400), strict=True)] == [True, True]


def test_a_model_that_was_changed_is_refused(runner, model):
    model.encoder.conv1.weight.data = model.encoder.conv1.weight.data.clone()
    with pytest.raises(RuntimeError, match="moved, cast or loaded"):
        runner.encode(torch.zeros(10, model.config.n_mels), [10], 1)


def test_copies_have_no_graphs(runner, model):
    model.graphs = runner
    assert copy.deepcopy(model).graphs is None
    assert pickle.loads(pickle.dumps(runner)) is None


def test_what_is_optimized_gives_the_same_on_a_cpu():
    clips = random_clips(3, 0)
    model = load_model("tiny", device="cpu")
    expected = encode_waveforms(model, clips)
    optimized = optimize_for_inference(load_model("tiny", device="cpu"))
    assert optimized.graphs is None and not any(each.requires_grad for each in optimized.parameters())
    assert all(map(torch.equal, encode_waveforms(optimized, clips), expected))
    optimized.graphs = GraphRunner(optimized, capture=False)
    assert all(map(torch.equal, encode_waveforms(optimized, clips), expected))
    for one, other in zip(decode_codes(optimized, expected), decode_codes(model, expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * other.abs().max().item())


def test_graphs_need_a_gpu():
    with pytest.raises(ValueError, match="cuda_graphs=True for a model on cpu; accepted: one NVIDIA GPU"):
        optimize_for_inference(load_model("tiny", device="cpu"), cuda_graphs=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recorded_graphs(dtype):
    plain = load_model("tiny", device="cuda", dtype=dtype)
    model = optimize_for_inference(load_model("tiny", device="cuda", dtype=dtype))
    batches = [random_clips(count, seed) for seed, count in enumerate([1, 3, 16, 1, 30, 2] * 4)]
    agreement, total = 0, 0
    for batch in batches + batches:
        expected, actual = encode_waveforms(plain, batch), encode_waveforms(model, batch)
        for one, other in zip(expected, actual, strict=True):
            assert one.shape == other.shape
            agreement += int((one == other).sum())
            total += one.numel()
        audio = decode_codes(plain, expected), decode_codes(model, expected)
        for one, other in zip(*audio, strict=True):
            assert one.shape == other.shape
            assert (one - other).norm() <= (1e-4 if dtype == "float32" else 0.1) * one.norm()
    assert agreement / total > (0.999 if dtype == "float32" else 0.8)
    recorded = model.graphs.recorded
    assert recorded > 10
    threads = [Thread(target=encode_waveforms, args=(model, batch)) for batch in batches]
    for thread in threads:
        thread.start()
    for batch, expected in zip(batches, [encode_waveforms(model, batch) for batch in batches], strict=True):
        assert all(map(torch.equal, encode_waveforms(model, batch), expected))
    for thread in threads:
        thread.join()
    assert model.graphs.recorded == recorded
