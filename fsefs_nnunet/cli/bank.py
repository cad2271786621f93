"""`fseft bank`."""

from __future__ import annotations

import argparse

from fsefs_nnunet.cli.arguments import add_dataset


def register(verb) -> None:
    parser = verb("bank", bank, "List the feature banks of a dataset, or remove them.")
    add_dataset(parser)
    parser.add_argument(
        "--clear", nargs="*", metavar="KEY", help="remove the banks of these keys, which the list shows; of all without"
    )


def bank(args: argparse.Namespace) -> None:
    from fsefs_nnunet.features import disk

    if args.clear is None:
        disk.show(args.d)
    else:
        disk.clear(args.d, args.clear)
