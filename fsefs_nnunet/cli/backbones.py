"""`fseft backbones`."""

from __future__ import annotations

import argparse
from pathlib import Path


def register(verb) -> None:
    parser = verb("backbones", backbones, "List, import, download, verify and remove backbones.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="what is here, and the public ones that can be had")
    parser = actions.add_parser("info", help="everything that is known of one")
    parser.add_argument("id", help="as `fseft backbones list` names it")
    parser = actions.add_parser("import", help="a public checkpoint, or a nnU-Net model as folder or zip")
    parser.add_argument("id", help="name that the backbone gets; that of a public one says what the file must hold")
    parser.add_argument("path", help="checkpoint file, model folder, or zip of nnUNetv2_export_model_to_zip")
    parser.add_argument("-f", default="", metavar="FOLD", help="of a nnU-Net model; default: the first one")
    parser.add_argument("-chk", default="checkpoint_final.pth", metavar="FILE", help="default: checkpoint_final.pth")
    parser.add_argument("-c", default="", metavar="CONFIGURATION", help="which model of a zip that holds several")
    _add_folder(parser)
    parser = actions.add_parser("download", help="fetch a public checkpoint, resuming, and import it")
    parser.add_argument("id", help="of a public one in `fseft backbones list`")
    _add_folder(parser)
    parser = actions.add_parser("verify", help="compare weights with the SHA-256 that was recorded")
    parser.add_argument("id", nargs="*", help="default: all that are here")
    parser = actions.add_parser("remove", help="delete a backbone that you imported")
    parser.add_argument("id", help="as `fseft backbones list` names it")


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", metavar="FOLDER", help="default: environment variable fseft_backbones, else your data folder"
    )


def backbones(args: argparse.Namespace) -> None:
    from fsefs_nnunet.backbones import store
    from fsefs_nnunet.backbones.published import shelf

    if args.action == "list":
        shelf.show_list()
    elif args.action == "info":
        shelf.show_info(args.id)
    elif args.action == "verify":
        shelf.verify(args.id)
    elif args.action == "remove":
        for file in store.remove_backbone(args.id):
            print(f"{file} is deleted.")
    else:
        from fsefs_nnunet.backbones.published import obtaining

        target = Path(args.o) if args.o else store.user_folder()
        if args.action == "download":
            contract = obtaining.download_backbone(args.id, target)
        else:
            contract = obtaining.import_backbone(args.id, Path(args.path), target, args.f, args.chk, args.c)
        where = f"fseft_backbones={target} " if args.o else ""
        print(f"Use it: {where}fseft plan_and_preprocess -d DATASET -b {contract.id}")
