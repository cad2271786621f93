"""`fseft demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fsefs_nnunet.cli.arguments import add_device, positive_float


def register(verb) -> None:
    parser = verb("demo", demo, "Synthetic data, 5 labelled cases, four methods: tables, pictures, a report.")
    parser.add_argument("-o", default="fseft_demo", metavar="FOLDER", help="default: ./fseft_demo")
    parser.add_argument(
        "--seconds",
        type=positive_float,
        help="training time of the from-scratch baseline; default: that of the adapter with the size prior",
    )
    add_device(parser)


def demo(args: argparse.Namespace) -> None:
    from fsefs_nnunet.synthetic.demo import run_demo

    run_demo(Path(args.o), args.seconds, args.device)
