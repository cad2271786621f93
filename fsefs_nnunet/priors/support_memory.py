"""Crops of the support's features, few enough to be stored with a model; adaptation to a query trains on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fsefs_nnunet.errors import InputError
from fsefs_nnunet.features.crops import CropLoader
from fsefs_nnunet.features.map_crops import MapCrops

MAX_BYTES = 50_000_000
MAX_CROPS = 64
CROP_SIZE = 16
BATCH_SIZE = 4


@dataclass(frozen=True)
class SupportMemory:
    """Crops without the names of their cases.

    features: N of them, float16, as the feature bank holds them.
    targets: label maps (N, 1, x, y, z), or one channel per region, int16.
    """

    features: MapCrops
    targets: torch.Tensor

    @classmethod
    def draw(cls, loader: CropLoader) -> SupportMemory:
        """The first crops of `loader`, as many as MAX_BYTES and MAX_CROPS allow, at least one."""
        crops: list[tuple[MapCrops, torch.Tensor]] = []
        limit = 1
        while len(crops) < limit:
            batch = next(loader)
            ones = torch.arange(len(batch["data"])).split(1)
            crops.extend((batch["data"][i], batch["target"][i].to(torch.int16)) for i in ones)
            limit = max(1, min(MAX_CROPS, MAX_BYTES // sum(of_crop.nbytes for of_crop in crops[0])))
        features, targets = zip(*crops[:limit])
        return cls(MapCrops.join(features), torch.cat(targets))

    def batch(self, step: int) -> tuple[MapCrops, torch.Tensor]:
        """BATCH_SIZE crops and their targets of training step `step`; every crop in turn."""
        which = torch.from_numpy(np.arange(step * BATCH_SIZE, (step + 1) * BATCH_SIZE) % len(self.features))
        return self.features[which], self.targets[which]

    def state(self) -> dict:
        return {"features": self.features.state(), "targets": self.targets}

    @classmethod
    def from_state(cls, state: dict, file: str) -> SupportMemory:
        """The inverse of `state`. Raises InputError, naming `file`, for what an earlier version wrote."""
        if not isinstance(state["features"], dict):
            raise InputError(
                f"The support features in {file} were written by an earlier version: write them again with `fseft "
                "remember`."
            )
        return cls(MapCrops.from_state(state["features"]), state["targets"])
