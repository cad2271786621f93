"""Series of DICOM slices, and PNG masks of the slices."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from fsefs_nnunet.datasets.source import natural
from fsefs_nnunet.errors import InputError


class Masks(NamedTuple):
    """PNG masks in the order of their slices' positions; data: (X, Y, Z), a PNG's rows are the slice's rows."""

    files: list[Path]
    data: np.ndarray


def write_volume(folder: Path, target: Path) -> Path:
    """Write the series of DICOM slices in `folder` as a NIfTI file; returns `target`.

    Raises:
        InputError: for files that cannot be read, and for gaps between slices.
    """
    files, order = _slices(folder)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(files[i]) for i in order])
    try:
        sitk.WriteImage(reader.Execute(), str(target))
    except RuntimeError as error:
        raise InputError(f"{folder} cannot be read: {_last_line(error)}.") from error
    return target


def read_masks(folder: Path, series: Path, shape: tuple[int, ...]) -> Masks:
    """Masks in `folder` of the slices in `series`, which make a volume of `shape`.

    They are paired in the order of their names; only the header of a slice says where it lies in the patient, so both
    are sorted by position afterwards.

    Raises:
        InputError: for masks that cannot be read, and unless there is one for each slice.
    """
    slices, order = _slices(series)
    masks = _by_name(folder, "png")
    if len(masks) != len(slices):
        raise InputError(f"{folder} has {len(masks)} masks for {len(slices)} slices: unpack it again.")
    names = {file.stem for file in slices}
    strays = [file for file in masks if file.stem not in names]
    if 0 < len(strays) < len(masks):  # masks are named after slices: a slice and another mask are lost
        raise InputError(f"{strays[0]} has no slice with its name in {series}: unpack both again.")
    files = [masks[i] for i in order]
    try:
        stack = np.stack([sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in files])
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{folder} holds a mask that cannot be read: {_last_line(error)}.") from error
    data = stack.T  # slices, rows, columns -> NIfTI's order
    if data.shape != tuple(shape):
        raise InputError(
            f"{folder} has masks of {data.shape[:-1]} voxels for slices of {tuple(shape[:-1])}: unpack it again."
        )
    return Masks(files, data)


def _slices(folder: Path) -> tuple[list[Path], np.ndarray]:
    """DICOM files by name, and their order along the normal of the slices.

    Raises:
        InputError: for files that cannot be read, and for gaps between slices.
    """
    files = _by_name(folder, "dcm")
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
            f"{folder} is not a complete series: {len(files)} slices with gaps or in one place. Unpack it again."
        )
    return files, order


def _by_name(folder: Path, ending: str) -> list[Path]:
    return sorted(folder.glob(f"[!.]*.{ending}"), key=lambda file: natural(file.name))


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
