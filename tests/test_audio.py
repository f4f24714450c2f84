"""Reading, resampling and writing audio."""

from __future__ import annotations

import io
import math
import os
import struct
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mimo_audio_hf import audio
from mimo_audio_hf.audio import load_audio, resample, save_audio
from mimo_audio_hf.dataset import to_waveform


FIXTURES = Path(__file__).parent / "fixtures" / "audio"
SPEECH = FIXTURES / "prompt_speech_en_m.wav"
RATE = 24000


def tone(samples: int = 12000, channels: int = 1) -> np.ndarray:
    """(samples, channels) float64, every channel the same fading sine at a loudness of its own."""
    sine = np.sin(2 * np.pi * 440 / RATE * np.arange(samples)) * np.hanning(samples)
    return sine[:, None] * (0.5 / (1 + np.arange(channels)))


def encode(data: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    sf.write(file, data, options.pop("samplerate", RATE), **options)
    return file.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# ---- load_audio


@pytest.mark.parametrize(
    ("file_format", "subtype", "tolerance"),
    [
        ("WAV", "PCM_U8", 2**-7),
        ("WAV", "PCM_16", 2**-15),
        ("WAV", "PCM_24", 2**-23),
        ("WAV", "PCM_32", 2**-23),
        ("WAV", "FLOAT", 2**-24),
        ("WAV", "DOUBLE", 2**-24),
        ("WAV", "ULAW", 2**-5),
        ("WAV", "ALAW", 2**-5),
        ("WAV", "IMA_ADPCM", 0.05),
        ("WAVEX", "PCM_16", 2**-15),
        ("RF64", "PCM_16", 2**-15),
        ("AIFF", "PCM_16", 2**-15),
        ("AU", "PCM_16", 2**-15),
        ("CAF", "PCM_16", 2**-15),
        ("W64", "PCM_16", 2**-15),
        ("FLAC", "PCM_16", 2**-15),
        ("FLAC", "PCM_24", 2**-23),
        ("OGG", "VORBIS", 0.05),
        ("OGG", "OPUS", 0.1),
        ("MP3", "MPEG_LAYER_III", 0.05),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_formats(tmp_path, file_format, subtype, tolerance, channels):
    data = tone(channels=channels)
    path = write(tmp_path / "any name", encode(data, format=file_format, subtype=subtype))
    samples = load_audio(path)
    assert samples.dtype == torch.float32
    assert samples.ndim == 1
    if subtype == "IMA_ADPCM":  # blocks of a fixed size: padded
        samples = samples[: len(data)]
    np.testing.assert_allclose(samples.numpy(), data.mean(1), atol=tolerance)


@pytest.mark.parametrize("name", ["stereo_44k1.flac", "mono_8k_ulaw.wav"])
def test_real_files_as_torchaudio(name):
    expected = load_file(FIXTURES / "expected.safetensors")[f"{Path(name).stem}.audio_24k"]
    torch.testing.assert_close(load_audio(FIXTURES / name), expected, atol=1e-6, rtol=0)


def test_16_bit_samples_are_exact():
    integers, _ = sf.read(SPEECH, dtype="int16")
    assert torch.equal(load_audio(SPEECH), torch.from_numpy(integers / np.float32(32768)))


def test_sampling_rate():
    samples = load_audio(SPEECH)
    assert torch.equal(load_audio(SPEECH, 16000), resample(samples, 24000, 16000))


def test_channels_are_averaged_block_by_block(monkeypatch):
    sizes = []

    class Spy(audio._SequentialFile):
        def read(self, *args, **kwargs):
            sizes.append(super().read(*args, **kwargs))
            return sizes[-1]

    monkeypatch.setattr(audio, "_READ_ELEMENTS", 800)
    monkeypatch.setattr(audio, "_SequentialFile", Spy)
    data = np.random.default_rng(0).uniform(-1, 1, (1050, 8))
    samples = load_audio(encode(data, format="WAV", subtype="FLOAT"))
    np.testing.assert_allclose(samples.numpy(), data.mean(1), atol=1e-6)
    assert [block.shape for block in sizes] == [(100, 8)] * 10 + [(50, 8), (0, 8)]


@pytest.mark.parametrize("kind", [str, Path, bytes, bytearray, memoryview, io.BytesIO])
def test_sources(kind):
    source = kind(str(SPEECH)) if kind in (str, Path) else kind(SPEECH.read_bytes())
    assert torch.equal(load_audio(source), load_audio(SPEECH))


def test_file_object_is_read_from_its_start_and_left_open():
    with open(SPEECH, "rb") as file:
        file.seek(1000)
        assert torch.equal(load_audio(file), load_audio(SPEECH))
        assert not file.closed


@pytest.mark.parametrize("file_format", ["WAV", "FLAC", "OGG", "MP3"])
def test_pipe(file_format):
    content = encode(tone(), format=file_format)
    reader, writer = os.pipe()

    def feed() -> None:
        with open(writer, "wb") as file:
            file.write(content)

    thread = threading.Thread(target=feed)
    thread.start()
    with open(reader, "rb") as file:
        samples = load_audio(file)
    thread.join()
    assert torch.equal(samples, load_audio(content))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoder(dtype):
    data = torch.rand(2, 441, dtype=dtype) - 0.5
    decoder = SimpleNamespace(get_all_samples=lambda: SimpleNamespace(data=data, sample_rate=44100))
    torch.testing.assert_close(load_audio(decoder), resample(data.float().mean(0), 44100, 24000))


def test_decoder_of_mono_samples_without_channels():
    data = torch.rand(441) - 0.5
    decoder = SimpleNamespace(get_all_samples=lambda: SimpleNamespace(data=data, sample_rate=24000))
    assert torch.equal(load_audio(decoder), data)
    decoder = SimpleNamespace(get_all_samples=lambda: SimpleNamespace(data=data[None, None], sample_rate=24000))
    with pytest.raises(ValueError, match=r"shape \(1, 1, 441\); accepted: \(samples,\)"):
        load_audio(decoder)


@pytest.mark.parametrize("rate", [24000.5, 24000.0, "24000", None])
def test_rates_that_are_no_integers(tmp_path, rate):
    with pytest.raises(ValueError, match=r"sampling_rate must be .* an integer"):
        load_audio(SPEECH, rate)
    with pytest.raises(ValueError, match="sampling_rate=.*; accepted: an integer"):
        save_audio(tmp_path / "a.wav", torch.zeros(10), rate)


@pytest.mark.parametrize("waveform", [[0.5, 0.5], None, "noise", np.array(["noise"])])
def test_what_is_no_waveform_is_not_saved(tmp_path, waveform):
    with pytest.raises(ValueError, match=r"a\.wav: waveform is an? .*; accepted: "):
        save_audio(tmp_path / "a.wav", waveform, RATE)


def test_a_file_that_cannot_be_replaced_is_named(tmp_path):
    (tmp_path / "a.wav").mkdir()
    with pytest.raises(OSError) as raised:
        save_audio(tmp_path / "a.wav", torch.zeros(10), RATE)
    assert raised.value.filename == str(tmp_path / "a.wav")
    assert "tmp" not in str(raised.value).replace(str(tmp_path), "")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.wav"):
        load_audio(tmp_path / "missing.wav")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
@pytest.mark.timeout(60)
def test_what_is_no_regular_file(tmp_path):
    """A pipe that nobody writes to would be waited for."""
    os.mkfifo(tmp_path / "speech.wav")
    for path in (tmp_path / "speech.wav", Path("/dev/null")):
        with pytest.raises(ValueError, match=f"^{path}: no regular file; accepted: .*WAV"):
            load_audio(path)


def test_directory(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path.name}: a directory; accepted: .*WAV"):
        load_audio(tmp_path)


@pytest.mark.parametrize("source", [None, 3, np.zeros(10), io.StringIO("text")])
def test_other_types(source):
    with pytest.raises(TypeError, match=f"{type(source).__name__}; accepted: a path, bytes"):
        load_audio(source)


@pytest.mark.parametrize("content", [b"", b"R", b"RIFF", b"ID3", b"OggS", b"fLaC", b"\xff\xfb\x90", b"<html>" * 99])
@pytest.mark.parametrize("suffix", ["wav", "mp3", "raw"])
def test_not_audio(tmp_path, content, suffix):
    path = write(tmp_path / f"culprit.{suffix}", content)
    with pytest.raises(ValueError, match=rf"culprit\.{suffix}: .*accepted: ") as raised:
        load_audio(path)
    if not content.startswith(b"OggS"):  # our own check
        assert isinstance(raised.value.__cause__, (sf.SoundFileError, TypeError))
    with open(path, "rb") as file, pytest.raises(ValueError, match=rf"culprit\.{suffix}: "):
        load_audio(file)
    with pytest.raises(ValueError, match="bytes: "):
        load_audio(content)
    with pytest.raises(ValueError, match="BytesIO: "):
        load_audio(io.BytesIO(content))


@pytest.mark.parametrize("file_format", ["WAV", "AIFF", "OGG"])
def test_no_samples(tmp_path, file_format):
    path = write(tmp_path / "culprit", encode(np.zeros((0, 1)), format=file_format))
    with pytest.raises(ValueError, match="culprit: no samples; accepted"):
        load_audio(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(tmp_path, value):
    data = tone(channels=2)
    data[777, 1] = value
    path = write(tmp_path / "culprit.wav", encode(data, format="WAV", subtype="FLOAT"))
    with pytest.raises(ValueError, match="culprit.wav: NaN or infinite samples; accepted"):
        load_audio(path)


@pytest.mark.parametrize("rate", [1, 999, 1_000_001, 16_000_000])
def test_rates_of_damaged_headers_are_refused(tmp_path, rate):
    sf.write(tmp_path / "a.wav", np.zeros(100), rate)
    with pytest.raises(ValueError, match=rf"a\.wav: a sampling rate of {rate} Hz; accepted: 1000 to 1000000 Hz"):
        load_audio(tmp_path / "a.wav")
    with pytest.raises(ValueError, match=f"array: a sampling rate of {rate} Hz"):
        to_waveform({"array": np.zeros(100, np.float32), "sampling_rate": rate}, 24000)


@pytest.mark.parametrize("rate", [0, -24000])
def test_load_at_a_rate_that_is_not_positive(rate):
    with pytest.raises(ValueError, match=f"sampling_rate .*{rate}"):
        load_audio(SPEECH, rate)


# ---- incomplete files


@pytest.mark.parametrize(
    ("file_format", "subtype"),
    [
        ("WAV", "PCM_16"),
        ("WAV", "FLOAT"),
        ("WAV", "IMA_ADPCM"),
        ("RF64", "PCM_16"),
        ("AIFF", "PCM_16"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", "MPEG_LAYER_III"),
    ],
)
@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_truncated(tmp_path, file_format, subtype, kept):
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 48000)
    content = encode(noise, format=file_format, subtype=subtype)
    load_audio(content)
    path = write(tmp_path / "culprit", content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="culprit: truncated.*accepted: whole files"):
        load_audio(path)


def test_truncated_names_both_counts():
    content = encode(tone(1000), format="WAV")
    with pytest.raises(ValueError, match="2000 bytes of samples, there are 500;"):
        load_audio(content[:-1500])
    content = encode(np.random.default_rng(0).uniform(-0.3, 0.3, 48000), format="FLAC")
    with pytest.raises(ValueError, match=r"promises 48000 samples, about [1-9]\d* could be decoded"):
        load_audio(content[:-1500])


def test_rf64_size_is_that_of_its_ds64_chunk():
    content = bytearray(encode(tone(1000), format="RF64"))
    assert len(load_audio(content)) == 1000
    at = content.index(b"ds64") + 16
    assert struct.unpack_from("<Q", content, at)[0] in (2000, 2002)
    struct.pack_into("<Q", content, at, 2**33)
    with pytest.raises(ValueError, match=f"promises {2**33} bytes"):
        load_audio(content)


@pytest.mark.parametrize("file_format", ["FLAC", "OGG", "MP3"])
def test_damaged(file_format):
    rng = np.random.default_rng(0)
    content = bytearray(encode(rng.uniform(-0.3, 0.3, 48000), format=file_format))
    middle = len(content) // 2
    content[middle : middle + 3000] = rng.bytes(3000)
    with pytest.raises(ValueError, match="bytes: truncated or damaged"):
        load_audio(content)


@pytest.mark.parametrize(
    ("riff_size", "data_size"),
    [
        (0, 0),
        (8, 0),
        (36, 0),  # a program that was stopped before it could set the sizes
        (0xFFFFFFFF, 0),
        (0xFFFFFFFF, 0xFFFFFFFF),  # ffmpeg
        (0xFFFFFFFF, 0xFFFFFFFF - 36),
        (0x7FFFF024, 0x7FFFF000),  # sox
        (0x80000024, 0x80000000),  # arecord
        (0x7FFFFFFF, 0x7FFFFFFF - 36),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_streamed_wav(riff_size, data_size, channels):
    whole = encode(tone(channels=channels), format="WAV")
    content = bytearray(whole)
    assert content[36:40] == b"data"
    struct.pack_into("<I", content, 4, riff_size)
    struct.pack_into("<I", content, 40, data_size)
    assert torch.equal(load_audio(content), load_audio(whole))


def test_wav_with_chunks_around_the_samples():
    whole = encode(tone(), format="WAV")
    odd = b"LIST" + struct.pack("<I", 5) + b"INFOx\0"
    content = bytearray(whole[:36] + odd + whole[36:] + odd)
    struct.pack_into("<I", content, 4, len(content) - 8)
    assert torch.equal(load_audio(content), load_audio(whole))
    with pytest.raises(ValueError, match=f"24000 bytes of samples, there are {24000 - 2}"):
        load_audio(content[: -len(odd) - 2])


def test_wav_whose_data_chunk_is_truly_empty():
    content = bytearray(encode(tone(), format="WAV")[:44] + b"LIST" + struct.pack("<I", 4) + b"INFO")
    struct.pack_into("<I", content, 4, len(content) - 8)
    struct.pack_into("<I", content, 40, 0)
    with pytest.raises(ValueError, match="bytes: no samples"):
        load_audio(content)


def test_flac_of_unknown_length():
    whole = encode(tone(), format="FLAC")
    content = bytearray(whole)
    content[21] &= 0xF0  # the low 36 of these bits are the number of samples
    content[22:26] = bytes(4)
    assert torch.equal(load_audio(content), load_audio(whole))
    with pytest.raises(ValueError, match="promises an unstated number of samples"):
        load_audio(content[: len(content) // 2])


def test_several_ogg_streams():
    content = encode(tone(), format="OGG")
    with pytest.raises(ValueError, match="bytes: 2 OGG streams"):
        load_audio(content + content)
    assert torch.equal(load_audio(content + b"TAG" + bytes(125)), load_audio(content))


def loud_then_quiet(channels: int) -> np.ndarray:
    """Of which a variable bit rate makes a file that is much shorter per second than it starts."""
    data = np.random.default_rng(0).uniform(-0.5, 0.5, (96000, channels))
    data[12000:] *= 1e-3
    return data


def without_xing(content: bytes) -> bytes:
    """An MP3 less its first frame, which holds no audio but the number of frames."""
    tag = max(content.find(b"Xing"), content.find(b"Info"))
    return content[content.index(content[:2], tag) :]


ID3V2 = b"ID3\x04\0\0" + bytes([0, 0, 2, 44]) + bytes(300)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("prefix", [b"", ID3V2])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("channels", [1, 2])
def test_mp3_without_xing_header_is_read_to_its_end(mode, prefix, reverse, channels):
    data = loud_then_quiet(channels)[:: -1 if reverse else 1]
    whole = encode(data, format="MP3", bitrate_mode=mode, compression_level=0.1)
    expected = load_audio(prefix + whole)
    assert len(expected) == len(data)
    samples = load_audio(prefix + without_xing(whole))
    # Without the header the encoder's delay and padding stay.
    assert len(data) <= len(samples) <= len(data) + 4 * 1152
    # The same audio otherwise, to its end.
    offset = len(samples) - len(expected) - np.arange(len(samples) - len(expected) + 1)
    errors = [(samples[at : at + len(expected)] - expected).abs().max() for at in offset]
    assert min(errors) < 1e-3


def test_mp3_with_a_wrong_xing_header():
    content = bytearray(encode(loud_then_quiet(1), format="MP3", bitrate_mode="VARIABLE", compression_level=0.1))
    frames = content.index(b"Xing") + 8
    (count,) = struct.unpack_from(">I", content, frames)
    for wrong, message in ((0, "goes on after"), (count // 2, "goes on after"), (2 * count, "truncated")):
        struct.pack_into(">I", content, frames, wrong)
        with pytest.raises(ValueError, match=f"bytes: {message}"):
            load_audio(content)


@pytest.mark.parametrize("suffix", [b"TAG" + bytes(125), b"APETAGEX" + b"\1" * 9000, bytes(9000)])
def test_mp3_tags(suffix):
    content = encode(tone(), format="MP3")
    assert torch.equal(load_audio(ID3V2 + content + suffix), load_audio(content))


@pytest.mark.parametrize("prefix", [b"", ID3V2])
def test_joined_mp3(prefix):
    content = prefix + encode(tone(48000), format="MP3")
    with pytest.raises(ValueError, match="bytes: goes on after the 48000 samples that its header promises"):
        load_audio(content + content)


# ---- resample


def exact(waveform: np.ndarray, orig: int, new: int, outputs: np.ndarray) -> np.ndarray:
    """Some outputs of the filter, by its formula over all inputs and in float64."""
    gcd = math.gcd(orig, new)
    orig, new = orig // gcd, new // gcd
    cutoff = min(orig, new) * 0.99
    inputs = np.arange(len(waveform))
    result = []
    for output in outputs:
        time = np.clip((inputs / orig - output / new) * cutoff, -6, 6)
        result.append((waveform * np.sinc(time) * np.cos(time * np.pi / 12) ** 2).sum() * cutoff / orig)
    return np.array(result)


RATES = [(rate, 24000) for rate in (8000, 11025, 16000, 22050, 32000, 44100, 48000, 96000, 192000)] + [(24000, 16000)]


@pytest.mark.parametrize(("orig", "new"), RATES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_resample_as_torchaudio(orig, new, dtype, tolerance):
    reference = load_file(FIXTURES / "resample.safetensors")
    output = resample(reference["noise"].to(dtype), orig, new)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), reference[f"{orig}_{new}"], atol=tolerance, rtol=0)


@pytest.mark.parametrize(("orig", "new"), [(44100, 24000), (22051, 24000), (24000, 44100), (7, 3), (192000, 1000)])
def test_resample_by_the_formula_across_chunks(orig, new, monkeypatch):
    monkeypatch.setattr(audio, "_RESAMPLE_ELEMENTS", 2**14)
    waveform = np.random.default_rng(0).uniform(-1, 1, 40000)
    output = resample(torch.from_numpy(waveform), orig, new)
    assert len(output) == math.ceil(new * len(waveform) / orig)
    step = 2**14 // audio._filter_weights(orig // math.gcd(orig, new), new // math.gcd(orig, new)).shape[1]
    assert len(output) > 3 * step, "too few chunks"
    edges = np.r_[0:5, step - 5 : step + 5, 2 * step - 5 : 2 * step + 5, len(output) - 20 : len(output)]
    np.testing.assert_allclose(output[edges].numpy(), exact(waveform, orig, new, edges), atol=1e-10, rtol=0)


def test_resample_long_input_does_not_depend_on_the_chunks(monkeypatch):
    waveform = torch.rand(2, 200_000) - 0.5
    chunked = resample(waveform, 44100, 24000)
    monkeypatch.setattr(audio, "_RESAMPLE_ELEMENTS", 2**40)
    torch.testing.assert_close(chunked, resample(waveform, 44100, 24000), atol=1e-7, rtol=0)


@pytest.mark.parametrize(("orig", "new"), [(44100, 24000), (22051, 24000), (24001, 24000), (192000, 24000)])
def test_resample_memory_is_bounded(orig, new):
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                    self.elements = max(self.elements, elements)
            return result

    waveform = torch.rand(8, 100_000)
    with Largest() as largest:
        output = resample(waveform, orig, new)
    # A dense kernel for 22051 -> 24000 has 24000 * (22051 + 14) = 530 million elements, all windows 8 * 109000 * 16.
    assert largest.elements <= max(waveform.numel() + 8 * 200, output.numel(), audio._RESAMPLE_ELEMENTS, 24000 * 16)
    gcd = math.gcd(orig, new)
    assert audio._filter_weights(orig // gcd, new // gcd).size <= 13 * max(orig, new) // gcd + 4 * new // gcd


@pytest.mark.parametrize("shape", [(1000,), (1, 1000), (2, 3, 1000), (0, 1000), (2, 0), (0,), (2, 1)])
def test_resample_shapes(shape):
    waveform = torch.rand(shape)
    output = resample(waveform, 44100, 24000)
    assert output.shape == (*shape[:-1], math.ceil(shape[-1] * 24000 / 44100))
    for index in np.ndindex(shape[:-1]):
        torch.testing.assert_close(output[index], resample(waveform[index], 44100, 24000))


def test_resample_to_the_same_rate():
    waveform = torch.rand(10)
    assert resample(waveform, 24000, 24000) is waveform


def test_resample_has_a_gradient_after_inference_mode():
    audio._filter_weights.cache_clear()
    with torch.inference_mode():
        resample(torch.rand(100), 3, 2)
    waveform = torch.rand(12, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda waveform: resample(waveform, 3, 2), waveform)


def test_resample_errors():
    for orig, new in ((0, 24000), (24000, 0), (-1, 24000)):
        with pytest.raises(ValueError, match=f"positive, got {orig} and {new}"):
            resample(torch.zeros(10), orig, new)
    with pytest.raises(TypeError, match="int16"):
        resample(torch.zeros(10, dtype=torch.int16), 44100, 24000)
    with pytest.raises(TypeError):
        resample(torch.zeros(10), 44100.0, 24000)


# ---- save_audio


@pytest.mark.parametrize(
    ("suffix", "file_format", "subtype", "tolerance"),
    [
        ("wav", "WAV", "PCM_16", 2**-15),
        ("WAV", "WAV", "PCM_16", 2**-15),
        ("flac", "FLAC", "PCM_16", 2**-15),
        ("ogg", "OGG", "VORBIS", 0.05),
        ("mp3", "MP3", "MPEG_LAYER_III", 0.05),
    ],
)
def test_save_formats(tmp_path, suffix, file_format, subtype, tolerance):
    path = tmp_path / "new" / "directory" / f"out.{suffix}"
    waveform = torch.from_numpy(tone()[:, 0])
    save_audio(path, waveform, RATE)
    info = sf.info(path)
    assert (info.format, info.subtype, info.samplerate, info.channels) == (file_format, subtype, RATE, 1)
    torch.testing.assert_close(load_audio(path), waveform.float(), atol=tolerance, rtol=0)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_save_is_exact_for_16_bit_samples_and_rounds_others(tmp_path, suffix):
    path = tmp_path / f"out.{suffix}"
    speech = load_audio(SPEECH)
    save_audio(path, speech, RATE)
    assert torch.equal(load_audio(path), speech)
    save_audio(path, torch.tensor([-1.6, -1.4, -0.6, -0.4, 0.4, 0.6, 1.4, 1.6]) / 32768, RATE)
    assert sf.read(path, dtype="int16")[0].tolist() == [-2, -1, -1, 0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, np.float64, np.float32]
)
@pytest.mark.parametrize("shape", [(500,), (1, 500)])
def test_save_dtypes_and_shapes(tmp_path, dtype, shape):
    values = np.linspace(-0.5, 0.5, 500).reshape(shape)
    if isinstance(dtype, torch.dtype):
        waveform = torch.from_numpy(values).to(dtype).requires_grad_()
    else:
        waveform = values.astype(dtype)[..., ::-1]
        waveform.flags.writeable = False
        values = values[..., ::-1]
    save_audio(str(tmp_path / "out.wav"), waveform, RATE)
    np.testing.assert_allclose(load_audio(tmp_path / "out.wav").numpy(), values.reshape(-1), atol=2e-3)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_save_clips(tmp_path, suffix, dtype):
    waveform = torch.from_numpy(tone(24000)[:, 0] * 6)  # three times full scale
    save_audio(tmp_path / f"loud.{suffix}", waveform.to(dtype), RATE)
    samples = load_audio(tmp_path / f"loud.{suffix}")
    tolerance = 1e-3 if suffix in ("wav", "flac") else 0.3
    torch.testing.assert_close(samples, waveform.float().clamp(-1, 1), atol=tolerance, rtol=0)


def test_save_long_ogg(tmp_path):
    """libsndfile crashes on so much in one write."""
    save_audio(tmp_path / "long.ogg", torch.zeros(100 * RATE), RATE)
    assert sf.info(tmp_path / "long.ogg").frames == 100 * RATE


@pytest.mark.parametrize(
    ("name", "waveform", "rate", "message"),
    [
        ("out.txt", torch.zeros(10), RATE, "extension '.txt'; accepted: .wav, .flac, .ogg, .mp3"),
        ("out", torch.zeros(10), RATE, "extension ''"),
        ("out.wav", torch.tensor([0.0, math.nan]), RATE, "NaN or infinite"),
        ("out.wav", torch.tensor([0.0, -math.inf]), RATE, "NaN or infinite"),
        ("out.wav", torch.zeros(0), RATE, r"shape \(0,\); accepted"),
        ("out.wav", torch.zeros(1, 0), RATE, r"shape \(1, 0\)"),
        ("out.wav", torch.zeros(2, 10), RATE, r"shape \(2, 10\)"),
        ("out.wav", torch.zeros(10, 1), RATE, r"shape \(10, 1\)"),
        ("out.wav", torch.zeros(1, 1, 10), RATE, r"shape \(1, 1, 10\)"),
        ("out.wav", torch.tensor(0.0), RATE, r"shape \(\)"),
        ("out.wav", torch.zeros(10, dtype=torch.int16), RATE, "torch.int16; accepted: a floating dtype"),
        ("out.wav", np.zeros(10, dtype=np.int16), RATE, "torch.int16"),
        ("out.wav", torch.zeros(10), 0, "0 Hz"),
        ("out.mp3", torch.zeros(10), 12345, "MP3 at 12345 Hz"),
    ],
)
def test_save_errors(tmp_path, name, waveform, rate, message):
    path = tmp_path / "new" / name
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        save_audio(path, waveform, rate)
    assert not path.parent.exists() or os.listdir(path.parent) == []


@pytest.mark.parametrize("existing", [None, b"earlier content"])
def test_failing_write_leaves_nothing_behind(tmp_path, monkeypatch, existing):
    path = tmp_path / "out.wav"
    if existing is not None:
        path.write_bytes(existing)
    write = sf.SoundFile.write
    seen = []

    def fail(self, data):
        write(self, data)
        seen.append(sorted(os.listdir(tmp_path)))
        if len(seen) == 3:
            raise sf.LibsndfileError(2)

    monkeypatch.setattr(sf.SoundFile, "write", fail)
    with pytest.raises(OSError, match="out.wav: cannot be written"):
        save_audio(path, torch.rand(600_000), RATE)
    assert len(seen) == 3
    assert len(seen[-1]) == (1 if existing is None else 2), "written under a temporary name"
    assert os.listdir(tmp_path) == ([] if existing is None else ["out.wav"])
    if existing is not None:
        assert path.read_bytes() == existing


def test_save_replaces_a_file(tmp_path):
    path = write(tmp_path / "out.wav", b"earlier content")
    save_audio(path, torch.zeros(10), RATE)
    assert len(load_audio(path)) == 10
    assert os.listdir(tmp_path) == ["out.wav"]


def test_audio_that_is_finite_until_it_is_resampled(tmp_path):
    path = tmp_path / "loud.wav"
    sf.write(path, np.random.default_rng(0).choice(np.float32([3.3e38, -3.3e38]), 44100), 44100, "FLOAT")
    assert len(load_audio(path, 44100)) == 44100
    with pytest.raises(ValueError, match="loud.wav: too loud to be resampled in float32; accepted"):
        load_audio(path, 24000)
