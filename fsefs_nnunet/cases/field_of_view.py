"""The spacing at which a backbone's windows show as much of a volume as they did in its training."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np

SPACINGS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)  # mm, the same along all axes
MOST_WINDOWS = 2


def fitting_spacing(
    extent: Sequence[float],
    own: Sequence[float],
    window: Sequence[int],
    field_of_view_mm: tuple[float, float] | None = None,
) -> float | None:
    """The finest of SPACINGS at which a volume is at most MOST_WINDOWS windows long on each axis, else the coarsest.

    If it is known how much the windows of the training showed, a coarser spacing is returned where a window needs it to
    show the middle of that range.

    Args:
        extent: of the volume, in mm per axis.
        own: its spacing, in mm per axis.
        window: the backbone's largest, in voxels per axis.
        field_of_view_mm: the range that the windows of its training showed along an axis, (from, to).

    Returns:
        mm; None if the volume fits at its own spacing, or would be no shorter at the one found.
    """

    def windows(spacing: float | Sequence[float]) -> float:
        return np.max(np.rint(np.divide(extent, spacing)) / window)  # nnU-Net rounds shapes, too

    if windows(own) <= MOST_WINDOWS:
        return None
    found = next((mm for mm in SPACINGS if windows(mm) <= MOST_WINDOWS), SPACINGS[-1])
    if field_of_view_mm is not None and max(extent) >= middle_of(field_of_view_mm):
        found = max(found, spacing_of_view(window, field_of_view_mm))
    return found if windows(found) < windows(own) else None


def middle_of(field_of_view_mm: tuple[float, float]) -> float:
    return sqrt(field_of_view_mm[0] * field_of_view_mm[1])


def spacing_of_view(window: Sequence[int], field_of_view_mm: tuple[float, float]) -> float:
    """The one of SPACINGS at which the field of view of `window` is closest to the middle of the training's range."""
    return min(SPACINGS, key=lambda mm: abs(mm * max(window) - middle_of(field_of_view_mm)))
