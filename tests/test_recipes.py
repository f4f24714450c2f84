"""What the recipes' scripts do to data."""

from __future__ import annotations

import io
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset, load_dataset

from mimo_audio_hf.training.config import TrainingConfig, read_yaml


TINY = Path(__file__).parent.parent / "recipes" / "tiny"
VARY_SPEED = TINY / "vary_speed.py"
RATE = 24000


@pytest.fixture
def clips(tmp_path) -> Path:
    """Two clips of a second, tones of 1 kHz, under different licences."""
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)
    file = io.BytesIO()
    soundfile.write(file, tone, RATE, format="FLAC")
    rows = [
        {
            "key": f"clip{number}",
            "audio": {"bytes": file.getvalue(), "path": f"clip{number}.flac"},
            "speaker": "somebody",
            "licence": licence,
            "seconds": 1.0,
        }
        for number, licence in enumerate(["CC0", "GPL"])
    ]
    Dataset.from_list(rows).cast_column("audio", Audio(RATE)).to_parquet(tmp_path / "clips.parquet")
    return tmp_path / "clips.parquet"


def vary_speed(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["vary_speed.py", *map(str, arguments), "--workers", "1"])
    runpy.run_path(str(VARY_SPEED), run_name="__main__")


def test_clips_at_several_speeds(clips, tmp_path, monkeypatch):
    output = tmp_path / "varied.parquet"
    vary_speed(monkeypatch, clips, output, "--speeds", "0.8", "1", "1.2501", "--without-licence", "GPL")
    rows = load_dataset("parquet", data_files=str(output), split="train").cast_column("audio", Audio(decode=False))
    assert rows["key"] == ["clip0-0.8", "clip0", "clip0-1.25"]
    assert rows["speaker"] == ["somebody-0.8", "somebody", "somebody-1.25"]
    assert set(rows["licence"]) == {"CC0"}
    for row, speed in zip(rows, (0.8, 1, 1.25), strict=True):
        samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]))
        assert (rate, len(samples)) == (RATE, RATE / speed)
        assert row["seconds"] == 1 / speed
        spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
        assert np.argmax(spectrum) * rate / len(samples) == pytest.approx(1000 * speed, abs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speeds", "0"], "--speeds: 0; accepted: 0.1 to 10"),
        (["--speeds", "-1"], "--speeds: -1; accepted"),
        (["--speeds", "nan"], "--speeds: nan; accepted"),
        (["--speeds", "1.1", "1.101"], "--speeds [1.1, 1.1]; accepted: different ones"),
        (["--without-licence", "CC0", "GPL"], "is left of 2; accepted: fewer licences"),
    ],
)
def test_speeds_that_make_no_sense_are_refused(arguments, message, clips, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        vary_speed(monkeypatch, clips, tmp_path / "varied.parquet", *arguments)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "varied.parquet").exists()


def test_what_the_recipes_ask_for_exists():
    first, second = (TrainingConfig.from_values(read_yaml(TINY / name)) for name in ("stage1.yaml", "stage2.yaml"))
    assert (first.stage, second.stage) == (1, 2)
    # The second goes on from the last checkpoint of the first.
    assert second.model == f"{first.output_dir}/checkpoint-{first.max_steps}"
    commands = (TINY / "README.md").read_text()
    assert f"{second.output_dir}/checkpoint-{second.max_steps} src/mimo_audio_hf/tiny" in commands
