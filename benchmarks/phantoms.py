"""The table of `fseft benchmark` on phantoms of an unseen scanner: K = 1, 5, 10, all, three draws of the support.

    python benchmarks/phantoms.py --work /data/phantoms

The demo's phantoms (scanner drift 1.6, pretraining saw 0 to 1; the backbone has never seen a stomach) and its short
training, but 20 cases to draw the support from and 12 queries. What is done is not done again; the table, figure and
report are in WORK/benchmark. The methods on the frozen backbone come first, from an empty bank, so that their passes of
the backbone can be counted: those of the largest cell alone, and of all cells.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from fsefs_nnunet.benchmark.result import Result
from fsefs_nnunet.methods.registry import METHODS, choose
from fsefs_nnunet.methods.run_file import RunFile
from fsefs_nnunet.nnunet.experiment import Experiment
from fsefs_nnunet.synthetic.demo import prepare

DATASET = "Dataset902_FSEFTPhantoms"
NUM_QUERIES, POOL = 12, 20
SHOTS = ("1", "5", "10", "all")
OUTPUT = "benchmark"


def benchmark(experiment: Experiment, shots: list[str], folds: int, methods: list[str]) -> None:
    chosen = ("--shots", *shots, "--folds", str(folds), "--methods", *methods)
    output = experiment.work / (OUTPUT if experiment.results == Experiment.results else f"{OUTPUT}_alone")
    experiment.run("fseft", "benchmark", "-d", DATASET, "-device", experiment.device, "-o", output, *chosen)


def windows_of(experiment: Experiment, shots: list[str], folds: int, methods: list[str]) -> int:
    """Windows that go through the backbone for these cells, from an empty bank."""
    results = experiment.folders["nnUNet_results"]
    if not any(results.rglob("benchmark_*.json")):
        experiment.run("fseft", "bank", "-d", DATASET, "--clear")
    benchmark(experiment, shots, folds, methods)
    found = {file: Result.load(file) for file in results.rglob("benchmark_*.json")}
    own = {f: r for f, r in found.items() if r.method in methods and str(r.shots) in shots and r.fold < folds}
    trainings = {file.parent for file in own}  # methods may share one
    return sum(r.windows for r in own.values()) + sum(RunFile.load(fold).windows for fold in trainings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shots", nargs="+", default=list(SHOTS))
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="as those of fseft benchmark")
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(args.work.resolve(), DATASET, device=args.device)
    prepare(experiment, NUM_QUERIES, POOL, SHOTS)
    methods = choose(args.methods)
    numbers = [shots for shots in args.shots if shots != "all"]
    frozen = [method for method in methods if METHODS[method].shares_features]
    if numbers and frozen:
        alone = replace(experiment, results="nnUNet_results_alone")
        one = windows_of(alone, numbers[-1:], 1, frozen[-1:])
        all_cells = windows_of(experiment, numbers, args.folds, frozen)
        print(f"Windows through the backbone: one cell {one}, the table of {', '.join(frozen)} {all_cells}.")
    benchmark(experiment, args.shots, args.folds, methods)
    print((experiment.work / OUTPUT / "table.md").read_text("utf-8"))


if __name__ == "__main__":
    main()
