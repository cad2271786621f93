"""Where a volume's voxels lie in the patient, by its header alone, and whether headers agree with each other.

Affines map voxels i, j, k as stored to mm to the patient's right, front and head (RAS+), as nibabel gives them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from fsefs_nnunet.errors import InputError

PIXDIM_TOLERANCE = 0.01  # relative: some programs round pixdim to a few digits
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
REWRITE = (
    "python -c \"import nibabel as n, numpy as np; i = n.load('{0}'); "
    "n.save(n.Nifti1Image(np.asarray(i.dataobj), i.affine), '{0}')\""
)


@dataclass(frozen=True)
class Header:
    """shape and spacing (mm) are of i, j, k as stored; affine: (4, 4).

    pixdim: the spacing that nnU-Net's readers take, mm; differs from `spacing` where the header contradicts itself.
    knows_sides: False where a NIfTI header has neither sform nor qform, and left and right are a guess.
    forms_agree: False where a NIfTI header's sform and qform place the voxels differently; `affine` is the sform.
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
    def half_voxel(self) -> float:
        """mm; what lies closer is the same, since headers of image and label map often differ by rounding."""
        return min(self.sizes) / 2

    @property
    def spacing(self) -> tuple[float, ...]:
        return self.pixdim if self.pixdim_agrees else self.sizes

    @property
    def pixdim_agrees(self) -> bool:
        return np.allclose(self.pixdim, self.sizes, rtol=PIXDIM_TOLERANCE, atol=0)

    @property
    def codes(self) -> str:
        """Where the axes lead, "RAS" for example."""
        return "".join(nib.aff2axcodes(self.affine))

    @property
    def mm(self) -> str:
        return f"{_times(self.spacing)} mm"

    def turned(self) -> Header:
        """The grid as nnU-Net's reorienting readers give it: axes to the right, the front and the head."""
        turn = nib.io_orientation(self.affine)
        shape = np.empty(3, int)
        shape[turn[:, 0].astype(int)] = self.shape
        affine = self.affine @ nib.orientations.inv_ornt_aff(turn, self.shape)
        return replace(self, shape=tuple(shape.tolist()), affine=affine, pixdim=tuple(nib.affines.voxel_sizes(affine)))


def _times(values: Iterable[float]) -> str:
    return " x ".join(f"{float(x):.4g}" for x in values)


def read_header(file: str | Path) -> Header:
    """
    Raises:
        InputError: if the file cannot be read, is no single volume, or its spacing is not positive.
    """
    if str(file).lower().endswith((".nii", ".nii.gz")):
        header = _nifti_header(str(file))
    else:
        header = _itk_header(str(file))
    sound = np.isfinite(header.affine).all() and min(header.sizes) > 0
    if not sound or np.linalg.matrix_rank(header.affine[:3, :3]) < 3:
        raise InputError(
            f"{file} has a voxel spacing of {_times(header.sizes)} mm, which is not positive: repair its header, or "
            "leave the case out."
        )
    return header


def _nifti_header(file: str) -> Header:
    with refused_if_unreadable(file):
        image = nib.load(file)
        with nib.openers.ImageOpener(file) as stream:  # nibabel replaces a spacing of 0 by 1 without a word
            raw = type(image.header).from_fileobj(stream, check=False)
        codes = int(raw["sform_code"]), int(raw["qform_code"])
    _require_volume(file, image.ndim)
    _require_numbers(file, image.get_data_dtype().kind)
    pixdim = np.asarray(raw["pixdim"][1:4], float)
    if not codes[0] and not (np.isfinite(pixdim).all() and (pixdim != 0).all()):
        raise InputError(
            f"{file} has a voxel spacing (pixdim) of {_times(pixdim)} mm: repair its header, or leave the case out."
        )
    header = Header(file, image.shape, image.affine, tuple(np.abs(pixdim).tolist()), any(code > 0 for code in codes))
    return replace(header, forms_agree=not all(code > 0 for code in codes) or _forms_agree(image, header))


def _forms_agree(image: nib.Nifti1Image, header: Header) -> bool:
    try:
        return same_grid(replace(header, affine=image.get_qform()), header)
    except nib.spatialimages.HeaderDataError:  # of a quaternion that is none
        return False


def _itk_header(file: str) -> Header:
    reader = sitk.ImageFileReader()
    with refused_if_unreadable(file):
        reader.SetFileName(file)
        reader.ReadImageInformation()
    _require_volume(file, reader.GetDimension())
    components = "V" if reader.GetNumberOfComponents() > 1 else "f"
    _require_numbers(file, "c" if "complex" in sitk.GetPixelIDValueAsString(reader.GetPixelID()) else components)
    spacing = tuple(reader.GetSpacing())
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(reader.GetDirection(), (3, 3)) * spacing
    affine[:3, 3] = reader.GetOrigin()
    return Header(file, tuple(reader.GetSize()), LPS_TO_RAS @ affine, spacing)


def _require_volume(file: str, dimensions: int) -> None:
    if dimensions != 3:
        raise InputError(f"{file} has {dimensions} dimensions: give one file per volume and channel.")


@contextmanager
def refused_if_unreadable(*files: str) -> Iterator[None]:
    """Whatever libraries raise while they read `files` becomes an InputError that names them."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{', '.join(files)} cannot be read ({reason}): repair it, or leave the case out.") from error


def _require_numbers(file: str, kind: str) -> None:
    """Raises InputError for voxels of a kind (NumPy's letter) that readers reduce to numbers without a word."""
    if kind in "cV":
        held = (
            "complex numbers: save their magnitude"
            if kind == "c"
            else "several numbers a voxel, colours perhaps: save one"
        )
        raise InputError(f"{file} holds {held}, or leave the case out.")


# ---- two headers ----


def _corners(shape: Sequence[int]) -> np.ndarray:
    return np.array([(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in shape))], float)


def distance_in_mm(a: Header, b: Header) -> float:
    """Largest distance between the same corner voxel of both, along an axis; infinite for different shapes."""
    if tuple(a.shape) != tuple(b.shape):
        return float("inf")
    return float(np.abs((_corners(a.shape) @ (a.affine - b.affine).T)[:, :3]).max())


def same_grid(a: Header, b: Header) -> bool:
    return distance_in_mm(a, b) <= b.half_voxel


def shared_part(a: Header, b: Header, samples: int = 16) -> float:
    """Part of the field of view of `a` that `b` shows as well, by points spread evenly over it."""
    axes = [(np.arange(samples) + 0.5) / samples * n - 0.5 for n in a.shape]
    points = np.stack([*(axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")), np.ones(samples**3)])
    seen = (np.linalg.inv(b.affine) @ a.affine @ points)[:3]
    inside = (seen >= -0.5) & (seen <= np.array(b.shape)[:, None] - 0.5)
    return float(inside.all(0).mean())


def offset_in_mm(label: Header, image: Header, reorients: bool) -> float:
    """How far `label` lies from `image`, whose voxels nnU-Net pairs one by one; 0 where the grids are the same.

    Args:
        reorients: whether the reader turns both to RAS before it pairs them.

    Raises:
        InputError: if it would pair voxels that do not belong together, or the headers do not say.
    """
    a, b = (label.turned(), image.turned()) if reorients else (label, image)
    if a.shape != b.shape:
        raise InputError(_mismatch(label, image))
    if same_grid(a, b) and label.knows_sides == image.knows_sides:
        return 0.0
    reach = np.abs((_corners(a.shape)[:, :3] - (np.array(a.shape) - 1) / 2) @ (a.affine - b.affine)[:3, :3].T).max()
    if reach > b.half_voxel or label.codes != image.codes:
        raise InputError(_mismatch(label, image))
    centre = np.append((np.array(a.shape) - 1) / 2, 1)
    return float(np.linalg.norm(((a.affine - b.affine) @ centre)[:3]))


def _mismatch(label: Header, image: Header) -> str:
    found = " against ".join(
        f"{' x '.join(map(str, h.shape))} voxels of {h.mm}, axes {h.codes if h.knows_sides else 'unknown'}"
        for h in (label, image)
    )
    text = f"{label.file} does not lie on the grid of {image.file}: {found}"
    if tuple(label.shape) == tuple(image.shape):
        return (
            f"{text}. Both store as many voxels: if one header was lost and the voxels belong to each other in the "
            "order of the files, give that file the other's header, with SimpleITK's `lost.CopyInformation(other)`; if "
            "both headers are right, resample the first to the second. Look at both before "
            "(documentation/broken_files.md)."
        )
    return (
        f"{text}. Resample the first to the second if both headers are right, or leave the case out "
        "(documentation/broken_files.md)."
    )


# ---- what a user should hear of headers that can be read ----


def several(names: Iterable[str], most: int = 3) -> str:
    """ "a, b, c and 2 more"."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def pixdim_remedy(header: Header) -> str:
    return (
        f"{header.file} has a spacing of {_times(header.pixdim)} mm in pixdim and of "
        f"{_times(header.sizes)} mm in its sform: nnU-Net takes one or the other. Write it "
        f"anew, where the sform is right: {REWRITE.format(header.file)}"
    )


def warnings_of(headers: Iterable[Header]) -> list[str]:
    """One sentence for each kind of oddity, naming the files."""
    headers = list(headers)
    made = []
    if unknown := [h.file for h in headers if not h.knows_sides]:
        made.append(
            f"{several(unknown)}: the header has neither sform nor qform and says nothing of left and right. The axes "
            "are taken to lead to the left, the front and the head, as nibabel does."
        )
    if torn := [h.file for h in headers if not h.forms_agree]:
        made.append(f"{several(torn)}: sform and qform of the header disagree, the sform counts.")
    if odd := [h.file for h in headers if not h.pixdim_agrees]:
        made.append(
            f"{several(odd)}: pixdim of the header disagrees with the sform, whose spacing is taken; nnUNetv2_predict "
            "takes pixdim's (documentation/broken_files.md)."
        )
    return made
