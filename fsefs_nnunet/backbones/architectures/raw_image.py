"""The image itself as features: the control that shows what a backbone is worth."""

from __future__ import annotations

import torch
from torch import nn

from fsefs_nnunet.backbones.contract import BackboneContract


class RawImageBackbone(nn.Module):
    """Passes the image on; has no weights and knows no classes."""

    head = None

    def __init__(self, contract: BackboneContract, stages: str):
        super().__init__()
        self.out_channels = contract.input_channels

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image (B, C, X, Y, Z) -> the same."""
        return image

    def load_backbone_state(self, weights: dict[str, torch.Tensor]) -> None:
        """Nothing to load; the file's one tensor is a placeholder."""
