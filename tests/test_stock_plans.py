"""nnU-Net's own plans, which the baseline `nnunet` trains with."""

import json

import in_process
import pytest
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from trainings import edit

from fsefs_nnunet.cli.main import main
from fsefs_nnunet.methods.registry import METHODS
from fsefs_nnunet.nnunet import experiment, planning
from fsefs_nnunet.planners.fseft_planner import FSEFTPlanner

OURS = [f"3d_fullres_{k}shot_nnunet" for k in (1, 5, "all")]


def read(workspace) -> dict:
    return json.loads((workspace.preprocessed / "nnUNetPlans.json").read_text())


def stock_plans(workspace) -> dict:
    """Plans of nnU-Net's planner for the same fingerprint."""
    planner = ExperimentPlanner(workspace.dataset, plans_name="Stock")
    planner.plan_experiment()
    text = (workspace.preprocessed / "Stock.json").read_text()
    (workspace.preprocessed / "Stock.json").unlink()
    return json.loads(text.replace("Stock", "nnUNetPlans"))


def test_plans_are_nnunets_but_for_the_shots(workspace, tiny):
    plans, stock = read(tiny), stock_plans(workspace)
    for shots, name in zip((1, 5, "all"), OURS):
        assert plans["configurations"].pop(name) == {"inherits_from": "3d_fullres", "fseft_shots": shots}
    fingerprint = json.loads((tiny.preprocessed / "dataset_fingerprint.json").read_text())
    assert plans.pop("fseft_made_of") == fingerprint["fseft_made_of"]
    assert plans == stock
    parent = plans["configurations"]["3d_fullres"]
    assert parent["resampling_fn_data_kwargs"]["order"] == 3  # the backbone's is 1
    assert plans["image_reader_writer"] == "SimpleITKIO" and plans["transpose_forward"] == [0, 1, 2]
    assert not list(tiny.preprocessed.glob("nnUNetPlans_*"))  # nothing is preprocessed yet


def test_a_user_s_plans_stay(workspace):
    file = workspace.preprocessed / "nnUNetPlans.json"
    theirs = stock_plans(workspace)
    theirs["configurations"]["3d_fullres"]["batch_size"] = 7
    file.write_text(json.dumps(theirs))
    planning.plan(77, "phantom", [2], 1, 8, None)
    made = read(workspace)
    added = {name: made["configurations"].pop(name) for name in [*OURS, "3d_fullres_2shot_nnunet"]}
    assert made == theirs
    assert added["3d_fullres_2shot_nnunet"] == {"inherits_from": "3d_fullres", "fseft_shots": 2}
    # what a user changed in ours stays, too
    edit(file, lambda plans: plans["configurations"]["3d_fullres_2shot_nnunet"].update(batch_size=3))
    before = file.read_text()
    planning.plan(77, "phantom", [2], 1, 8, None)
    assert json.loads(file.read_text()) == json.loads(before)


@pytest.mark.parametrize(
    "change",
    [
        lambda plans: plans.update(fseft_made_of="other files"),
        lambda plans: plans["configurations"]["3d_fullres"].update(spacing=[5.0, 5.0, 5.0]),
    ],
)
def test_plans_of_ours_are_made_anew_and_clear_what_is_stale(workspace, capsys, change):
    folder = workspace.preprocessed / "nnUNetPlans_3d_fullres"
    folder.mkdir()
    planning.plan(77, "phantom", [], 1, 8, None)
    assert folder.exists()
    before = read(workspace)
    edit(workspace.preprocessed / "nnUNetPlans.json", change)
    capsys.readouterr()
    planning.plan(77, "phantom", [], 1, 8, None)
    assert not folder.exists() and f"{folder} was made with other plans or from other files" in capsys.readouterr().out
    assert read(workspace) == before


def test_damaged_plans(workspace, capsys):
    (workspace.preprocessed / "nnUNetPlans.json").write_text('{"configura')
    assert main(["plan", "-d", "77", "-np", "1"]) == 2
    assert "nnUNetPlans.json is damaged" in capsys.readouterr().err


def test_no_reader_of_nnunets_opens_the_images(workspace, monkeypatch, capsys):
    (workspace.preprocessed / "nnUNetPlans.json").unlink()

    def fail(self):
        raise RuntimeError("Unable to determine a reader")

    monkeypatch.setattr(ExperimentPlanner, "determine_reader_writer", fail)
    assert planning.plan(77, "phantom", [], 1, 8, None) == "FSEFTPlans"
    assert (
        "own planner fails (Unable to determine a reader): there are no plans for `--methods nnunet`"
        in capsys.readouterr().out
    )
    assert not (workspace.preprocessed / "nnUNetPlans.json").exists()


def test_without_workers_for_augmentation(workspace, monkeypatch):
    """With 0 of them nnU-Net's own command fails."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    (workspace.preprocessed / "nnUNetPlans.json").unlink()
    planning.plan(77, "phantom", [], 1, 8, None)
    assert list(read(workspace)["configurations"])[-3:] == OURS


def test_leftovers_of_macos_stay_out(workspace):
    """dataset.json lists the cases for nnU-Net's preprocessing then; its planner copies the raw one."""
    file = workspace.raw / "imagesTr" / "case_0_0000.nii.gz"
    file.with_name(f"._{file.name}").write_bytes(b"not an image")
    planning.plan(77, "phantom", [], 1, 8, None)
    assert sorted(json.loads((workspace.preprocessed / "dataset.json").read_text())["dataset"])[0] == "case_0"
    assert read(workspace)["image_reader_writer"] == "SimpleITKIO"


def test_ours_cannot_take_their_name(workspace, capsys):
    assert main(["plan", "-d", "77", "-np", "1", "-overwrite_plans_name", "nnUNetPlans"]) == 2
    assert "'nnUNetPlans' is the name of nnU-Net's own plans: give these another." in capsys.readouterr().err


def test_nnunets_command_leaves_them_alone(workspace):
    (workspace.preprocessed / "nnUNetPlans.json").unlink()
    FSEFTPlanner(workspace.dataset).plan_experiment()
    assert not (workspace.preprocessed / "nnUNetPlans.json").exists()


@pytest.mark.slow
def test_preprocessing_of_the_parent(workspace, monkeypatch, tmp_path):
    """By nnU-Net's command, as the benchmark calls it."""
    monkeypatch.setattr(experiment, "subprocess", in_process)
    own = experiment.OwnExperiment(tmp_path, workspace.dataset, METHODS["nnunet"].plans)
    own.preprocess("3d_fullres")
    folder = str(workspace.preprocessed / "nnUNetPlans_3d_fullres")
    dataset = infer_dataset_class(folder)(folder)
    assert sorted(dataset.identifiers) == [f"case_{i}" for i in range(8)]
    assert dataset.load_case("case_0")[0].shape == (1, 22, 20, 24)  # z, y, x
