"""Many streams decoded at once: time per 0.4 s of each stream, whether they keep up, the first audio's latency.

    python benchmarks/streaming.py --output benchmarks/results/streaming.json
    python benchmarks/streaming.py --device cpu --output benchmarks/results/streaming_on_cpu.json

On a GPU the released size in bfloat16 with random weights; on a CPU the model in the package, in float32. All streams
are pushed 10 frames in one call, each at its own position, until contexts are full; the calls after that are timed,
from codes on the CPU to audio on the CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from workloads import random_model, report

from mimo_audio_hf import MiMoAudioTokenizerConfig, MiMoAudioTokenizerModel, load_model, optimize_for_inference
from mimo_audio_hf.streaming import LOW_LATENCY, StreamingDecoder, StreamingDecoderPool


PRESETS: dict[str, dict[str, Any]] = {"upstream's": {}, "low latency": dict(LOW_LATENCY)}
PUSH = 10  # frames of codes: 0.4 s
FULL = 300  # more than all contexts and what has not been given out


def random_codes(model: MiMoAudioTokenizerModel, frames: int, num_quantizers: int) -> torch.Tensor:
    sizes = model.config.codebook_sizes[:num_quantizers]
    return torch.stack([torch.randint(size, (frames,)) for size in sizes], dim=1)


def steady(
    model: MiMoAudioTokenizerModel, options: dict[str, Any], streams: int, num_quantizers: int, repeats: int
) -> dict[str, Any]:
    """Time per push of 0.4 s to each of the streams."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    pool = StreamingDecoderPool(model, capacity=streams, **options)
    names = [pool.open() for _ in range(streams)]
    pool.push({name: random_codes(model, 7 * index % 50, num_quantizers) for index, name in enumerate(names)})
    times = []
    for number in range(FULL // PUSH + repeats):
        codes = {name: random_codes(model, PUSH, num_quantizers) for name in names}
        started = time.perf_counter()
        audio = pool.push(codes)
        if number >= FULL // PUSH:
            times.append(time.perf_counter() - started)
            assert {len(samples) for samples in audio.values()} == {PUSH * 960}
    times.sort()
    row = {
        "streams": streams,
        "median_ms": round(1000 * statistics.median(times), 2),
        "p95_ms": round(1000 * times[int(0.95 * (len(times) - 1))], 2),
        "max_ms": round(1000 * times[-1], 2),
        "audio_seconds_per_second": round(streams * PUSH / 25 / statistics.median(times), 1),
        "keep_up": times[-1] < PUSH / 25,
    }
    if model.device.type == "cuda":
        row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return row


def first_audio(
    model: MiMoAudioTokenizerModel, options: dict[str, Any], num_quantizers: int, repeats: int
) -> dict[str, Any]:
    """A stream's codes frame by frame as they would be generated: the wait for the first audio."""
    decoder = StreamingDecoder(model, **options)
    times, frames = [], 0
    for _ in range(3 + repeats):  # graphs are recorded when a size comes the second time
        decoder.reset()
        audio, frames = torch.empty(0), 0
        while not len(audio):
            codes, frames = random_codes(model, 1, num_quantizers), frames + 1
            started = time.perf_counter()
            audio = decoder.push(codes)
        times.append(time.perf_counter() - started)
    milliseconds = 1000 * statistics.median(times[3:])
    return {
        "frames_of_codes": frames,
        "seconds_of_codes": frames / 25,
        "compute_ms": round(milliseconds, 2),
        "latency_ms_if_codes_come_in_real_time": round(1000 * frames / 25 + milliseconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--streams", type=int, nargs="+", help="(default: 1 16 64, on a CPU 1 4)")
    parser.add_argument("--num-quantizers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.device == "cuda":
        model = random_model(MiMoAudioTokenizerConfig(), torch.bfloat16)
    else:
        model = load_model("tiny", device="cpu")
    optimize_for_inference(model)
    results: dict[str, Any] = {"num_quantizers": args.num_quantizers, "push_seconds": PUSH / 25}
    for name, options in PRESETS.items():
        results[name] = {
            "options": options,
            "steady": [
                steady(model, options, streams, args.num_quantizers, args.repeats)
                for streams in args.streams or ([1, 16, 64] if args.device == "cuda" else [1, 4])
            ],
            "first_audio": first_audio(model, options, args.num_quantizers, args.repeats),
        }
    report("streaming", results, args.output, device="CPU" if args.device == "cpu" else None)


if __name__ == "__main__":
    main()
