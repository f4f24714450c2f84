"""An hour of audio through `mimo-audio roundtrip` on the CPU: time, and the most memory that the command takes.

    python benchmarks/long_audio.py --output benchmarks/results/long_audio.json

The recording is made of clips, one after the other, again and again; 24 kHz mono, and 44.1 kHz stereo. Also checked:
that the codes of its first minutes are those of the pieces of 60 s apart.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import soundfile
import torch
from workloads import report

from mimo_audio_hf import MiMoAudioTokenizerFeatureExtractor, encode_waveforms, load_audio, load_model
from mimo_audio_hf.inference import MAX_PIECE_FRAMES


# Name: rate in Hz, channels.
FORMATS = {"24 kHz mono": (24000, 1), "44.1 kHz stereo": (44100, 2)}


def write_recording(path: Path, clips: list[Path], minutes: float, rate: int, channels: int) -> None:
    """16-bit WAV."""
    missing = round(minutes * 60 * rate)
    with soundfile.SoundFile(path, "w", rate, channels, "PCM_16") as file:
        for clip in itertools.cycle([load_audio(clip, rate) for clip in clips]):
            file.write(clip[:missing, None].expand(-1, channels).numpy())
            missing -= min(missing, len(clip))
            if not missing:
                return


def roundtrip(recording: Path, result: Path) -> dict[str, Any]:
    """What the command takes for a recording."""
    command = [sys.executable, "-m", "mimo_audio_hf.cli", "roundtrip", str(recording), str(result)]
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--model", "tiny", "--device", "cpu"])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{recording.name} failed")
    source, decoded = (soundfile.info(path) for path in (recording, result))
    return {
        "minutes": round(source.duration / 60, 3),
        "minutes_back": round(decoded.duration / 60, 3),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 3),
    }


@torch.inference_mode()
def pieces_are_encoded_apart(path: Path, minutes: int) -> bool:
    """Whether the codes of the first minutes are those that `encode` gives for each piece of the mel spectrogram."""
    model = load_model("tiny", device="cpu")
    waveform = load_audio(path)[: minutes * 60 * 24000]
    mel = MiMoAudioTokenizerFeatureExtractor.from_config(model.config).log_mel_spectrogram(waveform)
    apart = [model.encode(piece[None]).audio_codes[0].t() for piece in mel.split(MAX_PIECE_FRAMES, dim=1)]
    return torch.equal(encode_waveforms(model, [waveform])[0], torch.cat(apart))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--audio", type=Path, nargs="+", default=[Path("tests/fixtures/audio/prompt_speech_en_m.wav")])
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        recording, result = Path(folder, "recording.wav"), Path(folder, "result.wav")
        for name, kind in FORMATS.items():
            write_recording(recording, args.audio, args.minutes, *kind)
            results[name] = roundtrip(recording, result)
        same = pieces_are_encoded_apart(recording, 5)
    results["codes_of_the_first_minutes_are_those_of_the_pieces_apart"] = same
    report("long_audio", results, args.output, device="CPU")


if __name__ == "__main__":
    main()
