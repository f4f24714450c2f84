# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""`mimo-audio stream`: a microphone, or a file as if it were one, through encoder and decoder while it runs."""

from __future__ import annotations

import argparse
import math
import queue
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..audio import audio_writer, load_audio
from ..streaming import LOW_LATENCY, StreamingDecoder, StreamingEncoder
from .options import (
    OUTPUT_SUFFIXES,
    Subparsers,
    add_model_options,
    add_num_quantizers,
    count_from_zero,
    counted,
    load_converter,
    path_argument,
    positive_count,
    positive_number,
)


# Samples come in blocks of so many code frames (0.2 s).
BLOCK_FRAMES = 5


def add_stream(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "stream",
        help="a microphone or a file, live through encoder and decoder",
        description="Encode audio while it is recorded and decode its codes at once, showing the latency. A file is "
        "read at the speed at which it was recorded. Without IN the microphone is recorded until Ctrl-C, for which "
        "the package sounddevice is needed. Ctrl-C ends the audio there, of a file, too; a second one drops all.",
    )
    parser.add_argument("input", nargs="?", type=path_argument, metavar="IN", help="audio file (default: microphone)")
    parser.add_argument(
        "-o",
        "--output",
        type=path_argument,
        metavar="OUT",
        help=f"audio file for what comes back: a name ending in {', '.join(OUTPUT_SUFFIXES)}",
    )
    parser.add_argument("--play", action="store_true", help="play what comes back; needs sounddevice (use headphones)")
    parser.add_argument("--no-wait", action="store_true", help="read the file as fast as the model runs")
    parser.add_argument("--seconds", type=positive_number, metavar="S", help="stop after so many seconds of audio")
    parser.add_argument(
        "--look-ahead",
        type=count_from_zero,
        metavar="N",
        help="frames of 40 ms that an encoder which looks ahead sees after those it gives out (default: 25)",
    )
    parser.add_argument(
        "--encoder-chunk",
        type=positive_count,
        metavar="N",
        help="frames that such an encoder gives out at a time (default: 10)",
    )
    add_num_quantizers(parser)
    add_model_options(parser)
    parser.set_defaults(run=run_stream)


def run_stream(args: argparse.Namespace) -> None:
    if args.output is not None and args.output.suffix.lower() not in OUTPUT_SUFFIXES:
        raise ValueError(f"{args.output}: accepted: a file name ending in {', '.join(OUTPUT_SUFFIXES)}")
    if args.no_wait and args.input is None:
        raise ValueError("--no-wait without IN; accepted: both")
    model = load_converter(args, args.num_quantizers, decodes=True)
    config = model.config
    rate, block = config.sampling_rate, BLOCK_FRAMES * config.samples_per_frame
    most = None if args.seconds is None else _samples(args.seconds, rate)
    looks_ahead = StreamingEncoder.looks_ahead_in(model)
    for flag, value in (("--look-ahead", args.look_ahead), ("--encoder-chunk", args.encoder_chunk)):
        if value is not None and not looks_ahead:
            raise ValueError(f"{flag} {value}: the encoder of {args.model} does not look ahead; accepted: no {flag}")
    chunk = args.encoder_chunk or (BLOCK_FRAMES * 2 if looks_ahead else None)
    options = {"right_context": args.look_ahead, "chunk_frames": chunk}
    encoder = StreamingEncoder(model, num_quantizers=args.num_quantizers, **options)
    decoder = StreamingDecoder.low_latency(model)

    with ExitStack() as stack:
        # Whatever cannot be opened is known before anything is recorded.
        write = None if args.output is None else stack.enter_context(audio_writer(args.output, rate))
        speaker = None
        if args.play:
            with _device("speaker") as sounddevice:
                speaker = stack.enter_context(sounddevice.OutputStream(rate, channels=1))
        source: _File | _Microphone
        if args.input is None:
            source = stack.enter_context(closing(_Microphone(rate, block)))
        else:
            source = _File(load_audio(args.input, rate), block, 0.0 if args.no_wait else 1 / rate)
        _warm_up(encoder, decoder, config.samples_per_frame)
        stack.enter_context(_at_first_interrupt(source.stop))
        delays: list[float] = []  # how far behind the recording a player would be
        first_codes = busy = slowest = start = now = 0.0
        received = codes = emitted = 0
        with tqdm(bar_format="streamed {n:.1f} s [{elapsed}{postfix}]", disable=None) as bar:
            for samples, recorded, is_last in _with_last(source, most):
                begun = time.perf_counter()
                if not received:
                    start = recorded - len(samples) / rate
                new_codes = encoder.push(samples, last=is_last)
                new_audio = decoder.push(new_codes, last=is_last)
                ended = time.perf_counter()
                computed = ended - begun
                received += len(samples)
                # Where nothing was waited for: as if it had been, behind what was still being computed then.
                now = max(now, received / rate) + computed if args.no_wait else ended - start
                if speaker is not None and len(new_audio):
                    with _device("speaker"):
                        speaker.write(new_audio.numpy())
                if len(new_codes) and not codes:
                    first_codes = now
                if len(new_audio):
                    delays.append(now - emitted / rate)
                    bar.set_postfix_str(f"latency {delays[-1]:.2f} s, {1000 * computed:.0f} ms of it computing")
                if write is not None:
                    write(new_audio[: received - emitted])  # the last frame may be longer than the recording
                codes, emitted = codes + len(new_codes), emitted + len(new_audio)
                busy, slowest = busy + computed, max(slowest, computed)
                bar.update(len(samples) / rate)
        if not received:
            raise ValueError("nothing was recorded; accepted: audio of one sample or more")
    print(
        f"{received / rate:.2f} s of audio streamed as {codes} frames of codes"
        f"{'' if args.output is None else f' -> {args.output}'}; first codes after {first_codes:.2f} s, first audio "
        f"after {delays[0]:.2f} s, at most {max(delays):.2f} s behind; computing took "
        f"{busy * rate / received:.0%} of the time, {1000 * slowest:.0f} ms at most"
    )
    if source.gaps:
        print(f"the microphone lost samples {counted(source.gaps, 'time')}: what was streamed has gaps there")


def _samples(seconds: float, rate: int) -> int:
    if not 1 <= seconds * rate < math.inf:
        raise ValueError(f"--seconds {seconds:g}; accepted: a finite number, {1 / rate:.5f} (one sample) or more")
    return round(seconds * rate)


def _warm_up(encoder: StreamingEncoder, decoder: StreamingDecoder, samples_per_frame: int) -> None:
    """Runs what the stream will run, on silence: what the first calls of a model cost is no one's latency."""
    # A first chunk, further ones, and a last one that is not full.
    frames = decoder.first_audio_frames + 2 * LOW_LATENCY["chunk_frames"] + 1
    for _ in range(2):  # of sizes that come again graphs are made
        codes = encoder.push(torch.zeros(frames * samples_per_frame), last=True)
        decoder.push(codes, last=True)
        encoder.reset()
        decoder.reset()


@contextmanager
def _device(name: str) -> Iterator[Any]:
    """The package sounddevice, to use a device with.

    Raises:
        ValueError: the package is missing, or the device fails in the block.
    """
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: without PortAudio
        raise ValueError(
            f"microphone and speaker need the package sounddevice ({error}); accepted: a file, or after "
            "`pip install sounddevice`"
        ) from error
    try:
        yield sounddevice
    except sounddevice.PortAudioError as error:
        raise ValueError(f"{name}: {error}; accepted: one that takes one channel at the model's rate") from error


@contextmanager
def _at_first_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Has the first Ctrl-C in the block do this, and no more than this; the next ones do what they did before."""

    def handle(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        stop()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _File:
    """Blocks of a file, each with the time at which it would have been recorded, and not before that."""

    gaps = 0

    def __init__(self, waveform: torch.Tensor, block: int, seconds_per_sample: float) -> None:
        self._blocks = waveform.split(block)
        self._seconds_per_sample = seconds_per_sample
        self._stopped = False

    def __iter__(self) -> Iterator[tuple[torch.Tensor, float]]:
        started = time.perf_counter()
        received = 0
        for samples in self._blocks:
            received += len(samples)
            recorded = started + received * self._seconds_per_sample
            time.sleep(max(0.0, recorded - time.perf_counter()))
            if self._stopped:
                return
            yield samples, recorded

    def stop(self) -> None:
        self._stopped = True


class _Microphone:
    """Blocks of the microphone's samples, each with the time at which it was complete.

    Attributes:
        gaps (`int`): How often samples were lost, because the system could not hand them on in time.
    """

    def __init__(self, rate: int, block: int) -> None:
        self.gaps = 0
        # A signal's handler puts into it, which may interrupt a `get`: a queue.Queue would wait for itself.
        self._blocks: queue.SimpleQueue[tuple[torch.Tensor, float] | None] = queue.SimpleQueue()
        with _device("microphone") as sounddevice:
            self._stream = sounddevice.InputStream(rate, blocksize=block, channels=1, callback=self._take)

    def _take(self, samples: np.ndarray, frames: int, time_info: Any, status: Any) -> None:
        self.gaps += bool(status)  # an overflow: nothing else can happen to input alone
        self._blocks.put((torch.from_numpy(samples[:, 0].copy()), time.perf_counter()))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, float]]:
        with _device("microphone"):
            self._stream.start()
        yield from iter(self._blocks.get, None)

    def stop(self) -> None:
        """Ends the blocks; those that were recorded are still given out."""
        self._blocks.put(None)

    def close(self) -> None:
        self._stream.close()


def _with_last(
    blocks: Iterable[tuple[torch.Tensor, float]], most: int | None
) -> Iterator[tuple[torch.Tensor, float, bool]]:
    """Blocks of at most so many samples, and at the end nothing, as the last one."""
    received, recorded = 0, 0.0
    for samples, recorded in blocks:
        if most is not None:
            samples = samples[: most - received]
        received += len(samples)
        yield samples, recorded, False
        if most is not None and received >= most:
            break
    yield torch.empty(0), recorded, True
