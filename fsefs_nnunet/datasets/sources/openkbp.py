from __future__ import annotations

from io import BytesIO
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

from fsefs_nnunet.datasets.source import Case, Labels, Source, natural
from fsefs_nnunet.datasets.volumes import OtherGrid
from fsefs_nnunet.errors import InputError

SHAPE = (128, 128, 128)
FILES = {
    "brainstem": "Brainstem.csv",
    "spinal_cord": "SpinalCord.csv",
    "parotid_gland_right": "RightParotid.csv",
    "parotid_gland_left": "LeftParotid.csv",
    "mandible": "Mandible.csv",
}


class OpenKBP(Source):
    """Head-and-neck CT of radiotherapy plans (github.com/ababier/open-kbp, doi.org/10.1002/mp.14845).

    provided-data/train-pats/pt_1 holds ct.csv, voxel_dimensions.csv and one file per structure that was drawn. Files
    are sparse: a row is an index into 128 x 128 x 128 voxels whose axes run to the back, the left and the feet, and in
    ct.csv HU + 1024; voxels without a row are 0. Where structures overlap, the class later in the list wins. All
    patients have structures, those of test-pats too. The files do not say where the origin lies: it is voxel 0.
    """

    name = "OpenKBP"
    layout = "provided-data/train-pats/pt_1/ct.csv, voxel_dimensions.csv, Brainstem.csv ..."

    def cases(self, folder: Path) -> list[Case]:
        patients = sorted((p for p in folder.rglob("pt_*") if p.is_dir()), key=lambda path: natural(path.name))
        found = []
        for patient in patients:
            image = patient / "ct.csv"
            drawn = any((patient / file).exists() for file in FILES.values())
            found.append(Case(patient.name, image if image.exists() else None, patient if drawn else None))
        return [case for case in found if case.image or case.label]

    def image_files(self, image: Path, scratch: Path) -> list[Path]:
        spacing = _spacing(image.with_name("voxel_dimensions.csv"))
        rows = _rows(image)
        if not rows["data"].between(0, 2**15 - 1).all():
            raise InputError(f"{image} has rows without a value, or with one that is not HU + 1024: download it again.")
        volume = np.full(SHAPE, -1024, np.int16)
        volume.reshape(-1)[rows["index"]] = np.rint(rows["data"]) - 1024
        target = scratch / "ct.nii.gz"
        to_back, to_left, to_feet = spacing
        nib.save(nib.Nifti1Image(_turned(volume), np.diag([to_left, to_back, to_feet, 1])), target)
        return [target]

    def label(self, case: Case, image: nib.Nifti1Image, wanted: dict[str, int], other_grid: OtherGrid) -> Labels:
        data, overlap = np.zeros(SHAPE, np.uint8), 0
        for name, value in wanted.items():
            file = case.label / FILES[name]
            rows = _rows(file) if file.exists() else ()
            if not len(rows):
                raise InputError(
                    f"{file} is {'empty' if file.exists() else 'missing'}: the patient has no contour of {name}; "
                    "--classes without it keeps the case."
                )
            overlap += int(np.count_nonzero(data.reshape(-1)[rows["index"]]))
            data.reshape(-1)[rows["index"]] = value
        return Labels(image, _turned(data), overlap=overlap)


def _turned(volume: np.ndarray) -> np.ndarray:
    """Axes to the back, the left and the feet -> axes to the right, the front and the head."""
    return np.ascontiguousarray(volume[::-1, ::-1, ::-1].transpose(1, 0, 2))


def _rows(file: Path) -> pd.DataFrame:
    """Columns "index" and "data", which is NaN in masks. Raises InputError for anything but a whole sparse file."""
    content = file.read_bytes()
    if not content.endswith(b"\n"):
        raise InputError(f"{file} ends in the middle of a line: download it again.")
    try:
        columns = {"index": "int64", "data": "float64"}
        rows = pd.read_csv(BytesIO(content), header=0, names=list(columns), dtype=columns, index_col=False)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{file} is not a list of voxels ({error}): download it again.") from error
    outside = rows["index"][~rows["index"].between(0, np.prod(SHAPE) - 1)]
    if len(outside):
        raise InputError(
            f"{file} has the index {outside.iloc[0]}, beyond the {np.prod(SHAPE)} voxels of 128 x 128 x 128: download "
            "it again."
        )
    return rows


def _spacing(file: Path) -> np.ndarray:
    """mm to the back, the left and the feet."""
    if not file.exists():
        raise InputError(f"{file} is missing: download the whole folder again.")
    try:
        spacing = np.array(file.read_text("utf-8").split(), float)
    except ValueError:
        spacing = np.zeros(0)
    if spacing.shape != (3,) or not (np.isfinite(spacing) & (spacing > 0)).all():
        raise InputError(f"{file} does not hold three spacings in mm: download it again.")
    return spacing
