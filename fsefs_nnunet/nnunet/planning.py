"""From a raw dataset to plans, splits and preprocessed data: what `fseft plan_and_preprocess` runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints
from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess as nnunet_preprocess
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from fsefs_nnunet.backbones.store import find_backbone
from fsefs_nnunet.cases.dataset_json import read_dataset_json
from fsefs_nnunet.cases.folders import dataset_folders, labelled_cases, made_folder, training_files
from fsefs_nnunet.cases.images import check_label, read_image
from fsefs_nnunet.cases.queries import UnlabelledQueries
from fsefs_nnunet.cases.readers import find_reader
from fsefs_nnunet.cases.splits import fitting_shots
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import read_json
from fsefs_nnunet.labels import label_values
from fsefs_nnunet.planners.fseft_planner import FSEFTPlanner


def plan(
    dataset_id: int | str,
    backbone: str,
    shots: list[int | str],
    num_processes: int,
    gpu_memory_target_in_gb: float,
    plans_name: str | None,
    overwrite_target_spacing: list[float] | None = None,
    check_integrity: bool = False,
) -> str:
    """Fingerprint and plans. Returns the plans' name."""
    contract = find_backbone(backbone)
    name, raw, preprocessed = dataset_folders(dataset_id)
    fitting_shots(shots, len(labelled_cases(raw)))
    _require_sound_cases(raw, contract, num_processes)  # before anything of earlier plans is replaced
    clean = _is_older(made_folder(preprocessed) / "dataset_fingerprint.json", raw)
    extract_fingerprints(
        [int(name[7:10])], num_processes=num_processes, check_dataset_integrity=check_integrity, clean=clean
    )
    planner = FSEFTPlanner(
        name,
        gpu_memory_target_in_gb,
        plans_name=plans_name,
        overwrite_target_spacing=overwrite_target_spacing,
        backbone=backbone,
        shots=shots,
    )
    # nnU-Net's planner takes the number of training's workers for that of its threads, and 0 is right for the former
    workers = os.environ.pop("nnUNet_n_proc_DA", None)
    try:
        planner.plan_experiment()
    finally:
        if workers is not None:
            os.environ["nnUNet_n_proc_DA"] = workers
    return planner.plans_identifier


def _is_older(fingerprint: Path, raw: Path) -> bool:
    """Whether training cases were added, taken away or changed since; nnU-Net takes the fingerprint that is there."""
    if not fingerprint.exists():
        return False
    cases = training_files(raw, read_dataset_json(raw / "dataset.json")).values()
    if len(read_json(fingerprint).get("spacings", ())) != len(cases):
        return True
    made = fingerprint.stat().st_mtime
    return any(Path(file).stat().st_mtime > made for case in cases for file in [*case["images"], case["label"]])


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
    manager = PlansManager(str(preprocessed / f"{plans_name}.json"))
    configuration = manager.get_configuration("3d_fullres")
    queries = UnlabelledQueries(preprocessed / configuration.data_identifier)
    if query_files:  # first: a broken one is refused before nnU-Net clears what it preprocessed earlier
        dataset_json = read_dataset_json(raw / "dataset.json")
        queries.preprocess(query_files, manager, configuration, dataset_json)
    elif missing := sorted(set(unlabelled) - set(queries.cases)):
        print(
            f"{len(missing)} unlabelled queries of earlier plans, e.g. {missing[0]}, no longer lie where they were: "
            "run this again with `--queries FOLDER`, or trainings with a size prior will ask for it."
        )
    nnunet_preprocess([int(name[7:10])], plans_name, ("3d_fullres",), [num_processes])


def _require_sound_cases(raw: Path, contract, num_threads: int) -> None:
    """nnU-Net preprocesses NaN and unknown labels without a word, and what it cannot read ends in a traceback of its
    workers'.
    """
    dataset_json = read_dataset_json(raw / "dataset.json")
    reader = find_reader(contract.image_reader_writer, dataset_json["file_ending"])
    channels = len(dataset_json["channel_names"])
    cases = training_files(raw, dataset_json)
    labels = label_values(dataset_json["labels"])

    def check(case: str) -> None:
        files = cases[case]["images"]
        if len(files) != channels:
            raise InputError(f"{case} has {len(files)} images in {raw}, dataset.json names {channels} channel(s).")
        image, _ = read_image(reader(), files)
        check_label(reader(), cases[case]["label"], image.shape[1:], labels)

    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        list(tqdm(pool.map(check, cases), total=len(cases), desc="checking cases"))
