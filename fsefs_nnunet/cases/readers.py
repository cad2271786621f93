"""nnU-Net's readers: which one gives the same axes and orientation as another for files with a given ending."""

from __future__ import annotations

from collections.abc import Sequence

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

from fsefs_nnunet.cases.headers import Header
from fsefs_nnunet.errors import InputError

# Both reorient images to RAS and give the same array and spacing (tests/test_readers.py), from different file types.
REORIENTING = ("NibabelIOWithReorient", "SimpleITKIOWithReorient")


def find_reader(wanted: str, file_ending: str) -> type:
    """nnU-Net's reader class for files of `file_ending`, e.g. ".nii.gz", that gives the axes of the reader `wanted`.

    Raises:
        InputError: if none does, or this SimpleITK reorients images differently from nibabel.
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
            f"This SimpleITK does not reorient {file_ending!r} images to RAS: convert the dataset to .nii.gz, or "
            "install SimpleITK 2.5."
        )
    return fitting[0]


def reorients(reader_name: str) -> bool:
    return reader_name in REORIENTING


def _simpleitk_means_ras() -> bool:
    """ITK has named orientations by where axes come from and also by where they point: RAS points right, front, up."""
    turned = sitk.DICOMOrient(sitk.Image([1, 1, 1], sitk.sitkUInt8), "RAS")
    return np.allclose(turned.GetDirection(), np.diag([-1, -1, 1]).ravel())  # ITK's world is left, back, up


def reoriented_axes(header: Header) -> list[int]:
    """For each axis z, y, x of a reorienting reader's array, the corresponding axis of a plain reader's."""
    stored = np.argsort(nib.io_orientation(header.affine)[:, 0])  # of x, y, z, counted in i, j, k
    return [2 - int(axis) for axis in stored[::-1]]


def spacing_of(header: Header, reader_name: str) -> list[float]:
    """mm per axis z, y, x of the array that a reader gives; that of the affine if pixdim disagrees with it."""
    return [float(x) for x in in_axes_of(header.spacing, header, reader_name)]


def in_axes_of(values: Sequence, header: Header, reader_name: str) -> list:
    """`values` of the axes i, j, k as stored, for each axis z, y, x that a reader gives."""
    axes = reoriented_axes(header) if reorients(reader_name) else [0, 1, 2]
    return [values[::-1][axis] for axis in axes]
