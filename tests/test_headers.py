"""What headers say of where voxels lie, and whether two of them agree."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from field_files import LPS, RAS, SHAPE, disagree, forget_pixdim, forget_sides, set_pixdim, turn, volume, write

from fsefs_nnunet.cases.headers import (
    Header,
    offset_in_mm,
    pixdim_remedy,
    read_header,
    same_grid,
    shared_part,
    warnings_of,
)
from fsefs_nnunet.cases.readers import image_geometry
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


def test_a_sound_header(file):
    read = read_header(file)
    assert read.shape == SHAPE and read.codes == "RAS" and read.mm == "2 x 2 x 3 mm"
    assert read.knows_sides and read.forms_agree and read.pixdim_agrees
    np.testing.assert_array_equal(read.affine, RAS)
    assert warnings_of([read]) == []


@pytest.mark.parametrize("ending", [".mha", ".nrrd", ".nii"])
def test_formats_say_the_same(file, ending):
    turn(file, "PIL")
    other = file.with_name(f"y{ending}")
    sitk.WriteImage(sitk.ReadImage(str(file)), str(other))
    read, expected = read_header(other), read_header(file)
    assert read.shape == expected.shape and read.codes == "PIL"
    np.testing.assert_allclose(read.affine, expected.affine, atol=1e-5)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR", "IAL", "SLA"])
def test_turned_is_what_the_reader_gives(file, axes):
    turn(file, axes)
    turned = read_header(file).turned()
    assert turned.shape == SHAPE
    np.testing.assert_allclose(turned.affine, RAS, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_pixdim_that_is_no_spacing(file, axis, value):
    """nibabel reads 1 mm for 0."""
    set_pixdim(file, axis, value)
    with pytest.raises(InputError, match=rf"x\.nii\.gz has a voxel spacing \(pixdim\) of .*{value:.4g}.* mm: repair"):
        read_header(file)


def test_an_affine_without_volume(file):
    image = nib.Nifti1Image(volume(0)[0], None)
    image.set_sform(np.diag([2.0, 0, 3, 1]), 1)
    nib.save(image, file)
    with pytest.raises(InputError, match="has a voxel spacing of 2 x 0 x 3 mm, which is not positive"):
        read_header(file)


@pytest.mark.parametrize(
    "array, what",
    [
        (np.zeros((4, 4, 4, 2), np.float32), "has 4 dimensions: give one file per volume and channel"),
        (np.zeros((4, 4), np.float32), "has 2 dimensions: give one file"),
        (np.zeros((4, 4, 4), np.complex64), "holds complex numbers: save their magnitude"),
        (np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "holds several numbers a voxel"),
    ],
)
def test_what_is_no_volume_of_numbers(file, array, what):
    write(file, array)
    with pytest.raises(InputError, match=rf"x\.nii\.gz {what}"):
        read_header(file)


def test_colours_in_another_format(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 4, 4, 3), np.uint8), isVector=True), str(tmp_path / "x.mha"))
    with pytest.raises(InputError, match=r"x\.mha holds several numbers a voxel"):
        read_header(tmp_path / "x.mha")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1", b"\0\5\x16\7Mac OS X"])
def test_what_is_no_image(file, content):
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.nii\.gz cannot be read \(.+\): repair it, or leave the case out"):
        read_header(file)


# ---- a header and itself ----


def test_sform_and_qform_that_disagree(file):
    disagree(file)
    read = read_header(file)
    assert read.codes == "RAS" and not read.forms_agree  # of the sform
    assert warnings_of([read]) == [f"{file}: sform and qform of the header disagree, the sform counts."]


def test_neither_sform_nor_qform(file):
    forget_sides(file)
    read = read_header(file)
    assert not read.knows_sides and read.codes == "LAS" and read.mm == "2 x 2 x 3 mm"
    (warning,) = warnings_of([read])
    assert warning.startswith(f"{file}: the header has neither sform nor qform and says nothing of left and right")


def test_a_warning_names_three_files_and_counts_the_rest():
    (warning,) = warnings_of([header(knows_sides=False)] * 5)
    assert warning.startswith("x, x, x and 2 more: the header")


@pytest.mark.parametrize("axes", ["RAS", "LPS"])
@pytest.mark.parametrize("reader", ["NibabelIOWithReorient", "NibabelIO"])
def test_pixdim_that_disagrees(file, axes, reader):
    turn(file, axes)
    affine = nib.load(file).affine
    image = nib.Nifti1Image(np.asarray(nib.load(file).dataobj), None)
    image.set_sform(affine, 1)
    nib.save(image, file)
    read = read_header(file)
    assert not read.pixdim_agrees and read.pixdim == (1, 1, 1)
    np.testing.assert_allclose(read.spacing, (2, 2, 3))
    assert image_geometry(file, reader) == ([13, 15, 16], [3, 2, 2])
    assert "whose spacing is taken; nnUNetv2_predict takes pixdim's" in warnings_of([read])[0]


def test_rounded_pixdim_agrees(file):
    image = nib.load(file)
    image.header["pixdim"][1:4] = (2.01, 1.99, 3.0)
    nib.save(image, file)
    assert read_header(file).pixdim_agrees


def test_the_remedy_for_pixdim_is_right(file):
    """The line of Python in the message, taken at its word."""
    before = nib.load(file).get_fdata()
    forget_pixdim(file)
    command = pixdim_remedy(read_header(file)).split("python -c ")[1].strip('"')
    exec(command)
    read = read_header(file)
    assert read.pixdim_agrees and read.codes == "RAS"
    np.testing.assert_array_equal(nib.load(file).get_fdata(), before)
    np.testing.assert_array_equal(nib.load(file).affine, RAS)


# ---- two headers ----


def tilted(degrees: float) -> np.ndarray:
    a = np.deg2rad(degrees)
    turned = np.array([[np.cos(a), -np.sin(a), 0, 0], [np.sin(a), np.cos(a), 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    return turned @ RAS


@pytest.mark.parametrize("reorients", [True, False])
def test_the_same_grid(reorients):
    for affine in (RAS, moved((0.9, -0.9, 0.9)), tilted(0.05)):
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
    with pytest.raises(InputError, match=r"Both store as many voxels.*lost\.CopyInformation\(other\)"):
        offset_in_mm(header(LOST[name]), header(LPS), reorients=True)


def test_a_side_that_only_one_header_tells():
    unknown = header(np.diag([-2.0, 2, 3, 1]), knows_sides=False)
    with pytest.raises(InputError, match="axes RAS against .* axes unknown"):
        offset_in_mm(header(), unknown, reorients=True)
    assert offset_in_mm(unknown, unknown, reorients=True) == 0


def test_other_shapes_are_not_advised_to_share_a_header():
    with pytest.raises(InputError, match="Resample the first to the second if both headers are right") as error:
        offset_in_mm(header(shape=(16, 15, 12)), header(), reorients=True)
    assert "CopyInformation" not in str(error.value)


def test_shared_part_of_the_field_of_view():
    assert shared_part(header(), header()) == 1
    assert shared_part(header(moved((16, 0, 0))), header()) == 0.5  # 8 of 16 voxels
    assert shared_part(header(moved((400, 0, 0))), header()) == 0
    assert same_grid(header(moved((0.9, 0, 0))), header()) and not same_grid(header(moved((1.1, 0, 0))), header())
