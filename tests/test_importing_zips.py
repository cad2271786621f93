"""Exported models as backbones."""

import errno
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from nnunet_models import (
    FOLDER,
    write_checkpoint,
    write_model,
)

from fsefs_nnunet.backbones.published.nnunet_models import import_nnunet_model
from fsefs_nnunet.errors import InputError


def export(folder: Path, file: Path) -> Path:
    """As nnUNetv2_export_model_to_zip does, which calls this on each file of interest."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.write(path, os.path.relpath(path, folder))
    return file


def test_zip_is_the_folder(tmp_path, backbones, model, capsys):
    (model.folder / "fold_1").mkdir()
    shutil.copy(model.folder / "fold_0" / "checkpoint_final.pth", model.folder / "fold_1")
    aside = model.folder / "crossval_results_folds_0_1"
    aside.mkdir()
    shutil.copy(model.folder / "plans.json", aside)
    file = export(tmp_path / "results", tmp_path / "model.zip")
    from_folder = import_nnunet_model("mine", model.folder, backbones)
    from_zip = import_nnunet_model("mine", file, tmp_path / "other")
    assert from_zip == from_folder
    assert f"{file}/{FOLDER}/fold_0/checkpoint_final.pth" in capsys.readouterr().out
    import_nnunet_model("second", file, backbones, fold="1")
    assert f"{file}/{FOLDER}/fold_1/checkpoint_final.pth" in capsys.readouterr().out


def test_zip_of_several_models(tmp_path, backbones, model):
    lowres = model.folder.parent / "nnUNetTrainer__nnUNetPlans__3d_lowres"
    write_model(lowres, ["CT"], spacing=[8.0, 4.0, 3.0])
    file = export(tmp_path / "results", tmp_path / "model.zip")
    with pytest.raises(ValueError, match=r"model\.zip holds 2 models, .*__3d_fullres, .*__3d_lowres: choose"):
        import_nnunet_model("mine", file, backbones)
    assert import_nnunet_model("mine", file, backbones, configuration="3d_lowres").spacing == (8.0, 4.0, 3.0)
    with pytest.raises(ValueError, match=r"model\.zip holds no nnU-Net model of 2d with fold_X/checkpoint_final\.pth"):
        import_nnunet_model("mine", file, backbones, configuration="2d")


@pytest.mark.parametrize("member", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:\\evil.txt"])
def test_zip_with_a_member_that_points_outside(tmp_path, backbones, model, member):
    file = export(tmp_path / "results", tmp_path / "model.zip")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(member, "")
    with pytest.raises(ValueError) as error:
        import_nnunet_model("mine", file, backbones)
    assert f"model.zip was not unpacked: its member {member!r} points outside the folder. Take the zip" in str(
        error.value
    )
    assert not backbones.exists() and not list(tmp_path.rglob("evil.txt"))


class RunsCode:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_zip_with_a_checkpoint_that_would_run_code(tmp_path, backbones, model):
    witness, weights = tmp_path / "ran", model.folder / "fold_0" / "checkpoint_final.pth"
    write_checkpoint(weights, model.network, model.plans, logging=RunsCode(f"touch {witness}"))
    file = export(tmp_path / "results", tmp_path / "model.zip")
    with pytest.raises(ValueError, match=rf"^{file}/{FOLDER}/fold_0/checkpoint_final\.pth was not opened"):
        import_nnunet_model("mine", file, backbones)
    assert not witness.exists() and not backbones.exists()
    torch.load(weights, weights_only=False)
    assert witness.exists()  # so it was dangerous


def test_damaged_zips(tmp_path, backbones, model):
    file = export(tmp_path / "results", tmp_path / "model.zip")
    content = bytearray(file.read_bytes())
    flipped = content.copy()
    with zipfile.ZipFile(file) as archive:
        start = archive.getinfo(f"{FOLDER}/fold_0/checkpoint_final.pth").header_offset
    flipped[start + 200] ^= 255
    for damaged in (content[: len(content) // 2], flipped, b"", b"<html>404</html>"):
        file.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"model\.zip is damaged or not a plain zip .*: export or download it again"
        ):
            import_nnunet_model("mine", file, backbones)
    assert not backbones.exists()


def test_no_room_to_unpack_a_zip(tmp_path, backbones, model, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = export(tmp_path / "results", tmp_path / "model.zip")
    monkeypatch.setattr(zipfile.ZipFile, "extract", full)
    with pytest.raises(
        InputError, match=r"model\.zip could not be unpacked in .* \(.*No space left.*\): make room .*TMPDIR"
    ):
        import_nnunet_model("mine", file, backbones)
