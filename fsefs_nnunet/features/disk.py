"""The feature banks of a dataset on disk: how much they may take, what is there, and removing it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from fsefs_nnunet.cases.folders import dataset_folders
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import gigabytes

BANK_FOLDER = "fseft_features"  # in the dataset's preprocessed folder; one folder `<backbone>_<key>` for each bank


def used_bytes(folder: Path) -> int:
    """Size of all files below `folder`; other processes may add and rename files meanwhile."""
    total = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def cap_in_gb(planned: float | None) -> float | None:
    """What the banks of a dataset may take: the environment variable fseft_bank_gb, else `planned`; None: no cap.

    Raises:
        InputError: if it is not a number from 0 upwards.
    """
    cap = os.environ.get("fseft_bank_gb") or planned
    if cap is None:
        return None
    with suppress(ValueError, TypeError):
        if float(cap) >= 0:
            return float(cap)
    raise InputError(f"fseft_bank_gb is {cap!r}: give the gigabytes that the feature banks may take, 20 for example.")


def require_space(root: Path, needed: int, cap_gb: float | None) -> None:
    """Raises InputError if `needed` more bytes in `root`, the folder of all banks, exceed the cap or the disk."""
    used, free = _used_and_free(root)
    figures = f"The feature bank needs {gigabytes(needed)} more in {root}, which holds {gigabytes(used)}"
    remedies = (
        "clear old banks with `fseft bank -d ID --clear`, draw fewer queries with `fseft splits -d ID --num_queries "
        'N`, or set fseft_views lower or stages to "last" in the plans.'
    )
    if cap_gb is not None and used + needed > cap_gb * 1e9:
        raise InputError(f"{figures}; fseft_bank_gb allows {gigabytes(cap_gb * 1e9)}: raise it, {remedies}")
    if needed > free:
        raise InputError(f"{figures}; the disk has {gigabytes(free)} free: free some, {remedies}")


def has_space(root: Path, needed: int, cap_gb: float | None) -> bool:
    """Whether `needed` more bytes in `root` fit within the cap and half of the free disk."""
    used, free = _used_and_free(root)
    return needed <= free / 2 and (cap_gb is None or used + needed <= cap_gb * 1e9)


def _used_and_free(root: Path) -> tuple[int, int]:
    return used_bytes(root), shutil.disk_usage(root if root.exists() else root.parent).free


@dataclass(frozen=True)
class Bank:
    """One bank of a dataset: `entries` volumes of the backbone `backbone` in `num_bytes` bytes."""

    folder: Path
    backbone: str
    key: str
    entries: int
    num_bytes: int
    last_used: datetime


def list_banks(root: Path) -> list[Bank]:
    """The banks in `root`, the one used last first; none if there is no such folder."""
    banks = []
    for folder in filter(Path.is_dir, root.glob("*_*")):
        backbone, key = folder.name.rsplit("_", 1)
        entries = len(list(folder.glob("*.json")))
        # every training that reads a bank touches its folder
        last_used = datetime.fromtimestamp(folder.stat().st_mtime)
        banks.append(Bank(folder, backbone, key, entries, used_bytes(folder), last_used))
    return sorted(banks, key=lambda bank: bank.last_used, reverse=True)


def clear_banks(root: Path, keys: Sequence[str]) -> list[Bank]:
    """Remove the banks of `root` with these keys, all of them if none is given. Returns what was removed.

    Raises:
        InputError: for an unknown key, or if an entry is being computed; nothing is removed then.
    """
    banks = list_banks(root)
    unknown = set(keys) - {bank.key for bank in banks}
    if unknown:
        raise InputError(
            f"No feature bank {', '.join(sorted(unknown))} in {root}; there are: "
            f"{', '.join(bank.key for bank in banks) or 'none'}."
        )
    banks = [bank for bank in banks if not keys or bank.key in keys]
    for bank in banks:
        if _is_being_filled(bank.folder):
            raise InputError(f"A training is filling {bank.folder}: wait until it has finished, or stop it.")
    for bank in banks:
        shutil.rmtree(bank.folder)
    return banks


def _is_being_filled(folder: Path) -> bool:
    try:
        for file in folder.glob("*.lock"):
            with FileLock(file, timeout=0):
                pass
    except Timeout:
        return True
    return False


def show(dataset_id: int | str) -> None:
    """Print the banks of a dataset: what `fseft bank -d ID` runs."""
    root = bank_folder(dataset_id)
    banks = list_banks(root)
    print(f"{len(banks)} feature banks in {root}, {gigabytes(sum(bank.num_bytes for bank in banks))}")
    for bank in banks:
        print(f"  {_line(bank)}, last used {bank.last_used:%Y-%m-%d %H:%M}")


def clear(dataset_id: int | str, keys: Sequence[str]) -> None:
    """Remove banks of a dataset and print which: what `fseft bank -d ID --clear [KEY ...]` runs."""
    root = bank_folder(dataset_id)
    banks = clear_banks(root, keys)
    for bank in banks:
        print(f"Removed {_line(bank)}")
    print(f"{len(banks)} feature banks removed from {root}, {gigabytes(sum(bank.num_bytes for bank in banks))}")


def bank_folder(dataset_id: int | str) -> Path:
    """The folder of all banks of a dataset."""
    return dataset_folders(dataset_id)[2] / BANK_FOLDER


def _line(bank: Bank) -> str:
    return f"{bank.key} ({bank.backbone}): {bank.entries} entries, {gigabytes(bank.num_bytes)}"
