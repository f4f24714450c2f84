"""The test matrix: `nox` runs the tests with the oldest and with the newest versions of what the package stands on.

Both ends follow from pyproject.toml: the oldest ones are its lower bounds, the newest ones what pip finds within it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import nox


nox.options.sessions = ["oldest", "newest", "wheel"]
nox.needs_version = ">=2024.10"

PROJECT = nox.project.load_toml("pyproject.toml")["project"]


def lower_bounds(requirements: Sequence[str]) -> list[str]:
    """`name==version` for each `name>=version`."""
    bounds = [re.match(r"([\w-]+)>=([\w.]+)", requirement) for requirement in requirements]
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound is not None]


@nox.session(python=PROJECT["requires-python"].removeprefix(">="))
def oldest(session: nox.Session) -> None:
    """The tests with the lower bounds of all dependencies, on the oldest Python."""
    session.install("-e", ".[test]", *lower_bounds(PROJECT["dependencies"]))
    session.run("pytest", *session.posargs)


@nox.session
def newest(session: nox.Session) -> None:
    """The tests with the newest versions there are, pre-releases left out."""
    session.install("--upgrade", "--upgrade-strategy", "eager", "-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def wheel(session: nox.Session) -> None:
    """The wheel, built from the sdist, in an environment with nothing else: a clip to codes and back, offline."""
    folder = Path(session.create_tmp())
    session.install("build")
    session.run("python", "-m", "build", "--outdir", str(folder))
    session.run("python", "-m", "pip", "uninstall", "-y", "build")
    session.install(*map(str, folder.glob("*.whl")))
    clip = Path("tests", "fixtures", "audio", "prompt_speech_en_m.wav").resolve()
    session.chdir(folder)
    offline = {"HF_HUB_OFFLINE": "1"}
    session.run("mimo-audio", "roundtrip", str(clip), "roundtrip.wav", "--model", "tiny", env=offline)
