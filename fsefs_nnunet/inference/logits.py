"""Logits of a volume from slabs of its features, in blocks that overlap by an adapter's receptive field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch

from fsefs_nnunet.device import reduced_precision
from fsefs_nnunet.features.map_crops import MapCrops, crop_of
from fsefs_nnunet.features.tiling import Tiling
from fsefs_nnunet.features.volume import VolumeFeatures
from fsefs_nnunet.features.windows import Slab
from fsefs_nnunet.methods.network import AdaptedNetwork, ReducedBackbone

BLOCK = 128  # most voxels of a block along an axis
Place = tuple[slice, slice, slice]


class BlocksOfLogits:
    """Turns slabs into logits, for any number of networks on the same features, with a slab or two in memory.

    Networks without a margin, whose output depends on the whole volume, get it in one piece.
    """

    def __init__(
        self,
        networks: Sequence[Callable[[MapCrops], torch.Tensor]],
        margin: int | None,
        tiling: Tiling,
        device: torch.device,
        take: Callable[[int, Place, torch.Tensor], None],
    ):
        """
        Args:
            networks: map crops to logits (1, outputs, x, y, z).
            margin: voxels around a crop that its outermost logits depend on; None: the whole volume.
            take: called with the index of a network, a place in the volume, and the logits (outputs, x, y, z) there.
        """
        self.networks, self.margin, self.tiling, self.device, self.take = networks, margin, tiling, device, take
        self.maps: list[torch.Tensor] = []
        self.first = self.stop = self.done = 0

    def add(self, slab: Slab) -> None:
        """Compute the logits for which the planes so far suffice."""
        self.maps = [torch.cat([kept, m], 1) for kept, m in zip(self.maps, slab.maps)] if self.maps else slab.maps
        self.stop = slab.stop
        length, before = self.tiling.shape[0], self.tiling.before[0]
        if slab.stop == self.tiling.padded[0]:
            ready = length
        elif self.margin is None:
            ready = 0
        else:
            ready = min(slab.stop - before - self.margin - self.tiling.stride[0], length)
        # thin blocks would consist mostly of margins
        if ready - self.done >= 8 * (self.margin or 0) or ready == length:
            self._compute(ready)
        self._drop()

    @torch.no_grad()
    def _compute(self, ready: int) -> None:
        first, end = (self.done, 0, 0), (ready, *self.tiling.shape[1:])
        steps = [n if self.margin is None else BLOCK for n in self.tiling.shape]
        for start in product(*map(range, first, end, steps)):
            self._block(start, [min(a + step, b) for a, step, b in zip(start, steps, end)])
        self.done = ready

    def _block(self, start: Sequence[int], stop: Sequence[int]) -> None:
        reach = self.margin or 0
        first = [max(a - reach, 0) for a in start]
        end = [min(b + reach, n) for b, n in zip(stop, self.tiling.shape)]
        regions = [
            [(self.first // m.stride[0], self.stop // m.stride[0]), *((0, n) for n in self.tiling.grid(i)[1:])]
            for i, m in enumerate(self.tiling.maps)
        ]
        size = [b - a for a, b in zip(first, end)]
        crop = crop_of(self.maps, regions, self.tiling, first, size).to(self.device)
        inside = tuple(slice(a - f, b - f) for a, b, f in zip(start, stop, first))
        place = tuple(map(slice, start, stop))
        for number, network in enumerate(self.networks):
            with reduced_precision(self.device):  # as in training
                logits = network(crop)[0]
            self.take(number, place, logits[(slice(None), *inside)])

    def _drop(self) -> None:
        """Forget planes that no later block needs."""
        needed = self.done - (self.margin or 0) + self.tiling.before[0] - 2 * self.tiling.stride[0]
        first = max(needed // self.tiling.stride[0] * self.tiling.stride[0], self.first)
        if self.margin is None:
            first = self.first
        self.maps = [m[:, (first - self.first) // g.stride[0] :].clone() for m, g in zip(self.maps, self.tiling.maps)]
        self.first = first


def logits_of(network: AdaptedNetwork, features: VolumeFeatures) -> torch.Tensor:
    """Logits (outputs, X, Y, Z) of a volume, float32 on the CPU, from one look at its features."""
    return _collected(network, network.adapt, features)


def logits_in_one_look(
    network: AdaptedNetwork, image: np.ndarray, window: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, int]:
    """Logits (outputs, X, Y, Z) of a preprocessed image (channels, X, Y, Z), and the number of windows.

    A reduction comes before the blending: it is affine, so the result is the same, and there is less to blend.
    """
    backbone = ReducedBackbone(network) if network.reduces else network.backbone
    features = VolumeFeatures(backbone, image, window, device)
    return _collected(network, network.finish if network.reduces else network.adapt, features), features.windows


def _collected(
    network: AdaptedNetwork, outputs: Callable[[MapCrops], torch.Tensor], features: VolumeFeatures
) -> torch.Tensor:
    logits = torch.empty((network.head.out_channels, *features.tiling.shape))

    def take(number: int, place: Place, block: torch.Tensor) -> None:
        logits[(slice(None), *place)] = block

    features.look(BlocksOfLogits([outputs], network.adapter.margin, features.tiling, features.device, take))
    return logits
