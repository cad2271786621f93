"""The ways to a backbone: a public checkpoint, fetched or at hand, or a nnU-Net model."""

from __future__ import annotations

from pathlib import Path

from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.downloading import download
from fsefs_nnunet.backbones.import_published import import_published
from fsefs_nnunet.backbones.importing import import_nnunet_model
from fsefs_nnunet.backbones.zoo import ZOO
from fsefs_nnunet.errors import InputError


def import_backbone(
    backbone_id: str, path: Path, target: Path, fold: str, checkpoint: str, configuration: str
) -> BackboneContract:
    """Import the nnU-Net model in a folder or .zip, or the checkpoint in any other file.

    Raises:
        InputError: as import_nnunet_model and import_published do, and for a nnU-Net model under a public name.
    """
    if path.is_file() and path.suffix.lower() != ".zip":
        return import_published(backbone_id, path, target)
    if backbone_id in ZOO:
        raise InputError(
            f"{backbone_id!r} is a public backbone, whose file is {ZOO[backbone_id].file}, and {path} is none: give "
            "that file, or another name."
        )
    return import_nnunet_model(backbone_id, path, target, fold, checkpoint, configuration)


def download_backbone(backbone_id: str, target: Path) -> BackboneContract:
    """Fetch a public checkpoint into `target`, import it, and delete the file.

    Raises:
        InputError: as download and import_published do, and for an id that is not in the zoo.
    """
    if backbone_id not in ZOO:
        raise InputError(f"{backbone_id!r} is no public backbone that is known here; there are: {', '.join(ZOO)}.")
    file = download(ZOO[backbone_id], target)
    contract = import_published(backbone_id, file, target)
    file.unlink()  # not before: what failed may be repaired without fetching it again
    return contract
