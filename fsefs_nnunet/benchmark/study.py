"""What the cells of one benchmark share, checked before anything runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from fsefs_nnunet.backbones.store import find_backbone
from fsefs_nnunet.benchmark.target import Target, queries, test_set
from fsefs_nnunet.cases.folders import dataset_folders, folder_of
from fsefs_nnunet.cases.splits import SPLITS_FILE, load_splits
from fsefs_nnunet.device import device_named
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.evaluation.surface import require_monai
from fsefs_nnunet.files import read_json
from fsefs_nnunet.labels import foreground_names, match_labels
from fsefs_nnunet.methods.settings import is_k_shot
from fsefs_nnunet.nnunet.experiment import OwnExperiment


@dataclass(frozen=True, eq=False)
class Study:
    """A dataset with one set of plans and splits, what it is evaluated on, and the folder of the outputs.

    scratch_minutes: of trainings from scratch; None: as long as the longest other method.
    """

    experiment: OwnExperiment
    plans: dict
    splits: dict
    target: Target
    scratch_minutes: float | None = None

    @property
    def planned_shots(self) -> list[int | str]:
        return [c["fseft_shots"] for c in self.plans["configurations"].values() if is_k_shot(c)]

    @property
    def backbone(self) -> dict:
        """Its id and hash, as the plans' arch_kwargs "backbone" and "sha256"."""
        child = next(c for c in self.plans["configurations"].values() if is_k_shot(c))
        return child["architecture"]["arch_kwargs"]

    @property
    def setting(self) -> str:
        """What the table shows, in a sentence."""
        where = "labelled queries" if self.target.is_queries else f"cases of {self.target.images}"
        return (
            f"{self.experiment.dataset}, plans {self.experiment.plans}, evaluated on {len(self.target.cases)} {where}, "
            "whose labels are used for nothing else."
        )

    def reader(self):
        """nnU-Net's reader of the dataset's segmentations."""
        return PlansManager(self.plans).image_reader_writer_class()

    def label_manager(self):
        """nnU-Net's, of the dataset."""
        return PlansManager(self.plans).get_label_manager(self.target.dataset_json)

    def known_labels(self) -> dict[str, str]:
        """The dataset's labels that the backbone's own head can predict, with its names for them."""
        if self.backbone.get("z_scores_as_hu"):  # `fseft zero_shot` refuses a modality that it has never seen
            return {}
        labels = self.target.dataset_json["labels"]
        return match_labels(foreground_names(labels, True), find_backbone(self.backbone["backbone"]).head_classes)


def open_study(
    dataset_id: str,
    plans_name: str,
    test: tuple[Path, Path] | None,
    output: Path | None,
    device: str | None,
    scratch_minutes: float | None = None,
) -> Study:
    """
    Args:
        test: folders of images and labels; default: the labelled queries of the splits.
        output: default: ./fseft_benchmark/DATASET_PLANS.

    Raises:
        InputError: for folders, plans, splits or a device that are not there, and without MONAI.
    """
    require_monai()
    name, raw, preprocessed = dataset_folders(dataset_id)
    folder_of("nnUNet_results")
    file = preprocessed / f"{plans_name}.json"
    if not file.exists():
        raise InputError(
            f"{file} is missing: make it with `fseft plan_and_preprocess -d ID`, or choose other plans with -p."
        )
    splits = load_splits(preprocessed / SPLITS_FILE)
    target = test_set(*test, raw) if test else queries(splits, raw, preprocessed)
    # images, labels or a GPU that are missing are reported before the first training
    target.images_sha256, target.labels_sha256  # noqa: B018
    kind = device_named(device).type
    plans = read_json(file)
    target.check_references(PlansManager(plans).image_reader_writer_class)
    work = _writable(output or Path("fseft_benchmark") / f"{name}_{plans_name}")
    experiment = OwnExperiment(work, name, plans_name, kind)
    study = Study(experiment, plans, splits, target, scratch_minutes)
    if not study.planned_shots:
        raise InputError(f"{file} has no K-shot configuration: plan with `fseft plan -d ID`.")
    return study


def _writable(folder: Path) -> Path:
    folder = folder.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise InputError(f"{folder} cannot be written: choose another folder with -o.")
    return folder
