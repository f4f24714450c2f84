"""A few hundred inputs for each parser of fuzz.py; benchmarks/results/fuzz.json has what a hundred thousand gave.

And, one by one, the inputs that fuzzing found to give other errors than documented.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import fuzz
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimo_audio_hf import AudioCodes, load_model
from mimo_audio_hf.files import read_json
from mimo_audio_hf.offline import load_tokens, read_list
from mimo_audio_hf.sources import JsonLinesSource, Problem
from mimo_audio_hf.training.config import TrainingConfig, read_yaml


PARSERS = fuzz.parsers()
EXAMPLES = {"config.json with weights": 20}  # each makes a model
DEEP = "[" * 100_000
DIGITS = "1" * 5000


@pytest.mark.parametrize("name", PARSERS)
def test_damaged_inputs_give_documented_errors(name, tmp_path):
    parser = PARSERS[name]
    path = tmp_path / fuzz.file_name(name)
    seen = set()

    @settings(
        max_examples=EXAMPLES.get(name, 200),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32).map(lambda number: fuzz.make_input(parser, name, number)) | st.binary(max_size=200))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        told = fuzz.outcome(parser, path)
        seen.add(told)
        assert told in ("accepted", "refused")

    check()
    for seed in parser.seeds:
        path.write_bytes(seed)
        assert fuzz.outcome(parser, path) == "accepted"
    assert "refused" in seen or name in ("offline lists", "JSON-lines sources")  # which tell of lines


def test_a_failure_is_found_out(tmp_path):
    def read(path: Path) -> None:
        if path.read_bytes() == b"\0":
            raise KeyError("oh")
        raise ValueError("somewhere")

    parser = fuzz.Parser([b"good"], read)
    (tmp_path / "input").write_bytes(b"\0")
    assert fuzz.outcome(parser, tmp_path / "input").startswith("KeyError: 'oh' (test_fuzz.py:")
    (tmp_path / "input").write_bytes(b"\1")
    assert fuzz.outcome(parser, tmp_path / "input").startswith("ValueError that does not name")


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 100_000, f'{{"a": {DIGITS}}}'])
def test_json_beyond_pythons_limits(text, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(text)
    for read in (read_json, lambda path: load_tokens(str(path))):
        with pytest.raises(ValueError, match="file.json"):
            read(path)


@pytest.mark.parametrize("bad", [b'{"key": "\xff"}', DEEP.encode(), DIGITS.encode()])
def test_a_line_that_cannot_be_read_is_one_problem(bad, tmp_path):
    good = b'{"key": "a", "wav": "a.wav", "quantized_tokens": "a.json"}'
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join((good, bad, good.replace(b'a.json"', b'b.json"'))))
    lines, (problem,) = read_list(path, "wav2token")
    assert [line["quantized_tokens"] for line in lines] == ["a.json", "b.json"]
    assert problem.startswith(f"{path}, line 2: ") and "accepted: a JSON object" in problem
    found = [row for unit in JsonLinesSource(str(path), ["wav"]).units() for row in unit]
    assert [isinstance(row, Problem) for row in found] == [False, True, False]


@pytest.mark.parametrize("name", ["a\0.wav", "a\ud800.wav"])
def test_paths_that_no_file_has(name, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"key": "a", "wav": "a.wav", "quantized_tokens": name}))
    lines, (problem,) = read_list(path, "wav2token")
    assert not lines and "line 1: quantized_tokens=" in problem and "accepted: a path" in problem


@pytest.mark.parametrize("sizes", [DEEP, f"[{DIGITS}]"])
def test_metadata_beyond_pythons_limits(sizes, tmp_path):
    path = tmp_path / "codes.safetensors"
    AudioCodes(torch.zeros(1, 1).long(), (8,), 24000, 960, 960, "owner/name").save(path)
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["codebook_sizes"] = sizes
    written = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + data[8 + size :])
    with pytest.raises(ValueError, match="codes.safetensors: metadata codebook_sizes"):
        AudioCodes.load(path)


@pytest.mark.parametrize("text", ["!!int ''", "!!float ''", "!!bool x", "!!timestamp x", DEEP])
def test_yaml_that_is_none(text, tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(f"stage: {text}\n")
    with pytest.raises(ValueError, match="options.yaml cannot be read"):
        read_yaml(path)


def test_yaml_that_stands_for_gigabytes(tmp_path):
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 20)]
    values = yaml.safe_load("\n".join(lines))
    with pytest.raises(ValueError, match="stage=.*accepted: int") as caught:
        TrainingConfig.from_values({"stage": values["a19"]})
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": "x"}, "config.json: "),
        ({"num_labels": "1e999"}, "config.json: "),
        ({"dtype": True}, "dtype=True; accepted: the name of a torch.dtype"),
        ({"num_quantizers": 2**31}, "num_quantizers=2147483648; accepted: a positive integer, at most 1024"),
        ({"encoder_layers": 1025}, "encoder_layers=1025; accepted: a positive integer, at most 1024"),
        ({"encoder_layers": 1024, "d_model": 2**20}, "does not hold a checkpoint of this"),  # many terabytes
    ],
)
def test_configurations(fields, message, tmp_path):
    config = json.loads(fuzz.tiny("config.json")) | fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(fuzz.tiny("model.safetensors"))
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path, device="cpu")
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("text", [DEEP, f'{{"d_model": {DIGITS}}}'])
def test_configurations_beyond_pythons_limits(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json cannot be read"):
        load_model(tmp_path, device="cpu")
