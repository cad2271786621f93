"""The queries of a training, from the features that the bank keeps of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING

import numpy as np
import torch

from fsefs_nnunet.device import reduced_precision
from fsefs_nnunet.features.bank import FeatureBank
from fsefs_nnunet.methods.network import AdaptedNetwork
from fsefs_nnunet.priors.volumes import QueryVolume, VolumePrediction, block_voxels

if TYPE_CHECKING:
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

CALIBRATION_CASES = 5  # each costs as much as a query once an epoch
KEPT_BYTES = 10**9  # of volumes that stay in memory, on the device
MAX_SCALE = 8.0  # a class that is all but lost says nothing about how much pooling removes
LEAST_SIZE = 1e-30  # in ml; gradients relative to smaller ones overflow


class QueryVolumes:
    """Predictions on the queries of a training.

    The adapter sees less in features that were averaged over blocks: its soft sizes come out smaller than in whole
    volumes. The factor, measured on the support cases, is what the queries' sizes are divided by.
    """

    def __init__(
        self, bank: FeatureBank, queries: list[str], voxel_ml: float, support_ml: dict[str, torch.Tensor] | None = None
    ):
        """
        Args:
            voxel_ml: volume of a voxel in ml.
            support_ml: sizes (classes,) in ml of support cases, by the names that the bank keeps them pooled under.
        """
        self.bank, self.queries, self.voxel_ml = bank, queries, voxel_ml
        self.support_ml = {case: sizes.to(bank.device) for case, sizes in (support_ml or {}).items()}
        self.scale: torch.Tensor | float = 1.0
        self._kept: dict[str, QueryVolume] = {}

    def _volume(self, case: str) -> QueryVolume:
        if case not in self._kept:
            volume = self._load(case)
            if sum(kept.features.nbytes for kept in self._kept.values()) + volume.features.nbytes > KEPT_BYTES:
                return volume
            self._kept[case] = volume
        return self._kept[case]

    def _load(self, case: str) -> QueryVolume:
        entry = self.bank[case]
        voxels_ml = block_voxels(entry.layout.shape, entry.layout.pool) * self.voxel_ml
        features = entry.blocks[None].to(self.bank.device, copy=True)  # so that later steps read no file
        return QueryVolume(features, voxels_ml.to(self.bank.device))

    def visits(self, steps: int) -> int:
        """How many of the `steps` of an epoch look at a query, each at a different one if there are enough.

        Within an epoch the sizes of a query hardly change, so none is looked at twice, unless half the steps need it.
        """
        return min(steps, max(len(self.queries), ceil(steps / 2)))

    def visit(self, epoch: int, step: int, steps: int) -> int | None:
        """Number, in the whole training, of the visit in step `step` of an epoch's `steps`; None if it has none."""
        visits = self.visits(steps)
        return epoch * visits + step * visits // steps if step * visits % steps < visits else None

    def rotating(self, visit: int, seed: int) -> str:
        """The query of a visit: each once in a round, every round in a new seeded order."""
        order = np.random.default_rng((seed, visit // len(self.queries))).permutation(len(self.queries))
        return self.queries[order[visit % len(self.queries)]]

    @torch.no_grad()
    def calibrate(self, network: AdaptedNetwork, has_regions: bool, found: torch.Tensor | float = 1.0) -> None:
        """Set `scale` (classes,), the ratio of the network's soft sizes of pooled support cases to those of whole ones.

        Args:
            found: (classes,) share of the labelled voxels that it finds in whole ones. Without it a network that finds
                too little, in whole volumes as in pooled ones, would seem right, and the prior would drive it on.
        """
        if not self.support_ml:
            return
        predicted = torch.stack(
            [self._volume(case).predict(network, has_regions).sizes.soft for case in self.support_ml]
        )
        true = torch.stack(list(self.support_ml.values())).to(predicted)
        self.scale = scale_between(torch.where(true > 0, predicted, 0).sum(0), true.sum(0) * found)

    def predict(self, network: AdaptedNetwork, query: str, has_regions: bool) -> VolumePrediction:
        return replace(self._volume(query), scale=self.scale).predict(network, has_regions)

    def predict_beside_support(
        self, network: AdaptedNetwork, query: str, visit: int, has_regions: bool
    ) -> VolumePrediction:
        """As `predict`, but the gradient of the sizes takes into account that `scale` depends on the network.

        Shrinking an organ in every pooled volume alike leaves S^ as it is, since the scale shrinks with it. To a
        gradient that treats the scale as constant it would seem to help, step by step, until the organ is lost.
        """
        prediction = self.predict(network, query, has_regions)
        if not self.support_ml:
            return prediction
        case = [*self.support_ml][visit % len(self.support_ml)]
        size = self._volume(case).predict(network, has_regions).sizes.soft
        # probabilities may all be rounded to zero, and the gradient of 0 / 0 is NaN even where it is not chosen
        shown = (self.support_ml[case].to(size) > 0) & (size.detach() > LEAST_SIZE)
        size = torch.where(shown, size, 1.0)
        relative = size / size.detach()  # 1, but not its gradient
        return replace(prediction, sizes=replace(prediction.sizes, soft=prediction.sizes.soft / relative))


def scale_between(pooled: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """The ratio of soft sizes (classes,) of pooled volumes to the true ones, within bounds; 1 for a class of size 0."""
    return torch.where(true > 0, pooled / true, 1.0).clamp(1 / MAX_SCALE, MAX_SCALE)


def calibration_cases(sizes_ml: dict[str, np.ndarray], num_classes: int, most: int = CALIBRATION_CASES) -> list[str]:
    """Support cases that show what pooling removes: the first few, and one for each class that these do not show.

    sizes_ml: (classes,) by case. most: the largest number of first cases.
    """
    cases = [*sizes_ml][: min(most, CALIBRATION_CASES)]
    for k in range(num_classes):
        if not any(sizes_ml[case][k] for case in cases):
            cases += [case for case, sizes in sizes_ml.items() if sizes[k]][:1]
    return cases


@torch.no_grad()
def share_found(network: AdaptedNetwork, batches: Iterable[dict], label_manager: LabelManager) -> torch.Tensor:
    """Soft predictions on crops of the support as a share of the labelled voxels (classes,); 1 without labels."""
    has_regions, ignore_label = label_manager.has_regions, label_manager.ignore_label
    device = network.feature_mean.device
    found = labelled = 0
    for batch in batches:
        target = batch["target"].to(device)
        with reduced_precision(device):
            logits = network.adapt(batch["data"].to(device))
        if has_regions:  # the ignored voxels are the channel after the regions
            soft, true = torch.sigmoid(logits), target[:, : logits.shape[1]].float()
            ignored = target[:, logits.shape[1] :].bool().any(1, keepdim=True)
        else:
            soft = torch.softmax(logits, 1)[:, 1:]
            true = torch.cat([target == label for label in label_manager.foreground_labels], 1).float()
            ignored = target == (ignore_label if ignore_label is not None else -1)  # -1 is not a label
        found += torch.where(ignored, 0, soft).sum((0, 2, 3, 4))
        labelled += torch.where(ignored, 0, true).sum((0, 2, 3, 4))
    return torch.where(labelled > 0, found / labelled, 1.0)
