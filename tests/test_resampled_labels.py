"""What planning says about labels that a spacing costs."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from trainings import edit

from fsefs_nnunet.cases.resampled_labels import describe_cost, dice_there_and_back, resampled_and_back
from fsefs_nnunet.cli.main import main
from fsefs_nnunet.planners.fseft_planner import FSEFTPlanner

LABELS = {"background": 0, "block": 1, "plate": 2}


def plans_at(tiny, spacing) -> PlansManager:
    plans = tiny.plans()
    plans["configurations"]["3d_fullres"]["spacing"] = spacing
    return PlansManager(plans)


def write_labels(file, labels, spacing=(1.0, 1.0, 1.0)) -> str:
    nib.save(nib.Nifti1Image(labels.astype(np.uint8), np.diag([*spacing, 1.0])), file)
    return str(file)


@pytest.fixture
def labels():
    """A block of 16^3 voxels and a plate one voxel thick."""
    made = np.zeros((32, 32, 32), np.uint8)
    made[8:24, 8:24, 8:24] = 1
    made[:, :, 3] = 2
    return made


def test_a_block_stays_and_a_plate_is_lost(tiny, labels, tmp_path):
    file = write_labels(tmp_path / "label.nii.gz", labels)
    dice = dice_there_and_back([file], plans_at(tiny, [4.0, 4.0, 4.0]), {"labels": LABELS})
    assert dice["block"] > 0.95 and dice["plate"] == 0
    lines = describe_cost({"block": 0.9, "plate": 0.8999}).splitlines()
    assert lines[0].endswith("keep a Dice of block 0.900, plate 0.900.")
    assert lines[1].startswith("Warning: at this spacing plate cannot be segmented with a higher Dice than that;")
    assert describe_cost({"block": 0.9}).count("\n") == 0


def test_as_nnunet_resamples_all_classes_at_once(tiny, labels):
    configuration = plans_at(tiny, [3.0, 3.0, 3.0]).get_configuration("3d_fullres")
    ours = resampled_and_back(labels.astype(np.int16), (1.0, 1.0, 1.0), configuration)
    small = configuration.resampling_fn_seg(labels[None].astype(np.int16), (11, 11, 11), (1,) * 3, (3,) * 3)[0]
    one_hot = np.stack([small == value for value in range(3)]).astype(np.float32)
    shares = configuration.resampling_fn_probabilities(one_hot, labels.shape, (3,) * 3, (1,) * 3)
    np.testing.assert_array_equal(ours, shares.argmax(0))
    assert 0 < np.mean(ours != labels) < 0.1


def test_cases_of_this_spacing_say_nothing(tiny, labels, tmp_path):
    coarse = write_labels(tmp_path / "coarse.nii.gz", labels, (4.0, 4.0, 4.0))
    plans = plans_at(tiny, [4.0, 4.0, 4.0])
    assert dice_there_and_back([coarse], plans, {"labels": LABELS}) == {}
    fine = write_labels(tmp_path / "fine.nii.gz", labels)
    both = dice_there_and_back([coarse, fine], plans, {"labels": LABELS})
    assert both == dice_there_and_back([fine], plans, {"labels": LABELS})
    # the sixth is not read
    assert dice_there_and_back([coarse] * 5 + ["missing"], plans, {"labels": LABELS}) == {}


def test_axes_are_those_of_the_network(tiny, tmp_path):
    """A plate across x is lost by a coarse x alone."""
    plate = np.zeros((32, 32, 32), np.uint8)
    plate[3] = 2
    file = write_labels(tmp_path / "label.nii.gz", plate)
    assert dice_there_and_back([file], plans_at(tiny, [4.0, 1.0, 1.0]), {"labels": LABELS}) == {"plate": 0}
    assert dice_there_and_back([file], plans_at(tiny, [1.0, 1.0, 4.0]), {"labels": LABELS}) == {"plate": 1}


def test_regions_and_ignored_voxels(tiny, labels, tmp_path):
    labels[16:, 16:] = 3
    file = write_labels(tmp_path / "label.nii.gz", labels)
    content = {"labels": {"background": 0, "both": [1, 2], "ignore": 3}}
    plans = plans_at(tiny, [2.0, 2.0, 2.0])
    (name, dice), *rest = dice_there_and_back([file], plans, content).items()
    assert name == "both" and not rest and 0.7 < dice < 1
    back = resampled_and_back(labels.astype(np.int16), (1.0, 1.0, 1.0), plans.get_configuration("3d_fullres"))
    seen = labels != 3
    before, after = np.isin(labels, (1, 2)) & seen, np.isin(back, (1, 2)) & seen
    assert dice == pytest.approx(2 * (before & after).sum() / (before.sum() + after.sum()))


# ---- in planning ----


@pytest.fixture
def read(monkeypatch):
    """Names of the label maps that are read for the cost."""
    files = []

    def spy(label_files, *args):
        files.extend(file.rsplit("/", 1)[1].removesuffix(".nii.gz") for file in label_files)
        return {"spleen": 0.5}

    monkeypatch.setattr("fsefs_nnunet.planners.fseft_planner.dice_there_and_back", spy)
    return files


def test_only_support_is_read(workspace, read, capsys):
    splits = json.loads((workspace.preprocessed / "splits_fseft.json").read_text())
    FSEFTPlanner(workspace.dataset, overwrite_target_spacing=(20.0, 20.0, 20.0)).plan_experiment()
    assert read == splits["folds"][0] and not set(read) & set(splits["queries"])
    output = capsys.readouterr().out
    assert "Spacing [20.0, 20.0, 20.0] mm: as given by -overwrite_target_spacing." in output
    assert "keep a Dice of spleen 0.500.\nWarning: at this spacing spleen cannot" in output


def test_the_draw_that_comes_with_the_planning_counts(workspace, read):
    arguments = ["-d", "77", "-np", "1", "--shots", "5", "--seed", "1", "-overwrite_target_spacing", "20", "20", "20"]
    assert main(["plan_and_preprocess", *arguments]) == 0
    splits = json.loads((workspace.preprocessed / "splits_fseft.json").read_text())
    assert splits["seed"] == 1 and read == splits["folds"][0]


def test_before_the_draw_no_label_is_read(workspace, read, capsys):
    (workspace.preprocessed / "splits_fseft.json").unlink()
    FSEFTPlanner(workspace.dataset, overwrite_target_spacing=(20.0, 20.0, 20.0)).plan_experiment()
    assert not read and "To see what this spacing costs the labels, run `fseft splits -d ID`" in capsys.readouterr().out


def test_the_dataset_s_own_spacing_costs_nothing(workspace, read, capsys):
    FSEFTPlanner(workspace.dataset).plan_experiment()
    assert not read and "what this spacing costs" not in capsys.readouterr().out


# ---- the spacing of the plans ----


def clinical(fingerprint) -> None:
    """512 x 512 x 400 voxels of 0.8 x 0.8 x 1 mm, in z, y, x."""
    fingerprint["spacings"] = [[1.0, 0.8, 0.8]] * 8
    fingerprint["shapes_after_crop"] = [[400, 512, 512]] * 8


@pytest.mark.slow
def test_a_clinical_ct(workspace, read, capsys):
    edit(workspace.preprocessed / "dataset_fingerprint.json", clinical)
    FSEFTPlanner(workspace.dataset).plan_experiment()
    plans = json.loads((workspace.preprocessed / "FSEFTPlans.json").read_text())
    parent = plans["configurations"]["3d_fullres"]
    assert parent["spacing"] == [4, 4, 4] and parent["median_image_size_in_voxels"] == [102, 102, 100]
    assert plans["configurations"]["3d_fullres_5shot"]["architecture"]["arch_kwargs"]["stages"] == "skips"
    output = capsys.readouterr().out
    assert (
        "Spacing [4.0, 4.0, 4.0] mm: by the field of view, at most 2 windows ([128, 128, 128] voxels), a window shows "
        "256 mm, the training's 150 to 400 mm; the dataset's own, [0.8, 0.8, 1.0] mm, makes [512, 512, 400] of a "
        "median volume of [409.6, 409.6, 400.0] mm."
    ) in output
    assert "skips, 42.0 channels at full resolution in effect, 0.11 GB for a slab." in output
    assert read  # 10 mm and 4 mm differ


@pytest.mark.slow
def test_chaos(shared, raw, capsys):
    source, folder = shared / "data" / "CHAOS_T2SPIR", raw / "Dataset050_CHAOS"
    if not source.is_dir():
        pytest.skip(f"{source} is missing: this test plans on its MR.")
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
        for file in sorted((source / name).iterdir())[:3]:
            shutil.copy(file, folder / name)
    shutil.copy(source / "dataset.json", folder)
    assert main(["splits", "-d", "50", "--shots", "2"]) == 0
    assert main(["plan", "-d", "50", "--shots", "2", "-np", "1"]) == 0
    preprocessed = raw.parent / "nnUNet_preprocessed" / "Dataset050_CHAOS"
    plans = json.loads((preprocessed / "FSEFTPlans.json").read_text())
    assert plans["configurations"]["3d_fullres"]["spacing"] == [4.0] * 3
    child = plans["configurations"]["3d_fullres_2shot"]
    assert child["patch_size"] == [64] * 3 and child["architecture"]["arch_kwargs"]["stages"] == "skips"
    stock = json.loads((preprocessed / "nnUNetPlans.json").read_text())["configurations"]["3d_fullres"]
    np.testing.assert_allclose(stock["spacing"], [7.7, 1.25, 1.25], rtol=1e-6)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Labels resampled"))
    dice = [float(part.split()[-1]) for part in line.rstrip(".").split("Dice of")[1].split(",")]
    assert len(dice) == 4 and all(0.95 < value < 1 for value in dice)
