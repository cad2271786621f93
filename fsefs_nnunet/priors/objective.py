"""Eq. (3) of FSEFT (arXiv 2303.17051), the loss of a training and of the adaptation to a volume."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fsefs_nnunet.device import reduced_precision
from fsefs_nnunet.features.map_crops import MapCrops
from fsefs_nnunet.methods.network import AdaptedNetwork


def support_loss(
    network: AdaptedNetwork,
    features: torch.Tensor | MapCrops,
    target: torch.Tensor,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """L_SEG of support crops.

    Args:
        features, target: as AdaptedNetwork.adapt and `loss` take them.
        loss: L_SEG of logits and targets.
        kept: channels that the step sees, see AdaptedNetwork.adapt.
    """
    with reduced_precision(features.device):
        return loss(network.adapt(features, kept), target)


def objective(segmentation_loss: torch.Tensor, penalty: torch.Tensor | None, weight: float) -> torch.Tensor:
    """L_SEG(support) + lambda * L_TI(query).

    Args:
        penalty: L_TI, averaged over the classes; None if there is none.
        weight: lambda.
    """
    return segmentation_loss if penalty is None else segmentation_loss + weight * penalty
