"""Few-shot adaptation on real MR: MSD Task04 Hippocampus, 40 query cases to tune on, imagesTs for the final figures.

    FSEFT_SHARED=FOLDER python benchmarks/hippocampus.py --work /data/hippocampus

FOLDER/data/Task04_Hippocampus is the Decathlon's folder, with labelsTs for the test cases. Rows that are done are not
computed again. `--tune` reports the queries instead of imagesTs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from fsefs_nnunet.backbones.store import find_backbone, save_backbone
from fsefs_nnunet.evaluation.tables import markdown_table, mean_dice
from fsefs_nnunet.experiment import Experiment, trained_parameters, training_seconds

DATASET = "Dataset004_Hippocampus"
NUM_QUERIES = 40
METHODS = {
    "linear probe": ("FSEFTTrainer_LinearProbe", "FSEFTPlans"),
    "spatial adapter": ("FSEFTTrainer_Adapter", "FSEFTPlans"),
    "spatial adapter + size prior": ("FSEFTTrainer", "FSEFTPlans"),
    "control: random backbone": ("FSEFTTrainer", "FSEFTPlans_random"),
    "control: raw image": ("FSEFTTrainer", "FSEFTPlans_raw"),
    "nnU-Net from scratch, equal time": ("FSEFTTrainer_Scratch", "FSEFTPlans"),
}


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
            args = ("-d", DATASET, "-b", backbone, "-np", "2", "--num_queries", NUM_QUERIES)
            experiment.run("fseft", "plan_and_preprocess", *args, fseft_backbones=str(backbones))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--tune", action="store_true", help="figures of the queries, imagesTs stays unseen")
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    if "FSEFT_SHARED" not in os.environ:
        sys.exit("Set FSEFT_SHARED to the folder that holds data/Task04_Hippocampus.")
    source = Path(os.environ["FSEFT_SHARED"]) / "data" / "Task04_Hippocampus"
    args.work.mkdir(parents=True, exist_ok=True)
    work = args.work.resolve()
    prepare(Experiment(work, DATASET), source)
    rows = []
    for method in args.methods:
        trainer, plans = METHODS[method]
        experiment = Experiment(work, DATASET, plans, args.device)
        configuration = f"3d_fullres_{args.shots}shot"
        environment = {"fseft_backbones": str(work / "backbones")}
        if trainer == "FSEFTTrainer_Scratch":
            minutes = training_seconds(experiment.model("FSEFTTrainer", configuration) / f"fold_{args.fold}") / 60
            environment |= {"fseft_train_minutes": f"{minutes:.4f}", "fseft_shots": str(args.shots)}
            configuration = "3d_fullres"
        fold = experiment.train(trainer, configuration, args.fold, **environment)
        summary = fold / "validation" / "summary.json"
        if not args.tune:
            predictions = fold / "imagesTs"
            summary = predictions / "summary.json"
            if not summary.exists():
                os.environ.update(environment)
                experiment.predict(trainer, configuration, experiment.raw / "imagesTs", predictions, args.fold)
                files = (
                    "-djfile",
                    experiment.raw / "dataset.json",
                    "-pfile",
                    experiment.preprocessed / f"{plans}.json",
                )
                experiment.run("nnUNetv2_evaluate_folder", source / "labelsTs", predictions, *files)
        dice = mean_dice(summary)
        rows.append(
            {
                "method": method,
                "trained parameters": trained_parameters(fold / "checkpoint_final.pth"),
                "seconds": round(training_seconds(fold)),
                "anterior": dice["1"],
                "posterior": dice["2"],
                "mean Dice": dice["mean"],
            }
        )
        print(markdown_table(rows), flush=True)
    where = "queries" if args.tune else "imagesTs"
    (work / f"{where}_{args.shots}shot_fold{args.fold}.md").write_text(markdown_table(rows))


if __name__ == "__main__":
    main()
