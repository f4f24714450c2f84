"""Encode and decode, waveform in and waveform out: time over the arithmetic's floor, memory, what is built when.

    python benchmarks/speed.py --output benchmarks/results/speed.json --plot docs/speed.png
    python benchmarks/speed.py --preset tiny --device cpu --dtype float32 --repeats 3   # a smaller case, anywhere

Weights are random. `encode` takes packed waveforms that are on the device already to codes there, `decode` those codes
to waveforms there, both with whatever they need of the clips' lengths; `front_end` is the log-mels alone. Paths:
`plain` is the model as it is loaded, `fast` after `optimize_for_inference`, `fp8` that in 8 bits. Times are medians,
after five calls. The floor is the operations of the frames really there over the rate of a large bfloat16 product
(float32 on a CPU) that is timed in turns with the call; `over_rested_floor` takes the rate that the product had at the
beginning of the run instead, which a GPU does not keep for long. What is built, Triton kernels and CUDA graphs, is
counted for `fast`: in the first calls of a process, from a cold cache, and in 200 batches of random lengths after
others like them. The plot shows `plain` and `fast`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from workloads import WORKLOADS, Ceiling, floor_flops, mel_lengths, random_model, report

from mimo_audio_hf import MiMoAudioTokenizerConfig, MiMoAudioTokenizerModel, optimize_for_inference
from mimo_audio_hf.checkpoints import PRESETS
from mimo_audio_hf.inference import decode_packed, encode_packed
from mimo_audio_hf.modeling_mimo_audio_tokenizer import PackedBounds
from mimo_audio_hf.quantization import quantize


# Of the plot: clips of 10 s in a batch, and seconds of a single clip.
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
CLIP_SECONDS = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0)


def make_model(preset: str, device: str, dtype: torch.dtype, path: str) -> MiMoAudioTokenizerModel:
    model = random_model(MiMoAudioTokenizerConfig(**PRESETS[preset]), dtype, device=device)
    if path == "fp8":
        quantize(model, "fp8")
    return model if path == "plain" else optimize_for_inference(model)


def noise(config: MiMoAudioTokenizerConfig, seconds: list[float], device: str) -> tuple[torch.Tensor, list[int]]:
    lengths = [int(each * config.sampling_rate) for each in seconds]
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(sum(lengths), generator=generator, device=device) * 0.1, lengths


@contextmanager
def counted_kernels() -> Iterator[list[str]]:
    """Names of the Triton kernels that are built within."""
    built: list[str] = []
    try:
        from triton import knobs
    except ImportError:
        yield built
        return
    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda *args, **kwargs: built.append(str(kwargs.get("repr")))
    try:
        yield built
    finally:
        knobs.runtime.jit_post_compile_hook = before


def measure(
    model: MiMoAudioTokenizerModel,
    seconds: list[float],
    ceiling: Ceiling,
    rested: float,
    repeats: int,
    codes: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Times and floors of one batch; all of its codes, too."""
    config, device = model.config, str(model.device)
    samples, lengths = noise(config, seconds, device)
    frames = mel_lengths(config, seconds)
    bounds = PackedBounds.of_levels(torch.tensor([lengths, frames]), device)
    code_lengths = model.encoder.code_lengths(frames)
    encoded = encode_packed(model, samples, lengths)
    codes = encoded if codes is None else codes
    calls = {
        "front_end": lambda: model.encoder.log_mel(samples, *bounds),
        "encode": lambda: encode_packed(model, samples, lengths),
        "decode": lambda: decode_packed(model, codes, code_lengths),
    }
    flops = dict(zip(("encode", "decode"), floor_flops(config, frames), strict=True))
    row: dict[str, Any] = {}
    for work, call in calls.items():
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        taken, rate = ceiling.beside(call, repeats)
        row[work] = {"milliseconds": round(taken * 1000, 3)}
        if work in flops:
            row[work] |= {
                "ceiling_tflops": round(rate / 1e12, 2),
                "floor_milliseconds": round(flops[work] / rate * 1000, 3),
                "over_floor": round(taken * rate / flops[work], 3),
                "over_rested_floor": round(taken * rested / flops[work], 3),
            }
        if device != "cpu":
            row[work]["peak_gigabytes"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return row | {"audio_seconds": round(sum(seconds), 1), "_codes": encoded}


def first_call(model: MiMoAudioTokenizerModel, repeats: int = 3) -> dict[str, Any]:
    """Encode and decode of ten seconds, as a process's first work."""
    samples, lengths = noise(model.config, [10.0], str(model.device))
    seconds = []
    with counted_kernels() as built:
        for _ in range(repeats):
            started = time.perf_counter()
            codes = encode_packed(model, samples, lengths)
            decode_packed(model, codes, [len(codes)])
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(round(time.perf_counter() - started, 3))
    return {"seconds_of_the_first_calls": seconds, "kernels_built": len(built)}


def first_calls_of(path: str, args: argparse.Namespace) -> dict[str, Any]:
    """[`first_call`] in a process that finds nothing built."""
    command = [sys.executable, __file__, "--preset", args.preset, "--device", args.device, "--dtype", args.dtype]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache}
        run = subprocess.run([*command, "--first-calls", path], env=environment, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def random_batches(model: MiMoAudioTokenizerModel, batches: int = 200) -> dict[str, Any]:
    """What is built in random batches, after others like them."""
    generator = random.Random(0)
    counts = []
    for _ in range(2):
        graphs = model.graphs.recorded if model.graphs else 0
        with counted_kernels() as built:
            for _ in range(batches):
                seconds = [generator.uniform(0.1, 12.0) for _ in range(generator.randint(1, 24))]
                samples, lengths = noise(model.config, seconds, str(model.device))
                codes = encode_packed(model, samples, lengths)
                code_lengths = model.encoder.code_lengths(mel_lengths(model.config, seconds))
                decode_packed(model, codes, code_lengths)
        recorded = (model.graphs.recorded if model.graphs else 0) - graphs
        counts.append({"kernels_built": len(built), "graphs_recorded": recorded})
    return {"batches": batches, "before": counts[0], "after": counts[1]}


def agreement(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    return [round(each, 4) for each in (a == b).float().mean(0).tolist()]


def plot(curves: dict[str, dict[str, list[dict[str, Any]]]], path: Path, device: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, (kind, label) in zip(
        axes, (("batch_size", "clips of 10 s in a batch"), ("clip_seconds", "seconds of a single clip")), strict=True
    ):
        for (name, rows), color in zip(curves.items(), ("tab:gray", "tab:blue", "tab:green"), strict=False):
            for work, style in (("encode", "-o"), ("decode", "--s")):
                points = [(row[kind], row[work]["over_floor"]) for row in rows[kind]]
                axis.plot(*zip(*points, strict=True), style, color=color, label=f"{name}, {work}")
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="time over the arithmetic's floor")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=8)
    figure.suptitle(device)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--preset", choices=list(PRESETS), default="released")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--paths", nargs="+", default=["plain", "fast"], choices=["plain", "fast", "fp8"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-random-batches", action="store_true")
    parser.add_argument("--first-calls", metavar="PATH", help=argparse.SUPPRESS)
    args = parser.parse_args()

    device, dtype = args.device, getattr(torch, args.dtype)
    if args.first_calls:
        print(json.dumps(first_call(make_model(args.preset, device, dtype, args.first_calls))))
        return
    ceiling = Ceiling(2048, device, dtype) if device == "cpu" else Ceiling(device=device)
    rested = ceiling.measure()
    results: dict[str, Any] = {
        "preset": args.preset,
        "dtype": args.dtype,
        "rested_ceiling_tflops": round(rested / 1e12, 2),
        "paths": {},
    }
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    reference: dict[str, torch.Tensor] = {}
    for path in args.paths:
        model = make_model(args.preset, device, dtype, path)
        found: dict[str, Any] = {"attn_implementation": model.attn_implementation}
        if path == "fast":
            found["first_calls"] = first_calls_of(path, args)
        found["rows"] = []
        for name, seconds in WORKLOADS.items():
            row = {"workload": name} | measure(model, seconds, ceiling, rested, args.repeats, reference.get(name))
            codes = row.pop("_codes")
            if path == args.paths[0]:
                reference[name] = codes
            else:
                row["code_agreement_per_codebook"] = agreement(codes, reference[name])
            found["rows"].append(row)
            print(path, row, flush=True)
        if path == "fast" and not args.no_random_batches and device != "cpu":
            found["random_batches"] = random_batches(model)
        if args.plot and path != "fp8":
            curves[path] = {
                "batch_size": [
                    {"batch_size": size} | measure(model, [10.0] * size, ceiling, rested, args.repeats)
                    for size in BATCH_SIZES
                ],
                "clip_seconds": [
                    {"clip_seconds": seconds} | measure(model, [seconds], ceiling, rested, args.repeats)
                    for seconds in CLIP_SECONDS
                ],
            }
            for rows in curves[path].values():
                for row in rows:
                    del row["_codes"]
            found |= curves[path]
        results["paths"][path] = found
        del model
    name = None if device == "cpu" else torch.cuda.get_device_name()
    report("speed", results, args.output, name or f"CPU, {torch.get_num_threads()} threads")
    if args.plot:
        plot(curves, args.plot, name or "CPU")
    print("| path | work | front end | encode | floor | over | rested | decode | floor | over | rested |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for path, found in results["paths"].items():
        for row in found["rows"]:
            cells = [
                f"{cell['milliseconds']:.2f} ms | {cell['floor_milliseconds']:.2f} ms | {cell['over_floor']:.2f} | "
                f"{cell['over_rested_floor']:.2f}"
                for cell in (row["encode"], row["decode"])
            ]
            front_end = f"{row['front_end']['milliseconds']:.2f} ms"
            print(f"| {path} | {row['workload']} | {front_end} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
