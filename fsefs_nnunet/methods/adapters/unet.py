"""A small U-Net's decoder on image and frozen maps; after DropGen (arXiv 2604.02564)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from fsefs_nnunet.backbones.maps import FeatureMap

MOST_CHANNELS = 320  # as nnU-Net's


class FeatureUNet(nn.Module):
    """Takes each map at its own stride, from the coarsest to the image, as nnU-Net's decoder takes its skips.

    In training, whole channels of the maps are dropped, except the image's, the last map, so that the decoder does not
    rely on single features. It does not start as the identity, and its output depends on the whole window through
    instance norm.
    """

    margin = None
    own_strides = True

    def __init__(self, maps: Sequence[FeatureMap], width: int = 16, dropout: float = 0.5):
        """
        Args:
            maps: with the image at full resolution as the last one.
            width: channels at full resolution; coarser levels have twice as many as the next finer one.
            dropout: probability that a channel is dropped.
        """
        super().__init__()
        self.dropout = nn.Dropout3d(dropout)
        strides = sorted({m.stride for m in maps}, key=np.prod)
        self.levels = [[i for i, m in enumerate(maps) if m.stride == stride] for stride in strides]
        channels = [min(width * 2**level, MOST_CHANNELS) for level in range(len(strides))]
        taken = [sum(maps[i].channels for i in level) for level in self.levels]
        self.bottom = _block(taken[-1], channels[-1])
        self.up = nn.ModuleList()
        self.blocks = nn.ModuleList()
        for fine, coarse in reversed(list(zip(range(len(strides)), range(1, len(strides))))):
            step = tuple(b // a for a, b in zip(strides[fine], strides[coarse]))
            self.up.append(nn.ConvTranspose3d(channels[coarse], channels[fine], step, step))
            self.blocks.append(_block(taken[fine] + channels[fine], channels[fine]))
        self.out_channels = channels[0]

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Maps (B, C, x, y, z), each at its own stride -> (B, out_channels, X, Y, Z)."""
        seen = [*map(self.dropout, maps[:-1]), maps[-1]]
        *finer, coarsest = [torch.cat([seen[i] for i in level], 1) for level in self.levels]
        x = self.bottom(coarsest)
        for up, block, level in zip(self.up, self.blocks, reversed(finer)):
            x = block(torch.cat((up(x), level), 1))
        return x


def _block(channels: int, width: int) -> nn.Sequential:
    """Two convolutions, each as in nnU-Net's plans."""
    layers = []
    for inputs in (channels, width):  # nnU-Net's own blocks hold each layer twice, and so would checkpoints
        layers += [nn.Conv3d(inputs, width, 3, padding="same"), nn.InstanceNorm3d(width, affine=True), nn.LeakyReLU()]
    return nn.Sequential(*layers)
