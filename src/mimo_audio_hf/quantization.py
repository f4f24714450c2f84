# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Transformer layers in 8 bits, for speed at some cost in exactness: int8 on CPUs, FP8 on GPUs from Hopper on.

Weights are rounded once, by output; inputs as they come, by frame. Convolutions, norms, attention, the codebooks and
the vocoder's head stay as they are.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from .modeling_mimo_audio_tokenizer import (
    MiMoAudioTokenizerAttention,
    MiMoAudioTokenizerLayer,
    MiMoAudioTokenizerModel,
)


QUANTIZATIONS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
# What is not rounded to 8 bits.
REMAINDER_DTYPES = {"int8": torch.float32, "fp8": torch.bfloat16}
FP8_COMPUTE_CAPABILITY = (8, 9)


class RoundedRows(NamedTuple):
    """A matrix in 8 bits."""

    rows: torch.Tensor
    scale: torch.Tensor  # (rows, 1) float32, what they are to be multiplied with


def round_rows(states: torch.Tensor, dtype: torch.dtype) -> RoundedRows:
    """Rows (rows, dim) in 8 bits, each by its largest number."""
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    # A row of zeros stays one.
    scale = states.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / largest
    scaled = states.float() / scale
    return RoundedRows((scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale)


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is held in 8 bits and whose inputs are rounded to 8 bits, each row by its largest.

    Args:
        weight: (out_features, in_features), int8 or float8_e4m3fn.
        scale: (1, out_features) float32, what the weight's rows are to be multiplied with.
        bias: (out_features,), in the dtype of the outputs.
    """

    scale: torch.Tensor

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, dtype: torch.dtype) -> QuantizedLinear:
        weight, scale = round_rows(linear.weight.detach(), dtype)
        return cls(weight, scale.t().contiguous(), None if linear.bias is None else linear.bias.detach())

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(frames, in_features) to (frames, out_features), in the states' dtype; without a gradient."""
        require_no_gradient(states)
        return self.product(round_rows(states, self.weight.dtype), states.dtype)

    def product(self, states: RoundedRows, dtype: torch.dtype) -> torch.Tensor:
        """(frames, out_features) in `dtype`."""
        rows, scale = states
        if self.weight.dtype == torch.int8:
            product = torch._int_mm(rows, self.weight.t()).float().mul_(scale).mul_(self.scale).to(dtype)
            return product if self.bias is None else product.add_(self.bias)
        return torch._scaled_mm(
            rows, self.weight.t(), scale, self.scale, self.bias, out_dtype=dtype, use_fast_accum=True
        )


def require_no_gradient(states: torch.Tensor) -> None:
    """Raises ValueError where a gradient of these states is wanted: rounding has none."""
    if torch.is_grad_enabled() and states.requires_grad:
        raise ValueError("a quantized model has no gradients; accepted: the model that it was made of")


def quantization_of(model: MiMoAudioTokenizerModel) -> str | None:
    """`"int8"`, `"fp8"` or, of a model as it was loaded, None."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            return next(name for name, dtype in QUANTIZATIONS.items() if dtype == module.weight.dtype)
    return None


def check_quantization(quantization: str, device: torch.device) -> None:
    """Raises ValueError where a device cannot do it."""
    if quantization == "int8" and device.type != "cpu":
        raise ValueError(f"dtype='int8' on {device}; accepted: on a CPU")
    if quantization == "fp8" and (
        device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_COMPUTE_CAPABILITY
    ):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device
        raise ValueError(f"dtype='fp8' on {name}; accepted: a GPU of compute capability 8.9 or more (Ada, Hopper)")


def quantize(model: MiMoAudioTokenizerModel, quantization: str) -> MiMoAudioTokenizerModel:
    """Rounds the transformer layers' weights to 8 bits, in place, and freezes the model.

    It cannot be undone, and the model not be saved.

    Args:
        model: in evaluation mode, on the device where it is to run; for `"fp8"` in bfloat16.
        quantization: `"int8"`, on a CPU, or `"fp8"`, on a GPU of compute capability 8.9 or more.

    Raises:
        ValueError: the device cannot do it.
    """
    check_quantization(quantization, model.device)
    model.drop_optimizations()
    model.freeze()
    for part_name, part in model.named_modules():
        if isinstance(part, (MiMoAudioTokenizerLayer, MiMoAudioTokenizerAttention)):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear) and not (quantization == "fp8" and _gains_nothing(part_name, name)):
                    setattr(part, name, QuantizedLinear.from_linear(linear, QUANTIZATIONS[quantization]))
    model.save_pretrained = partial(_refuse_to_save, quantization)  # type: ignore[assignment]
    return model


def _gains_nothing(part_name: str, name: str) -> bool:
    """Whether rounding the inputs takes a GPU as long as it saves: of attention's outputs, of few channels."""
    return name == "out_proj" or ".vocoder." in part_name


def _refuse_to_save(quantization: str, *args: Any, **kwargs: Any) -> None:
    raise ValueError(
        f"the model is quantized to {quantization}, which is not saved; accepted: the model it was made of"
    )
