from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from fsefs_nnunet.cases.headers import read_header
from fsefs_nnunet.datasets.slices import read_masks
from fsefs_nnunet.datasets.source import Case, Labels
from fsefs_nnunet.datasets.sources.chaos import CHAOS
from fsefs_nnunet.datasets.volumes import OtherGrid
from fsefs_nnunet.errors import InputError

# Grey values, first and last: the ranges of the organisers, widened to 12 on either side of the value in labels.json.
GREY = {"liver": (51, 75), "kidney_right": (110, 138), "kidney_left": (175, 201), "spleen": (240, 255)}


class ChaosT2SPIR(CHAOS):
    """MR part of CHAOS (zenodo.org/records/3431873), T2 SPIR: four organs, one PNG of grey values per slice.

    Train_Sets/MR/1/T2SPIR/DICOM_anon/*.dcm, Train_Sets/MR/1/T2SPIR/Ground/*.png; Test_Sets/MR without masks. A mask has
    its slice's name (IMG-0002-00001.dcm: IMG-0002-00001.png).
    """

    name = "CHAOS_T2SPIR"
    layout = "Train_Sets/MR/1/T2SPIR/DICOM_anon/*.dcm and Train_Sets/MR/1/T2SPIR/Ground/*.png"
    scans = "MR/*/T2SPIR/DICOM_anon"
    series = {".": "MR T2 SPIR"}

    def label(self, case: Case, image: nib.Nifti1Image, wanted: dict[str, int], other_grid: OtherGrid) -> Labels:
        masks = read_masks(case.label, case.image / next(iter(self.series)), image.shape)
        values = np.full(2**16, -1, np.int16)  # by grey value; -1: of no organ
        values[0] = 0
        for organ, (first, last) in GREY.items():
            values[first : last + 1] = self.row["labels"][organ]
        data = values[masks.data]
        if (data < 0).any():
            x, y, z = np.argwhere(data < 0)[0]
            expected = ", ".join(f"{first} to {last} {organ}" for organ, (first, last) in GREY.items())
            raise InputError(
                f"{masks.files[z]} has the grey value {masks.data[x, y, z]}: unpack it again; expected 0, {expected}."
            )
        return Labels(image, data)


class ChaosT1DUAL(ChaosT2SPIR):
    """T1 DUAL, both phases as channels: MR/1/T1DUAL/DICOM_anon/InPhase and OutPhase, MR/1/T1DUAL/Ground.

    The masks have the names of the in-phase slices; those of the out-of-phase slices are odd where these are even, in
    the same order.
    """

    name = "CHAOS_T1DUAL"
    layout = "Train_Sets/MR/1/T1DUAL/DICOM_anon/InPhase/*.dcm, OutPhase/*.dcm and Train_Sets/MR/1/T1DUAL/Ground/*.png"
    scans = "MR/*/T1DUAL/DICOM_anon"
    series = {"InPhase": "MR T1 in phase", "OutPhase": "MR T1 out of phase"}

    def image_files(self, image: Path, scratch: Path) -> list[Path]:
        present = [phase for phase in ("InPhase", "OutPhase") if (image / phase).is_dir()]
        missing = [phase for phase in self.series if phase not in present]
        if missing:
            instead = f", or convert {ChaosT1DUAL.name}_{present[0]}" if present else ""
            raise InputError(f"{image} has no {missing[0]}: unpack it again{instead}.")
        files = super().image_files(image, scratch)
        first, *others = [read_header(file) for file in files]
        if not all(header.is_on_grid_of(first) for header in others):
            raise InputError(
                f"{image}: InPhase and OutPhase do not lie on one grid: unpack both again, or convert one of them "
                f"({ChaosT1DUAL.name}_InPhase)."
            )
        return files


class ChaosInPhase(ChaosT1DUAL):
    """Only T1 in phase."""

    name = "CHAOS_T1DUAL_InPhase"
    series = {"InPhase": "MR T1 in phase"}


class ChaosOutPhase(ChaosT1DUAL):
    """Only T1 out of phase."""

    name = "CHAOS_T1DUAL_OutPhase"
    series = {"OutPhase": "MR T1 out of phase"}
