# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""What the model's parts remember of streams, so that they run on new frames only.

Rows stand for streams: a call runs some of them, all with the same number of new frames, each at its own position.
A call changes nothing that it would need when it is repeated, until it is told that all went well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .modeling_mimo_audio_tokenizer import (
    AttentionBackend,
    MiMoAudioTokenizerStack,
    PackedGroupNorm,
    PackedSequences,
    Window,
    apply_rotary,
    rotary_embedding,
)


# Angles of RoPE are float32: past this position (11 minutes at 50 Hz) a stream's positions start at 0 again, and its
# keys are turned back by as much.
MAX_POSITION = 2**15


@dataclass(frozen=True)
class StreamRows:
    """The streams that a call runs.

    Attributes:
        table (`torch.Tensor` of shape `(3, streams)`, int64, on the device):
            Each stream's row; how many frames it has had; the position that RoPE counts from.
        are_first (`bool`): Whether the rows are 0, 1, ... in order, so that they need not be gathered.
        end (`int`): Frames that the furthest of the streams has had.
    """

    table: torch.Tensor
    are_first: bool
    end: int

    def __len__(self) -> int:
        return self.table.shape[1]

    @property
    def index(self) -> torch.Tensor:
        return self.table[0]

    @property
    def positions(self) -> torch.Tensor:
        return self.table[1]

    @property
    def origins(self) -> torch.Tensor:
        return self.table[2]

    def take(self, states: torch.Tensor) -> torch.Tensor:
        """These streams' rows of a cache."""
        return states[: len(self)] if self.are_first else states[self.index]


class KeyValueCache:
    """Keys and values of a stack of causal layers: each layer's last ones, as far back as it looks.

    Args:
        stack: encoder or decoder; none of its layers may look ahead.
        rows: how many streams.
        max_frames: the most new frames of a stream in one call.
        limit: how many frames back layers without a window look; None is all of them, in memory that grows with the
            streams.
        device, dtype: of keys and values.
    """

    def __init__(
        self,
        stack: MiMoAudioTokenizerStack,
        *,
        rows: int,
        max_frames: int,
        limit: int | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        if any(right != 0 for _, right in stack.windows):
            raise ValueError(f"layers with windows {stack.windows}; accepted: layers that do not look ahead")
        self.stack = stack
        self.max_frames = max_frames
        self.device = device
        # Frames that each stream has had, and the one that RoPE counts from.
        self.positions = [0] * rows
        self._origins = [0] * rows
        self._windows: dict[Window, int | None] = {
            window: limit if window[0] < 0 else window[0] if limit is None else min(window[0], limit)
            for window in stack.windows
        }
        # Rings: the frame at position p lies in slot p % slots. What a call overwrites no layer looks back to.
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        weight: Any = stack.layer_norm.weight
        heads = weight.shape[0] // stack.head_dim
        for layer in stack.layers:
            slots = (self._windows[self._window_of(layer)] or 0) + max_frames
            for states in (self._keys, self._values):
                states.append(torch.zeros(rows, slots, heads, stack.head_dim, device=device, dtype=dtype))

    @property
    def is_bounded(self) -> bool:
        """Whether all layers look back so far and no further."""
        return None not in self._windows.values()

    def table(self, rows: Sequence[int]) -> torch.Tensor:
        """What [`StreamRows`] has for these rows, on the host."""
        positions, origins = ([each[row] for row in rows] for each in (self.positions, self._origins))
        return torch.tensor([[*rows], positions, origins])

    def rows(self, rows: Sequence[int]) -> StreamRows:
        """These rows, for a call."""
        are_first = list(rows) == list(range(len(rows)))
        return StreamRows(self.table(rows).to(self.device), are_first, max(self.positions[row] for row in rows))

    def run(self, hidden_states: torch.Tensor, rows: StreamRows, skip_layer_id: int | None = None) -> torch.Tensor:
        """All layers and the final norm over new frames. Does not wait for the device.

        Args:
            hidden_states: (len(rows) * frames, dim), stream after stream, at most `max_frames` each.
            rows: the streams.
            skip_layer_id: as in the stack's `run_layers`.

        Returns:
            (len(rows) * frames, dim)
        """
        frames = len(hidden_states) // len(rows)
        new = rows.positions[:, None] + torch.arange(frames, device=self.device)
        packed = PackedSequences.from_tensor(rows.index.new_full((len(rows),), frames), len(hidden_states), frames)
        place = (new - rows.origins[:, None]).flatten()
        sequences = PackedSequences(packed.cu_seqlens, frames, place, packed.sequence_ids)
        caches = zip(self._keys, self._values, strict=True)  # the layers attend in order

        def make_mask(sequences: PackedSequences, window: Window) -> tuple[torch.Tensor, torch.Tensor]:
            """Slots (streams, frames) of the new frames, and which slots they see (streams, 1, frames, slots)."""
            left = self._windows[window]
            slots = self._grow(window, rows.end + frames) if left is None else left + self.max_frames
            # All of a ring, for its size does not change from call to call; of what grows, as much as there is.
            slot = torch.arange(slots if left is not None else rows.end + frames, device=self.device)
            # Whose frame is in a slot, new ones included: the last position that falls into it.
            last = rows.positions[:, None] + frames - 1
            held = last - (last - slot) % slots
            seen = (held[:, None, :] <= new[:, :, None]) & (held[:, None, :] >= 0)
            if left is not None:
                seen &= held[:, None, :] >= new[:, :, None] - left
            return new % slots, seen[:, None]

        def attend(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: tuple[torch.Tensor, torch.Tensor],
            scaling: float,
            sequences: PackedSequences,
            window: Window,
        ) -> torch.Tensor:
            slot, mask = attention_mask
            keys, values = next(caches)
            for cached, states in ((keys, key), (values, value)):
                cached[rows.index[:, None], slot] = states.unflatten(0, (len(rows), -1)).to(cached.dtype)
            query = query.unflatten(0, (len(rows), -1)).transpose(1, 2).to(keys.dtype)
            keys, values = (rows.take(cached)[:, : mask.shape[-1]].transpose(1, 2) for cached in (keys, values))
            output = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
            return output.transpose(1, 2).flatten(0, 1)

        backend = AttentionBackend(attend, make_mask=make_mask)
        return self.stack.run_layers(hidden_states, sequences, backend, skip_layer_id=skip_layer_id)

    def advance(self, rows: Sequence[int], frames: int) -> None:
        """Keeps what the last call of `run` added for these streams."""
        for row in rows:
            self.positions[row] += frames
            shift = self.positions[row] - self._origins[row]
            if shift >= MAX_POSITION:
                self._turn_back(row, shift)
                self._origins[row] = self.positions[row]

    def reset(self, row: int) -> None:
        """Forgets a stream."""
        self.positions[row] = self._origins[row] = 0
        for states in self.tensors():
            states[row] = 0  # masked, but a weight of zero would not take away what is not finite

    def add_rows(self, rows: int) -> None:
        """Room for more streams."""
        self.positions += [0] * rows
        self._origins += [0] * rows
        for states in (self._keys, self._values):
            states[:] = [torch.cat([each, each.new_zeros(rows, *each.shape[1:])]) for each in states]

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from self._keys
        yield from self._values

    def _grow(self, window: Window, end: int) -> int:
        """Room for all frames before `end` in the layers of a window that is not bounded; the number of slots."""
        slots = 0
        for number, layer in enumerate(self.stack.layers):
            if self._window_of(layer) != window:
                continue
            slots = self._keys[number].shape[1]
            if slots < end:
                slots = max(end, 2 * slots)
                for states in (self._keys, self._values):
                    missing = slots - states[number].shape[1]
                    states[number] = F.pad(states[number], (0, 0, 0, 0, 0, missing))
        return slots

    @staticmethod
    def _window_of(layer: Any) -> Window:
        return layer.self_attn.window

    def _turn_back(self, row: int, frames: int) -> None:
        weight: Any = self.stack.layer_norm.weight
        for keys in self._keys:
            position = torch.tensor([-frames], device=keys.device)
            cos, sin = rotary_embedding(
                position, self.stack.head_dim, self.stack.config.rope_theta, weight.dtype, torch.float32
            )
            turned, _ = apply_rotary(keys[row].float(), keys[row].float(), cos, sin)
            keys[row] = turned.to(keys.dtype)


class RunningGroupNorm:
    """A group norm whose statistics are those of all frames that a stream has had so far.

    Args:
        norm: the model's.
        rows: how many streams.
        device: of the statistics, which are float32.
    """

    def __init__(self, norm: PackedGroupNorm, *, rows: int, device: torch.device) -> None:
        self.norm = norm
        self.mean = torch.zeros(rows, device=device)
        self.variance = torch.zeros(rows, device=device)

    def include(
        self, hidden_states: torch.Tensor, rows: StreamRows, before: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance (streams,) of all frames of these streams: new ones (streams, frames, dim), and as many as
        there were `before` (streams,).
        """
        x = hidden_states.float().flatten(1)
        frames = hidden_states.shape[1]
        weight = frames / (frames + before.float())
        mean, variance = x.mean(1), x.var(1, correction=0)
        old_mean, old_variance = rows.take(self.mean), rows.take(self.variance)
        spread = weight * (1 - weight) * (mean - old_mean).square()
        return torch.lerp(old_mean, mean, weight), torch.lerp(old_variance, variance, weight) + spread

    def normalize(self, hidden_states: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        """Frames (streams, frames, dim) with the statistics (streams,)."""
        scale = (variance + self.norm.eps).rsqrt()[:, None, None]
        centered = (hidden_states.float() - mean[:, None, None]) * scale
        return (centered * self.norm.weight + self.norm.bias).to(hidden_states.dtype)

    def keep(self, rows: StreamRows, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Remembers what `include` has found."""
        self.mean[rows.index] = mean
        self.variance[rows.index] = variance

    def reset(self, row: int) -> None:
        """Forgets a stream."""
        self.mean[row] = self.variance[row] = 0  # so that nothing that is not finite stays

    def add_rows(self, rows: int) -> None:
        """Room for more streams."""
        self.mean, self.variance = (torch.cat([each, each.new_zeros(rows)]) for each in (self.mean, self.variance))


__all__ = ["KeyValueCache", "RunningGroupNorm", "StreamRows"]
