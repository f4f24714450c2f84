"""Peak memory of `mimo-audio tokenize` for 1,000 and for 10,000 short clips, on the CPU.

    python benchmarks/job_memory.py --output benchmarks/results/job_memory.json

Each job runs in a process of its own, with the tiny model and two reading processes; measured is the largest resident
size of that process and of its largest child.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
from workloads import report


JOB = """
import json, resource, sys
import torch
from mimo_audio_hf.jobs import JobOptions, tokenize_job
torch.set_num_threads(1)
summary = tokenize_job(sys.argv[1], sys.argv[2], JobOptions(model="tiny", device="cpu", num_workers=2))
sizes = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
names = ("clips", "megabytes", "megabytes_of_a_reader")
print(json.dumps(dict(zip(names, (summary.clips, *(round(size, 1) for size in sizes))))))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--clips", type=int, nargs=2, default=[1_000, 10_000])
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        generator = np.random.default_rng(0)
        for index in range(100):
            samples = generator.uniform(-0.5, 0.5, int(generator.integers(2_000, 12_000)))
            soundfile.write(Path(folder, f"{index}.wav"), samples, 24000)
        for clips in args.clips:
            source = Path(folder, f"source{clips}")
            source.mkdir()
            for index in range(clips):
                os.link(Path(folder, f"{index % 100}.wav"), source / f"{index:06}.wav")
            command = [sys.executable, "-c", JOB, str(source), str(Path(folder, f"out{clips}"))]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                raise SystemExit(run.stderr)
            rows.append(json.loads(run.stdout.splitlines()[-1]))
    ratio = rows[1]["megabytes"] / rows[0]["megabytes"]
    report("job_memory", {"rows": rows, "ratio": round(ratio, 3)}, args.output, device="CPU")


if __name__ == "__main__":
    main()
