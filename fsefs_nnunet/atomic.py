"""Files that are there whole or not at all, and reading what others may have left in parts."""

from __future__ import annotations

import json
import os
from pathlib import Path

from fsefs_nnunet.errors import InputError


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write beside `file`, then rename: whoever reads meanwhile sees the old content or the new one."""
    part = file.with_name(f"{file.name}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, file)


def read_json(file: Path) -> dict:
    """The content of a JSON file that exists.

    Raises:
        InputError: if it was written in part.
    """
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is damaged ({error}): move it away, or restore it.") from error
