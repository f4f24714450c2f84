# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels of narrow layers' matrix products together with what follows them, for inference.

A product with so few columns (the vocoder's 256) is over before its operands are through the memory, so that what
follows costs more than the product itself, unless it is done before the results leave the processor. Wide layers'
products are faster in cuBLAS.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl


# The widest row that a program holds, with all of its columns.
MAX_DIM = 256
COLUMNS, DEPTH = 128, 64


@triton.jit
def gelu(x):
    """GELU (exact) of float32, to a few units in the last place, in half the instructions that erf takes.

    Of y = |x|, erfc(y / sqrt(2)) / 2 is exp(-y * y / 2) times a polynomial in 1 / (1 + 0.36 * y), fitted to a relative
    error of 1e-7. No difference of near numbers is taken, so that the negative tail keeps its precision.
    """
    y = tl.abs(x)
    y = tl.where(y > 40.0, 40.0, y)  # nothing is left there; NaN stays
    t = 1.0 / (1.0 + 0.36 * y)
    tail = -0.030238829235543108 * t + 0.13951076119801087
    tail = tail * t - 0.22360371061027706
    tail = tail * t + 0.10737307547540631
    tail = tail * t - 0.00038851632857550555
    tail = tail * t + 0.0960380447984106
    tail = tail * t + 0.1240096310806712
    tail = tail * t + 0.14368189221812067
    tail = tail * t + 0.14361766439631052
    return tl.where(x > 0.0, x, 0.0) - y * (tail * t * tl.exp2(y * y * -0.7213475204444817))


@triton.jit
def limited(x, limit):
    """Not by tl.minimum and tl.maximum, which would make a number of NaN."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def _product(states, weight, rows, columns, inside, depth: tl.constexpr, DEPTH: tl.constexpr):
    """Of some rows and columns, states (total, depth) times weight (dim, depth) transposed."""
    channel = tl.arange(0, DEPTH)
    left = states + rows.to(tl.int64)[:, None] * depth + channel[None, :]
    right = weight + columns[None, :] * depth + channel[:, None]
    sums = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for start in range(0, depth, DEPTH):
        sums = tl.dot(tl.load(left + start, inside, other=0.0), tl.load(right + start), sums)
    return sums


@triton.jit(do_not_specialize=["total"])
def _product_gelu_kernel(
    states,
    weight,
    bias,
    output,
    total,
    depth: tl.constexpr,
    dim: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < total)[:, None]
    x = _product(states, weight, rows, columns, inside, depth, DEPTH) + tl.load(bias + columns)[None, :].to(tl.float32)
    x = x.to(output.dtype.element_ty).to(tl.float32)  # as the plain path rounds it
    tl.store(output + rows.to(tl.int64)[:, None] * dim + columns[None, :], gelu(x), inside)


def product_gelu(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU (exact) of `states @ weight.T + bias`: (total, depth) to (total, dim). See [`takes_product`]."""
    states = states.contiguous()
    total, depth = states.shape
    dim = len(weight)
    output = states.new_empty(total, dim)
    rows, columns = 128, min(dim, COLUMNS)
    _product_gelu_kernel[(dim // columns, triton.cdiv(total, rows))](
        states,
        weight,
        bias,
        output,
        total,
        depth=depth,
        dim=dim,
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=DEPTH,
        num_warps=8,
        num_stages=3,
    )
    return output


@triton.jit(do_not_specialize=["total"])
def _product_add_norm_kernel(
    states,
    weight,
    bias,
    hidden,
    norm_weight,
    norm_shift,
    normed,
    total,
    limit,
    eps,
    depth: tl.constexpr,
    dim: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, dim)
    inside = (rows < total)[:, None]
    place = rows.to(tl.int64)[:, None] * dim + columns[None, :]
    x = _product(states, weight, rows, columns, inside, depth, DEPTH) + tl.load(bias + columns)[None, :].to(tl.float32)
    x += tl.load(hidden + place, inside, other=0.0).to(tl.float32)
    x = limited(x, limit).to(hidden.dtype.element_ty)
    tl.store(hidden + place, x, inside)
    x = x.to(tl.float32)
    x -= (tl.sum(x, axis=1) / dim)[:, None]
    x *= tl.rsqrt(tl.sum(x * x, axis=1) / dim + eps)[:, None]
    x = x * tl.load(norm_weight + columns)[None, :].to(tl.float32) + tl.load(norm_shift + columns)[None, :].to(
        tl.float32
    )
    tl.store(normed + place, x, inside)


def product_add_norm_(
    hidden_states: torch.Tensor,
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_shift: torch.Tensor,
    eps: float,
    limit: float,
) -> torch.Tensor:
    """Adds `states @ weight.T + bias` to the residual stream, in place; its layer norm. See [`takes_product`].

    Args:
        hidden_states: (total, dim), contiguous.
        states: (total, depth), of the same dtype as all others.
        limit: of the sums' size.

    Returns:
        (total, dim).
    """
    total, dim = hidden_states.shape
    normed = torch.empty_like(hidden_states)
    rows = 64
    _product_add_norm_kernel[(triton.cdiv(total, rows),)](
        states.contiguous(),
        weight,
        bias,
        hidden_states,
        norm_weight,
        norm_shift,
        normed,
        total,
        limit,
        eps,
        depth=states.shape[1],
        dim=dim,
        ROWS=rows,
        DEPTH=DEPTH,
        num_warps=8,
        num_stages=_stages(states.device),
    )
    return normed


@lru_cache
def _stages(device: torch.device) -> int:
    """Loads ahead of the products, as far as a processor's shared memory has room for them."""
    if device.type != "cuda":  # in Triton's interpreter
        return 2
    memory = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return 3 if memory > 3 * (64 + MAX_DIM) * DEPTH * 2 else 2


def takes_product(depth: int, dim: int, is_row: bool) -> bool:
    """Whether a product with contiguous weights (dim, depth) runs here: a narrow one.

    `is_row`: whether all its columns are to be in a program.
    """
    columns = dim if is_row else min(dim, COLUMNS)
    whole = columns <= MAX_DIM and columns >= 16 and columns & (columns - 1) == 0 and dim % columns == 0
    return whole and min(depth, dim) <= MAX_DIM and depth % DEPTH == 0
