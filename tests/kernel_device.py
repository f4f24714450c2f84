"""Where tests of Triton kernels run: on a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter, without one."""

from __future__ import annotations

import os

import pytest
import torch


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
needs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="these tests need a CUDA GPU")
# Of what the interpreter lacks, or is too slow or too inexact for.
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="this test needs a CUDA GPU")
