"""Voxels of a label map that show foreground, or are annotated at all."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np


class ShownVoxels:
    """Sequence of the voxels of a label map (X, Y, Z) that show something, in C order.

    A whole body has a hundred million annotated voxels. Instead of listing them, this keeps one count for each plane
    along the first axis, and searches a plane when one of its voxels is requested.
    """

    def __init__(self, labels: np.ndarray, shown: Callable[[np.ndarray], np.ndarray]):
        """shown: gives the mask of the voxels that count in (a plane of) `labels`."""
        self.labels, self.shown = labels, shown

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([np.count_nonzero(self.shown(plane)) for plane in self.labels])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        """Coordinates (3,) of voxel number `index`."""
        x = int(np.searchsorted(self._ends, index, "right"))
        in_plane = np.flatnonzero(self.shown(self.labels[x]))[index - (self._ends[x - 1] if x else 0)]
        return np.array([x, *np.unravel_index(in_plane, self.labels.shape[1:])])

    def at_most(self, number: int) -> np.ndarray:
        """Coordinates (n, 3) of all voxels, or, if there are more than `number`, of every second, third, ... one."""
        step, found = max(1, -(-len(self) // number)), []
        for x, end in enumerate(self._ends):
            start = self._ends[x - 1] if x else 0
            which = np.arange(-(-start // step) * step, end, step) - start
            if len(which):
                in_plane = np.flatnonzero(self.shown(self.labels[x]))[which]
                places = np.unravel_index(in_plane, self.labels.shape[1:])
                found.append(np.stack([np.full(len(which), x), *places], 1))
        return np.concatenate(found) if found else np.empty((0, 3), int)


def annotated_in(labels: np.ndarray, ignore_label: int) -> np.ndarray:
    """Mask of the voxels of a label map that lie in the image and are not ignored."""
    return (labels >= 0) & (labels != ignore_label)


def foreground_of(labels: np.ndarray, ignore_label: int | None) -> np.ndarray:
    """Mask of the voxels of a label map that show a class; nnU-Net's ignore label, the highest value, is not one."""
    return labels > 0 if ignore_label is None else (labels > 0) & (labels != ignore_label)
