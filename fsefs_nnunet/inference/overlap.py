"""Reading, the network and writing at once, for one volume after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def overlapped(
    cases: Sequence[str],
    load: Callable[[str], Any],
    compute: Callable[[str, Any], Any],
    write: Callable[[str, Any], None],
) -> Iterator[tuple[str, Exception | None]]:
    """Load, compute and write each of `cases`: while one is computed, the next is loaded and the one before written.

    Loading and writing have a thread each, not nnU-Net's processes: readers, resampling and PyTorch release Python's
    lock, nothing is copied, and a thread starts at once.

    Args:
        compute: of a case and what `load` gave; write: of a case and what `compute` gave.

    Yields:
        Each case that is done with, and why it failed, None if it did not.
    """
    with ThreadPoolExecutor(1) as loading, ThreadPoolExecutor(1) as writing:
        loaded = loading.submit(load, cases[0]) if cases else None
        written: tuple[str, Future] | None = None
        for case, following in zip(cases, [*cases[1:], None]):
            content = made = error = None
            try:
                content = loaded.result()
            except Exception as reason:  # readers of broken files raise whatever they like
                error = reason
            loaded = None if following is None else loading.submit(load, following)
            if error is None:
                try:
                    made = compute(case, content)
                except Exception as reason:
                    error = reason
            if written is not None:
                yield written[0], written[1].exception()
            written = None if error else (case, writing.submit(write, case, made))
            if error is not None:
                yield case, error
        if written is not None:
            yield written[0], written[1].exception()
