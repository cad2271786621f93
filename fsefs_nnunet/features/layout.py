"""What the feature bank keeps of a volume: the parts of a support case that crops come from, a query in blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from math import ceil, prod

import numpy as np

BACKGROUND_BLOCKS = 32
MAX_POOLED_VOXELS = 100_000

Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """Boxes of a volume's maps, or its features averaged over blocks.

    shape: of the volume, (X, Y, Z).
    boxes: first voxel of each and the one after its last, per axis; the first box holds every crop around foreground.
    pool: voxels of a block per axis; None: maps in boxes, each map at its own resolution.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...] = ()
    pool: tuple[int, ...] | None = None

    @property
    def voxels(self) -> int:
        """In all boxes, or blocks."""
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
    """The name under which the bank keeps all of a query, for its final validation."""
    return f"{case}__whole"


def query_layout(shape: Sequence[int], pool: Sequence[int]) -> Layout:
    """A volume (X, Y, Z), averaged over blocks of `pool` voxels."""
    return Layout(tuple(int(n) for n in shape), pool=tuple(pool))


class Voxels:
    """The voxels of a label map (X, Y, Z) that show something, in the order of its memory, without a list of them.

    A whole body has a hundred million voxels that are annotated: of these, as many numbers as there are planes along
    the first axis are kept, and a plane is looked through when a voxel of it is asked for.
    """

    def __init__(self, labels: np.ndarray, shown: Callable[[np.ndarray], np.ndarray]):
        """shown: which voxels of labels count, as a mask of their shape."""
        self.labels, self.shown = labels, shown

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([np.count_nonzero(self.shown(plane)) for plane in self.labels])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        """Coordinates (3,) of the voxel of this number."""
        x = int(np.searchsorted(self._ends, index, "right"))
        in_plane = np.flatnonzero(self.shown(self.labels[x]))[index - (self._ends[x - 1] if x else 0)]
        return np.array([x, *np.unravel_index(in_plane, self.labels.shape[1:])])

    def at_most(self, number: int) -> np.ndarray:
        """Coordinates (n, 3) of every voxel, or of every second, third, ... one where there are more than `number`."""
        step, found = max(1, -(-len(self) // number)), []
        for x, end in enumerate(self._ends):
            start = self._ends[x - 1] if x else 0
            which = np.arange(-(-start // step) * step, end, step) - start
            if len(which):
                in_plane = np.flatnonzero(self.shown(self.labels[x]))[which]
                places = np.unravel_index(in_plane, self.labels.shape[1:])
                found.append(np.stack([np.full(len(which), x), *places], 1))
        return np.concatenate(found) if found else np.empty((0, 3), int)


def annotated_in(labels: np.ndarray, ignore_label: int) -> np.ndarray:
    """Which voxels of a label map lie in the image and are not ignored."""
    return (labels >= 0) & (labels != ignore_label)


def foreground_of(labels: np.ndarray, ignore_label: int | None) -> np.ndarray:
    """Which voxels of a label map show a class; nnU-Net's ignore label, the highest of all, is none."""
    return labels > 0 if ignore_label is None else (labels > 0) & (labels != ignore_label)


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
    rng = np.random.default_rng(list(case.encode()))
    annotated = [] if ignore_label is None else Voxels(labels, partial(annotated_in, ignore_label=ignore_label))
    if len(annotated):  # a block of ignored voxels teaches nothing
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
    """Voxels per axis of the smallest block that is at least `side_mm` long along each."""
    return tuple(max(1, ceil(side_mm / mm - 1e-3)) for mm in spacing_mm)


def cube_that_leaves(
    most: int, shape: Sequence[int], spacing_mm: Sequence[float], least_mm: float = 0.0
) -> tuple[int, ...]:
    """Voxels per axis of the smallest cubes from `least_mm` on that leave at most `most` of a volume (X, Y, Z)."""
    least_mm = max(least_mm, min(spacing_mm))
    for step in count():
        pool = cube(least_mm * (1 + step / 4), spacing_mm)
        if prod(ceil(n / p) for n, p in zip(shape, pool)) <= most:
            return pool


def pooled_blocks(
    shape: Sequence[int], spacing_mm: Sequence[float], large: bool, most: int | None = MAX_POOLED_VOXELS
) -> tuple[int, ...]:
    """Voxels per axis of the blocks that queries are averaged over in a training: cubes of twice the finest spacing.

    Args:
        shape: of the median volume (X, Y, Z).
        large: whether it is longer than two windows: the cubes are at least 4 mm long then.
        most: blocks that may be left, coarser ones where there are more; None: any number.
    """
    side = max(2 * min(spacing_mm), 4.0 if large else 0.0)
    return cube(side, spacing_mm) if most is None else cube_that_leaves(most, shape, spacing_mm, side)
