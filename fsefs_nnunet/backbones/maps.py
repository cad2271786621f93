"""The feature maps that a backbone gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class FeatureMap:
    """channels: of the map; stride: voxels of the image that one of its voxels stands for, per axis."""

    channels: int
    stride: tuple[int, int, int] = (1, 1, 1)


def at_full_resolution(maps: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """Maps (B, C_i, x_i, y_i, z_i) of an image of `shape` (X, Y, Z) -> (B, sum of C_i, X, Y, Z), upsampled linearly."""
    shape = tuple(shape)
    full = [m if m.shape[2:] == shape else F.interpolate(m, size=shape, mode="trilinear") for m in maps]
    return full[0] if len(full) == 1 else torch.cat(full, 1)
