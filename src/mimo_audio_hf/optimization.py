# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""The fast path: one call makes a loaded model as fast as its device allows."""

from __future__ import annotations

from typing import cast

import torch
from transformers.utils import logging

from . import kernels
from .graphs import GraphRunner
from .modeling_mimo_audio_tokenizer import MiMoAudioTokenizerLayer, MiMoAudioTokenizerModel, MiMoAudioTokenizerStack


logger = logging.get_logger(__name__)


def optimize_for_inference(
    model: MiMoAudioTokenizerModel, *, cuda_graphs: bool | None = None
) -> MiMoAudioTokenizerModel:
    """Make a model as fast as its device allows, for inference alone.

    The model is changed in place and frozen: it must not be moved, cast or trained afterwards. Its results are those
    of another order of the same sums: codes agree with the plain path's as those of two attention backends agree.

    In half precision on an NVIDIA GPU, where the attention backend is `"triton_varlen"`, the projections to queries,
    keys and values become one product (in memory; `state_dict` and saved files keep their names), and the codebooks
    are searched in one product and one kernel. On any NVIDIA GPU, calls of up to seven minutes of audio are run as
    CUDA graphs: `encode` and `decode` on padded tensors, [`encode_waveforms`] and [`decode_codes`]. A graph is
    recorded when a size comes the second time, which takes a few tenths of a second. Elsewhere nothing but freezing
    is to be done.

    Args:
        model: on the device and in the dtype that it is to have.
        cuda_graphs: whether to record CUDA graphs; by default where that is possible.

    Returns:
        The model itself.

    Raises:
        ValueError: `cuda_graphs=True` for a model that is not on one NVIDIA GPU.
    """
    model.freeze()
    devices = {parameter.device for parameter in model.parameters()}
    can_record = len(devices) == 1 and next(iter(devices)).type == "cuda" and torch.version.cuda is not None
    if cuda_graphs and not can_record:
        raise ValueError(
            f"cuda_graphs=True for a model on {', '.join(map(str, devices))}; accepted: one NVIDIA GPU for all of it"
        )
    if can_record and model.attn_implementation == "triton_varlen":
        _join(model)
    if can_record and cuda_graphs is not False:
        model.graphs = GraphRunner(model)
    logger.info(
        f"attention: {model.attn_implementation}; CUDA graphs: {'no' if model.graphs is None else 'yes'}; codebooks: "
        f"{'one by one' if model.encoder.quantizer.search is None else 'searched in one pass'}"
    )
    return model


def _join(model: MiMoAudioTokenizerModel) -> None:
    dtype = model.encoder.conv1.weight.dtype
    entries = [codebook.entries(dtype) for codebook in model.encoder.quantizer.codebooks]
    model.encoder.quantizer.search = kernels.fused.ResidualSearch(entries, dtype)
    for stack in model.modules():
        if isinstance(stack, MiMoAudioTokenizerStack) and kernels.fused.can_fuse(stack):
            for layer in stack.layers:
                kernels.fused.join_projections(cast(MiMoAudioTokenizerLayer, layer).self_attn)
