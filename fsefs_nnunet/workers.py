"""Worker processes: forked where the system can, which shares what is loaded and starts at once, else spawned."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from typing import Any

import torch

AHEAD = 2  # results for each worker that may wait to be taken

_of_worker: Callable | None = None


def worker_context() -> BaseContext:
    methods = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context("fork" if "fork" in methods else "spawn")


def _start(function: Callable) -> None:
    global _of_worker
    torch.set_num_threads(1)  # OpenMP does not survive a fork, and the cores belong to the other workers
    _of_worker = function


def _call(argument: object) -> Any:
    return _of_worker(argument)


class Ahead:
    """Results of a function, computed by worker processes in the order of its arguments before they are asked for.

    Without workers, and from the moment that one of them is killed, the function is called here.
    """

    def __init__(self, function: Callable[[Any], Any], arguments: Sequence, workers: int, context: BaseContext):
        """
        Args:
            function: where processes are spawned, it must be picklable.
            workers: 0: none.
        """
        self.function, self.arguments = function, list(arguments)
        self.next, self.most = 0, AHEAD * workers
        self.waiting: deque[tuple[Any, Future]] = deque()
        self.pool = ProcessPoolExecutor(workers, context, _start, (function,)) if workers else None

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

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def ahead(
    function: Callable[[Any], Any], arguments: Sequence, workers: int, context: BaseContext | None = None
) -> Iterator[Ahead]:
    """See Ahead; its workers end with the block."""
    made = Ahead(function, arguments, min(workers, len(arguments)), context or worker_context())
    try:
        yield made
    finally:
        made.close()
