"""Seconds of `fseft predict`: one fold inductive, transductive, and an ensemble of five folds, on real MR.

    FSEFT_SHARED=FOLDER python benchmarks/prediction_cost.py --work /data/hippocampus

Uses the trainings of benchmarks/hippocampus.py at K = 5 in the same folder; trains what is missing. Predicts imagesTs.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from time import monotonic

from hippocampus import DATASET, decathlon_folder, prepare

from fsefs_nnunet.evaluation.tables import markdown_table
from fsefs_nnunet.experiment import Experiment

TRAINER, CONFIGURATION, FOLDS = "FSEFTTrainer", "3d_fullres_5shot", ("0", "1", "2", "3", "4")
WAYS = {
    "one fold, inductive": ("-f", "0", "--inductive"),
    "one fold, transductive": ("-f", "0"),
    "five folds, inductive": ("-f", *FOLDS, "--inductive"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=2, help="the fastest counts; default: 2")
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    work = args.work.resolve()
    experiment = Experiment(work, DATASET, device=args.device)
    prepare(experiment, decathlon_folder())
    for fold in FOLDS:
        if not (experiment.model(TRAINER, CONFIGURATION) / f"fold_{fold}" / "checkpoint_final.pth").exists():
            experiment.train(TRAINER, CONFIGURATION, int(fold))
    images, output = experiment.raw / "imagesTs", work / "prediction_cost"
    model = ("-d", DATASET, "-c", CONFIGURATION, "-tr", TRAINER, "-device", args.device)
    seconds: dict[str, float] = {}
    for _ in range(args.repeats):
        for way, flags in WAYS.items():
            shutil.rmtree(output, ignore_errors=True)
            start = monotonic()
            experiment.run("fseft", "predict", "-i", images, "-o", output, *model, *flags)
            seconds[way] = min(seconds.get(way, float("inf")), monotonic() - start)
    first = next(iter(seconds.values()))
    volumes = len(list(images.glob("*.nii.gz")))
    print(
        markdown_table(
            [{"prediction": way, f"seconds, {volumes} volumes": s, "of one": s / first} for way, s in seconds.items()]
        )
    )


if __name__ == "__main__":
    main()
