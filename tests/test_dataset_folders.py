"""Which folder a dataset's id or name means, and which files its cases are."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from field_files import array_of, image_of, label_of, write, write_dataset

from fsefs_nnunet.cases.dataset_json import read_dataset_json
from fsefs_nnunet.cases.folders import (
    dataset_folders,
    dataset_name,
    made_folder,
    model_folder,
    training_files,
    warnings_of_cases,
)
from fsefs_nnunet.cases.images import list_images
from fsefs_nnunet.datasets.building import new_dataset
from fsefs_nnunet.errors import InputError


@pytest.fixture
def dataset(raw):
    return write_dataset(raw)


def cases_of(folder) -> dict:
    return training_files(folder, read_dataset_json(folder / "dataset.json"))


# ---- ids and names ----


@pytest.mark.parametrize("named", [4, "4", "004", "Dataset004_Field"])
def test_a_dataset_by_id_and_by_name(dataset, named):
    assert dataset_folders(named)[:2] == ("Dataset004_Field", dataset)


@pytest.mark.parametrize("named", [4, "Dataset004_Field"])
@pytest.mark.parametrize(
    "other",
    ["nnUNet_raw/Dataset004_Other", "nnUNet_results/Dataset004_Old", "nnUNet_preprocessed/Dataset004_Old"],
)
def test_two_datasets_of_one_id(dataset, raw, named, other):
    (raw.parent / other).mkdir()
    with pytest.raises(InputError) as error:
        dataset_folders(named)
    assert "Dataset id 4 is used by" in str(error.value)
    assert str(dataset) in str(error.value) and str(raw.parent / other) in str(error.value)


@pytest.mark.parametrize("named", [123, "Dataset123_Field"])
def test_four_digits_beside_three(raw, named):
    """nnU-Net looks for the beginning of the name."""
    write_dataset(raw, name="Dataset123_Field")
    (raw / "Dataset1234_Other").mkdir()
    with pytest.raises(InputError, match="Dataset123_Field and .*Dataset1234_Other: rename all but one"):
        dataset_folders(named)


@pytest.mark.parametrize(
    "name, asked, sentence",
    [
        ("Dataset4_Field", 4, "ids have three digits, rename .*Dataset4_Field to Dataset004_Field"),
        ("Dataset4_Field", "Dataset4_Field", "Dataset4_Field is not an nnU-Net dataset name: .* three-digit id"),
        ("Dataset1234_Field", "Dataset1234_Field", "Dataset1234_Field is not an nnU-Net dataset name"),
        ("Dataset1234_Field", 1234, "1234 is not an nnU-Net dataset name: .* id from 001 to 999"),
        ("Dataset004_Field", 5, "No dataset 5 in .*nnUNet_raw: there are Dataset004_Field"),
        ("Dataset004_Field", "Dataset004_Fields", "No dataset Dataset004_Fields in .*: there are Dataset004_Field"),
        ("Dataset004_Field", "Hippocampus", "No dataset Hippocampus in .*: give an id, 4 for example, or a name"),
    ],
)
def test_names_that_are_none(raw, name, asked, sentence):
    write_dataset(raw, name=name)
    with pytest.raises(InputError, match=sentence):
        dataset_folders(asked)


def test_a_model_by_its_own_name(raw):
    """Prediction needs no id that is the dataset's own."""
    for name in ("Dataset004_Field", "Dataset004_Old"):
        (raw.parent / "nnUNet_results" / name).mkdir()
    model = model_folder("Dataset004_Old", "T", "P", "C")
    assert model == raw.parent / "nnUNet_results" / "Dataset004_Old" / "T__P__C"
    with pytest.raises(InputError, match="Dataset id 4 is used by"):
        model_folder(4, "T", "P", "C")


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_environment_variables(dataset, monkeypatch, variable):
    monkeypatch.setenv(variable, "")
    with pytest.raises(InputError, match=f"The environment variable {variable} is empty: export {variable}=FOLDER"):
        dataset_folders(4)
    monkeypatch.delenv(variable)
    with pytest.raises(InputError, match=f"The environment variable {variable} is not set: export"):
        dataset_folders(4)
    monkeypatch.setenv("nnUNet_raw", "/nowhere"), monkeypatch.setenv("nnUNet_preprocessed", "/nowhere")
    with pytest.raises(InputError, match="nnUNet_raw is /nowhere, which is not a folder"):
        dataset_folders(4)


def test_a_new_dataset_needs_its_folder(raw, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "")
    with pytest.raises(InputError, match="nnUNet_raw is empty"):
        new_dataset(7, "X")
    with pytest.raises(InputError, match="nnUNet_raw is empty"):
        dataset_name("X", "nnUNet_raw")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/Dataset004 cannot be written to .*: check nnUNet_preprocessed"):
        made_folder(tmp_path / "file" / "Dataset004")


# ---- images in a folder ----


def listed(folder):
    return list_images(folder / "imagesTr", read_dataset_json(folder / "dataset.json"))


def faults(folder) -> list[str]:
    return [str(fault) for fault in listed(folder).faults.values()]


def test_sound_images(dataset):
    found = listed(dataset)
    assert list(found.cases) == ["case_0", "case_1", "case_2"] and not found.faults
    assert found.cases["case_1"] == [str(image_of(dataset, 1))]


def test_leftovers_of_macos_and_what_is_no_volume_are_left_out(dataset):
    for name in (".DS_Store", "._case_0_0000.nii.gz", ".hidden_0000.nii.gz", "readme.txt", "preview.png"):
        (dataset / "imagesTr" / name).write_bytes(b"\0\5\x16\7")
    assert list(listed(dataset).cases) == ["case_0", "case_1", "case_2"] and not faults(dataset)


def test_a_broken_link(dataset):
    image_of(dataset, 3).symlink_to("/nowhere/x.nii.gz")
    (said,) = faults(dataset)
    assert said == (
        f"{image_of(dataset, 3)} is a broken link to /nowhere/x.nii.gz: restore that file, or remove the case."
    )
    assert list(listed(dataset).cases) == ["case_0", "case_1", "case_2"]


def test_a_file_in_two_formats(dataset):
    """Nobody knows which one is meant."""
    write(dataset / "imagesTr" / "case_1_0000.nii", array_of(image_of(dataset, 1)))
    assert faults(dataset) == [f"{image_of(dataset, 1)} exists twice, also as case_1_0000.nii: keep one."]
    assert list(listed(dataset).cases) == ["case_0", "case_2"]


@pytest.mark.parametrize("name", ["other_0000.nii", "other.nrrd", "OTHER_0000.NII.GZ"])
def test_another_file_ending(dataset, name):
    (dataset / "imagesTr" / name).touch()
    (said,) = faults(dataset)
    assert said == (
        f"{dataset / 'imagesTr' / name} does not end with .nii.gz, the file_ending of dataset.json: convert it, move "
        "it away, or correct the key."
    )


def test_no_channel_number(dataset):
    image_of(dataset, 1).rename(dataset / "imagesTr" / "case_1.nii.gz")
    (said,) = faults(dataset)
    assert said.endswith("case_1.nii.gz has no channel number: expected nnU-Net's naming, case_1_0000.nii.gz for the "
                         "first channel.")  # fmt: skip


def test_channels_that_do_not_count_up(dataset):
    content = json.loads((dataset / "dataset.json").read_text())
    (dataset / "dataset.json").write_text(json.dumps({**content, "channel_names": {"0": "T1", "1": "T2"}}))
    for name in ("case_0_0001", "case_1_0001", "case_1_0002", "case_3_0001"):
        shutil.copy(image_of(dataset, 0), dataset / "imagesTr" / f"{name}.nii.gz")
    assert list(listed(dataset).cases) == ["case_0"]
    assert [said.split("imagesTr/")[1] for said in faults(dataset)] == [
        "case_1_0002.nii.gz is one channel too many: the dataset has 2. Move it away.",
        "case_2_0001.nii.gz is missing: every case needs 2 channel(s).",
        "case_3_0000.nii.gz is missing: every case needs 2 channel(s).",
    ]


def test_a_number_that_is_no_channel(dataset):
    image_of(dataset, 1).rename(dataset / "imagesTr" / "patient_2019.nii.gz")
    (said,) = faults(dataset)
    assert "patient_0000.nii.gz is missing: every case needs 1 channel(s). Found patient_2019.nii.gz, which may" in said


@pytest.mark.slow
@pytest.mark.parametrize("locale, code", [("C", 1), ("C.UTF-8", 0)])
def test_names_and_the_locale(dataset, locale, code):
    """nnU-Net's workers print them."""
    image_of(dataset, 0).rename(dataset / "imagesTr" / "m\u00fcller_0000.nii.gz")
    script = (
        "import sys; from pathlib import Path; from fsefs_nnunet.cases.folders import training_files; "
        "training_files(Path(sys.argv[1]), {'file_ending': '.nii.gz', 'channel_names': {'0': 'CT'}})"
    )
    plain = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", script, str(dataset)]
    done = subprocess.run(command, env={**os.environ, **plain}, capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert ("set PYTHONUTF8=1" in done.stderr) == bool(code)


def test_a_folder_without_images(dataset, tmp_path):
    content = read_dataset_json(dataset / "dataset.json")
    (tmp_path / "images").mkdir(), (tmp_path / "images" / "x.txt").touch()
    with pytest.raises(InputError, match=r"has no images named <case>_0000\.nii\.gz: expected .*, found x\.txt"):
        list_images(tmp_path / "images", content)
    with pytest.raises(InputError, match="none does not exist. Expected a folder of images"):
        list_images(tmp_path / "none", content)
    with pytest.raises(InputError, match=r"x\.txt is a file, perhaps an image: give its folder"):
        list_images(tmp_path / "images" / "x.txt", content)


# ---- training cases ----


def test_training_cases(dataset):
    assert cases_of(dataset)["case_2"] == {"images": [str(image_of(dataset, 2))], "label": str(label_of(dataset, 2))}


def test_no_training_case_vanishes(dataset):
    image_of(dataset, 3).symlink_to("/nowhere/x.nii.gz")
    (dataset / "imagesTr" / "stray.nii.gz").touch()
    with pytest.raises(InputError, match=r"stray\.nii\.gz has no channel number: .* 1 more file\(s\) have faults\."):
        cases_of(dataset)


def test_numbers_that_differ_are_warned_of(dataset):
    shutil.copy(label_of(dataset, 0), label_of(dataset, 7))
    (dataset / "labelsTr" / "._case_0.nii.gz").touch()
    content = {**read_dataset_json(dataset / "dataset.json"), "numTraining": 9}
    assert warnings_of_cases(dataset, content, cases_of(dataset)) == [
        f"numTraining of {dataset / 'dataset.json'} is 9, but 3 labelled cases were found.",
        f"{dataset / 'labelsTr'} has 1 label map(s) without an image: case_7.",
    ]


def listing(dataset, tmp_path) -> dict:
    """dataset.json's key "dataset" for images that lie elsewhere: relative, absolute, and by environment variables."""
    shutil.move(dataset / "imagesTr", tmp_path / "else where")
    shutil.move(dataset / "labelsTr", tmp_path / "else where" / "labels")
    bases = ("../../else where", str(tmp_path / "else where"), "${FIELD}")
    return {
        f"case_{i}": {"images": [f"{base}/case_{i}_0000.nii.gz"], "label": f"{base}/labels/case_{i}.nii.gz"}
        for i, base in enumerate(bases)
    }


def write_listing(dataset, entries) -> None:
    content = json.loads((dataset / "dataset.json").read_text())
    (dataset / "dataset.json").write_text(json.dumps({**content, "dataset": entries}))


def test_cases_that_lie_elsewhere(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("FIELD", str(tmp_path / "else where"))
    write_listing(dataset, listing(dataset, tmp_path))
    for i, files in enumerate(cases_of(dataset).values()):
        assert files["images"] == [str(tmp_path / "else where" / f"case_{i}_0000.nii.gz")]
        assert files["label"] == str(tmp_path / "else where" / "labels" / f"case_{i}.nii.gz")


@pytest.mark.parametrize(
    "entry, sentence",
    [
        ({"images": ["x.nii.gz"]}, r"""case 'a' under "dataset" is .*: write \{"images": \[FILE of each of 1"""),
        ({"label": "x.nii.gz"}, "case 'a' under"),
        ({"images": "x.nii.gz", "label": "x.nii.gz"}, "case 'a' under"),
        ({"images": ["x.nii.gz", "y.nii.gz"], "label": "x.nii.gz"}, "case 'a' under"),
        (3, "case 'a' under"),
        (
            {"images": ["/nowhere/x.nii.gz"], "label": "x"},
            "case 'a' names /nowhere/x.nii.gz, but /nowhere/x.nii.gz does",
        ),
        ({"images": ["$UNSET_X/x.nii.gz"], "label": "x"}, "but the environment variable UNSET_X is not set"),
    ],
)
def test_entries_that_name_no_files(dataset, entry, sentence):
    write_listing(dataset, {"a": entry})
    with pytest.raises(InputError, match=sentence):
        cases_of(dataset)


def test_a_list_of_no_case(dataset):
    write_listing(dataset, {})
    with pytest.raises(InputError, match='"dataset" lists no case'):
        cases_of(dataset)
