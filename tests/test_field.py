"""The faults that people's own files brought to light: each script of FSEFT_SHARED/field, and what happens now."""

import json
import runpy
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from field_files import assert_aligned

from fsefs_nnunet.cli.main import main

pytestmark = pytest.mark.slow
PLAN = ["plan_and_preprocess", "--shots", "2", "--num_queries", "2", "-np", "1", "-d"]

PLANNED = {  # None: aligned, and nothing is warned of
    "05-label-other-orientation": None,
    "07-label-other-origin": "The headers of case_2, case_3 place files of one case up to 123 mm apart",
    "10-shear-later-case": None,
    "28-macos-files": None,
    "49-numTraining": None,
}
REFUSED = {
    "06-label-affine-lost": "labelsTr/case_2.nii.gz does not lie on the grid of",
    "09-codes-zero": "labelsTr/case_3.nii.gz does not lie on the grid of",
    "16-zero-spacing": "case_1_0000.nii.gz has a voxel spacing (pixdim) of 2 x 2 x 0 mm",
    "20-uint16-offset": "case_3_0000.nii.gz: no value below 0, unlike CT in HU",
    "30-no-channel-number": "case_0.nii.gz has no channel number: expected nnU-Net's naming, case_0_0000.nii.gz",
    "31-one-without-channel": "patient9.nii.gz has no channel number: expected nnU-Net's naming, patient9_0000.nii.gz",
    "32-labels-with-gap": "labels must be in consecutive order (0, 1, 2, ...), 3 do not satisfy this",
    "35-background-not-0": 'background is 1: it must be "background": 0',
    "40-channels-reversed": 'swapped: write "channel_names": {"0": "CT"}',
    "42-regions-no-order": "regions need regions_class_order",
    "46-ignore-not-highest": "the ignore label is 1, it must be the highest value",
    "91-ending-no-dot": 'has no dot: write "file_ending": ".nii.gz"',
}


@pytest.fixture
def make(shared, raw, monkeypatch):
    """Run a script; returns the folder that it writes to, which nnU-Net's variables name."""
    if not (shared / "field").is_dir():
        pytest.skip(f"{shared / 'field'} is missing: this test runs its scripts.")

    def run(name: str) -> Path:
        monkeypatch.setattr(sys, "argv", [name, str(raw.parent)])
        monkeypatch.syspath_prepend(str(shared / "field"))
        sys.modules.pop("base", None)  # it reads the arguments
        runpy.run_path(str(shared / "field" / f"{name}.py"))
        return raw.parent

    return run


@pytest.mark.parametrize("name", PLANNED)
def test_planned(make, raw, capsys, name):
    make(name)
    assert main([*PLAN, "4"]) == 0
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning")]
    assert [line.startswith(f"Warning: {PLANNED[name]}") for line in warned] == [True] * (PLANNED[name] is not None)
    assert_aligned(raw)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(make, raw, capsys, name):
    make(name)
    assert main([*PLAN, "4"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("fseft: ") and REFUSED[name] in said
    assert not list((raw.parent / "nnUNet_preprocessed").iterdir())


def test_constant_images(make, capsys):
    make("22-empty-image")
    assert main([*PLAN, "4"]) == 2
    assert "case_1_0000.nii.gz is constant (-1024)" in capsys.readouterr().err


def test_nothing_but_a_leftover(make):
    make("29-ds-store-in-imagesTs")
    assert main([*PLAN, "4"]) == 0


def sound_dataset(raw) -> None:
    """Into the folders of the script that ran last."""
    sys.modules["base"].dataset()


@pytest.fixture
def zero_shot(make, raw, capsys):
    """Segment what a script wrote; returns the exit status, what was printed, and the label maps."""

    def run(name: str) -> tuple[int, str, dict[str, np.ndarray]]:
        root = make(name)
        sound_dataset(raw)
        code = main(["zero_shot", "-d", "4", "-i", str(root / "images"), "-o", str(root / "out")])
        told = capsys.readouterr()
        made = {file.name[:-7]: nib.load(file) for file in sorted((root / "out").glob("*.nii.gz"))}
        return code, told.out + told.err, made

    return run


def test_queries_of_unusual_geometry(zero_shot, raw):
    code, told, made = zero_shot("50-queries-geometry")
    assert code == 0 and len(made) == 11
    assert "codes_zero_0000.nii.gz: the header does not define the orientation" in told
    assert "disagree_0000.nii.gz: sform and qform of the header disagree, the sform is used" in told
    for case, label in made.items():
        image = nib.load(raw.parent / "images" / f"{case}_0000.nii.gz")
        assert label.shape == image.shape and np.allclose(label.affine, image.affine, atol=1e-4)


def test_queries_whose_pixdim_is_wrong(zero_shot, raw):
    """Segmented as the same volumes with sound headers."""
    code, told, made = zero_shot("51-pixdim-disagrees")
    assert code == 0 and "q_20_0000.nii.gz, " in told and "pixdim of the header disagrees with the sform" in told
    for file in (raw.parent / "images").iterdir():
        image = nib.load(file)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine), file)
    assert main(["zero_shot", "-d", "4", "-i", str(raw.parent / "images"), "-o", str(raw.parent / "sound")]) == 0
    for case, label in made.items():
        np.testing.assert_array_equal(label.dataobj, nib.load(raw.parent / "sound" / f"{case}.nii.gz").dataobj)


def test_broken_queries(zero_shot):
    code, told, made = zero_shot("52-queries-broken")
    assert code == 2 and "Traceback" not in told and "fseft: 10 case(s) failed" in told
    assert sorted(made) == ["constant", "offset", "one_slice", "q_20", "tiny", "zeros"]
    assert not any(np.asarray(made[case].dataobj).any() for case in ("constant", "zeros"))


def test_the_dataset_key(make, monkeypatch, raw, capsys):
    monkeypatch.setenv("FIELD_DATA", str(raw.parent / "else where"))
    make("66-dataset-key")
    assert main([*PLAN, "4"]) == 0
    assert_aligned(raw)
    for number, said in ((5, "/nowhere/seg.nii.gz does not exist"), (6, "case 'case_2'"), (7, "case 'case_2'")):
        capsys.readouterr()
        assert main([*PLAN, str(number)]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.delenv("FIELD_DATA")
    assert main([*PLAN, "4"]) == 2
    assert "the environment variable FIELD_DATA is not set" in capsys.readouterr().err


def test_lits(make, raw):
    root = make("72-lits")
    left_out = {}
    for number, options in ((20, []), (21, ["--resample_labels"]), (22, ["--image_header"])):
        assert main(["convert", "LiTS", "-i", str(root / "download"), "-d", str(number), "-np", "1", *options]) == 0
        summary = json.loads((raw / f"Dataset{number:03d}_LiTS" / "conversion.json").read_text())
        left_out[number] = list(summary["left out"])
    assert left_out == {20: ["volume-1"], 21: ["volume-1"], 22: []}
    folder = raw / "Dataset022_LiTS"
    image, label = (
        nib.load(folder / part).get_fdata() for part in ("imagesTr/volume-1_0000.nii", "labelsTr/volume-1.nii")
    )
    np.testing.assert_array_equal(image > 100, label > 0)


def test_empty_labels(make, capsys):
    make("82-empty-labels")
    assert main([*PLAN, "4"]) == 0
    assert main([*PLAN, "5"]) == 2
    assert "Dataset005_None shows anything but background" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "member, said",
    [
        (102, "labels must be in consecutive order (0, 1, 2, ...), 3"),
        (103, "Dataset103_C/labelsTr/case_0.nii.gz does not lie on the grid of"),
        (104, None),
        (105, "Dataset105_E/labelsTr/case_0.nii.gz does not lie on the grid of"),
        (106, "Dataset106_F/labelsTr/case_0.nii.gz holds values that are not integers, 1.00001526, 2: round"),
    ],
)
def test_assemblies(make, capsys, member, said):
    make("88-assemble")
    argv = ["assemble", "-d", "101", str(member), "-o", "900", "--template", "union", "-np", "1"]
    assert main(argv) == (2 if said else 0)
    told = capsys.readouterr()
    if said:
        assert said in told.err.splitlines()[-1]
    else:
        assert "D_case_0 is the same patient as A_case_0" in told.out


def test_no_script_is_left_out(shared):
    scripts = {f.stem for f in (shared / "field").glob("[0-9]*.py")}
    own = Path(__file__).read_text("utf-8")
    assert scripts and all(f'"{name}"' in own for name in scripts)
