import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from source_trees import AFFINES, FIRST, SECOND, SHAPE, TREES, lits, save, truncate

from fsefs_nnunet.datasets.conversion import convert
from fsefs_nnunet.datasets.selection import select
from fsefs_nnunet.datasets.sides import split_sides
from fsefs_nnunet.datasets.source import Case, Source, numbered, paired
from fsefs_nnunet.datasets.sources import SOURCES, find_source
from fsefs_nnunet.datasets.tables import tables
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.labels import TEMPLATE_29, normalised

LABELS = {
    "FLARE22": "liver kidney_right spleen pancreas aorta inferior_vena_cava adrenal_gland_right adrenal_gland_left "
    "gallbladder esophagus stomach duodenum kidney_left",
    "AMOS22": "spleen kidney_right kidney_left gallbladder esophagus liver stomach aorta inferior_vena_cava pancreas "
    "adrenal_gland_right adrenal_gland_left duodenum urinary_bladder prostate_uterus",
    "BTCV": "spleen kidney_right kidney_left gallbladder esophagus liver stomach aorta inferior_vena_cava "
    "portal_vein_and_splenic_vein pancreas adrenal_gland_right adrenal_gland_left",
    "LiTS": "liver liver_tumor",
    "KiTS": "kidneys kidney_tumor kidney_cyst",
    "MSD": "pancreas pancreas_tumor",
    "CT-ORG": "liver urinary_bladder lung_right lung_left kidney_right kidney_left bone brain",
    "AbdomenCT-1K": "liver kidney_right kidney_left spleen pancreas",
}


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("name", list(TREES))
def test_published_layout(name, raw, tmp_path, capsys):
    tree = TREES[name](tmp_path / "source")
    out = convert(name.lower(), tree.folder, 11, [], num_processes=1)
    ending = ".nii" if name == "LiTS" else ".nii.gz"
    assert out.name == ("Dataset011_Pancreas" if name == "MSD" else f"Dataset011_{name}")
    assert files(out / "imagesTr") == sorted(f"{case}_0000{ending}" for case in tree.images)
    assert files(out / "labelsTr") == sorted(f"{case}{ending}" for case in tree.labels)
    assert not tree.tests or files(out / "imagesTs") == [f"{case}_0000{ending}" for case in tree.tests]
    for case, expected in tree.labels.items():
        image_file, label_file = out / "imagesTr" / f"{case}_0000{ending}", out / "labelsTr" / f"{case}{ending}"
        image, label = nib.load(image_file), nib.load(label_file)
        assert image_file.is_symlink() and str(image_file.resolve()).startswith(str(tree.folder))
        assert label_file.is_symlink() == (name not in ("CT-ORG", "AbdomenCT-1K"))  # unchanged unless sides are told
        np.testing.assert_array_equal(np.asanyarray(image.dataobj), tree.images[case])
        np.testing.assert_array_equal(np.asanyarray(label.dataobj), expected)
        np.testing.assert_allclose(label.affine, tree.affines[case], atol=1e-6)
    content = json.loads((out / "dataset.json").read_text())
    expected_names = ["background", *LABELS[name].split()]
    assert content["labels"] == {label: i for i, label in enumerate(expected_names)}
    assert (content["numTraining"], content["file_ending"]) == (len(tree.images), ending)
    assert content["channel_names"] == {"0": "CT"}
    summary = json.loads((out / "conversion.json").read_text())
    assert list(summary["left out"]) == [tree.broken]
    assert f"{tree.broken}" in (printed := capsys.readouterr().out) and "cannot be read" in printed
    assert not list(raw.glob(".*"))


def test_names_of_all_tables_are_canonical():
    """`fseft assemble` and the backbones' heads compare names as labels.normalised gives them."""
    for source in tables()["sources"].values():
        for names in (source.get("labels", {}), source.get("v1", []), source.get("v2", [])):
            assert all(normalised(name) in (name, name.lower()) for name in names)
    assert all(normalised(name) == name for name in TEMPLATE_29)


def test_every_converter_has_its_labels_and_its_line_in_the_documentation():
    assert set(SOURCES) == set(tables()["sources"])
    page = Path(__file__).parents[1] / "documentation" / "datasets.md"
    rows = [line.split("|")[1].strip() for line in page.read_text().splitlines() if line.startswith("| ")]
    assert sorted(rows) == sorted(["NAME", *SOURCES])


class Spleens(Source):
    """A converter outside of the package, with a row of its own."""

    name = "Spleens"
    layout = "images/scan_1.nii.gz and labels/scan_1.nii.gz"
    row = {
        "reference": "https://example.org/spleens",
        "labels": {"spleen": 4, "liver": 2},
        "groups": {"one": ["liver"]},
    }

    def cases(self, folder: Path) -> list[Case]:
        images, labels = (
            numbered(folder.glob(f"{name}/*.nii.gz"), r"scan_(\d+)\.nii\.gz") for name in ("images", "labels")
        )
        return paired(images, labels, "scan_{}")


def test_a_converter_of_ones_own(raw, tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "Spleens", Spleens)
    values = np.zeros(SHAPE, np.uint8)
    values[:3], values[3:5] = 4, 2
    save(tmp_path / "source" / "images" / "scan_7.nii.gz", np.zeros(SHAPE, np.int16), AFFINES[0])
    save(tmp_path / "source" / "labels" / "scan_7.nii.gz", values, AFFINES[0])
    out = convert("spleens", tmp_path / "source", 11, ["one", "spleen"], num_processes=1)
    content = json.loads((out / "dataset.json").read_text())
    assert out.name == "Dataset011_Spleens" and content["labels"] == {"background": 0, "liver": 1, "spleen": 2}
    assert content["reference"] == "https://example.org/spleens"
    written = np.asarray(nib.load(out / "labelsTr" / "scan_7.nii.gz").dataobj)
    np.testing.assert_array_equal(written, np.where(values == 4, 2, np.where(values == 2, 1, 0)))


def test_one_case_in_two_places(raw, tmp_path):
    kits = TREES["KiTS"](tmp_path / "kits")
    shutil.copytree(kits.folder / "dataset", kits.folder / "again")
    total_segmentator(tmp_path / "ts" / "one", "v1", ("s0000",))
    shutil.copytree(tmp_path / "ts" / "one", tmp_path / "ts" / "two")
    for name, folder, case in (("KiTS", kits.folder, "case_00000"), ("TotalSegmentator", tmp_path / "ts", "s0000")):
        with pytest.raises(InputError, match=f"/{case}/.* and .*/{case}.* are both case {case}"):
            convert(name, folder, 11, [], num_processes=1)
    assert not list(raw.iterdir())


# ---- TotalSegmentator ----


def total_segmentator(folder: Path, version: str, cases=("s0000", "s0011")) -> dict[str, np.ndarray]:
    """Every class in one voxel of its own. Returns the label maps of all classes by the version's order."""
    names, expected = tables()["sources"]["TotalSegmentator"][version], {}
    for number, case in enumerate(cases):
        save(folder / case / "ct.nii.gz", np.zeros(SHAPE, np.int16), AFFINES[number])
        expected[case] = np.zeros(SHAPE, np.uint8)
        for i, name in enumerate(names):
            mask = np.zeros(SHAPE, np.uint8)
            mask.flat[i + number] = 1
            expected[case].flat[i + number] = i + 1
            save(folder / case / "segmentations" / f"{name}.nii.gz", mask, AFFINES[number])
    return expected


def test_totalsegmentator_versions(raw, tmp_path):
    for number, version, classes in ((11, "v1", 104), (12, "v2", 117)):
        expected = total_segmentator(tmp_path / version, version)
        truncated = tmp_path / version / "s0011" / "segmentations" / "liver.nii.gz"
        truncate(truncated)
        out = convert("TotalSegmentator", tmp_path / version, number, [], num_processes=1)
        content = json.loads((out / "dataset.json").read_text())
        assert list(content["labels"])[1:] == tables()["sources"]["TotalSegmentator"][version]
        assert content["labels"]["background"] == 0 and max(content["labels"].values()) == classes
        assert files(out / "labelsTr") == ["s0000.nii.gz"]
        np.testing.assert_array_equal(nib.load(out / "labelsTr" / "s0000.nii.gz").dataobj, expected["s0000"])
        assert str(truncated) in json.loads((out / "conversion.json").read_text())["left out"]["s0011"]


def test_totalsegmentator_groups(raw, tmp_path):
    total_segmentator(tmp_path / "source", "v1", ("s0000",))
    out = convert("TotalSegmentator", tmp_path / "source", 11, ["base", "gluteus", "spleen"], num_processes=1)
    labels = json.loads((out / "dataset.json").read_text())["labels"]
    base = "spleen kidney_left gallbladder esophagus liver pancreas stomach duodenum aorta".split()
    gluteus = [f"gluteus_{part}_{side}" for part in ("maximus", "medius", "minimus") for side in ("left", "right")]
    assert list(labels) == ["background", *base, *gluteus]
    data = np.asanyarray(nib.load(out / "labelsTr" / "s0000.nii.gz").dataobj)
    order = tables()["sources"]["TotalSegmentator"]["v1"]
    assert {name: int(data.flat[order.index(name)]) for name in labels if name != "background"} == {
        name: i for i, name in enumerate(base + gluteus, 1)
    }
    assert np.count_nonzero(data) == 15


def test_heart_is_a_class_in_v2_and_a_group_in_v1():
    content = tables()["sources"]["TotalSegmentator"]
    names = {
        version: select({n: i for i, n in enumerate(content[version], 1)}, ["heart"], [], content["groups"]).names
        for version in ("v1", "v2")
    }
    assert names["v2"] == ("heart",)
    assert len(names["v1"]) == 6 and "heart_atrium_left" in names["v1"]


def test_overlapping_masks(raw, tmp_path, capsys):
    folder = tmp_path / "source" / "s0000" / "segmentations"
    total_segmentator(tmp_path / "source", "v1", ("s0000",))
    spleen, liver = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    spleen[2:6, 2:4, 2:4], liver[5:8, 2:4, 2:4] = 1, 1
    save(folder / "spleen.nii.gz", spleen, AFFINES[0]), save(folder / "liver.nii.gz", liver, AFFINES[0])
    for number, order in ((11, ["spleen", "liver"]), (12, ["liver", "spleen"])):
        out = convert("TotalSegmentator", tmp_path / "source", number, order, num_processes=1)
        data = np.asanyarray(nib.load(out / "labelsTr" / "s0000.nii.gz").dataobj)
        assert (data[5, 2:4, 2:4] == 2).all()
        assert "voxels in several masks (the later class has them): s0000 4" in capsys.readouterr().out


@pytest.mark.slow
def test_real_ct(raw, real_ct):
    """Of the 104 masks, 59 are not empty: names and voxel counts stay."""
    out = convert("TotalSegmentator", real_ct, 11, [], num_processes=1)
    labels = json.loads((out / "dataset.json").read_text())["labels"]
    masks = {file.name[:-7]: file for file in (real_ct / "s0000" / "segmentations").iterdir()}
    assert set(labels) - {"background"} == set(masks)
    label = nib.load(out / "labelsTr" / "s0000.nii.gz")
    np.testing.assert_array_equal(label.affine, nib.load(real_ct / "s0000" / "ct.nii.gz").affine)
    counts = np.bincount(np.asanyarray(label.dataobj).ravel(), minlength=105)
    expected = {name: int(np.count_nonzero(nib.load(file).dataobj)) for name, file in masks.items()}
    assert {name: int(counts[labels[name]]) for name in masks} == expected
    assert sum(n > 0 for n in expected.values()) == 59


# ---- MSD ----


def test_msd_with_several_channels(raw, tmp_path):
    folder = tmp_path / "Task01_BrainTumour"
    image = np.random.default_rng(0).integers(0, 500, (*SHAPE, 4)).astype(np.float32)
    save(folder / "imagesTr" / "BRATS_001.nii.gz", image, AFFINES[1])
    save(folder / "labelsTr" / "BRATS_001.nii.gz", (image[..., 0] > 250).astype(np.uint8), AFFINES[1])
    save(folder / "imagesTr" / "BRATS_002.nii.gz", image[..., :3], AFFINES[1])
    save(folder / "labelsTr" / "BRATS_002.nii.gz", (image[..., 0] > 250).astype(np.uint8), AFFINES[1])
    modality = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
    content = {"modality": modality, "labels": {"0": "background", "1": "edema"}}
    (folder / "dataset.json").write_text(json.dumps(content))
    out = convert("MSD", folder, 11, [], num_processes=1)
    assert json.loads((out / "dataset.json").read_text())["channel_names"] == modality
    assert files(out / "imagesTr") == [f"BRATS_001_{i:04d}.nii.gz" for i in range(4)]
    for i in range(4):
        channel = nib.load(out / "imagesTr" / f"BRATS_001_{i:04d}.nii.gz")
        np.testing.assert_array_equal(channel.dataobj, image[..., i])
        np.testing.assert_allclose(channel.affine, AFFINES[1], atol=1e-5)
    left_out = json.loads((out / "conversion.json").read_text())["left out"]
    assert "has 3 channels instead of 4" in left_out["BRATS_002"]


# ---- right and left ----


def two_boxes(*boxes) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    for start, stop in boxes:
        mask[tuple(slice(a, b) for a, b in zip(start, stop))] = True
    return mask


@pytest.mark.parametrize("flip", [1, -1])
def test_sides_follow_the_patient(flip):
    """Both boxes lie in the first half of the array, and a fragment lies beside the second."""
    mask = two_boxes(((0, 2, 1), (2, 5, 4)), ((4, 2, 1), (6, 5, 4)), ((7, 2, 1), (8, 3, 2)))
    side = split_sides(mask, np.diag([flip, 1.0, 1.0, 1.0]))
    to_the_right = np.broadcast_to(np.arange(SHAPE[0])[:, None, None] >= 4, SHAPE)
    right = to_the_right if flip == 1 else ~to_the_right
    np.testing.assert_array_equal(side, np.where(mask, np.where(right, 1, 2), 0))


def test_sides_that_cannot_be_told():
    assert split_sides(two_boxes(FIRST), np.eye(4)) is None
    assert split_sides(two_boxes(FIRST, ((9, 2, 1), (10, 3, 2))), np.eye(4)) is None  # an organ and a crumb of it
    behind = two_boxes(FIRST, SECOND)
    assert split_sides(behind, np.eye(4)) is not None
    # the array's first axis runs to the back: the boxes lie on one side
    assert split_sides(behind, AFFINES[2]) is None


def test_undecided_case_is_left_out_and_the_whole_can_be_kept(raw, tmp_path):
    folder = tmp_path / "source"
    for i, boxes in ((1, (FIRST, SECOND)), (2, (FIRST,))):
        save(folder / "ImagePart1" / f"Case_0000{i}_0000.nii.gz", np.zeros(SHAPE, np.int16), AFFINES[0])
        save(folder / "Mask" / f"Case_0000{i}.nii.gz", two_boxes(*boxes).astype(np.uint8) * 2, AFFINES[0])
    out = convert("AbdomenCT-1K", folder, 11, [], num_processes=1)
    reason = json.loads((out / "conversion.json").read_text())["left out"]["Case_00002"]
    assert "right and left of kidneys cannot be told apart" in reason and "--classes with kidneys" in reason
    out = convert("AbdomenCT-1K", folder, 12, ["kidneys"], num_processes=1)
    assert files(out / "labelsTr") == ["Case_00001.nii.gz", "Case_00002.nii.gz"]


# ---- choice of classes ----


@pytest.mark.parametrize("names", [["liver"], ["liver_tumor", "Liver"]])
def test_lesion_that_is_not_wanted_is_its_organ(names, raw, tmp_path):
    tree = lits(tmp_path / "source")
    out = convert("LiTS", tree.folder, 11, names, num_processes=1)
    data = np.asanyarray(nib.load(out / "labelsTr" / "volume-0.nii").dataobj)
    swapped = np.array([0, 2, 1])[tree.labels["volume-0"]]
    np.testing.assert_array_equal(data, tree.labels["volume-0"] > 0 if names == ["liver"] else swapped)


def test_kidneys_of_kits_are_split_on_demand_with_their_tumours():
    selection = select(find_source("kits").table(Path()), ["kidney_right", "kidney_left"], [], {})
    assert selection.names == ("kidney_right", "kidney_left")
    assert [tuple(pair) for pair in selection.pairs] == [("kidneys", [1, 2, 3], 1, 2)]


@pytest.mark.parametrize(
    "wanted, message",
    [
        (["livr"], "No class 'livr' here. Did you mean liver?"),
        (["kidneys", "kidney_left"], "'kidneys' and its part 'kidney_left' cannot both be a label"),
    ],
)
def test_refused_classes(wanted, message):
    with pytest.raises(ValueError, match=message):
        select({"liver": 1, "kidneys": 2}, wanted, ["kidneys"], {})


def test_misspelt_source():
    with pytest.raises(ValueError, match="No converter 'AMOS'. Did you mean AMOS22?"):
        find_source("AMOS")
    with pytest.raises(ValueError, match="Did you mean TotalSegmentator?"):
        find_source("totalsegmentor")
