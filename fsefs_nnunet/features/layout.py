"""What the feature bank keeps of a volume: the parts of a support case that crops come from, a query pooled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

BACKGROUND_BLOCKS = 32
MAX_POOLED_VOXELS = 100_000

Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """Boxes of a volume, or of its average over blocks of pool^3 voxels.

    shape: of the volume, (X, Y, Z).
    boxes: first voxel of each and the one after its last, per axis; the first box holds every crop around foreground.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    pool: int = 1

    @property
    def voxels(self) -> int:
        return sum(int(np.prod(np.subtract(stop, start))) for start, stop in self.boxes)

    def pack(self, features: torch.Tensor) -> np.ndarray:
        """Features (C, X, Y, Z) of the volume -> its boxes one after another, flat float16."""
        features = pooled(features, self.pool)[0] if self.pool > 1 else features
        parts = [features[(slice(None), *map(slice, *box))] for box in self.boxes]
        flat = [part.half().numpy().ravel() for part in parts]
        return flat[0] if len(flat) == 1 else np.concatenate(flat)  # one box is most often a whole volume

    def unpack(self, flat: np.ndarray) -> list[np.ndarray]:
        """What `pack` gave -> each box's features (C, x, y, z), views of `flat`."""
        shapes = [np.subtract(stop, start) for start, stop in self.boxes]
        channels = len(flat) // self.voxels
        ends = np.cumsum([channels * np.prod(shape) for shape in shapes])
        return [part.reshape(channels, *shape) for part, shape in zip(np.split(flat, ends[:-1]), shapes)]


def whole_layout(shape: Sequence[int]) -> Layout:
    """All of a volume (X, Y, Z)."""
    shape = tuple(int(n) for n in shape)
    return Layout(shape, (((0, 0, 0), shape),))


def pooled_name(case: str) -> str:
    """The name under which the bank keeps a support case as it keeps queries."""
    return f"{case}__pooled"


def query_layout(shape: Sequence[int], pool: int) -> Layout:
    """A volume (X, Y, Z), averaged over blocks of pool^3 voxels."""
    coarse = whole_layout([-(-n // pool) for n in shape])
    return Layout(tuple(int(n) for n in shape), coarse.boxes, pool)


def foreground_of(labels: np.ndarray, ignore_label: int | None) -> np.ndarray:
    """Which voxels of a label map show a class; nnU-Net's ignore label, the highest of all, is none."""
    return labels > 0 if ignore_label is None else (labels > 0) & (labels != ignore_label)


def annotated_voxels(labels: np.ndarray, ignore_label: int | None) -> np.ndarray:
    """Flat indices of the voxels in the image that are not ignored; none where the dataset has no ignore label."""
    if ignore_label is None:
        return np.empty(0, np.uint32)
    return flat_indices((labels >= 0) & (labels != ignore_label))


def flat_indices(mask: np.ndarray) -> np.ndarray:
    """Of the true voxels; a whole body has millions, and 4 bytes each are enough."""
    return np.flatnonzero(mask).astype(np.uint32)


def support_layout(
    case: str, labels: np.ndarray, crop_size: Sequence[int], window: Sequence[int], ignore_label: int | None = None
) -> Layout:
    """The region that crops around foreground lie in, then blocks for background crops; all of a small volume.

    Args:
        case: seeds the places of the blocks.
        labels: label map (X, Y, Z).
        crop_size: largest crop, voxels per axis.
        window: the backbone's; a volume that fits into it is small.
    """
    foreground = foreground_of(labels, ignore_label)
    whole = whole_layout(foreground.shape)
    if all(n <= w for n, w in zip(foreground.shape, window)):
        return whole
    crop = np.minimum(crop_size, foreground.shape)
    last = np.array(foreground.shape) - crop
    # drawn as background crops of a whole volume would be, so that they may overlap each other and the region
    rng, annotated = np.random.default_rng(list(case.encode())), annotated_voxels(labels, ignore_label)
    if len(annotated):  # a block of ignored voxels teaches nothing
        voxels = annotated[rng.integers(len(annotated), size=BACKGROUND_BLOCKS)]
        starts = np.clip(np.stack(np.unravel_index(voxels, labels.shape), 1) - crop // 2, 0, last)
    else:
        starts = rng.integers(0, last + 1, (BACKGROUND_BLOCKS, 3))
    boxes = [_box(start, start + crop) for start in starts]
    if foreground.any():
        lowest, highest = zip(*map(_extent, [foreground.any(others) for others in ((1, 2), (0, 2), (0, 1))]))
        region = [np.clip(voxel - crop // 2, 0, last) for voxel in (np.array(lowest), np.array(highest))]
        boxes.insert(0, _box(region[0], region[1] + crop))
    parts = Layout(whole.shape, tuple(boxes))
    return parts if parts.voxels < whole.voxels else whole


def _extent(present: np.ndarray) -> tuple[int, int]:
    places = np.flatnonzero(present)
    return places[0], places[-1]


def _box(start: np.ndarray, stop: np.ndarray) -> Box:
    return tuple(start.tolist()), tuple(stop.tolist())


def pooling_factor(shape: Sequence[int], most: int = MAX_POOLED_VOXELS) -> int:
    """The smallest factor that leaves at most `most` voxels of a volume of `shape`."""
    factor = 1
    while np.prod([-(-n // factor) for n in shape]) > most:
        factor += 1
    return factor


def pooled(features: torch.Tensor, factor: int) -> torch.Tensor:
    """Features (C, X, Y, Z) averaged over blocks of factor^3 voxels; incomplete blocks average what they hold.

    Returns:
        (1, C, x, y, z).
    """
    block = [min(factor, n) for n in features.shape[1:]]  # PyTorch refuses blocks wider than the volume
    return torch.nn.functional.avg_pool3d(features[None], block, ceil_mode=True, count_include_pad=False)
