"""Crops of feature maps at the maps' own resolution, upsampled as late as possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from fsefs_nnunet.features.tiling import Tiling, coarse_places, linear_weights, voxels_for

Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
FULL = (1, 1, 1)


@dataclass(frozen=True)
class MapCrops:
    """A batch of crops.

    maps: (B, C, x, y, z) each; maps below full resolution reach one of their voxels beyond the crop, where possible.
    resolutions: for each map, the index of its weights.
    weights: for each resolution, matrices of linear upsampling per axis (B, size, voxels of the map); None at full
        resolution.
    """

    maps: tuple[torch.Tensor, ...]
    resolutions: tuple[int, ...]
    weights: tuple[Weights | None, ...]

    @classmethod
    def whole(cls, maps: Sequence[torch.Tensor], shape: Sequence[int]) -> MapCrops:
        """Maps (B, C, x, y, z) that cover whole images of `shape` (X, Y, Z)."""
        sides = list(dict.fromkeys(tuple(m.shape[2:]) for m in maps))

        def weights_of(of_map: tuple[int, ...]) -> Weights | None:
            if of_map == tuple(shape):
                return None
            made = (linear_weights(0, n, n // length, length, 0, length) for n, length in zip(shape, of_map))
            return tuple(w.to(maps[0].device).expand(len(maps[0]), -1, -1) for w in made)

        resolutions = tuple(sides.index(tuple(m.shape[2:])) for m in maps)
        return cls(tuple(maps), resolutions, tuple(map(weights_of, sides)))

    @classmethod
    def join(cls, crops: Sequence[MapCrops]) -> MapCrops:
        """Concatenate batches whose crops have the same size."""
        maps = (torch.cat(parts) for parts in zip(*(crop.maps for crop in crops)))
        weights = (
            None if parts[0] is None else tuple(torch.cat(along) for along in zip(*parts))
            for parts in zip(*(crop.weights for crop in crops))
        )
        return cls(tuple(maps), crops[0].resolutions, tuple(weights))

    def __len__(self) -> int:
        return len(self.maps[0])

    def __getitem__(self, which: torch.Tensor) -> MapCrops:
        """The crops with the indices `which` (n,)."""
        weights = (w and tuple(along[which] for along in w) for w in self.weights)
        return MapCrops(tuple(m[which] for m in self.maps), self.resolutions, tuple(weights))

    @property
    def device(self) -> torch.device:
        return self.maps[0].device

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the crops at full resolution, (B, C, X, Y, Z)."""
        first, weights = self.maps[0], self.weights[self.resolutions[0]]
        sides = first.shape[2:] if weights is None else (along.shape[1] for along in weights)
        return (len(first), sum(m.shape[1] for m in self.maps), *sides)

    @property
    def nbytes(self) -> int:
        return sum(m.nbytes for m in self.maps) + sum(along.nbytes for w in self.weights if w for along in w)

    def to(self, device: torch.device, non_blocking: bool = False) -> MapCrops:
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        weights = (w and tuple(map(moved, w)) for w in self.weights)
        return MapCrops(tuple(map(moved, self.maps)), self.resolutions, tuple(weights))

    def pin_memory(self) -> MapCrops:
        """A copy in pinned memory, from which a GPU copies asynchronously."""
        weights = (w and tuple(along.pin_memory() for along in w) for w in self.weights)
        return MapCrops(tuple(m.pin_memory() for m in self.maps), self.resolutions, tuple(weights))

    def at_full_resolution(self) -> torch.Tensor:
        """(B, sum of C, X, Y, Z)."""
        full = [upsampled(m, self.weights[r]) for m, r in zip(self.maps, self.resolutions)]
        return full[0] if len(full) == 1 else torch.cat(full, 1)

    def state(self) -> dict[str, list]:
        """Tensors, numbers and lists only, for a checkpoint."""
        return {
            "maps": [*self.maps],
            "resolutions": [*self.resolutions],
            "weights": [w and [*w] for w in self.weights],
        }

    @classmethod
    def from_state(cls, state: dict[str, list]) -> MapCrops:
        """The inverse of `state`."""
        weights = (w and tuple(w) for w in state["weights"])
        return cls(tuple(state["maps"]), tuple(state["resolutions"]), tuple(weights))


def upsampled(feature_map: torch.Tensor, weights: Weights | None) -> torch.Tensor:
    """A map (B, C, x, y, z), upsampled by weights (B, size, x), ... to (B, C, X, Y, Z); unchanged without weights."""
    if weights is None:
        return feature_map
    feature_map = feature_map.float() if feature_map.dtype == torch.float16 else feature_map
    along_x, along_y, along_z = (w.to(feature_map.dtype) for w in weights)
    b, c, x, y, z = feature_map.shape
    made = torch.matmul(feature_map.reshape(b, c * x * y, z), along_z.mT).view(b, c, x, y, -1)
    made = torch.matmul(along_y[:, None, None], made)
    return torch.matmul(along_x[:, None], made.flatten(3)).unflatten(3, made.shape[3:])


@lru_cache(maxsize=4096)
def _weights(device: torch.device, *of_axis: int) -> torch.Tensor:
    """See linear_weights; crops ask for the same few again and again."""
    return linear_weights(*of_axis).to(device, non_blocking=True)


def crop_of(
    maps: Sequence[torch.Tensor],
    regions: Sequence[Sequence[tuple[int, int]]],
    tiling: Tiling,
    start: Sequence[int],
    size: Sequence[int],
) -> MapCrops:
    """A crop out of maps, or out of regions of them.

    Args:
        maps: (C, x, y, z) each.
        regions: the voxels [first, stop) per axis that each of `maps` holds, see Tiling.region.
        start, size: of the crop, in voxels of the volume.

    Returns:
        A batch of one crop, whose maps are views of `maps` where these reach far enough.
    """
    strides = list(dict.fromkeys(m.stride for m in tiling.maps))
    places: list[list[slice]] = []
    missing: list[list[int]] = []
    weights: list[Weights | None] = []
    for stride in strides:
        index = next(i for i, m in enumerate(tiling.maps) if m.stride == stride)
        counts, firsts, along = [voxels_for(n, s) for n, s in zip(size, stride)], [], []
        for axis, (count, (begin, end), length) in enumerate(zip(counts, regions[index], tiling.grid(index))):
            voxel = start[axis] + tiling.before[axis]
            needed = int(coarse_places(voxel, 1, stride[axis], length)[0])
            firsts.append(max(min(needed, end - count), begin))
            along.append(_weights(maps[0].device, voxel, size[axis], stride[axis], length, firsts[axis], count)[None])
        begins = [region[0] for region in regions[index]]
        places.append([slice(f - b, f - b + n) for f, b, n in zip(firsts, begins, counts)])
        missing.append([max(f + n - region[1], 0) for f, n, region in zip(firsts, counts, regions[index])])
        weights.append(None if tuple(stride) == FULL else tuple(along))
    resolutions = tuple(strides.index(m.stride) for m in tiling.maps)
    parts = []
    for feature_map, r in zip(maps, resolutions):
        part = feature_map[(slice(None), *places[r])][None]
        if any(missing[r]):  # all crops of a batch have the same shape; the padded voxels have weight 0
            part = torch.nn.functional.pad(part, [n for m in reversed(missing[r]) for n in (0, m)])
        parts.append(part)
    return MapCrops(tuple(parts), resolutions, tuple(weights))
