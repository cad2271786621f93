"""A backbone, loaded, verified and frozen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fsefs_nnunet.backbones.architectures import build_architecture
from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.backbones.store import find_backbone, load_weights


class FrozenBackbone(nn.Module):
    """Holds a backbone outside of PyTorch's registry of modules.

    It follows `.to()` and always stays in eval mode without gradients, but it is in nobody's `parameters()` or
    `state_dict()`: optimisers, checkpoints and parameter counts see the adapter alone.
    """

    def __init__(self, backbone_id: str, stages: str, sha256: str | None = None):
        """Raises InputError for an unknown backbone, damaged weights, or others than `sha256`."""
        super().__init__()
        self.contract, self.stages = find_backbone(backbone_id), stages
        module = build_architecture(self.contract, stages)
        module.load_backbone_state(load_weights(self.contract, sha256))
        self.__dict__["module"] = module.eval().requires_grad_(False)

    @property
    def maps(self) -> Sequence[FeatureMap]:
        return self.module.maps

    @property
    def out_channels(self) -> int:
        """Of all maps together."""
        return sum(feature_map.channels for feature_map in self.maps)

    @property
    def head(self) -> nn.Module | None:
        return self.module.head

    def _apply(self, fn, recurse: bool = True):
        self.module._apply(fn)
        return super()._apply(fn)

    @torch.no_grad()
    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """image (B, input_channels, X, Y, Z) -> feature maps, see backbones/protocol.py."""
        return self.module(image)
