"""A backbone, loaded, verified and frozen. New architectures are added to ARCHITECTURES."""

from __future__ import annotations

import torch
from torch import nn

from fsefs_nnunet.backbones.architectures.nnunet import NNUNetBackbone
from fsefs_nnunet.backbones.architectures.raw_image import RawImageBackbone
from fsefs_nnunet.backbones.architectures.suprem_unet import SuPreMUNetBackbone
from fsefs_nnunet.backbones.architectures.swin_unetr import SwinUNETRBackbone
from fsefs_nnunet.backbones.store import find_backbone, load_weights
from fsefs_nnunet.errors import InputError

ARCHITECTURES = {
    "nnunet": NNUNetBackbone,
    "raw_image": RawImageBackbone,
    "swin_unetr": SwinUNETRBackbone,
    "suprem_unet": SuPreMUNetBackbone,
}


class FrozenBackbone(nn.Module):
    """Holds a backbone outside of PyTorch's registry of modules.

    It follows `.to()` and always stays in eval mode without gradients, but it is in nobody's `parameters()` or
    `state_dict()`: optimisers, checkpoints and parameter counts see the adapter alone.
    """

    def __init__(self, backbone_id: str, stages: str, sha256: str | None = None):
        """Raises InputError for an unknown backbone, damaged weights, or others than `sha256`."""
        super().__init__()
        self.contract = find_backbone(backbone_id)
        kind = self.contract.architecture.get("kind")
        if kind not in ARCHITECTURES:
            raise InputError(f"Backbone {backbone_id!r} is of kind {kind!r}; known kinds: {', '.join(ARCHITECTURES)}.")
        module = ARCHITECTURES[kind](self.contract, stages)
        module.load_backbone_state(load_weights(self.contract, sha256))
        self.__dict__["module"] = module.eval().requires_grad_(False)

    @property
    def out_channels(self) -> int:
        return self.module.out_channels

    @property
    def head(self) -> nn.Module | None:
        return self.module.head

    def _apply(self, fn, recurse: bool = True):
        self.module._apply(fn)
        return super()._apply(fn)

    @torch.no_grad()
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image (B, input_channels, X, Y, Z) -> features (B, out_channels, X, Y, Z)."""
        return self.module(image)
