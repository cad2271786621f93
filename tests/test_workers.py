"""Worker processes that compute ahead, and what remains where one of them dies."""

import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
from filelock import FileLock
from trainings import make_trainer

from fsefs_nnunet import workers
from fsefs_nnunet.workers import Ahead, worker_context

HERE = os.getpid()


def squared(number: int) -> tuple[int, bool]:
    return number * number, os.getpid() == HERE


def killed_in_a_worker(number: int) -> int:
    if os.getpid() != HERE:
        os._exit(1)
    return number


def refused(number: int) -> int:
    raise ValueError(f"no {number}")


@pytest.mark.parametrize("number, here", [(0, True), (2, False)])
def test_results_come_in_the_order_of_the_arguments(number, here):
    with Ahead(squared, range(10), number) as results:
        assert [results.take(i) for i in range(10)] == [(i * i, here) for i in range(10)]


def test_results_that_nobody_takes_are_dropped():
    with Ahead(squared, range(10), 1) as results:
        assert [results.take(i)[0] for i in (0, 4, 5, 9)] == [0, 16, 25, 81]
        assert results.take(3)[0] == 9  # again, here


def test_a_killed_worker_leaves_the_work_to_this_process():
    with Ahead(killed_in_a_worker, range(5), 2) as results:
        assert [results.take(i) for i in range(5)] == [*range(5)]


def test_errors_arrive():
    with Ahead(refused, range(5), 2) as results, pytest.raises(ValueError, match="no 0"):
        results.take(0)


@pytest.mark.parametrize("platform, method", [("linux", "fork"), ("darwin", "spawn")])
def test_processes_are_forked_on_linux_alone(monkeypatch, platform, method):
    monkeypatch.setattr(workers.sys, "platform", platform)
    assert worker_context().get_start_method() == method


KILLED = """
import sys, time
from filelock import FileLock
from test_workers import squared
from fsefs_nnunet import workers
from fsefs_nnunet.workers import Ahead
with FileLock(sys.argv[1]), Ahead(squared, range(9), 3) as results:
    results.take(0)
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_workers_of_a_killed_process_keep_no_lock(tmp_path):
    """They inherit it; a command that goes on would wait for it for ever."""
    lock, here = str(tmp_path / "training.lock"), os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONPATH": here}
    process = subprocess.Popen([sys.executable, "-c", KILLED, lock], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    with FileLock(lock).acquire(timeout=60):
        pass
    assert process.stdout.read() == ""  # no worker holds the pipe any more


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_views_are_the_same_whatever_process_makes_them(work, method):
    trainer = make_trainer(work, fseft_views=20)
    trainer.initialize()
    trainer.run = trainer.describe_run()
    views = trainer.support_views()
    names = [*views.names]
    with Ahead(views.make, names, 2, multiprocessing.get_context(method)) as made:
        assert made.pool is not None
        for name in names:
            theirs, ours = made.take(name), views.make(name)
            assert made.pool is not None, "the workers died"
            assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(theirs, ours))
