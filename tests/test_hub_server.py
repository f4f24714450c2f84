"""The Hub round trip over HTTP: a fine-tuned model goes up by `push_to_hub` and comes back where this package is not.

The server is that of hub_server.py, on the loopback interface; both directions go through huggingface_hub's own
client, in interpreters of their own, since it reads the Hub's address when it is imported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, hub_server
from safetensors.torch import load_file, save_file

import mimo_audio_hf
from mimo_audio_hf import MiMoAudioTokenizerFeatureExtractor
from mimo_audio_hf.checkpoints import load_model
from mimo_audio_hf.cli import main
from mimo_audio_hf.hub import AUTO_CLASSES, assemble_hub_repository


SOURCES = Path(mimo_audio_hf.__file__).parent.parent
RECORDING = Path(__file__).parent / "fixtures" / "audio" / "prompt_speech_en_m.wav"
TOKEN, OTHER_TOKEN = "hf_mine", "hf_theirs"
PART_SIZE = 8_000_000  # the weights go up in several parts
WEIGHTS = "model.safetensors"

# Runs what it is sent, a snippet at a time, and answers with what that has put into `result`, or with its error.
INTERPRETER = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what is printed goes elsewhere
sys.path[:0] = json.loads(sys.argv[1])
if not json.loads(sys.argv[1]):
    sys.modules["mimo_audio_hf"] = None
names = {}
for line in sys.stdin:
    names["result"] = error = None
    try:
        exec(json.loads(line), names)
    except Exception as caught:
        error = [type(caught).__name__, str(caught)]
    print(json.dumps([names["result"], error]), file=answers, flush=True)
"""


class Interpreter:
    """A Python that has the server for its Hub."""

    def __init__(self, server: HubServer, home: Path, path: list[str]) -> None:
        self.home = home
        environment = hub_environment(server, home) | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", INTERPRETER, json.dumps(path)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, code: str) -> object:
        result, error = self._ask(code)
        assert error is None, error
        return result

    def error(self, code: str) -> list[str]:
        """Name and message of the exception that the code ends with."""
        result, error = self._ask(code)
        assert error is not None, result
        return error

    def run_again_if_it_fails(self, code: str) -> list[str] | None:
        """The error of the first attempt: older huggingface_hub gives up where newer ones go on."""
        _, error = self._ask(code)
        if error is not None:
            self.run(code)
        return error

    def _ask(self, code: str) -> tuple[object, list[str] | None]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(code) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the interpreter ended with {self._process.wait()}"
        return json.loads(answer)

    def close(self) -> None:
        self._process.communicate()


def hub_environment(server: HubServer, home: Path) -> dict[str, str]:
    ours = {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | ours | {"HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with hub_server({TOKEN: "me", OTHER_TOKEN: "they"}, part_size=PART_SIZE) as running:
        yield running


@pytest.fixture(autouse=True)
def no_faults_are_left(server):
    yield
    left = [fault for fault in server.faults if fault.times > 0]
    server.faults.clear()
    server.requests.clear()
    assert not left, "a fault that a test asked for did not happen"


@pytest.fixture(scope="module")
def with_package(server, tmp_path_factory) -> Iterator[Interpreter]:
    interpreter = Interpreter(server, tmp_path_factory.mktemp("publisher"), [str(SOURCES)])
    yield interpreter
    interpreter.close()


@pytest.fixture(scope="module")
def without_package(server, tmp_path_factory) -> Iterator[Interpreter]:
    interpreter = Interpreter(server, tmp_path_factory.mktemp("user"), [])
    yield interpreter
    interpreter.close()


@pytest.fixture(scope="module")
def voices(tmp_path_factory) -> Path:
    """`tiny`, its decoder fine-tuned for a step, as `mimo-audio train` leaves it."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "recordings").mkdir()
    shutil.copy(RECORDING, folder / "recordings")
    paths = ["--train-data", str(folder / "recordings"), "--output-dir", str(folder / "run")]
    sizes = ["--max-steps", "1", "--crop-seconds", "1", "--batch-seconds", "1", "--discriminator-width", "0.1"]
    options = ["--warmup-steps", "0", "--learning-rate", "1e-3", "--mixed-precision", "no"]
    assert main(["train", "--model", "tiny", *paths, *sizes, *options, "--dataloader-num-workers", "0"]) == 0
    return folder / "run" / "checkpoint-1"


@pytest.fixture(scope="module")
def expected(voices, tmp_path_factory) -> dict[str, torch.Tensor]:
    """What the fine-tuned model gives here for a clip."""
    model = load_model(voices, device="cpu", dtype="float32")
    clip = mimo_audio_hf.load_audio(RECORDING)[:24000]
    inputs = MiMoAudioTokenizerFeatureExtractor.from_config(model.config)(clip, sampling_rate=24000)
    with torch.inference_mode():
        codes = model.encode(**inputs).audio_codes
        return {"codes": codes, "audio": model.decode(codes).audio_values, **inputs}


def pushed(checkpoint: Path, name: str, **options: object) -> str:
    """Code that pushes a checkpoint."""
    call = f"push_to_hub({str(checkpoint)!r}, {name!r}, **{options!r})"
    return f"from mimo_audio_hf.hub import push_to_hub\nresult = {call}"


def loaded(name: str, cache: Path, **options: object) -> str:
    """Code that loads a repository's model by its own code."""
    options |= {"trust_remote_code": True, "cache_dir": str(cache)}
    return f"""
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioTokenization
extractor = AutoFeatureExtractor.from_pretrained({name!r}, **{options!r})
model = AutoModelForAudioTokenization.from_pretrained({name!r}, dtype="float32", **{options!r})
result = type(model).__module__
"""


def encoded(inputs: Path, outputs: Path) -> str:
    """Code that runs the loaded model on a clip's features."""
    return f"""
import torch
from safetensors.torch import load_file, save_file
inputs = load_file({str(inputs)!r})
with torch.inference_mode():
    codes = model.encode(**inputs).audio_codes
    audio = model.decode(codes).audio_values
save_file({{"codes": codes.contiguous(), "audio": audio.contiguous()}}, {str(outputs)!r})
"""


def cached_commits(cache: Path) -> list[str]:
    return [path.parent.name for path in cache.glob(f"models--*/snapshots/*/{WEIGHTS}")]


def cached_weights(cache: Path) -> list[bytes]:
    return [path.read_bytes() for path in cache.glob(f"models--*/snapshots/*/{WEIGHTS}")]


def test_a_fine_tuned_model_goes_up_and_comes_back(server, with_package, without_package, voices, expected, tmp_path):
    address = with_package.run(pushed(voices, "me/voices", token=TOKEN))
    assert address == f"{server.endpoint}/me/voices"
    repository = server.repositories["me/voices"]
    assert not repository.private and len(repository.commits) == 2  # the first one is the Hub's
    names = {"README.md", "config.json", "preprocessor_config.json", WEIGHTS}
    names |= {f"{cls.__module__.rpartition('.')[2]}.py" for cls in AUTO_CLASSES.values()}
    assert repository.commits[repository.branches["main"]].keys() - {".gitattributes"} >= names
    assert server.content("me/voices", WEIGHTS) == (voices / WEIGHTS).read_bytes()
    assert b"1 steps of stage 2" in server.content("me/voices", "README.md")
    parts = -(-(voices / WEIGHTS).stat().st_size // PART_SIZE)
    assert sum(method == "PUT" for method, _ in server.requests) == parts > 1
    assert ("POST", "/api/validate-yaml") in server.requests

    module = without_package.run(loaded("me/voices", tmp_path / "cache"))
    assert str(module).startswith("transformers_modules.")
    assert cached_commits(tmp_path / "cache") == [repository.branches["main"]]
    save_file({name: tensor for name, tensor in expected.items() if name not in ("codes", "audio")}, tmp_path / "in")
    without_package.run(encoded(tmp_path / "in", tmp_path / "out"))
    returned = load_file(tmp_path / "out")
    assert torch.equal(returned["codes"], expected["codes"])
    torch.testing.assert_close(returned["audio"], expected["audio"], atol=1e-5, rtol=0)
    # The tokens are those of `tiny`, the decoder is another.
    tiny = load_model("tiny", device="cpu", dtype="float32")
    with torch.inference_mode():
        assert torch.equal(tiny.encode(expected["input_features"]).audio_codes, expected["codes"])
        assert not torch.allclose(tiny.decode(expected["codes"]).audio_values, expected["audio"], atol=1e-3)


def test_the_package_loads_it_by_name(server, with_package, voices, expected, tmp_path):
    with_package.run(pushed(voices, "me/by-name", token=TOKEN))
    save_file({name: tensor for name, tensor in expected.items() if name not in ("codes", "audio")}, tmp_path / "in")
    code = 'from mimo_audio_hf import load_model\nmodel = load_model("me/by-name", device="cpu", dtype="float32")\n'
    with_package.run(code + encoded(tmp_path / "in", tmp_path / "out"))
    assert torch.equal(load_file(tmp_path / "out")["codes"], expected["codes"])


def test_revisions(server, with_package, without_package, voices, tiny_checkpoint, tmp_path):
    with_package.run(pushed(voices, "me/revised", token=TOKEN))
    with_package.run(pushed(tiny_checkpoint, "me/revised", token=TOKEN, revision="untrained"))
    repository = server.repositories["me/revised"]
    assert repository.branches.keys() == {"main", "untrained"}
    assert server.content("me/revised", WEIGHTS) == (voices / WEIGHTS).read_bytes()
    assert server.content("me/revised", WEIGHTS, "untrained") == (tiny_checkpoint / WEIGHTS).read_bytes()
    for revision, checkpoint in (
        ("untrained", tiny_checkpoint),
        ("main", voices),
        (repository.branches["untrained"], tiny_checkpoint),
    ):
        cache = tmp_path / revision
        without_package.run(loaded("me/revised", cache, revision=revision, code_revision=revision))
        assert cached_commits(cache) == [repository.resolve(revision)]
        assert cached_weights(cache) == [(checkpoint / WEIGHTS).read_bytes()]
    # Once more to the same branch.
    with_package.run(pushed(voices, "me/revised", token=TOKEN, revision="untrained"))
    assert server.content("me/revised", WEIGHTS, "untrained") == (voices / WEIGHTS).read_bytes()
    name, message = without_package.error(loaded("me/revised", tmp_path / "none", revision="none"))
    assert name == "OSError" and "none" in message


def test_private_repositories(server, with_package, without_package, voices, tmp_path):
    with_package.run(pushed(voices, "me/secret", token=TOKEN, private=True))
    assert server.repositories["me/secret"].private
    for options in ({}, {"token": OTHER_TOKEN}):
        name, message = without_package.error(loaded("me/secret", tmp_path / "cache", **options))
        assert name == "OSError" and "me/secret" in message
        assert not cached_weights(tmp_path / "cache")
    without_package.run(loaded("me/secret", tmp_path / "cache", token=TOKEN))
    assert cached_weights(tmp_path / "cache") == [(voices / WEIGHTS).read_bytes()]
    name, message = with_package.error('from mimo_audio_hf import load_model\nload_model("me/secret", device="cpu")')
    assert name == "ValueError" and "me/secret" in message and "accepted" in message and "\n" not in message


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("me/refused", OTHER_TOKEN, "don't have the rights"),
        ("me/refused", "hf_unknown", "Invalid credentials"),
        ("me/re/fused", TOKEN, "Repo id must be"),
        ("refused", TOKEN, "accepted: owner/name"),
    ],
)
def test_refusals(server, with_package, voices, name, token, message):
    error, told = with_package.error(pushed(voices, name, token=token))
    assert error == "ValueError" and message in told and f"repo_id={name!r}" in told and "\n" not in told
    assert name not in server.repositories


def test_an_edited_card_goes_up(server, with_package, voices, tmp_path):
    repository = assemble_hub_repository(voices, tmp_path / "repository")
    card = (repository / "README.md").read_text() + "\nRecorded in a quiet room.\n"
    (repository / "README.md").write_text(card)
    (repository / "samples").mkdir()
    shutil.copy(RECORDING, repository / "samples" / "voice.wav")
    (repository / ".cache").mkdir()
    (repository / ".cache" / "notes").write_text("not for the Hub")
    for _ in range(2):  # again gives the same
        with_package.run(pushed(repository, "me/edited", token=TOKEN))
        assert server.content("me/edited", "README.md").decode() == card
    assert server.content("me/edited", WEIGHTS) == (voices / WEIGHTS).read_bytes()
    assert server.content("me/edited", "samples/voice.wav") == RECORDING.read_bytes()
    stored = server.repositories["me/edited"]
    assert not any(name.startswith(".cache") for name in stored.commits[stored.branches["main"]])


def test_a_card_that_the_hub_refuses_leaves_no_repository(server, with_package, voices, tmp_path):
    repository = assemble_hub_repository(voices, tmp_path / "repository")
    card = (repository / "README.md").read_text()
    (repository / "README.md").write_text(card.replace("---\n", "---\nlicense: gratis\n", 1))
    error, told = with_package.error(pushed(repository, "me/unlicensed", token=TOKEN))
    assert error == "ValueError" and "\n" not in told
    assert "repo_id='me/unlicensed': README.md" in told and "\"license\" is 'gratis'" in told
    assert "me/unlicensed" not in server.repositories


def test_an_upload_that_is_interrupted_goes_on(server, with_package, voices):
    server.large_files.clear()
    fault = server.fail("PUT", "/storage/", after=1_000_000)
    error = with_package.run_again_if_it_fails(pushed(voices, "me/interrupted", token=TOKEN))
    assert error is None or (error[0] == "ValueError" and WEIGHTS in error[1] and "\n" not in error[1])
    assert len(fault.seen) == 1
    assert server.content("me/interrupted", WEIGHTS) == (voices / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("method", "path", "options"),
    [
        ("POST", "/commit/", {"after": 1000}),
        ("PUT", "/storage/", {"status": 403}),
        ("POST", "/api/repos/create", {"after": 0}),
    ],
)
def test_an_upload_that_fails_is_told_and_can_be_repeated(
    server, with_package, tiny_checkpoint, method, path, options, tmp_path
):
    name = f"me/failed-{path.strip('/').rpartition('/')[2]}"
    server.large_files.clear()
    server.fail(method, path, **options)
    error, message = with_package.error(pushed(tiny_checkpoint, name, token=TOKEN))
    assert error == "ValueError" and f"repo_id='{name}'" in message and "\n" not in message
    if name in server.repositories:
        assert len(server.repositories[name].commits) == 1  # nothing of it can be seen
    already_there = bool(server.large_files)
    server.requests.clear()
    with_package.run(pushed(tiny_checkpoint, name, token=TOKEN))
    assert server.content(name, WEIGHTS) == (tiny_checkpoint / WEIGHTS).read_bytes()
    assert any(method == "PUT" for method, _ in server.requests) != already_there


def test_a_download_that_is_interrupted_goes_on(server, with_package, without_package, voices, tmp_path):
    with_package.run(pushed(voices, "me/download", token=TOKEN))
    fault = server.fail("GET", "/signed/", after=3_000_000)
    server.requests.clear()
    error = without_package.run_again_if_it_fails(loaded("me/download", tmp_path / "cache"))
    assert error is None or (error[0] == "OSError" and "me/download" in error[1])
    assert fault.seen == [None]
    assert sum(path.startswith("/signed/") for method, path in server.requests if method == "GET") == 2
    assert cached_weights(tmp_path / "cache") == [(voices / WEIGHTS).read_bytes()]


def test_a_download_that_fails_is_told_and_can_be_repeated(server, with_package, without_package, voices, tmp_path):
    with_package.run(pushed(voices, "me/broken", token=TOKEN))
    server.fail("GET", "/signed/", status=403)
    name, message = without_package.error(loaded("me/broken", tmp_path / "cache"))
    assert name == "OSError" and "me/broken" in message
    assert not cached_weights(tmp_path / "cache")
    without_package.run(loaded("me/broken", tmp_path / "cache"))
    assert cached_weights(tmp_path / "cache") == [(voices / WEIGHTS).read_bytes()]


def test_the_command_pushes_with_the_stored_token(server, voices, tmp_path):
    arguments = ["hub", str(voices), str(tmp_path / "repository"), "--push", "me/command", "--private"]
    environment = hub_environment(server, tmp_path / "home") | {"PYTHONPATH": str(SOURCES)}
    command = [sys.executable, "-m", "mimo_audio_hf.cli", *arguments, "--revision", "next"]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr.strip().splitlines()[-1].startswith("mimo-audio: error: repo_id='me/command': ")
    card = tmp_path / "repository" / "README.md"
    card.write_text(card.read_text() + "\nThe voices are mine.\n")
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "token").write_text(TOKEN)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"{server.endpoint}/me/command")
    # What was assembled is what was pushed.
    for path in (tmp_path / "repository").iterdir():
        assert server.content("me/command", path.name, "next") == path.read_bytes()
    assert server.repositories["me/command"].private
