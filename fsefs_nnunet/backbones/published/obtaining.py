"""The ways to obtain a backbone: from a public checkpoint, downloaded or at hand, or from an nnU-Net model."""

from __future__ import annotations

import zipfile
from pathlib import Path

from fsefs_nnunet.backbones.architectures.swin_unetr import monais_swin_unetr
from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.published.downloading import by_hand, download, only_download
from fsefs_nnunet.backbones.published.importing import import_published, read_published, store_published
from fsefs_nnunet.backbones.published.model_files import refuse_nnunet_v1
from fsefs_nnunet.backbones.published.nnunet_models import import_nnunet_model
from fsefs_nnunet.backbones.store import EMBEDDED
from fsefs_nnunet.backbones.zoo import SWIN_UNETR, ZOO
from fsefs_nnunet.errors import InputError


def import_backbone(
    backbone_id: str, path: Path, target: Path, fold: str, checkpoint: str, configuration: str
) -> BackboneContract:
    """Import the nnU-Net model in a folder or .zip, or the checkpoint in any other file.

    Raises:
        InputError: as import_nnunet_model and import_published do, for a path that does not exist, for an nnU-Net
            model under a public name, and for the name of an embedded backbone.
    """
    if (EMBEDDED / f"{backbone_id}.json").exists():
        raise InputError(f"{backbone_id!r} is the backbone that comes with the package: choose another name.")
    if not path.exists():
        raise InputError(f"{path} does not exist: give a checkpoint, or an nnU-Net model as a folder or zip.")
    refuse_nnunet_v1(path)
    if path.is_file() and _is_checkpoint(path):
        return import_published(backbone_id, path, target)
    if backbone_id in ZOO:
        raise InputError(
            f"{backbone_id!r} is a public backbone, and {path} is not its file, {ZOO[backbone_id].file}: give "
            "that file, or another name."
        )
    return import_nnunet_model(backbone_id, path, target, fold, checkpoint, configuration)


def _is_checkpoint(file: Path) -> bool:
    if file.suffix.lower() != ".zip":
        return True
    try:
        with zipfile.ZipFile(file) as archive:  # torch.save writes zips, too, and some are named .zip
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def download_backbone(backbone_id: str, target: Path) -> BackboneContract:
    """Fetch a public checkpoint into `target`, import it, and delete the file.

    Raises:
        InputError: as download and import_published do, for an id that is not in the zoo, and while another process
            downloads it.
    """
    if backbone_id not in ZOO:
        raise InputError(f"{backbone_id!r} is not a known public backbone; there are: {', '.join(ZOO)}.")
    entry, target = ZOO[backbone_id], Path(target)
    if entry.kind == SWIN_UNETR:
        monais_swin_unetr(backbone_id)  # before the download, which takes a while
    with only_download(entry, target):
        file = download(entry, target)
        try:
            checkpoint = read_published(backbone_id, file)
        except InputError as error:
            if entry.sha256:
                raise  # the file is the right one
            file.unlink()  # otherwise every later download would find it and fail
            raise InputError(
                f"{error} It was deleted: run fseft backbones download {backbone_id} again, or: {by_hand(entry)}"
            ) from error
        contract = store_published(checkpoint, target)
        file.unlink()  # only now: a failure above may be repaired without another download
    return contract
