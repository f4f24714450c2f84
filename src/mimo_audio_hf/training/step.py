# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""A step of training: modules, optimizers and losses, on batches that are there.

Nothing here waits for the GPU: losses come back as tensors. (Of the first stage's language models, transformers looks
at the padding mask, which does.)
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import random
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedType, InitProcessGroupKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..feature_extraction_mimo_audio_tokenizer import MiMoAudioTokenizerFeatureExtractor
from ..modeling_mimo_audio_tokenizer import (
    AttentionBackend,
    MiMoAudioTokenizerDecoder,
    MiMoAudioTokenizerDecoderLayout,
    MiMoAudioTokenizerEncoderLayout,
    MiMoAudioTokenizerLayer,
    MiMoAudioTokenizerModel,
)
from . import checkpointing
from .audio_to_text import AudioToTextLoss
from .batch import Batch, padded
from .config import RECONSTRUCTION, TrainingConfig
from .discriminators import AudioDiscriminator
from .losses import MultiScaleMelLoss, adversarial_loss, discriminator_loss, feature_matching_loss


class BFloat16Compute(nn.Module):
    """Runs a module as if its parameters were bfloat16, while they are float32 for the optimizer.

    Autocast would keep the residual stream in float32 and round RoPE's frequencies otherwise than a bfloat16 model
    does: here a decoder is trained in the arithmetic that it will run in. Buffers stay as they are.

    What runs is a copy that is given the rounded parameters each time: functional_call does that too, but takes longer
    than the GPU needs for the layers. train() and eval() reach the copy through this module only; hooks and gradient
    checkpointing have to be set before.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        tensors = (*module.parameters(), *module.buffers())
        copied = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
        self.places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}  # a tied one has several
        for part in copied.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    self.places.setdefault(parameter, []).append((part, name))
        # A layer's parameters are rounded together: their gradients are then there while DDP still waits for others.
        layers = [part for part in module.modules() if isinstance(part, MiMoAudioTokenizerLayer)]
        self.groups = [list(layer.parameters()) for layer in layers]
        grouped = {parameter for group in self.groups for parameter in group}
        self.groups.extend([parameter] for parameter in module.parameters() if parameter not in grouped)
        self.running = (copied,)  # in a tuple, so that it is no submodule

    def train(self, mode: bool = True) -> BFloat16Compute:
        super().train(mode)
        self.running[0].train(mode)
        return self

    def forward(self, *args: Any) -> Any:
        for group in self.groups:
            for parameter, rounded in zip(group, _Rounded.apply(*group), strict=True):
                for part, name in self.places[parameter]:
                    part._parameters[name] = rounded
        return self.running[0](*args)


class _Rounded(torch.autograd.Function):
    """Parameters in bfloat16, and their gradients in float32, by few kernels for many tensors."""

    @staticmethod
    def forward(ctx: Any, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _copies(parameters, torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _copies(gradients, torch.float32)


def _copies(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    copies = [torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format) for tensor in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return tuple(copies)


class DecoderTraining(nn.Module):
    """What stage 2 trains: quantized features to samples."""

    def __init__(self, decoder: MiMoAudioTokenizerDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, features: torch.Tensor, layout: MiMoAudioTokenizerDecoderLayout, backend: AttentionBackend
    ) -> torch.Tensor:
        """Packed features (total_codes, d_model) to packed samples (total_samples,)."""
        return self.decoder(features, layout, backend).flatten()


class TokenizerTraining(nn.Module):
    """What stage 1 trains: the tokenizer, and the language model that reads its features."""

    def __init__(self, tokenizer: MiMoAudioTokenizerModel, audio_to_text: AudioToTextLoss | None) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.audio_to_text = audio_to_text

    def forward(
        self, features: torch.Tensor, batch: Batch, num_quantizers: int, backend: AttentionBackend
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Packed log-mels (total_frames, n_mels) to packed samples (total_samples,), codes (total_codes,
        num_quantizers), the commitment loss, and the sum of the text tokens' losses."""
        encoder, decoder = self.tokenizer.encoder, cast(MiMoAudioTokenizerDecoder, self.tokenizer.decoder)
        dtype = encoder.conv1.weight.dtype
        layout = cast(MiMoAudioTokenizerEncoderLayout, batch.encoder_layout)
        encoded = encoder(features.to(dtype), layout, backend)
        quantized, codes, commitment = encoder.quantizer(encoded, num_quantizers, dtype)
        samples = decoder(quantized.to(dtype), batch.decoder_layout, backend).flatten()
        text = None
        if self.audio_to_text is not None and batch.text_ids is not None:
            text = self.audio_to_text(quantized, batch.code_lengths, batch.text_ids, batch.text_lengths)
        return samples, codes, commitment, text


class TrainingStep:
    """What a run trains, and how a step moves it.

    Args:
        config: the run's.
        accelerator: from [`make_accelerator`].
        tokenizer: the model, float32; it is trained in place.
        audio_to_text: the first stage's language model.

    Attributes:
        tokenizer: the model. In stage 2 its encoder may be rounded to bfloat16; `frozen` has the weights that it had.
        generator, optimizer, scheduler: what is trained of it (and the language model), as accelerate wraps it.
        discriminator, discriminator_optimizer, discriminator_scheduler: the second stage's, if it has any.
        mel_loss: the reconstruction loss.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        tokenizer: MiMoAudioTokenizerModel,
        audio_to_text: AudioToTextLoss | None = None,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.device = accelerator.device
        self.half = accelerator.mixed_precision == "bf16"
        self.tokenizer = tokenizer
        self.extractor = MiMoAudioTokenizerFeatureExtractor.from_config(tokenizer.config)
        self.mel_loss = MultiScaleMelLoss(
            tokenizer.config.sampling_rate, config.mel_scales, config.log_mel_loss, config.log_mel_floor
        )
        self._make_discriminator()
        self._make_generator(audio_to_text)

    def _make_generator(self, audio_to_text: AudioToTextLoss | None) -> None:
        """What is trained, its optimizer and its schedule; in stage 2, the encoder as it runs beside it."""
        config, tokenizer = self.config, self.tokenizer
        self.frozen: dict[str, torch.Tensor] = {}
        if config.stage == 1:
            trained: nn.Module = TokenizerTraining(tokenizer.train(), audio_to_text)
        else:
            tokenizer.requires_grad_(False).eval()
            decoder = cast(MiMoAudioTokenizerDecoder, tokenizer.decoder)
            trained = DecoderTraining(decoder.requires_grad_(True))
            # Kept aside, for in bfloat16 the encoder is rounded and the checkpoint must have what was there.
            self.frozen = {
                f"encoder.{name}": tensor.to("cpu", copy=self.half)
                for name, tensor in tokenizer.encoder.state_dict().items()
            }
            needed = tokenizer.encoder if config.codes_column is None else tokenizer.encoder.quantizer
            needed.to(self.device, torch.bfloat16 if self.half else torch.float32)
        running = trained
        # FSDP computes in bfloat16 itself.
        if self.half and self.accelerator.distributed_type != DistributedType.FSDP:
            trained = BFloat16Compute(trained.to(self.device))
            running = trained.running[0]
        if config.torch_compile:
            # All layers share it: three widths or windows, with and without gradients, in training and validation.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
            modules = list(running.modules())
            if config.stage == 2 and config.codes_column is None:
                modules.extend(tokenizer.encoder.modules())
            for module in modules:
                if isinstance(module, MiMoAudioTokenizerLayer):
                    module.compile(dynamic=True)
        trained._no_split_modules = ["MiMoAudioTokenizerLayer"]  # type: ignore[assignment] # (for FSDP's wrapping)
        optimizer = self._adamw(trained, config.learning_rate, config.weight_decay)
        self.generator, self.optimizer = self.accelerator.prepare(trained, optimizer)
        self.scheduler = self._schedule(optimizer)
        self.dtype = torch.bfloat16 if self.half else torch.float32
        # In stage 1 the weights are float32 and what runs is not: autocast is how the model is told.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            self.backend = tokenizer.attention_backend(self.device)

    def _make_discriminator(self) -> None:
        config = self.config
        self.discriminator: nn.Module | None = None
        if config.uses_discriminators:
            discriminator: nn.Module = AudioDiscriminator(config.discriminator_width).to(self.device)
            self.discriminator_optimizer = self._adamw(discriminator, config.discriminator_learning_rate, 0.0)
            self.discriminator_scheduler = self._schedule(self.discriminator_optimizer)
            if self.accelerator.num_processes > 1:
                # Small beside the decoder: never sharded, also where FSDP shards that.
                discriminator = DistributedDataParallel(
                    discriminator, device_ids=[self.device] if self.device.type == "cuda" else None
                )
            self.discriminator = discriminator

    def _adamw(self, module: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
        """Weight decay is for matrices only, as usual."""
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for parameter in module.parameters():
            if parameter.requires_grad:
                (decayed if parameter.ndim > 1 else others).append(parameter)
        return torch.optim.AdamW(
            [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=learning_rate,
            betas=(self.config.adam_beta1, self.config.adam_beta2),
            fused=self.device.type == "cuda",
        )

    def _schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return transformers.get_scheduler(
            self.config.lr_scheduler_type, optimizer, self.config.warmup_steps, self.config.max_steps
        )

    def _seed(self, step: int) -> None:
        """torch's generators, for what is random within a step: dead entries' revival, a language model's dropout."""
        torch.manual_seed(derived_seed(self.config.seed, step, self.accelerator.process_index))

    def num_quantizers(self, step: int) -> int:
        """How many codebooks a step uses, the same on every process."""
        generator = random.Random(f"quantizers {self.config.seed} {step}")
        whole = self.tokenizer.config.num_quantizers
        return generator.randint(1, whole) if generator.random() < self.config.quantizer_dropout else whole

    def train(self, batches: Sequence[Batch], step: int) -> dict[str, torch.Tensor]:
        """One step of the optimizers.

        Args:
            batches: `gradient_accumulation_steps` of them, on the device.
            step: its number, from 0, from which all that is random in it follows.

        Returns:
            This process's shares of the losses, which add up over the processes, and the gradients' norms: tensors on
            the device, not waited for.
        """
        config = self.config
        self._seed(step)
        num_quantizers = self.num_quantizers(step)
        totals: dict[str, torch.Tensor] = {}
        for number, batch in enumerate(batches, start=1):
            with contextlib.ExitStack() as stack:
                if number < len(batches):
                    stack.enter_context(self.accelerator.no_sync(self.generator))
                    if isinstance(self.discriminator, DistributedDataParallel):
                        stack.enter_context(self.discriminator.no_sync())
                losses = self.backward(batch, num_quantizers, 1 / len(batches))
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0) + loss.detach() / len(batches)
        # The norm is the same on every process; their sum is to be it.
        processes = self.accelerator.num_processes
        norm = self.accelerator.clip_grad_norm_(self.generator.parameters(), config.max_grad_norm)
        totals["gradient_norm"] = _local(norm) / processes
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        if self.discriminator is not None:
            norm = nn.utils.clip_grad_norm_(self.discriminator.parameters(), config.max_grad_norm)
            totals["discriminator_gradient_norm"] = norm / processes
            self.discriminator_optimizer.step()
            self.discriminator_optimizer.zero_grad()
            self.discriminator_scheduler.step()
        return totals

    def reconstruct(
        self, batch: Batch, num_quantizers: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Packed samples and codes of a batch and, in stage 1, commitment loss and the sum of the text's losses."""
        count = self.tokenizer.check_num_quantizers(num_quantizers)
        if self.config.stage == 1:
            return self.generator(self._mels(batch), batch, count, self.backend)
        with torch.no_grad():
            if batch.codes is None:
                encoded = self.tokenizer.encode(self._mels(batch), num_quantizers=count, layout=batch.encoder_layout)
                codes = encoded.audio_codes
            else:
                codes = batch.codes[:, :count]
            features = self.tokenizer.encoder.quantizer.decode(codes, self.dtype).to(self.dtype)
        return self.generator(features, batch.decoder_layout, self.backend), codes, None, None

    def _mels(self, batch: Batch) -> torch.Tensor:
        """Packed log-mels (total_frames, n_mels)."""
        return self.extractor.packed_log_mel_spectrogram(batch.waveforms.split(batch.lengths))

    def pairs(self, batch: Batch, samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What was decoded, trimmed, and the recordings: padded, (clips, longest)."""
        strides = [length * self.tokenizer.config.samples_per_frame for length in batch.code_lengths]
        return padded(samples, batch.lengths, strides), padded(batch.waveforms, batch.lengths, batch.lengths)

    def backward(self, batch: Batch, num_quantizers: int, weight: float) -> dict[str, torch.Tensor]:
        """Adds the gradients of a batch, and returns this process's shares of its losses."""
        config = self.config
        samples, _, commitment, text = self.reconstruct(batch, num_quantizers)
        predicted, target = self.pairs(batch, samples)
        losses = {RECONSTRUCTION: self.mel_loss(predicted, target, batch.lengths, batch.batch_lengths)}
        loss = config.reconstruction_weight * losses[RECONSTRUCTION]
        if commitment is not None:
            share = sum(batch.code_lengths) / self._batch_codes(batch)
            losses["commitment_loss"] = share * commitment
            loss = loss + config.commitment_weight * losses["commitment_loss"]
        if text is not None:
            tokens = torch.tensor(float(sum(batch.text_lengths))).to(self.device, non_blocking=True)
            losses["audio_to_text_loss"] = text / self.accelerator.reduce(tokens, "sum")
            loss = loss + config.audio_to_text_weight * losses["audio_to_text_loss"]
        if self.discriminator is not None:
            loss = loss + self._adversarial(batch, predicted, target, losses, weight)
        # Wrappers average gradients over processes, and shares are to be added. Not by accelerate, which divides once
        # more where its environment tells it of gradient accumulation.
        (loss * (weight * self.accelerator.num_processes)).backward()
        return losses

    def _adversarial(
        self,
        batch: Batch,
        predicted: torch.Tensor,
        target: torch.Tensor,
        losses: dict[str, torch.Tensor],
        weight: float,
    ) -> torch.Tensor:
        """Adds the discriminators' gradients and losses; returns what has the decoder's adversarial gradient.

        Both sides are judged by the discriminators as the step found them, so these run once: the decoder's gradient
        is taken at the samples first, without touching the discriminators' weights, and the hinge loss then goes
        through the same graph.
        """
        config, discriminator = self.config, cast(nn.Module, self.discriminator)
        share = len(batch.lengths) / len(batch.batch_lengths)
        rows = batch.segments[:, None] + torch.arange(batch.segment_samples, device=self.device)
        real, fake = target.gather(1, rows), predicted.gather(1, rows)
        leaf = fake.detach().requires_grad_()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            real_layers, fake_layers = discriminator(real, leaf)
        losses["adversarial_loss"] = share * adversarial_loss(fake_layers)
        losses["feature_matching_loss"] = share * feature_matching_loss(real_layers, fake_layers)
        generator_loss = (
            config.adversarial_weight * losses["adversarial_loss"]
            + config.feature_matching_weight * losses["feature_matching_loss"]
        )
        (gradient,) = torch.autograd.grad(generator_loss, leaf, retain_graph=True)
        losses["discriminator_loss"] = share * discriminator_loss(real_layers, fake_layers)
        scaled = losses["discriminator_loss"] * (weight * self.accelerator.num_processes)
        scaled.backward(inputs=list(discriminator.parameters()))
        return (fake * gradient).sum()

    def _batch_codes(self, batch: Batch) -> int:
        """Code frames of the whole batch, on all processes."""
        hop = self.tokenizer.config.hop_length
        return sum(self.tokenizer.encoder.code_lengths([1 + length // hop for length in batch.batch_lengths]))

    # --- Its state ---

    def model_tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """On the CPU, the model's tensors by upstream's names, and in stage 1 the language model's.

        Every process has to ask; with FSDP only the first is told.
        """
        tensors = checkpointing.model_tensors(self.generator)
        if any(name.startswith("module.") for name in tensors):  # BFloat16Compute's
            tensors = _under("module.", tensors)
        if self.config.stage == 1:
            return _under("tokenizer.", tensors), _under("audio_to_text.", tensors)
        return {name: tensor.cpu() for name, tensor in self.frozen.items()} | tensors, {}

    def state(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
        """What else is needed to go on: tensors, and numbers for JSON. Every process has to ask."""
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        settings: dict[str, Any] = {"scheduler": self.scheduler.state_dict()}
        optimizer = self.optimizer.optimizer
        tensors["optimizer"], settings["optimizer"] = checkpointing.optimizer_state(self.generator, optimizer)
        if self.discriminator is not None:
            optimizer = self.discriminator_optimizer
            tensors["discriminator"] = checkpointing.model_tensors(self.discriminator)
            tensors["discriminator_optimizer"], settings["discriminator_optimizer"] = checkpointing.optimizer_state(
                self.discriminator, optimizer
            )
            settings["discriminator_scheduler"] = self.discriminator_scheduler.state_dict()
        return tensors, settings

    def load_state(self, tensors: Callable[[str], dict[str, torch.Tensor]], settings: dict[str, Any]) -> None:
        """Goes on from a `state()`; the model's and the language model's weights are there already."""
        checkpointing.load_optimizer_state(
            self.generator, self.optimizer.optimizer, tensors("optimizer"), settings["optimizer"]
        )
        self.scheduler.load_state_dict(settings["scheduler"])
        if self.discriminator is not None:
            inner = self.discriminator
            inner = inner.module if isinstance(inner, DistributedDataParallel) else inner
            inner.load_state_dict(tensors("discriminator"))
            checkpointing.load_optimizer_state(
                self.discriminator,
                self.discriminator_optimizer,
                tensors("discriminator_optimizer"),
                settings["discriminator_optimizer"],
            )
            self.discriminator_scheduler.load_state_dict(settings["discriminator_scheduler"])


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """accelerate as the trainer needs it.

    Raises:
        ValueError: accelerate does not have what the configuration asks for, or is configured for what this trainer
            does not do.
    """
    try:
        accelerator = Accelerator(
            # Without a GPU it has to be told, or it does not see the other processes.
            cpu="RANK" in os.environ and not torch.cuda.is_available(),
            mixed_precision=config.mixed_precision,
            log_with=list(config.report_to) or None,
            project_dir=os.path.join(config.output_dir, "logs"),
            kwargs_handlers=[
                # What runs in bfloat16 is said here, not by autocast around everything.
                AutocastKwargs(enabled=False),
                # Reading all clips takes long, and some processes longer than others.
                InitProcessGroupKwargs(timeout=timedelta(hours=2)),
            ],
        )
    except ValueError as error:
        asked = f"report_to={config.report_to}, mixed_precision={config.mixed_precision}"
        raise ValueError(f"{asked}: {error}") from error
    found = [str(tracker) for tracker in accelerator.log_with]
    for name in config.report_to:
        if name not in (*found, "all"):  # accelerate leaves it out without a word
            raise ValueError(f"report_to={name!r}: its package is not installed; accepted: installed trackers")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed precision {accelerator.mixed_precision}; accepted: no or bf16")
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (
        kind == DistributedType.FSDP and not accelerator.is_fsdp2
    ):
        raise ValueError(f"accelerate is configured for {kind.value}; accepted: DDP, or FSDP with fsdp_version 2")
    return accelerator


def derived_seed(*parts: object) -> int:
    """A seed for one purpose among others."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def _local(tensor: Any) -> torch.Tensor:
    """FSDP's norms are distributed tensors."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
