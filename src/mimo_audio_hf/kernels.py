"""Triton kernels for inference on NVIDIA GPUs, behind `attn_implementation="triton_varlen"`.

Importing this module offers them to the model, which then prefers them to PyTorch's kernels in half precision; without
Triton it does nothing. They save memory traffic and launches where PyTorch has no kernel of the right shape:

- rotary embedding of queries and keys in one pass instead of ten;
- attention within a narrow window (the vocoder's 40 and 10 frames with heads of 16), where one block of keys holds all
  that a block of queries sees, so that softmax needs no second pass. FlashAttention takes about six times as long.

Everything else about attention is PyTorch's FlashAttention. With gradients enabled, PyTorch's kernels run throughout.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from transformers.utils import logging

from . import modeling_mimo_audio_tokenizer as modeling
from .modeling_mimo_audio_tokenizer import PackedSequences, Window, apply_rotary, torch_varlen_attention_forward


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

logger = logging.get_logger(__name__)

# Queries a program, and the most keys: one tile of scores has to fit into the registers.
QUERIES = 64
MAX_KEYS = 256
HEAD_DIMS = (16, 32, 64, 128)

if triton is not None:

    @triton.jit
    def _rotate(states, output, first, second, cos, sin, inside):
        x = tl.load(states + first, inside).to(tl.float32)
        y = tl.load(states + second, inside).to(tl.float32)
        tl.store(output + first, x * cos - y * sin, inside)
        tl.store(output + second, y * cos + x * sin, inside)

    @triton.jit
    def _rotary_kernel(
        query, key, cos, sin, query_out, key_out, pairs, heads: tl.constexpr, half: tl.constexpr, BLOCK: tl.constexpr
    ):
        pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = pair < pairs
        frame = pair // (heads * half)
        angle = frame * half + pair % half
        first = (pair // half) * (2 * half) + pair % half
        c = tl.load(cos + angle, inside).to(tl.float32)
        s = tl.load(sin + angle, inside).to(tl.float32)
        _rotate(query, query_out, first, first + half, c, s, inside)
        _rotate(key, key_out, first, first + half, c, s, inside)

    @triton.jit
    def _banded_attention_kernel(
        query,
        key,
        value,
        sequence_ids,
        output,
        total,
        scaling,
        left,
        right,
        heads: tl.constexpr,
        head_dim: tl.constexpr,
        QUERIES: tl.constexpr,
        KEYS: tl.constexpr,
    ):
        start = tl.program_id(0) * QUERIES
        head = tl.program_id(1) * head_dim
        channel = tl.arange(0, head_dim)
        query_row = start + tl.arange(0, QUERIES)
        key_row = start - left + tl.arange(0, KEYS)
        query_inside = query_row < total
        key_inside = (key_row >= 0) & (key_row < total)
        query_offset = query_row.to(tl.int64)[:, None] * (heads * head_dim) + head + channel
        key_offset = key_row.to(tl.int64)[:, None] * (heads * head_dim) + head + channel
        q = tl.load(query + query_offset, query_inside[:, None], other=0.0)
        k = tl.load(key + key_offset, key_inside[:, None], other=0.0)
        v = tl.load(value + key_offset, key_inside[:, None], other=0.0)
        # What other clips hold that is not finite is not taken away by a weight of zero.
        v = tl.where(tl.abs(v.to(tl.float32)) < float("inf"), v, 0.0)
        query_clip = tl.load(sequence_ids + query_row, query_inside, other=-1)
        key_clip = tl.load(sequence_ids + key_row, key_inside, other=-2)

        distance = key_row[None, :] - query_row[:, None]
        seen = (distance >= -left) & (distance <= right) & (key_clip[None, :] == query_clip[:, None])
        scores = tl.where(seen, tl.dot(q, tl.trans(k)) * (scaling * 1.4426950408889634), -1e30)
        weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
        attended = tl.dot(weights.to(v.dtype), v) / tl.sum(weights, axis=1)[:, None]
        tl.store(output + query_offset, attended, query_inside[:, None])


def triton_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half-split rotation of queries and keys (total_frames, heads, head_dim)."""
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return apply_rotary(query, key, cos, sin)
    query, key = query.contiguous(), key.contiguous()
    outputs = torch.empty_like(query), torch.empty_like(key)
    pairs, block = query.numel() // 2, 1024
    _rotary_kernel[(triton.cdiv(pairs, block),)](
        query, key, cos, sin, *outputs, pairs, heads=query.shape[1], half=query.shape[2] // 2, BLOCK=block
    )
    return outputs


def triton_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    sequences: PackedSequences,
    window: Window,
) -> torch.Tensor:
    """Attention within a narrow window in one tile of scores; PyTorch's FlashAttention for every other."""
    keys = triton.next_power_of_2(QUERIES + sum(window))
    needs_gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    fits = min(window) >= 0 and keys <= MAX_KEYS and query.shape[2] in HEAD_DIMS
    if needs_gradient or not fits:
        return torch_varlen_attention_forward(query, key, value, attention_mask, scaling, sequences, window)
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    total, heads, head_dim = query.shape
    output = torch.empty_like(query)
    _banded_attention_kernel[(triton.cdiv(total, QUERIES), heads)](
        query,
        key,
        value,
        sequences.sequence_ids,
        output,
        total,
        scaling,
        *window,
        heads=heads,
        head_dim=head_dim,
        QUERIES=QUERIES,
        KEYS=keys,
    )
    return output


@lru_cache
def _kernels_run(device: torch.device) -> bool:
    """Whether Triton can build and run these kernels here; it needs a C compiler, which not every machine has."""
    sequences = PackedSequences.from_lengths([1], device)
    states = torch.zeros(1, 1, max(HEAD_DIMS), device=device, dtype=torch.bfloat16)
    angles = torch.zeros(1, 1, max(HEAD_DIMS) // 2, device=device, dtype=torch.bfloat16)
    widest = (MAX_KEYS - QUERIES, 0)
    try:
        with torch.no_grad(), torch.cuda.device(device):
            triton_rotary(states, states, angles, angles)
            triton_attention_forward(states, states, states, None, 1.0, sequences, widest)
    except Exception as error:  # whatever a missing or broken compiler raises
        logger.warning(f"Triton cannot build kernels here, so PyTorch's are used: {error}")
        return False
    return True


if triton is not None:
    modeling.register_attention(
        "triton_varlen",
        triton_attention_forward,
        rotary=triton_rotary,
        half_precision_on_cuda=True,
        is_default=_kernels_run,
    )
