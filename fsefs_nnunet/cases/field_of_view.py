"""The spacing at which a volume is at most a few of a backbone's windows long."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SPACINGS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)  # mm, the same along all axes
MOST_WINDOWS = 2


def fitting_spacing(extent: Sequence[float], own: Sequence[float], window: Sequence[int]) -> float | None:
    """The finest of SPACINGS at which a volume is at most MOST_WINDOWS windows long on each axis, else the coarsest.

    Args:
        extent: of the volume, in mm per axis.
        own: its spacing, in mm per axis.
        window: the backbone's largest, in voxels per axis.

    Returns:
        mm; None if the volume fits at its own spacing, or would be no shorter at the one found.
    """

    def windows(spacing: float | Sequence[float]) -> float:
        return np.max(np.rint(np.divide(extent, spacing)) / window)  # nnU-Net rounds shapes, too

    if windows(own) <= MOST_WINDOWS:
        return None
    found = next((mm for mm in SPACINGS if windows(mm) <= MOST_WINDOWS), SPACINGS[-1])
    return found if windows(found) < windows(own) else None
