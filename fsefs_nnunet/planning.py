"""From a raw dataset to plans, splits and preprocessed data: what `fseft plan_and_preprocess` runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fsefs_nnunet.atomic import read_json
from fsefs_nnunet.cases.dataset_json import read_dataset_json
from fsefs_nnunet.cases.splits import (
    NUM_FOLDS,
    NUM_QUERIES,
    SEED,
    SPLITS_FILE,
    extended,
    load_splits,
    make_splits,
    save_splits,
)
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
    """ "images" and "label" of each training case, as nnU-Net finds them.

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


def query_images(raw: Path, folder: str | None, labelled_queries: bool) -> dict[str, list[str]]:
    """Unlabelled query images: of `folder`, else of imagesTs where no labelled case is left to be a query."""
    from fsefs_nnunet.cases.images import images_in, require_channels

    dataset_json = read_dataset_json(raw / "dataset.json")
    if folder is None:
        if labelled_queries or not any((raw / "imagesTs").glob("*")):
            return {}
        folder = str(raw / "imagesTs")
        print(f"No labelled case is left over: the images of {folder} are the queries.")
    images = images_in(Path(folder), dataset_json)
    for files in images.values():
        require_channels(files)
    clash = sorted(set(images) & set(labelled_cases(raw)))
    if clash:
        raise InputError(f"{folder} and imagesTr share case names, e.g. {clash[0]}: rename the queries.")
    return images


def draw_splits(
    dataset_id: int | str,
    shots: list[int | str],
    queries: str | None,
    num_queries: int | None = None,
    num_folds: int | None = None,
    seed: int | None = None,
) -> tuple[dict, dict[str, list[str]]]:
    """The K-shot folds, and the files of the unlabelled queries by case; nothing is written.

    What was drawn before stays, as far as it serves: results of trainings belong to it. It is drawn anew for other
    labelled cases, for more shots than its pool has cases, and where `num_queries` or `seed` are given.
    """
    _, raw, preprocessed = dataset_folders(dataset_id)
    labelled = labelled_cases(raw)
    wanted = fitting_shots(shots, len(labelled))
    numbers = [k for k in wanted if k != "all"]
    earlier = _earlier_splits(preprocessed / SPLITS_FILE, labelled)
    if earlier and num_queries is None and seed is None and max(numbers, default=1) <= len(earlier["folds"][0]):
        images = query_images(raw, queries, bool(earlier["queries"]))
        unlabelled = list(images) or earlier["unlabelled_queries"]
        num_folds = earlier["num_folds"] if num_folds is None else num_folds
        return extended(earlier, num_folds, unlabelled), images
    if "all" in wanted:
        numbers.append(-(-len(labelled) // 2))  # all but the queries: not more of these than of support
    num_queries = NUM_QUERIES if num_queries is None else num_queries
    images = query_images(raw, queries, len(labelled) > max(numbers) and num_queries > 0)
    num_folds, seed = NUM_FOLDS if num_folds is None else num_folds, SEED if seed is None else seed
    return make_splits(labelled, list(images), numbers, num_queries, num_folds, seed), images


def _earlier_splits(file: Path, labelled: list[str]) -> dict | None:
    """What was drawn from these labelled cases, if there is such a file."""
    try:
        splits = load_splits(file)
    except InputError:  # missing or damaged: there is nothing to keep
        return None
    return splits if sorted([*splits["folds"][0], *splits["queries"]]) == sorted(labelled) else None


def keep_splits(dataset_id: int | str, splits: dict) -> None:
    """Write what draw_splits drew beside nnU-Net's own splits, which stay as they are."""
    preprocessed = _made(dataset_folders(dataset_id)[2])
    file = preprocessed / SPLITS_FILE
    if file.exists() and not _same_draws(file, splits):
        print(f"{file} is replaced by other draws: results of earlier K-shot trainings no longer belong to it.")
    save_splits(splits, file)
    pool, queries, unlabelled = map(len, (splits["folds"][0], splits["queries"], splits["unlabelled_queries"]))
    print(
        f"{file}: {pool + queries} labelled cases; {queries} of them and {unlabelled} unlabelled ones are queries; "
        f"{splits['num_folds']} seeded draws of the support from the other {pool}."
    )


def _same_draws(file: Path, splits: dict) -> bool:
    """Whether folds that are in both, and the labelled queries, are the same."""
    try:
        earlier = load_splits(file)
    except InputError:
        return False
    both = zip(earlier["folds"], splits["folds"])
    return earlier["queries"] == splits["queries"] and all(then == now for then, now in both)


def write_splits(
    dataset_id: int | str,
    shots: list[int | str],
    queries: str | None,
    num_queries: int | None = None,
    num_folds: int | None = None,
    seed: int | None = None,
) -> dict[str, list[str]]:
    """Draw the K-shot folds and keep them; returns the files of the unlabelled queries by case."""
    splits, images = draw_splits(dataset_id, shots, queries, num_queries, num_folds, seed)
    keep_splits(dataset_id, splits)
    return images


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
    clean = _is_older(_made(preprocessed) / "dataset_fingerprint.json", raw)
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


def _made(preprocessed: Path) -> Path:
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
            f"{len(missing)} unlabelled queries of earlier plans, e.g. {missing[0]}, are not preprocessed for these: "
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
