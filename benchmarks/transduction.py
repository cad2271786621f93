"""Weight, rate and steps of `fseft predict`'s adaptation: Dice and sizes of the labelled queries for each choice.

    python benchmarks/transduction.py -d 4 --shots 1 5 --folds 0 1 --weights 0.3 1 3 --rates 1e-4 3e-4

Of trained models in nnUNet_results, with their feature banks; nothing is trained here. Each query goes through the
backbone once. Dice is counted on the preprocessed grid, where labels and predictions lie before any resampling. What is
done is kept in FILE.json and not done again. Choose defaults on the queries; test cases play no part.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from tqdm import tqdm

from fsefs_nnunet.cases.folders import dataset_folders, model_folder
from fsefs_nnunet.cases.splits import SPLITS_FILE, load_splits
from fsefs_nnunet.evaluation.tables import markdown_table
from fsefs_nnunet.features.volume import VolumeFeatures
from fsefs_nnunet.files import read_json, write_atomically
from fsefs_nnunet.inference.prediction import QueryPredictor, Volume
from fsefs_nnunet.inference.support import memories_of
from fsefs_nnunet.inference.trained_model import TrainedModel

INDUCTIVE = "inductive"


def dice(predicted: np.ndarray, true: np.ndarray) -> float:
    """Of two masks; NaN where both are empty."""
    return 2 * (predicted & true).sum() / (predicted.sum() + true.sum()) if (predicted | true).any() else float("nan")


def measure(model: TrainedModel, cases: list[str], choices: dict[str, dict | None]) -> dict[str, dict]:
    """Mean Dice, mean relative size error and mean steps of each choice: settings that it replaces, or None."""
    base = model.settings
    dataset_class = infer_dataset_class(str(preprocessed_of(model)))
    dataset = dataset_class(str(preprocessed_of(model)), cases)
    predictor = QueryPredictor(model, memories_of(model))
    rows = {name: [] for name in choices}
    for case in tqdm(cases):
        image, labels = (np.asarray(array[:]) for array in dataset.load_case(case)[:2])
        backbone, window = model.network.backbone, model.configuration.patch_size
        with TemporaryDirectory() as folder:
            volume = Volume(image, {}, VolumeFeatures(backbone, image, window, model.device, Path(folder)))
            for name, settings in choices.items():
                model.settings = replace(base, **(settings or {}))
                predict = predictor._inductive if settings is None else predictor._transductive
                logits, (prediction,) = predict(volume)
                segmentation = model.label_manager.convert_logits_to_segmentation(logits).numpy()
                masks = [(np.isin(segmentation, label), np.isin(labels[0], label)) for label in model.classes]
                errors = [abs(p.sum() / t.sum() - 1) if t.any() else np.nan for p, t in masks]
                rows[name].append((np.nanmean([dice(*m) for m in masks]), np.nanmean(errors), prediction.steps))
    model.settings = base
    return {name: dict(zip(("Dice", "size error", "steps"), np.nanmean(of, 0).tolist())) for name, of in rows.items()}


def preprocessed_of(model: TrainedModel) -> Path:
    preprocessed = dataset_folders(model.plans_manager.dataset_name)[2]
    return preprocessed / model.configuration.data_identifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, metavar="DATASET")
    parser.add_argument("-tr", default="FSEFTTrainer")
    parser.add_argument("-p", default="FSEFTPlans")
    parser.add_argument("--shots", nargs="+", default=["1", "5"])
    parser.add_argument("--folds", nargs="+", default=["0", "1"])
    parser.add_argument("--weights", nargs="+", type=float, default=[0.3, 1.0, 3.0], help="fseft_predict_lambda")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4], help="fseft_predict_lr")
    parser.add_argument("--steps", type=int, default=30, help="fseft_predict_steps")
    parser.add_argument("-o", type=Path, default=Path("transduction.json"), metavar="FILE.json")
    args = parser.parse_args()
    choices: dict[str, dict | None] = {INDUCTIVE: None}
    for rate in args.rates:
        for weight in args.weights:
            settings = {"predict_lambda": weight, "predict_lr": rate, "predict_steps": args.steps}
            choices[f"weight {weight:g}, rate {rate:g}, {args.steps} steps"] = settings
    queries = load_splits(dataset_folders(args.d)[2] / SPLITS_FILE)["queries"]
    done = read_json(args.o) if args.o.exists() else {}
    cells = {}
    for shots in args.shots:
        for fold in args.folds:
            of_cell = done.setdefault(f"{args.d} {args.tr} {args.p}, {shots} shots, fold {fold}", {})
            cells[f"{shots} shots, fold {fold}"] = of_cell
            missing = {name: settings for name, settings in choices.items() if name not in of_cell}
            if missing:
                configuration = f"3d_fullres_{shots}shot"
                folder = model_folder(args.d, args.tr, args.p, configuration)
                model = TrainedModel(folder, configuration, [fold], "checkpoint_final.pth", torch.device("cpu"))
                of_cell |= measure(model, queries, missing)
                write_atomically(args.o, json.dumps(done, indent=1))
    rows = [{"choice": name, **{k: cells[k][name]["Dice"] for k in cells}, **means(cells, name)} for name in choices]
    print(markdown_table(rows))


def means(cells: dict[str, dict], name: str) -> dict[str, float]:
    measured = [cell[name] for cell in cells.values()]
    return {f"mean {key}": float(np.mean([of[key] for of in measured])) for key in measured[0]}


if __name__ == "__main__":
    main()
