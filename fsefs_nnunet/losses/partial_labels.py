"""Universal pretraining on partially labelled assemblies, Eq. (1) of FSEFT (arXiv 2303.17051)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fsefs_nnunet.errors import InputError
from fsefs_nnunet.losses.soft_dice import soft_dice


def annotation_masks(dataset_json: dict, regions: list[str]) -> dict[str, torch.Tensor]:
    """Task mask w of each case: (K,) float, 1 where the case's source annotates the region.

    dataset_json["sources"] maps a source's name to its "classes" (names of labels or regions) and "cases".

    Raises:
        InputError: if "sources" is missing, names an unknown class, or lists a case twice.
    """
    if not dataset_json.get("sources"):
        raise InputError(
            'dataset.json has no "sources": say which cases are annotated for which classes, '
            'e.g. "sources": {"siteA": {"classes": ["liver"], "cases": ["siteA_001"]}}.'
        )
    masks = {}
    for source, content in dataset_json["sources"].items():
        if not content.get("classes") or not content.get("cases"):
            raise InputError(f'dataset.json: source {source!r} needs "classes" and "cases", neither of them empty.')
        unknown = sorted(set(content["classes"]) - set(regions))
        if unknown:
            raise InputError(f"dataset.json: source {source!r} annotates {unknown}, but the labels are {regions}.")
        mask = torch.tensor([float(name in content["classes"]) for name in regions])
        for case in content["cases"]:
            if case in masks:
                raise InputError(f"dataset.json: case {case!r} is listed in two sources.")
            masks[case] = mask
    return masks


class PartialLabelLoss(nn.Module):
    """Eq. (1): 1 / sum_k w_{n,k} * sum_k w_{n,k} * L_SEG(Y_{n,k}, Y^_{n,k}), averaged over the batch.

    L_SEG is soft Dice plus binary cross-entropy. The voxels of a class that fills little of the window weigh more in
    the cross-entropy, by the square root of background over class: sigmoids of small organs would otherwise first fall
    to zero, where Dice has next to no gradient. A class that a case does not annotate gets exactly zero gradient.
    """

    def forward(self, logits: torch.Tensor, target: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """logits, target (B, K, X, Y, Z); w (B, K), with at least one annotated class in every case."""
        logits, target = logits.float(), target.float()
        weight = self.weight_of_class(target)
        bce = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none").mean((2, 3, 4))
        per_class = bce + soft_dice(torch.sigmoid(logits), target)
        return ((per_class * w).sum(1) / w.sum(1)).mean()

    def weight_of_class(self, target: torch.Tensor) -> torch.Tensor:
        """Weight (B, K, 1, 1, 1) of a class's voxels in the cross-entropy."""
        size = target.sum((2, 3, 4), keepdim=True)
        return ((target[0, 0].numel() - size) / size.clamp_min(1)).sqrt().clamp_min(1)
