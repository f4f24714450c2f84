"""Waveforms to codes and back in batches."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kernel_device import needs_gpu

from mimo_audio_hf import MiMoAudioTokenizerConfig, MiMoAudioTokenizerFeatureExtractor, MiMoAudioTokenizerModel
from mimo_audio_hf.checkpoints import PRESETS
from mimo_audio_hf.inference import (
    _lie_end_to_end,
    _run_in_batches,
    _to_device,
    convert_each,
    decode_codes,
    encode_stream,
    encode_waveforms,
    group_by_seconds,
)
from mimo_audio_hf.streaming import StreamingDecoder


# Samples: odd and even numbers of frames, one too short for the STFT's padding, and no order.
LENGTHS = (5000, 300, 12345, 960, 2400, 24000)
FRAMES = (6, 2, 13, 2, 3, 26)


# What batches ask a model for.
MODEL = SimpleNamespace(graphs=None)


@pytest.fixture(scope="module")
def waveforms() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, generator=generator) * 0.1 for length in LENGTHS]


@pytest.fixture(scope="module")
def codes(tiny_model, waveforms) -> list[torch.Tensor]:
    return encode_waveforms(tiny_model, waveforms)


@pytest.fixture
def batches_on_the_cpu(monkeypatch):
    """As on a GPU: several clips at once."""
    monkeypatch.setattr("mimo_audio_hf.inference._gains_from_batches", lambda device: True)


@pytest.fixture(scope="module")
def encoder_only() -> MiMoAudioTokenizerModel:
    return MiMoAudioTokenizerModel(MiMoAudioTokenizerConfig(**PRESETS["tiny"], has_decoder=False)).eval()


def test_codes_are_int64_frames_first_in_the_order_given(codes):
    assert [tuple(clip.shape) for clip in codes] == [(frames, 20) for frames in FRAMES]
    assert {(clip.dtype, clip.device.type) for clip in codes} == {(torch.int64, "cpu")}


def test_codes_are_those_of_the_models_own_encode(tiny_model, waveforms, codes):
    extractor = MiMoAudioTokenizerFeatureExtractor.from_config(tiny_model.config)
    for waveform, clip in zip(waveforms, codes, strict=True):
        expected = tiny_model.encode(**extractor(waveform, sampling_rate=24000)).audio_codes[0].t()
        assert torch.equal(clip, expected)


@pytest.mark.parametrize("max_batch_seconds", [0.1, 0.6, math.inf])
def test_codes_do_not_depend_on_the_batches(tiny_model, waveforms, codes, max_batch_seconds, batches_on_the_cpu):
    batched = encode_waveforms(tiny_model, waveforms, max_batch_seconds=max_batch_seconds)
    for clip, expected in zip(batched, codes, strict=True):
        assert torch.equal(clip, expected)


def test_fewer_codebooks_are_the_first_ones(tiny_model, waveforms, codes):
    for clip, full in zip(encode_waveforms(tiny_model, waveforms, 3), codes, strict=True):
        assert torch.equal(clip, full[:, :3])


def test_codes_can_be_trained_on(codes):
    # Tensors made under inference mode cannot be saved for a backward pass.
    embedding = torch.nn.Embedding(1024, 4)
    embedding(codes[0][:, 0]).sum().backward()
    assert embedding.weight.grad.count_nonzero() > 0


def test_codes_do_not_hold_their_batch(codes):
    assert all(clip.untyped_storage().nbytes() == clip.nbytes for clip in codes)


def test_waveforms_are_those_of_the_models_own_decode(tiny_model, codes):
    decoded = decode_codes(tiny_model, codes)
    assert [tuple(waveform.shape) for waveform in decoded] == [(960 * frames,) for frames in FRAMES]
    for waveform, clip in zip(decoded, codes, strict=True):
        expected = tiny_model.decode(clip.t()[None]).audio_values[0, 0]
        assert (waveform.dtype, waveform.device.type) == (torch.float32, "cpu")
        torch.testing.assert_close(waveform, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("max_batch_seconds", [0.1, 0.6, math.inf])
def test_waveforms_do_not_depend_on_the_batches(tiny_model, codes, max_batch_seconds, batches_on_the_cpu):
    alone = [decode_codes(tiny_model, [clip])[0] for clip in codes]
    for waveform, expected in zip(
        decode_codes(tiny_model, codes, max_batch_seconds=max_batch_seconds), alone, strict=True
    ):
        torch.testing.assert_close(waveform, expected, rtol=0, atol=1e-5)


def test_clips_with_several_numbers_of_codebooks_and_integer_dtypes(tiny_model, codes, batches_on_the_cpu):
    mixed = [codes[0][:, :8].short(), codes[1], codes[2][:, :8], codes[3][:, :1].int()]
    for waveform, clip in zip(decode_codes(tiny_model, mixed), mixed, strict=True):
        torch.testing.assert_close(waveform, decode_codes(tiny_model, [clip])[0], rtol=0, atol=1e-5)


def test_nothing_gives_nothing(tiny_model):
    assert encode_waveforms(tiny_model, []) == []
    assert decode_codes(tiny_model, []) == []


def test_long_audio_is_encoded_in_pieces_of_a_minute(tiny_model, monkeypatch):
    monkeypatch.setattr("mimo_audio_hf.inference.MAX_PIECE_FRAMES", 60)
    extractor = MiMoAudioTokenizerFeatureExtractor.from_config(tiny_model.config)
    generator = torch.Generator().manual_seed(1)
    for frames in (60, 61, 121, 180, 181):  # one piece; a last piece of one frame; whole pieces
        for extra in (0, 239):
            waveform = torch.randn((frames - 1) * 240 + extra, generator=generator) * 0.1
            mel = extractor.log_mel_spectrogram(waveform)
            pieces = [tiny_model.encode(piece[None]).audio_codes[0].t() for piece in mel.split(60, dim=1)]
            (codes,) = encode_waveforms(tiny_model, [waveform])
            assert torch.equal(codes, torch.cat(pieces))


def test_a_minute_is_as_long_as_upstreams(tiny_model):
    """6,000 frames of the mel spectrogram."""
    waveform = torch.randn(61 * 24000, generator=torch.Generator().manual_seed(1)) * 0.1
    mel = MiMoAudioTokenizerFeatureExtractor.from_config(tiny_model.config).log_mel_spectrogram(waveform)
    pieces = [tiny_model.encode(piece[None]).audio_codes[0].t() for piece in mel.split(6000, dim=1)]
    assert torch.equal(encode_waveforms(tiny_model, [waveform])[0], torch.cat(pieces))


def test_pieces_of_long_audio_may_overlap(tiny_model, monkeypatch):
    monkeypatch.setattr("mimo_audio_hf.inference.MAX_PIECE_FRAMES", 60)
    waveform = torch.randn(60_000, generator=torch.Generator().manual_seed(1)) * 0.1
    extractor = MiMoAudioTokenizerFeatureExtractor.from_config(tiny_model.config)
    whole = tiny_model.encode(**extractor(waveform, sampling_rate=24000)).audio_codes[0].t()
    (apart,) = encode_waveforms(tiny_model, [waveform])
    # Pieces that see everything give the codes of the whole.
    (seeing,) = encode_waveforms(tiny_model, [waveform], overlap_seconds=3)
    assert torch.equal(seeing, whole)
    (overlapping,) = encode_waveforms(tiny_model, [waveform], overlap_seconds=0.4)
    assert overlapping.shape == whole.shape
    agreement = [(codes == whole).float().mean() for codes in (apart, overlapping)]
    assert agreement[0] < agreement[1] < 1
    for overlap_seconds in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"overlap_seconds={overlap_seconds}; accepted: 0 or more"):
            encode_waveforms(tiny_model, [waveform], overlap_seconds=overlap_seconds)


@pytest.mark.parametrize("batched", [False, True])
def test_long_codes_are_decoded_as_by_upstreams_streaming_decoder(tiny_model, monkeypatch, batched):
    if batched:
        monkeypatch.setattr("mimo_audio_hf.inference._gains_from_batches", lambda device: True)
    constants = {"MAX_WHOLE_FRAMES": 50, "PIECE_CHUNK": 20, "PIECE_LEFT_CONTEXT": 10, "PIECE_RIGHT_CONTEXT": 4}
    for name, value in constants.items():
        monkeypatch.setattr(f"mimo_audio_hf.inference.{name}", value)
    generator = torch.Generator().manual_seed(3)
    clips = [torch.randint(128, (frames, 5), generator=generator) for frames in (51, 50, 60, 61, 63, 64, 65, 7)]
    for clip, waveform in zip(clips, decode_codes(tiny_model, clips), strict=True):
        if len(clip) <= 50:
            expected = tiny_model.decode(clip.t()[None]).audio_values[0, 0]
        else:
            decoder = StreamingDecoder(tiny_model, left_context=10, right_context=4, crossfade_samples=240)
            chunks = clip.split(20)
            pieces = [decoder.push(chunk, last=chunk is chunks[-1]) for chunk in chunks]
            expected = torch.cat(pieces)
        assert len(waveform) == 960 * len(clip)
        torch.testing.assert_close(waveform, expected, rtol=0, atol=1e-5)


class Memory:
    """A device that holds so many seconds: runs batches of numbers, each its own duration."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.ran: list[list[float]] = []

    def run(self, items, max_batch_seconds: float):
        def launch(batch):
            if sum(batch) > self.seconds:
                raise torch.OutOfMemoryError("out of memory")
            self.ran.append(batch)
            return lambda: [-item for item in batch]

        return list(_run_in_batches(MODEL, launch, items, float, max_batch_seconds, torch.device("cuda"), None))


def test_out_of_memory_means_smaller_batches_from_there_on():
    memory = Memory(4)
    items = [1.0] * 20
    assert memory.run(items, 10) == [(1.0, -1.0)] * 20
    assert max(map(len, memory.ran)) == 2  # 10 and 5 do not fit, 2.5 does
    assert sum(memory.ran, []) == items


def test_an_item_that_never_fits_fails_alone():
    memory = Memory(4)
    results = memory.run([1.0, 1.0, 5.0, 1.0, 3.0], 100)
    assert [item for item, _ in results] == [1.0, 1.0, 5.0, 1.0, 3.0]
    assert isinstance(results[2][1], torch.OutOfMemoryError)
    assert [result for index, (_, result) in enumerate(results) if index != 2] == [-1.0, -1.0, -1.0, -3.0]


def test_a_batch_is_launched_before_the_one_before_it_is_collected():
    events: list[str] = []

    def launch(batch):
        events.append(f"launch {batch[0]}")
        return lambda: events.append(f"collect {batch[0]}") or batch

    list(_run_in_batches(MODEL, launch, [1, 2, 3], float, 1, torch.device("cuda"), None))
    assert events == ["launch 1", "launch 2", "collect 1", "launch 3", "collect 2", "collect 3"]


@pytest.mark.gpu
@needs_gpu
def test_batches_on_a_gpu_give_what_the_cpu_gives(tiny_model, monkeypatch):
    """Many batches in flight, copies through pinned memory, and clips in pieces."""
    monkeypatch.setattr("mimo_audio_hf.inference.MAX_PIECE_FRAMES", 250)
    generator = torch.Generator().manual_seed(2)
    clips = [torch.randn(200 + 997 * index, generator=generator) * 0.1 for index in range(100)]
    model = copy.deepcopy(tiny_model).to("cuda")
    expected = encode_waveforms(tiny_model, clips)
    codes = encode_waveforms(model, clips, max_batch_seconds=7)
    assert [len(clip) for clip in codes] == [len(clip) for clip in expected]
    equal = torch.cat([(clip == other).flatten() for clip, other in zip(codes, expected, strict=True)])
    assert equal.float().mean() > 0.999
    # The same codes for both: a code that rounding has moved would move the audio.
    for waveform, other in zip(
        decode_codes(model, expected, max_batch_seconds=7), decode_codes(tiny_model, expected), strict=True
    ):
        torch.testing.assert_close(waveform, other, rtol=0, atol=1e-3 * other.abs().max().item())


def test_progress_counts_the_seconds_of_every_batch(tiny_model, waveforms, codes, batches_on_the_cpu):
    encoded: list[float] = []
    encode_waveforms(tiny_model, waveforms, max_batch_seconds=0.6, progress=encoded.append)
    # The longest first: 1 s is over the budget and runs alone; the others fit in 0.6 s and 0.36 s.
    assert encoded == pytest.approx([1.0, 12345 / 24000, (5000 + 2400 + 960 + 300) / 24000])

    decoded: list[float] = []
    decode_codes(tiny_model, codes, max_batch_seconds=0.6, progress=decoded.append)
    assert decoded == pytest.approx([26 * 0.04, 13 * 0.04, (6 + 3 + 2 + 2) * 0.04])


@pytest.mark.parametrize(
    ("waveform", "fault"),
    [
        (torch.zeros(0), "empty"),
        (torch.zeros(2, 100), "mono"),
        (torch.zeros(100, dtype=torch.int16), "int16"),
        (torch.full((100,), math.nan), "NaN"),
        (torch.tensor([0.0, 1e300], dtype=torch.float64), "NaN or infinite"),  # in float32
        (torch.full((100,), math.inf), "infinite"),
    ],
)
def test_a_bad_waveform_is_named_by_its_place(tiny_model, waveforms, waveform, fault):
    with pytest.raises(ValueError, match=rf"waveforms\[1\].*{fault}"):
        encode_waveforms(tiny_model, [waveforms[0], waveform])


def test_nothing_is_encoded_before_everything_is_checked(tiny_model, waveforms):
    encoded: list[float] = []
    for clips, count, fault in (
        ([waveforms[5], torch.zeros(0)], None, r"waveforms\[1\]"),  # the empty one would be the last to run
        (waveforms[:1], 21, "num_quantizers=21"),
        ([], 21, "num_quantizers=21"),
    ):
        with pytest.raises(ValueError, match=fault):
            encode_waveforms(tiny_model, clips, count, max_batch_seconds=0.1, progress=encoded.append)
    assert encoded == []


def test_arrays_are_taken_and_nothing_else(tiny_model, waveforms, codes):
    (encoded,) = encode_waveforms(tiny_model, [waveforms[0].numpy()])
    assert torch.equal(encoded, codes[0])
    (decoded,) = decode_codes(tiny_model, [codes[0].numpy().astype(np.uint16)])
    assert torch.equal(decoded, decode_codes(tiny_model, codes[:1])[0])
    for bad in (None, [0.5, 0.5], "clip", np.array(["clip"])):
        with pytest.raises(ValueError, match=r"waveforms\[0\] is a"):
            encode_waveforms(tiny_model, [bad])
        with pytest.raises(ValueError, match=r"codes\[0\] is a"):
            decode_codes(tiny_model, [bad])


def test_offloaded_weights(tiny_checkpoint, tiny_model, waveforms, codes, tmp_path):
    model = MiMoAudioTokenizerModel.from_pretrained(
        tiny_checkpoint, device_map={"encoder": "cpu", "decoder": "disk"}, offload_folder=tmp_path
    )
    assert {weight.is_meta for weight in model.decoder.parameters()} == {True}
    assert torch.equal(encode_waveforms(model, waveforms[:1])[0], codes[0])
    torch.testing.assert_close(decode_codes(model, codes[:1])[0], decode_codes(tiny_model, codes[:1])[0])


def test_a_batch_that_fails_is_retried_item_by_item():
    calls: list[list[int]] = []

    def invert(items: list[int]) -> list[float]:
        calls.append(items)
        if 0 in items:
            raise ValueError("zero")
        return [1 / item for item in items]

    assert convert_each(invert, []) == []
    assert convert_each(invert, [1, 2]) == [1, 0.5]
    first, error, last = convert_each(invert, [1, 0, 2])
    assert (first, str(error), last) == (1, "zero", 0.5)
    assert calls == [[], [1, 2], [1, 0, 2], [1], [0], [2]]


@pytest.mark.parametrize(
    ("clip", "fault"),
    [
        (torch.zeros(0, 20, dtype=torch.long), r"shape \(0, 20\)"),
        (torch.zeros(5, 21, dtype=torch.long), r"shape \(5, 21\)"),
        (torch.zeros(5, 0, dtype=torch.long), r"shape \(5, 0\)"),
        (torch.zeros(1, 5, 20, dtype=torch.long), r"shape \(1, 5, 20\)"),
        (torch.zeros(5, 20), "torch.float32"),
        (torch.zeros(5, 20, dtype=torch.bool), "torch.bool"),
        (torch.full((5, 20), 128), "codebook 2 .*0 to 127"),
        (torch.full((5, 20), -1), "codebook 0 .*0 to 1023"),
    ],
)
def test_bad_codes_are_named_by_their_place_before_anything_is_decoded(tiny_model, codes, clip, fault):
    decoded: list[float] = []
    with pytest.raises(ValueError, match=rf"codes\[1\].*{fault}"):
        decode_codes(tiny_model, [codes[0], clip], max_batch_seconds=0.1, progress=decoded.append)
    assert decoded == []


@pytest.mark.parametrize("num_quantizers", [0, 21])
def test_more_codebooks_than_there_are(tiny_model, waveforms, num_quantizers):
    with pytest.raises(ValueError, match=f"num_quantizers={num_quantizers}; accepted: 1 to 20"):
        encode_waveforms(tiny_model, waveforms, num_quantizers)


@pytest.mark.parametrize("max_batch_seconds", [0, -1, math.nan])
def test_a_budget_that_is_not_positive(tiny_model, waveforms, codes, max_batch_seconds):
    with pytest.raises(ValueError, match="max_batch_seconds"):
        encode_waveforms(tiny_model, waveforms, max_batch_seconds=max_batch_seconds)
    with pytest.raises(ValueError, match="max_batch_seconds"):
        decode_codes(tiny_model, codes, max_batch_seconds=max_batch_seconds)


def test_a_model_without_decoder_encodes_only(encoder_only, waveforms):
    codes = encode_waveforms(encoder_only, waveforms[:2])
    with pytest.raises(ValueError, match="cannot decode"):
        decode_codes(encoder_only, codes)


def test_groups_stay_within_the_budget_and_take_nothing_in_advance():
    taken: list[float] = []

    def items():
        for seconds in (3.0, 4.0, 3.0, 20.0, 1.0):
            taken.append(seconds)
            yield seconds

    groups = group_by_seconds(items(), float, 10.0)
    assert taken == []
    assert next(groups) == [3.0, 4.0, 3.0]
    assert taken == [3.0, 4.0, 3.0, 20.0]
    assert list(groups) == [[20.0], [1.0]]


def test_a_full_group_waits_for_no_other_item():
    items = iter([1.0, 2.0, 3.0, 4.0, 5.0])
    groups = group_by_seconds(items, float, 5.0, 2)
    assert next(groups) == [1.0, 2.0]
    assert next(items) == 3.0
    assert list(groups) == [[4.0], [5.0]]


@pytest.mark.parametrize("max_batch_clips", [0, -1, 1.5])
def test_a_number_of_clips_that_is_none(tiny_model, waveforms, max_batch_clips):
    with pytest.raises(ValueError, match="max_batch_clips"):
        list(encode_stream(tiny_model, enumerate(waveforms), max_batch_clips=max_batch_clips))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("chosen", [slice(0, 3), slice(1, 3), slice(0, 3, 2)])
def test_what_readers_hand_on_in_pinned_memory_reaches_a_gpu(chosen):
    """Neighbours as they lie, others one by one; also where the memory is given back and used again at once."""
    for size in ([300000, 1, 7], [3, 300000, 5]):
        clips = torch.rand(sum(size)).pin_memory().split(size)[chosen]
        expected = torch.cat(clips).clone()
        on_gpu = _to_device(clips, torch.device("cuda"))
        del clips
        torch.empty(sum(size), pin_memory=True).zero_()
        assert torch.equal(on_gpu.cpu(), expected)


def test_only_neighbours_in_memory_are_taken_as_one():
    whole = torch.arange(10.0)
    first, second, third = whole.split([3, 5, 2])
    assert _lie_end_to_end([first, second, third])
    assert _lie_end_to_end([second, third])
    assert not _lie_end_to_end([first, third])
    assert not _lie_end_to_end([second, first])
    assert not _lie_end_to_end([first, second.clone()])
    assert not _lie_end_to_end([whole[::2], third])
    assert _lie_end_to_end([*whole.view(5, 2).split([2, 3])])
