"""LoRA (Hu et al., ICLR 2022) inside a frozen backbone, for linear layers and 3D convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from fsefs_nnunet.errors import InputError

LINEAR, CONVOLUTIONS = (nn.Linear,), (nn.Conv3d, nn.ConvTranspose3d)
SITES = {"all": LINEAR + CONVOLUTIONS, "linear": LINEAR, "convolutions": CONVOLUTIONS}


class LowRank(nn.Module):
    """Adds B A to a weight (out, ...), seen as a matrix (out, rest): A (rank, rest) is random, B (out, rank) zero.

    The layer computes with the sum, so that storing the sum as its weight changes nothing, not even by rounding.
    """

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, prod(weight.shape[1:])))
        self.b = nn.Parameter(torch.zeros(len(weight), rank))
        nn.init.kaiming_uniform_(self.a, 5**0.5)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.b @ self.a).view_as(weight)


@dataclass(frozen=True)
class LoRA:
    """Trains low-rank updates next to the frozen weights.

    rank: of the updates.
    sites: "all" layers with weights, "linear" (attention and its networks) or "convolutions".
    decoder: whether the decoder itself is trained, without updates.
    """

    trains_decoder: ClassVar[bool] = False

    rank: int = 4
    sites: str = "all"
    decoder: bool = False

    def prepare(self, backbone: nn.Module) -> dict[str, nn.Parameter]:
        """Layers that are smaller than the rank are left unchanged.

        Raises:
            InputError: for unknown sites, and for a rank that is not a positive integer or exceeds every layer's.
        """
        if self.sites not in SITES:
            raise InputError(f"The option sites of LoRA is {self.sites!r}: make it one of {', '.join(SITES)}.")
        parameters, modules = dict(backbone.named_parameters()), dict(backbone.named_modules())
        as_they_are = backbone.tuned_parameters("decoder") if self.decoder else []
        weights = {}
        for name in backbone.tuned_parameters("all"):
            owner, _, leaf = name.rpartition(".")
            if leaf == "weight" and name not in as_they_are and isinstance(modules[owner], SITES[self.sites]):
                weights[owner] = parameters[name]
        ranks = {owner: min(len(weight), prod(weight.shape[1:])) for owner, weight in weights.items()}
        most = max(ranks.values(), default=1)
        if not isinstance(self.rank, int) or not 1 <= self.rank <= most:
            raise InputError(
                f"The option rank of LoRA is {self.rank!r}: make it a whole number from 1 to {most}, the rank of the "
                "largest layer."
            )
        trained = {name: parameters[name] for name in as_they_are}
        for owner, weight in weights.items():
            if ranks[owner] >= self.rank:
                update = LowRank(weight, self.rank).to(weight)
                parametrize.register_parametrization(modules[owner], "weight", update)
                trained |= {f"{owner}.parametrizations.weight.0.{factor}": getattr(update, factor) for factor in "ab"}
        return trained
