# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""A training set with every clip at several speeds, pitch and formants with it: more voices than were recorded.

    python recipes/tiny/vary_speed.py data/tiny/train.parquet data/tiny/train-speeds.parquet

Clips are written as 16-bit WAV, which is read fastest; their keys and speakers get the speed as a suffix. Speeds are
multiples of 0.01, to which others are rounded: the resampler wants small ratios.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import soundfile
import torch
from datasets import Audio, load_dataset

from mimo_audio_hf.audio import load_audio, resample
from mimo_audio_hf.files import replacing


SAMPLING_RATE = 24000
SPEEDS = [0.72, 0.8, 0.88, 0.96, 1.04, 1.14, 1.25]


def parsed_speed(value: str) -> float:
    """A speed from the command line."""
    rounded = round(float(value), 2)
    if not 0.1 <= rounded <= 10:
        raise argparse.ArgumentTypeError(f"{value}; accepted: 0.1 to 10")
    return rounded


def at_speeds(rows: dict[str, list[Any]], speeds: list[float]) -> dict[str, list[Any]]:
    """Every clip of a batch of rows at every speed, a multiple of 0.01."""
    torch.set_num_threads(1)
    varied: dict[str, list[Any]] = {name: [] for name in rows}
    for number, audio in enumerate(rows["audio"]):
        recording = load_audio(audio["bytes"], SAMPLING_RATE)
        for speed in speeds:
            # Said to be at a higher rate than it is, it has fewer samples afterwards: it is faster.
            waveform = resample(recording, round(SAMPLING_RATE * speed), SAMPLING_RATE).clamp(-1, 1)
            row = {name: values[number] for name, values in rows.items()}
            if speed != 1:
                row |= {"key": f"{row['key']}-{speed:g}", "speaker": f"{row['speaker']}-{speed:g}"}
            file = io.BytesIO()
            soundfile.write(file, waveform.numpy(), SAMPLING_RATE, format="WAV", subtype="PCM_16")
            row |= {"audio": {"bytes": file.getvalue(), "path": None}, "seconds": len(waveform) / SAMPLING_RATE}
            for name, value in row.items():
                varied[name].append(value)
    return varied


def main() -> None:
    parser = argparse.ArgumentParser(description="A training set with every clip at several speeds.")
    parser.add_argument("input", type=Path, metavar="IN.parquet")
    parser.add_argument("output", type=Path, metavar="OUT.parquet")
    parser.add_argument("--speeds", type=parsed_speed, nargs="+", default=SPEEDS, help="(default: %(default)s)")
    parser.add_argument("--without-licence", nargs="*", default=[], metavar="L", help="leave out clips under these")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    args = parser.parse_args()
    if len(set(args.speeds)) < len(args.speeds):
        parser.error(f"--speeds {args.speeds}; accepted: different ones")

    dataset = load_dataset("parquet", data_files=str(args.input), split="train")
    dataset = dataset.cast_column("audio", Audio(decode=False))
    wanted = [row for row, licence in enumerate(dataset["licence"]) if licence not in args.without_licence]
    if not wanted:
        parser.error(f"no clip of {args.input} is left of {len(dataset)}; accepted: fewer licences to leave out")
    varied = dataset.select(wanted).map(
        at_speeds, batched=True, batch_size=16, num_proc=args.workers, fn_kwargs={"speeds": args.speeds}
    )
    with replacing(args.output) as temporary:
        varied.cast_column("audio", Audio(SAMPLING_RATE)).to_parquet(str(temporary))
    hours = sum(varied["seconds"]) / 3600
    print(f"{len(wanted)} of {len(dataset)} clips, {hours:.2f} h at {len(args.speeds)} speeds -> {args.output}")


if __name__ == "__main__":
    main()
