"""`fseft env`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path


def register(verb) -> None:
    verb("env", env, 'Print what the shell needs for nnU-Net to find our trainers: eval "$(fseft env)".')


def env(args: argparse.Namespace) -> None:
    shims = str(Path(__file__).resolve().parent.parent / "nnunet" / "shims")
    folders = [f for f in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if f and f != shims]
    print(f"export nnUNet_extTrainer={shlex.quote(os.pathsep.join([shims, *folders]))}")
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        if name not in os.environ:
            print(f"{name} is not set: export {name}=FOLDER, as nnU-Net needs it.", file=sys.stderr)
