"""The error of bad input, and names in its sentences."""

from __future__ import annotations

from collections.abc import Iterable


class InputError(SystemExit, ValueError):
    """Something that the user can repair; its text names the file and the remedy.

    nnU-Net's commands call our classes and catch nothing: being a SystemExit, this ends them with its sentence instead
    of a traceback. Being a ValueError, it is caught as any other error of its kind.
    """


def several(names: Iterable[str], most: int = 3) -> str:
    """ "a, b, c and 2 more"."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
