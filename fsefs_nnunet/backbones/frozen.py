"""A backbone, loaded, verified and frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from fsefs_nnunet.backbones.architectures import build_architecture
from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.backbones.store import find_backbone, load_weights
from fsefs_nnunet.errors import InputError

WITH_IMAGE = "+image"  # at the end of `stages`: the image is one of the maps
_loaded: dict[tuple, nn.Module] | None = None


@contextmanager
def backbones_stay_loaded() -> Iterator[None]:
    """Within the block, frozen backbones of the same weights and stages are one module: loaded and verified once."""
    global _loaded
    before, _loaded = _loaded, {}
    try:
        yield
    finally:
        _loaded = before


class FrozenBackbone(nn.Module):
    """Holds a backbone outside of PyTorch's registry of modules.

    It follows `.to()` and always stays in eval mode without gradients, but it is in no module's `parameters()` or
    `state_dict()`: optimisers, checkpoints and parameter counts see the adapter alone.

    A backbone of one channel takes the channels of an image one after the other; their features are concatenated in
    each map, in the order of the channels.
    """

    def __init__(
        self,
        backbone_id: str,
        stages: str,
        sha256: str | None = None,
        channels: int | None = None,
        z_scores_as_hu: dict[str, dict[str, float]] | None = None,
    ):
        """
        Args:
            stages: of the architecture, followed by "+image" if the image is to be a map, too.
            channels: of the images; default: as many as the backbone was trained with.
            z_scores_as_hu: channels of the images that are z-scored, since the backbone has never seen their modality,
                and the linear map that turns them into Hounsfield units, see BackboneContract.

        Raises:
            InputError: for an unknown backbone, damaged weights or weights other than `sha256`, and channels that it
                cannot take.
        """
        super().__init__()
        self.contract, self.stages = find_backbone(backbone_id), stages
        own = self.contract.input_channels
        self.channels = channels or own
        if self.channels != own and own > 1:
            raise InputError(
                f"Backbone {backbone_id!r} takes {own} image channel(s), but the dataset has {channels}: choose "
                "another backbone or convert the dataset."
            )
        self.passes = self.channels // own
        self.__dict__["module"] = self._shared_module(sha256) if type(self) is FrozenBackbone else self._load(sha256)
        self.z_scores_as_hu = z_scores_as_hu or {}

    def _shared_module(self, sha256: str | None) -> nn.Module:
        if _loaded is None or sha256 not in (None, self.contract.sha256):
            return self._load(sha256)
        key = (self.contract.id, self.contract.sha256, self.stages.removesuffix(WITH_IMAGE))
        if key not in _loaded:
            _loaded[key] = self._load(sha256)
        return _loaded[key]

    def _load(self, sha256: str | None) -> nn.Module:
        module = build_architecture(self.contract, self.stages.removesuffix(WITH_IMAGE))
        module.load_backbone_state(load_weights(self.contract, sha256))
        return module.eval().requires_grad_(False)

    @property
    def maps(self) -> Sequence[FeatureMap]:
        found = [replace(m, channels=m.channels * self.passes) for m in self.module.maps]
        return [*found, FeatureMap(self.channels)] if self.stages.endswith(WITH_IMAGE) else found

    @property
    def out_channels(self) -> int:
        """Channels of all maps together."""
        return sum(feature_map.channels for feature_map in self.maps)

    @property
    def head(self) -> nn.Module | None:
        return self.module.head

    def _apply(self, fn, recurse: bool = True):
        self.module._apply(fn)
        return super()._apply(fn)

    @torch.no_grad()
    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """image (B, channels, X, Y, Z) -> feature maps, see backbones/protocol.py."""
        return self._maps_of(image)

    def _maps_of(self, image: torch.Tensor) -> list[torch.Tensor]:
        seen = as_hounsfield(image, self.contract, self.z_scores_as_hu) if self.z_scores_as_hu else image
        found = self.module(seen.flatten(0, 1)[:, None] if self.passes > 1 else seen)
        if self.passes > 1:
            found = [m.unflatten(0, (-1, self.passes)).flatten(1, 2) for m in found]
        return [*found, image] if self.stages.endswith(WITH_IMAGE) else found


def as_hounsfield(image: torch.Tensor, contract: BackboneContract, lines: dict[str, dict[str, float]]) -> torch.Tensor:
    """An image (B, C, X, Y, Z) whose channels in `lines` are turned into HU and normalised as CTNormalization does."""
    made, ct = image.clone(), contract.intensities_of(image.shape[1])
    for channel, line in lines.items():
        window = ct[channel]
        units = (image[:, int(channel)] * line["std"] + line["mean"]).clamp(line["low"], line["high"])
        units = units.clamp(window["percentile_00_5"], window["percentile_99_5"])
        made[:, int(channel)] = (units - window["mean"]) / window["std"]
    return made
