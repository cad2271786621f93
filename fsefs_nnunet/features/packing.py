"""How the maps of a volume lie in one flat array, and what collects them from slabs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch

from fsefs_nnunet.features.layout import Layout
from fsefs_nnunet.features.map_crops import MapCrops, crop_of
from fsefs_nnunet.features.tiling import Tiling, linear_weights
from fsefs_nnunet.features.windows import Slab

Array = np.ndarray | torch.Tensor
LARGEST_HALF = torch.finfo(torch.float16).max


class Overflow(Exception):
    """A feature is too large for float16."""


@dataclass(frozen=True)
class Packing:
    """Positions in a flat array of what `layout` keeps: for each box the region of each map, or the blocks."""

    layout: Layout
    tiling: Tiling

    @cached_property
    def regions(self) -> list[list[tuple[tuple[int, int], ...]]]:
        """Voxels [first, stop) per axis of each map, by box and map."""
        return [[self.tiling.region(i, box) for i in range(len(self.tiling.maps))] for box in self.layout.boxes]

    @cached_property
    def _shapes(self) -> list[list[tuple[int, ...]]]:
        if self.layout.pool is not None:
            return [[(self.tiling.channels, *self.layout.blocks)]]
        sides = [[tuple(stop - first for first, stop in region) for region in of_box] for of_box in self.regions]
        return [[(m.channels, *n) for m, n in zip(self.tiling.maps, of_box)] for of_box in sides]

    @property
    def size(self) -> int:
        """Number of values in all."""
        return sum(prod(shape) for of_box in self._shapes for shape in of_box)

    def unpack(self, flat: Array) -> list[list[Array]]:
        """Views (C, x, y, z) of a flat array, by box and map; for blocks a single one, (C, *blocks)."""
        views, done = [], 0
        for of_box in self._shapes:
            views.append([])
            for shape in of_box:
                views[-1].append(flat[done : done + prod(shape)].reshape(shape))
                done += prod(shape)
        return views

    def crop(self, boxes: list[list[Array]], start: Sequence[int], size: Sequence[int]) -> MapCrops:
        """The crop that starts at voxel `start` of the volume, a batch of one; IndexError if no box contains it."""
        start, stop = np.array(start), np.add(start, size)
        for (first, end), maps, regions in zip(self.layout.boxes, boxes, self.regions):
            if (start >= first).all() and (stop <= end).all():
                crop = crop_of([torch.as_tensor(m) for m in maps], regions, self.tiling, start.tolist(), list(size))
                return MapCrops(tuple(m.clone() for m in crop.maps), crop.resolutions, crop.weights)
        raise IndexError(f"The crop from {start.tolist()} to {stop.tolist()} is not stored.")

    def slabs(self, boxes: list[list[np.ndarray]]) -> Iterator[Slab]:
        """The maps of a whole volume as `run_windows` gave them, up to rounding, in slabs as long as a window."""
        (maps,) = boxes
        for first in range(0, self.tiling.padded[0], self.tiling.window[0]):
            stop = min(first + self.tiling.window[0], self.tiling.padded[0])
            parts = []
            for array, region, feature_map in zip(maps, self.regions[0], self.tiling.maps):
                stride = feature_map.stride[0]
                parts.append(self._in_grid(array, region, first // stride, stop // stride, feature_map))
            yield Slab(first, stop, parts)

    def _in_grid(self, array, region, first: int, stop: int, feature_map) -> torch.Tensor:
        """Planes of a map; zeros around the volume, which nothing reads."""
        grid = [n // s for n, s in zip(self.tiling.padded[1:], feature_map.stride[1:])]
        planes = torch.zeros((feature_map.channels, stop - first, *grid), dtype=torch.from_numpy(array[:0]).dtype)
        low, high = max(first, region[0][0]), min(stop, region[0][1])
        if low < high:
            at = (slice(None), slice(low - first, high - first), *(slice(a, b) for a, b in region[1:]))
            planes[at] = torch.from_numpy(array[:, low - region[0][0] : high - region[0][0]])
        return planes


class Boxes:
    """Collects the regions of maps that `packing` keeps in the flat array `flat`."""

    def __init__(self, packing: Packing, flat: np.ndarray):
        self.packing, self.half = packing, flat.dtype == np.float16
        self.views = [[torch.from_numpy(array) for array in of_box] for of_box in packing.unpack(flat)]

    def add(self, slab: Slab) -> None:
        """Raises Overflow if the flat array is float16 and a feature is too large for it."""
        for index, feature_map in enumerate(self.packing.tiling.maps):
            values, stride = slab.maps[index], feature_map.stride[0]
            if self.half:
                values = as_half(values)
            first, stop = slab.first // stride, slab.stop // stride
            for of_box, regions in zip(self.views, self.packing.regions):
                (begin, end), *others = regions[index]
                low, high = max(first, begin), min(stop, end)
                if low < high:
                    at = (slice(None), slice(low - first, high - first), *(slice(a, b) for a, b in others))
                    of_box[index][:, low - begin : high - begin].copy_(values[at])


def as_half(values: torch.Tensor) -> torch.Tensor:
    """`values` in float16; raises Overflow if one is too large."""
    if max(-values.min(), values.max()) > LARGEST_HALF:
        raise Overflow
    return values.half()


class Blocks:
    """Averages features, upsampled first, over blocks of a volume; incomplete blocks over the voxels that they have."""

    def __init__(self, tiling: Tiling, layout: Layout, device: torch.device):
        self.tiling, self.layout = tiling, layout
        self.averages = [torch.zeros((m.channels, *layout.blocks), device=device) for m in tiling.maps]
        self.along = [
            [_averaging(tiling, i, axis, layout.pool[axis]).to(device) for axis in range(3)]
            for i in range(len(tiling.maps))
        ]

    def add(self, slab: Slab) -> None:
        for index, values in enumerate(slab.maps):
            stride = self.tiling.maps[index].stride[0]
            along_x, along_y, along_z = self.along[index]
            averages = self.averages[index]
            columns = along_x[:, slab.first // stride : slab.stop // stride]
            for channel, of_channel in zip(values.to(averages.device, torch.float32), averages):  # to save memory
                made = along_y @ (channel @ along_z.T)
                of_channel += torch.tensordot(columns, made, 1)

    def result(self) -> torch.Tensor:
        """(C, *blocks) float32."""
        return torch.cat(self.averages)


def _averaging(tiling: Tiling, index: int, axis: int, pool: int) -> torch.Tensor:
    """Matrix (blocks, voxels of the map) that upsamples along an axis and averages each block."""
    size, before = tiling.shape[axis], tiling.before[axis]
    stride, length = tiling.maps[index].stride[axis], tiling.grid(index)[axis]
    made = torch.zeros((-(-size // pool), length))
    for block in range(len(made)):
        voxels = min(pool, size - block * pool)
        made[block] = linear_weights(before + block * pool, voxels, stride, length, 0, length).mean(0)
    return made


class Sums:
    """Sums channels and their squares over a volume, each map at its own resolution."""

    def __init__(self, tiling: Tiling):
        self.tiling = tiling
        self.sums, self.square_sums = torch.zeros((2, tiling.channels), dtype=torch.float64)
        self.along = [[_covered(tiling, i, axis) for axis in range(3)] for i in range(len(tiling.maps))]

    def add(self, slab: Slab) -> None:
        sums, square_sums = [], []
        for index, values in enumerate(slab.maps):
            stride = self.tiling.maps[index].stride[0]
            along_x, along_y, along_z = (w.to(values.device) for w in self.along[index])
            plane = torch.outer(along_y, along_z).flatten()
            along_x = along_x[slab.first // stride : slab.stop // stride].double()
            for channel in values.float().flatten(2):  # one at a time: their squares are as large as they are
                sums.append((channel @ plane).double() @ along_x)
                square_sums.append((channel.square() @ plane).double() @ along_x)
        self.sums += torch.stack(sums).cpu()
        self.square_sums += torch.stack(square_sums).cpu()


def mean_and_deviation(
    voxels: np.ndarray | int, sums: np.ndarray, square_sums: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of channels (C,), float32. A constant channel has deviation 1, so that it is not scaled."""
    mean = sums / voxels
    std = np.sqrt(np.maximum(square_sums / voxels - mean**2, 0))
    std = np.where(std > 1e-3 * max(std.max(), 1e-6), std, 1.0)
    return torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)


def _covered(tiling: Tiling, index: int, axis: int) -> torch.Tensor:
    """Number of the volume's voxels that each voxel of a map covers along an axis."""
    stride, before = tiling.maps[index].stride[axis], tiling.before[axis]
    first = torch.arange(tiling.grid(index)[axis]) * stride
    low, high = first.clamp(min=before), (first + stride).clamp(max=before + tiling.shape[axis])
    return (high - low).clamp(min=0).float()
