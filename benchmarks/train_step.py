"""Stage 2 of training, released size, bfloat16, random weights: step time over the floor, and peak memory.

    python benchmarks/train_step.py --output benchmarks/results/train_step.json
    torchrun --nproc_per_node=2 benchmarks/train_step.py --output benchmarks/results/train_step_x2.json

A step is the trainer's own: frozen encoder, decoder and discriminators forward and backward, gradient clipping, both
optimizers. Batches are on the GPU already. The floor is three times the forward's operations of what is trained
(decoder, vocoder, and the discriminators on the real and the decoded segments) over the rate of a large product in
the same run; the frozen encoder's forward is told beside it. With `--codes` the encoder does not run, and nothing is
told of it. With several processes, each has a batch of its own of the same size, and the data-parallel efficiency is
the time of a step without averaging of gradients over that of one with it.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

import torch
from workloads import floor_flops, measured_ceiling, mel_lengths, random_model, report, seconds_of

from mimo_audio_hf import MiMoAudioTokenizerConfig
from mimo_audio_hf.training.batch import Batch, Collator
from mimo_audio_hf.training.config import TrainingConfig
from mimo_audio_hf.training.discriminators import AudioDiscriminator
from mimo_audio_hf.training.step import TrainingStep, make_accelerator


def random_batch(
    collator: Collator, seconds: float, clips: int, device: torch.device, with_codes: bool = False
) -> Batch:
    generator = torch.Generator().manual_seed(0)
    waveforms = [torch.randn(int(seconds * 24000), generator=generator) * 0.1 for _ in range(clips)]
    codes = None
    if with_codes:
        sizes = torch.tensor(collator.model.config.codebook_sizes)
        frames = collator.code_lengths([len(waveform) for waveform in waveforms])
        codes = [(torch.rand(count, len(sizes), generator=generator) * sizes).long() for count in frames]
    return collator(waveforms, codes=codes).to(device)


def discriminator_flops(discriminator: AudioDiscriminator, batch: Batch, device: torch.device) -> float:
    """Of one forward of the discriminators on real and decoded segments."""
    segments = torch.zeros(2 * len(batch.lengths), batch.segment_samples, device=device)
    flops = 0
    with torch.no_grad():
        for kind in (discriminator.periods, discriminator.stft):
            for layers in kind(segments)[0]:
                # Not as the convolutions are computed, which multiplies zeros, too.
                flops += sum(
                    2 * out.numel() * conv.weight[0, 0].numel() for out, conv in zip(layers, kind.convs, strict=True)
                )
    return float(flops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--clip-seconds", type=float, default=6.0)
    parser.add_argument("--discriminator-seconds", type=float, default=TrainingConfig.discriminator_seconds)
    parser.add_argument("--attn-implementation")
    parser.add_argument("--torch-compile", action="store_true")
    parser.add_argument("--codes", action="store_true", help="the batch has codes, so that the encoder does not run")
    args = parser.parse_args()

    options = TrainingConfig(
        output_dir="unused",
        stage=2,
        mixed_precision="bf16",
        discriminator_seconds=args.discriminator_seconds,
        attn_implementation=args.attn_implementation,
        torch_compile=args.torch_compile,
        codes_column="codes" if args.codes else None,
    )
    config = MiMoAudioTokenizerConfig()
    accelerator = make_accelerator(options)
    trained = TrainingStep(options, accelerator, random_model(config, torch.float32))
    collator = Collator(config, int(args.discriminator_seconds * config.sampling_rate))
    batch = random_batch(collator, args.clip_seconds, args.clips, trained.device, args.codes)

    def step() -> None:
        trained.train([batch], 0)

    torch.cuda.reset_peak_memory_stats()
    step_seconds = seconds_of(step, args.repeats, warmup=5)
    peak = torch.cuda.max_memory_allocated()
    milliseconds = {"step": step_seconds}
    alone = None
    with ExitStack() as stack:
        if accelerator.num_processes > 1:
            stack.enter_context(accelerator.no_sync(trained.generator))
            stack.enter_context(trained.discriminator.no_sync())
            alone = seconds_of(step, args.repeats, warmup=2)
        milliseconds["forward_and_backward"] = seconds_of(
            lambda: trained.backward(batch, config.num_quantizers, 1.0), args.repeats, warmup=2
        )
        with torch.no_grad():
            forward = "decoder_forward" if args.codes else "encoder_and_decoder_forward"
            milliseconds[forward] = seconds_of(lambda: trained.reconstruct(batch), args.repeats, warmup=2)
    milliseconds = {name: value * 1000 for name, value in milliseconds.items()}

    ceiling = measured_ceiling()
    encode, decode = floor_flops(config, mel_lengths(config, [args.clip_seconds] * args.clips))
    discriminator = trained.discriminator
    discriminator = discriminator.module if accelerator.num_processes > 1 else discriminator
    discriminate = discriminator_flops(discriminator, batch, trained.device)
    floor = 3 * (decode + discriminate) / ceiling
    results = {
        "dtype": "bfloat16, float32 master weights",
        "attn_implementation": args.attn_implementation or "default",
        "torch_compile": args.torch_compile,
        "encoder_runs": not args.codes,
        "processes": accelerator.num_processes,
        "audio_seconds_per_process": args.clips * args.clip_seconds,
        "discriminated_seconds_per_process": args.clips * batch.segment_samples / config.sampling_rate,
        "ceiling_tflops": round(ceiling / 1e12, 1),
        "milliseconds": {name: round(value, 1) for name, value in milliseconds.items()},
        "floor_milliseconds": {
            "three_times_decoder_and_vocoder": round(3 * decode / ceiling * 1000, 1),
            "three_times_discriminators": round(3 * discriminate / ceiling * 1000, 1),
        },
        "step_over_floor": round(step_seconds / floor, 3),
        "step_over_floor_of_decoder_and_vocoder_alone": round(step_seconds * ceiling / (3 * decode), 3),
        "peak_gigabytes": round(peak / 1e9, 2),
        "audio_seconds_per_second": round(
            accelerator.num_processes * args.clips * args.clip_seconds / step_seconds, 1
        ),
    }
    if not args.codes:
        results["floor_milliseconds"]["frozen_encoder_forward"] = round(encode / ceiling * 1000, 1)
        results["step_over_floor_with_the_frozen_encoder"] = round(step_seconds / (floor + encode / ceiling), 3)
    if alone is not None:
        results["step_without_gradient_averaging_milliseconds"] = round(alone * 1000, 1)
        results["data_parallel_efficiency"] = round(alone / step_seconds, 3)
    if accelerator.is_main_process:
        report("train_step", results, args.output)
    if accelerator.num_processes > 1:
        accelerator.state.destroy_process_group()


if __name__ == "__main__":
    main()
