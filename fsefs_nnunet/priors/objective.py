"""Eq. (3) of FSEFT (arXiv 2303.17051), the loss of a training and of the adaptation to a volume."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fsefs_nnunet.device import reduced_precision
from fsefs_nnunet.methods.network import AdaptedNetwork


def objective(
    network: AdaptedNetwork,
    features: torch.Tensor,
    target: torch.Tensor,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    weight: float,
    penalty: Callable[[], torch.Tensor | None],
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """L_SEG(support) + lambda * L_TI(query).

    Args:
        features, target: of support crops, (B, C, x, y, z) and as `loss` takes it.
        loss: L_SEG of logits and targets.
        weight: lambda.
        penalty: gives L_TI, averaged over the classes; None while there is none.
        kept: channels that the step sees, see AdaptedNetwork.adapt.

    Returns:
        The sum, and L_SEG alone.
    """
    with reduced_precision(features.device):
        segmentation_loss = loss(network.adapt(features, kept), target)
    value = penalty()
    return segmentation_loss if value is None else segmentation_loss + weight * value, segmentation_loss
