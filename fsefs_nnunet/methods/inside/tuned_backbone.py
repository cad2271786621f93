"""A backbone in which something is trained."""

from __future__ import annotations

import torch
from torch import nn

from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.methods.inside.protocol import Inside


class TunedBackbone(FrozenBackbone):
    """A FrozenBackbone except for what `inside` trains, which alone is in `parameters()` and `state_dict()`.

    The trained parameters lie in the backbone and, the same objects, in `tuned`, a tree of empty modules that gives
    them their names. Everything stays in eval mode; autograd keeps nothing of the layers before the first trained one.
    """

    def __init__(self, backbone_id: str, stages: str, sha256: str | None, inside: Inside, *args, **kwargs):
        """The other arguments are FrozenBackbone's. Raises InputError for a backbone that has nothing to train."""
        super().__init__(backbone_id, stages, sha256, *args, **kwargs)
        trained = inside.prepare(self.module)
        self.module.eval()  # including what was added
        if not trained:
            raise InputError(
                f"Backbone {backbone_id!r} has no part that this method fine-tunes: choose another method or backbone."
            )
        self.tuned = nn.Module()
        for name, parameter in trained.items():
            _register(self.tuned, name, parameter.requires_grad_())

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """image (B, channels, X, Y, Z) -> feature maps, see backbones/protocol.py."""
        return self._maps_of(image)


def _register(tree: nn.Module, name: str, parameter: nn.Parameter) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if part not in tree._modules:
            tree.add_module(part, nn.Module())
        tree = tree._modules[part]
    tree.register_parameter(leaf, parameter)
