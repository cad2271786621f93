"""The features of one volume, which can be read more than once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from fsefs_nnunet.features.arrays import new_array
from fsefs_nnunet.features.entry import Entry
from fsefs_nnunet.features.layout import whole_layout
from fsefs_nnunet.features.packing import Boxes, Overflow, Packing
from fsefs_nnunet.features.tiling import Tiling
from fsefs_nnunet.features.windows import Slab, run_windows


class Consumer(Protocol):
    """Receives the slabs of a volume."""

    def add(self, slab: Slab) -> None:
        """Slabs come in order; each is valid until the next one."""


class VolumeFeatures:
    """A backbone's maps of a preprocessed image; the first look runs the backbone, later ones read a temporary file.

    The file holds the maps in float16, each at its own resolution. Without room for it, or if a feature is too large
    for float16, every look runs the backbone.
    """

    def __init__(
        self,
        backbone: nn.Module,
        image: np.ndarray,
        window: Sequence[int],
        device: torch.device,
        keep_in: Path | None = None,
        cap_gb: float | None = None,
    ):
        """
        Args:
            image: (channels, X, Y, Z).
            window: of the backbone (X, Y, Z).
            keep_in: folder of the temporary file; None: no file.
            cap_gb: GB that the file may take; it never takes more than half of the free disk.
        """
        self.backbone, self.image, self.device = backbone, torch.from_numpy(np.asarray(image, np.float32)), device
        self.tiling = Tiling.of(image.shape[1:], window, backbone.maps)
        self.packing = Packing(whole_layout(image.shape[1:]), self.tiling)
        self.windows = 0  # that went through the backbone
        self.arrays: list[list[np.ndarray]] | None = None
        self.file = None
        if keep_in is not None and self._fits(keep_in, cap_gb):
            self.file = keep_in / "features.npy"

    @classmethod
    def stored(cls, entry: Entry, device: torch.device) -> VolumeFeatures:
        """The features of a whole volume in the feature bank."""
        made = cls.__new__(cls)
        made.tiling, made.packing, made.device = entry.packing.tiling, entry.packing, device
        made.arrays, made.file, made.windows = entry.arrays, None, 0
        return made

    @property
    def only_look(self) -> bool:
        """Whether this would be the first look, and nothing would be kept of it."""
        return self.arrays is None and self.file is None

    def _fits(self, folder: Path, cap_gb: float | None) -> bool:
        needed = 2 * self.packing.size
        return needed < shutil.disk_usage(folder).free / 2 and (cap_gb is None or needed <= cap_gb * 1e9)

    def look(self, *consumers: Consumer) -> None:
        """Pass all slabs to each of `consumers`. Raises InputError as run_windows does."""
        for slab in self.slabs():
            for consumer in consumers:
                consumer.add(slab)

    def slabs(self) -> Iterator[Slab]:
        """The slabs in order, on the device, or where they were blended; each valid until the next one."""
        if self.arrays is not None:
            for slab in self.packing.slabs(self.arrays):
                yield Slab(slab.first, slab.stop, [m.to(self.device) for m in slab.maps])
            return
        keeping = flat = None
        if self.file is not None:
            with suppress(OSError):  # the disk is full: the next look runs the backbone again
                flat = new_array(self.file, self.packing.size, np.float16)
                keeping = Boxes(self.packing, flat)
        for slab in run_windows(self.backbone, self.image, self.tiling, self.device):
            if keeping is not None:
                try:
                    keeping.add(slab)
                except Overflow:
                    keeping = None
            yield slab
        self.windows += self.tiling.num_windows
        if keeping is not None:
            self.arrays = self.packing.unpack(flat)

    def forget(self) -> None:
        """Remove the temporary file."""
        if self.file is not None:
            self.arrays = None
            self.file.unlink(missing_ok=True)
