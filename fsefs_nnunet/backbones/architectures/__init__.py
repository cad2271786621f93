"""The architectures of backbones by their contract's "kind": one file and one key each, see backbones/protocol.py."""

from __future__ import annotations

from fsefs_nnunet.backbones.architectures.anatomix import AnatomixBackbone
from fsefs_nnunet.backbones.architectures.highres3dnet import HighRes3DNetBackbone
from fsefs_nnunet.backbones.architectures.inflated_resnet import InflatedResNetBackbone
from fsefs_nnunet.backbones.architectures.nnunet import NNUNetBackbone
from fsefs_nnunet.backbones.architectures.obelisk import ObeliskBackbone
from fsefs_nnunet.backbones.architectures.raw_image import RawImageBackbone
from fsefs_nnunet.backbones.architectures.suprem_unet import SuPreMUNetBackbone
from fsefs_nnunet.backbones.architectures.swin_unetr import SwinUNETRBackbone
from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.backbones.protocol import Backbone
from fsefs_nnunet.errors import InputError

ARCHITECTURES: dict[str, type[Backbone]] = {
    "anatomix": AnatomixBackbone,
    "highres3dnet": HighRes3DNetBackbone,
    "inflated_resnet": InflatedResNetBackbone,
    "nnunet": NNUNetBackbone,
    "obelisk": ObeliskBackbone,
    "raw_image": RawImageBackbone,
    "swin_unetr": SwinUNETRBackbone,
    "suprem_unet": SuPreMUNetBackbone,
}


def build_architecture(contract: BackboneContract, stages: str) -> Backbone:
    """The network of `contract` with random weights. Raises InputError for an unknown kind, and as the class does."""
    return _class_of(contract)(contract, stages)


def stage_maps(contract: BackboneContract) -> dict[str, list[FeatureMap]]:
    """The maps of each choice of `stages`, the preferred one first. Raises InputError for an unknown kind."""
    return _class_of(contract).stage_maps(contract)


def _class_of(contract: BackboneContract) -> type[Backbone]:
    kind = contract.architecture.get("kind")
    if kind not in ARCHITECTURES:
        raise InputError(f"Backbone {contract.id!r} is of kind {kind!r}; known kinds: {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[kind]
