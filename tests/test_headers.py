"""What headers say of where voxels lie, and how they are rewritten."""

import errno
import gzip
import os
import re
import shlex
import struct

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from field_files import LPS, RAS, SHAPE, disagree, forget_pixdim, forget_sides, set_pixdim, turn, volume, write

from fsefs_nnunet.cases.grids import offset_in_mm
from fsefs_nnunet.cases.headers import Header, pixdim_remedy, read_header, rewrite_header, warnings_of
from fsefs_nnunet.cases.readers import in_axes_of, spacing_of
from fsefs_nnunet.cli.main import main
from fsefs_nnunet.errors import InputError


@pytest.fixture
def file(tmp_path):
    write(tmp_path / "x.nii.gz", volume(0)[0])
    return tmp_path / "x.nii.gz"


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


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_spacings_in_other_units(file, scale):
    write(file, volume(0)[0], np.diag([scale, scale, scale, 1]) @ RAS)
    with pytest.raises(
        InputError,
        match=r"x\.nii\.gz spans .* mm according to its header, with voxels of .* mm: give the spacing in mm",
    ):
        read_header(file)


def test_numbers_that_are_not_finite(file):
    image = nib.Nifti1Image(volume(0)[0], None)
    affine = RAS.copy()
    affine[0, 3] = np.nan
    image.set_sform(affine, 1)
    nib.save(image, file)
    with pytest.raises(InputError, match="has a header with NaN or infinite numbers"):
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
        (np.zeros((4, 4, 4, 1), np.float32), "has 4 dimensions, the last of length 1: save it without"),
        (np.zeros((4, 4, 4, 2), np.float32), "has 4 dimensions: give one file per volume and channel"),
        (np.zeros((4, 4), np.float32), "has 2 dimensions: give one file"),
        (np.zeros((4, 4, 4), np.complex64), "holds complex numbers: save their magnitude"),
        (np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "holds several values per voxel"),
    ],
)
def test_what_is_no_volume_of_numbers(file, array, what):
    write(file, array)
    with pytest.raises(InputError, match=rf"x\.nii\.gz {what}"):
        read_header(file)


def test_colours_in_another_format(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 4, 4, 3), np.uint8), isVector=True), str(tmp_path / "x.mha"))
    with pytest.raises(InputError, match=r"x\.mha holds several values per voxel"):
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
    assert warnings_of([read]) == [f"{file}: sform and qform of the header disagree, the sform is used."]


def test_neither_sform_nor_qform(file):
    forget_sides(file)
    read = read_header(file)
    assert not read.knows_sides and read.codes == "LAS" and read.mm == "2 x 2 x 3 mm"
    (warning,) = warnings_of([read])
    assert warning == (
        f"{file}: the header does not define the orientation. The axes are assumed to be LAS; left and right are a "
        "guess."
    )


@pytest.mark.parametrize("space, knows", [("space: left-posterior-superior\n", True), ("", False)])
def test_nrrd_without_a_space(tmp_path, space, knows):
    geometry = "space directions: (2,0,0) (0,2,0) (0,0,3)\n" if space else "spacings: 2 2 3\n"
    head = f"NRRD0004\ntype: uint8\ndimension: 3\n{space}sizes: 2 3 4\n{geometry}encoding: raw\n\n"
    (tmp_path / "x.nrrd").write_bytes(head.encode() + bytes(24))
    assert read_header(tmp_path / "x.nrrd").knows_sides == knows


def test_gipl_has_no_axes(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 4, 4), np.int16)), str(tmp_path / "x.gipl"))
    read = read_header(tmp_path / "x.gipl")
    assert not read.knows_sides and read.codes == "LPS"


def test_a_warning_names_three_files_and_counts_the_rest():
    header = Header("x", SHAPE, RAS, (2, 2, 3), knows_sides=False)
    (warning,) = warnings_of([header] * 5)
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
    assert in_axes_of(read.shape, read, reader) == [13, 15, 16] and spacing_of(read, reader) == [3, 2, 2]
    assert "whose spacing is used; nnUNetv2_predict uses pixdim's" in warnings_of([read])[0]


def test_rounded_pixdim_agrees(file):
    image = nib.load(file)
    image.header["pixdim"][1:4] = (2.01, 1.99, 3.0)
    nib.save(image, file)
    assert read_header(file).pixdim_agrees


# ---- rewritten headers ----


def fseft(line: str) -> int:
    return main(shlex.split(line.removeprefix("fseft ")))


@pytest.mark.parametrize("name", ["x.nii.gz", "x.nii", "it's a $x.nii"])
@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.int64])
def test_the_remedy_for_pixdim_is_right(tmp_path, name, dtype):
    """The command in the message, taken at its word."""
    file, array = tmp_path / name, volume(0)[0].astype(dtype)
    image = nib.Nifti1Image(array, None, dtype=dtype)
    image.set_sform(RAS, 1)
    nib.save(image, file)
    assert fseft(pixdim_remedy(read_header(file)).split("rewrite the header: ")[1]) == 0
    read = read_header(file)
    assert read.pixdim_agrees and read.codes == "RAS" and nib.load(file).get_data_dtype() == dtype
    np.testing.assert_array_equal(np.asarray(nib.load(file).dataobj), array)
    np.testing.assert_array_equal(nib.load(file).affine, RAS)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_nothing_but_the_geometry_changes(tmp_path):
    """Scaling, units, extensions, NIfTI-2, permissions."""
    file = tmp_path / "x.nii.gz"
    image = nib.Nifti2Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), None)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"a scanner"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"kept"))
    image.set_sform(RAS, 1)
    nib.save(image, file)
    content = bytearray(gzip.decompress(file.read_bytes()))
    content[176:192] = struct.pack("<dd", 2.0, -1024.0)  # slope and intercept
    file.write_bytes(gzip.compress(content)), file.chmod(0o640)
    before = nib.load(file)
    rewrite_header(file)
    after = nib.load(file)
    assert read_header(file).pixdim_agrees and isinstance(after, nib.Nifti2Image)
    assert after.get_data_dtype() == np.int16 and (after.dataobj.slope, after.dataobj.inter) == (2, -1024)
    np.testing.assert_array_equal(after.get_fdata(), before.get_fdata())
    assert after.header.get_xyzt_units()[0] == "mm" and bytes(after.header["descrip"]).startswith(b"a scanner")
    assert [e.get_content() for e in after.header.extensions] == [e.get_content() for e in before.header.extensions]
    assert file.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["x.gipl", "x.mhd", "x.img", "gone.nii", "."])
def test_what_is_not_rewritten(tmp_path, name):
    if name not in ("gone.nii", "."):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"is not a file\.|is not \.nii, \.nii\.gz, \.mha or \.nrrd: convert it first"):
        rewrite_header(tmp_path / name)


def test_a_guess_is_not_written_down(file):
    """Nobody would be warned of it any more."""
    forget_sides(file)
    with pytest.raises(InputError, match="does not define the orientation: give a file that does with --from"):
        rewrite_header(file)


def test_a_full_disk(file, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = file.read_bytes()
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"x\.nii\.gz cannot be rewritten \(.*No space left on device"):
        rewrite_header(file)
    assert file.read_bytes() == before and [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_link_becomes_a_file(tmp_path):
    """`fseft convert` links images to the download."""
    write(tmp_path / "download.nii", volume(0)[0])
    forget_pixdim(tmp_path / "download.nii")
    before = (tmp_path / "download.nii").read_bytes()
    (tmp_path / "x.nii").symlink_to(tmp_path / "download.nii")
    rewrite_header(tmp_path / "x.nii")
    assert not (tmp_path / "x.nii").is_symlink() and read_header(tmp_path / "x.nii").pixdim_agrees
    assert (tmp_path / "download.nii").read_bytes() == before


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd"])
def test_the_header_of_another_file(tmp_path, ending):
    image, label = tmp_path / f"image{ending}", tmp_path / f"label{ending}"
    write(tmp_path / "image.nii.gz", np.ascontiguousarray(volume(0)[0][::-1, ::-1]), LPS)
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "image.nii.gz")), str(image))
    lost = sitk.GetImageFromArray(np.ascontiguousarray(volume(0)[1][::-1, ::-1].transpose(2, 1, 0)))
    sitk.WriteImage(lost, str(label))
    with pytest.raises(InputError) as error:
        offset_in_mm(read_header(label), read_header(image), reorients=True)
    command = re.search("`(.*)`", str(error.value))[1]
    assert fseft(command.replace("LOST", str(label)).replace("OTHER", str(image))) == 0
    assert offset_in_mm(read_header(label), read_header(image), reorients=True) == 0
    shown = sitk.GetArrayFromImage(sitk.ReadImage(str(label))).transpose(2, 1, 0)[::-1, ::-1]
    np.testing.assert_array_equal(shown, volume(0)[1])


def test_a_header_that_cannot_be_read_is_replaced(tmp_path, file):
    """Its own spacing is 0, which other commands refuse."""
    write(tmp_path / "other.nii.gz", volume(0)[1], LPS)
    before = nib.load(file).get_fdata()
    set_pixdim(file, 1, 0)
    assert fseft(f"fseft rewrite_header {file} --from {tmp_path / 'other.nii.gz'}") == 0
    assert read_header(file).codes == "LPS" and read_header(file).mm == "2 x 2 x 3 mm"
    np.testing.assert_array_equal(nib.load(file).get_fdata(), before)


def test_a_header_of_another_shape(tmp_path, file):
    write(tmp_path / "y.nii.gz", np.zeros((16, 15, 12), np.uint8))
    before = file.read_bytes()
    with pytest.raises(
        InputError, match=r"has 16 x 15 x 13 voxels, .*y\.nii\.gz 16 x 15 x 12: the header does not fit"
    ):
        rewrite_header(file, tmp_path / "y.nii.gz")
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
