"""Few-shot adaptation on real MR: MSD Task04 Hippocampus, 40 query cases to tune on, imagesTs for the final figures.

    FSEFT_SHARED=FOLDER python benchmarks/hippocampus.py --work /data/hippocampus

FOLDER/data/Task04_Hippocampus is the Decathlon's folder, with labelsTs for the test cases. K = 1, 5, 10, five draws of
the support, by `fseft benchmark`: once with the embedded backbone and once with each of two controls, the same network
untrained and the raw image. What is done is not done again. `--tune` reports the queries instead of imagesTs.
Each adapter with the size prior starts without a feature bank, so that its time includes all of it. Trainings from
scratch and, if asked for, of a part of the backbone get the same time, and their schedules end with it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

from fsefs_nnunet.backbones.store import find_backbone, save_backbone
from fsefs_nnunet.benchmark.evaluation import DICE, SIZE_ERROR
from fsefs_nnunet.benchmark.result import Result
from fsefs_nnunet.benchmark.summary import ROW, class_means, fold_means, spread
from fsefs_nnunet.evaluation.tables import markdown_table
from fsefs_nnunet.methods.registry import METHODS
from fsefs_nnunet.methods.run_file import RunFile
from fsefs_nnunet.nnunet.experiment import Experiment

DATASET = "Dataset004_Hippocampus"
NUM_QUERIES = 40
OURS = METHODS["fseft"].title
LONG_MINUTES, LONG = 30, "from scratch, 30 minutes"
BACKBONES = {"phantom": "FSEFTPlans", "random": "FSEFTPlans_random", "raw": "FSEFTPlans_raw"}
CONTROLS = {"random": "control: random backbone", "raw": "control: raw image"}
FINE_TUNING = ("ft_last", "decoder", "ft")


def decathlon_folder() -> Path:
    """Task04_Hippocampus, where the environment variable FSEFT_SHARED says."""
    if "FSEFT_SHARED" not in os.environ:
        sys.exit("Set FSEFT_SHARED to the folder that holds data/Task04_Hippocampus.")
    return Path(os.environ["FSEFT_SHARED"]) / "data" / "Task04_Hippocampus"


def write_controls(folder: Path) -> None:
    """Backbones `random` (the embedded one's architecture, untrained) and `raw` (the image itself)."""
    import torch

    from fsefs_nnunet.backbones.architectures.nnunet import NNUNetBackbone

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
    for backbone, plans in BACKBONES.items():
        if not list(experiment.preprocessed.glob(f"{plans}_3d_fullres")):
            shots = ("--shots", "1", "5", "10", "all")
            args = ("-d", DATASET, "-b", backbone, "-np", "2", "--num_queries", NUM_QUERIES, *shots)
            experiment.run("fseft", "plan_and_preprocess", *args, fseft_backbones=str(backbones))


def shots_argument(text: str) -> int | str:
    return text if text == "all" else int(text)


def backbones_of(experiment: Experiment) -> dict[str, str]:
    return {"fseft_backbones": str(experiment.work / "backbones")}


def train_at_equal_time(experiment: Experiment, tuned: list[str], shots: list[int | str], folds: int) -> None:
    """FSEFTTrainer from an empty bank, then the methods `tuned` for the time that it took."""
    for configuration in (f"3d_fullres_{k}shot" for k in shots):
        for fold in range(folds):
            environment = backbones_of(experiment) | {"fseft_final_validation": "0"}
            ours = experiment.model("FSEFTTrainer", configuration) / f"fold_{fold}"
            if not (ours / "checkpoint_final.pth").exists():
                experiment.run("fseft", "bank", "-d", DATASET, "--clear", **environment)
                experiment.train("FSEFTTrainer", configuration, fold, **environment)
            environment["fseft_train_minutes"] = str(RunFile.load(ours).training_seconds / 60)
            for method in tuned:
                experiment.train(METHODS[method].trainer, configuration, fold, **environment)


def benchmark(
    experiment: Experiment, name: str, methods: list[str], shots: list[int | str], folds: int, test: tuple, *more: str
) -> list[Result]:
    """`fseft benchmark` in the folder `name`; the results of these shots, folds and methods."""
    chosen = ("--shots", *map(str, shots), "--folds", str(folds), "--methods", *methods)
    where = ("-d", DATASET, "-p", experiment.plans, "-device", experiment.device, "-o", experiment.work / name)
    experiment.run("fseft", "benchmark", *where, *chosen, *test, *more, **backbones_of(experiment))
    target = "imagesTs_*" if test else "queries"
    folder = experiment.folders["nnUNet_results"] / DATASET
    found = [
        Result.load(file)
        for method in methods
        for file in folder.glob(
            f"*__{METHODS[method].plans or experiment.plans}__*/fold_*/benchmark_{method}_{target}.json"
        )
    ]
    return sorted((r for r in found if r.shots in shots and r.fold < folds), key=lambda r: (len(r.support), r.fold))


def in_order(results: dict[str, list[Result]]) -> list[int | str]:
    labels = {r.shots: len(r.support) for group in results.values() for r in group}
    return sorted(labels, key=labels.get)


def over_folds(results: dict[str, list[Result]]) -> list[dict]:
    """One row per shots and method; Dice by class and size errors are means over the folds."""
    rows = []
    for shots in in_order(results):
        for title, group in results.items():
            if some := [r for r in group if r.shots == shots]:
                by_class = class_means(some).groupby("class", sort=False).mean()
                rows.append(
                    {
                        "shots": shots,
                        "method": title,
                        "folds": len(some),
                        "trained parameters": f"{round(mean(r.trained_parameters for r in some)):,}",
                        "seconds": round(mean(r.seconds for r in some)),
                        **by_class[DICE].rename(str.lower).to_dict(),
                        "mean Dice": spread(fold_means(some)[DICE], min),
                        "size error": ", ".join(f"{x:.3f}" for x in by_class[SIZE_ERROR]),
                    }
                )
    return rows


def against(results: dict[str, list[Result]]) -> list[dict]:
    """Dice points by which the adapter with the size prior is ahead of each other row, per fold."""
    rows = []
    for shots in in_order(results):
        dice = {
            title: fold_means(some)[DICE].droplevel(ROW)
            for title, group in results.items()
            if (some := [r for r in group if r.shots == shots])
        }
        ours = dice.pop(OURS, None)
        for title, theirs in dice.items() if ours is not None else ():
            ahead = 100 * (ours - theirs).dropna()
            if len(ahead):
                rows.append({"shots": shots, "ahead of": title, "smallest": ahead.min(), "mean": ahead.mean()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shots", type=shots_argument, nargs="+", default=[1, 5, 10], help="or all")
    parser.add_argument("--folds", type=int, default=5, help="the first N; default: 5")
    methods = ["probe", "adapter", "fseft", "transductive", "scratch", "nnunet"]
    parser.add_argument("--methods", nargs="+", default=methods, help="as those of fseft benchmark")
    parser.add_argument("--long", action="store_true", help=f"fold 0 also from scratch for {LONG_MINUTES} minutes")
    parser.add_argument("--tune", action="store_true", help="figures of the queries, imagesTs stays unseen")
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    source = decathlon_folder()
    args.work.mkdir(parents=True, exist_ok=True)
    work = args.work.resolve()
    prepare(Experiment(work, DATASET), source)
    where = "queries" if args.tune else "imagesTs"
    test = () if args.tune else ("-i", work / "nnUNet_raw" / DATASET / "imagesTs", "-l", source / "labelsTs")
    results: dict[str, list[Result]] = {METHODS[method].title: [] for method in args.methods}
    for backbone, plans in BACKBONES.items():
        experiment = Experiment(work, DATASET, plans, args.device)
        tuned = [method for method in args.methods if method in FINE_TUNING]
        others = [method for method in args.methods if method not in FINE_TUNING]
        train_at_equal_time(experiment, [] if backbone in CONTROLS else tuned, args.shots, args.folds)
        for methods in (["fseft"],) if backbone in CONTROLS else filter(None, (others, tuned)):
            for result in benchmark(experiment, f"{where}_{backbone}", methods, args.shots, args.folds, test):
                title = CONTROLS.get(backbone, METHODS[result.method].title)
                results.setdefault(title, []).append(result)
    if args.long:
        long = Experiment(work, DATASET, "FSEFTPlans", args.device, "nnUNet_results_long")
        minutes = ("--scratch_minutes", str(LONG_MINUTES))
        results[LONG] = benchmark(long, f"{where}_long", ["scratch"], args.shots, 1, test, *minutes)
    text = f"{markdown_table(over_folds(results))}\n{markdown_table(against(results))}"
    (work / f"{where}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
