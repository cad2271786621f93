"""From a raw dataset to plans, splits and preprocessed data: what `fseft plan_and_preprocess` runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fsefs_nnunet.atomic import read_json
from fsefs_nnunet.cases.dataset_json import read_dataset_json
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.labels import label_values


def dataset_folders(dataset_id: int | str) -> tuple[str, Path, Path]:
    """Name, raw and preprocessed folder. Raises InputError where nnU-Net's environment variables are missing."""
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw

    for name, variable in (("nnUNet_raw", nnUNet_raw), ("nnUNet_preprocessed", nnUNet_preprocessed)):
        _require(name, variable)
    name = _dataset_name(dataset_id, nnUNet_raw)
    raw = Path(str(nnUNet_raw)) / name
    if not (raw / "dataset.json").exists():
        raise InputError(f"{raw}/dataset.json is missing: a raw dataset in nnU-Net's layout is wanted.")
    return name, raw, Path(str(nnUNet_preprocessed)) / name


def model_folder(dataset_id: int | str, trainer: str, plans: str, configuration: str) -> Path:
    """Of a trained model in nnUNet_results. Raises InputError without that variable, and for an unknown dataset."""
    from nnunetv2.paths import nnUNet_results

    _require("nnUNet_results", nnUNet_results)
    return (
        Path(str(nnUNet_results)) / _dataset_name(dataset_id, nnUNet_results) / f"{trainer}__{plans}__{configuration}"
    )


def _require(name: str, variable) -> None:
    if not variable.is_set():
        raise InputError(f"The environment variable {name} is not set: export {name}=FOLDER, as nnU-Net needs it.")


def _dataset_name(dataset_id: int | str, folder) -> str:
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    try:
        return maybe_convert_to_dataset_name(int(dataset_id) if str(dataset_id).isdigit() else dataset_id)
    except (RuntimeError, ValueError) as error:
        reason = str(error).split(". ")[0]  # nnU-Net's text goes on over several lines
        raise InputError(f"No dataset {dataset_id} in {folder}: {reason}.") from error


def labelled_cases(raw: Path) -> list[str]:
    return sorted(_training_files(raw, read_dataset_json(raw / "dataset.json")))


def _training_files(raw: Path, dataset_json: dict) -> dict[str, dict]:
    """Each training case's "images" and "label", as nnU-Net finds them.

    Raises:
        InputError: if there is none.
    """
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    files = {}
    if "dataset" in dataset_json or (raw / "imagesTr").is_dir():
        files = get_filenames_of_train_images_and_targets(str(raw), dataset_json)
    if not files:
        ending = dataset_json["file_ending"]
        raise InputError(f"{raw / 'imagesTr'} has no images named <case>_0000{ending}: nnU-Net's naming is wanted.")
    return files


def fitting_shots(requested: Sequence[int | str], num_labelled: int) -> Sequence[int | str]:
    """The requested shots; of the default ones, those that `num_labelled` cases allow.

    Raises:
        InputError: for more shots than labelled cases.
    """
    from fsefs_nnunet.planners.fseft_planner import DEFAULT_SHOTS

    if requested:
        too_many = [k for k in requested if k != "all" and k > num_labelled]
        if too_many:
            raise InputError(f"{max(too_many)} shots need as many labelled cases, the dataset has {num_labelled}.")
        return requested
    return [k for k in DEFAULT_SHOTS if k == "all" or k <= num_labelled]


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
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints

    from fsefs_nnunet.backbones.store import find_backbone
    from fsefs_nnunet.planners.fseft_planner import FSEFTPlanner

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


def made_folder(preprocessed: Path) -> Path:
    """A folder below nnUNet_preprocessed, there from now on."""
    try:
        preprocessed.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{preprocessed} cannot be written to ({error.strerror}): check nnUNet_preprocessed."
        ) from error
    return preprocessed


def _is_older(fingerprint: Path, raw: Path) -> bool:
    """Whether training cases were added, taken away or changed since; nnU-Net takes the fingerprint that is there."""
    if not fingerprint.exists():
        return False
    cases = _training_files(raw, read_dataset_json(raw / "dataset.json")).values()
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
    """The unlabelled queries, and beside them nnU-Net's preprocessing of the parent configuration.

    unlabelled: names of all unlabelled queries, those of an earlier call's `query_files` as well.

    Raises:
        InputError: for a query that cannot be read, or holds NaN or infinite values.
    """
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess as nnunet_preprocess
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from fsefs_nnunet.cases.queries import UnlabelledQueries

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
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    from fsefs_nnunet.backbones.readers import find_reader
    from fsefs_nnunet.cases.images import check_label, read_image

    dataset_json = read_dataset_json(raw / "dataset.json")
    reader, channels = find_reader(contract, dataset_json["file_ending"]), len(dataset_json["channel_names"])
    cases = _training_files(raw, dataset_json)
    labels = label_values(dataset_json["labels"])

    def check(case: str) -> None:
        files = cases[case]["images"]
        if len(files) != channels:
            raise InputError(f"{case} has {len(files)} images in {raw}, dataset.json names {channels} channel(s).")
        image, _ = read_image(reader(), files)
        check_label(reader(), cases[case]["label"], image.shape[1:], labels)

    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        list(tqdm(pool.map(check, cases), total=len(cases), desc="checking cases"))
