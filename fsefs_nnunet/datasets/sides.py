"""Right and left of a label that names both organs of a pair."""

from __future__ import annotations

import cc3d
import numpy as np


def split_sides(mask: np.ndarray, affine: np.ndarray) -> np.ndarray | None:
    """1 for the right and 2 for the left organ of `mask`, (X, Y, Z), uint8; None if it cannot be decided.

    The organs are the two largest components, told apart along the patient's axis: `affine` maps voxels to mm, the
    first coordinate grows to the patient's right (NIfTI). Fragments go to the organ whose centre is nearer.
    Not decided: the second component has under a tenth of the first's voxels (one organ, or both grown together), or
    the line between the centres lies more than 60 degrees off the left-right axis (two pieces of one side).
    """
    components = cc3d.connected_components(mask.astype(np.uint8), connectivity=6)
    statistics = cc3d.statistics(components)
    sizes = statistics["voxel_counts"].astype(np.int64)
    sizes[0] = 0
    if len(sizes) < 3:
        return None
    second, first = np.argsort(sizes)[-2:]
    centres = statistics["centroids"] @ affine[:3, :3].T + affine[:3, 3]
    line = centres[first] - centres[second]
    if sizes[second] < 0.1 * sizes[first] or abs(line[0]) < 0.5 * np.linalg.norm(line):
        return None
    right, left = (first, second) if line[0] > 0 else (second, first)
    to_right, to_left = (np.linalg.norm(centres - centres[organ], axis=1) for organ in (right, left))
    side = np.where(to_right <= to_left, 1, 2).astype(np.uint8)
    side[0] = 0
    return side[components]
