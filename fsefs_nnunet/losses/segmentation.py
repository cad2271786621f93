"""L_SEG as the plans name it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn

from fsefs_nnunet.losses.soft_dice import SoftDiceLoss

if TYPE_CHECKING:
    from nnunetv2.utilities.label_handling.label_handling import LabelManager


def segmentation_loss(name: str, label_manager: LabelManager, batch_dice: bool) -> nn.Module:
    """L_SEG of logits (B, C, X, Y, Z) and nnU-Net's targets (B, 1 or regions, X, Y, Z), without deep supervision.

    Args:
        name: "soft_dice", the published loss, or "nnunet", what nnU-Net's trainer builds for such labels.
        batch_dice: of the configuration.
    """
    ignore_label = label_manager.ignore_label
    if name == "soft_dice":
        return SoftDiceLoss(label_manager.has_regions, ignore_label)
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": label_manager.has_regions, "ddp": False}
    if label_manager.has_regions:
        return DC_and_BCE_loss(
            {}, dice, use_ignore_label=ignore_label is not None, dice_class=MemoryEfficientSoftDiceLoss
        )
    return DC_and_CE_loss(
        dice, {}, weight_ce=1, weight_dice=1, ignore_label=ignore_label, dice_class=MemoryEfficientSoftDiceLoss
    )
