"""`fseft link`, `fseft unlink`: shims in the installed nnU-Net, so that its own commands find our classes by name."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import write_atomically

MARKER = "# Written by `fseft link`; `fseft unlink` removes it.\n"

# File in nnU-Net's package -> (package, module) of ours whose classes nnU-Net finds there. nnU-Net searches planners
# only in its own package, and takes the first module that has the name.
SHIMS = {
    "experiment_planning/fseft_planner.py": ("fsefs_nnunet.planners", "fseft_planner"),
    "training/nnUNetTrainer/fseft_trainers.py": ("fsefs_nnunet.trainers", "by_name"),
}

# nnU-Net imports every module that it passes on a search. Ours imports nothing until it is asked for a name of ours, so
# that stock planners and trainers work as before, even where fsefs_nnunet was removed without unlinking.
_SHIM = (
    MARKER
    + """

def __getattr__(name):
    if not name.startswith("FSEFT"):
        raise AttributeError(f"module {{__name__!r}} has no attribute {{name!r}}")
    from {package} import {module}

    return getattr({module}, name)
"""
)

_NEXT = """
export fseft_backbone=BACKBONE                       # one of `fseft backbones list`; default: phantom
nnUNetv2_plan_and_preprocess -d ID -pl FSEFTPlanner  # plans FSEFTPlans, FSEFTPlans_BACKBONE for other backbones
fseft splits -d ID                                   # the K-shot folds, which nnU-Net's command does not draw
nnUNetv2_train ID 3d_fullres_5shot 0 -tr FSEFTTrainer -p FSEFTPlans
`fseft unlink` removes the shims; run it before you remove nnU-Net or fsefs_nnunet."""


def nnunet_folder() -> Path:
    """Folder of the package nnunetv2 that this Python imports, found without importing it."""
    return Path(next(iter(find_spec("nnunetv2").submodule_search_locations)))


def link(nnunet: Path) -> None:
    """Write the shims into `nnunet`, the folder of the package nnunetv2; those of an earlier call are replaced.

    Raises:
        InputError: if a file of that name is not ours or a folder cannot be written; nothing is written then.
    """
    files = [nnunet / name for name in SHIMS]
    for file in files:
        if file.exists() and not _is_ours(file):
            raise InputError(
                f"{file} was not written by `fseft link` and is left unchanged: rename it, or do without the link and "
                'use `eval "$(fseft env)"` and `fseft plan_and_preprocess`.'
            )
        _check_writable(file.parent)
    for file, (package, module) in zip(files, SHIMS.values()):
        write_atomically(file, _SHIM.format(package=package, module=module))
        print(f"{file} was written.")
    if (nnunet.parent / ".git").exists():
        print(f"{nnunet.parent} is a git checkout: its `git status` lists both files as untracked.")
    print(_NEXT)


def unlink(nnunet: Path) -> None:
    """Remove what `link` wrote into `nnunet`, and the bytecode compiled from it; files without our marker are kept.

    Raises:
        InputError: if a folder cannot be written.
    """
    present = [file for file in (nnunet / name for name in SHIMS) if file.exists()]
    ours = [file for file in present if _is_ours(file)]
    for file in ours:
        _check_writable(file.parent)
    for file in ours:
        file.unlink()
        for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
            compiled.unlink()
        print(f"{file} was removed.")
    for file in present:
        if file not in ours:
            print(f"{file} was not written by `fseft link` and is kept.")
    if not ours:
        print(f"{nnunet} holds none of our shims: nothing was removed.")


def _is_ours(file: Path) -> bool:
    return file.read_bytes().startswith(MARKER.encode())


def _check_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK):
        raise InputError(
            f"{folder} cannot be written: install nnU-Net in a virtual environment of your own, or do without the link "
            'and use `eval "$(fseft env)"` and `fseft plan_and_preprocess`.'
        )
