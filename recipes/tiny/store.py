# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""A trained checkpoint as the package carries it: matrices in float16, what the run says of itself beside them.

    python recipes/tiny/store.py runs/tiny-stage2/checkpoint-2000 src/mimo_audio_hf/tiny

config.json says float32: that is what the model loads as, from numbers rounded once.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    parser = argparse.ArgumentParser(description="A trained checkpoint as the package carries it.")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("output", type=Path, metavar="OUT")
    args = parser.parse_args()

    stored = {}
    for name, tensor in load_file(args.checkpoint / "model.safetensors").items():
        # Counts, biases and norms are few, and counts may be large.
        stored[name] = tensor.half() if tensor.ndim > 1 else tensor
        if not stored[name].isfinite().all():
            raise ValueError(f"{name} reaches {tensor.abs().max():g}; accepted: float16's range")
    args.output.mkdir(parents=True, exist_ok=True)
    save_file(stored, args.output / "model.safetensors", {"format": "pt"})
    (args.output / "model.safetensors").chmod(0o644)
    config = json.loads((args.checkpoint / "config.json").read_text())
    config["dtype"] = "float32"
    (args.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(args.checkpoint / "preprocessor_config.json", args.output / "preprocessor_config.json")
    training = json.loads((args.checkpoint / "training.json").read_text()) | {"rounded_to": "float16"}
    (args.output / "training.json").write_text(json.dumps(training, indent=2) + "\n")
    bytes_stored = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    print(f"{bytes_stored / 1e6:.2f} MB -> {args.output}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
