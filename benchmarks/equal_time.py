"""Dice of labelled queries that methods reach in the same CPU time, from the same labels.

    FSEFT_SHARED=FOLDER python benchmarks/equal_time.py --work /data/equal_time --data hippocampus --cells 1:10 5:30

FOLDER/data holds Task04_Hippocampus, CHAOS_T2SPIR and OpenKBP; no label of a test case is read. A cell K:MINUTES is K
shots and the time from the command to the final checkpoint, start, feature bank and training: CPU time of one core or,
with `-device cuda --cells 1:1 5:5`, wall time. Methods that train on stored features stop by themselves, earlier. What
is done is not done again. `--figure` draws Dice against time from the results.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean
from time import monotonic

from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder_simple

from fsefs_nnunet.adaptation.choice import STUDENT
from fsefs_nnunet.cases.folders import training_files
from fsefs_nnunet.cases.splits import SPLITS_FILE, load_splits
from fsefs_nnunet.evaluation.tables import markdown_table
from fsefs_nnunet.files import read_json, write_atomically
from fsefs_nnunet.labels import foreground, summary_key
from fsefs_nnunet.methods.registry import BANK, METHODS, configuration_of
from fsefs_nnunet.nnunet.experiment import Experiment

START_SECONDS = 15  # of a command of nnU-Net's before the first epoch
TEACHERS = {STUDENT: "context", "student_of_ft_long": "ft_long"}  # by name of the cell
SHARE_OF_TEACHER = 1 / 3  # of the time, where the teacher does not stop by itself
DATA = {  # folder, dataset, labelled queries
    "hippocampus": ("Task04_Hippocampus", "Dataset004_Hippocampus", 40),
    "chaos": ("CHAOS_T2SPIR", "Dataset020_CHAOS", 4),
    "openkbp": ("OpenKBP", "Dataset021_OpenKBP", 15),
}


def prepare(work: Path, data: str, spacing: list[float], device: str = "cpu") -> Experiment:
    folder, dataset, queries = DATA[data]
    experiment = Experiment(work / data, dataset, device=device)
    if not (experiment.raw / "dataset.json").exists():
        source = Path(os.environ["FSEFT_SHARED"]) / "data" / folder
        decathlon = folder.startswith("Task")
        copy = experiment.work / folder if decathlon else experiment.raw
        unseen = shutil.ignore_patterns("labelsTs", *([] if decathlon else ["imagesTs"]))
        shutil.copytree(source, copy, ignore=unseen, copy_function=shutil.copyfile, dirs_exist_ok=True)
        for made in (copy, *filter(Path.is_dir, copy.rglob("*"))):
            made.chmod(0o755)
        if decathlon:
            experiment.run("nnUNetv2_convert_MSD_dataset", "-i", copy, "-np", "2")
    if not (experiment.preprocessed / f"{experiment.plans}_3d_fullres").exists():
        target = ("-overwrite_target_spacing", *map(str, spacing)) if spacing else ()
        drawn = ("--num_queries", str(queries), "--shots", "1", "5", "10")
        experiment.run("fseft", "plan_and_preprocess", "-d", dataset, "-b", "phantom", "-np", "2", *drawn, *target)
    return experiment


def seconds_of(device: str) -> float:
    """Wall time for a GPU; for a CPU, CPU time of the commands so far."""
    if device != "cpu":
        return monotonic()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_cell(experiment: Experiment, name: str, shots: int, minutes: float, fold: int) -> dict[str, float]:
    """Train and validate; seconds of the training's command and Dice of the queries."""
    method = METHODS[name]
    plans = method.plans or experiment.plans
    own = Experiment(experiment.work, experiment.dataset, plans, experiment.device, f"nnUNet_results_{minutes:g}min")
    if method.plans:
        own.preprocess_missing()
    configuration = configuration_of(shots, method.suffix)
    budget = {
        "fseft_train_minutes": str(minutes - START_SECONDS / 60),
        "fseft_train_clock": "cpu" if experiment.device == "cpu" else "wall",
    }
    experiment.run("fseft", "bank", "-d", own.dataset, "--clear")
    before = seconds_of(experiment.device)
    folder = own.train(method.trainer, configuration, fold, fseft_final_validation="0", **budget)
    seconds = seconds_of(experiment.device) - before
    training = (own.dataset, configuration, str(fold), "-tr", method.trainer, "-p", plans, "-device", own.device)
    own.run("nnUNetv2_train", *training, "--val")
    classes = foreground(read_json(own.raw / "dataset.json")["labels"])
    return {**of_summary(folder / "validation" / "summary.json", classes), "seconds": seconds}


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
    return of_summary(predictions / "summary.json", classes)


def of_summary(file: Path, classes: dict) -> dict[str, float]:
    summary = read_json(file)
    dice = {name: summary["mean"][summary_key(value)]["Dice"] for name, value in classes.items()}
    return {"mean": summary["foreground_mean"]["Dice"], **dice}


def run_student(experiment: Experiment, name: str, shots: int, minutes: float, fold: int) -> dict[str, float]:
    """Teacher, pile and student in the same CPU time; the student is `ft_long`."""
    own = replace(experiment, results=f"nnUNet_results_{minutes:g}min_{name}")  # with a teacher of its own
    teacher, configuration = METHODS[TEACHERS[name]], configuration_of(shots)
    number = 100 + int(20 * minutes) + 2 * shots + fold + 20 * list(TEACHERS).index(name)
    clock = {"fseft_train_clock": "cpu" if experiment.device == "cpu" else "wall"}
    images = query_images(own)
    experiment.run("fseft", "bank", "-d", own.dataset, "--clear")
    before = seconds_of(experiment.device)
    share = {} if teacher.learns_from == BANK else {"fseft_train_minutes": str(SHARE_OF_TEACHER * minutes), **clock}
    own.train(teacher.trainer, configuration, fold, fseft_final_validation="0", **share)
    taught = ("-d", own.dataset, "-c", configuration, "-tr", teacher.trainer, "-p", own.plans, "-f", str(fold))
    own.run("fseft", "student", *taught, "-o", str(number), "--student", "none", "-np", "2", "-device", own.device)
    used = (seconds_of(experiment.device) - before + START_SECONDS) / 60
    student = replace(own, dataset=f"Dataset{number}_{own.dataset.split('_')[1]}Student")
    trainer, configuration = METHODS["ft_long"].trainer, configuration_of("all")
    budget = {"fseft_train_minutes": str(minutes - used), **clock}
    student.train(trainer, configuration, 0, fseft_final_validation="0", **budget)
    seconds = seconds_of(experiment.device) - before
    output = student.model(trainer, configuration) / "fold_0" / "queries"
    student.predict(trainer, configuration, images, output)
    return {**dice_of(output, own), "seconds": seconds}


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
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)


def found(file: Path) -> dict[str, dict[str, float]]:
    return read_json(file) if file.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", choices=DATA, required=True)
    parser.add_argument("--cells", nargs="+", default=["1:10", "5:30"], metavar="K:MINUTES")
    parser.add_argument("--folds", type=int, nargs="+", default=[0], help="draws of the support")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *TEACHERS], default=["scratch", "nnunet"])
    parser.add_argument("--spacing", type=float, nargs=3, default=[], metavar="MM", help="-overwrite_target_spacing")
    parser.add_argument("-device", default="cpu", help="cuda: minutes are wall time; default: cpu")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the results, run nothing")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    args = parser.parse_args()
    work = args.work.resolve()
    if args.figure:
        draw(read_json(work / "results.json"), args.figure)
        return
    if "FSEFT_SHARED" not in os.environ:
        sys.exit("Set FSEFT_SHARED to the folder that holds data/Task04_Hippocampus.")
    os.sched_setaffinity(0, {args.core})
    experiment = prepare(work, args.data, args.spacing, args.device)
    file = work / "results.json"
    for cell in args.cells:
        shots, minutes = int(cell.partition(":")[0]), float(cell.partition(":")[2])
        for fold in args.folds:
            for name in args.methods:
                key = f"{args.data}, K = {shots}, {minutes:g} minutes, draw {fold}, {name}"
                if key not in found(file):
                    run = run_student if name in TEACHERS else run_cell
                    made = run(experiment, name, shots, minutes, fold)
                    # other cells may have been measured meanwhile, on another core
                    write_atomically(file, json.dumps({**found(file), key: made}, indent=1))
                print(key, {k: round(v, 3) for k, v in found(file)[key].items()}, flush=True)
    print(markdown_table([{"cell": key, **of} for key, of in read_json(file).items()]))


if __name__ == "__main__":
    main()
