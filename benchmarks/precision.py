"""float32, bfloat16 and 8 bits: time and memory, and how far codes and audio are from those in float32.

    python benchmarks/precision.py RECORDING... --threads 2 --output benchmarks/results/precision_on_cpu.json
    python benchmarks/precision.py RECORDING... --device cuda --output benchmarks/results/precision_on_gpu.json

8 bits are int8 on a CPU, FP8 on a GPU. For `tiny`, and for the released size with random weights (whose PESQ and STOI
would mean nothing). Times are medians; each dtype has a process of its own, whose peak resident memory is what the
operating system counted. Decoded are the codes of float32; PESQ and STOI are of each dtype's own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from workloads import report

from mimo_audio_hf import decode_codes, encode_waveforms, load_audio, load_model, optimize_for_inference
from mimo_audio_hf.metrics import pesq, stoi


DTYPES = {"cpu": ["float32", "bfloat16", "int8"], "cuda": ["float32", "bfloat16", "fp8"]}


@torch.inference_mode()
def measure(model_name: str, dtype: str, args: argparse.Namespace, folder: Path) -> None:
    """In a process of its own: times, and what was made, for the others to be compared with."""
    recordings: list[Path] = args.recordings
    torch.set_num_threads(args.threads)
    model = optimize_for_inference(load_model(model_name, device=args.device, dtype=dtype))
    clips = [load_audio(path) for path in recordings]
    seconds = sum(map(len, clips)) / model.config.sampling_rate
    codes = encode_waveforms(model, clips)
    reference = folder / "float32.safetensors"
    given = codes if dtype == "float32" else list(load_codes(reference))
    times: dict[str, list[float]] = {"encode": [], "decode": []}
    audio = decode_codes(model, given)
    for _ in range(3):
        for work, call in (
            ("encode", lambda: encode_waveforms(model, clips)),
            ("decode", lambda: decode_codes(model, given)),
        ):
            started = time.perf_counter()
            call()
            times[work].append((time.perf_counter() - started) / seconds)
    recovered = decode_codes(model, codes)
    tensors = {f"codes{i}": each.contiguous() for i, each in enumerate(codes)}
    tensors |= {f"audio{i}": each.contiguous() for i, each in enumerate(audio)}
    tensors |= {f"recovered{i}": each.contiguous() for i, each in enumerate(recovered)}
    save_file(tensors, folder / f"{dtype}.safetensors")
    (folder / f"{dtype}.json").write_text(json.dumps(times))


def load_codes(path: Path) -> list[torch.Tensor]:
    tensors = load_file(path)
    return [tensors[f"codes{i}"] for i in range(sum(name.startswith("codes") for name in tensors))]


def compare(dtype: str, recordings: list[Path], folder: Path, trained: bool) -> dict[str, Any]:
    own, exact = (load_file(folder / f"{name}.safetensors") for name in (dtype, "float32"))
    times = json.loads((folder / f"{dtype}.json").read_text())
    row: dict[str, Any] = {f"{work}_rtf": round(statistics.median(each), 4) for work, each in times.items()}
    numbers = range(len(recordings))
    if dtype != "float32":
        agreement = torch.cat([own[f"codes{i}"] == exact[f"codes{i}"] for i in numbers]).float().mean(0)
        row["code_agreement"] = [round(value, 3) for value in agreement.tolist()]
        power = sum(exact[f"audio{i}"].square().sum() for i in numbers)
        noise = sum((own[f"audio{i}"] - exact[f"audio{i}"]).square().sum() for i in numbers)
        row["decoded_snr_db"] = round(10 * torch.log10(torch.as_tensor(power / noise)).item(), 1)
    if trained:
        for name, score in (
            ("stoi", stoi),
            ("pesq_nb", lambda *audio: pesq(*audio, "nb")),
            ("pesq_wb", lambda *audio: pesq(*audio, "wb")),
        ):
            scores = []
            for i, path in enumerate(recordings):
                clip = load_audio(path)
                scores.append(score(clip, own[f"recovered{i}"][: len(clip)], 24000))
            row[name] = round(statistics.mean(scores), 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", nargs="+", type=Path, metavar="RECORDING")
    parser.add_argument("--device", choices=list(DTYPES), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--sizes", nargs="+", choices=["tiny", "released"], default=["tiny", "released"])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", nargs=3, metavar=("MODEL", "DTYPE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure[0], args.measure[1], args, Path(args.measure[2]))
        return
    results: dict[str, Any] = {"recordings": [path.name for path in args.recordings], "threads": args.threads}
    with tempfile.TemporaryDirectory() as temporary:
        released = Path(temporary, "released")
        if "released" in args.sizes:
            command = [sys.executable, "-m", "mimo_audio_hf.cli", "init", str(released), "--preset", "released"]
            subprocess.run(command, check=True)
        for size in args.sizes:
            model = "tiny" if size == "tiny" else str(released)
            folder = Path(temporary, f"made by {size}")
            folder.mkdir()
            results[size] = {}
            for dtype in DTYPES[args.device]:
                recordings = [str(path) for path in args.recordings]
                command = [
                    sys.executable,
                    __file__,
                    *recordings,
                    "--threads",
                    str(args.threads),
                    "--device",
                    args.device,
                ]
                process = subprocess.Popen([*command, "--measure", model, dtype, str(folder)])
                _, status, usage = os.wait4(process.pid, 0)
                if status:
                    raise SystemExit(f"{size} in {dtype} failed")
                row = compare(dtype, args.recordings, folder, trained=size == "tiny")
                row["peak_gigabytes"] = round(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9, 2)
                results[size][dtype] = row
    cpu = f"{platform.machine()} CPU, {args.threads} threads"
    report(
        f"precision_on_{'cpu' if args.device == 'cpu' else 'gpu'}",
        results,
        args.output,
        None if args.device == "cuda" else cpu,
    )


if __name__ == "__main__":
    main()
