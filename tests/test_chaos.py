"""CHAOS: DICOM slices and PNG masks, in both directions of the table."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from source_trees import truncate, write_png, write_slice

from fsefs_nnunet.datasets.conversion import convert
from fsefs_nnunet.errors import InputError

COLUMNS, ROWS, SLICES = 9, 7, 5
PIXEL, STEP = (0.5, 0.8), 3.0  # mm between columns, rows, slices
CORNER = (-40.0, 25.0, 100.0)  # of the slice that is lowest, in DICOM's LPS
LIVER = (2, 5, 1)  # column, row, slice from below
HU = 300


def write_patient(folder: Path, head_first: bool, masks: int = SLICES) -> None:
    """Slices whose names go from the head or from the feet; the liver is one voxel, off every centre."""
    for i in range(SLICES):
        level = SLICES - 1 - i if head_first else i
        pixels = np.full((COLUMNS, ROWS), 50, np.int16)
        mask = np.zeros((COLUMNS, ROWS), np.uint8)
        if level == LIVER[2]:
            pixels[LIVER[:2]], mask[LIVER[:2]] = HU, 255
        affine = np.diag([*PIXEL, STEP, 1.0])
        affine[:3, 3] = *CORNER[:2], CORNER[2] + STEP * level
        tags = {"0008|0060": "CT", "0028|1052": "-1024", "0028|1053": "1"}
        write_slice(folder / "DICOM_anon" / f"i{i:04d},0000b.dcm", pixels, affine, i + 1, tags)
        if i < masks:
            write_png(folder / "Ground" / f"liver_GT_{i:03d}.png", mask)


def lps_of_the_liver() -> np.ndarray:
    return np.array(CORNER) + np.array([*PIXEL, STEP]) * np.array(LIVER)


@pytest.fixture
def source(tmp_path) -> Path:
    train = tmp_path / "CHAOS" / "Train_Sets" / "CT"
    write_patient(train / "1", head_first=True)
    write_patient(train / "10", head_first=False)
    write_patient(train / "2", head_first=True, masks=SLICES - 1)
    write_patient(tmp_path / "CHAOS" / "Test_Sets" / "CT" / "3", head_first=True)
    return tmp_path / "CHAOS"


def test_slices_and_masks_lie_where_the_header_says(source, raw):
    out = convert("chaos", source, 11, [], num_processes=1)
    assert sorted(f.name for f in (out / "labelsTr").iterdir()) == ["CHAOS_CT_1.nii.gz", "CHAOS_CT_10.nii.gz"]
    assert [f.name for f in (out / "imagesTs").iterdir()] == ["CHAOS_CT_3_0000.nii.gz"]
    assert json.loads((out / "dataset.json").read_text())["labels"] == {"background": 0, "liver": 1}
    for case in ("CHAOS_CT_1", "CHAOS_CT_10"):
        image = nib.load(out / "imagesTr" / f"{case}_0000.nii.gz")
        label = nib.load(out / "labelsTr" / f"{case}.nii.gz")
        assert image.shape == label.shape == (COLUMNS, ROWS, SLICES)
        np.testing.assert_allclose(image.header.get_zooms(), (*PIXEL, STEP), rtol=1e-5)
        np.testing.assert_array_equal(image.affine, label.affine)
        hu = np.asanyarray(image.dataobj)
        assert sorted(np.unique(hu)) == [50, HU]  # SimpleITK's writer takes the intercept out again
        np.testing.assert_array_equal(label.dataobj, hu == HU)
        ((voxel,),) = (np.argwhere(hu == HU),)
        position = nib.affines.apply_affine(image.affine, voxel)
        np.testing.assert_allclose(position, lps_of_the_liver() * (-1, -1, 1), atol=1e-4)  # NIfTI is RAS


@pytest.mark.parametrize("patient", ["Train_Sets/CT/1", "Test_Sets/CT/3"])
def test_one_patient_in_two_places(source, raw, patient):
    write_patient(source / "again" / patient, head_first=False)
    with pytest.raises(InputError, match=f"/{patient}/.* and .*/{patient}/.* are both case CHAOS_CT_"):
        convert("CHAOS", source, 11, [], num_processes=1)


def test_broken_patients_are_left_out(source, raw, tmp_path):
    train = source / "Train_Sets" / "CT"
    write_patient(train / "5", head_first=False)
    (train / "5" / "DICOM_anon" / "i0002,0000b.dcm").unlink()
    (train / "5" / "Ground" / "liver_GT_002.png").unlink()
    write_patient(train / "6", head_first=False)
    (train / "6" / "DICOM_anon" / "i0001,0000b.dcm").write_bytes(b"half a file")
    write_patient(train / "7", head_first=False)
    write_png(train / "7/Ground/liver_GT_001.png", np.full((COLUMNS, ROWS), 63, np.uint8))
    write_patient(train / "8", head_first=False)
    truncate(train / "8" / "DICOM_anon" / "i0003,0000b.dcm")
    out = convert("CHAOS", source, 11, [], num_processes=1)
    left_out = json.loads((out / "conversion.json").read_text())["left out"]
    assert f"{train}/2/Ground has {SLICES - 1} masks for {SLICES} slices" in left_out.pop("CHAOS_CT_2")
    assert f"{train}/5/DICOM_anon is not a complete series" in left_out.pop("CHAOS_CT_5")
    assert "i0001,0000b.dcm cannot be read" in left_out.pop("CHAOS_CT_6")
    assert "holds values other than 0 and 255" in left_out.pop("CHAOS_CT_7")
    assert "cannot be read" in left_out.pop("CHAOS_CT_8")
    assert not left_out
