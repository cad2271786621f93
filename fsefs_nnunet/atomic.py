"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write beside `file`, then rename: whoever reads meanwhile sees the old content or the new one."""
    part = file.with_name(f"{file.name}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, file)
