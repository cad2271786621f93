"""Readers and orientations: an imported model sees the user's images as its own."""

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nnunet_models import CONFIGURATION, make_plans, preprocessed_case, save, write_dataset, write_model
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient

from fsefs_nnunet.backbones.published.nnunet_models import import_nnunet_model
from fsefs_nnunet.cases.headers import read_header
from fsefs_nnunet.cases.readers import find_reader, reoriented_axes
from fsefs_nnunet.planners.fseft_planner import FSEFTPlanner

AXES = ["".join(c) for p in itertools.permutations(("LR", "PA", "IS")) for c in itertools.product(*p)]


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd"])
def test_both_reorienting_readers_see_the_same(tmp_path, ending):
    """All 48 stored orientations: array, spacing, and a segmentation that lies on the image it came from."""
    assert len(set(AXES)) == 48
    array = np.random.default_rng(0).integers(1, 100, (4, 5, 6)).astype(np.int16)
    nifti, other, output = (str(tmp_path / name) for name in ("x.nii.gz", f"y{ending}", f"z{ending}"))
    for axes in AXES:
        save(array, axes, Path(nifti))
        save(array, axes, Path(other))
        expected, properties = NibabelIOWithReorient().read_images([nifti])
        np.testing.assert_array_equal(expected[0], array.transpose(2, 1, 0))
        assert properties["spacing"] == [3.0, 1.5, 2.0]
        seen, properties = SimpleITKIOWithReorient().read_images([other])
        np.testing.assert_array_equal(seen, expected)
        np.testing.assert_allclose(properties["spacing"], [3.0, 1.5, 2.0])
        SimpleITKIOWithReorient().write_seg(seen[0], output, properties)
        before, after = sitk.ReadImage(other), sitk.ReadImage(output)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(after), sitk.GetArrayFromImage(before))
        for geometry in ("GetOrigin", "GetSpacing", "GetDirection"):
            np.testing.assert_allclose(getattr(after, geometry)(), getattr(before, geometry)(), atol=1e-4)


def test_oblique_images_are_seen_the_same(tmp_path):
    """Tilted by 20 degrees, each reader turns to the nearest axes."""
    a = np.deg2rad(20)
    tilt = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    affine = np.eye(4)
    affine[:3, :3] = tilt @ np.array([[0, 0, -2], [-1.5, 0, 0], [0, 3, 0]])  # stored as P, S, L
    array = np.random.default_rng(0).integers(1, 100, (4, 5, 6)).astype(np.int16)
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "x.nii.gz")
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "x.nii.gz")), str(tmp_path / "x.nrrd"))
    expected, _ = NibabelIOWithReorient().read_images([str(tmp_path / "x.nii.gz")])
    seen, _ = SimpleITKIOWithReorient().read_images([str(tmp_path / "x.nrrd")])
    np.testing.assert_array_equal(seen, expected)


def test_nrrd_of_another_program(tmp_path):
    """A header written by hand, in NRRD's own words for RAS."""
    array = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)  # z, y, x
    header = (
        "NRRD0004\ntype: uint8\ndimension: 3\nspace: right-anterior-superior\nsizes: 2 3 4\n"
        "space directions: (2,0,0) (0,1.5,0) (0,0,3)\nkinds: domain domain domain\nencoding: raw\n"
        "space origin: (7,-8,9)\n\n"
    )
    (tmp_path / "x.nrrd").write_bytes(header.encode() + array.tobytes())
    seen, properties = SimpleITKIOWithReorient().read_images([str(tmp_path / "x.nrrd")])
    np.testing.assert_array_equal(seen[0], array)
    np.testing.assert_allclose(properties["spacing"], [3, 1.5, 2])


READERS = [
    ("NibabelIOWithReorient", ".nii", "NibabelIOWithReorient"),
    ("NibabelIOWithReorient", ".nii.gz", "NibabelIOWithReorient"),
    ("NibabelIOWithReorient", ".mha", "SimpleITKIOWithReorient"),
    ("NibabelIOWithReorient", ".nrrd", "SimpleITKIOWithReorient"),
    ("SimpleITKIOWithReorient", ".nii.gz", "SimpleITKIOWithReorient"),
    ("SimpleITKIOWithReorient", ".nii", "NibabelIOWithReorient"),
    ("SimpleITKIO", ".nii.gz", "SimpleITKIO"),
    ("SimpleITKIO", ".mha", "SimpleITKIO"),
    ("NibabelIO", ".nii", "NibabelIO"),
]


@pytest.mark.parametrize("reader, ending, expected", READERS)
def test_reader_of_a_file_ending(tmp_path, backbones, reader, ending, expected):
    model = write_model(tmp_path / "m", ["CT"], image_reader_writer=reader)
    contract = import_nnunet_model("mine", model.folder, backbones)
    assert find_reader(contract.image_reader_writer, ending).__name__ == expected


@pytest.mark.parametrize("reader, ending", [("SimpleITKIO", ".nii"), ("NibabelIO", ".mha")])
def test_a_file_ending_that_the_models_reader_cannot_read(tmp_path, backbones, monkeypatch, reader, ending):
    model = write_model(tmp_path / "m", ["CT"], image_reader_writer=reader)
    import_nnunet_model("mine", model.folder, backbones)
    write_dataset(tmp_path, monkeypatch, ["CT"], ending)
    with pytest.raises(ValueError, match=rf"backbone was trained with {reader}, .* '\{ending}': convert .*\.nii\.gz"):
        FSEFTPlanner("Dataset005_User", backbone="mine")


def test_another_simpleitk_that_means_something_else_by_ras(monkeypatch, contract):
    turn = sitk.DICOMOrient
    monkeypatch.setattr(sitk, "DICOMOrient", lambda image, axes: turn(image, "LPI" if axes == "RAS" else axes))
    with pytest.raises(ValueError, match=r"does not reorient '\.mha' images to RAS: convert the dataset to \.nii\.gz"):
        find_reader(contract.image_reader_writer, ".mha")
    assert find_reader(contract.image_reader_writer, ".nii.gz") is NibabelIOWithReorient


@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
def test_the_datasets_own_spacing_follows_the_reoriented_axes(tmp_path, backbones, monkeypatch, ending):
    """nnU-Net's fingerprint is of the images as stored; the default backbone sees x, y, z whatever they are."""
    raw = write_dataset(tmp_path, monkeypatch, ["CT"], ending, axes="PIL")
    assert reoriented_axes(read_header(raw / "imagesTr" / f"a_0000{ending}")) == [1, 2, 0]
    plans = make_plans("phantom")
    parent = plans["configurations"][CONFIGURATION]
    assert parent["spacing"] == [2.0, 1.5, 3.0]
    assert list(parent["median_image_size_in_voxels"]) == [10, 18, 10]  # x is cropped to what is not zero
    assert preprocessed_case(plans, raw).shape == (1, 10, 18, 10)
