"""nnU-Net's readers: which one gives the axes and orientation of another from files of an ending."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

from fsefs_nnunet.errors import InputError

# Both turn images to RAS and give the same array and spacing (tests/test_readers.py), from different file types.
REORIENTING = ("NibabelIOWithReorient", "SimpleITKIOWithReorient")


def find_reader(wanted: str, file_ending: str) -> type:
    """nnU-Net's reader class for files of `file_ending`, e.g. ".nii.gz", that gives the axes of the reader `wanted`.

    Raises:
        InputError: if none does, or this SimpleITK turns images to another orientation than nibabel.
    """
    readers = [recursive_find_reader_writer_by_name(name) for name in (REORIENTING if reorients(wanted) else [wanted])]
    readers.sort(key=lambda reader: reader.__name__ != wanted)
    fitting = [reader for reader in readers if file_ending.lower() in reader.supported_file_endings]
    if not fitting:
        endings = dict.fromkeys(ending for reader in readers for ending in reader.supported_file_endings)
        raise InputError(
            f"The backbone was trained with {wanted}, which cannot read {file_ending!r}: convert the dataset to "
            f"{' or '.join(endings)}."
        )
    if fitting[0].__name__ == "SimpleITKIOWithReorient" and not _simpleitk_means_ras():
        raise InputError(
            f"This SimpleITK does not turn {file_ending!r} images to RAS: convert the dataset to .nii.gz, or install "
            "SimpleITK 2.5."
        )
    return fitting[0]


def reorients(reader_name: str) -> bool:
    return reader_name in REORIENTING


def _simpleitk_means_ras() -> bool:
    """ITK has named orientations by where axes come from as well as by where they lead: RAS leads right, front, up."""
    turned = sitk.DICOMOrient(sitk.Image([1, 1, 1], sitk.sitkUInt8), "RAS")
    return np.allclose(turned.GetDirection(), np.diag([-1, -1, 1]).ravel())  # ITK's world is left, back, up


def reoriented_axes(image_file: str | Path) -> list[int]:
    """For each axis z, y, x that a reorienting reader gives, the axis of the file as stored; reads the header alone."""
    affine, _, _ = _header(image_file)
    stored = np.argsort(nib.io_orientation(affine)[:, 0])  # of x, y, z, counted in i, j, k
    return [2 - int(axis) for axis in stored[::-1]]


def image_geometry(image_file: str | Path, reader_name: str) -> tuple[list[int], list[float]]:
    """Shape in voxels and spacing in mm of the array that a reader gives, per axis z, y, x; reads the header alone.

    Raises:
        InputError: for an image that is not three-dimensional.
    """
    _, shape, spacing = _header(image_file)
    axes = reoriented_axes(image_file) if reorients(reader_name) else [0, 1, 2]
    return [int(shape[axis]) for axis in axes], [float(spacing[axis]) for axis in axes]


def _header(image_file: str | Path) -> tuple[np.ndarray, list[int], list[float]]:
    """Affine (where nibabel cannot read the file, its directions); shape and spacing as stored, in order k, j, i."""
    if str(image_file).lower().endswith((".nii", ".nii.gz")):
        image = nib.load(image_file)
        _require_volume(image_file, image.ndim)
        return image.affine, list(image.shape[::-1]), list(image.header.get_zooms()[::-1])
    header = sitk.ImageFileReader()
    header.SetFileName(str(image_file))
    header.ReadImageInformation()
    _require_volume(image_file, header.GetDimension())
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(header.GetDirection(), (3, 3))
    return affine, list(header.GetSize()[::-1]), list(header.GetSpacing()[::-1])


def _require_volume(image_file: str | Path, dimensions: int) -> None:
    if dimensions != 3:
        raise InputError(f"{image_file} has {dimensions} dimensions: give one file per volume and channel.")
