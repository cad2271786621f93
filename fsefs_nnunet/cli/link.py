"""`fseft link` and `fseft unlink`."""

from __future__ import annotations

import argparse


def register(verb) -> None:
    verb("link", link, "Let nnU-Net's own commands find our classes: nnUNetv2_plan_and_preprocess -pl FSEFTPlanner.")
    verb("unlink", unlink, "Remove what `fseft link` wrote into the installed nnU-Net.")


def link(args: argparse.Namespace) -> None:
    from fsefs_nnunet.nnunet import linking

    linking.link(linking.nnunet_folder())


def unlink(args: argparse.Namespace) -> None:
    from fsefs_nnunet.nnunet import linking

    linking.unlink(linking.nnunet_folder())
