"""The SHA-256 of a checkpoint's weights: what stands beside them, as `fseft remember` adds to it, plays no part."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch

from fsefs_nnunet.backbones.checkpoints import read_checkpoint


def sha256_of_weights(checkpoint: Path) -> str:
    """Computed once while the file stays as it is.

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
