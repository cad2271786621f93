"""Patch merging of the Swin transformer as the public checkpoints were trained with it."""

from __future__ import annotations

import torch
from torch import nn

# Offsets of the eight sub-grids that are concatenated, in their order. The first releases of Swin UNETR take 010 and
# 001 twice and neither 110 nor 011; MONAI's "merging" corrects it, and published weights give other features with it.
PUBLISHED_ORDER = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))


class PublishedPatchMerging(nn.Module):
    """Halves each axis, doubles the channels; the arguments are those that MONAI passes to a `downsample`."""

    def __init__(self, dim: int, norm_layer: type[nn.Module] = nn.LayerNorm, spatial_dims: int = 3):
        """dim: channels of the input. spatial_dims: always 3."""
        super().__init__()
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(8 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, X, Y, Z, dim), X, Y, Z even -> (B, X / 2, Y / 2, Z / 2, 2 dim)."""
        grids = [x[:, i::2, j::2, k::2] for i, j, k in PUBLISHED_ORDER]
        return self.reduction(self.norm(torch.cat(grids, -1)))
