"""`fseft env`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys


def register(verb) -> None:
    verb("env", env, 'Print what the shell needs for nnU-Net to find our trainers: eval "$(fseft env)".')


def env(args: argparse.Namespace) -> None:
    from fsefs_nnunet.nnunet.experiment import external_trainers

    print(f"export nnUNet_extTrainer={shlex.quote(external_trainers())}")
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        if name not in os.environ:
            print(f"{name} is not set: export {name}=FOLDER, as nnU-Net needs it.", file=sys.stderr)
