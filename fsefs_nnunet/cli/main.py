"""`fseft <verb>`: parses and calls the function beside it. Heavy imports wait until a verb runs."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from fsefs_nnunet import __version__


def shots_argument(text: str) -> int | str:
    if text == "all":
        return text
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive number nor 'all'")
    return value


def env(args: argparse.Namespace) -> None:
    shims = str(Path(__file__).resolve().parent.parent / "shims")
    folders = [f for f in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if f and f != shims]
    print(f"export nnUNet_extTrainer={shlex.quote(os.pathsep.join([shims, *folders]))}")
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        if name not in os.environ:
            print(f"{name} is not set: export {name}=FOLDER, as nnU-Net needs it.", file=sys.stderr)


def plan(args: argparse.Namespace) -> str:
    from fsefs_nnunet import planning

    return planning.plan(
        args.d,
        args.b,
        args.shots,
        args.np,
        args.gpu_memory_target,
        args.overwrite_plans_name,
        args.overwrite_target_spacing,
        args.verify_dataset_integrity,
    )


def splits(args: argparse.Namespace) -> dict[str, list[str]]:
    from fsefs_nnunet import planning

    return planning.write_splits(args.d, args.shots, args.queries, args.num_queries, args.folds, args.seed)


def plan_and_preprocess(args: argparse.Namespace) -> None:
    from fsefs_nnunet import planning

    name, queries = plan(args), splits(args)
    planning.preprocess(args.d, name, args.np, queries)
    configuration = f"3d_fullres_{(args.shots or ['all'])[0]}shot"
    print(
        '\nNext:\n  eval "$(fseft env)"\n'
        f"  nnUNetv2_train {args.d} {configuration} 0 -tr FSEFTTrainer -p {name}\n"
        "(on a machine without a GPU add -device cpu)"
    )


def backbones(args: argparse.Namespace) -> None:
    from fsefs_nnunet.backbones import store

    if args.action == "list":
        for name, file in store.known_backbones().items():
            contract = store.find_backbone(name)
            print(f"{name}: {len(contract.classes)} classes, SHA-256 {contract.sha256[:12]}, {file.parent}")
    else:
        from fsefs_nnunet.backbones.importing import import_nnunet_model

        target = Path(args.o) if args.o else store.user_folder()
        contract = import_nnunet_model(args.id, Path(args.path), target, args.f, args.chk, args.c)
        print(f"Use it: fseft plan_and_preprocess -d DATASET -b {contract.id}")


def bank(args: argparse.Namespace) -> None:
    from fsefs_nnunet import bank_disk

    if args.clear is None:
        bank_disk.show(args.d)
    else:
        bank_disk.clear(args.d, args.clear)


def link(args: argparse.Namespace) -> None:
    from fsefs_nnunet import linking

    linking.link(linking.nnunet_folder())


def unlink(args: argparse.Namespace) -> None:
    from fsefs_nnunet import linking

    linking.unlink(linking.nnunet_folder())


def demo(args: argparse.Namespace) -> None:
    from fsefs_nnunet.demo import run_demo

    run_demo(Path(args.o), args.seconds, args.device)


def parser() -> argparse.ArgumentParser:
    main_parser = argparse.ArgumentParser(
        prog="fseft", description="Few-shot adaptation of frozen foundation models with nnU-Net's commands."
    )
    main_parser.add_argument("--version", action="version", version=f"fseft {__version__}")
    verbs = main_parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, function, help_text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help_text, description=help_text)
        sub.set_defaults(function=function)
        return sub

    def dataset(sub):
        sub.add_argument("-d", required=True, metavar="DATASET", help="id or name of a nnU-Net raw dataset")
        sub.add_argument(
            "--shots",
            nargs="+",
            type=shots_argument,
            default=[],
            metavar="K",
            help="default: 1 5 10 all, as far as they fit",
        )

    def planning_options(sub):
        sub.add_argument(
            "-b", default="phantom", metavar="BACKBONE", help="see `fseft backbones list`; default: phantom"
        )
        sub.add_argument("-np", type=int, default=4, metavar="N", help="processes, as in nnU-Net; default: 4")
        sub.add_argument(
            "-gpu_memory_target", type=float, default=8, metavar="GB", help="window and crops fit it; default: 8"
        )
        sub.add_argument(
            "-overwrite_plans_name", metavar="NAME", help="default: FSEFTPlans, FSEFTPlans_BACKBONE for others"
        )
        sub.add_argument("-overwrite_target_spacing", nargs=3, type=float, metavar="MM", help="as in nnU-Net: z y x")
        sub.add_argument("--verify_dataset_integrity", action="store_true", help="nnU-Net's check, recommended once")

    def split_options(sub):
        sub.add_argument(
            "--queries", metavar="FOLDER", help="unlabelled volumes; default: imagesTs if no labelled case is left over"
        )
        sub.add_argument(
            "--num_queries", type=int, default=20, help="labelled cases kept as queries at most; default: 20"
        )
        sub.add_argument("--folds", type=int, default=5, help="seeded draws of the support; default: 5")
        sub.add_argument("--seed", type=int, default=12345)

    verb("env", env, 'Print what the shell needs for nnU-Net to find our trainers: eval "$(fseft env)".')
    sub = verb("plan_and_preprocess", plan_and_preprocess, "Fingerprint, plans, K-shot splits and preprocessing.")
    dataset(sub), planning_options(sub), split_options(sub)
    sub = verb("plan", plan, "Fingerprint and plans with one configuration per number of shots.")
    dataset(sub), planning_options(sub)
    sub = verb("splits", splits, "Draw support and query cases; nnU-Net's splits_final.json is not touched.")
    dataset(sub), split_options(sub)
    sub = verb("backbones", backbones, "List backbones, or import a trained nnU-Net model as one.")
    actions = sub.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="what is here")
    sub = actions.add_parser("import", help="import a nnU-Net model: a folder with plans.json and fold_X, or a zip")
    sub.add_argument("id", help="name that the backbone gets")
    sub.add_argument("path", help="model folder, or zip of nnUNetv2_export_model_to_zip")
    sub.add_argument("-f", default="", metavar="FOLD", help="default: the first fold that has the checkpoint")
    sub.add_argument("-chk", default="checkpoint_final.pth", metavar="FILE", help="default: checkpoint_final.pth")
    sub.add_argument("-c", default="", metavar="CONFIGURATION", help="which model of a zip that holds several")
    sub.add_argument(
        "-o", metavar="FOLDER", help="default: environment variable fseft_backbones, else your data folder"
    )
    sub = verb("bank", bank, "List the feature banks of a dataset, or remove them.")
    sub.add_argument("-d", required=True, metavar="DATASET", help="id or name of a nnU-Net raw dataset")
    sub.add_argument(
        "--clear", nargs="*", metavar="KEY", help="remove the banks of these keys, which the list shows; of all without"
    )
    verb("link", link, "Let nnU-Net's own commands find our classes: nnUNetv2_plan_and_preprocess -pl FSEFTPlanner.")
    verb("unlink", unlink, "Remove what `fseft link` wrote into the installed nnU-Net.")
    sub = verb("demo", demo, "Synthetic data, 5 labelled cases, four methods: tables, pictures, a report in minutes.")
    sub.add_argument("-o", default="fseft_demo", metavar="FOLDER", help="default: ./fseft_demo")
    sub.add_argument("--seconds", type=float, default=None, help="training time of the from-scratch baseline")
    sub.add_argument("-device", default="cpu", choices=["cpu", "cuda", "mps"], help="default: cpu")
    return main_parser


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        args.function(args)
    except ValueError as error:
        print(f"fseft: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
