"""nnU-Net's commands and ours in this process: one of its own imports PyTorch for five seconds, as do its workers."""

import contextlib
import multiprocessing
import os
import queue
import shlex
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import entry_points
from multiprocessing.pool import ThreadPool
from pathlib import Path
from subprocess import STDOUT, CalledProcessError, CompletedProcess
from types import SimpleNamespace

import pytest
import torch

THREADS = SimpleNamespace(Pool=ThreadPool, Process=threading.Thread, Queue=queue.Queue, Event=threading.Event)


@contextlib.contextmanager
def threads_for_workers():
    """nnU-Net's workers are threads of this process, which do the same and see the same folders."""
    from nnunetv2.inference import data_iterators
    from nnunetv2.utilities import utils

    original = multiprocessing.get_context

    def get_context(method=None):
        by_nnunet = sys._getframe(1).f_globals["__name__"].startswith("nnunetv2.")
        return THREADS if by_nnunet else original(method)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", get_context)
        patch.setattr(data_iterators, "Manager", lambda: THREADS)
        patch.setattr(utils, "Pool", ThreadPool)
        yield


def call(program: str, *arguments: object) -> int:
    """Call what the installed command `program` calls; returns its exit status, and prints what ends it."""
    (script,) = entry_points(group="console_scripts", name=program)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *map(str, arguments)])
        patch.setattr(sys, "excepthook", sys.excepthook)  # a trainer may set its own
        try:
            code = script.load()()
        except SystemExit as end:
            code = end.code
        except Exception:
            sys.excepthook(*sys.exc_info())
            code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        return 1
    return code or 0


def run(command: Sequence, env=None, stdout=None, stderr=None, check=False) -> CompletedProcess:
    """As subprocess.run: a test puts this module in the place of that one. Output goes to a file, if one is given."""
    program, *arguments = command
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if env is not None:
            for name in {*os.environ} - {*env}:
                patch.delenv(name)
            for name, value in env.items():
                patch.setenv(name, value)
        if stdout is not None:
            stack.enter_context(contextlib.redirect_stdout(stdout))
        if stderr is not None:
            stack.enter_context(contextlib.redirect_stderr(stdout if stderr == STDOUT else stderr))
        code = call(Path(program).name, *arguments)
    if check and code:
        raise CalledProcessError(code, command)
    return CompletedProcess(command, code)


def one_thread(patch: pytest.MonkeyPatch) -> None:
    """Volumes this small are no faster with more, which wait at full load; sums depend on their number, too."""
    torch.set_num_threads(1)
    patch.setattr(torch, "set_num_threads", lambda number: None)  # commands on a CPU ask for all cores


def shell(line: str) -> int:
    """A command as a user types it."""
    return call(*shlex.split(line))


if __name__ == "__main__":  # a process of its own that computes as the tests do, to the last bit
    one_thread(pytest.MonkeyPatch())
    sys.exit(call(*sys.argv[1:]))
