"""Which layers run fused, and which as they are."""

from __future__ import annotations

import pytest
import torch
from golden import load_golden
from torch import nn


pytest.importorskip("triton")
from mimo_audio_hf import fused  # noqa: E402 (which imports Triton)


def do_nothing(module: nn.Module, *arguments: object) -> None:
    pass


def watched(layer: nn.Module) -> None:
    layer.fc1.register_forward_hook(do_nothing)


def activation_watched(layer: nn.Module) -> None:
    layer.activation_fn.register_forward_pre_hook(do_nothing)


def replaced(layer: nn.Module) -> None:
    layer.fc1 = nn.Sequential(layer.fc1)


def another_activation(layer: nn.Module) -> None:
    layer.activation_fn = nn.ReLU()


def without_a_bias(layer: nn.Module) -> None:
    layer.fc1 = nn.Linear(layer.fc1.in_features, layer.fc1.out_features, bias=False)


def moved(layer: nn.Module) -> None:
    layer.self_attn.forward = layer.self_attn.forward  # as accelerate wraps what it moves


def run_again(layer: nn.Module) -> None:
    layer.gradient_checkpointing = True


def compiled(layer: nn.Module) -> None:
    layer.compile()


@pytest.mark.parametrize(
    "change",
    [watched, activation_watched, replaced, another_activation, without_a_bias, moved, run_again, compiled],
)
def test_what_was_changed_is_not_fused(change):
    stack = load_golden("base").encoder
    assert fused.can_fuse(stack)
    change(stack.layers[1])
    assert not fused.can_fuse(stack)


def test_the_final_norm_is_looked_at():
    stack = load_golden("base").decoder
    handle = stack.layer_norm.register_forward_hook(do_nothing)
    assert not fused.can_fuse(stack)
    handle.remove()
    assert fused.can_fuse(stack)


def test_what_is_compiled_is_not_fused():
    stack = load_golden("base").encoder

    @torch.compile(fullgraph=True, backend="eager")
    def fuses(states: torch.Tensor) -> torch.Tensor:
        return states + 1 if fused.can_fuse(stack) else states

    assert fuses(torch.zeros(1)) == 0
