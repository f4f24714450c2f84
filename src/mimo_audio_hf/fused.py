# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels for what lies between a transformer layer's matrix products, and for the codebooks' search.

The products run at the GPU's limit; the rest is memory traffic, and each of these passes over it once where PyTorch
does several times: adding to the residual stream and the norm that follows, and GELU with its bias. Both have
gradients. Before products in 8 bits they round their results to 8 bits, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN

from .attention_kernels import (
    HEAD_DIMS,
    MAX_CLIPS,
    MAX_PLACE,
    banded_rotary_attention,
    needs_gradient,
    rotary_attention_,
    takes_band,
)
from .modeling_mimo_audio_tokenizer import (
    AttentionBackend,
    MiMoAudioTokenizerAttention,
    MiMoAudioTokenizerLayer,
    MiMoAudioTokenizerStack,
    PackedSequences,
    Window,
)
from .product_kernels import gelu, limited, product_add_norm_, product_gelu, takes_product
from .quantization import QuantizedLinear, RoundedRows, require_no_gradient, round_rows


# Programs that share the rows of a gradient: a few for each of the GPU's processors.
PROGRAMS = 528
# Rows and columns of a tile of GELU's gradient, and rows that a program adds up.
TILE_ROWS, TILE_COLUMNS, CHUNK = 32, 128, 256


@triton.jit
def _row(pointer, row, columns, inside):
    return tl.load(pointer + row + columns, inside, other=0.0).to(tl.float32)


@triton.jit
def _stored_scale(largest, round_scales, largest_rounded):
    """What to divide a row by so that its largest number is the largest in 8 bits, after storing it."""
    scale = tl.maximum(largest, 1e-12) / largest_rounded
    tl.store(round_scales + tl.program_id(0), scale)
    return scale


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
    round_scales,
    limit,
    eps,
    largest_rounded,
    dim: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEPS: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Of a row, hidden + update + bias, and its layer norm, in 8 bits where ROUNDS. An update makes it store sums."""
    row = tl.program_id(0).to(tl.int64) * dim
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    x = _row(hidden, row, columns, inside)
    if HAS_UPDATE:
        u = _row(update, row, columns, inside)
        if HAS_BIAS:
            u += _row(bias, 0, columns, inside)
        x += u
        # Rounded as what is stored, for that is what the plain path norms.
        x = limited(x, limit).to(hidden_out.dtype.element_ty)
        tl.store(hidden_out + row + columns, x, inside)
        x = x.to(tl.float32)
    elif HAS_BIAS:
        x += _row(bias, 0, columns, inside)
    mean = tl.sum(x, axis=0) / dim
    centered = tl.where(inside, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centered * centered, axis=0) / dim + eps)
    normed = centered * scale * _row(weight, 0, columns, inside) + _row(shift, 0, columns, inside)
    if ROUNDS:
        normed = normed.to(hidden.dtype.element_ty).to(tl.float32)
        normed /= _stored_scale(tl.max(tl.abs(normed), axis=0), round_scales, largest_rounded)
    tl.store(normed_out + row + columns, normed, inside)
    if KEEPS:
        tl.store(means + tl.program_id(0), mean)
        tl.store(scales + tl.program_id(0), scale)


@triton.jit(do_not_specialize=["total", "rows"])
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


def _launch_add_norm(
    hidden_states: torch.Tensor,
    update: torch.Tensor | None,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    limit: float,
    means: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    rounded: RoundedRows | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    total, dim = hidden_states.shape
    hidden_states = hidden_states.contiguous()
    summed = hidden_states if update is None else torch.empty_like(hidden_states)
    normed = torch.empty_like(hidden_states) if rounded is None else rounded.rows
    block = triton.next_power_of_2(dim)
    _add_norm_kernel[(total,)](
        hidden_states,
        None if update is None else update.contiguous(),
        bias,
        weight,
        shift,
        summed,
        normed,
        means,
        scales,
        None if rounded is None else rounded.scale,
        limit,
        eps,
        _largest(rounded),
        dim=dim,
        BLOCK=block,
        HAS_UPDATE=update is not None,
        HAS_BIAS=bias is not None,
        KEEPS=means is not None,
        ROUNDS=rounded is not None,
        # Warps that share a row wait for each other; that costs more than fewer warps with more columns each.
        num_warps=min(max(block // (1024 if rounded is None else 2048), 1), 8),
    )
    return summed, normed


def _largest(rounded: RoundedRows | None) -> float:
    return 1.0 if rounded is None else torch.finfo(rounded.rows.dtype).max


def _empty_rounded(states: torch.Tensor, dtype: torch.dtype) -> RoundedRows:
    scale = torch.empty(len(states), 1, dtype=torch.float32, device=states.device)
    return RoundedRows(torch.empty_like(states, dtype=dtype), scale)


def add_norm(
    hidden_states: torch.Tensor,
    update: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream `hidden_states + update + bias` and its layer norm, both (total_frames, dim).

    Half-precision sums are limited, here after attention as well as at a layer's end.
    """
    differentiated = needs_gradient(hidden_states, update, weight, shift, bias)
    limit = _limit(hidden_states.dtype, differentiated)
    limited = limit < torch.inf
    if not differentiated:
        return _launch_add_norm(hidden_states, update, bias, weight, shift, eps, limit)
    if limited:  # float16: rarely trained, so the limit's gradient has no kernel
        summed = hidden_states + update if bias is None else hidden_states + (update + bias)
        summed = summed.clamp(-limit, limit)
        return summed, F.layer_norm(summed, weight.shape, weight, shift, eps)
    return _AddNorm.apply(hidden_states, update, bias, weight, shift, eps)


def _limit(dtype: torch.dtype, differentiated: bool) -> float:
    limited = dtype == torch.float16 or (dtype == torch.bfloat16 and not differentiated)
    return torch.finfo(dtype).max - 1000 if limited else torch.inf


def add_norm_rounded(
    hidden_states: torch.Tensor,
    update: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, RoundedRows]:
    """As [`add_norm`] without a gradient, with the norm's rows in the 8 bits of `dtype`."""
    rounded = _empty_rounded(hidden_states, dtype)
    limit = _limit(hidden_states.dtype, differentiated=False)
    summed, _ = _launch_add_norm(hidden_states, update, bias, weight, shift, eps, limit, rounded=rounded)
    return summed, rounded


def norm(
    hidden_states: torch.Tensor,
    bias: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
) -> torch.Tensor | RoundedRows:
    """Layer norm of `hidden_states + bias` (total_frames, dim) without a gradient, in 8 bits if `dtype` is given."""
    rounded = None if dtype is None else _empty_rounded(hidden_states, dtype)
    _, normed = _launch_add_norm(hidden_states, None, bias, weight, shift, eps, torch.inf, rounded=rounded)
    return normed if rounded is None else rounded


@triton.jit
def _gelu_rounded_kernel(
    states, output, round_scales, largest_rounded, dim: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr
):
    """In parts of BLOCK and of up to REST columns, so that little of the work is on columns that are not there."""
    row = tl.program_id(0).to(tl.int64) * dim
    columns = tl.arange(0, BLOCK)
    others = BLOCK + tl.arange(0, REST)
    x = gelu(tl.load(states + row + columns).to(tl.float32)).to(states.dtype.element_ty).to(tl.float32)
    y = gelu(_row(states, row, others, others < dim)).to(states.dtype.element_ty).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(x), axis=0), tl.max(tl.abs(y), axis=0))
    scale = _stored_scale(largest, round_scales, largest_rounded)
    tl.store(output + row + columns, x / scale)
    tl.store(output + row + others, y / scale, others < dim)


def gelu_rounded(states: torch.Tensor, dtype: torch.dtype) -> RoundedRows:
    """GELU (exact) of (total_frames, dim) without a gradient, rows in the 8 bits of `dtype`."""
    total, dim = states.shape
    rounded = _empty_rounded(states, dtype)
    block = 1 << (dim.bit_length() - 1)
    _gelu_rounded_kernel[(total,)](
        states,
        *rounded,
        _largest(rounded),
        dim=dim,
        BLOCK=block,
        REST=triton.next_power_of_2(max(dim - block, 1)),
        num_warps=4,
    )
    return rounded


@triton.jit(do_not_specialize=["rows"])
def _gelu_kernel(states, bias, output, rows, dim: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # Computed here from `dim`, it is known to be a multiple of what is loaded at once.
    inside = offset < rows.to(tl.int64) * dim
    x = tl.load(states + offset, inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + offset % dim, inside, other=0.0).to(tl.float32)
    tl.store(output + offset, gelu(x), inside)


@triton.jit(do_not_specialize=["total"])
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
        states, bias, output, len(states), dim=states.shape[1], BLOCK=block, HAS_BIAS=bias is not None
    )
    return output


def bias_gelu(states: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU (exact) of `states + bias`, (total_frames, dim)."""
    states = states.contiguous()
    if needs_gradient(states, bias):
        return _BiasGelu.apply(states, bias)
    return _launch_gelu(states, bias, torch.empty_like(states))


def gelu_(states: torch.Tensor) -> torch.Tensor:
    """GELU (exact) in place, of contiguous states and without a gradient."""
    return _launch_gelu(states, None, states)


# --- Residual vector quantization ---


@triton.jit
def _residual_search_kernel(
    products,
    halves,
    gram,
    offsets,
    codes,
    used,
    entries,
    num_quantizers,
    BOOKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Of a frame, the nearest entry in each codebook to what those before it left over."""
    frame = tl.program_id(0).to(tl.int64)
    books = tl.arange(0, BOOKS)
    group = tl.arange(0, GROUP)
    rows = tl.zeros([BOOKS], tl.int32)  # of the entries that were chosen, among all
    for book in range(num_quantizers):
        first = tl.load(offsets + book)
        end = tl.load(offsets + book + 1)
        nearest = float("inf")
        chosen = first
        for start in range(first, end, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = columns < end
            distance = tl.load(halves + columns, inside, other=float("inf"))
            distance -= tl.load(products + frame * used + columns, inside, other=0.0)
            for other in range(0, book, GROUP):
                row = tl.sum(tl.where(books[None, :] == other + group[:, None], rows[None, :], 0), axis=1)
                before = (other + group < book)[:, None] & inside[None, :]
                products_with = row.to(tl.int64)[:, None] * entries + columns[None, :]
                distance += tl.sum(tl.load(gram + products_with, before, other=0.0), axis=0)
            lowest, place = tl.min(distance, axis=0, return_indices=True)
            chosen = tl.where(lowest < nearest, start + place, chosen)
            nearest = tl.minimum(lowest, nearest)
        rows = tl.where(books == book, chosen, rows)
        tl.store(codes + frame * num_quantizers + book, (chosen - first).to(tl.int64))


@triton.jit
def _sum_entries_kernel(codes, offsets, entries, output, num_quantizers, dim: tl.constexpr, BLOCK: tl.constexpr):
    """Of a frame, the sum of the entries that its codes name."""
    frame = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    summed = tl.zeros([BLOCK], tl.float32)
    for book in range(num_quantizers):
        entry = tl.load(offsets + book) + tl.load(codes + frame * num_quantizers + book)
        summed += _row(entries, entry * dim, columns, inside)
    tl.store(output + frame * dim + columns, summed, inside)


class ResidualSearch:
    """Residual vector quantization in one matrix product and one kernel, and its reverse in another.

    The distance of what is left of a vector x to an entry e is, but for what all entries share and a factor of two,
    |e|^2 / 2 - x e + (the entries chosen so far) e. The second part comes from one product with all codebooks; the
    products between entries are known beforehand.

    Args:
        codebooks: entries (size, dim) in float32, rounded to the model's dtype already.
        dtype: the model's.
    """

    def __init__(self, codebooks: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
        entries = torch.cat(list(codebooks))
        self.sizes = [len(codebook) for codebook in codebooks]
        self.offsets = torch.tensor([0, *self.sizes]).cumsum(0).to(entries.device, torch.int32)
        self.entries = entries.to(dtype)
        self.halves = entries.square().sum(-1) / 2
        # In float64 once: those of twenty entries add up.
        self.gram = (entries.double() @ entries.double().t()).float()

    def __deepcopy__(self, memo: object) -> None:
        """Copies of the model may be moved, and search codebook by codebook."""

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (n, Q) int64 to the sum (n, dim) of their entries, in the model's dtype."""
        dim = self.entries.shape[1]
        output = self.entries.new_empty(len(codes), dim)
        with torch.cuda.device_of(codes):
            _sum_entries_kernel[(len(codes),)](
                codes.contiguous(),
                self.offsets,
                self.entries,
                output,
                codes.shape[1],
                dim=dim,
                BLOCK=triton.next_power_of_2(dim),
            )
        return output

    def encode(self, features: torch.Tensor, num_quantizers: int) -> torch.Tensor:
        """Features (n, dim) to codes (n, num_quantizers) int64."""
        used = sum(self.sizes[:num_quantizers])
        entries = self.entries[:used].t()
        if self.entries.dtype == torch.float32:
            products = features.float() @ entries
        else:  # products of half-precision numbers are exact in float32
            products = torch.mm(features.to(self.entries.dtype), entries, out_dtype=torch.float32)
        codes = torch.empty(len(features), num_quantizers, dtype=torch.long, device=features.device)
        with torch.cuda.device_of(features):
            _residual_search_kernel[(len(features),)](
                products,
                self.halves,
                self.gram,
                self.offsets,
                codes,
                used,
                len(self.entries),
                num_quantizers,
                BOOKS=triton.next_power_of_2(num_quantizers),
                COLUMNS=128,
                GROUP=4,
                num_warps=1,
            )
        return codes


# --- Layers ---


def can_fuse(stack: MiMoAudioTokenizerStack) -> bool:
    """Whether the layers are as this package made them: nothing replaces, wraps, watches, compiles or moves a part.

    Of layers that are prepared nothing more is asked, for it takes a slow host as long as several layers take the GPU.
    """
    if torch.compiler.is_compiling():  # the compiler fuses by itself
        return False
    if stack.optimized is not None and stack.optimized.is_of(stack):
        return True
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


_PLAIN = (
    MiMoAudioTokenizerLayer,
    MiMoAudioTokenizerAttention,
    QuantizedLinear,
    nn.Linear,
    nn.LayerNorm,
    type(ACT2FN["gelu"]),
)


class JoinedProjections(NamedTuple):
    """The projections to queries, keys and values as one; theirs are parts of its memory."""

    linear: nn.Linear | QuantizedLinear

    def are_those_of(self, attention: MiMoAudioTokenizerAttention) -> bool:
        """Not once the model was moved, cast or copied."""
        return self.linear.weight.data_ptr() == attention.q_proj.weight.data_ptr()


def join_projections(attention: MiMoAudioTokenizerAttention) -> None:
    """Makes the projections to queries, keys and values parts of one, in memory; names and values stay theirs."""
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    sizes = [linear.weight.shape[0] for linear in linears]
    weight = torch.cat([linear.weight.detach() for linear in linears])
    bias = torch.cat(
        [
            torch.zeros(size, dtype=attention.q_proj.bias.dtype, device=weight.device)
            if linear.bias is None
            else linear.bias.detach()
            for linear, size in zip(linears, sizes, strict=True)
        ]
    )
    if isinstance(attention.q_proj, QuantizedLinear):
        joined = QuantizedLinear(weight, torch.cat([linear.scale for linear in linears], dim=1), bias)
    else:
        with torch.device("meta"):
            joined = nn.Linear(weight.shape[1], weight.shape[0])
        joined.weight = nn.Parameter(weight, requires_grad=False)
        joined.bias = nn.Parameter(bias, requires_grad=False)
    for linear, part, part_bias in zip(linears, joined.weight.split(sizes), joined.bias.split(sizes), strict=True):
        linear.weight.data = part
        if linear.bias is not None:
            linear.bias.data = part_bias
    attention.optimized = JoinedProjections(joined)  # no module of the model's: its tensors are the projections' own


class PreparedStack(NamedTuple):
    """What is known of layers that [`prepare`] has seen: they can be fused, and are asked no more."""

    # What the residual stream lacks at each norm after the first, where products are added to it without their biases;
    # None where they bring them. And at the end, where the layer's output that was skipped to it lacks some, too.
    lacking: list[torch.Tensor] | None
    lacking_at_skip: torch.Tensor | None
    weight_ptr: int

    def is_of(self, stack: MiMoAudioTokenizerStack) -> bool:
        """Not once the model was moved, cast or copied."""
        return self.weight_ptr == _first_weight(stack).data_ptr()


def _first_weight(stack: MiMoAudioTokenizerStack) -> torch.Tensor:
    return cast(MiMoAudioTokenizerLayer, stack.layers[0]).self_attn.out_proj.weight


def prepare(stack: MiMoAudioTokenizerStack, skip_layer_id: int | None) -> None:
    """Joins the projections of layers that can be fused, and sums the biases that products leave out.

    Products with bfloat16 weights are added to the residual stream within the product, which can add but one thing;
    their biases are added where the stream is normed. Those in 8 bits are added afterwards, and with them what the
    stream lacks until then. Narrow ones bring their biases.
    """
    layers = _layers(stack)
    for layer in layers:
        join_projections(layer.self_attn)
    linears = [linear for layer in layers for linear in (layer.self_attn.out_proj, layer.fc2)]
    narrow = any(_is_narrow(linear, torch.bfloat16, is_row=True) for linear in linears)
    if stack.layer_norm.weight.dtype != torch.bfloat16 or narrow:
        stack.optimized = PreparedStack(None, None, _first_weight(stack).data_ptr())
        return
    lacking = torch.zeros_like(cast(torch.Tensor, stack.layer_norm.weight), dtype=torch.float32)
    sums: list[torch.Tensor] = []
    at_skip = None
    for number, linear in enumerate(linears, start=1):
        if isinstance(linear, QuantizedLinear):
            sums.append(lacking)
            lacking = torch.zeros_like(lacking)
        else:
            lacking = lacking + linear.bias.float()
            sums.append(lacking)
        if skip_layer_id is not None and number == 2 * skip_layer_id:
            at_skip = lacking
    at_skip = None if at_skip is None else at_skip + lacking
    stack.optimized = PreparedStack(sums, at_skip, _first_weight(stack).data_ptr())


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

    Where autocast would norm in float32, norms are in the sums' dtype here. Without a gradient, `hidden_states` may be
    overwritten.
    """
    layers = _layers(stack)
    trained = torch.is_grad_enabled() and (
        hidden_states.requires_grad or any(parameter.requires_grad for parameter in stack.parameters())
    )
    if isinstance(layers[0].fc1, QuantizedLinear):
        require_no_gradient(hidden_states)
    if not trained:
        hidden_states = hidden_states.contiguous()
    prepared: PreparedStack | None = stack.optimized
    if trained or prepared is None or hidden_states.dtype != torch.bfloat16 or not prepared.is_of(stack):
        prepared = None
    sums = None if prepared is None else prepared.lacking
    skip = None
    with torch.cuda.device_of(hidden_states):
        normed: torch.Tensor | RoundedRows = layers[0].self_attn_layer_norm(hidden_states)
        for number, layer in enumerate(layers):
            lacking: Sequence[torch.Tensor | None] = (None, None)
            if sums is not None:
                lacking = sums[2 * number : 2 * number + 2]
            final_norm = cast(nn.LayerNorm, layer.final_layer_norm)
            states: torch.Tensor | RoundedRows = _attend(
                layer.self_attn, normed, position_embeddings, attention_masks, sequences, backend, trained
            )
            hidden_states, normed = _add_product(
                hidden_states, states, layer.self_attn.out_proj, lacking[0], final_norm, layer.fc1, trained
            )
            states = _widen(layer, normed, trained)
            # What norms the layer's sums, and what takes the norm's results: after the last layer, whoever called.
            layer_norm, taker = stack.layer_norm, None
            if number + 1 < len(layers):
                layer_norm, taker = layers[number + 1].self_attn_layer_norm, layers[number + 1].self_attn.q_proj
            layer_norm = cast(nn.LayerNorm, layer_norm)
            hidden_states, normed = _add_product(
                hidden_states, states, layer.fc2, lacking[1], layer_norm, taker, trained
            )
            if number + 1 == skip_layer_id:
                skip = hidden_states if trained else hidden_states.clone()
        if skip is None:
            return cast(torch.Tensor, normed)
        summed = hidden_states + skip
        if prepared is None or prepared.lacking_at_skip is None:
            return stack.layer_norm(summed)
        last = cast(nn.LayerNorm, stack.layer_norm)
        return cast(torch.Tensor, norm(summed, prepared.lacking_at_skip, last.weight, last.bias, last.eps))


def _product(
    linear: nn.Linear | QuantizedLinear, states: torch.Tensor | RoundedRows, dtype: torch.dtype
) -> torch.Tensor:
    if isinstance(linear, QuantizedLinear):
        if isinstance(states, torch.Tensor):
            states = round_rows(states, linear.weight.dtype)
        return linear.product(states, dtype)
    return F.linear(cast(torch.Tensor, states), linear.weight, linear.bias)


def _is_narrow(linear: nn.Linear | QuantizedLinear, dtype: torch.dtype, is_row: bool) -> bool:
    """Whether what follows a product of states in `dtype` is done with it."""
    if isinstance(linear, QuantizedLinear) or linear.bias is None:
        return False
    is_half = dtype in (torch.float16, torch.bfloat16) and linear.weight.dtype == dtype
    return is_half and takes_product(linear.in_features, linear.out_features, is_row)


def _attend(
    attention: MiMoAudioTokenizerAttention,
    normed: torch.Tensor | RoundedRows,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_masks: dict[Window, Any],
    sequences: PackedSequences,
    backend: AttentionBackend,
    trained: bool,
) -> torch.Tensor:
    dtype = position_embeddings[0].dtype
    joined: JoinedProjections | None = attention.optimized
    if joined is not None and not trained and joined.are_those_of(attention):
        query, key, value = _product(joined.linear, normed, dtype).chunk(3, dim=1)
    else:
        query, key, value = (
            _product(linear, normed, dtype) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
    window, head_dim = attention.window, attention.head_dim
    if not trained:
        arguments = query, key, value, position_embeddings
        heads = query.shape[1] // head_dim
        if takes_band(window, head_dim):
            return banded_rotary_attention(*arguments, sequences, heads, attention.scaling, window)
        longest = sequences.max_seqlen
        if head_dim in HEAD_DIMS and len(sequences) <= MAX_CLIPS and longest * query.stride(0) < MAX_PLACE:
            return rotary_attention_(*arguments, sequences.cu_seqlens, longest, heads, attention.scaling, window)
    query, key, value = (states.unflatten(-1, (-1, head_dim)) for states in (query, key, value))
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
    hidden_states: torch.Tensor,
    states: torch.Tensor | RoundedRows,
    linear: nn.Linear | QuantizedLinear,
    lacking: torch.Tensor | None,
    layer_norm: nn.LayerNorm,
    taker: nn.Linear | QuantizedLinear | None,
    trained: bool,
) -> tuple[torch.Tensor, torch.Tensor | RoundedRows]:
    parameters = layer_norm.weight, layer_norm.bias, layer_norm.eps
    if trained:
        # The bias is added with the rest, for its gradient then costs no pass over the frames.
        update = F.linear(cast(torch.Tensor, states), linear.weight)
        return add_norm(hidden_states, update, *parameters, linear.bias)
    rounded = taker.weight.dtype if isinstance(taker, QuantizedLinear) else None
    if rounded is None and _is_narrow(linear, hidden_states.dtype, is_row=True):
        limit = _limit(hidden_states.dtype, differentiated=False)
        states = cast(torch.Tensor, states)
        bias = cast(torch.Tensor, linear.bias)
        normed = product_add_norm_(hidden_states, states, linear.weight, bias, *parameters, limit)
        return hidden_states, normed
    if lacking is not None and not isinstance(linear, QuantizedLinear):
        hidden_states.addmm_(cast(torch.Tensor, states), linear.weight.t())
        return hidden_states, norm(hidden_states, lacking, *parameters, rounded)
    update = _product(linear, states, hidden_states.dtype)
    if rounded is not None:
        return add_norm_rounded(hidden_states, update, *parameters, rounded, lacking)
    return add_norm(hidden_states, update, *parameters, lacking)


def _widen(
    layer: MiMoAudioTokenizerLayer, normed: torch.Tensor | RoundedRows, trained: bool
) -> torch.Tensor | RoundedRows:
    if trained:
        return bias_gelu(F.linear(cast(torch.Tensor, normed), layer.fc1.weight), layer.fc1.bias)
    dtype = cast(nn.LayerNorm, layer.final_layer_norm).weight.dtype
    if _is_narrow(layer.fc1, dtype, is_row=False) and not isinstance(layer.fc2, QuantizedLinear):
        return product_gelu(cast(torch.Tensor, normed), layer.fc1.weight, layer.fc1.bias)
    widened = _product(layer.fc1, normed, dtype)
    return gelu_rounded(widened, layer.fc2.weight.dtype) if isinstance(layer.fc2, QuantizedLinear) else gelu_(widened)
