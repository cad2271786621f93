"""`fseft demo`: five labelled phantoms from an unseen scanner, four methods, tables, pictures and a report."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from time import time

from fsefs_nnunet.device import device_named
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.evaluation.overlays import ABDOMEN_HU, save_overlay
from fsefs_nnunet.evaluation.report import write_report
from fsefs_nnunet.evaluation.tables import markdown_table, mean_dice
from fsefs_nnunet.files import read_json
from fsefs_nnunet.methods.registry import METHODS
from fsefs_nnunet.methods.run_file import RunFile
from fsefs_nnunet.nnunet.experiment import Experiment
from fsefs_nnunet.synthetic.datasets import DEMO_DRIFT, write_demo_dataset

DATASET = "Dataset901_FSEFTDemo"
CONFIGURATION = "3d_fullres_5shot"
SUPPORT, NUM_QUERIES = 5, 8
SHOWN = [METHODS[name] for name in ("probe", "adapter", "fseft", "scratch")]
WITH_PRIOR = METHODS["fseft"].title
ADVICE = [  # README.md says the same
    "Nothing to download, any modality: phantom, embedded, the default.",
    "Organs that TotalSegmentator knows: its own models, or your own nnU-Net, as backbones: fseft backbones import.",
    "Abdominal CT: FSEFT's, SuPreM's and others' universal models: fseft backbones list.",
]
# the plans' defaults train longer
SHORT = {"fseft_steps_per_epoch": 2, "fseft_views": 20, "fseft_crop_size": [24, 24, 24]}


def prepare(experiment: Experiment, num_queries: int, pool: int, shots: tuple[str, ...] = ("5",)) -> None:
    """Dataset, plans, splits, preprocessing; `pool` cases to draw the support from, short trainings."""
    if not (experiment.raw / "dataset.json").exists():
        write_demo_dataset(experiment.raw, num_queries + pool)
    done = experiment.preprocessed / "demo_is_prepared"
    if not done.exists():
        numbers = ("--shots", *shots, "--num_queries", str(num_queries))
        experiment.run("fseft", "plan_and_preprocess", "-d", experiment.dataset, *numbers, "-np", "2")
        file = experiment.preprocessed / "FSEFTPlans.json"
        plans = read_json(file)
        for number in shots:
            plans["configurations"][f"3d_fullres_{number}shot"].update(SHORT)
        file.write_text(json.dumps(plans, indent=4))
        done.touch()


def run_demo(folder: Path, seconds: float | None = None, device: str | None = None) -> None:
    """Run what is not done yet and write `table.md`, `report.html` and one overlay per method below `folder`.

    seconds: training time of the from-scratch baseline; default: as long as the adapter with the prior took.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: choose an empty or a new folder with -o.")
    if folder.exists() and any(folder.iterdir()) and not (folder / "nnUNet_raw").exists():
        raise InputError(f"{folder} holds other files: choose an empty or a new folder with -o.")
    if not os.access(folder.parent, os.W_OK):
        raise InputError(f"{folder.parent} cannot be written: choose another folder with -o.")
    experiment = Experiment(folder, DATASET, device=device_named(device).type)
    start = time()
    print("1/6 phantoms, plans, preprocessing", flush=True)
    prepare(experiment, NUM_QUERIES, SUPPORT)
    rows, folds, labels = [], {}, {}
    for i, method in enumerate(SHOWN, 2):
        print(f"{i}/6 {method.title} ({time() - start:.0f} s so far)", flush=True)
        budget = {}
        if method.suffix:
            minutes = (seconds or RunFile.load(folds[WITH_PRIOR]).training_seconds) / 60
            budget = {"fseft_train_minutes": f"{minutes:.4f}"}
        fold = folds[method.title] = experiment.train(method.trainer, CONFIGURATION + method.suffix, **budget)
        run = RunFile.load(fold)
        labels = read_json(fold.parent / "dataset.json")["labels"]
        dice = mean_dice(fold / "validation" / "summary.json")
        organs = {organ: dice[str(number)] for organ, number in labels.items() if organ != "background"}
        rows.append(
            {
                "method": method.title,
                "trained parameters": run.trained_parameters,
                "seconds": round(run.training_seconds),
                **organs,
                "mean Dice": dice["mean"],
            }
        )
    print("6/6 table, pictures, report", flush=True)
    for name, fold in folds.items():
        validation = fold / "validation"
        case = sorted(validation.glob("*.nii.gz"))[0].name
        save_overlay(
            experiment.raw / "imagesTr" / case.replace(".nii.gz", "_0000.nii.gz"),
            validation / case,
            folder / f"{name.replace(' ', '_').replace(',', '').replace('+', 'and')}.png",
            reference_file=experiment.raw / "labelsTr" / case,
            labels={organ: number for organ, number in labels.items() if organ != "background"},
            title=f"{name}: {case.removesuffix('.nii.gz')}",
            window=ABDOMEN_HU,
        )
    setting = (
        f"{SUPPORT} labelled phantoms, {NUM_QUERIES} queries, scanner drift {DEMO_DRIFT} (pretraining saw 0 to 1); "
        "the backbone has never seen a stomach. Dice of the queries."
    )
    table = f"{setting}\n\n{markdown_table(rows)}"
    (folder / "table.md").write_text(table, "utf-8")
    write_report(
        folder / "report.html", setting, rows, folds, WITH_PRIOR, experiment.raw, next_steps(experiment), ADVICE
    )
    print(f"\n{table}\n\n{folder}: report.html, table.md and one picture per method; {time() - start:.0f} s.")


def next_steps(experiment: Experiment) -> dict[str, list[str]]:
    """Commands for the report; those on the demo run as they stand."""
    trained = f"{CONFIGURATION} -tr FSEFTTrainer -p FSEFTPlans -device {experiment.device}"
    folders = {
        name: shlex.quote(str(experiment.work / name))
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    }
    images, output = (shlex.quote(str(f)) for f in (experiment.raw / "imagesTr", experiment.work / "predictions"))
    return {
        "Another draw of the five labelled cases, and predictions of the first adapter:": [
            'eval "$(fseft env)"',
            *(f"export {name}={folder}" for name, folder in folders.items()),
            f"nnUNetv2_train 901 {CONFIGURATION} 1 -tr FSEFTTrainer -p FSEFTPlans -device {experiment.device}",
            f"nnUNetv2_predict -i {images} -o {output} -d 901 -f 0 -c {trained}",
        ],
        "Your own scans, here dataset 4 of your own nnUNet_raw, five of them labelled. The first line chooses a "
        "method, trains it for half an hour and segments; the others do one step each:": [
            f"fseft adapt -d 4 --shots 5 --minutes 30 -i IMAGES -o OUTPUT -device {experiment.device}",
            'eval "$(fseft env)" && fseft plan_and_preprocess -d 4 --shots 5',
            f"nnUNetv2_train 4 {CONFIGURATION} 0 -tr FSEFTTrainer -p FSEFTPlans -device {experiment.device}",
            f"nnUNetv2_predict -i IMAGES -o OUTPUT -d 4 -f 0 -c {trained}",
        ],
    }
