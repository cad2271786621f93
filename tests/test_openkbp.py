"""OpenKBP: sparse tables whose axes run to the back, the left and the feet."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from source_trees import truncate, write_openkbp, write_sparse

from fsefs_nnunet.datasets.conversion import convert
from fsefs_nnunet.datasets.sources.openkbp import FILES, SHAPE
from fsefs_nnunet.errors import InputError

NAMES = ["brainstem", "spinal_cord", "parotid_gland_right", "parotid_gland_left", "mandible"]
STEMS = ["Brainstem", "SpinalCord", "RightParotid", "LeftParotid", "Mandible"]
SPACING = (3.5, 4.0, 2.5)  # to the right, the front and the head


def flat(back: int, left: int, feet: int) -> int:
    """Index of a voxel, from the front, the right and the head."""
    return (back * 128 + left) * 128 + feet


@pytest.fixture
def provided(tmp_path) -> Path:
    """Two patients with structures of two voxels each, every one shares a voxel with the next."""
    folder = tmp_path / "open-kbp" / "provided-data"
    for split, patient in (("train-pats", "pt_1"), ("test-pats", "pt_241")):
        write_patient(folder / split / patient)
    (folder.parent / "results" / "submissions").mkdir(parents=True)
    write_sparse(folder.parent / "results" / "pt_241.csv", np.array([1]), np.array([70.0]))  # a dose by a model
    return folder


def write_patient(patient: Path) -> None:
    write_sparse(patient / "ct.csv", np.array([flat(0, 0, 0), flat(1, 2, 3)]), np.array([1024.0, 3000.0]))
    for i, stem in enumerate(STEMS):
        write_sparse(patient / f"{stem}.csv", np.array([flat(10, 20 + i, 30), flat(10, 21 + i, 30)]))
    write_sparse(patient / "PTV70.csv", np.array([flat(10, 20, 30)]))
    write_sparse(patient / "possible_dose_mask.csv", np.array([flat(10, 20, 30)]))
    (patient / "voxel_dimensions.csv").write_text("4.0e+00\n3.5e+00\n2.5e+00\n")


def reason(provided: Path, broken: str, classes=(), number: int = 11) -> str:
    """Why the one case that cannot be converted is left out."""
    out = convert("OpenKBP", provided, number, list(classes), num_processes=1)
    left_out = json.loads((out / "conversion.json").read_text())["left out"]
    assert list(left_out) == [broken]
    return left_out[broken]


def test_voxels_lie_where_their_indices_say(provided, raw):
    out = convert("openkbp", provided.parent, 11, [], num_processes=1)
    content = json.loads((out / "dataset.json").read_text())
    assert content["labels"] == {name: i for i, name in enumerate(["background", *NAMES])}
    assert content["channel_names"] == {"0": "CT"} and content["file_ending"] == ".nii.gz"
    assert sorted(f.name for f in (out / "labelsTr").iterdir()) == ["pt_1.nii.gz", "pt_241.nii.gz"]
    image, label = nib.load(out / "imagesTr" / "pt_1_0000.nii.gz"), nib.load(out / "labelsTr" / "pt_1.nii.gz")
    hu, labels = np.asanyarray(image.dataobj), np.asanyarray(label.dataobj)
    for one in (image, label):
        np.testing.assert_array_equal(one.affine, np.diag([*SPACING, 1]))
        assert one.shape == SHAPE and nib.aff2axcodes(one.affine) == ("R", "A", "S")
    expected = np.full(SHAPE, -1024)
    expected[127, 127, 127], expected[125, 126, 124] = 0, 1976
    np.testing.assert_array_equal(hu, expected)
    assert hu.dtype == np.int16
    expected = np.zeros(SHAPE)
    for i, value in enumerate((1, 2, 3, 4, 5, 5)):  # a step to the left each; the later class has shared voxels
        expected[107 - i, 117, 97] = value
    np.testing.assert_array_equal(labels, expected)
    summary = json.loads((out / "conversion.json").read_text())
    assert summary["voxels in several masks (the later class has them)"]["pt_1"] == 4


def test_the_later_class_of_the_list_has_shared_voxels(provided, raw):
    out = convert("OpenKBP", provided, 11, ["mandible", "parotid_gland_left"], num_processes=1)
    data = np.asanyarray(nib.load(out / "labelsTr" / "pt_1.nii.gz").dataobj)
    assert data[107 - 3 : 107 - 6 : -1, 117, 97].tolist() == [2, 2, 1]


@pytest.mark.parametrize("name", list(FILES))
def test_contour_that_was_not_drawn(name, provided, raw):
    file = provided / "test-pats" / "pt_241" / FILES[name]
    file.unlink()
    text = reason(provided, "pt_241")
    assert text == f"{file} is missing: the patient has no contour of {name}; --classes without it keeps the case."
    out = convert("OpenKBP", provided, 12, [n for n in NAMES if n != name], num_processes=1)
    assert len(list((out / "labelsTr").iterdir())) == 2


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("Mandible.csv", ",data\n", "is empty: the patient has no contour of mandible"),
        ("Mandible.csv", f",data\n5,\n{128**3},\n", "has the index 2097152, beyond the 2097152 voxels of 128 x 128"),
        ("Mandible.csv", ",data\n5,\n-1,\n", "has the index -1, beyond"),
        ("Mandible.csv", ",data\n5,\n12", "ends in the middle of a line: download it again"),
        ("Mandible.csv", "", "ends in the middle of a line: download it again"),
        ("Mandible.csv", ",data\nfive,\n", "is not a list of voxels"),
        ("ct.csv", f",data\n{128**3},3.0\n", "has the index 2097152, beyond"),
        ("ct.csv", ",data\n5,1024.0\n6,10", "ends in the middle of a line: download it again"),
        ("ct.csv", ",data\n5,1024.0\n6,\n", "has rows without a value, or with one that is not HU + 1024: download"),
        ("ct.csv", ",data\n5,-1.0\n", "has rows without a value, or with one that is not HU + 1024: download"),
        ("voxel_dimensions.csv", "4.0\n3.5\n", "does not hold three spacings in mm: download it again"),
        ("voxel_dimensions.csv", "4.0\n3.5\n0.0\n", "does not hold three spacings in mm: download it again"),
        ("voxel_dimensions.csv", "4.0\n3.5\nx\n", "does not hold three spacings in mm: download it again"),
    ],
)
def test_broken_files(name, content, message, provided, raw):
    file = provided / "train-pats" / "pt_1" / name
    file.write_text(content)
    assert f"{file} {message}" in reason(provided, "pt_1")


@pytest.mark.parametrize("name", ["ct.csv", "Brainstem.csv"])
def test_a_file_cut_in_the_middle(name, provided, raw):
    file = provided / "train-pats" / "pt_1" / name
    truncate(file)
    assert reason(provided, "pt_1") == f"{file} ends in the middle of a line: download it again."


@pytest.mark.parametrize(
    "missing, message",
    [
        ("voxel_dimensions.csv", "voxel_dimensions.csv is missing: download the whole folder again."),
        ("ct.csv", "No image for {patient}: unpack the whole archive, or move the label away."),
        ("structures", "No label for {patient}/ct.csv: unpack the whole archive, or move the image away."),
    ],
)
def test_missing_files(missing, message, provided, raw):
    patient = provided / "train-pats" / "pt_1"
    for file in [patient / name for name in FILES.values()] if missing == "structures" else [patient / missing]:
        file.unlink()
    assert reason(provided, "pt_1").endswith(message.format(patient=patient))


def test_another_folder(tmp_path, raw):
    (tmp_path / "pt_1").mkdir()
    with pytest.raises(InputError, match="does not hold OpenKBP as published: expected provided-data/train-pats/pt_1"):
        convert("OpenKBP", tmp_path, 11, [], num_processes=1)


@pytest.mark.slow
def test_a_patient_of_openkbp(shared, raw, tmp_path):
    """A converted patient, written as published and converted again: everything as it was, right parotid right."""
    file = shared / "data" / "OpenKBP" / "imagesTr" / "kbp_train_001_0000.nii.gz"
    if not file.is_file():
        pytest.skip(f"{file} is missing: this test reads CT of OpenKBP.")
    image, label = nib.load(file), nib.load(shared / "data" / "OpenKBP" / "labelsTr" / "kbp_train_001.nii.gz")
    labels = np.asanyarray(label.dataobj)
    masks = {stem: labels == i for i, stem in enumerate(STEMS, 1)}
    patient = tmp_path / "source" / "train-pats" / "pt_1"
    write_openkbp(patient, np.asanyarray(image.dataobj), masks, image.header.get_zooms())
    # as published: first indices of pt_1/RightParotid.csv
    assert (patient / "RightParotid.csv").read_text().split()[:4] == [",data", "940210,", "940342,", "956594,"]
    out = convert("OpenKBP", tmp_path / "source", 11, [], num_processes=1)
    made = [nib.load(out / name) for name in ("imagesTr/pt_1_0000.nii.gz", "labelsTr/pt_1.nii.gz")]
    for one, original in zip(made, (image, label)):
        np.testing.assert_array_equal(one.dataobj, original.dataobj)
        np.testing.assert_array_equal(one.affine, original.affine)
        assert one.get_data_dtype() == original.get_data_dtype()
    content = json.loads((shared / "data" / "OpenKBP" / "dataset.json").read_text())
    assert json.loads((out / "dataset.json").read_text())["labels"] == content["labels"]
    x, y, z = (
        {
            name: nib.affines.apply_affine(made[1].affine, np.argwhere(labels == i).mean(0))[axis]
            for i, name in enumerate(NAMES, 1)
        }
        for axis in range(3)
    )
    assert x["parotid_gland_left"] < x["mandible"] < x["parotid_gland_right"]
    assert y["spinal_cord"] < y["mandible"] and z["spinal_cord"] < z["brainstem"]
