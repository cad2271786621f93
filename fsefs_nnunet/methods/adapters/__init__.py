"""Adapters: what is trained between the frozen backbone's features and the head.

An adapter maps (B, C, X, Y, Z) to the same shape, starts as the identity unless its docstring says otherwise, and says
in `margin` how many voxels around a crop its output depends on (None: on all of it). One with `own_strides` takes the
maps as they are, needs whole windows, and says in `out_channels` what the head reads. One file each, and a key in
ADAPTERS that rows of the registry name.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.methods.adapters.context import ContextAdapter
from fsefs_nnunet.methods.adapters.linear_probe import LinearProbe
from fsefs_nnunet.methods.adapters.spatial import SpatialAdapter
from fsefs_nnunet.methods.adapters.spatial_in import SpatialINAdapter
from fsefs_nnunet.methods.adapters.unet import FeatureUNet

ADAPTERS = {
    "linear_probe": LinearProbe,
    "spatial": SpatialAdapter,
    "spatial_in": SpatialINAdapter,
    "context": ContextAdapter,
    "unet": FeatureUNet,
}


def build_adapter(kind: str, channels: int, maps: Sequence[FeatureMap] = ()) -> nn.Module:
    """The adapter `kind` for features of `channels` channels at full resolution or, with `own_strides`, for `maps`.

    Raises:
        ValueError: if there is no such kind.
    """
    if kind not in ADAPTERS:
        raise InputError(f"There is no adapter {kind!r}: choose one of {sorted(ADAPTERS)}.")
    return ADAPTERS[kind](maps if takes_own_strides(kind) else channels)


def takes_own_strides(kind: str) -> bool:
    return getattr(ADAPTERS.get(kind), "own_strides", False)
