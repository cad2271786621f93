"""Unlabelled volumes and what a network predicts for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fsefs_nnunet.device import reduced_precision
from fsefs_nnunet.methods.network import AdaptedNetwork

ABSENT = 0.05  # a class of less than this share of its expected size seems to be absent


@dataclass(frozen=True)
class PredictedSizes:
    """Of the foreground classes on one volume, all (classes,).

    soft: S^ in ml, differentiable.
    at_border: whether the prediction reaches the volume's outermost voxels, so that the organ may go on beyond them.
    """

    soft: torch.Tensor
    at_border: torch.Tensor

    def __getitem__(self, classes: torch.Tensor) -> PredictedSizes:
        return PredictedSizes(self.soft[classes], self.at_border[classes])

    def to(self, device: torch.device) -> PredictedSizes:
        return PredictedSizes(self.soft.to(device), self.at_border.to(device))

    def absent(self, expected_ml: torch.Tensor) -> torch.Tensor:
        return self.soft.detach() < ABSENT * expected_ml

    def seen_whole(self, expected_ml: torch.Tensor) -> torch.Tensor:
        """Which classes the volume seems to show whole, so that they must not be smaller than expected."""
        return ~self.at_border & ~self.absent(expected_ml)


@dataclass(frozen=True)
class VolumePrediction:
    """What a prior sees of a volume.

    probabilities: (classes, x, y, z) of the foreground classes, differentiable.
    voxels_ml: what each voxel stands for, (x, y, z) or one number.
    sizes: of the classes.
    before: sizes on the whole volume before an adaptation to it; they decide which classes may grow.
    """

    probabilities: torch.Tensor
    voxels_ml: torch.Tensor | float
    sizes: PredictedSizes
    before: PredictedSizes | None = None


@dataclass(frozen=True)
class QueryVolume:
    """Features of a volume, or their averages over blocks.

    features: (1, C, x, y, z).
    voxels_ml: (x, y, z), what each stands for.
    scale: (classes,), what soft sizes are divided by: an adapter sees less in averaged features.
    """

    features: torch.Tensor
    voxels_ml: torch.Tensor
    scale: torch.Tensor | float = 1.0

    def predict(
        self, network: AdaptedNetwork, has_regions: bool, before: PredictedSizes | None = None
    ) -> VolumePrediction:
        device = network.feature_mean.device
        with reduced_precision(device):  # as in training
            logits = network.adapt(self.features.to(device))
        voxels_ml = self.voxels_ml.to(device)
        probabilities = probabilities_of(logits[0], has_regions)
        return VolumePrediction(probabilities, voxels_ml, _sizes(probabilities, voxels_ml, self.scale), before)


def probabilities_of(logits: torch.Tensor, has_regions: bool) -> torch.Tensor:
    """Logits (outputs, x, y, z) -> probabilities of the foreground classes (classes, x, y, z)."""
    return torch.sigmoid(logits) if has_regions else torch.softmax(logits, 0)[1:]


class SizesInBlocks:
    """Adds up sizes over the logits of a volume, block by block."""

    def __init__(self, shape: Sequence[int], voxel_ml: float, has_regions: bool):
        """shape: of the volume (X, Y, Z)."""
        self.shape, self.voxel_ml, self.has_regions = shape, voxel_ml, has_regions
        self.soft: torch.Tensor | None = None
        self.at_border: torch.Tensor | None = None
        self.finite = True

    def add(self, place: tuple[slice, ...], logits: torch.Tensor) -> None:
        """logits: (outputs, x, y, z) at `place` of the volume."""
        probabilities = probabilities_of(logits, self.has_regions)
        soft = (probabilities.sum((1, 2, 3), dtype=torch.float64) * self.voxel_ml).cpu()
        shell = torch.ones(probabilities.shape[1:], dtype=torch.bool, device=logits.device)
        inside = (slice(int(p.start == 0), s - int(p.stop == n)) for p, s, n in zip(place, shell.shape, self.shape))
        shell[tuple(inside)] = False
        at_border = ((probabilities > 0.5) & shell).flatten(1).any(1).cpu()
        self.finite &= bool(soft.isfinite().all())
        self.soft = soft if self.soft is None else self.soft + soft
        self.at_border = at_border if self.at_border is None else self.at_border | at_border

    def result(self) -> PredictedSizes:
        return PredictedSizes(self.soft.float(), self.at_border)


def sizes_of(logits: torch.Tensor, voxel_ml: float, has_regions: bool) -> PredictedSizes:
    """Sizes in the logits (outputs, x, y, z) of a volume."""
    sizes = SizesInBlocks(logits.shape[1:], voxel_ml, has_regions)
    sizes.add(tuple(slice(0, n) for n in logits.shape[1:]), logits)
    return sizes.result()


def _sizes(probabilities: torch.Tensor, voxels_ml: torch.Tensor | float, scale: torch.Tensor | float) -> PredictedSizes:
    present = probabilities.detach() > 0.5
    shell = torch.ones_like(present[0])
    shell[tuple(slice(1, -1) for _ in shell.shape)] = False
    soft = (probabilities * voxels_ml).sum((1, 2, 3))
    return PredictedSizes(soft / scale, (present & shell).flatten(1).any(1))


def block_voxels(shape: Sequence[int], pool: Sequence[int]) -> torch.Tensor:
    """Number of voxels (x, y, z) in each block of `pool`; those at the far borders may be incomplete."""
    widths = [torch.tensor([min(p, n - a) for a in range(0, n, p)], dtype=torch.float32) for n, p in zip(shape, pool)]
    return torch.einsum("x,y,z->xyz", *widths)
