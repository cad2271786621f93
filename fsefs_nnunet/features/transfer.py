"""Verification of feature banks, and their export to another computer: filled on a GPU, used on a laptop."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from fsefs_nnunet.errors import InputError, several
from fsefs_nnunet.features.disk import bank_folder, list_banks, require_space
from fsefs_nnunet.features.entry import LABELS
from fsefs_nnunet.files import gigabytes, read_json, refused_if_unwritable, replacing, sha256_of

ENTRY, FEATURES = ".json", ".npy"
# what an archive may hold: <backbone>_<key>/<entry>, so that nothing is written elsewhere
_IN_A_BANK = re.compile(r"[^/\\:.][^/\\:]*_[^/\\:]+/[^/\\.][^/\\]*(\.json|\.npy)")


def damaged_entries(folder: Path) -> list[str]:
    """Names of the entries of a bank whose features or label maps have changed since they were written."""
    damaged = []
    for file in tqdm(sorted(folder.glob(f"*{ENTRY}")), desc=f"verifying {folder.name}"):
        features = file.with_suffix(FEATURES)
        try:
            content = json.loads(file.read_text("utf-8"))
            sound = sha256_of(features) == content["features_sha256"]
            if noted := content.get("labels_sha256"):
                sound &= sha256_of(file.with_suffix(LABELS)) == noted
        except (OSError, ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            damaged.append(file.stem)
    return damaged


def verify(dataset_id: int | str) -> None:
    """Hash all features, and remove entries that are damaged: what `fseft bank -d ID --verify` runs."""
    root, banks = bank_folder(dataset_id), list_banks(bank_folder(dataset_id))
    damaged = [(bank.folder, name) for bank in banks for name in damaged_entries(bank.folder)]
    with refused_if_unwritable(root):
        for folder, name in damaged:
            (folder / f"{name}{ENTRY}").unlink(missing_ok=True)
    print(f"{sum(bank.entries for bank in banks)} entries in {root}, {len(damaged)} of them damaged.")
    if damaged:
        print(f"Removed: {several([name for _, name in damaged], 10)}. The next training computes them again.")


def export_banks(dataset_id: int | str, file: Path) -> None:
    """Write all banks of a dataset into `file`: what `fseft bank -d ID --export FILE` runs.

    Raises:
        InputError: if there are none, or `file` cannot be written.
    """
    if file.is_dir() or not file.parent.is_dir():
        raise InputError(f"{file} cannot be written: give a file in a folder that exists.")
    root = bank_folder(dataset_id)
    parts = [
        part for bank in list_banks(root) for ending in (FEATURES, ENTRY) for part in bank.folder.glob(f"*{ending}")
    ]
    if not parts:
        raise InputError(f"There is no feature bank in {root}: a training fills it.")
    with refused_if_unwritable(file.parent), replacing(file) as unfinished:
        with zipfile.ZipFile(unfinished, "w") as archive:  # uncompressed, since features do not benefit from it
            for part in tqdm(sorted(parts), desc="exporting"):
                archive.write(part, f"{part.parent.name}/{part.name}")
    print(f"{file}: {len(parts)} files, {gigabytes(file.stat().st_size)}.")


def import_banks(dataset_id: int | str, file: Path) -> None:
    """Import the banks that `export_banks` wrote: what `fseft bank -d ID --import FILE` runs.

    Existing entries are kept. The first training compares the images that the entries were computed from with its own.

    Raises:
        InputError: if `file` is damaged or not such a file, or no plans of the dataset name its backbone. Incomplete
            entries are not imported.
    """
    root = bank_folder(dataset_id)
    with _opened(file) as archive, refused_if_unwritable(root.parent):
        if not all(map(_IN_A_BANK.fullmatch, archive.namelist())):
            raise InputError(f"{file} was not written by `fseft bank --export`.")
        names = [PurePosixPath(name) for name in archive.namelist()]
        _require_backbones(archive, names, root.parent, file)
        missing = [name for name in names if not (root / name).exists()]
        require_space(root, sum(archive.getinfo(str(name)).file_size for name in missing), None)
        # JSON files come last: without one, an interrupted entry does not count
        for name in tqdm(sorted(missing, key=lambda name: name.suffix == ENTRY), desc="importing"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            with replacing(root / name) as part, archive.open(str(name)) as content, open(part, "wb") as f:
                while block := content.read(1 << 20):
                    f.write(block)
    print(f"{len(missing)} files imported into {root}; a training checks that they belong to its own images.")


@contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(
            f"{file} is damaged, or was not written by `fseft bank --export` ({error}): export again."
        ) from error
    except FileNotFoundError as error:
        raise InputError(f"{file} does not exist.") from error
    except IsADirectoryError as error:
        raise InputError(f"{file} is a folder: give the file that `fseft bank --export` wrote.") from error


def _require_backbones(archive: zipfile.ZipFile, names: list[PurePosixPath], preprocessed: Path, file: Path) -> None:
    theirs = {}
    for name in names:
        if name.suffix == ENTRY:
            try:
                backbone = json.loads(archive.read(str(name)))["key"]["recipe"]["backbone"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{file} is damaged: its {name} does not describe an entry of a bank. Export again."
                ) from error
            theirs[backbone] = name.parts[0].rsplit("_", 1)[0]
    ours = {}
    for plans in preprocessed.glob("*.json"):
        content = read_json(plans)
        configurations = content.get("configurations", {}) if isinstance(content, dict) else {}
        for configuration in configurations.values():
            kwargs = configuration.get("architecture", {}).get("arch_kwargs", {})
            if "backbone" in kwargs:
                ours[kwargs["sha256"]] = kwargs["backbone"]
    if strange := [f"{name!r} of SHA-256 {sha256[:12]}" for sha256, name in theirs.items() if sha256 not in ours]:
        planned = ", ".join(f"{name!r} of {sha256[:12]}" for sha256, name in ours.items()) or "no backbone"
        raise InputError(
            f"{file} holds features of backbone {' and '.join(strange)}; the plans in {preprocessed} name {planned}: "
            "plan with that backbone first."
        )
