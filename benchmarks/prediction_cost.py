"""Seconds of `fseft predict`: one fold inductive, transductive, and an ensemble of five folds, on real MR.

    FSEFT_SHARED=FOLDER python benchmarks/prediction_cost.py --work /data/hippocampus

Uses the trainings of benchmarks/hippocampus.py at K = 5 in the same folder; trains what is missing. Predicts imagesTs.
Seconds are those of reading, backbone, adaptation and export, without the start of Python and the loading of models.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from time import monotonic

from hippocampus import DATASET, prepare

from fsefs_nnunet.evaluation.tables import markdown_table
from fsefs_nnunet.nnunet.experiment import Experiment

TRAINER, CONFIGURATION, FOLDS = "FSEFTTrainer", "3d_fullres_5shot", ("0", "1", "2", "3", "4")
WAYS = {  # folds, and whether to adapt to each volume
    "one fold, inductive": (FOLDS[:1], False),
    "one fold, transductive": (FOLDS[:1], True),
    "five folds, inductive": (FOLDS, False),
}


def predict(experiment: Experiment, folds: tuple[str, ...], transductive: bool, images: Path, output: Path) -> float:
    """Seconds for all of `images`."""
    from fsefs_nnunet.device import device_named
    from fsefs_nnunet.inference.folder import predict_folder
    from fsefs_nnunet.inference.prediction import QueryPredictor
    from fsefs_nnunet.inference.support import memories_of
    from fsefs_nnunet.inference.trained_model import TrainedModel

    folder, device = experiment.model(TRAINER, CONFIGURATION), device_named(experiment.device)
    model = TrainedModel(folder, CONFIGURATION, folds, "checkpoint_final.pth", device)
    predictor = QueryPredictor(model, memories_of(model) if transductive else None)
    start = monotonic()
    if failures := predict_folder(predictor, images, output):
        raise RuntimeError("\n".join(failures))
    return monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=2, help="the fastest counts; default: 2")
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    work = args.work.resolve()
    experiment = Experiment(work, DATASET, device=args.device)
    prepare(experiment)
    for fold in FOLDS:
        if not (experiment.model(TRAINER, CONFIGURATION) / f"fold_{fold}" / "checkpoint_final.pth").exists():
            experiment.train(TRAINER, CONFIGURATION, int(fold))
    os.environ.update(experiment.environment())  # before nnU-Net reads its folders
    images, output = experiment.raw / "imagesTs", work / "prediction_cost"
    seconds: dict[str, float] = {}
    for _ in range(args.repeats):
        for way, (folds, transductive) in WAYS.items():
            shutil.rmtree(output, ignore_errors=True)
            took = predict(experiment, folds, transductive, images, output)
            seconds[way] = min(seconds.get(way, float("inf")), took)
    first = next(iter(seconds.values()))
    volumes = len(list(images.glob("*.nii.gz")))
    print(
        markdown_table(
            [{"prediction": way, f"seconds, {volumes} volumes": s, "of one": s / first} for way, s in seconds.items()]
        )
    )


if __name__ == "__main__":
    main()
