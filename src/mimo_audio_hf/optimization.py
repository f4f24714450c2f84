# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""The fast path: one call makes a loaded model as fast as its device allows."""

from __future__ import annotations

import torch
from transformers.utils import logging

from .graphs import GraphRunner
from .modeling_mimo_audio_tokenizer import (
    ATTENTION_BACKENDS,
    MiMoAudioTokenizerISTFTHead,
    MiMoAudioTokenizerModel,
    MiMoAudioTokenizerStack,
    PackedGroupNorm,
)


logger = logging.get_logger(__name__)


def optimize_for_inference(
    model: MiMoAudioTokenizerModel, *, cuda_graphs: bool | None = None
) -> MiMoAudioTokenizerModel:
    """Make a model as fast as its device allows, for inference alone.

    The model is changed in place and frozen. Its results are those of another order of the same sums: codes agree with
    the plain path's as those of two attention backends agree. Moving or casting it, `load_state_dict` and
    `set_attn_implementation` take back everything but the freezing; hooks that are added later may not be called.

    In half precision on an NVIDIA GPU, where the attention backend is `"triton_varlen"`, the projections to queries,
    keys and values become one product (in memory; `state_dict` and saved files keep their names), and the codebooks
    are searched in one product and one kernel, which takes 76 MB at the released size; sums, norms, the vocoder's
    narrow products and what surrounds its FFT run in kernels of the package's. With the backends made for packed clips
    (`"triton_varlen"`, `"torch_varlen"`, `"flash_attention_2"`), calls of up to 96 s of audio are run as CUDA
    graphs: `encode` and `decode` on padded tensors, [`encode_waveforms`], [`decode_codes`] and streaming, but for
    causal encoders and for the last chunk of a cached stream of codes. A graph is recorded when a size, rounded up to
    a quarter of an octave, comes the second time, which takes a few tenths of a second. Elsewhere nothing but freezing
    is to be done.

    Args:
        model: on the device and in the dtype that it is to have.
        cuda_graphs: whether to record CUDA graphs; by default where that gains something.

    Returns:
        The model itself. A model that was optimized stays as it is, but for graphs that are not wanted any more.

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
    if can_record and model.attn_implementation == "triton_varlen" and model.encoder.quantizer.optimized is None:
        _install_kernels(model)
    if cuda_graphs is None:
        # Other backends take dense masks, which grow with the filler.
        cuda_graphs = can_record and ATTENTION_BACKENDS[model.attn_implementation].make_mask is None
    if not cuda_graphs:
        model.graphs = None
    elif model.graphs is None:
        model.graphs = GraphRunner(model)
    logger.info(
        f"attention: {model.attn_implementation}; CUDA graphs: {'no' if model.graphs is None else 'yes'}; codebooks: "
        f"{'one by one' if model.encoder.quantizer.optimized is None else 'searched in one pass'}"
    )
    return model


def _install_kernels(model: MiMoAudioTokenizerModel) -> None:
    from . import fused, input_kernels, vocoder_kernels  # which import Triton

    dtype = model.encoder.conv1.weight.dtype
    entries = [codebook.entries(dtype) for codebook in model.encoder.quantizer.codebooks]
    model.encoder.quantizer.optimized = fused.ResidualSearch(entries, dtype)
    model.encoder.optimized_layout = input_kernels.encoder_layout
    if model.config.window_size == model.config.nfft:
        model.encoder.optimized_log_mel = input_kernels.log_mel
    if model.decoder is not None:
        model.decoder.optimized_layout = input_kernels.decoder_layout
    for module in model.modules():
        if isinstance(module, PackedGroupNorm):
            module.optimized = vocoder_kernels.group_norm
        elif isinstance(module, MiMoAudioTokenizerISTFTHead):
            module.optimized = vocoder_kernels.synthesize
        elif isinstance(module, MiMoAudioTokenizerStack) and fused.can_fuse(module):
            fused.prepare(module, model.config.encoder_skip_layer_id if module is model.encoder else None)
