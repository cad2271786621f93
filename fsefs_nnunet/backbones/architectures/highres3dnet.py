"""HighRes3DNet (Li et al., IPMI 2017): dilated residual blocks at full resolution, for T1 brain MR."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import pad

from fsefs_nnunet.backbones.architectures.plain import PlainBackbone
from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.maps import FeatureMap

STEM, FEATURES = 16, 80
BLOCKS = ((16, 1), (32, 2), (64, 4))  # width and dilation of three residual blocks each


class HighRes3DNetBackbone(PlainBackbone):
    """Features of the last hidden layer.

    Each window is standardised by its voxels above its mean, as the authors standardised whole heads.
    """

    parts: ClassVar = {
        "last_block": ("last.",),
        "decoder": ("blocks.2.", "last."),
        "all": ("stem.", "blocks.", "last."),
    }

    def __init__(self, contract: BackboneContract, stages: str):
        super().__init__(contract, stages)
        self.stem = nn.Sequential(nn.Conv3d(1, STEM, 3, padding=1, bias=False), nn.BatchNorm3d(STEM), nn.ReLU())
        self.blocks, width = nn.ModuleList(), STEM
        for wider, dilation in BLOCKS:
            inputs = (width, wider, wider)
            self.blocks.append(nn.Sequential(*(ResidualBlock(n, wider, dilation) for n in inputs)))
            width = wider
        self.last = nn.Sequential(nn.Conv3d(width, FEATURES, 1, bias=False), nn.BatchNorm3d(FEATURES), nn.ReLU())
        if classes := len(contract.head_classes):
            self.head = nn.Sequential(nn.Conv3d(FEATURES, classes, 1, bias=False), nn.BatchNorm3d(classes))

    @staticmethod
    def stage_maps(contract: BackboneContract) -> dict[str, list[FeatureMap]]:
        """See backbones/protocol.py."""
        return {"last": [FeatureMap(FEATURES)]}

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """image (B, 1, X, Y, Z) of any scale -> features (B, 80, X, Y, Z)."""
        x = self.stem(torch.stack([whitened(window) for window in image.float()]))
        for block in self.blocks:
            x = block(x)
        return [self.last(x)]


class ResidualBlock(nn.Module):
    """Twice batch norm, ReLU, dilated 3^3 convolution; the shortcut gets zero channels where the width grows."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int):
        super().__init__()
        self.added = (out_channels - in_channels) // 2  # on each side

        def layer(n: int) -> nn.Sequential:
            conv = nn.Conv3d(n, out_channels, 3, padding=dilation, dilation=dilation, bias=False)
            return nn.Sequential(nn.BatchNorm3d(n), nn.ReLU(), conv)

        self.layers = nn.Sequential(layer(in_channels), layer(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, X, Y, Z) -> (B, out_channels, X, Y, Z)."""
        return self.layers(x) + pad(x, (0, 0, 0, 0, 0, 0, self.added, self.added))


def whitened(window: torch.Tensor) -> torch.Tensor:
    """Minus the mean and divided by the standard deviation of the voxels above the window's mean."""
    bright = window[window > window.mean()]
    if bright.numel() < 2:  # a constant window
        return torch.zeros_like(window)
    return (window - bright.mean()) / bright.std().clamp(min=1e-6)
