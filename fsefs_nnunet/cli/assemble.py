"""`fseft assemble`."""

from __future__ import annotations

import argparse

from fsefs_nnunet.cli.arguments import add_processes


def register(verb) -> None:
    parser = verb(
        "assemble", assemble, "Combine several datasets into one partially labelled dataset, for FSEFTPretrainer."
    )
    parser.add_argument("-d", required=True, nargs="+", metavar="DATASET", help="ids or names of nnU-Net raw datasets")
    parser.add_argument("-o", required=True, type=int, metavar="ID", help="id of the assembly, not yet taken")
    parser.add_argument(
        "--template",
        default="universal",
        choices=["universal", "union"],
        help="classes: those of FSEFT's public model (default), or all labels of all datasets",
    )
    add_processes(parser)


def assemble(args: argparse.Namespace) -> None:
    from fsefs_nnunet.datasets.assembly import assemble

    assemble(args.d, args.o, args.template, args.np)
