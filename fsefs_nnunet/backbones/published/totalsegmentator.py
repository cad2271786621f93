"""TotalSegmentator's models where its own commands keep them: which are there, what each knows, and their import."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.published.model_files import JSON_FILES
from fsefs_nnunet.backbones.published.nnunet_models import import_nnunet_model
from fsefs_nnunet.backbones.store import known_backbones
from fsefs_nnunet.cases.dataset_json import channel_names
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.labels import foreground_names

NAME = "totalsegmentator"  # in place of a backbone's id
ALL = "all"

# Tasks of totalseg_download_weights by the numbers of the data sets; these models may be used for any purpose.
_OPEN_TASKS = {
    **dict.fromkeys((291, 292, 293, 294, 295), "total"),
    **dict.fromkeys((297, 298), "total_fast"),
    **dict.fromkeys((850, 851), "total_mr"),
    **dict.fromkeys((852, 853), "total_fast_mr"),
}
_LICENCE = "Apache-2.0 (README of github.com/wasserth/TotalSegmentator)"
_NO_LICENCE = "not known here: some of TotalSegmentator's models need a licence, see its README"
_CITATION = (
    "Wasserthal et al., TotalSegmentator: Robust Segmentation of 104 Anatomic Structures in CT Images, Radiology: "
    "Artificial Intelligence 5(5), 2023"
)
_MR_CITATION = (
    "Akinci D'Antonoli et al., TotalSegmentator MRI: Robust Sequence-independent Segmentation of Multiple Anatomic "
    "Structures in MRI, Radiology 314(2), 2025"
)
_DATASET = re.compile(r"Dataset(\d+)_(.+)")


@dataclass(frozen=True)
class InstalledModel:
    """dataset: its folder DatasetXXX_NAME; folder: the one in there that holds plans.json, None without one."""

    dataset: Path
    folder: Path | None
    id: str

    @property
    def number(self) -> int:
        return int(_DATASET.fullmatch(self.dataset.name)[1])

    @property
    def rights(self) -> dict[str, str]:
        """Licence and citation."""
        task = _OPEN_TASKS.get(self.number, "")
        citation = _MR_CITATION if task.endswith("_mr") else _CITATION
        return {"licence": _LICENCE if task else _NO_LICENCE, "citation": citation}

    @property
    def remedy(self) -> str:
        task = _OPEN_TASKS.get(self.number)
        command = f"totalseg_download_weights -t {task}" if task else "TotalSegmentator's task again"
        return f"delete {self.dataset} and run {command}, which fetches only what is not there."


def weights_folder() -> Path:
    """Where TotalSegmentator looks for its models."""
    if folder := os.environ.get("TOTALSEG_WEIGHTS_PATH"):
        return Path(folder)
    return Path(os.environ.get("TOTALSEG_HOME_DIR") or Path.home() / ".totalsegmentator") / "nnunet" / "results"


def installed_models() -> list[InstalledModel]:
    """Those in the weights folder, parts of models included.

    Raises:
        InputError: if the folder is missing or holds no models.
    """
    root = weights_folder()
    if not root.is_dir():
        raise InputError(
            f"{root}, where TotalSegmentator keeps its models, is missing: run totalseg_download_weights -t total, or "
            "set TOTALSEG_WEIGHTS_PATH to the folder that holds Dataset291_TotalSegmentator_part1_organs_1559subj."
        )
    models = [model for folder in sorted(root.iterdir()) for model in _models_of(folder)]
    if not models:
        raise InputError(
            f"{root} holds no folder of a model of TotalSegmentator v2, DatasetXXX_NAME: run totalseg_download_weights "
            "-t total, or set TOTALSEG_WEIGHTS_PATH to the folder that holds one."
        )
    return models


def _models_of(dataset: Path) -> list[InstalledModel]:
    """Models in a folder DatasetXXX_NAME; in most there is one."""
    match = _DATASET.fullmatch(dataset.name)
    if not match or not dataset.is_dir():
        return []
    name = re.sub(r"_\d+subj$", "", match[2]).lower()
    name = name.removeprefix("totalsegmentator_").replace("totalsegmri_", "mr_")
    model_id = f"totalseg{match[1]}_{_word(name)}"
    folders = sorted(dataset.glob("*__*__*"))  # trainer, plans, configuration
    if len(folders) < 2:
        return [InstalledModel(dataset, next(iter(folders), None), model_id)]
    return [InstalledModel(dataset, folder, f"{model_id}_{_word(folder.name)}") for folder in folders]


def _word(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")


def show_models() -> None:
    """What is there, each with what it knows and the command that imports it. Raises InputError if nothing is."""
    models, here = installed_models(), known_backbones()
    print(f"Models of TotalSegmentator in {weights_folder()}:")
    for model in models:
        try:
            _require_whole(model)
            print(f"{model.id}: {_knowledge(model)}; licence {model.rights['licence']}")
            command = f"fseft backbones import {NAME} {model.id}"
            print(f"  imported; again: {command}" if model.id in here else f"  {command}")
        except InputError as error:
            print(f"{model.id}: {error}")
    _show_leftovers()
    print(f"All of them: fseft backbones import {NAME} {ALL}")


def _knowledge(model: InstalledModel) -> str:
    """E.g. "CT, [1.5, 1.5, 1.5] mm, 24 classes: spleen, ..."."""
    plans, dataset = (json.loads((model.folder / name).read_text("utf-8")) for name in JSON_FILES)
    try:
        labels = dataset["labels"]
        names = foreground_names(labels, any(isinstance(value, list) for value in labels.values()))
        channels = ", ".join(str(name) for name in channel_names(dataset).values())
        spacing = plans["configurations"][model.folder.name.split("__")[-1]]["spacing"]
        return f"{channels}, {spacing} mm, {len(names)} classes: {', '.join(names)}"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{model.folder} holds JSON files other than nnU-Net's ({error}): {model.remedy}") from error


def _show_leftovers() -> None:
    for file in sorted(weights_folder().glob("*.zip")):
        if file.name == "tmp_download_file.zip":  # as TotalSegmentator names what it is fetching
            print(f"{file} is left over from a download: delete it unless TotalSegmentator is downloading now.")
        else:
            print(f"{file} is not unpacked; one model: fseft backbones import ID {file}")


def import_models(
    wanted: str, target: Path, fold: str = "", checkpoint: str = "checkpoint_final.pth"
) -> Iterator[BackboneContract]:
    """Import what `wanted` names into folder `target`, one after the other.

    Args:
        wanted: an id of the list, a data set's number or name, a folder, or "all".
        fold, checkpoint: as import_nnunet_model takes them.

    Raises:
        InputError: for an unknown name; for incomplete models, once the others are imported.
    """
    failures = []
    for model in _chosen(wanted):
        try:
            _require_whole(model, fold, checkpoint)
            contract = import_nnunet_model(model.id, model.folder, target, fold, checkpoint, **model.rights)
        except InputError as error:
            failures.append(str(error))
        else:
            yield contract
    if failures:
        raise InputError(" ".join(failures))


def _chosen(wanted: str) -> list[InstalledModel]:
    path = Path(wanted).absolute()
    if wanted != ALL and not wanted.isdigit() and path.is_dir():
        # the folder of a data set, or that of a model in it
        models = _models_of(path) or [model for model in _models_of(path.parent) if model.folder == path]
        if not models:
            raise InputError(
                f"{path} is not one of TotalSegmentator's folders, DatasetXXX_NAME: import it under a name of your "
                f"own (fseft backbones import ID {path}), or set TOTALSEG_WEIGHTS_PATH to it if it holds several."
            )
        return models
    models = installed_models()
    chosen = [m for m in models if wanted in (ALL, m.id, str(m.number), m.dataset.name)]
    if not chosen:
        raise InputError(
            f"TotalSegmentator's model {wanted!r} is not in {weights_folder()}; there are: "
            f"{', '.join(model.id for model in models)}."
        )
    return chosen


def _require_whole(model: InstalledModel, fold: str = "", checkpoint: str = "checkpoint_final.pth") -> None:
    """Raises InputError if a download was interrupted; the checkpoint itself is not read."""
    if model.folder is None:
        raise InputError(f"{model.dataset} holds no model: {model.remedy}")
    for name in JSON_FILES:
        file = model.folder / name
        try:
            complete = isinstance(json.loads(file.read_text("utf-8")), dict)
        except FileNotFoundError as error:
            raise InputError(f"{file} is missing: {model.remedy}") from error
        except ValueError:
            complete = False
        if not complete:
            raise InputError(f"{file} is damaged or incomplete: {model.remedy}")
    files = sorted(model.folder.glob(f"fold_{fold or '*'}/{checkpoint}"))
    if not files:
        raise InputError(f"{model.folder} has no fold_{fold or 'X'}/{checkpoint}: {model.remedy}")
    if not zipfile.is_zipfile(files[0]):  # a zip's table of contents comes last, so a part of one lacks it
        raise InputError(f"{files[0]} is damaged or incomplete: {model.remedy}")
