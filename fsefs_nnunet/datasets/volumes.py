"""NIfTI files of a conversion: reading with one-sentence errors, grids, links, label maps."""

from __future__ import annotations

import errno
import gzip
import itertools
import os
import shutil
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to

from fsefs_nnunet.errors import InputError

_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    zlib.error,
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
)


def read_header(file: Path) -> nib.Nifti1Image:
    """A NIfTI image whose voxels wait on disk. Raises InputError for a file that is missing or no NIfTI."""
    if not file.exists():
        raise InputError(f"{file} is missing: unpack the whole archive.")
    try:
        return nib.load(file)
    except _UNREADABLE as error:
        raise InputError(f"{file} cannot be read ({error}): download or unpack it again.") from error


def read_volume(file: Path) -> nib.Nifti1Image:
    """A NIfTI image with its voxels in memory. Raises InputError, for a truncated file too."""
    image = read_header(file)
    try:
        return nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine, image.header)
    except _UNREADABLE as error:
        raise InputError(f"{file} cannot be read ({error}): download or unpack it again.") from error


def integers(image: nib.Nifti1Image, file: Path) -> np.ndarray:
    """Voxels of a label map as integers. Raises InputError where they are none."""
    data = np.asanyarray(image.dataobj)
    if data.dtype.kind in "iu":
        return data
    whole = np.rint(data)
    if not (np.isfinite(whole).all() and (whole == data).all()):
        raise InputError(f"{file} holds values that are no integers: a label map is wanted.")
    return whole.astype(np.int32)


def distance_of_grids(a: nib.Nifti1Image, b: nib.Nifti1Image) -> float:
    """Largest distance in mm between the same corner voxel of both; infinite for different shapes."""
    if a.shape[:3] != b.shape[:3]:
        return float("inf")
    corners = np.array([(*c, 1) for c in itertools.product(*((0, n - 1) for n in a.shape[:3]))])
    return float(np.abs((corners @ (a.affine - b.affine).T)[:, :3]).max())


def on_grid(label: nib.Nifti1Image, image: nib.Nifti1Image, file: Path, resample: bool) -> nib.Nifti1Image:
    """`label` on the image's grid, nearest neighbour.

    Headers of label and image often differ by rounding: up to half a voxel is the same grid.

    Raises:
        InputError: for another grid, unless `resample`; for more axes than three, which nnU-Net does not read.
    """
    if len(label.shape) != 3:
        raise InputError(f"{file} has {len(label.shape)} axes: a volume is wanted.")
    if distance_of_grids(label, image) <= 0.5 * min(nib.affines.voxel_sizes(image.affine)):
        return label
    if not resample:
        raise InputError(f"{file} lies on another grid than its image: --resample_labels brings it there (nearest).")

    return resample_from_to(label, (image.shape[:3], image.affine), order=0)


def renumber(data: np.ndarray, values: dict[int, int]) -> np.ndarray:
    """Integers `data` with each key of `values` replaced by its value (at most 255), uint8."""
    lookup = np.zeros(max(values) + 1, np.uint8)
    lookup[list(values)] = list(values.values())
    return lookup[data]


def write_label(data: np.ndarray, image: nib.Nifti1Image, file: Path) -> None:
    """Label map (X, Y, Z) of up to 255 classes, with the geometry of its image."""
    file.unlink(missing_ok=True)  # a link of an earlier run would be written through
    header = image.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    nib.save(nib.Nifti1Image(data.astype(np.uint8), image.affine, header), file)


def link_or_copy(source: Path, target: Path) -> bool:
    """Make `target` a link to `source`, or a copy where there are no links; True for a link.

    Between .nii and .nii.gz the bytes are (un)compressed, nothing else changes.
    """
    target.unlink(missing_ok=True)
    packed = [file.name.endswith(".gz") for file in (source, target)]
    if packed[0] != packed[1]:
        with (
            (gzip.open if packed[0] else open)(source, "rb") as a,
            (gzip.open if packed[1] else open)(target, "wb") as b,
        ):
            shutil.copyfileobj(a, b)
        return False
    try:
        os.symlink(source.resolve(), target)
        return True
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.copyfile(source, target)
        return False
