"""A network over the windows of a volume."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from torch import nn

from fsefs_nnunet.backbones.maps import at_full_resolution

TILE_STEP_SIZE = 0.5


@torch.no_grad()
def extract_features(
    network: nn.Module, image: torch.Tensor, patch_size: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """Features of a whole volume: windows as nnU-Net's predictor places and weighs them, one at a time.

    The predictor blends logits, this blends features; for a linear probe that is the same.

    Args:
        network: gives a list of feature maps and has `out_channels`, those of all of them, as FrozenBackbone does.
        image: preprocessed, (channels, X, Y, Z).

    Returns:
        (C, X, Y, Z) float32 on the CPU: 4 bytes a voxel and channel, the most memory that filling a bank takes.
    """
    padded, revert = pad_nd_image(image, patch_size, "constant", {"value": 0}, True, None)
    starts = window_starts(image.shape[1:], patch_size)
    windows = [(slice(None), *(slice(a, a + n) for a, n in zip(start, patch_size))) for start in starts]

    def features_of(window: tuple[slice, ...]) -> torch.Tensor:
        return at_full_resolution(network(padded[window][None].to(device)), patch_size)[0].float().cpu()

    if len(windows) == 1:  # nothing to blend
        return features_of(windows[0])[(slice(None), *revert[1:])]
    gaussian = compute_gaussian(
        tuple(patch_size), sigma_scale=1.0 / 8, value_scaling_factor=10, device=torch.device("cpu")
    ).float()
    features = torch.zeros((network.out_channels, *padded.shape[1:]))
    weight = torch.zeros(padded.shape[1:])
    for window in windows:
        features[window].addcmul_(features_of(window), gaussian)
        weight[window[1:]] += gaussian
    features /= weight
    return features[(slice(None), *revert[1:])]


def window_starts(shape: Sequence[int], patch_size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """First voxels of the windows over a volume (X, Y, Z), padded to a window where it is smaller."""
    return list(product(*compute_steps_for_sliding_window(np.maximum(shape, patch_size), patch_size, TILE_STEP_SIZE)))
