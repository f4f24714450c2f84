"""Reading JSON, and writing so that nobody sees half of a file."""

from __future__ import annotations

import os

import pytest

from mimo_audio_hf import AudioCodes
from mimo_audio_hf.files import read_json, replacing
from mimo_audio_hf.sources import open_source


def test_json_objects(tmp_path):
    file = tmp_path / "some.json"
    file.write_text('{"a": {"b": [1]}, "c": "\u00e9"}', encoding="utf-8")
    entries = {"a": dict, "a.b": list, "c": str}
    assert read_json(file) == read_json(file, entries) == {"a": {"b": [1]}, "c": "\u00e9"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: .*No such file"),
        (b"{", "cannot be read: .*; accepted: a JSON object"),
        (b"", "cannot be read"),
        (b'{"a": "\xff"}', "cannot be read"),
        (b"[1]", "holds a list; accepted: a JSON object"),
        (b"null", "holds a NoneType"),
        (b"{}", "a.b is missing; accepted: int"),
        (b'{"a": null}', "a.b is missing"),
        (b'{"a": [1]}', "a.b is missing"),
        (b'{"a": {"b": "1"}}', "a.b is of type str; accepted: int"),
    ],
)
def test_json_that_is_something_else(content, message, tmp_path):
    file = tmp_path / "some.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"some\.json:? {message}"):
        read_json(file, {"a.b": int})


def test_a_file_is_replaced_as_a_whole(tmp_path):
    file = tmp_path / "folder" / "file"
    with replacing(file) as temporary:
        temporary.write_text("old")
    with pytest.raises(KeyError), replacing(file) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
@pytest.mark.timeout(60)
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "some.json")
    with pytest.raises(ValueError, match=r"some\.json: no regular file; accepted: a file"):
        read_json(tmp_path / "some.json")
    os.mkfifo(tmp_path / "list.jsonl")
    with pytest.raises(ValueError, match=r"list\.jsonl: no regular file; accepted: a folder"):
        open_source(str(tmp_path / "list.jsonl"))
    os.mkfifo(tmp_path / "some.safetensors")
    with pytest.raises(ValueError, match=r"some\.safetensors: no regular file; accepted: a code file"):
        AudioCodes.load(tmp_path / "some.safetensors")
