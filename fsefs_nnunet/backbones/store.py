"""Where backbones are kept, as safetensors and JSON contract: embedded ones in the package, the user's in a folder."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.zoo import ZOO
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import replacing, sha256_of

if TYPE_CHECKING:
    import torch

EMBEDDED = Path(__file__).parent / "weights"
DEFAULT_BACKBONE = "phantom"


def user_folder() -> Path:
    """The folder that the environment variable `fseft_backbones` names, else one among the user's data."""
    if folder := os.environ.get("fseft_backbones"):
        return Path(folder)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "fseft" / "backbones"


def known_backbones() -> dict[str, Path]:
    """Contract files by backbone id, without strays; a user's replaces an embedded one of the same id."""
    files = (file for folder in (EMBEDDED, user_folder()) for file in sorted(folder.glob("*.json")))
    return {file.stem: file for file in files if not _is_stray(file)}


def strays() -> list[Path]:
    """JSON files in the user's folder that belong to no backbone: notes, and macOS's "._" files."""
    return [file for file in sorted(user_folder().glob("*.json")) if _is_stray(file)]


def _is_stray(file: Path) -> bool:
    if not _can_name_a_backbone(file.stem):
        return True
    if file.with_suffix(".safetensors").exists():
        return False  # whatever it holds: a damaged contract must be reported
    try:
        BackboneContract.load(file)
    except InputError:
        return True
    return False


def find_backbone(backbone_id: str) -> BackboneContract:
    """The contract of a backbone.

    Raises:
        InputError: for an unknown id, with the known ones, and for a file that is not a contract or has another id.
    """
    known = known_backbones()
    if backbone_id not in known:
        get = ZOO[backbone_id].how_to_get if backbone_id in ZOO else "fseft backbones import ID PATH"
        raise InputError(
            f"Backbone {backbone_id!r} is not installed; there are: {', '.join(known) or 'none'}. "
            f"Look in {user_folder()} (environment variable fseft_backbones) or import it: {get}."
        )
    contract = BackboneContract.load(known[backbone_id])
    if contract.id != backbone_id:
        raise InputError(
            f"{known[backbone_id]} is the contract of backbone {contract.id!r}: give it and its weights that name, or "
            f"import {backbone_id!r} again."
        )
    return contract


def weights_file(backbone_id: str) -> Path:
    return known_backbones()[backbone_id].with_suffix(".safetensors")


def load_weights(contract: BackboneContract, expected_sha256: str | None = None) -> dict[str, torch.Tensor]:
    """The verified weights of `contract`.

    Args:
        expected_sha256: what plans or a checkpoint were made with.

    Raises:
        InputError: missing or damaged file, or other weights than expected; names the file and the remedy.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if expected_sha256 and expected_sha256 != contract.sha256:
        raise InputError(
            f"These plans were made with backbone {contract.id!r} of SHA-256 {expected_sha256[:12]}, but here "
            f"it has {contract.sha256[:12]}: import the former again, or plan and train again with this one."
        )
    file = weights_file(contract.id)
    if not file.exists():
        raise InputError(f"The weights {file} are missing: import the backbone again (fseft backbones import).")
    try:
        if sha256_of(file) != contract.sha256:
            raise InputError(
                f"The weights {file} are damaged (their SHA-256 is not the contract's): import them again."
            )
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"The weights {file} cannot be read ({error}): import the backbone again.") from error


def _can_name_a_backbone(name: str) -> bool:
    return name.replace("_", "").replace("-", "").isalnum()


def check_id(backbone_id: str) -> None:
    """Raises InputError unless `backbone_id` can name files and plans."""
    if not _can_name_a_backbone(backbone_id):
        raise InputError(f"{backbone_id!r} cannot name a backbone: use letters, digits, '_' and '-'.")


def save_backbone(contract: BackboneContract, weights: dict[str, torch.Tensor], folder: Path) -> BackboneContract:
    """Write weights and contract, the contract last and atomically, so that a backbone is listed only when whole.

    Processes that write the same id take turns.

    Raises:
        InputError: if the folder cannot be written or is full; nothing half-written is left.
    """
    from filelock import FileLock
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(folder)
    file, card = folder / f"{contract.id}.safetensors", folder / f"{contract.id}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # the weights are renamed first; in between, readers refuse them, since they are not the old contract's
        with FileLock(folder / f"{contract.id}.lock"), replacing(card) as new_card, replacing(file) as new_file:
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, new_file)
            contract = replace(contract, sha256=sha256_of(new_file))
            new_file.chmod(0o644)  # safetensors makes files that only their owner can read
            new_card.write_text(contract.to_json())
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"Backbone {contract.id!r} was not stored in {folder} ({error}): make room there, or choose another folder "
            "with the environment variable fseft_backbones."
        ) from error
    return contract


def remove_backbone(backbone_id: str) -> list[Path]:
    """Delete a backbone of the user's folder; returns the files that are gone.

    Raises:
        InputError: if it is not there or cannot be deleted, and for an id that cannot name one, e.g. a path.
    """
    check_id(backbone_id)
    folder = user_folder()
    own = [name for name, file in known_backbones().items() if file.parent == folder]
    if backbone_id not in own:
        raise InputError(f"{folder} holds no backbone {backbone_id!r}; your own are: {', '.join(own) or 'none'}.")
    files = [folder / f"{backbone_id}.{ending}" for ending in ("json", "safetensors", "lock", "download.lock")]
    gone = [file for file in files if file.exists()]
    try:
        for file in gone:
            file.unlink()
    except OSError as error:
        raise InputError(
            f"{file} cannot be deleted ({error.strerror}): delete it with the required permissions."
        ) from error
    return gone
