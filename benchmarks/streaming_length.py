"""How streaming's error against the whole clip grows with its length, and where it lies: the tiny model, on the CPU.

    python benchmarks/streaming_length.py --output benchmarks/results/streaming_length.json \\
        --picture docs/streaming_length.png --audio speech1.wav speech2.wav

The recordings are taken end to end, again and again, up to each length; the same codes are decoded whole and as
streams.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

import matplotlib
import torch
from workloads import report

from mimo_audio_hf import MiMoAudioTokenizerModel, encode_waveforms, load_audio, load_model
from mimo_audio_hf.metrics import stoi
from mimo_audio_hf.streaming import LOW_LATENCY, StreamingDecoder


matplotlib.use("agg")
import matplotlib.pyplot as plt


SECONDS = (15, 30, 60, 120, 240)
SEGMENT = 3  # seconds of which the ratio is taken alone
WAYS: dict[str, dict[str, Any]] = {
    "low latency": dict(LOW_LATENCY),
    "low latency, no crossfade": {**LOW_LATENCY, "crossfade_samples": 0},
    "upstream, pushes of 25": {"chunk_frames": 25},
}


def decibels(signal: torch.Tensor, noise: torch.Tensor) -> float:
    return round(10 * math.log10(signal.square().mean().item() / max(noise.square().mean().item(), 1e-12)), 2)


@torch.inference_mode()
def measure(
    model: MiMoAudioTokenizerModel, recording: torch.Tensor, codes: torch.Tensor, whole: torch.Tensor, **options: Any
) -> dict[str, Any]:
    """Ratios of the whole clip's audio to the difference from it.

    `at_borders_db`: energy of the error in the 10 ms from each chunk's first sample on, where one chunk goes over into
    the next, over that elsewhere.
    """
    decoder = StreamingDecoder(model, **options)
    pieces = [decoder.push(chunk) for chunk in codes.split(25)] + [decoder.flush()]
    audio = torch.cat(pieces)
    error = audio - whole
    segment = SEGMENT * model.config.sampling_rate
    ratios = [decibels(*pair) for pair in zip(whole.split(segment), error.split(segment), strict=True)]
    chunk = options["chunk_frames"] * model.config.samples_per_frame
    into_chunk = (torch.arange(len(audio)) + options.get("right_context", 40) * model.config.samples_per_frame) % chunk
    at_border = into_chunk < 240
    return {
        "snr_db": decibels(whole, error),
        "worst_segment_db": min(ratios),
        "segments_under_15_db": round(sum(ratio < 15 for ratio in ratios) / len(ratios), 3),
        "at_borders_db": decibels(error[at_border], error[~at_border]),
        "stoi": round(stoi(recording, audio[: len(recording)], 24000), 4),
        "segments_db": ratios,
    }


def draw(results: dict[str, Any], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
    longest = results["lengths"][-1]
    for name in ("low latency", "upstream, pushes of 25"):
        ratios = longest[name]["segments_db"]
        axis.plot([SEGMENT * (number + 0.5) for number in range(len(ratios))], ratios, ".-", label=name)
    axis.set(xlabel="seconds into the stream", ylabel=f"SNR of {SEGMENT} s against the whole clip [dB]")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--audio", type=Path, nargs="+", default=[Path("tests/fixtures/audio/prompt_speech_en_m.wav")])
    args = parser.parse_args()
    model = load_model("tiny", device="cpu")
    clips = [load_audio(path) for path in args.audio]
    results: dict[str, Any] = {"clips": [path.name for path in args.audio], "lengths": []}
    for seconds in SECONDS:
        size = seconds * 24000
        repeats = -(-size // sum(map(len, clips)))
        recording = torch.cat([*itertools.chain.from_iterable([clips] * repeats)])[:size]
        [codes] = encode_waveforms(model, [recording])
        with torch.inference_mode():
            whole = model.decode(codes.t()[None]).audio_values.flatten()
        row: dict[str, Any] = {"seconds": seconds, "stoi_of_the_whole": round(stoi(recording, whole[:size], 24000), 4)}
        row |= {name: measure(model, recording, codes, whole, **options) for name, options in WAYS.items()}
        results["lengths"].append(row)
        print({name: {**row[name], "segments_db": "..."} for name in WAYS}, flush=True)
    report("streaming_length", results, args.output, device="CPU")
    if args.picture is not None:
        draw(results, args.picture)


if __name__ == "__main__":
    main()
