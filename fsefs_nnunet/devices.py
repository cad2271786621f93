"""Where our own commands compute."""

from __future__ import annotations

import os

import torch

from fsefs_nnunet.errors import InputError


def device_named(name: str | None) -> torch.device:
    """The device "cpu", "cuda" or "mps"; None: the GPU if there is one.

    A CPU gets all its cores, as in nnU-Net's commands.

    Raises:
        InputError: for a GPU that is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = name or ("cuda" if available["cuda"] else "cpu")
    if not available.get(name, True):
        raise InputError(f"There is no GPU here that PyTorch can use as {name!r}: add -device cpu.")
    if name == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    return torch.device(name)
