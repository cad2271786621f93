"""nnU-Net's folders of a dataset, and the training cases in them."""

from __future__ import annotations

import locale
import os
import re
from pathlib import Path

from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

from fsefs_nnunet.cases.images import broken_link, is_leftover, list_images
from fsefs_nnunet.errors import InputError, several

VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def folder_of(variable: str) -> Path:
    """The folder that one of nnU-Net's environment variables names; it may not be there yet.

    Raises:
        InputError: if the variable is missing or empty.
    """
    value = os.environ.get(variable)
    if not value:
        found = "is empty" if value == "" else "is not set"
        raise InputError(f"The environment variable {variable} {found}: export {variable}=FOLDER, as nnU-Net needs it.")
    return Path(value)


def dataset_folders(dataset_id: int | str) -> tuple[str, Path, Path]:
    """Name, raw and preprocessed folder of a dataset, by its id or its name.

    Raises:
        InputError: if nnU-Net's environment variables are missing, there is no such dataset, or its id is used by
            another one, too.
    """
    raw, preprocessed = folder_of("nnUNet_raw"), folder_of("nnUNet_preprocessed")
    if not raw.is_dir():
        raise InputError(f"nnUNet_raw is {raw}, which is not a folder: correct the environment variable.")
    if not os.access(raw, os.R_OK | os.X_OK):
        raise InputError(f"nnUNet_raw is {raw}, which cannot be read: check its permissions.")
    name = dataset_name(dataset_id, "nnUNet_raw")
    if not (raw / name / "dataset.json").exists():
        lacking = "is missing" if (raw / name).is_dir() else "does not exist, nor does its folder"
        raise InputError(f"{raw / name / 'dataset.json'} {lacking}: expected a raw dataset in nnU-Net's layout.")
    return name, raw / name, preprocessed / name


def model_folder(dataset_id: int | str, trainer: str, plans: str, configuration: str) -> Path:
    """The folder of a trained model in nnUNet_results. Raises InputError if that or the dataset is missing."""
    results = folder_of("nnUNet_results")
    named = str(dataset_id).startswith("Dataset") and (results / str(dataset_id)).is_dir()
    name = dataset_id if named else dataset_name(dataset_id, "nnUNet_results")
    return results / name / f"{trainer}__{plans}__{configuration}"


def dataset_name(dataset_id: int | str, variable: str) -> str:
    """DatasetXXX_Name of an id or a name; it may lie in any of nnU-Net's folders; errors name `variable`'s.

    nnU-Net converts names to ids and back, so every name needs an id of its own in all its folders.

    Raises:
        InputError: if there is no such dataset, or there are two.
    """
    text = str(dataset_id)
    number = text if text.isdecimal() else (re.match(r"Dataset(\d+)_.", text) or [None, None])[1]
    if number is None:
        where = folder_of(variable)
        raise InputError(f"No dataset {text} in {where}: give an id, 4 for example, or a name, Dataset004_Name.")
    if not 0 < int(number) < 1000 or not (text.isdecimal() or len(number) == 3):
        raise InputError(
            f"{text} is not an nnU-Net dataset name: these are DatasetXXX_Name, with a three-digit id from 001 to "
            "999. Rename its folder."
        )
    roots = [Path(os.environ[v]) for v in VARIABLES if os.environ.get(v)]
    there = [path for root in roots if root.is_dir() for path in sorted(root.glob("Dataset*")) if path.is_dir()]
    candidates = find_candidate_datasets(int(number))
    found = {path.name: path for path in reversed(there) if path.name in candidates}
    if len(found) > 1:
        raise InputError(
            f"Dataset id {int(number)} is used by {' and '.join(map(str, found.values()))}: rename all but one in all "
            "three folders of nnU-Net, or move them away."
        )
    if found and (text.isdecimal() or text in found):
        return next(iter(found))
    remedy = f"there are {several(sorted({path.name for path in there}), 5) or 'none'}."
    near = [path for path in there if re.match(rf"Dataset0*{int(number)}_", path.name)]
    if near and not found:
        right = f"Dataset{int(number):03d}_{near[0].name.split('_', 1)[1]}"
        remedy = f"nnU-Net's ids have three digits, rename {near[0]} to {right}."
    raise InputError(f"No dataset {text} in {folder_of(variable)}: {remedy}")


def labelled_cases(raw: Path, dataset_json: dict) -> list[str]:
    return sorted(training_files(raw, dataset_json))


def training_files(raw: Path, dataset_json: dict) -> dict[str, dict]:
    """Each training case's "images" and "label" by name, as nnU-Net finds them, without leftovers of macOS.

    Raises:
        InputError: if there is none, or one that nnU-Net would ignore or fail on.
    """
    if "dataset" in dataset_json:
        cases = _listed_files(raw, dataset_json)
    else:
        ending = dataset_json["file_ending"]
        images = list_images(raw / "imagesTr", dataset_json).require_sound()
        cases = {c: {"images": images[c], "label": str(raw / "labelsTr" / f"{c}{ending}")} for c in images}
    for case, files in cases.items():
        _require_printable(raw, [case, *files["images"], files["label"]])
    return dict(sorted(cases.items()))


def _require_printable(raw: Path, names: list[str]) -> None:
    """Raises InputError for names that nnU-Net's workers could not print in this locale."""
    encoding = locale.getpreferredencoding(False)
    try:
        "".join(names).encode(encoding)
    except UnicodeEncodeError as error:
        raise InputError(
            f"{ascii(str(raw))} has names that this locale ({encoding}) cannot write: set PYTHONUTF8=1, or use plain "
            "letters."
        ) from error


def _listed_files(raw: Path, dataset_json: dict) -> dict[str, dict]:
    """Files in "dataset" of dataset.json: relative to the dataset's folder; may contain environment variables."""
    file, entries = raw / "dataset.json", dataset_json["dataset"]
    channels = len(dataset_json["channel_names"])
    if not isinstance(entries, dict) or not entries:
        raise InputError(f'{file}: "dataset" lists no case: write one entry for each case, or leave it out.')
    found = {}
    for case, entry in entries.items():
        images, label = (entry.get(key) if isinstance(entry, dict) else None for key in ("images", "label"))
        if not isinstance(images, list) or len(images) != channels or not isinstance(label, str):
            raise InputError(
                f'{file}: case {case!r} under "dataset" is {entry}: write {{"images": [FILE of each of {channels} '
                'channel(s)], "label": FILE}}.'
            )
        *found_images, found_label = (_expanded(raw, case, str(name)) for name in (*images, label))
        found[case] = {"images": found_images, "label": found_label}
    return found


def _expanded(raw: Path, case: str, name: str) -> str:
    path = os.path.abspath(os.path.join(raw, os.path.expandvars(name)))
    if not os.path.exists(path):
        unset = [variable for variable in re.findall(r"\$\{?(\w+)", name) if variable not in os.environ]
        why = f"the environment variable {unset[0]} is not set" if unset else f"{path} does not exist"
        raise InputError(f"{raw / 'dataset.json'}: case {case!r} names {name}, but {why}.")
    return path


def warnings_of_cases(raw: Path, dataset_json: dict, cases: dict[str, dict]) -> list[str]:
    """Warnings about the number of cases, one sentence each."""
    made = []
    stated = dataset_json.get("numTraining")
    if stated is not None and int(stated) != len(cases):
        made.append(f"numTraining of {raw / 'dataset.json'} is {stated}, but {len(cases)} labelled cases were found.")
    if "dataset" not in dataset_json:
        ending = dataset_json["file_ending"]
        stems = [file.name.removesuffix(ending) for file in (raw / "labelsTr").glob(f"*{ending}")]
        if lonely := [stem for stem in sorted(stems) if stem not in cases and not is_leftover(stem)]:
            made.append(f"{raw / 'labelsTr'} has {len(lonely)} label map(s) without an image: {several(lonely)}.")
    return made


def require_label_file(file: str) -> None:
    """Raises InputError if a label map is missing."""
    if Path(file).exists():
        return
    if Path(file).is_symlink():
        raise InputError(str(broken_link(Path(file))))
    raise InputError(f"{file} is missing: every training image needs its label map.")


def made_folder(preprocessed: Path) -> Path:
    """Create a folder below nnUNet_preprocessed. Raises InputError if it cannot be written to."""
    try:
        preprocessed.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{preprocessed} cannot be written to ({error.strerror}): check nnUNet_preprocessed."
        ) from error
    if not os.access(preprocessed, os.W_OK | os.X_OK):
        raise InputError(f"{preprocessed} cannot be written to (it is read-only): check nnUNet_preprocessed.")
    return preprocessed
