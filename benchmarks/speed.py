"""Encode and decode of the released size on one GPU: time over the arithmetic's floor, and peak memory.

    python benchmarks/speed.py --output benchmarks/results/speed.json

Weights are random, spectrograms are on the GPU already, and both calls are timed from padded tensors to padded
tensors. The floor is the operations of the frames really there over the rate of a large product in the same run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from workloads import (
    WORKLOADS,
    floor_flops,
    measured_ceiling,
    mel_lengths,
    random_features,
    random_model,
    report,
    seconds_of,
)

from mimo_audio_hf import MiMoAudioTokenizerConfig


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()

    config = MiMoAudioTokenizerConfig()
    model = random_model(config, torch.bfloat16)
    ceiling = measured_ceiling()
    rows = []
    for name, seconds in WORKLOADS.items():
        lengths = mel_lengths(config, seconds)
        features, mask = random_features(config, lengths)
        encoded = model.encode(features, mask)
        codes, codes_mask = encoded.audio_codes, encoded.audio_codes_mask
        calls = {
            "encode": lambda features=features, mask=mask: model.encode(features, mask),
            "decode": lambda codes=codes, codes_mask=codes_mask: model.decode(codes, codes_mask),
        }
        row = {"workload": name, "audio_seconds": sum(seconds)}
        for (work, call), flops in zip(calls.items(), floor_flops(config, lengths), strict=True):
            torch.cuda.reset_peak_memory_stats()
            time = seconds_of(call, args.repeats)
            row[work] = {
                "milliseconds": round(time * 1000, 2),
                "floor_milliseconds": round(flops / ceiling * 1000, 2),
                "over_floor": round(time * ceiling / flops, 3),
                "peak_gigabytes": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            }
        rows.append(row)
    results = {
        "dtype": "bfloat16",
        "attn_implementation": model.attn_implementation,
        "ceiling_tflops": round(ceiling / 1e12, 1),
        "rows": rows,
    }
    report("speed", results, args.output)
    print("| work | encode | floor | over | decode | floor | over |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [
            f"{cell['milliseconds']:.1f} ms | {cell['floor_milliseconds']:.2f} ms | {cell['over_floor']:.2f}"
            for cell in (row["encode"], row["decode"])
        ]
        print(f"| {row['workload']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
