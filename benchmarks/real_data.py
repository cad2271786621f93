"""The real datasets that are measured on, without the labels of their test cases, which `final.py` alone reads.

FSEFT_SHARED/data holds Task04_Hippocampus as the Decathlon has it, CHAOS_T2SPIR and OpenKBP as nnU-Net raw datasets.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fsefs_nnunet.backbones.store import find_backbone
from fsefs_nnunet.files import read_json
from fsefs_nnunet.nnunet.experiment import Experiment


@dataclass(frozen=True)
class RealData:
    """
    folder: below FSEFT_SHARED/data.
    dataset: name of the raw dataset.
    queries: labelled cases that are queries.
    surface_mm: tolerance of the surface Dice, about a voxel.
    """

    folder: str
    dataset: str
    queries: int
    surface_mm: float

    @property
    def source(self) -> Path:
        return shared_folder() / "data" / self.folder

    @property
    def decathlon(self) -> bool:
        return self.folder.startswith("Task")


REAL = {
    "hippocampus": RealData("Task04_Hippocampus", "Dataset004_Hippocampus", 40, 4.0),
    "chaos": RealData("CHAOS_T2SPIR", "Dataset020_CHAOS", 4, 8.0),
    "openkbp": RealData("OpenKBP", "Dataset021_OpenKBP", 15, 4.0),
}


def shared_folder() -> Path:
    if "FSEFT_SHARED" not in os.environ:
        sys.exit("Set FSEFT_SHARED to the folder that holds data/Task04_Hippocampus.")
    return Path(os.environ["FSEFT_SHARED"])


def make_raw(data: RealData, raw: Path, work: Path, run: Callable) -> None:
    """The raw dataset, unless it is there.

    work: for a copy of the Decathlon's folder, since nnU-Net's converter writes beside its input.
    run: takes the name of a command and its arguments.
    """
    if (raw / "dataset.json").exists():
        return
    copy = work / data.folder if data.decathlon else raw
    # the converter asks for imagesTs
    left_out = shutil.ignore_patterns("labelsTs", *([] if data.decathlon else ["imagesTs"]))
    shutil.copytree(data.source, copy, ignore=left_out, copy_function=shutil.copyfile, dirs_exist_ok=True)
    for made in (copy, *filter(Path.is_dir, copy.rglob("*"))):
        made.chmod(0o755)
    if data.decathlon:
        run("nnUNetv2_convert_MSD_dataset", "-i", copy, "-np", "2")


def plan(data: RealData, experiment: Experiment, backbone: str = "phantom", *options: str) -> None:
    """Plans, splits and preprocessed cases, unless they are there; options: more of `fseft plan_and_preprocess`."""
    make_raw(data, experiment.raw, experiment.work, experiment.run)
    if (experiment.preprocessed / f"{experiment.plans}_3d_fullres").exists():
        return
    channels = read_json(experiment.raw / "dataset.json")["channel_names"].values()
    other = ("--other_modality",) if find_backbone(backbone).unseen_channels([*channels]) else ()
    drawn = ("--num_queries", str(data.queries), "--shots", "1", "5", "10", "all")
    what = ("-d", experiment.dataset, "-b", backbone, "-np", "2")
    experiment.run("fseft", "plan_and_preprocess", *what, *drawn, *other, *options)
