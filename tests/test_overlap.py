"""Reading, the network and writing at once."""

from threading import Event

import pytest

from fsefs_nnunet.inference.overlap import overlapped


def run(cases, fails=(), seen=None):
    """Cases that fail in one of their steps, a pair each."""
    seen = [] if seen is None else seen

    def step(name, case, content=""):
        seen.append((name, case))
        if (name, case) in fails:
            raise ValueError(f"{name} {case}")
        return f"{content}{name[0]}"

    def write(case, content):
        assert content == "lc"
        step("write", case)

    steps = overlapped(cases, lambda case: step("load", case), lambda *of: step("compute", *of), write)
    return [(case, error and str(error)) for case, error in steps]


def test_every_case_goes_through_all_steps():
    seen = []
    assert run([*"abc"], seen=seen) == [("a", None), ("b", None), ("c", None)]
    assert sorted(seen) == sorted((name, case) for name in ("load", "compute", "write") for case in "abc")
    assert run([]) == []


@pytest.mark.parametrize("step", ["load", "compute", "write"])
@pytest.mark.parametrize("case", [*"abc"])
def test_a_case_that_fails_does_not_stop_the_others(step, case):
    made = dict(run([*"abc"], {(step, case)}))
    assert made == {**dict.fromkeys("abc"), case: f"{step} {case}"}
    assert dict(run([*"abc"], {(step, c) for c in "abc"})) == {c: f"{step} {c}" for c in "abc"}


def test_without_room_one_step_follows_the_other():
    seen = []
    steps = [lambda case, *_, name=name: seen.append((case, name)) for name in ("load", "compute", "write")]
    assert [case for case, _ in overlapped([*"abc"], *steps, lambda: False)] == [*"abc"]
    assert seen == [(case, name) for case in "abc" for name in ("load", "compute", "write")]


def test_steps_of_neighbours_run_at_once():
    """Computing b waits until c is being loaded and a written: one after another, that would never be."""
    loading, writing = Event(), Event()

    def compute(case, _):
        if case == "b":
            assert loading.wait(20) and writing.wait(20)

    def load(case):
        if case == "c":
            loading.set()

    assert all(error is None for _, error in overlapped([*"abc"], load, compute, lambda *_: writing.set()))
