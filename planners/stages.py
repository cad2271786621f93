"""The feature maps of a backbone that fit into a GPU's memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fsefs_nnunet.backbones.architectures import build_architecture
from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.maps import FeatureMap

# All stages of nnU-Net's own U-Nets have 960 channels or more. Whether a reduction can learn from so many with few
# cases has not been measured.
MOST_FEATURES = 256
RICHEST_FIRST = ("skips", "all", "last")


@dataclass(frozen=True)
class Stages:
    """A choice of feature maps.

    name: the plans' `stages`.
    channels: number at full resolution that takes as much memory as the maps at their own resolutions.
    slab_bytes: of the maps (float32) of a slab one window long, and as wide and high as the volume.
    """

    name: str
    channels: float
    slab_bytes: float


def choose_stages(contract: BackboneContract, window: Sequence[int], shape: Sequence[int], most_bytes: float) -> Stages:
    """The richest stages whose slab and twice the maps of a window take at most `most_bytes`, else "last".

    Args:
        window: the backbone's, (X, Y, Z).
        shape: of the median volume, (X, Y, Z).
    """
    for name in RICHEST_FIRST:
        if name != "last" and contract.stage_features.get(name, MOST_FEATURES + 1) > MOST_FEATURES:
            continue
        channels = channels_in_effect(build_architecture(contract, name).maps)
        slab = 4 * channels * float(window[0] * shape[1] * shape[2])
        stages = Stages(name, channels, slab)
        if slab + 2 * 4 * channels * float(np.prod(window)) <= most_bytes:
            break
    return stages


def channels_in_effect(maps: Sequence[FeatureMap]) -> float:
    """See Stages.channels."""
    return float(sum(m.channels / np.prod(m.stride) for m in maps))
