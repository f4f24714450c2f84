"""`mimo-audio stream`: files, and a microphone that is a stand-in."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from mimo_audio_hf import (
    MiMoAudioTokenizerConfig,
    MiMoAudioTokenizerModel,
    StreamingDecoder,
    StreamingEncoder,
    load_audio,
    load_model,
)
from mimo_audio_hf.checkpoints import PRESETS
from mimo_audio_hf.cli import main
from mimo_audio_hf.commands import stream
from mimo_audio_hf.streaming.cached_decoder import CachedDecoder


RECORDING = Path(__file__).parent / "fixtures" / "audio" / "prompt_speech_en_m.wav"
TINY = ["--model", "tiny", "--device", "cpu"]


def streamed(waveform: torch.Tensor, num_quantizers: int | None = None, **options: int) -> torch.Tensor:
    model = load_model("tiny", device="cpu")
    encoder = StreamingEncoder(model, num_quantizers=num_quantizers, **({"chunk_frames": 10} | options))
    decoder = StreamingDecoder.low_latency(model)
    codes = torch.cat([encoder.push(waveform), encoder.flush()])
    return torch.cat([decoder.push(codes), decoder.flush()])[: len(waveform)]


def test_a_file(tmp_path, capsys):
    output = tmp_path / "out.wav"
    assert main(["stream", str(RECORDING), "-o", str(output), "--no-wait", *TINY]) == 0
    waveform = load_audio(RECORDING)
    written, rate = soundfile.read(output, dtype="float32")
    assert (len(written), rate) == (len(waveform), 24000)
    np.testing.assert_allclose(written, streamed(waveform).numpy(), atol=2e-4)  # 16 bits, and rounding
    said = capsys.readouterr().out
    assert f"{len(waveform) / 24000:.2f} s of audio streamed as 110 frames of codes -> {output}" in said
    first_codes, first_audio = (float(each) for each in re.findall(r"first \w+ after ([\d.]+) s", said))
    # 10 frames, and 25 more that the encoder sees.
    assert first_codes >= 1.4
    assert first_audio >= first_codes


def test_options_of_the_encoder(tmp_path, monkeypatch, capsys):
    """On a clock that stands still: computing takes no time."""
    monkeypatch.setattr(stream, "time", SimpleNamespace(perf_counter=lambda: 0.0, sleep=lambda seconds: None))
    output = tmp_path / "out.flac"
    arguments = ["--look-ahead", "2", "--encoder-chunk", "3", "--num-quantizers", "9", "--seconds", "1.1"]
    assert main(["stream", str(RECORDING), "-o", str(output), "--no-wait", *arguments, *TINY]) == 0
    written, _ = soundfile.read(output, dtype="float32")
    expected = streamed(load_audio(RECORDING)[:26400], num_quantizers=9, right_context=2, chunk_frames=3)
    np.testing.assert_allclose(written, expected.numpy(), atol=2e-4)
    # 5 frames, and what the last one reaches beyond: the second block of 0.2 s has it.
    assert "first codes after 0.40 s" in capsys.readouterr().out


def test_a_file_comes_at_the_speed_of_its_recording(capsys):
    started = time.perf_counter()
    assert main(["stream", str(RECORDING), "--seconds", "1", *TINY]) == 0
    assert time.perf_counter() - started >= 1
    assert "1.00 s of audio streamed as 26 frames" in capsys.readouterr().out


class PortAudioError(Exception):
    """As sounddevice has it, of no other kind."""


class InputStream:
    """Stands in for that of sounddevice: records 1.5 s of the file at once, then Ctrl-C comes."""

    def __init__(self, samplerate, blocksize, channels, callback):
        assert (samplerate, channels) == (24000, 1)
        self.blocksize, self.callback = blocksize, callback

    def start(self):
        for block in load_audio(RECORDING)[:36000].split(self.blocksize):
            self.record(block)
        signal.raise_signal(signal.SIGINT)

    def record(self, block, status=None):
        self.callback(block[:, None].numpy(), len(block), None, status)

    def close(self):
        pass


def stand_in(monkeypatch, input_stream=InputStream, output_stream=None) -> None:
    devices = {"InputStream": input_stream, "OutputStream": output_stream, "PortAudioError": PortAudioError}
    monkeypatch.setitem(sys.modules, "sounddevice", SimpleNamespace(**devices))


class ThreadedInputStream(InputStream):
    """Records from a thread of its own, as PortAudio does."""

    def start(self):
        def record():
            for block in load_audio(RECORDING)[:36000].split(self.blocksize):
                self.record(block)
            os.kill(os.getpid(), signal.SIGINT)

        self.thread = threading.Thread(target=record)
        self.thread.start()

    def close(self):
        self.thread.join()


@pytest.fixture(autouse=True)
def interrupts_are_handled_as_before():
    # Python's own, also where the tests run in the background and a shell has them ignored.
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, outside) is signal.default_int_handler


def test_the_microphone_until_ctrl_c(tmp_path, monkeypatch, capsys):
    played = []

    class OutputStream:
        def __init__(self, samplerate, channels):
            assert (samplerate, channels) == (24000, 1)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def write(self, samples):
            played.append(samples)

    stand_in(monkeypatch, ThreadedInputStream, OutputStream)
    assert main(["stream", "-o", str(tmp_path / "out.wav"), "--play", *TINY]) == 0
    expected = streamed(load_audio(RECORDING)[:36000]).numpy()
    np.testing.assert_allclose(np.concatenate(played)[:36000], expected, atol=1e-4)
    written, _ = soundfile.read(tmp_path / "out.wav", dtype="float32")
    np.testing.assert_allclose(written, expected, atol=2e-4)
    assert "1.50 s of audio streamed" in capsys.readouterr().out


def test_the_latency_said_is_that_since_the_recording_began(tmp_path, monkeypatch, capsys):
    """On a clock of the test's: first calls of a minute, all of the recording, a tenth of a second for each block."""
    now = [0.0]
    monkeypatch.setattr(stream, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    push, pushes = StreamingEncoder.push, []

    def slow(encoder, samples, last=False):
        pushes.append(len(samples))
        now[0] += 60 if len(pushes) <= 2 else 0.1
        return push(encoder, samples, last=last)

    class Clocked(InputStream):
        def record(self, block, status=None):
            now[0] += len(block) / 24000
            super().record(block)

    stand_in(monkeypatch, Clocked)
    monkeypatch.setattr(StreamingEncoder, "push", slow)
    assert main(["stream", *TINY]) == 0
    # 1.5 s were recorded when the first of eight blocks was taken, and the eighth gives the first codes.
    assert pushes[2:] == [*[4800] * 7, 2400, 0]
    said = capsys.readouterr().out
    assert "first codes after 2.30 s, first audio after 2.30 s" in said
    assert "computing took 60% of the time, 100 ms at most" in said


def test_the_latency_of_a_file_that_is_not_waited_for_counts_what_has_piled_up(monkeypatch, capsys):
    """On a clock of the test's: half a second for each block of a fifth."""
    now = [0.0]
    monkeypatch.setattr(stream, "time", SimpleNamespace(perf_counter=lambda: now[0], sleep=lambda seconds: None))
    push = StreamingEncoder.push

    def slow(encoder, samples, last=False):
        now[0] += 0.5
        return push(encoder, samples, last=last)

    monkeypatch.setattr(StreamingEncoder, "push", slow)
    assert main(["stream", str(RECORDING), "--no-wait", "--seconds", "1.5", *TINY]) == 0
    # The eighth block gives the first codes, 8 times half a second after the first one's 0.2 s. A ninth call gives the
    # rest; the first 10 codes gave 5 frames of audio.
    said = capsys.readouterr().out
    assert "first codes after 4.20 s, first audio after 4.20 s, at most 4.50 s behind" in said


def test_the_first_calls_are_over_before_the_stream_begins(monkeypatch):
    model = load_model("tiny", device="cpu")
    encoder, decoder = StreamingEncoder(model, chunk_frames=10), StreamingDecoder.low_latency(model)
    expected = streamed(load_audio(RECORDING))
    steps = Counter()
    step = CachedDecoder._step

    def counting(self, codes, rows, is_last):
        steps[(len(codes), is_last)] += 1
        return step(self, codes, rows, is_last)

    monkeypatch.setattr(CachedDecoder, "_step", counting)
    stream._warm_up(encoder, decoder, 960)
    assert steps[(10, False)] >= 2 and steps[(5, False)] >= 4
    assert any(is_last for _, is_last in steps)
    audio = decoder.push(encoder.push(load_audio(RECORDING), last=True), last=True)
    torch.testing.assert_close(audio[: len(expected)], expected, rtol=0, atol=1e-5)


# --- Ctrl-C ---


def test_ctrl_c_ends_a_file_where_it_comes(tmp_path, monkeypatch, capsys):
    expected = streamed(load_audio(RECORDING)[: 8 * 4800]).numpy()
    push, pushes = StreamingEncoder.push, []

    def interrupted(encoder, samples, last=False):
        pushes.append(len(samples))
        if len(samples) and pushes.count(4800) == 8:
            signal.raise_signal(signal.SIGINT)
        return push(encoder, samples, last=last)

    monkeypatch.setattr(StreamingEncoder, "push", interrupted)
    assert main(["stream", str(RECORDING), "-o", str(tmp_path / "out.wav"), "--no-wait", *TINY]) == 0
    assert "1.60 s of audio streamed as 41 frames" in capsys.readouterr().out
    written, _ = soundfile.read(tmp_path / "out.wav", dtype="float32")
    np.testing.assert_allclose(written, expected, atol=2e-4)


@pytest.mark.parametrize("source", ["microphone", "file"])
def test_a_second_ctrl_c_ends_the_command(tmp_path, monkeypatch, capsys, source):
    """Where more waits than the model gets through."""
    push, pushes = StreamingEncoder.push, []

    def interrupted(encoder, samples, last=False):
        pushes.append(len(samples))
        if len(samples) and pushes.count(4800) == 3:
            signal.raise_signal(signal.SIGINT)
            if source == "file":  # of a microphone it is the second one
                signal.raise_signal(signal.SIGINT)
        return push(encoder, samples, last=last)

    stand_in(monkeypatch)
    monkeypatch.setattr(StreamingEncoder, "push", interrupted)
    recording = [] if source == "microphone" else [str(RECORDING), "--no-wait"]
    assert main(["stream", *recording, "-o", str(tmp_path / "out.wav"), *TINY]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ctrl_c_may_come_while_a_block_is_taken(monkeypatch):
    """Its handler runs wherever the program is: where that holds a lock, the handler must not ask for it."""
    stand_in(monkeypatch)
    microphone = stream._Microphone(24000, 4800)
    microphone._take(np.zeros((4800, 1), np.float32), 4800, None, None)
    taken = []

    def stop_inside(frame, event, argument):
        if frame.f_code.co_name == "_get":  # of queue.Queue, which holds its lock there
            sys.settrace(None)
            microphone.stop()

    def take():
        sys.settrace(stop_inside)
        taken.append(microphone._blocks.get())
        sys.settrace(None)
        microphone.stop()
        taken.append(microphone._blocks.get())

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    thread.join(20)
    assert len(taken) == 2 and taken[1] is None


# --- Devices ---


def test_a_device_that_cannot_be_opened_is_one_line(monkeypatch, capsys):
    def fail(*args, **options):
        raise PortAudioError("Error querying device -1")

    stand_in(monkeypatch, input_stream=fail, output_stream=fail)
    for arguments, name in (([], "microphone"), ([str(RECORDING), "--play"], "speaker")):
        assert main(["stream", *arguments, *TINY]) == 1
        assert f"error: {name}: Error querying device -1; accepted: " in capsys.readouterr().err


def test_a_microphone_that_does_not_start_is_closed(monkeypatch, capsys):
    closed = []

    class Failing(InputStream):
        def start(self):
            raise PortAudioError("Device unavailable")

        def close(self):
            closed.append(True)

    stand_in(monkeypatch, Failing)
    assert main(["stream", *TINY]) == 1
    assert "error: microphone: Device unavailable; accepted: " in capsys.readouterr().err
    assert closed == [True]


def test_lost_samples_are_said(monkeypatch, capsys):
    class Overflowing(InputStream):
        blocks = 0

        def record(self, block, status=None):
            self.blocks += 1
            super().record(block, "input overflow" if self.blocks in (2, 5) else "")

    stand_in(monkeypatch, Overflowing)
    assert main(["stream", *TINY]) == 0
    assert "the microphone lost samples 2 times" in capsys.readouterr().out
    stand_in(monkeypatch)
    assert main(["stream", *TINY]) == 0
    assert "lost" not in capsys.readouterr().out


# --- Bad use ---


def test_nothing_is_recorded_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(StreamingEncoder, "push", None)
    assert main(["stream", str(RECORDING), "-o", str(tmp_path / "file" / "out.wav"), "--no-wait", *TINY]) == 1
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "microphone and speaker need the package sounddevice"),
        (["missing.wav"], "missing.wav"),
        ([str(RECORDING), "-o", "out.txt"], "out.txt: accepted: a file name ending in .wav"),
        (["--no-wait"], "--no-wait without IN"),
        ([str(RECORDING), "--num-quantizers", "21"], "num_quantizers=21"),
        ([str(RECORDING), "--seconds", "0.00001"], "--seconds 1e-05; accepted: a finite number, 0.00004 (one sample)"),
        ([str(RECORDING), "--seconds", "inf"], "--seconds inf; accepted: a finite number"),
    ],
)
def test_bad_use_is_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert main(["stream", *arguments, *TINY]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len([line for line in error.splitlines() if "error:" in line]) == 1


@pytest.mark.parametrize("flag", ["--look-ahead", "--encoder-chunk"])
def test_what_a_causal_encoder_does_not_have_is_called_as_it_was_written(tmp_path, capsys, flag):
    config = MiMoAudioTokenizerConfig(**PRESETS["tiny"] | {"encoder_causal": True})
    MiMoAudioTokenizerModel(config).save_pretrained(tmp_path / "causal")
    arguments = ["stream", str(RECORDING), "--model", str(tmp_path / "causal"), "--device", "cpu", "--no-wait"]
    assert main([*arguments, flag, "5"]) == 1
    assert f"error: {flag} 5: the encoder of {tmp_path / 'causal'} does not look ahead" in capsys.readouterr().err
    assert main([*arguments, "--seconds", "0.5"]) == 0
