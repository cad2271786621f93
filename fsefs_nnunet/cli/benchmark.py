"""`fseft benchmark`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fsefs_nnunet.cli.arguments import add_dataset, add_device, positive_float, shots_argument
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.methods.registry import METHODS

if TYPE_CHECKING:
    from fsefs_nnunet.benchmark.study import Study


def register(verb) -> None:
    parser = verb(
        "benchmark",
        benchmark,
        "Train and compare methods, shots and folds on your data: table, figure, report. Completed cells are skipped.",
    )
    add_dataset(parser)
    parser.add_argument(
        "--shots", nargs="+", type=shots_argument, default=[], metavar="K", help="default: those of the plans"
    )
    parser.add_argument("--folds", type=int, default=3, metavar="N", help="the first N of the splits; default: 3")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        metavar="METHOD",
        help=f"of {', '.join(METHODS)}; default: {', '.join(name for name, row in METHODS.items() if row.by_default)}",
    )
    parser.add_argument("-p", default="FSEFTPlans", metavar="PLANS", help="default: FSEFTPlans")
    parser.add_argument("-i", metavar="IMAGES", help="test set, in nnU-Net's naming; default: the labelled queries")
    parser.add_argument("-l", metavar="LABELS", help="reference segmentations of the test set")
    parser.add_argument("-o", type=Path, metavar="FOLDER", help="default: ./fseft_benchmark/DATASET_PLANS")
    parser.add_argument(
        "--scratch_minutes",
        type=positive_float,
        metavar="M",
        help="training time from scratch; default: that of the longest other method of the same shots and fold",
    )
    add_device(parser)


def benchmark(args: argparse.Namespace) -> None:
    from fsefs_nnunet.benchmark.grid import plan_cells, run_cells
    from fsefs_nnunet.benchmark.study import open_study

    if (args.i is None) != (args.l is None):
        raise InputError(
            "-i IMAGES and -l LABELS belong together: give both for a test set, or neither for the queries."
        )
    test = (Path(args.i).resolve(), Path(args.l).resolve()) if args.i else None
    study = open_study(args.d, args.p, test, args.o, args.device, args.scratch_minutes)
    run_cells(study, plan_cells(study, args.shots, args.folds, args.methods), command_of(args, study))


def command_of(args: argparse.Namespace, study: Study) -> list[str]:
    """The command line that gives the same again, from any folder."""
    device = study.experiment.device
    command = ["fseft", "benchmark", "-d", args.d, "-p", args.p, "-device", device, "--folds", str(args.folds)]
    for flag, chosen in (("--shots", args.shots), ("--methods", args.methods)):
        command += [flag, *map(str, chosen)] if chosen else []
    command += ["--scratch_minutes", f"{args.scratch_minutes:g}"] if args.scratch_minutes else []
    command += ["-i", str(study.target.images), "-l", str(study.target.labels)] if args.i else []
    return [*command, "-o", str(study.experiment.work)]
