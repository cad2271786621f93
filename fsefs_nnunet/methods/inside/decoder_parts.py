"""Fine-tuning of a part of the backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn


@dataclass(frozen=True)
class LastBlock:
    """Trains the last block of the decoder."""

    part: ClassVar[str] = "last_block"
    trains_decoder: ClassVar[bool] = False

    def prepare(self, backbone: nn.Module) -> dict[str, nn.Parameter]:
        parameters = dict(backbone.named_parameters())
        return {name: parameters[name] for name in backbone.tuned_parameters(self.part)}


class Decoder(LastBlock):
    """Trains the decoder."""

    part = "decoder"
    trains_decoder = True


class Everything(Decoder):
    """Trains encoder and decoder."""

    part = "all"
