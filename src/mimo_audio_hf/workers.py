# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Processes for work that would hold up the one that runs the model."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import forkserver
from types import FrameType
from typing import TypeVar

import torch
from torch.utils.data import DataLoader


Item = TypeVar("Item")
Handler = Callable[[int, FrameType | None], object]


def available_cores() -> int:
    """Cores that this process may use: its share, where a launcher has started several."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def give_way(worker: int = 0) -> None:
    """Called in a process that works for the one that runs the model: that goes first where cores are scarce."""
    if hasattr(os, "nice"):
        os.nice(10)


@contextmanager
def interrupted_afterwards() -> Iterator[None]:
    """Ctrl-C or SIGTERM within the block counts at its end: Python swallows what a handler raises while it forks.

    Processes that begin in the block leave Ctrl-C to the one that began them.
    """
    if threading.current_thread() is not threading.main_thread():  # where Python has no signals
        yield
        return
    noted: list[Callable[[], object]] = []
    is_over = False

    def noting(handler: Handler) -> Handler:
        def receive(number: int, frame: FrameType | None) -> None:
            if is_over:  # a signal came while another's handler was put back, and kept this one's from it
                handler(number, frame)
            else:
                noted.append(partial(handler, number, frame))

        return receive

    handlers: dict[signal.Signals, Handler] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, noting(handler))
        yield
    finally:
        is_over = True
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for each in noted:
            each()


def begun(loader: DataLoader[Item]) -> Iterator[Item]:
    """What a loader gives, once its processes have begun, as [`interrupted_afterwards`]."""
    with interrupted_afterwards():
        return iter(loader)


@contextmanager
def worker_pool(
    workers: int, preload: str | None = None, initializer: Callable[[], None] | None = None
) -> Iterator[ProcessPoolExecutor]:
    """Processes of one core each. What has not begun when the block ends is not begun any more.

    Args:
        workers: how many.
        preload: a module with the functions they run. It is imported once for all of them, in a process that shares
            nothing with this one, neither threads nor a CUDA context; that takes some seconds, which are not waited
            for. Without it they are copies of this process as it is, where the system has such, and there at once:
            for a process without threads that matter to them.
        initializer: called in each at its start.
    """
    methods = multiprocessing.get_all_start_methods()
    copied = preload is None and sys.platform != "darwin"  # whose libraries do not all bear it
    wanted = "fork" if copied else "forkserver"
    method = wanted if wanted in methods else "spawn"
    context = multiprocessing.get_context(method)
    if preload is not None and method == "forkserver":
        context.set_forkserver_preload([preload])
        forkserver.ensure_running()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(initializer,))
    try:
        if method == "fork":
            with interrupted_afterwards():
                pool.submit(int)  # which starts them all
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
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
