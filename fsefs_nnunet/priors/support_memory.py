"""Crops of the support's features, few enough to travel with a model: what the adaptation to a query trains on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fsefs_nnunet.features.crops import CropLoader

MAX_BYTES = 50_000_000
MAX_CROPS = 64
CROP_SIZE = 16
BATCH_SIZE = 4


@dataclass(frozen=True)
class SupportMemory:
    """Crops without the names of their cases.

    features: (N, C, x, y, z) float16, as the feature bank holds them.
    targets: label maps (N, 1, x, y, z), or one channel per region, int16.
    """

    features: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def draw(cls, loader: CropLoader) -> SupportMemory:
        """The first crops of `loader`, as many as MAX_BYTES and MAX_CROPS allow, one at least."""
        crops: list[tuple[torch.Tensor, torch.Tensor]] = []
        limit = 1
        while len(crops) < limit:
            batch = next(loader)
            crops.extend(zip(batch["data"], batch["target"].to(torch.int16)))
            limit = max(1, min(MAX_CROPS, MAX_BYTES // sum(tensor.nbytes for tensor in crops[0])))
        crops = crops[:limit]
        features, targets = zip(*crops)
        return cls(torch.stack(features), torch.stack(targets))

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (BATCH_SIZE, C, x, y, z) float16 and targets of training step `step`; every crop in turn."""
        which = torch.from_numpy(np.arange(step * BATCH_SIZE, (step + 1) * BATCH_SIZE) % len(self.features))
        return self.features[which], self.targets[which]

    def state(self) -> dict[str, torch.Tensor]:
        return {"features": self.features, "targets": self.targets}
