"""The image itself as features: the control that shows what a backbone is worth."""

from __future__ import annotations

import torch
from torch import nn

from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.backbones.state import require_last_stage


class RawImageBackbone(nn.Module):
    """Passes the image on; has no weights and knows no classes."""

    head = None

    def __init__(self, contract: BackboneContract, stages: str):
        super().__init__()
        require_last_stage(contract, stages)
        self.maps = [FeatureMap(contract.input_channels)]

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """image (B, C, X, Y, Z) -> itself as the only map."""
        return [image]

    def tuned_parameters(self, part: str) -> list[str]:
        return []

    def backbone_state(self) -> dict[str, torch.Tensor]:
        """A placeholder: safetensors files hold one tensor at least."""
        return {"none": torch.zeros(1)}

    def load_backbone_state(self, weights: dict[str, torch.Tensor]) -> None:
        """There is nothing to load."""
