"""nnU-Net's folders of a dataset, and the training cases in them."""

from __future__ import annotations

from pathlib import Path

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from fsefs_nnunet.cases.dataset_json import read_dataset_json
from fsefs_nnunet.errors import InputError


def dataset_folders(dataset_id: int | str) -> tuple[str, Path, Path]:
    """Name, raw and preprocessed folder. Raises InputError where nnU-Net's environment variables are missing."""
    for name, variable in (("nnUNet_raw", nnUNet_raw), ("nnUNet_preprocessed", nnUNet_preprocessed)):
        _require(name, variable)
    name = _dataset_name(dataset_id, nnUNet_raw)
    raw = Path(str(nnUNet_raw)) / name
    if not (raw / "dataset.json").exists():
        raise InputError(f"{raw}/dataset.json is missing: expected a raw dataset in nnU-Net's layout.")
    return name, raw, Path(str(nnUNet_preprocessed)) / name


def model_folder(dataset_id: int | str, trainer: str, plans: str, configuration: str) -> Path:
    """Of a trained model in nnUNet_results. Raises InputError without that variable, and for an unknown dataset."""
    _require("nnUNet_results", nnUNet_results)
    return (
        Path(str(nnUNet_results)) / _dataset_name(dataset_id, nnUNet_results) / f"{trainer}__{plans}__{configuration}"
    )


def _require(name: str, variable) -> None:
    if not variable.is_set():
        raise InputError(f"The environment variable {name} is not set: export {name}=FOLDER, as nnU-Net needs it.")


def _dataset_name(dataset_id: int | str, folder) -> str:
    try:
        return maybe_convert_to_dataset_name(int(dataset_id) if str(dataset_id).isdigit() else dataset_id)
    except (RuntimeError, ValueError) as error:
        reason = str(error).split(". ")[0]  # nnU-Net's text goes on over several lines
        raise InputError(f"No dataset {dataset_id} in {folder}: {reason}.") from error


def labelled_cases(raw: Path) -> list[str]:
    return sorted(training_files(raw, read_dataset_json(raw / "dataset.json")))


def training_files(raw: Path, dataset_json: dict) -> dict[str, dict]:
    """Each training case's "images" and "label", as nnU-Net finds them.

    Raises:
        InputError: if there is none.
    """
    files = {}
    if "dataset" in dataset_json or (raw / "imagesTr").is_dir():
        files = get_filenames_of_train_images_and_targets(str(raw), dataset_json)
    if not files:
        ending = dataset_json["file_ending"]
        raise InputError(f"{raw / 'imagesTr'} has no images named <case>_0000{ending}: expected nnU-Net's naming.")
    return files


def made_folder(preprocessed: Path) -> Path:
    """A folder below nnUNet_preprocessed, there from now on."""
    try:
        preprocessed.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{preprocessed} cannot be written to ({error.strerror}): check nnUNet_preprocessed."
        ) from error
    return preprocessed
