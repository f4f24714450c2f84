"""Triton kernels for NVIDIA GPUs, behind `attn_implementation="triton_varlen"`.

Importing this module offers them to the model, which then prefers them to PyTorch's kernels in half precision; without
Triton it does nothing. They save memory traffic and launches where PyTorch has no kernel of the right shape:

- rotary embedding of queries and keys in one pass instead of ten;
- attention within a narrow window (the vocoder's 40 and 10 frames with heads of 16), where one block of keys holds all
  that a block of queries sees, so that softmax needs no second pass. FlashAttention takes about six times as long.

Both have gradients (attention's are of heads up to 32), but no gradients of gradients. One clip's values that are not
finite do not reach the others' results, but may reach their gradients; the trainer stops at such a loss. Layers as
they are usually made run as a whole, by the kernels of `fused`; else, and where their attention has a gradient,
everything else about attention is PyTorch's FlashAttention.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.utils import logging

from . import modeling_mimo_audio_tokenizer as modeling
from .modeling_mimo_audio_tokenizer import PackedSequences, Window, torch_varlen_attention_forward


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

logger = logging.get_logger(__name__)

# Queries a program, and the most keys: one tile of scores has to fit into the registers.
QUERIES = 64
MAX_KEYS = 256
HEAD_DIMS = (16, 32, 64)
GRADIENT_HEAD_DIMS = (16, 32)  # of larger ones the gradients' tiles do not fit into every GPU's shared memory

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
    def _load_rows(states, rows, total, head, channel, heads: tl.constexpr, head_dim: tl.constexpr):
        offset = rows.to(tl.int64)[:, None] * (heads * head_dim) + head * head_dim + channel
        return tl.load(states + offset, ((rows >= 0) & (rows < total))[:, None], other=0.0)

    @triton.jit
    def _store_rows(states, values, rows, total, head, channel, heads: tl.constexpr, head_dim: tl.constexpr):
        offset = rows.to(tl.int64)[:, None] * (heads * head_dim) + head * head_dim + channel
        tl.store(states + offset, values, (rows < total)[:, None])

    @triton.jit
    def _seen(sequence_ids, query_rows, key_rows, total, left, right):
        """Which keys (columns) each query (row) sees."""
        queries = tl.load(sequence_ids + query_rows, (query_rows >= 0) & (query_rows < total), other=-1)
        keys = tl.load(sequence_ids + key_rows, (key_rows >= 0) & (key_rows < total), other=-2)
        distance = key_rows[None, :] - query_rows[:, None]
        return (distance >= -left) & (distance <= right) & (keys[None, :] == queries[:, None])

    @triton.jit
    def _banded_attention_kernel(
        query,
        key,
        value,
        sequence_ids,
        output,
        log_sums,
        total,
        scaling,
        left,
        right,
        heads: tl.constexpr,
        head_dim: tl.constexpr,
        QUERIES: tl.constexpr,
        KEYS: tl.constexpr,
    ):
        """A block of queries against all keys that it sees."""
        head = tl.program_id(1)
        channel = tl.arange(0, head_dim)
        query_rows = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
        key_rows = tl.program_id(0) * QUERIES - left + tl.arange(0, KEYS)
        q = _load_rows(query, query_rows, total, head, channel, heads, head_dim)
        k = _load_rows(key, key_rows, total, head, channel, heads, head_dim)
        v = _load_rows(value, key_rows, total, head, channel, heads, head_dim)
        # What other clips hold that is not finite is not taken away by a weight of zero.
        v = tl.where(tl.abs(v.to(tl.float32)) < float("inf"), v, 0.0)
        seen = _seen(sequence_ids, query_rows, key_rows, total, left, right)
        scores = tl.where(seen, tl.dot(q, tl.trans(k)) * (scaling * 1.4426950408889634), -1e30)
        largest = tl.max(scores, axis=1)
        weights = tl.exp2(scores - largest[:, None])
        sums = tl.sum(weights, axis=1)
        attended = tl.dot(weights.to(v.dtype), v) / sums[:, None]
        _store_rows(output, attended, query_rows, total, head, channel, heads, head_dim)
        # In powers of two; the backward pass has the weights from them.
        tl.store(log_sums + head * total + query_rows, largest + tl.log2(sums), query_rows < total)

    @triton.jit
    def _banded_attention_gradient_kernel(
        query,
        key,
        value,
        sequence_ids,
        log_sums,
        gradient,
        products,
        query_gradient,
        key_gradient,
        value_gradient,
        total,
        scaling,
        left,
        right,
        heads: tl.constexpr,
        head_dim: tl.constexpr,
        ROWS: tl.constexpr,
        OTHERS: tl.constexpr,
    ):
        """A block of rows as queries, against all keys that it sees, and then as keys, against all that see it."""
        head = tl.program_id(1)
        channel = tl.arange(0, head_dim)
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        scale = scaling * 1.4426950408889634

        others = tl.program_id(0) * ROWS - left + tl.arange(0, OTHERS)
        q = _load_rows(query, rows, total, head, channel, heads, head_dim)
        k = _load_rows(key, others, total, head, channel, heads, head_dim)
        v = _load_rows(value, others, total, head, channel, heads, head_dim)
        g = _load_rows(gradient, rows, total, head, channel, heads, head_dim)
        log_sum = tl.load(log_sums + head * total + rows, rows < total, other=0.0)
        product = tl.load(products + head * total + rows, rows < total, other=0.0)
        seen = _seen(sequence_ids, rows, others, total, left, right)
        weights = tl.where(seen, tl.exp2(tl.dot(q, tl.trans(k)) * scale - log_sum[:, None]), 0.0)
        scores = weights * (tl.dot(g, tl.trans(v)) - product[:, None])
        _store_rows(
            query_gradient, tl.dot(scores.to(k.dtype), k) * scaling, rows, total, head, channel, heads, head_dim
        )

        others = tl.program_id(0) * ROWS - right + tl.arange(0, OTHERS)
        inside = (others >= 0) & (others < total)
        k = _load_rows(key, rows, total, head, channel, heads, head_dim)
        v = _load_rows(value, rows, total, head, channel, heads, head_dim)
        q = _load_rows(query, others, total, head, channel, heads, head_dim)
        g = _load_rows(gradient, others, total, head, channel, heads, head_dim)
        log_sum = tl.load(log_sums + head * total + others, inside, other=0.0)
        product = tl.load(products + head * total + others, inside, other=0.0)
        seen = _seen(sequence_ids, rows, others, total, right, left)
        weights = tl.where(seen, tl.exp2(tl.dot(k, tl.trans(q)) * scale - log_sum[None, :]), 0.0)
        scores = weights * (tl.dot(v, tl.trans(g)) - product[None, :])
        _store_rows(value_gradient, tl.dot(weights.to(g.dtype), g), rows, total, head, channel, heads, head_dim)
        _store_rows(key_gradient, tl.dot(scores.to(q.dtype), q) * scaling, rows, total, head, channel, heads, head_dim)


class _Rotary(torch.autograd.Function):
    """What `_rotate_pairs` does; its gradient is turned back."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotate_pairs(query, key, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        query_gradient, key_gradient = gradients
        return *_rotate_pairs(query_gradient, key_gradient, cos, -sin), None, None


def _rotate_pairs(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    query, key = query.contiguous(), key.contiguous()
    outputs = torch.empty_like(query), torch.empty_like(key)
    pairs, block = query.numel() // 2, 1024
    _rotary_kernel[(triton.cdiv(pairs, block),)](
        query, key, cos, sin, *outputs, pairs, heads=query.shape[1], half=query.shape[2] // 2, BLOCK=block
    )
    return outputs


class _BandedAttention(torch.autograd.Function):
    """Attention within a window so narrow that one tile holds all scores of a block of queries."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sequence_ids: torch.Tensor,
        scaling: float,
        left: int,
        right: int,
    ) -> torch.Tensor:
        output, log_sums = _attend(query, key, value, sequence_ids, scaling, left, right)
        ctx.save_for_backward(query, key, value, sequence_ids, output, log_sums)
        ctx.constants = scaling, left, right
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sequence_ids, output, log_sums = ctx.saved_tensors
        scaling, left, right = ctx.constants
        gradient = gradients[0].contiguous()
        total, heads, head_dim = query.shape
        products = (output.float() * gradient.float()).sum(-1).t().contiguous()
        results = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        _banded_attention_gradient_kernel[(triton.cdiv(total, QUERIES), heads)](
            query,
            key,
            value,
            sequence_ids,
            log_sums,
            gradient,
            products,
            *results,
            total,
            scaling,
            left,
            right,
            heads=heads,
            head_dim=head_dim,
            ROWS=QUERIES,
            OTHERS=_keys(left, right),
        )
        return *results, None, None, None, None


def _keys(left: int, right: int) -> int:
    """Keys that a block of queries sees, at most, as a power of two."""
    return triton.next_power_of_2(QUERIES + left + right)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequence_ids: torch.Tensor,
    scaling: float,
    left: int,
    right: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (total_frames, heads, head_dim), and of each head and query the logarithm of the weights' sum."""
    total, heads, head_dim = query.shape
    output = torch.empty_like(query)
    log_sums = torch.empty(heads, total, dtype=torch.float32, device=query.device)
    _banded_attention_kernel[(triton.cdiv(total, QUERIES), heads)](
        query,
        key,
        value,
        sequence_ids,
        output,
        log_sums,
        total,
        scaling,
        left,
        right,
        heads=heads,
        head_dim=head_dim,
        QUERIES=QUERIES,
        KEYS=_keys(left, right),
    )
    return output, log_sums


def _needs_gradient(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def triton_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half-split rotation of queries and keys (total_frames, heads, head_dim)."""
    if _needs_gradient(query, key):
        return _Rotary.apply(query, key, cos, sin)
    return _rotate_pairs(query, key, cos, sin)


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
    differentiated = _needs_gradient(query, key, value)
    head_dims = GRADIENT_HEAD_DIMS if differentiated else HEAD_DIMS
    if min(window) < 0 or _keys(*window) > MAX_KEYS or query.shape[2] not in head_dims:
        return torch_varlen_attention_forward(query, key, value, attention_mask, scaling, sequences, window)
    arguments = query.contiguous(), key.contiguous(), value.contiguous(), sequences.sequence_ids, scaling, *window
    if differentiated:
        return _BandedAttention.apply(*arguments)
    return _attend(*arguments)[0]


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
            # Of the others, the one that asks most of a GPU.
            states = torch.zeros(1, max(fused.HEAD_DIMS), device=device, dtype=torch.bfloat16)
            angles = torch.zeros(1, 1, max(fused.HEAD_DIMS) // 2, device=device, dtype=torch.bfloat16)
            embeddings = (angles, angles)
            fused.rotary_attention(states, states, states, embeddings, sequences.cu_seqlens, 1, 1, 1.0, (-1, -1))
    except Exception as error:  # whatever a missing or broken compiler raises
        logger.warning(f"Triton cannot build kernels here, so PyTorch's are used: {error}")
        return False
    return True


def kernels_take(states: torch.Tensor) -> bool:
    """Whether Triton kernels, these or others, can run on what a tensor holds."""
    return triton is not None and states.is_cuda and states.dtype != torch.float64 and _kernels_run(states.device)


if triton is not None:
    from . import fused

    modeling.register_attention(
        "triton_varlen",
        triton_attention_forward,
        rotary=triton_rotary,
        run_layers=fused.run_layers,
        can_run_layers=fused.can_fuse,
        half_precision_on_cuda=True,
        is_default=_kernels_run,
    )
