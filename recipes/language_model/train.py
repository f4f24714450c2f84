# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""A small causal language model of MiMo-Audio's first 8 codebooks, on accelerate.

    accelerate launch recipes/language_model/train.py --audio recordings/*.wav --tokenizer tiny --steps 200
    accelerate launch recipes/language_model/train.py --codes tokens --tokenizer tiny --steps 200 --output-dir trained

With --audio, codes are extracted on the fly by the frozen tokenizer, on the device that trains; with --codes they are
those of a folder that `mimo-audio tokenize` wrote. The model is for showing how: its embeddings of the 8 codebooks add
up, and a linear layer of its own predicts each. (MiMo-Audio itself joins 4 frames to a patch, with a small transformer
before and after the large one.) With --output-dir it is saved after training, and what it generates is decoded
meanwhile, frame after frame, as a live application would play it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoModel, LlamaConfig

from mimo_audio_hf import MiMoAudioTokenizerModel, StreamingDecoder, load_model, optimize_for_inference, save_audio
from mimo_audio_hf.audio import resample
from mimo_audio_hf.checkpoints import RELEASED_MODEL, load_config
from mimo_audio_hf.language_model import IGNORED, AudioCodesCollator, undelay_codes


class AudioLanguageModel(nn.Module):
    """A causal transformer over steps of several codebooks.

    Args:
        vocabulary_sizes: of each codebook.
        config: of a transformers model that takes `inputs_embeds`.
    """

    def __init__(self, vocabulary_sizes: Sequence[int], config: Any) -> None:
        super().__init__()
        self.sizes = list(vocabulary_sizes)
        self.embedding = nn.Embedding(sum(self.sizes), config.hidden_size)
        self.transformer = AutoModel.from_config(config)
        self.transformer.set_input_embeddings(None)  # it takes ours
        self.head = nn.Linear(config.hidden_size, sum(self.sizes), bias=False)
        offsets = torch.tensor([0, *self.sizes[:-1]]).cumsum(0)
        self.register_buffer("offsets", offsets, persistent=False)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss, and that of each codebook (Q,). Arguments as [`AudioCodesCollator`] makes them."""
        logits = self.logits(input_ids[:, :-1], attention_mask[:, :-1])
        losses = torch.stack(
            [
                F.cross_entropy(book.flatten(0, 1), labels[:, 1:, number].flatten(), ignore_index=IGNORED)
                for number, book in enumerate(logits)
            ]
        )
        return losses.mean(), losses.detach()

    def logits(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Sequence[torch.Tensor]:
        """For each codebook what follows on every step: (B, T, size)."""
        embedded = self.embedding(input_ids + self.offsets).sum(2)
        hidden = self.transformer(inputs_embeds=embedded, attention_mask=attention_mask).last_hidden_state
        return self.head(hidden).float().split(self.sizes, dim=-1)


@torch.no_grad()
def generate(model: AudioLanguageModel, delays: Sequence[int], frames: int) -> Iterator[torch.Tensor]:
    """Sampled codes, frame after frame (1, Q), each as soon as its last codebook is known.

    Runs on all steps every time; a model for more than showing how would keep keys and values.
    """
    empty = torch.tensor(model.sizes, device=model.offsets.device) - 1
    steps = empty[None, None]
    for step in range(frames + max(delays)):
        sampled = [torch.multinomial(book[0, -1, :-1].softmax(0), 1) for book in model.logits(steps)]
        has_code = torch.tensor([delay <= step < delay + frames for delay in delays], device=empty.device)
        steps = torch.cat([steps, torch.where(has_code, torch.cat(sampled), empty)[None, None]], dim=1)
        if step >= max(delays):
            yield undelay_codes(steps[0, -1 - max(delays) :], delays)


def speak(
    path: Path, model: AudioLanguageModel, delays: Sequence[int], tokenizer: MiMoAudioTokenizerModel, frames: int
) -> None:
    """Writes to a file what the model generates, decoded meanwhile."""
    decoder = StreamingDecoder.low_latency(tokenizer)
    audio = [decoder.push(codes) for codes in generate(model, delays, frames)]
    save_audio(path, torch.cat([*audio, decoder.flush()]), tokenizer.config.sampling_rate)


def transformer_config(hidden_size: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        vocab_size=1,  # of tokens that are not there
        bos_token_id=None,
        eos_token_id=None,
    )


class AudioFiles(Dataset):
    """Crops of audio files, read when they are asked for."""

    def __init__(self, paths: Sequence[str], seconds: float, sampling_rate: int) -> None:
        self.paths = paths
        self.seconds = seconds
        self.sampling_rate = sampling_rate

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"audio": read_crop(self.paths[index], self.seconds, self.sampling_rate)}


def read_crop(path: str, seconds: float, sampling_rate: int) -> torch.Tensor:
    """Mono samples of a random part of a file, of which no more is read than that, or of all of a shorter one."""
    with soundfile.SoundFile(path) as file:
        length, rate = round(seconds * file.samplerate), file.samplerate
        file.seek(random.randint(0, max(0, file.frames - length)))
        samples = file.read(length, dtype="float32", always_2d=True)
    return resample(torch.from_numpy(samples).mean(1), rate, sampling_rate)


def crop_codes(examples: Sequence[Mapping[str, Any]], frames: int) -> list[dict[str, Any]]:
    cropped = []
    for example in examples:
        codes = torch.as_tensor(example["audio_codes"])
        start = random.randint(0, max(0, len(codes) - frames))
        cropped.append({"audio_codes": codes[start : start + frames]})
    return cropped


def forever(loader: DataLoader) -> Iterator[Any]:
    while True:
        yield from loader


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--audio", nargs="+", help="audio files")
    source.add_argument("--codes", help="a folder that `mimo-audio tokenize` wrote")
    parser.add_argument("--tokenizer", default=RELEASED_MODEL, help="(default: %(default)s)")
    parser.add_argument("--num-quantizers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8, help="clips a process (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a crop (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output-dir",
        type=Path,
        help="a folder for the trained model, and for generated.wav: as many seconds as a crop has that it made up",
    )
    return parser.parse_args(argv)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Trains, and returns the losses and the median seconds of a step and of making its batch.

    Raises:
        ValueError: something is to be generated, and the tokenizer does not decode.
    """
    # Without this several processes on CPUs would not know of each other.
    accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.accelerator.is_available())
    set_seed(args.seed, device_specific=True)
    if args.audio:
        # The frozen tokenizer is on each process's device and no part of what is trained. It runs in its own dtype.
        dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
        tokenizer = load_model(args.tokenizer, device=str(accelerator.device), dtype=dtype)
        collator = AudioCodesCollator(optimize_for_inference(tokenizer), args.num_quantizers)
        data: Any = AudioFiles(args.audio, args.seconds, collator.config.sampling_rate)
    else:
        collator = AudioCodesCollator(load_config(args.tokenizer), args.num_quantizers)
        data = load_dataset(args.codes, split="train").with_format("numpy")
    if args.output_dir is not None:
        if not collator.config.has_decoder:
            raise ValueError(f"--output-dir: {args.tokenizer} holds an encoder only; accepted: a model with a decoder")
        args.output_dir.mkdir(parents=True, exist_ok=True)
    # Workers read; the batch is made in the loop, where the tokenizer is.
    loader = DataLoader(data, args.batch_size, shuffle=True, num_workers=args.workers, collate_fn=list)
    model = AudioLanguageModel(collator.vocabulary_sizes, transformer_config(args.hidden_size, args.layers))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    model, optimizer = accelerator.prepare(model, optimizer)
    # Examples stay on the host until they are a batch.
    loader = accelerator.prepare_data_loader(loader, device_placement=False)

    losses, seconds, batch_seconds = [], [], []
    batches = forever(loader)
    with tqdm(total=args.steps, desc="training", disable=None if accelerator.is_main_process else True) as bar:
        for _ in range(args.steps):
            examples = next(batches)
            started = time.perf_counter()
            if args.codes:
                examples = crop_codes(examples, round(args.seconds * collator.config.frame_rate))
            batch = collator(examples)
            batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
            _wait(accelerator.device)
            made = time.perf_counter()
            loss, _ = model(**batch)
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            seconds.append(time.perf_counter() - started)
            batch_seconds.append(made - started)
            bar.update()
            bar.set_postfix_str(f"loss {losses[-1]:.3f}")
    if args.output_dir is not None and accelerator.is_main_process:
        save(args, accelerator.unwrap_model(model), collator)
    accelerator.wait_for_everyone()
    # Before the processes part: what still belongs to them would wait for each other afterwards.
    del loss
    model, optimizer, loader = accelerator.free_memory(model, optimizer, loader)
    accelerator.end_training()
    accelerator.print(
        f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; a step took {1000 * statistics.median(seconds):.0f} ms, "
        f"{1000 * statistics.median(batch_seconds):.0f} ms of it to make the batch"
    )
    return {
        "losses": losses,
        "step_seconds": statistics.median(seconds),
        "batch_seconds": statistics.median(batch_seconds),
    }


def save(args: argparse.Namespace, model: AudioLanguageModel, collator: AudioCodesCollator) -> None:
    """Writes the trained model, and what it generates."""
    model.eval()
    save_file(model.state_dict(), args.output_dir / "model.safetensors")
    model.transformer.config.save_pretrained(args.output_dir)
    tokenizer = collator.model or load_model(args.tokenizer)
    path = args.output_dir / "generated.wav"
    speak(path, model, collator.delays, tokenizer, round(args.seconds * collator.config.frame_rate))
    print(f"generated {path}")


def _wait(device: torch.device) -> None:
    """For the time that the batch takes alone; a run that is not timed need not."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    train(parse_arguments())
