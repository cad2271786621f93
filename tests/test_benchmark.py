"""`fseft benchmark`: what it refuses, what it counts, and a small grid with nnU-Net's own commands."""

import csv
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from scipy.ndimage import binary_erosion, distance_transform_edt
from scipy.stats import wilcoxon

from fsefs_nnunet.backbones.checkpoints import add_to_checkpoint
from fsefs_nnunet.backbones.store import user_folder
from fsefs_nnunet.benchmark import grid as grid_module
from fsefs_nnunet.benchmark.cells import Cell
from fsefs_nnunet.benchmark.evaluation import METRICS
from fsefs_nnunet.benchmark.grid import _left, plan_cells, run_cells
from fsefs_nnunet.benchmark.methods import METHODS, choose
from fsefs_nnunet.benchmark.outputs import figure, write_results
from fsefs_nnunet.benchmark.report import shown
from fsefs_nnunet.benchmark.result import Result
from fsefs_nnunet.benchmark.shared_features import _features_of, share_features
from fsefs_nnunet.benchmark.study import open_study
from fsefs_nnunet.benchmark.summary import case_dice, class_table, comparisons, fold_mean, spread, table
from fsefs_nnunet.cases.splits import load_splits, save_splits
from fsefs_nnunet.cli.main import main
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.evaluation.report import size_section
from fsefs_nnunet.evaluation.surface import surface_metrics
from fsefs_nnunet.evaluation.tables import duration
from fsefs_nnunet.experiment import Experiment
from fsefs_nnunet.inference import prediction, weights

NAN = float("nan")
SPACING = (1.0, 2.0, 3.0)


# ---- methods ----


def test_methods_come_in_the_order_of_the_table():
    assert choose([]) == list(METHODS)
    assert choose(["scratch", "probe", "probe"]) == ["probe", "scratch"]


@pytest.mark.parametrize("name, near", [("probes", "probe"), ("fset", "fseft"), ("adapterin", "adapter_in")])
def test_misspelt_method(name, near):
    with pytest.raises(InputError, match=f"no method '{name}': did you mean '{near}'.* There are zero_shot, probe, "):
        choose(["probe", name])


def test_method_like_none():
    with pytest.raises(InputError, match=r"There is no method 'x'\. There are zero_shot, probe, "):
        choose(["x"])


def test_every_method_has_a_trainer_that_nnunet_finds():
    from fsefs_nnunet.shims import fseft_trainers

    assert all(hasattr(fseft_trainers, method.trainer) for method in METHODS.values() if method.trainer)


# ---- surface metrics ----


def box(*slices: slice) -> np.ndarray:
    mask = np.zeros((14, 12, 10), bool)
    mask[slices] = True
    return mask


def directed(a: np.ndarray, b: np.ndarray) -> float:
    surfaces = [mask & ~binary_erosion(mask) for mask in (a, b)]
    return np.percentile(distance_transform_edt(~surfaces[1], SPACING)[surfaces[0]], 95)


def test_distance_is_that_of_an_independent_computation():
    rng = np.random.default_rng(0)
    for _ in range(5):
        masks = [box(*(slice(a, a + rng.integers(3, 6)) for a in rng.integers(1, 5, 3))) for _ in range(2)]
        masks[0] ^= rng.random(masks[0].shape) < 0.02
        expected = max(directed(*masks), directed(*masks[::-1]))
        assert surface_metrics(*masks, SPACING)[1] == pytest.approx(expected)


def test_surface_dice_counts_what_lies_within_two_mm():
    cube = box(slice(2, 6), slice(2, 6), slice(2, 6))
    assert surface_metrics(cube, cube, SPACING) == (1.0, 0.0)
    by_2_mm, by_3_mm = (np.roll(cube, 1, axis) for axis in (1, 2))
    assert surface_metrics(by_2_mm, cube, SPACING) == (1.0, 2.0)
    partly, distance = surface_metrics(by_3_mm, cube, SPACING)
    assert 0.3 < partly < 1 and distance == 3.0
    far = np.roll(cube, 6, 0)
    assert surface_metrics(far, cube, (10.0, 10.0, 10.0))[0] < 0.2


def test_surface_dice_weighs_areas():
    """Of boxes of 20 x 20 x 40 mm and 20 x 20 x 45 mm with one base: voxels are 5 mm high, their faces differ."""
    short, tall = np.zeros((2, 30, 30, 14), bool)
    short[5:25, 5:25, 2:10] = tall[5:25, 5:25, 2:11] = True
    areas = 800 + 80 * 40, 800 + 80 * 45
    beyond = 16**2 + 400 + 80 * 3  # both tops, but for a rim, and the sides more than 2 mm above the lower one
    expected = 1 - beyond / sum(areas)
    assert surface_metrics(short, tall, (1.0, 1.0, 5.0))[0] == pytest.approx(expected, abs=0.02)


def test_a_mask_at_the_border_has_a_surface_there():
    """Metrics do not depend on where in the volume the masks lie."""
    inside = [box(slice(a, a + 4), slice(2, 6), slice(2, 6)) for a in (2, 4)]
    outside = [np.roll(mask, (-2, -2, -2), (0, 1, 2)) for mask in inside]
    assert outside[0][0].any()
    assert surface_metrics(*outside, SPACING) == surface_metrics(*inside, SPACING)


def test_empty_masks():
    empty, cube = box(slice(0)), box(slice(2, 6), slice(2, 6), slice(2, 6))
    assert all(map(math.isnan, surface_metrics(empty, empty, SPACING)))
    diagonal = math.sqrt(14**2 + 24**2 + 30**2)
    for masks in ((empty, cube), (cube, empty)):
        assert surface_metrics(*masks, SPACING) == (0.0, pytest.approx(diagonal))


# ---- results and their summary ----


def result(method="fseft", shots=5, fold=0, dice=((0.5, 0.7), (0.9, NAN)), parameters=100) -> Result:
    """Two classes; surface Dice is 0.1 less, the distance 10 (1 - Dice), the size error 1 - Dice."""
    cases = {
        f"case_{i}": {
            name: dict(zip(METRICS, (d, d - 0.1, 10 * (1 - d), 1 - d))) for name, d in zip(("liver", "spleen"), row)
        }
        for i, row in enumerate(dice)
    }
    support = [f"s{i}" for i in range(shots)] if METHODS[method].trainer else []
    return Result(method, shots, fold, support, "abc", "def", "ghi", parameters, 12.4, 0.0, 0.0, 1.5, 20.0, cases)


def test_result_file(tmp_path):
    file = tmp_path / "r.json"
    saved = result()
    saved.save(file)
    assert "NaN" not in file.read_text() and [f.name for f in tmp_path.iterdir()] == ["r.json"]
    loaded = Result.load(file)
    assert repr(loaded) == repr(saved)
    for content in ("{}", "no json", '{"method": "x", "other": 1}'):
        file.write_text(content)
        with pytest.raises(InputError, match="r.json is no result of this version of `fseft benchmark`: run it again"):
            Result.load(file)


def test_means_are_nnunets():
    """Over cases first, then over classes."""
    one = result()
    assert fold_mean(one, "Dice") == pytest.approx(((0.5 + 0.9) / 2 + 0.7) / 2)
    assert case_dice(one) == pytest.approx({"case_0": 0.6, "case_1": 0.9})


def test_table_over_folds():
    folds = [result(fold=0), result(fold=1, dice=((0.3, 0.5), (0.5, 0.7)))]
    row = table([*folds, result("probe", dice=((0.2, 0.2), (0.2, 0.2)), parameters=1350)])
    means = [0.7, 0.5]
    sd = np.std(means, ddof=1)
    assert row[0]["Dice"] == f"0.600 ± {sd:.3f} (0.500)"
    assert row[0]["HD95 mm"].startswith("4.000 ±") and row[0]["HD95 mm"].endswith("(5.000)")  # the largest is worst
    assert (row[0]["labels spent"], row[0]["folds"], row[0]["seconds"]) == (5, 2, "12")
    assert row[1]["Dice"] == "0.200" and row[1]["trained parameters"] == "1,350"
    assert spread([0.5], 0.5) == "0.500" and spread([0.5, NAN], NAN) == "-"
    (adapting,) = table([replace(folds[0], volume_seconds=1.25)])
    assert adapting["seconds"] == "12 + 1.2 a volume"
    classes = class_table(folds)[0]
    assert (classes["liver"], classes["spleen"]) == pytest.approx(((0.7 + 0.4) / 2, (0.7 + 0.6) / 2))


def test_pairs_are_cases_averaged_over_the_folds_of_both():
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 3, 8, 2))
    ours = [result("fseft", 5, f, a[f].tolist()) for f in range(3)]
    theirs = [result("probe", 5, f, b[f].tolist()) for f in (0, 2)]  # fold 1 failed
    (row,) = comparisons([*theirs, *ours])
    difference = a[[0, 2]].mean((0, 2)) - b[[0, 2]].mean((0, 2))
    assert row["pairs"] == 8
    assert row["mean difference of Dice"] == pytest.approx(difference.mean())
    assert row["p (Wilcoxon)"] == pytest.approx(wilcoxon(difference).pvalue)
    assert row["better / worse"] == f"{(difference > 0).sum()} / {(difference < 0).sum()}"
    assert row["comparison"] == "spatial adapter + size prior - linear probe"


def test_pairs_without_a_difference_and_without_a_class():
    same = [result("fseft"), result("probe")]
    assert comparisons(same)[0]["p (Wilcoxon)"] == 1.0
    absent = result("ft", dice=((NAN, NAN), (0.5, 0.5)))
    assert comparisons([result(), absent])[0]["pairs"] == 1
    assert comparisons([result("zero_shot", 0)]) == []


def test_zero_shot_is_compared_at_all_shots():
    results = [result("zero_shot", 0), result(shots=1), result(shots=5)]
    assert [(row["shots"], row["pairs"]) for row in comparisons(results)] == [(1, 2), (5, 2)]


def test_written_results(tmp_path):
    results = [result("zero_shot", 0, parameters=0), result(), result("probe")]
    write_results(results, tmp_path, "A dataset.")
    with open(tmp_path / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 2
    assert rows[0] == {
        **{"method": "zero_shot", "shots": "0", "fold": "0", "case": "case_0", "class": "liver"},
        **{"Dice": "0.5", "surface Dice 2 mm": "0.4", "HD95 mm": "5.0", "size error": "0.5"},
    }
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("A dataset.") and text.count("| spatial adapter + size prior |") == 2
    assert "| pairs |" in text
    assert figure(results).startswith(b"\x89PNG")


@pytest.mark.parametrize("ending", [".mha", ".nrrd", ".nii.gz"])
def test_size_section_of_any_file_that_nnunet_reads(tmp_path, ending):
    """A voxel has 10 x 10 x 5 mm = 0.5 ml."""
    fold = tmp_path / "FSEFTTrainer__FSEFTPlans__3d_fullres_5shot" / "fold_0"
    (fold / "validation").mkdir(parents=True)
    plans = {"image_reader_writer": "SimpleITKIO", "configurations": {"3d_fullres_5shot": {"fseft_gamma": 0.1}}}
    metrics = {"1": {"Dice": 0.9, "n_ref": 24, "n_pred": 20}}
    for file, content in (
        (fold.parent / "plans.json", plans),
        (fold.parent / "dataset.json", {"labels": {"background": 0, "liver": 1}, "file_ending": ending}),
        (
            fold / "validation" / "summary.json",
            {"metric_per_case": [{"prediction_file": f"a{ending}", "metrics": metrics}]},
        ),
    ):
        file.write_text(json.dumps(content))
    segmentation = SimpleITK.GetImageFromArray(np.ones((2, 3, 4), np.uint8))
    segmentation.SetSpacing((10.0, 10.0, 5.0))
    SimpleITK.WriteImage(segmentation, fold / "validation" / f"a{ending}")
    (fold / "training_log_2026_1_1_10_00_00.txt").write_text("Size prior of liver: 11.00 ml, spread 1.00 ml, 5 cases\n")
    _, rows = size_section(fold, fold / "validation")
    assert "<td>12.0</td>" in rows and "<td>10.0</td>" in rows and "<td>11.0</td>" in rows


def test_duration():
    assert [duration(s) for s in (45.2, 700, 12600)] == ["45 s", "12 min", "3.5 h"]


def test_peak_memory_is_that_of_the_process_alone():
    """Started by one of a GB more, with which it has nothing to do."""
    here = "import torch; from fsefs_nnunet.peak_memory import peak_memory_gb as p; print(p(torch.device('cpu')))"
    large = f"import subprocess as s, sys; x = b'1' * 10**9; s.run([sys.executable, '-c', {here!r}], check=True)"
    measured = [float(subprocess.check_output([sys.executable, "-c", program])) for program in (here, large)]
    assert 0.05 < measured[0] < 0.9 and measured[1] == pytest.approx(measured[0], abs=0.1)


# ---- what is refused before anything runs ----


@pytest.fixture
def folders(workspace, tmp_path):
    return workspace, tmp_path / "output"


def study_of(folders, plans="FSEFTPlans", test=None, device="cpu"):
    return open_study("77", plans, test, folders[1], device)


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
    spent = {cells[1]: 15.0, cells[2]: 30.0}  # trained and predicted already
    assert _left(cells, done, {}, spent) == "; about 25 s left"


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--folds", "6"], "Fold 5 does not exist: there are 5 folds"),
        (["--folds", "0"], "0 folds: give at least 1"),
        (["--shots", "3"], "have no configuration '3d_fullres_3shot': plan again with `fseft plan -d ID --shots 3`"),
        (["--methods", "prob"], "no method 'prob': did you mean 'probe'"),
        (["-p", "Others"], "Others.json is missing: `fseft plan_and_preprocess -d ID` makes it"),
        (["-i", "x"], "-i IMAGES and -l LABELS belong together"),
        (["-i", "x", "-l", "y"], "x has no images named <case>_0000.nii.gz"),
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
    assert f"'{minutes}' is no positive number of minutes" in capsys.readouterr().err


def test_missing_results_variable(folders, monkeypatch):
    monkeypatch.delenv("nnUNet_results")
    with pytest.raises(InputError, match="nnUNet_results is not set"):
        study_of(folders)


def test_no_labelled_queries(folders):
    file = folders[0].preprocessed / "splits_fseft.json"
    save_splits({**load_splits(file), "queries": []}, file)
    with pytest.raises(InputError, match="keep no labelled case as query: give a test set with -i IMAGES -l LABELS"):
        study_of(folders)


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
    with pytest.raises(InputError, match="scan_0.nii.gz is missing: -l wants a reference segmentation of every case"):
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
    with pytest.raises(InputError, match="was trained with other plans than the present 'FSEFTPlans': move it away"):
        trained_earlier(study, batch_size=7).check()


def test_results_of_other_splits(folders):
    study = study_of(folders)
    cell = trained_earlier(study)
    log = cell.folder / "training_log_2026_1_1_10_00_00.txt"
    line = "2026-01-01 10:00:00.1: 5 labelled support cases (all the labels that this training uses): {}; 3 queries\n"
    log.write_text(line.format(cell.support))
    cell.check()
    log.write_text(line.format(["other", *cell.support[1:]]))
    with pytest.raises(InputError, match=r"was trained on \['other', .* the splits now say \['case_"):
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


def trained(cell: Cell, seconds: int, reason: str = "") -> Cell:
    """As if nnUNetv2_train had been through."""
    cell.folder.mkdir(parents=True)
    (cell.folder.parent / "plans.json").write_text(json.dumps(cell.study.plans))
    lines = (
        "2026-01-01 10:00:00.0: start",
        reason,
        f"2026-01-01 10:{seconds // 60:02d}:{seconds % 60:02d}.0: Training done.",
    )
    (cell.folder / "training_log_2026_1_1_10_00_00.txt").write_text("\n".join(lines))
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


def test_scratch_alone_has_no_time(folders, monkeypatch):
    monkeypatch.setenv("fseft_train_minutes", "3")
    _, cell = plan_cells(study_of(folders), [5], 1, ["scratch"])
    with pytest.raises(InputError, match="add one to --methods, or give --scratch_minutes"):
        cell.train()


def test_only_trainings_from_scratch_have_a_time(folders, commands_run, monkeypatch):
    monkeypatch.setenv("fseft_train_minutes", "3")
    study = study_of(folders)
    assert "fseft_train_minutes" not in study.experiment.environment()
    _, ft, scratch = plan_cells(study, [5], 1, ["ft", "scratch"])
    ft.train()
    trained(ft, 90)
    scratch.train()
    _, cell = plan_cells(replace(study, scratch_minutes=2.5), [5], 1, ["scratch"])
    cell.train()
    assert [env.get("fseft_train_minutes") for _, env in commands_run] == [None, "1.5000", "2.5000"]


@pytest.mark.parametrize(
    "reason, before", [("the budget of 90 s is used", "for 90 s"), ("", "without a limit of time")]
)
def test_training_from_scratch_of_another_time(folders, reason, before):
    study = study_of(folders)
    _, probe, ft, scratch = plan_cells(study, [5], 1, ["probe", "ft", "scratch"])
    trained(scratch, 95, reason)
    refused = f"{scratch.folder} was trained {before}, now it would get 600 s: move it away"
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
    trained(scratch, 95, "Training ends after epoch 7: the budget of 90 s is used")
    plan_cells(study, [5], 1, ["probe", "scratch"])
    plan_cells(study, [5], 1, ["scratch"])
    plan_cells(replace(study, scratch_minutes=1.51), [5], 1, ["scratch"])


def test_a_finished_training_from_scratch_is_refused_once_others_took_longer(folders, monkeypatch, capsys):
    study = study_of(folders)
    _, ft, scratch = plan_cells(study, [5], 1, ["ft", "scratch"])
    trained(scratch, 95, "the budget of 90 s is used")
    finished = result("scratch")
    monkeypatch.setattr(Cell, "finished", lambda cell: finished if cell.name == "scratch" else None)
    monkeypatch.setattr(Cell, "run", lambda cell, *seconds: trained(cell, 600) and result(cell.name))
    monkeypatch.setattr(grid_module, "write_report", lambda *args: None)
    with pytest.raises(InputError, match="1 of 2 cells failed: from scratch, equal time, 5 shots, fold 0"):
        run_cells(study, [ft, scratch], ["fseft"])
    assert "was trained for 90 s, now it would get 600 s" in capsys.readouterr().out
    with open(study.experiment.work / "results.csv") as file:
        assert {row["method"] for row in csv.DictReader(file)} == {"ft"}


def test_command_that_repeats_it(folders, monkeypatch):
    asked = ["-d", "77", "-device", "cpu", "--scratch_minutes", "2.5", "-o", str(folders[1])]
    commands = []
    monkeypatch.setattr(grid_module, "run_cells", lambda study, cells, command: commands.append((study, command)))
    assert main(["benchmark", *asked, "--methods", "scratch"]) == 0
    study, command = commands[0]
    assert study.scratch_minutes == 2.5 and "--scratch_minutes 2.5 -o" in " ".join(command)


@pytest.fixture
def commands_run(monkeypatch) -> list[tuple[str, dict]]:
    """Commands and what they get in their environment, which are not run."""
    calls = []
    monkeypatch.setattr(Experiment, "run", lambda self, command, *args, **env: calls.append((command, env)))
    return calls


def test_a_training_is_done_once_it_has_its_final_checkpoint(folders, commands_run):
    cell = Cell(study_of(folders), "probe", 5, 0)
    (cell.folder / "validation").mkdir(parents=True)
    (cell.folder / "validation" / "summary.json").write_text("{}")  # of an earlier training
    cell.train()
    cell.study.experiment.train("FSEFTTrainer_LinearProbe", cell.configuration)
    assert [command for command, _ in commands_run] == ["nnUNetv2_train"] * 2
    cell.checkpoint.touch()
    cell.train()
    cell.study.experiment.train("FSEFTTrainer_LinearProbe", cell.configuration)
    assert len(commands_run) == 2
    (cell.folder / "validation" / "summary.json").unlink()
    cell.train()
    cell.study.experiment.train("FSEFTTrainer_LinearProbe", cell.configuration, fseft_final_validation="0")
    assert len(commands_run) == 2
    cell.study.experiment.train("FSEFTTrainer_LinearProbe", cell.configuration)
    assert len(commands_run) == 3


def test_queries_are_validated_only_where_they_are_evaluated(folders, commands_run, labelled_scans):
    for test, expected in ((None, [None, "0"]), (labelled_scans, ["0", "0"])):
        for name in ("ft", "probe"):
            Cell(study_of(folders, test=test), name, 5, 0).train()
        assert [env.get("fseft_final_validation") for _, env in commands_run[-2:]] == expected


def test_interrupt(folders, monkeypatch, capsys):
    def interrupt(cell):
        raise KeyboardInterrupt

    monkeypatch.setattr(Cell, "train", interrupt)
    study = study_of(folders)
    with pytest.raises(InputError, match="Interrupted. The same command goes on"):
        run_cells(study, plan_cells(study, [5], 1, ["probe"]), ["fseft"])


# ---- with nnU-Net's commands ----


@pytest.fixture(scope="module")
def grid(tiny, tmp_path_factory):
    """Runs `fseft benchmark` in one workspace, with plans of short trainings; two cells to begin with."""
    work = type(tiny)(tmp_path_factory.mktemp("grid") / "work")
    shutil.copytree(tiny.root, work.root)
    short = dict(fseft_steps_per_epoch=1, fseft_views=1, fseft_crop_size=[8, 8, 8], patch_size=[16, 16, 16])
    (work.preprocessed / "FSEFTPlans.json").write_text(json.dumps(work.plans(**short)))
    output = work.root / "output"

    def run(*argv: str) -> int:
        return main(
            ["benchmark", "-d", "77", "--shots", "5", "--folds", "1", "-device", "cpu", "-o", str(output), *argv]
        )

    with pytest.MonkeyPatch.context() as patch:
        for name, folder in work.environment().items():
            patch.setenv(name, folder)
        patch.setenv("nnUNet_def_n_proc", "1")
        run.work, run.output = work, output
        assert run("--methods", "probe", "ft_last") == 0
        yield run


def commands(grid) -> list[str]:
    return [line.split()[1] for line in (grid.output / "log.txt").read_text().splitlines() if line.startswith("$ ")]


@pytest.mark.slow
def test_a_grid(grid):
    predicted = ["nnUNetv2_train", "nnUNetv2_evaluate_folder"]  # on stored features
    assert commands(grid) == [*predicted, "fseft", "nnUNetv2_evaluate_folder", "nnUNetv2_train"]
    with open(grid.output / "results.csv") as file:
        rows = list(csv.DictReader(file))
    queries = load_splits(grid.work.preprocessed / "splits_fseft.json")["queries"]
    assert len(rows) == 3 * len(queries) * 3 and rows[0]["method"] == "zero_shot"
    for trainer, method in (("FSEFTTrainer_LinearProbe", "probe"), ("FSEFTTrainer_FTLast", "ft_last")):
        fold = grid.work.results / f"{trainer}__FSEFTPlans__3d_fullres_5shot" / "fold_0"
        summary = json.loads((fold / "validation" / "summary.json").read_text())
        expected = {
            Path(case["prediction_file"]).name[: -len(".nii.gz")]: case["metrics"]["1"]["Dice"]
            for case in summary["metric_per_case"]
        }
        own = {r["case"]: float(r["Dice"]) for r in rows if (r["method"], r["class"]) == (method, "spleen")}
        assert own == pytest.approx(expected)
        counts = [case["metrics"]["1"] for case in summary["metric_per_case"]]
        errors = [abs(c["n_pred"] - c["n_ref"]) / c["n_ref"] for c in counts]
        own = [float(r["size error"]) for r in rows if (r["method"], r["class"]) == (method, "spleen")]
        assert sorted(own) == pytest.approx(sorted(errors))
        saved = Result.load(fold / f"benchmark_{method}_queries.json")
        assert fold_mean(saved, "Dice") == pytest.approx(summary["foreground_mean"]["Dice"])
        assert 0.1 < saved.peak_memory_gb < 100 and saved.seconds > 0 and len(saved.support) == 5
    page = (grid.output / "report.html").read_text()
    for text in (
        "Best, median and worst case: linear probe, 5 shots, fold 0",
        "SHA-256",
        "fseft benchmark -d 77 -p FSEFTPlans -device cpu --folds 1 --shots 5 --methods probe ft_last -o ",
        "export nnUNet_raw=",
        f"export fseft_backbones={user_folder()}",
        "<summary>splits_fseft.json</summary>",
        "&quot;fseft_lambda&quot;: 0.3",
    ):
        assert text in page
    assert page.count("data:image/png") == 1 + 3 and "http" not in page.split("base64")[0]


@pytest.mark.slow
def test_what_is_done_stays_done_and_a_failure_stops_nothing(grid, capsys):
    before = commands(grid)
    broken = (
        grid.work.results / "FSEFTTrainer_Adapter__FSEFTPlans__3d_fullres_5shot" / "fold_0" / "checkpoint_latest.pth"
    )
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no checkpoint")
    assert grid("--methods", "probe", "adapter", "ft_last", "zero_shot") == 2
    captured = capsys.readouterr()
    assert "4 cells, 3 of them done before" in captured.out
    assert "1 of 4 cells failed: spatial adapter, 5 shots, fold 0." in captured.err
    assert "no checkpoint" in broken.read_text() and "What failed" in (grid.output / "report.html").read_text()
    assert commands(grid)[len(before) :] == ["nnUNetv2_train"]
    shutil.rmtree(broken.parent.parent)
    with open(grid.output / "results.csv") as file:
        assert {row["method"] for row in csv.DictReader(file)} == {"zero_shot", "probe", "ft_last"}


@pytest.mark.slow
def test_a_test_set(grid):
    """Fine-tuned weights through nnUNetv2_predict; the labels are those of the very images."""
    images, labels = grid.work.root / "images", grid.work.root / "labels"
    case = load_splits(grid.work.preprocessed / "splits_fseft.json")["queries"][0]
    images.mkdir(), labels.mkdir()
    shutil.copy(grid.work.raw / "imagesTr" / f"{case}_0000.nii.gz", images / "new_0000.nii.gz")
    shutil.copy(grid.work.raw / "labelsTr" / f"{case}.nii.gz", labels / "new.nii.gz")
    output = grid.work.root / "test_set"
    assert grid("-i", str(images), "-l", str(labels), "-o", str(output), "--methods", "ft_last") == 0
    predictions = [line for line in (output / "log.txt").read_text().splitlines() if line.startswith("$ ")]
    assert [line.split()[1] for line in predictions] == [
        *("fseft", "nnUNetv2_evaluate_folder"),
        *("nnUNetv2_predict", "nnUNetv2_evaluate_folder"),
    ]
    fold = grid.work.results / "FSEFTTrainer_FTLast__FSEFTPlans__3d_fullres_5shot" / "fold_0"
    saved = Result.load(next(fold.glob("benchmark_ft_last_images_*.json")))
    validated = Result.load(fold / "benchmark_ft_last_queries.json")
    # nnU-Net predicts the raw image as it did the preprocessed one
    for name, metrics in saved.cases["new"].items():
        assert metrics == pytest.approx(validated.cases[case][name], abs=1e-6, nan_ok=True)


@pytest.mark.slow
def test_methods_on_the_same_backbone_share_one_pass_over_the_queries(grid, monkeypatch, capsys):
    passes = []
    once = prediction.extract_features
    monkeypatch.setattr(prediction, "extract_features", lambda *args: passes.append(args) or once(*args))
    assert grid("--methods", "adapter", "fseft", "transductive") == 0
    queries = load_splits(grid.work.preprocessed / "splits_fseft.json")["queries"]
    assert len(passes) == len(queries)
    with open(grid.output / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {"zero_shot", "adapter", "fseft", "transductive"}
    fold = grid.work.results / "FSEFTTrainer__FSEFTPlans__3d_fullres_5shot" / "fold_0"
    log = next(fold.glob("training_log_*.txt")).read_text()
    assert "The final validation is skipped: fseft_final_validation is 0." in log
    assert (fold / "validation" / "summary.json").exists()
    sizes = sorted(file.name for file in (fold / "benchmark_transductive_queries").glob("*_sizes.json"))
    assert sizes == [f"{case}_sizes.json" for case in sorted(queries)]

    # an interrupted prediction goes on
    fold = grid.work.results / "FSEFTTrainer_Adapter__FSEFTPlans__3d_fullres_5shot" / "fold_0"
    for name in ("benchmark_adapter_queries.json", "validation/summary.json", f"validation/{queries[0]}.nii.gz"):
        (fold / name).unlink()
    passes.clear()
    assert grid("--methods", "adapter") == 0 and len(passes) == 1

    # an image that cannot be read is named, also where only the report wants it
    image = grid.work.raw / "imagesTr" / f"{queries[0]}_0000.nii.gz"
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    assert grid("--methods", "adapter") == 2
    assert f"{image.name} was not segmented" in capsys.readouterr().out
    assert "An image cannot be drawn: " in (grid.output / "report.html").read_text("utf-8")
    image.write_bytes(content)


def test_cells_that_share_features(folders):
    """Of the same window, stages and backbone: plans may say others for some shots."""
    study = study_of(folders)
    one, five = Cell(study, "fseft", 1, 0), Cell(study, "probe", 5, 1)
    assert _features_of(one) == _features_of(five)
    study.plans["configurations"]["3d_fullres_5shot"]["patch_size"] = [8, 8, 8]
    assert _features_of(one) != _features_of(five)
