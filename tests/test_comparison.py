"""The figures of docs/comparison.md that were measured here are those of the records."""

from __future__ import annotations

import json
from pathlib import Path


ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "comparison.md").read_text()


def results(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["results"]


def test_the_speed_of_the_model():
    for row in results("speed")["paths"]["fast"]["rows"]:
        (line,) = (line for line in TEXT.splitlines() if line.startswith(f"| {row['workload']} |"))
        cells = [cell.strip() for cell in line.split("|")][-3:-1]
        for cell, part in zip(cells, (row["encode"], row["decode"]), strict=True):
            milliseconds, over_floor = cell.rstrip(")").split(" (")
            assert float(milliseconds) == round(part["milliseconds"], 1)
            digits = len(over_floor.partition(".")[2])
            assert float(over_floor) == round(part["over_rested_floor"], digits)


def test_the_job_and_the_cpu():
    assert f"{results('job')['rows'][0]['audio_seconds_per_second']:,} s of audio a second" in TEXT
    released = results("precision_on_cpu")["released"]["float32"]
    assert f"{released['encode_rtf']:.2f} s (encode) and {released['decode_rtf']:.2f} s (decode)" in TEXT
