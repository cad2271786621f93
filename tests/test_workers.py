"""Worker processes that compute ahead, and what remains where one of them dies."""

import multiprocessing
import os

import numpy as np
import pytest
from trainings import make_trainer

from fsefs_nnunet.workers import ahead, worker_context

HERE = os.getpid()


def squared(number: int) -> tuple[int, bool]:
    return number * number, os.getpid() == HERE


def killed_in_a_worker(number: int) -> int:
    if os.getpid() != HERE:
        os._exit(1)
    return number


def refused(number: int) -> int:
    raise ValueError(f"no {number}")


@pytest.mark.parametrize("workers, here", [(0, True), (2, False)])
def test_results_come_in_the_order_of_the_arguments(workers, here):
    with ahead(squared, range(10), workers) as results:
        assert [results.take(i) for i in range(10)] == [(i * i, here) for i in range(10)]


def test_results_that_nobody_takes_are_dropped():
    with ahead(squared, range(10), 1) as results:
        assert [results.take(i)[0] for i in (0, 4, 5, 9)] == [0, 16, 25, 81]
        assert results.take(3)[0] == 9  # again, here


def test_a_killed_worker_leaves_the_work_to_this_process():
    with ahead(killed_in_a_worker, range(5), 2) as results:
        assert [results.take(i) for i in range(5)] == [*range(5)]


def test_errors_arrive():
    with ahead(refused, range(5), 2) as results, pytest.raises(ValueError, match="no 0"):
        results.take(0)


def test_processes_are_forked_where_that_is_possible(monkeypatch):
    assert worker_context().get_start_method() == "fork"
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert worker_context().get_start_method() == "spawn"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_views_are_the_same_whatever_process_makes_them(work, method):
    trainer = make_trainer(work, fseft_views=20)
    trainer.initialize()
    trainer.run = trainer.describe_run()
    views = trainer.support_views()
    names = [*views.names]
    with ahead(views.make, names, 2, multiprocessing.get_context(method)) as made:
        assert made.pool is not None
        for name in names:
            theirs, ours = made.take(name), views.make(name)
            assert made.pool is not None, "the workers died"
            assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(theirs, ours))
