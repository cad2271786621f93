"""`fseft backbones`."""

from __future__ import annotations

import argparse
from pathlib import Path


def register(verb) -> None:
    parser = verb("backbones", backbones, "List backbones, or import a trained nnU-Net model as one.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="what is here")
    parser = actions.add_parser("import", help="import a nnU-Net model: a folder with plans.json and fold_X, or a zip")
    parser.add_argument("id", help="name that the backbone gets")
    parser.add_argument("path", help="model folder, or zip of nnUNetv2_export_model_to_zip")
    parser.add_argument("-f", default="", metavar="FOLD", help="default: the first fold that has the checkpoint")
    parser.add_argument("-chk", default="checkpoint_final.pth", metavar="FILE", help="default: checkpoint_final.pth")
    parser.add_argument("-c", default="", metavar="CONFIGURATION", help="which model of a zip that holds several")
    parser.add_argument(
        "-o", metavar="FOLDER", help="default: environment variable fseft_backbones, else your data folder"
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
