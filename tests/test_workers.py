"""Interruptions while processes begin: Python swallows what a signal's handler raises while it forks."""

from __future__ import annotations

import json
import signal
from contextlib import suppress
from types import SimpleNamespace

import pytest
from torch.utils.data import DataLoader

from mimo_audio_hf import jobs, offline
from mimo_audio_hf.training.data import BatchReader
from mimo_audio_hf.workers import interrupted_afterwards


NUMBERS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def raising_handlers():
    """A shell may have started the tests with signals ignored."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in NUMBERS]


@pytest.mark.parametrize("number", NUMBERS)
def test_an_interruption_counts_afterwards(number):
    before, done = handlers(), []
    with pytest.raises(KeyboardInterrupt), interrupted_afterwards():
        signal.raise_signal(number)
        done.append("begun")
    assert done == ["begun"] and handlers() == before


@pytest.mark.parametrize("number", NUMBERS)
def test_an_error_does_not_hide_an_interruption(number):
    before = handlers()
    with pytest.raises(KeyboardInterrupt) as raised, interrupted_afterwards():
        signal.raise_signal(number)
        raise OSError("no process")
    assert isinstance(raised.value.__context__, OSError) and handlers() == before
    with pytest.raises(OSError, match="no process"), interrupted_afterwards():
        raise OSError("no process")
    assert handlers() == before


def test_all_interruptions_count():
    received: list[int] = []
    for number in NUMBERS:
        signal.signal(number, lambda number, frame: received.append(number))
    with interrupted_afterwards():
        for number in NUMBERS:
            signal.raise_signal(number)
        assert not received
    assert received == NUMBERS


def test_a_handler_that_was_not_put_back_does_its_work(monkeypatch):
    """A signal between two handlers' return keeps the second from it."""
    put = signal.signal
    with pytest.raises(KeyboardInterrupt), interrupted_afterwards():

        def interrupted(number, handler):
            put(number, handler)
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(signal, "signal", interrupted)
    assert signal.getsignal(signal.SIGTERM) is not signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_ignored_signals_stay_ignored():
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)
    with interrupted_afterwards():
        for number in NUMBERS:
            signal.raise_signal(number)


@pytest.fixture
def interrupted_in_a_fork(monkeypatch):
    """Ctrl-C while a loader begins its processes."""
    begin = DataLoader.__iter__

    def interrupted(loader):
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return begin(loader)

    monkeypatch.setattr(DataLoader, "__iter__", interrupted)


def test_the_offline_command(interrupted_in_a_fork, tmp_path, tiny_checkpoint, write_audio, capsys):
    line = {"wav": str(write_audio(tmp_path / "a.wav", 9600)), "quantized_tokens": str(tmp_path / "a.json")}
    (tmp_path / "list.jsonl").write_text(json.dumps({"key": "a"} | line))
    options = {"model_path": tiny_checkpoint, "data_list": tmp_path / "list.jsonl", "batch_size": 1, "num_workers": 0}
    assert offline.main([f"--{name}={value}" for name, value in options.items()]) == 130
    assert capsys.readouterr().err == "mimo_audio_tokenizer: error: interrupted\n"
    assert not (tmp_path / "a.json").exists()


def test_jobs(interrupted_in_a_fork):
    with pytest.raises(KeyboardInterrupt):
        list(jobs._read_ahead({0: SimpleNamespace(rest=None)}, [0], 0, pin_memory=False))


def test_training(interrupted_in_a_fork):
    with pytest.raises(KeyboardInterrupt):
        list(BatchReader.loader({0: "batch"}, [0], 0))
