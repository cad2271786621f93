"""From a raw dataset to plans, splits and preprocessed data: what `fseft plan_and_preprocess` runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from fsefs_nnunet.cases.dataset_json import read_dataset_json
from fsefs_nnunet.cases.folders import dataset_folders, made_folder, training_files
from fsefs_nnunet.cases.queries import UnlabelledQueries
from fsefs_nnunet.files import read_json, refused_if_unwritable, replacing, write_atomically
from fsefs_nnunet.nnunet import drawing
from fsefs_nnunet.nnunet.stock_plans import add_stock_configurations
from fsefs_nnunet.planners.fseft_planner import FSEFTPlanner


def add_configurations(file: Path, configurations: dict[str, dict]) -> None:
    """Add configurations to plans; all others are kept, including those that another process adds meanwhile."""
    with FileLock(f"{file}.lock"):
        plans = read_json(file)
        plans["configurations"] |= configurations
        write_atomically(file, json.dumps(plans, indent=4))


def plan_and_preprocess(draw: tuple, options: dict) -> str:
    """Draw folds, plan and preprocess; returns the plans' name.

    draw, options: arguments of drawing.draw_splits and of `plan`.
    """
    dataset_id = options["dataset_id"]
    splits, queries = drawing.draw_splits(*draw)
    name = plan(**options, support=splits["folds"][0])
    preprocess(dataset_id, name, options["num_processes"], queries, splits["unlabelled_queries"])
    drawing.keep_splits(dataset_id, splits, queries)  # last: until then the earlier folds belong to the data
    return name


def plan(
    dataset_id: int | str,
    backbone: str,
    shots: list[int | str],
    num_processes: int,
    gpu_memory_target_in_gb: float = 8,
    plans_name: str | None = None,
    overwrite_target_spacing: list[float] | None = None,
    accept_positive_ct: bool = False,
    support: Sequence[str] = (),
    other_modality: bool = False,
) -> str:
    """Fingerprint and plans, with nnU-Net's own for the baseline. Returns the plans' name.

    support: cases whose labels may show the cost of the spacing; default: those of the drawn folds.
    other_modality: see FSEFTPlanner.
    """
    planner = FSEFTPlanner(
        dataset_id,
        gpu_memory_target_in_gb,
        plans_name=plans_name,
        overwrite_target_spacing=overwrite_target_spacing,
        backbone=backbone,
        shots=shots,
        num_processes=num_processes,
        accept_positive_ct=accept_positive_ct,
        support=support,
        other_modality=other_modality,
    )
    planner.plan_experiment()
    with refused_if_unwritable(dataset_folders(dataset_id)[2]):
        add_stock_configurations(planner)
    return planner.plans_identifier


def preprocess(
    dataset_id: int | str,
    plans_name: str,
    num_processes: int,
    query_files: dict[str, list[str]],
    unlabelled: Sequence[str] = (),
) -> None:
    """Preprocess the unlabelled queries, then the parent configuration by nnU-Net.

    unlabelled: names of all unlabelled queries, those of an earlier call's `query_files` as well.

    Raises:
        InputError: for a query that cannot be read, or holds NaN or infinite values.
    """
    name, raw, preprocessed = dataset_folders(dataset_id)
    dataset_json = read_dataset_json(raw / "dataset.json")
    manager = PlansManager(str(preprocessed / f"{plans_name}.json"))
    configuration = manager.get_configuration("3d_fullres")
    queries = UnlabelledQueries(preprocessed / configuration.data_identifier)
    with refused_if_unwritable(preprocessed):
        if query_files:  # first: a broken one is refused before nnU-Net clears what it preprocessed earlier
            queries.preprocess(query_files, manager, configuration, dataset_json)
        elif missing := sorted(set(unlabelled) - set(queries.cases)):
            print(
                f"{len(missing)} unlabelled queries of earlier plans, e.g. {missing[0]}, are no longer where they "
                "were: run this again with `--queries FOLDER`, or trainings with a size prior will ask for it."
            )
        configuration.preprocessor_class(verbose=False).run(name, "3d_fullres", plans_name, num_processes)
        if "dataset" not in dataset_json:  # the planner may have listed the cases for the line above
            shutil.copy(raw / "dataset.json", preprocessed / "dataset.json")
        labels = made_folder(preprocessed / "gt_segmentations")
        keep_labels(training_files(raw, dataset_json), labels, dataset_json["file_ending"])


def keep_labels(cases: dict[str, dict], folder: Path, ending: str) -> None:
    """Copy label maps, for evaluation without the raw data; nnU-Net would keep one that is newer than its successor."""
    for case, files in cases.items():
        with replacing(folder / f"{case}{ending}") as part:
            shutil.copy2(files["label"], part)
