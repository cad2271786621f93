"""`fseft plan_and_preprocess`, `fseft plan` and `fseft splits`."""

from __future__ import annotations

import argparse

from fsefs_nnunet.cases.splits import NUM_FOLDS, NUM_QUERIES, SEED
from fsefs_nnunet.cli.arguments import (
    add_dataset,
    add_processes,
    name_argument,
    positive_float,
    shots_argument,
)


def register(verb) -> None:
    parser = verb("plan_and_preprocess", plan_and_preprocess, "Fingerprint, plans, K-shot splits and preprocessing.")
    add_dataset(parser), _add_shots(parser), _add_planning(parser), _add_splits(parser)
    parser = verb("plan", plan, "Fingerprint and plans with one configuration per number of shots.")
    add_dataset(parser), _add_shots(parser), _add_planning(parser)
    parser = verb("splits", splits, "Draw support and query cases; nnU-Net's splits_final.json is not touched.")
    add_dataset(parser), _add_shots(parser), _add_splits(parser)


def _add_shots(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shots",
        nargs="+",
        type=shots_argument,
        default=[],
        metavar="K",
        help="default: those of 1 5 10 all that the labelled cases allow",
    )


def _add_planning(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-b", default="phantom", metavar="BACKBONE", help="see `fseft backbones list`; default: phantom"
    )
    add_processes(parser)
    parser.add_argument(
        "-gpu_memory_target",
        type=positive_float,
        default=8,
        metavar="GB",
        help="as in nnU-Net; the features of a slab of a volume take at most half of it; default: 8",
    )
    parser.add_argument(
        "-overwrite_plans_name",
        type=name_argument,
        metavar="NAME",
        help="default: FSEFTPlans, or FSEFTPlans_BACKBONE for backbones other than phantom",
    )
    parser.add_argument(
        "-overwrite_target_spacing", nargs=3, type=positive_float, metavar="MM", help="as in nnU-Net: z y x"
    )
    parser.add_argument(
        "--verify_dataset_integrity",
        action="store_true",
        help="accepted for compatibility with nnU-Net, no effect: planning always checks every case",
    )
    parser.add_argument(
        "--accept_positive_ct", action="store_true", help="train on CT without values below 0, probably not in HU"
    )
    parser.add_argument(
        "--other_modality",
        action="store_true",
        help="show the backbone z-scored images of a modality that it has never seen, e.g. MR for a CT backbone",
    )


def _add_splits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--queries",
        metavar="FOLDER",
        help="unlabelled volumes; default: as before, else imagesTs if no labelled case is left over",
    )
    parser.add_argument(
        "--num_queries",
        type=int,
        metavar="N",
        help=f"at most this many labelled cases are kept as queries; default: as drawn before, else {NUM_QUERIES}",
    )
    parser.add_argument(
        "--folds",
        type=int,
        metavar="N",
        help=f"seeded draws of the support, earlier ones are kept; default: as before, else {NUM_FOLDS}",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help=f"default: as before, else {SEED}; this or --num_queries draws everything again",
    )


def plan(args: argparse.Namespace) -> str:
    from fsefs_nnunet.nnunet import planning

    return planning.plan(**_plan(args))


def _plan(args: argparse.Namespace) -> dict:
    return {
        "dataset_id": args.d,
        "backbone": args.b,
        "shots": args.shots,
        "num_processes": args.np,
        "gpu_memory_target_in_gb": args.gpu_memory_target,
        "plans_name": args.overwrite_plans_name,
        "overwrite_target_spacing": args.overwrite_target_spacing,
        "accept_positive_ct": args.accept_positive_ct,
        "other_modality": args.other_modality,
    }


def splits(args: argparse.Namespace) -> None:
    from fsefs_nnunet.nnunet import drawing

    drawing.write_splits(*_draw(args))


def _draw(args: argparse.Namespace) -> tuple:
    return args.d, args.shots, args.queries, args.num_queries, args.folds, args.seed


def plan_and_preprocess(args: argparse.Namespace) -> None:
    from fsefs_nnunet.nnunet.planning import plan_and_preprocess

    name = plan_and_preprocess(_draw(args), _plan(args))
    configuration = f"3d_fullres_{(args.shots or ['all'])[0]}shot"
    print(
        '\nNext:\n  eval "$(fseft env)"\n'
        f"  nnUNetv2_train {args.d} {configuration} 0 -tr FSEFTTrainer -p {name}\n"
        "(on a machine without a GPU add -device cpu)"
    )
