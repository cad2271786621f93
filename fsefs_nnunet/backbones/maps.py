"""The feature maps that a backbone gives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FeatureMap:
    """channels: of the map; stride: how many voxels of the image one of its voxels spans, per axis."""

    channels: int
    stride: tuple[int, int, int] = (1, 1, 1)
