"""The locked run: every choice was made on queries, and this script alone reads labels of test cases, once.

    FSEFT_SHARED=FOLDER python benchmarks/final.py --work /data/final --reason "version 0.2.0"
    FSEFT_SHARED=FOLDER python benchmarks/final.py --work /data/final
    python benchmarks/final.py --report

FOLDER is that of `real_data.py`, and FOLDER/weights holds OBELISK's file. The first call notes commit and reason in
`looks.md`; the second continues where the first was stopped, cell by cell, as long as the package's code is the same.
Other code is another look, and needs a reason of its own. Results are kept in `final_results.jsonl`; `--report` prints
tables and differences of what is done.

The cells, in the order of their use: the best method of `equal_time.py` and the baseline, then `fseft adapt`, each in a
time of one core (on a GPU, a sixth of it); then all that trains on stored features, and `ft_last`, by `fseft
benchmark`; then the baseline on the whole pool. One core, unless `-device cuda`. The baseline is nnU-Net by its own
plans; where a step of it takes a core more than a minute and 20 GB, for CHAOS and OpenKBP, it runs on a GPU alone, and
on a core the backbone's architecture is trained from scratch instead.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from hashlib import sha256
from itertools import groupby, product
from math import isfinite
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from filelock import FileLock
from final_report import ADAPT, BEST, OTHER, RECOMMENDED, report
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from real_backbones import CONTROL, make_backbones
from real_data import REAL, RealData, plan
from timed_training import Trained, seconds_of, train

from fsefs_nnunet.backbones.store import find_backbone
from fsefs_nnunet.cases.splits import SPLITS_FILE, load_splits, support_cases
from fsefs_nnunet.device import precision_name
from fsefs_nnunet.evaluation.surface import surface_metrics
from fsefs_nnunet.files import read_json, write_atomically
from fsefs_nnunet.labels import foreground, foreground_names, match_labels
from fsefs_nnunet.methods.registry import METHODS, configuration_of
from fsefs_nnunet.methods.run_file import RunFile
from fsefs_nnunet.nnunet.experiment import Experiment
from fsefs_nnunet.planners.fseft_planner import default_plans_name

ROOT = Path(__file__).resolve().parents[1]
LOOKS, RESULTS = (ROOT / "benchmarks" / name for name in ("looks.md", "final_results.jsonl"))
PARTS = ("final.py", "final_report.py", "real_backbones.py", "real_data.py", "timed_training.py")
CODE = ("fsefs_nnunet", "planners", "trainers", "setup.py", *(f"benchmarks/{part}" for part in PARTS))
ZERO_SHOT = "zero_shot"
MINUTES = {1: 10, 5: 30}  # of one core, by shots
BASELINE_MINUTES = 30
GPU_SHARE = 1 / 6
DRAWS = 2
GRID = {  # methods by backbone
    RECOMMENDED: ("fseft", "adapter", "context", "transductive", "ft_last"),
    RECOMMENDED + CONTROL: ("fseft",),
    OTHER: ("fseft", "context", "ft_last"),
    OTHER + CONTROL: ("fseft",),
}


@dataclass(frozen=True)
class Cell:
    """
    method: of the registry, ADAPT or a student.
    shots: labelled cases; 0 for zero-shot, "all" for the pool.
    fold: draw of the support.
    minutes: of the training; None for one that ends with its epochs.
    """

    data: str
    backbone: str
    method: str
    shots: int | str
    fold: int = 0
    minutes: float | None = None

    @property
    def name(self) -> str:
        time = "" if self.minutes is None else f", {self.minutes:g} minutes"
        return f"{self.data}, K = {self.shots}, draw {self.fold}, {self.backbone}, {self.method}{time}"


def all_cells(data: list[str], device: str) -> Iterator[Cell]:
    share = 1 if device == "cpu" else GPU_SHARE

    def baseline(name: str, shots: int | str) -> Cell:
        method = "nnunet" if device != "cpu" or name == "hippocampus" else "scratch"
        return Cell(name, RECOMMENDED, method, shots, minutes=share * BASELINE_MINUTES)

    for name, (shots, minutes) in product(data, MINUTES.items()):
        yield Cell(name, RECOMMENDED, BEST, shots, minutes=share * minutes)
        yield baseline(name, shots)
    for name, (shots, minutes) in product(data, MINUTES.items()):
        yield Cell(name, RECOMMENDED, ADAPT, shots, minutes=share * minutes)
    for name, (backbone, methods) in product(data, GRID.items()):
        if backbone.startswith(OTHER) and name == "hippocampus":  # trained on abdomens
            continue
        shots = (5, 1, 10) if name == "hippocampus" else (5, 1)
        for fold, k, method in product(range(DRAWS), shots, methods):
            yield Cell(name, backbone, method, k, fold)
    for name in data:
        yield baseline(name, "all")


# ---- the lock ----


def git(*args: str) -> str:
    return subprocess.run(["git", "-C", ROOT, *args], check=True, capture_output=True, encoding="utf-8").stdout.strip()


def look(reason: str | None, device: str) -> str:
    """Note this look at the test cases, or go on with the last one; returns a name for its folder of work.

    Raises SystemExit for code or earlier results that are not committed, and for a look without a reason.
    """
    if changed := git("status", "--porcelain", "--", *CODE).splitlines():
        sys.exit(f"Commit the code before the test cases are looked at: {changed[0]}")
    code = sha256(f"{git('ls-files', '-s', '--', *CODE)} {device}".encode()).hexdigest()
    if RESULTS.exists() and json.loads(RESULTS.read_text().splitlines()[0])["code"] == code:
        return code[:8]
    if not reason:
        sys.exit("This is a new look at the test cases: say why with --reason.")
    if git("status", "--porcelain", "--", f"benchmarks/{RESULTS.name}"):
        sys.exit(f"Commit {RESULTS} first: this look replaces it.")
    commit = git("rev-parse", "--short", "HEAD")
    with open(LOOKS, "a") as looks:
        looks.write(f"| {date.today()} | {commit} | all, by `benchmarks/final.py` | {reason} |\n")
    write_atomically(RESULTS, json.dumps({"code": code, "commit": commit, "reason": reason}) + "\n")
    print(f"Noted in {LOOKS}: commit it.")
    return code[:8]


# ---- the work ----


def experiment_of(work: Path, data: str, backbone: str, device: str) -> Experiment:
    experiment = Experiment(work / data, REAL[data].dataset, default_plans_name(backbone), device)
    plan(REAL[data], experiment, backbone)
    return experiment


def test_images(experiment: Experiment, data: RealData) -> Path:
    return experiment.raw / "imagesTs" if data.decathlon else data.source / "imagesTs"


def run_timed(experiment: Experiment, cell: Cell) -> tuple[Path, dict]:
    """Predictions of the test images, and what the training took."""
    images = test_images(experiment, REAL[cell.data])
    if cell.method == ADAPT:
        own = replace(experiment, results=f"nnUNet_results_adapt_{cell.shots}shot")
        # what was interrupted has lost its time
        shutil.rmtree(own.folders["nnUNet_results"], ignore_errors=True)
        for choice in own.preprocessed.glob(f"fseft_adapt_*_{cell.shots}shot_*"):
            choice.unlink()
        own.run("fseft", "bank", "-d", own.dataset, "--clear")
        where = ("-d", own.dataset, "--shots", str(cell.shots), "-f", str(cell.fold), "-device", own.device)
        call, before = ("fseft", "adapt", *where, "--minutes", f"{cell.minutes:g}"), seconds_of(own.device)
        own.run(*call)
        took, output = seconds_of(own.device) - before, own.folders["nnUNet_results"] / "imagesTs"
        own.run(*call, "-i", images, "-o", output)  # it trains nothing again
        return output, {"seconds": took}
    trained = train(experiment, cell.method, cell.shots, cell.minutes, cell.fold)
    return trained.predict(images, "imagesTs"), {"seconds": trained.seconds, **facts_of(trained)}


def facts_of(trained: Trained) -> dict:
    run = RunFile.load(trained.folder)
    return {"parameters": run.trained_parameters, "peak_gb": run.peak_memory_gb.get("host")}


def run_grid(experiment: Experiment, cells: list[Cell]) -> Iterator[tuple[Cell, Path, dict]]:
    """By `fseft benchmark`, which shares features between methods; zero-shot comes with it where it is possible."""
    data = REAL[cells[0].data]
    images, labels = test_images(experiment, data), data.source / "labelsTs"
    shots, folds = (list(dict.fromkeys(map(str, column))) for column in zip(*((c.shots, c.fold) for c in cells)))
    methods = list(dict.fromkeys(cell.method for cell in cells))
    output = experiment.work / f"benchmark_{experiment.plans}"
    what = ("--shots", *shots, "--folds", str(len(folds)), "--methods", *methods, "-i", images, "-l", labels)
    where = ("-d", experiment.dataset, "-p", experiment.plans, "-device", experiment.device, "-o", output)
    experiment.run("fseft", "benchmark", *where, *what)
    found = list((output / ZERO_SHOT).glob(f"benchmark_{ZERO_SHOT}_imagesTs_*/"))
    if found and not cells[0].backbone.endswith(CONTROL):
        yield replace(cells[0], method=ZERO_SHOT, shots=0), found[0], {"seconds": 0.0, "parameters": 0}
    for cell in cells:
        method = METHODS[cell.method]
        fold = experiment.model(method.trainer, configuration_of(cell.shots)) / f"fold_{cell.fold}"
        (file,) = fold.glob(f"benchmark_{cell.method}_imagesTs_*.json")
        run = RunFile.load(fold)
        took = {"seconds": run.training_seconds, "parameters": run.trained_parameters}
        yield cell, file.with_suffix(""), {**took, "peak_gb": run.peak_memory_gb.get("host")}


def evaluate(predictions: Path, experiment: Experiment, data: RealData) -> dict[str, dict[str, dict[str, float]]]:
    """By case and class: Dice, surface Dice, relative size error, and how much is taken for the other side's organ."""
    dataset_json = read_json(experiment.raw / "dataset.json")
    plans = PlansManager(str(experiment.preprocessed / f"{experiment.plans}.json"))
    reader, ending, found = plans.image_reader_writer_class(), dataset_json["file_ending"], {}
    classes = foreground(dataset_json["labels"])
    for file in sorted((data.source / "labelsTs").glob(f"[!.]*{ending}")):
        true, properties = reader.read_seg(str(file))
        predicted, _ = reader.read_seg(str(predictions / file.name))
        found[file.name.removesuffix(ending)] = {
            name: metrics(predicted[0], true[0], name, classes, properties["spacing"], data.surface_mm)
            for name in classes
        }
    return found


def metrics(
    predicted: np.ndarray, true: np.ndarray, name: str, classes: dict, spacing: tuple[float, ...], surface_mm: float
) -> dict[str, float]:
    """Of one class; NaN where the reference has none of it."""
    made, reference = predicted == classes[name], true == classes[name]
    size = reference.sum()
    if not size:
        return dict.fromkeys(("Dice", "surface Dice", "size error", "other side"), float("nan"))
    twin = {"left": name.replace("left", "right"), "right": name.replace("right", "left")}
    other = next((twin[side] for side in twin if side in name), None)
    return {
        "Dice": float(2 * (made & reference).sum() / (made.sum() + size)),
        "surface Dice": surface_metrics(made, reference, spacing, surface_mm)[0],
        "size error": float(abs(int(made.sum()) - int(size)) / size),
        "other side": float((reference & (predicted == classes[other])).sum() / size) if other in classes else np.nan,
    }


def facts(experiment: Experiment, cell: Cell) -> dict:
    """Labels that were spent, and classes that the backbone knows by name."""
    splits, labels = load_splits(experiment.preprocessed / SPLITS_FILE), read_json(experiment.raw / "dataset.json")
    spent = [] if cell.shots == 0 else support_cases(splits, cell.shots, cell.fold)
    trained = find_backbone(cell.backbone.removesuffix(CONTROL))
    known = match_labels(foreground_names(labels["labels"], True), trained.classes)
    return {"labels": len(spent), "known": list(known)}


def done_cells() -> dict[str, dict]:
    """Results by name of the cell; the first line of the file is the look."""
    if not RESULTS.exists():
        return {}
    cells = map(json.loads, RESULTS.read_text().splitlines()[1:])
    return {cell.pop("cell"): cell for cell in cells}


def rounded(value: object) -> object:
    """Floats in a result with four decimals; NaN becomes null."""
    if isinstance(value, dict):
        return {key: rounded(of) for key, of in value.items()}
    if isinstance(value, float):
        return round(value, 4) if isfinite(value) else None
    return value


def run(work: Path, cells: list[Cell], device: str) -> None:
    precision = precision_name(torch.device(device))  # with bfloat16, a training takes more steps in its time

    def save(cell: Cell, experiment: Experiment, predictions: Path, took: dict) -> None:
        cases = evaluate(predictions, experiment, REAL[cell.data])
        made = {**facts(experiment, cell), **took, "device": device, "precision": precision, "cases": cases}
        with FileLock(f"{RESULTS}.lock"):  # another process may run other datasets
            write_atomically(RESULTS, RESULTS.read_text() + json.dumps({"cell": cell.name, **rounded(made)}) + "\n")
        dice = mean(np.nanmean([of[name]["Dice"] for of in cases.values()]) for name in next(iter(cases.values())))
        print(f"{cell.name}: {dice:.3f}", flush=True)

    done = set(done_cells())
    for timed, group in groupby(cells, lambda cell: cell.minutes is not None):
        if timed:
            for cell in group:
                if cell.name not in done:
                    experiment = experiment_of(work, cell.data, cell.backbone, device)
                    save(cell, experiment, *run_timed(experiment, cell))
            continue
        for (data, backbone), of_grid in groupby(group, lambda cell: (cell.data, cell.backbone)):
            grid = list(of_grid)
            if any(cell.name not in done for cell in grid):
                experiment = experiment_of(work, data, backbone, device)
                for cell, predictions, took in run_grid(experiment, grid):
                    if cell.name not in done:
                        save(cell, experiment, predictions, took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--data", nargs="+", choices=REAL, default=["chaos", "openkbp", "hippocampus"])
    parser.add_argument("--reason", help="of a new look at the test cases, for looks.md")
    parser.add_argument("--report", action="store_true", help="tables of what is done, run nothing")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    if not args.report:
        if args.work is None:
            parser.error("--work FOLDER is needed, for a run")
        work = args.work.resolve() / look(args.reason, args.device)
        work.mkdir(parents=True, exist_ok=True)
        if args.device == "cpu":
            os.sched_setaffinity(0, {args.core})
        os.environ["fseft_backbones"] = str(work / "backbones")
        make_backbones(work / "backbones", [*GRID])
        run(work, list(all_cells(args.data, args.device)), args.device)
    print(report(done_cells()) if done_cells() else "Nothing is done yet.")


if __name__ == "__main__":
    main()
