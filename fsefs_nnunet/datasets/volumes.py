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

from fsefs_nnunet.cases.grids import shared_part
from fsefs_nnunet.cases.headers import Header
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
    """A NIfTI image whose voxels stay on disk. Raises InputError for a file that is missing or not NIfTI."""
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
    """Voxels of a label map as integers. Raises InputError if they are not."""
    data = np.asanyarray(image.dataobj)
    if data.dtype.kind in "iu":
        return data
    require_whole_numbers(values_in(data), file)
    return data.astype(np.int32)


@dataclass(frozen=True)
class OtherGrid:
    """What to do with label maps that do not lie on their image's grid; without a choice they are refused.

    image_header: those with the image's shape take its header, since their own was lost.
    resample: the others are resampled (nearest neighbour).
    """

    image_header: bool = False
    resample: bool = False


REFUSED = OtherGrid()


# how a label map came to lie on its image's grid
AS_IT_IS, RESAMPLED, IMAGE_HEADER = "as it is", "resampled", "image's header"


class Placed(NamedTuple):
    """A label map on its image's grid; how: one of the above."""

    volume: nib.Nifti1Image
    how: str = AS_IT_IS


def on_grid(label: nib.Nifti1Image, image: nib.Nifti1Image, file: Path, other_grid: OtherGrid) -> Placed:
    """`label`, which was read from `file`, on the grid of `image`.

    Headers of label and image often differ by rounding: up to half a voxel counts as the same grid.

    Raises:
        InputError: for another grid, unless the user says what to do; if resampling would lose labels; for more than
            three axes, which nnU-Net does not read.
    """
    if len(label.shape) != 3:
        raise InputError(f"{file} has {len(label.shape)} axes: a volume is expected.")
    grids = _grid(label), _grid(image)
    if grids[0].is_on_grid_of(grids[1]):
        return Placed(label)
    # stored along other axes, unless these are a guess
    if all(g.knows_sides for g in grids) and grids[0].turned().is_on_grid_of(grids[1].turned()):
        turn = nib.orientations.ornt_transform(nib.io_orientation(label.affine), nib.io_orientation(image.affine))
        return Placed(label.as_reoriented(turn))
    same_shape = label.shape == image.shape
    if same_shape and other_grid.image_header:
        return Placed(nib.Nifti1Image(label.dataobj, image.affine, label.header), IMAGE_HEADER)
    lost = " The shape is the same, so its header may have been lost: --image_header gives it the image's."
    if not other_grid.resample:
        raise InputError(
            f"{file} does not lie on its image's grid.{lost if same_shape else ''} If its header is right, "
            "--resample_labels brings it to the image's grid (nearest)."
        )
    # if the shapes are equal, different fields of view mean a lost header rather than a choice of the annotator
    parts = shared_part(*grids), shared_part(*reversed(grids))
    overlap, needed = (min(parts), 0.9) if same_shape else (max(parts), 0.5)
    if overlap < needed:
        raise InputError(
            f"{file} does not show the same part of the patient as its image, of which it covers {parts[1]:.0%}: "
            f"resampling would lose labels.{lost if same_shape else ' Leave the case out, or repair the header.'}"
        )
    made = resample_from_to(label, (image.shape[:3], image.affine), order=0)
    _require_volumes(label, made, file)
    return Placed(made, RESAMPLED)


def _grid(image: nib.Nifti1Image) -> Header:
    pixdim, codes = tuple(nib.affines.voxel_sizes(image.affine)), ("sform_code", "qform_code")
    return Header("", image.shape[:3], image.affine, pixdim, any(int(image.header[code]) > 0 for code in codes))


def _require_volumes(before: nib.Nifti1Image, after: nib.Nifti1Image, file: Path) -> None:
    """Raises InputError if a label has lost a tenth of its volume: more than nearest-neighbour resampling changes."""
    then, now = (np.bincount(integers(image, file).clip(0).ravel()) for image in (before, after))
    voxels = [abs(np.linalg.det(image.affine[:3, :3])) / 1000 for image in (before, after)]
    for value in filter(None, np.flatnonzero(then).tolist()):
        ml = then[value] * voxels[0]
        left = now[value] * voxels[1] if value < len(now) else 0.0
        if not left or ml - left > max(0.1 * ml, 8 * max(voxels)):
            raise InputError(
                f"{file}: of {ml:.3g} ml of label {value}, resampling to the image's grid would leave {left:.3g}. "
                "Leave the case out, or resample it yourself."
            )


def renumber(data: np.ndarray, values: dict[int, int]) -> np.ndarray:
    """Integers `data` with each key of `values` replaced by its value (at most 255), uint8."""
    lookup = np.zeros(max(values) + 1, np.uint8)
    lookup[list(values)] = list(values.values())
    return lookup[data]


def write_label(data: np.ndarray, image: nib.Nifti1Image, file: Path) -> None:
    """Label map (X, Y, Z) of up to 255 classes, with the geometry of its image."""
    file.unlink(missing_ok=True)  # writing to a link of an earlier run would change its target
    header = image.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    nib.save(nib.Nifti1Image(data.astype(np.uint8), image.affine, header), file)


def link_or_copy(source: Path, target: Path) -> bool:
    """Make `target` a link to `source`, or a copy if links are not supported; True for a link.

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
