"""One function on many cases, in parallel, with an error that the user understands whatever happens."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import starmap
from multiprocessing import get_context, parent_process
from threading import Thread

from tqdm import tqdm

from fsefs_nnunet.errors import InputError


def run_jobs(function: Callable, jobs: Iterable[tuple], num_processes: int, text: str) -> list:
    """Results of `function(*job)`, in parallel, with a progress bar.

    Raises:
        InputError: the first one of a worker, and if a worker is killed, the disk is full, or the user interrupts.
    """
    jobs = list(jobs)
    if not jobs:
        return []
    progress = partial(tqdm, total=len(jobs), desc=text)
    try:
        with full_disk_reported():
            if num_processes == 1:
                return list(progress(starmap(function, jobs)))
            with ProcessPoolExecutor(num_processes, get_context("spawn"), _start_worker) as pool:
                try:
                    futures = [pool.submit(function, *job) for job in jobs]
                    return list(progress(map(Future.result, futures)))
                except BaseException:  # the pool would finish all jobs first
                    for worker in pool._processes.values():  # as terminate_workers() does from Python 3.14 on
                        worker.terminate()
                    raise
    except BrokenProcessPool:
        raise InputError(
            f"One of {num_processes} processes was killed, usually for lack of memory: run the same command "
            "again with a smaller -np to continue."
        ) from None
    except KeyboardInterrupt:
        raise InputError("Interrupted: run the same command again to continue.") from None


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent reports an interrupt
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, which would wait for jobs forever."""
    parent_process().join()
    os._exit(1)


@contextmanager
def full_disk_reported() -> Iterator[None]:
    """Raises InputError if the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        text = f"No space left in nnUNet_raw ({error}): free some, then run the same command again."
        raise InputError(text) from error
