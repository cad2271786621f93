"""`fseft backbones`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fsefs_nnunet.errors import InputError

if TYPE_CHECKING:
    from fsefs_nnunet.backbones.contract import BackboneContract


def register(verb) -> None:
    parser = verb("backbones", backbones, "List, import, download, verify and remove backbones.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="installed backbones, and public ones that can be obtained")
    parser = actions.add_parser("info", help="everything that is known about one")
    parser.add_argument("id", help="as listed by `fseft backbones list`")
    parser = actions.add_parser("import", help="import a public checkpoint, or an nnU-Net model as a folder or zip")
    parser.add_argument(
        "id",
        help="name of the new backbone; that of a public one determines what the file must hold; totalsegmentator: "
        "lists the models that TotalSegmentator has installed, or imports them",
    )
    parser.add_argument(
        "path",
        nargs="?",
        help="checkpoint file, model folder, or zip of nnUNetv2_export_model_to_zip; for totalsegmentator: a name or "
        "number from its list, a folder, or all; not needed if a Python package holds the file",
    )
    parser.add_argument("-f", default="", metavar="FOLD", help="of an nnU-Net model; default: the first one")
    parser.add_argument("-chk", default="checkpoint_final.pth", metavar="FILE", help="default: checkpoint_final.pth")
    parser.add_argument("-c", default="", metavar="CONFIGURATION", help="which model of a zip that holds several")
    _add_folder(parser)
    parser = actions.add_parser("download", help="fetch or resume a public checkpoint, and import it")
    parser.add_argument("id", help="of a public one from `fseft backbones list`")
    _add_folder(parser)
    parser = actions.add_parser("verify", help="compare weights with the recorded SHA-256")
    parser.add_argument("id", nargs="*", help="default: all that are installed")
    parser = actions.add_parser("remove", help="delete a backbone that you imported")
    parser.add_argument("id", help="as listed by `fseft backbones list`")


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
            print(f"{file} was deleted.")
    else:
        target = Path(args.o) if args.o else store.user_folder()
        where = f"fseft_backbones={target} " if args.o else ""
        for contract in _obtain(args, target):
            print(f"Use it: {where}fseft plan_and_preprocess -d DATASET -b {contract.id}")


def _obtain(args: argparse.Namespace, target: Path) -> Iterable[BackboneContract]:
    """Download or import into folder `target`; nothing if a list is requested."""
    from fsefs_nnunet.backbones.published import obtaining, totalsegmentator
    from fsefs_nnunet.backbones.published.downloading import by_hand
    from fsefs_nnunet.backbones.published.packaged import packaged_file
    from fsefs_nnunet.backbones.zoo import ZOO

    if args.action == "download":
        return [obtaining.download_backbone(args.id, target)]
    if args.id == totalsegmentator.NAME:
        if args.c:
            raise InputError("TotalSegmentator's folders hold one configuration each: omit -c.")
        if args.path is None:
            totalsegmentator.show_models()
            return []
        return totalsegmentator.import_models(args.path, target, args.f, args.chk)
    packaged = args.path is None and args.id in ZOO and ZOO[args.id].package
    if args.path is None and not packaged:
        how = f" {by_hand(ZOO[args.id])}." if args.id in ZOO else ""
        raise InputError(f"Say what {args.id!r} is imported from: fseft backbones import {args.id} PATH.{how}")
    path = packaged_file(ZOO[args.id]) if packaged else Path(args.path)
    return [obtaining.import_backbone(args.id, path, target, args.f, args.chk, args.c)]
