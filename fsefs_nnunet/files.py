"""Files that are complete or not there at all, and reading files that others may have left incomplete."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from math import isfinite
from pathlib import Path
from secrets import token_hex
from time import time

from fsefs_nnunet.errors import InputError

PART = ".part"  # ends the names of unfinished files
ABANDONED_SECONDS = 24 * 3600


@contextmanager
def replacing(file: str | Path) -> Iterator[Path]:
    """A path next to `file` to write to; it takes the name of `file` at the end, and is deleted after an error.

    The name is unique, so that two processes may replace one file at once: the last one wins, and whoever reads
    meanwhile sees one content or the other. What a killed process left more than a day ago is deleted.
    """
    file = Path(file)
    for left in file.parent.glob(f".{escape(file.name)}.*{PART}"):
        with suppress(FileNotFoundError):
            if time() - left.stat().st_mtime > ABANDONED_SECONDS:
                left.unlink()
    part = file.with_name(f".{file.name}.{os.getpid()}-{token_hex(4)}{PART}")
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def refused_if_unwritable(folder: str | Path) -> Iterator[None]:
    """Raises InputError if a folder turns out to be read-only, or a folder is in the place of a file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR):
            raise
        file = error.filename2 or error.filename or folder
        raise InputError(
            f"{file} cannot be written ({error.strerror}): make it writable, or choose another folder."
        ) from error


def write_atomically(file: str | Path, content: str | bytes) -> None:
    """Replace `file`: it holds the old content or the new one, never a part."""
    with replacing(file) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(file: str | Path, content: object) -> None:
    """As write_atomically; numbers that are not finite become null, since JSON has no NaN."""
    write_atomically(file, json.dumps(_finite(content), indent=1))


def _finite(content: object) -> object:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not isfinite(content) else content


def read_json(file: Path) -> dict:
    """The content of a JSON file that exists.

    Raises:
        InputError: if it is incomplete or damaged.
    """
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is damaged ({error}): move it away, or restore it.") from error


def value_in(file: Path, key: str) -> object:
    """The value of `key` in a JSON file; None without the key, and without a readable file."""
    try:
        return read_json(file).get(key)
    except (FileNotFoundError, InputError):
        return None


def sha256_of(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB"
