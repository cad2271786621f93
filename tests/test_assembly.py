import errno
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import write_phantom
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from source_trees import AFFINES, SHAPE, save

from fsefs_nnunet.cli.main import main
from fsefs_nnunet.datasets import volumes
from fsefs_nnunet.datasets.common_labels import common_labels
from fsefs_nnunet.datasets.conversion import convert
from fsefs_nnunet.datasets.tables import tables
from fsefs_nnunet.labels import TEMPLATE_29
from fsefs_nnunet.losses.partial_labels import annotation_masks

UNIVERSAL = list(TEMPLATE_29)


def write_dataset(raw: Path, number: int, name: str, labels: list[str], cases: dict[str, np.ndarray], seed: int = 0):
    """A raw dataset; images are random, label maps as given."""
    folder = raw / f"Dataset{number:03d}_{name}"
    for i, (case, data) in enumerate(cases.items()):
        image = np.random.default_rng((seed, i)).integers(-500, 500, data.shape).astype(np.int16)
        save(folder / "imagesTr" / f"{case}_0000.nii.gz", image, AFFINES[0])
        save(folder / "labelsTr" / f"{case}.nii.gz", data, AFFINES[0])
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **{label: i for i, label in enumerate(labels, 1)}},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def stripes(values: int) -> np.ndarray:
    """Label map with value i in the i-th plane."""
    return np.broadcast_to(np.minimum(np.arange(SHAPE[0]), values)[:, None, None], SHAPE).astype(np.uint8).copy()


def assemble(*argv: object) -> int:
    return main(["assemble", *map(str, argv), "-np", "1"])


# ---- the table ----


def test_kidneys_of_three_sources():
    """One tells the sides, one the organ, one organ and masses: each annotates what it can, no value is lost."""
    sources = {
        "sided": ["kidney_left", "kidney_right"],
        "whole": ["kidneys", "liver"],
        "masses": ["kidneys", "kidney_tumor", "kidney_cyst"],
    }
    common = common_labels(sources, UNIVERSAL)
    value = {name: v for source in common.values.values() for name, v in source.items()}
    assert sorted(value.values()) == list(range(1, 7))
    assert set(common.labels["kidneys"]) == {v for name, v in value.items() if name != "liver"}
    assert common.labels["kidney_right"] == value["kidney_right"] and common.labels["liver"] == value["liver"]
    assert common.labels["kidney_tumor"] == value["kidney_tumor"]
    assert {s: set(classes) for s, classes in common.annotated.items()} == {
        "sided": {"kidneys", "kidney_left", "kidney_right"},
        "whole": {"kidneys", "liver"},
        "masses": {"kidneys", "kidney_tumor", "kidney_cyst"},
    }
    manager = LabelManager(common.labels, common.regions_class_order)
    assert manager.has_regions and manager.all_labels == list(range(7))
    # wholes are painted first, or they would hide their parts
    names = list(common.labels)[1:]
    assert names[0] == "kidneys" and common.regions_class_order[0] == value["kidneys"]


def test_parts_that_the_template_does_not_know_make_their_whole():
    lobes = [name for name in tables()["sources"]["TotalSegmentator"]["groups"]["lung"]]
    common = common_labels({"lobes": [*lobes, "trachea"], "lungs": ["lungs"]}, UNIVERSAL)
    assert common.values["lobes"]["trachea"] == 0
    right, left = common.labels["lung_right"], common.labels["lung_left"]
    assert {common.values["lobes"][lobe] for lobe in lobes if lobe.endswith("right")} == {right}
    assert {common.values["lobes"][lobe] for lobe in lobes if lobe.endswith("left")} == {left}
    assert set(common.labels["lungs"]) == {right, left, common.values["lungs"]["lungs"]}
    assert set(common.annotated["lobes"]) == {"lungs", "lung_right", "lung_left"}
    assert common.annotated["lungs"] == ["lungs"]


def test_half_of_a_whole_is_not_the_whole():
    common = common_labels({"a": ["lung_upper_lobe_left", "liver"], "b": ["lung_left"]}, UNIVERSAL)
    assert common.values["a"]["lung_upper_lobe_left"] == 0
    assert "lung_left" not in common.annotated["a"]


def test_lesion_outside_the_template_is_its_organ():
    common = common_labels({"a": ["liver", "liver_tumor"], "b": ["liver", "spleen"]}, ["liver", "spleen"])
    assert common.values["a"]["liver_tumor"] == common.values["a"]["liver"] == common.values["b"]["liver"]
    assert common.annotated == {"a": ["all_classes", "liver"][1:], "b": ["all_classes", "liver", "spleen"]}


def test_labels_without_any_whole_get_one():
    """Sigmoid outputs need nnU-Net's regions; a source that lacks a class does not annotate all of them."""
    common = common_labels({"a": ["anterior"], "b": ["posterior"], "c": ["anterior", "posterior"]}, None)
    assert common.labels == {"background": 0, "all_classes": [1, 2], "anterior": 1, "posterior": 2}
    assert common.annotated["a"] == ["anterior"] and common.annotated["b"] == ["posterior"]
    assert common.annotated["c"] == ["all_classes", "anterior", "posterior"]
    manager = LabelManager(common.labels, common.regions_class_order)
    # an output that no source has trained is not seen in a prediction
    logits = torch.tensor([9.0, -9.0, 9.0, -9.0, -9.0, -9.0, 9.0, 9.0, -9.0]).reshape(3, 3, 1, 1)
    assert manager.convert_logits_to_segmentation(logits).flatten().tolist() == [2, 2, 0]


def test_tables_that_make_no_assembly():
    with pytest.raises(ValueError, match="No label of b is in the template"):
        common_labels({"a": ["liver", "spleen"], "b": ["anterior"]}, UNIVERSAL)
    with pytest.raises(ValueError, match="only one class in all, liver"):
        common_labels({"a": ["liver"], "b": ["liver"]}, UNIVERSAL)


# ---- the command ----


def test_assembly(raw, capsys):
    first = write_dataset(raw, 11, "One", ["Liver", "left kidney", "trachea"], {"x": stripes(3), "y": stripes(2)})
    write_dataset(raw, 12, "Two", ["kidney", "spleen"], {"x": stripes(2)}, seed=1)
    assert assemble("-d", 11, 12, "-o", 900) == 0
    out = raw / "Dataset900_Universal"
    content = json.loads((out / "dataset.json").read_text())
    value = {name: v for name, v in content["labels"].items() if isinstance(v, int)}
    assert set(content["labels"]) == {"background", "spleen", "kidney_left", "liver", "kidneys"}
    assert content["sources"] == {
        "Dataset011_One": {"classes": ["kidney_left", "liver"], "cases": ["One_x", "One_y"]},
        "Dataset012_Two": {"classes": ["kidneys", "spleen"], "cases": ["Two_x"]},
    }
    image = out / "imagesTr" / "One_y_0000.nii.gz"
    assert image.is_symlink() and image.resolve() == first / "imagesTr" / "y_0000.nii.gz"
    data = np.asanyarray(nib.load(out / "labelsTr" / "One_x.nii.gz").dataobj)
    assert data[:5, 0, 0].tolist() == [0, value["liver"], value["kidney_left"], 0, 0]  # the trachea is background
    np.testing.assert_allclose(nib.load(out / "labelsTr" / "One_x.nii.gz").affine, AFFINES[0], atol=1e-6)
    whole = content["labels"]["kidneys"][0]
    assert set(content["labels"]["kidneys"]) == {whole, value["kidney_left"]} and whole not in value.values()
    assert np.asanyarray(nib.load(out / "labelsTr" / "Two_x.nii.gz").dataobj)[:3, 0, 0].tolist() == [
        0,
        whole,
        value["spleen"],
    ]
    masks = annotation_masks(content, list(content["labels"])[1:])
    assert {case: int(mask.sum()) for case, mask in masks.items()} == {"One_x": 2, "One_y": 2, "Two_x": 2}
    printed = capsys.readouterr().out
    assert "Dataset011_One: trachea not in the template: treated as background, unannotated" in printed
    table = [line.split() for line in printed.splitlines() if line.split()[:1] in (["liver"], ["kidneys"])]
    assert table == [["kidneys", "-", "1"], ["liver", "2", "-"]]


def test_one_patient_in_two_sources(raw, capsys):
    """Stored in another orientation and number format: the same voxels, kept once."""
    one = write_dataset(raw, 11, "One", ["liver", "spleen"], {"x": stripes(2), "y": stripes(2), "y_2": stripes(2)})
    two = write_dataset(raw, 12, "Two", ["pancreas", "spleen"], {"a": stripes(2), "b": stripes(2)}, seed=1)
    image = nib.load(one / "imagesTr" / "y_0000.nii.gz")
    turned = nib.as_closest_canonical(nib.Nifti1Image(np.asanyarray(image.dataobj).astype(np.float32), image.affine))
    nib.save(turned, two / "imagesTr" / "a_0000.nii.gz")
    assert turned.affine[0, 0] > 0 > image.affine[0, 0]
    assert assemble("-d", 12, 11, "-o", 900, "--template", "union") == 0
    out = raw / "Dataset900_Union"
    content = json.loads((out / "dataset.json").read_text())
    assert {name: source["cases"] for name, source in content["sources"].items()} == {
        "Dataset012_Two": ["Two_a", "Two_b"],
        "Dataset011_One": ["One_x", "One_y_2"],
    }
    assert content["numTraining"] == 4
    assert sorted(file.name for file in (out / "labelsTr").iterdir()) == [
        "One_x.nii.gz",
        "One_y_2.nii.gz",
        "Two_a.nii.gz",
        "Two_b.nii.gz",
    ]
    assert len(list((out / "imagesTr").iterdir())) == 4
    assert "One_y is the same patient as Two_a, whose labels are kept." in capsys.readouterr().out


def test_sources_of_one_name_and_generic_labels(raw, capsys):
    write_dataset(raw, 11, "Site", ["organ", "cancer"], {"x": stripes(2)})
    write_dataset(raw, 12, "Site", ["gland", "Cancer"], {"x": stripes(2)}, seed=1)
    assert assemble("-d", 11, 12, "-o", 900, "--template", "union") == 0
    content = json.loads((raw / "Dataset900_Union" / "dataset.json").read_text())
    assert content["sources"]["Dataset012_Site"]["cases"] == ["Dataset012_Site_x"]
    assert "cancer of Dataset011_Site and Dataset012_Site is treated as one class" in capsys.readouterr().out


def refused(capsys, *argv: object) -> str:
    assert assemble(*argv) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_refused_assemblies(raw, capsys):
    write_dataset(raw, 11, "One", ["liver"], {"x": stripes(1)})
    write_dataset(raw, 12, "Two", ["spleen"], {"x": stripes(2)}, seed=1)
    three = write_dataset(raw, 13, "Three", ["Kidney", "kidneys"], {"x": stripes(1)})
    assert "two datasets or more, each once" in refused(capsys, "-d", 11, "Dataset011_One", "-o", 900)
    assert "No dataset 14" in refused(capsys, "-d", 11, 14, "-o", 900)
    assert "id 12 is taken by Dataset012_Two" in refused(capsys, "-d", 11, 12, "-o", 12)
    assert "has two labels for kidneys" in refused(capsys, "-d", 11, 13, "-o", 900)
    message = refused(capsys, "-d", 11, 12, "-o", 900)
    assert "Dataset012_Two/labelsTr/x.nii.gz has values [2] that dataset.json does not name" in message
    content = json.loads((three / "dataset.json").read_text())
    order = {"regions_class_order": [2, 1]}
    changes = (
        ({"labels": {"background": 0, "all": [1, 2], "one": 1}, **order}, "has regions or an ignore label"),
        ({"labels": {"background": 0, "one": 1, "ignore": 2}}, "has regions or an ignore label"),
        ({"labels": {"background": 0, "spleen": 1}, "channel_names": {"0": "MRI"}}, "has channels MRI"),
        ({"labels": {"background": 0, "spleen": 1}, "file_ending": ".mha"}, "has .mha files: NIfTI is expected"),
    )
    for change, reason in changes:
        (three / "dataset.json").write_text(json.dumps({**content, **change}))
        assert reason in refused(capsys, "-d", 11, 13, "-o", 900)
    unfinished = raw / ".Dataset900_Universal.part"
    datasets = ["Dataset011_One", "Dataset012_Two", "Dataset013_Three"]
    assert sorted(path.name for path in raw.iterdir()) == [unfinished.name, *datasets]

    # what stopped it is mended: the same command goes on
    started = (unfinished / "labelsTr" / "One_x.nii.gz").lstat().st_mtime_ns
    save(raw / "Dataset012_Two" / "labelsTr" / "x.nii.gz", stripes(1), AFFINES[0])
    assert assemble("-d", 11, 12, "-o", 900) == 0
    finished = raw / "Dataset900_Universal"
    assert (finished / "labelsTr" / "One_x.nii.gz").lstat().st_mtime_ns == started
    assert not unfinished.exists() and not (finished / "records").exists()


def test_unfinished_assembly_of_other_datasets(raw, capsys):
    """Finished cases are taken over by the same datasets with the same labels in the same order alone."""
    one = write_dataset(raw, 11, "One", ["liver", "spleen"], {"x": stripes(2)})
    write_dataset(raw, 12, "Two", ["liver", "spleen"], {"x": stripes(3)}, seed=1)
    write_dataset(raw, 13, "Three", ["liver", "spleen"], {"x": stripes(2)}, seed=2)
    assert "has values [3]" in refused(capsys, "-d", 11, 12, "-o", 900)
    begun = "was started with other options, labels or cases: delete it first"
    assert begun in refused(capsys, "-d", 11, 13, "-o", 900)
    assert begun in refused(capsys, "-d", 12, 11, "-o", 900)
    content = json.loads((one / "dataset.json").read_text())
    content["labels"] = {"background": 0, "liver": 2, "spleen": 1}
    (one / "dataset.json").write_text(json.dumps(content))
    assert begun in refused(capsys, "-d", 11, 12, "-o", 900)


def test_no_space_left(raw, monkeypatch, capsys):
    """The disk fills up at the second case; with space again the same command goes on."""
    write_dataset(raw, 11, "One", ["liver", "spleen"], {"x": stripes(2)})
    write_dataset(raw, 12, "Two", ["liver", "spleen"], {"x": stripes(2)}, seed=1)
    link = volumes.os.symlink

    def full(source, target):
        if "Two_x" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        link(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(volumes.os, "symlink", full)
        assert "run the same command again" in refused(capsys, "-d", 11, 12, "-o", 900)
    first = (raw / ".Dataset900_Universal.part" / "imagesTr" / "One_x_0000.nii.gz").lstat().st_mtime_ns
    assert assemble("-d", 11, 12, "-o", 900) == 0
    out = raw / "Dataset900_Universal"
    assert (out / "imagesTr" / "One_x_0000.nii.gz").lstat().st_mtime_ns == first
    assert json.loads((out / "dataset.json").read_text())["numTraining"] == 2


def test_cases_whose_short_names_are_one(raw):
    """A + 1_x and A_1 + x."""
    write_dataset(raw, 11, "A", ["liver", "spleen"], {"1_x": stripes(2)})
    write_dataset(raw, 12, "A_1", ["liver", "spleen"], {"x": stripes(2)}, seed=1)
    assert assemble("-d", 11, 12, "-o", 900) == 0
    names = sorted(file.name for file in (raw / "Dataset900_Universal" / "labelsTr").iterdir())
    assert names == ["Dataset011_A_1_x.nii.gz", "Dataset012_A_1_x.nii.gz"]


# ---- nnU-Net, our planner, our pretrainer ----


@pytest.mark.slow
def test_converted_and_assembled_datasets_are_planned_and_read(raw, tmp_path, monkeypatch):
    """Two downloads -> datasets -> nnU-Net's integrity check -> our plans -> the masks of FSEFTPretrainer."""
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    from fsefs_nnunet.nnunet import planning
    from fsefs_nnunet.trainers.pretrainer import FSEFTPretrainer

    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    for i in range(2):
        training = tmp_path / "btcv" / "Training"
        scratch = tmp_path / "scratch.nii.gz"
        for folder in ("img", "label"):
            (training / folder).mkdir(parents=True, exist_ok=True)
        write_phantom(training / "img" / f"img000{i}.nii.gz", scratch, (3, i))
        organs = nib.load(scratch)
        labels = np.array([0, 1, 7, 3], np.uint8)[np.asanyarray(organs.dataobj)]
        save(training / "label" / f"label000{i}.nii.gz", labels, organs.affine)
        flare = tmp_path / "flare"
        for folder in ("images", "labels"):
            (flare / folder).mkdir(parents=True, exist_ok=True)
        write_phantom(flare / "images" / f"FLARE22_Tr_000{i}_0000.nii.gz", scratch, (4, i))
        labels = np.array([0, 3, 11, 13], np.uint8)[np.asanyarray(nib.load(scratch).dataobj)]
        save(flare / "labels" / f"FLARE22_Tr_000{i}.nii.gz", labels, organs.affine)
    convert("BTCV", tmp_path / "btcv", 11, ["spleen", "stomach"], num_processes=1)
    convert("FLARE22", flare, 12, ["spleen", "kidney_left"], num_processes=1)
    assert assemble("-d", 11, 12, "-o", 900) == 0
    verify_dataset_integrity(str(raw / "Dataset011_BTCV"), 1)
    planning.plan(900, "phantom", [], 1, 8, None)
    name = "Dataset900_Universal"
    plans = json.loads((raw.parent / "nnUNet_preprocessed" / name / "FSEFTPlans.json").read_text())
    content = json.loads((raw / name / "dataset.json").read_text())
    trainer = FSEFTPretrainer({**plans, "continue_training": False}, "3d_fullres", 0, content, torch.device("cpu"))
    assert trainer.region_names == ["all_classes", "spleen", "kidney_left", "stomach"]
    assert {case: mask.tolist() for case, mask in trainer.masks.items()} == {
        "BTCV_img0000": [0, 1, 0, 1],
        "BTCV_img0001": [0, 1, 0, 1],
        "FLARE22_FLARE22_Tr_0000": [0, 1, 1, 0],
        "FLARE22_FLARE22_Tr_0001": [0, 1, 1, 0],
    }


# ---- headers ----


@pytest.mark.parametrize("what", ["lost header", "another shape"])
def test_labels_that_do_not_lie_on_their_image(raw, capsys, what):
    write_dataset(raw, 11, "One", ["liver"], {"x": stripes(1)})
    folder = write_dataset(raw, 12, "Two", ["spleen"], {"y": stripes(1)}, seed=1)
    label = stripes(1) if what == "lost header" else stripes(1)[:, :, 1:]
    save(folder / "labelsTr" / "y.nii.gz", label, np.eye(4) if what == "lost header" else AFFINES[0])
    message = refused(capsys, "-d", 11, 12, "-o", 900)
    assert f"{folder / 'labelsTr' / 'y.nii.gz'} does not lie on the grid of" in message
    assert ("fseft rewrite_header" in message) == (what == "lost header")


def test_shifts_and_offsets_are_told(raw, capsys):
    folder = write_dataset(raw, 11, "One", ["liver"], {"x": stripes(1)})
    write_dataset(raw, 12, "Two", ["spleen"], {"y": stripes(1)}, seed=1)
    affine = AFFINES[0].copy()
    affine[:3, 3] += 50
    save(folder / "labelsTr" / "x.nii.gz", stripes(1), affine)
    image = folder / "imagesTr" / "x_0000.nii.gz"
    save(image, np.abs(np.asarray(nib.load(image).dataobj)), AFFINES[0])
    assert assemble("-d", 11, 12, "-o", 900) == 0
    out = capsys.readouterr().out
    assert "Warning: The headers of Dataset011_One/x place files of one case up to 86.6 mm apart" in out
    assert "Warning: One_x: no value below 0, unlike CT in HU" in out
