"""What is released: the sdist holds what is needed to work on the project, the wheel what is needed to use it."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import soundfile

from mimo_audio_hf import __version__


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "mimo_audio_hf"
RECORDING = ROOT / "tests" / "fixtures" / "audio" / "prompt_speech_en_m.wav"
# What tools leave behind beside hidden files, of which these are the project's own.
LEFT_BEHIND = {"__pycache__", "build", "dist", "_build", "shared"}
HIDDEN = {".ci", ".gitignore", ".pre-commit-config.yaml"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of the sources, in which building leaves its traces."""
    copy = tmp_path_factory.mktemp("release") / "sources"

    def is_ignored(name: str) -> bool:
        return name in LEFT_BEHIND or name.endswith(".egg-info") or (name.startswith(".") and name not in HIDDEN)

    shutil.copytree(ROOT, copy, ignore=lambda folder, names: [name for name in names if is_ignored(name)])
    return copy


@pytest.fixture(scope="module")
def release(sources) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it; with the tools that are installed, for there is no network."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(sources.parent / "dist"), str(sources)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (sdist,) = (sources.parent / "dist").glob("*.tar.gz")
    (wheel,) = (sources.parent / "dist").glob("*.whl")
    return sdist, wheel


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_version_is_in_one_place(release):
    sdist, wheel = release
    assert sdist.name == f"mimo_audio_hf-{__version__}.tar.gz"
    assert wheel.name == f"mimo_audio_hf-{__version__}-py3-none-any.whl"
    places = [*PACKAGE.rglob("*.py"), ROOT / "pyproject.toml"]
    assert [path.name for path in places if f'"{__version__}"' in path.read_text()] == ["version.py"]
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_sdist_has_all_sources(sources, release):
    with tarfile.open(release[0]) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    expected = {name for name in files_in(sources) if ".egg-info/" not in name and not name.startswith("build/")}
    assert expected - found <= {".gitignore"}


def test_the_wheel_has_the_package_and_nothing_else(release):
    with zipfile.ZipFile(release[1]) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        information = {name.partition("/")[2]: name for name in names if ".dist-info/" in name}
        metadata = email.message_from_bytes(archive.read(information["METADATA"]))
        entry_points = archive.read(information["entry_points.txt"]).decode()
    package = {f"mimo_audio_hf/{name}" for name in files_in(PACKAGE) if not name.endswith(".pyc")}
    assert names - set(information.values()) == package
    assert {"mimo_audio_hf/py.typed", "mimo_audio_hf/tiny/model.safetensors"} <= package
    licences = {name for name in information if name.startswith("licenses/")}
    assert {
        "licenses/LICENSE",
        "licenses/src/mimo_audio_hf/tiny/LICENSE",
        "licenses/src/mimo_audio_hf/tiny/NOTICE",
    } == licences
    assert metadata["Version"] == __version__ and metadata["Requires-Python"] == ">=3.10"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert all(", https://" in url for url in metadata.get_all("Project-URL"))
    assert "# mimo-audio-hf" in metadata.get_payload()
    assert {"mimo-audio = mimo_audio_hf.cli:main", "mimo_audio_tokenizer = mimo_audio_hf.offline:main"} <= set(
        entry_points.splitlines()
    )


def test_the_wheel_runs(release, tmp_path):
    """From a folder of its own, without the sources; noxfile.py has the same in a bare environment."""
    with zipfile.ZipFile(release[1]) as archive:
        archive.extractall(tmp_path / "installed")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r})\n"
        f"import mimo_audio_hf.cli as cli; assert cli.__file__.startswith({str(tmp_path)!r})\n"
        f"sys.exit(cli.main(['roundtrip', {str(RECORDING)!r}, 'out.wav', '--model', 'tiny', '--device', 'cpu']))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert soundfile.info(tmp_path / "out.wav").frames == soundfile.info(RECORDING).frames
