"""What an architecture has to offer to serve as a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fsefs_nnunet.backbones.contract import BackboneContract
    from fsefs_nnunet.backbones.maps import FeatureMap


class Backbone(Protocol):
    """A torch.nn.Module that gives a list of feature maps. One file each, one key in ARCHITECTURES.

    The contract's `architecture` says "kind", that key, and what else that architecture is built from.

    maps: what `forward` gives, in its order.
    head: the universal head, which reads the map of stages "last" and gives one row for each of the contract's
        classes; None for a backbone without one. If it is a 1^3 convolution, that map is the first of all stages, and
        its rows can start an adapter's head.
    """

    maps: Sequence[FeatureMap]
    head: nn.Module | None

    def __init__(self, contract: BackboneContract, stages: str):
        """stages: which maps to give, a key of `stage_maps`.

        Raises:
            InputError: for stages that it does not have, or a missing package.
        """

    @staticmethod
    def stage_maps(contract: BackboneContract) -> dict[str, list[FeatureMap]]:
        """The maps of each choice of `stages`, in the order in which the planner tries them; one is "last"."""

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """image (B, input_channels, X, Y, Z) -> for each of `maps` (B, channels, X / stride, Y / stride, Z / stride).

        Raises:
            InputError: for sides that the architecture cannot take.
        """

    def tuned_parameters(self, part: str) -> list[str]:
        """Names, as `named_parameters` has them, of "last_block" of the decoder, "decoder", or "all".

        Each part is contained in the next; the head is in none. Empty for a part that the architecture does not have.
        """

    def backbone_state(self) -> dict[str, torch.Tensor]:
        """The tensors to store, by name: those that `load_backbone_state` takes, without aliases and constants."""

    def load_backbone_state(self, weights: dict[str, torch.Tensor]) -> None:
        """Load what `backbone_state` gave. Raises InputError unless every tensor matches in name and shape."""
