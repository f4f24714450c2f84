"""Upstream's command end to end: files in, token and audio files out, as upstream measures its RTF.

    python benchmarks/end_to_end.py --output benchmarks/results/end_to_end.json
    python benchmarks/end_to_end.py --preset tiny --clips 40 --hours 0.1 --workers 2   # a smaller case, anywhere

Upstream reports Seed-TTS-Eval's 1,676 clips in batches of 64. How long these are is not published; here they are 2 to
10 s, 6.25 s on average, the lengths of the benchmarks' first workload: about 2.9 hours. They are speech (the recording
of the tests, cut at random places) in 24 kHz WAV files, given several times under other names until there are enough
hours. The rate counts what the command reports: reading, computing and writing, without Python's imports and without
loading the model, both of which the whole process's time includes. A first run leaves its kernels compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from workloads import WORKLOADS, random_model, report

from mimo_audio_hf import MiMoAudioTokenizerConfig, load_audio
from mimo_audio_hf.checkpoints import PRESETS


RECORDING = Path(__file__).parents[1] / "tests" / "fixtures" / "audio" / "prompt_speech_en_m.wav"
SAMPLING_RATE = 24000


def write_clips(folder: Path, number: int) -> list[tuple[str, float]]:
    """Files and their seconds."""
    speech = load_audio(RECORDING).numpy()
    generator = np.random.default_rng(0)
    lengths = WORKLOADS["64 clips of 2 to 10 s"]
    clips = []
    folder.mkdir()
    for index in range(number):
        seconds = lengths[random.Random(index).randrange(len(lengths))]
        samples = np.resize(np.roll(speech, -int(generator.integers(len(speech)))), int(seconds * SAMPLING_RATE))
        path = folder / f"{index:05}.wav"
        soundfile.write(path, samples * generator.uniform(0.5, 1), SAMPLING_RATE)
        clips.append((str(path), len(samples) / SAMPLING_RATE))
    return clips


def write_list(path: Path, clips: list[tuple[str, float]], seconds: float, out: Path) -> None:
    """A list of the clips, over and over, of at least so many seconds."""
    total, lines = 0.0, []
    while total < seconds:
        for wav, each in clips:
            key = f"{len(lines):06}"
            targets = {"quantized_tokens": str(out / f"{key}.json"), "reconstructed_wav": str(out / f"{key}.wav")}
            lines.append(json.dumps({"key": key, "wav": wav} | targets))
            total += each
    out.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def run(model: Path, data_list: Path, task: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "mimo_audio_hf.offline", "--model_path", str(model), "--task", task]
    command += ["--data_list", str(data_list), "--batch_size", str(args.batch_size)]
    command += ["--num_workers", str(args.workers)]
    if args.dtype is not None:
        command += ["--dtype", args.dtype]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    wall = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    match = re.search(r"([\d.]+) s of audio in ([\d.]+) s", done.stdout)
    assert match is not None, done.stdout
    audio, seconds = map(float, match.groups())
    return {
        "task": task,
        "audio_seconds": audio,
        "seconds": seconds,
        "rtf": round(seconds / audio, 6),
        "process_seconds": round(wall, 2),
        "rtf_of_the_process": round(wall / audio, 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--preset", choices=list(PRESETS), default="released")
    parser.add_argument("--dtype", help="of the command; its default otherwise")
    parser.add_argument("--clips", type=int, default=1676)
    parser.add_argument("--hours", type=float, default=6.0, help="of audio, at least")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=6, help="reading processes")
    args = parser.parse_args()

    config = MiMoAudioTokenizerConfig(**PRESETS[args.preset])
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        device = "cuda" if torch.cuda.is_available() else "cpu"
        random_model(config, torch.bfloat16 if device == "cuda" else torch.float32, device=device).save_pretrained(
            model
        )
        if device == "cuda":
            torch.cuda.empty_cache()
        clips = write_clips(folder / "clips", args.clips)
        write_list(folder / "first.jsonl", clips[: 2 * args.batch_size], 1.0, folder / "first")
        run(model, folder / "first.jsonl", "wav2token2wav", args)
        write_list(folder / "list.jsonl", clips, args.hours * 3600, folder / "out")
        for task in ("wav2token2wav", "wav2token"):
            rows.append(run(model, folder / "list.jsonl", task, args))
            print(json.dumps(rows[-1]), flush=True)
    results = {
        "preset": args.preset,
        "dtype": args.dtype,
        "clips": args.clips,
        "batch_size": args.batch_size,
        "workers": args.workers,
        "cores": os.cpu_count(),
        "rows": rows,
    }
    report("end_to_end", results, args.output, device=None if device == "cuda" else "CPU")


if __name__ == "__main__":
    main()
