"""The files of a trained nnU-Net model, from its folder or from a zip of nnUNetv2_export_model_to_zip."""

from __future__ import annotations

import json
import lzma
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from tempfile import TemporaryDirectory, gettempdir

from fsefs_nnunet.backbones.checkpoints import read_checkpoint
from fsefs_nnunet.errors import InputError

JSON_FILES = ("plans.json", "dataset.json")


@dataclass(frozen=True)
class ModelFiles:
    """plans, dataset: the contents of plans.json and dataset.json; checkpoint: what `source` holds."""

    plans: dict
    dataset: dict
    checkpoint: dict
    source: str


def read_model(path: Path, fold: str, checkpoint: str, configuration: str) -> ModelFiles:
    """Read the model in `path`, the folder with plans.json and fold_X, or a zip of such folders.

    Args:
        fold: "0", "all", ...; "" for the first one that has a checkpoint.
        checkpoint: file name in fold_X.
        configuration: which model of a zip, e.g. "3d_fullres"; "" if it holds only one.

    Raises:
        InputError: for missing, damaged or unsafe files; names them and the remedy.
    """
    path = Path(path)
    refuse_nnunet_v1(path)
    if path.is_dir():
        return _read_folder(path, fold, checkpoint)
    if not path.exists():
        raise InputError(f"{path} is missing: give an nnU-Net model folder or a .zip of one.")
    if path.suffix.lower() != ".zip":
        raise InputError(
            f"{path} is neither a model folder nor a .zip of one: give the folder with plans.json and fold_X."
        )
    with TemporaryDirectory() as folder:
        try:
            files = _read_folder(_unzip(path, Path(folder), fold, checkpoint, configuration), fold, checkpoint)
            return replace(files, source=files.source.replace(folder, str(path)))
        except InputError as error:
            raise InputError(str(error).replace(folder, str(path))) from error
        except OSError as error:
            raise InputError(
                f"{path} could not be unpacked in {gettempdir()} ({error}): make room there, or choose another folder "
                "with the environment variable TMPDIR."
            ) from error


def refuse_nnunet_v1(path: Path) -> None:
    """Raises InputError for a folder, zip or pickle of nnU-Net v1, by its name alone: pickles can run any program."""
    pickles = [path] if path.suffix.lower() == ".pkl" and path.is_file() else []
    if path.is_dir() and not (path / "plans.json").exists():
        pickles = sorted(file for pattern in ("*.pkl", "fold_*/*.pkl") for file in path.glob(pattern))
    if pickles:
        raise InputError(_of_nnunet_v1(pickles[0]))


def _of_nnunet_v1(file: Path) -> str:
    return (
        f"{file} is a pickle, as nnU-Net v1 wrote them; it could run code and was not opened: give a model that "
        "nnU-Net v2 trained, with plans.json and fold_X/checkpoint_final.pth."
    )


def _read_folder(folder: Path, fold: str, checkpoint: str) -> ModelFiles:
    if not (folder / "plans.json").exists():
        raise InputError(f"{folder}/plans.json is missing: give the folder that holds plans.json and fold_X.")
    if not (folder / "dataset.json").exists():
        raise InputError(f"{folder}/dataset.json is missing: copy the model's folder as nnU-Net wrote it.")
    files = sorted(folder.glob(f"fold_{fold or '*'}/{checkpoint}"))
    if not files:
        raise InputError(f"{folder} has no fold_{fold or 'X'}/{checkpoint}: is the training finished?")
    plans, dataset = (_read_json(folder / name) for name in JSON_FILES)
    return ModelFiles(plans, dataset, read_checkpoint(files[0]), str(files[0]))


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is damaged ({error}): copy the model again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is not what nnU-Net writes: copy the model again.")
    return content


def _unzip(file: Path, target: Path, fold: str, checkpoint: str, configuration: str) -> Path:
    """Extract plans, dataset and one checkpoint of one model, nothing else. Returns the model's folder in `target`."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            _refuse_unsafe(file, names)
            model = _choose_model(file, names, fold, checkpoint, configuration)
            weights = sorted(str(p) for p in map(PurePosixPath, names) if _is_checkpoint(p, model, fold, checkpoint))
            for name in [*(str(model / name) for name in JSON_FILES), weights[0]]:
                if name in names:  # missing files are reported when the folder is read
                    archive.extract(name, target)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
        raise InputError(f"{file} is damaged or not a plain zip ({error}): export or download it again.") from error
    return target / model


def _refuse_unsafe(file: Path, names: list[str]) -> None:
    for name in names:
        path = PureWindowsPath(name)  # handles both slashes, and drives
        if path.anchor or ".." in path.parts:
            raise InputError(
                f"{file} was not unpacked: its member {name!r} points outside the folder. Take the zip from its "
                "publisher again."
            )


def _is_checkpoint(path: PurePosixPath, model: PurePosixPath, fold: str, checkpoint: str) -> bool:
    return path.parent.parent == model and path.match(f"fold_{fold or '*'}/{checkpoint}")


def _choose_model(file: Path, names: list[str], fold: str, checkpoint: str, configuration: str) -> PurePosixPath:
    paths = [PurePosixPath(name) for name in names]
    folders = {path.parent.parent for path in paths if _is_checkpoint(path, path.parent.parent, fold, checkpoint)}
    # nnU-Net's folders are named trainer__plans__configuration
    models = sorted(m for m in folders if not configuration or m.name.split("__")[-1] == configuration)
    if not models:
        for path in paths:
            if path.name == "plans.pkl":
                raise InputError(_of_nnunet_v1(file / path))
        raise InputError(
            f"{file} holds no nnU-Net model{f' of {configuration}' if configuration else ''} with "
            f"fold_{fold or 'X'}/{checkpoint}: make it with nnUNetv2_export_model_to_zip."
        )
    if len(models) > 1:
        raise InputError(
            f"{file} holds {len(models)} models, {', '.join(map(str, models))}: choose a configuration (-c), or unpack "
            "it and give the folder of one."
        )
    return models[0]
