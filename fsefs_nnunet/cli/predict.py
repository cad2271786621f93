"""`fseft predict` and `fseft remember`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fsefs_nnunet.cli.arguments import add_device
from fsefs_nnunet.errors import InputError


def register(verb) -> None:
    parser = verb(
        "predict",
        predict,
        "Segment images, adapting each fold's adapter to each image under the size prior. Flags are those of "
        "nnUNetv2_predict.",
    )
    parser.add_argument("-i", required=True, metavar="FOLDER", help="images, in nnU-Net's naming")
    parser.add_argument("-o", required=True, metavar="FOLDER", help="segmentations, and CASE_sizes.json for each")
    _add_model(parser)
    parser.add_argument("--inductive", action="store_true", help="do not adapt; needs no support features")
    parser.add_argument("--largest_component", action="store_true", help="keep the largest component of each class")
    parser.add_argument("--save_probabilities", action="store_true", help="as in nnUNetv2_predict")
    parser.add_argument("--continue_prediction", "--c", action="store_true", help="skip cases that are done")
    parser.add_argument("-num_parts", type=int, default=1, metavar="N", help="split the cases into N parts; default: 1")
    parser.add_argument("-part_id", type=int, default=0, metavar="ID", help="which part this is, from 0; default: 0")
    parser = verb(
        "remember",
        remember,
        "Write support features (at most 50 MB) into trained checkpoints, so that `fseft predict` can adapt anywhere.",
    )
    _add_model(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", required=True, metavar="DATASET", help="id or name of the dataset it was trained on")
    parser.add_argument("-c", required=True, metavar="CONFIGURATION", help="e.g. 3d_fullres_5shot")
    parser.add_argument("-tr", default="FSEFTTrainer", metavar="TRAINER", help="default: FSEFTTrainer")
    parser.add_argument("-p", default="FSEFTPlans", metavar="PLANS", help="default: FSEFTPlans")
    parser.add_argument("-f", nargs="+", default=["0", "1", "2", "3", "4"], metavar="FOLD", help="default: 0 1 2 3 4")
    parser.add_argument("-chk", default="checkpoint_final.pth", metavar="FILE", help="default: checkpoint_final.pth")
    add_device(parser)


def _model(args: argparse.Namespace):
    from fsefs_nnunet.cases.folders import model_folder
    from fsefs_nnunet.device import device_named
    from fsefs_nnunet.inference.trained_model import TrainedModel

    folder = model_folder(args.d, args.tr, args.p, args.c)
    return TrainedModel(folder, args.c, args.f, args.chk, device_named(args.device))


def predict(args: argparse.Namespace) -> None:
    from fsefs_nnunet.inference.folder import predict_folder
    from fsefs_nnunet.inference.prediction import QueryPredictor
    from fsefs_nnunet.inference.support import memories_of

    if not 0 <= args.part_id < args.num_parts:
        raise InputError(f"-part_id {args.part_id} is not one of 0 to {args.num_parts - 1}: parts count from 0.")
    model = _model(args)
    predictor = QueryPredictor(model, None if args.inductive else memories_of(model), args.save_probabilities)
    options = (args.continue_prediction, args.largest_component, args.num_parts, args.part_id)
    try:
        failures = predict_folder(predictor, Path(args.i), Path(args.o), *options)
    except KeyboardInterrupt:
        raise InputError("Interrupted: --continue_prediction skips the cases that are done.") from None
    if failures:
        raise InputError(f"{len(failures)} case(s) failed:\n" + "\n".join(failures))


def remember(args: argparse.Namespace) -> None:
    from fsefs_nnunet.inference.support import remember

    remember(_model(args))
