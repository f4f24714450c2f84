"""Jobs: every source, resuming, what can go wrong with clips, files and disks."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from datasets import Audio, ClassLabel, Dataset, DatasetDict, load_dataset
from filelock import FileLock

from mimo_audio_hf import decode_codes, encode_waveforms, load_audio
from mimo_audio_hf.cli import main


SUFFIXES = (".wav", ".flac")
RATES = (24000, 16000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """40 short clips in two folders."""
    folder = tmp_path_factory.mktemp("speech")
    generator = np.random.default_rng(0)
    for index in range(40):
        path = folder / "ab"[index % 2] / f"{index:02}{SUFFIXES[index % 2]}"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, generator.uniform(-0.5, 0.5, int(generator.integers(100, 5000))), RATES[index % 2])
    (folder / "notes.txt").write_text("no audio")
    (folder / "a" / ".hidden.wav").write_text("no audio")
    return folder


@pytest.fixture(scope="module")
def expected(folder, tiny_model) -> dict[str, torch.Tensor]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.name[0] != ".")
    codes = encode_waveforms(tiny_model, [load_audio(path) for path in paths])
    return {path.relative_to(folder).as_posix(): clip for path, clip in zip(paths, codes, strict=True)}


@pytest.fixture
def tokenize(tmp_path, tiny_checkpoint, capfd, caplog):
    """Runs the command; returns its status and what it said."""

    def run(source, *options: str, out: Path = tmp_path / "out", command: str = "tokenize"):
        arguments = [command, str(source), str(out), "--model", str(tiny_checkpoint), "--device", "cpu", *options]
        caplog.clear()
        status = main(arguments)
        captured = capfd.readouterr()
        return status, captured.out, captured.err + caplog.text

    return run


def rows_of(out: Path) -> dict[str, dict]:
    rows = [row for shard in sorted(out.glob("data/*.parquet")) for row in pq.read_table(shard).to_pylist()]
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: row for row in rows}


def check(out: Path, expected: dict[str, torch.Tensor]) -> dict[str, dict]:
    rows = rows_of(out)
    assert rows.keys() == expected.keys()
    for key, codes in expected.items():
        assert torch.equal(torch.tensor(rows[key]["audio_codes"]), codes)
        assert -(-rows[key]["num_samples"] // 960) <= len(codes)
    return rows


def errors_of(out: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "errors.jsonl").read_text().rstrip("\n").split("\n")]
    assert len({line["key"] for line in lines}) == len(lines)
    return {line["key"]: line["error"] for line in lines}


# --- Sources ---


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_folder(tokenize, folder, expected, tmp_path, workers):
    status, output, _ = tokenize(folder, "--num-workers", workers, "--shard-clips", "15")
    assert status == 0
    assert "tokenized 40 of 40 clips" in output
    check(tmp_path / "out", expected)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [shard["clips"] for shard in manifest["shards"]] == [15, 15, 10]
    assert (manifest["complete"], manifest["clips"], manifest["failed"]) == (True, 40, 0)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".job", "README.md", "data", "manifest.json"]


def test_load_dataset_reads_the_result(tokenize, folder, expected, tmp_path):
    tokenize(folder, "--num-quantizers", "3")
    dataset = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"]
    assert len(dataset) == 40
    assert str(dataset.features["audio_codes"]) == "List(List(Value('int16')))"
    assert all(torch.equal(torch.tensor(row["audio_codes"]), expected[row["key"]][:, :3]) for row in dataset)


def test_load_dataset_reads_what_is_there_now(tmp_path, write_audio, tiny_checkpoint):
    """Its cache knows such a directory by its last name and its README."""
    arguments = ["--model", str(tiny_checkpoint), "--device", "cpu", "--num-workers", "0"]
    cache = str(tmp_path / "cache")

    def keys(out: Path) -> list[str]:
        return sorted(load_dataset(str(out), split="train", cache_dir=cache)["key"])

    for name in ("a", "b"):
        write_audio(tmp_path / name / "audio" / f"{name}.wav", 5000)
        assert main(["tokenize", str(tmp_path / name / "audio"), str(tmp_path / name / "out"), *arguments]) == 0
        assert keys(tmp_path / name / "out") == [f"{name}.wav"]
    readme = tmp_path / "b" / "out" / "README.md"
    written = readme.read_text()
    assert main(["tokenize", str(tmp_path / "b" / "audio"), str(tmp_path / "b" / "out"), *arguments]) == 0
    assert readme.read_text() == written
    write_audio(tmp_path / "b" / "audio" / "c.wav", 5000)
    assert main(["tokenize", str(tmp_path / "b" / "audio"), str(tmp_path / "b" / "out"), *arguments]) == 0
    assert keys(tmp_path / "b" / "out") == ["b.wav", "c.wav"]
    # Another README than a job's is left alone.
    readme.write_text("# Mine\n")
    write_audio(tmp_path / "b" / "audio" / "d.wav", 5000)
    assert main(["tokenize", str(tmp_path / "b" / "audio"), str(tmp_path / "b" / "out"), *arguments]) == 0
    assert readme.read_text() == "# Mine\n"


def test_a_list_of_json_lines(tokenize, folder, expected, tmp_path):
    lines = [
        {"wav": os.path.relpath(folder / key, tmp_path), "key": index, "text": "ä", "score": index % 2 or 0.5}
        for index, key in enumerate(expected)
    ]
    del lines[3]["text"]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "list.jsonl").write_text("\ufeff" + text, encoding="utf-8")
    assert tokenize(tmp_path / "list.jsonl", "--num-workers", "1")[0] == 0
    rows = check(tmp_path / "out", {str(index): codes for index, codes in enumerate(expected.values())})
    assert (rows["2"]["text"], rows["3"]["text"], rows["3"]["score"]) == ("ä", None, 1.0)
    assert rows["2"]["wav"] == lines[2]["wav"]


def audio_table(folder: Path, keys: list[str]) -> Dataset:
    columns = {
        "speech": [{"bytes": (folder / key).read_bytes(), "path": None} for key in keys],
        "name": keys,
        "label": [index % 2 for index in range(len(keys))],
    }
    table = Dataset.from_dict(columns).cast_column("label", ClassLabel(names=["no", "yes"]))
    return table.cast_column("speech", Audio())


def test_a_saved_dataset_with_splits(tokenize, folder, expected, tmp_path):
    table = audio_table(folder, list(expected))
    DatasetDict({"train": table.select([1, 0]), "test": table}).save_to_disk(tmp_path / "saved")
    status, _, errors = tokenize(tmp_path / "saved")
    assert status == 1
    assert "--split is None; accepted: 'train', 'test'" in errors
    assert tokenize(tmp_path / "saved", "--split", "test", "--key-column", "name")[0] == 0
    check(tmp_path / "out", expected)
    dataset = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"]
    assert dataset.features["label"].names == ["no", "yes"]
    assert set(dataset.column_names) == {"key", "label", "audio_codes", "num_samples"}


def test_a_dataset_without_keys_has_its_rows_numbers(tokenize, folder, expected, tmp_path):
    audio_table(folder, list(expected)).save_to_disk(tmp_path / "saved")
    assert tokenize(tmp_path / "saved")[0] == 0
    check(tmp_path / "out", {str(index): codes for index, codes in enumerate(expected.values())})


def test_parquet_files(tokenize, folder, expected, tmp_path):
    table = audio_table(folder, list(expected))
    (tmp_path / "tables").mkdir()
    table.select(range(25)).to_parquet(tmp_path / "tables" / "x.parquet", batch_size=10)
    table.select(range(25, 40)).to_parquet(tmp_path / "tables" / "y.parquet")
    assert pq.ParquetFile(tmp_path / "tables" / "x.parquet").num_row_groups == 3
    assert tokenize(tmp_path / "tables", "--num-workers", "1")[0] == 0
    keys = [f"x.parquet:{row}" for row in range(25)] + [f"y.parquet:{row}" for row in range(15)]
    rows = check(tmp_path / "out", dict(zip(keys, expected.values(), strict=True)))
    assert rows["x.parquet:24"]["name"] == list(expected)[24]
    assert tokenize(tmp_path / "tables" / "y.parquet", out=tmp_path / "single")[0] == 0
    assert rows_of(tmp_path / "single").keys() == {f"y.parquet:{row}" for row in range(15)}


def test_nulls_odd_types_and_keys(tokenize, folder, expected, tmp_path):
    (key, codes), *_ = expected.items()
    sound = {"bytes": (folder / key).read_bytes(), "path": None}
    table = pa.table(
        {
            "audio": [sound, None, sound, sound],
            "id": pa.array([7, 8, None, 9]),
            "speaker": pa.array(["x", "y", "x", None]).dictionary_encode(),
            "words": [[{"word": "a", "start": 0.5}], [], None, []],
        }
    )
    pq.write_table(table, tmp_path / "odd.parquet")
    status, output, _ = tokenize(tmp_path / "odd.parquet", "--key-column", "id")
    assert status == 1
    assert "tokenized 3 of 4 clips" in output
    assert errors_of(tmp_path / "out") == {"odd.parquet:2": "'id' is null; accepted: keys"}
    rows = rows_of(tmp_path / "out")
    assert torch.equal(torch.tensor(rows["9"]["audio_codes"]), codes)
    assert (rows["8"]["audio_codes"], rows["8"]["num_samples"], rows["8"]["speaker"]) == (None, None, "y")
    assert rows["7"]["words"] == [{"word": "a", "start": 0.5}]
    assert tokenize(tmp_path / "out", command="detokenize", out=tmp_path / "back")[0] == 0
    assert {key: row["audio"] is None for key, row in rows_of(tmp_path / "back").items()} == {
        "7": False,
        "8": True,
        "9": False,
    }


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_webdataset_tars(tokenize, folder, expected, tmp_path):
    keys = list(expected)
    long_name = "long" * 40  # needs an extended header
    for tar, part in (("x.tar", keys[:30]), ("y.tar", keys[30:])):
        members: dict[str, bytes] = {}
        for index, key in enumerate(part):
            stem = long_name if index == 4 else f"{index:03}"
            members[f"./{stem}.txt"] = f"text {index}".encode()
            members[f"./{stem}{Path(key).suffix}"] = (folder / key).read_bytes()
            members[f"./._{stem}.wav"] = b"hidden"
            members[f"./._{stem}.txt"] = b"\xff"
        write_tar(tmp_path / "tars" / tar, members)
    assert tokenize(tmp_path / "tars", "--num-workers", "1")[0] == 0
    names = [f"{long_name if index == 4 else f'{index:03}'}" for index in range(30)]
    wanted = [f"x.tar/{name}" for name in names] + [f"y.tar/{name}" for name in names[:10]]
    rows = check(tmp_path / "out", dict(zip(wanted, expected.values(), strict=True)))
    assert rows["y.tar/003"]["txt"] == "text 3"


def test_a_hub_id_goes_through_load_dataset(tokenize, folder, expected, tmp_path, monkeypatch):
    table = audio_table(folder, list(expected)[:3])

    def load(path, config, split):
        assert (path, config, split) == ("owner/speech", "en", "train")
        return table

    monkeypatch.setattr("mimo_audio_hf.sources.load_dataset", load)
    assert tokenize("owner/speech", "--config", "en", "--split", "train")[0] == 0
    check(tmp_path / "out", {str(index): codes for index, codes in enumerate(list(expected.values())[:3])})


def test_links_to_folders_are_followed(tokenize, folder, expected, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "speech").symlink_to(folder)
    (tmp_path / "links" / "circle").symlink_to(tmp_path / "links")
    assert tokenize(tmp_path / "links")[0] == 0
    check(tmp_path / "out", {f"speech/{key}": codes for key, codes in expected.items()})


def test_sources_that_are_none(tokenize, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.tar").touch()
    (tmp_path / "mixed" / "b.wav").touch()
    (tmp_path / "text.txt").touch()
    (tmp_path / "broken.parquet").write_text("no Parquet")
    (tmp_path / "columns.jsonl").write_text('{"sound": "x.wav"}\n')
    for source, options, message in (
        (tmp_path / "nowhere", [], "there is no such file or folder"),
        (tmp_path / "empty", [], "no files to read"),
        (tmp_path / "mixed", [], "holds a.tar and b.wav"),
        (tmp_path / "text.txt", [], "nothing to read many clips from"),
        (tmp_path / "broken.parquet", [], "broken.parquet: no Parquet file"),
        (tmp_path / "columns.jsonl", [], "has no column 'audio' or"),
        (folder, ["--split", "train"], "has no configurations and splits"),
    ):
        status, _, errors = tokenize(source, *options, out=tmp_path / "none")
        assert (status, message in errors) == (1, True), errors


def test_two_clips_with_one_key(tokenize, folder, expected, tmp_path):
    line = json.dumps({"audio": str(folder / next(iter(expected))), "key": "same"})
    (tmp_path / "list.jsonl").write_text(f"{line}\n{line}\n")
    status, _, errors = tokenize(tmp_path / "list.jsonl")
    assert status == 1
    assert "two clips have the key 'same'" in errors


# --- Bad clips ---


def bad_files(folder: Path, good: Path) -> dict[str, str]:
    """Bad files, and a word of the reason for each."""
    whole = good.read_bytes()
    (folder / "empty.wav").touch()
    (folder / "truncated.wav").write_bytes(whole[: len(whole) // 2])
    (folder / "text.wav").write_text("this is no audio")
    soundfile.write(folder / "nan.wav", np.array([0.1, np.nan, 0.2], np.float32), 24000, subtype="FLOAT")
    (folder / "nothing.wav").write_bytes(whole[:44])
    return {
        "missing.wav": "No such file",
        "empty.wav": "cannot be decoded",
        "truncated.wav": "truncated",
        "text.wav": "cannot be decoded",
        "nan.wav": "NaN",
        "nothing.wav": "truncated",
    }


def test_30_bad_files_among_500(tokenize, tiny_model, tmp_path):
    """Each bad one is named with its reason; what is merely unusual, one clip of 40 minutes too, is tokenized."""
    source = tmp_path / "source"
    source.mkdir()
    generator = np.random.default_rng(0)
    keys = [f"{index:03}.wav" for index in range(470)]
    for key in keys:
        soundfile.write(source / key, generator.uniform(-0.5, 0.5, int(generator.integers(500, 2500))), 24000)
    soundfile.write(source / "000.wav", np.zeros(10), 24000)
    soundfile.write(source / "001.wav", generator.uniform(-0.5, 0.5, (3000, 8)), 24000)
    soundfile.write(source / "002.wav", generator.uniform(-0.5, 0.5, 20000), 192000)
    soundfile.write(source / "003.wav", generator.uniform(-0.1, 0.1, 40 * 60 * 8000), 8000)
    reasons = bad_files(source, source / "004.wav")
    for copy in range(1, 5):
        for name in list(reasons)[:6]:
            if (source / name).exists():
                (source / f"{copy}{name}").write_bytes((source / name).read_bytes())
            reasons[f"{copy}{name}"] = reasons[name]
    assert len(reasons) == 30
    listed = [*keys, *reasons]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"audio": f"source/{key}"}) + "\n" for key in listed))

    status, output, _ = tokenize(tmp_path / "list.jsonl", "--num-workers", "2")
    assert status == 1
    assert "tokenized 470 of 500 clips" in output
    assert "30 failed: see" in output
    errors = errors_of(tmp_path / "out")
    assert errors.keys() == {f"source/{key}" for key in reasons}
    for key, reason in reasons.items():
        assert reason in errors[f"source/{key}"]
        assert key in errors[f"source/{key}"]
    rows = rows_of(tmp_path / "out")
    assert rows.keys() == {f"source/{key}" for key in keys}
    for key in [*keys[:3], *keys[4:30]]:
        (codes,) = encode_waveforms(tiny_model, [load_audio(source / key)])
        assert torch.equal(torch.tensor(rows[f"source/{key}"]["audio_codes"]), codes)
    assert len(rows["source/003.wav"]["audio_codes"]) == 40 * 60 * 25 + 1

    # Mended, they alone are done.
    for key in reasons:
        (source / key).write_bytes((source / "005.wav").read_bytes())
    status, output, _ = tokenize(tmp_path / "list.jsonl")
    assert status == 0
    assert "tokenized 30 of 30 clips, 470 were there already" in output
    assert rows_of(tmp_path / "out").keys() == {f"source/{key}" for key in listed}
    assert not (tmp_path / "out" / "errors.jsonl").exists()


def test_a_shard_damaged_inside_is_set_aside(tokenize, folder, expected, tmp_path):
    tokenize(folder, "--shard-clips", "10")
    shard = tmp_path / "out" / "data" / "train-00001.parquet"
    data = bytearray(shard.read_bytes())
    data[4:300] = bytes(296)
    shard.write_bytes(data)
    status, output, errors = tokenize(folder)
    assert status == 0
    assert "train-00001.parquet is damaged" in errors
    check(tmp_path / "out", expected)


def test_another_column_called_key(tokenize, folder, expected, tmp_path):
    sound = {"bytes": (folder / next(iter(expected))).read_bytes(), "path": None}
    pq.write_table(pa.table({"key": [1, 2], "id": ["a", "b"], "audio": [sound] * 2}), tmp_path / "keys.parquet")
    for _ in range(2):
        assert tokenize(tmp_path / "keys.parquet", "--key-column", "id")[0] == 0
        assert rows_of(tmp_path / "out").keys() == {"a", "b"}


def test_columns_that_come_later_are_refused(tokenize, folder, expected, tmp_path):
    lines = [{"audio": str(folder / key), "key": key} for key in expected]
    (tmp_path / "list.jsonl").write_text(json.dumps(lines[0]))
    assert tokenize(tmp_path / "list.jsonl")[0] == 0
    (tmp_path / "list.jsonl").write_text(json.dumps(lines[0]) + "\n" + json.dumps({**lines[1], "text": "x"}))
    status, _, errors = tokenize(tmp_path / "list.jsonl")
    assert status == 1
    assert "has the columns" in errors
    assert "text (string)" in errors


def test_large_carried_values_fill_a_shard(tokenize, folder, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("mimo_audio_hf.shards.MAX_SHARD_BYTES", 50_000)
    sound = {"bytes": (folder / next(iter(expected))).read_bytes(), "path": None}
    table = pa.table({"audio": [sound] * 9, "picture": [[{"bytes": bytes(20_000)}]] * 9})
    pq.write_table(table, tmp_path / "large.parquet")
    assert tokenize(tmp_path / "large.parquet")[0] == 0
    assert len(list((tmp_path / "out" / "data").iterdir())) >= 3


def test_bad_lines_and_tars(tokenize, folder, expected, tmp_path):
    good = str(folder / next(iter(expected)))
    lines = [json.dumps({"wav": good, "key": "x"}), "no json", '["list"]', '{"key": "y"}', '{"wav": 5, "key": "z"}']
    lines += [
        '{"wav": "a", "key": "\\ud800"}',
        json.dumps({"wav": "nowhere\u2028.wav", "key": "\u2028"}, ensure_ascii=False),
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    assert tokenize(tmp_path / "list.jsonl")[0] == 1
    assert rows_of(tmp_path / "out").keys() == {"x"}
    errors = errors_of(tmp_path / "out")
    assert errors.keys() == {"line 2", "line 3", "line 4", "z", "line 6", "\u2028"}
    assert "'wav' is missing" in errors["line 4"]

    sound = Path(good).read_bytes()
    write_tar(tmp_path / "tars" / "x.tar", {"0.wav": sound, "1.txt": b"alone", "2.wav": sound, "3.wav": sound * 9})
    data = (tmp_path / "tars" / "x.tar").read_bytes()
    (tmp_path / "tars" / "x.tar").write_bytes(data[: 3 * len(sound) + 6000])
    assert tokenize(tmp_path / "tars", out=tmp_path / "from_tars")[0] == 1
    assert rows_of(tmp_path / "from_tars").keys() == {"x.tar/0", "x.tar/2"}
    errors = errors_of(tmp_path / "from_tars")
    assert errors.keys() == {"x.tar", "x.tar/1"}
    assert "what comes before was read" in errors["x.tar"]


@pytest.mark.parametrize("damage", ["cut between", "cut in a header", "overwritten header"])
def test_a_tar_that_tarfile_takes_for_whole(tokenize, folder, expected, tmp_path, damage):
    sound = (folder / next(iter(expected))).read_bytes()
    write_tar(tmp_path / "tars" / "x.tar", {f"{index}.wav": sound for index in range(6)})
    path = tmp_path / "tars" / "x.tar"
    with tarfile.open(path) as tar:
        third = tar.getmembers()[3].offset
    data = path.read_bytes()
    path.write_bytes(
        {
            "cut between": data[:third],
            "cut in a header": data[: third + 100],
            "overwritten header": data[:third] + b"x" * 512 + data[third + 512 :],
        }[damage]
    )
    status, output, _ = tokenize(tmp_path / "tars")
    assert status == 1
    assert "tokenized 3 of 4 clips" in output
    assert "its end is missing" in errors_of(tmp_path / "out")["x.tar"]


def test_columns_with_names_of_results_are_refused(tokenize, folder, expected, tmp_path):
    line = {"audio": str(folder / next(iter(expected))), "key": "x", "num_samples": "seven"}
    (tmp_path / "list.jsonl").write_text(json.dumps(line))
    status, _, errors = tokenize(tmp_path / "list.jsonl")
    assert status == 1
    assert "has a column 'num_samples', as the result has" in errors


def test_a_signal_while_a_shard_is_handed_to_its_writer(tokenize, folder, expected, tmp_path, monkeypatch):
    from mimo_audio_hf.shards import ThreadPoolExecutor

    class Signalling(ThreadPoolExecutor):
        def submit(self, function, *arguments):
            future = super().submit(function, *arguments)
            if function.__name__ == "_write" and not (tmp_path / "signalled").exists():
                (tmp_path / "signalled").touch()
                os.kill(os.getpid(), signal.SIGTERM)
            return future

    with monkeypatch.context() as patched:
        patched.setattr("mimo_audio_hf.shards.ThreadPoolExecutor", Signalling)
        with pytest.raises(SystemExit):
            tokenize(folder, "--shard-clips", "10")
    assert tokenize(folder)[0] == 0
    check(tmp_path / "out", expected)


def test_types_that_do_not_fit_each_other(tokenize, folder, expected, tmp_path):
    good = str(folder / next(iter(expected)))
    lines = [{"wav": good, "key": "x", "speaker": "one"}, {"wav": good, "key": "y", "speaker": 2}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    status, _, errors = tokenize(tmp_path / "list.jsonl")
    assert status == 1
    assert "'speaker' has several types" in errors


def test_long_clips_are_handed_on_one_by_one(tokenize, folder, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("mimo_audio_hf.jobs._CHUNK_ELEMENTS", 5000)
    assert tokenize(folder, "--num-workers", "1")[0] == 0
    check(tmp_path / "out", expected)


# --- Resuming ---


def test_a_rerun_does_what_is_missing(tokenize, folder, expected, tmp_path):
    tokenize(folder, "--shard-clips", "10")
    status, output, _ = tokenize(folder)
    assert status == 0
    assert "tokenized 0 of 0 clips, 40 were there already" in output
    (tmp_path / "out" / "data" / "train-00001.parquet").unlink()
    status, output, _ = tokenize(folder, "--shard-clips", "3")
    assert "tokenized 10 of 10 clips, 30 were there already" in output
    check(tmp_path / "out", expected)


def test_new_files_are_added(tokenize, folder, tmp_path):
    source = tmp_path / "growing"
    source.mkdir()
    for name in ("b.wav", "a.wav"):
        soundfile.write(source / name, np.zeros(1000), 24000)
        assert tokenize(source)[0] == 0
    assert rows_of(tmp_path / "out").keys() == {"a.wav", "b.wav"}


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_shard_is_set_aside_and_done_again(tokenize, folder, expected, tmp_path, size):
    tokenize(folder, "--shard-clips", "10")
    shard = tmp_path / "out" / "data" / "train-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:size])
    status, output, errors = tokenize(folder)
    assert status == 0
    assert "train-00002.parquet is damaged" in errors
    assert "tokenized 10 of 10 clips, 30 were there already" in output
    assert (tmp_path / "out" / "damaged" / "train-00002.parquet.damaged").exists()
    assert tokenize(tmp_path / "out", command="detokenize", out=tmp_path / "back")[0] == 0
    check(tmp_path / "out", expected)


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"format": "mimo',
        "[]",
        '{"format": "mimo_audio_dataset"}',
        '{"format": "mimo_audio_dataset", "settings": []}',
    ],
)
def test_a_damaged_manifest_is_made_anew(tokenize, folder, expected, tmp_path, text):
    tokenize(folder)
    manifest = tmp_path / "out" / "manifest.json"
    before = manifest.read_text()
    manifest.write_text(text)
    status, output, errors = tokenize(folder)
    assert status == 0
    assert "manifest.json is damaged" in errors
    assert "40 were there already" in output
    assert manifest.read_text() == before
    check(tmp_path / "out", expected)


def test_other_settings_are_refused(tokenize, folder, tmp_path):
    tokenize(folder)
    before = (tmp_path / "out" / "manifest.json").read_text()
    for options, names in (
        (["--num-quantizers", "3"], ["codebook_sizes="]),
        (["--dtype", "bfloat16"], ["weights=", "dtype='float32', not 'bfloat16'"]),
        (["--key-column", "name"], ["key_column=None, not 'name'"]),
    ):
        status, _, errors = tokenize(folder, *options)
        assert status == 1
        for name in names:
            assert name in errors.partition("was made with ")[2]
    (tmp_path / "out" / "manifest.json").write_text("")
    status, _, errors = tokenize(folder / "a")
    assert "train-00000.parquet was made with source=" in errors
    (tmp_path / "out" / "manifest.json").write_text(before)
    assert tokenize(folder)[0] == 0


def test_directories_of_others_are_refused(tokenize, folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    status, _, errors = tokenize(folder)
    assert status == 1
    assert "holds other files" in errors
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]

    foreign = tmp_path / "foreign"
    tokenize(folder, out=foreign)
    Dataset.from_dict({"key": ["x"]}).to_parquet(foreign / "data" / "other.parquet")
    status, _, errors = tokenize(folder, out=foreign)
    assert status == 1
    assert "other.parquet is not this job's" in errors


def test_one_job_at_a_time(tokenize, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("mimo_audio_hf.shards._LOCK_SECONDS", 0.1)
    (tmp_path / "out" / ".job").mkdir(parents=True)
    with FileLock(tmp_path / "out" / ".job" / "process-00001.lock"):
        status, _, errors = tokenize(folder)
    assert status == 1
    assert "is being written to by another job" in errors
    assert tokenize(folder)[0] == 0


def test_a_clip_in_two_shards_is_an_error(tokenize, folder, tmp_path):
    tokenize(folder)
    shard = tmp_path / "out" / "data" / "train-00000.parquet"
    shard.with_name("train-00007.parquet").write_bytes(shard.read_bytes())
    status, _, errors = tokenize(folder)
    assert status == 1
    assert "is in the shards twice" in errors


# --- Disks and processes ---


def command(source: Path, out: Path, checkpoint: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "mimo_audio_hf.cli", "tokenize", str(source), str(out), "--model", str(checkpoint)),
        *("--device", "cpu", "--shard-clips", "5"),
    ]


def test_a_full_disk(tokenize, write_audio, tmp_path, tiny_checkpoint):
    """No file may grow beyond 8 kB: the list of clips fits, a shard of five does not."""
    source, out = tmp_path / "source", tmp_path / "out"
    for index in range(6):
        write_audio(source / f"{index}.wav", 150000, seed=index)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    arguments = [*command(source, out, tiny_checkpoint), "--num-workers", "0"]
    run = subprocess.run(arguments, preexec_fn=limit, capture_output=True, text=True)
    assert run.returncode == 1
    assert "File too large" in run.stderr
    assert str(out) in run.stderr
    assert "Traceback" not in run.stderr
    assert all(path.suffix == ".parquet" for path in out.glob("data/*"))
    assert tokenize(source)[0] == 0
    assert rows_of(out).keys() == {f"{index}.wav" for index in range(6)}


def test_a_directory_that_cannot_be_written(tokenize, folder, tmp_path):
    (tmp_path / "file").write_text("no directory")
    for out in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/out")):
        status, _, errors = tokenize(folder, out=out)
        assert status == 1
        assert str(out) in errors
        assert "Traceback" not in errors


def test_a_killed_reading_process(tokenize, folder, expected, tmp_path, monkeypatch):
    def read(value, sampling_rate):
        if str(value).endswith("33.flac"):
            os.kill(os.getpid(), signal.SIGKILL)
        return load_audio(value, sampling_rate)

    with monkeypatch.context() as patched:
        patched.setattr("mimo_audio_hf.jobs.to_waveform", read)
        status, _, errors = tokenize(folder, "--num-workers", "1")
    assert status == 1
    assert "a reading process was killed" in errors
    before = len(rows_of(tmp_path / "out"))
    status, output, _ = tokenize(folder)
    assert status == 0
    assert f"{40 - before} of {40 - before} clips" in output
    check(tmp_path / "out", expected)


def test_what_is_done_is_kept_when_the_job_is_told_to_stop(tokenize, folder, expected, tmp_path, monkeypatch):
    from mimo_audio_hf.jobs import encode_stream

    def stream(model, clips, *arguments, **options):
        for number, result in enumerate(encode_stream(model, clips, *arguments, **options)):
            if number == 17:
                os.kill(os.getpid(), signal.SIGTERM)
            yield result

    with monkeypatch.context() as patched:
        patched.setattr("mimo_audio_hf.jobs.encode_stream", stream)
        with pytest.raises(SystemExit) as stopped:
            tokenize(folder)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert 17 <= len(rows_of(tmp_path / "out")) <= 18
    assert tokenize(folder)[0] == 0
    check(tmp_path / "out", expected)


def test_two_processes_with_bad_clips_among_others(folder, expected, tmp_path, tiny_checkpoint):
    lines = [{"audio": str(folder / key), "key": key} for key in expected] + [{"audio": "nowhere.wav", "key": "bad"}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    job = command(tmp_path / "list.jsonl", tmp_path / "out", tiny_checkpoint)
    run = subprocess.run([*launcher, *job[1:]], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert run.stdout.count("tokenized 40 of 41 clips") == 1
    check(tmp_path / "out", expected)
    assert errors_of(tmp_path / "out").keys() == {"bad"}


# --- Back ---


def test_detokenize(tokenize, folder, expected, tmp_path, tiny_model):
    tokenize(folder)
    status, output, _ = tokenize(tmp_path / "out", command="detokenize", out=tmp_path / "back")
    assert status == 0
    assert "decoded 40 of 40 clips" in output
    dataset = load_dataset(str(tmp_path / "back"), cache_dir=str(tmp_path / "cache"))["train"]
    assert isinstance(dataset.features["audio"], Audio)
    assert dataset.features["audio"].sampling_rate == 24000
    for row in dataset.cast_column("audio", Audio(decode=False)):
        assert row["audio"]["path"] == f"{row['key']}.flac"
        samples = load_audio(row["audio"]["bytes"])
        assert len(samples) == row["num_samples"] == len(load_audio(folder / row["key"]))
        (decoded,) = decode_codes(tiny_model, [expected[row["key"]]])
        torch.testing.assert_close(samples, decoded[: len(samples)].clamp(-1, 1), rtol=0, atol=2**-15)


def test_detokenize_names_bad_codes(tokenize, tmp_path):
    rows = [
        {"key": "good", "audio_codes": [[0] * 20] * 3, "num_samples": 2000},
        {"key": "whole", "audio_codes": [[0] * 4] * 3},
        {"key": "range", "audio_codes": [[5000] * 20]},
        {"key": "ragged", "audio_codes": [[0, 1], [1]]},
        {"key": "long", "audio_codes": [[0] * 20], "num_samples": 961},
        {"key": "none", "audio_codes": [[0] * 20], "num_samples": 0},
    ]
    (tmp_path / "codes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, output, _ = tokenize(tmp_path / "codes.jsonl", "--format", "wav", command="detokenize")
    assert status == 1
    assert "decoded 2 of 6 clips" in output
    errors = errors_of(tmp_path / "out")
    assert errors.keys() == {"range", "ragged", "long", "none"}
    assert "codebook 0" in errors["range"]
    audio = {key: load_audio(row["audio"]["bytes"]) for key, row in rows_of(tmp_path / "out").items()}
    assert {key: len(samples) for key, samples in audio.items()} == {"good": 2000, "whole": 2880}
