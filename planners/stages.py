"""The feature maps of a backbone that fit into a GPU's memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fsefs_nnunet.backbones.architectures import stage_maps
from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.frozen import WITH_IMAGE
from fsefs_nnunet.backbones.maps import FeatureMap

# All stages of nnU-Net's own U-Nets have 960 channels or more. Whether a reduction can learn from so many with few
# cases has not been measured.
MOST_FEATURES = 256


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


def choose_stages(
    contract: BackboneContract,
    window: Sequence[int],
    shape: Sequence[int],
    most_bytes: float,
    image_channels: int = 1,
) -> Stages:
    """The first of the architecture's stages whose slab and twice the maps of a window take at most `most_bytes`.

    Stages of more than MOST_FEATURES channels are skipped. If none fit, those of the smallest slab. If all maps are
    below full resolution, the image is added to them.

    Args:
        window: the backbone's, (X, Y, Z).
        shape: of the median volume, (X, Y, Z).
        image_channels: of the dataset.
    """
    passes, found = image_channels // contract.input_channels, []
    for name, maps in stage_maps(contract).items():
        if name != "last" and passes * sum(m.channels for m in maps) > MOST_FEATURES:
            continue
        channels = passes * channels_in_effect(maps)
        if all(max(m.stride) > 1 for m in maps):
            name, channels = name + WITH_IMAGE, channels + image_channels
        slab = 4 * channels * float(window[0] * shape[1] * shape[2])
        found.append(Stages(name, channels, slab))
        if slab + 2 * 4 * channels * float(np.prod(window)) <= most_bytes:
            return found[-1]
    return min(found, key=lambda stages: stages.slab_bytes)


def channels_in_effect(maps: Sequence[FeatureMap]) -> float:
    """See Stages.channels."""
    return float(sum(m.channels / np.prod(m.stride) for m in maps))
