"""Codes to audio while they are generated, and audio to codes while it is recorded."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from golden import GOLDEN, expected_clips, load_golden
from kernel_device import needs_gpu
from safetensors.torch import load_file

from mimo_audio_hf import (
    MiMoAudioTokenizerConfig,
    MiMoAudioTokenizerFeatureExtractor,
    MiMoAudioTokenizerModel,
    caching,
    decode_codes,
    encode_waveforms,
    load_audio,
    load_model,
    optimize_for_inference,
)
from mimo_audio_hf.checkpoints import PRESETS
from mimo_audio_hf.graphs import GraphRunner
from mimo_audio_hf.modeling_mimo_audio_tokenizer import PackedGroupNorm
from mimo_audio_hf.streaming import LOW_LATENCY, StreamingDecoder, StreamingDecoderPool, StreamingEncoder
from mimo_audio_hf.streaming import encoder as encoding


# Ways to stream of which the audio does not depend on how codes are cut into pushes, with contexts that matter.
CHUNKED = {
    "run again": {"left_context": 30, "right_context": 6, "chunk_frames": 8},
    "run again, faded": {"left_context": 30, "right_context": 6, "chunk_frames": 8, "crossfade_samples": 240},
    "no context": {"left_context": 0, "right_context": 0, "chunk_frames": 8},
    "cached": {"left_context": 30, "right_context": 6, "chunk_frames": 8, "cached": True},
    "cached, no right context": {"left_context": 30, "right_context": 0, "chunk_frames": 3, "cached": True},
    "cached, short vocoder": {
        "left_context": 30,
        "right_context": 3,
        "chunk_frames": 2,
        "cached": True,
        "vocoder_context": 4,
    },
    "low latency": dict(LOW_LATENCY),
}


@pytest.fixture(scope="module")
def base():
    return load_golden("base")


@pytest.fixture(scope="module")
def causal():
    return load_golden("causal_hybrid_encoder")


@pytest.fixture(scope="module")
def trained():
    return load_model("tiny", device="cpu")


@pytest.fixture(scope="module")
def speech():
    return load_audio(GOLDEN.parent / "audio" / "prompt_speech_en_m.wav")


def random_codes(model, frames: int, seed: int = 0, num_quantizers: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = model.config.codebook_sizes[:num_quantizers]
    return torch.stack([torch.randint(size, (frames,), generator=generator) for size in sizes], dim=1)


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed)) * 0.1


def random_chunks(data: torch.Tensor, most: int, seed: int) -> list[torch.Tensor]:
    generator, sizes = random.Random(seed), []
    while sum(sizes) < len(data):
        sizes.append(min(generator.randint(1, most), len(data) - sum(sizes)))
    return list(data.split(sizes))


def stream(decoder: StreamingDecoder | StreamingEncoder, chunks: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([decoder.push(chunk) for chunk in chunks] + [decoder.flush()])


def assert_equal_audio(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))


# --- Decoder ---


@pytest.mark.parametrize("frames", [25, 7])
def test_chunks_are_those_of_upstreams_streaming_decoder(base, frames):
    golden = load_file(GOLDEN / "streaming.safetensors")
    chunks = golden["codes"].split(frames)
    decoder = StreamingDecoder(base, left_context=60, right_context=10)
    pool = StreamingDecoderPool(base, left_context=60, right_context=10)
    other, pooled = pool.open(), pool.open()
    for number, codes in enumerate(chunks):
        last = number == len(chunks) - 1
        audio = decoder.push(codes, last=last)
        expected = golden[f"chunk{frames}.{number}"]
        assert audio.shape == expected.shape
        torch.testing.assert_close(audio, expected, rtol=0, atol=1e-4)
        beside = pool.push({other: codes.flip(0), pooled: codes}, last=[pooled] if last else [])
        torch.testing.assert_close(beside[pooled], expected, rtol=0, atol=1e-4)
    assert f"chunk{frames}.{len(chunks)}" not in golden


def test_upstreams_contexts_are_the_defaults(base):
    decoder = StreamingDecoder(base)
    assert len(decoder.push(random_codes(base, 40))) == 0
    assert len(decoder.push(random_codes(base, 1))) == 960
    codes = random_codes(base, 400)
    pieces = [decoder.reset(), *(decoder.push(chunk) for chunk in codes.split(100))][1:]
    # The third chunk sees the 250 frames before it, no more.
    seen = decode_codes(base, [codes[:300]])[0][: 260 * 960]
    assert_equal_audio(pieces[2], seen[160 * 960 :])
    seen = decode_codes(base, [codes[50:400]])[0]
    assert_equal_audio(pieces[3], seen[210 * 960 : 310 * 960])


@pytest.mark.parametrize("way", CHUNKED)
def test_random_pushes_give_what_fixed_ones_give(base, way):
    options = CHUNKED[way]
    for length in (1, 7, 14, 15, 133):
        codes = random_codes(base, length, seed=length)
        fixed = stream(StreamingDecoder(base, **options), codes.split(options["chunk_frames"]))
        assert len(fixed) == len(decode_codes(base, [codes])[0]) == 960 * length
        for seed in range(3):
            assert_equal_audio(stream(StreamingDecoder(base, **options), random_chunks(codes, 40, seed)), fixed)
        decoder = StreamingDecoder(base, **options)
        assert_equal_audio(decoder.push(codes, last=True), fixed)


@pytest.mark.parametrize("way", ["run again", "cached"])
def test_when_audio_comes(base, way):
    """A chunk and right context at first, so that statistics and keys of fewer frames do not stay in a cache."""
    decoder = StreamingDecoder(base, **CHUNKED[way])
    lengths = [len(decoder.push(frame)) // 960 for frame in random_codes(base, 30).split(1)]
    emitted = torch.tensor(lengths).cumsum(0).tolist()
    first = [0] * 13 + [8] if way == "cached" else [0] * 7 + [2] * 7
    assert emitted[:14] == first
    assert emitted[21:23] == ([16, 16] if way == "cached" else [10, 10])


@pytest.mark.parametrize("way", ["run again", "run again, faded", "no context", "cached"])
@pytest.mark.parametrize("length", [14, 15, 22, 24, 64])
def test_a_stream_that_ends_with_its_push_takes_no_run_more(base, monkeypatch, way, length):
    """But for a cached one that ends with a full chunk: the first has 14 frames there, the others 8."""
    codes, runs = random_codes(base, length), []
    forward = type(base.decoder.vocoder).forward
    monkeypatch.setattr(type(base.decoder.vocoder), "forward", lambda *args: runs.append(None) or forward(*args))
    options = CHUNKED[way]
    flushed = StreamingDecoder(base, **options)
    expected = torch.cat([flushed.push(codes), flushed.flush()])
    runs.clear()
    assert_equal_audio(StreamingDecoder(base, **options).push(codes, last=True), expected)
    assert len(runs) == (2 + (length - 14) // 8 if way == "cached" else -(-length // 8))


@pytest.mark.parametrize("length", [60, 61, 80])
def test_codes_in_chunks_are_those_of_long_decoding(base, monkeypatch, length):
    """However they end: after a full chunk, too, the last frames see as far back as the chunk did."""
    constants = {"MAX_WHOLE_FRAMES": 50, "PIECE_CHUNK": 20, "PIECE_LEFT_CONTEXT": 10, "PIECE_RIGHT_CONTEXT": 4}
    for name, value in constants.items():
        monkeypatch.setattr(f"mimo_audio_hf.inference.{name}", value)
    codes = random_codes(base, length)
    (expected,) = decode_codes(base, [codes])
    decoder = StreamingDecoder(base, left_context=10, right_context=4, chunk_frames=20, crossfade_samples=240)
    assert_equal_audio(stream(decoder, codes.split(7)), expected)


@pytest.mark.parametrize("of_numpy", [False, True])
def test_codes_that_wait_are_not_those_that_the_caller_writes_next(base, of_numpy):
    codes = random_codes(base, 30)
    expected = stream(StreamingDecoder(base, **CHUNKED["run again"]), [codes])
    decoder = StreamingDecoder(base, **CHUNKED["run again"])
    pool = StreamingDecoderPool(base, **CHUNKED["run again"])
    name, audio, pooled = pool.open(), [], []
    reused = torch.empty(1, 6, dtype=torch.long)
    given = reused.numpy() if of_numpy else reused  # of the same memory
    for frame in codes.split(1):
        reused.copy_(frame)
        audio.append(decoder.push(given))
        pooled.append(pool.push({name: given})[name])
    assert_equal_audio(torch.cat([*audio, decoder.flush()]), expected)
    assert_equal_audio(torch.cat([*pooled, pool.flush([name])[name]]), expected)


def test_pushes_are_chunks_unless_chunks_have_a_size(base):
    codes = random_codes(base, 120)
    decoder = StreamingDecoder(base, left_context=20, right_context=5)
    for seed in range(3):
        assert len(stream(decoder, random_chunks(codes, 40, seed))) == 960 * 120
        decoder.reset()


def interleave(
    pool: StreamingDecoderPool, chunks: list[list[torch.Tensor]], seed: int, with_last: bool
) -> list[torch.Tensor]:
    """The audio of as many streams, some of which get their next chunk in a call, where others come and go.

    `with_last`: half of them end with their last chunk, not after it. (Where pushes are chunks, to end after it is to
    push an empty chunk more.)
    """
    generator = random.Random(seed)
    names = [pool.open() for _ in chunks]
    audio: list[list[torch.Tensor]] = [[] for _ in chunks]
    waiting = {index: list(each) for index, each in enumerate(chunks)}
    while waiting:
        some = generator.sample(sorted(waiting), generator.randint(1, len(waiting)))
        pushed = {names[index]: waiting[index].pop(0) for index in some}
        last = [names[index] for index in some if with_last and not waiting[index] and index % 2]
        for name, samples in pool.push(pushed, last=last).items():
            audio[names.index(name)].append(samples)
        for index in [index for index in some if not waiting[index]]:
            del waiting[index]
            if names[index] not in last:
                audio[index].append(pool.flush([names[index]])[names[index]])
            # Its place is taken by another stream, which must not see anything of it.
            pool.close(names[index])
            pool.push({pool.open(): random_codes(pool.model, 9, seed=index)})
    return [torch.cat(pieces) for pieces in audio]


@pytest.mark.parametrize("way", ["upstream", *CHUNKED])
def test_sixteen_interleaved_streams_are_sixteen_separate_ones(base, way):
    options = CHUNKED.get(way, {"left_context": 20, "right_context": 5})
    lengths = random.Random(0)
    codes = [random_codes(base, lengths.randint(1, 120), seed, 1 + seed % 6) for seed in range(16)]
    chunks = [random_chunks(each, 40, seed) for seed, each in enumerate(codes)]
    separate = [stream(StreamingDecoder(base, **options), each) for each in chunks]
    interleaved = interleave(StreamingDecoderPool(base, **options), chunks, 0, with_last=way != "upstream")
    for audio, expected in zip(interleaved, separate, strict=True):
        assert_equal_audio(audio, expected)


@pytest.mark.parametrize("way", ["run again", "cached", "low latency"])
def test_streams_go_on_where_a_pool_grows(base, way):
    codes = [random_codes(base, 64, seed) for seed in range(5)]
    expected = [stream(StreamingDecoder(base, **CHUNKED[way]), [each]) for each in codes]
    pool = StreamingDecoderPool(base, **CHUNKED[way])
    audio: dict[int, list[torch.Tensor]] = {}
    for step in range(12):
        if step < 5:
            audio[pool.open()] = []  # room is made for 1, 2, 4 and 8
        # A stream has begun as many steps ago as were before it.
        pushed = {name: codes[name][8 * (step - name) :][:8] for name in audio if 0 <= step - name < 8}
        for name, samples in pool.push(pushed, last=[name for name in pushed if step - name == 7]).items():
            audio[name].append(samples)
    for name, samples in enumerate(expected):
        assert_equal_audio(torch.cat(audio[name]), samples)


@pytest.mark.parametrize("part", ["KeyValueCache", "RunningGroupNorm"])
def test_a_stream_is_opened_or_not(base, monkeypatch, part):
    """Where memory does not suffice for more streams, there is room for them when they are asked for again."""
    pool = StreamingDecoderPool(base, **CHUNKED["cached"])
    codes = random_codes(base, 40)
    names = [pool.open()]
    pieces = [pool.push({names[0]: codes[:20]})[names[0]]]
    with monkeypatch.context() as patch:
        patch.setattr(getattr(caching, part), "add_rows", out_of_memory_error)
        with pytest.raises(torch.OutOfMemoryError):
            pool.open()
    assert pool.streams == names
    names.append(pool.open())
    audio = pool.push({names[0]: codes[20:], names[1]: codes}, last=names)
    expected = stream(StreamingDecoder(base, **CHUNKED["cached"]), [codes])
    assert_equal_audio(torch.cat([*pieces, audio[names[0]]]), expected)
    assert_equal_audio(audio[names[1]], expected)


def out_of_memory_error(*args):
    raise torch.OutOfMemoryError("injected")


@pytest.mark.parametrize("way", ["upstream", *CHUNKED])
def test_a_stream_that_was_reset_is_a_new_one(base, way):
    options = CHUNKED.get(way, {"left_context": 20, "right_context": 5})
    codes = random_codes(base, 50)
    decoder = StreamingDecoder(base, **options)
    expected = stream(decoder, codes.split(10))
    for before in (0, 30):  # ended, or in the middle of something else
        decoder.reset()
        decoder.push(random_codes(base, before, seed=1, num_quantizers=2))
        decoder.reset()
        assert_equal_audio(stream(decoder, codes.split(10)), expected)
    pool = StreamingDecoderPool(base, **options)
    name = pool.open()
    pool.push({name: random_codes(base, 30, num_quantizers=2)})
    pool.reset(name)
    pieces = [pool.push({name: chunk})[name] for chunk in codes.split(10)] + [pool.flush([name])[name]]
    assert_equal_audio(torch.cat(pieces), expected)


@pytest.mark.parametrize("before", [0, 30])
def test_a_stream_that_was_reset_is_for_as_many_codebooks_as_it_was_opened_for(base, before):
    pool = StreamingDecoderPool(base, **CHUNKED["cached"])
    name = pool.open(num_quantizers=2)
    decoder = StreamingDecoder(base, num_quantizers=2, **CHUNKED["cached"])
    codes = random_codes(base, before, num_quantizers=2)
    pool.push({name: codes})
    decoder.push(codes)
    for _ in range(2):
        pool.reset(name)
        decoder.reset()
        for push in (decoder.push, lambda codes: pool.push({name: codes})):
            with pytest.raises(ValueError, match="are of 3 codebooks; accepted: 2"):
                push(random_codes(base, 3, num_quantizers=3))


def test_nothing_of_a_stream_is_left_after_a_reset(base):
    """Not even what is not finite, which a mask does not take away."""
    codes = random_codes(base, 50)
    expected = stream(StreamingDecoder(base, **CHUNKED["cached"]), [codes])
    pool = StreamingDecoderPool(base, **CHUNKED["cached"])
    name = pool.open()
    pool.push({name: random_codes(base, 30, seed=1)})
    cache = pool._cache
    norms = [each for norm in (cache.norm1, cache.norm2) for each in (norm.mean, norm.variance)]
    for kept in (*cache.layers.tensors(), cache.tails, cache.mels, *norms):
        with torch.inference_mode():
            kept.fill_(math.nan)
        pool.reset(name)
        assert_equal_audio(torch.cat([pool.push({name: codes})[name], pool.flush([name])[name]]), expected)
        pool.reset(name)


def without_statistics(monkeypatch) -> None:
    """Group norms that take every clip's mean to be 0.1 and its variance 2."""

    def forward(norm, hidden_states, sequences):
        return (hidden_states - 0.1) * (2 + norm.eps) ** -0.5 * norm.weight + norm.bias

    def include(norm, hidden_states, *rows):
        mean = hidden_states.new_full((len(hidden_states),), 0.1)
        return mean, torch.full_like(mean, 2.0)

    monkeypatch.setattr(PackedGroupNorm, "forward", forward)
    monkeypatch.setattr(caching.RunningGroupNorm, "include", include)


@pytest.mark.parametrize("turned", [False, True])
def test_caches_are_exact_but_for_the_norms_statistics(base, monkeypatch, turned):
    without_statistics(monkeypatch)
    if turned:  # positions begin anew again and again
        monkeypatch.setattr(caching, "MAX_POSITION", 50)
    codes = random_codes(base, 150)
    (whole,) = decode_codes(base, [codes])
    # Two layers of the vocoder see 10 mel frames ahead each, the inverse STFT 2: 6 frames of codes.
    options = {"left_context": 150, "right_context": 6, "chunk_frames": 4, "cached": True}
    assert_equal_audio(stream(StreamingDecoder(base, **options), codes.split(9)), whole)
    # Two layers of 40 mel frames and the inverse STFT's 4 reach 21 frames of codes back from those that are given out.
    assert_equal_audio(stream(StreamingDecoder(base, **options, vocoder_context=27), codes.split(9)), whole)
    audio = stream(StreamingDecoder(base, **options, vocoder_context=15), codes.split(9))
    assert (audio - whole).abs().max() > 1e-4 * whole.abs().max()
    # Every frame sees as many before it as it is told to, in each of the layers: 30 frames of codes are 60 of theirs.
    windowed = copy.deepcopy(base)
    windowed.decoder.windows = [(60, 0)]
    for layer in windowed.decoder.layers:
        layer.self_attn.window = (60, 0)
    (expected,) = decode_codes(windowed, [codes])
    audio = stream(StreamingDecoder(base, **options | {"left_context": 30}), codes.split(9))
    assert_equal_audio(audio, expected)
    assert (audio - whole).abs().max() > 1e-2 * whole.abs().max()


@pytest.mark.parametrize("chunk_frames", [1, 5, 20])
def test_the_statistics_of_a_streams_norms_become_those_of_the_whole_clip(base, monkeypatch, chunk_frames):
    codes = random_codes(base, 60)
    seen = []

    def forward(norm, hidden_states, sequences):
        seen.append((hidden_states.mean(), hidden_states.var(correction=0), len(hidden_states)))
        return original(norm, hidden_states, sequences)

    original = PackedGroupNorm.forward
    monkeypatch.setattr(PackedGroupNorm, "forward", forward)
    decode_codes(base, [codes])
    monkeypatch.undo()
    mean, variance, _ = seen[0]  # of the first norm, which sees the codes alone

    last, counted = {}, Counter()
    include = caching.RunningGroupNorm.include

    def remember(norm, *args):
        counted[norm.norm] += args[0].shape[1]
        last[norm.norm] = include(norm, *args)
        return last[norm.norm]

    monkeypatch.setattr(caching.RunningGroupNorm, "include", remember)
    stream(StreamingDecoder(base, chunk_frames=chunk_frames, right_context=2, cached=True), [codes])
    torch.testing.assert_close(last[base.decoder.dconv1.norm][0].squeeze(), mean)
    torch.testing.assert_close(last[base.decoder.dconv1.norm][1].squeeze(), variance)
    if chunk_frames > 1:  # else the last chunk has no frames
        # The second norm's are over what is cut from a clip's end, too.
        assert counted[base.decoder.dconv2.norm] == seen[1][2] == 60 * 4 + 1


@pytest.mark.parametrize("way", ["upstream", "run again", "cached", "low latency"])
def test_calls_of_the_sizes_that_graphs_have_give_the_same(base, way):
    """As on a GPU after `optimize_for_inference`, but for the recording."""
    options = CHUNKED.get(way, {"left_context": 20, "right_context": 5})
    model = copy.deepcopy(base).freeze()
    model.graphs = GraphRunner(model, capture=False)
    chunks = [random_chunks(random_codes(base, 50 + 9 * seed, seed), 12, seed) for seed in range(6)]
    separate = [stream(StreamingDecoder(base, **options), each) for each in chunks]
    for seed in range(3):
        pool = StreamingDecoderPool(model, **options)
        interleaved = interleave(pool, chunks, seed, with_last=way != "upstream")
        for audio, expected in zip(interleaved, separate, strict=True):
            assert_equal_audio(audio, expected)
        # (What runs again runs as any call of the model.)
        assert pool._cache is None or pool._cache._programs


def test_windows_run_in_the_sizes_that_graphs_have(base):
    model = copy.deepcopy(base).freeze()
    model.graphs = GraphRunner(model, capture=False)
    waveform = noise(60_000)
    options = {"left_context": 10, "right_context": 3, "chunk_frames": 4}
    expected = stream(StreamingEncoder(base, **options), [waveform])
    assert torch.equal(stream(StreamingEncoder(model, **options), random_chunks(waveform, 5000, 0)), expected)
    assert model.graphs.recorded  # sizes come again


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("way", ["upstream", "run again", "cached", "low latency"])
def test_streams_on_a_gpu_are_those_on_the_cpu(trained, way):
    options = CHUNKED.get(way, {"left_context": 20, "right_context": 5})
    model = optimize_for_inference(copy.deepcopy(trained).to("cuda"))
    chunks = [random_chunks(random_codes(trained, 90 + 9 * seed, seed), 12, seed) for seed in range(6)]
    separate = [stream(StreamingDecoder(trained, **options), each) for each in chunks]
    for seed in range(3):  # sizes come again, as graphs
        interleaved = interleave(StreamingDecoderPool(model, **options), chunks, seed, with_last=way != "upstream")
        for audio, expected in zip(interleaved, separate, strict=True):
            torch.testing.assert_close(audio, expected, rtol=0, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("way", ["upstream", *CHUNKED])
def test_the_first_audio_comes_when_it_is_said_to(base, way):
    options = CHUNKED.get(way, {"left_context": 20, "right_context": 5})
    decoder = StreamingDecoder(base, **options)
    lengths = [len(decoder.push(frame)) for frame in random_codes(base, 40).split(1)]
    first = next(number for number, length in enumerate(lengths, start=1) if length)
    assert decoder.first_audio_frames == StreamingDecoderPool(base, **options).first_audio_frames == first


def test_what_low_latency_is_told_to_change_changes_what_depends_on_it(base):
    assert StreamingDecoder(base).first_audio_frames == 41
    assert StreamingDecoder.low_latency(base).first_audio_frames == 10
    codes = random_codes(base, 90)
    for changes, options in (
        ({"cached": False}, {"right_context": 5, "chunk_frames": 5, "crossfade_samples": 240}),
        ({"chunk_frames": None}, {"right_context": 5, "crossfade_samples": 240}),
        ({"right_context": 0}, {"right_context": 0, "chunk_frames": 5, "cached": True, "vocoder_context": 40}),
        (
            {"right_context": 60, "left_context": 70},
            {
                "left_context": 70,
                "right_context": 60,
                "chunk_frames": 5,
                "crossfade_samples": 240,
                "cached": True,
                "vocoder_context": 60,
            },
        ),
        ({"right_context": 300, "cached": False}, {"left_context": 300, "right_context": 300, "chunk_frames": 5}),
    ):
        expected = stream(StreamingDecoder(base, **options), codes.split(9))
        assert_equal_audio(stream(StreamingDecoder.low_latency(base, **changes), codes.split(9)), expected)
        pool = StreamingDecoderPool.low_latency(base, **changes, capacity=2)
        assert pool.first_audio_frames == StreamingDecoder(base, **options).first_audio_frames


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cached": True, "chunk_frames": None}, "cached=True without chunk_frames"),
        ({"cached": False, "vocoder_context": 9}, "vocoder_context=9 without cached=True"),
        ({"crossfade_samples": 9, "right_context": 0}, "crossfade_samples=9; accepted: 0 to 0"),
        ({"left_context": 4}, "left_context=4; accepted: 5 \\(right_context\\) or more"),
        ({"right_context": "5"}, "right_context='5'; accepted: 0 or more"),
    ],
)
def test_what_low_latency_is_told_is_what_its_errors_are_about(base, changes, message):
    with pytest.raises(ValueError, match=message):
        StreamingDecoder.low_latency(base, **changes)


def test_the_preset_cannot_be_changed_by_accident():
    with pytest.raises(TypeError):
        LOW_LATENCY["right_context"] = 0


def test_low_latency_gives_audio_after_ten_frames(trained, speech):
    (codes,) = encode_waveforms(trained, [speech])
    decoder = StreamingDecoder.low_latency(trained)
    pieces = [decoder.push(frame) for frame in codes[:30].split(1)]
    assert [len(piece) > 0 for piece in pieces].index(True) < 10  # 0.4 s
    # From then on never more than a chunk behind.
    emitted = torch.tensor([len(piece) for piece in pieces]).cumsum(0) // 960
    behind = torch.arange(1, 31) - emitted
    assert behind.max() < LOW_LATENCY["right_context"] + LOW_LATENCY["chunk_frames"] + 1


def test_low_latency_is_near_the_whole_clip(trained, speech):
    (codes,) = encode_waveforms(trained, [speech])
    (whole,) = decode_codes(trained, [codes])
    audio = stream(StreamingDecoder.low_latency(trained), codes.split(3))
    ratio = whole.square().sum() / (audio - whole).square().sum()
    assert 10 * math.log10(ratio) > 24  # dB; 26.3 were measured of this clip, docs/streaming.md has others


@pytest.mark.parametrize("way", ["run again", "cached"])
def test_a_streams_memory_does_not_grow(base, way):
    pool = StreamingDecoderPool(base, **CHUNKED[way])
    name = pool.open()

    def held() -> int:
        stream = pool._streams[name]
        tensors = [*stream.pending, stream.buffer, stream.fading]
        if pool._cache is not None:
            cache = pool._cache
            tensors += [*cache.layers.tensors(), cache.tails, cache.mels]
            tensors += [each for norm in (cache.norm1, cache.norm2) for each in (norm.mean, norm.variance)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)

    sizes = []
    for chunk in random_codes(base, 400).split(16):
        pool.push({name: chunk})
        sizes.append(held())
    assert len(set(sizes[4:])) == 1


def test_fade(base):
    codes = random_codes(base, 40)
    options = {"left_context": 20, "right_context": 5, "chunk_frames": 10}
    plain = stream(StreamingDecoder(base, **options), [codes])
    faded = stream(StreamingDecoder(base, **options, crossfade_samples=100), [codes])
    changed = (plain != faded).nonzero().flatten()
    expected = torch.cat([torch.arange(border, border + 100) for border in (5 * 960, 15 * 960, 25 * 960)])
    # (The end of the last chunk is of the same samples as its beginning.)
    assert set(changed.tolist()) <= set(expected.tolist())
    assert len(changed) > 290
    # At the border's first sample the chunk before weighs 100 parts of 101.
    before = decode_codes(base, [codes[:10]])[0][5 * 960]
    torch.testing.assert_close(faded[5 * 960], before * 100 / 101 + plain[5 * 960] / 101)


# --- Bad use of the decoder ---


@pytest.mark.parametrize("way", ["upstream", "run again", "cached"])
def test_bad_use_is_an_error_and_leaves_all_streams_as_they_were(base, way):
    options = CHUNKED.get(way, {"left_context": 30, "right_context": 6})
    codes = random_codes(base, 64)
    expected = stream(StreamingDecoder(base, **options), codes.split(16))
    pool = StreamingDecoderPool(base, **options)
    good, bad, ended = pool.open(), pool.open(), pool.open()
    pool.push({ended: codes[:9]}, last=(name for name in [ended]))
    outside = codes[:4].clone()
    outside[2, 1] = 64
    pieces = []
    for chunk in codes.split(16):
        pool.push({bad: chunk[:3, :2]})
        for fault, message in (
            (outside, rf"stream {bad}.*64 for codebook 1.*0 to 63"),
            (codes[:4, :3], rf"stream {bad} are of 3 codebooks; accepted: 2"),
            (codes[:4, :2].float(), rf"stream {bad} is torch.float32"),
            (codes[0], rf"stream {bad} has shape"),
            (random_codes(base, 4).repeat(1, 2), rf"stream {bad} has shape \(4, 12\)"),
            ([[1, 2]], rf"stream {bad} is a list"),
        ):
            with pytest.raises(ValueError, match=message):
                pool.push({good: chunk, bad: fault})
        with pytest.raises(RuntimeError, match=f"stream {ended} has ended; accepted: codes after a reset"):
            pool.push({good: chunk, ended: chunk})
        with pytest.raises(ValueError, match="stream 9 is not open; accepted: 0, 1, 2"):
            pool.push({good: chunk, 9: chunk})
        for last, message in (
            ([bad], r"last names \[1\]"),
            (["a", 1], r"last names \['a', 1\]"),
            (True, r"last=True; accepted: streams, such as \[0\]"),
            ([[good]], r"last=\[\[0\]\]; accepted: streams"),
        ):
            with pytest.raises(ValueError, match=message):
                pool.push({good: chunk}, last=last)
        with pytest.raises(ValueError, match="codes is a Tensor; accepted: a mapping"):
            pool.push(chunk)
        with pytest.raises(ValueError, match=r"streams=0; accepted: streams, such as \[0\]"):
            pool.flush(good)
        # Nothing is not an error, whatever its number of codebooks.
        assert len(pool.push({good: codes[:0], bad: codes[:0]})[good]) == 0
        pieces.append(pool.push({good: chunk})[good])
    pieces.append(pool.flush([good])[good])
    assert_equal_audio(torch.cat(pieces), expected)


@pytest.fixture
def out_of_memory(monkeypatch):
    """Has the n-th call from now on of a module's class run out of memory."""

    def fail(module: torch.nn.Module, number: int) -> None:
        forward, calls = type(module).forward, []

        def failing(*args, **kwargs):
            calls.append(None)
            if len(calls) == number:
                raise torch.OutOfMemoryError("injected")
            return forward(*args, **kwargs)

        monkeypatch.setattr(type(module), "forward", failing)

    return fail


@pytest.mark.parametrize(
    ("way", "failing_call"), [("upstream", 1), ("upstream", 2), *itertools.product(["run again", "cached"], [1, 2, 3])]
)
def test_an_error_in_a_call_loses_and_doubles_nothing(base, out_of_memory, way, failing_call):
    options = CHUNKED.get(way, {"left_context": 30, "right_context": 6})
    # Two calls of the vocoder for each chunk: streams of another number of codebooks run apart.
    all_codes = [random_codes(base, 80, seed, books) for seed, books in enumerate([4, 2, 4])]
    expected = [stream(StreamingDecoder(base, **options), codes.split([24, 32, 24])) for codes in all_codes]
    pool = StreamingDecoderPool(base, capacity=4, **options)
    names = [pool.open() for _ in all_codes]
    waiting = pool.open()
    audio = {name: [] for name in names}

    def push(codes: dict[int, torch.Tensor], last: bool = False) -> None:
        for name, samples in pool.push(codes, last=list(codes) if last else []).items():
            audio[name].append(samples)

    first, second, third = (
        dict(zip(names, part, strict=True)) for part in zip(*[c.split([24, 32, 24]) for c in all_codes], strict=True)
    )
    push(first)
    out_of_memory(base.decoder.vocoder, failing_call)
    with pytest.raises(torch.OutOfMemoryError):
        pool.push({**second, waiting: random_codes(base, 1)})
    if way == "cached" and failing_call > 1:
        for name in names:
            with pytest.raises(
                RuntimeError, match=f"stream {name} was broken off by an error in a call; accepted: cod"
            ):
                pool.push({name: second[name]})
        for name, codes, samples in zip(names, all_codes, expected, strict=True):
            pool.reset(name)
            assert_equal_audio(pool.push({name: codes}, last=[name])[name], samples)
    else:
        push(second)
        push(third)
        push({name: codes[:0] for name, codes in third.items()}, last=True)
        for name, samples in zip(names, expected, strict=True):
            assert_equal_audio(torch.cat(audio[name]), samples)
    # The one that was given codes that were not run is as it was.
    codes = random_codes(base, 20, 7)
    if way != "upstream":
        assert_equal_audio(
            pool.push({waiting: codes}, last=[waiting])[waiting], stream(StreamingDecoder(base, **options), [codes])
        )


@pytest.mark.parametrize("family", ["causal", "base"])
def test_an_error_in_an_encoders_call_loses_and_doubles_nothing(causal, base, out_of_memory, family):
    model = {"causal": causal, "base": base}[family]
    waveform = noise(100_000)
    expected = stream(StreamingEncoder(model), [waveform])
    encoder = StreamingEncoder(model)
    codes = [encoder.push(waveform[:40_000])]
    out_of_memory(model.encoder.conv1, 2 if family == "base" else 1)
    with pytest.raises(torch.OutOfMemoryError):
        encoder.push(waveform[40_000:], last=True)
    if family == "causal":
        with pytest.raises(RuntimeError, match="broken off by an error in a call; accepted: samples after a reset"):
            encoder.push(waveform[40_000:])
        encoder.reset()
        codes = [encoder.push(waveform[:40_000])]
    codes.append(encoder.push(waveform[40_000:], last=True))
    assert torch.equal(torch.cat(codes), expected)


def test_graphs_of_other_weights_are_not_run_again(base):
    model = copy.deepcopy(base).freeze()
    model.graphs = GraphRunner(model, capture=False)
    pool = StreamingDecoderPool(model, **CHUNKED["cached"])
    name = pool.open()
    codes = random_codes(model, 200)
    for chunk in codes[:80].split(8):
        pool.push({name: chunk})
    programs = list(pool._cache._programs.values())
    assert programs
    model.graphs.clear()
    pool.push({name: codes[80:88]})
    assert not pool._cache._programs
    for chunk in codes[88:120].split(8):
        pool.push({name: chunk})
    assert pool._cache._programs
    model.load_state_dict(model.state_dict())
    assert model.graphs is None
    pool.push({name: codes[120:128]})
    assert not pool._cache._programs
    model.graphs = GraphRunner(model, capture=False)
    for chunk in codes[128:160].split(8):
        pool.push({name: chunk})
    assert pool._cache._programs
    model.graphs = GraphRunner(model, capture=False)
    pool.push({name: codes[160:168]})
    assert not pool._cache._programs


def test_what_a_runner_recorded_goes_with_its_other_graphs(base):
    """Also before the pool that holds it is used again, which it may never be."""
    model = copy.deepcopy(base).freeze()
    model.graphs = GraphRunner(model, capture=False)
    pool = StreamingDecoderPool(model, **CHUNKED["cached"])
    name = pool.open()
    codes = random_codes(model, 100)
    pieces = [pool.push({name: chunk})[name] for chunk in codes[:60].split(8)]
    (program,) = pool._cache._programs.values()
    model.graphs.clear()
    with pytest.raises(RuntimeError, match="the graph was given back"):
        program.replay()
    pieces += [pool.push({name: codes[60:]})[name], pool.flush([name])[name]]
    assert_equal_audio(torch.cat(pieces), stream(StreamingDecoder(base, **CHUNKED["cached"]), [codes]))


def test_a_stream_does_not_run_as_graphs_where_they_do_not_hold(base):
    model = copy.deepcopy(base).freeze()
    model.graphs = GraphRunner(model, capture=False)
    pool = StreamingDecoderPool(model, **CHUNKED["cached"])
    name = pool.open()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for chunk in random_codes(model, 80).split(8):
            pool.push({name: chunk})
    assert not pool._cache._programs
    pool.reset(name)
    codes = random_codes(model, 80)
    pool.push({name: codes[:40]})
    model.encoder.conv1.weight.data = model.encoder.conv1.weight.data.clone()
    with pytest.raises(RuntimeError, match="a part of the model was moved or cast"):
        pool.push({name: codes[40:]})
    assert not pool._streams[name].broken  # nothing was run


@pytest.mark.parametrize("way", ["run again", "cached"])
def test_a_model_that_was_cast_is_taken_or_refused_before_anything_changes(base, way):
    model = copy.deepcopy(base)
    decoder = StreamingDecoder(model, **CHUNKED[way])
    codes = random_codes(model, 60)
    pieces = [decoder.push(codes[:30])]
    model.double()
    if way == "cached":
        message = "moved or cast to torch.float64 on cpu after .* for torch.float32 on cpu; accepted: a new decoder"
        with pytest.raises(RuntimeError, match=message):
            decoder.push(codes[30:], last=True)
        model.float()
    pieces.append(decoder.push(codes[30:], last=True))
    torch.testing.assert_close(
        torch.cat(pieces), stream(StreamingDecoder(base, **CHUNKED[way]), [codes]), rtol=0, atol=1e-4
    )


def test_a_causal_model_that_was_cast_is_refused_before_anything_changes(causal):
    model = copy.deepcopy(causal)
    waveform = noise(30_000)
    (expected,) = encode_waveforms(causal, [waveform])
    encoder = StreamingEncoder(model)
    codes = [encoder.push(waveform[:10_000])]
    model.double()
    with pytest.raises(RuntimeError, match="cast to torch.float64 on cpu after the stream began with torch.float32"):
        encoder.push(waveform[10_000:])
    model.float()
    codes.append(encoder.push(waveform[10_000:], last=True))
    assert torch.equal(torch.cat(codes), expected)
    model.double()
    encoder.reset()
    assert encoder.push(waveform, last=True).shape == expected.shape


def test_ends(base):
    decoder = StreamingDecoder(base)
    assert decoder.flush().shape == (0,)  # of nothing
    for codes in (random_codes(base, 3), random_codes(base, 0)):
        with pytest.raises(RuntimeError, match="ended"):
            decoder.push(codes)
    with pytest.raises(RuntimeError, match="ended"):
        decoder.flush()
    decoder.reset()
    assert decoder.push(random_codes(base, 3), last=True).shape == (3 * 960,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"right_context": -1}, "right_context=-1; accepted: 0"),
        ({"left_context": 39}, r"left_context=39; accepted: 40 \(right_context\)"),
        ({"chunk_frames": 0}, "chunk_frames=0; accepted: 1"),
        ({"chunk_frames": 2.0}, "chunk_frames=2.0; accepted: 1 or more, an integer"),
        ({"chunk_frames": True}, "chunk_frames=True; accepted: 1 or more, an integer"),
        ({"crossfade_samples": 961}, "crossfade_samples=961; accepted: 0 to 960"),
        ({"crossfade_samples": 1, "right_context": 0}, "crossfade_samples=1; accepted: 0 to 0"),
        ({"cached": True}, "cached=True without chunk_frames"),
        ({"vocoder_context": 50}, "vocoder_context=50 without cached=True"),
        ({"vocoder_context": 39, "cached": True, "chunk_frames": 1}, r"vocoder_context=39; accepted: 40 \(right_con"),
        ({"num_quantizers": 7}, "num_quantizers=7; accepted: 1 to 6"),
    ],
)
def test_bad_options(base, options, message):
    with pytest.raises(ValueError, match=message):
        StreamingDecoder(base, **options)


def test_whole_numbers_of_any_kind_are_options(base):
    options = {name: np.int64(value) for name, value in CHUNKED["run again, faded"].items()}
    codes = random_codes(base, 30)
    expected = stream(StreamingDecoder(base, **CHUNKED["run again, faded"]), [codes])
    assert_equal_audio(stream(StreamingDecoder(base, **options), [codes]), expected)
    encoder = StreamingEncoder(base, right_context=np.int32(3), chunk_frames=np.int64(2), left_context=np.int64(9))
    assert {type(each) for each in (encoder.right_context, encoder.chunk_frames, encoder.left_context)} == {int}


def test_bad_codes_are_described_as_they_are(base):
    decoder = StreamingDecoder(base)
    with pytest.raises(ValueError, match=r"shape \(5, 7\); accepted: \(frames, 1 to 6 codebooks\)$"):
        decoder.push(torch.zeros(5, 7, dtype=torch.long))
    with pytest.raises(ValueError, match=f"hold {2**63 + 1} for codebook 1"):
        decoder.push(np.array([[0, 2**63 + 1]], dtype=np.uint64))


def test_a_model_without_decoder_decodes_no_streams():
    model = MiMoAudioTokenizerModel(MiMoAudioTokenizerConfig(**PRESETS["tiny"], has_decoder=False)).eval()
    with pytest.raises(ValueError, match="encoder only"):
        StreamingDecoder(model)


# --- Encoder ---


def test_a_causal_encoder_gives_the_codes_of_the_whole_clip(causal):
    for seed, samples in enumerate((1, 480, 481, 960, 5000, 24000, 24001, 24239, 100_000)):
        waveform = noise(samples, seed)
        (expected,) = encode_waveforms(causal, [waveform])
        for most in (100, 2000, 200_000):
            assert torch.equal(stream(StreamingEncoder(causal), random_chunks(waveform, most, seed)), expected)
    assert torch.equal(StreamingEncoder(causal, num_quantizers=2).push(waveform, last=True), expected[:, :2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_causal_encoder_gives_nearly_the_codes_of_the_whole_clip_in_half_precision(dtype):
    model = load_golden("causal_hybrid_encoder").to(dtype)
    equal = []
    for seed in range(4):
        waveform = noise(100_000, seed)
        (expected,) = encode_waveforms(model, [waveform])
        equal.append(stream(StreamingEncoder(model), list(waveform.split(4800))) == expected)
    assert torch.cat(equal).float().mean() > 0.975


@pytest.mark.parametrize("first", [480, 481, 719, 720, 721])
def test_the_first_mel_frames_wait_for_what_they_mirror(causal, first):
    waveform = noise(9000)
    (expected,) = encode_waveforms(causal, [waveform])
    chunks = [waveform[:first], waveform[first : first + 1], waveform[first + 1 :]]
    assert torch.equal(stream(StreamingEncoder(causal), chunks), expected)


def test_mel_frames_are_those_of_all_samples(causal):
    """Values, and when: frame t reaches 480 samples beyond sample 240 t, and the mirror of the first begins there."""
    extractor = MiMoAudioTokenizerFeatureExtractor.from_config(causal.config)
    waveform = noise(3000)
    expected = extractor.log_mel_spectrogram(waveform).t()
    mel = encoding._StreamingMel(extractor, torch.device("cpu"))
    pieces = [mel.push(sample, number == 3000) for number, sample in enumerate(waveform.split(1), start=1)]
    counts = torch.tensor([*map(len, pieces)]).cumsum(0).tolist()
    assert counts[:-1] == [0 if number <= 480 else (number - 480) // 240 + 1 for number in range(1, 3000)]
    # To rounding; a frame that lacks its last sample is off by ten times as much.
    torch.testing.assert_close(torch.cat(pieces), expected, rtol=0, atol=6e-7)


def test_much_audio_at_once_runs_in_parts(causal, monkeypatch):
    waveform = noise(150_000)
    (expected,) = encode_waveforms(causal, [waveform])
    monkeypatch.setattr(encoding, "_MAX_ENCODER_FRAMES", 7)
    monkeypatch.setattr(encoding, "_MAX_SECONDS", 1)
    assert torch.equal(StreamingEncoder(causal).push(waveform, last=True), expected)


def test_windows_are_as_long_as_their_contexts(base):
    waveform = noise(30 * 960)
    encoder = StreamingEncoder(base, left_context=6, right_context=2, chunk_frames=4)
    codes = stream(encoder, random_chunks(waveform, 3000, 0))
    mel = MiMoAudioTokenizerFeatureExtractor.from_config(base.config).log_mel_spectrogram(waveform)
    assert mel.shape[1] == 30 * 4 + 1
    for start in range(0, 24, 4):
        first = max(0, start - 6)
        window = mel[:, 4 * first : 4 * (start + 4 + 2)]
        expected = base.encode(window[None]).audio_codes[0].t()[start - first :][:4]
        assert torch.equal(codes[start : start + 4], expected), start


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_causal_encoder_gives_the_golden_codes(causal, size):
    for clip in expected_clips("causal_hybrid_encoder"):
        causal_encoding = encoding._CausalEncoding(causal, torch.device("cpu"), causal.config.num_quantizers, None)
        pieces = clip["mel"].t().split(size)
        with torch.inference_mode():
            codes = [
                found
                for number, piece in enumerate(pieces, start=1)
                for found in causal_encoding.push(piece, number == len(pieces))
            ]
        assert torch.equal(torch.cat(codes), clip["codes"].long())


def test_positions_of_a_long_stream_begin_anew(causal, monkeypatch):
    waveform = noise(150_000)
    (expected,) = encode_waveforms(causal, [waveform])
    monkeypatch.setattr(caching, "MAX_POSITION", 50)
    assert torch.equal(stream(StreamingEncoder(causal), list(waveform.split(5000))), expected)


def test_a_causal_encoder_bounds_its_memory_where_it_is_told_to(causal):
    encoder = StreamingEncoder(causal, left_context=30)
    waveform = noise(240_000)
    codes, sizes = [], []
    for piece in waveform.split(24_000):
        codes.append(encoder.push(piece))
        sizes.append([keys.shape for keys in encoder._encoding.cache._keys])
    assert all(shapes == sizes[0] for shapes in sizes)
    whole = encode_waveforms(causal, [waveform])[0][: sum(map(len, codes))]
    agreement = (torch.cat(codes) == whole).float().mean(1)
    assert agreement[:30].min() == 1  # until there is more before a frame than it may see
    assert agreement.mean() > 0.5


@pytest.mark.parametrize("family", ["causal", "base"])
def test_codes_come_as_soon_as_what_they_need(causal, base, family):
    model = {"causal": causal, "base": base}[family]
    options = {} if family == "causal" else {"right_context": 3, "chunk_frames": 1}
    encoder = StreamingEncoder(model, **options)
    given = 0
    for number, sample in enumerate(noise(12_000).split(1), start=1):
        given += len(encoder.push(sample))
        assert given == max(0, (number - encoder.look_ahead) // 960)
    assert given > 5


def test_windows_over_the_whole_clip_give_its_codes(base):
    waveform = noise(60_000)
    (expected,) = encode_waveforms(base, [waveform])
    for chunk in (1, 10, 100):
        encoder = StreamingEncoder(base, left_context=100, right_context=100, chunk_frames=chunk)
        assert torch.equal(stream(encoder, random_chunks(waveform, 5000, chunk)), expected)


def test_windows_give_nearly_the_codes_of_the_whole_clip(trained, speech):
    (whole,) = encode_waveforms(trained, [speech])
    codes = stream(StreamingEncoder(trained), list(speech.split(2400)))
    assert codes.shape == whole.shape
    assert (codes == whole).float().mean() > 0.6  # docs/streaming.md has the measurements
    assert (codes == whole)[:, 0].float().mean() > 0.95
    near = stream(StreamingEncoder(trained, right_context=0), list(speech.split(2400)))
    assert (near == whole).float().mean() < (codes == whole).float().mean()


@pytest.mark.parametrize("family", ["causal", "base"])
def test_bad_use_of_an_encoder_leaves_it_as_it_was(causal, base, family):
    model = {"causal": causal, "base": base}[family]
    waveform = noise(20_000)
    expected = stream(StreamingEncoder(model), [waveform])
    encoder = StreamingEncoder(model)
    codes = []
    for piece in waveform.split(7000):
        for fault, message in (
            (torch.full((100,), math.nan), "NaN"),
            (torch.zeros(2, 100), "mono"),
            (torch.zeros(100, dtype=torch.int16), "int16"),
            ([0.5], "samples is a list"),
        ):
            with pytest.raises(ValueError, match=message):
                encoder.push(fault)
        assert encoder.push(torch.empty(0)).shape == (0, model.config.num_quantizers)
        codes.append(encoder.push(piece.numpy()))
    codes.append(encoder.flush())
    assert torch.equal(torch.cat(codes), expected)
    with pytest.raises(RuntimeError, match="ended"):
        encoder.push(waveform)
    encoder.reset()
    assert torch.equal(encoder.push(waveform, last=True), expected)
    encoder.reset()
    assert encoder.flush().shape == (0, model.config.num_quantizers)


def test_bad_options_of_an_encoder(causal, base):
    for options, message in (
        ({"num_quantizers": 7}, "num_quantizers=7"),
        ({"left_context": 0}, "left_context=0; accepted: 1"),
        ({"right_context": -1}, "right_context=-1; accepted: 0"),
        ({"chunk_frames": 0}, "chunk_frames=0; accepted: 1"),
    ):
        with pytest.raises(ValueError, match=message):
            StreamingEncoder(base, **options)
    with pytest.raises(ValueError, match="right_context=3, chunk_frames=None with an encoder that does not look"):
        StreamingEncoder(causal, right_context=3)
