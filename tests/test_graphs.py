"""Calls as graphs run them, in buckets with a filler, without recording any: results are those of the plain calls."""

from __future__ import annotations

import copy
import pickle
import random
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from golden import load_golden
from kernel_device import needs_gpu

from mimo_audio_hf import (
    MiMoAudioTokenizerFeatureExtractor,
    decode_codes,
    encode_waveforms,
    load_model,
    optimize_for_inference,
)
from mimo_audio_hf import graphs as graphs_module
from mimo_audio_hf.graphs import GraphRunner
from mimo_audio_hf.quantization import quantize


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


def test_long_calls_are_not_taken(runner):
    assert runner.takes([1001] * 8)
    assert runner.takes([9600])
    assert runner.takes_codes([2400])
    assert not runner.takes([9601])
    assert not runner.takes_codes([2401])
    with torch.autocast("cpu"):
        assert not runner.takes([3000])


def test_shapes_hold_their_clips_and_are_few(runner):
    generator = random.Random(0)
    batches: set = set()
    for _ in range(3000):
        frames = [generator.randint(1, 2000) for _ in range(generator.randint(1, 30))]
        while not runner.takes(frames):
            frames.pop()
        for inputs in ("features", "waveforms"):
            shape = runner._shape_of(inputs, frames, 20)
            filler = shape.total - sum(frames)
            assert filler >= 0 and shape.clips >= len(frames)
            assert shape.total >= shape.longest >= max(*frames, filler)
            assert shape.total <= max(64, 1.26 * sum(frames) + 1)
        batches.add(shape)
    assert len(batches) < 100
    assert len({runner._shape_of("codes", [frames], 20) for frames in range(1, 2401)}) < 32


@torch.no_grad()
def test_codes_of_other_calls_are_not_read(runner, model):
    """What an earlier call left is out of range in another's shape."""
    if model.decoder is None:
        pytest.skip("an encoder only")
    sizes = torch.tensor(model.config.codebook_sizes)
    large = (sizes - 1).repeat(30, 1)
    for codes in (large, large[:9, :2], large[:9, :1], large[:9, :3]):
        expected = model.decode(codes.t()[None]).audio_values.flatten()
        actual = runner.decode(codes, [len(codes)])
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_calls_in_and_out_of_inference_mode(model, runner):
    features = torch.zeros(20, model.config.n_mels)
    with torch.inference_mode():
        first = runner.encode(features, [20], 2).clone()
    for _ in range(2):
        assert torch.equal(runner.encode(features.clone(), [20], 2), first)
    with torch.inference_mode():
        assert torch.equal(runner.encode(features.clone(), [20], 2), first)


def test_threads_keep_their_results(runner, model, monkeypatch):
    """Results are copied before the next call, whose outputs are in the same place."""
    places: dict = {}
    run_program = type(runner)._program

    def in_place(self, shape, inputs, lengths):
        program = run_program(self, shape, inputs, lengths)

        def run():
            outputs, broken = program()
            return places.setdefault(shape, torch.empty_like(outputs)).copy_(outputs), broken

        return run

    monkeypatch.setattr(type(runner), "_program", in_place)
    clips = [torch.randn(20, model.config.n_mels, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    expected = [runner.encode(clip, [20], 2) for clip in clips]
    assert not torch.equal(expected[0], expected[1])
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda clip: runner.encode(clip, [20], 2), clips * 20))
    assert all(map(torch.equal, results, expected * 20))


def test_old_graphs_go(runner, model, monkeypatch):
    monkeypatch.setattr(graphs_module, "MAX_GRAPHS", 2)
    sizes = 10, 100, 200, 400
    for frames in (*sizes, *sizes):
        runner.encode(torch.zeros(frames, model.config.n_mels), [frames], 1)
    assert runner.recorded == 4
    # Those that went have to come twice again.
    assert [shape.total >= size for shape, size in zip(runner._programs, (200, 400), strict=True)] == [True, True]
    assert runner._seen == set(runner._programs)
    runner.clear()
    assert not runner._programs and not runner._seen


def test_a_model_that_was_changed_in_part_is_refused(runner, model):
    model.encoder.conv1.weight.data = model.encoder.conv1.weight.data.clone()
    with pytest.raises(RuntimeError, match="a part of the model was moved or cast"):
        runner.encode(torch.zeros(10, model.config.n_mels), [10], 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: model.to("cpu"),
        lambda model: model.load_state_dict(model.state_dict()),
        lambda model: model.set_attn_implementation("eager"),
        lambda model: quantize(model, "int8"),
    ],
)
def test_what_was_made_for_other_weights_goes(change):
    model = optimize_for_inference(load_model("tiny", device="cpu"))
    model.graphs = GraphRunner(model, capture=False)
    model.encoder.quantizer.optimized = lambda features, num_quantizers: 1 / 0
    assert load_model(model, device="cpu", dtype="float32").graphs is not None
    change(model)
    assert model.graphs is None and model.encoder.quantizer.optimized is None


def test_graphs_do_not_keep_the_model(model):
    kept = weakref.ref(model)
    model.graphs = GraphRunner(model, capture=False)
    copied = copy.deepcopy(model)
    copied.graphs = GraphRunner(copied, capture=False)
    reference = weakref.ref(copied)
    del copied
    assert reference() is None and kept() is model


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
@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recorded_graphs(dtype):
    plain, other = (
        load_model("tiny", device="cuda", dtype=dtype, attn_implementation=name) for name in (None, "sdpa")
    )
    model = optimize_for_inference(load_model("tiny", device="cuda", dtype=dtype), cuda_graphs=True)
    batches = [random_clips(count, seed) for seed, count in enumerate([1, 3, 16, 1, 30, 2] * 4)]
    same: list[torch.Tensor] = []
    for batch in batches + batches:
        codes = [torch.cat(encode_waveforms(each, batch)) for each in (plain, model, other)]
        same.append(torch.stack([codes[0] == codes[1], codes[0] == codes[2]]).float().mean(1))
        expected = encode_waveforms(plain, batch)
        audio = decode_codes(plain, expected), decode_codes(model, expected)
        for one, another in zip(*audio, strict=True):
            assert one.shape == another.shape
            assert (one - another).norm() <= (1e-4 if dtype == "float32" else 0.1) * one.norm()
    # Per codebook as near as two plain backends are to each other, but for chance.
    graphs, backends = torch.stack(same).mean(0)
    assert (graphs > backends - 0.02).all()
    recorded = model.graphs.recorded
    assert recorded > 10
    expected_codes = [encode_waveforms(model, batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda batch: encode_waveforms(model, batch), batches * 4))
    for result, codes_of_batch in zip(results, expected_codes * 4, strict=True):
        assert all(map(torch.equal, result, codes_of_batch))
    assert model.graphs.recorded == recorded
