# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Code files: the codes of one clip, with what it takes to decode them, in one safetensors file.

The file holds a tensor `audio_codes` (L, Q), frames first, of the smallest dtype for its codebooks, and as metadata
(strings) `format` ("mimo_audio_codes"), `version`, `sampling_rate` in Hz, `samples_per_frame`, `num_samples` (length
of the encoded audio at that rate), `codebook_sizes` (of the Q codebooks, a JSON list) and `model`.
"""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .configuration_mimo_audio_tokenizer import MiMoAudioTokenizerConfig
from .files import replacing, require_regular_file


FORMAT = "mimo_audio_codes"
VERSION = "1"
SUFFIX = ".safetensors"

_TENSOR = "audio_codes"
_INTEGERS = ("sampling_rate", "samples_per_frame", "num_samples")
_STORED_DTYPES = (torch.uint8, torch.int16, torch.int32)
_ACCEPTED = "accepted: a code file as `mimo-audio encode` writes it"


def code_dtype(codebook_sizes: Sequence[int]) -> torch.dtype:
    """The smallest of uint8, int16 and int32 that holds the codes of all these codebooks (int16 as released)."""
    return next(dtype for dtype in _STORED_DTYPES if max(codebook_sizes) - 1 <= torch.iinfo(dtype).max)


@dataclass(frozen=True, eq=False)
class AudioCodes:
    """The codes of one clip.

    Attributes:
        codes: (L, Q), integers, of the first Q codebooks; int64 when read from a file.
        codebook_sizes: entries of these Q codebooks.
        sampling_rate: of the audio, in Hz.
        samples_per_frame: samples of audio that a frame of codes stands for.
        num_samples: length of the audio that was encoded; the decoded audio is to be cut there.
        model: name of the model whose codes these are.

    Raises:
        ValueError: fields that are out of range or do not fit each other; the message names the field.
    """

    codes: torch.Tensor
    codebook_sizes: tuple[int, ...]
    sampling_rate: int
    samples_per_frame: int
    num_samples: int
    model: str

    def __post_init__(self) -> None:
        codes, sizes = self.codes, self.codebook_sizes
        if not isinstance(codes, torch.Tensor):
            raise ValueError(f"codes are a {type(codes).__name__}; accepted: a torch.Tensor")
        if not isinstance(sizes, (tuple, list)) or not all(isinstance(size, numbers.Integral) for size in sizes):
            raise ValueError(f"codebook_sizes={sizes!r}; accepted: a tuple of integers")
        for name in _INTEGERS:
            if not isinstance(getattr(self, name), numbers.Integral):
                raise ValueError(f"{name}={getattr(self, name)!r}; accepted: an integer")
        if not isinstance(self.model, str):
            raise ValueError(f"model={self.model!r}; accepted: a name")
        if codes.ndim != 2 or not codes.numel():
            raise ValueError(f"codes have shape {tuple(codes.shape)}; accepted: (frames, codebooks), not empty")
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"codes are {codes.dtype}; accepted: integers")
        if len(sizes) != codes.shape[1] or min(sizes) < 1:
            raise ValueError(f"codebook_sizes={list(sizes)}; accepted: {codes.shape[1]} positive sizes, as codes have")
        for name in ("sampling_rate", "samples_per_frame"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; accepted: 1 or more")
        span = codes.shape[0] * self.samples_per_frame
        if not 1 <= self.num_samples <= span:
            raise ValueError(
                f"num_samples={self.num_samples}; accepted: 1 to {span}, the span of {codes.shape[0]} frames"
            )
        # As int64: torch finds no bounds of uint16 and uint32.
        for book, (column, size) in enumerate(zip(codes.long().t(), sizes, strict=True)):
            low, high = (int(bound) for bound in column.aminmax())
            if low < 0 or high >= size:
                raise ValueError(
                    f"codes hold {low} to {high} for codebook {book} (counted from 0); accepted: 0 to {size - 1}"
                )

    @classmethod
    def of_model(cls, config: MiMoAudioTokenizerConfig, codes: torch.Tensor, num_samples: int) -> AudioCodes:
        """Codes (L, Q) that the model of this configuration made of `num_samples` samples."""
        return cls(
            codes=codes,
            codebook_sizes=tuple(config.codebook_sizes[: codes.shape[-1]]),
            sampling_rate=config.sampling_rate,
            samples_per_frame=config.samples_per_frame,
            num_samples=num_samples,
            model=config.name_or_path or "",
        )

    @property
    def seconds(self) -> float:
        """Duration of the audio."""
        return self.num_samples / self.sampling_rate

    @property
    def bitrate(self) -> float:
        """Bits per second."""
        frame_rate = self.sampling_rate / self.samples_per_frame
        return frame_rate * sum(math.log2(size) for size in self.codebook_sizes)

    def require_decodable(self, config: MiMoAudioTokenizerConfig) -> None:
        """Raise a ValueError that says why, if a model of this configuration cannot decode these codes."""
        for name, found, expected in (
            ("sampling_rate", self.sampling_rate, config.sampling_rate),
            ("samples_per_frame", self.samples_per_frame, config.samples_per_frame),
            ("codebook_sizes", list(self.codebook_sizes), config.codebook_sizes[: len(self.codebook_sizes)]),
        ):
            if found != expected:
                raise ValueError(f"{name}={found} does not suit {config.name_or_path}; accepted: {expected}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a code file; one that exists is overwritten, parent directories are made.

        Raises:
            ValueError: `path` does not end in .safetensors, or is another file than a code file.
            OSError: the file cannot be written.
        """
        path = Path(path)
        require_writable(path)
        metadata = {name: str(getattr(self, name)) for name in _INTEGERS} | {
            "format": FORMAT,
            "version": VERSION,
            "codebook_sizes": json.dumps([int(size) for size in self.codebook_sizes]),
            "model": self.model,
        }
        stored = self.codes.to(device="cpu", dtype=code_dtype(self.codebook_sizes)).contiguous()
        with replacing(path) as temporary:
            # Not save_file, which makes files that nobody else may read.
            temporary.write_bytes(save({_TENSOR: stored}, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AudioCodes:
        """Read a code file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a code file, of another version, or its content is inconsistent. The message names
                the file.
        """
        metadata, tensors = _read(Path(path))
        if metadata.get("version") != VERSION:
            raise ValueError(
                f"{path}: code file of version {metadata.get('version')!r}; accepted: version {VERSION!r}"
            )
        if list(tensors) != [_TENSOR]:
            raise ValueError(f"{path}: holds the tensors {sorted(tensors)}; accepted: ['{_TENSOR}']")
        stored = tensors[_TENSOR]
        if stored.dtype not in _STORED_DTYPES:
            raise ValueError(f"{path}: {_TENSOR} is {stored.dtype}; accepted: uint8, int16 or int32")
        try:
            return cls(
                codes=stored.long(),
                codebook_sizes=_parse_sizes(metadata),
                model=_entry(metadata, "model"),
                **{name: _parse_integer(metadata, name) for name in _INTEGERS},
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def require_writable(path: Path) -> None:
    """Raise a ValueError unless `path` can be written as a code file: a new name, or that of another code file."""
    if path.suffix != SUFFIX:
        raise ValueError(f"{path}: code files are named with {SUFFIX}; accepted: {path.with_suffix(SUFFIX).name}")
    if path.exists():
        try:
            _read(path)
        except ValueError as error:
            raise ValueError(f"{path} exists and is no code file: it is not overwritten") from error


def _read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a file that says it is a code file."""
    require_regular_file(path, _ACCEPTED)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") == FORMAT:
                return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
    except SafetensorError as error:
        raise ValueError(f"{path}: no safetensors file ({error}); {_ACCEPTED}") from error
    raise ValueError(f"{path}: a safetensors file, but not of codes; {_ACCEPTED}")


def _entry(metadata: dict[str, str], name: str) -> str:
    if name not in metadata:
        raise ValueError(f"metadata {name} is missing; {_ACCEPTED}")
    return metadata[name]


def _parse_integer(metadata: dict[str, str], name: str) -> int:
    value = _entry(metadata, name)
    if not value.isdecimal():
        raise ValueError(f"metadata {name}={value!r}; accepted: a number of digits")
    return int(value)


def _parse_sizes(metadata: dict[str, str]) -> tuple[int, ...]:
    value = _entry(metadata, "codebook_sizes")
    try:
        sizes = json.loads(value)
    except (ValueError, RecursionError):
        sizes = None
    if not isinstance(sizes, list) or not all(type(size) is int for size in sizes):
        raise ValueError(f"metadata codebook_sizes={value!r}; accepted: a JSON list of integers")
    return tuple(sizes)
