"""Reading checkpoints without executing anything that they carry."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import torch

from fsefs_nnunet.errors import InputError


def _numpy_types() -> list:
    """What checkpoints hold beside tensors: numpy scalars in the log."""
    # numpy pickles its scalars under the name of its private module, which was another one before version 2
    from numpy._core import multiarray

    dtypes = {type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64", "bool")}
    return [multiarray.scalar, (multiarray.scalar, "numpy.core.multiarray.scalar"), np.dtype, *dtypes]


def read_checkpoint(file: Path) -> dict:
    """Load a PyTorch file as data alone.

    Raises:
        InputError: if the file is missing, damaged, or wants to run code; names the file and the remedy.
    """
    file = Path(file)
    if not file.exists():
        raise InputError(f"The checkpoint {file} is missing.")
    refuse_web_page(file)
    try:
        with torch.serialization.safe_globals(_numpy_types()):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file} was not opened: it holds more than weights, or is no PyTorch file "
            f"({str(error).splitlines()[0][:120]}). "
            "Take it from its publisher again; if it is your own, save its state_dict alone."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise InputError(f"{file} is damaged or incomplete: download or copy it again.") from error


def refuse_web_page(file: Path) -> None:
    """Raises InputError if `file` is what a browser, or git without LFS, leaves in place of a checkpoint."""
    with open(file, "rb") as f:
        start = f.read(64).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"version https://git-lfs")):
        raise InputError(
            f"{file} was not opened: it is a web page or a pointer to the checkpoint, not the checkpoint. Download the "
            "file itself."
        )


def add_to_checkpoint(file: str | Path, **content) -> None:
    """Add entries, or replace them, atomically; nnU-Net's loaders look at their own alone."""
    part = f"{file}.part"
    torch.save({**read_checkpoint(Path(file)), **content}, part)
    os.replace(part, file)
