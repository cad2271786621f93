"""An entry of the feature bank: what it depends on, and what it holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from fsefs_nnunet.features.layout import Layout
from fsefs_nnunet.features.map_crops import MapCrops
from fsefs_nnunet.features.packing import Array, Packing

LABELS = ".labels.npy"  # ends the name of the file with a view's label map


@dataclass(frozen=True)
class EntryKey:
    """What an entry depends on besides its files."""

    recipe: dict
    case: str
    layout: Layout
    made: dict

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def name(self) -> str:
        return f"{self.case}_{short_hash(self.to_json())}"


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def stamp_of(file: Path) -> list[int]:
    """Size in bytes and modification time in ns of a file."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


@dataclass(frozen=True)
class Entry:
    """Stored features of a volume.

    flat: all that `packing` keeps, memory-mapped, or a tensor on a device.
    sums, square_sums: (C,) over the volume, None if no request needed them.
    labels: label map (1, X, Y, Z) of a view.
    precision: that the backbone ran in, for the record.
    """

    packing: Packing
    flat: Array
    sums: np.ndarray | None = None
    square_sums: np.ndarray | None = None
    labels: np.ndarray | None = None
    precision: str = ""

    @cached_property
    def arrays(self) -> list[list[Array]]:
        """(C, x, y, z) by box and map."""
        return self.packing.unpack(self.flat)

    def on(self, device: torch.device) -> Entry:
        """The entry with its features in the memory of `device`."""
        return replace(self, flat=torch.from_numpy(np.array(self.flat)).to(device))

    @property
    def layout(self) -> Layout:
        return self.packing.layout

    def crop(self, start: Sequence[int], size: Sequence[int]) -> MapCrops:
        """The crop that starts at voxel `start` of the volume; IndexError if no box contains it."""
        return self.packing.crop(self.arrays, start, size)

    @property
    def blocks(self) -> torch.Tensor:
        """(C, *blocks), averages over the blocks of a pooled layout."""
        return torch.as_tensor(self.arrays[0][0])
