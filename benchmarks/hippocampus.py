"""Few-shot adaptation on real MR: MSD Task04 Hippocampus, Dice of its 40 labelled queries.

    FSEFT_SHARED=FOLDER python benchmarks/hippocampus.py --work /data/hippocampus

FOLDER is that of `real_data.py`. K = 1, 5, 10, five draws of the support, by `fseft benchmark`: once with the embedded
backbone and once with each of two controls, the same network untrained and the raw image. What is done is not done
again. Each adapter with the size prior starts without a feature bank, so that its time includes all of it. Trainings
from scratch and, if asked for, of a part of the backbone get the same time, and their schedules end with it.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from statistics import mean

from real_data import REAL, plan

from fsefs_nnunet.backbones.store import find_backbone, save_backbone
from fsefs_nnunet.benchmark.evaluation import DICE, SIZE_ERROR
from fsefs_nnunet.benchmark.result import Result
from fsefs_nnunet.benchmark.summary import ROW, class_means, fold_means, spread
from fsefs_nnunet.evaluation.tables import markdown_table
from fsefs_nnunet.methods.registry import METHODS
from fsefs_nnunet.methods.run_file import RunFile
from fsefs_nnunet.nnunet.experiment import Experiment

DATA = REAL["hippocampus"]
DATASET = DATA.dataset
OURS = METHODS["fseft"].title
LONG_MINUTES, LONG = 30, "from scratch, 30 minutes"
BACKBONES = {"phantom": "FSEFTPlans", "random": "FSEFTPlans_random", "raw": "FSEFTPlans_raw"}
CONTROLS = {"random": "control: random backbone", "raw": "control: raw image"}
FINE_TUNING = ("ft_last", "decoder", "ft")


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


def prepare(experiment: Experiment) -> None:
    backbones = experiment.work / "backbones"
    os.environ["fseft_backbones"] = str(backbones)
    if not (backbones / "raw.json").exists():
        write_controls(backbones)
    for backbone, plans in BACKBONES.items():
        plan(DATA, replace(experiment, plans=plans), backbone)


def shots_argument(text: str) -> int | str:
    return text if text == "all" else int(text)


def train_at_equal_time(experiment: Experiment, tuned: list[str], shots: list[int | str], folds: int) -> None:
    """FSEFTTrainer from an empty bank, then the methods `tuned` for the time that it took."""
    for configuration in (f"3d_fullres_{k}shot" for k in shots):
        for fold in range(folds):
            environment = {"fseft_final_validation": "0"}
            ours = experiment.model("FSEFTTrainer", configuration) / f"fold_{fold}"
            if not (ours / "checkpoint_final.pth").exists():
                experiment.run("fseft", "bank", "-d", DATASET, "--clear")
                experiment.train("FSEFTTrainer", configuration, fold, **environment)
            environment["fseft_train_minutes"] = str(RunFile.load(ours).training_seconds / 60)
            for method in tuned:
                experiment.train(METHODS[method].trainer, configuration, fold, **environment)


def benchmark(
    experiment: Experiment, name: str, methods: list[str], shots: list[int | str], folds: int, *more: str
) -> list[Result]:
    """`fseft benchmark` in the folder `name`; the results of these shots, folds and methods."""
    chosen = ("--shots", *map(str, shots), "--folds", str(folds), "--methods", *methods)
    where = ("-d", DATASET, "-p", experiment.plans, "-device", experiment.device, "-o", experiment.work / name)
    experiment.run("fseft", "benchmark", *where, *chosen, *more)
    folder = experiment.folders["nnUNet_results"] / DATASET
    found = [
        Result.load(file)
        for method in methods
        for file in folder.glob(
            f"*__{METHODS[method].plans or experiment.plans}__*/fold_*/benchmark_{method}_queries.json"
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
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    work = args.work.resolve()
    prepare(Experiment(work, DATASET))
    results: dict[str, list[Result]] = {METHODS[method].title: [] for method in args.methods}
    for backbone, plans in BACKBONES.items():
        experiment = Experiment(work, DATASET, plans, args.device)
        tuned = [method for method in args.methods if method in FINE_TUNING]
        others = [method for method in args.methods if method not in FINE_TUNING]
        train_at_equal_time(experiment, [] if backbone in CONTROLS else tuned, args.shots, args.folds)
        for methods in (["fseft"],) if backbone in CONTROLS else filter(None, (others, tuned)):
            for result in benchmark(experiment, f"queries_{backbone}", methods, args.shots, args.folds):
                title = CONTROLS.get(backbone, METHODS[result.method].title)
                results.setdefault(title, []).append(result)
    if args.long:
        long = Experiment(work, DATASET, "FSEFTPlans", args.device, "nnUNet_results_long")
        minutes = ("--scratch_minutes", str(LONG_MINUTES))
        results[LONG] = benchmark(long, "queries_long", ["scratch"], args.shots, 1, *minutes)
    text = f"{markdown_table(over_folds(results))}\n{markdown_table(against(results))}"
    (work / "queries.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
