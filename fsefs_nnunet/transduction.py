"""Sizes that the network predicts on query volumes, for the size prior."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from fsefs_nnunet.crops import pooled
from fsefs_nnunet.features import FeatureBank
from fsefs_nnunet.network import AdaptedNetwork

MAX_POOLED_VOXELS = 100_000


def pooling_factor(shape: tuple[int, ...], at_least: int) -> int:
    """The smallest factor from `at_least` on that leaves at most MAX_POOLED_VOXELS of a volume of `shape`."""
    factor = at_least
    while np.prod([-(-n // factor) for n in shape]) > MAX_POOLED_VOXELS:
        factor += 1
    return factor


def block_voxels(shape: tuple[int, ...], factor: int) -> torch.Tensor:
    """How many voxels each pooled voxel stands for: blocks at the far borders may be incomplete."""
    widths = [torch.tensor([min(factor, n - a) for a in range(0, n, factor)], dtype=torch.float32) for n in shape]
    return torch.einsum("x,y,z->xyz", *widths)


class QuerySizes:
    """Soft sizes S^ of the classes on the queries, from pooled features."""

    def __init__(self, bank: FeatureBank, queries: list[str], voxel_ml: float, pool: int, device: torch.device):
        """voxel_ml: volume of a voxel in ml. pool: pooling factor, raised where a volume is large."""
        self.bank, self.queries, self.voxel_ml, self.pool, self.device = bank, queries, voxel_ml, pool, device
        self._features = lru_cache(maxsize=64)(self._load)

    def _load(self, query: str) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.bank[query]
        factor = pooling_factor(features.shape[1:], self.pool)
        return pooled(features, factor).half(), block_voxels(features.shape[1:], factor) * self.voxel_ml

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
