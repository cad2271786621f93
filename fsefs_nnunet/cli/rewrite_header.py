"""`fseft rewrite_header`."""

from __future__ import annotations

import argparse
from pathlib import Path


def register(verb) -> None:
    parser = verb(
        "rewrite_header",
        rewrite_header,
        "Mend the geometry in headers: the spacing that the sform says, or the place of another file's voxels.",
    )
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help=".nii, .nii.gz, .mha or .nrrd; a link becomes a file"
    )
    parser.add_argument(
        "--from",
        type=Path,
        dest="other",
        metavar="OTHER",
        help="file of as many voxels in the same order, which says where they lie: an image, for its label map",
    )


def rewrite_header(args: argparse.Namespace) -> None:
    from fsefs_nnunet.cases.headers import rewrite_header

    for file in args.files:
        rewrite_header(file, args.other)
        print(f"{file} is written.")
