"""Planning and preprocessing: what is refused before anything is replaced, and what is made anew."""

import json
import os
import re
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from trainings import edit

from fsefs_nnunet.backbones.store import find_backbone, load_weights, save_backbone
from fsefs_nnunet.cases.queries import UnlabelledQueries
from fsefs_nnunet.cli.main import main
from fsefs_nnunet.planners.fseft_planner import FSEFTPlanner

# ---- what is refused, before anything is replaced ----


def raw_image(workspace, case="case_7"):
    return workspace.raw / "imagesTr" / f"{case}_0000.nii.gz"


def with_nan(workspace) -> None:
    image = nib.load(raw_image(workspace))
    array = image.get_fdata(dtype=np.float32)
    array[3, 3, 3] = np.nan
    nib.save(nib.Nifti1Image(array, image.affine), raw_image(workspace))


def truncated(workspace) -> None:
    raw_image(workspace).write_bytes(raw_image(workspace).read_bytes()[:1000])


def second_channel(workspace) -> None:
    shutil.copy(raw_image(workspace), raw_image(workspace).with_name("case_7_0001.nii.gz"))


def two_channels_wanted(workspace) -> None:
    edit(workspace.raw / "dataset.json", lambda content: content.update(channel_names={"0": "CT", "1": "CT"}))


def damaged_backbone(workspace) -> None:
    store = workspace.root / "store"
    save_backbone(replace(find_backbone("phantom"), id="mine"), load_weights(find_backbone("phantom")), store)
    file = store / "mine.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def raw_label(workspace):
    return workspace.raw / "labelsTr" / "case_7.nii.gz"


def with_label(change):
    """What replaces the last case's label map by what `change` makes of it."""

    def replace_it(workspace) -> None:
        label = nib.load(raw_label(workspace))
        array = change(np.asarray(label.dataobj).copy())
        nib.save(nib.Nifti1Image(array, label.affine), raw_label(workspace))

    return replace_it


def truncated_label(workspace) -> None:
    raw_label(workspace).write_bytes(raw_label(workspace).read_bytes()[:200])


def no_json(workspace) -> None:
    (workspace.raw / "dataset.json").write_text('{"labels": ')


def no_ending(workspace) -> None:
    edit(workspace.raw / "dataset.json", lambda content: content.pop("file_ending"))


def other_ending(workspace) -> None:
    edit(workspace.raw / "dataset.json", lambda content: content.update(file_ending=".mha"))


def no_images(workspace) -> None:
    shutil.rmtree(workspace.raw / "imagesTr")


REFUSED = {
    "truncated label": (truncated_label, [], r"case_7\.nii\.gz cannot be read .*: repair it, or leave the case out"),
    "no label": (lambda w: raw_label(w).unlink(), [], r"case_7\.nii\.gz is missing: every training image needs"),
    "label of another shape": (
        with_label(lambda x: x[:-1]),
        [],
        r"case_7\.nii\.gz does not lie on the grid of .*: 23 x 20",
    ),
    "unknown label": (
        with_label(lambda x: x + 7),
        [],
        r"case_7\.nii\.gz holds the values 7, 8, 9 and 1 more, but dataset",
    ),
    "half a label": (
        with_label(lambda x: x / 2.0),
        [],
        r"case_7\.nii\.gz holds values that are not integers, 0\.5, 1\.5: round",
    ),
    "no JSON": (no_json, [], r"dataset\.json is not an nnU-Net dataset\.json"),
    "no file ending": (no_ending, [], r'dataset\.json: file_ending is missing: add "file_ending": "\.nii\.gz"'),
    "another file ending": (
        other_ending,
        [],
        r"case_0_0000\.nii\.gz does not end with \.mha, the file_ending .* 7 more",
    ),
    "no images": (no_images, [], r"imagesTr does not exist\. Expected a folder of images named <case>_0000\."),
    "NaN": (with_nan, [], r"case_7_0000\.nii\.gz holds NaN or infinite values: repair"),
    "truncated image": (truncated, [], r"case_7_0000\.nii\.gz cannot be read .*: repair it, or leave the case out"),
    "a channel too many": (second_channel, [], r"case_7_0001\.nii\.gz is one channel too many: the dataset has 1"),
    "a channel too few": (two_channels_wanted, [], r"channel"),
    "K beyond the cases": (None, ["--shots", "99"], r"99 shots need as many labelled cases, but the dataset has 8"),
    "unknown backbone": (None, ["-b", "fantom"], r"'fantom'"),
    "damaged backbone": (damaged_backbone, ["-b", "mine"], r"mine\.safetensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_replaced(workspace, monkeypatch, capsys, name):
    break_it, options, sentence = REFUSED[name]
    monkeypatch.setenv("fseft_backbones", str(workspace.root / "store"))
    if break_it is not None:
        break_it(workspace)
    before = {path: path.read_bytes() for path in workspace.preprocessed.rglob("*") if path.is_file()}
    assert main(["plan_and_preprocess", "-d", "77", "--seed", "1", "-np", "1", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fseft: ") and re.search(sentence, error)
    assert {path: path.read_bytes() for path in workspace.preprocessed.rglob("*") if path.is_file()} == before


def test_a_name_that_is_no_dataset(workspace, capsys):
    assert main(["splits", "-d", "Hippocampus"]) == 2
    assert "No dataset Hippocampus in" in capsys.readouterr().err


def test_a_preprocessed_folder_that_cannot_be_made(workspace, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "file"))
    assert main(["splits", "-d", "77"]) == 2
    assert "file/Dataset077_Tiny cannot be written to (Not a directory): check nnUNet_prepro" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["-np", "0"], ["-gpu_memory_target", "0"], ["-overwrite_plans_name", "a/b"]])
def test_arguments_out_of_range(workspace, capsys, options):
    with pytest.raises(SystemExit):
        main(["plan", "-d", "77", *options])
    assert f"argument {options[0]}: {options[1]!r} is no" in capsys.readouterr().err


# ---- what is made anew ----


def test_the_fingerprint_is_of_the_images_that_lie_there(workspace, capsys):
    fingerprint = workspace.preprocessed / "dataset_fingerprint.json"
    os.utime(fingerprint)  # newer than the copies of the images
    made = fingerprint.stat().st_mtime_ns
    assert main(["plan", "-d", "77", "-np", "1"]) == 0
    assert fingerprint.stat().st_mtime_ns == made
    for file in sorted(workspace.raw.glob("*Tr/*.nii.gz")):
        image = nib.load(file)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), np.diag([5.0, 5.0, 5.0, 1.0])), file)
    assert main(["plan", "-d", "77", "-np", "1"]) == 0
    assert "Spacing [5.0, 5.0, 5.0] mm" in capsys.readouterr().out


def test_plan_keys_that_were_edited_are_told(workspace, capsys):
    def change(plans: dict) -> None:
        configuration = plans["configurations"]["3d_fullres_1shot"]
        configuration.update(patch_size=[16, 16, 16], fseft_lambda=0.7, spacing=[2.0, 2.0, 2.0])
        configuration["architecture"]["arch_kwargs"].update(channels=8)

    FSEFTPlanner(workspace.dataset).plan_experiment()
    assert "Planned again" not in capsys.readouterr().out
    plans = workspace.preprocessed / "FSEFTPlans.json"
    planned = json.loads(plans.read_text())["configurations"]["3d_fullres_1shot"]
    edit(plans, change)
    FSEFTPlanner(workspace.dataset).plan_experiment()
    said = capsys.readouterr().out
    channels = planned["architecture"]["arch_kwargs"]["channels"]
    for key, before, after in (
        ("patch_size", [16, 16, 16], planned["patch_size"]),
        ("fseft_lambda", 0.7, 0.3),
        ("spacing", [2.0, 2.0, 2.0], "nothing"),
        ("channels", 8, channels),
    ):
        assert f"{key} {before} -> {after}" in said
    assert re.findall("Planned again in (.*?):", said) == ["3d_fullres_1shot"]
    assert "Edit the plans again if you had changed them." in said


def test_other_plans_get_the_unlabelled_queries_of_before(workspace, capsys):
    options = ["-d", "77", "-np", "1", "--shots", "5"]
    assert main(["plan_and_preprocess", *options, "-overwrite_plans_name", "Other"]) == 0
    assert UnlabelledQueries(workspace.preprocessed / "Other_3d_fullres").cases == ["scan_0", "scan_1"]
    edit(
        workspace.preprocessed / "unlabelled_queries.json",
        lambda files: files.update(scan_0=["/moved/scan_0_0000.nii.gz"]),
    )
    assert main(["plan_and_preprocess", *options, "-overwrite_plans_name", "Third"]) == 0
    assert (
        "2 unlabelled queries of earlier plans, e.g. scan_0, are no longer where they were" in capsys.readouterr().out
    )
    assert not UnlabelledQueries(workspace.preprocessed / "Third_3d_fullres").cases
