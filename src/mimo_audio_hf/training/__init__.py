# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Training, as the technical report does it (arXiv 2512.23808)."""

from .config import TrainingConfig
from .trainer import NonFiniteLossError, Trainer


__all__ = ["NonFiniteLossError", "Trainer", "TrainingConfig"]
