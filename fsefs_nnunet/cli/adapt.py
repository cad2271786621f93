"""`fseft adapt`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fsefs_nnunet.cli.arguments import add_dataset, add_device, add_processes, positive_float, positive_int
from fsefs_nnunet.errors import InputError


def register(verb) -> None:
    parser = verb(
        "adapt",
        adapt,
        "From a raw dataset to an adapted model, and predictions if requested: plan what is not planned, choose the "
        "method by what was measured in the most similar situation, and train it within a time limit. Run the same "
        "command again to resume after an interruption.",
    )
    add_dataset(parser)
    parser.add_argument("--shots", type=positive_int, required=True, metavar="K", help="labelled cases to adapt to")
    parser.add_argument("-f", type=int, default=0, metavar="FOLD", help="draw of the support; default: 0")
    parser.add_argument(
        "--minutes",
        type=positive_float,
        required=True,
        metavar="N",
        help="wall time until the model is trained, planning included",
    )
    parser.add_argument(
        "-b", default="phantom", metavar="BACKBONE", help="see `fseft backbones list`; default: phantom"
    )
    parser.add_argument(
        "--other_modality", action="store_true", help="as in fseft plan_and_preprocess: e.g. MR for a CT backbone"
    )
    parser.add_argument("-i", type=Path, metavar="FOLDER", help="images to segment, in nnU-Net's naming")
    parser.add_argument("-o", type=Path, metavar="FOLDER", help="where their segmentations go")
    add_processes(parser)
    add_device(parser)


def adapt(args: argparse.Namespace) -> None:
    from fsefs_nnunet.adaptation.adapting import adapt
    from fsefs_nnunet.adaptation.decision import Task
    from fsefs_nnunet.device import device_named
    from fsefs_nnunet.inference.images import refuse_output

    if (args.i is None) != (args.o is None):
        raise InputError("-i and -o belong together: give the images and where their segmentations go, or neither.")
    if args.i is not None:
        refuse_output(args.o, args.i)
    device = device_named(args.device).type
    adapt(Task(args.d, args.shots, args.f, args.minutes, args.b, device, args.np, args.other_modality), args.i, args.o)
