"""Worker processes: forked on Linux, where they share what is loaded and start at once; spawned elsewhere."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from threading import Thread
from typing import Any

import torch

WAITING_PER_WORKER = 2  # results that are made before they are taken

_of_worker: Callable | None = None


def worker_context() -> BaseContext:
    # a fork after macOS's frameworks were loaded may crash
    return multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def _start(function: Callable) -> None:
    global _of_worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    Thread(target=_end_with_parent, daemon=True).start()  # an orphan would keep the parent's locks
    torch.set_num_threads(1)  # OpenMP does not survive a fork, and the cores belong to the other workers
    _of_worker = function


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(argument: object) -> Any:
    return _of_worker(argument)


class Ahead:
    """Results of a function that worker processes compute in the order of its arguments before they are requested.

    A context manager: the workers end with its block. Without workers, and as soon as one of them is killed, the
    function is called in this process.
    """

    def __init__(
        self, function: Callable[[Any], Any], arguments: Sequence, workers: int, context: BaseContext | None = None
    ):
        """
        Args:
            function: where processes are spawned, it must be picklable.
            workers: 0: none.
        """
        self.function, self.arguments = function, list(arguments)
        workers = min(workers, len(self.arguments))
        self.next, self.most = 0, WAITING_PER_WORKER * workers
        self.waiting: deque[tuple[Any, Future]] = deque()
        made = context or worker_context()
        self.pool = ProcessPoolExecutor(workers, made, _start, (function,)) if workers else None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
            self.pool = None

    def take(self, argument: Any) -> Any:
        """The result for `argument`; those before it that nobody took are dropped."""
        if self.pool is not None:
            try:
                return self._taken(argument)
            except BrokenProcessPool:
                self.pool = None
        return self.function(argument)

    def _taken(self, argument: Any) -> Any:
        position = self.arguments.index(argument)
        while self.waiting and self.arguments.index(self.waiting[0][0]) < position:
            self.waiting.popleft()[1].cancel()
        self.next = max(self.next, position)
        while self.next < len(self.arguments) and len(self.waiting) < self.most:
            following = self.arguments[self.next]
            self.waiting.append((following, self.pool.submit(_call, following)))
            self.next += 1
        if not self.waiting or self.waiting[0][0] != argument:
            return self.function(argument)  # taken before
        return self.waiting.popleft()[1].result()
