"""`fseft rewrite_header`."""

from __future__ import annotations

import argparse
from pathlib import Path


def register(verb) -> None:
    parser = verb(
        "rewrite_header",
        rewrite_header,
        "Write volumes anew, voxels as they are: with the spacing of their sform, or with another file's header.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="replaced; a link becomes a file")
    parser.add_argument(
        "--from",
        type=Path,
        dest="other",
        metavar="OTHER",
        help="file whose header the others get: of the same voxels in the same order, an image for its label map",
    )


def rewrite_header(args: argparse.Namespace) -> None:
    from fsefs_nnunet.cases.headers import rewrite_header

    for file in args.files:
        rewrite_header(file, args.other)
        print(f"{file} is written.")
