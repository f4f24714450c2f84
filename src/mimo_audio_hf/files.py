# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Reading and writing files: nobody ever sees half of one."""

from __future__ import annotations

import json
import os
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name in the directory of `path`, to be written under and renamed to `path` at the end.

    Missing directories are made. If the block raises, an existing file stays as it was and nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        # Nobody knows the temporary file's name: say which file could not be written. A full disk names none at all.
        if error.errno is None or error.filename not in (None, temporary, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def require_regular_file(path: str | os.PathLike[str], accepted: str) -> None:
    """Refuse what is read without an end, or waited for: directories, pipes, devices.

    Args:
        accepted: the end of the message, which says what is.

    Raises:
        ValueError: it is one of these; the message names it.
        OSError: it is not there.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "no regular file"
        raise ValueError(f"{os.fspath(path)}: {kind}; {accepted}")


def read_json(path: Path, entries: Mapping[str, type] | None = None) -> dict[str, Any]:
    """A JSON object in a file.

    Args:
        entries: what it has to hold, and of which kind; `outer.inner` is an entry of an object in it.

    Raises:
        ValueError: the file is missing, or holds something else; the message names it.
    """
    try:
        require_regular_file(path, "accepted: a file")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}; accepted: a JSON object") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; accepted: a JSON object")
    for name, kind in (entries or {}).items():
        value: Any = content
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            found = "missing" if value is None else f"of type {type(value).__name__}"
            raise ValueError(f"{path}: {name} is {found}; accepted: {kind.__name__}")
    return content
