"""Sizes that the network predicts on query volumes, for the size prior."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from fsefs_nnunet.features import FeatureBank
from fsefs_nnunet.network import AdaptedNetwork


def block_voxels(shape: tuple[int, ...], factor: int) -> torch.Tensor:
    """How many voxels each pooled voxel stands for: blocks at the far borders may be incomplete."""
    widths = [torch.tensor([min(factor, n - a) for a in range(0, n, factor)], dtype=torch.float32) for n in shape]
    return torch.einsum("x,y,z->xyz", *widths)


class QuerySizes:
    """Soft sizes S^ of the classes on the queries, from pooled features."""

    def __init__(self, bank: FeatureBank, queries: list[str], voxel_ml: float, device: torch.device):
        """voxel_ml: volume of a voxel in ml."""
        self.bank, self.queries, self.voxel_ml, self.device = bank, queries, voxel_ml, device
        self._features = lru_cache(maxsize=64)(self._load)

    def _load(self, query: str) -> tuple[torch.Tensor, torch.Tensor]:
        entry = self.bank[query]
        features = torch.from_numpy(np.array(entry.boxes[0]))[None]
        return features, block_voxels(entry.layout.shape, entry.layout.pool) * self.voxel_ml

    def rotating(self, step: int, seed: int) -> str:
        """The query of training step `step`: each once in a round, every round in a new seeded order."""
        order = np.random.default_rng((seed, step // len(self.queries))).permutation(len(self.queries))
        return self.queries[order[step % len(self.queries)]]

    def soft_sizes(self, network: AdaptedNetwork, query: str, has_regions: bool) -> torch.Tensor:
        """S^ of each foreground class in ml, (classes,), differentiable."""
        features, volumes = self._features(query)
        logits = network.adapt(features.to(self.device).float()).float()
        probabilities = torch.sigmoid(logits) if has_regions else torch.softmax(logits, 1)[:, 1:]
        return (probabilities[0] * volumes.to(self.device)).sum((1, 2, 3))
