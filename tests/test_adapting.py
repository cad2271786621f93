"""`fseft adapt`: what it chooses, why, and that one command leads to a model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import in_process
import nibabel as nib
import numpy as np
import pytest
import torch
from trainings import FIVE, TINY, edit, edit_labels, splits_of

from fsefs_nnunet.adaptation import adapting, decision, leave_one_out
from fsefs_nnunet.adaptation.choice import STUDENT, Measured, Situation, measured, nearest, ranking
from fsefs_nnunet.cli.main import main
from fsefs_nnunet.methods.registry import METHODS
from fsefs_nnunet.methods.run_file import RunFile
from fsefs_nnunet.nnunet import experiment
from fsefs_nnunet.trainers import patch_trainer
from fsefs_nnunet.trainers.bank_trainer import BankTrainer

MINUTES_LEFT = decision.minutes_left
HERE = Situation(shots=5, minutes=30, device="cpu", voxels=64_000, pile=65)
CELL = Measured("somewhere", HERE, {"context": 0.7, "ft_long": 0.8, STUDENT: 0.9})


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Commands run in this process, and trainings are not validated."""
    monkeypatch.setattr(experiment, "subprocess", in_process)
    leave(monkeypatch, lambda task, started: 0.02)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")


def leave(monkeypatch, minutes_left) -> None:
    for module in (decision, adapting):
        monkeypatch.setattr(module, "minutes_left", minutes_left)


def choose(monkeypatch, **dice: float) -> None:
    """Let the table say that these methods reach this Dice."""
    monkeypatch.setattr(decision, "measured", lambda: (Measured("somewhere", HERE, dice),))


# ---- the table ----


def test_distances_are_doublings():
    def other(**changes) -> float:
        return HERE.distance(Situation(**{**vars(HERE), **changes}))

    assert other() == 0
    assert other(shots=10) == other(minutes=15) == 1
    assert other(voxels=256_000) == 1  # four times the voxels
    assert other(device="cuda", minutes=1.5) == 0  # a minute of a GPU stands for 20 of a core


def test_the_nearest_cell_counts():
    cells = tuple(Measured(str(k), Situation(k, 10, "cpu", 64_000, 0), {"ft": 0.5}) for k in (1, 5, 10))
    found = [nearest(Situation(k, 10, "cpu", 1_000_000, 0), cells, {"ft"}).data for k in (1, 2, 3, 6, 20)]
    assert found == ["1", "1", "5", "5", "10"]


def test_what_is_not_possible_is_left_out():
    assert [name for name, _ in ranking(CELL, {STUDENT, "ft_long", "context"})] == [STUDENT, "ft_long", "context"]
    assert ranking(CELL, {"context", "unet"}) == [("context", 0.7)]


def test_a_student_must_be_clearly_ahead():
    def first(of_student: float) -> str:
        return ranking(Measured("", HERE, {STUDENT: of_student, "ft_long": 0.8}), {STUDENT, "ft_long"})[0][0]

    assert (first(0.809), first(0.811)) == ("ft_long", STUDENT)


def task(**changes) -> decision.Task:
    given = dict(dataset=77, shots=1, fold=0, minutes=9, backbone="phantom", device="cpu", num_processes=1)
    return decision.Task(**{**given, **changes})


def test_possible_methods(contract):
    planned = dict.fromkeys(["3d_fullres_1shot", "3d_fullres_1shot_scratch"], {})
    stock = {"3d_fullres_1shot_nnunet": {}}
    possible = decision.possible_methods(task(), contract, planned, stock, pile=4)
    assert {STUDENT, "context", "ft_long", "unet", "scratch", "nnunet"} <= possible and "zero_shot" not in possible
    without = decision.possible_methods(task(), contract, planned, {}, pile=0)
    assert possible - without == {STUDENT, "nnunet"}
    architecture = {**contract.architecture, "encoder_only": True}
    encoder = decision.possible_methods(task(), replace(contract, architecture=architecture), planned, stock, pile=4)
    assert encoder == {"decoder", "ft", "decoder_long", "ft_long", "scratch", "nnunet"}


def test_a_cell_without_a_possible_method_is_passed_over():
    adapters, others = (
        Measured("near", HERE, {"context": 0.5}),
        Measured("far", Situation(1, 1, "cpu", 1, 0), {"ft": 0.4}),
    )
    assert nearest(HERE, (adapters, others), {"context", "ft"}) is adapters
    assert nearest(HERE, (adapters, others), {"ft"}) is others
    assert nearest(HERE, (adapters, others), {"unet"}) is None


def test_minutes_of_a_cpu_are_those_of_all_its_cores(monkeypatch):
    monkeypatch.setattr(decision.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    assert task(minutes=5).core_minutes == 20
    assert task(minutes=5, device="cuda").core_minutes == 5


def test_the_table_names_methods():
    names = {name for cell in measured() for name in cell.dice}
    assert measured() and names <= {STUDENT, *METHODS} and "nnunet" in names
    assert all(0 < dice < 1 for cell in measured() for dice in cell.dice.values())


def shorten(plans: dict) -> None:
    plans["configurations"]["3d_fullres_1shot"] |= {**TINY, "fseft_epochs": 1}


# ---- leaving one out ----


def support_of(work, **settings) -> leave_one_out.Support:
    cases = splits_of(work)["folds"][0]
    return leave_one_out.Support(
        work.plans(**TINY, **settings), FIVE, 0, work.dataset_json(), torch.device("cpu"), cases
    )


def leave_out(work, case: str) -> tuple[float, float]:
    with leave_one_out.results_elsewhere():
        return leave_one_out.left_out_dice("context", support_of(work), case)


@pytest.fixture
def trained_weights(monkeypatch) -> list[torch.Tensor]:
    """Of each short training, the head's, at its end."""
    monkeypatch.setattr(leave_one_out, "EPOCHS", 2)
    kept, end = [], BankTrainer.on_train_end

    def keep(self):
        kept.append(self.network.head.weight.detach().clone())
        end(self)

    monkeypatch.setattr(BankTrainer, "on_train_end", keep)
    return kept


def test_a_case_is_segmented_by_the_others(work, trained_weights):
    """Neither its label map nor a query changes the training; the Dice is that of its own label map."""
    case, query = splits_of(work)["folds"][0][1], splits_of(work)["queries"][0]
    before = sorted(work.results.rglob("*"))
    dice, seconds = leave_out(work, case)
    assert 0 < dice < 1 and seconds > 0
    assert sorted(work.results.rglob("*")) == before
    for file in work.preprocessed.glob(f"FSEFTPlans_3d_fullres/{query}*"):
        file.unlink()
    assert leave_out(work, case)[0] == dice
    edit_labels(work, [case], lambda labels: np.roll(labels, 9, 1))
    assert leave_out(work, case)[0] != dice
    first, *others = trained_weights
    assert len(others) == 2 and all(torch.equal(first, other) for other in others)
    rest = [other for other in splits_of(work)["folds"][0] if other != case]
    edit_labels(work, rest, lambda labels: np.roll(labels, 9, 1))
    leave_out(work, case)
    assert not torch.equal(first, trained_weights[-1])


def test_methods_are_compared_on_every_case(work, trained_weights):
    found = leave_one_out.compare(["fseft", "context"], support_of(work), 1e6)
    assert list(found) == ["fseft", "context"] and all(0 < dice < 1 for dice in found.values())
    assert found["fseft"] != found["context"] and len(trained_weights) == 10


def test_comparing_stops_where_it_would_take_too_long(work, monkeypatch, capsys):
    dice, support = {"fseft": 0.5, "context": 0.6}, support_of(work)
    monkeypatch.setattr(leave_one_out, "left_out_dice", lambda method, *others: (dice[method], 7.0))
    assert leave_one_out.compare([*dice], support, 70) == dice
    assert leave_one_out.compare([*dice], support, 69) == {}
    assert "10 short trainings of 7 s would take more than 69 s" in capsys.readouterr().out


# ---- the command ----


def adapt(*options: object) -> int:
    return main(["adapt", *map(str, ("-d", 77, "-np", 1, "-device", "cpu", *options))])


@pytest.mark.slow
def test_from_a_raw_dataset_to_segmentations(workspace, monkeypatch, tmp_path, capsys):
    shutil.rmtree(workspace.preprocessed)  # it plans
    choose(monkeypatch, ft_long=0.8, context=0.7)
    options = ("--shots", 1, "--minutes", 7.5, "-i", workspace.queries, "-o", tmp_path / "out")
    assert adapt(*options) == 0
    printed = capsys.readouterr().out
    assert "Dice there: ft_long 0.800, context 0.700." in printed
    assert "Chosen: fine-tuning, everything, long, for " in printed
    configuration = "3d_fullres_1shot_auto7.5"
    plans = json.loads((workspace.preprocessed / "FSEFTPlans.json").read_text())["configurations"]
    added = plans[configuration]
    assert added["inherits_from"] == "3d_fullres_1shot" and added["fseft_minutes"] == 0.02
    assert plans["3d_fullres_1shot"]["fseft_minutes"] is None
    fold = workspace.results / f"FSEFTTrainer_FTLong__FSEFTPlans__{configuration}" / "fold_0"
    run = RunFile.load(fold)
    assert run.budget_seconds == pytest.approx(1.2) and len(run.support) == 1
    segmentations = sorted(file.name for file in (tmp_path / "out").glob("*.nii.gz"))
    assert segmentations == ["scan_0.nii.gz", "scan_1.nii.gz"]
    assert np.asarray(nib.load(tmp_path / "out" / "scan_0.nii.gz").dataobj).any()
    # the same call trains nothing again
    trained = (fold / "checkpoint_final.pth").stat().st_mtime_ns
    assert adapt(*options) == 0
    assert (fold / "checkpoint_final.pth").stat().st_mtime_ns == trained
    assert "This choice was made earlier" in capsys.readouterr().out


@pytest.mark.slow
def test_what_trains_on_stored_features_is_compared(work, monkeypatch, capsys):
    """The better one of the support is taken, whatever the table says of the two."""
    choose(monkeypatch, context=0.8, fseft=0.7)
    dice = {"fseft": 0.66, "context": 0.55}
    monkeypatch.setattr(leave_one_out, "left_out_dice", lambda method, *others: (dice[method], 0.01))
    file = work.preprocessed / "FSEFTPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"][FIVE] |= {**TINY, "fseft_epochs": 1}
    file.write_text(json.dumps(plans))
    assert adapt("--shots", 5, "--minutes", 1) == 0
    printed = capsys.readouterr().out
    assert "Leave-one-out Dice on the support: fseft 0.660, context 0.550." in printed
    assert "Chosen: spatial adapter + size prior, for 0.0 minutes at most." in printed
    added = json.loads(file.read_text())["configurations"][f"{FIVE}_auto1"]
    assert added == {"inherits_from": FIVE, "fseft_minutes": 0.02}
    assert (
        work.results / "FSEFTTrainer__FSEFTPlans__3d_fullres_5shot_auto1" / "fold_0" / "checkpoint_final.pth"
    ).exists()


@pytest.mark.slow
def test_a_student_is_made_and_trained(work, monkeypatch, capsys):
    choose(monkeypatch, **{STUDENT: 0.9, "context": 0.8})
    edit(work.preprocessed / "FSEFTPlans.json", shorten)
    assert adapt("--shots", 1, "--minutes", 10) == 0
    printed = capsys.readouterr().out
    assert "Chosen: a student of the context adapter" in printed and "The student is trained for" in printed
    student = work.root / "nnUNet_results" / "Dataset999_TinyStudent"
    fold = student / "FSEFTTrainer_FTLong__FSEFTPlans__3d_fullres_allshot_auto10" / "fold_0"
    assert len(RunFile.load(fold).pile) == 4
    assert "-d Dataset999_TinyStudent -c 3d_fullres_allshot_auto10 -f 0 -tr FSEFTTrainer_FTLong" in printed


@pytest.mark.slow
def test_nnunet_is_a_candidate(work, monkeypatch):
    choose(monkeypatch, nnunet=0.9, context=0.8)
    assert adapt("--shots", 1, "--minutes", 10) == 0
    fold = work.results / "FSEFTTrainer_Scratch__nnUNetPlans__3d_fullres_1shot_auto10" / "fold_0"
    assert (fold / "checkpoint_final.pth").exists()


@pytest.mark.slow
def test_a_training_that_misses_classes_gives_up(work, monkeypatch, capsys, tmp_path):
    """The context adapter takes its place, and the same call trains nothing again."""
    choose(monkeypatch, ft_long=0.9)
    leave(monkeypatch, lambda task, started: 0.3)
    monkeypatch.setattr(adapting, "WORTH_GIVING_UP", 0.2)
    monkeypatch.setattr(patch_trainer, "HARDLY_FOUND", 1.1)
    monkeypatch.setattr(patch_trainer, "LAST_EPOCHS", 1)
    edit(work.preprocessed / "FSEFTPlans.json", shorten)
    assert adapt("--shots", 1, "--minutes", 10, "-i", work.queries, "-o", tmp_path) == 0
    printed = capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.glob("*.nii.gz")) == ["scan_0.nii.gz", "scan_1.nii.gz"]
    assert "even in patches of the support: spleen" in printed
    configuration = "3d_fullres_1shot_auto10_instead"
    assert f"-d Dataset077_Tiny -c {configuration} -f 0 -tr FSEFTTrainer_Context -p FSEFTPlans" in printed
    fold = work.results / f"FSEFTTrainer_Context__FSEFTPlans__{configuration}" / "fold_0"
    assert RunFile.load(fold).budget_seconds == pytest.approx(12)  # two thirds of 18 s
    trained = (fold / "checkpoint_final.pth").stat().st_mtime_ns
    assert adapt("--shots", 1, "--minutes", 10) == 0
    assert (fold / "checkpoint_final.pth").stat().st_mtime_ns == trained
    assert "Instead: " in capsys.readouterr().out


def test_instead_of_a_student_its_teacher(work, capsys):
    run = RunFile(missed=["spleen"], gave_up=True)
    training = adapting.prepare_instead(task(), decision.Decision(STUDENT, [], 3.0), run)
    assert (training.trainer, training.experiment.dataset) == ("FSEFTTrainer_Context", "Dataset077_Tiny")
    assert training.configuration == "3d_fullres_1shot_auto9"  # the teacher's
    assert "The student hardly finds spleen. The teacher is the result." in capsys.readouterr().out


# ---- bad input ----


def test_a_budget_shorter_than_the_start(work, monkeypatch, capsys):
    choose(monkeypatch, ft_long=0.8)
    leave(monkeypatch, MINUTES_LEFT)
    for module in (decision, adapting):
        monkeypatch.setattr(module, "monotonic", lambda: 0.0)
    assert adapt("--shots", 1, "--minutes", 0.1) == 2
    error = capsys.readouterr().err
    expected = "--minutes 0.1 leaves no time for the training: the steps before it take 0.3 minutes. Give at least 1."
    assert expected in error
    configurations = json.loads((work.preprocessed / "FSEFTPlans.json").read_text())["configurations"]
    assert not [name for name in configurations if "auto" in name]


def test_images_without_an_output(work, capsys):
    assert adapt("--shots", 1, "--minutes", 1, "-i", work.queries) == 2
    assert "-i and -o belong together" in capsys.readouterr().err


def test_plans_without_these_shots(work, capsys):
    """They are not planned anew, which could change what the user chose."""
    assert adapt("--shots", 3, "--minutes", 1) == 2
    assert "FSEFTPlans.json has no 3d_fullres_3shot: run `fseft plan_and_preprocess" in capsys.readouterr().err


def test_more_shots_than_cases(workspace, capsys):
    shutil.rmtree(workspace.preprocessed)
    assert adapt("--shots", 9, "--minutes", 1) == 2
    assert "9 shots need as many labelled cases, but the dataset has 8" in capsys.readouterr().err


def test_images_are_looked_at_first(work, capsys, tmp_path):
    assert adapt("--shots", 1, "--minutes", 1, "-i", tmp_path / "none", "-o", tmp_path / "out") == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.slow
def test_splits_that_were_drawn_anew(work, monkeypatch, capsys):
    choose(monkeypatch, ft_long=0.8)
    assert adapt("--shots", 1, "--minutes", 10) == 0
    edit(work.preprocessed / "splits_fseft.json", lambda splits: splits["folds"][0].reverse())
    assert adapt("--shots", 1, "--minutes", 10) == 2
    assert (
        "was trained on support cases other than those in splits_fseft.json now: delete it" in capsys.readouterr().err
    )


def test_a_fold_that_is_not_there(work, capsys):
    assert adapt("--shots", 1, "--minutes", 1, "-f", 7) == 2
    assert "Fold 7 does not exist" in capsys.readouterr().err


def test_no_such_dataset(work, capsys):
    assert main("adapt -d 78 --shots 1 --minutes 1 -device cpu".split()) == 2
    assert "No dataset 78" in capsys.readouterr().err


def test_results_return_to_their_folder(monkeypatch):
    import os

    monkeypatch.setenv("nnUNet_results", "/somewhere")
    with pytest.raises(RuntimeError), leave_one_out.results_elsewhere():
        assert Path(os.environ["nnUNet_results"]).is_dir()
        raise RuntimeError
    assert os.environ["nnUNet_results"] == "/somewhere"


@pytest.mark.parametrize("content", ["{}", "[1]", "{", '{"method": "gone", "why": [], "minutes": null}'])
def test_a_damaged_choice(work, capsys, content):
    (work.preprocessed / "fseft_adapt_FSEFTPlans_3d_fullres_1shot_auto1.json").write_text(content)
    assert adapt("--shots", 1, "--minutes", 1) == 2
    assert "is damaged or was written by another version: delete it" in capsys.readouterr().err


def test_no_folder_of_results(work, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_results")
    assert adapt("--shots", 1, "--minutes", 1) == 2
    assert "nnUNet_results is not set" in capsys.readouterr().err


def test_an_output_that_is_a_file(work, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert adapt("--shots", 1, "--minutes", 1, "-i", work.queries, "-o", tmp_path / "file") == 2
    assert "is a file: give a folder for the segmentations" in capsys.readouterr().err


def test_an_interrupted_planning_is_done_again(work, monkeypatch):
    planned = []
    monkeypatch.setattr(adapting, "plan_and_preprocess", lambda *arguments: planned.append(arguments))
    adapting.plan_if_needed(task())
    assert not planned
    (work.preprocessed / adapting.PLANNING).touch()
    adapting.plan_if_needed(task())
    assert len(planned) == 1 and not (work.preprocessed / adapting.PLANNING).exists()
