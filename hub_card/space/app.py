# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""The Space: the page of `mimo-audio demo`, for the model that the variable MIMO_AUDIO_MODEL names."""

import os
from pathlib import Path

from mimo_audio_hf import load_model, optimize_for_inference
from mimo_audio_hf.demo import Demo, serve


model = optimize_for_inference(load_model(os.environ.get("MIMO_AUDIO_MODEL", "tiny")))
serve(Demo(model), sorted(Path(__file__).with_name("examples").iterdir()))
