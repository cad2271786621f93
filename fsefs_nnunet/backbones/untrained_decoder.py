"""Backbones whose published file holds an encoder alone: their decoder means nothing until it is trained."""

from __future__ import annotations

import os

from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.errors import InputError


def untrained_decoder(contract: BackboneContract) -> str:
    return f"Backbone {contract.id!r} is an encoder; its decoder is random and must be tuned."


def refuse_untrained_decoder(contract: BackboneContract) -> None:
    """For methods that train on the decoder's features as they are.

    Raises:
        InputError: for an encoder without a decoder, unless the environment variable fseft_force is 1.
    """
    if contract.encoder_only and os.environ.get("fseft_force") != "1":
        raise InputError(
            f"{untrained_decoder(contract)} Adapters on its frozen features are refused: use a method that "
            "tunes the decoder, or set the environment variable fseft_force to 1."
        )
