"""The table of `fseft benchmark` on phantoms of an unseen scanner: K = 1, 5, 10, all, three draws of the support.

    python benchmarks/phantoms.py --work /data/phantoms

The demo's phantoms (scanner drift 1.6, pretraining saw 0 to 1; the backbone has never seen a stomach) and its short
training, but 20 cases to draw the support from and 12 queries. What is done is not done again; the table, figure and
report are in WORK/benchmark. The methods on the frozen backbone come first, one cell of theirs before the others, and
their passes of the backbone are counted in the logs.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from fsefs_nnunet.benchmark.methods import METHODS
from fsefs_nnunet.demo import prepare
from fsefs_nnunet.experiment import Experiment

DATASET = "Dataset902_FSEFTPhantoms"
NUM_QUERIES, POOL = 12, 20
SHOTS = ("1", "5", "10", "all")


def backbone_windows(experiment: Experiment) -> int:
    """Windows that went through the frozen backbone, as trainings and predictions in `experiment` have logged."""
    logs = [*experiment.folders["nnUNet_results"].rglob("training_log_*.txt"), experiment.work / "log.txt"]
    counts = re.compile(r"The frozen backbone ran over (\d+) windows")
    return sum(int(match[1]) for log in logs for match in counts.finditer(log.read_text("utf-8", errors="replace")))


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
    output = experiment.work / "benchmark"

    def benchmark(shots: list[str], folds: int, methods: list[str]) -> None:
        chosen = ("--shots", *shots, "--folds", str(folds), "--methods", *methods)
        experiment.run("fseft", "benchmark", "-d", DATASET, "-device", args.device, "-o", output, *chosen)

    black_box = [method for method in args.methods if METHODS[method].shares_features]
    numbers = [shots for shots in args.shots if shots != "all"]
    if black_box and numbers:
        benchmark(numbers[-1:], 1, ["fseft"])
        one = backbone_windows(experiment)
        benchmark(numbers, args.folds, black_box)
        print(f"Windows through the backbone: one cell {one}, {', '.join(black_box)} {backbone_windows(experiment)}.")
    benchmark(args.shots, args.folds, args.methods)
    print((output / "table.md").read_text("utf-8"))


if __name__ == "__main__":
    main()
