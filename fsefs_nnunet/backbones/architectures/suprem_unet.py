"""The 3D U-Net of the CLIP-Driven Universal Model and SuPreM."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from fsefs_nnunet.backbones.architectures.plain import PlainBackbone
from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.backbones.state import require_divisible

STAGES = 4


class SuPreMUNetBackbone(PlainBackbone):
    """Four stages of two convolutions, max pooling down, transposed convolutions up; features of the last stage.

    The published network normalises by the statistics of the current batch even in evaluation, and its own inference
    runs patches one by one. That is instance normalisation: a patch's features depend on no other patch.
    """

    parts: ClassVar = {
        "last_block": ("upsample.2.", "decoder.2."),
        "decoder": ("upsample.", "decoder."),
        "all": ("encoder.", "upsample.", "decoder."),
    }

    def __init__(self, contract: BackboneContract, stages: str):
        super().__init__(contract, stages)
        features = contract.architecture["features"]
        widths = [features * 2**stage for stage in range(STAGES)]
        inputs = [contract.input_channels, *widths[:-1]]
        self.encoder = nn.ModuleList(
            nn.Sequential(ConvNormReLU(below, width // 2), ConvNormReLU(width // 2, width))
            for below, width in zip(inputs, widths)
        )
        self.pool = nn.MaxPool3d(2)
        self.upsample = nn.ModuleList(nn.ConvTranspose3d(width, width, 2, stride=2) for width in widths[:0:-1])
        self.decoder = nn.ModuleList(
            nn.Sequential(ConvNormReLU(3 * width, width), ConvNormReLU(width, width)) for width in widths[-2::-1]
        )

    @staticmethod
    def stage_maps(contract: BackboneContract) -> dict[str, list[FeatureMap]]:
        """See backbones/protocol.py."""
        return {"last": [FeatureMap(contract.architecture["features"])]}

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """image (B, input_channels, X, Y, Z), sides multiples of 8 -> the last stage's features (B, C, X, Y, Z)."""
        require_divisible(self.contract, image)
        skips, x = [], image
        for stage in self.encoder[:-1]:
            skips.append(stage(x))
            x = self.pool(skips[-1])
        x = self.encoder[-1](x)
        for up, stage, skip in zip(self.upsample, self.decoder, reversed(skips)):
            x = stage(torch.cat((up(x), skip), 1))
        return [x]


class ConvNormReLU(nn.Module):
    """3^3 convolution, normalisation of each patch on its own, ReLU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3, padding=1)
        self.norm = nn.InstanceNorm3d(out_channels, affine=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, X, Y, Z) -> (B, out_channels, X, Y, Z)."""
        return torch.relu_(self.norm(self.conv(x)))
