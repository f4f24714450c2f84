"""How streaming's contexts decide its error against the whole clip: decoder and encoder, on the tiny model.

    python benchmarks/streaming_context.py --output benchmarks/results/streaming_context.json \\
        --picture docs/streaming_context.png --audio speech1.wav speech2.wav

The clips are taken one by one and, as one longer clip more, end to end. Decoding is compared with decoding the same
codes whole, encoding with the codes of the whole clip.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import matplotlib
import torch
from tqdm import tqdm
from workloads import report

from mimo_audio_hf import decode_codes, encode_waveforms, load_audio, load_model
from mimo_audio_hf.metrics import mel_distance, stoi
from mimo_audio_hf.streaming import LOW_LATENCY, StreamingDecoder, StreamingEncoder


matplotlib.use("agg")
import matplotlib.pyplot as plt


LEFT = (25, 50, 100, 150, 250, 400)
RIGHT = (0, 1, 2, 3, 4, 5, 6, 8, 10, 20, 40)
# (chunk_frames, right_context): first audio after at most 0.4 s of codes, 10 frames.
PRESETS = [(chunk, 10 - chunk) for chunk in range(2, 9)]
CROSSFADES = (0, 120, 240, 480, 960)
VOCODER = (5, 7, 10, 15, 20, 30, 40, 80, None)
ENCODER = [(left, right, 25) for left in (50, 250) for right in (0, 5, 10, 25, 50)] + [(250, 100, 25), (1000, 250, 25)]


def decibels(ratio: float) -> float:
    return round(10 * math.log10(max(ratio, 1e-12)), 2)


@torch.inference_mode()
def decoder_row(model: Any, clips: list[dict[str, torch.Tensor]], **options: Any) -> dict[str, Any]:
    """Errors of a decoder with these options, over all clips.

    `snr_db`: energy of the whole clips' audio over the error's; `worst_snr_db`: that of the worst clip.
    `mel_distance`: to the whole clips' audio. `stoi`: to the recordings. `border_db`: mean squared error within 5 ms
    of the chunks' borders over that elsewhere. `jump_db` and `jump_inside_db`: mean squared step of the error from one
    sample to the next, at the borders and elsewhere, over that of the audio.
    """
    signal = noise = 0.0
    near, far, jumps, steps, audio_steps = ([] for _ in range(5))
    mels, stois, seconds = 0.0, 0.0, 0.0
    ratios = []
    first = None
    for clip in clips:
        decoder = StreamingDecoder(model, **options)
        pieces = [decoder.push(frame) for frame in clip["codes"].split(1)] + [decoder.flush()]
        first = next(number for number, piece in enumerate(pieces, start=1) if len(piece))
        audio, whole = torch.cat(pieces), clip["whole"]
        error = audio - whole
        signal += whole.square().sum().item()
        noise += error.square().sum().item()
        ratios.append((whole.square().sum() / error.square().sum().clamp(min=1e-12)).item())
        borders = torch.tensor([len(piece) for piece in pieces if len(piece)]).cumsum(0)[:-1]
        at_border = torch.zeros(len(audio), dtype=torch.bool)
        at_border[(borders[:, None] + torch.arange(-120, 120)).flatten().clamp(0, len(audio) - 1)] = True
        near.append(error[at_border].square())
        far.append(error[~at_border].square())
        step = error.diff().square()
        jumps.append(step[borders - 1])
        steps.append(step[~at_border[1:]])
        audio_steps.append(whole.diff().square())
        length = len(clip["recording"]) / 24000
        seconds += length
        mels += length * mel_distance(whole, audio, 24000)
        stois += length * stoi(clip["recording"], audio[: len(clip["recording"])], 24000)
    mean_step = torch.cat(audio_steps).mean().item()
    return {
        **options,
        "frames_before_first_audio": first,
        "snr_db": decibels(signal / max(noise, 1e-12)),
        "worst_snr_db": decibels(min(ratios)),
        "mel_distance": round(mels / seconds, 4),
        "stoi": round(stois / seconds, 4),
        "border_db": decibels(torch.cat(near).mean().item() / torch.cat(far).mean().item()),
        "jump_db": decibels(torch.cat(jumps).mean().item() / mean_step),
        "jump_inside_db": decibels(torch.cat(steps).mean().item() / mean_step),
    }


def encoder_row(model: Any, clips: list[dict[str, torch.Tensor]], left: int, right: int, chunk: int) -> dict[str, Any]:
    """How many of each codebook's codes are those of the whole clip."""
    equal = []
    for clip in clips:
        encoder = StreamingEncoder(model, left_context=left, right_context=right, chunk_frames=chunk)
        codes = [encoder.push(samples) for samples in clip["recording"].split(24000)] + [encoder.flush()]
        equal.append(torch.cat(codes) == clip["codes"])
    agreement = torch.cat(equal).float().mean(0)
    return {
        "left_context": left,
        "right_context": right,
        "chunk_frames": chunk,
        "agreement": [round(share, 4) for share in agreement.tolist()],
        "mean_agreement": round(agreement.mean().item(), 4),
    }


def draw(results: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(19, 4.2), layout="constrained")
    for column, (name, title) in enumerate((("rerun", "run again (upstream)"), ("cached", "cached"))):
        for left in LEFT:
            rows = [row for row in results[name] if row["left_context"] == left]
            axes[column].plot(
                [row["right_context"] for row in rows], [row["snr_db"] for row in rows], ".-", label=f"{left}"
            )
        axes[column].set(title=f"decoder, {title}", xlabel="right context [frames of 40 ms]", ylabel="SNR [dB]")
        axes[column].legend(title="left context")
        axes[column].grid(alpha=0.3)
    for fade in CROSSFADES:
        rows = [row for row in results["crossfade"] if row["crossfade_samples"] == fade]
        axes[2].plot([row["right_context"] for row in rows], [row["jump_db"] for row in rows], ".-", label=f"{fade}")
    rows = [row for row in results["crossfade"] if row["crossfade_samples"] == 0]
    axes[2].plot(
        [row["right_context"] for row in rows], [row["jump_inside_db"] for row in rows], "k--", label="inside a chunk"
    )
    axes[2].set(
        title="steps at borders, cached, over those of the audio",
        xlabel="right context; chunks of 10 less that [frames]",
        ylabel="[dB]",
    )
    axes[2].legend(title="crossfade [samples]")
    axes[2].grid(alpha=0.3)
    for row in results["encoder"]:
        if row["left_context"] == 250:
            axes[3].plot(row["agreement"], ".-", label=f"{row['right_context']}")
    axes[3].set(title="encoder, left context 250", xlabel="codebook", ylabel="share of equal codes", ylim=(0, 1))
    axes[3].legend(title="right context")
    axes[3].grid(alpha=0.3)
    axes[3].xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--audio", type=Path, nargs="+", default=[Path("tests/fixtures/audio/prompt_speech_en_m.wav")])
    args = parser.parse_args()
    model = load_model("tiny", device="cpu")
    recordings = [load_audio(path) for path in args.audio]
    if len(recordings) > 1:
        recordings.append(torch.cat(recordings))
    codes = encode_waveforms(model, recordings)
    wholes = decode_codes(model, codes)
    clips = [
        {"recording": recording, "codes": each, "whole": whole}
        for recording, each, whole in zip(recordings, codes, wholes, strict=True)
    ]

    cached = [{"chunk_frames": 5, "cached": True, "left_context": left, "right_context": right}
              for left in LEFT for right in RIGHT]  # fmt: skip
    rerun = [{**options, "chunk_frames": 10, "cached": False} for options in cached]
    crossfades = [
        {"chunk_frames": chunk, "right_context": right, "crossfade_samples": fade, "cached": True}
        for chunk, right in PRESETS
        for fade in CROSSFADES
    ]
    named = {
        "upstream, pushes of 25": {"chunk_frames": 25},
        "upstream, pushes of 10": {"chunk_frames": 10},
        "low latency": dict(LOW_LATENCY),
        "low latency, not cached": {**LOW_LATENCY, "cached": False, "vocoder_context": None},
    }
    results: dict[str, Any] = {
        "clips": [path.name for path in args.audio],
        "seconds": [round(len(recording) / 24000, 2) for recording in recordings],
        "stoi_of_whole_clips": [
            round(stoi(clip["recording"], clip["whole"][: len(clip["recording"])], 24000), 4) for clip in clips
        ],
        "named": {name: decoder_row(model, clips, **options) for name, options in named.items()},
    }
    vocoders = [{**LOW_LATENCY, "vocoder_context": context} for context in VOCODER]
    grids = {"rerun": rerun, "cached": cached, "crossfade": crossfades, "vocoder": vocoders}
    for name, grid in grids.items():
        grid = [options for options in grid if options["right_context"] <= options.get("left_context", 250)]
        results[name] = [decoder_row(model, clips, **options) for options in tqdm(grid, desc=name, disable=None)]
    results["encoder"] = [encoder_row(model, clips, *contexts) for contexts in tqdm(ENCODER, disable=None)]
    report("streaming_context", results, args.output, device="CPU")
    if args.picture is not None:
        draw(results, args.picture)


if __name__ == "__main__":
    main()
