"""`fseft train`."""

from __future__ import annotations

import argparse

from fsefs_nnunet.cli.arguments import add_dataset, add_device, shots_argument
from fsefs_nnunet.errors import InputError


def register(verb) -> None:
    parser = verb(
        "train",
        train,
        "Train several methods, shots and folds in one process, which loads the backbone once; each training is what "
        "nnUNetv2_train makes of it, and its flags mean the same.",
    )
    add_dataset(parser)
    parser.add_argument(
        "--shots", nargs="+", type=shots_argument, default=[], metavar="K", help="default: those of the plans"
    )
    parser.add_argument("-f", nargs="+", type=fold_argument, default=[0], metavar="FOLD", help="default: 0")
    parser.add_argument("-tr", nargs="+", default=["FSEFTTrainer"], metavar="TRAINER", help="default: FSEFTTrainer")
    parser.add_argument("-p", default="FSEFTPlans", metavar="PLANS", help="default: FSEFTPlans")
    add_device(parser)
    parser.add_argument("--npz", action="store_true", help="keep probabilities of the final validation")
    once = parser.add_mutually_exclusive_group()
    once.add_argument("--c", action="store_true", help="continue what was interrupted, leave out what is done")
    once.add_argument("--val", action="store_true", help="validate alone what is trained")
    parser.add_argument("--val_best", action="store_true", help="validate checkpoint_best.pth")
    parser.add_argument("--disable_checkpointing", action="store_true", help="write no checkpoints")


def fold_argument(text: str) -> int | str:
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither the number of a fold nor 'all'")
    return text if text == "all" else int(text)


def train(args: argparse.Namespace) -> None:
    from fsefs_nnunet.cases.folders import dataset_folders, folder_of
    from fsefs_nnunet.device import device_named
    from fsefs_nnunet.nnunet.training import Options, plan_trainings, run_trainings

    if args.val_best and args.disable_checkpointing:
        raise InputError("--val_best needs checkpoints: leave out --disable_checkpointing.")
    name, _, preprocessed = dataset_folders(args.d)
    folder_of("nnUNet_results")
    trainings = plan_trainings(name, preprocessed, args.p, args.shots, args.f, args.tr)
    options = Options(args.npz, args.c, args.val, args.val_best, args.disable_checkpointing)
    try:
        failures = run_trainings(trainings, device_named(args.device), options)
    except KeyboardInterrupt:
        raise InputError("Interrupted: the same command with --c goes on.") from None
    for training in trainings:
        print(f"{training.title}: {result_of(training)}")
    if failures:
        why = "\n".join(f"{training.title}: {reason}" for training, reason in failures.items())
        raise InputError(f"{len(failures)} of {len(trainings)} trainings failed, --c tries them again:\n{why}")


def result_of(training) -> str:
    """What the final validation of a training found, in words."""
    from fsefs_nnunet.files import read_json

    if not training.summary.exists():
        return "not validated"
    return f"mean Dice of the queries {read_json(training.summary)['foreground_mean']['Dice']:.3f}"
