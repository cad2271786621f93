"""ResNet-152 inflated to three dimensions, as Merlin (arXiv 2406.06512) and Astra trained it: an encoder alone."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import max_pool3d

from fsefs_nnunet.backbones.architectures.plain import PlainBackbone
from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.backbones.state import require_divisible

WIDTHS, BLOCKS, GROWTH = (64, 128, 256, 512), (3, 8, 36, 3), 4
STRIDES = ((4, 4, 2), (8, 8, 4), (16, 16, 8), (32, 32, 16))


class InflatedResNetBackbone(PlainBackbone):
    """The outputs of the residual stages.

    The network's own axes are z, x, y, and the image is given as all three input channels.
    """

    def __init__(self, contract: BackboneContract, stages: str):
        super().__init__(contract, stages)
        used = STRIDES.index(self.maps[-1].stride) + 1
        self.parts = {"all": ("stem.", *(f"layers.{stage}." for stage in range(used)))}
        self.stem = nn.Sequential(
            nn.Conv3d(3, WIDTHS[0], (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False), nn.BatchNorm3d(WIDTHS[0])
        )
        self.layers, below = nn.ModuleList(), WIDTHS[0]
        for width, blocks in zip(WIDTHS, BLOCKS):
            stride = 1 if width == WIDTHS[0] else 2
            first = Bottleneck(below, width, stride)
            below = GROWTH * width
            self.layers.append(nn.Sequential(first, *(Bottleneck(below, width) for _ in range(blocks - 1))))

    @staticmethod
    def stage_maps(contract: BackboneContract) -> dict[str, list[FeatureMap]]:
        """ "all": stages 1 and 2, "last": stage 2, "deep": stages 1 to 3; a voxel of stage 4 spans about 5 cm."""
        maps = [FeatureMap(GROWTH * width, stride) for width, stride in zip(WIDTHS, STRIDES)]
        return {"all": maps[:2], "last": maps[1:2], "deep": maps[:3]}

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """image (B, 1, X, Y, Z), sides multiples of the divisor -> `maps`."""
        require_divisible(self.contract, image)
        x = torch.relu(self.stem(image.permute(0, 1, 4, 2, 3).expand(-1, 3, -1, -1, -1)))
        x, found = max_pool3d(x, 3, 2, 1), []
        for layer, stride in zip(self.layers, STRIDES):
            x = layer(x)
            found.append(x.permute(0, 1, 3, 4, 2))
            if stride == self.maps[-1].stride:
                break
        return found[-len(self.maps) :]


class Bottleneck(nn.Module):
    """1^3, 3^3 and 1^3 convolutions with batch norm, and a shortcut."""

    def __init__(self, in_channels: int, width: int, stride: int = 1):
        super().__init__()
        out = GROWTH * width
        layers = ((in_channels, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1))
        self.layers = nn.ModuleList(nn.Sequential(_conv(*sizes), nn.BatchNorm3d(sizes[1])) for sizes in layers)
        changes = in_channels != out or stride != 1
        self.shortcut = nn.Sequential(_conv(in_channels, out, 1, stride), nn.BatchNorm3d(out)) if changes else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, Z, X, Y) -> (B, 4 width, Z / stride, X / stride, Y / stride)."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        first, second, third = self.layers
        return torch.relu(third(torch.relu(second(torch.relu(first(x))))) + shortcut)


def _conv(in_channels: int, out_channels: int, size: int, stride: int) -> nn.Conv3d:
    return nn.Conv3d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)
