"""The code in README and guides, run as it stands but for the released model, in whose place stands a small one.

All blocks of a page belong together: one after the other, in one folder, Python's with the same variables. A block
that cannot be run here has `<!-- not run: REASON -->` above it. It is parsed: Python compiled, a command's options by
the parsers of the programs that it calls.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import accelerate.commands.launch
import pytest
import soundfile
import torch
import torch.distributed.run
import yaml
from datasets import Audio, load_dataset

from mimo_audio_hf import cli, load_audio, offline
from mimo_audio_hf.checkpoints import RELEASED_MODEL
from mimo_audio_hf.cli import main
from mimo_audio_hf.training.config import TrainingConfig


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
A_LITTLE_TRAINING = ["--max-steps", "1", "--discriminator-width", "0.1", "--mixed-precision", "no"]
RECORDING = ROOT / "tests" / "fixtures" / "audio" / "prompt_speech_en_m.wav"
# Commands that name their model otherwise than by the default.
NAMES_ITS_MODEL = ("info", "init", "hub", "train")


@dataclass(frozen=True)
class Block:
    """A block of code: where it begins, and, if it cannot be run here, why."""

    place: str
    language: str
    code: str
    not_run: str | None

    def commands(self) -> list[str]:
        return [line for line in self.code.replace("\\\n", " ").splitlines() if line.strip()]


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(
        r"(?:^<!-- not run: (?P<why>.+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", text, re.M | re.S
    )
    return [
        Block(
            f"{page.name}:{text.count(chr(10), 0, match.start('language')) + 1}",
            match["language"],
            match["code"],
            match["why"],
        )
        for match in found
    ]


# --- Running ---


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A folder with what the pages speak of."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(RECORDING, "speech.wav")
    audio, rate = soundfile.read("speech.wav")
    soundfile.write("other.flac", audio[:30001], rate)
    Path("recordings").mkdir()
    shutil.copy("speech.wav", "recordings")
    shutil.copy("other.flac", "recordings")
    lines = (
        {"key": name, "wav": name, "quantized_tokens": f"{name}.json", "reconstructed_wav": f"{name}-decoded.wav"}
        for name in ("speech.wav", "other.flac")
    )
    Path("data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.fixture
def run_page(workplace, tiny_checkpoint, capsys) -> Callable[[str], dict]:
    """Runs a page's blocks, and gives the variables that are there in the end."""

    def run_command(line: str, place: str) -> None:
        program, *arguments = shlex.split(line)
        if program == "mimo_audio_tokenizer":
            assert offline.main(arguments) == 0, f"{place}: {capsys.readouterr().err}"
            return
        assert program == "mimo-audio", f"{place}: {program} cannot be run here; accepted: <!-- not run: REASON -->"
        if arguments[0] == "train":
            arguments += A_LITTLE_TRAINING
        if arguments[0] not in NAMES_ITS_MODEL:
            arguments += ["--device", "cpu"]
        if arguments[0] not in NAMES_ITS_MODEL[:3] and "--model" not in arguments:
            arguments += ["--model", str(tiny_checkpoint)]
        assert main(arguments) == 0, f"{place}: {capsys.readouterr().err}"

    def run(name: str) -> dict:
        variables: dict = {"__name__": "page"}
        for block in blocks_of(ROOT / name):
            code = block.code.replace(RELEASED_MODEL, str(tiny_checkpoint))
            if block.not_run is not None or block.language == "bash":  # see below
                continue
            if block.language == "python":
                exec(compile(code, block.place, "exec"), variables)
            elif block.language == "console":
                for line in Block(block.place, "console", code, None).commands():
                    run_command(line, block.place)
            else:
                assert block.language == "yaml", f"{block.place}: {block.language!r}; accepted: python, console, yaml"
                TrainingConfig.from_values(yaml.safe_load(code))
        return variables

    return run


def test_readme(run_page):
    variables = run_page("README.md")
    frames = soundfile.info("speech.wav").frames
    assert soundfile.info("decoded0.wav").frames == frames
    assert soundfile.info("decoded1.wav").frames == 30001
    assert [len(waveform) for waveform in variables["waveforms"]] == [960 * n for n in variables["codes_lens"]]
    # The last example's codes are the first one's: upstream's interface over the same model.
    first = variables["encoded"].audio_codes.transpose(1, 2)
    assert torch.equal(variables["codes"], first)

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


def test_training(run_page):
    run_page("docs/training.md")
    assert Path("voices-from-codes", "checkpoint-1", "model.safetensors").is_file()
    (options,) = (block.code for block in blocks_of(ROOT / "docs" / "training.md") if block.language == "yaml")
    config = TrainingConfig.from_values(yaml.safe_load(options))
    assert config.stage == 1 and config.learning_rate == 2e-4 and config.metrics == ["stoi", "pesq_wb"]


def test_scale(run_page):
    variables = run_page("docs/scale.md")
    assert sorted(variables["tokens"]["key"]) == ["other.flac", "speech.wav"]


def test_migrate(run_page):
    variables = run_page("docs/migrate.md")
    for name, clip in zip(("speech.wav", "other.flac"), variables["encoded"].audio_codes, strict=True):
        codes = offline.load_tokens(f"{name}.json")
        assert torch.equal(codes[:, :8].t(), clip[:, : len(codes)])
        assert soundfile.info(f"{name}-decoded.wav").frames == 960 * len(codes)


TESTED_ABOVE = ("README.md", "training.md", "scale.md", "migrate.md")


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in TESTED_ABOVE], ids=lambda page: page.stem)
def test_page(run_page, page):
    run_page(str(page.relative_to(ROOT)))


# --- What cannot be run here ---


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_not_run_is_well_formed(page):
    for block in blocks_of(page):
        if block.not_run is None:
            continue
        if block.language == "python":
            compile(block.code, block.place, "exec")
        else:
            assert block.language == "console", f"{block.place}: {block.language!r}; accepted: python, console"
            for line in block.commands():
                check_options(shlex.split(re.sub(r"\$\(which (\w+)\)", r"\1", line)))


def check_options(words: list[str]) -> None:
    """Parse a command as its program would. Bad options end in SystemExit."""
    program, *arguments = words
    if program == "mimo-audio":
        cli.make_parser().parse_args(arguments)
    elif program == "mimo_audio_tokenizer":
        offline.make_parser().parse_args(arguments)
    elif program == "torchrun":
        launched = torch.distributed.run.get_args_parser().parse_args(arguments)
        check_launched(launched, launched.training_script_args)
    elif words[:2] == ["accelerate", "launch"]:
        launched = accelerate.commands.launch.launch_command_parser().parse_args(words[2:])
        check_launched(launched, launched.training_script_args)
    elif words[:2] == ["pip", "install"]:
        for extras in re.findall(r"\[(.*?)\]", " ".join(words)):
            known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
            assert {*extras.split(",")} <= {*known}
    else:
        raise AssertionError(f"{program} is not known here")


def check_launched(launched: argparse.Namespace, arguments: list[str]) -> None:
    names = {"mimo_audio_hf.cli": "mimo-audio"} if launched.module else {}
    check_options([names.get(launched.training_script, launched.training_script), *arguments])


@pytest.mark.parametrize(
    "command",
    [
        "mimo-audio encode speech.wav --output-dir codes",
        "torchrun --nproc_per_machine=8 --no-python mimo-audio tokenize recordings tokens",
        "torchrun --nproc_per_node=8 -m mimo_audio_hf.cli train --no-such-option 1",
        "accelerate launch --processes 8 -m mimo_audio_hf.cli tokenize recordings tokens",
        "mimo_audio_tokenizer --model M",
    ],
)
def test_options_that_do_not_exist_are_found(command):
    with pytest.raises(SystemExit):
        check_options(shlex.split(command))


# --- The two commands of the README's beginning ---


def bash_blocks() -> list[str]:
    return [block.code.strip() for page in PAGES for block in blocks_of(page) if block.language == "bash"]


def test_first_command(workplace, monkeypatch):
    first, _ = bash_blocks()
    install, run = first.split(" && ")
    assert install == "pip install -e ."
    program, *arguments = shlex.split(run)
    assert program == "mimo-audio"
    monkeypatch.chdir(ROOT)
    arguments[2] = str(workplace / arguments[2])
    assert main(arguments) == 0
    assert soundfile.info(workplace / "roundtrip.wav").frames == soundfile.info(RECORDING).frames


def test_second_command_is_what_ci_runs():
    assert bash_blocks()[1] in (ROOT / ".ci" / "run").read_text().splitlines()
