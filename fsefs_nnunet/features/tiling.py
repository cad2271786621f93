"""Where windows lie in a volume, and the grids of their maps.

The windows of nnU-Net's predictor start anywhere; ours start at multiples of the maps' largest stride, so that the
maps of all windows lie on one grid. Volumes smaller than a window are padded on both sides, as nnU-Net does, others
at their end, up to a multiple of that stride. "Padded" voxels count from the first one of the padded volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import ceil, lcm, prod

import numpy as np
import torch
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.errors import InputError

TILE_STEP_SIZE = 0.5


@dataclass(frozen=True)
class Tiling:
    """Windows over a volume.

    shape, window: of the volume (X, Y, Z) and of a window, in voxels.
    maps: what the network gives of a window.
    """

    shape: tuple[int, int, int]
    window: tuple[int, int, int]
    maps: tuple[FeatureMap, ...]

    @classmethod
    def of(cls, shape: Sequence[int], window: Sequence[int], maps: Sequence[FeatureMap]) -> Tiling:
        """Raises InputError if a stride does not divide the window."""
        tiling = cls(tuple(int(n) for n in shape), tuple(int(n) for n in window), tuple(maps))
        if any(n % s for n, s in zip(tiling.window, tiling.stride)):
            raise InputError(
                f"A window of {list(tiling.window)} voxels cannot be divided by the strides of the backbone's maps, "
                f"{list(tiling.stride)} at most: make patch_size in the plans a multiple of them."
            )
        return tiling

    @property
    def stride(self) -> tuple[int, ...]:
        """Least common multiple of the strides of all maps, per axis."""
        return tuple(lcm(*(feature_map.stride[axis] for feature_map in self.maps)) for axis in range(3))

    @property
    def padded(self) -> tuple[int, ...]:
        """Shape of the padded volume."""
        return tuple(max(w, ceil(n / s) * s) for n, w, s in zip(self.shape, self.window, self.stride))

    @property
    def before(self) -> tuple[int, ...]:
        """Padding in front of the volume's first voxel, per axis."""
        return tuple(max(w - n, 0) // 2 for n, w in zip(self.shape, self.window))

    @property
    def inside(self) -> tuple[slice, ...]:
        """Where the volume lies in the padded one."""
        return tuple(slice(first, first + n) for first, n in zip(self.before, self.shape))

    @cached_property
    def starts(self) -> list[list[int]]:
        """First padded voxels of the windows along each axis, in order."""
        steps = compute_steps_for_sliding_window(self.padded, self.window, TILE_STEP_SIZE)
        return [sorted({start // s * s for start in along}) for along, s in zip(steps, self.stride)]

    @property
    def num_windows(self) -> int:
        return prod(map(len, self.starts))

    def windows_from(self, first: int) -> list[tuple[int, int, int]]:
        """First padded voxels of the windows that start at `first` along the first axis."""
        return list(product([first], *self.starts[1:]))

    def grid(self, index: int) -> tuple[int, ...]:
        """Shape of a map of the whole padded volume."""
        return tuple(n // s for n, s in zip(self.padded, self.maps[index].stride))

    @property
    def channels(self) -> int:
        return sum(feature_map.channels for feature_map in self.maps)

    @property
    def slab_bytes(self) -> int:
        """Size of all maps (float32) of a slab as long as a window: what a volume of any length keeps in memory."""
        length = self.window[0] / self.padded[0]
        return 4 * int(length * sum(m.channels * prod(self.grid(i)) for i, m in enumerate(self.maps)))

    def image_window(self, image: torch.Tensor, start: Sequence[int]) -> torch.Tensor:
        """The window at padded voxel `start` of the image (channels, X, Y, Z), zeros where it lies outside."""
        first = [a - b for a, b in zip(start, self.before)]
        inside = [slice(max(f, 0), min(f + w, n)) for f, w, n in zip(first, self.window, self.shape)]
        part = image[(slice(None), *inside)]
        if part.shape[1:] == self.window:
            return part
        whole = image.new_zeros((image.shape[0], *self.window))
        whole[(slice(None), *(slice(s.start - f, s.stop - f) for s, f in zip(inside, first)))] = part
        return whole

    def region(self, index: int, box: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
        """Voxels [first, stop) per axis of a map that cover `box` of the volume, and one more on each side.

        box: first voxel of the volume and the one after its last.
        """
        found = []
        for axis, (start, stop) in enumerate(zip(*box)):
            stride, length = self.maps[index].stride[axis], self.grid(index)[axis]
            places = coarse_places(start + self.before[axis], stop - start, stride, length).astype(int)
            margin = int(stride > 1)
            found.append((max(int(places[0]) - margin, 0), min(int(places[-1]) + 1 + 2 * margin, length)))
        return tuple(found)


def voxels_for(size: int, stride: int) -> int:
    """The largest number of voxels of a map that linear upsampling to `size` voxels needs, wherever these start."""
    return size if stride == 1 else ceil((size - 1) / stride) + 2


def coarse_places(start: int, size: int, stride: int, length: int) -> np.ndarray:
    """Coordinates of the `size` padded voxels from `start` on in a map of `length` voxels, for linear upsampling."""
    return np.clip((np.arange(start, start + size) + 0.5) / stride - 0.5, 0, length - 1)


def linear_weights(start: int, size: int, stride: int, length: int, first: int, count: int) -> torch.Tensor:
    """Matrix that upsamples a map linearly along an axis, as PyTorch's `interpolate` does.

    Args:
        start, size: padded voxels to compute.
        length: of the map.
        first, count: voxels of the map that the columns stand for; they must include all that are needed.

    Returns:
        (size, count), each row sums to 1.
    """
    places = coarse_places(start, size, stride, length)
    below = places.astype(int)
    share, rows = places - below, np.arange(size)
    weights = np.zeros((size, count), np.float32)
    weights[rows, below - first] = 1 - share
    between = share > 0
    weights[rows[between], below[between] + 1 - first] += share[between]
    return torch.from_numpy(weights)
