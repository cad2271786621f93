"""The image itself as features: the control that shows what a backbone is worth."""

from __future__ import annotations

import torch

from fsefs_nnunet.backbones.architectures.plain import PlainBackbone
from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.maps import FeatureMap


class RawImageBackbone(PlainBackbone):
    """Passes the image on; has no weights and knows no classes."""

    @staticmethod
    def stage_maps(contract: BackboneContract) -> dict[str, list[FeatureMap]]:
        """See backbones/protocol.py."""
        return {"last": [FeatureMap(contract.input_channels)]}

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """image (B, C, X, Y, Z) -> itself as the only map."""
        return [image]

    def backbone_state(self) -> dict[str, torch.Tensor]:
        """A placeholder: safetensors files hold at least one tensor."""
        return {"none": torch.zeros(1)}

    def load_backbone_state(self, weights: dict[str, torch.Tensor]) -> None:
        """There is nothing to load."""
