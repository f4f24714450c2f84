# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Processes for work that would hold up the one that runs the model."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver

import torch


def available_cores() -> int:
    """Cores that this process may use: its share, where a launcher has started several."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def give_way(worker: int = 0) -> None:
    """Called in a process that works for the one that runs the model: that goes first where cores are scarce."""
    if hasattr(os, "nice"):
        os.nice(10)


@contextmanager
def worker_pool(
    workers: int, preload: str, initializer: Callable[[], None] | None = None
) -> Iterator[ProcessPoolExecutor]:
    """Processes that share nothing with this one: neither its threads nor its CUDA context survive a fork.

    What has not begun when the block ends is not begun any more.

    Args:
        workers: how many; each uses one core.
        preload: the module whose functions they run, which is imported once for all of them.
        initializer: called in each at its start.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([preload])
        forkserver.ensure_running()  # which begins to import, and is not waited for
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(initializer,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start(initializer: Callable[[], None] | None) -> None:
    """There may be as many workers as cores: each uses one. It ends with the process that started it, in any case."""
    give_way()
    torch.set_num_threads(1)
    if initializer is not None:
        initializer()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
