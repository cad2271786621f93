"""The feature maps that a backbone gives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FeatureMap:
    """channels: of the map; stride: voxels of the image that one of its voxels stands for, per axis."""

    channels: int
    stride: tuple[int, int, int] = (1, 1, 1)
