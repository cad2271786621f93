"""`fseft convert`."""

from __future__ import annotations

import argparse

from fsefs_nnunet.cli.arguments import add_processes
from fsefs_nnunet.datasets.tables import tables


def register(verb) -> None:
    parser = verb("convert", convert, "Convert a public dataset, as downloaded, to an nnU-Net raw dataset.")
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(tables()['sources'])}")
    parser.add_argument("-i", required=True, metavar="FOLDER", help="the unpacked download")
    parser.add_argument("-d", required=True, type=int, metavar="ID", help="dataset id, not yet taken")
    parser.add_argument(
        "--classes",
        nargs="+",
        default=[],
        metavar="CLASS",
        help="names or groups, in the order of their numbers; default: all",
    )
    parser.add_argument("--dry_run", action="store_true", help="report what would be converted, write nothing")
    add_processes(parser)
    parser.add_argument(
        "--resample_labels", action="store_true", help="resample labels on another grid to their image's (nearest)"
    )
    parser.add_argument(
        "--image_header",
        action="store_true",
        help="give labels on another grid, but with their image's shape, the image's header: their own was lost",
    )


def convert(args: argparse.Namespace) -> None:
    from fsefs_nnunet.datasets.conversion import convert
    from fsefs_nnunet.datasets.volumes import OtherGrid

    other_grid = OtherGrid(args.image_header, args.resample_labels)
    convert(args.name, args.i, args.d, args.classes, args.dry_run, args.np, other_grid)
