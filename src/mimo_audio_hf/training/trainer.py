# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Training as the technical report does it (arXiv 2512.23808), on accelerate.

Stage 1 trains the whole tokenizer: L = 10 L_A2T + L_recon + L_commit. Stage 2 leaves encoder and quantizer as they
are, so that the codes stay what they were, and trains decoder and vocoder: L_G = L_recon + L_adv + 2 L_fm.

A run is a function of its configuration, its data and the number of the step: batches, crops, quantizer dropout and
torch's generators are derived from seed and step, so a checkpoint need not hold any generator's state, and a run that
was killed goes on to the weights that it would have had. Nothing in a step waits for the GPU; losses are looked at
every `logging_steps`, before every checkpoint and at the end.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import accelerate
import datasets
import torch
import transformers
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from ..audio import save_audio
from ..checkpoints import load_model
from ..files import read_json, replacing
from ..hub import TRAINING_NAME, is_hub_id
from ..inference import MAX_PIECE_FRAMES, encode_waveforms
from ..metrics import METRICS, Metric, require_metrics, require_package
from ..pictures import reconstruction_figure, save_figure
from ..version import __version__
from . import checkpointing
from .audio_to_text import AudioToTextLoss, load_language_model
from .config import RECONSTRUCTION, TrainingConfig
from .data import BatchReader, Clips, Collator, open_dataset, plan_epoch, plan_run
from .discriminators import AudioDiscriminator
from .losses import MultiScaleMelLoss
from .pictures import training_figure
from .step import TrainingStep, derived_seed, make_accelerator


logger = logging.getLogger(__name__)

LOG_NAME = "log.jsonl"

# Codes that a data set brings are compared with the model's own in so many clips, of up to so many seconds each.
_COMPARED_CLIPS = 3
_COMPARED_SECONDS = 5.0

# The metrics that are better when they are lower; all others are when they are higher.
_LOWER_IS_BETTER = (RECONSTRUCTION, "mel_distance")


class NonFiniteLossError(ValueError):
    """A loss or gradient that is NaN or infinite.

    Attributes:
        step: in which it was found.
        keys: names of the clips of that step.
    """

    def __init__(self, name: str, step: int, keys: list[str]) -> None:
        self.step = step
        self.keys = keys
        super().__init__(
            f"step {step}: {name} is not finite, with the clips {', '.join(keys)}; all checkpoints are from before"
        )


class Trainer:
    """A training run.

    Args:
        config: what to do.
        train_dataset, validation_dataset: datasets to use instead of those that the configuration names.
        metrics: functions by name, to validate with besides those that the configuration names.

    Raises:
        ValueError: an option, the model or the data cannot be used; or the directory holds a run already and is not to
            be resumed, or is of another configuration or other data.
        ModuleNotFoundError: a package is not installed; the message names the extra.
    """

    def __init__(
        self,
        config: TrainingConfig,
        train_dataset: datasets.Dataset | None = None,
        validation_dataset: datasets.Dataset | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        require_package("matplotlib", "train")
        self.config = config
        self.step = 0
        self.directory = Path(config.output_dir)
        require_metrics(config.metrics)
        self.metrics = {name: METRICS[name] for name in config.metrics} | dict(metrics or {})
        known = (RECONSTRUCTION, *self.metrics)
        if config.metric_for_best_model not in known:
            raise ValueError(f"metric_for_best_model={config.metric_for_best_model!r}; accepted: {', '.join(known)}")
        newest = checkpointing.newest(self.directory)
        if newest is not None and not config.resume:
            raise ValueError(
                f"{self.directory} holds a run already ({newest.name}); accepted: another directory, or resume=True"
            )
        if newest is None and config.resume:
            raise ValueError(f"{self.directory} holds no checkpoint to resume from; accepted: resume=False")
        self.accelerator = make_accelerator(config)
        self.device = self.accelerator.device
        # Options that name something of the Hub: a name alone does not tell, once it is read on another machine.
        self._from_hub = {"model"} if is_hub_id(config.model) else set()
        if newest is not None:
            self._require_same_run(newest)
        # The same in every process: fresh discriminators and language models have to be.
        torch.manual_seed(derived_seed(config.seed, "fresh modules"))
        self.tokenizer = load_model(
            config.model if newest is None else newest,
            device="cpu",
            dtype=torch.float32,
            attn_implementation=config.attn_implementation,
        )
        if self.tokenizer.decoder is None:
            raise ValueError(f"model {config.model} holds an encoder only; accepted: a model with a decoder")
        self._make_text_model(newest)
        self._open_data(train_dataset, validation_dataset)
        self.trained = TrainingStep(config, self.accelerator, self.tokenizer, self.audio_to_text)
        self.best: float | None = None
        if newest is not None:
            self._resume(newest)

    @property
    def newest_checkpoint(self) -> Path | None:
        return checkpointing.newest(self.directory)

    # --- Making the parts ---

    def _make_text_model(self, checkpoint: Path | None) -> None:
        config = self.config
        self.audio_to_text: AudioToTextLoss | None = None
        self.tokenize: Callable[[str], list[int]] | None = None
        if config.uses_text:
            language_model, text_tokenizer = load_language_model(
                config.text_model, config.text_model_config, config.text_tokenizer
            )
            self.audio_to_text = AudioToTextLoss(language_model, self.tokenizer.config.d_model)
            if checkpoint is not None:
                self.audio_to_text.load_state_dict(checkpointing.load_tensors(checkpoint, "audio_to_text"))
            end = cast(int, text_tokenizer.eos_token_id)

            def tokenize(text: str) -> list[int]:
                return [*text_tokenizer(text, add_special_tokens=False)["input_ids"], end]

            self.tokenize = tokenize

    def _open_data(self, train_dataset: datasets.Dataset | None, validation_dataset: datasets.Dataset | None) -> None:
        config, model_config = self.config, self.tokenizer.config
        rate = model_config.sampling_rate
        names, shortest = ["min_seconds", "crop_seconds"], MultiScaleMelLoss(rate, config.mel_scales).min_samples
        if config.uses_discriminators:
            names.append("discriminator_seconds")
            shortest = max(shortest, AudioDiscriminator(config.discriminator_width).min_samples)
        for name in names:
            samples = round(getattr(config, name) * rate)
            if name == "crop_seconds" and config.codes_column is not None:
                samples -= samples % model_config.samples_per_frame  # crops are cut to whole codes
            if samples < shortest:
                accepted = f"{shortest / rate:.3f} or more, which the losses need"
                raise ValueError(f"{name}={getattr(config, name):g}; accepted: {accepted}")

        self.collator = Collator(model_config, round(config.discriminator_seconds * rate))

        def inspect(dataset: datasets.Dataset, name: str, needs_text: bool) -> Clips:
            return Clips.inspect(
                dataset,
                name,
                rate,
                audio_column=config.audio_column,
                text_column=config.text_column if needs_text else None,
                codes_column=config.codes_column,
                collator=self.collator,
                key_column=config.key_column,
                min_samples=round(config.min_seconds * rate),
                num_workers=config.dataloader_num_workers,
                process_index=self.accelerator.process_index,
                num_processes=self.accelerator.num_processes,
            )

        if train_dataset is None:
            if config.train_data is None:
                raise ValueError("train_data is missing; accepted: a directory, a file or a Hub dataset")
            train_dataset = open_dataset(config.train_data, config.train_split, config.audio_column)
            if is_hub_id(config.train_data):
                self._from_hub.add("train_data")
        if validation_dataset is None and config.validation_data is not None:
            validation_dataset = open_dataset(config.validation_data, config.validation_split, config.audio_column)
            if is_hub_id(config.validation_data):
                self._from_hub.add("validation_data")
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self.accelerator.is_main_process:
            datasets.disable_progress_bars()
        # First the few clips, then the many: what is wrong with the former is said sooner.
        self.validation_clips = None
        if validation_dataset is not None:
            first = validation_dataset.select(range(min(config.validation_clips, len(validation_dataset))))
            self.validation_clips = inspect(first, config.validation_data or "validation", False)
        self.train_clips = inspect(train_dataset, config.train_data or "train", config.uses_text)
        if self.accelerator.is_main_process:
            for clips, name in ((self.train_clips, "training"), (self.validation_clips, "validation")):
                if clips is not None and clips.skipped:
                    some = "; ".join(f"{key}: {problem}" for key, problem in list(clips.skipped.items())[:5])
                    total = len(clips) + len(clips.skipped)
                    logger.warning(f"{len(clips.skipped)} of {total} {name} clips are skipped ({some})")
        if config.codes_column is not None:
            self._require_own_codes()

    def _require_own_codes(self) -> None:
        """That codes are this model's, as far as a few clips of each data set tell.

        The main process looks, on the CPU in float32, and tells the others.
        """
        problem: list[str | None] = [None]
        if self.accelerator.is_main_process:
            try:
                for clips in (self.validation_clips, self.train_clips):
                    if clips is not None:
                        for clip in self._compared_clips(clips):
                            self._require_own_codes_of(clips, clip)
            except ValueError as error:
                problem = [str(error)]
        broadcast_object_list(problem)
        if problem[0] is not None:
            raise ValueError(problem[0])

    def _compared_clips(self, clips: Clips) -> list[int]:
        """Random ones that are short, so that to encode them takes little time; where there is none, the shortest.

        Not parts of long ones: attention reaches from end to end, so that a cut changes codes far from it as well.
        """
        short = [
            clip for clip, length in enumerate(clips.lengths) if length <= _COMPARED_SECONDS * clips.sampling_rate
        ]
        if not short:
            return [min(range(len(clips)), key=clips.lengths.__getitem__)]
        return random.Random(f"codes {self.config.seed}").sample(short, min(_COMPARED_CLIPS, len(short)))

    def _require_own_codes_of(self, clips: Clips, clip: int) -> None:
        """Most of a clip's codes of the first codebook are those that it gets here, whatever dtype made them."""
        waveform, _, codes = clips.load(clip)
        # Longer audio than this is encoded in pieces, each on its own: the first tells enough.
        _, samples = self.collator.extractor.samples_of_frames(0, MAX_PIECE_FRAMES, len(waveform))
        (own,) = encode_waveforms(self.tokenizer, [waveform[:samples]], 1)
        (frames,) = self.tokenizer.encoder.code_lengths([MAX_PIECE_FRAMES])
        agreement = (own[:frames, 0] == cast(torch.Tensor, codes)[:frames, 0]).float().mean().item()
        if agreement < 0.5:
            raise ValueError(
                f"clip {clips.keys[clip]}: {agreement:.0%} of its first codebook's codes in "
                f"{self.config.codes_column!r} are those of {self.config.model}; accepted: codes that this model made"
            )

    def _reader(self, clips: Clips, *, training: bool) -> BatchReader:
        config = self.config
        return BatchReader(
            clips,
            self.collator,
            crop_samples=round((config.crop_seconds if training else config.batch_seconds) * clips.sampling_rate),
            gain_db=config.gain_db if training else 0.0,
            equalizer_db=config.equalizer_db if training else 0.0,
            seed=config.seed,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            tokenize=self.tokenize if training else None,
        )

    def _plan_lengths(self, reader: BatchReader) -> tuple[list[int], int]:
        """What a plan is made of: the clips' lengths as they are read, and the longest that a batch may be."""
        lengths = [reader.used_samples(clip) for clip in range(len(reader.clips))]
        return lengths, round(self.config.batch_seconds * reader.clips.sampling_rate)

    # --- The run ---

    def train(self) -> dict[str, float]:
        """Runs to `max_steps`.

        Returns:
            The last validation's metrics, or nothing without validation data.

        Raises:
            NonFiniteLossError: a loss or gradient is NaN or infinite; checkpoints are from before.
            ValueError: a clip is not what it was when the run started.
        """
        config, accelerator = self.config, self.accelerator
        reader = self._reader(self.train_clips, training=True)
        rate = self.train_clips.sampling_rate
        plan = plan_run(*self._plan_lengths(reader), accelerator.num_processes, config.seed)
        done = self.step * config.gradient_accumulation_steps
        loader = reader.loader(itertools.islice(plan, done, None), config.dataloader_num_workers)
        if accelerator.is_main_process:
            checkpointing.remove_leftovers(self.directory)
            with replacing(self.directory / TRAINING_NAME) as temporary:
                checkpointing.write_json(temporary, self._document({}))
            self._rewind_log()
        if config.report_to:
            flat = {name: value for name, value in dataclasses.asdict(config).items() if _is_scalar(value)}
            # What a killed run told TensorBoard after its checkpoint is told again.
            options = {"tensorboard": {"purge_step": self.step + 1}}
            accelerator.init_trackers("mimo-audio-train", config=flat, init_kwargs=options)
        metrics: dict[str, float] = {}
        pending: list[tuple[int, list[str], dict[str, torch.Tensor]]] = []
        started, seconds = time.perf_counter(), 0.0
        with tqdm(
            desc=f"stage {config.stage}",
            total=config.max_steps,
            initial=self.step,
            unit="step",
            disable=None if accelerator.is_main_process else True,
        ) as bar:
            while self.step < config.max_steps:
                batches = [
                    batch.to(self.device) for batch in itertools.islice(loader, config.gradient_accumulation_steps)
                ]
                losses = self.trained.train(batches, self.step)
                self.step += 1
                pending.append((self.step, [key for batch in batches for key in batch.batch_keys], losses))
                seconds += sum(sum(batch.batch_lengths) for batch in batches) / rate
                bar.update()
                last = self.step == config.max_steps
                saves = last or self.step % config.save_steps == 0
                validates = self.validation_clips is not None and (last or self.step % config.eval_steps == 0)
                if saves or validates or self.step % config.logging_steps == 0:
                    means = self._look_at(pending)
                    elapsed = time.perf_counter() - started
                    means |= {
                        "audio_seconds_per_second": seconds / elapsed,
                        "learning_rate": float(self.trained.scheduler.get_last_lr()[0]),
                    }
                    pending, started, seconds = [], time.perf_counter(), 0.0
                    bar.set_postfix_str(
                        f"{means[RECONSTRUCTION]:.4g} mel, {means['audio_seconds_per_second']:.0f} s of audio/s"
                    )
                    self._log({f"train/{name}": value for name, value in means.items()})
                if validates:
                    metrics = self.validate()
                    self._log({f"validation/{name}": value for name, value in metrics.items()})
                    # Before the checkpoint: a run that is killed in between comes here once more.
                    if self._is_best(metrics):
                        self.save(self.directory / checkpointing.BEST, metrics, to_resume=False)
                if saves:
                    measured = metrics if validates else {}
                    self.save(checkpointing.path(self.directory, self.step), measured, to_resume=True)
                if validates or saves:
                    self._draw_log()
                    started = time.perf_counter()
        if config.report_to:
            accelerator.end_training()
        return metrics

    def _look_at(self, pending: list[tuple[int, list[str], dict[str, torch.Tensor]]]) -> dict[str, float]:
        """Mean losses since the last look, over all processes: the one time that the GPU is waited for.

        Raises:
            NonFiniteLossError: one of them is not finite; on every process.
        """
        names = list(pending[0][2])
        table = torch.stack([torch.stack([losses[name].float() for name in names]) for _, _, losses in pending])
        rows = self.accelerator.reduce(table, "sum").tolist()
        for (step, keys, _), row in zip(pending, rows, strict=True):
            for name, value in zip(names, row, strict=True):
                if not math.isfinite(value):
                    raise NonFiniteLossError(name, step, keys)
        return {name: sum(column) / len(rows) for name, column in zip(names, zip(*rows, strict=True), strict=True)}

    def _log(self, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            with (self.directory / LOG_NAME).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step} | values) + "\n")
        if self.config.report_to:
            self.accelerator.log(values, step=self.step)

    def _rewind_log(self) -> None:
        """Takes out of the log what comes again: the entries after this step, and a line that was never finished."""
        file = self.directory / LOG_NAME
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
        with replacing(file) as temporary, temporary.open("w", encoding="utf-8") as kept:
            kept.writelines(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step)

    def _draw_log(self) -> None:
        if self.accelerator.is_main_process:
            lines = (self.directory / LOG_NAME).read_text(encoding="utf-8").splitlines()
            save_figure(self.directory / "training.png", training_figure(map(json.loads, lines)))

    # --- Validation ---

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Reconstructs the validation clips, `batch_seconds` of each at most, with all codebooks.

        Returns:
            The means of the metrics over the clips, and of each codebook the share of entries in use. A clip that a
            metric is not defined for does not count for it, and a metric that none is defined for is left out. Audio
            and pictures of the first clips are written to `samples/`.
        """
        reader = self._reader(cast(Clips, self.validation_clips), training=False)
        plan = plan_epoch(*self._plan_lengths(reader), self.accelerator.num_processes, None, 0)
        sizes = self.tokenizer.config.codebook_sizes
        used = [torch.zeros(size, dtype=torch.long, device=self.device) for size in sizes]
        names = [RECONSTRUCTION, *self.metrics]
        sums = torch.zeros(len(names), 2, dtype=torch.float64)
        self.trained.generator.eval()
        for batch in reader.loader(plan, self.config.dataloader_num_workers):
            batch = batch.to(self.device)
            samples, codes, _, _ = self.trained.reconstruct(batch)
            if not batch.counted:
                continue
            for book, column in enumerate(codes.t()):
                used[book] += torch.bincount(column, minlength=sizes[book])
            decoded, targets = self.trained.pairs(batch, samples)
            for clip, key, length, reference, waveform in zip(
                batch.clips, batch.keys, batch.lengths, targets, decoded, strict=True
            ):
                loss = self.trained.mel_loss(waveform[None, :length], reference[None, :length])
                reference, waveform = reference[:length].cpu(), waveform[:length].cpu()
                for row, value in enumerate([float(loss), *self._measured(key, reference, waveform)]):
                    if math.isfinite(value):
                        sums[row] += torch.tensor([value, 1.0], dtype=torch.float64)
                if clip < self.config.validation_samples:
                    self._write_sample(clip, key, reference, waveform)
        self.trained.generator.train()
        sums, counts = (
            self.accelerator.reduce(tensor.to(self.device), "sum") for tensor in (sums.float(), torch.cat(used))
        )
        metrics = {name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True) if count}
        for book, count in enumerate(counts.cpu().split(sizes)):
            metrics[f"codebook_use/{book}"] = int(count.count_nonzero()) / sizes[book]
        return metrics

    def _measured(self, key: str, reference: torch.Tensor, decoded: torch.Tensor) -> Iterator[float]:
        for name, metric in self.metrics.items():
            try:
                yield float(metric(reference, decoded, self.tokenizer.config.sampling_rate))
            except ValueError as error:
                logger.warning(f"{name} of {key}: {error}")
                yield math.nan

    def _is_best(self, metrics: dict[str, float]) -> bool:
        name = self.config.metric_for_best_model
        value = metrics.get(name)
        if value is None:
            return False
        better = self.best is None or (value < self.best if name in _LOWER_IS_BETTER else value > self.best)
        if better:
            self.best = value
        return better

    def _write_sample(self, clip: int, key: str, reference: torch.Tensor, decoded: torch.Tensor) -> None:
        """Audio and a picture of it, beside the recording's, as files and to the trackers."""
        rate = self.tokenizer.config.sampling_rate
        folder = self.directory / "samples" / f"step-{self.step}"
        figure = reconstruction_figure(reference, decoded, self.collator.extractor)
        save_audio(folder / f"{clip}-decoded.wav", decoded, rate)
        save_audio(folder / f"{clip}-recording.wav", reference, rate)
        save_figure(folder / f"{clip}.png", figure)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                writer = tracker.tracker
                writer.add_audio(f"validation/{key}", decoded[None].clamp(-1, 1), self.step, sample_rate=rate)
                writer.add_figure(f"validation/{key}", figure, self.step)

    # --- Checkpoints ---

    def save(self, target: Path, metrics: dict[str, float], *, to_resume: bool) -> None:
        """Writes the model as a checkpoint, by all processes together; with `to_resume`, also what the run needs.

        Old checkpoints beyond `save_total_limit` are removed when the new one is complete.
        """
        accelerator, trained = self.accelerator, self.trained
        model, text_model = trained.model_tensors()
        tensors, settings = trained.state() if to_resume else ({}, {})
        if text_model:
            tensors["audio_to_text"] = text_model
        if accelerator.is_main_process:
            with checkpointing.replacing_directory(target) as temporary:
                self.tokenizer.save_pretrained(temporary, state_dict=model)
                self.collator.extractor.save_pretrained(temporary)
                checkpointing.write_json(temporary / TRAINING_NAME, self._document(metrics))
                if to_resume:
                    for name, contents in tensors.items():
                        checkpointing.save_tensors(temporary, name, contents)
                    state = {"step": self.step} | settings
                    checkpointing.write_json(temporary / checkpointing.STATE_NAME, state)
            checkpointing.remove_old(self.directory, self.config.save_total_limit)
        accelerator.wait_for_everyone()

    def _require_same_run(self, checkpoint: Path) -> None:
        """Before anything is loaded: what a checkpoint says of its run is what this one says.

        Options that were added since it was written had their defaults.
        """
        found = read_json(checkpoint / TRAINING_NAME, {"config": dict, "processes": int, "mixed_precision": str})
        defaults = TrainingConfig(output_dir=self.config.output_dir)
        ours, theirs = (json.loads(json.dumps(dataclasses.asdict(config))) for config in (self.config, defaults))
        launched = self._launched()
        ours |= launched
        theirs |= found["config"] | {name: found[name] for name in launched}
        for name, value in ours.items():
            if name not in self.config.may_change and value != theirs[name]:
                had = theirs[name]
                raise ValueError(f"{name}={value!r}; accepted with resume=True: {had!r}, as {checkpoint} has it")
        # Where the run started from is not looked for any more: it may have gone since.
        noted = found.get("from_hub")
        if isinstance(noted, list):
            self._from_hub = {"model"} & {*noted}

    def _resume(self, checkpoint: Path) -> None:
        found = read_json(checkpoint / TRAINING_NAME, {"data.train.fingerprint": str})
        if found["data"]["train"]["fingerprint"] != self.train_clips.fingerprint:
            raise ValueError(f"the training data are not those of {checkpoint}; accepted with resume=True: the same")
        entries = {"step": int, "scheduler": dict, "optimizer.param_groups": list}
        if self.trained.discriminator is not None:
            entries |= {"discriminator_scheduler": dict, "discriminator_optimizer.param_groups": list}
        state = read_json(checkpoint / checkpointing.STATE_NAME, entries)
        self.trained.load_state(lambda name: checkpointing.load_tensors(checkpoint, name), state)
        self.step = state["step"]
        best = self.directory / checkpointing.BEST / TRAINING_NAME
        if self.validation_clips is not None and best.is_file():
            found = read_json(best, {"data.validation.fingerprint": str, "metrics": dict})
            # Other clips or another metric: no comparison.
            if found["data"]["validation"]["fingerprint"] == self.validation_clips.fingerprint:
                self.best = found["metrics"].get(self.config.metric_for_best_model)

    def _launched(self) -> dict[str, Any]:
        """What `accelerate launch` decides."""
        return {
            "processes": self.accelerator.num_processes,
            "mixed_precision": self.accelerator.mixed_precision,
        }

    def _document(self, metrics: dict[str, float]) -> dict[str, Any]:
        """What lies beside the weights: what made them, of what, and how good they are."""

        def described(clips: Clips | None) -> dict[str, Any] | None:
            if clips is None:
                return None
            return {
                "clips": len(clips),
                "seconds": round(clips.seconds, 3),
                "skipped": clips.skipped,
                "fingerprint": clips.fingerprint,
            }

        return {
            "config": dataclasses.asdict(self.config),
            "from_hub": sorted(self._from_hub),
            **self._launched(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine(),
            "versions": {
                "mimo_audio_hf": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "accelerate": accelerate.__version__,
                "datasets": datasets.__version__,
            },
            "data": {"train": described(self.train_clips), "validation": described(self.validation_clips)},
            "step": self.step,
            "metrics": metrics,
        }


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))
