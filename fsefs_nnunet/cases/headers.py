"""Where a volume's voxels lie in the patient, from its header alone, and whether headers agree with each other.

Affines map voxels i, j, k as stored to mm to the patient's right, front and head (RAS+), as nibabel gives them.
"""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from fsefs_nnunet.errors import InputError, several
from fsefs_nnunet.files import refused_if_unwritable

HALF_VOXEL = 0.5
PIXDIM_TOLERANCE = 0.01  # relative: some programs round pixdim to a few digits
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# extent of a patient, or part of one, along the longest axis; anything outside this range has a spacing not in mm
SMALLEST_MM, LARGEST_MM = 2.0, 5000.0


@dataclass(frozen=True)
class Header:
    """shape and spacing (mm) are of i, j, k as stored; affine: (4, 4).

    pixdim: the spacing that nnU-Net's readers use, mm; differs from `spacing` if the header contradicts itself.
    knows_sides: False if the header does not define where the axes point, and left and right are a guess.
    forms_agree: False if a NIfTI header's sform and qform place the voxels differently; `affine` is the sform.
    """

    file: str
    shape: tuple[int, int, int]
    affine: np.ndarray
    pixdim: tuple[float, float, float]
    knows_sides: bool = True
    forms_agree: bool = True

    @property
    def sizes(self) -> tuple[float, ...]:
        """mm per voxel, of the affine."""
        return tuple(nib.affines.voxel_sizes(self.affine).tolist())

    @property
    def field_of_view(self) -> tuple[float, ...]:
        """mm along each axis."""
        return tuple(n * mm for n, mm in zip(self.shape, self.sizes))

    @property
    def spacing(self) -> tuple[float, ...]:
        return self.pixdim if self.pixdim_agrees else self.sizes

    @property
    def pixdim_agrees(self) -> bool:
        return np.allclose(self.pixdim, self.sizes, rtol=PIXDIM_TOLERANCE, atol=0)

    @property
    def corners(self) -> np.ndarray:
        """(8, 3): centres of the corner voxels in mm, in a fixed order."""
        ijk = np.array([(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in self.shape))], float)
        return (ijk @ self.affine.T)[:, :3]

    def voxels(self, mm: np.ndarray) -> np.ndarray:
        """Convert lengths (n, 3) in mm along the patient's axes to voxels along i, j, k."""
        return mm @ np.linalg.inv(self.affine[:3, :3]).T

    def is_on_grid_of(self, other: Header) -> bool:
        """Whether the voxels of both coincide, in the order in which they are stored. Headers of image and label map
        often differ by rounding, so up to half a voxel is tolerated.
        """
        if tuple(self.shape) != tuple(other.shape):
            return False
        return bool(np.abs(other.voxels(self.corners - other.corners)).max() <= HALF_VOXEL)

    @property
    def codes(self) -> str:
        """Where the axes point, e.g. "RAS"."""
        return "".join(nib.aff2axcodes(self.affine))

    @property
    def mm(self) -> str:
        return f"{times(self.spacing)} mm"

    def turned(self) -> Header:
        """The grid as nnU-Net's reorienting readers give it: axes pointing to the right, the front and the head."""
        turn = nib.io_orientation(self.affine)
        shape = np.empty(3, int)
        shape[turn[:, 0].astype(int)] = self.shape
        affine = self.affine @ nib.orientations.inv_ornt_aff(turn, self.shape)
        return replace(self, shape=tuple(shape.tolist()), affine=affine, pixdim=tuple(nib.affines.voxel_sizes(affine)))


def times(values: Iterable[float]) -> str:
    """ "2 x 2 x 3"."""
    return " x ".join(f"{float(x):.4g}" for x in values)


def read_header(file: str | Path) -> Header:
    """Read a file's header, but no voxels.

    Raises:
        InputError: if the file cannot be read, is not a single volume, or its spacing is not positive.
    """
    if str(file).lower().endswith((".nii", ".nii.gz")):
        header = _nifti_header(str(file))
    else:
        header = _itk_header(str(file))
    if not np.isfinite(header.affine).all():
        raise InputError(f"{file} has a header with NaN or infinite numbers: repair it, or leave the case out.")
    if min(header.sizes) <= 0 or np.linalg.matrix_rank(header.affine[:3, :3]) < 3:
        raise InputError(
            f"{file} has a voxel spacing of {times(header.sizes)} mm, which is not positive: repair its header, or "
            "leave the case out."
        )
    longest = max(header.field_of_view)
    if not SMALLEST_MM <= longest <= LARGEST_MM:
        raise InputError(
            f"{file} spans {longest:.3g} mm according to its header, with voxels of {header.mm}: give the spacing in "
            "mm, or leave the case out."
        )
    return header


def _nifti_header(file: str) -> Header:
    with refused_if_unreadable(file):
        image = nib.load(file)
        with nib.openers.ImageOpener(file) as stream:  # nibabel silently replaces a spacing of 0 by 1
            raw = type(image.header).from_fileobj(stream, check=False)
        codes = int(raw["sform_code"]), int(raw["qform_code"])
    _require_volume(file, image.shape)
    _require_numbers(file, image.get_data_dtype().kind)
    pixdim = np.asarray(raw["pixdim"][1:4], float)
    if not codes[0] and not (np.isfinite(pixdim).all() and (pixdim != 0).all()):
        raise InputError(
            f"{file} has a voxel spacing (pixdim) of {times(pixdim)} mm: repair its header, or leave the case out."
        )
    header = Header(file, image.shape, image.affine, tuple(np.abs(pixdim).tolist()), any(code > 0 for code in codes))
    return replace(header, forms_agree=not all(code > 0 for code in codes) or _forms_agree(image, header))


def _forms_agree(image: nib.Nifti1Image, header: Header) -> bool:
    try:
        return replace(header, affine=image.get_qform()).is_on_grid_of(header)
    except nib.spatialimages.HeaderDataError:  # an invalid quaternion
        return False


def _itk_header(file: str) -> Header:
    reader = sitk.ImageFileReader()
    with refused_if_unreadable(file):
        reader.SetFileName(file)
        reader.ReadImageInformation()
    _require_volume(file, reader.GetSize())
    components = "V" if reader.GetNumberOfComponents() > 1 else "f"
    _require_numbers(file, "c" if "complex" in sitk.GetPixelIDValueAsString(reader.GetPixelID()) else components)
    spacing = tuple(reader.GetSpacing())
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(reader.GetDirection(), (3, 3)) * spacing
    affine[:3, 3] = reader.GetOrigin()
    return Header(file, tuple(reader.GetSize()), LPS_TO_RAS @ affine, spacing, _says_axes(file, reader))


def _says_axes(file: str, reader: sitk.ImageFileReader) -> bool:
    """Whether a file defines where its axes point; otherwise ITK assumes left, back and head."""
    if file.lower().endswith(".nrrd"):
        return "NRRD_space" in reader.GetMetaDataKeys()
    return not file.lower().endswith(".gipl")  # a format that has no field for it


def _require_volume(file: str, shape: tuple[int, ...]) -> None:
    if len(shape) == 4 and shape[3] == 1:
        raise InputError(f"{file} has 4 dimensions, the last of length 1: save it without that one.")
    if len(shape) != 3:
        raise InputError(f"{file} has {len(shape)} dimensions: give one file per volume and channel.")


@contextmanager
def refused_if_unreadable(*files: str) -> Iterator[None]:
    """Whatever libraries raise while they read `files` becomes an InputError that names them."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{', '.join(files)} cannot be read ({reason}): repair it, or leave the case out.") from error


def _require_numbers(file: str, kind: str) -> None:
    """Raises InputError for voxels of a kind (NumPy's letter) that readers silently reduce to numbers."""
    if kind in "cV":
        colours = "several values per voxel (a colour image?): save one channel"
        held = "complex numbers: save their magnitude" if kind == "c" else colours
        raise InputError(f"{file} holds {held}, or leave the case out.")


def pixdim_remedy(header: Header) -> str:
    return (
        f"{header.file} has a spacing of {times(header.pixdim)} mm in pixdim and of {times(header.sizes)} mm in its "
        "sform: nnU-Net uses one or the other. If the sform is right, rewrite the header: "
        f"fseft rewrite_header {shlex.quote(header.file)}"
    )


def rewrite_header(file: Path, other: Path | None = None) -> None:
    """Make the header of a volume agree with its affine, or with that of `other`; everything else is kept.

    A link is replaced by a file.

    Raises:
        InputError: if a file cannot be read or written, the shapes differ, or nothing defines the orientation.
    """
    ending = next((e for e in (".nii", ".nii.gz", ".mha", ".nrrd") if file.name.lower().endswith(e)), None)
    if not file.is_file() or ending is None:
        reason = "is not a file" if not file.is_file() else "is not .nii, .nii.gz, .mha or .nrrd: convert it first"
        raise InputError(f"{file} {reason}.")
    header = read_header(other or file)
    if not header.knows_sides:
        raise InputError(f"{header.file} does not define the orientation: give a file that does with --from.")
    write = _write_nifti_header if ending.startswith(".nii") else _write_itk_header
    with refused_if_unwritable(file.parent), tempfile.TemporaryDirectory(dir=file.parent, prefix=".") as folder:
        made = Path(folder) / file.name
        try:
            write(file, header, made)
            shutil.copymode(file, made)
            os.replace(made, file)
        except PermissionError:
            raise
        except (OSError, RuntimeError) as error:  # for a full disk, SimpleITK does not raise an OSError
            raise InputError(f"{file} cannot be rewritten ({' '.join(str(error).split())}).") from error


def _require_shape(file: Path, shape: tuple[int, ...], header: Header) -> None:
    if shape != tuple(header.shape):
        raise InputError(
            f"{file} has {times(shape)} voxels, {header.file} {times(header.shape)}: the header does not fit."
        )


def _write_nifti_header(file: Path, header: Header, made: Path) -> None:
    """Only the geometry changes, not the type of the voxels, their scaling, units or extensions."""
    with refused_if_unreadable(str(file)):
        with nib.openers.ImageOpener(file) as stream:
            content = stream.read()
        # the header as stored: that of a loaded image has lost the offset of the voxels and their scaling
        new = type(nib.load(file).header).from_fileobj(BytesIO(content), check=False)
    _require_shape(file, new.get_data_shape(), header)
    code = int(new["sform_code"])
    new.set_qform(header.affine, 0)  # sets pixdim
    new.set_sform(header.affine, code if code > 0 else 2)
    with nib.openers.ImageOpener(made, "wb") as stream:
        stream.write(new.binaryblock)
        stream.write(content[len(new.binaryblock) :])


def _write_itk_header(file: Path, header: Header, made: Path) -> None:
    with refused_if_unreadable(str(file)):
        image = sitk.ReadImage(str(file))
    _require_shape(file, image.GetSize(), header)
    affine = LPS_TO_RAS @ header.affine
    image.SetSpacing(header.sizes)
    image.SetDirection((affine[:3, :3] / header.sizes).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    sitk.WriteImage(image, str(made), useCompression=True)


def warnings_of(headers: Iterable[Header]) -> list[str]:
    """One sentence for each kind of oddity, naming the files."""
    headers = list(headers)
    made = []
    if unknown := [h for h in headers if not h.knows_sides]:
        made.append(
            f"{several(h.file for h in unknown)}: the header does not define the orientation. The axes are assumed to "
            f"be {unknown[0].codes}; left and right are a guess."
        )
    if torn := [h.file for h in headers if not h.forms_agree]:
        made.append(f"{several(torn)}: sform and qform of the header disagree, the sform is used.")
    if odd := [h.file for h in headers if not h.pixdim_agrees]:
        made.append(
            f"{several(odd)}: pixdim of the header disagrees with the sform, whose spacing is used; nnUNetv2_predict "
            "uses pixdim's (documentation/broken_files.md)."
        )
    return made
