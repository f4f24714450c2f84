"""Code files."""

from __future__ import annotations

import os
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mimo_audio_hf import MiMoAudioTokenizerConfig
from mimo_audio_hf.codes import AudioCodes, code_dtype


METADATA = {
    "format": "mimo_audio_codes",
    "version": "1",
    "sampling_rate": "24000",
    "samples_per_frame": "960",
    "num_samples": "4321",
    "codebook_sizes": "[1024, 1024, 128]",
    "model": "owner/name",
}
CODES = torch.tensor([[1023, 0, 127], [5, 6, 7], [1, 2, 3], [0, 1023, 0], [9, 9, 9]])


def audio_codes(**changes) -> AudioCodes:
    fields = {
        "codes": CODES,
        "codebook_sizes": (1024, 1024, 128),
        "sampling_rate": 24000,
        "samples_per_frame": 960,
        "num_samples": 4321,
        "model": "owner/name",
    }
    return AudioCodes(**fields | changes)


def test_a_file_says_everything_and_comes_back(tmp_path):
    path = tmp_path / "new" / "folder" / "clip.safetensors"
    audio_codes().save(path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == METADATA
        assert list(file.keys()) == ["audio_codes"]
        assert file.get_tensor("audio_codes").dtype == torch.int16
    loaded = AudioCodes.load(path)
    assert loaded.codes.dtype == torch.int64
    assert torch.equal(loaded.codes, CODES)
    assert (loaded.codebook_sizes, loaded.sampling_rate, loaded.samples_per_frame) == ((1024, 1024, 128), 24000, 960)
    assert (loaded.num_samples, loaded.model) == (4321, "owner/name")
    assert list(path.parent.iterdir()) == [path]


def test_a_file_is_readable_as_others_are(tmp_path):
    (tmp_path / "other").touch()
    audio_codes().save(tmp_path / "clip.safetensors")
    assert (tmp_path / "clip.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ([128, 256], torch.uint8),
        ([128, 257], torch.int16),
        ([1024, 128], torch.int16),
        ([2**15], torch.int16),
        ([2**15 + 1], torch.int32),
    ],
)
def test_the_smallest_dtype_holds_the_largest_code(tmp_path, sizes, dtype):
    assert code_dtype(sizes) == dtype
    codes = torch.tensor([[size - 1 for size in sizes]])
    audio_codes(codes=codes, codebook_sizes=tuple(sizes), num_samples=1).save(tmp_path / "clip.safetensors")
    assert torch.equal(AudioCodes.load(tmp_path / "clip.safetensors").codes, codes)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32])
def test_unsigned_codes(tmp_path, dtype):
    audio_codes(codes=CODES.to(dtype)).save(tmp_path / "clip.safetensors")
    assert torch.equal(AudioCodes.load(tmp_path / "clip.safetensors").codes, CODES)


def test_of_a_model():
    config = MiMoAudioTokenizerConfig(name_or_path="owner/name")
    codes = AudioCodes.of_model(config, CODES, num_samples=4321)
    assert codes.codebook_sizes == (1024, 1024, 128)
    assert (codes.sampling_rate, codes.samples_per_frame, codes.model) == (24000, 960, "owner/name")


def test_duration_and_bitrate():
    assert audio_codes().seconds == pytest.approx(4321 / 24000)
    assert audio_codes().bitrate == pytest.approx(25 * (10 + 10 + 7))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"codes": CODES[0]}, r"codes have shape \(3,\)"),
        ({"codes": CODES[:0]}, r"codes have shape \(0, 3\)"),
        ({"codes": CODES.float()}, "codes are torch.float32"),
        ({"codes": CODES.bool()}, "codes are torch.bool"),
        ({"codes": CODES.numpy()}, "codes are a ndarray; accepted: a torch.Tensor"),
        ({"codes": CODES.tolist()}, "codes are a list"),
        ({"codebook_sizes": 1024}, "codebook_sizes=1024; accepted: a tuple"),
        ({"sampling_rate": "24000"}, "sampling_rate='24000'; accepted: an integer"),
        ({"num_samples": None}, "num_samples=None"),
        ({"model": None}, "model=None"),
        ({"codes": (CODES + 1).to(torch.uint16)}, r"1 to 1024 for codebook 0"),
        ({"codes": CODES + 1}, r"1 to 1024 for codebook 0 .*0 to 1023"),
        ({"codes": CODES - 1}, r"-1 to 1022 for codebook 0"),
        ({"codebook_sizes": (1024, 1024)}, r"codebook_sizes=\[1024, 1024\]"),
        ({"codebook_sizes": (1024, 1024, 0)}, r"codebook_sizes=\[1024, 1024, 0\]"),
        ({"sampling_rate": 0}, "sampling_rate=0"),
        ({"samples_per_frame": 0}, "samples_per_frame=0"),
        ({"num_samples": 0}, "num_samples=0; accepted: 1 to 4800"),
        ({"num_samples": 4801}, "num_samples=4801; accepted: 1 to 4800"),
    ],
)
def test_fields_that_do_not_fit_are_named(changes, fault):
    with pytest.raises(ValueError, match=fault):
        audio_codes(**changes)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"format": "something else"}, "not of codes"),
        ({"format": None}, "not of codes"),
        ({"version": "2"}, "version '2'; accepted: version '1'"),
        ({"version": None}, "version None"),
        ({"sampling_rate": None}, "sampling_rate is missing"),
        ({"sampling_rate": "fast"}, "sampling_rate='fast'"),
        ({"samples_per_frame": None}, "samples_per_frame is missing"),
        ({"num_samples": None}, "num_samples is missing"),
        ({"num_samples": "-5"}, "num_samples='-5'"),
        ({"num_samples": "4801"}, "num_samples=4801"),
        ({"codebook_sizes": None}, "codebook_sizes is missing"),
        ({"codebook_sizes": "[1024,"}, "codebook_sizes='.1024,'"),
        ({"codebook_sizes": '["1024", 1, 1]'}, "codebook_sizes="),
        ({"codebook_sizes": "[1024, 1024]"}, "codebook_sizes="),
        ({"codebook_sizes": "[1024, 1024, 127]"}, "codebook 2"),
        ({"model": None}, "model is missing"),
    ],
)
def test_wrong_metadata_is_named_with_its_file(tmp_path, changes, fault):
    path = tmp_path / "clip.safetensors"
    metadata = {name: value for name, value in (METADATA | changes).items() if value is not None}
    save_file({"audio_codes": CODES.short()}, path, metadata)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{fault}"):
        AudioCodes.load(path)


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ({"audio_codes": CODES.float()}, "torch.float32"),
        ({"audio_codes": CODES}, "torch.int64"),
        ({"audio_codes": CODES[0].short()}, r"shape \(3,\)"),
        ({"codes": CODES.short()}, r"tensors \['codes'\]"),
        ({"audio_codes": CODES.short(), "more": CODES}, r"tensors \['audio_codes', 'more'\]"),
    ],
)
def test_wrong_tensors_are_named_with_their_file(tmp_path, tensors, fault):
    path = tmp_path / "clip.safetensors"
    save_file(tensors, path, METADATA)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{fault}"):
        AudioCodes.load(path)


def test_files_that_are_none(tmp_path):
    path = tmp_path / "clip.safetensors"
    with pytest.raises(FileNotFoundError, match="clip.safetensors"):
        AudioCodes.load(path)
    for content in (b"", b"RIFF, certainly no safetensors"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: no safetensors file"):
            AudioCodes.load(path)
    audio_codes().save(tmp_path / "whole.safetensors")
    path.write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: no safetensors file"):
        AudioCodes.load(path)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}: a directory"):
        AudioCodes.load(tmp_path)


def test_a_code_file_is_overwritten_and_nothing_else(tmp_path):
    path = tmp_path / "clip.safetensors"
    audio_codes().save(path)
    audio_codes(num_samples=17).save(path)
    assert AudioCodes.load(path).num_samples == 17

    weights = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(3)}, weights)
    content = weights.read_bytes()
    with pytest.raises(ValueError, match=f"^{re.escape(str(weights))} exists and is no code file"):
        audio_codes().save(weights)
    assert weights.read_bytes() == content

    with pytest.raises(ValueError, match=r"clip\.wav: .*accepted: clip\.safetensors"):
        audio_codes().save(tmp_path / "clip.wav")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clip.safetensors", "model.safetensors"]


def test_a_failed_write_leaves_everything_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "clip.safetensors"
    audio_codes().save(path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        audio_codes(num_samples=17).save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert AudioCodes.load(path).num_samples == 4321


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"sampling_rate": 16000}, "sampling_rate=24000 .*accepted: 16000"),
        ({"hop_length": 120}, "samples_per_frame=960 .*accepted: 480"),
        ({"codebook_size": [1024, 128]}, r"codebook_sizes=\[1024, 1024, 128\] .*accepted: \[1024, 128, 128\]"),
        ({"num_quantizers": 2}, r"codebook_sizes=\[1024, 1024, 128\] .*accepted: \[1024, 1024\]"),
    ],
)
def test_a_model_that_cannot_decode_these_codes(fields, fault):
    audio_codes().require_decodable(MiMoAudioTokenizerConfig())
    with pytest.raises(ValueError, match=fault):
        audio_codes().require_decodable(MiMoAudioTokenizerConfig(**fields))
