"""The attention backends side by side on one GPU, released size, bfloat16, random weights.

    python benchmarks/backends.py --output benchmarks/results/backends.json

For each backend that runs here: encode and decode over the arithmetic's floor and peak memory on the three workloads.
For each pair, on the first workload: how many codes agree in each codebook, and the signal-to-noise ratio between the
waveforms decoded from the same codes. And what the profiler says of waiting: within the packed core, nothing may wait
for the GPU.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available
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

from mimo_audio_hf import MiMoAudioTokenizerConfig, MiMoAudioTokenizerModel
from mimo_audio_hf.modeling_mimo_audio_tokenizer import ATTENTION_BACKENDS


WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH", "aten::item")


def waits(model: MiMoAudioTokenizerModel, lengths: list[int], features: torch.Tensor) -> dict[str, int]:
    """Operations that wait for the GPU in packed encode and decode, as counted by the profiler."""
    encoder_layout = model.encoder_layout(lengths)
    decoder_layout = model.decoder_layout(model.encoder.code_lengths(lengths))
    packed = encoder_layout.mel.unpad(features.transpose(1, 2))

    def run() -> None:
        codes = model.encode(packed, layout=encoder_layout).audio_codes
        model.decode(codes, layout=decoder_layout)

    run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
    events = {event.key: event.count for event in profile.key_averages()}
    torch.cuda.set_sync_debug_mode("error")  # PyTorch's own check: raises where something waits
    run()
    torch.cuda.set_sync_debug_mode("default")
    # The profiler itself waits once when it stops.
    return {name: sum(count for key, count in events.items() if name in key) for name in WAITING}


def signal_to_noise(a: torch.Tensor, b: torch.Tensor) -> float:
    return 10 * torch.log10(a.square().sum() / (a - b).square().sum()).item()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()

    config = MiMoAudioTokenizerConfig()
    model = random_model(config, torch.bfloat16)
    names = [name for name in ATTENTION_BACKENDS if name != "flash_attention_2" or is_flash_attn_2_available()]
    ceiling = measured_ceiling()
    default = model.attn_implementation
    rows: list[dict[str, Any]] = []
    codes: dict[str, torch.Tensor] = {}
    audio: dict[str, torch.Tensor] = {}
    decoded_by_all: torch.Tensor | None = None
    counted: dict[str, dict[str, int]] = {}
    for name in names:
        model.set_attn_implementation(name)
        for workload, seconds in WORKLOADS.items():
            lengths = mel_lengths(config, seconds)
            features, mask = random_features(config, lengths)
            encoded = model.encode(features, mask)
            same_codes = encoded.audio_codes
            if workload == next(iter(WORKLOADS)):
                codes[name] = encoded.audio_codes.transpose(1, 2)[encoded.audio_codes_mask.bool()]
                decoded_by_all = encoded.audio_codes if decoded_by_all is None else decoded_by_all
                same_codes = decoded_by_all
                audio[name] = model.decode(same_codes, encoded.audio_codes_mask).audio_values
                counted[name] = waits(model, lengths, features)
            calls = (
                ("encode", lambda f=features, m=mask: model.encode(f, m)),
                ("decode", lambda c=same_codes, m=encoded.audio_codes_mask: model.decode(c, m)),
            )
            row: dict[str, Any] = {"attn_implementation": name, "workload": workload}
            for (work, call), flops in zip(calls, floor_flops(config, lengths), strict=True):
                torch.cuda.reset_peak_memory_stats()
                time = seconds_of(call, args.repeats, warmup=3)
                row[f"{work}_milliseconds"] = round(time * 1000, 2)
                row[f"{work}_over_floor"] = round(time * ceiling / flops, 3)
                row[f"{work}_peak_gigabytes"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            rows.append(row)

    pairs = [
        {
            "pair": [a, b],
            "code_agreement_per_codebook": [round(x, 4) for x in (codes[a] == codes[b]).float().mean(0).tolist()],
            "waveform_snr_db": round(signal_to_noise(audio[a], audio[b]), 1),
        }
        for a, b in itertools.combinations(names, 2)
    ]
    results = {
        "dtype": "bfloat16",
        "default": default,
        "not_run": {} if is_flash_attn_2_available() else {"flash_attention_2": "flash-attn is not installed here"},
        "ceiling_tflops": round(ceiling / 1e12, 1),
        "rows": rows,
        "pairs": pairs,
        "waiting_operations": counted,
    }
    report("backends", results, args.output)


if __name__ == "__main__":
    main()
