"""Few-shot adaptation on real MR: MSD Task04 Hippocampus, 40 query cases to tune on, imagesTs for the final figures.

    FSEFT_SHARED=FOLDER python benchmarks/hippocampus.py --work /data/hippocampus

FOLDER/data/Task04_Hippocampus is the Decathlon's folder, with labelsTs for the test cases. K = 1, 5, 10, five draws of
the support; trainings that are done are not done again. `--tune` reports the queries instead of imagesTs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fsefs_nnunet.backbones.store import find_backbone, save_backbone
from fsefs_nnunet.evaluation.tables import markdown_table, mean_dice
from fsefs_nnunet.experiment import Experiment, trained_parameters, training_seconds

DATASET = "Dataset004_Hippocampus"
NUM_QUERIES = 40
LONG = "nnU-Net from scratch, 30 minutes"
METHODS = {
    "linear probe": ("FSEFTTrainer_LinearProbe", "FSEFTPlans"),
    "spatial adapter": ("FSEFTTrainer_Adapter", "FSEFTPlans"),
    "spatial adapter + size prior": ("FSEFTTrainer", "FSEFTPlans"),
    "control: random backbone": ("FSEFTTrainer", "FSEFTPlans_random"),
    "control: raw image": ("FSEFTTrainer", "FSEFTPlans_raw"),
    "nnU-Net from scratch, equal time": ("FSEFTTrainer_Scratch", "FSEFTPlans"),
    LONG: ("FSEFTTrainer_Scratch", "FSEFTPlans"),
}
CLASSES = {"1": "anterior", "2": "posterior"}
KEYS = ("shots", "fold", "method")


def write_controls(folder: Path) -> None:
    """Backbones `random` (the embedded one's architecture, untrained) and `raw` (the image itself)."""
    import torch

    from fsefs_nnunet.backbones.nnunet import NNUNetBackbone

    contract = find_backbone("phantom")
    torch.manual_seed(0)
    save_backbone(
        replace(contract, id="random", training={}), NNUNetBackbone(contract, "last").backbone_state(), folder
    )
    raw = replace(contract, id="raw", architecture={"kind": "raw_image"}, classes=(), training={})
    save_backbone(raw, {"none": torch.zeros(1)}, folder)


def prepare(experiment: Experiment, source: Path) -> None:
    backbones = experiment.work / "backbones"
    if not (backbones / "raw.json").exists():
        write_controls(backbones)
    if not (experiment.raw / "dataset.json").exists():
        # the converter wants to write beside its input
        copy = shutil.copytree(source, experiment.work / source.name, dirs_exist_ok=True)
        experiment.run("nnUNetv2_convert_MSD_dataset", "-i", copy, "-np", "2")
    for backbone, plans in (("phantom", "FSEFTPlans"), ("random", "FSEFTPlans_random"), ("raw", "FSEFTPlans_raw")):
        if not list(experiment.preprocessed.glob(f"{plans}_3d_fullres")):
            args = ("-d", DATASET, "-b", backbone, "-np", "2", "--num_queries", NUM_QUERIES, "--shots", "1", "5", "10")
            experiment.run("fseft", "plan_and_preprocess", *args, fseft_backbones=str(backbones))


@dataclass(frozen=True)
class Cell:
    """One training of the grid."""

    work: Path
    method: str
    shots: int
    fold: int
    device: str

    @property
    def trainer(self) -> str:
        return METHODS[self.method][0]

    @property
    def from_scratch(self) -> bool:
        return self.trainer == "FSEFTTrainer_Scratch"

    @property
    def configuration(self) -> str:
        return f"3d_fullres_{self.shots}shot" + ("_scratch" if self.from_scratch else "")

    @property
    def experiment(self) -> Experiment:
        results = "nnUNet_results_long" if self.method == LONG else "nnUNet_results"
        return Experiment(self.work, DATASET, METHODS[self.method][1], self.device, results)

    @property
    def folder(self) -> Path:
        return self.experiment.model(self.trainer, self.configuration) / f"fold_{self.fold}"

    def environment(self) -> dict[str, str]:
        environment = {"fseft_backbones": str(self.work / "backbones")}
        if self.from_scratch:
            adapter = replace(self, method="spatial adapter + size prior")
            minutes = 30 if self.method == LONG else training_seconds(adapter.folder) / 60
            environment["fseft_train_minutes"] = f"{minutes:.4f}"
        return environment

    def summary(self, source: Path, tune: bool) -> Path:
        """Train and evaluate, unless it is done; nnU-Net's summary.json of the queries or of imagesTs."""
        environment = self.environment()
        self.experiment.train(self.trainer, self.configuration, self.fold, **environment)
        if tune:
            return self.folder / "validation" / "summary.json"
        predictions = self.folder / "imagesTs"
        if not (predictions / "summary.json").exists():
            images = self.experiment.raw / "imagesTs"
            self.experiment.predict(self.trainer, self.configuration, images, predictions, self.fold, **environment)
            files = ("-djfile", predictions / "dataset.json", "-pfile", predictions / "plans.json")
            self.experiment.run("nnUNetv2_evaluate_folder", source / "labelsTs", predictions, *files)
        return predictions / "summary.json"

    def row(self, source: Path, tune: bool) -> dict:
        summary = self.summary(source, tune)
        dice = mean_dice(summary)
        return {
            "shots": self.shots,
            "fold": self.fold,
            "method": self.method,
            "trained parameters": trained_parameters(self.folder / "checkpoint_final.pth"),
            "seconds": round(training_seconds(self.folder)),
            **{name: dice[label] for label, name in CLASSES.items()},
            "mean Dice": dice["mean"],
            **{f"size error, {CLASSES[label]}": error for label, error in size_errors(summary).items()},
        }


def size_errors(summary_json_file: Path) -> dict[str, float]:
    """Mean of |predicted - true| / true voxels over the cases of nnU-Net's summary.json, per label."""
    cases = [case["metrics"] for case in json.loads(summary_json_file.read_text())["metric_per_case"]]
    return {
        label: float(np.mean([abs(c[label]["n_pred"] - c[label]["n_ref"]) / c[label]["n_ref"] for c in cases]))
        for label in CLASSES
    }


def over_folds(rows: list[dict]) -> list[dict]:
    """One row per shots and method: means over the folds, with standard deviation and worst of the mean Dice."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["shots"], row["method"]), []).append(row)
    table = []
    for (shots, method), group in groups.items():
        dice = [row["mean Dice"] for row in group]
        means = {key: float(np.mean([row[key] for row in group])) for key in group[0] if key not in KEYS}
        seconds = round(means.pop("seconds"))
        spread = {"standard deviation": float(np.std(dice)), "worst": min(dice)}
        table.append({"shots": shots, "method": method, "folds": len(group), "seconds": seconds, **means, **spread})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5, 10])
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[name for name in METHODS if name != LONG])
    parser.add_argument("--tune", action="store_true", help="figures of the queries, imagesTs stays unseen")
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    if "FSEFT_SHARED" not in os.environ:
        sys.exit("Set FSEFT_SHARED to the folder that holds data/Task04_Hippocampus.")
    source = Path(os.environ["FSEFT_SHARED"]) / "data" / "Task04_Hippocampus"
    args.work.mkdir(parents=True, exist_ok=True)
    work = args.work.resolve()
    prepare(Experiment(work, DATASET), source)
    where, rows = "queries" if args.tune else "imagesTs", []
    for shots, fold, method in itertools.product(args.shots, args.folds, args.methods):
        rows.append(Cell(work, method, shots, fold, args.device).row(source, args.tune))
        print(markdown_table(rows[-1:]), flush=True)
        (work / f"{where}.md").write_text(f"{markdown_table(over_folds(rows))}\n{markdown_table(rows)}")
    print((work / f"{where}.md").read_text())


if __name__ == "__main__":
    main()
