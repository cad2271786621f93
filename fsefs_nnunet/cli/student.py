"""`fseft student`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fsefs_nnunet.cli.arguments import add_dataset, add_device, add_processes, fold_argument, positive_float
from fsefs_nnunet.errors import InputError

NONE = "none"


def register(verb) -> None:
    parser = verb(
        "student",
        student,
        "Let a trained model label a pile of unlabelled cases, write them and the true cases as a raw dataset, and "
        "train on it. Run the same command again to resume after an interruption.",
    )
    add_dataset(parser)
    parser.add_argument("-c", required=True, metavar="CONFIGURATION", help="of the teacher, e.g. 3d_fullres_5shot")
    parser.add_argument(
        "-tr", default="FSEFTTrainer_Context", metavar="TRAINER", help="of the teacher; default: FSEFTTrainer_Context"
    )
    parser.add_argument("-p", default="FSEFTPlans", metavar="PLANS", help="default: FSEFTPlans")
    parser.add_argument("-f", type=fold_argument, default=0, metavar="FOLD", help="of the teacher; default: 0")
    parser.add_argument(
        "-o",
        required=True,
        type=int,
        metavar="ID",
        help="id of the student's dataset, free or used by the same call before",
    )
    parser.add_argument(
        "--pile",
        type=Path,
        metavar="FOLDER",
        help="unlabelled images in nnU-Net's naming; default: the labelled cases that are neither support nor query, "
        "without their labels",
    )
    parser.add_argument(
        "--min_probability",
        type=positive_float,
        default=0.9,
        metavar="P",
        help="voxels that the teacher is less sure of become nnU-Net's ignore label; default: 0.9",
    )
    parser.add_argument(
        "--transductive", action="store_true", help="allow queries and test cases in the pile; dataset.json notes it"
    )
    parser.add_argument(
        "--student",
        default="FSEFTTrainer_FTLong",
        metavar="TRAINER",
        help=f"e.g. FSEFTTrainer_UNet; {NONE}: do not train; default: FSEFTTrainer_FTLong",
    )
    parser.add_argument(
        "--minutes", type=positive_float, metavar="N", help="train for N minutes instead of the method's epochs"
    )
    add_processes(parser)
    add_device(parser)


def student(args: argparse.Namespace) -> None:
    from fsefs_nnunet.adaptation.student import make_student, require_student
    from fsefs_nnunet.adaptation.teacher import Teacher
    from fsefs_nnunet.device import device_named
    from fsefs_nnunet.methods.run_file import RunFile
    from fsefs_nnunet.nnunet.experiment import OwnExperiment
    from fsefs_nnunet.nnunet.training import Training

    if args.min_probability > 1:
        raise InputError(f"--min_probability {args.min_probability:g}: give a probability, at most 1.")
    if args.student != NONE:
        require_student(args.student)
    device = device_named(args.device)
    teacher = Teacher(args.d, args.tr, args.p, args.c, args.f)
    name = make_student(teacher, args.o, args.pile, args.transductive, args.min_probability, device, args.np)
    if args.student != NONE:
        configuration = Training(name, args.p, args.student, "all", 0).configuration
        budget = {} if args.minutes is None else {"fseft_train_minutes": str(args.minutes)}
        experiment = OwnExperiment.of(name, args.p, device.type)
        folder = experiment.model(args.student, configuration) / "fold_0"
        if (folder / "checkpoint_final.pth").exists():
            minutes = (RunFile.load(folder).budget_seconds or 0) / 60
            if abs(minutes - (args.minutes or 0)) > 1e-3:
                then = f"{minutes:g} minutes" if minutes else "its epochs"
                raise InputError(f"{folder} was trained for {then}: delete it to train for another time.")
        experiment.train(args.student, configuration, 0, fseft_final_validation="0", **budget)
        model = f"-d {name} -c {configuration} -f 0 -tr {args.student} -p {args.p}"
        print(f"The student is in {folder}. Its options for nnUNetv2_predict: {model}")
