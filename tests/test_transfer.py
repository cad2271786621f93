"""`fseft bank --verify`, `--export` and `--import`."""

import json
import os
import zipfile

import numpy as np
import pytest
from banks import make_bank, make_images, request_of, requests

from fsefs_nnunet.cli.main import main
from fsefs_nnunet.features.disk import BANK_FOLDER

DATASET = "Dataset009_Bank"


@pytest.fixture
def machines(tmp_path, monkeypatch, backbone):
    """Two preprocessed folders of one dataset, and a function that chooses one; the first has a filled bank."""

    def choose(name: str):
        folders = {n: tmp_path / name / n for n in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        for variable, folder in folders.items():
            (folder / DATASET).mkdir(parents=True, exist_ok=True)
            monkeypatch.setenv(variable, str(folder))
        preprocessed = folders["nnUNet_preprocessed"] / DATASET
        kwargs = {"backbone": "phantom", "sha256": backbone.contract.sha256}
        plans = {"configurations": {"3d_fullres_5shot": {"architecture": {"arch_kwargs": kwargs}}}}
        (preprocessed / "FSEFTPlans.json").write_text(json.dumps(plans))
        (preprocessed / "splits_final.json").write_text("[]")
        (folders["nnUNet_raw"] / DATASET / "dataset.json").write_text("{}")
        return make_bank(preprocessed / BANK_FOLDER, backbone), make_images(preprocessed)

    bank, images = choose("gpu")
    bank.fill(requests(images))
    return choose, tmp_path / "bank.zip"


def test_a_bank_moves_to_another_machine(machines, capsys):
    choose, file = machines
    assert main(["bank", "-d", "9", "--export", str(file)]) == 0
    laptop, images = choose("laptop")
    assert main(["bank", "-d", "9", "--import", str(file)]) == 0
    assert laptop.fill(requests(images)) == 0 and laptop.windows == 0
    gpu, images = choose("gpu")
    gpu.fill(requests(images))
    assert np.array_equal(laptop["a"].arrays[0][0], gpu["a"].arrays[0][0])
    choose("laptop")
    assert main(["bank", "-d", "9", "--import", str(file)]) == 0
    assert "0 files imported" in capsys.readouterr().out


def test_other_images_are_computed_again(machines):
    choose, file = machines
    main(["bank", "-d", "9", "--export", str(file)])
    laptop, images = choose("laptop")
    main(["bank", "-d", "9", "--import", str(file)])
    np.save(images["a"], np.load(images["a"]) + 1)
    assert laptop.fill(requests(images)) == 1


def test_a_bank_of_another_backbone(machines, backbone, capsys):
    choose, file = machines
    main(["bank", "-d", "9", "--export", str(file)])
    root = choose("laptop")[0].root
    plans = root.parent / "FSEFTPlans.json"
    plans.write_text(plans.read_text().replace(backbone.contract.sha256, "0" * 64))
    assert main(["bank", "-d", "9", "--import", str(file)]) == 2
    assert "holds features of backbone 'phantom' of SHA-256" in capsys.readouterr().err
    assert not root.exists()


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def text(file):
    file.write_text("no archive")


def climbing(file):
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("../evil.npy", b"")


def absolute(file):
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("/evil.npy", b"")


def roundabout(file):
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("phantom_1//evil.npy", b"")


def described_by_nothing(file):
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("phantom_1/evil.json", "[]")


def scrambled(file):
    """Compressed by hand, then altered."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("phantom_1/a.npy", bytes(range(256)) * 1000)
    content = bytearray(file.read_bytes())
    content[60:200] = b"\xff" * 140
    file.write_bytes(content)


def missing(file):
    file.unlink()


def folder(file):
    file.unlink(), file.mkdir()


@pytest.mark.parametrize(
    "damage, said",
    [
        (cut, "is damaged"),
        (text, "is damaged"),
        (scrambled, "is damaged"),
        (described_by_nothing, "is damaged"),
        (climbing, "was not written by"),
        (absolute, "was not written by"),
        (roundabout, "was not written by"),
        (missing, "does not exist"),
        (folder, "is a folder"),
    ],
)
def test_files_that_nobody_exported(machines, capsys, damage, said):
    choose, file = machines
    main(["bank", "-d", "9", "--export", str(file)])
    root = choose("laptop")[0].root
    damage(file)
    assert main(["bank", "-d", "9", "--import", str(file)]) == 2
    error = capsys.readouterr().err
    assert said in error and str(file) in error and "Traceback" not in error
    assert not [*root.rglob("*.np*"), *root.rglob("*.part")]


@pytest.mark.parametrize("name", [".", "nowhere/bank.zip"])
def test_an_export_that_cannot_be_written(machines, tmp_path, capsys, name):
    assert main(["bank", "-d", "9", "--export", str(tmp_path / name)]) == 2
    assert "cannot be written: give a file in a folder" in capsys.readouterr().err


def test_nothing_to_export(machines, capsys):
    choose, file = machines
    choose("laptop")
    assert main(["bank", "-d", "9", "--export", str(file)]) == 2
    assert "There is no feature bank in" in capsys.readouterr().err and not file.exists()


def test_damage_that_neither_size_nor_time_shows(machines, capsys):
    choose, _ = machines
    bank, images = choose("gpu")
    bank.fill(requests(images))
    (npy,) = bank.folder.glob("a_*[0-9a-f].npy")
    before, content = npy.stat(), bytearray(npy.read_bytes())
    content[-1] ^= 64
    npy.write_bytes(content)
    os.utime(npy, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert bank.fill(requests(images)) == 0
    assert main(["bank", "-d", "9", "--verify"]) == 0
    said = capsys.readouterr().out
    assert "2 entries" in said and f"Removed: {npy.stem}" in said
    assert make_bank(bank.root, bank.backbone).fill(requests(images)) == 1
    assert main(["bank", "-d", "9", "--verify"]) == 0 and "0 of them damaged" in capsys.readouterr().out


def test_an_altered_label_map_of_a_view(machines, capsys):
    choose, _ = machines
    bank, images = choose("gpu")
    labels = np.zeros((1, 16, 16, 20), np.int8)
    bank.fill([request_of("v", images["a"], made={"view": 1}, labels=lambda: labels)])
    (file,) = bank.folder.glob("v_*.labels.npy")
    np.save(file, labels + 1)
    assert main(["bank", "-d", "9", "--verify"]) == 0
    assert "1 of them damaged" in capsys.readouterr().out
