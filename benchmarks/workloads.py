"""What the GPU benchmarks share: workloads, the arithmetic's floor, timing and the report."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from mimo_audio_hf import MiMoAudioTokenizerConfig, MiMoAudioTokenizerModel, __version__


# Clip lengths in seconds.
WORKLOADS: dict[str, list[float]] = {
    "64 clips of 2 to 10 s": [2 + 8 * ((i + 0.5) / 64) ** 0.882 for i in range(64)],
    "1 clip of 10 s": [10.0],
    "16 clips of 28 to 30 s": [28 + 2 * i / 15 for i in range(16)],
}


def mel_lengths(config: MiMoAudioTokenizerConfig, seconds: list[float]) -> list[int]:
    return [1 + int(each * config.sampling_rate) // config.hop_length for each in seconds]


def random_features(
    config: MiMoAudioTokenizerConfig, lengths: list[int], device: str = "cuda", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with about the level of log-mels: (clips, n_mels, frames) float32 and its mask."""
    generator = torch.Generator(device).manual_seed(seed)
    frames = max(lengths)
    features = torch.randn(len(lengths), config.n_mels, frames, generator=generator, device=device) * 2 - 5
    mask = torch.arange(frames, device=device) < torch.tensor(lengths, device=device)[:, None]
    return features * mask[:, None], mask.long()


def random_model(
    config: MiMoAudioTokenizerConfig, dtype: torch.dtype, seed: int = 0, device: str = "cuda"
) -> MiMoAudioTokenizerModel:
    torch.manual_seed(seed)
    with torch.device(device):
        return MiMoAudioTokenizerModel(config).to(dtype).eval()


def floor_flops(config: MiMoAudioTokenizerConfig, mels: list[int]) -> tuple[float, float]:
    """Floating-point operations of encode and decode for clips of these mel frames, without any padding.

    Counted: the layers' products, attention over each clip (half of it where causal), the convolutions, the codebooks'
    products and the vocoder's linear layers.
    """
    d, k = config.d_model, config.kernel_size
    frames = [(mel - 1) // config.stride_size + 1 for mel in mels]
    codes = [-(-frame // config.avg_pooler) for frame in frames]

    def layers(number: int, dim: int, ffn: int, lengths: list[int]) -> float:
        return number * 2 * (4 * dim**2 + 2 * dim * ffn) * sum(lengths)

    def attention(number: int, lengths: list[int], causal: bool) -> float:
        return number * 4 * d * sum(length**2 for length in lengths) / (2 if causal else 1)

    encode = layers(config.encoder_layers, d, config.encoder_ffn_dim, frames)
    encode += attention(config.encoder_layers, frames, config.encoder_causal)
    encode += 2 * k * (config.n_mels * d * sum(mels) + d * d * sum(frames))
    encode += 2 * d * sum(codes) * (config.avg_pooler * d + sum(config.codebook_sizes))

    frames = [config.avg_pooler * code for code in codes]
    mel_frames = config.decoder_stride_size * sum(frames)
    decode = layers(config.decoder_layers, d, config.decoder_ffn_dim, frames)
    decode += attention(config.decoder_layers, frames, config.decoder_causal)
    decode += 2 * config.avg_pooler * d * d * sum(codes)
    decode += 2 * config.decoder_kernel_size * d * config.n_mels * sum(frames)
    decode += layers(config.vocoder_num_layers, config.vocoder_dim, config.vocoder_intermediate_dim, [mel_frames])
    decode += 2 * config.vocoder_dim * (config.n_mels + config.nfft + 2) * mel_frames
    return encode, decode


def seconds_of(function: Callable[[], Any], repeats: int = 20, warmup: int = 5, device: str = "cuda") -> float:
    """Median of `repeats` runs, by CUDA events, or on a CPU by its clock."""
    for _ in range(warmup):
        function()
    return statistics.median(_seconds(function, device) for _ in range(repeats))


def _seconds(function: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


class Ceiling:
    """FLOP/s of a product of random square matrices: the rate that the floor is counted at."""

    def __init__(self, size: int = 8192, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> None:
        self.flops, self.device = 2 * size**3, device
        self.factors = [torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)]

    def _product(self) -> None:
        torch.mm(*self.factors)

    def measure(self) -> float:
        """As the GPU is after a pause."""
        return self.flops / seconds_of(self._product, device=self.device)

    def beside(self, function: Callable[[], Any], repeats: int = 20, warmup: int = 5) -> tuple[float, float]:
        """Median seconds of a function, and the rate of products that take turns with it.

        A GPU that works without a pause is slower than one that is rested; so both are measured in the same state.
        """
        for _ in range(warmup):
            function()
        pairs = [(_seconds(self._product, self.device), _seconds(function, self.device)) for _ in range(repeats)]
        products, seconds = (statistics.median(column) for column in zip(*pairs, strict=True))
        return seconds, self.flops / products


def measured_ceiling() -> float:
    """[`Ceiling`] of bfloat16 on the GPU after a pause."""
    return Ceiling().measure()


def report(name: str, results: dict[str, Any], output: Path | None, device: str | None = None) -> None:
    """Prints the results as JSON and writes them beside what they were measured on, by default the GPU."""
    # The place in this repository, wherever the file was written first; of other files the name alone.
    renamed = {str(output): f"benchmarks/results/{output.name}"} if output else {}
    arguments = [renamed.get(word, Path(word).name if Path(word).is_absolute() else word) for word in sys.argv]
    processes = os.environ.get("WORLD_SIZE")
    launcher = f"torchrun --nproc_per_node={processes}" if processes else "python"
    document = {
        "benchmark": name,
        "command": " ".join([launcher, *arguments]),
        "device": device or torch.cuda.get_device_name(),
        "versions": {
            "mimo_audio_hf": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cuda": torch.version.cuda,
        },
        "results": results,
    }
    text = json.dumps(document, indent=2)
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")
