"""The 3D U-Net of the CLIP-Driven Universal Model and SuPreM."""

from __future__ import annotations

import torch
from torch import nn

from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.backbones.state import copy_exactly, require_divisible, require_last_stage

STAGES = 4


class SuPreMUNetBackbone(nn.Module):
    """Four stages of two convolutions, max pooling down, transposed convolutions up; features of the last stage.

    The published network normalises by the statistics of the batch at hand, in evaluation, too, and its own inference
    runs patches one by one. That is instance normalisation: a patch's features depend on no other patch.
    """

    head = None  # the published classes have no linear rows

    def __init__(self, contract: BackboneContract, stages: str):
        """Raises InputError for stages other than "last"."""
        super().__init__()
        require_last_stage(contract, stages)
        self.contract = contract
        features = contract.architecture["features"]
        self.maps = [FeatureMap(features)]
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

    def tuned_parameters(self, part: str) -> list[str]:
        """Names of the parameters that fine-tuning of "last_block", "decoder" or "all" trains."""
        last = STAGES - 2
        prefixes = {
            "last_block": (f"upsample.{last}.", f"decoder.{last}."),
            "decoder": ("upsample.", "decoder."),
            "all": ("",),
        }[part]
        return [name for name, _ in self.named_parameters() if name.startswith(prefixes)]

    def backbone_state(self) -> dict[str, torch.Tensor]:
        """Tensors to store: the parameters, there are no buffers."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_backbone_state(self, weights: dict[str, torch.Tensor]) -> None:
        """Load what `backbone_state` gave. Raises InputError unless every tensor matches in name and shape."""
        copy_exactly(self.backbone_state(), weights)


class ConvNormReLU(nn.Module):
    """3^3 convolution, normalisation of each patch by itself, ReLU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3, padding=1)
        self.norm = nn.InstanceNorm3d(out_channels, affine=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, X, Y, Z) -> (B, out_channels, X, Y, Z)."""
        return torch.relu_(self.norm(self.conv(x)))
