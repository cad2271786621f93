"""A backbone of which one part is trained."""

from __future__ import annotations

import torch
from torch import nn

from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.errors import InputError

PARTS = ("last_block", "decoder", "all")


class TunedBackbone(FrozenBackbone):
    """A FrozenBackbone but for one part: its parameters, and they alone, are in `parameters()` and `state_dict()`.

    They lie in the backbone and, the same objects, in `tuned`, a tree of empty modules that gives them their names.
    Everything stays in eval mode; autograd keeps nothing of the layers before the first trained one.
    """

    def __init__(self, backbone_id: str, stages: str, sha256: str | None, part: str):
        """
        Args:
            part: "last_block" of the decoder, "decoder" or "all"; `tuned_parameters` of the backbone's class names its
                parameters. The universal head is in none of them.

        Raises:
            InputError: for another part, or a backbone without parts.
        """
        super().__init__(backbone_id, stages, sha256)
        if part not in PARTS:
            raise InputError(f"{part!r} is no part of a backbone that can be trained: choose one of {list(PARTS)}.")
        if not hasattr(self.module, "tuned_parameters"):
            raise InputError(f"Backbone {backbone_id!r} has no weights to fine-tune: choose another backbone.")
        self.tuned = nn.Module()
        parameters = dict(self.module.named_parameters())
        for name in self.module.tuned_parameters(part):
            _register(self.tuned, name, parameters[name].requires_grad_())

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image (B, input_channels, X, Y, Z) -> features (B, out_channels, X, Y, Z)."""
        return self.module(image)


def _register(tree: nn.Module, name: str, parameter: nn.Parameter) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if part not in tree._modules:
            tree.add_module(part, nn.Module())
        tree = tree._modules[part]
    tree.register_parameter(leaf, parameter)
