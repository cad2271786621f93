"""Label maps of a conversion on another grid than their image."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from fsefs_nnunet.datasets import volumes
from fsefs_nnunet.errors import InputError


@pytest.fixture
def image():
    return nib.Nifti1Image(np.zeros((20, 20, 20), np.int16), np.diag([2.0, 2, 2, 1]))


def resampled(label, affine, image) -> np.ndarray:
    placed, how = volumes.on_grid(nib.Nifti1Image(label, affine), image, Path("x"), volumes.OtherGrid(resample=True))
    assert how == "resampled"
    return np.asarray(placed.dataobj)


def test_a_label_around_its_organ(image):
    """Cropped by whoever labelled: another shape, another part of the field of view, nothing lost."""
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = (8, 8, 8)
    expected = np.zeros((20, 20, 20), np.uint8)
    expected[5:10, 5:10, 5:10] = 3
    np.testing.assert_array_equal(resampled(expected[4:12, 4:12, 4:12], affine, image), expected)


@pytest.mark.parametrize("what", ["a lesion of one voxel", "an organ beyond the image"])
def test_resampling_loses_no_label(image, what):
    label = np.zeros((40, 40, 40), np.uint8)
    label[10:20, 10:20, 10:20] = 1
    affine = np.diag([1.0, 1, 1, 1])
    if what == "a lesion of one voxel":
        label[5, 5, 5] = 2
        said = "of 0.001 ml of label 2, resampling to the image's grid would leave 0"
    else:
        affine[:3, 3] = (15, 0, 0)
        label[30:40, 10:20, 10:20] = 2
        said = "of 1 ml of label 2, resampling to the image's grid would leave 0"
    with pytest.raises(InputError, match=said):
        resampled(label, affine, image)


def test_grids_that_hardly_overlap(image):
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = (30, 0, 0)
    with pytest.raises(InputError, match="of which it covers 25%: resampling would lose labels. Leave the case out"):
        resampled(np.ones((16, 20, 20), np.uint8), affine, image)


def centred(axes: str) -> nib.Nifti1Image:
    """With as many voxels on each side of the origin, where nibabel puts a volume of which it knows no place."""
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = -19
    label = np.zeros((20, 20, 20), np.uint8)
    label[2:6, 3:9, 10:15] = 1
    turn = nib.orientations.axcodes2ornt(axes)
    return nib.Nifti1Image(label, affine).as_reoriented(turn)


def test_a_label_along_other_axes():
    placed, how = volumes.on_grid(centred("LPS"), centred("RAS"), Path("x"), volumes.REFUSED)
    assert how == volumes.AS_IT_IS
    np.testing.assert_array_equal(placed.dataobj, centred("RAS").dataobj)


def test_axes_that_are_a_guess_are_not_turned():
    """It would swap left and right of a label map that has only lost its header."""
    lost = nib.Nifti1Image(np.asarray(centred("RAS").dataobj), None)
    lost.header.set_zooms((2, 2, 2))
    lost = nib.Nifti1Image(np.asarray(lost.dataobj), lost.header.get_best_affine(), lost.header)
    assert not lost.header["sform_code"] and nib.aff2axcodes(lost.affine) == ("L", "A", "S")
    with pytest.raises(
        InputError, match="does not lie on its image's grid. The shape is the same, so its header may have been lost"
    ):
        volumes.on_grid(lost, centred("RAS"), Path("x"), volumes.REFUSED)
