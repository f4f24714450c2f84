"""What a step of a language model on codes costs: codes extracted on the fly, or stored ones.

    python benchmarks/language_model.py --output benchmarks/results/language_model.json
    python benchmarks/language_model.py --device cpu --output benchmarks/results/language_model_on_cpu.json

The model and its batches are those of recipes/language_model/train.py. On a GPU the tokenizer has the released size,
bfloat16 and random weights; on a CPU it is the one in the package. Audio is noise in memory: reading files, which data
loaders' workers do meanwhile, is not counted.
"""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path
from typing import Any

import torch
from workloads import random_model, report, seconds_of

from mimo_audio_hf import MiMoAudioTokenizerConfig, encode_waveforms, load_model, optimize_for_inference
from mimo_audio_hf.language_model import AudioCodesCollator


RECIPE = Path(__file__).parent.parent / "recipes" / "language_model" / "train.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--batch-size", type=int, help="clips (default: 16, on a CPU 4)")
    parser.add_argument("--seconds", type=float, help="of a clip (default: 10, on a CPU 3)")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    batch_size, seconds = args.batch_size or (16 if on_gpu else 4), args.seconds or (10.0 if on_gpu else 3.0)
    torch.manual_seed(0)
    if on_gpu:
        tokenizer = random_model(MiMoAudioTokenizerConfig(), torch.bfloat16)
    else:
        tokenizer = load_model("tiny", device="cpu")
    optimize_for_inference(tokenizer)
    collator = AudioCodesCollator(tokenizer)
    hidden, layers = (1024, 12) if on_gpu else (256, 4)
    recipe = runpy.run_path(str(RECIPE))
    config = recipe["transformer_config"](hidden, layers)
    model = recipe["AudioLanguageModel"](collator.vocabulary_sizes, config).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=on_gpu)

    waveforms = [torch.randn(round(seconds * 24000)) * 0.1 for _ in range(batch_size)]
    with_audio = [{"audio": waveform} for waveform in waveforms]
    with_codes = [{"audio_codes": codes.numpy()} for codes in encode_waveforms(tokenizer, waveforms, 8)]

    def make(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(args.device) for name, tensor in collator(examples).items()}

    def step(examples: list[dict[str, Any]]) -> None:
        batch = make(examples)
        with torch.autocast(args.device, torch.bfloat16):
            loss, _ = model(**batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def milliseconds(function: Any, examples: list[dict[str, Any]]) -> float:
        seconds = seconds_of(lambda: function(examples), args.repeats, warmup=3, device=args.device)
        return round(1000 * seconds, 2)

    results = {
        "batch": f"{batch_size} clips of {seconds:g} s",
        "language_model_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "batch_ms": {"extracted": milliseconds(make, with_audio), "stored": milliseconds(make, with_codes)},
        "step_ms": {"extracted": milliseconds(step, with_audio), "stored": milliseconds(step, with_codes)},
    }
    results["extraction_share_of_step"] = round(1 - results["step_ms"]["stored"] / results["step_ms"]["extracted"], 3)
    report("language_model", results, args.output, device=None if on_gpu else "CPU")


if __name__ == "__main__":
    main()
