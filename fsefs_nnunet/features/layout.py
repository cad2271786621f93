"""What the feature bank keeps of a volume: boxes of a support case that crops come from, block averages of a query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import ceil, prod

import numpy as np

from fsefs_nnunet.cases.shown_voxels import ShownVoxels, annotated_in, foreground_of

BACKGROUND_BLOCKS = 32
MAX_POOLED_VOXELS = 100_000

Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """Boxes of a volume's maps, or its features averaged over blocks.

    shape: of the volume, (X, Y, Z).
    boxes: first voxel of each and the one after its last, per axis; with foreground, the first box contains all crops
        around it.
    pool: voxels of a block per axis; None: boxes of the maps, each map at its own resolution.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...] = ()
    pool: tuple[int, ...] | None = None

    @property
    def voxels(self) -> int:
        """Number of voxels in all boxes, or of blocks."""
        if self.pool is not None:
            return prod(self.blocks)
        return sum(prod(np.subtract(stop, start).tolist()) for start, stop in self.boxes)

    @property
    def blocks(self) -> tuple[int, ...]:
        """How many blocks there are along each axis; those at the far borders may be incomplete."""
        return tuple(ceil(n / p) for n, p in zip(self.shape, self.pool))


def whole_layout(shape: Sequence[int]) -> Layout:
    """All of a volume (X, Y, Z)."""
    shape = tuple(int(n) for n in shape)
    return Layout(shape, (((0, 0, 0), shape),))


def pooled_name(case: str) -> str:
    """The name under which the bank keeps a support case as it keeps queries."""
    return f"{case}__pooled"


def whole_name(case: str) -> str:
    """The name under which the bank keeps a whole query for the final validation."""
    return f"{case}__whole"


def query_layout(shape: Sequence[int], pool: Sequence[int]) -> Layout:
    """A volume (X, Y, Z), averaged over blocks of `pool` voxels."""
    return Layout(tuple(int(n) for n in shape), pool=tuple(pool))


def support_layout(
    case: str, labels: np.ndarray, crop_size: Sequence[int], window: Sequence[int], ignore_label: int | None = None
) -> Layout:
    """The region that contains all crops around foreground, then blocks for background crops; all of a small volume.

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
    rng = np.random.default_rng(list(case.encode()))
    annotated = [] if ignore_label is None else ShownVoxels(labels, partial(annotated_in, ignore_label=ignore_label))
    if len(annotated):  # there is nothing to learn from a block of ignored voxels
        voxels = np.array([annotated[k] for k in rng.integers(len(annotated), size=BACKGROUND_BLOCKS)])
        starts = np.clip(voxels - crop // 2, 0, last)
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


def cube(side_mm: float, spacing_mm: Sequence[float]) -> tuple[int, ...]:
    """Voxels per axis of the smallest block that is at least `side_mm` long along each axis."""
    return tuple(max(1, ceil(side_mm / mm - 1e-3)) for mm in spacing_mm)


def cube_that_leaves(
    most: int, shape: Sequence[int], spacing_mm: Sequence[float], least_mm: float = 0.0
) -> tuple[int, ...]:
    """Voxels per axis of the smallest cubes, at least `least_mm` long, that divide a volume into at most `most` blocks.

    shape: of the volume (X, Y, Z).
    """
    least_mm = max(least_mm, min(spacing_mm))
    for step in count():
        pool = cube(least_mm * (1 + step / 4), spacing_mm)
        if prod(ceil(n / p) for n, p in zip(shape, pool)) <= most:
            return pool


def pooled_blocks(
    shape: Sequence[int], spacing_mm: Sequence[float], large: bool, most: int | None = MAX_POOLED_VOXELS
) -> tuple[int, ...]:
    """Voxels per axis of the blocks that a training averages queries over: cubes of twice the finest spacing.

    Args:
        shape: of the median volume (X, Y, Z).
        large: whether it is longer than two windows; the cubes are then at least 4 mm long.
        most: highest number of blocks, enforced by larger cubes; None: any number.
    """
    side = max(2 * min(spacing_mm), 4.0 if large else 0.0)
    return cube(side, spacing_mm) if most is None else cube_that_leaves(most, shape, spacing_mm, side)
