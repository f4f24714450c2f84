# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures of mel spectrograms, without a plotting library."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from .files import replacing


def mel_picture(mels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Log-mels (n_mels, frames), one below the other, low pitch below: greyscale (height, width) uint8.

    The first one's range is what all are shown in; white lines lie between them.
    """
    low, high = mels[0].min(), mels[0].max()
    shown = [((mel.flip(0) - low) / (high - low).clamp(min=1e-6)).clamp(0, 1) for mel in mels]
    width = max(mel.shape[1] for mel in shown)
    rows = [torch.nn.functional.pad(mel, (0, width - mel.shape[1], 0, 2), value=1.0) for mel in shown]
    return (torch.cat(rows)[:-2] * 255).round().to(torch.uint8)


def write_png(path: Path, picture: torch.Tensor) -> None:
    """Write a greyscale picture (height, width) uint8."""
    height, width = picture.shape
    # Every row begins with the number of its filter: none.
    rows = torch.nn.functional.pad(picture.cpu(), (1, 0)).contiguous().numpy().tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    with replacing(path) as temporary:
        temporary.write_bytes(content)
