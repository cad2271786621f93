"""Surface metrics, by MONAI: the normalised surface Dice counts areas as the published implementation does."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import bounding_box_to_slice, get_bbox_from_mask, pad_bbox

from fsefs_nnunet.errors import InputError

TOLERANCE_MM = 2.0


def require_monai() -> None:
    """Raises InputError without MONAI."""
    if find_spec("monai") is None:
        raise InputError('Surface metrics need MONAI: pip install "fsefs_nnunet[monai]".')


def surface_metrics(
    prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...], tolerance_mm: float = TOLERANCE_MM
) -> tuple[float, float]:
    """Normalised surface Dice (arXiv 1809.04430) and 95th percentile of the Hausdorff distance in mm.

    If only one mask is empty, they are 0 and the volume's diagonal, the largest possible distance; if both are, NaN.

    Args:
        prediction, reference: boolean volumes of one shape.
        spacing: mm per axis.
        tolerance_mm: distance up to which surfaces agree in the surface Dice.

    Raises:
        InputError: without MONAI.
    """
    require_monai()
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    if not prediction.any() and not reference.any():
        return float("nan"), float("nan")
    if not prediction.any() or not reference.any():
        return 0.0, float(np.linalg.norm(np.array(prediction.shape) * spacing))
    # MONAI's time grows with the volume, and it needs only the organs and one voxel around them
    box = pad_bbox(get_bbox_from_mask(prediction | reference), 1, prediction.shape)
    organs = bounding_box_to_slice(box)
    masks = [torch.from_numpy(mask[organs])[None, None] for mask in (prediction, reference)]
    options = {"include_background": True, "spacing": list(map(float, spacing))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI warns about an argument that it passes itself
        surface_dice = compute_surface_dice(*masks, [tolerance_mm], use_subvoxels=True, **options)
        distance = compute_hausdorff_distance(*masks, percentile=95, **options)
    return float(surface_dice), float(distance)
