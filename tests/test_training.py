"""The trainer: what it moves and leaves alone, that it goes on where it stopped, and what it does with bad data."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import accelerate
import datasets
import numpy as np
import pytest
import soundfile
import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from pystoi import stoi
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import mimo_audio_hf
from mimo_audio_hf import (
    MiMoAudioTokenizerConfig,
    MiMoAudioTokenizerFeatureExtractor,
    MiMoAudioTokenizerModel,
    encode_waveforms,
    load_audio,
    load_model,
    tokenize_audio,
)
from mimo_audio_hf.cli import main
from mimo_audio_hf.modeling_mimo_audio_tokenizer import MiMoAudioTokenizerEncoder
from mimo_audio_hf.pictures import reconstruction_figure, save_figure
from mimo_audio_hf.training import NonFiniteLossError, Trainer
from mimo_audio_hf.training.batch import Collator
from mimo_audio_hf.training.config import TrainingConfig, read_yaml
from mimo_audio_hf.training.data import Clips, PlannedBatch, open_dataset, plan_epoch, plan_run
from mimo_audio_hf.training.losses import MultiScaleMelLoss
from mimo_audio_hf.training.pictures import training_figure
from mimo_audio_hf.training.step import TrainingStep, make_accelerator


RECORDING = Path(__file__).parent / "fixtures" / "audio" / "prompt_speech_en_m.wav"
RATE = 24000

# The tiny preset, smaller.
MINI = {
    "d_model": 48,
    "encoder_layers": 2,
    "encoder_skip_layer_id": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 96,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 96,
    "vocoder_dim": 64,
    "vocoder_num_layers": 2,
    "vocoder_attention_heads": 2,
    "vocoder_intermediate_dim": 128,
    "num_quantizers": 4,
    "codebook_size": [64, 32],
    "initializer_range": 0.1,
}
LANGUAGE_MODEL = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
}
OPTIONS = {
    "batch_seconds": 8.0,
    "crop_seconds": 0.6,
    "min_seconds": 0.1,
    "discriminator_seconds": 0.2,
    "discriminator_width": 0.06,
    "dataloader_num_workers": 0,
    "warmup_steps": 2,
    "learning_rate": 2e-3,
    "max_steps": 4,
    "logging_steps": 2,
    "save_steps": 2,
    "eval_steps": 2,
    "mixed_precision": "no",
}


@pytest.fixture(scope="module")
def waveform() -> np.ndarray:
    return load_audio(RECORDING).numpy()


@pytest.fixture(scope="module")
def clips(waveform) -> datasets.Dataset:
    """20 clips of real speech, of 0.4 to 0.8 s, with a text."""
    lengths = [int(RATE * (0.4 + 0.02 * number)) for number in range(20)]
    starts = [number * (len(waveform) - lengths[-1]) // 20 for number in range(20)]
    audio = [
        {"array": waveform[start : start + length], "sampling_rate": RATE}
        for start, length in zip(starts, lengths, strict=True)
    ]
    return datasets.Dataset.from_dict(
        {"audio": audio, "text": [f"number {number}" for number in range(20)], "name": [f"clip{n}" for n in range(20)]}
    )


@pytest.fixture(scope="module")
def folder(waveform, tmp_path_factory) -> Path:
    """Six clips as files."""
    directory = tmp_path_factory.mktemp("recordings")
    for number in range(6):
        soundfile.write(directory / f"{number}.wav", waveform[number * 15000 :][: 12000 + 960 * number], RATE)
    return directory


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("checkpoints") / "fresh"
    MiMoAudioTokenizerModel(MiMoAudioTokenizerConfig(**MINI)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def stage1(fresh, clips, tmp_path_factory) -> Path:
    """200 steps of stage 1 on 20 clips."""
    directory = tmp_path_factory.mktemp("runs") / "stage1"
    config = TrainingConfig(
        output_dir=str(directory),
        model=str(fresh),
        stage=1,
        text_model_config=LANGUAGE_MODEL,
        **OPTIONS | {"max_steps": 200, "save_steps": 200, "logging_steps": 1},
    )
    Trainer(config, clips).train()
    return directory


@pytest.fixture(autouse=True)
def fresh_accelerator_state():
    """accelerate keeps one mixed precision a process: that of the fixtures' runs, and of the test before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def options(model: Path, output_dir: Path, **changed) -> dict:
    return OPTIONS | {"model": str(model), "output_dir": str(output_dir)} | changed


def run(model: Path, output_dir: Path, dataset: datasets.Dataset, validation=None, **changed) -> Trainer:
    trainer = Trainer(TrainingConfig(**options(model, output_dir, **changed)), dataset, validation)
    trainer.train()
    return trainer


def tokenized(dataset: datasets.Dataset, model: Path, **changed) -> datasets.Dataset:
    return dataset.map(tokenize_audio, batched=True, fn_kwargs={"model": str(model), "device": "cpu"} | changed)


def train_in_two_processes(values: dict, directory: Path) -> subprocess.CompletedProcess[str]:
    """The command under torchrun, on CPUs, with a configuration that is written to the directory."""
    (directory / "run.yaml").write_text(yaml.safe_dump(values))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(mimo_audio_hf.__file__).parent.parent)}
    environment |= {"ACCELERATE_USE_CPU": "true", "HF_DATASETS_CACHE": str(directory / "cache")}
    arguments = ["-m", "mimo_audio_hf.cli", "train", str(directory / "run.yaml")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run([sys.executable, *launcher, *arguments], env=environment, capture_output=True, text=True)


def logged(directory: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def assert_same_weights(one: Path, other: Path, **tolerance) -> None:
    for file in sorted(path.relative_to(one) for path in one.rglob("*.safetensors")):
        found, expected = load_file(one / file), load_file(other / file)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(
                tensor, expected[name], msg=lambda text, place=f"{file} {name}": f"{place}: {text}", **tolerance
            )


def assert_moved_alike(start: Path, found: Path, expected: Path) -> None:
    """Adam divides by the gradient's size: where that is but rounding, so is the step's direction."""
    before, one, other = (load_file(path / "model.safetensors") for path in (start, found, expected))
    for name, tensor in one.items():
        moved = (other[name] - before[name]).norm()
        assert (tensor - other[name]).norm() <= 0.02 * moved + 1e-6, name


# --- What training does ---


def test_200_steps_of_stage_1_halve_the_losses(stage1, clips):
    losses = logged(stage1, "train/reconstruction_loss")
    assert len(losses) == 200
    last = np.mean(losses[-4:])  # of two epochs
    assert last < 0.5 * losses[0]
    # Silence would do as well as that: it is better.
    silence = [
        MultiScaleMelLoss()(torch.zeros(1, len(row["array"])), torch.tensor(row["array"])[None]).item()
        for row in clips["audio"]
    ]
    assert last < 0.9 * np.mean(silence)
    text = logged(stage1, "train/audio_to_text_loss")
    assert np.mean(text[-5:]) < 0.5 * text[0]
    model = load_model(stage1 / "checkpoint-200", device="cpu")
    for codebook in model.encoder.quantizer.codebooks:
        assert codebook.inited.item() == 1
        assert codebook.embed.isfinite().all()
        # What is not chosen often enough is revived, at this size.
        assert (codebook.cluster_size >= codebook.threshold_ema_dead_code).all()
    first = model.encoder.quantizer.codebooks[0]
    assert first.embed.unique(dim=0).shape == first.embed.shape


def test_overfitting_one_clip_is_intelligible(fresh, waveform, tmp_path):
    """Short-time objective intelligibility of 0.9, in 250 steps on 2 s of speech."""
    clip = datasets.Dataset.from_dict({"audio": [{"array": waveform[:48000], "sampling_rate": RATE}]})

    def intelligibility(reference: torch.Tensor, decoded: torch.Tensor, sampling_rate: int) -> float:
        return stoi(reference.double().numpy(), decoded.double().numpy(), sampling_rate)

    changed = {"crop_seconds": 2.0, "batch_seconds": 2.0, "max_steps": 250, "learning_rate": 4e-3}
    changed |= {"eval_steps": 250, "save_steps": 250}
    config = TrainingConfig(**options(fresh, tmp_path, stage=1, audio_to_text_weight=0.0, **changed))
    assert Trainer(config, clip, clip, metrics={"stoi": intelligibility}).train()["stoi"] > 0.9


def test_stage_2_moves_decoder_and_vocoder_only(stage1, clips, waveform, tmp_path):
    start = stage1 / "checkpoint-200"
    run(start, tmp_path, clips, max_steps=3, quantizer_dropout=0.5)
    trained = tmp_path / "checkpoint-3"
    before, after = load_file(start / "model.safetensors"), load_file(trained / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        moved = not torch.equal(tensor, after[name])
        # The window is no weight, nor are the biases before a softmax that does not see them.
        assert moved == (name.startswith("decoder.") and not name.endswith("istft.window")), name
    test_set = [torch.from_numpy(waveform), torch.from_numpy(waveform[5000:30001])]
    codes = [encode_waveforms(load_model(path, device="cpu"), test_set) for path in (start, trained)]
    assert all(torch.equal(one, other) for one, other in zip(*codes, strict=True))


def test_stage_2_in_bfloat16(stage1, clips, tmp_path):
    """The encoder is saved bit for bit, and the decoder's gradient is float32's, but for rounding."""
    start = stage1 / "checkpoint-200"
    gradients = {}
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        config = TrainingConfig(**options(start, tmp_path / precision, mixed_precision=precision, max_steps=1))
        trainer = Trainer(config, clips)
        reader = trainer._reader(trainer.train_clips, training=True)
        (batch,) = reader.loader(plan_epoch([RATE // 2] * 20, RATE * 20, 1, 0, 0), 0)
        trainer.trained.backward(batch, 4, 1.0)
        decoder = trainer.tokenizer.decoder
        gradients[precision] = torch.cat([parameter.grad.flatten() for parameter in decoder.parameters()])
        trainer.trained.optimizer.zero_grad()
        trainer.train()
    assert trainer.tokenizer.encoder.conv1.weight.dtype == torch.bfloat16
    assert decoder.dconv1.conv.weight.dtype == torch.float32
    assert not torch.equal(*gradients.values())
    assert torch.cosine_similarity(*gradients.values(), dim=0) > 0.98
    before, after = (load_file(path / "model.safetensors") for path in (start, tmp_path / "bf16" / "checkpoint-1"))
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    for name, tensor in before.items():
        assert name.startswith("decoder.") or torch.equal(tensor, after[name]), name


class RoundedByTorch(torch.nn.Module):
    """What BFloat16Compute does, by torch's own means."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.running = (module,)

    def forward(self, *args):
        rounded = {name: parameter.bfloat16() for name, parameter in self.module.named_parameters()}
        return torch.func.functional_call(self.module, rounded, args)


def test_stage_1_in_bfloat16(fresh, clips, tmp_path, monkeypatch):
    """With tied weights, moving codebooks, validation and a resumed run, to the bit."""
    model = {"stage": 1, "text_model_config": LANGUAGE_MODEL | {"tie_word_embeddings": True}}
    common = model | {"mixed_precision": "bf16", "batch_seconds": 4.0}
    run(fresh, tmp_path / "ours", clips, clips.select(range(3)), **common)
    shutil.copytree(tmp_path / "ours", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    AcceleratorState._reset_state(reset_partial_state=True)
    run(fresh, tmp_path / "resumed", clips, clips.select(range(3)), **common, resume=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr("mimo_audio_hf.training.step.BFloat16Compute", RoundedByTorch)
    run(fresh, tmp_path / "torchs", clips, clips.select(range(3)), **common)
    for name in ("model.safetensors", "trainer/audio_to_text.safetensors"):
        ours, resumed, torchs = (
            load_file(tmp_path / run / "checkpoint-4" / name) for run in ("ours", "resumed", "torchs")
        )
        assert ours.keys() == resumed.keys() == torchs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor, resumed[key]) and torch.equal(tensor, torchs[key]), key


def test_the_losses_weigh_as_the_report_says(stage1, clips, tmp_path, monkeypatch):
    """Gradients of the whole step against the sum of the losses' own, by plain autograd and no packing."""
    # Which accelerate would divide them by.
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    trainer = Trainer(TrainingConfig(**options(stage1 / "checkpoint-200", tmp_path)), clips)
    reader = trainer._reader(trainer.train_clips, training=True)
    (batch,) = reader.loader(plan_epoch([RATE // 2] * 20, RATE * 20, 1, 0, 0), 0)
    assert len(batch.lengths) == 20
    trainer.trained.backward(batch, 4, 1.0)
    decoder, discriminator = trainer.tokenizer.decoder, trainer.trained.discriminator
    actual = {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}
    judged = {name: parameter.grad.clone() for name, parameter in discriminator.named_parameters()}
    trainer.trained.generator.zero_grad()
    discriminator.zero_grad()

    offset, decoded, segments, real = 0, [], [], []
    for clip, length in enumerate(batch.lengths):
        recording = batch.waveforms[offset : offset + length]
        features = trainer.collator.extractor([recording.numpy()], sampling_rate=RATE)
        with torch.no_grad():
            codes = trainer.tokenizer.encode(**features).audio_codes
        waveform = trainer.tokenizer.decode(codes).audio_values[0, 0, :length]
        decoded.append((recording, waveform))
        window = slice(batch.segments[clip], batch.segments[clip] + batch.segment_samples)
        segments.append(waveform[window])
        real.append(recording[window])
        offset += length
    mel_loss = trainer.trained.mel_loss
    frames = {hop: [1 + length // hop for length in batch.lengths] for hop in mel_loss.hops}
    reconstruction = 0
    for hop, bins in zip(mel_loss.hops, mel_loss.bins, strict=True):
        for (recording, waveform), count in zip(decoded, frames[hop], strict=True):
            mels = [mel_loss._mel(signal[None], [len(signal)], bins, hop) for signal in (recording, waveform)]
            reconstruction = reconstruction + (mels[0] - mels[1]).abs().mean() * count / sum(frames[hop])
    # In evaluation mode the power iteration stands still where the step left it.
    discriminator.eval()
    on_real, on_fake = discriminator(torch.stack(real), torch.stack(segments))
    adversarial = torch.stack([torch.relu(1 - layers[-1]).mean() for layers in on_fake]).mean()
    matching = torch.stack(
        [
            torch.stack([(f - r.detach()).abs().mean() for r, f in zip(rs[:-1], fs[:-1], strict=True)]).mean()
            for rs, fs in zip(on_real, on_fake, strict=True)
        ]
    ).mean()
    (reconstruction + adversarial + 2 * matching).backward()
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad, rtol=2e-3, atol=2e-6, msg=name)
    discriminator.zero_grad()
    on_real, on_fake = discriminator(torch.stack(real), torch.stack(segments).detach())
    hinges = [
        (torch.relu(1 - r[-1]).mean() + torch.relu(1 + f[-1]).mean()) for r, f in zip(on_real, on_fake, strict=True)
    ]
    torch.stack(hinges).mean().backward()
    for name, parameter in discriminator.named_parameters():
        torch.testing.assert_close(judged[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


class Waiting(TorchDispatchMode):
    """Refuses operations for which a GPU is waited for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "bincount", "nonzero", "_unique2", "masked_select", "equal"), name
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(("stage", "codes"), [(1, None), (2, None), (2, "audio_codes")])
def test_nothing_in_a_step_waits_for_the_gpu(stage, codes, stage1, clips, tmp_path):
    start = stage1 / "checkpoint-200"
    changed = {"stage": stage, "audio_to_text_weight": 0.0, "codes_column": codes}
    trainer = Trainer(TrainingConfig(**options(start, tmp_path, **changed)), tokenized(clips, start))
    reader = trainer._reader(trainer.train_clips, training=True)
    (batch,) = reader.loader(plan_epoch([RATE // 2] * 20, RATE * 20, 1, 0, 0), 0)
    assert (batch.codes is None) == (codes is None)
    trainer.trained.train([batch], 0)  # the first asks whether the codebooks are set
    with Waiting():
        trainer.trained.backward(batch, 4, 1.0)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Waiting():
        batch.waveforms.sum().item()


def test_discriminators_have_no_weight_decay(stage1, clips, tmp_path):
    trainer = Trainer(TrainingConfig(**options(stage1 / "checkpoint-200", tmp_path, weight_decay=0.1)), clips)
    assert {group["weight_decay"] for group in trainer.trained.discriminator_optimizer.param_groups} == {0.0}
    decays = {group["weight_decay"] for group in trainer.trained.optimizer.param_groups}
    assert decays == {0.0, 0.1}


def test_gradient_accumulation_is_a_larger_batch(stage1, tmp_path, waveform):
    # Clips of one length, so that every batch weighs alike, and all of them in a step.
    audio = [{"array": waveform[n * 6000 :][:12000], "sampling_rate": RATE} for n in range(8)]
    dataset = datasets.Dataset.from_dict({"audio": audio})
    start = stage1 / "checkpoint-200"
    run(start, tmp_path / "one", dataset, batch_seconds=4.0, max_steps=2)
    run(start, tmp_path / "two", dataset, batch_seconds=2.0, gradient_accumulation_steps=2, max_steps=2)
    assert_moved_alike(start, tmp_path / "two" / "checkpoint-2", tmp_path / "one" / "checkpoint-2")


def test_gains(stage1, clips, tmp_path):
    changed = {"gain_db": 20.0, "crop_seconds": 2.0}
    trainer = Trainer(TrainingConfig(**options(stage1 / "checkpoint-200", tmp_path, **changed)), clips)

    def ratios(crop: bool, epoch: int = 0) -> torch.Tensor:
        planned = PlannedBatch(epoch, list(range(20)))
        batch = trainer._reader(trainer.train_clips, training=crop)[planned]
        recorded = torch.cat([trainer.train_clips.load(clip)[0] for clip in range(20)])
        assert batch.waveforms.abs().max() <= 1 + 1e-6
        means = [
            made.norm() / given.norm()
            for made, given in zip(batch.waveforms.split(batch.lengths), recorded.split(batch.lengths), strict=True)
        ]
        torch.testing.assert_close(
            batch.waveforms, torch.cat([g * c for g, c in zip(means, recorded.split(batch.lengths), strict=True)])
        )
        return torch.stack(means)

    gains = ratios(True)
    assert gains.min() >= 0.0999 and 1.5 < gains.max() <= 10.001
    assert gains.log10().std() > 0.2
    assert torch.equal(gains, ratios(True)) and not torch.equal(gains, ratios(True, epoch=1))
    assert torch.equal(ratios(False), torch.ones(20))


def test_equalizer(stage1, clips, tmp_path):
    """Random gains at octaves, in decibels linear between them, without a phase; validation has none."""
    changed = {"equalizer_db": 9.0, "crop_seconds": 2.0}
    trainer = Trainer(TrainingConfig(**options(stage1 / "checkpoint-200", tmp_path, **changed)), clips)
    reader = trainer._reader(trainer.train_clips, training=True)
    impulse = torch.zeros(RATE)
    impulse[RATE // 2] = 1
    response = reader._equalized(impulse, random.Random(1))
    # As much before the impulse as after it.
    torch.testing.assert_close(response[1 : RATE // 2], response[RATE // 2 + 1 :].flip(0), atol=1e-4, rtol=0)
    decibels = 20 * torch.fft.rfft(response).abs().log10()
    gains = decibels[[60 * 2**octave for octave in range(8)]]
    assert gains.abs().max() < 9.1 and gains.std() > 2
    between = decibels[[round(60 * 2 ** (octave + 0.5)) for octave in range(7)]]
    torch.testing.assert_close(between, (gains[1:] + gains[:-1]) / 2, atol=0.2, rtol=0)

    planned = PlannedBatch(0, list(range(20)))
    batch = reader[planned]
    assert batch.waveforms.abs().max() <= 1 + 1e-6
    assert torch.equal(batch.waveforms, reader[planned].waveforms)
    assert not torch.equal(batch.waveforms, reader[PlannedBatch(1, planned.clips)].waveforms)
    unchanged = trainer._reader(trainer.train_clips, training=False)[planned].waveforms
    assert torch.equal(unchanged, torch.cat([trainer.train_clips.load(clip)[0] for clip in planned.clips]))


def test_codes_that_are_there_are_used(stage1, clips, tmp_path, monkeypatch):
    """Whole clips give the same training with the encoder and without it."""
    start = stage1 / "checkpoint-200"
    whole = {"crop_seconds": 2.0, "quantizer_dropout": 0.5}
    run(start, tmp_path / "encoder", clips, clips.select(range(4)), **whole)
    with_codes = tokenized(clips, start)
    AcceleratorState._reset_state(reset_partial_state=True)
    config = TrainingConfig(**options(start, tmp_path / "codes", codes_column="audio_codes", **whole))
    trainer = Trainer(config, with_codes, with_codes.select(range(4)))
    monkeypatch.setattr(trainer.tokenizer.encoder, "forward", None)
    trainer.train()
    assert_same_weights(tmp_path / "codes" / "checkpoint-4", tmp_path / "encoder" / "checkpoint-4", rtol=0, atol=1e-6)
    name = "validation/reconstruction_loss"
    assert logged(tmp_path / "codes", name) == pytest.approx(logged(tmp_path / "encoder", name), abs=1e-6)


def test_an_encoder_that_does_not_run_stays_as_it_is(stage1, waveform, tmp_path, monkeypatch):
    """Neither moved to the device nor rounded."""
    tokenizer = load_model(stage1 / "checkpoint-200", device="cpu")
    clip = torch.from_numpy(waveform[:24000])
    codes = encode_waveforms(tokenizer, [clip])

    def refuse(self, *arguments):
        raise AssertionError("the encoder is moved")

    monkeypatch.setattr(MiMoAudioTokenizerEncoder, "_apply", refuse)
    config = TrainingConfig(**options(Path(), tmp_path, codes_column="audio_codes", mixed_precision="bf16"))
    trained = TrainingStep(config, make_accelerator(config), tokenizer)
    trained.train([Collator(tokenizer.config, 4800)([clip], codes=codes)], 0)
    assert tokenizer.encoder.quantizer.codebooks[0].embed.dtype == torch.bfloat16
    assert tokenizer.encoder.conv1.weight.dtype == torch.float32
    with pytest.raises(AssertionError, match="encoder is moved"):
        tokenizer.to(torch.bfloat16)


def test_crops_of_codes(stage1, waveform, tmp_path):
    start = stage1 / "checkpoint-200"
    clip = datasets.Dataset.from_dict({"audio": [{"array": waveform[:50000], "sampling_rate": RATE}]})
    with_codes = tokenized(clip, start)
    config = TrainingConfig(**options(start, tmp_path, codes_column="audio_codes", crop_seconds=0.5))
    trainer = Trainer(config, with_codes)
    reader = trainer._reader(trainer.train_clips, training=True)
    assert reader.used_samples(0) == 12 * 960  # of the 12.5 frames in half a second
    codes = torch.tensor(with_codes["audio_codes"][0])
    starts = set()
    for epoch in range(5):
        batch = reader[PlannedBatch(epoch, [0])]
        assert batch.code_lengths == [12] and batch.codes.shape == (12, 4)
        (first,) = (i for i in range(0, 39 * 960, 960) if np.array_equal(waveform[i:][: 12 * 960], batch.waveforms))
        assert torch.equal(batch.codes, codes[first // 960 :][:12])
        starts.add(first)
    assert len(starts) > 2


def test_crops_shorter_than_the_losses_need_are_refused(stage1, clips, tmp_path):
    short = {"codes_column": "audio_codes", "crop_seconds": 0.09, "min_seconds": 0.09, "discriminator_seconds": 0.086}
    with pytest.raises(ValueError, match="crop_seconds=0.09; accepted: 0.085 or more"):
        Trainer(TrainingConfig(**options(stage1 / "checkpoint-200", tmp_path, **short)), clips)


def test_codes_that_cannot_be_a_clips_own_are_skipped(stage1, clips, tmp_path):
    start = stage1 / "checkpoint-200"
    codes = [torch.tensor(each) for each in tokenized(clips, start)["audio_codes"]]
    damaged = [codes[0][:-1], codes[1][:, :3], codes[2] + 64, -codes[3] - 1, None, *codes[5:]]
    column = [None if each is None else each.tolist() for each in damaged]
    dataset = datasets.Dataset.from_list([{**clip, "codes": each} for clip, each in zip(clips, column, strict=True)])
    config = TrainingConfig(**options(start, tmp_path, codes_column="codes"))
    skipped = Trainer(config, dataset).train_clips.skipped
    reasons = [
        "frames of codes, not",
        "codes has 3 codebooks; accepted: all 4",
        f"hold {codes[2][0, 0] + 64} for codebook 0 (counted from 0); accepted: 0 to 63",
        "hold -",
        "no codes",
    ]
    assert len(skipped) == 5
    for problem, reason in zip(skipped.values(), reasons, strict=True):
        assert reason in problem
    binary = [(each % 2).bool().tolist() for each in codes]
    binary = datasets.Dataset.from_list([{**clip, "codes": each} for clip, each in zip(clips, binary, strict=True)])
    with pytest.raises(ValueError, match="codes is torch.bool; accepted: integers"):
        Trainer(config, binary)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """Another model of the same sizes."""
    torch.manual_seed(1)
    directory = tmp_path_factory.mktemp("checkpoints") / "foreign"
    MiMoAudioTokenizerModel(MiMoAudioTokenizerConfig(**MINI)).save_pretrained(directory)
    return directory


def test_codes_of_another_model_are_an_error(stage1, foreign, clips, tmp_path, monkeypatch):
    start = stage1 / "checkpoint-200"
    own, others = tokenized(clips, start), tokenized(clips, foreign)
    mixed = datasets.concatenate_datasets([own.select([0]), others.select(range(1, 20))])
    config = TrainingConfig(**options(start, tmp_path, codes_column="audio_codes", key_column="name"))
    for train, validation in ((others, None), (mixed, None), (own, others.select(range(4)))):
        with pytest.raises(ValueError, match=r"clip clip\d+: \d+% of .*'audio_codes'.* codes that this model made"):
            Trainer(config, train, validation)
    rounded = tokenized(clips, start, dtype="bfloat16")
    assert rounded["audio_codes"][:] != own["audio_codes"][:]
    Trainer(config, rounded, rounded.select(range(4)))
    monkeypatch.setattr(accelerate.Accelerator, "is_main_process", False)
    Trainer(config, others)  # of other processes, none looks itself


def test_codes_are_compared_in_few_short_clips(stage1, waveform, tmp_path, monkeypatch):
    """Of long recordings alone, in the shortest, and no more of it than is encoded in one piece."""
    start = stage1 / "checkpoint-200"
    long = [np.resize(waveform, seconds * RATE) for seconds in (80, 70)]
    short = [waveform[: (40 + number) * 960] for number in range(5)]
    made = [
        tokenized(datasets.Dataset.from_dict({"audio": [{"array": w, "sampling_rate": RATE} for w in audio]}), start)
        for audio in (long, long + short)
    ]
    lengths: list[int] = []

    def encode(model, waveforms, num_quantizers):
        lengths.extend(map(len, waveforms))
        return encode_waveforms(model, waveforms, num_quantizers)

    monkeypatch.setattr("mimo_audio_hf.training.trainer.encode_waveforms", encode)
    config = TrainingConfig(**options(start, tmp_path, codes_column="audio_codes"))
    Trainer(config, made[1], made[0])
    assert 60 * RATE <= lengths[0] < 60.1 * RATE
    drawn = lengths[1:]
    assert len(set(drawn)) == 3 and set(drawn) <= {len(each) for each in short}
    Trainer(config, made[1])
    assert lengths[4:] == drawn
    monkeypatch.undo()
    # After the first piece it is not looked at.
    codes = [np.array(each) for each in made[0]["audio_codes"]]
    for first, error in ((0, True), (1500, False)):
        changed = [np.concatenate([each[:first], 31 - each[first:].clip(max=31)]) for each in codes]
        dataset = made[0].remove_columns("audio_codes").add_column("audio_codes", [each.tolist() for each in changed])
        with pytest.raises(ValueError, match=r"train\[1\]: \d+%") if error else contextlib.nullcontext():
            Trainer(config, dataset)


def test_two_processes_are_told_of_codes_of_another_model(stage1, foreign, clips, tmp_path):
    tokenized(clips, foreign).save_to_disk(tmp_path / "data")
    start = stage1 / "checkpoint-200"
    values = options(start, tmp_path / "run", train_data=str(tmp_path / "data"), codes_column="audio_codes")
    finished = train_in_two_processes(values, tmp_path)
    assert finished.returncode != 0
    assert finished.stderr.count("accepted: codes that this model made") == 2


def test_quantizer_dropout_is_of_the_step_alone(stage1, clips, tmp_path):
    config = TrainingConfig(**options(stage1 / "checkpoint-200", tmp_path, quantizer_dropout=0.5))
    trainer = Trainer(config, clips)
    drawn = [trainer.trained.num_quantizers(step) for step in range(400)]
    assert drawn == [trainer.trained.num_quantizers(step) for step in range(400)]
    counts = np.bincount(drawn, minlength=5)[1:]
    assert (counts[:3] > 25).all() and 220 < counts[3] < 280  # 400 * (1/2 + 1/8), and 50 of each other


# --- Going on ---


def kill_when(path: Path, config: Path) -> None:
    """Runs the command in a process of its own, which is killed as soon as a file is there."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(mimo_audio_hf.__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, "-m", "mimo_audio_hf.cli", "train", str(config)], env=environment, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 120
        while not path.exists():
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("stage", [1, 2])
def test_killed_and_resumed_is_undisturbed(stage, fresh, stage1, folder, tmp_path, capsys):
    texts = [f"clip {number}" for number in range(6)]
    dataset = datasets.Dataset.from_dict(
        {"audio": [str(folder / f"{number}.wav") for number in range(6)], "text": texts}
    )
    dataset.save_to_disk(tmp_path / "data")
    values = options(
        fresh if stage == 1 else stage1 / "checkpoint-200",
        tmp_path / "killed",
        stage=stage,
        train_data=str(tmp_path / "data"),
        batch_seconds=1.3,  # two clips: a resumed run starts within an epoch
        max_steps=16,
        save_steps=2,
        quantizer_dropout=0.5,
        text_model_config=LANGUAGE_MODEL if stage == 1 else None,
    )
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    kill_when(tmp_path / "killed" / "checkpoint-4", config)
    stopped = max(int(path.name[11:]) for path in (tmp_path / "killed").glob("checkpoint-*"))
    assert 4 <= stopped < 16
    # What the first ran into on the way does not matter to the second; how far it goes does.
    assert main(["train", str(config), "--resume"]) == 0
    assert f"steps {stopped} to 16" in capsys.readouterr().out
    assert main(["train", str(config), "--output-dir", str(tmp_path / "undisturbed")]) == 0
    assert_same_weights(
        tmp_path / "killed" / "checkpoint-16", tmp_path / "undisturbed" / "checkpoint-16", rtol=0, atol=0
    )
    assert sorted(path.name for path in (tmp_path / "killed").glob("checkpoint-*")) == [
        "checkpoint-14",
        "checkpoint-16",
    ]
    assert not [path for path in (tmp_path / "killed").rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".pth")]


@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes_are_one(stage, stage1, folder, tmp_path):
    model = load_model(stage1 / "checkpoint-200", device="cpu")
    # Entries are revived with vectors of the first process, of which two processes have other ones.
    model.config.threshold_ema_dead_code = 0
    model.save_pretrained(tmp_path / "model")
    data = shutil.copytree(folder, tmp_path / "data")
    (data / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{n}.wav", "text": "yes " * (n + 1)}) for n in range(6))
    )
    values = options(
        tmp_path / "model",
        tmp_path / "two",
        stage=stage,
        train_data=str(data),
        validation_data=str(data),
        validation_clips=3,
        batch_seconds=1.0,  # for each process; together they hold three or four clips
        text_model_config=LANGUAGE_MODEL if stage == 1 else None,
        max_steps=2,
        gradient_accumulation_steps=2,
    )
    finished = train_in_two_processes(values, tmp_path)
    assert finished.returncode == 0, finished.stderr
    one = ["--output-dir", str(tmp_path / "one"), "--batch-seconds", "2.0"]
    assert main(["train", str(tmp_path / "run.yaml"), *one]) == 0
    names = ["reconstruction_loss", "gradient_norm"]
    names += ["audio_to_text_loss", "commitment_loss"] if stage == 1 else ["adversarial_loss", "feature_matching_loss"]
    names += [] if stage == 1 else ["discriminator_loss", "discriminator_gradient_norm"]
    for name in names:
        found, expected = (logged(tmp_path / run, f"train/{name}") for run in ("two", "one"))
        assert len(found) == 1  # a look every two steps
        np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=name)
    found, expected = (logged(tmp_path / run, "validation/reconstruction_loss") for run in ("two", "one"))
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert_moved_alike(tmp_path / "model", tmp_path / "two" / "checkpoint-2", tmp_path / "one" / "checkpoint-2")
    # Each process read its share of the data, and knows all of them.
    two, one = (json.loads((tmp_path / run / "training.json").read_text())["data"] for run in ("two", "one"))
    assert two == one and two["train"]["clips"] == 6


def test_killed_between_best_and_checkpoint(stage1, clips, tmp_path, monkeypatch):
    """And with all that a kill may leave: a log's half line, entries after the checkpoint, temporary directories."""
    losses = {1: 3.0, 2: 2.0, 3: 4.0, 4: 1.0}
    monkeypatch.setattr(Trainer, "validate", lambda self: {"reconstruction_loss": losses[self.step]})
    values = options(stage1 / "checkpoint-200", tmp_path, eval_steps=1, save_steps=2, save_total_limit=9)
    trainer = Trainer(TrainingConfig(**values), clips, clips)
    save, saved = trainer.save, []

    def killed(target, metrics, *, to_resume):
        if trainer.step == 4 and saved[-1] == 4:  # the second of the last step's two
            raise KeyboardInterrupt
        save(target, metrics, to_resume=to_resume)
        saved.append(trainer.step)

    monkeypatch.setattr(trainer, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "train/rec')
    leftover = tmp_path / f".{'0' * 32}.tmp"
    (leftover / "trainer").mkdir(parents=True)
    (tmp_path / ".notes.tmp").touch()  # somebody else's
    resumed = Trainer(TrainingConfig(**values | {"resume": True}), clips, clips)
    assert (resumed.step, resumed.best) == (2, 1.0)
    resumed.train()
    assert json.loads((tmp_path / "best" / "training.json").read_text())["step"] == 4
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 1, 2, 2, 3, 3, 4, 4]
    assert not leftover.exists() and (tmp_path / ".notes.tmp").exists()


def test_best_is_of_one_metric_and_of_one_set_of_clips(stage1, clips, tmp_path):
    values = options(stage1 / "checkpoint-200", tmp_path, max_steps=1, lr_scheduler_type="constant")
    Trainer(TrainingConfig(**values), clips, clips.select(range(2))).train()
    values |= {"resume": True, "max_steps": 2}
    same = Trainer(TrainingConfig(**values), clips, clips.select(range(2)))
    best = json.loads((tmp_path / "best" / "training.json").read_text())
    assert same.best == best["metrics"]["reconstruction_loss"]
    other_clips = Trainer(TrainingConfig(**values), clips, clips.select(range(3)))
    metric = {"metric_for_best_model": "stoi", "metrics": ["stoi"]}
    other_metric = Trainer(TrainingConfig(**values | metric), clips, clips.select(range(2)))
    assert other_clips.best is None and other_metric.best is None


def test_metrics_are_those_of_the_checkpoint(stage1, clips, tmp_path):
    def undefined(reference: torch.Tensor, decoded: torch.Tensor, sampling_rate: int) -> float:
        raise ValueError("not defined")

    config = TrainingConfig(**options(stage1 / "checkpoint-200", tmp_path, max_steps=3, eval_steps=2, save_steps=1))
    Trainer(config, clips, clips.select(range(2)), metrics={"undefined": undefined}).train()
    two, three = (json.loads((tmp_path / f"checkpoint-{step}" / "training.json").read_text()) for step in (2, 3))
    assert set(two["metrics"]) == set(three["metrics"]) != set()
    assert "undefined" not in two["metrics"] and two["metrics"] != three["metrics"]
    config = TrainingConfig(**options(stage1 / "checkpoint-200", tmp_path / "odd", max_steps=2, save_steps=1))
    Trainer(config, clips, clips.select(range(2))).train()
    assert json.loads((tmp_path / "odd" / "checkpoint-1" / "training.json").read_text())["metrics"] == {}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 1e-5}, "learning_rate=1e-05; accepted with resume=True: 0.002"),
        ({"stage": 1, "audio_to_text_weight": 0.0}, "stage=1"),
        ({"max_steps": 9}, "max_steps=9"),
        ({"mixed_precision": "bf16"}, "mixed_precision='bf16'"),
        ({"resume": False}, "holds a run already"),
        ({"output_dir": "elsewhere"}, "no checkpoint to resume"),
    ],
)
def test_resuming_something_else_is_refused(changed, message, stage1, clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = stage1 / "checkpoint-200"
    run(start, tmp_path / "run", clips, max_steps=1)
    again = options(start, tmp_path / "run", max_steps=1, resume=True) | changed
    with pytest.raises(ValueError, match=message):
        Trainer(TrainingConfig(**again), None)  # before any data are looked at
    with pytest.raises(ValueError, match="data are not those"):
        Trainer(TrainingConfig(**options(start, tmp_path / "run", max_steps=1, resume=True)), clips.select(range(5)))


def test_resuming_in_another_precision_is_refused(stage1, clips, tmp_path, monkeypatch):
    values = options(stage1 / "checkpoint-200", tmp_path, max_steps=1, mixed_precision=None)
    Trainer(TrainingConfig(**values), clips).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="mixed_precision='bf16'; accepted with resume=True: 'no'"):
        Trainer(TrainingConfig(**values | {"resume": True}), clips)


def edited(file: Path, **changed) -> None:
    """Replaces entries of a JSON object, or takes out those that are None."""
    content = json.loads(file.read_text()) | changed
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def test_options_that_an_older_checkpoint_lacks_had_their_defaults(stage1, clips, tmp_path):
    values = options(stage1 / "checkpoint-200", tmp_path, max_steps=1, resume=True)
    run(stage1 / "checkpoint-200", tmp_path, clips, max_steps=1)
    document = tmp_path / "checkpoint-1" / "training.json"
    older = json.loads(document.read_text())["config"]
    del older["gain_db"], older["codes_column"]
    edited(document, config=older)
    assert Trainer(TrainingConfig(**values), clips).step == 1
    with pytest.raises(ValueError, match="gain_db=3.0; accepted with resume=True: 0.0"):
        Trainer(TrainingConfig(**values | {"gain_db": 3.0}), clips)


def test_what_came_from_the_hub_is_noted(fresh, folder, tmp_path, monkeypatch):
    """A relative path may look like a name on the Hub, also when it leads nowhere any more."""

    def noted(model: str, data: str, output_dir: str, **changed) -> list[str]:
        values = {"train_data": data, "validation_data": data, "lr_scheduler_type": "constant", "save_steps": 1}
        Trainer(TrainingConfig(**options(Path(model), Path(output_dir), **values | changed))).train()
        return json.loads(Path(output_dir, "training.json").read_text())["from_hub"]

    monkeypatch.chdir(tmp_path)
    shutil.copytree(fresh, "models/fresh")
    shutil.copytree(folder, "data/voices")
    assert noted("models/fresh", "data/voices", "run", max_steps=1) == []
    shutil.rmtree("models")
    assert noted("models/fresh", "data/voices", "run", max_steps=2, resume=True) == []

    place = "mimo_audio_hf.training.trainer"
    monkeypatch.setattr(f"{place}.load_model", lambda _, **options: load_model(fresh, **options))
    monkeypatch.setattr(f"{place}.open_dataset", lambda _, *options: open_dataset(str(folder), *options))
    assert noted("me/fresh", "me/voices", "hub", max_steps=1) == ["model", "train_data", "validation_data"]


def test_damaged_checkpoints_are_named(stage1, clips, tmp_path):
    run(stage1 / "checkpoint-200", tmp_path, clips, clips.select(range(2)), max_steps=1)
    config = TrainingConfig(**options(stage1 / "checkpoint-200", tmp_path, max_steps=1, resume=True))
    for name, changed, message in (
        ("checkpoint-1/training.json", {"config": None}, "config is missing; accepted: dict"),
        ("checkpoint-1/training.json", {"config": [1]}, "config is of type list"),
        ("checkpoint-1/training.json", {"processes": None}, "processes is missing"),
        ("checkpoint-1/training.json", {"mixed_precision": None}, "mixed_precision is missing"),
        ("checkpoint-1/training.json", {"data": None}, "data.train.fingerprint is missing"),
        ("checkpoint-1/training.json", {"data": {"train": "speech"}}, "data.train.fingerprint is missing"),
        ("checkpoint-1/trainer/state.json", {"step": "1"}, "step is of type str; accepted: int"),
        ("checkpoint-1/trainer/state.json", {"scheduler": None}, "scheduler is missing"),
        ("checkpoint-1/trainer/state.json", {"optimizer": {}}, "optimizer.param_groups is missing"),
        ("checkpoint-1/trainer/state.json", {"discriminator_scheduler": None}, "discriminator_scheduler is missing"),
        ("checkpoint-1/trainer/state.json", {"discriminator_optimizer": {}}, "discriminator_optimizer.param_groups"),
        ("best/training.json", {"data": {"validation": None}}, "data.validation.fingerprint is missing"),
        ("best/training.json", {"metrics": None}, "metrics is missing"),
    ):
        file = tmp_path / name
        whole = file.read_text()
        edited(file, **changed)
        with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: {re.escape(message)}"):
            Trainer(config, clips, clips.select(range(2)))
        file.write_text(whole)
    (tmp_path / "checkpoint-1" / "training.json").write_text("[]")
    with pytest.raises(ValueError, match=r"checkpoint-1/training\.json holds a list; accepted: a JSON object"):
        Trainer(config, clips)


# --- Validation and what lies beside the weights ---


def test_validation_writes_what_people_look_at(stage1, clips, waveform, tmp_path):
    def loudness(reference: torch.Tensor, decoded: torch.Tensor, sampling_rate: int) -> float:
        assert reference.shape == decoded.shape and sampling_rate == RATE
        if len(reference) == int(0.4 * RATE):
            raise ValueError("not defined")
        return float(len(reference))

    config = TrainingConfig(
        **options(
            stage1 / "checkpoint-200",
            tmp_path,
            metric_for_best_model="loudness",
            report_to=["tensorboard"],
            validation_samples=2,
        )
    )
    trainer = Trainer(config, clips, clips.select(range(4)), metrics={"loudness": loudness})
    metrics = trainer.train()
    lengths = [int(RATE * (0.4 + 0.02 * number)) for number in range(1, 4)]
    assert metrics["loudness"] == pytest.approx(np.mean(lengths))
    model = load_model(tmp_path / "checkpoint-4", device="cpu")
    codes = torch.cat(encode_waveforms(model, [torch.tensor(row["array"]) for row in clips.select(range(4))["audio"]]))
    for book, size in enumerate([64, 32, 32, 32]):
        assert metrics[f"codebook_use/{book}"] == len(codes[:, book].unique()) / size
    for step in (2, 4):
        samples = tmp_path / "samples" / f"step-{step}"
        names = ("-decoded.wav", "-recording.wav", ".png")
        assert sorted(path.name for path in samples.iterdir()) == sorted(
            f"{n}{name}" for n in (0, 1) for name in names
        )
        assert soundfile.info(samples / "0-decoded.wav").frames == int(0.4 * RATE)
    assert (tmp_path / "training.png").is_file()
    assert list((tmp_path / "logs" / "mimo-audio-train").glob("events*"))
    best = json.loads((tmp_path / "best" / "training.json").read_text())
    assert best["metrics"]["loudness"] == metrics["loudness"]
    assert best["step"] == 2  # no worse than later ones
    assert best["data"]["train"]["clips"] == 20 and len(best["data"]["train"]["fingerprint"]) == 64
    assert best["versions"]["torch"] == torch.__version__
    assert best["config"]["learning_rate"] == 2e-3
    assert not (tmp_path / "best" / "trainer").exists()
    load_model(tmp_path / "best", device="cpu")


def test_a_long_validation_clip_is_cut(stage1, clips, waveform, tmp_path):
    lengths = []

    def length(reference: torch.Tensor, decoded: torch.Tensor, sampling_rate: int) -> float:
        lengths.append(len(reference))
        return 0.0

    long = datasets.Dataset.from_dict(
        {"audio": [{"array": waveform[:count], "sampling_rate": RATE} for count in (3 * RATE, RATE)]}
    )
    config = TrainingConfig(**options(stage1 / "checkpoint-200", tmp_path, max_steps=1, batch_seconds=1.5))
    Trainer(config, clips, long, metrics={"length": length}).train()
    assert lengths == [RATE * 3 // 2, RATE]


def test_pictures(tmp_path):
    extractor = MiMoAudioTokenizerFeatureExtractor()
    recording, decoded = torch.randn(2, RATE, generator=torch.Generator().manual_seed(0)) * 0.1
    figure = reconstruction_figure(recording, decoded, extractor)
    for axes, waveform in zip(figure.axes[:2], (recording, decoded), strict=True):
        assert np.array_equal(axes.lines[0].get_ydata(), waveform)
    for axes, waveform in zip(figure.axes[2:], (recording, decoded), strict=True):
        assert np.array_equal(axes.images[0].get_array(), extractor.log_mel_spectrogram(waveform))
    log = [
        {"step": 1, "train/mel_loss": 3.0, "train/learning_rate": 1.0},
        {"step": 2, "train/mel_loss": 2.0},
        {"step": 2, "validation/mel_loss": 2.5, "validation/stoi": 0.5, "validation/codebook_use/0": 1.0},
    ]
    figure = training_figure(log)
    assert [axes.get_title() for axes in figure.axes] == ["mel_loss", "stoi"]
    train, validation = figure.axes[0].lines
    assert (list(train.get_xdata()), list(train.get_ydata())) == ([1, 2], [3.0, 2.0])
    assert (list(validation.get_xdata()), list(validation.get_ydata())) == ([2], [2.5])
    save_figure(tmp_path / "training.png", figure)
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error")
def test_pictures_of_nothing(tmp_path):
    """Of a silent recording, whose scales would show nothing of what was decoded, and of a log without losses."""
    extractor = MiMoAudioTokenizerFeatureExtractor()
    silent, decoded = torch.zeros(RATE), torch.randn(RATE, generator=torch.Generator().manual_seed(0)) * 0.1
    alone = reconstruction_figure(decoded, decoded, extractor)
    figure = reconstruction_figure(silent, decoded, extractor)
    for found, expected in zip(figure.axes, alone.axes, strict=True):
        assert found.get_ylim() == expected.get_ylim()
    for found, expected in zip(figure.axes[2:], alone.axes[2:], strict=True):
        assert found.images[0].get_clim() == expected.images[0].get_clim()
    save_figure(tmp_path / "silent.png", figure)
    save_figure(tmp_path / "nothing.png", reconstruction_figure(silent, silent, extractor))
    # The recording's own, where it has any.
    loud = reconstruction_figure(decoded, 5 * decoded, extractor)
    assert [axes.get_ylim() for axes in loud.axes] == [axes.get_ylim() for axes in alone.axes]
    assert loud.axes[3].images[0].get_clim() == alone.axes[3].images[0].get_clim()
    for log in ([], [{"step": 1, "train/learning_rate": 1.0}]):
        figure = training_figure(log)
        assert figure.axes == []
        save_figure(tmp_path / "training.png", figure)


# --- Bad data ---


def with_bad_clips(clips: datasets.Dataset, waveform: np.ndarray) -> datasets.Dataset:
    nan = waveform[:9600].copy()
    nan[5] = np.nan
    bad = {
        "silent": (np.zeros(9600, np.float32), "text"),
        "short": (waveform[:1000], "text"),
        "nan": (nan, "text"),
        "textless": (waveform[:9600], " "),
        "no text": (waveform[:9600], None),
    }
    rows = [
        {"audio": {"array": array.tolist(), "sampling_rate": RATE}, "text": text, "name": name}
        for name, (array, text) in bad.items()
    ]
    return datasets.Dataset.from_list([*clips.select(range(3)), *rows])


def test_bad_clips_are_counted_and_skipped(stage1, clips, waveform, tmp_path, caplog):
    bad = with_bad_clips(clips, waveform)
    stages = {
        2: {"silent": "silent", "short": "0.042 s, shorter than 0.1 s", "nan": "NaN"},
        1: {"textless": "no text", "no text": "no text"},
    }
    for stage, more in ((2, {}), (1, {"text_model_config": LANGUAGE_MODEL})):
        config = options(
            stage1 / "checkpoint-200", tmp_path / str(stage), stage=stage, key_column="name", max_steps=1, **more
        )
        Trainer(TrainingConfig(**config), bad).train()
        document = json.loads((tmp_path / str(stage) / "checkpoint-1" / "training.json").read_text())
        skipped = document["data"]["train"]["skipped"]
        wanted = stages[2] | (stages[1] if stage == 1 else {})
        assert skipped.keys() == wanted.keys()
        assert all(text in skipped[name] for name, text in wanted.items())
        assert f"{len(wanted)} of 8 training clips are skipped" in caplog.text


def test_no_usable_clip_is_an_error(stage1, clips, waveform, tmp_path):
    bad = with_bad_clips(clips, waveform).select([3, 4])
    with pytest.raises(ValueError, match="none of 2 clips can be used .*silent.*shorter"):
        Trainer(TrainingConfig(**options(stage1 / "checkpoint-200", tmp_path)), bad)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_clip_that_changes_stops_the_run(workers, stage1, waveform, tmp_path):
    file = tmp_path / "clip.wav"
    soundfile.write(file, waveform[:12000], RATE)
    dataset = datasets.Dataset.from_dict({"audio": [str(file)]})
    config = options(stage1 / "checkpoint-200", tmp_path / "run", dataloader_num_workers=workers)
    trainer = Trainer(TrainingConfig(**config), dataset)
    soundfile.write(file, waveform[:11000], RATE)
    with pytest.raises(ValueError, match=r"clip clip\.wav has 11000 samples and had 12000"):
        trainer.train()


def test_a_loss_that_is_not_finite_names_the_clips(stage1, clips, tmp_path, monkeypatch):
    trainer = Trainer(
        TrainingConfig(**options(stage1 / "checkpoint-200", tmp_path, key_column="name", max_steps=6, save_steps=2)),
        clips.select(range(4)),
    )
    train = trainer.trained.train

    def broken(batches, step):
        if step == 4:
            with torch.no_grad():
                next(trainer.trained.generator.parameters()).fill_(float("nan"))
        return train(batches, step)

    monkeypatch.setattr(trainer.trained, "train", broken)
    with pytest.raises(NonFiniteLossError, match=r"step 5: reconstruction_loss is not finite, .*clip3") as caught:
        trainer.train()
    assert sorted(caught.value.keys) == ["clip0", "clip1", "clip2", "clip3"]
    checkpoints = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-4"]
    for name in checkpoints:
        assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / name / "model.safetensors").values())


# --- Configuration, data and plan ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stage": 3}, "stage=3; accepted: 1 or 2"),
        ({"stage": "two"}, "stage='two'"),
        ({"learning_rate": "fast"}, "learning_rate='fast'"),
        ({"learning_rate": -1}, "learning_rate=-1.0; accepted: a positive number"),
        ({"batch_seconds": 1, "crop_seconds": 2}, "at most batch_seconds"),
        ({"mixed_precision": "fp16"}, "accepted: no or bf16"),
        ({"no_such": 1}, "no_such is no option"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "accepted: linear, cosine"),
        ({"adam_beta2": 1}, "adam_beta2=1.0; accepted: 0 to 1"),
        ({"validation_clips": 0}, "validation_clips=0; accepted: 1 or more"),
        ({"codes_column": "codes", "stage": 1}, "codes_column='codes'; accepted: nothing in stage 1"),
        ({"codes_column": "codes", "gain_db": 6}, "gain_db=6.0; accepted: 0 with codes"),
        ({"gain_db": -6}, "gain_db=-6.0; accepted: 0 or more"),
        ({"equalizer_db": float("inf")}, "equalizer_db=inf; accepted: 0 or more"),
        ({"codes_column": "codes", "equalizer_db": 6}, "equalizer_db=6.0; accepted: 0 with codes"),
        ({"max_steps": 1.5}, "max_steps=1.5; accepted: int"),
        ({"resume": 1}, "resume=1; accepted: bool"),
        ({"mel_scales": []}, r"mel_scales=\[\]; accepted: one or more integers from 2 to 10"),
        ({"mel_scales": 1}, r"mel_scales=\[1\]"),
        ({"mel_scales": ["five"]}, "mel_scales='five'"),
    ],
)
def test_bad_options(values, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig.from_values({"output_dir": "x"} | values)


def test_options_as_yaml_and_flags_give_them(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "output_dir: run\nlearning_rate: 1e-4\nreport_to: tensorboard\ntext_model_config: {model_type: gpt2}\n"
        "mel_scales: [5, 8]\n"
    )
    config = TrainingConfig.from_values(read_yaml(file))
    assert config.mel_scales == [5, 8]
    assert TrainingConfig.from_values({"output_dir": "run", "mel_scales": ["6", "7"]}).mel_scales == [6, 7]
    assert config.learning_rate == 1e-4  # which YAML takes for text
    assert config.report_to == ["tensorboard"] and config.text_model_config == {"model_type": "gpt2"}
    flags = {"output_dir": "x", "text_model_config": '{"model_type": "gpt2"}', "max_steps": "7"}
    assert TrainingConfig.from_values(flags).max_steps == 7
    for content in ("- a list", "{"):
        file.write_text(content)
        with pytest.raises(ValueError, match="run.yaml"):
            read_yaml(file)


def test_commands_errors_are_one_line(fresh, tmp_path, capsys):
    for arguments, message in (
        (["--output-dir", str(tmp_path / "x"), "--model", str(fresh)], "train_data is missing"),
        (["--output-dir", str(tmp_path / "x"), "--model", str(fresh), "--train-data", "none"], "data none: no such"),
        ([str(tmp_path / "none.yaml")], "none.yaml cannot be read"),
        (["--stage", "1"], "output_dir=''"),
        (["--output-dir", "x", "--metrics", "beauty"], "metric 'beauty'"),
        (
            ["--output-dir", "x", "--model", str(fresh), "--discriminator-seconds", "0.01"],
            "discriminator_seconds=0.01",
        ),
        (["--output-dir", "x", "--model", str(fresh), "--crop-seconds", "0.01"], "crop_seconds=0.01"),
    ):
        assert main(["train", *arguments]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("mimo-audio: error: ") and message in error


@pytest.mark.filterwarnings("ignore:.*no supported trackers")
def test_trackers_that_are_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)
    with pytest.raises(ValueError, match="report_to='tensorboard': its package is not installed"):
        make_accelerator(TrainingConfig(output_dir=str(tmp_path), report_to=["tensorboard"]))


@pytest.mark.parametrize(("kind", "version"), [(DistributedType.DEEPSPEED, 0), (DistributedType.FSDP, 1)])
def test_what_accelerate_may_not_be_configured_for(kind, version, tmp_path, monkeypatch):
    configured = SimpleNamespace(distributed_type=kind, is_fsdp2=version == 2, mixed_precision="no", log_with=[])
    monkeypatch.setattr("mimo_audio_hf.training.step.Accelerator", lambda **kwargs: configured)
    with pytest.raises(ValueError, match=f"configured for {kind.value}; accepted: DDP, or FSDP with fsdp_version 2"):
        make_accelerator(TrainingConfig(output_dir=str(tmp_path)))


def test_validation_data_are_checked_first(stage1, clips, tmp_path, monkeypatch):
    def inspect(dataset, *arguments, **options):
        raise ValueError(f"{len(dataset)} clips")

    monkeypatch.setattr(Clips, "inspect", inspect)
    with pytest.raises(ValueError, match="^3 clips"):
        Trainer(TrainingConfig(**options(stage1 / "checkpoint-200", tmp_path)), clips, clips.select(range(3)))


def test_datasets_by_name(folder, waveform, tmp_path):
    assert len(open_dataset(str(folder), "train")) == 6
    table = datasets.Dataset.from_dict({"audio": [str(folder / "0.wav")]})
    table.save_to_disk(tmp_path / "disk")
    datasets.DatasetDict({"a": table, "b": table}).save_to_disk(tmp_path / "splits")
    table.to_csv(tmp_path / "table.csv")
    for name in ("disk", "table.csv"):
        assert open_dataset(str(tmp_path / name), "train")["audio"] == [str(folder / "0.wav")]
    (tmp_path / "list.jsonl").write_text('{"sound": "clips/0.wav"}\n{"sound": null}\n')
    listed = open_dataset(str(tmp_path / "list.jsonl"), "train", "sound")["sound"]
    assert listed == [str(tmp_path / "clips" / "0.wav"), None]
    with pytest.raises(ValueError, match="no split 'train'; accepted: a, b"):
        open_dataset(str(tmp_path / "splits"), "train")
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "empty", tmp_path / "none", Path(RECORDING)):
        with pytest.raises(ValueError, match=f"data {name}"):
            open_dataset(str(name), "train")


def test_clips_of_every_kind(folder, waveform):
    paths = [str(folder / f"{number}.wav") for number in range(2)]
    decoded = datasets.Dataset.from_dict({"audio": paths}).cast_column("audio", datasets.Audio())
    for dataset in (decoded, datasets.Dataset.from_dict({"audio": paths})):
        found = Clips.inspect(dataset, "x", RATE)
        assert found.keys == ["0.wav", "1.wav"] and found.lengths == [12000, 12960]
        assert len(found.load(1)[0]) == 12960
    one, two = (Clips.inspect(decoded.select(rows), "x", RATE).fingerprint for rows in ([0, 1], [1, 0]))
    assert one != two
    with pytest.raises(ValueError, match="no column 'sound'; accepted: audio"):
        Clips.inspect(decoded, "x", RATE, audio_column="sound")


def test_codes_are_part_of_the_fingerprint(stage1, clips):
    start = stage1 / "checkpoint-200"
    collator = Collator(load_model(start, device="cpu").config, RATE)
    with_codes = tokenized(clips.select(range(2)), start)
    rows = with_codes.to_list()
    rows[1]["audio_codes"][3][2] ^= 1
    others = datasets.Dataset.from_list(rows, features=with_codes.features)
    read = {"codes_column": "audio_codes", "collator": collator}
    found = [Clips.inspect(dataset, "x", RATE, **read) for dataset in (with_codes, with_codes, others)]
    assert all(each.lengths == found[0].lengths and not each.skipped for each in found)
    assert found[0].fingerprint == found[1].fingerprint != found[2].fingerprint
    assert found[0].fingerprint != Clips.inspect(with_codes, "x", RATE).fingerprint


def test_clips_have_names_of_their_own(folder, waveform, tmp_path):
    for number, speaker in enumerate("ab"):
        (tmp_path / speaker).mkdir()
        shutil.copy(folder / f"{number}.wav", tmp_path / speaker / "1.wav")
        soundfile.write(tmp_path / speaker / "silent.wav", np.zeros(RATE), RATE)
    found = Clips.inspect(open_dataset(str(tmp_path), "train"), str(tmp_path), RATE)
    assert found.keys == ["a/1.wav", "b/1.wav"]
    assert found.skipped == {"a/silent.wav": "silent", "b/silent.wav": "silent"}
    elsewhere = datasets.Dataset.from_dict({"audio": [str(tmp_path / speaker / "1.wav") for speaker in "ab"]})
    assert Clips.inspect(elsewhere, "x", RATE).keys == ["1.wav[0]", "1.wav[1]"]
    nameless = datasets.Dataset.from_dict({"audio": [{"array": waveform[:9600], "sampling_rate": RATE}] * 2})
    assert Clips.inspect(nameless, "x", RATE).keys == ["x[0]", "x[1]"]


def test_folder_with_texts(folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    lines = [json.dumps({"file_name": f"{number}.wav", "text": f"text {number}"}) for number in range(6)]
    (data / "metadata.jsonl").write_text("\n".join(lines))
    dataset = open_dataset(str(data), "train").select(range(5))
    found = Clips.inspect(dataset, str(data), RATE, text_column="text", num_workers=2)
    assert found.keys == [f"{number}.wav" for number in range(5)]
    assert found.load(3)[1] == "text 3"
    (data / "metadata.jsonl").write_text('{"file_name": "0.wav"}')
    assert len(Clips.inspect(open_dataset(str(data), "train"), str(data), RATE)) == 1


def test_files_that_changed_are_read_again(folder, waveform, tmp_path):
    file = shutil.copy(folder / "0.wav", tmp_path)
    datasets.Dataset.from_dict({"audio": [str(file)]}).save_to_disk(tmp_path / "disk")
    before = Clips.inspect(open_dataset(str(tmp_path / "disk"), "train"), "x", RATE)
    soundfile.write(file, waveform[20000:][: before.lengths[0]], RATE)
    after = Clips.inspect(open_dataset(str(tmp_path / "disk"), "train"), "x", RATE)
    assert after.lengths == before.lengths and after.fingerprint != before.fingerprint


@pytest.mark.timeout(60)
def test_reading_in_processes_does_not_hang(folder):
    """Where torch has used its threads before: a forked process would wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (torch.ones(512, 512) @ torch.ones(512, 512)).exp().sum()
        found = Clips.inspect(open_dataset(str(folder), "train"), str(folder), 16000, num_workers=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert found.lengths == Clips.inspect(open_dataset(str(folder), "train"), str(folder), 16000).lengths


@pytest.mark.parametrize("clips", range(8, 40))
def test_plan_leaves_out_fewer_clips_than_there_are_processes(clips):
    """Also where no process has room for more than one: there, batches filled alike had too few clips."""
    seen = [clip for batch in plan_epoch([6000] * clips, 6000, 8, 0, 0) for clip in batch.clips]
    assert len(seen) == len(set(seen)) == clips // 8 * 8


@pytest.mark.parametrize("processes", [1, 3])
def test_plan(processes):
    generator = np.random.default_rng(0)
    lengths = [int(length) for length in generator.integers(1000, 20000, 500)]
    limit = 60000
    epochs = [plan_epoch(lengths, limit, processes, 7, epoch) for epoch in range(2)]
    for batches in epochs:
        seen = [clip for batch in batches for clip in batch.clips]
        assert sorted(seen) == list(range(500))
        for batch in batches:
            assert sum(lengths[clip] for clip in batch.clips) <= limit * processes
            shares = [sum(lengths[clip] for clip in batch.clips[rank::processes]) for rank in range(processes)]
            assert min(shares) > 0
    assert [batch.clips for batch in epochs[0]] != [batch.clips for batch in epochs[1]]
    assert epochs[0] == plan_epoch(lengths, limit, processes, 7, 0)
    # Of like lengths: padded to the longest of its batch, little would be added.
    padded = sum(len(batch.clips) * max(lengths[clip] for clip in batch.clips) for batch in epochs[0])
    assert padded < 1.25 * sum(lengths)
    with pytest.raises(ValueError, match="1 clips for 2 processes"):
        next(plan_run([1000], limit, 2, 0))
