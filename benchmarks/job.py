"""`mimo-audio tokenize` end to end on 1, 2, ... GPUs: audio seconds per second, against the model alone.

    python benchmarks/job.py --gpus 1 2 --output benchmarks/results/job.json

Clips are 2 to 10 s of speech (the recording of the tests, cut at random places) in files on the local disk, 24 kHz
WAV or 16 kHz FLAC; a few thousand files, each under many names, so that the operating system holds them in memory.
Times are those that the jobs print, without Python's imports. A rate is that of a long job less a short one: loading
the model and listing the files are told apart. Scaling compares the long jobs as they are; on N GPUs they have N times
the clips. The GPUs' busy share is what nvidia-smi samples within the long job, from its first to its last busy sample.
The model alone runs `encode` over spectrograms of the same lengths that are on the GPU already, in batches of the same
size.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from workloads import mel_lengths, random_model, report, seconds_of

from mimo_audio_hf import MiMoAudioTokenizerConfig, load_audio
from mimo_audio_hf.audio import resample
from mimo_audio_hf.checkpoints import PRESETS
from mimo_audio_hf.inference import MAX_BATCH_SECONDS, group_by_seconds


RECORDING = Path(__file__).parents[1] / "tests" / "fixtures" / "audio" / "prompt_speech_en_m.wav"
FORMATS = {"24 kHz WAV": (24000, ".wav"), "16 kHz FLAC": (16000, ".flac")}


def clip_seconds(number: int) -> list[float]:
    return [random.Random(index).uniform(2, 10) for index in range(number)]


def write_clips(folder: Path, rate: int, suffix: str, number: int, names: int) -> float:
    """`number` files, with further `names` for them in all; returns the seconds of audio."""
    speech = resample(load_audio(RECORDING), 24000, rate).numpy()
    generator = np.random.default_rng(0)
    seconds = clip_seconds(number)
    for index, each in enumerate(seconds):
        start = int(generator.integers(len(speech)))
        samples = np.resize(np.roll(speech, -start), int(each * rate)) * generator.uniform(0.5, 1)
        path = folder / f"{index:06}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples, rate)
    for index in range(number, names):
        os.link(folder / f"{index % number:06}{suffix}", folder / f"{index:06}{suffix}")
    return sum(seconds[index % number] for index in range(names))


def run_job(source: Path, model: Path, gpus: int, workers: int, batch_seconds: float) -> dict[str, Any]:
    """One job: its wall time, and the busy share of the GPUs in percent."""
    out = source.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = ["tokenize", str(source), str(out), "--model", str(model), "--num-workers", str(workers)]
    command += ["--batch-seconds", str(batch_seconds)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    with tempfile.TemporaryFile("w+") as samples:
        query = ["nvidia-smi", "--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
        monitor = subprocess.Popen(query, stdout=samples) if torch.cuda.is_available() else None
        started = time.perf_counter()
        arguments = [sys.executable, *launcher, "-m", "mimo_audio_hf.cli", *command]
        run = subprocess.run(arguments, capture_output=True, text=True)
        wall = time.perf_counter() - started
        if monitor is not None:
            monitor.terminate()
            monitor.wait()
        samples.seek(0)
        busy = [tuple(map(int, line.split(","))) for line in samples.read().splitlines() if line.count(",") == 1]
    if run.returncode:
        raise SystemExit(run.stdout + run.stderr)
    match = re.search(r"([\d.]+) h of audio in ([\d.]+) s", run.stdout)
    assert match is not None, run.stdout
    shares = []
    for gpu in range(gpus):
        found = [share for index, share in busy if index == gpu]
        active = [index for index, share in enumerate(found) if share > 10]
        if active:
            shares.append(statistics.mean(found[active[0] : active[-1] + 1]))
    return {
        "audio_seconds": float(match[1]) * 3600,
        "wall_seconds": round(wall, 2),
        "job_seconds": float(match[2]),
        "busy_percent": [round(share, 1) for share in shares],
    }


@torch.inference_mode()
def model_alone(config: MiMoAudioTokenizerConfig, batch_seconds: float) -> float:
    """Audio seconds per second of `encode` over packed spectrograms on the GPU."""
    model = random_model(config, torch.bfloat16)
    batches = list(group_by_seconds(clip_seconds(400), float, batch_seconds))[:5]
    rates = []
    for batch in batches:
        lengths = mel_lengths(config, batch)
        mels = torch.randn(sum(lengths), config.n_mels, device="cuda") * 2 - 5

        def encode(mels: torch.Tensor = mels, lengths: list[int] = lengths) -> None:
            model.encode(mels, layout=model.encoder_layout(lengths, mels.device))

        rates.append(sum(batch) / seconds_of(encode))
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--preset", choices=list(PRESETS), default="released")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--files", type=int, default=3000)
    parser.add_argument("--clips", type=int, default=24_000, help="of a long job on one GPU")
    parser.add_argument("--short", type=int, default=1_000, help="clips of a short job on one GPU")
    parser.add_argument("--workers", type=int, default=14, help="reading processes for each GPU")
    parser.add_argument("--batch-seconds", type=float, default=MAX_BATCH_SECONDS)
    parser.add_argument("--folder", type=Path, help="where the files are written (default: a temporary one)")
    args = parser.parse_args()

    config = MiMoAudioTokenizerConfig(**PRESETS[args.preset])
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        model = Path(folder, "model")
        alone = model_alone(config, args.batch_seconds) if torch.cuda.is_available() else None
        if torch.cuda.is_available():
            random_model(config, torch.bfloat16).save_pretrained(model)
            torch.cuda.empty_cache()
        else:
            subprocess.run([*(sys.executable, "-m", "mimo_audio_hf.cli", "init", model, "--preset", args.preset)])
        for name in args.formats:
            rate, suffix = FORMATS[name]
            for gpus in args.gpus:
                runs = []
                for number in (args.short * gpus, args.clips * gpus):
                    source = Path(folder, f"{suffix[1:]}{number}")
                    if not source.exists():
                        write_clips(source, rate, suffix, min(args.files, number), number)
                    runs.append(run_job(source, model, gpus, args.workers, args.batch_seconds))
                short, long = runs
                audio, seconds = (long[key] - short[key] for key in ("audio_seconds", "job_seconds"))
                each = long["audio_seconds"] / long["job_seconds"] / gpus
                one = next((row["long_job"] for row in rows if row["format"] == name), long)
                first = one["audio_seconds"] / one["job_seconds"] / args.gpus[0]
                row = {
                    "format": name,
                    "gpus": gpus,
                    "audio_seconds_per_second": round(audio / seconds),
                    "of_the_model_alone": alone and round(audio / seconds / alone / gpus, 3),
                    "scaling_efficiency": round(each / first, 3),
                    "busy_percent": long["busy_percent"],
                    "long_job": long,
                    "short_job": short,
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
    results = {
        "preset": args.preset,
        "workers_per_gpu": args.workers,
        "cores": os.cpu_count(),
        "batch_seconds": args.batch_seconds,
        "model_alone_audio_seconds_per_second": alone and round(alone),
        "rows": rows,
    }
    report("job", results, args.output, device=None if torch.cuda.is_available() else "CPU")


if __name__ == "__main__":
    main()
