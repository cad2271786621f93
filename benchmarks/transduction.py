"""`fseft predict` with and without adaptation to each volume, on real MR, and what an ensemble of folds costs.

    FSEFT_SHARED=FOLDER python benchmarks/transduction.py --work /data/hippocampus --tune

Needs the trainings of benchmarks/hippocampus.py in the same folder (method "spatial adapter + size prior"); trains what
is missing. `--tune` predicts the 40 labelled queries, else imagesTs. Predictions that are done are not done again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from time import monotonic

import numpy as np
from hippocampus import CLASSES, Cell, prepare, size_errors
from scipy.stats import wilcoxon

from fsefs_nnunet.evaluation.tables import case_dice, markdown_table, mean_dice
from fsefs_nnunet.experiment import Experiment
from fsefs_nnunet.splits import SPLITS_FILE, load_splits

METHOD = "spatial adapter + size prior"
WAYS = {"inductive": ("--inductive",), "transductive": ()}


def query_images(experiment: Experiment, source: Path, tune: bool) -> tuple[Path, Path]:
    """Folders of images and labels."""
    if not tune:
        return experiment.raw / "imagesTs", source / "labelsTs"
    folders = experiment.work / "queries" / "images", experiment.work / "queries" / "labels"
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for case in load_splits(experiment.preprocessed / SPLITS_FILE)["queries"]:
        shutil.copy(experiment.raw / "imagesTr" / f"{case}_0000.nii.gz", folders[0])
        shutil.copy(experiment.raw / "labelsTr" / f"{case}.nii.gz", folders[1])
    return folders


def predict(cell: Cell, folds: list[int], way: str, images: Path, output: Path) -> float:
    """Returns seconds of the whole command."""
    seconds = output / "seconds.json"
    if not seconds.exists():
        start = monotonic()
        model = ("-d", cell.experiment.dataset, "-c", cell.configuration, "-f", *map(str, folds))
        cell.experiment.run("fseft", "predict", "-i", images, "-o", output, *model, *WAYS[way], "-device", cell.device)
        seconds.write_text(json.dumps(monotonic() - start))
    return json.loads(seconds.read_text())


def row(cell: Cell, way: str, images: Path, labels: Path, where: str) -> dict:
    output = cell.work / "transduction" / where / f"{cell.configuration}_fold{cell.fold}_{way}"
    seconds = predict(cell, [cell.fold], way, images, output)
    if not (output / "summary.json").exists():
        files = ("-djfile", output / "dataset.json", "-pfile", output / "plans.json")
        cell.experiment.run("nnUNetv2_evaluate_folder", labels, output, *files)
    summary, dice = output / "summary.json", mean_dice(output / "summary.json")
    steps = [json.loads(file.read_text())["steps"][0] for file in output.glob("*_sizes.json")]
    return {
        "shots": cell.shots,
        "fold": cell.fold,
        "prediction": way,
        "adapted volumes": sum(s > 0 for s in steps),
        "mean steps": float(np.mean(steps)),
        "seconds": seconds,
        **{name: dice[label] for label, name in CLASSES.items()},
        "mean Dice": dice["mean"],
        **{f"size error, {CLASSES[label]}": error for label, error in size_errors(summary).items()},
        "summary": summary,
    }


def over_folds(rows: list[dict]) -> list[dict]:
    """One row per shots and way: means over folds, with the paired test over all volumes of all folds."""
    table = []
    for shots, way in itertools.product(dict.fromkeys(r["shots"] for r in rows), WAYS):
        group = [r for r in rows if (r["shots"], r["prediction"]) == (shots, way)]
        means = {
            key: float(np.mean([r[key] for r in group])) for key in group[0] if key not in ("prediction", "summary")
        }
        means.update({"shots": shots, "fold": len(group)})
        entry = {"shots": shots, "prediction": way, **means, "gain": 0.0, "p": 1.0}
        if way == "transductive":
            pairs = []
            for r in group:
                other = next(
                    o for o in rows if (o["shots"], o["fold"], o["prediction"]) == (shots, r["fold"], "inductive")
                )
                ours, theirs = case_dice(r["summary"]), case_dice(other["summary"])
                pairs += [ours[case] - theirs[case] for case in ours]
            entry["gain"] = float(np.mean(pairs))
            if any(pairs):
                entry["p"] = float(wilcoxon(pairs).pvalue)
        table.append(entry)
    return table


def ensemble_cost(cell: Cell, folds: list[int], images: Path) -> list[dict]:
    """Seconds of one fold and of all of them, inductive, on the same images."""
    rows = []
    for chosen in ([folds[0]], folds):
        output = cell.work / "transduction" / "ensemble" / f"{cell.configuration}_{len(chosen)}"
        rows.append({"folds": len(chosen), "seconds": predict(cell, chosen, "inductive", images, output)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5, 10])
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tune", action="store_true", help="the labelled queries; imagesTs stays unseen")
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    if "FSEFT_SHARED" not in os.environ:
        sys.exit("Set FSEFT_SHARED to the folder that holds data/Task04_Hippocampus.")
    source = Path(os.environ["FSEFT_SHARED"]) / "data" / "Task04_Hippocampus"
    work, where = args.work.resolve(), "queries" if args.tune else "imagesTs"
    work.mkdir(parents=True, exist_ok=True)
    prepare(Cell(work, METHOD, 1, 0, args.device).experiment, source)
    rows = []
    for shots, fold in itertools.product(args.shots, args.folds):
        cell = Cell(work, METHOD, shots, fold, args.device)
        cell.experiment.train(cell.trainer, cell.configuration, fold, **cell.environment())
        images, labels = query_images(cell.experiment, source, args.tune)
        rows += [row(cell, way, images, labels, where) for way in WAYS]
        print(markdown_table([{k: v for k, v in r.items() if k != "summary"} for r in rows[-2:]]), flush=True)
    table = markdown_table(over_folds(rows))
    costs = markdown_table(ensemble_cost(cell, args.folds, images))
    (work / f"transduction_{where}.md").write_text(f"{table}\n{costs}")
    print(table, costs, sep="\n")


if __name__ == "__main__":
    main()
