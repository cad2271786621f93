"""`fseft rewrite_header`."""

from __future__ import annotations

import argparse
from pathlib import Path


def register(verb) -> None:
    parser = verb(
        "rewrite_header",
        rewrite_header,
        "Repair the geometry in headers: take the spacing from the sform, or the position from another file.",
    )
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help=".nii, .nii.gz, .mha or .nrrd; a link becomes a file"
    )
    parser.add_argument(
        "--from",
        type=Path,
        dest="other",
        metavar="OTHER",
        help="file with the same number and order of voxels that says where they lie, e.g. a label map's image",
    )


def rewrite_header(args: argparse.Namespace) -> None:
    from fsefs_nnunet.cases.headers import rewrite_header

    for file in args.files:
        rewrite_header(file, args.other)
        print(f"{file} was written.")
