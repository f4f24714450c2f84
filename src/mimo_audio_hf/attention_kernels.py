# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels of attention over packed clips, with rotary embedding.

They save memory traffic and launches where PyTorch has no kernel of the right shape:

- rotary embedding of queries and keys in one pass instead of ten;
- attention within a narrow window (the vocoder's 40 and 10 frames with heads of 16), where one block of keys holds all
  that a block of queries sees, so that softmax needs no second pass. FlashAttention takes about six times as long;
- attention of each clip to itself within any window, for inference.

The first two have gradients (attention's are of heads up to 32), but no gradients of gradients. One clip's values that
are not finite do not reach the others' results, but may reach their gradients; the trainer stops at such a loss.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .modeling_mimo_audio_tokenizer import PackedSequences, Window, torch_varlen_attention_forward


# Queries a program; in a narrow window the most keys, for one tile of scores has to fit into the registers.
QUERIES = 64
MAX_KEYS = 256
HEAD_DIMS = (16, 32, 64)
GRADIENT_HEAD_DIMS = (16, 32)  # of larger ones the gradients' tiles do not fit into every GPU's shared memory
ROTATE_BLOCK, ROTATE_ROWS = 1024, 16
# In other windows: keys a block.
KEYS = 64
MAX_CLIPS = 65535  # what a grid has room for
MAX_PLACE = 2**31  # of a clip's keys, counted in numbers


@triton.jit
def _rotate(states, output, first, second, cos, sin, inside):
    x = tl.load(states + first, inside).to(tl.float32)
    y = tl.load(states + second, inside).to(tl.float32)
    tl.store(output + first, x * cos - y * sin, inside)
    tl.store(output + second, y * cos + x * sin, inside)


@triton.jit(do_not_specialize=["pairs"])
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
def _load_rows(states, rows, total, head, channel, stride, head_dim: tl.constexpr):
    offset = rows.to(tl.int64)[:, None] * stride + head * head_dim + channel
    return tl.load(states + offset, ((rows >= 0) & (rows < total))[:, None], other=0.0)


@triton.jit
def _turned(states, place, inside, other_half, cos, sin, angle, sign):
    """Channels turned by RoPE; the ones that they turn with lie half a head away."""
    x = tl.load(states + place, inside, other=0.0).to(tl.float32)
    y = tl.load(states + place + other_half, inside, other=0.0).to(tl.float32)
    c = tl.load(cos + angle, inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, inside, other=0.0).to(tl.float32)
    return (x * c + y * s * sign).to(states.dtype.element_ty)


@triton.jit
def _load_turned_rows(states, cos, sin, rows, total, head, channel, stride, head_dim: tl.constexpr):
    half: tl.constexpr = head_dim // 2
    inside = ((rows >= 0) & (rows < total))[:, None]
    is_first = channel < half
    offset = rows.to(tl.int64)[:, None] * stride + head * head_dim + channel
    angle = rows.to(tl.int64)[:, None] * half + channel % half
    other_half, sign = tl.where(is_first, half, -half), tl.where(is_first, -1.0, 1.0)
    return _turned(states, offset, inside, other_half, cos, sin, angle, sign)


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


@triton.jit(do_not_specialize=["total"])
def _banded_attention_kernel(
    query,
    key,
    value,
    cos,
    sin,
    sequence_ids,
    cu_seqlens,
    output,
    log_sums,
    total,
    stride,
    scaling,
    left,
    right,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TURNS: tl.constexpr,
    KEEPS: tl.constexpr,
):
    """A block of queries against all keys that it sees, turned first (RoPE) where TURNS."""
    head = tl.program_id(1)
    channel = tl.arange(0, head_dim)
    query_rows = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    key_rows = tl.program_id(0) * QUERIES - left + tl.arange(0, KEYS)
    if TURNS:
        q = _load_turned_rows(query, cos, sin, query_rows, total, head, channel, stride, head_dim)
        k = _load_turned_rows(key, cos, sin, key_rows, total, head, channel, stride, head_dim)
    else:
        q = _load_rows(query, query_rows, total, head, channel, stride, head_dim)
        k = _load_rows(key, key_rows, total, head, channel, stride, head_dim)
    v = _load_rows(value, key_rows, total, head, channel, stride, head_dim)
    # What other clips hold that is not finite is not taken away by a weight of zero.
    v = tl.where(tl.abs(v.to(tl.float32)) < float("inf"), v, 0.0)
    clip = tl.load(sequence_ids + query_rows, query_rows < total, other=0)
    first = tl.maximum(query_rows - left, tl.load(cu_seqlens + clip))
    last = tl.minimum(query_rows + right, tl.load(cu_seqlens + clip + 1) - 1)
    seen = (key_rows[None, :] >= first[:, None]) & (key_rows[None, :] <= last[:, None])
    scores = tl.where(seen, tl.dot(q, tl.trans(k)) * (scaling * 1.4426950408889634), -1e30)
    largest = tl.max(scores, axis=1)
    weights = tl.exp2(scores - largest[:, None])
    sums = tl.sum(weights, axis=1)
    attended = tl.dot(weights.to(v.dtype), v) / sums[:, None]
    _store_rows(output, attended, query_rows, total, head, channel, heads, head_dim)
    if KEEPS:
        # In powers of two; the backward pass has the weights from them.
        tl.store(log_sums + head * total + query_rows, largest + tl.log2(sums), query_rows < total)


@triton.jit(do_not_specialize=["total"])
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
    q = _load_rows(query, rows, total, head, channel, heads * head_dim, head_dim)
    k = _load_rows(key, others, total, head, channel, heads * head_dim, head_dim)
    v = _load_rows(value, others, total, head, channel, heads * head_dim, head_dim)
    g = _load_rows(gradient, rows, total, head, channel, heads * head_dim, head_dim)
    log_sum = tl.load(log_sums + head * total + rows, rows < total, other=0.0)
    product = tl.load(products + head * total + rows, rows < total, other=0.0)
    seen = _seen(sequence_ids, rows, others, total, left, right)
    weights = tl.where(seen, tl.exp2(tl.dot(q, tl.trans(k)) * scale - log_sum[:, None]), 0.0)
    scores = weights * (tl.dot(g, tl.trans(v)) - product[:, None])
    _store_rows(query_gradient, tl.dot(scores.to(k.dtype), k) * scaling, rows, total, head, channel, heads, head_dim)

    others = tl.program_id(0) * ROWS - right + tl.arange(0, OTHERS)
    inside = (others >= 0) & (others < total)
    k = _load_rows(key, rows, total, head, channel, heads * head_dim, head_dim)
    v = _load_rows(value, rows, total, head, channel, heads * head_dim, head_dim)
    q = _load_rows(query, others, total, head, channel, heads * head_dim, head_dim)
    g = _load_rows(gradient, others, total, head, channel, heads * head_dim, head_dim)
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
    pairs = query.numel() // 2
    _rotary_kernel[(triton.cdiv(pairs, ROTATE_BLOCK),)](
        query, key, cos, sin, *outputs, pairs, heads=query.shape[1], half=query.shape[2] // 2, BLOCK=ROTATE_BLOCK
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
        sequences: PackedSequences,
        scaling: float,
        left: int,
        right: int,
    ) -> torch.Tensor:
        output, log_sums = _attend(query, key, value, sequences, scaling, left, right)
        ctx.save_for_backward(query, key, value, sequences.sequence_ids, output, log_sums)
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
    sequences: PackedSequences,
    scaling: float,
    left: int,
    right: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (total_frames, heads, head_dim), and of each head and query the logarithm of the weights' sum."""
    total, heads, _ = query.shape
    log_sums = torch.empty(heads, total, dtype=torch.float32, device=query.device)
    states = (query.flatten(1), key.flatten(1), value.flatten(1))
    output = _launch_banded_attention(*states, None, sequences, heads, scaling, (left, right), log_sums)
    return output.view_as(query), log_sums


def banded_rotary_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    sequences: PackedSequences,
    heads: int,
    scaling: float,
    window: Window,
) -> torch.Tensor:
    """Attention within a narrow window (see [`takes_band`]) that turns queries and keys, without a gradient.

    Args:
        query, key, value: (total_frames, dim) before RoPE; their rows may lie apart, by one stride.
        position_embeddings: cosines and sines (total_frames, 1, head_dim // 2).
        sequences: where the clips lie.
        scaling: of the products of queries and keys.
        window: frames to the left and to the right that are seen.

    Returns:
        (total_frames, dim).
    """
    return _launch_banded_attention(query, key, value, position_embeddings, sequences, heads, scaling, window, None)


def _launch_banded_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
    sequences: PackedSequences,
    heads: int,
    scaling: float,
    window: Window,
    log_sums: torch.Tensor | None,
) -> torch.Tensor:
    total, dim = query.shape
    output = query.new_empty(total, dim)
    cos, sin = position_embeddings or (None, None)
    _banded_attention_kernel[(triton.cdiv(total, QUERIES), heads)](
        query,
        key,
        value,
        cos,
        sin,
        sequences.sequence_ids,
        sequences.cu_seqlens,
        output,
        log_sums,
        total,
        query.stride(0),
        scaling,
        *window,
        heads=heads,
        head_dim=dim // heads,
        QUERIES=QUERIES,
        KEYS=_keys(*window),
        TURNS=position_embeddings is not None,
        KEEPS=log_sums is not None,
        num_warps=4,
    )
    return output


def takes_band(window: Window, head_dim: int) -> bool:
    """Whether a window is so narrow that one tile holds all scores of a block of queries."""
    return min(window) >= 0 and _keys(*window) <= MAX_KEYS and head_dim in HEAD_DIMS


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def triton_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half-split rotation of queries and keys (total_frames, heads, head_dim)."""
    if needs_gradient(query, key):
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
    differentiated = needs_gradient(query, key, value)
    head_dim = query.shape[2]
    if not takes_band(window, head_dim) or (differentiated and head_dim not in GRADIENT_HEAD_DIMS):
        return torch_varlen_attention_forward(query, key, value, attention_mask, scaling, sequences, window)
    arguments = query.contiguous(), key.contiguous(), value.contiguous(), sequences, scaling, *window
    if differentiated:
        return _BandedAttention.apply(*arguments)
    return _attend(*arguments)[0]


@triton.jit(do_not_specialize=["total"])
def _rotate_kernel(states, cos, sin, total, stride, half: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Turns some heads of some rows in place."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (rows < total)[:, None]
    channel = tl.arange(0, half)[None, :]
    angle = rows.to(tl.int64)[:, None] * half + channel
    c = tl.load(cos + angle, inside).to(tl.float32)
    s = tl.load(sin + angle, inside).to(tl.float32)
    place = rows.to(tl.int64)[:, None] * stride + tl.program_id(1) * (HEADS * 2 * half) + channel
    for head in tl.static_range(HEADS):
        first = place + head * (2 * half)
        _rotate(states, states, first, first + half, c, s, inside)


@triton.jit
def _attend_to_blocks(
    q,
    key,
    value,
    begin,
    end,
    at,
    length,
    stride,
    scale,
    attended,
    sums,
    largest,
    head_dim: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds blocks of keys to a block of queries' attention. Not MASKED: all of them are seen by all queries."""
    channels = tl.arange(0, head_dim)
    for block in range(begin, end, KEYS):
        rows = block + tl.arange(0, KEYS)
        place = rows[:, None] * stride + channels[None, :]
        if MASKED:
            k = tl.load(key + place, (rows < length)[:, None], other=0.0)
            v = tl.load(value + place, (rows < length)[:, None], other=0.0)
        else:
            k = tl.load(key + place)
            v = tl.load(value + place)
        scores = tl.dot(q, tl.trans(k))
        if MASKED:
            seen = (rows < length)[None, :]
            if LEFT >= 0:
                seen = seen & (rows[None, :] >= at[:, None] - LEFT)
            if RIGHT >= 0:
                seen = seen & (rows[None, :] <= at[:, None] + RIGHT)
            # Scaled first: where a query sees nothing of a block, the difference to the highest is to be zero.
            scores = tl.where(seen, scores * scale, -1e30)
            highest = tl.maximum(largest, tl.max(scores, axis=1))
            weights = tl.exp2(scores - highest[:, None])
        else:
            highest = tl.maximum(largest, tl.max(scores, axis=1) * scale)
            weights = tl.exp2(scores * scale - highest[:, None])
        shrunk = tl.exp2(largest - highest)
        sums = sums * shrunk + tl.sum(weights, axis=1)
        attended = tl.dot(weights.to(v.dtype), v, attended * shrunk[:, None])
        largest = highest
    return attended, sums, largest


@triton.jit
def _attention_kernel(
    query,
    key,
    value,
    cos,
    sin,
    cu_seqlens,
    output,
    stride,
    scaling,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A block of a clip's queries, of one head, against the clip's turned keys within the window, block by block."""
    head = tl.program_id(0)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * QUERIES  # the longest first, where they are causal
    start = tl.load(cu_seqlens + tl.program_id(2)).to(tl.int64)
    length = (tl.load(cu_seqlens + tl.program_id(2) + 1) - start).to(tl.int32)
    if first < length:
        half: tl.constexpr = head_dim // 2
        scale = scaling * 1.4426950408889634
        channels = tl.arange(0, head_dim)
        at = first + tl.arange(0, QUERIES)
        inside = (at < length)[:, None]
        place = (start + at)[:, None] * stride + head * head_dim + channels[None, :]
        angle = (start + at)[:, None] * half + channels[None, :] % half
        is_first = channels[None, :] < half
        q = _turned(
            query, place, inside, tl.where(is_first, half, -half), cos, sin, angle, tl.where(is_first, -1.0, 1.0)
        )
        key += start * stride + head * head_dim
        value += start * stride + head * head_dim
        largest = tl.full([QUERIES], -1e30, tl.float32)
        sums = tl.zeros([QUERIES], tl.float32)
        attended = tl.zeros([QUERIES, head_dim], tl.float32)
        begin, end, whole = 0, length, length
        if RIGHT >= 0:
            end = tl.minimum(length, first + QUERIES + RIGHT)
            whole = tl.minimum(length, first + RIGHT + 1)
        whole = whole // KEYS * KEYS
        if LEFT >= 0:
            begin = tl.maximum(0, first - LEFT) // KEYS * KEYS
            whole = begin
        attended, sums, largest = _attend_to_blocks(
            q,
            key,
            value,
            begin,
            whole,
            at,
            length,
            stride,
            scale,
            attended,
            sums,
            largest,
            head_dim,
            LEFT,
            RIGHT,
            KEYS,
            False,
        )
        attended, sums, largest = _attend_to_blocks(
            q,
            key,
            value,
            whole,
            end,
            at,
            length,
            stride,
            scale,
            attended,
            sums,
            largest,
            head_dim,
            LEFT,
            RIGHT,
            KEYS,
            True,
        )
        place = (start + at)[:, None] * (heads * head_dim) + head * head_dim + channels[None, :]
        tl.store(output + place, attended / sums[:, None], inside)


def rotary_attention_(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    heads: int,
    scaling: float,
    window: tuple[int, int],
) -> torch.Tensor:
    """Attention of each clip to itself, without a gradient. Turns the keys (RoPE) in place.

    Args:
        query, key, value: (total_frames, dim) before RoPE; their rows may lie apart, by one stride.
        position_embeddings: cosines and sines (total_frames, 1, head_dim // 2).
        cu_seqlens: (clips + 1,) int32, where clips begin; max_seqlen: frames of the longest.
        scaling: of the products of queries and keys.
        window: frames to the left and to the right that are seen; -1 is unbounded.

    Returns:
        (total_frames, dim).
    """
    total, dim = query.shape
    head_dim = dim // heads
    output = query.new_empty(total, dim)
    cos, sin = position_embeddings
    stride = query.stride(0)
    turned = 2 - heads % 2  # heads a program
    _rotate_kernel[(triton.cdiv(total, ROTATE_ROWS), heads // turned)](
        key, cos, sin, total, stride, half=head_dim // 2, HEADS=turned, ROWS=ROTATE_ROWS
    )
    _attention_kernel[(heads, triton.cdiv(max_seqlen, QUERIES), len(cu_seqlens) - 1)](
        query,
        key,
        value,
        cos,
        sin,
        cu_seqlens,
        output,
        stride,
        scaling,
        heads=heads,
        head_dim=head_dim,
        LEFT=window[0],
        RIGHT=window[1],
        QUERIES=QUERIES,
        KEYS=KEYS,
        num_warps=4,
        num_stages=3,
        maxnreg=128,  # so that a processor holds as many blocks as shared memory has room for
    )
    return output
