"""The architectures of backbones by their contract's "kind": one file and one key each, see backbones/protocol.py."""

from __future__ import annotations

from fsefs_nnunet.backbones.architectures.nnunet import NNUNetBackbone
from fsefs_nnunet.backbones.architectures.raw_image import RawImageBackbone
from fsefs_nnunet.backbones.architectures.suprem_unet import SuPreMUNetBackbone
from fsefs_nnunet.backbones.architectures.swin_unetr import SwinUNETRBackbone
from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.protocol import Backbone
from fsefs_nnunet.errors import InputError

ARCHITECTURES: dict[str, type[Backbone]] = {
    "nnunet": NNUNetBackbone,
    "raw_image": RawImageBackbone,
    "swin_unetr": SwinUNETRBackbone,
    "suprem_unet": SuPreMUNetBackbone,
}


def build_architecture(contract: BackboneContract, stages: str) -> Backbone:
    """The network of `contract` with random weights. Raises InputError for an unknown kind, and as the class does."""
    kind = contract.architecture.get("kind")
    if kind not in ARCHITECTURES:
        raise InputError(f"Backbone {contract.id!r} is of kind {kind!r}; known kinds: {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[kind](contract, stages)
