"""`mimo-audio stream`: files, and a microphone that is a stand-in."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from mimo_audio_hf import StreamingDecoder, StreamingEncoder, load_audio, load_model
from mimo_audio_hf.cli import main
from mimo_audio_hf.commands import stream


RECORDING = Path(__file__).parent / "fixtures" / "audio" / "prompt_speech_en_m.wav"
TINY = ["--model", "tiny", "--device", "cpu"]


def streamed(waveform: torch.Tensor, num_quantizers: int | None = None, **options) -> torch.Tensor:
    model = load_model("tiny", device="cpu")
    encoder = StreamingEncoder(model, num_quantizers=num_quantizers, chunk_frames=10, **options)
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


def test_options_of_the_encoder(tmp_path, capsys):
    output = tmp_path / "out.flac"
    arguments = ["--look-ahead", "2", "--encoder-chunk", "5", "--num-quantizers", "3", "--seconds", "1.1"]
    assert main(["stream", str(RECORDING), "-o", str(output), "--no-wait", *arguments, *TINY]) == 0
    assert soundfile.info(output).frames == 26400
    assert float(re.search(r"first codes after ([\d.]+) s", capsys.readouterr().out)[1]) >= 0.28


def test_a_file_comes_at_the_speed_of_its_recording(capsys):
    started = time.perf_counter()
    assert main(["stream", str(RECORDING), "--seconds", "1", *TINY]) == 0
    assert time.perf_counter() - started >= 1
    assert "1.00 s of audio streamed as 26 frames" in capsys.readouterr().out


class Devices(SimpleNamespace):
    """Stands in for sounddevice: records the file from a thread of its own, then Ctrl-C comes."""

    def __init__(self) -> None:
        super().__init__(played=[])
        devices = self

        class InputStream:
            def __init__(self, samplerate, blocksize, channels, callback):
                assert (samplerate, channels) == (24000, 1)
                self.blocksize, self.callback = blocksize, callback

            def start(self):
                def record():
                    for block in load_audio(RECORDING)[:36000].split(self.blocksize):
                        self.callback(block[:, None].numpy(), len(block), None, None)
                    os.kill(os.getpid(), signal.SIGINT)

                self.thread = threading.Thread(target=record)
                self.thread.start()

            def stop(self):
                self.thread.join()

            def close(self):
                pass

        class OutputStream:
            def __init__(self, samplerate, channels):
                assert (samplerate, channels) == (24000, 1)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                pass

            def write(self, samples):
                devices.played.append(samples)

        self.InputStream, self.OutputStream = InputStream, OutputStream


def test_the_microphone_until_ctrl_c(tmp_path, monkeypatch, capsys):
    devices = Devices()
    monkeypatch.setitem(sys.modules, "sounddevice", devices)
    handler = signal.getsignal(signal.SIGINT)
    assert main(["stream", "-o", str(tmp_path / "out.wav"), "--play", *TINY]) == 0
    assert signal.getsignal(signal.SIGINT) is handler
    expected = streamed(load_audio(RECORDING)[:36000]).numpy()
    np.testing.assert_allclose(np.concatenate(devices.played)[:36000], expected, atol=1e-4)
    written, _ = soundfile.read(tmp_path / "out.wav", dtype="float32")
    np.testing.assert_allclose(written, expected, atol=2e-4)
    assert "1.50 s of audio streamed" in capsys.readouterr().out


def test_the_latency_said_is_that_since_the_recording_began(tmp_path, monkeypatch, capsys):
    """On a clock of the test's: a first call of a minute, all of the recording, a tenth of a second for each block."""
    now = [0.0]
    monkeypatch.setattr(stream, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    push, pushes = StreamingEncoder.push, []

    def slow(encoder, samples, last=False):
        pushes.append(len(samples))
        now[0] += 60 if len(pushes) == 1 else 0.1
        return push(encoder, samples, last=last)

    class InputStream:
        def __init__(self, samplerate, blocksize, channels, callback):
            self.blocksize, self.callback = blocksize, callback

        def start(self):
            for block in load_audio(RECORDING)[:36000].split(self.blocksize):
                now[0] += len(block) / 24000
                self.callback(block[:, None].numpy(), len(block), None, None)
            signal.raise_signal(signal.SIGINT)

        def stop(self):
            pass

        close = stop

    monkeypatch.setitem(sys.modules, "sounddevice", SimpleNamespace(InputStream=InputStream))
    monkeypatch.setattr(StreamingEncoder, "push", slow)
    assert main(["stream", *TINY]) == 0
    # 1.5 s were recorded when the first of eight blocks was taken, and the eighth gives the first codes.
    assert pushes == [4800, *[4800] * 7, 2400, 0]
    said = capsys.readouterr().out
    assert "first codes after 2.30 s, first audio after 2.30 s" in said
    assert "computing took 60% of the time, 100 ms at most" in said


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
    ],
)
def test_bad_use_is_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert main(["stream", *arguments, *TINY]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len([line for line in error.splitlines() if "error:" in line]) == 1
