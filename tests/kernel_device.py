"""Where tests of a GPU's code run: there, or some of Triton's kernels with TRITON_INTERPRET=1 in its interpreter."""

from __future__ import annotations

import os

import pytest
import torch


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
needs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="these tests need a CUDA GPU")
# Also of kernels for which the interpreter is too slow or too inexact, or that it does not take.
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="this test needs a CUDA GPU")
