"""What `fseft benchmark` runs, keeps, and refuses before anything runs."""

import csv
import json
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import torch
from studies import result, study_of
from trainings import edit

from fsefs_nnunet.backbones.checkpoints import add_to_checkpoint
from fsefs_nnunet.benchmark.cells import Cell, Spent
from fsefs_nnunet.benchmark.evaluation import METRICS
from fsefs_nnunet.benchmark.grid import _left, plan_cells, run_cells
from fsefs_nnunet.benchmark.report import shown
from fsefs_nnunet.benchmark.result import Result
from fsefs_nnunet.benchmark.shared_features import share_features
from fsefs_nnunet.benchmark.study import open_study
from fsefs_nnunet.cases.splits import load_splits, save_splits
from fsefs_nnunet.cli.main import main
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.inference import weights
from fsefs_nnunet.methods.registry import METHODS, choose
from fsefs_nnunet.methods.run_file import RunFile
from fsefs_nnunet.nnunet.experiment import OwnExperiment

# ---- methods ----


def test_methods_come_in_the_order_of_the_table():
    long = ["lora", "norms", "biases", "ft_last_long", "decoder_long", "ft_long", "unet"]
    assert choose([]) == [name for name in METHODS if name not in long]
    assert choose([*reversed(METHODS)]) == list(METHODS)
    assert choose(["scratch", "probe", "probe"]) == ["probe", "scratch"]


@pytest.mark.parametrize("name, near", [("probes", "probe"), ("fset", "fseft"), ("adapterin", "adapter_in")])
def test_misspelt_method(name, near):
    with pytest.raises(InputError, match=f"no method '{name}': did you mean '{near}'.* There are zero_shot, probe, "):
        choose(["probe", name])


def test_method_like_none():
    with pytest.raises(InputError, match=r"There is no method 'x'\. There are zero_shot, probe, "):
        choose(["x"])


def test_every_method_has_a_trainer_that_nnunet_finds():
    from fsefs_nnunet.nnunet.shims import fseft_trainers

    assert all(hasattr(fseft_trainers, method.trainer) for method in METHODS.values() if method.trainer)


# ---- what is refused before anything runs ----


def test_grid(folders):
    study = study_of(folders)
    cells = plan_cells(study, [1, 5], 2, ["scratch", "probe", "zero_shot", "fseft"])
    names = [(cell.name, cell.shots, cell.fold) for cell in cells]
    per_cell = [(m, k, f) for k in (1, 5) for f in (0, 1) for m in ("probe", "fseft", "scratch")]
    assert names == [("zero_shot", 0, 0), *per_cell]
    scratch = cells[3]
    assert [other.name for other in scratch.others] == ["probe", "fseft"] and scratch.configuration.endswith("_scratch")
    assert [cell.shots for cell in plan_cells(study, [], 1, ["probe"])] == [0, 1, 5, "all"]  # zero-shot always beside
    first, second = cells[1], cells[7]
    assert set(first.support) <= set(second.support) and len(second.support) == 5  # 1 shot in 5
    assert [(cell.name, cell.shots, cell.fold) for cell in shown(cells)] == [("fseft", 1, 0), ("fseft", 5, 0)]
    assert cells[2].title == "spatial adapter + size prior, 1 shot, fold 0"


def test_estimate_of_the_time_left(folders):
    cells = plan_cells(study_of(folders), [1, 5], 1, ["probe", "fseft"])[1:]
    done = {cells[0]: result("probe")}  # 20 s
    assert _left(cells, {}, {}, {}) == ""
    assert _left(cells, done, {}, {}) == "; about 60 s left"
    assert _left(cells, done, {cells[1]: "failed"}, {}) == "; about 40 s left"
    spent = {cells[1]: Spent(15.0), cells[2]: Spent(30.0)}  # trained and predicted already
    assert _left(cells, done, {}, spent) == "; about 25 s left"


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--folds", "6"], "Fold 5 does not exist: there are 5 folds"),
        (["--folds", "0"], "0 folds: give at least 1"),
        (["--shots", "3"], "have no configuration '3d_fullres_3shot': plan again with `fseft plan -d ID --shots 3`"),
        (["--methods", "prob"], "no method 'prob': did you mean 'probe'"),
        (["-p", "Others"], "Others.json is missing: make it with `fseft plan_and_preprocess -d ID`"),
        (["-i", "x"], "-i IMAGES and -l LABELS belong together"),
        (["-i", "x", "-l", "y"], "x does not exist. Expected a folder of images"),
        (["-o", "/dev/null/x"], "/dev/null/x cannot be written: choose another folder with -o"),
    ],
)
def test_mistakes(folders, capsys, argv, sentence):
    default = [] if "-o" in argv else ["-o", str(folders[1])]
    assert main(["benchmark", "-d", "77", "-device", "cpu", *default, *argv]) == 2
    message = capsys.readouterr().err
    assert sentence in message and message.startswith("fseft: ") and message.count("\n") == 1


@pytest.mark.parametrize("minutes", ["0", "-3", "nan", "inf", "long"])
def test_minutes_are_a_positive_number(capsys, minutes):
    with pytest.raises(SystemExit):
        main(["benchmark", "-d", "77", f"--scratch_minutes={minutes}"])
    assert f"'{minutes}' is not a positive number" in capsys.readouterr().err


def test_missing_results_variable(folders, monkeypatch):
    monkeypatch.delenv("nnUNet_results")
    with pytest.raises(InputError, match="nnUNet_results is not set"):
        study_of(folders)


def test_no_labelled_queries(folders):
    file = folders[0].preprocessed / "splits_fseft.json"
    save_splits({**load_splits(file), "queries": []}, file)
    with pytest.raises(InputError, match="keep no labelled case as a query: give a test set with -i IMAGES -l LABELS"):
        study_of(folders)


def change_nnunets_plans(folders, change) -> None:
    edit(folders[0].preprocessed / "nnUNetPlans.json", change)


def test_stock_nnunet_has_plans_of_its_own(folders):
    study = study_of(folders)
    _, fseft, nnunet = plan_cells(study, [5], 1, ["fseft", "nnunet"])
    name = "FSEFTTrainer_Scratch__nnUNetPlans__3d_fullres_5shot_nnunet"
    assert nnunet.folder == folders[0].results / name / "fold_0" and nnunet.support == fseft.support
    assert nnunet.configurations()["3d_fullres"]["data_identifier"] == "nnUNetPlans_3d_fullres"
    assert (fseft.experiment.plans, nnunet.experiment.plans) == ("FSEFTPlans", "nnUNetPlans")
    # results of other plans of nnU-Net's are refused, whatever ours are
    nnunet.folder.mkdir(parents=True)
    shutil.copy(folders[0].preprocessed / "nnUNetPlans.json", nnunet.folder.parent / "plans.json")
    nnunet.check()
    change_nnunets_plans(folders, lambda plans: plans["configurations"]["3d_fullres"].update(batch_size=7))
    with pytest.raises(InputError, match="was trained with plans other than the current 'nnUNetPlans': move it away"):
        nnunet.check()


def test_without_nnunets_plans(folders):
    change_nnunets_plans(folders, lambda plans: plans["configurations"].pop("3d_fullres_5shot_nnunet"))
    sentence = "Plans 'nnUNetPlans' have no configuration '3d_fullres_5shot_nnunet': plan again with `fseft plan -d ID"
    for _ in range(2):
        with pytest.raises(InputError, match=sentence):
            plan_cells(study_of(folders), [5], 1, ["nnunet"])
        (folders[0].preprocessed / "nnUNetPlans.json").unlink(missing_ok=True)
    plan_cells(study_of(folders), [5], 1, ["scratch"])


def test_stock_preprocessing_runs_where_it_is_missing(folders, monkeypatch):
    ran = []
    monkeypatch.setattr(OwnExperiment, "run", lambda self, *command, **environment: ran.append(command))
    monkeypatch.setenv("nnUNet_def_n_proc", "3")
    cell = plan_cells(replace(study_of(folders), scratch_minutes=1), [5], 1, ["nnunet"])[1]
    cell.train()
    preprocessing, training = ran
    expected = ("nnUNetv2_preprocess", "-d", "077", "-plans_name", "nnUNetPlans", "-c", "3d_fullres", "-np", "3")
    assert preprocessing == expected
    assert training[:3] == ("nnUNetv2_train", "Dataset077_Tiny", "3d_fullres_5shot_nnunet")
    assert training[training.index("-p") + 1] == "nnUNetPlans"
    preprocessed = folders[0].preprocessed
    shutil.copytree(preprocessed / "FSEFTPlans_3d_fullres", preprocessed / "nnUNetPlans_3d_fullres")
    cell.train()
    assert [command[0] for command in ran[2:]] == ["nnUNetv2_train"]


@pytest.fixture
def labelled_scans(workspace) -> tuple[Path, Path]:
    """A test set."""
    labels = workspace.root / "labels"
    labels.mkdir()
    for case in ("scan_0", "scan_1"):
        shutil.copy(workspace.raw / "labelsTr" / "case_0.nii.gz", labels / f"{case}.nii.gz")
    return workspace.queries, labels


def test_test_sets(folders, tmp_path, labelled_scans):
    workspace, _ = folders
    with pytest.raises(
        InputError, match="scan_0.nii.gz is missing: -l must contain a reference segmentation for every case"
    ):
        study_of(folders, test=(workspace.queries, tmp_path))
    target = study_of(folders, test=labelled_scans).target
    assert target.cases == ("scan_0", "scan_1") and target.name.startswith("queries_")
    assert target.image_folder(tmp_path) == workspace.queries
    with pytest.raises(InputError, match="imagesTr holds the cases that the adapters were trained on"):
        study_of(folders, test=(workspace.raw / "imagesTr", workspace.raw / "labelsTr"))


def test_query_images_are_the_queries_alone(folders):
    study = study_of(folders)
    folder = study.target.image_folder(folders[1])
    queries = load_splits(folders[0].preprocessed / "splits_fseft.json")["queries"]
    assert sorted(f.name for f in folder.iterdir()) == [f"{case}_0000.nii.gz" for case in sorted(queries)]
    for name in ("foreign_0000.nii.gz", "foreign_0001.nii.gz"):  # of another dataset, of splits drawn earlier
        (folder / name).symlink_to(folders[0].queries / "scan_0_0000.nii.gz")
    assert study.target.image_folder(folders[1]) == folder
    assert sorted(f.name for f in folder.iterdir()) == [f"{case}_0000.nii.gz" for case in sorted(queries)]
    assert tuple(study.target.image_files()) == study.target.cases


def test_default_output_is_of_the_dataset_and_plans(folders, monkeypatch):
    monkeypatch.chdir(folders[0].root)
    work = open_study("77", "FSEFTPlans", None, None, "cpu").experiment.work
    assert work == folders[0].root / "fseft_benchmark" / "Dataset077_Tiny_FSEFTPlans"


def trained_earlier(study, **changes) -> Cell:
    """The place of a training with the present plans but for `changes` in its configuration."""
    cell = Cell(study, "probe", 5, 0)
    cell.folder.mkdir(parents=True, exist_ok=True)
    plans = json.loads(json.dumps(study.plans))
    plans["configurations"]["3d_fullres_5shot"].update(changes)
    (cell.folder.parent / "plans.json").write_text(json.dumps(plans))
    return cell


def test_results_of_other_plans(folders):
    study = study_of(folders)
    trained_earlier(study).check()
    with pytest.raises(InputError, match="was trained with plans other than the current 'FSEFTPlans': move it away"):
        trained_earlier(study, batch_size=7).check()


def test_results_of_other_splits(folders):
    study = study_of(folders)
    cell = trained_earlier(study)
    RunFile(support=cell.support).save(cell.folder)
    cell.check()
    RunFile(support=["other", *cell.support[1:]]).save(cell.folder)
    with pytest.raises(InputError, match=r"was trained on \['other', .* but the splits now say \['case_"):
        cell.check()


def of_cell(saved: Result, cell: Cell) -> Result:
    """As if it had been evaluated with the present weights, images and labels."""
    target = cell.study.target
    cases = dict.fromkeys(target.cases, {"spleen": dict.fromkeys(METRICS, 0.5)})
    digests = {"images": target.images_sha256, "labels": target.labels_sha256}
    return replace(saved, weights=cell.weights, cases=cases, **digests)


@pytest.mark.parametrize("folder", ["imagesTr", "gt_segmentations"])
def test_results_are_of_the_images_and_labels_that_lie_there(folders, folder):
    study = study_of(folders)
    cell = Cell(study, "zero_shot", 0, 0)
    cell.folder.mkdir()
    of_cell(result("zero_shot", 0), cell).save(cell.file)
    assert Cell(study_of(folders), "zero_shot", 0, 0).finished()
    first = study.target.cases[0]
    base = study.target.images if folder == "imagesTr" else study.target.labels
    file = next(base.glob(f"{first}*"))
    file.write_bytes(file.read_bytes() + b"corrected")
    assert Cell(study_of(folders), "zero_shot", 0, 0).finished() is None


def test_a_query_without_its_image(folders):
    study = study_of(folders)
    next(study.target.images.glob(f"{study.target.cases[0]}_*")).unlink()
    with pytest.raises(InputError, match=f"no image of '{study.target.cases[0]}', which the splits name: put it back"):
        study_of(folders)


def test_files_that_were_written_in_part(folders):
    """nnU-Net's own JSON files, of a run that was killed."""
    study = study_of(folders)
    cell = trained(Cell(study, "fseft", 5, 0), 9)
    cell.predictions.mkdir()
    summary = cell.predictions / "summary.json"
    summary.write_text("{}")
    assert cell.predicted
    summary.write_text('{"metric_per')
    assert not cell.predicted
    (cell.folder.parent / "plans.json").write_text('{"configura')
    with pytest.raises(InputError, match="plans.json is damaged .*: move it away"):
        cell.check()


def test_result_of_an_earlier_version_is_evaluated_anew(folders):
    cell = Cell(study_of(folders), "zero_shot", 0, 0)
    cell.folder.mkdir()
    saved = of_cell(result("zero_shot", 0), cell)
    saved.save(cell.file)
    assert cell.finished() == saved
    content = json.loads(cell.file.read_text())
    del content["budget_seconds"]
    cell.file.write_text(json.dumps(content))
    assert cell.finished() is None


def trained(cell: Cell, seconds: int, budget: int | None = None) -> Cell:
    """As if nnUNetv2_train had been through."""
    cell.folder.mkdir(parents=True)
    (cell.folder.parent / "plans.json").write_text(json.dumps(cell.study.plans))
    RunFile(support=cell.support, seconds={"training": seconds}, budget_seconds=budget).save(cell.folder)
    torch.save({"network_weights": {"head": torch.zeros(3)}}, cell.checkpoint)
    return cell


def test_results_are_of_the_weights_whatever_stands_beside_them(folders, monkeypatch):
    cell = trained(Cell(study_of(folders), "fseft", 5, 0), 9)
    reads = []
    read = weights.read_checkpoint
    monkeypatch.setattr(weights, "read_checkpoint", lambda file: reads.append(file) or read(file))
    before = cell.weights
    assert len(before) == 64 and cell.weights == Cell(cell.study, "transductive", 5, 0).weights == before
    assert len(reads) == 1
    add_to_checkpoint(cell.checkpoint, fseft_support=torch.ones(4))  # `fseft remember`
    assert cell.weights == before
    for changed in (torch.ones(3), torch.zeros(3, 1), torch.zeros(3).half(), torch.tensor(0).bfloat16()):
        add_to_checkpoint(cell.checkpoint, network_weights={"head": changed})
        assert cell.weights != before


def test_result_beside_a_damaged_checkpoint(folders):
    cell = trained(Cell(study_of(folders), "fseft", 5, 0), 9)
    saved = of_cell(result(), cell)
    saved.save(cell.file)
    assert cell.finished() == saved
    cell.checkpoint.write_bytes(cell.checkpoint.read_bytes()[:500])
    assert cell.finished() is None


def test_a_damaged_checkpoint_fails_its_cell_alone(folders):
    cell = trained(Cell(study_of(folders), "fseft", 5, 0), 9)
    cell.checkpoint.write_bytes(cell.checkpoint.read_bytes()[:500])
    failures, _ = share_features([cell])
    assert "checkpoint_final.pth is damaged or incomplete" in failures[cell]


@pytest.fixture
def nnunet_train(tmp_path, monkeypatch) -> Callable[[str], None]:
    """Puts a shell script in the place of `nnUNetv2_train` and `fseft train`."""
    programs = [tmp_path / "bin" / name for name in ("nnUNetv2_train", "fseft")]
    programs[0].parent.mkdir()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))  # commands are sought beside it

    def replace_by(script: str) -> None:
        for program in programs:
            program.write_text(f"#!/bin/sh\n{script}\n")
            program.chmod(0o755)

    return replace_by


@pytest.fixture
def trainings(nnunet_train, tmp_path) -> Callable[[], list[list[str]]]:
    """Lists minutes and final validation of the trainings that were started, which do nothing."""
    calls = tmp_path / "calls"
    calls.touch()
    nnunet_train(f'echo "$fseft_train_minutes,$fseft_final_validation" >> {calls}')
    return lambda: [line.split(",") for line in calls.read_text().splitlines()]


def test_scratch_alone_has_no_time(folders, monkeypatch):
    monkeypatch.setenv("fseft_train_minutes", "3")
    _, cell = plan_cells(study_of(folders), [5], 1, ["scratch"])
    with pytest.raises(InputError, match="add one to --methods, or give --scratch_minutes"):
        cell.train()


def test_only_trainings_from_scratch_have_a_time(folders, trainings, monkeypatch):
    monkeypatch.setenv("fseft_train_minutes", "3")
    study = study_of(folders)
    _, ft, scratch = plan_cells(study, [5], 1, ["ft", "scratch"])
    ft.train()
    trained(ft, 90)
    scratch.train()
    _, cell = plan_cells(replace(study, scratch_minutes=2.5), [5], 1, ["scratch"])
    cell.train()
    assert [minutes for minutes, _ in trainings()] == ["", "1.5000", "2.5000"]


@pytest.mark.parametrize("budget, before", [(90, "for 90 s"), (None, "without a time limit")])
def test_training_from_scratch_of_another_time(folders, budget, before):
    study = study_of(folders)
    _, probe, ft, scratch = plan_cells(study, [5], 1, ["probe", "ft", "scratch"])
    trained(scratch, 95, budget)
    refused = f"{scratch.folder} was trained {before}, but now it would get 600 s: move it away"
    with pytest.raises(InputError, match=refused):
        plan_cells(replace(study, scratch_minutes=10), [5], 1, ["probe", "scratch"])
    trained(probe, 90)
    plan_cells(study, [5], 1, ["probe", "ft", "scratch"])  # as long as `ft` takes is known later
    trained(ft, 600)
    with pytest.raises(InputError, match=refused):
        scratch.check_budget()
    with pytest.raises(InputError, match=refused):
        plan_cells(study, [5], 1, ["ft", "scratch"])


def test_training_from_scratch_of_the_same_time(folders):
    study = study_of(folders)
    _, probe, scratch = plan_cells(study, [5], 1, ["probe", "scratch"])
    trained(probe, 90)
    trained(scratch, 95, 90)
    plan_cells(study, [5], 1, ["probe", "scratch"])
    plan_cells(study, [5], 1, ["scratch"])
    plan_cells(replace(study, scratch_minutes=1.51), [5], 1, ["scratch"])


def test_a_finished_training_from_scratch_is_refused_once_others_took_longer(folders, nnunet_train, tmp_path, capsys):
    study = study_of(folders)
    _, ft, scratch = plan_cells(study, [5], 1, ["ft", "scratch"])
    trained(scratch, 95, 90)
    of_cell(result("scratch"), scratch).save(scratch.file)
    assert scratch.finished()
    trained(ft, 600)
    ft.predictions.mkdir()
    for case in study.target.cases:
        shutil.copy(study.target.labels / f"{case}.nii.gz", ft.predictions)
    ft.count_dice()
    made = ft.folder.parent.rename(tmp_path / "made")
    nnunet_train(f"cp -Rp {made}/. {ft.folder.parent}")
    with pytest.raises(InputError, match="1 of 2 cells failed: from scratch, equal time, 5 shots, fold 0"):
        run_cells(study, [ft, scratch], ["fseft"])
    assert "was trained for 90 s, but now it would get 600 s" in capsys.readouterr().out
    with open(study.experiment.work / "results.csv") as file:
        assert {(row["method"], row["Dice"]) for row in csv.DictReader(file)} == {("ft", "1.0")}


def test_command_that_repeats_it(folders, capsys):
    study = study_of(folders)
    zero_shot, scratch = plan_cells(study, [5], 1, ["scratch"])
    zero_shot.folder.mkdir()
    trained(scratch, 155, 150)
    for cell in (zero_shot, scratch):
        of_cell(result(cell.name, cell.shots), cell).save(cell.file)
    asked = ["benchmark", "-d", "77", "-device", "cpu", "--folds", "1", "--shots", "5", "--methods", "scratch"]
    asked += ["-o", str(folders[1]), "--scratch_minutes"]
    assert main([*asked, "2.5"]) == 0
    command = "--folds 1 --shots 5 --methods scratch --scratch_minutes 2.5 -o"
    page = unescape((folders[1] / "report.html").read_text())
    assert f"fseft benchmark -d 77 -p FSEFTPlans -device cpu {command} {folders[1]}" in page
    assert main([*asked, "3"]) == 2
    assert "was trained for 150 s, but now it would get 180 s" in capsys.readouterr().err


def test_a_training_is_done_once_it_has_its_final_checkpoint(folders, trainings):
    cell = Cell(study_of(folders), "probe", 5, 0)
    (cell.folder / "validation").mkdir(parents=True)
    (cell.folder / "validation" / "summary.json").write_text("{}")  # of an earlier training
    cell.train()
    cell.study.experiment.train("FSEFTTrainer_LinearProbe", cell.configuration)
    assert len(trainings()) == 2
    cell.checkpoint.touch()
    cell.train()
    cell.study.experiment.train("FSEFTTrainer_LinearProbe", cell.configuration)
    assert len(trainings()) == 2
    (cell.folder / "validation" / "summary.json").unlink()
    cell.train()
    cell.study.experiment.train("FSEFTTrainer_LinearProbe", cell.configuration, fseft_final_validation="0")
    assert len(trainings()) == 2
    cell.study.experiment.train("FSEFTTrainer_LinearProbe", cell.configuration)
    assert len(trainings()) == 3


def test_queries_are_validated_only_where_they_are_evaluated(folders, trainings, labelled_scans):
    for test in (None, labelled_scans):
        Cell(study_of(folders, test=test), "ft", 5, 0).train()
        failures, _ = share_features([Cell(study_of(folders, test=test), "probe", 5, 0)])
        assert [*failures.values()] == ["it ended without a checkpoint"]
    assert [validation for _, validation in trainings()] == ["", "0", "0", "0"]


@pytest.mark.parametrize("method", ["probe", "ft"])
def test_interrupt(folders, nnunet_train, method):
    """Ctrl-C while nnU-Net trains."""
    nnunet_train("kill -INT $PPID; exec sleep 60")
    study = study_of(folders)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(InputError, match="Interrupted. Run the same command again to continue"):
            run_cells(study, plan_cells(study, [5], 1, [method])[1:], ["fseft"])
    finally:
        signal.signal(signal.SIGINT, before)
