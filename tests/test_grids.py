"""Whether two headers place their voxels on one grid."""

import nibabel as nib
import numpy as np
import pytest
from field_files import LPS, RAS, SHAPE, turn, volume, write

from fsefs_nnunet.cases.grids import offset_in_mm, shared_part
from fsefs_nnunet.cases.headers import Header, read_header
from fsefs_nnunet.errors import InputError


@pytest.fixture
def file(tmp_path):
    write(tmp_path / "x.nii.gz", volume(0)[0])
    return tmp_path / "x.nii.gz"


def header(affine=RAS, shape=SHAPE, **changes) -> Header:
    return Header("x", shape, np.asarray(affine, float), tuple(nib.affines.voxel_sizes(affine)), **changes)


def moved(mm, affine=RAS) -> np.ndarray:
    affine = affine.copy()
    affine[:3, 3] += mm
    return affine


def tilted(degrees: float) -> np.ndarray:
    a = np.deg2rad(degrees)
    turned = np.array([[np.cos(a), -np.sin(a), 0, 0], [np.sin(a), np.cos(a), 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    return turned @ RAS


@pytest.mark.parametrize("reorients", [True, False])
def test_the_same_grid(reorients):
    for affine in (RAS, moved((0.9, -0.9, 1.4)), tilted(0.05)):  # voxels of 2 x 2 x 3 mm
        assert offset_in_mm(header(affine), header(), reorients) == 0


@pytest.mark.parametrize("reorients", [True, False])
def test_a_shift_is_told(reorients):
    assert offset_in_mm(header(moved((3, 0, 4))), header(), reorients) == pytest.approx(5)


def test_the_same_place_in_another_orientation(file):
    """A reader that turns both to RAS pairs the right voxels, another one does not."""
    image = read_header(file)
    turn(file, "PSR")
    label = read_header(file)
    assert offset_in_mm(label, image, reorients=True) == 0
    with pytest.raises(InputError, match="does not lie on the grid"):
        offset_in_mm(label, image, reorients=False)


LOST = {
    "identity": np.eye(4),
    "spacing alone": np.diag([2.0, 2, 3, 1]),
    "spacing, and turned to RAS it would only be shifted": moved((7, 9, 11)),
    "tilt": tilted(10),
}


@pytest.mark.parametrize("name", LOST)
def test_lost_headers(name):
    """The label's voxels are stored as the image's, its header is not."""
    with pytest.raises(InputError, match=r"Both have the same shape.*`fseft rewrite_header LOST --from OTHER`"):
        offset_in_mm(header(LOST[name]), header(LPS), reorients=True)


def test_a_side_that_only_one_header_tells():
    unknown = header(np.diag([-2.0, 2, 3, 1]), knows_sides=False)
    with pytest.raises(InputError, match="axes RAS against .* axes unknown"):
        offset_in_mm(header(), unknown, reorients=True)
    assert offset_in_mm(unknown, unknown, reorients=True) == 0
    # where the guess is right, voxels are paired as they should be, wherever the origins are
    assert offset_in_mm(header(moved((9, 9, 9), np.diag([-2.0, 2, 3, 1]))), unknown, reorients=True) == 0


def test_thick_slices():
    """Half a voxel along each axis: a slice thickness that was rounded is no other grid."""
    thick, rounded = np.diag([0.7, 0.7, 5.0, 1]), np.diag([0.7, 0.7, 4.99, 1])
    assert offset_in_mm(header(rounded, (64, 64, 90)), header(thick, (64, 64, 90)), reorients=True) == 0


def test_other_shapes_are_not_advised_to_share_a_header():
    with pytest.raises(InputError, match="If both headers are right, resample the first to the second") as error:
        offset_in_mm(header(shape=(16, 15, 12)), header(), reorients=True)
    assert "rewrite_header" not in str(error.value)


def test_shared_part_of_the_field_of_view():
    assert shared_part(header(), header()) == 1
    assert shared_part(header(moved((16, 0, 0))), header()) == 0.5  # 8 of 16 voxels
    assert shared_part(header(moved((400, 0, 0))), header()) == 0
    assert header(moved((0.9, 0, 0))).is_on_grid_of(header())
    assert not header(moved((1.1, 0, 0))).is_on_grid_of(header())
