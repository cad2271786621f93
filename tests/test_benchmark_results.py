"""Results of `fseft benchmark`, their summary and what is written."""

import csv
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import SimpleITK
from scipy.stats import wilcoxon
from studies import NAN, result

from fsefs_nnunet.benchmark.outputs import figure, write_results
from fsefs_nnunet.benchmark.result import Result
from fsefs_nnunet.benchmark.summary import case_dice, class_table, comparisons, fold_means, spread, table
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.evaluation.report import size_section
from fsefs_nnunet.evaluation.tables import duration
from fsefs_nnunet.methods.run_file import RunFile


def test_result_file(tmp_path):
    file = tmp_path / "r.json"
    saved = result()
    saved.save(file)
    assert "NaN" not in file.read_text() and [f.name for f in tmp_path.iterdir()] == ["r.json"]
    loaded = Result.load(file)
    assert repr(loaded) == repr(saved)
    for content in ("{}", "no json", '{"method": "x", "other": 1}'):
        file.write_text(content)
        with pytest.raises(
            InputError, match="r.json is not a result of this version of `fseft benchmark`: run it again"
        ):
            Result.load(file)


def test_means_are_nnunets():
    """Over cases first, then over classes."""
    one = result()
    assert fold_means([one])["Dice"].item() == pytest.approx(((0.5 + 0.9) / 2 + 0.7) / 2)
    assert case_dice([one]).to_dict() == pytest.approx({(5, "fseft", 0, "case_0"): 0.6, (5, "fseft", 0, "case_1"): 0.9})


def test_table_over_folds():
    folds = [result(fold=0), result(fold=1, dice=((0.3, 0.5), (0.5, 0.7)))]
    row = table([*folds, result("probe", dice=((0.2, 0.2), (0.2, 0.2)), parameters=1350)])
    means = [0.7, 0.5]
    sd = np.std(means, ddof=1)
    assert row[0]["Dice"] == f"0.600 ± {sd:.3f} (0.500)"
    assert row[0]["HD95 mm"].startswith("4.000 ±") and row[0]["HD95 mm"].endswith("(5.000)")  # the largest is worst
    assert (row[0]["labels spent"], row[0]["folds"], row[0]["seconds"]) == (5, 2, "12")
    assert row[1]["Dice"] == "0.200" and row[1]["trained parameters"] == "1,350"
    assert spread(pd.Series([0.5]), min) == "0.500" and spread(pd.Series([0.5, NAN]), min) == "-"
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
    plans = {"image_reader_writer": "SimpleITKIO", "configurations": {}}
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
    RunFile(prior={"liver": {"size": 11.0, "spread": 1.0, "num_cases": 5, "tolerance": 0.2}}).save(fold)
    (row,) = size_section(fold, fold / "validation")["rows"]
    assert (row["prior S"], row["predicted"], row["labelled"]) == ("11.0", "10.0", "12.0")


def test_duration():
    assert [duration(s) for s in (45.2, 700, 12600)] == ["45 s", "12 min", "3.5 h"]


@pytest.mark.slow
def test_peak_memory_is_that_of_the_process_alone():
    """Started by one of a GB more, with which it has nothing to do."""
    here = "from fsefs_nnunet.device import peak_host_memory_gb; print(peak_host_memory_gb())"
    large = f"import subprocess as s, sys; x = b'1' * 10**9; s.run([sys.executable, '-c', {here!r}], check=True)"
    measured = [float(subprocess.check_output([sys.executable, "-c", program])) for program in (here, large)]
    assert 0.05 < measured[0] < 0.9 and measured[1] == pytest.approx(measured[0], abs=0.1)
