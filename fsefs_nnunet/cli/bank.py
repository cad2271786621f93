"""`fseft bank`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fsefs_nnunet.cli.arguments import add_dataset


def register(verb) -> None:
    parser = verb("bank", bank, "List the feature banks of a dataset, remove, verify, export or import them.")
    add_dataset(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--verify", action="store_true", help="hash all features, and remove entries that are damaged")
    what.add_argument("--export", metavar="FILE", help="write all banks into a file, for another machine")
    what.add_argument(
        "--import", dest="import_from", metavar="FILE", help="import the banks in a file; the images must be the same"
    )
    what.add_argument(
        "--clear", nargs="*", metavar="KEY", help="remove the banks with these keys (see the list), or all of them"
    )


def bank(args: argparse.Namespace) -> None:
    from fsefs_nnunet.features import disk, transfer

    if args.verify:
        transfer.verify(args.d)
    elif args.export:
        transfer.export_banks(args.d, Path(args.export))
    elif args.import_from:
        transfer.import_banks(args.d, Path(args.import_from))
    elif args.clear is None:
        disk.show(args.d)
    else:
        disk.clear(args.d, args.clear)
