from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from fsefs_nnunet.datasets.source import Case, Labels, Source, natural
from fsefs_nnunet.datasets.volumes import OtherGrid
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.labels import values_in


class CHAOS(Source):
    """CT part of CHAOS (zenodo.org/records/3431873): livers, as DICOM slices with one PNG mask per slice.

    Train_Sets/CT/1/DICOM_anon/*.dcm, Train_Sets/CT/1/Ground/liver_GT_000.png; Test_Sets/CT without masks. Slices and
    masks belong together in the order of their names (i0000,0000b.dcm: liver_GT_000.png); where a slice lies in the
    patient says its header alone, so both are sorted by position afterwards. A PNG's rows are the slice's rows.
    """

    name = "CHAOS"
    layout = "Train_Sets/CT/1/DICOM_anon/*.dcm and Train_Sets/CT/1/Ground/*.png"

    @staticmethod
    def _patients(folder: Path) -> list[Path]:
        found = {path.parent for path in folder.rglob("DICOM_anon") if path.parent.parent.name == "CT"}
        return sorted(found, key=lambda path: natural(path.name))

    def cases(self, folder: Path) -> list[Case]:
        patients = [p for p in self._patients(folder) if "Test_Sets" not in p.parts]
        return [
            Case(f"CHAOS_CT_{p.name}", p / "DICOM_anon", p / "Ground" if (p / "Ground").exists() else None)
            for p in patients
        ]

    def test_images(self, folder: Path) -> list[Case]:
        patients = [p for p in self._patients(folder) if "Test_Sets" in p.parts]
        return [Case(f"CHAOS_CT_{p.name}", p / "DICOM_anon", None) for p in patients]

    def image_files(self, image: Path, scratch: Path) -> list[Path]:
        files, order = _slices(image)
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames([str(files[i]) for i in order])
        target = scratch / f"{image.parent.name}.nii.gz"
        try:
            sitk.WriteImage(reader.Execute(), str(target))
        except RuntimeError as error:
            raise InputError(f"{image} cannot be read: {_last_line(error)}.") from error
        return [target]

    def label(self, case: Case, image: nib.Nifti1Image, wanted: dict[str, int], other_grid: OtherGrid) -> Labels:
        files, order = _slices(case.image)
        masks = sorted(case.label.glob("[!.]*.png"), key=lambda file: natural(file.name))
        if len(masks) != len(files):
            raise InputError(f"{case.label} has {len(masks)} masks for {len(files)} slices: unpack it again.")
        try:
            stack = np.stack([sitk.GetArrayFromImage(sitk.ReadImage(str(masks[i]))) for i in order])
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{case.label} holds a mask that cannot be read: {_last_line(error)}.") from error
        data = stack.transpose(2, 1, 0)  # slices, rows, columns -> NIfTI's order
        if data.shape != image.shape:
            raise InputError(f"{case.label} has masks of {data.shape[:2]} voxels for slices of {image.shape[:2]}.")
        if not values_in(data) <= {0, 1, 255}:
            raise InputError(
                f"{case.label} holds values other than 0 and 255: the CT masks are wanted, not the MR ones."
            )
        return Labels(image, (data > 0).astype(np.uint8))


def _slices(folder: Path) -> tuple[list[Path], np.ndarray]:
    """DICOM files by name, and their order along the normal of the slices.

    Raises:
        InputError: for files that cannot be read, and for gaps between slices.
    """
    files = sorted(folder.glob("[!.]*.dcm"), key=lambda file: natural(file.name))
    reader, positions = sitk.ImageFileReader(), []
    for file in files:
        try:
            reader.SetFileName(str(file))
            reader.ReadImageInformation()
        except RuntimeError as error:
            raise InputError(f"{file} cannot be read: {_last_line(error)}.") from error
        normal = np.array(reader.GetDirection()).reshape(3, 3)[:, 2]
        positions.append(float(np.dot(reader.GetOrigin(), normal)))
    order = np.argsort(positions)
    steps = np.diff(np.array(positions)[order])
    if len(files) < 2 or steps.min() <= 0 or steps.max() > 1.5 * np.median(steps):
        raise InputError(
            f"{folder} is no whole series: {len(files)} slices with gaps or in one place. Unpack it again."
        )
    return files, order


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
