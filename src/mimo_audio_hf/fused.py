# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels for what lies between a transformer layer's matrix products.

The products run at the GPU's limit; the rest is memory traffic, and each of these passes over it once where PyTorch
does several times: adding to the residual stream and the norm that follows; GELU with its bias; attention over packed
clips that turns queries and keys (RoPE) as it reads them. The first two have gradients.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN

from .modeling_mimo_audio_tokenizer import (
    AttentionBackend,
    MiMoAudioTokenizerAttention,
    MiMoAudioTokenizerLayer,
    MiMoAudioTokenizerStack,
    PackedSequences,
    Window,
)


# Programs that share the rows of a gradient: a few for each of the GPU's processors.
PROGRAMS = 528
# Rows and columns of a tile of GELU's gradient, and rows that a program adds up.
TILE_ROWS, TILE_COLUMNS, CHUNK = 32, 128, 256
QUERIES, KEYS = 128, 64
# Of attention: a half of one is a factor of a product, of at least 16; at 128 a block outgrows smaller GPUs.
HEAD_DIMS = (32, 64)
MAX_CLIPS = 65535  # of attention, what a grid has room for


@triton.jit
def _row(pointer, row, columns, inside):
    return tl.load(pointer + row + columns, inside, other=0.0).to(tl.float32)


@triton.jit
def _add_norm_kernel(
    hidden,
    update,
    bias,
    weight,
    shift,
    hidden_out,
    normed_out,
    means,
    scales,
    limit,
    eps,
    dim: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEPS: tl.constexpr,
):
    """Of a row, hidden + update + bias, and its layer norm."""
    row = tl.program_id(0).to(tl.int64) * dim
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    u = _row(update, row, columns, inside)
    if HAS_BIAS:
        u += _row(bias, 0, columns, inside)
    x = _row(hidden, row, columns, inside) + u
    # Rounded as what is stored, for that is what the plain path norms.
    # Not tl.minimum and tl.maximum, which would make a number of NaN.
    x = tl.where(x > limit, limit, tl.where(x < -limit, -limit, x)).to(hidden_out.dtype.element_ty)
    tl.store(hidden_out + row + columns, x, inside)
    x = x.to(tl.float32)
    mean = tl.sum(x, axis=0) / dim
    centered = tl.where(inside, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centered * centered, axis=0) / dim + eps)
    normed = centered * scale * _row(weight, 0, columns, inside) + _row(shift, 0, columns, inside)
    tl.store(normed_out + row + columns, normed, inside)
    if KEEPS:
        tl.store(means + tl.program_id(0), mean)
        tl.store(scales + tl.program_id(0), scale)


@triton.jit
def _add_norm_gradient_kernel(
    hidden,
    hidden_gradient,
    normed_gradient,
    means,
    scales,
    weight,
    gradient,
    sums,
    total,
    rows,
    dim: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of `rows` rows the gradient, and its sum and those of the norm's weight and shift over them."""
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    w = _row(weight, 0, columns, inside)
    bias_sum = tl.zeros([BLOCK], tl.float32)
    weight_sum = tl.zeros([BLOCK], tl.float32)
    shift_sum = tl.zeros([BLOCK], tl.float32)
    for step in range(rows):
        number = tl.program_id(0) * rows + step
        valid = inside & (number < total)
        row = number.to(tl.int64) * dim
        scale = tl.load(scales + number, number < total, other=0.0)
        mean = tl.load(means + number, number < total, other=0.0)
        centered = tl.where(valid, (_row(hidden, row, columns, valid) - mean) * scale, 0.0)
        g = _row(normed_gradient, row, columns, valid)
        weight_sum += g * centered
        shift_sum += g
        g *= w
        g -= tl.sum(g, axis=0) / dim + centered * (tl.sum(g * centered, axis=0) / dim)
        g = tl.where(valid, g * scale, 0.0) + _row(hidden_gradient, row, columns, valid)
        bias_sum += g
        tl.store(gradient + row + columns, g, valid)
    sums += tl.program_id(0) * 3 * dim + columns
    tl.store(sums, bias_sum, inside)
    tl.store(sums + dim, weight_sum, inside)
    tl.store(sums + 2 * dim, shift_sum, inside)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        update: torch.Tensor,
        bias: torch.Tensor | None,
        weight: torch.Tensor,
        shift: torch.Tensor,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        means, scales = torch.empty(2, len(hidden_states), dtype=torch.float32, device=hidden_states.device)
        summed, normed = _launch_add_norm(hidden_states, update, bias, weight, shift, eps, torch.inf, means, scales)
        ctx.save_for_backward(summed, weight, means, scales)
        ctx.has_bias = bias is not None
        return summed, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        summed, weight, means, scales = ctx.saved_tensors
        hidden_gradient, normed_gradient = (gradient.contiguous() for gradient in gradients)
        total, dim = summed.shape
        rows = triton.cdiv(total, PROGRAMS)
        programs = triton.cdiv(total, rows)
        gradient = torch.empty_like(summed)
        sums = torch.empty(programs, 3, dim, dtype=torch.float32, device=summed.device)
        _add_norm_gradient_kernel[(programs,)](
            summed,
            hidden_gradient,
            normed_gradient,
            means,
            scales,
            weight,
            gradient,
            sums,
            total,
            rows,
            dim=dim,
            BLOCK=triton.next_power_of_2(dim),
            num_warps=2,
        )
        bias_gradient, weight_gradient, shift_gradient = sums.sum(0).to(weight.dtype)
        return gradient, gradient, bias_gradient if ctx.has_bias else None, weight_gradient, shift_gradient, None


def _needs_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _launch_add_norm(
    hidden_states: torch.Tensor,
    update: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    limit: float,
    means: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    total, dim = hidden_states.shape
    hidden_states = hidden_states.contiguous()
    summed, normed = torch.empty_like(hidden_states), torch.empty_like(hidden_states)
    _add_norm_kernel[(total,)](
        hidden_states,
        update.contiguous(),
        bias,
        weight,
        shift,
        summed,
        normed,
        means,
        scales,
        limit,
        eps,
        dim=dim,
        BLOCK=triton.next_power_of_2(dim),
        HAS_BIAS=bias is not None,
        KEEPS=means is not None,
    )
    return summed, normed


def add_norm(
    hidden_states: torch.Tensor,
    update: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream `hidden_states + update + bias` and its layer norm, both (total_frames, dim).

    Half-precision sums are limited where the plain layers limit them.
    """
    dtype = hidden_states.dtype
    differentiated = _needs_gradient(hidden_states, update, weight, shift, bias)
    limited = dtype == torch.float16 or (dtype == torch.bfloat16 and not differentiated)
    limit = torch.finfo(dtype).max - 1000 if limited else torch.inf
    if not differentiated:
        return _launch_add_norm(hidden_states, update, bias, weight, shift, eps, limit)
    if limited:  # float16: rarely trained, so the limit's gradient has no kernel
        summed = hidden_states + update if bias is None else hidden_states + (update + bias)
        summed = summed.clamp(-limit, limit)
        return summed, F.layer_norm(summed, weight.shape, weight, shift, eps)
    return _AddNorm.apply(hidden_states, update, bias, weight, shift, eps)


@triton.jit
def _gelu_kernel(states, bias, output, total, dim: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < total
    x = tl.load(states + offset, inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + offset % dim, inside, other=0.0).to(tl.float32)
    tl.store(output + offset, 0.5 * x * (1 + tl.erf(x * 0.7071067811865476)), inside)


@triton.jit
def _gelu_gradient_kernel(
    states,
    bias,
    gradient_out,
    gradient,
    sums,
    total,
    dim: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    b = tl.load(bias + columns, columns < dim, other=0.0).to(tl.float32)
    added = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, CHUNK, ROWS):
        rows = tl.program_id(1).to(tl.int64) * CHUNK + start + tl.arange(0, ROWS)
        inside = (rows < total)[:, None] & (columns < dim)[None, :]
        offset = rows[:, None] * dim + columns[None, :]
        x = tl.load(states + offset, inside, other=0.0).to(tl.float32) + b[None, :]
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        g = tl.load(gradient_out + offset, inside, other=0.0).to(tl.float32)
        g *= 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density
        tl.store(gradient + offset, g, inside)
        added += tl.sum(g, axis=0)
    tl.store(sums + tl.program_id(1) * dim + columns, added, columns < dim)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(states, bias)
        return _launch_gelu(states, bias, torch.empty_like(states))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states, bias = ctx.saved_tensors
        total, dim = states.shape
        gradient = torch.empty_like(states)
        chunks = triton.cdiv(total, CHUNK)
        sums = torch.empty(chunks, dim, dtype=torch.float32, device=states.device)
        _gelu_gradient_kernel[(triton.cdiv(dim, TILE_COLUMNS), chunks)](
            states,
            bias,
            gradients[0].contiguous(),
            gradient,
            sums,
            total,
            dim=dim,
            ROWS=TILE_ROWS,
            COLUMNS=TILE_COLUMNS,
            CHUNK=CHUNK,
        )
        return gradient, sums.sum(0).to(bias.dtype)


def _launch_gelu(states: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor) -> torch.Tensor:
    block = 4096
    _gelu_kernel[(triton.cdiv(states.numel(), block),)](
        states, bias, output, states.numel(), dim=states.shape[1], BLOCK=block, HAS_BIAS=bias is not None
    )
    return output


def bias_gelu(states: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU (exact) of `states + bias`, (total_frames, dim)."""
    states = states.contiguous()
    if _needs_gradient(states, bias):
        return _BiasGelu.apply(states, bias)
    return _launch_gelu(states, bias, torch.empty_like(states))


def gelu_(states: torch.Tensor) -> torch.Tensor:
    """GELU (exact) in place, of contiguous states and without a gradient."""
    return _launch_gelu(states, None, states)


@triton.jit
def _turned(states, cos, sin, rows, inside, stride, head, head_dim: tl.constexpr):
    """Rows of a head, turned: their first halves and their second ones."""
    half: tl.constexpr = head_dim // 2
    channels = tl.arange(0, half)
    place = states + rows[:, None] * stride + head * head_dim + channels[None, :]
    x = tl.load(place, inside[:, None], other=0.0).to(tl.float32)
    y = tl.load(place + half, inside[:, None], other=0.0).to(tl.float32)
    angle = rows[:, None] * half + channels[None, :]
    c = tl.load(cos + angle, inside[:, None], other=0.0).to(tl.float32)
    s = tl.load(sin + angle, inside[:, None], other=0.0).to(tl.float32)
    dtype = states.dtype.element_ty
    return (x * c - y * s).to(dtype), (y * c + x * s).to(dtype)


@triton.jit
def _rotary_attention_kernel(
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
    """A block of a clip's queries, of one head, against the clip's keys within the window, block by block."""
    start = tl.load(cu_seqlens + tl.program_id(2)).to(tl.int64)
    length = (tl.load(cu_seqlens + tl.program_id(2) + 1) - start).to(tl.int32)
    first = tl.program_id(0) * QUERIES
    if first < length:
        head = tl.program_id(1)
        channels = tl.arange(0, head_dim)
        at = first + tl.arange(0, QUERIES)
        q1, q2 = _turned(query, cos, sin, start + at, at < length, stride, head, head_dim)
        largest = tl.full([QUERIES], -1e30, tl.float32)
        sums = tl.zeros([QUERIES], tl.float32)
        attended = tl.zeros([QUERIES, head_dim], tl.float32)
        begin, end = 0, length
        if LEFT >= 0:
            begin = tl.maximum(0, first - LEFT) // KEYS * KEYS
        if RIGHT >= 0:
            end = tl.minimum(length, first + QUERIES + RIGHT)
        for block in range(begin, end, KEYS):
            other = block + tl.arange(0, KEYS)
            inside = other < length
            k1, k2 = _turned(key, cos, sin, start + other, inside, stride, head, head_dim)
            scores = tl.dot(q1, tl.trans(k1))
            scores = tl.dot(q2, tl.trans(k2), scores) * (scaling * 1.4426950408889634)
            seen = inside[None, :]
            if LEFT >= 0:
                seen = seen & (other[None, :] >= at[:, None] - LEFT)
            if RIGHT >= 0:
                seen = seen & (other[None, :] <= at[:, None] + RIGHT)
            scores = tl.where(seen, scores, -1e30)
            highest = tl.maximum(largest, tl.max(scores, axis=1))
            weights = tl.exp2(scores - highest[:, None])
            shrunk = tl.exp2(largest - highest)
            sums = sums * shrunk + tl.sum(weights, axis=1)
            rows = (start + other)[:, None] * stride + head * head_dim + channels[None, :]
            v = tl.load(value + rows, inside[:, None], other=0.0)
            attended = tl.dot(weights.to(v.dtype), v, attended * shrunk[:, None])
            largest = highest
        rows = (start + at)[:, None] * (heads * head_dim) + head * head_dim + channels[None, :]
        tl.store(output + rows, attended / sums[:, None], (at < length)[:, None])


def rotary_attention(
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
    """Attention of each clip to itself, without a gradient.

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
    grid = (triton.cdiv(max_seqlen, QUERIES), heads, len(cu_seqlens) - 1)
    _rotary_attention_kernel[grid](
        query,
        key,
        value,
        cos,
        sin,
        cu_seqlens,
        output,
        query.stride(0),
        scaling,
        heads=heads,
        head_dim=head_dim,
        LEFT=window[0],
        RIGHT=window[1],
        QUERIES=QUERIES,
        KEYS=KEYS,
    )
    return output


# --- Layers ---


def can_fuse(stack: MiMoAudioTokenizerStack) -> bool:
    """Whether the layers are as this package made them: nothing replaces, wraps, watches, compiles or moves a part."""
    if torch.compiler.is_compiling():  # the compiler fuses by itself
        return False
    parts = [stack.layer_norm]
    for layer in _layers(stack):
        if layer.gradient_checkpointing or getattr(layer.fc1, "bias", None) is None:
            return False
        parts += [layer, layer.self_attn, *layer.self_attn.children(), *layer.children()]
    return all(
        type(part) in _PLAIN
        and not (part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)
        and part._compiled_call_impl is None
        and "forward" not in vars(part)
        for part in parts
    )


def _layers(stack: MiMoAudioTokenizerStack) -> list[MiMoAudioTokenizerLayer]:
    return cast(list[MiMoAudioTokenizerLayer], list(stack.layers))


_PLAIN = (MiMoAudioTokenizerLayer, MiMoAudioTokenizerAttention, nn.Linear, nn.LayerNorm, type(ACT2FN["gelu"]))


def run_layers(
    stack: MiMoAudioTokenizerStack,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_masks: dict[Window, Any],
    sequences: PackedSequences,
    backend: AttentionBackend,
    skip_layer_id: int | None = None,
) -> torch.Tensor:
    """The stack's layers and final norm, each norm taken where its input is added up. For what [`can_fuse`] allows.

    Where autocast would norm in float32, norms are in the sums' dtype here.
    """
    layers = _layers(stack)
    parts = [norm for layer in layers for norm in (layer.self_attn_layer_norm, layer.final_layer_norm)]
    norms = [cast(nn.LayerNorm, norm) for norm in (*parts, stack.layer_norm)]
    trained = torch.is_grad_enabled() and (
        hidden_states.requires_grad or any(parameter.requires_grad for parameter in stack.layers.parameters())
    )
    skip = None
    with torch.cuda.device_of(hidden_states):
        normed = norms[0](hidden_states)
        for number, layer in enumerate(layers):
            attended = _attend(
                layer.self_attn, normed, position_embeddings, attention_masks, sequences, backend, trained
            )
            hidden_states, normed = _add_product(
                hidden_states, attended, layer.self_attn.out_proj, norms[2 * number + 1], trained
            )
            widened = _widen(layer.fc1, normed, trained)
            hidden_states, normed = _add_product(hidden_states, widened, layer.fc2, norms[2 * number + 2], trained)
            if number + 1 == skip_layer_id:
                skip = hidden_states
        return normed if skip is None else norms[-1](hidden_states + skip)


def _attend(
    attention: MiMoAudioTokenizerAttention,
    normed: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_masks: dict[Window, Any],
    sequences: PackedSequences,
    backend: AttentionBackend,
    trained: bool,
) -> torch.Tensor:
    query, key, value = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
    window = attention.window
    clips = len(sequences.cu_seqlens) - 1
    if not trained and min(window) < 0 and attention.head_dim in HEAD_DIMS and clips <= MAX_CLIPS:
        return rotary_attention(
            query,
            key,
            value,
            position_embeddings,
            sequences.cu_seqlens,
            sequences.max_seqlen,
            query.shape[1] // attention.head_dim,
            attention.scaling,
            window,
        )
    query, key, value = (states.unflatten(-1, (-1, attention.head_dim)) for states in (query, key, value))
    query, key = backend.rotary(query, key, *position_embeddings)
    output = backend.attend(
        query,
        key,
        value,
        attention_mask=attention_masks[window],
        scaling=attention.scaling,
        sequences=sequences,
        window=window,
    )
    return output.flatten(1)


def _add_product(
    hidden_states: torch.Tensor, states: torch.Tensor, linear: nn.Linear, norm: nn.LayerNorm, trained: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    # With a gradient the bias is added here, for its own gradient then costs no pass over the frames.
    update = F.linear(states, linear.weight, None if trained else linear.bias)
    return add_norm(hidden_states, update, norm.weight, norm.bias, norm.eps, linear.bias if trained else None)


def _widen(linear: nn.Linear, states: torch.Tensor, trained: bool) -> torch.Tensor:
    return bias_gelu(F.linear(states, linear.weight), linear.bias) if trained else gelu_(linear(states))
