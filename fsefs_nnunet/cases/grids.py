"""Whether two volumes lie on one grid, as nnU-Net's readers pair their voxels."""

from __future__ import annotations

import numpy as np

from fsefs_nnunet.cases.headers import HALF_VOXEL, Header
from fsefs_nnunet.errors import InputError, several


def shared_part(a: Header, b: Header, samples: int = 16) -> float:
    """Fraction of the field of view of `a` that `b` shows as well, estimated from evenly spread points."""
    axes = [(np.arange(samples) + 0.5) / samples * n - 0.5 for n in a.shape]
    points = np.stack([*(axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")), np.ones(samples**3)])
    seen = (np.linalg.inv(b.affine) @ a.affine @ points)[:3]
    inside = (seen >= -0.5) & (seen <= np.array(b.shape)[:, None] - 0.5)
    return float(inside.all(0).mean())


def offset_in_mm(label: Header, image: Header, reorients: bool) -> float:
    """How far `label` lies from `image`, whose voxels nnU-Net pairs one by one; 0 if the grids are the same.

    Args:
        reorients: whether the reader turns both to RAS before it pairs them.

    Raises:
        InputError: if it would pair voxels that do not belong together, or the headers do not define it.
    """
    a, b = (label.turned(), image.turned()) if reorients else (label, image)
    if a.shape != b.shape:
        raise InputError(_mismatch(label, image))
    guessed = not (label.knows_sides and image.knows_sides)
    if a.is_on_grid_of(b) and not (guessed and label.codes != image.codes):
        return 0.0
    centre = np.append((np.array(a.shape) - 1) / 2, 1)
    shift = ((a.affine - b.affine) @ centre)[:3]
    reach = np.abs(b.voxels(a.corners - b.corners - shift)).max()  # what remains once the centres coincide
    if reach > HALF_VOXEL or label.codes != image.codes:
        raise InputError(_mismatch(label, image))
    return 0.0 if guessed else float(np.linalg.norm(shift))


def _mismatch(label: Header, image: Header) -> str:
    found = " against ".join(
        f"{' x '.join(map(str, h.shape))} voxels of {h.mm}, axes {h.codes if h.knows_sides else 'unknown'}"
        for h in (label, image)
    )
    text = f"{label.file} does not lie on the grid of {image.file}: {found}."
    if tuple(label.shape) == tuple(image.shape):
        text += (
            " Both have the same shape: if one of them lost its header and the voxels correspond in the order in which "
            "they are stored, `fseft rewrite_header LOST --from OTHER` copies the other's header."
        )
    return f"{text} If both headers are right, resample the first to the second. See documentation/broken_files.md."


def shift_warnings(offsets_mm: dict[str, float]) -> list[str]:
    """At most one sentence; `offsets_mm`: of the files of each case."""
    shifted = {case: offset for case, offset in offsets_mm.items() if offset}
    if not shifted:
        return []
    return [
        f"The headers of {several(shifted)} place files of one case up to {max(shifted.values()):.3g} mm apart. Their "
        "voxels are paired one by one, as in nnU-Net: check them with nnUNetv2_plot_overlay_pngs."
    ]
