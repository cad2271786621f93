from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from fsefs_nnunet.datasets.slices import read_masks, write_volume
from fsefs_nnunet.datasets.source import Case, Labels, Source, natural
from fsefs_nnunet.datasets.volumes import OtherGrid
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.labels import values_in


class CHAOS(Source):
    """CT part of CHAOS (zenodo.org/records/3431873): livers, as DICOM slices with one PNG mask per slice.

    Train_Sets/CT/1/DICOM_anon/*.dcm, Train_Sets/CT/1/Ground/liver_GT_000.png; Test_Sets/CT without masks. Slices and
    masks belong together in the order of their names (i0000,0000b.dcm: liver_GT_000.png).
    """

    name = "CHAOS"
    layout = "Train_Sets/CT/1/DICOM_anon/*.dcm and Train_Sets/CT/1/Ground/*.png"
    scans = "CT/*/DICOM_anon"  # where slices lie, * is the patient
    series = {".": "CT"}  # folders of slices in it, and the channels that they are

    def channels(self, folder: Path) -> dict[int, str]:
        return dict(enumerate(self.series.values()))

    def cases(self, folder: Path) -> list[Case]:
        return self._listed(folder, test=False)

    def test_images(self, folder: Path) -> list[Case]:
        return self._listed(folder, test=True)

    def _listed(self, folder: Path, test: bool) -> list[Case]:
        found = []
        for scan in folder.rglob("DICOM_anon"):
            if scan.match(self.scans) and ("Test_Sets" in scan.parts) == test:
                modality, patient, *_ = scan.parts[-len(Path(self.scans).parts) :]
                masks = scan.parent / "Ground"
                label = masks if masks.exists() and not test else None
                found.append(Case(f"CHAOS_{modality}_{patient}", scan, label))
        return sorted(found, key=lambda case: natural(case.name))

    def image_files(self, image: Path, scratch: Path) -> list[Path]:
        return [write_volume(image / part, scratch / f"{i}.nii.gz") for i, part in enumerate(self.series)]

    def label(self, case: Case, image: nib.Nifti1Image, wanted: dict[str, int], other_grid: OtherGrid) -> Labels:
        masks = read_masks(case.label, case.image, image.shape)
        if not values_in(masks.data) <= {0, 1, 255}:
            raise InputError(
                f"{case.label} holds values other than 0 and 255: the CT masks are expected, not the MR ones."
            )
        return Labels(image, (masks.data > 0).astype(np.uint8))
