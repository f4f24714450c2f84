"""The README's examples, run as they stand but for the released model, in whose place stands a small one."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import soundfile
import torch
import yaml
from datasets import Audio, load_dataset

from mimo_audio_hf import load_audio
from mimo_audio_hf.checkpoints import RELEASED_MODEL
from mimo_audio_hf.cli import main
from mimo_audio_hf.training.config import TrainingConfig


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
A_LITTLE_TRAINING = ["--max-steps", "1", "--discriminator-width", "0.1", "--mixed-precision", "no"]
RECORDING = ROOT / "tests" / "fixtures" / "audio" / "prompt_speech_en_m.wav"


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(RECORDING, "speech.wav")
    audio, rate = soundfile.read("speech.wav")
    soundfile.write("other.flac", audio[:30001], rate)
    Path("recordings").mkdir()
    shutil.copy("speech.wav", "recordings")
    shutil.copy("other.flac", "recordings")
    return tmp_path


def test_python_examples(workplace, tiny_checkpoint):
    source = "\n".join(blocks("python"))
    assert RELEASED_MODEL in source
    namespace: dict = {"__name__": "readme"}
    exec(compile(source.replace(RELEASED_MODEL, str(tiny_checkpoint)), "README.md", "exec"), namespace)
    assert soundfile.info("decoded0.wav").frames == soundfile.info("speech.wav").frames
    assert soundfile.info("decoded1.wav").frames == 30001
    assert [len(waveform) for waveform in namespace["waveforms"]] == [960 * n for n in namespace["codes_lens"]]
    # The last example's codes are the first one's: upstream's interface over the same model.
    first = namespace["encoded"].audio_codes.transpose(1, 2)
    assert torch.equal(namespace["codes"], first)


def test_command_line_examples(workplace, tiny_checkpoint, capsys):
    for line in "".join(blocks("console")).splitlines():
        program, command, *arguments = shlex.split(line.replace(RELEASED_MODEL, str(tiny_checkpoint)))
        assert program == "mimo-audio"
        if command not in ("info", "init", "hub", "train"):  # for the released model, which is the others' default
            arguments += ["--model", str(tiny_checkpoint), "--device", "cpu"]
        if command == "train":
            arguments += A_LITTLE_TRAINING
        assert main([command, *arguments]) == 0, capsys.readouterr().err
    frames = soundfile.info("speech.wav").frames
    for name in ("decoded.wav", "eight.wav", "decoded/speech.flac"):
        assert soundfile.info(name).frames == frames
    assert soundfile.info("decoded/other.flac").frames == 30001
    back = {row["key"]: row for row in load_dataset("audio", split="train").cast_column("audio", Audio(decode=False))}
    assert {key: len(load_audio(row["audio"]["bytes"])) for key, row in back.items()} == {
        "speech.wav": frames,
        "other.flac": 30001,
    }
    assert Path("evaluation", "evaluation.md").is_file()
    assert Path("my-repository", "modeling_mimo_audio_tokenizer.py").is_file()
    assert "1 steps of stage 2" in Path("voices-repository", "README.md").read_text()


def test_examples_of_training(workplace, tiny_checkpoint):
    """But for launchers, which test_training runs."""
    text = (ROOT / "docs" / "training.md").read_text().replace(RELEASED_MODEL, str(tiny_checkpoint))
    (options,) = blocks("yaml", text)
    config = TrainingConfig.from_values(yaml.safe_load(options))
    assert config.stage == 1 and config.learning_rate == 2e-4 and config.metrics == ["stoi", "pesq_wb"]
    (tokenizing,), (command,) = blocks("python", text), blocks("console", text)
    exec(compile(tokenizing, "training.md", "exec"), {})
    arguments = [*shlex.split(command)[1:], "--model", str(tiny_checkpoint), *A_LITTLE_TRAINING]
    assert main(arguments) == 0
    assert Path("voices-from-codes", "checkpoint-1", "model.safetensors").is_file()


def test_examples_of_scale(workplace, tiny_checkpoint):
    """But for the Ray stage, which test_ray runs, and launchers, which test_jobs does."""
    text = (ROOT / "docs" / "scale.md").read_text()
    (commands,) = blocks("console", text)
    for line in commands.splitlines():
        assert main([*shlex.split(line)[1:], "--model", str(tiny_checkpoint), "--device", "cpu"]) == 0
    reading, ray = blocks("python", text)
    assert "import ray" in ray
    namespace: dict = {}
    exec(compile(reading, "scale.md", "exec"), namespace)
    assert sorted(namespace["tokens"]["key"]) == ["other.flac", "speech.wav"]


def test_first_command(workplace, monkeypatch):
    command = blocks("bash")[0].strip()
    install, run = command.split(" && ")
    assert install == "pip install -e ."
    program, *arguments = shlex.split(run)
    assert program == "mimo-audio"
    monkeypatch.chdir(ROOT)
    arguments[2] = str(workplace / arguments[2])
    assert main(arguments) == 0
    assert soundfile.info(workplace / "roundtrip.wav").frames == soundfile.info(RECORDING).frames


def test_second_command_is_what_ci_runs():
    assert blocks("bash")[1].strip() in (ROOT / ".ci" / "run").read_text().splitlines()
