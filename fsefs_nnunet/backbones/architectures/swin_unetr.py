"""Swin UNETR (arXiv 2201.01266) with the published order of patch merging, through MONAI."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from fsefs_nnunet.backbones.architectures.patch_merging import PublishedPatchMerging
from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.backbones.state import copy_exactly, require_divisible, require_last_stage
from fsefs_nnunet.errors import InputError


class SwinUNETRBackbone(nn.Module):
    """Features of the last decoder stage, those that the published heads act on.

    Sides of the input must be multiples of 32. Attention is computed by PyTorch's fused kernel where no gradient is
    asked for: the same within 1e-5 of the largest feature.
    """

    def __init__(self, contract: BackboneContract, stages: str):
        """Raises InputError for stages other than "last", and without MONAI."""
        super().__init__()
        require_last_stage(contract, stages)
        self.contract = contract
        features = contract.architecture["features"]
        self.maps = [FeatureMap(features)]
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

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """image (B, input_channels, X, Y, Z) -> the last stage's features (B, C, X, Y, Z)."""
        require_divisible(self.contract, image)
        return [self.network(image)]

    def tuned_parameters(self, part: str) -> list[str]:
        """Names of the parameters that fine-tuning of "last_block", "decoder" or "all" trains, without the head's.

        The convolutions on the skips (MONAI's encoder1 to encoder10) belong to the decoder where they are untrained.
        """
        prefixes = {
            "last_block": ("network.decoder1.",),
            "decoder": ("network.decoder", *(("network.encoder",) if self.contract.encoder_only else ())),
            "all": ("network.",),
        }[part]
        return [name for name, _ in self.named_parameters() if name.startswith(prefixes)]

    def backbone_state(self) -> dict[str, torch.Tensor]:
        """Tensors to store: the parameters; MONAI's one kind of buffer, relative_position_index, is a constant."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_backbone_state(self, weights: dict[str, torch.Tensor]) -> None:
        """Load what `backbone_state` gave. Raises InputError unless every tensor matches in name and shape."""
        copy_exactly(self.backbone_state(), weights)


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
