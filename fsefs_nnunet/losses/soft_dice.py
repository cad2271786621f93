"""The published segmentation loss."""

from __future__ import annotations

import torch
from torch import nn


def soft_dice(probabilities: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 - (2 sum(p y) + 1) / (sum p + sum y + 1) per volume and class: (B, K, X, Y, Z) twice -> (B, K)."""
    p, y = probabilities.flatten(2), target.flatten(2)
    return 1 - (2 * (p * y).sum(2) + 1) / (p.sum(2) + y.sum(2) + 1)


class SoftDiceLoss(nn.Module):
    """L_SEG as published (FSEFT, Eq. 3): soft Dice per class and crop, averaged; background is not a class.

    Takes nnU-Net's targets: a label map (B, 1, X, Y, Z) for softmax outputs with background in channel 0, or one
    channel per region (B, K, X, Y, Z) for sigmoid outputs, followed by a channel of ignored voxels if there is an
    ignore label.
    """

    def __init__(self, has_regions: bool, ignore_label: int | None = None):
        super().__init__()
        self.has_regions = has_regions
        self.ignore_label = ignore_label

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """logits (B, C, X, Y, Z) -> scalar."""
        logits = logits.float()
        keep = None
        if self.has_regions:
            probabilities = torch.sigmoid(logits)
            if self.ignore_label is not None:
                keep, target = 1 - target[:, -1:].float(), target[:, :-1]
        else:
            probabilities = torch.softmax(logits, 1)[:, 1:]
            if self.ignore_label is not None:
                keep = (target != self.ignore_label).float()
            classes = torch.arange(1, logits.shape[1], device=logits.device).view(1, -1, 1, 1, 1)
            target = target == classes
        target = target.float()
        if keep is not None:
            probabilities, target = probabilities * keep, target * keep
        return soft_dice(probabilities, target).mean()
