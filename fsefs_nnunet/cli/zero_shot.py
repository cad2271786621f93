"""`fseft zero_shot`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fsefs_nnunet.cli.arguments import add_dataset, add_device
from fsefs_nnunet.errors import InputError


def register(verb) -> None:
    parser = verb("zero_shot", zero_shot, "Segment the dataset's labels that a backbone's own head knows by name.")
    add_dataset(parser)
    parser.add_argument(
        "-b", default="phantom", metavar="BACKBONE", help="see `fseft backbones list`; default: phantom"
    )
    parser.add_argument("-i", required=True, metavar="FOLDER", help="images in nnU-Net's naming")
    parser.add_argument("-o", required=True, metavar="FOLDER", help="segmentations")
    add_device(parser)


def zero_shot(args: argparse.Namespace) -> None:
    from fsefs_nnunet.inference.zero_shot import predict_zero_shot

    failures = predict_zero_shot(args.d, args.b, Path(args.i), Path(args.o), args.device)
    if failures:
        raise InputError(f"{len(failures)} case(s) failed:\n" + "\n".join(failures))
