"""`fseft benchmark`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fsefs_nnunet.cli.arguments import add_dataset, add_device, shots_argument
from fsefs_nnunet.errors import InputError


def register(verb) -> None:
    parser = verb(
        "benchmark",
        benchmark,
        "Train and compare methods, shots and folds on your dataset: table, figure, report. What is done stays done.",
    )
    add_dataset(parser)
    parser.add_argument(
        "--shots", nargs="+", type=shots_argument, default=[], metavar="K", help="default: those of the plans"
    )
    parser.add_argument("--folds", type=int, default=3, metavar="N", help="the first N of the splits; default: 3")
    parser.add_argument(
        "--methods", nargs="+", default=[], metavar="METHOD", help="default: all; a wrong name lists them"
    )
    parser.add_argument("-p", default="FSEFTPlans", metavar="PLANS", help="default: FSEFTPlans")
    parser.add_argument("-i", metavar="IMAGES", help="test set, in nnU-Net's naming; default: the labelled queries")
    parser.add_argument("-l", metavar="LABELS", help="reference segmentations of the test set")
    parser.add_argument("-o", default="fseft_benchmark", metavar="FOLDER", help="default: ./fseft_benchmark")
    add_device(parser, "cuda")


def benchmark(args: argparse.Namespace) -> None:
    from fsefs_nnunet.benchmark.grid import plan_cells, run_cells
    from fsefs_nnunet.benchmark.study import open_study

    if (args.i is None) != (args.l is None):
        raise InputError("-i IMAGES and -l LABELS belong together: give both for a test set, none for the queries.")
    test = (Path(args.i), Path(args.l)) if args.i else None
    study = open_study(args.d, args.p, test, Path(args.o), args.device)
    run_cells(study, plan_cells(study, args.shots, args.folds, args.methods), ["fseft", *sys.argv[1:]])
