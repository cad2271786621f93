from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from fsefs_nnunet.datasets.source import Case, Labels, Source
from fsefs_nnunet.datasets.volumes import AS_IT_IS, OtherGrid, integers, on_grid, read_volume
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.labels import values_in


class TotalSegmentator(Source):
    """TotalSegmentator's CT dataset, v1 (104 masks) and v2 (117 masks; doi.org/10.5281/zenodo.6802613).

    s0000/ct.nii.gz and one mask per class, s0000/segmentations/liver.nii.gz, names as in the project's
    totalsegmentator/map_to_binary.py ("total_v1", "total"). Where masks overlap, the class later in the list wins.
    """

    name = "TotalSegmentator"
    layout = "s0000/ct.nii.gz and s0000/segmentations/liver.nii.gz ..."

    def table(self, folder: Path) -> dict[str, int]:
        version = "v2" if next(folder.rglob("segmentations/heart.nii.gz"), None) else "v1"
        return {name: i for i, name in enumerate(self.row[version], 1)}

    def cases(self, folder: Path) -> list[Case]:
        subjects = {path.parent for path in (*folder.rglob("ct.nii.gz"), *folder.rglob("segmentations"))}
        parts = [(s.name, s / "ct.nii.gz", s / "segmentations") for s in sorted(subjects)]
        return [Case(name, *(path if path.exists() else None for path in paths)) for name, *paths in parts]

    def label(self, case: Case, image: nib.Nifti1Image, wanted: dict[str, int], other_grid: OtherGrid) -> Labels:
        merged, overlap, how = np.zeros(image.shape[:3], np.uint8), 0, AS_IT_IS
        for name, value in wanted.items():
            file = case.label / f"{name}.nii.gz"
            volume = read_volume(file)
            placed, of_mask = on_grid(volume, image, file, other_grid)
            data = integers(placed, file)
            if not values_in(data) <= {0, 1}:
                raise InputError(f"{file} holds values other than 0 and 1: a mask is expected.")
            overlap += int(np.count_nonzero(merged[data == 1]))
            merged[data == 1] = value
            how = how if of_mask == AS_IT_IS else of_mask
        return Labels(image, merged, how, overlap)
