# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""The commands of `mimo-audio`.

Each is a pair: `add_X(subparsers)`, which `cli` calls, declares its arguments; `run_X(args)` does the work and returns
the exit status, or None for success. A ValueError, OSError or missing package becomes one line on stderr and status 1.
"""
