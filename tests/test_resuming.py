"""Jobs that are killed at random moments and begun again: every clip once, with the codes of an undisturbed run.

CLIPS and KILLS in the environment make it longer.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from mimo_audio_hf import encode_waveforms, load_audio


CLIPS = int(os.environ.get("CLIPS", 60))
KILLS = int(os.environ.get("KILLS", 4))


def launch(processes: int, source: Path, out: Path, checkpoint: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "mimo_audio_hf.cli"]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["-m", "mimo_audio_hf.cli"]
    command += ["tokenize", str(source), str(out), "--model", str(checkpoint), "--device", "cpu", "--shard-clips", "7"]
    with open(out.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log)


def kill(job: subprocess.Popen, out: Path, moment: random.Random) -> None:
    """SIGKILL at a random moment, to all of a job, to its launcher alone, or to one of its processes."""
    if moment.random() < 0.3:
        time.sleep(moment.uniform(0, 5))
    else:
        while job.poll() is None and not (out / ".job" / "missing.arrow").exists():
            time.sleep(0.01)
        time.sleep(moment.uniform(0, 1))
    if job.poll() is not None:
        return
    whom = moment.choice(["all", "launcher", "one"])
    launcher = psutil.Process(job.pid)
    children = launcher.children()
    if whom == "one" and children:
        victims = [moment.choice(children)]
    elif whom == "launcher":
        victims = [launcher]
    else:
        victims = [launcher, *launcher.children(recursive=True)]
    end(victims)
    job.wait(timeout=60)  # those whom it leaves behind may go on for a while


def end(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture
def out(tmp_path) -> Iterator[Path]:
    """The jobs' directory. Processes that a killed launcher left waiting for it end with the test."""
    out = tmp_path / "out"
    yield out
    end(process for process in psutil.process_iter(["cmdline"]) if str(out) in (process.info["cmdline"] or []))


@pytest.mark.timeout(1800)
def test_killed_jobs_lose_nothing_and_double_nothing(tmp_path, out, tiny_checkpoint, tiny_model):
    generator = np.random.default_rng(0)
    source = tmp_path / "source"
    source.mkdir()
    for index in range(CLIPS):
        samples = generator.uniform(-0.5, 0.5, int(generator.integers(3_000, 150_000)))
        soundfile.write(source / f"{index:04}.wav", samples, 24000)

    moment = random.Random(0)
    for attempt in range(KILLS):
        kill(launch(1 + (attempt + 1) % 3, source, out, tiny_checkpoint), out, moment)
    last = launch(2, source, out, tiny_checkpoint)
    last.wait(timeout=300)
    assert last.returncode == 0, out.with_suffix(".log").read_text()

    shards = sorted((out / "data").iterdir())
    assert all(shard.suffix == ".parquet" for shard in shards)
    rows = [row for shard in shards for row in pq.read_table(shard).to_pylist()]
    assert sorted(row["key"] for row in rows) == sorted(path.name for path in source.iterdir())
    for row in rows:
        (expected,) = encode_waveforms(tiny_model, [load_audio(source / row["key"])])
        assert torch.equal(torch.tensor(row["audio_codes"]), expected)
