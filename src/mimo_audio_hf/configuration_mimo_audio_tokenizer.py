# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the MiMo-Audio tokenizer."""

from __future__ import annotations

import math
from typing import Any

from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig


RELEASED_CODEBOOK_SIZE = [1024, 1024] + 18 * [128]
POSITIVE_INTEGERS = (
    "avg_pooler",
    "d_model",
    "decoder_attention_heads",
    "decoder_ffn_dim",
    "decoder_kernel_size",
    "decoder_layers",
    "decoder_stride_size",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "encoder_layers",
    "hop_length",
    "kernel_size",
    "n_mels",
    "nfft",
    "num_quantizers",
    "sampling_rate",
    "stride_size",
    "vocoder_attention_heads",
    "vocoder_dim",
    "vocoder_intermediate_dim",
    "vocoder_num_layers",
    "window_size",
)
# More than any model needs, so that a file of a few bytes cannot ask for any time or memory.
MOST = 2**20
MOST_OF = {
    "decoder_layers": 1024,
    "encoder_layers": 1024,
    "n_mels": 1024,
    "nfft": 2**16,
    "num_quantizers": 1024,
    "vocoder_num_layers": 1024,
}


def single_auto_classes(fields: dict[str, Any]) -> dict[str, Any]:
    """Undoes what transformers does to remote code on saving: it takes every class with "Tokenizer" in its name for a
    text tokenizer and writes a pair (class, None) to `auto_map`, which no auto class can load.
    """
    if "auto_map" in fields:
        auto_map = fields["auto_map"].items()
        fields["auto_map"] = {name: entry if isinstance(entry, str) else entry[0] for name, entry in auto_map}
    return fields


class MiMoAudioTokenizerConfig(PreTrainedConfig):
    r"""
    Configuration of a [`MiMoAudioTokenizerModel`].

    Field names are those of the released checkpoint's `config.json`, which this class reads as it is; the defaults
    give the released 1.2B model (24 kHz audio to 20 codebooks at 25 Hz and back).

    Args:
        d_model (`int`, defaults to 1280): Width of the encoder and the decoder, and of the codebook entries.
        kernel_size (`int`, defaults to 3): Kernel of the encoder's two convolutions.
        stride_size (`int`, defaults to 2): Stride of the encoder's second convolution (100 Hz to 50 Hz).
        avg_pooler (`int`, defaults to 2): Factor between the layers' frame rate and the codes' (50 Hz to 25 Hz).
        encoder_layers, encoder_attention_heads, encoder_ffn_dim (`int`): Size of the encoder.
        encoder_skip_layer_id (`int` or `None`, defaults to 3):
            Layer, counted from 1, whose output is added to the last layer's output.
        encoder_causal (`bool`), encoder_attn_window_size (`list[int]`, `[left, right]`, -1 is unbounded):
            Which frames an encoder frame attends to.
        decoder_layers, decoder_attention_heads, decoder_ffn_dim, decoder_causal, decoder_attn_window_size:
            The same for the decoder.
        decoder_kernel_size (`int`), decoder_stride_size (`int`):
            Transposed convolution from the decoder's frames to mel frames.
        vocoder_dim, vocoder_num_layers, vocoder_attention_heads, vocoder_intermediate_dim, vocoder_attn_window_size:
            Size and attention window of the vocoder.
        vocoder_padding (`str`, defaults to `"same"`): Edge handling of the inverse STFT; only `"same"` exists.
        nfft, window_size, hop_length (`int`): STFT of the mel front end and of the vocoder, in samples.
        n_mels (`int`), fmin (`float`), fmax (`float` or `None` for Nyquist), sampling_rate (`int`): Mel spectrogram.
        num_quantizers (`int`), codebook_size (`list[int]` or `int`):
            The codebooks. A list that is too short repeats its last entry.
        threshold_ema_dead_code (`float`): In training, codebook entries used less often than this are replaced.
        rope_theta (`float`), rope_type (`str`): Rotary position embedding; only `"default"` exists.
        ln_type (`str`): `"LayerNorm"` (eps 1e-5) or `"RMSNorm"` (eps 1e-6).
        activation_function (`str`): Any of transformers' activation names.
        hybrid_attention (`bool`), swa_per_block (`int`):
            MiMo-V2's encoders: layer `i`, counted from 0, keeps the window where
            `i % swa_per_block < swa_per_block - 1` and is unbounded otherwise.
        initializer_range (`float`): Standard deviation of freshly initialized weights.
        has_decoder (`bool`): False for checkpoints that hold an encoder only (MiMo-V2's `audio_tokenizer` folders).
        max_audio_seconds, scale_embedding, position_embedding_type, hybrid_block_size:
            Kept for upstream's files; they change nothing in the computation.

    Raises:
        ValueError: a field has a value that the model does not implement; the message names the field.
    """

    model_type = "mimo_audio_tokenizer"
    # Whether nobody has asked for an attention backend, so that the model may choose; not saved.
    _attn_implementation_is_default = False
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
        "num_attention_heads": "encoder_attention_heads",
        "intermediate_size": "encoder_ffn_dim",
    }

    def __init__(
        self,
        max_audio_seconds: int = 1800,
        stride_size: int = 2,
        avg_pooler: int = 2,
        d_model: int = 1280,
        scale_embedding: bool = False,
        kernel_size: int = 3,
        activation_function: str = "gelu",
        encoder_layers: int = 32,
        encoder_skip_layer_id: int | None = 3,
        encoder_attention_heads: int = 20,
        encoder_ffn_dim: int = 5120,
        encoder_causal: bool = False,
        encoder_attn_window_size: list[int] | None = None,
        decoder_layers: int = 32,
        decoder_attention_heads: int | None = None,
        decoder_ffn_dim: int = 5120,
        decoder_kernel_size: int = 3,
        decoder_stride_size: int = 2,
        decoder_causal: bool = True,
        decoder_attn_window_size: list[int] | None = None,
        nfft: int = 960,
        vocoder_dim: int = 256,
        vocoder_intermediate_dim: int = 1024,
        vocoder_num_layers: int = 16,
        n_mels: int = 128,
        sampling_rate: int = 24000,
        hop_length: int = 240,
        window_size: int = 960,
        vocoder_padding: str = "same",
        fmin: float = 0,
        fmax: float | None = None,
        num_quantizers: int = 20,
        codebook_size: list[int] | int | None = None,
        threshold_ema_dead_code: float = 2,
        position_embedding_type: str = "rope",
        rope_theta: float = 10000,
        rope_type: str = "default",
        ln_type: str = "LayerNorm",
        vocoder_attention_heads: int = 16,
        vocoder_attn_window_size: list[int] | None = None,
        hybrid_attention: bool = False,
        hybrid_block_size: int | None = None,
        swa_per_block: int | None = None,
        initializer_range: float = 0.02,
        has_decoder: bool = True,
        **kwargs: Any,
    ) -> None:
        self.max_audio_seconds = max_audio_seconds
        self.stride_size = stride_size
        self.avg_pooler = avg_pooler
        self.d_model = d_model
        self.scale_embedding = scale_embedding
        self.kernel_size = kernel_size
        self.activation_function = activation_function
        self.encoder_layers = encoder_layers
        self.encoder_skip_layer_id = encoder_skip_layer_id
        self.encoder_attention_heads = encoder_attention_heads
        self.encoder_ffn_dim = encoder_ffn_dim
        self.encoder_causal = encoder_causal
        self.encoder_attn_window_size = [-1, -1] if encoder_attn_window_size is None else encoder_attn_window_size
        self.decoder_layers = decoder_layers
        # Encoder-only configurations do not say; the released model has as many as its encoder.
        self.decoder_attention_heads = (
            encoder_attention_heads if decoder_attention_heads is None else decoder_attention_heads
        )
        self.decoder_ffn_dim = decoder_ffn_dim
        self.decoder_kernel_size = decoder_kernel_size
        self.decoder_stride_size = decoder_stride_size
        self.decoder_causal = decoder_causal
        self.decoder_attn_window_size = [-1, -1] if decoder_attn_window_size is None else decoder_attn_window_size
        self.nfft = nfft
        self.vocoder_dim = vocoder_dim
        self.vocoder_intermediate_dim = vocoder_intermediate_dim
        self.vocoder_num_layers = vocoder_num_layers
        self.n_mels = n_mels
        self.sampling_rate = sampling_rate
        self.hop_length = hop_length
        self.window_size = window_size
        self.vocoder_padding = vocoder_padding
        self.fmin = fmin
        self.fmax = fmax
        self.num_quantizers = num_quantizers
        self.codebook_size = RELEASED_CODEBOOK_SIZE.copy() if codebook_size is None else codebook_size
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.position_embedding_type = position_embedding_type
        self.rope_theta = rope_theta
        self.rope_type = rope_type
        self.ln_type = ln_type
        self.vocoder_attention_heads = vocoder_attention_heads
        self.vocoder_attn_window_size = [40, 10] if vocoder_attn_window_size is None else vocoder_attn_window_size
        self.hybrid_attention = hybrid_attention
        self.hybrid_block_size = hybrid_block_size
        self.swa_per_block = swa_per_block
        self.initializer_range = initializer_range
        self.has_decoder = has_decoder
        super().__init__(**kwargs)
        self._check_fields()  # last, for kwargs may hold fields under transformers' names

    def _check_fields(self) -> None:
        def refuse(field: str, accepted: str) -> None:
            raise ValueError(f"{type(self).__name__}: {field}={getattr(self, field)!r}; accepted: {accepted}")

        def is_integer(value: Any, least: int) -> bool:
            return type(value) is int and value >= least

        for field in POSITIVE_INTEGERS:
            most = MOST_OF.get(field, MOST)
            if not is_integer(getattr(self, field), 1) or getattr(self, field) > most:
                refuse(field, f"a positive integer, at most {most}")
        for field in ("encoder_causal", "decoder_causal", "hybrid_attention", "has_decoder"):
            if not isinstance(getattr(self, field), bool):
                refuse(field, "true or false")
        for field in ("encoder_attn_window_size", "decoder_attn_window_size", "vocoder_attn_window_size"):
            window = getattr(self, field)
            if not isinstance(window, (list, tuple)) or len(window) != 2 or not all(is_integer(x, -1) for x in window):
                refuse(field, "[left, right] in frames, -1 for unbounded")
        sizes = self.codebook_size if isinstance(self.codebook_size, (list, tuple)) else [self.codebook_size]
        if not sizes or not all(is_integer(size, 1) for size in sizes):
            refuse("codebook_size", "a list of one or more positive integers")
        for width, heads in (
            ("d_model", "encoder_attention_heads"),
            ("d_model", "decoder_attention_heads"),
            ("vocoder_dim", "vocoder_attention_heads"),
        ):
            if getattr(self, width) % (2 * getattr(self, heads)):
                refuse(heads, f"a number whose double divides {width}={getattr(self, width)}")
        if self.vocoder_padding != "same":
            refuse("vocoder_padding", "'same'")
        if self.rope_type != "default":
            refuse("rope_type", "'default'")
        if not isinstance(self.rope_theta, (int, float)) or not self.rope_theta > 0:
            refuse("rope_theta", "a positive number")
        if self.ln_type not in ("LayerNorm", "RMSNorm"):
            refuse("ln_type", "'LayerNorm' or 'RMSNorm'")
        if not isinstance(self.activation_function, str) or self.activation_function not in ACT2FN:
            refuse("activation_function", "one of transformers' activations")
        if self.encoder_skip_layer_id is not None and not (
            is_integer(self.encoder_skip_layer_id, 1) and self.encoder_skip_layer_id <= self.encoder_layers
        ):
            refuse("encoder_skip_layer_id", f"None or 1 to encoder_layers={self.encoder_layers}")
        if self.hybrid_attention and not is_integer(self.swa_per_block, 1):
            refuse("swa_per_block", "1 or more where hybrid_attention is set")
        if self.nfft <= self.hop_length or (self.nfft - self.hop_length) % 2:
            refuse("hop_length", f"shorter than nfft={self.nfft}, by an even number")
        if self.window_size > self.nfft:
            refuse("window_size", f"at most nfft={self.nfft}")
        if self.decoder_kernel_size < self.decoder_stride_size:
            refuse("decoder_kernel_size", f"at least decoder_stride_size={self.decoder_stride_size}")
        if self.fmax is not None and not isinstance(self.fmax, (int, float)):
            refuse("fmax", "a number, or None for Nyquist")
        nyquist = self.sampling_rate / 2
        if not isinstance(self.fmin, (int, float)) or not 0 <= self.fmin < (self.fmax or nyquist) <= nyquist:
            refuse("fmin", f"0 or more, and less than fmax={self.fmax}, which is at most {nyquist:g}")

    @property
    def codebook_sizes(self) -> list[int]:
        """Entries of each of the `num_quantizers` codebooks."""
        sizes = [self.codebook_size] if isinstance(self.codebook_size, int) else list(self.codebook_size)
        return (sizes + sizes[-1:] * self.num_quantizers)[: self.num_quantizers]

    @property
    def samples_per_frame(self) -> int:
        """Audio samples that one frame of codes stands for (960 in the released model)."""
        return self.hop_length * self.decoder_stride_size * self.avg_pooler

    @property
    def frame_rate(self) -> float:
        """Frames of codes per second (25 in the released model)."""
        return self.sampling_rate / (self.hop_length * self.stride_size * self.avg_pooler)

    def to_dict(self) -> dict[str, Any]:
        fields = single_auto_classes(super().to_dict())
        fields.pop("_attn_implementation_is_default", None)
        return fields

    def bitrate(self, num_quantizers: int | None = None) -> float:
        """Bits per second of the first `num_quantizers` codebooks (all of them by default)."""
        if num_quantizers is None:
            num_quantizers = self.num_quantizers
        if not 1 <= num_quantizers <= self.num_quantizers:
            raise ValueError(f"num_quantizers={num_quantizers}; accepted: 1 to {self.num_quantizers}")
        return self.frame_rate * sum(math.log2(size) for size in self.codebook_sizes[:num_quantizers])


__all__ = ["MiMoAudioTokenizerConfig"]
