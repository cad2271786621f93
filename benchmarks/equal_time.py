"""Dice of labelled queries that methods reach in the same CPU time, from the same labels.

    FSEFT_SHARED=FOLDER python benchmarks/equal_time.py --work /data/equal_time --data hippocampus --cells 1:10 5:30

FOLDER is that of `real_data.py`; no label of a test case is read. A cell K:MINUTES is K shots and the time from the
command to the final checkpoint, start, feature bank and training: CPU time of one core or, with `-device cuda --cells
1:1 5:5`, wall time. Methods on stored features may end earlier, with their epochs. Completed cells are skipped.
`--figure` draws Dice against time from the results.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from statistics import mean

from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder_simple
from real_data import REAL, plan
from timed_training import TEACHERS, train

from fsefs_nnunet.cases.folders import training_files
from fsefs_nnunet.cases.splits import SPLITS_FILE, load_splits
from fsefs_nnunet.evaluation.tables import markdown_table
from fsefs_nnunet.files import read_json, write_atomically
from fsefs_nnunet.labels import foreground, summary_key
from fsefs_nnunet.methods.registry import METHODS
from fsefs_nnunet.nnunet.experiment import Experiment


def prepare(work: Path, data: str, device: str = "cpu") -> Experiment:
    """Planned for the embedded backbone."""
    experiment = Experiment(work / data, REAL[data].dataset, device=device)
    plan(REAL[data], experiment)
    return experiment


def run_cell(experiment: Experiment, name: str, shots: int, minutes: float, fold: int) -> dict[str, float]:
    """Seconds of a training and Dice of the queries."""
    images = query_images(experiment)
    trained = train(experiment, name, shots, minutes, fold)
    return {**dice_of(trained.predict(images, "queries"), experiment), "seconds": trained.seconds}


def query_images(experiment: Experiment) -> Path:
    """A folder with the images of the labelled queries."""
    folder, dataset_json = experiment.work / "query_images", read_json(experiment.raw / "dataset.json")
    files = training_files(experiment.raw, dataset_json)
    for case in load_splits(experiment.preprocessed / SPLITS_FILE)["queries"]:
        for channel, file in enumerate(files[case]["images"]):
            copy = folder / f"{case}_{channel:04d}{dataset_json['file_ending']}"
            if not copy.exists():
                folder.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
    return folder


def dice_of(predictions: Path, experiment: Experiment) -> dict[str, float]:
    """Of segmentations of the queries: the mean, and by class."""
    classes = foreground(read_json(experiment.raw / "dataset.json")["labels"])
    labels = experiment.preprocessed / "gt_segmentations"
    regions = [tuple(value) if isinstance(value, list) else value for value in classes.values()]
    compute_metrics_on_folder_simple(str(labels), str(predictions), regions, num_processes=2, chill=True)
    summary = read_json(predictions / "summary.json")
    dice = {name: summary["mean"][summary_key(value)]["Dice"] for name, value in classes.items()}
    return {"mean": summary["foreground_mean"]["Dice"], **dice}


def draw(results: dict[str, dict[str, float]], file: Path) -> None:
    """Dice against minutes, a panel for each dataset and number of shots, a line for each method over its draws."""
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, dict[str, list[tuple[float, float]]]]] = {}
    for key, of in results.items():
        data, shots, minutes, _, method = key.split(", ")
        lines = panels.setdefault(f"{data}, {shots}", {}).setdefault(method, {})
        lines.setdefault(minutes, []).append((of["seconds"] / 60, of["mean"]))
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    methods = list(dict.fromkeys(method for lines in panels.values() for method in lines))
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for method, of_minutes in lines.items():
            points = sorted(tuple(map(mean, zip(*found))) for found in of_minutes.values())
            axes.plot(*zip(*points), "o-", color=f"C{methods.index(method)}", label=method)
        axes.set(title=title, xlabel="minutes", ylabel="mean Dice of the queries")
        axes.set(xlim=(0, 1.1 * axes.dataLim.xmax), ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="lower left")
    figure.savefig(file, dpi=120)


def found(file: Path) -> dict[str, dict[str, float]]:
    return read_json(file) if file.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", choices=REAL, required=True)
    parser.add_argument("--cells", nargs="+", default=["1:10", "5:30"], metavar="K:MINUTES")
    parser.add_argument("--folds", type=int, nargs="+", default=[0], help="draws of the support")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *TEACHERS], default=["scratch", "nnunet"])
    parser.add_argument("-device", default="cpu", help="cuda: minutes are wall time; default: cpu")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the results, run nothing")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    args = parser.parse_args()
    work = args.work.resolve()
    if args.figure:
        draw(read_json(work / "results.json"), args.figure)
        return
    os.sched_setaffinity(0, {args.core})
    experiment = prepare(work, args.data, args.device)
    file = work / "results.json"
    for cell in args.cells:
        shots, minutes = int(cell.partition(":")[0]), float(cell.partition(":")[2])
        for fold in args.folds:
            for name in args.methods:
                key = f"{args.data}, K = {shots}, {minutes:g} minutes, draw {fold}, {name}"
                if key not in found(file):
                    made = run_cell(experiment, name, shots, minutes, fold)
                    # other cells may have been measured meanwhile, on another core
                    write_atomically(file, json.dumps({**found(file), key: made}, indent=1))
                print(key, {k: round(v, 3) for k, v in found(file)[key].items()}, flush=True)
    print(markdown_table([{"cell": key, **of} for key, of in read_json(file).items()]))


if __name__ == "__main__":
    main()
