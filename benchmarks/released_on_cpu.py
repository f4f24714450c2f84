"""Memory and time of the released size on the CPU: a recording through `mimo-audio roundtrip`, float32 and bfloat16.

    python benchmarks/released_on_cpu.py tests/fixtures/audio/prompt_speech_en_m.wav --output results.json

The checkpoint is randomly initialized and written to a temporary folder (5 GB); its tensors' names and shapes are held
against those of the released checkpoint. Each command runs in a process of its
own, whose peak resident memory is what the operating system counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import soundfile
import torch
from safetensors import safe_open
from workloads import report


RELEASED_SHAPES = Path(__file__).parent.parent / "tests" / "fixtures" / "golden" / "released_state_dict_shapes.json"


def run(*arguments: str | Path) -> dict[str, float]:
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "mimo_audio_hf.cli", *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"mimo-audio {' '.join(map(str, arguments))} failed")
    # Linux counts in kilobytes, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "peak_gigabytes": round(usage.ru_maxrss * unit / 1e9, 2),
        "seconds": round(time.perf_counter() - started, 1),
    }


def saved_shapes(checkpoint: Path) -> dict[str, list[int]]:
    shapes = {}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no dictionary)
    return shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    results: dict[str, object] = {"recording": args.recording.name}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, audio = Path(folder, "released"), Path(folder, "roundtrip.wav")
        results["init"] = run("init", checkpoint, "--preset", "released")
        if saved_shapes(checkpoint) != json.loads(RELEASED_SHAPES.read_text()):
            raise SystemExit("the saved tensors are not those of the released checkpoint")
        for dtype in ("float32", "bfloat16"):
            options = ["--model", checkpoint, "--device", "cpu", "--dtype", dtype]
            results[dtype] = run("roundtrip", args.recording, audio, *options)
            if soundfile.info(audio).frames != soundfile.info(args.recording).frames:
                raise SystemExit(f"{dtype}: {soundfile.info(audio).frames} samples came back")
    device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    report("released_on_cpu", results, args.output, device)


if __name__ == "__main__":
    main()
