"""A group's own setting: five labelled scans, all of them support (fold `all`), the others images without labels.

    FSEFT_SHARED=FOLDER python benchmarks/five_labelled.py CHAOS_T2SPIR --num_queries 4 --work /data/five

Makes a dataset of the five support cases of draw 0 and gives the queries as unlabelled images; this script alone reads
the queries' labels, for the Dice that it prints: of `nnUNetv2_predict`, and of `fseft predict`, which adapts to each.
FOLDER/data/CHAOS_T2SPIR (or OpenKBP, with 15 queries) is in nnU-Net's raw layout; test cases are not looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np

from fsefs_nnunet.cases.splits import make_splits, support_cases
from fsefs_nnunet.files import read_json
from fsefs_nnunet.nnunet.experiment import Experiment

DATASET, CONFIGURATION, SHOTS = "Dataset035_Five", "3d_fullres_allshot", 5


def make_dataset(source: Path, experiment: Experiment, num_queries: int) -> list[str]:
    """The raw dataset of the support, and the folder of the queries' images; returns the queries."""
    dataset = read_json(source / "dataset.json")
    ending = dataset["file_ending"]
    cases = sorted(file.name[: -len(ending)] for file in (source / "labelsTr").glob(f"*{ending}"))
    splits = make_splits(cases, [], [1, SHOTS], num_queries)
    support, queries = support_cases(splits, SHOTS, 0), splits["queries"]
    images = experiment.work / "queries"
    for folder, names in ((experiment.raw / "imagesTr", support), (images, queries)):
        folder.mkdir(parents=True)
        for name in names:
            shutil.copy(source / "imagesTr" / f"{name}_0000{ending}", folder)
    (experiment.raw / "labelsTr").mkdir()
    for name in support:
        shutil.copy(source / "labelsTr" / f"{name}{ending}", experiment.raw / "labelsTr")
    (experiment.raw / "dataset.json").write_text(json.dumps({**dataset, "numTraining": SHOTS}))
    return queries


def dice_of(predictions: Path, source: Path, queries: list[str]) -> dict[str, float]:
    """Mean Dice of the queries, by class and of all classes."""
    dataset = read_json(source / "dataset.json")
    labels = {name: value for name, value in dataset["labels"].items() if value}
    scores = {name: [] for name in labels}
    for query in queries:
        file = f"{query}{dataset['file_ending']}"
        made, true = (np.asarray(nib.load(folder / file).dataobj) for folder in (predictions, source / "labelsTr"))
        for name, value in labels.items():
            a, b = made == value, true == value
            if b.any():
                scores[name].append(2 * (a & b).sum() / (a.sum() + b.sum()))
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    return {name: round(value, 3) for name, value in {**means, "mean": float(np.mean([*means.values()]))}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a folder of FSEFT_SHARED/data")
    parser.add_argument("--num_queries", type=int, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--trainer", default="FSEFTTrainer")
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    source = Path(os.environ["FSEFT_SHARED"]) / "data" / args.data
    experiment = Experiment(args.work / args.data, DATASET, device=args.device)
    shutil.rmtree(experiment.work, ignore_errors=True)
    queries = make_dataset(source, experiment, args.num_queries)
    images = experiment.work / "queries"
    experiment.run("fseft", "plan_and_preprocess", "-d", DATASET, "--shots", "all", "--queries", images, "-np", "1")
    experiment.train(args.trainer, CONFIGURATION, "all", fseft_final_validation="0")
    model = ("-d", DATASET, "-c", CONFIGURATION, "-tr", args.trainer, "-f", "all", "-device", args.device)
    experiment.run("nnUNetv2_predict", "-i", images, "-o", experiment.work / "stock", *model, "-p", "FSEFTPlans")
    experiment.run("fseft", "predict", "-i", images, "-o", experiment.work / "adapted", *model)
    for command, folder in (("nnUNetv2_predict", "stock"), ("fseft predict", "adapted")):
        print(command, dice_of(experiment.work / folder, source, queries), flush=True)


if __name__ == "__main__":
    main()
