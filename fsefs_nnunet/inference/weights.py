"""The SHA-256 of a checkpoint's weights alone, which does not change with what `fseft remember` adds."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch

from fsefs_nnunet.backbones.checkpoints import read_checkpoint


def sha256_of_weights(checkpoint: Path) -> str:
    """Computed once, and again only if the file changes.

    Raises:
        InputError: for a damaged file.
    """
    return _sha256(checkpoint, checkpoint.stat().st_mtime_ns)


@cache
def _sha256(checkpoint: Path, modified: int) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(read_checkpoint(checkpoint)["network_weights"].items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
