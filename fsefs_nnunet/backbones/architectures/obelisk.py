"""The U-Net for abdominal CT of Heinrich, Oktay, Bouteldja (MIDL 2018), the OBELISK repository's "allconvunet"."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import interpolate, leaky_relu

from fsefs_nnunet.backbones.architectures.plain import PlainBackbone
from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.maps import FeatureMap

STEM, WIDTHS = 5, (14, 28, 42, 56, 70)
SLOPE = 0.1
LEFT_AND_INFERIOR = (2, 4)  # it sees volumes with the axes left, anterior, inferior; ours are right, anterior, superior


class ObeliskBackbone(PlainBackbone):
    """Five strided stages down, trilinear upsampling and one convolution each up, all with batch norm.

    Takes images as CTNormalization made them and turns them back into Hounsfield units. The published code also
    drops channels in prediction; here nothing is dropped.
    """

    parts: ClassVar = {"last_block": ("up.3.",), "decoder": ("up.",), "all": ("stem.", "down.", "up.")}

    def __init__(self, contract: BackboneContract, stages: str):
        super().__init__(contract, stages)
        values = contract.foreground_intensity_properties_per_channel["0"]
        self.mean, self.std = values["mean"], values["std"]
        self.stem = ConvNorm(1, STEM)
        self.down = nn.ModuleList(
            nn.Sequential(ConvNorm(below, width, stride=2), ConvNorm(width, width))
            for below, width in zip((STEM, *WIDTHS), WIDTHS)
        )
        self.up = nn.ModuleList(ConvNorm(below + width, width) for below, width in zip(WIDTHS[:0:-1], WIDTHS[-2::-1]))
        if classes := len(contract.head_classes):
            self.head = _TwoLayers(STEM + WIDTHS[0], classes)

    @staticmethod
    def stage_maps(contract: BackboneContract) -> dict[str, list[FeatureMap]]:
        """ "last": what the head reads; "all": the same before its upsampling, and the decoder's stages below."""
        decoder = [FeatureMap(width, (2 ** (s + 1),) * 3) for s, width in enumerate(WIDTHS[:-1])]
        return {"all": [FeatureMap(STEM), *decoder], "last": [FeatureMap(STEM + WIDTHS[0])]}

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """image (B, 1, X, Y, Z), normalised -> `maps`."""
        x = self.stem(_turned(image.float() * self.std + self.mean))
        skips = [x]
        for stage in self.down:
            skips.append(stage(skips[-1]))
        x, decoder = skips.pop(), []
        for stage in self.up:
            skip = skips.pop()
            x = stage(torch.cat((_resized(x, skip), skip), 1))
            decoder.insert(0, x)
        stem = skips.pop()
        wanted = [stem, *decoder] if self.stages == "all" else [torch.cat((_resized(x, stem), stem), 1)]
        return [_turned(feature_map) for feature_map in wanted]


class ConvNorm(nn.Module):
    """3^3 convolution, batch norm, leaky ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3, stride, padding=1)
        self.norm = nn.BatchNorm3d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, X, Y, Z) -> (B, out_channels, X / stride, Y / stride, Z / stride)."""
        return leaky_relu(self.norm(self.conv(x)), SLOPE)


class _TwoLayers(nn.Module):
    """The head: two 3^3 convolutions."""

    def __init__(self, in_channels: int, classes: int):
        super().__init__()
        self.first, self.second = ConvNorm(in_channels, classes), nn.Conv3d(classes, classes, 3, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, X, Y, Z) -> logits (B, classes, X, Y, Z)."""
        return _turned(self.second(self.first(_turned(features))))


def _turned(x: torch.Tensor) -> torch.Tensor:
    return x.flip(LEFT_AND_INFERIOR)


def _resized(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return interpolate(x, like.shape[2:], mode="trilinear", align_corners=False)
