"""`fseft train`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fsefs_nnunet.cli.arguments import add_dataset, add_device, fold_argument, shots_argument
from fsefs_nnunet.errors import InputError


def register(verb) -> None:
    parser = verb(
        "train",
        train,
        "Train several methods, shots and folds in one process, so that the backbone is loaded once. Flags and results "
        "are those of nnUNetv2_train.",
    )
    add_dataset(parser)
    parser.add_argument(
        "--shots", nargs="+", type=shots_argument, default=[], metavar="K", help="default: those of the plans"
    )
    parser.add_argument("-f", nargs="+", type=fold_argument, default=[0], metavar="FOLD", help="default: 0")
    parser.add_argument("-tr", nargs="+", default=["FSEFTTrainer"], metavar="TRAINER", help="default: FSEFTTrainer")
    parser.add_argument("-p", default="FSEFTPlans", metavar="PLANS", help="default: FSEFTPlans")
    add_device(parser)
    parser.add_argument("--npz", action="store_true", help="save the probabilities of the final validation")
    once = parser.add_mutually_exclusive_group()
    once.add_argument("--c", action="store_true", help="continue interrupted trainings, skip finished ones")
    once.add_argument("--val", action="store_true", help="only validate")
    parser.add_argument("--val_best", action="store_true", help="validate checkpoint_best.pth instead")
    parser.add_argument("--disable_checkpointing", action="store_true", help="write no checkpoints")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="JSON with the folders of failed trainings, and why"
    )


def train(args: argparse.Namespace) -> None:
    from fsefs_nnunet.cases.folders import dataset_folders, folder_of
    from fsefs_nnunet.device import device_named
    from fsefs_nnunet.files import write_json
    from fsefs_nnunet.nnunet.training import Options, plan_trainings, run_trainings

    if args.val_best and args.disable_checkpointing:
        raise InputError("--val_best needs checkpoints: omit --disable_checkpointing.")
    if args.report and not args.report.absolute().parent.is_dir():
        raise InputError(f"--report {args.report}: its folder does not exist.")
    name, _, preprocessed = dataset_folders(args.d)
    folder_of("nnUNet_results")
    trainings = plan_trainings(name, preprocessed, args.p, args.shots, args.f, args.tr)
    options = Options(args.npz, args.c, args.val, args.val_best, args.disable_checkpointing)
    try:
        failures = run_trainings(trainings, device_named(args.device), options)
    except KeyboardInterrupt:
        raise InputError("Interrupted: run the same command with --c to continue.") from None
    for training in trainings:
        if training not in failures:
            print(f"{training.title}: {result_of(training)}", flush=True)
    if args.report:
        write_json(args.report, {str(training.folder): reason for training, reason in failures.items()})
    if failures:
        why = "\n".join(f"{training.title}: {reason}" for training, reason in failures.items())
        raise InputError(
            f"{len(failures)} of {len(trainings)} trainings failed; run the command with --c to try them again:\n{why}"
        )


def result_of(training) -> str:
    """What the final validation of a training found, in words."""
    from fsefs_nnunet.files import read_json
    from fsefs_nnunet.trainers.kshot_trainer import validates

    if not validates() or not training.summary.exists():
        return "not validated"
    return f"mean Dice of the queries {read_json(training.summary)['foreground_mean']['Dice']:.3f}"
