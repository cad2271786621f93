"""Reading checkpoints without executing anything that they carry."""

from __future__ import annotations

import codecs
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import replacing


def _numpy_types() -> list:
    """What checkpoints hold besides tensors: numpy scalars in the log."""
    # numpy pickles its scalars under the name of its private module, which was renamed in version 2
    from numpy._core import multiarray

    dtypes = {type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64", "bool")}
    return [multiarray.scalar, (multiarray.scalar, "numpy.core.multiarray.scalar"), np.dtype, *dtypes]


def read_checkpoint(file: Path) -> dict:
    """Load a PyTorch file as data alone.

    Raises:
        InputError: if the file is missing, unreadable, damaged, or tries to run code; names the file and the remedy.
    """
    file = Path(file)
    if not file.exists():
        raise InputError(f"The checkpoint {file} is missing.")
    try:
        refuse_web_page(file)
        _refuse_torchscript(file)
        with torch.serialization.safe_globals(_numpy_types()):
            return torch.load(file, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except OSError as error:
        if error.strerror is None:  # a reader's, not the system's
            raise InputError(_damaged(file)) from error
        raise InputError(
            f"{file} cannot be read ({error.strerror}): make it readable, or give another file."
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(_damaged(file)) from error
    except Exception as error:  # unpickling arbitrary bytes may raise anything
        raise InputError(_why_not_opened(file, error)) from error


def _damaged(file: Path) -> str:
    return f"{file} is damaged or incomplete: download or copy it again."


def _why_not_opened(file: Path, error: Exception) -> str:
    """In our own words, since PyTorch's message advises loading the file anyway."""
    name = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and name:
        return (
            f"{file} was not opened: it holds more than weights, {name[1]}, and could run code. Take it from its "
            "publisher again; if it is your own, save its state_dict alone."
        )
    return f"{file} was not opened: it is not a PyTorch checkpoint. Take the checkpoint from its publisher again."


def _refuse_torchscript(file: Path) -> None:
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise InputError(
                f"{file} was not opened: it is a TorchScript archive, which is a program. Take the publisher's "
                "state_dict; if it is your own, save torch.jit.load(FILE).state_dict() with torch.save."
            )


def refuse_web_page(file: Path) -> None:
    """Raises InputError if `file` is what a browser, or git without LFS, leaves in place of a checkpoint."""
    with open(file, "rb") as f:
        start = f.read(64).removeprefix(codecs.BOM_UTF8).lstrip().lower()
    pages = (b"<!doctype", b"<!--", b"<html", b"<head", b"<body", b"<script", b"<?xml")
    if start.startswith((*pages, b"version https://git-lfs")):
        raise InputError(
            f"{file} was not opened: it is a web page or a pointer to the checkpoint, not the checkpoint. Download the "
            "file itself."
        )


def add_to_checkpoint(file: str | Path, **content) -> None:
    """Add entries, or replace them, atomically; nnU-Net's loaders only read their own."""
    with replacing(file) as part:
        torch.save({**read_checkpoint(Path(file)), **content}, part)
