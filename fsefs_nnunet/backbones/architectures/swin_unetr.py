"""Swin UNETR (arXiv 2201.01266) with the published order of patch merging, through MONAI."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from fsefs_nnunet.backbones.architectures.patch_merging import PublishedPatchMerging
from fsefs_nnunet.backbones.architectures.plain import PlainBackbone
from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.backbones.state import require_divisible
from fsefs_nnunet.errors import InputError


class SwinUNETRBackbone(PlainBackbone):
    """Features of the last decoder stage, those that the published heads act on.

    Sides of the input must be multiples of 32. Attention is computed by PyTorch's fused kernel if no gradient is
    needed: the same within 1e-5 of the largest feature. The convolutions on the skips (MONAI's encoder1 to
    encoder10) belong to the decoder if they are untrained.
    """

    def __init__(self, contract: BackboneContract, stages: str):
        """Raises InputError for other stages, and without MONAI."""
        super().__init__(contract, stages)
        skips = ("network.encoder",) if contract.encoder_only else ()
        self.parts = {
            "last_block": ("network.decoder1.",),
            "decoder": ("network.decoder", *skips),
            "all": ("network.",),
        }
        features = contract.architecture["features"]
        self.network = monais_swin_unetr(contract.id)(
            in_channels=contract.input_channels,
            out_channels=1,
            feature_size=features,
            downsample=PublishedPatchMerging,
            use_flash_attention=True,
        )
        self.network.out = nn.Identity()  # the head is kept apart, so that the network ends with the features
        classes = len(contract.head_classes)
        self.head = nn.Conv3d(features, classes, 1) if classes else None

    @staticmethod
    def stage_maps(contract: BackboneContract) -> dict[str, list[FeatureMap]]:
        """See backbones/protocol.py."""
        return {"last": [FeatureMap(contract.architecture["features"])]}

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """image (B, input_channels, X, Y, Z) -> the last stage's features (B, C, X, Y, Z)."""
        require_divisible(self.contract, image)
        return [self.network(image)]


def monais_swin_unetr(backbone_id: str) -> type[nn.Module]:
    """The class. Raises InputError without MONAI, or with one that is too old."""
    try:
        from monai.networks.nets.swin_unetr import SwinUNETR
    except ImportError:
        SwinUNETR = None
    # older ones have no fused attention; einops is optional for MONAI, not for this network
    if SwinUNETR is None or "use_flash_attention" not in inspect.signature(SwinUNETR).parameters:
        raise InputError(
            f"Backbone {backbone_id!r} is a Swin UNETR, which needs MONAI 1.6.1 or newer: "
            'pip install "fsefs_nnunet[monai]".'
        )
    return SwinUNETR
