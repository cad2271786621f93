"""NIfTI files of a conversion: reading with one-sentence errors, grids, links, label maps."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to

from fsefs_nnunet.cases.headers import Header, same_grid, shared_part
from fsefs_nnunet.cases.images import require_whole_numbers
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.labels import values_in

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
    require_whole_numbers(values_in(data), file)
    return data.astype(np.int32)


@dataclass(frozen=True)
class OtherGrid:
    """What becomes of label maps that do not lie on their image's grid, where the user wants it; else they are refused.

    image_header: those with the image's shape take its header, for their own was lost.
    resample: the others are resampled (nearest neighbour).
    """

    image_header: bool = False
    resample: bool = False


REFUSED = OtherGrid()


class Placed(NamedTuple):
    """A label map on its image's grid, and how it got there: "as it is", "resampled" or "image's header"."""

    volume: nib.Nifti1Image
    how: str = "as it is"


def on_grid(label: nib.Nifti1Image, image: nib.Nifti1Image, file: Path, other_grid: OtherGrid) -> Placed:
    """`label`, which was read from `file`, on the grid of `image`.

    Headers of label and image often differ by rounding: up to half a voxel is the same grid.

    Raises:
        InputError: for another grid, unless the user says what to do; where resampling would lose labels; for more
            axes than three, which nnU-Net does not read.
    """
    if len(label.shape) != 3:
        raise InputError(f"{file} has {len(label.shape)} axes: a volume is wanted.")
    grids = _grid(label, file), _grid(image, file)
    if same_grid(*grids):
        return Placed(label)
    if label.shape == image.shape and other_grid.image_header:
        return Placed(nib.Nifti1Image(label.dataobj, image.affine, label.header), "image's header")
    adopt = " Its header may have been lost, the shape is the same: --image_header gives it the image's."
    adopt = adopt if label.shape == image.shape else ""
    if not other_grid.resample:
        raise InputError(
            f"{file} lies on another grid than its image.{adopt} If its header is right, --resample_labels brings it "
            "to the image's grid (nearest)."
        )
    # fields of view of one shape that differ are a lost header rather than a choice of whoever labelled
    parts = shared_part(*grids), shared_part(*reversed(grids))
    if min(parts) < 0.9 if adopt else max(parts) < 0.5:
        raise InputError(
            f"{file} shows another part of the patient than its image, of which it covers {parts[1]:.0%}: resampling "
            f"would lose labels.{adopt or ' Leave the case out, or repair the header.'}"
        )
    made = resample_from_to(label, (image.shape[:3], image.affine), order=0)
    _require_volumes(label, made, file)
    return Placed(made, "resampled")


def _grid(image: nib.Nifti1Image, file: Path) -> Header:
    return Header(str(file), image.shape[:3], image.affine, tuple(nib.affines.voxel_sizes(image.affine)))


def _require_volumes(before: nib.Nifti1Image, after: nib.Nifti1Image, file: Path) -> None:
    """Raises InputError where a label has lost a tenth of its volume: more than nearest neighbours take or give."""
    volumes = []
    for image in (before, after):
        values, counts = np.unique(np.rint(np.asarray(image.dataobj)), return_counts=True)
        voxel = abs(np.linalg.det(image.affine[:3, :3])) / 1000
        volumes.append((dict(zip(values.tolist(), (counts * voxel).tolist())), voxel))
    (then, small), (now, large) = volumes
    for value, ml in then.items():
        left = now.get(value, 0.0)
        if value and (not left or ml - left > max(0.1 * ml, 8 * max(small, large))):
            raise InputError(
                f"{file}: of {ml:.3g} ml of label {value:g}, resampling to the image's grid would leave {left:.3g}. "
                "Leave the case out, or resample it yourself."
            )


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
