# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""The audio-to-text loss of the technical report's first stage (arXiv 2512.23808).

A language model writes down what it reads in the quantized features, so that these keep what was said.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


IGNORED = -100


class AudioToTextLoss(nn.Module):
    """Next-token loss of a causal language model on the text of clips, after their quantized features.

    A linear layer brings the features to the model's width. A clip's sequence is its features, then its text; only
    the text is predicted.

    Args:
        language_model: any of transformers' causal language models that takes `inputs_embeds`.
        feature_size: width of the quantized features.
    """

    def __init__(self, language_model: PreTrainedModel, feature_size: int) -> None:
        super().__init__()
        self.language_model = language_model
        width = cast(torch.Tensor, language_model.get_input_embeddings().weight).shape[1]
        self.projection = nn.Linear(feature_size, width)
        accepted = inspect.signature(language_model.forward).parameters
        self._takes_position_ids = "position_ids" in accepted
        self._takes_logits_to_keep = "logits_to_keep" in accepted

    def forward(
        self, features: torch.Tensor, lengths: Sequence[int], text_ids: torch.Tensor, text_lengths: Sequence[int]
    ) -> torch.Tensor:
        """Sum of the losses of all text tokens, float32: divide by their number for the mean.

        Args:
            features: packed quantized features (total_codes, feature_size).
            lengths: of the clips, in codes.
            text_ids: the clips' tokens, one after the other (total_tokens,).
            text_lengths: tokens of each clip, at least one.
        """
        audio = self.projection(features.to(self.projection.weight.dtype)).split(list(lengths))
        embeddings = self.language_model.get_input_embeddings()
        text = embeddings(text_ids).to(audio[0].dtype).split(list(text_lengths))
        clips = [torch.cat(pair) for pair in zip(audio, text, strict=True)]
        longest = max(len(clip) for clip in clips)
        kept = max(text_lengths) + 1
        # Padded on the left, so that all texts end together and logits are needed for the last positions only.
        inputs = torch.stack([F.pad(clip, (0, 0, longest - len(clip), 0)) for clip in clips])
        places = torch.arange(longest)
        starts = torch.tensor([longest - len(clip) for clip in clips])[:, None]
        options: dict[str, Any] = {"attention_mask": (places >= starts).long().to(inputs.device, non_blocking=True)}
        if self._takes_position_ids:
            options["position_ids"] = (places - starts).clamp(min=0).to(inputs.device, non_blocking=True)
        if self._takes_logits_to_keep:
            options["logits_to_keep"] = kept
        logits = self.language_model(inputs_embeds=inputs, use_cache=False, **options).logits[:, -kept:-1]
        labels = torch.stack(
            [F.pad(ids, (kept - 1 - len(ids), 0), value=IGNORED) for ids in text_ids.split(list(text_lengths))]
        )
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def load_language_model(
    pretrained: str | None, config: dict[str, Any] | None, tokenizer: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The language model, pretrained or fresh, and its tokenizer.

    Args:
        pretrained: a Hub id or directory of a causal language model in safetensors.
        config: fields of the configuration of a fresh one instead, with its `model_type`; `vocab_size` is by default
            the tokenizer's.
        tokenizer: a Hub id or directory; by default the pretrained model's, and bytes (ByT5's) for a fresh one.

    Raises:
        ValueError: neither or both of `pretrained` and `config`, or something that cannot be loaded.
    """
    if (pretrained is None) == (config is None):
        raise ValueError("the audio-to-text loss needs a language model; accepted: text_model or text_model_config")
    source = tokenizer or pretrained
    try:
        text_tokenizer = ByT5Tokenizer() if source is None else AutoTokenizer.from_pretrained(source)
        if config is None:
            language_model = AutoModelForCausalLM.from_pretrained(
                cast(str, pretrained), dtype=torch.float32, use_safetensors=True
            )
        else:
            fields = {"vocab_size": len(text_tokenizer)} | dict(config)
            if "model_type" not in fields:
                raise ValueError("text_model_config has no model_type; accepted: a causal language model's, as qwen3")
            language_model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32)
    except (OSError, KeyError) as error:
        raise ValueError(f"text model {source or config}: {' '.join(str(error).split())}") from error
    if text_tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {source} has no eos_token; accepted: one that ends a text")
    return language_model, text_tokenizer
