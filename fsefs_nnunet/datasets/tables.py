"""Label tables of the public datasets, labels.json. Imports nothing heavy: help pages list the datasets."""

from __future__ import annotations

import difflib
import json
from functools import cache
from pathlib import Path


@cache
def tables() -> dict:
    """labels.json: "sources" and their labels by value; "sides" (right, left) of a label that names both.

    "unions" are structures that others make up completely, "lesions" lie inside a structure.
    """
    return json.loads((Path(__file__).parent / "labels.json").read_text("utf-8"))


def nearest(name: str, names: list[str]) -> str:
    """' Did you mean X?', or nothing if no name is close."""
    near = difflib.get_close_matches(name.lower(), [n.lower() for n in names], 1, 0.5)
    return f" Did you mean {next(n for n in names if n.lower() == near[0])}?" if near else ""
