"""MR part of CHAOS: both sequences, oblique slices in either order of their names, grey values."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from source_trees import write_png, write_slice

from fsefs_nnunet.datasets.conversion import convert
from fsefs_nnunet.datasets.sources.chaos_mr import GREY
from fsefs_nnunet.errors import InputError

SHAPE = (9, 7, 5)
SPIR, DUAL = "CHAOS_T2SPIR", "CHAOS_T1DUAL"
NAMES = ["liver", "kidney_right", "kidney_left", "spleen"]
CENTRES = [63, 126, 189, 252]
# two turns and unlike voxels, right-handed, in DICOM's LPS
TURN = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]])
LPS = np.eye(4)
LPS[:3, :3], LPS[:3, 3] = TURN * [1.5, 1.25, 7.7], (-40, 25, 100)
RAS = np.diag([-1, -1, 1, 1]) @ LPS


def random_labels(seed: int = 0) -> np.ndarray:
    """0 to 4, each of them somewhere."""
    labels = np.random.default_rng(seed).integers(0, 5, SHAPE)
    labels.flat[:5] = np.arange(5)
    return labels


def random_image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 900, SHAPE).astype(np.int16)


def write_series(folder: Path, image: np.ndarray, names: list[int], descending: bool, affine: np.ndarray = LPS) -> None:
    """Slices named by `names`, whose positions go along the normal or, `descending`, against it."""
    for i, name in enumerate(names):
        level = SHAPE[2] - 1 - i if descending else i
        moved = affine.copy()
        moved[:3, 3] = affine[:3, 3] + affine[:3, 2] * level
        tags = {"0008|0060": "MR"}
        write_slice(folder / f"IMG-0004-{name:05d}.dcm", image[..., level], moved, i + 1, tags)


def write_masks(folder: Path, labels: np.ndarray, names: list[int], descending: bool, grey=CENTRES) -> None:
    values = np.array([0, *grey], np.uint8)[labels]
    for i, name in enumerate(names):
        level = SHAPE[2] - 1 - i if descending else i
        write_png(folder / f"IMG-0004-{name:05d}.png", values[..., level])


def write_spir(patient: Path, seed: int = 0, descending: bool = True, grey=CENTRES, ground: bool = True) -> None:
    names = list(range(1, SHAPE[2] + 1))
    write_series(patient / "T2SPIR" / "DICOM_anon", random_image(seed), names, descending)
    if ground:
        write_masks(patient / "T2SPIR" / "Ground", random_labels(seed), names, descending, grey)


def write_dual(patient: Path, descending: bool = True) -> None:
    """Out of phase odd, in phase even, as published."""
    folder, even = patient / "T1DUAL", list(range(2, 2 * SHAPE[2] + 2, 2))
    write_series(folder / "DICOM_anon" / "InPhase", random_image(1), even, descending)
    write_series(folder / "DICOM_anon" / "OutPhase", random_image(2), [i - 1 for i in even], descending)
    write_masks(folder / "Ground", random_labels(), even, descending)


@pytest.fixture
def train(tmp_path) -> Path:
    return tmp_path / "CHAOS" / "Train_Sets" / "MR"


def reason(name: str, train: Path, broken: str, number: int = 11) -> str:
    """Why the case `broken`, the one beside a whole one, is left out."""
    out = convert(name, train, number, [], num_processes=1)
    left_out = json.loads((out / "conversion.json").read_text())["left out"]
    assert list(left_out) == [f"CHAOS_MR_{broken}"]
    assert not list(out.glob(f"*/*MR_{broken}*"))
    return left_out[f"CHAOS_MR_{broken}"]


def assert_as_written(out: Path, case: str, images: list[np.ndarray], labels: np.ndarray) -> None:
    for i, image in enumerate(images):
        written = nib.load(out / "imagesTr" / f"{case}_{i:04d}.nii.gz")
        np.testing.assert_array_equal(written.dataobj, image)
        np.testing.assert_allclose(written.affine, RAS, atol=1e-4)
    label = nib.load(out / "labelsTr" / f"{case}.nii.gz")
    np.testing.assert_array_equal(label.dataobj, labels)
    np.testing.assert_array_equal(label.affine, nib.load(out / "imagesTr" / f"{case}_0000.nii.gz").affine)


def test_t2_spir(train, raw):
    write_spir(train / "1", seed=1, descending=True)
    write_spir(train / "10", seed=2, descending=False)
    write_spir(train.parents[1] / "Test_Sets" / "MR" / "4", ground=False)
    write_dual(train / "1")
    out = convert("chaos_t2spir", train.parents[1], 11, [], num_processes=1)
    content = json.loads((out / "dataset.json").read_text())
    assert out.name == "Dataset011_CHAOS_T2SPIR" and content["channel_names"] == {"0": "MR T2 SPIR"}
    assert content["labels"] == {name: i for i, name in enumerate(["background", *NAMES])}
    assert sorted(f.name for f in (out / "labelsTr").iterdir()) == ["CHAOS_MR_1.nii.gz", "CHAOS_MR_10.nii.gz"]
    assert [f.name for f in (out / "imagesTs").iterdir()] == ["CHAOS_MR_4_0000.nii.gz"]
    assert_as_written(out, "CHAOS_MR_1", [random_image(1)], random_labels(1))
    assert_as_written(out, "CHAOS_MR_10", [random_image(2)], random_labels(2))


@pytest.mark.parametrize(
    "name, channels, seeds",
    [
        (DUAL, ["MR T1 in phase", "MR T1 out of phase"], [1, 2]),
        (f"{DUAL}_InPhase", ["MR T1 in phase"], [1]),
        (f"{DUAL}_OutPhase", ["MR T1 out of phase"], [2]),
    ],
)
def test_t1_dual(name, channels, seeds, train, raw):
    write_dual(train / "2")
    write_spir(train / "2")
    out = convert(name, train, 11, [], num_processes=1)
    content = json.loads((out / "dataset.json").read_text())
    assert out.name == f"Dataset011_{name}"
    assert content["channel_names"] == {str(i): channel for i, channel in enumerate(channels)}
    assert len(list((out / "imagesTr").iterdir())) == len(channels)
    assert_as_written(out, "CHAOS_MR_2", [random_image(seed) for seed in seeds], random_labels())


@pytest.mark.parametrize("end", [0, 1])
def test_grey_values_at_the_ends_of_their_ranges(end, train, raw):
    write_spir(train / "1", grey=[GREY[name][end] for name in NAMES])
    out = convert(SPIR, train, 11, ["spleen", "liver"], num_processes=1)
    data = np.asanyarray(nib.load(out / "labelsTr" / "CHAOS_MR_1.nii.gz").dataobj)
    np.testing.assert_array_equal(data, np.array([0, 2, 0, 0, 1])[random_labels()])


@pytest.mark.parametrize("grey", [1, 50, 76, 109, 139, 174, 202, 239])
def test_unknown_grey_value(grey, train, raw):
    write_spir(train / "1")
    write_spir(train / "2")
    mask = np.zeros(SHAPE[:2], np.uint8)
    mask[3, 2] = grey
    write_png(train / "2" / "T2SPIR" / "Ground" / "IMG-0004-00004.png", mask)
    text = reason(SPIR, train, "2")
    assert f"{train}/2/T2SPIR/Ground/IMG-0004-00004.png has the grey value {grey}: unpack it again" in text
    assert "expected 0, 51 to 75 liver" in text


def test_missing_ground(train, raw):
    write_spir(train / "1")
    write_spir(train / "2", ground=False)
    text = reason(SPIR, train, "2")
    assert text == f"No label for {train}/2/T2SPIR/DICOM_anon: unpack the whole archive, or move the image away."


def test_no_ground_at_all(train, raw):
    write_spir(train / "2", ground=False)
    with pytest.raises(InputError, match="does not hold CHAOS_T2SPIR as published: expected Train_Sets/MR/1/T2SPIR"):
        convert(SPIR, train, 11, [], num_processes=1)


def test_masks_that_are_not_those_of_the_slices(train, raw):
    ground = train / "2" / "T2SPIR" / "Ground"
    write_spir(train / "1")
    write_spir(train / "2")
    (ground / "IMG-0004-00005.png").unlink()
    assert reason(SPIR, train, "2") == f"{ground} has 4 masks for 5 slices: unpack it again."
    write_png(ground / "IMG-0004-00006.png", np.zeros(SHAPE[:2], np.uint8))
    text = reason(SPIR, train, "2", 12)
    assert f"{ground}/IMG-0004-00006.png has no slice with its name" in text and "unpack both again" in text


def test_masks_of_other_slices(train, raw):
    write_spir(train / "1")
    write_spir(train / "2")
    for file in (train / "2" / "T2SPIR" / "Ground").iterdir():
        write_png(file, np.zeros((4, 3), np.uint8))
    assert "has masks of (4, 3) voxels for slices of (9, 7): unpack it again" in reason(SPIR, train, "2")


@pytest.mark.parametrize("missing, present", [("InPhase", "OutPhase"), ("OutPhase", "InPhase")])
def test_one_phase(missing, present, train, raw):
    write_dual(train / "1")
    write_dual(train / "2")
    phases = train / "2" / "T1DUAL" / "DICOM_anon"
    (phases / missing).rename(train / "away")
    text = reason(DUAL, train, "2")
    assert text == f"{phases} has no {missing}: unpack it again, or convert CHAOS_T1DUAL_{present}."
    out = convert(f"{DUAL}_{present}", train, 12, [], num_processes=1)
    assert len(list((out / "labelsTr").iterdir())) == 2


def test_phases_on_two_grids(train, raw):
    write_dual(train / "1")
    write_dual(train / "2")
    moved = LPS.copy()
    moved[:3, 3] += LPS[:3, 2]
    odd = list(range(1, 2 * SHAPE[2], 2))
    write_series(train / "2" / "T1DUAL" / "DICOM_anon" / "OutPhase", random_image(2), odd, True, moved)
    text = reason(DUAL, train, "2")
    assert "InPhase and OutPhase do not lie on one grid: unpack both again" in text


@pytest.mark.slow
@pytest.mark.parametrize("descending", [True, False])
def test_a_patient_of_chaos(descending, train, raw, shared):
    """A converted patient, written as slices and masks and converted again: everything as it was, the liver right."""
    file = shared / "data" / SPIR / "imagesTr" / "chaos_01_0000.nii.gz"
    if not file.is_file():
        pytest.skip(f"{file} is missing: this test reads MR of CHAOS.")
    image, label = nib.load(file), nib.load(shared / "data" / SPIR / "labelsTr" / "chaos_01.nii.gz")
    # slices as scanners write them: columns to the left, rows to the back
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt("LPS"))
    stored, masks = (volume.as_reoriented(turn) for volume in (image, label))
    affine = np.diag([-1, -1, 1, 1]) @ stored.affine
    pixels = np.asanyarray(stored.dataobj)
    grey = np.array([0, *CENTRES], np.uint8)[np.asanyarray(masks.dataobj)]
    folder, depth = train / "1" / "T2SPIR", pixels.shape[2]
    for i in range(depth):
        level, name = depth - 1 - i if descending else i, f"IMG-0002-{i + 1:05d}"
        moved = affine.copy()
        moved[:3, 3] += affine[:3, 2] * level
        write_slice(folder / "DICOM_anon" / f"{name}.dcm", pixels[..., level], moved, i + 1, {"0008|0060": "MR"})
        write_png(folder / "Ground" / f"{name}.png", grey[..., level])
    out = convert(SPIR, train, 11, [], num_processes=1)
    made = [nib.load(out / name) for name in ("imagesTr/CHAOS_MR_1_0000.nii.gz", "labelsTr/CHAOS_MR_1.nii.gz")]
    for one, original in zip(made, (image, label)):
        one = nib.as_closest_canonical(one)
        np.testing.assert_array_equal(one.dataobj, original.dataobj)
        np.testing.assert_allclose(one.affine, original.affine, atol=1e-3)
    data, middle = np.asanyarray(made[1].dataobj), nib.affines.apply_affine(made[1].affine, np.array(made[1].shape) / 2)
    right = {
        name: nib.affines.apply_affine(made[1].affine, np.argwhere(data == i).mean(0))[0] - middle[0]
        for i, name in enumerate(NAMES, 1)
    }
    assert right["liver"] > 0 and right["kidney_right"] > 0 > right["spleen"]
    assert right["kidney_left"] < right["kidney_right"]
