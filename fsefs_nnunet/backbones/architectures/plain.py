"""What the architectures of public backbones share: maps by name, and a state of parameters and running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.backbones.state import copy_exactly
from fsefs_nnunet.errors import InputError


class PlainBackbone(nn.Module):
    """A base of architectures, see backbones/protocol.py.

    parts: prefixes of the parameter names of "last_block", "decoder" and "all"; the head's are in none.
    """

    parts: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __init__(self, contract: BackboneContract, stages: str):
        """Raises InputError for stages that the architecture does not give."""
        super().__init__()
        self.contract, self.stages = contract, stages
        self.head: nn.Module | None = None
        self.maps: Sequence[FeatureMap] = maps_named(contract, self.stage_maps(contract), stages)

    @staticmethod
    def stage_maps(contract: BackboneContract) -> dict[str, list[FeatureMap]]:
        """See backbones/protocol.py."""
        raise NotImplementedError

    def tuned_parameters(self, part: str) -> list[str]:
        """Names of the parameters that fine-tuning of "last_block", "decoder" or "all" trains, without the head's."""
        return [name for name, _ in self.named_parameters() if name.startswith(self.parts.get(part, ()))]

    def backbone_state(self) -> dict[str, torch.Tensor]:
        """Tensors to store: parameters and the running statistics of batch norms, without their counters."""
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return {name: tensor.detach() for name, tensor in tensors.items() if tensor.is_floating_point()}

    def load_backbone_state(self, weights: dict[str, torch.Tensor]) -> None:
        """Load what `backbone_state` gave. Raises InputError unless every tensor matches in name and shape."""
        copy_exactly(self.backbone_state(), weights)


def maps_named(contract: BackboneContract, known: dict[str, list[FeatureMap]], stages: str) -> list[FeatureMap]:
    """Raises InputError for `stages` that are not among the `known`."""
    if stages not in known:
        names = ", ".join(map(repr, known))
        raise InputError(f"Backbone {contract.id!r} has stages {names}, but the plans' arch_kwargs name {stages!r}.")
    return known[stages]
