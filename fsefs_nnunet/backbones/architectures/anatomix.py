"""anatomix (ICLR 2025, arXiv 2411.02372): a U-Net's features for any modality, learned on synthetic volumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import interpolate, max_pool3d

from fsefs_nnunet.backbones.architectures.plain import PlainBackbone
from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.backbones.state import require_divisible

FEATURES = 16
WIDTHS = (16, 32, 64, 128, 256)


class AnatomixBackbone(PlainBackbone):
    """Max pooling down, nearest-neighbour upsampling up, convolutions that mirror at the border; no head.

    Takes images that are scaled to [0, 1] by their minimum and maximum.
    """

    parts: ClassVar = {"last_block": ("up.3.",), "decoder": ("up.",), "all": ("down.", "up.")}

    def __init__(self, contract: BackboneContract, stages: str):
        super().__init__(contract, stages)
        first, *deeper = WIDTHS
        self.down = nn.ModuleList([_layers((1, first, first, first))])
        self.down.extend(_layers((width // 2, width, width)) for width in deeper)
        self.up = nn.ModuleList(_layers((3 * width, width, width)) for width in WIDTHS[-2:0:-1])
        self.up.append(_layers((3 * first, first, first, FEATURES), plain_end=True))

    @staticmethod
    def stage_maps(contract: BackboneContract) -> dict[str, list[FeatureMap]]:
        """ "last": the 16 features of the publication; "all": the decoder's stages below as well."""
        deeper = [FeatureMap(width, (2 ** (s + 1),) * 3) for s, width in enumerate(WIDTHS[1:-1])]
        return {"last": [FeatureMap(FEATURES)], "all": [FeatureMap(FEATURES), *deeper]}

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """image (B, 1, X, Y, Z), sides multiples of 16 -> `maps`."""
        require_divisible(self.contract, image)
        skips = [self.down[0](image)]
        for stage in self.down[1:]:
            skips.append(stage(max_pool3d(skips[-1], 2)))
        x, decoder = skips.pop(), []
        for stage in self.up:
            x = stage(torch.cat((skips.pop(), interpolate(x, scale_factor=2, mode="nearest")), 1))
            decoder.insert(0, x)
        return decoder[: len(self.maps)]


def _layers(widths: Sequence[int], plain_end: bool = False) -> nn.Sequential:
    """3^3 convolutions without bias, each with batch norm and ReLU; `plain_end`: the last with neither."""
    made: list[nn.Module] = []
    for place, (below, width) in enumerate(zip(widths, widths[1:]), 2):
        made.append(nn.Conv3d(below, width, 3, padding=1, padding_mode="reflect", bias=False))
        if not plain_end or place < len(widths):
            made += [nn.BatchNorm3d(width), nn.ReLU()]
    return nn.Sequential(*made)
