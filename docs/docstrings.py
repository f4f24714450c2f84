# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Docstrings as the site wants them: names in brackets as links, each parameter by itself."""

from __future__ import annotations

import re
from typing import Any

import griffe


_REFERENCE = re.compile(r"\[`([\w.]+)`\](?![\[(])")
# One of the parameters that a line tells about, with its type if there is one.
_PARAMETER = re.compile(r"(\w+)(?: \(([^()]*)\))?")
_TYPE = re.compile(r"^( +\w+ \()([^()]*\):)", re.MULTILINE)
_PARAMETERS = re.compile(rf"^( +)({_PARAMETER.pattern}(?:, {_PARAMETER.pattern})+):(?= |$)", re.MULTILINE)


class DocstringExtension(griffe.Extension):
    """For griffe, which reads the source."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return

        def link(match: re.Match[str]) -> str:
            name, *members = match[1].split(".")
            try:
                target = obj.resolve(name)
            except griffe.NameResolutionError:  # of what the module does not import
                target = f"mimo_audio_hf.{name}"
            if not target.startswith("mimo_audio_hf."):
                return f"`{match[1]}`"
            return f"[`{match[1]}`][{'.'.join([target, *members])}]"

        def apart(match: re.Match[str]) -> str:
            *others, (last, last_type) = _PARAMETER.findall(match[2])
            lines = [f"{name} ({kind or last_type}): see `{last}`." for name, kind in others]
            lines.append(f"{last} ({last_type}):")
            return "\n".join(match[1] + line.replace(" ()", "") for line in lines)

        text = _PARAMETERS.sub(apart, _REFERENCE.sub(link, obj.docstring.value))
        obj.docstring.value = _TYPE.sub(lambda match: match[1] + match[2].replace("`", ""), text)
