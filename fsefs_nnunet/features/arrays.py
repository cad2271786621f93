"""Flat arrays in .npy files, mapped if the file system can map files."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fsefs_nnunet.files import replacing


@contextmanager
def new_files(files: Sequence[Path], sizes: Sequence[int], dtype: type) -> Iterator[list[np.ndarray]]:
    """New flat arrays that become `files` (.npy) at the end; after an error none of them does."""
    if not files:
        yield []
        return
    with replacing(files[0]) as part, new_files(files[1:], sizes[1:], dtype) as others:
        array = new_array(part, sizes[0], dtype)
        yield [array, *others]
        if isinstance(array, np.memmap):
            array.flush()
        else:
            with open(part, "wb") as f:
                np.save(f, array)


def new_array(file: Path, size: int, dtype: type) -> np.ndarray:
    """A flat array in a new .npy `file`, mapped; in memory if the file system cannot map files.

    Raises:
        OSError: if the disk cannot hold it. Space is reserved at once, since a mapped file that runs out of it later
            kills the process.
    """
    try:
        array = np.lib.format.open_memmap(file, "w+", dtype, (size,))
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        return np.zeros(size, dtype)
    if hasattr(os, "posix_fallocate"):
        with open(file, "r+b") as f:
            os.posix_fallocate(f.fileno(), 0, max(file.stat().st_size, 1))
    return array


def mapped(npy: Path) -> np.ndarray:
    """Content of an .npy file, mapped copy-on-write; in memory if the file system cannot map files."""
    try:
        return np.load(npy, mmap_mode="c")
    except OSError:
        return np.load(npy)
