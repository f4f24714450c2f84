"""The Ray stage on a local cluster, as the documentation shows it, and with an actor killed in mid-run."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from mimo_audio_hf import encode_waveforms, load_audio


ray = pytest.importorskip("ray", reason="ray is not installed: it has no wheels for this Python")

from mimo_audio_hf.ray import TokenizeAudio  # noqa: E402 (after the check for ray)


ROOT = Path(__file__).parent.parent


class KilledOnce(TokenizeAudio):
    """Kills the first actor that has done a batch."""

    def __init__(self, marker: str, **options) -> None:
        super().__init__(**options)
        self.marker = marker

    def __call__(self, batch):
        result = super().__call__(batch)
        try:
            os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return result
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster():
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=3, include_dashboard=False, runtime_env={"env_vars": environment})
    yield
    ray.shutdown()


@pytest.fixture
def folder(tmp_path, write_audio) -> Path:
    for index in range(24):
        write_audio(tmp_path / "recordings" / f"{index:02}.wav", 500 + 300 * index, (24000, 16000)[index % 2], index)
    return tmp_path / "recordings"


def check(tokens: Path, folder: Path, model) -> dict[str, dict]:
    rows = {Path(row["path"]).name: row for row in pq.read_table(tokens).to_pylist()}
    assert len(pq.read_table(tokens)) == len(rows)
    assert rows.keys() == {path.name for path in folder.iterdir()}
    for name, row in rows.items():
        if row["audio_codes"] is not None:
            (codes,) = encode_waveforms(model, [load_audio(folder / name)])
            assert torch.equal(torch.tensor(row["audio_codes"]), codes)
    return rows


def test_the_documented_example(cluster, folder, tiny_checkpoint, tiny_model, tmp_path, monkeypatch):
    """With two actors on CPUs in place of eight on GPUs."""
    (example,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "scale.md").read_text(), re.DOTALL)
        if "import ray" in block
    )
    assert len(example.splitlines()) < 20
    (folder / "bad.wav").write_text("no audio")
    for written, replaced in (
        ("    num_gpus=1,\n", ""),
        ("size=8", "size=2"),
        ('"recordings"', repr(str(folder))),
        ('"ray-tokens"', repr(str(tmp_path / "tokens"))),
        ("kwargs={", f"kwargs={{'model': {str(tiny_checkpoint)!r}, 'device': 'cpu', "),
    ):
        assert written in example
        example = example.replace(written, replaced)
    exec(compile(example, "scale.md", "exec"), {})
    rows = check(tmp_path / "tokens", folder, tiny_model)
    assert [name for name, row in rows.items() if row["audio_error"] is not None] == ["bad.wav"]
    assert rows["bad.wav"]["audio_codes"] is None
    assert "int16" in str(pq.read_schema(next((tmp_path / "tokens").glob("*.parquet"))))


def test_an_actor_killed_in_mid_run(cluster, folder, tiny_checkpoint, tiny_model, tmp_path):
    clips = ray.data.read_binary_files(str(folder), include_paths=True)
    options = {"model": str(tiny_checkpoint), "device": "cpu", "audio_column": "bytes"}
    tokens = clips.map_batches(
        KilledOnce,
        fn_constructor_kwargs={"marker": str(tmp_path / "killed"), **options},
        batch_format="pyarrow",
        batch_size=4,
        compute=ray.data.ActorPoolStrategy(size=2),
    )
    tokens.drop_columns(["bytes"]).write_parquet(str(tmp_path / "tokens"))
    assert (tmp_path / "killed").exists()
    check(tmp_path / "tokens", folder, tiny_model)
