# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Codes to audio while they are generated, and audio to codes while it is recorded.

Everything that a stream remembers belongs to the stream, and is bounded (but for encoders that look back without a
bound, see [`StreamingEncoder`]): it may run for days.
"""

from .decoder import LOW_LATENCY, StreamingDecoder, StreamingDecoderPool
from .encoder import StreamingEncoder


__all__ = ["LOW_LATENCY", "StreamingDecoder", "StreamingDecoderPool", "StreamingEncoder"]
