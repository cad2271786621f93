"""Any nnU-Net U-Net (PlainConvUNet, ResidualEncoderUNet) as a frozen feature extractor."""

from __future__ import annotations

import pydoc

import numpy as np
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from fsefs_nnunet.backbones.architectures.plain import maps_named
from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.backbones.state import copy_exactly
from fsefs_nnunet.errors import InputError

UNETS = ("PlainConvUNet", "ResidualEncoderUNet")
_MODULES = ("torch.nn.", "dynamic_network_architectures.building_blocks.")


class NNUNetBackbone(nn.Module):
    """Feature maps of a U-Net.

    The last decoder stage comes first, so that the universal head reads the first map whatever `stages` is. The deeper
    stages follow, from fine to coarse, then the encoder's skips below full resolution, and last the one at full
    resolution.
    """

    def __init__(self, contract: BackboneContract, stages: str):
        """stages: "last" for the last decoder stage alone, "all" for every decoder stage, "skips" for these and the
            encoder's skips.

        Raises:
            InputError: for another architecture, or layers that are not network layers.
        """
        super().__init__()
        self.unet = _build_unet(contract)
        self.stages = stages
        self.maps = maps_named(contract, self.stage_maps(contract), stages)

    @staticmethod
    def stage_maps(contract: BackboneContract) -> dict[str, list[FeatureMap]]:
        """See backbones/protocol.py."""
        kwargs = contract.architecture["arch_kwargs"]
        strides = np.cumprod([np.broadcast_to(stride, 3) for stride in kwargs["strides"]], 0).tolist()
        # decoder and encoder have the same number of channels in each stage
        stages = [FeatureMap(c, tuple(s)) for c, s in zip(kwargs["features_per_stage"][:-1], strides)]
        return {name: _wanted(name, stages, stages) for name in ("skips", "all", "last")}

    @property
    def head(self) -> nn.Module:
        """The universal head, 1^3 convolution on the leading channels."""
        return self.unet.decoder.seg_layers[-1]

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """image (B, input_channels, X, Y, Z) -> `maps`, (B, C, X / stride, Y / stride, Z / stride) each."""
        decoder = self.unet.decoder
        skips = self.unet.encoder(image)
        x, features = skips[-1], []
        for s, (up, stage) in enumerate(zip(decoder.transpconvs, decoder.stages)):
            x = stage(torch.cat((up(x), skips[-(s + 2)]), 1))
            features.append(x)
        return _wanted(self.stages, features[::-1], skips[:-1])

    def tuned_parameters(self, part: str) -> list[str]:
        """Names of the parameters that fine-tuning of "last_block", "decoder" or "all" trains, without the head's."""
        last = len(self.unet.decoder.stages) - 1
        decoder = ("unet.decoder.stages.", "unet.decoder.transpconvs.")
        prefixes = {
            "last_block": tuple(f"{block}{last}." for block in decoder),
            "decoder": decoder,
            "all": ("unet.encoder.", *decoder),
        }[part]
        return [name for name, _ in self.named_parameters() if name.startswith(prefixes)]

    def backbone_state(self) -> dict[str, torch.Tensor]:
        """Tensors to store, without the aliases that nnU-Net's state_dict carries."""
        return {name: p.detach() for name, p in self.unet.named_parameters()} | dict(self.unet.named_buffers())

    def load_backbone_state(self, weights: dict[str, torch.Tensor]) -> None:
        """Load what `backbone_state` gave. Raises InputError unless every tensor matches in name and shape."""
        copy_exactly(self.backbone_state(), weights)


def _wanted(stages: str, decoder: list, encoder: list) -> list:
    """Select what belongs to `stages` from lists for the stages of decoder and encoder, both from fine to coarse."""
    if stages == "last":
        return decoder[:1]
    return decoder if stages == "all" else [*decoder, *encoder[1:], *encoder[:1]]


def plans_architecture(contract: BackboneContract) -> dict:
    """What nnU-Net's plans say about the architecture: network_class_name, arch_kwargs, _kw_requires_import.

    Raises:
        InputError: for another architecture, or layers that are not network layers.
    """
    architecture = contract.architecture
    name = architecture["network_class_name"].split(".")[-1]
    if name not in UNETS:
        raise InputError(f"Backbone {contract.id!r} is a {name}, but only {' and '.join(UNETS)} are known.")
    for key in architecture["_kw_requires_import"]:
        _refuse_unless_layer(contract.id, key, architecture["arch_kwargs"].get(key))
    return {
        # old plans name a module that no longer exists
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
        "arch_kwargs": architecture["arch_kwargs"],
        "_kw_requires_import": architecture["_kw_requires_import"],
    }


def _build_unet(contract: BackboneContract) -> nn.Module:
    architecture = plans_architecture(contract)
    try:
        return get_network_from_plans(
            *architecture.values(),
            contract.input_channels,
            len(contract.classes),
            allow_init=True,
            deep_supervision=False,
        )
    except Exception as error:  # asserts, and whatever the layers raise
        name, why = architecture["network_class_name"].split(".")[-1], str(error) or type(error).__name__
        raise InputError(
            f"Backbone {contract.id!r} has arch_kwargs that do not build a {name} ({why}): compare them with plans "
            "that nnU-Net wrote."
        ) from error


def _refuse_unless_layer(backbone_id: str, key: str, name: str | None) -> None:
    """nnU-Net imports and calls whatever plans name here, so that an untrusted plans.json could run any function."""
    if name is None:
        return
    layer = pydoc.locate(name) if name.startswith(_MODULES) else None
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise InputError(
            f"Backbone {backbone_id!r} names {name!r} as its {key}, which is not a layer: do not trust it."
        )
