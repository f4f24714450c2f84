"""What loading a checkpoint runs, opens and connects to, seen by Python's audit hooks in a fresh interpreter."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mimo_audio_hf
from mimo_audio_hf.hub import AUTO_CLASSES, assemble_hub_repository


PACKAGE = Path(mimo_audio_hf.__file__).parent
MODEL_CODE = {f"{cls.__module__.rpartition('.')[2]}.py" for cls in AUTO_CLASSES.values()}

# The events are told in a file, each with what the hook saw; `installed` are the places of Python and its packages.
AUDIT = """
import json, os, sys

report = open(sys.argv[1], "w")
places = json.loads(sys.argv[2])
if not places["package"]:
    sys.modules["mimo_audio_hf"] = None
sys.path[:0] = places["package"]
processes = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty")
sockets = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto")
loading = False


def caller():
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith("<frozen"):
        frame = frame.f_back
    return frame.f_code.co_filename


def hook(event, arguments):
    if not loading:
        return
    told = None
    if event == "exec":
        told = arguments[0].co_filename
        if told.startswith("<"):  # of a string: whoever runs it answers for it
            told = f"{told} by {caller()}"
    elif event == "pickle.find_class":
        told = ".".join(arguments)
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        path, mode, flags = arguments
        writes = set("wax+") & set(mode or "") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
        event, told = ("write" if writes else "read"), os.fsdecode(path)
    elif event in processes or event in sockets:
        told = repr(arguments)
    elif event == "ctypes.dlopen":
        told = str(arguments[0])
    if told is not None:
        print(json.dumps([event, told]), file=report, flush=True)


sys.addaudithook(hook)
repository = sys.argv[3]
import torch
import transformers.modeling_utils  # with what it imports: old scipy asks the system for its processor
"""
LOAD = """
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioTokenization
if places["package"]:
    import mimo_audio_hf
loading = True
config = AutoConfig.from_pretrained(repository, **OPTIONS)
extractor = AutoFeatureExtractor.from_pretrained(repository, **OPTIONS)
model = AutoModelForAudioTokenization.from_pretrained(repository, **OPTIONS)
loading = False
with torch.inference_mode():
    inputs = extractor([0.1] * 4800, sampling_rate=24000)
    assert model.encode(**inputs).audio_codes.shape == (1, 20, 6)
"""


@pytest.fixture
def repository(tiny_checkpoint, tmp_path) -> Path:
    """A repository that also holds what must not be run: code of other names, and pickles, that leave a mark."""
    repository = assemble_hub_repository(tiny_checkpoint, tmp_path / "repository")
    mark = f"open({str(tmp_path / 'mark')!r}, 'w').close()\n"
    for name in ("__init__.py", "sitecustomize.py", "setup.py", "tokenization_mimo_audio_tokenizer.py", "generate.py"):
        (repository / name).write_text(mark)
    (repository / "custom_generate").mkdir()
    (repository / "custom_generate" / "generate.py").write_text(mark)

    class Mark:
        def __reduce__(self) -> tuple[Any, ...]:
            return exec, (mark,)

    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt"):
        (repository / name).write_bytes(pickle.dumps(Mark()))
    return repository


def audited(repository: Path, folder: Path, options: dict[str, Any], package: bool = False) -> list[tuple[str, str]]:
    """The events of loading a repository's configuration, feature extractor and model."""
    home, report = folder / "home", folder / "events"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    places = json.dumps({"package": [str(PACKAGE.parent)] if package else []})
    code = AUDIT + LOAD.replace("OPTIONS", repr(options))
    command = [sys.executable, "-I", "-c", code, str(report), places, str(repository)]
    done = subprocess.run(command, env=environment, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [(event, told) for event, told in map(json.loads, report.read_text().splitlines())]


def not_installed(files: set[str], *others: Path) -> set[str]:
    """Without the files of Python and of its packages."""
    import importlib.util

    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    packages = Path(spec.origin).parent.parent
    installed = tuple(f"{place}{os.sep}" for place in (packages, Path(os.__file__).parent, *others))
    return {file for file in files if not file.startswith((*installed, "<frozen "))}


def test_only_the_three_files_are_run(repository, tmp_path):
    events = audited(repository, tmp_path, {"trust_remote_code": True})
    modules = tmp_path / "home" / "modules" / "transformers_modules"
    executed = not_installed({told.rpartition(" by ")[2] for event, told in events if event == "exec"})
    # transformers runs copies, in packages of which it makes the (empty) __init__.py itself.
    own = {file for file in executed if Path(file).name == "__init__.py"}
    assert {Path(file).name for file in executed - own} == MODEL_CODE
    for file in map(Path, executed - own):
        assert modules in file.parents and file.read_bytes() == (PACKAGE / file.name).read_bytes()
    for file in map(Path, own):
        assert modules.parent in file.parents and file.read_bytes() == b""
    assert not (tmp_path / "mark").exists()
    # No process, no connection, no pickle; nothing is written but these copies.
    assert {event for event, _ in events} <= {"exec", "read", "write", "ctypes.dlopen"}
    written = {told for event, told in events if event == "write"}
    assert not {file for file in written if modules.parent not in Path(file).parents and file != os.devnull}
    # A library without a folder is looked for among the system's own.
    assert not not_installed({told for event, told in events if event == "ctypes.dlopen" and os.sep in told})
    assert not {told for event, told in events if told.endswith((".bin", ".pt"))}


def test_with_the_package_nothing_of_the_repository_is_run(repository, tmp_path):
    for name in MODEL_CODE:
        (repository / name).write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\n")
    events = audited(repository, tmp_path, {}, package=True)
    executed = {told.rpartition(" by ")[2] for event, told in events if event == "exec"}
    assert not not_installed(executed, PACKAGE)
    assert not (tmp_path / "mark").exists()
    assert {event for event, _ in events} <= {"exec", "read"}


def test_without_trust_nothing_of_the_repository_is_run(repository, tmp_path):
    with pytest.raises(AssertionError, match="trust_remote_code"):
        audited(repository, tmp_path, {"trust_remote_code": False})
    events = map(json.loads, (tmp_path / "events").read_text().splitlines())
    assert not not_installed({told.rpartition(" by ")[2] for event, told in events if event == "exec"})
    assert not (tmp_path / "mark").exists()


def test_the_hook_sees_what_must_not_happen(repository, tmp_path):
    """A model code that runs another file, a process and a pickle is found out."""
    name = "configuration_mimo_audio_tokenizer.py"
    code = """
import pickle, runpy, subprocess
pickle.loads(pickle.dumps(Path))
subprocess.run(["true"])
runpy.run_path(REPOSITORY + "/setup.py")
"""
    source = (repository / name).read_text() + "from pathlib import Path\n"
    (repository / name).write_text(source + code.replace("REPOSITORY", repr(str(repository))))
    events = audited(repository, tmp_path, {"trust_remote_code": True})
    assert {"pickle.find_class", "subprocess.Popen"} <= {event for event, _ in events}
    assert ("exec", str(repository / "setup.py")) in events
    assert (tmp_path / "mark").exists()
