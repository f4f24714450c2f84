# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels for NVIDIA GPUs, behind `attn_implementation="triton_varlen"`.

Importing this module offers them to the model, which then prefers them to PyTorch's kernels in half precision; without
Triton it does nothing. Layers as they are usually made run as a whole, by the kernels of `fused`; in others attention
and rotary embedding alone are this package's, or PyTorch's FlashAttention.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from transformers.utils import logging

from . import modeling_mimo_audio_tokenizer as modeling


try:
    import triton
except ImportError:
    triton = None
else:
    from . import attention_kernels, fused, product_kernels

logger = logging.get_logger(__name__)


@lru_cache
def _kernels_run(device: torch.device) -> bool:
    """Whether Triton can build and run these kernels here; it needs a C compiler, which not every machine has."""
    sequences = modeling.PackedSequences.from_lengths([1], device)
    head_dim = max(attention_kernels.HEAD_DIMS)
    states = torch.zeros(1, 1, head_dim, device=device, dtype=torch.bfloat16)
    angles = torch.zeros(1, 1, head_dim // 2, device=device, dtype=torch.bfloat16)
    widest = (attention_kernels.MAX_KEYS - attention_kernels.QUERIES, 0)
    try:
        with torch.no_grad(), torch.cuda.device(device):
            attention_kernels.triton_rotary(states, states, angles, angles)
            attention_kernels.triton_attention_forward(states, states, states, None, 1.0, sequences, widest)
            # What asks most of a GPU.
            rows = (states[0],) * 3
            attention_kernels.rotary_attention_(*rows, (angles, angles), sequences.cu_seqlens, 1, 1, 1.0, (-1, -1))
            weight = torch.zeros((product_kernels.MAX_DIM,) * 2, device=device, dtype=torch.bfloat16)
            row, zeros = weight[:1], weight[0]
            product_kernels.product_add_norm_(row.clone(), row, weight, zeros, zeros, zeros, 1e-5, torch.inf)
    except Exception as error:  # whatever a missing or broken compiler raises
        logger.warning(f"Triton cannot build kernels here, so PyTorch's are used: {error}")
        return False
    return True


def kernels_take(states: torch.Tensor) -> bool:
    """Whether Triton kernels, these or others, can run on what a tensor holds."""
    return triton is not None and states.is_cuda and states.dtype != torch.float64 and _kernels_run(states.device)


if triton is not None:
    modeling.register_attention(
        "triton_varlen",
        attention_kernels.triton_attention_forward,
        rotary=attention_kernels.triton_rotary,
        run_layers=fused.run_layers,
        can_run_layers=fused.can_fuse,
        half_precision_on_cuda=True,
        is_default=_kernels_run,
    )
