"""`fseft benchmark` with nnU-Net's commands on the tiny dataset."""

import csv
import json
import shutil
from html import unescape
from pathlib import Path

import in_process
import pytest
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder2
from studies import study_of

from fsefs_nnunet.backbones.store import user_folder
from fsefs_nnunet.benchmark.cells import Cell
from fsefs_nnunet.benchmark.result import Result
from fsefs_nnunet.benchmark.shared_features import _features_of
from fsefs_nnunet.benchmark.summary import fold_means
from fsefs_nnunet.cases.splits import load_splits
from fsefs_nnunet.cli.main import main
from fsefs_nnunet.features import volume
from fsefs_nnunet.nnunet import experiment


@pytest.fixture(scope="module")
def grid(tiny, tmp_path_factory):
    """Runs `fseft benchmark` in one workspace, with plans of short trainings; two cells to begin with."""
    work = type(tiny)(tmp_path_factory.mktemp("grid") / "work")
    shutil.copytree(tiny.root, work.root)
    short = dict(fseft_epochs=2, fseft_steps_per_epoch=1, fseft_views=1, fseft_crop_size=[8] * 3, patch_size=[16] * 3)
    (work.preprocessed / "FSEFTPlans.json").write_text(json.dumps(work.plans(**short)))
    output = work.root / "output"

    def run(*argv: str) -> int:
        return main(
            ["benchmark", "-d", "77", "--shots", "5", "--folds", "1", "-device", "cpu", "-o", str(output), *argv]
        )

    with pytest.MonkeyPatch.context() as patch:
        for name, folder in work.environment().items():
            patch.setenv(name, folder)
        patch.setattr(experiment, "subprocess", in_process)
        run.work, run.output = work, output
        assert run("--methods", "probe", "ft_last") == 0
        yield run


def commands(grid) -> list[str]:
    return [line.split()[1] for line in (grid.output / "log.txt").read_text().splitlines() if line.startswith("$ ")]


@pytest.mark.slow
def test_a_grid(grid):
    # the probe, trained by `fseft train`, predicts from stored features; then zero-shot, by its own command
    assert commands(grid) == ["fseft", "fseft", "nnUNetv2_train"]
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
        assert fold_means([saved])["Dice"].item() == pytest.approx(summary["foreground_mean"]["Dice"])
        assert 0.1 < saved.peak_memory_gb < 100 and saved.seconds > 0 and len(saved.support) == 5
    page = unescape((grid.output / "report.html").read_text())
    for text in (
        "Best, median and worst case: linear probe, 5 shots, fold 0",
        "SHA-256",
        "fseft benchmark -d 77 -p FSEFTPlans -device cpu --folds 1 --shots 5 --methods probe ft_last -o ",
        "export nnUNet_raw=",
        f"export fseft_backbones={user_folder()}",
        "<summary>splits_fseft.json</summary>",
        '"fseft_lambda": 0.3',
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
    assert "4 cells, 3 of them already done" in captured.out
    assert "1 of 4 cells failed: spatial adapter, 5 shots, fold 0." in captured.err
    assert "no checkpoint" in broken.read_text() and "What failed" in (grid.output / "report.html").read_text()
    assert commands(grid)[len(before) :] == ["fseft"]
    assert f"{broken} cannot be read, it may be truncated" in captured.out
    shutil.rmtree(broken.parent.parent)
    with open(grid.output / "results.csv") as file:
        assert {row["method"] for row in csv.DictReader(file)} == {"zero_shot", "probe", "ft_last"}


def saved_at(fold: Path) -> Path:
    """The folder of the predictions of the test set's images."""
    return next(folder for folder in fold.glob("benchmark_ft_last_images_*") if folder.is_dir())


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
    assert [line.split()[1] for line in predictions] == ["fseft", "nnUNetv2_predict"]
    fold = grid.work.results / "FSEFTTrainer_FTLast__FSEFTPlans__3d_fullres_5shot" / "fold_0"
    saved = Result.load(next(fold.glob("benchmark_ft_last_images_*.json")))
    validated = Result.load(fold / "benchmark_ft_last_queries.json")
    counted = json.loads((saved_at(fold) / "summary.json").read_text())
    dataset_json, plans = grid.work.raw / "dataset.json", grid.work.preprocessed / "FSEFTPlans.json"
    compute_metrics_on_folder2(str(labels), str(saved_at(fold)), str(dataset_json), str(plans), num_processes=1)
    assert counted == json.loads((saved_at(fold) / "summary.json").read_text())
    # nnU-Net predicts the raw image in float32 as ours validated the preprocessed one, in bfloat16 where that is native
    for name, metrics in saved.cases["new"].items():
        assert metrics == pytest.approx(validated.cases[case][name], rel=0.05, abs=0.02, nan_ok=True)


@pytest.mark.slow
def test_methods_on_the_same_backbone_share_one_pass_over_the_queries(grid, monkeypatch, capsys):
    passes = []
    once = volume.run_windows
    monkeypatch.setattr(volume, "run_windows", lambda *args: passes.append(args) or once(*args))
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


@pytest.mark.slow
def test_stock_nnunet(grid):
    """Preprocessed by its own plans first, in the axes that nnU-Net chooses."""
    assert grid("--methods", "nnunet", "--scratch_minutes", "0.02") == 0
    assert commands(grid)[-2:] == ["nnUNetv2_preprocess", "nnUNetv2_train"]
    fold = grid.work.results / "FSEFTTrainer_Scratch__nnUNetPlans__3d_fullres_5shot_nnunet" / "fold_0"
    saved = Result.load(fold / "benchmark_nnunet_queries.json")
    splits = load_splits(grid.work.preprocessed / "splits_fseft.json")
    assert saved.support == splits["folds"][0][:5] and sorted(saved.cases) == splits["queries"]
    assert json.loads((fold.parent / "plans.json").read_text())["image_reader_writer"] == "SimpleITKIO"
    assert "<summary>nnUNetPlans.json</summary>" in (grid.output / "report.html").read_text()


def test_cells_that_share_features(folders):
    """Of the same window, stages and backbone: plans may say others for some shots."""
    study = study_of(folders)
    one, five = Cell(study, "fseft", 1, 0), Cell(study, "probe", 5, 1)
    assert _features_of(one) == _features_of(five)
    study.plans["configurations"]["3d_fullres_5shot"]["patch_size"] = [8, 8, 8]
    assert _features_of(one) != _features_of(five)
