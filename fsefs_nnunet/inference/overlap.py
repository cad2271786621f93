"""Reading, computing and writing at the same time, volume by volume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def overlapped(
    cases: Sequence[str],
    load: Callable[[str], Any],
    compute: Callable[[str, Any], Any],
    write: Callable[[str, Any], None],
    has_room: Callable[[], bool] = lambda: True,
) -> Iterator[tuple[str, Exception | None]]:
    """Load, compute and write each of `cases`: while one is computed, the next is loaded and the one before written.

    Loading and writing have a thread each, not nnU-Net's processes: readers, resampling and PyTorch release Python's
    global lock, nothing is copied, and a thread starts at once.

    Args:
        compute: of a case and what `load` gave; write: of a case and what `compute` gave.
        has_room: whether there is memory for what waits; if there is none, the steps run one after the other.

    Yields:
        Each finished case, and why it failed, or None.
    """
    with ThreadPoolExecutor(1) as loading, ThreadPoolExecutor(1) as writing:
        loaded: Future | None = None
        written: tuple[str, Future] | None = None
        for case, following in zip(cases, [*cases[1:], None]):
            content = made = error = None
            try:
                content = (loaded or loading.submit(load, case)).result()
            except Exception as reason:  # readers may raise anything for broken files
                error = reason
            loaded = loading.submit(load, following) if following is not None and has_room() else None
            if error is None:
                try:
                    made = compute(case, content)
                except Exception as reason:
                    error = reason
            if written is not None:
                yield written[0], written[1].exception()
                written = None
            if error is None:
                written = case, writing.submit(write, case, made)
                content = made = None
                if not has_room():
                    written[1].exception()
            else:
                yield case, error
        if written is not None:
            yield written[0], written[1].exception()
