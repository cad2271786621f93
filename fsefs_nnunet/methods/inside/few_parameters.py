"""Fine-tuning of few parameters throughout a backbone: biases (BitFit, Ben Zaken et al., ACL 2022), norms' scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)  # batch and instance norms are _NormBase


@dataclass(frozen=True)
class Biases:
    """Trains every bias, those of norms as well.

    decoder: whether the whole decoder is trained, too.
    """

    trains_decoder: ClassVar[bool] = False

    decoder: bool = False

    def prepare(self, backbone: nn.Module) -> dict[str, nn.Parameter]:
        parameters, modules = dict(backbone.named_parameters()), dict(backbone.named_modules())
        everything = [(name, *name.rpartition(".")[::2]) for name in backbone.tuned_parameters("all")]
        names = [name for name, owner, leaf in everything if self.takes(modules[owner], leaf)]
        names += backbone.tuned_parameters("decoder") if self.decoder else []
        return {name: parameters[name] for name in dict.fromkeys(names)}

    def takes(self, module: nn.Module, parameter: str) -> bool:
        return parameter == "bias"


class Norms(Biases):
    """Trains scale and shift of every norm."""

    def takes(self, module: nn.Module, parameter: str) -> bool:
        return isinstance(module, NORMS)
