# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""The MiMo-Audio tokenizer (arXiv 2512.23808): log-mel spectrograms to residual codes, and codes to waveforms.

Everything inside runs on packed clips: tensors of shape (total_frames, dim) in which the clips of a batch stand end
to end, with [`PackedSequences`] saying where each one lies. There is no padding that could leak into a clip's result,
and none that costs time. Padded tensors exist only at the edges, in `encode`, `decode` and `forward`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import AttentionInterface, PreTrainedAudioTokenizerBase
from transformers.utils import ModelOutput, can_return_tuple, is_flash_attn_2_available, logging

from .configuration_mimo_audio_tokenizer import MiMoAudioTokenizerConfig
from .feature_extraction_mimo_audio_tokenizer import MiMoAudioTokenizerFeatureExtractor, upload


if is_flash_attn_2_available():
    from flash_attn import flash_attn_varlen_func

logger = logging.get_logger(__name__)

Window = tuple[int, int]
Length = TypeVar("Length", int, torch.Tensor)


# --- Packed clips ---


class PackedBounds(NamedTuple):
    """Where clips lie, without what follows from it for each frame; see [`PackedSequences`]."""

    cu_seqlens: torch.Tensor
    total: int
    max_seqlen: int

    @classmethod
    def of_levels(cls, levels: torch.Tensor, device: torch.device | str | None = None) -> list[PackedBounds]:
        """Of clips at several frame rates, lengths (levels, clips) on the host, in one copy from there."""
        clips = levels.shape[1]
        # Each row begins at a multiple of 16 bytes, for kernels are built anew for addresses that are none.
        starts = F.pad(levels.cumsum(1), (1, -(clips + 1) % 4)).int()
        totals, longest = starts[:, clips].tolist(), levels.amax(1).tolist()
        rows = upload(starts, device)[:, : clips + 1]
        return [cls(*row) for row in zip(rows, totals, longest, strict=True)]

    @classmethod
    def of_tensor(cls, lengths: torch.Tensor, total: int, max_seqlen: int) -> PackedBounds:
        """Of lengths (clips,) that their device alone knows, but for their sum and the longest, or more.

        A length may be 0.
        """
        return cls(F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), total, max_seqlen)


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """Where the clips of a batch lie in a (total_frames, ...) tensor.

    Attributes:
        cu_seqlens (`torch.Tensor` of shape `(clips + 1,)`, int32): First frame of each clip, then the total.
        max_seqlen (`int`): Frames of the longest clip, or more.
        position_ids (`torch.Tensor` of shape `(total_frames,)`): Each frame's place in its clip, from 0.
        sequence_ids (`torch.Tensor` of shape `(total_frames,)`): Each frame's clip.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    position_ids: torch.Tensor
    sequence_ids: torch.Tensor

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str | None = None) -> PackedSequences:
        """Sequences of the given lengths, in frames; from the host, so that no layer has to ask the GPU for them."""
        return cls.at(PackedBounds.of_levels(torch.tensor([[*lengths]], device="cpu"), device)[0])

    @classmethod
    def from_tensor(cls, lengths: torch.Tensor, total: int, max_seqlen: int) -> PackedSequences:
        """Sequences of lengths that their device alone knows, as in [`PackedBounds.of_tensor`]."""
        return cls.at(PackedBounds.of_tensor(lengths, total, max_seqlen))

    @classmethod
    def at(cls, bounds: PackedBounds) -> PackedSequences:
        """Sequences that lie there."""
        frames = torch.arange(bounds.total, device=bounds.cu_seqlens.device, dtype=torch.int32)
        sequence_ids = torch.searchsorted(bounds.cu_seqlens[1:], frames, right=True)
        return cls(bounds.cu_seqlens, bounds.max_seqlen, frames - bounds.cu_seqlens[sequence_ids], sequence_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedSequences:
        return _dataclass_to(self, device, non_blocking)

    def __len__(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def total(self) -> int:
        return self.position_ids.shape[0]

    @property
    def lengths(self) -> torch.Tensor:
        return self.cu_seqlens.diff()

    @property
    def mask(self) -> torch.Tensor:
        """(clips, max_seqlen) bool, True where a padded tensor holds a clip's frame."""
        return torch.arange(self.max_seqlen, device=self.cu_seqlens.device) < self.lengths[:, None]

    @property
    def padded_index(self) -> torch.Tensor:
        """(clips, max_seqlen): the packed row of each padded frame; padding points one past the last row."""
        rows = self.cu_seqlens[:-1, None] + torch.arange(self.max_seqlen, device=self.cu_seqlens.device)
        return torch.where(self.mask, rows, self.total)

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """(total_frames, ...) to (clips, max_seqlen, ...), zeros past each clip's end."""
        return gather_rows(packed.to(self.cu_seqlens.device), self.padded_index)

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """(clips, frames, ...) to (total_frames, ...). Padding is never read."""
        return padded[self.sequence_ids, self.position_ids]

    def conv_index(self, outputs: PackedSequences, kernel: int, stride: int, padding: int) -> torch.Tensor:
        """(outputs.total, kernel): the input row under each tap; taps outside a clip point one past the last row."""
        taps = torch.arange(-padding, kernel - padding, device=self.cu_seqlens.device)
        start, end = self._bounds(outputs.sequence_ids[:, None])
        row = outputs.position_ids[:, None] * stride + start + taps
        return torch.where((row >= start) & (row < end), row, self.total)

    def conv_transpose_index(
        self, outputs: PackedSequences, kernel: int, stride: int, offset: int = 0
    ) -> torch.Tensor:
        """(outputs.total, ceil(kernel / stride)): for each output frame the rows of the (total * kernel, ...) products
        that add up to it, one past the last row where there is none. `offset` frames are cut from each clip's start.
        """
        steps = torch.arange(-(-kernel // stride), device=self.cu_seqlens.device)
        position = outputs.position_ids[:, None] + offset
        start, end = self._bounds(outputs.sequence_ids[:, None])
        row, tap = position // stride + start - steps, position % stride + steps * stride
        inside = (tap < kernel) & (row >= start) & (row < end)
        return torch.where(inside, row * kernel + tap, self.total * kernel)

    def _bounds(self, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cu_seqlens[:-1][clips], self.cu_seqlens[1:][clips]

    def mean(self, rows: torch.Tensor) -> torch.Tensor:
        """Mean of one number a frame (total_frames,) over each clip, (clips,)."""
        return self.pad(rows).sum(1) / self.lengths


@dataclass(frozen=True, eq=False)
class MiMoAudioTokenizerEncoderLayout:
    """Everything about the lengths of a batch that the encoder needs; see [`MiMoAudioTokenizerModel.encoder_layout`].

    `mel`, `frames` and `codes` are the clips at 100, 50 and 25 Hz; the rest are the convolutions' gather indices.
    """

    mel: PackedSequences
    frames: PackedSequences
    codes: PackedSequences
    conv1_index: torch.Tensor
    conv2_index: torch.Tensor
    pool_index: torch.Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MiMoAudioTokenizerEncoderLayout:
        return _dataclass_to(self, device, non_blocking)


@dataclass(frozen=True, eq=False)
class MiMoAudioTokenizerDecoderLayout:
    """Everything about the lengths of a batch that the decoder needs; see [`MiMoAudioTokenizerModel.decoder_layout`].

    `codes`, `frames` and `mel` are the clips at 25, 50 and 100 Hz and `uncut` the mel frames before the transposed
    convolution's tail is cut (`cut_index`). `audio` counts in blocks of samples that divide hop and window;
    `audio_index` says which pieces of STFT frames overlap in a block.
    """

    codes: PackedSequences
    frames: PackedSequences
    uncut: PackedSequences
    mel: PackedSequences
    audio: PackedSequences
    dconv1_index: torch.Tensor
    dconv2_index: torch.Tensor
    cut_index: torch.Tensor
    audio_index: torch.Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MiMoAudioTokenizerDecoderLayout:
        return _dataclass_to(self, device, non_blocking)


def _dataclass_to(instance: Any, device: torch.device | str, non_blocking: bool) -> Any:
    moved = {}
    for field in fields(instance):
        value = getattr(instance, field.name)
        moved[field.name] = value.to(device, non_blocking=non_blocking) if hasattr(value, "to") else value
    return type(instance)(**moved)


def gather_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`rows[index]`, where an index one past the last row gives zeros."""
    table = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])]).view(len(rows) + 1, -1)
    # Unlike indexing, an embedding need not add up gradients of all the padding.
    gathered = F.embedding(index, table, padding_idx=len(rows))
    return gathered.view(*index.shape, *rows.shape[1:])


class PackedConv1d(nn.Conv1d):
    """1D convolution over packed clips, as one matrix product over gathered taps."""

    def forward(self, hidden_states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        taps = gather_rows(hidden_states, index).flatten(1)
        return F.linear(taps, self.weight.transpose(1, 2).flatten(1), self.bias)


class PackedConvTranspose1d(nn.ConvTranspose1d):
    """1D transposed convolution over packed clips: one matrix product, then the overlapping products' sum."""

    def forward(self, hidden_states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        products = F.linear(hidden_states, self.weight.permute(2, 1, 0).flatten(0, 1))
        products = products.view(-1, self.out_channels)
        if self.kernel_size == self.stride and len(index) == len(products):  # each is an output, and in its place
            outputs = products
        else:
            outputs = gather_rows(products, index).sum(1)
        return outputs if self.bias is None else outputs + self.bias


class PackedGroupNorm(nn.GroupNorm):
    """Group normalization with one group: statistics over all channels and frames of each clip, in float32."""

    # Another way to the same result, if `mimo_audio_hf.optimize_for_inference` gave one; so in other modules.
    optimized: Callable[..., torch.Tensor] | None = None

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, sequences: PackedSequences
    ) -> torch.Tensor:
        if self.optimized is not None and not hidden_states.requires_grad:
            return self.optimized(hidden_states, sequences, self.weight, self.bias, self.eps)
        x = hidden_states.float()
        centered = x - sequences.mean(x.mean(-1))[sequences.sequence_ids, None]
        variance = sequences.mean(centered.square().mean(-1))
        scale = (variance + self.eps).rsqrt()[sequences.sequence_ids, None]
        return (centered * scale * self.weight + self.bias).to(hidden_states.dtype)


# --- Attention over packed clips ---


class BandedMask(NamedTuple):
    """Attention within a bounded window, as dense attention of short query blocks to the keys around them."""

    key_index: torch.Tensor  # (blocks, keys): packed rows
    mask: torch.Tensor  # (blocks, 1, queries, keys), bool


# Queries a block: long enough to keep the kernels busy, short enough to waste little on keys outside the window.
BAND_BLOCK = 128


def _in_window(distance: torch.Tensor, window: Window) -> torch.Tensor:
    """Whether a key at `distance` frames from its query is seen; -1 in the window is unbounded."""
    left, right = window
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return seen


def padded_mask(sequences: PackedSequences, window: Window) -> torch.Tensor:
    """(clips, 1, queries, keys) bool. A padded query sees itself, so that no softmax is over nothing."""
    position = torch.arange(sequences.max_seqlen, device=sequences.cu_seqlens.device)
    distance = position - position[:, None]
    return _in_window(distance, window) & sequences.mask[:, None, None, :] | (distance == 0)


def banded_mask(sequences: PackedSequences, window: Window) -> BandedMask:
    left, right = window
    device = sequences.cu_seqlens.device
    total = sequences.total
    blocks = torch.arange(-(-total // BAND_BLOCK), device=device)[:, None] * BAND_BLOCK
    query = blocks + torch.arange(BAND_BLOCK, device=device)
    key = blocks + torch.arange(-left, BAND_BLOCK + right, device=device)
    query_row, key_row = query.clamp(max=total - 1), key.clamp(0, total - 1)
    clip = sequences.sequence_ids
    mask = _in_window(key[:, None, :] - query[:, :, None], window)
    mask &= ((key >= 0) & (key < total))[:, None, :]
    mask &= clip[key_row][:, None, :] == clip[query_row][:, :, None]
    mask |= (query >= total)[:, :, None]
    return BandedMask(key_row, mask[:, None])


def sdpa_mask(sequences: PackedSequences, window: Window) -> torch.Tensor | BandedMask | None:
    if min(window) >= 0 and sum(window) + BAND_BLOCK < sequences.max_seqlen:
        return banded_mask(sequences, window)
    if window in ((-1, -1), (-1, 0)) and sequences.total == len(sequences) * sequences.max_seqlen:
        return None
    return padded_mask(sequences, window)


def eager_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    sequences: PackedSequences,
    window: Window,
) -> torch.Tensor:
    query, key, value = (sequences.pad(states).transpose(1, 2) for states in (query, key, value))
    weights = (query @ key.transpose(2, 3) * scaling).masked_fill(~attention_mask, -math.inf)
    weights = weights.softmax(-1, dtype=torch.float32).to(value.dtype)
    return sequences.unpad((weights @ value).transpose(1, 2))


def sdpa_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BandedMask | None,
    scaling: float,
    sequences: PackedSequences,
    window: Window,
) -> torch.Tensor:
    if isinstance(attention_mask, BandedMask):
        key_index, mask = attention_mask
        # A block sees keys of other clips, masked: their zero weights would not take away what is not finite.
        key, value = key.nan_to_num(), value.nan_to_num()
        total = query.shape[0]
        query = F.pad(query, (0, 0, 0, 0, 0, -total % BAND_BLOCK)).unflatten(0, (-1, BAND_BLOCK))
        query, key, value = (states.transpose(1, 2) for states in (query, key[key_index], value[key_index]))
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return output.transpose(1, 2).flatten(0, 1)[:total]
    if attention_mask is None:
        # Clips of one length: padded and packed are the same tensor.
        query, key, value = (
            states.unflatten(0, (len(sequences), -1)).transpose(1, 2) for states in (query, key, value)
        )
        output = F.scaled_dot_product_attention(query, key, value, is_causal=window[1] == 0, scale=scaling)
        return output.transpose(1, 2).flatten(0, 1)
    query, key, value = (sequences.pad(states).transpose(1, 2) for states in (query, key, value))
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return sequences.unpad(output.transpose(1, 2))


def torch_varlen_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    sequences: PackedSequences,
    window: Window,
) -> torch.Tensor:
    """PyTorch's own FlashAttention over packed clips (CUDA, float16 or bfloat16)."""
    from torch.nn.attention.varlen import varlen_attn  # takes a second to import, which only its users should pay

    cu_seqlens, max_seqlen = sequences.cu_seqlens, sequences.max_seqlen
    output = varlen_attn(
        query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scaling, window_size=window
    )
    return cast(torch.Tensor, output)


def flash_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    sequences: PackedSequences,
    window: Window,
) -> torch.Tensor:
    """The flash-attn package over packed clips (CUDA, float16 or bfloat16)."""
    cu_seqlens, max_seqlen = sequences.cu_seqlens, sequences.max_seqlen
    return flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=scaling,
        causal=window == (-1, 0),
        window_size=window,
    )


def apply_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half-split rotation of queries and keys (total_frames, heads, head_dim)."""

    def rotate(states: torch.Tensor) -> torch.Tensor:
        first, second = states.chunk(2, dim=-1)
        return torch.cat(
            [torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)], dim=-1
        )

    return rotate(query), rotate(key)


class AttentionBackend(NamedTuple):
    """How an `attn_implementation` computes attention over packed clips."""

    attend: Callable[..., torch.Tensor]
    # What `attend` takes as its attention_mask, made once a call for each window.
    make_mask: Callable[[PackedSequences, Window], Any] | None = None
    rotary: Callable[..., tuple[torch.Tensor, torch.Tensor]] = apply_rotary
    # Runs all layers of a stack and its final norm in its own way, where it can.
    run_layers: Callable[..., torch.Tensor] | None = None
    can_run_layers: Callable[..., bool] = lambda stack: True
    # Whether it takes float16 and bfloat16 on CUDA and nothing else.
    half_precision_on_cuda: bool = False
    # Whether the model may choose it by itself; asked where the model runs.
    is_default: Callable[[torch.device], bool] = lambda device: False


ATTENTION_BACKENDS: dict[str, AttentionBackend] = {}
# transformers' own default, and where nothing better is found.
DEFAULT_ATTN_IMPLEMENTATION = "sdpa"


def register_attention(name: str, attend: Callable[..., torch.Tensor], **kwargs: Any) -> None:
    """Adds an attention backend under a name that `attn_implementation` accepts; the last default one is preferred."""
    ATTENTION_BACKENDS[name] = AttentionBackend(attend, **kwargs)
    # transformers accepts the names that it knows. Its own functions under its own names stay what they are.
    if name not in ("eager", *AttentionInterface().valid_keys()):
        AttentionInterface.register(name, attend)


register_attention("eager", eager_attention_forward, make_mask=padded_mask)
register_attention("sdpa", sdpa_attention_forward, make_mask=sdpa_mask)
register_attention("flash_attention_2", flash_attention_forward, half_precision_on_cuda=True)
register_attention(
    "torch_varlen", torch_varlen_attention_forward, half_precision_on_cuda=True, is_default=lambda device: True
)


def rotary_embedding(
    position_ids: torch.Tensor, head_dim: int, theta: float, weight_dtype: torch.dtype, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (total_frames, 1, head_dim // 2) in `dtype`, computed in float32.

    A half-precision model rounds the inverse frequencies to its weights' dtype, as `model.bfloat16()` does upstream.
    """
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    frequencies = (1.0 / theta**exponents).to(weight_dtype).float()
    angles = position_ids.float()[:, None, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


class MiMoAudioTokenizerAttention(nn.Module):
    """Multi-head self-attention of each clip to itself, within a window of (left, right) frames."""

    # What a backend that runs whole layers has made ready of the projections.
    optimized: Any = None

    def __init__(self, dim: int, num_heads: int, window: Window) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.scaling = self.head_dim**-0.5
        self.window = window
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_masks: dict[Window, Any],
        sequences: PackedSequences,
        backend: AttentionBackend,
    ) -> torch.Tensor:
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = backend.rotary(query, key, *position_embeddings)
        output = backend.attend(
            query,
            key,
            value,
            attention_mask=attention_masks[self.window],
            scaling=self.scaling,
            sequences=sequences,
            window=self.window,
        )
        return self.out_proj(output.flatten(1))


# --- Transformer layers ---


def _norm(config: MiMoAudioTokenizerConfig, dim: int) -> nn.Module:
    return nn.RMSNorm(dim, eps=1e-6) if config.ln_type == "RMSNorm" else nn.LayerNorm(dim, eps=1e-5)


class MiMoAudioTokenizerLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer."""

    def __init__(
        self,
        config: MiMoAudioTokenizerConfig,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        window: Window,
    ) -> None:
        super().__init__()
        self.self_attn = MiMoAudioTokenizerAttention(dim, num_heads, window)
        self.self_attn_layer_norm = _norm(config, dim)
        self.activation_fn = ACT2FN[config.activation_function]
        self.fc1 = nn.Linear(dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, dim)
        self.final_layer_norm = _norm(config, dim)

    def forward(self, hidden_states: torch.Tensor, **attention_kwargs: Any) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(self.self_attn_layer_norm(hidden_states), **attention_kwargs)
        feed_forward = self.fc2(self.activation_fn(self.fc1(self.final_layer_norm(hidden_states))))
        hidden_states = hidden_states + feed_forward
        dtype = hidden_states.dtype
        if dtype == torch.float16 or (dtype == torch.bfloat16 and not hidden_states.requires_grad):
            # Unconditionally: looking for infinities first, as upstream does, would make every layer wait for the GPU.
            # bfloat16 reaches as far as float32: in training an infinity is to be seen, and the limit's gradient would
            # cost more than the norm's.
            limit = torch.finfo(hidden_states.dtype).max - 1000
            hidden_states = hidden_states.clamp(-limit, limit)
        return hidden_states


class MiMoAudioTokenizerStack(nn.Module):
    """Base of encoder, decoder and vocoder: `layers` and a final `layer_norm` over packed clips."""

    # What a backend that runs whole layers has made ready of them.
    optimized: Any = None

    def __init__(
        self,
        config: MiMoAudioTokenizerConfig,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        causal: bool,
        windows: Iterable[Sequence[int]],
    ) -> None:
        super().__init__()
        self.config = config
        self.head_dim = dim // num_heads
        # A layer's window is (left, right); what is causal sees nothing to the right.
        layer_windows = [(left, 0 if causal else right) for left, right in windows]
        self.windows: list[Window] = list(dict.fromkeys(layer_windows))
        self.layers = nn.ModuleList(
            MiMoAudioTokenizerLayer(config, dim, num_heads, ffn_dim, window) for window in layer_windows
        )
        self.layer_norm = _norm(config, dim)

    def run_layers(
        self,
        hidden_states: torch.Tensor,
        sequences: PackedSequences,
        backend: AttentionBackend,
        all_hidden_states: list[torch.Tensor] | None = None,
        skip_layer_id: int | None = None,
    ) -> torch.Tensor:
        """All layers in order, the skip connection from layer `skip_layer_id` (counted from 1) and the final norm.

        The input and every layer's output are appended to `all_hidden_states` where that is given.
        """
        position_embeddings = rotary_embedding(
            sequences.position_ids,
            self.head_dim,
            self.config.rope_theta,
            cast(torch.Tensor, self.layer_norm.weight).dtype,
            hidden_states.dtype,
        )
        attention_masks = {
            window: backend.make_mask(sequences, window) if backend.make_mask else None for window in self.windows
        }
        if backend.run_layers is not None and all_hidden_states is None and backend.can_run_layers(self):
            return backend.run_layers(
                self, hidden_states, position_embeddings, attention_masks, sequences, backend, skip_layer_id
            )
        skip = None
        for number, layer in enumerate(self.layers, start=1):
            if all_hidden_states is not None:
                all_hidden_states.append(hidden_states)
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_masks=attention_masks,
                sequences=sequences,
                backend=backend,
            )
            if number == skip_layer_id:
                skip = hidden_states
        if all_hidden_states is not None:
            all_hidden_states.append(hidden_states)
        if skip is not None:
            hidden_states = hidden_states + skip.to(hidden_states.device)  # the layers may lie on several devices
        return self.layer_norm(hidden_states)


# --- Residual vector quantizer ---


class MiMoAudioTokenizerCodebook(nn.Module):
    """One codebook: nearest entry by Euclidean distance; in training a moving average of what it quantizes.

    The buffers are upstream's: `embed` (the entries), `cluster_size` and `embed_avg` (moving counts and sums of the
    vectors that chose an entry) and `inited` (whether k-means has set the entries).
    """

    inited: torch.Tensor
    cluster_size: torch.Tensor
    embed: torch.Tensor
    embed_avg: torch.Tensor

    decay = 0.99
    epsilon = 1e-5
    kmeans_iterations = 50

    def __init__(self, codebook_size: int, dim: int, threshold_ema_dead_code: float) -> None:
        super().__init__()
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self._is_initialized = False  # what `inited` says, once it was asked: to ask is to wait for the GPU
        self.register_buffer("inited", torch.zeros(1))
        self.register_buffer("cluster_size", torch.zeros(codebook_size))
        self.register_buffer("embed", torch.empty(codebook_size, dim))
        self.register_buffer("embed_avg", torch.empty(codebook_size, dim))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._is_initialized = False
        super()._load_from_state_dict(*args, **kwargs)

    def entries(self, dtype: torch.dtype) -> torch.Tensor:
        """The entries in float32, rounded to the model's dtype first: a bfloat16 model has bfloat16 codebooks."""
        return self.embed.to(dtype).float()

    @staticmethod
    def nearest(x: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        """Index (n,) of the entry nearest to each float32 vector (n, dim); the first one on a tie."""
        return torch.addmm(entries.square().sum(-1), x, entries.t(), alpha=-2).argmin(-1)

    @torch.no_grad()
    def initialize(self, x: torch.Tensor) -> None:
        """K-means over the first training batch of all processes, unless the entries are set already."""
        if self._is_initialized:
            return
        self._is_initialized = True
        if self.inited.item():
            return
        size = self.embed.shape[0]
        means = _sample_rows(x, size)
        for _ in range(self.kmeans_iterations):
            counts, sums = self._count(x, self.nearest(x, means))
            means = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], means)
        counts, _ = self._count(x, self.nearest(x, means))
        self.embed.copy_(means)
        self.cluster_size.copy_(counts)
        self.embed_avg.copy_(means * counts[:, None])
        self.inited.fill_(1)

    @torch.no_grad()
    def update(self, x: torch.Tensor, codes: torch.Tensor) -> None:
        """Moves the entries toward the vectors (n, dim) that chose them, alike in all processes; revives dead ones.

        Upstream replaces dead entries before the update, which overwrites them; here they come back after it, with
        statistics that say they are worth keeping for a while.
        """
        counts, sums = self._count(x, codes)
        self.cluster_size.lerp_(counts.to(self.cluster_size.dtype), 1 - self.decay)
        self.embed_avg.lerp_(sums.to(self.embed_avg.dtype), 1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.epsilon) / (total + self.cluster_size.numel() * self.epsilon) * total
        self.embed.copy_(self.embed_avg / smoothed[:, None])
        threshold = self.threshold_ema_dead_code
        if threshold > 0:
            dead = self.cluster_size < threshold
            revived = _sample_rows(x, dead.numel()).to(self.embed.dtype)
            self.embed.copy_(torch.where(dead[:, None], revived, self.embed))
            self.embed_avg.copy_(torch.where(dead[:, None], threshold * revived, self.embed_avg))
            self.cluster_size.masked_fill_(dead, threshold)

    def _count(self, x: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many vectors chose each entry, and their sum, over all processes."""
        size = self.embed.shape[0]
        # Not by bincount, for which the GPU is waited for.
        counts = x.new_zeros(size).index_add_(0, codes, x.new_ones(len(codes)))
        sums = x.new_zeros(size, x.shape[1]).index_add_(0, codes, x)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        return counts, sums


def _sample_rows(x: torch.Tensor, size: int) -> torch.Tensor:
    """`size` random rows of x (n, dim), repeated where n is smaller; the first process's in every process."""
    rows = torch.randperm(x.shape[0], device=x.device).repeat(-(-size // x.shape[0]))[:size]
    sample = x[rows].contiguous()
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(sample, src=0)
    return sample


class MiMoAudioTokenizerVectorQuantization(nn.Module):
    """Holds a codebook under upstream's name."""

    def __init__(self, codebook_size: int, dim: int, threshold_ema_dead_code: float) -> None:
        super().__init__()
        self._codebook = MiMoAudioTokenizerCodebook(codebook_size, dim, threshold_ema_dead_code)


class MiMoAudioTokenizerResidualVectorQuantization(nn.Module):
    """Holds the codebooks under upstream's name."""

    def __init__(self, config: MiMoAudioTokenizerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            MiMoAudioTokenizerVectorQuantization(size, config.d_model, config.threshold_ema_dead_code)
            for size in config.codebook_sizes
        )


class CodebookSearch(Protocol):
    """Another way than codebook by codebook."""

    def encode(self, features: torch.Tensor, num_quantizers: int) -> torch.Tensor:
        """Features (n, dim) to codes (n, num_quantizers)."""

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (n, Q) to the sum (n, dim) of their entries."""


class MiMoAudioTokenizerResidualVectorQuantizer(nn.Module):
    """Residual vector quantizer: each codebook quantizes what the ones before it left over. Always in float32."""

    optimized: CodebookSearch | None = None

    def __init__(self, config: MiMoAudioTokenizerConfig) -> None:
        super().__init__()
        self.vq = MiMoAudioTokenizerResidualVectorQuantization(config)

    @property
    def codebooks(self) -> list[MiMoAudioTokenizerCodebook]:
        return [cast(MiMoAudioTokenizerVectorQuantization, layer)._codebook for layer in self.vq.layers]

    @torch.no_grad()
    def encode(self, features: torch.Tensor, num_quantizers: int, dtype: torch.dtype) -> torch.Tensor:
        """Features (n, dim) of a model in `dtype` to codes (n, num_quantizers) int64."""
        with torch.autocast(features.device.type, enabled=False):
            if self.optimized is not None:
                return self.optimized.encode(features, num_quantizers)
            residual = features.float()
            codes = []
            for codebook in self.codebooks[:num_quantizers]:
                entries = codebook.entries(dtype).to(residual.device)
                codes.append(codebook.nearest(residual, entries))
                residual = residual - F.embedding(codes[-1], entries)
        return torch.stack(codes, dim=-1)

    def decode(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Codes (n, Q) to the sum (n, dim) of their entries for a model in `dtype`: float32, or rounded to it."""
        if self.optimized is not None:
            return self.optimized.decode(codes)
        codebooks = self.codebooks[: codes.shape[-1]]
        table = torch.cat([codebook.entries(dtype) for codebook in codebooks])
        codes = codes.to(table.device)
        # Made on the device: a tensor from the host would have to be waited for.
        sizes = torch.cat([codes.new_full((1,), codebook.embed.shape[0]) for codebook in codebooks])
        return F.embedding_bag(codes + sizes.cumsum(0) - sizes, table, mode="sum")

    def forward(
        self, features: torch.Tensor, num_quantizers: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantized features (n, dim) float32, codes (n, num_quantizers) and the commitment loss.

        Where gradients are wanted, the quantized features pass theirs straight through to `features`; in training mode
        the codebooks move. As upstream: the straight-through residual is not detached, so only the first codebook's
        share of the commitment loss reaches the features.
        """
        if self.training and any(codebook.embed.dtype != torch.float32 for codebook in self.codebooks):
            raise ValueError(
                f"codebooks in {self.codebooks[0].embed.dtype} cannot be trained: moving averages would stand still; "
                "accepted: a float32 model (with autocast), or model.encoder.quantizer.eval()"
            )
        if not self.training and not (torch.is_grad_enabled() and features.requires_grad):
            codes = self.encode(features, num_quantizers, dtype)
            return self.decode(codes, dtype), codes, features.new_zeros((), dtype=torch.float32)
        codes_of_books, losses = [], []
        with torch.autocast(features.device.type, enabled=False):
            residual = features.float()
            quantized = torch.zeros_like(residual)
            for codebook in self.codebooks[:num_quantizers]:
                vectors = residual.detach()
                if self.training:
                    codebook.initialize(vectors)
                entries = codebook.entries(dtype)
                codes = codebook.nearest(vectors, entries)
                chosen = F.embedding(codes, entries)
                codes_of_books.append(codes)
                losses.append(F.mse_loss(residual, chosen))
                if self.training:
                    codebook.update(vectors, codes)
                passed = residual + (chosen - residual).detach()
                quantized = quantized + passed
                residual = residual - passed
        return quantized, torch.stack(codes_of_books, dim=-1), torch.stack(losses).mean()


# --- Encoder and decoder ---


class MiMoAudioTokenizerEncoder(MiMoAudioTokenizerStack):
    """Log-mel frames at 100 Hz to features at 25 Hz, ready to be quantized."""

    # Other ways, that `mimo_audio_hf.optimize_for_inference` gives, to the layout and from packed samples to log-mels.
    optimized_layout: Callable[..., MiMoAudioTokenizerEncoderLayout] | None = None
    optimized_log_mel: Callable[..., torch.Tensor] | None = None

    def __init__(self, config: MiMoAudioTokenizerConfig) -> None:
        windows = [config.encoder_attn_window_size] * config.encoder_layers
        if config.hybrid_attention:
            period = config.swa_per_block or 1
            windows = [window if i % period < period - 1 else [-1, -1] for i, window in enumerate(windows)]
        super().__init__(
            config,
            config.d_model,
            config.encoder_attention_heads,
            config.encoder_ffn_dim,
            config.encoder_causal,
            windows,
        )
        dim, kernel, pooler = config.d_model, config.kernel_size, config.avg_pooler
        self.conv1 = PackedConv1d(config.n_mels, dim, kernel, padding=1)
        self.conv2 = PackedConv1d(dim, dim, kernel, stride=config.stride_size, padding=1)
        # Upstream's down_sample_layer is a Sequential of this convolution and a GELU.
        self.down_sample_layer = nn.ModuleList([PackedConv1d(dim, dim, pooler, stride=pooler, bias=False)])
        self.down_sample_norm = _norm(config, dim)
        self.quantizer = MiMoAudioTokenizerResidualVectorQuantizer(config)

    def frame_length(self, length: Length) -> Length:
        """Mel frames of a clip to the layers' frames; a tensor has them of many."""
        return (length + 2 - self.config.kernel_size) // self.config.stride_size + 1

    def code_length(self, length: Length) -> Length:
        """Mel frames of a clip to code frames; a tensor has them of many."""
        return -(-self.frame_length(length) // self.config.avg_pooler)

    def code_lengths(self, lengths: Sequence[int]) -> list[int]:
        return self.code_length(torch.tensor(lengths, device="cpu")).tolist()

    def layout(
        self, lengths: Sequence[int], device: torch.device | str | None = None
    ) -> MiMoAudioTokenizerEncoderLayout:
        levels = torch.stack(self.level_lengths(torch.tensor(lengths, device="cpu")))
        return self.layout_of(*PackedBounds.of_levels(levels, device))

    def level_lengths(self, length: Length) -> tuple[Length, Length, Length]:
        """Mel frames of a clip, the layers' and code frames. A tensor has them of many clips."""
        return length, self.frame_length(length), self.code_length(length)

    def layout_of(self, *bounds: PackedBounds) -> MiMoAudioTokenizerEncoderLayout:
        """The layout of clips whose bounds at all levels are known."""
        if self.optimized_layout is not None and bounds[0].cu_seqlens.device == self.conv1.weight.device:
            return self.optimized_layout(self, bounds)
        mel, frames, codes = map(PackedSequences.at, bounds)
        kernel, stride, pooler = self.config.kernel_size, self.config.stride_size, self.config.avg_pooler
        return MiMoAudioTokenizerEncoderLayout(
            mel=mel,
            frames=frames,
            codes=codes,
            conv1_index=mel.conv_index(mel, kernel, stride=1, padding=1),
            conv2_index=mel.conv_index(frames, kernel, stride, padding=1),
            pool_index=frames.conv_index(codes, pooler, stride=pooler, padding=0),
        )

    def forward(
        self,
        input_features: torch.Tensor,
        layout: MiMoAudioTokenizerEncoderLayout,
        backend: AttentionBackend,
        all_hidden_states: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Packed log-mel frames (total_frames, n_mels) to features (total_codes, d_model)."""
        hidden_states = self.stem(input_features, layout.conv1_index, layout.conv2_index)
        hidden_states = self.run_layers(
            hidden_states, layout.frames, backend, all_hidden_states, self.config.encoder_skip_layer_id
        )
        return self.pool(hidden_states, layout.pool_index)

    def log_mel(self, samples: torch.Tensor, clips: PackedBounds, mel: PackedBounds) -> torch.Tensor:
        """Clips end to end, (total_samples,) float32, to what `encode` takes, (total_frames, n_mels).

        `clips` says where they lie, `mel` where their frames do: what a clip has more than its samples give is
        silence.
        """
        extractor = MiMoAudioTokenizerFeatureExtractor.from_config(self.config)
        if self.optimized_log_mel is not None:
            return self.optimized_log_mel(extractor, samples, clips, mel)
        lengths, frames = (each.cu_seqlens.diff().long() for each in (clips, mel))
        return extractor.log_mel_of_packed(samples, lengths, frames, mel.total)

    def stem(self, input_features: torch.Tensor, conv1_index: torch.Tensor, conv2_index: torch.Tensor) -> torch.Tensor:
        """Log-mel frames to what the layers take."""
        return F.gelu(self.conv2(F.gelu(self.conv1(input_features, conv1_index)), conv2_index))

    def pool(self, hidden_states: torch.Tensor, pool_index: torch.Tensor) -> torch.Tensor:
        """What the layers give to features."""
        return self.down_sample_norm(F.gelu(self.down_sample_layer[0](hidden_states, pool_index)))


class MiMoAudioTokenizerUpsample(nn.Module):
    """Transposed convolution and group norm."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.conv = PackedConvTranspose1d(in_channels, out_channels, kernel_size, stride=stride)
        self.norm = PackedGroupNorm(1, out_channels)

    def forward(self, hidden_states: torch.Tensor, index: torch.Tensor, outputs: PackedSequences) -> torch.Tensor:
        return self.norm(self.conv(hidden_states, index), outputs)


class MiMoAudioTokenizerISTFT(nn.Module):
    """Inverse STFT with "same" padding, in float32 whatever the model's dtype."""

    window: torch.Tensor

    def __init__(self, config: MiMoAudioTokenizerConfig) -> None:
        super().__init__()
        self.n_fft = config.nfft
        # Samples that divide hop, window and what "same" padding cuts: overlap-add moves blocks of them, not samples.
        self.cut = (config.nfft - config.hop_length) // 2
        self.block = math.gcd(config.nfft, config.hop_length, self.cut)
        # Kept for upstream's files. A half-precision model would round it, so the window is computed where it is used.
        self.register_buffer("window", torch.hann_window(config.nfft))

    def forward(self, spectrum: torch.Tensor, layout: MiMoAudioTokenizerDecoderLayout) -> torch.Tensor:
        """Packed complex spectrum (total_frames, n_fft // 2 + 1) to samples (total_blocks, block)."""
        window = torch.hann_window(self.n_fft, dtype=torch.float32, device=spectrum.device)
        frames = torch.fft.irfft(spectrum, self.n_fft) * window
        samples = gather_rows(frames.view(-1, self.block), layout.audio_index).sum(1)
        # The squared windows overlap as the frames do; row n of a frame's pieces holds the window's piece n % pieces.
        pieces = window.square().view(-1, self.block)
        inside = layout.audio_index < frames.numel() // self.block
        taps = torch.where(inside, layout.audio_index % pieces.shape[0], pieces.shape[0])
        return samples / gather_rows(pieces, taps).sum(1)


class MiMoAudioTokenizerISTFTHead(nn.Module):
    """Hidden states to log-magnitudes and phases, and those to samples."""

    # Largest magnitude of a spectrum's bin, as upstream has it.
    max_magnitude = 100.0
    # Another way from log-magnitudes and phases to samples.
    optimized: Callable[..., torch.Tensor] | None = None

    def __init__(self, config: MiMoAudioTokenizerConfig) -> None:
        super().__init__()
        self.out = nn.Linear(config.vocoder_dim, config.nfft + 2)
        self.istft = MiMoAudioTokenizerISTFT(config)

    def forward(self, hidden_states: torch.Tensor, layout: MiMoAudioTokenizerDecoderLayout) -> torch.Tensor:
        states = self.out(hidden_states)
        if self.optimized is not None and not states.requires_grad:
            return self.optimized(states, layout, self.istft, self.max_magnitude)
        log_magnitude, phase = states.float().chunk(2, dim=-1)
        # Limited before exp: past its overflow the gradient of a limit after it would be NaN.
        spectrum = torch.polar(log_magnitude.clamp(max=math.log(self.max_magnitude)).exp(), phase)
        return self.istft(spectrum, layout)


class MiMoAudioTokenizerVocoder(MiMoAudioTokenizerStack):
    """Vocos with transformer layers: frames at 100 Hz to samples."""

    def __init__(self, config: MiMoAudioTokenizerConfig) -> None:
        super().__init__(
            config,
            config.vocoder_dim,
            config.vocoder_attention_heads,
            config.vocoder_intermediate_dim,
            causal=False,
            windows=[config.vocoder_attn_window_size] * config.vocoder_num_layers,
        )
        self.embeddings = nn.Linear(config.n_mels, config.vocoder_dim, bias=False)
        self.head = MiMoAudioTokenizerISTFTHead(config)

    def forward(
        self, mel: torch.Tensor, layout: MiMoAudioTokenizerDecoderLayout, backend: AttentionBackend
    ) -> torch.Tensor:
        """Packed frames (total_frames, n_mels) to samples (total_blocks, block), float32."""
        hidden_states = self.run_layers(self.embeddings(mel), layout.mel, backend)
        return self.head(hidden_states, layout)


class MiMoAudioTokenizerDecoder(MiMoAudioTokenizerStack):
    """Quantized features at 25 Hz to samples."""

    # Another way to the layout, if `mimo_audio_hf.optimize_for_inference` gave one.
    optimized_layout: Callable[..., MiMoAudioTokenizerDecoderLayout] | None = None

    def __init__(self, config: MiMoAudioTokenizerConfig) -> None:
        super().__init__(
            config,
            config.d_model,
            config.decoder_attention_heads,
            config.decoder_ffn_dim,
            config.decoder_causal,
            [config.decoder_attn_window_size] * config.decoder_layers,
        )
        dim = config.d_model
        self.dconv1 = MiMoAudioTokenizerUpsample(dim, dim, config.avg_pooler, config.avg_pooler)
        self.dconv2 = MiMoAudioTokenizerUpsample(
            dim, config.n_mels, config.decoder_kernel_size, config.decoder_stride_size
        )
        self.vocoder = MiMoAudioTokenizerVocoder(config)

    def layout(
        self, lengths: Sequence[int], device: torch.device | str | None = None
    ) -> MiMoAudioTokenizerDecoderLayout:
        levels = torch.stack(self.level_lengths(torch.tensor(lengths, device="cpu")))
        return self.layout_of(*PackedBounds.of_levels(levels, device))

    def level_lengths(self, length: Length) -> tuple[Length, Length, Length, Length, Length]:
        """Code frames of a clip, and what they become: the layers' frames, mel frames before and after the cut, and
        blocks of samples. A tensor has them of many clips.
        """
        config = self.config
        frames = length * config.avg_pooler
        mel = frames * config.decoder_stride_size
        uncut = mel + config.decoder_kernel_size - config.decoder_stride_size
        return length, frames, uncut, mel, mel * (config.hop_length // self.vocoder.head.istft.block)

    def layout_of(self, *bounds: PackedBounds) -> MiMoAudioTokenizerDecoderLayout:
        """The layout of clips whose bounds at all levels are known."""
        if self.optimized_layout is not None and bounds[0].cu_seqlens.device == self.dconv1.conv.weight.device:
            return self.optimized_layout(self, bounds)
        codes, frames, uncut, mel, audio = map(PackedSequences.at, bounds)
        config, istft = self.config, self.vocoder.head.istft
        pooler, kernel, stride = config.avg_pooler, config.decoder_kernel_size, config.decoder_stride_size
        pieces, blocks_a_hop = config.nfft // istft.block, config.hop_length // istft.block
        return MiMoAudioTokenizerDecoderLayout(
            codes=codes,
            frames=frames,
            uncut=uncut,
            mel=mel,
            audio=audio,
            dconv1_index=codes.conv_transpose_index(frames, pooler, pooler),
            dconv2_index=frames.conv_transpose_index(uncut, kernel, stride),
            cut_index=uncut.cu_seqlens[mel.sequence_ids] + mel.position_ids,
            audio_index=mel.conv_transpose_index(audio, pieces, blocks_a_hop, offset=istft.cut // istft.block),
        )

    def forward(
        self,
        features: torch.Tensor,
        layout: MiMoAudioTokenizerDecoderLayout,
        backend: AttentionBackend,
        all_hidden_states: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Packed quantized features (total_codes, d_model) to samples (total_blocks, block), float32."""
        hidden_states = self.dconv1(features, layout.dconv1_index, layout.frames)
        hidden_states = self.run_layers(hidden_states, layout.frames, backend, all_hidden_states)
        uncut = self.dconv2(hidden_states, layout.dconv2_index, layout.uncut)
        mel = uncut[layout.cut_index.to(uncut.device)]
        return self.vocoder(mel, layout, backend)


# --- The model ---


@dataclass
class MiMoAudioTokenizerEncoderOutput(ModelOutput):
    r"""
    audio_codes (`torch.LongTensor` of shape `(batch_size, num_quantizers, code_frames)`):
        Codes; zero past each clip's end. Packed input gives `(total_codes, num_quantizers)`.
    audio_codes_mask (`torch.LongTensor` of shape `(batch_size, code_frames)`, padded input only):
        1 for a clip's codes, 0 for padding.
    latents (`torch.Tensor` of shape `(batch_size, code_frames, d_model)`, with `output_latents=True`):
        Features before quantization, with gradient. Packed input gives `(total_codes, d_model)`.
    hidden_states (`tuple` of tensors `(batch_size, frames, d_model)`, with `output_hidden_states=True`):
        The encoder layers' input and every layer's output, at 50 Hz. Packed input gives `(total_frames, d_model)`.
    """

    audio_codes: torch.Tensor | None = None
    audio_codes_mask: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class MiMoAudioTokenizerDecoderOutput(ModelOutput):
    r"""
    audio_values (`torch.FloatTensor` of shape `(batch_size, 1, samples_per_frame * code_frames)`):
        Waveforms, float32, zero past each clip's end. Packed input gives `(total_samples,)`.
    audio_lengths (`torch.LongTensor` of shape `(batch_size,)`): Samples of each clip.
    hidden_states (`tuple` of tensors `(batch_size, frames, d_model)`, with `output_hidden_states=True`):
        The decoder layers' input and every layer's output, at 50 Hz. Packed input gives `(total_frames, d_model)`.
    """

    audio_values: torch.Tensor | None = None
    audio_lengths: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class MiMoAudioTokenizerOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`, in training mode): Sum of the two below.
    commitment_loss (`torch.FloatTensor` of shape `()`, in training mode):
        Mean squared distance of the residuals to the entries chosen for them, averaged over the codebooks.
    reconstruction_loss (`torch.FloatTensor` of shape `()`, in training mode):
        Mean absolute difference of the waveforms' log-mels to `input_features`.
    audio_codes, audio_codes_mask, latents, hidden_states:
        As in [`MiMoAudioTokenizerEncoderOutput`].
    audio_values, audio_lengths: As in [`MiMoAudioTokenizerDecoderOutput`].
    decoder_hidden_states: The decoder's `hidden_states`.
    """

    loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    audio_codes: torch.Tensor | None = None
    audio_codes_mask: torch.Tensor | None = None
    audio_values: torch.Tensor | None = None
    audio_lengths: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None


class MiMoAudioTokenizerPreTrainedModel(PreTrainedAudioTokenizerBase):
    """Weight initialization, loading and attention backends."""

    config: MiMoAudioTokenizerConfig
    config_class = MiMoAudioTokenizerConfig
    base_model_prefix = "mimo_audio_tokenizer"
    main_input_name = "input_features"
    input_modalities = "audio"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiMoAudioTokenizerLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d)):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)):
            init.ones_(module.weight)
            if isinstance(bias := getattr(module, "bias", None), torch.Tensor):
                init.zeros_(bias)
        elif isinstance(module, MiMoAudioTokenizerCodebook):
            init.normal_(module.embed, mean=0.0, std=std)
            init.copy_(module.embed_avg, module.embed)
            init.zeros_(module.cluster_size)
            init.zeros_(module.inited)
        elif isinstance(module, MiMoAudioTokenizerISTFT):
            init.copy_(module.window, torch.hann_window(module.n_fft))

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True


class MiMoAudioTokenizerModel(MiMoAudioTokenizerPreTrainedModel):
    r"""
    The MiMo-Audio tokenizer.

    Example:

    ```python
    >>> from mimo_audio_hf import MiMoAudioTokenizerFeatureExtractor, MiMoAudioTokenizerModel, load_audio

    >>> model = MiMoAudioTokenizerModel.from_pretrained("XiaomiMiMo/MiMo-Audio-Tokenizer")
    >>> feature_extractor = MiMoAudioTokenizerFeatureExtractor.from_pretrained("XiaomiMiMo/MiMo-Audio-Tokenizer")
    >>> inputs = feature_extractor(load_audio("speech.wav"), sampling_rate=24000)
    >>> audio_codes = model.encode(**inputs).audio_codes  # (1, 20, frames)
    >>> audio_values = model.decode(audio_codes).audio_values  # (1, 1, 960 * frames)
    ```
    """

    def __init__(self, config: MiMoAudioTokenizerConfig) -> None:
        super().__init__(config)
        self._frozen = False
        # What runs calls on padded tensors as a whole, if it is given: mimo_audio_hf.optimize_for_inference does.
        self.graphs: Any = None
        self.encoder = MiMoAudioTokenizerEncoder(config)
        self.decoder = MiMoAudioTokenizerDecoder(config) if config.has_decoder else None
        self.post_init()

    # --- Loading ---

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but nothing is silently repaired and no pickle is loaded.

        A checkpoint without any decoder tensor (the `audio_tokenizer` folders of MiMo-V2's repositories, reached with
        `subfolder="audio_tokenizer"`) gives a model that only encodes; its tensors outside `encoder.` are ignored.

        Raises:
            ValueError: tensors are missing, unexpected or of another shape (named; `ignore_mismatched_sizes=True`
                lets the last pass), or the weights are a pickle.
        """
        if pretrained_model_name_or_path is None and not kwargs.get("state_dict"):
            return super().from_pretrained(None, *args, **kwargs)  # a fresh model is what is asked for
        if pretrained_model_name_or_path is not None:
            _refuse_pickle(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        output_loading_info = kwargs.pop("output_loading_info", False)
        allow_mismatched = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model, info = loaded
        if kwargs.get("attn_implementation") is not None:
            model.config._attn_implementation_is_default = False
        missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
        decoder_keys = {key for key in model.state_dict() if key.startswith("decoder.")}
        if model.decoder is None or decoder_keys <= missing:
            logger.info(f"{pretrained_model_name_or_path} holds no decoder: the model encodes only")
            model.decoder = None
            model.config.has_decoder = False
            missing -= decoder_keys
            unexpected = {key for key in unexpected if key.startswith("encoder.")}
        problems = [f"missing tensor {key}" for key in sorted(missing)]
        problems += [f"unexpected tensor {key}" for key in sorted(unexpected)]
        if not allow_mismatched:
            problems += [
                f"tensor {key} has shape {tuple(found)} instead of {tuple(expected)}"
                for key, found, expected in sorted(info["mismatched_keys"])
            ]
        if problems:
            more = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise ValueError(
                f"{pretrained_model_name_or_path} does not hold a checkpoint of this configuration: "
                + "; ".join(problems[:20])
                + more
            )
        return (model, info) if output_loading_info else model

    @classmethod
    def _from_config(cls, config: MiMoAudioTokenizerConfig, **kwargs: Any) -> Any:
        model = super()._from_config(config, **kwargs)
        if kwargs.get("attn_implementation") is not None:
            model.config._attn_implementation_is_default = False
        return model

    # --- Attention backends ---

    @property
    def attn_implementation(self) -> str:
        """The attention backend that the next call uses.

        What was asked for with `attn_implementation=` or `set_attn_implementation`; by default the best one for where
        the model is. In half precision on an NVIDIA GPU from compute capability 8.0 that is `"torch_varlen"`, or
        `"triton_varlen"` where the package offers its kernels; elsewhere it is `"sdpa"`.
        """
        devices = (parameter.device for parameter in self.parameters() if not parameter.is_meta)
        return self._attn_implementation_on(next(devices, torch.device("cpu")))

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any) -> None:
        self.drop_optimizations()
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        self.config._attn_implementation_is_default = False

    # --- What was made for the weights as they were ---

    def drop_optimizations(self) -> None:
        """Takes back what `mimo_audio_hf.optimize_for_inference` did, but for freezing."""
        self.graphs = None
        for module in self.modules():
            for name in ("optimized", "optimized_layout", "optimized_log_mel"):
                vars(module).pop(name, None)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.drop_optimizations()  # moved or cast
        return super()._apply(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.drop_optimizations()
        return super().load_state_dict(*args, **kwargs)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, is_init_check: bool = False, *args: Any, **kwargs: Any
    ) -> str:
        """transformers' check of what was asked for, with this model's own backends and no kernels from the Hub."""
        if attn_implementation is None:
            self.config._attn_implementation_is_default = True
            return DEFAULT_ATTN_IMPLEMENTATION
        if attn_implementation not in ATTENTION_BACKENDS:
            raise ValueError(
                f'Specified `attn_implementation="{attn_implementation}"` is not supported; '
                f"accepted: {', '.join(ATTENTION_BACKENDS)}"
            )
        return self.get_correct_attn_implementation(attn_implementation, is_init_check)

    def _attn_implementation_on(self, device: torch.device) -> str:
        chosen = self.config._attn_implementation
        if chosen != DEFAULT_ATTN_IMPLEMENTATION or not self.config._attn_implementation_is_default:
            return chosen
        autocast = torch.is_autocast_enabled(device.type)
        return _best_attn_implementation(
            device, torch.get_autocast_dtype(device.type) if autocast else self.weight_dtype
        )

    def attention_backend(self, device: torch.device) -> AttentionBackend:
        """What attends on a device; a ValueError if that does not run there in this dtype."""
        name = self._attn_implementation_on(device)
        backend = ATTENTION_BACKENDS[name]
        half_precision = self.weight_dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled("cuda")
        if backend.half_precision_on_cuda and not (device.type == "cuda" and half_precision):
            raise ValueError(
                f"attn_implementation={name!r} with a model in {self.weight_dtype} on {device}; accepted: "
                "float16 or bfloat16 on CUDA. Use attn_implementation='sdpa' elsewhere"
            )
        return backend

    # --- Modes ---

    def freeze(self) -> MiMoAudioTokenizerModel:
        """No gradients and evaluation mode for good: also when a surrounding model is put into training mode."""
        self._frozen = True
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> MiMoAudioTokenizerModel:
        return super().train(mode and not self._frozen)

    # --- Lengths ---

    def encoder_layout(
        self, lengths: Sequence[int], device: torch.device | str | None = None
    ) -> MiMoAudioTokenizerEncoderLayout:
        """What `encode(packed_features, layout=...)` takes for clips of these lengths in mel frames.

        `device` is where the model is by default; it has to be given where the weights are offloaded.
        """
        return self.encoder.layout(_check_lengths(lengths), device or self.encoder.conv1.weight.device)

    def decoder_layout(
        self, lengths: Sequence[int], device: torch.device | str | None = None
    ) -> MiMoAudioTokenizerDecoderLayout:
        """What `decode(packed_codes, layout=...)` takes for clips of these lengths in code frames; see
        `encoder_layout`.
        """
        decoder = self._require_decoder()
        return decoder.layout(_check_lengths(lengths), device or decoder.dconv1.conv.weight.device)

    def get_audio_codes_mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """Mask of the codes (batch_size, code_frames) that belongs to a mask of mel frames (batch_size, frames)."""
        (padded,) = self.encoder.code_lengths([attention_mask.shape[1]])
        lengths = self.encoder.code_length((attention_mask != 0).sum(-1))
        positions = torch.arange(padded, device=attention_mask.device)
        return (positions < lengths[:, None]).to(attention_mask.dtype)

    # --- The three methods ---

    @can_return_tuple
    def encode(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_quantizers: int | None = None,
        output_latents: bool = False,
        output_hidden_states: bool | None = None,
        layout: MiMoAudioTokenizerEncoderLayout | None = None,
    ) -> MiMoAudioTokenizerEncoderOutput:
        r"""
        Log-mel spectrograms to codes. Each clip's codes are those it has alone, whatever stands beside it and whatever
        its padding holds.

        Args:
            input_features (`torch.Tensor` of shape `(batch_size, n_mels, frames)`):
                Log-mel spectrograms as [`MiMoAudioTokenizerFeatureExtractor`] makes them; with `layout`, packed:
                `(total_frames, n_mels)`.
            attention_mask (`torch.Tensor` of shape `(batch_size, frames)`, *optional*):
                1 for a clip's frames, 0 for padding after them. All frames count by default.
            num_quantizers (`int`, *optional*): How many codebooks to use, from the first; all by default.
            output_latents (`bool`): Also return the features before quantization.
            output_hidden_states (`bool`, *optional*): Also return the encoder layers' outputs.
            layout ([`MiMoAudioTokenizerEncoderLayout`], *optional*):
                Lengths of packed input, from `encoder_layout`. Nothing is checked then and nothing waits for the GPU,
                and the call compiles with `fullgraph=True`.

        Returns:
            [`MiMoAudioTokenizerEncoderOutput`]

        Raises:
            ValueError: wrong shape or dtype, NaN or infinite features, a mask that is not a prefix of ones, or more
                codebooks than the model has.
        """
        num_quantizers = self.check_num_quantizers(num_quantizers)
        packed = layout is not None
        hidden_states = self._hidden_states_list(output_hidden_states)
        if layout is None:
            input_features, lengths = self._check_features(input_features, attention_mask)
            if self.graphs is not None and not output_latents and hidden_states is None and self.graphs.takes(lengths):
                codes, mask = self.graphs.encode_padded(input_features, lengths, num_quantizers)
                return MiMoAudioTokenizerEncoderOutput(audio_codes=codes, audio_codes_mask=mask)
            input_features, layout = self._pack_features(input_features, lengths)
        else:
            _check_packed("input_features", input_features, layout.mel, attention_mask)
        features = self._encode_features(input_features, layout, hidden_states)
        output = MiMoAudioTokenizerEncoderOutput(
            audio_codes=self.encoder.quantizer.encode(features, num_quantizers, self.weight_dtype),
            latents=features if output_latents else None,
            hidden_states=None if hidden_states is None else tuple(hidden_states),
        )
        return output if packed else _pad_encoder_output(output, layout)

    @can_return_tuple
    def decode(
        self,
        audio_codes: torch.Tensor,
        audio_codes_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        layout: MiMoAudioTokenizerDecoderLayout | None = None,
    ) -> MiMoAudioTokenizerDecoderOutput:
        r"""
        Codes to waveforms. Each clip's waveform is the one it has alone.

        Args:
            audio_codes (`torch.Tensor` of shape `(batch_size, num_quantizers, code_frames)`, integer):
                Codes of the first codebooks, as many as there are; with `layout`, packed:
                `(total_codes, num_quantizers)`.
            audio_codes_mask (`torch.Tensor` of shape `(batch_size, code_frames)`, *optional*):
                1 for a clip's codes, 0 for padding after them, whose codes are not read. All count by default.
            output_hidden_states (`bool`, *optional*): Also return the decoder layers' outputs.
            layout ([`MiMoAudioTokenizerDecoderLayout`], *optional*):
                Lengths of packed input, from `decoder_layout`. Nothing is checked then and nothing waits for the GPU,
                and the call compiles with `fullgraph=True`; see `check_codes`.

        Returns:
            [`MiMoAudioTokenizerDecoderOutput`]

        Raises:
            ValueError: wrong shape or dtype, codes out of range for their codebook, more codebooks than the model has,
                a mask that is not a prefix of ones, or a model without decoder.
        """
        self._require_decoder()
        packed = layout is not None
        hidden_states = self._hidden_states_list(output_hidden_states)
        if layout is None:
            audio_codes, lengths = self._check_codes(audio_codes, audio_codes_mask)
            if self.graphs is not None and hidden_states is None and self.graphs.takes_codes(lengths):
                waveforms = self.graphs.decode_padded(audio_codes, lengths)
                samples = upload(torch.tensor(lengths) * self.config.samples_per_frame, waveforms.device)
                return MiMoAudioTokenizerDecoderOutput(audio_values=waveforms, audio_lengths=samples)
            device = _compute_device(self._require_decoder().dconv1.conv.weight, audio_codes)
            layout = self.decoder_layout(lengths, device)
            audio_codes = layout.codes.unpad(audio_codes.to(device).transpose(1, 2))
        else:
            _check_packed("audio_codes", audio_codes, layout.codes, audio_codes_mask)
        features = self.encoder.quantizer.decode(audio_codes.long(), self.weight_dtype)
        output = self._decode_features(features, layout, hidden_states)
        return output if packed else _pad_decoder_output(output, layout)

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_quantizers: int | None = None,
        output_latents: bool = False,
        output_hidden_states: bool | None = None,
    ) -> MiMoAudioTokenizerOutput:
        r"""
        Encodes and decodes. In training mode the decoder's gradient passes straight through the quantizer, the
        codebooks move (unless `model.encoder.quantizer` is in evaluation mode), and the losses are returned.

        Args:
            input_features, attention_mask, num_quantizers, output_latents, output_hidden_states: As in `encode`.

        Returns:
            [`MiMoAudioTokenizerOutput`]

        Raises:
            ValueError: as `encode`; or the model has no decoder.
        """
        self._require_decoder()
        num_quantizers = self.check_num_quantizers(num_quantizers)
        input_features, lengths = self._check_features(input_features, attention_mask)
        input_features, layout = self._pack_features(input_features, lengths)
        hidden_states = self._hidden_states_list(output_hidden_states)
        decoder_hidden_states = self._hidden_states_list(output_hidden_states)
        features = self._encode_features(input_features, layout, hidden_states)
        quantizer = self.encoder.quantizer
        quantized, codes, commitment_loss = quantizer(features, num_quantizers, self.weight_dtype)
        encoded = MiMoAudioTokenizerEncoderOutput(
            audio_codes=codes,
            latents=features if output_latents else None,
            hidden_states=None if hidden_states is None else tuple(hidden_states),
        )
        encoded = _pad_encoder_output(encoded, layout)
        device = _compute_device(self._require_decoder().dconv1.conv.weight, input_features)
        code_lengths = self.encoder.code_lengths(lengths)
        decoder_layout = self.decoder_layout(code_lengths, device)
        decoded = _pad_decoder_output(
            self._decode_features(quantized, decoder_layout, decoder_hidden_states), decoder_layout
        )
        losses = {}
        if self.training:
            waveforms = cast(torch.Tensor, decoded.audio_values)
            reconstruction_loss = self._reconstruction_loss(waveforms, code_lengths, input_features, lengths)
            losses = {
                "loss": reconstruction_loss + commitment_loss,
                "commitment_loss": commitment_loss,
                "reconstruction_loss": reconstruction_loss,
            }
        return MiMoAudioTokenizerOutput(
            **losses,
            audio_values=decoded.audio_values,
            audio_lengths=decoded.audio_lengths,
            decoder_hidden_states=decoded.hidden_states,
            **encoded,
        )

    # --- Between the edges and the packed core ---

    @property
    def weight_dtype(self) -> torch.dtype:
        """That of the encoder's weights, in which features are taken."""
        return self.encoder.conv1.weight.dtype

    def _hidden_states_list(self, output_hidden_states: bool | None) -> list[torch.Tensor] | None:
        """Where a stack of layers puts its hidden states, if they are wanted."""
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return [] if wanted else None

    def _require_decoder(self) -> MiMoAudioTokenizerDecoder:
        if self.decoder is None:
            raise ValueError(
                f"{self.config.name_or_path or 'this model'} holds an encoder only (as MiMo-V2's audio tokenizers "
                "do): it encodes, but cannot decode"
            )
        return self.decoder

    def check_num_quantizers(self, num_quantizers: int | None) -> int:
        """How many codebooks to use, all by default; a ValueError if the model does not have that many."""
        if num_quantizers is None:
            return self.config.num_quantizers
        if type(num_quantizers) is not int or not 1 <= num_quantizers <= self.config.num_quantizers:
            raise ValueError(f"num_quantizers={num_quantizers!r}; accepted: 1 to {self.config.num_quantizers}")
        return num_quantizers

    def check_codes(self, audio_codes: torch.Tensor) -> None:
        """Raises a ValueError that names the codebook where packed codes (total_codes, Q) are out of range."""
        check_code_range(audio_codes, self.config.codebook_sizes)

    def _check_features(
        self, input_features: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[int]]:
        """The features as a tensor, and the clips' lengths in mel frames."""
        input_features = _as_tensor("input_features", input_features)
        n_mels = self.config.n_mels
        shape = tuple(input_features.shape)
        if len(shape) != 3 or shape[1] != n_mels or 0 in shape:
            raise ValueError(f"input_features have shape {shape}; accepted: (batch_size, {n_mels}, frames)")
        if not input_features.is_floating_point():
            raise ValueError(f"input_features are {input_features.dtype}; accepted: floats")
        return input_features, _mask_lengths("attention_mask", attention_mask, shape[0], shape[2])

    def _pack_features(
        self, input_features: torch.Tensor, lengths: list[int]
    ) -> tuple[torch.Tensor, MiMoAudioTokenizerEncoderLayout]:
        device = _compute_device(self.encoder.conv1.weight, input_features)
        layout = self.encoder_layout(lengths, device)
        packed = layout.mel.unpad(input_features.to(device).transpose(1, 2))
        if not torch.isfinite(packed).all():
            raise not_finite_error(int(layout.mel.sequence_ids[~torch.isfinite(packed).all(-1)][0]))
        return packed, layout

    def _check_codes(
        self, audio_codes: torch.Tensor, audio_codes_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[int]]:
        """The codes as an int64 tensor, and the clips' lengths in code frames."""
        audio_codes = _as_tensor("audio_codes", audio_codes)
        shape = tuple(audio_codes.shape)
        if len(shape) != 3 or 0 in shape:
            raise ValueError(f"audio_codes have shape {shape}; accepted: (batch_size, num_quantizers, code_frames)")
        if audio_codes.is_floating_point() or audio_codes.is_complex() or audio_codes.dtype == torch.bool:
            raise ValueError(f"audio_codes are {audio_codes.dtype}; accepted: integers")
        if shape[1] > self.config.num_quantizers:
            raise ValueError(
                f"audio_codes hold {shape[1]} codebooks (shape {shape}); accepted: 1 to {self.config.num_quantizers}"
            )
        lengths = _mask_lengths("audio_codes_mask", audio_codes_mask, shape[0], shape[2])
        audio_codes = audio_codes.long()
        # Where they are, before anything is moved: an index out of range would take a GPU down.
        ends = torch.tensor(lengths, device=audio_codes.device)
        read = torch.arange(shape[2], device=audio_codes.device) < ends[:, None]
        sizes = self.config.codebook_sizes
        outside = _out_of_range(audio_codes.transpose(1, 2), sizes) & read[..., None]
        if outside.any():
            clip, frame, book = outside.nonzero()[0].tolist()
            code = int(audio_codes[clip, book, frame])
            raise _range_error(f"audio_codes of clip {clip}", code, book, sizes)
        return audio_codes, lengths

    def _reconstruction_loss(
        self,
        audio_values: torch.Tensor,
        code_lengths: list[int],
        packed_features: torch.Tensor,
        lengths: list[int],
    ) -> torch.Tensor:
        extractor = MiMoAudioTokenizerFeatureExtractor.from_config(self.config)
        samples_per_frame = self.config.samples_per_frame
        reconstructed = [
            # Cut at the clip's own end: padding would change its last frames.
            extractor.log_mel_spectrogram(waveform[0, : codes * samples_per_frame])[:, :length].t()
            for waveform, codes, length in zip(audio_values, code_lengths, lengths, strict=True)
        ]
        packed_features = packed_features.to(audio_values.device)
        return F.l1_loss(torch.cat(reconstructed), packed_features.float())

    def _encode_features(
        self,
        input_features: torch.Tensor,
        layout: MiMoAudioTokenizerEncoderLayout,
        hidden_states: list[torch.Tensor] | None,
    ) -> torch.Tensor:
        backend = self.attention_backend(layout.mel.cu_seqlens.device)
        return self.encoder(input_features.to(self.weight_dtype), layout, backend, hidden_states)

    def _decode_features(
        self,
        features: torch.Tensor,
        layout: MiMoAudioTokenizerDecoderLayout,
        hidden_states: list[torch.Tensor] | None,
    ) -> MiMoAudioTokenizerDecoderOutput:
        device = layout.codes.cu_seqlens.device
        features = features.to(device, self.weight_dtype)
        samples = self._require_decoder()(features, layout, self.attention_backend(device), hidden_states)
        return MiMoAudioTokenizerDecoderOutput(
            audio_values=samples.flatten(),
            audio_lengths=layout.codes.lengths.long() * self.config.samples_per_frame,
            hidden_states=None if hidden_states is None else tuple(hidden_states),
        )


@torch.compiler.assume_constant_result  # decided once, when a graph is compiled
def _best_attn_implementation(device: torch.device, dtype: torch.dtype) -> str:
    if (
        device.type == "cuda"
        and torch.version.cuda is not None
        and dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(device) >= (8, 0)
    ):
        return next(name for name, backend in reversed(ATTENTION_BACKENDS.items()) if backend.is_default(device))
    return DEFAULT_ATTN_IMPLEMENTATION


def _compute_device(weight: torch.Tensor, data: torch.Tensor) -> torch.device:
    """Where a module runs: where its weights are, or where its input is if accelerate has offloaded them."""
    return data.device if weight.is_meta else weight.device


def not_finite_error(clip: int) -> ValueError:
    return ValueError(f"input_features of clip {clip} are NaN or infinite; accepted: finite log-mels")


def check_code_range(audio_codes: torch.Tensor, codebook_sizes: Sequence[int]) -> None:
    """Raises a ValueError that names the codebook where packed codes (total_codes, Q) are out of range."""
    outside = _out_of_range(audio_codes.long(), codebook_sizes)
    if outside.any():
        frame, book = outside.nonzero()[0].tolist()
        code = int(audio_codes[frame, book].cpu().numpy())  # torch's own int() has no room for uint64
        raise _range_error("audio_codes", code, book, codebook_sizes)


def _out_of_range(audio_codes: torch.Tensor, codebook_sizes: Sequence[int]) -> torch.Tensor:
    """Which codes (..., Q) their codebook does not have."""
    sizes = torch.tensor(codebook_sizes[: audio_codes.shape[-1]], device=audio_codes.device)
    return (audio_codes < 0) | (audio_codes >= sizes)


def _range_error(name: str, code: int, book: int, codebook_sizes: Sequence[int]) -> ValueError:
    last = codebook_sizes[book] - 1
    return ValueError(f"{name} hold {code} for codebook {book} (counted from 0); accepted: 0 to {last}")


def _as_tensor(name: str, value: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: {error}; accepted: a tensor or an array") from error


def _check_packed(name: str, packed: torch.Tensor, sequences: PackedSequences, mask: torch.Tensor | None) -> None:
    """What can be checked of packed input without waiting for the GPU."""
    if mask is not None:
        raise ValueError(f"{name} with a layout and a mask; accepted: one of the two")
    if packed.ndim != 2 or packed.shape[0] != sequences.total:
        raise ValueError(
            f"{name} have shape {tuple(packed.shape)}; accepted: ({sequences.total}, ...), as the layout says"
        )


def _check_lengths(lengths: Sequence[int]) -> list[int]:
    lengths = [int(length) for length in lengths]
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths={lengths}; accepted: one or more frames for each clip")
    return lengths


def _mask_lengths(name: str, mask: torch.Tensor | None, batch_size: int, frames: int) -> list[int]:
    """Lengths of the clips behind a padding mask: the one time that a batch on the GPU is waited for."""
    if mask is None:
        return [frames] * batch_size
    mask = _as_tensor(name, mask)
    if tuple(mask.shape) != (batch_size, frames):
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; accepted: {(batch_size, frames)}")
    mask = mask.cpu()
    lengths = (mask != 0).sum(-1)
    prefix = torch.arange(frames) < lengths[:, None]
    for clip, good in enumerate((mask == prefix).all(-1).tolist()):
        if not good or lengths[clip] == 0:
            raise ValueError(f"{name} of clip {clip} is not a prefix of ones; accepted: one or more ones, then zeros")
    return lengths.tolist()


def _pad_encoder_output(
    output: MiMoAudioTokenizerEncoderOutput, layout: MiMoAudioTokenizerEncoderLayout
) -> MiMoAudioTokenizerEncoderOutput:
    return MiMoAudioTokenizerEncoderOutput(
        audio_codes=layout.codes.pad(cast(torch.Tensor, output.audio_codes)).transpose(1, 2).contiguous(),
        audio_codes_mask=layout.codes.mask.long(),
        latents=None if output.latents is None else layout.codes.pad(output.latents),
        hidden_states=None
        if output.hidden_states is None
        else tuple(layout.frames.pad(states) for states in output.hidden_states),
    )


def _pad_decoder_output(
    output: MiMoAudioTokenizerDecoderOutput, layout: MiMoAudioTokenizerDecoderLayout
) -> MiMoAudioTokenizerDecoderOutput:
    blocks = cast(torch.Tensor, output.audio_values).view(layout.audio.total, -1)
    return MiMoAudioTokenizerDecoderOutput(
        audio_values=layout.audio.pad(blocks).flatten(1)[:, None],
        audio_lengths=output.audio_lengths,
        hidden_states=None
        if output.hidden_states is None
        else tuple(layout.frames.pad(states) for states in output.hidden_states),
    )


def _refuse_pickle(folder: Path) -> None:
    if not folder.is_dir() or any(folder.glob("model*.safetensors")):
        return
    pickles = sorted(file.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(suffix))
    if pickles:
        raise ValueError(f"{folder / pickles[0]} is a pickle, which is never loaded; accepted: model.safetensors")


__all__ = [
    "MiMoAudioTokenizerDecoderLayout",
    "MiMoAudioTokenizerDecoderOutput",
    "MiMoAudioTokenizerEncoderLayout",
    "MiMoAudioTokenizerEncoderOutput",
    "MiMoAudioTokenizerModel",
    "MiMoAudioTokenizerOutput",
    "MiMoAudioTokenizerPreTrainedModel",
    "PackedSequences",
    "PackedBounds",
]
