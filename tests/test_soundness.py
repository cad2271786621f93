"""What the planner says of training cases, by nnU-Net's command as by ours: nothing is planned from what misleads."""

import json
import shlex
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from field_files import (
    NAME,
    RAS,
    SHAPE,
    add_offset,
    array_of,
    assert_aligned,
    disagree,
    files_of,
    forget_pixdim,
    forget_sides,
    image_of,
    label_of,
    lose_header,
    plan_and_preprocess,
    preprocessed,
    set_pixdim,
    shift,
    turn,
    write,
    write_dataset,
)
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from fsefs_nnunet.backbones.store import load_weights, save_backbone
from fsefs_nnunet.cases.images import read_headers, read_image
from fsefs_nnunet.cli.main import main
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.planners.fseft_planner import FSEFTPlanner


@pytest.fixture
def dataset(raw):
    return write_dataset(raw)


def check() -> FSEFTPlanner:
    """As nnU-Net's command constructs it, which checks and takes the fingerprint."""
    return FSEFTPlanner(NAME)


def warnings(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning: ")]


# ---- what is fine ----


def test_a_sound_dataset(dataset, capsys):
    planner = check()
    assert not warnings(capsys)
    assert planner.dataset_fingerprint["spacings"] == [[3, 2, 2]] * 3
    assert planner.dataset_fingerprint["shapes_after_crop"] == [[13, 15, 16]] * 3


@pytest.mark.slow
def test_stored_orientations(dataset, raw, capsys):
    """Labels along other axes than their images; nnU-Net's own check reads both as stored and refuses them."""
    for case, axes in enumerate(("LPS", "PSR", "LAI")):
        turn(label_of(dataset, case), axes)
    turn(image_of(dataset, 1), "SPL")
    assert plan_and_preprocess("--verify_dataset_integrity") == 0
    assert not warnings(capsys)
    assert_aligned(raw)


@pytest.mark.slow
def test_cosines_that_are_not_orthogonal(dataset, raw):
    """ITK, with which nnU-Net would take the fingerprint, refuses them."""
    affine = RAS.copy()
    affine[0, 1], affine[1, 2] = 0.05, 0.1
    for file in files_of(dataset, 2):
        write(file, array_of(file), affine)
    assert plan_and_preprocess() == 0
    assert_aligned(raw)


@pytest.mark.slow
def test_leftovers_of_macos(dataset, raw):
    """nnU-Net takes a twin for a case unless it has a list of the cases."""
    for folder in (dataset, dataset / "imagesTr", dataset / "labelsTr"):
        (folder / ".DS_Store").write_bytes(b"Bud1")
    for case in range(3):
        for file in files_of(dataset, case):
            file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7Mac OS X")
    assert plan_and_preprocess() == 0
    assert_aligned(raw)
    assert list(preprocessed(raw)) == ["case_0", "case_1", "case_2"]
    folder = raw.parent / "nnUNet_preprocessed" / NAME
    assert "dataset" not in json.loads((folder / "dataset.json").read_text())
    assert sorted(file.name for file in (folder / "gt_segmentations").iterdir()) == [
        f"case_{i}.nii.gz" for i in range(3)
    ]
    # with nnU-Net's commands the list stays
    check().plan_experiment()
    manager = PlansManager(str(folder / "FSEFTPlans.json"))
    manager.get_configuration("3d_fullres").preprocessor_class().run(NAME, "3d_fullres", "FSEFTPlans", 1)
    assert_aligned(raw)


def test_nothing_but_a_leftover_in_imagests(raw):
    dataset = write_dataset(raw, cases=1)
    (dataset / "imagesTs").mkdir(), (dataset / "imagesTs" / ".DS_Store").touch()
    assert main(["splits", "-d", "4", "--shots", "1"]) == 0


def test_no_numtraining(raw, capsys):
    write_dataset(raw, numTraining=None)
    assert check().dataset_json["numTraining"] == 3
    assert not warnings(capsys)


# ---- what is told ----


def test_an_origin_that_differs(dataset, capsys):
    for case in (1, 2):
        shift(label_of(dataset, case), (100, -60, 40))
    check()
    assert warnings(capsys) == [
        "Warning: The headers of case_1, case_2 place files of one case up to 123 mm apart. Their voxels are paired "
        "one by one, as in nnU-Net: check them with nnUNetv2_plot_overlay_pngs."
    ]


def test_one_warning_names_all_files_of_a_kind(dataset, capsys):
    for case in (0, 1):
        for file in files_of(dataset, case):
            forget_sides(file)
    disagree(image_of(dataset, 2))
    check()
    sides, forms = warnings(capsys)
    first = ", ".join(map(str, (*files_of(dataset, 0), image_of(dataset, 1))))
    assert sides.startswith(f"Warning: {first} and 1 more: the header does not define the orientation")
    assert forms == f"Warning: {image_of(dataset, 2)}: sform and qform of the header disagree, the sform is used."


def test_numtraining_that_differs(raw, capsys):
    folder = write_dataset(raw, numTraining=5)
    check()
    assert warnings(capsys) == [
        f"Warning: numTraining of {folder / 'dataset.json'} is 5, but 3 labelled cases were found."
    ]


@pytest.mark.parametrize("forced", ["flag", "environment"])
def test_a_ct_with_an_offset_only_if_forced(dataset, monkeypatch, capsys, forced):
    for case in (1, 2):
        add_offset(image_of(dataset, case))
    files = f"{image_of(dataset, 1)}, {image_of(dataset, 2)}"
    said = f"{files}: no value below 0, unlike CT in HU: another modality, or stored with an offset (of 1024)?"
    assert main(["plan", "-d", "4", "-np", "1"]) == 2
    error = capsys.readouterr().err
    assert said in error and "--accept_positive_ct" in error and "fseft_accept_positive_ct=1" in error
    if forced == "environment":
        monkeypatch.setenv("fseft_accept_positive_ct", "1")
        check()
    else:
        assert main(["plan", "-d", "4", "-np", "1", "--accept_positive_ct"]) == 0
    assert warnings(capsys) == [f"Warning: {said}"]


def test_other_modalities_may_be_positive(raw, monkeypatch, contract, backbones):
    save_backbone(replace(contract, id="mr", channel_names=("MRI",)), load_weights(contract), backbones)
    dataset = write_dataset(raw, channel_names={"0": "MRI"})
    add_offset(image_of(dataset, 1))
    assert FSEFTPlanner(NAME, backbone="mr").shots


# ---- what is refused ----


def empty(dataset) -> None:
    for case in range(3):
        write(label_of(dataset, case), np.zeros(SHAPE, np.uint8))


def of_values(change):
    def replace_label(dataset) -> None:
        write(label_of(dataset, 2), change(array_of(label_of(dataset, 2))))

    return replace_label


def scaled(dataset) -> None:
    """Floats stored as integers with a slope."""
    image = nib.Nifti1Image(array_of(label_of(dataset, 2)).astype(np.float64), RAS)
    image.header.set_data_dtype(np.int16)
    nib.save(image, label_of(dataset, 2))


def both(change):
    def of_image_and_label(dataset) -> None:
        for file in files_of(dataset, 2):
            change(file)

    return of_image_and_label


def link(dataset) -> None:
    label_of(dataset, 2).unlink()
    label_of(dataset, 2).symlink_to("/nowhere/label.nii.gz")


REFUSED = {
    "lost header": (
        lambda d: lose_header(d, 2),
        r"labelsTr/case_2\.nii\.gz does not lie on the grid of .*`fseft rewrite_header LOST --from OTHER`",
    ),
    "sides in one header": (lambda d: forget_sides(image_of(d, 2)), r"labelsTr/case_2.* does not lie on the grid of"),
    "label of another shape": (
        of_values(lambda x: x[:, :, 1:]),
        "16 x 15 x 12 voxels .* If both headers are right, resample",
    ),
    "pixdim": (
        both(forget_pixdim),
        r"case_2_0000\.nii\.gz has a spacing of 1 x 1 x 1 mm in pixdim and of 2 x 2 x 3 mm ",
    ),
    "pixdim of the label": (
        lambda d: forget_pixdim(label_of(d, 2)),
        r"labelsTr/case_2\.nii\.gz has a spacing of 1 x 1",
    ),
    "pixdim of 0": (
        both(lambda file: set_pixdim(file, 2, 0)),
        r"case_2_0000\.nii\.gz has a voxel spacing \(pixdim\) of",
    ),
    "constant image": (
        lambda d: write(image_of(d, 2), np.full(SHAPE, -1024, np.int16)),
        r"case_2_0000\.nii\.gz is constant \(-1024\): repair it, or leave the case out",
    ),
    "all labels empty": (empty, r"No label map of .*Dataset004_Field shows anything but background"),
    "unknown value": (
        of_values(lambda x: x + 2),
        r"case_2\.nii\.gz holds the values 3, 4, but dataset\.json names 0, 1, 2: renumber",
    ),
    "half a label": (of_values(lambda x: x / np.float32(2)), "holds values that are not integers, 0.5: round them"),
    "NaN label": (of_values(lambda x: np.where(x == 1, np.nan, x)), "case_2.nii.gz holds NaN: repair the label map"),
    "scaled label": (scaled, r"not integers, 1\.0000\d+: round them and save it as integers, with a slope of 1"),
    "broken link": (link, r"labelsTr/case_2\.nii\.gz is a broken link to /nowhere/label\.nii\.gz: restore"),
    "no label": (lambda d: label_of(d, 2).unlink(), r"labelsTr/case_2\.nii\.gz is missing: every training image needs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(dataset, raw, name):
    spoil, sentence = REFUSED[name]
    spoil(dataset)
    with pytest.raises(InputError, match=sentence):
        check()
    assert not list((raw.parent / "nnUNet_preprocessed").iterdir())


def test_all_faulty_cases_are_named(dataset):
    lose_header(dataset, 0)
    forget_pixdim(label_of(dataset, 2))
    with pytest.raises(InputError, match=r"case_0\.nii\.gz does not lie on .* Other cases have faults, too: case_2\."):
        check()


@pytest.mark.parametrize("scale", [0.1, 10])
def test_a_spacing_in_other_units(dataset, scale):
    """In cm: every number is right but for a factor, which one case alone has."""
    for file in files_of(dataset, 1):
        write(file, array_of(file), np.diag([scale, scale, scale, 1]) @ RAS)
    with pytest.raises(
        InputError, match=r"case_1_0000\.nii\.gz spans .* mm according to its header, the dataset's images 30 x 32 x 39"
    ):
        check()


def test_fields_of_view_that_differ_along_one_axis(dataset):
    """Of a chest and a whole body."""
    for file in files_of(dataset, 1):
        write(file, np.concatenate([array_of(file)] * 7, axis=2))
    check()


def test_a_label_that_no_case_shows(dataset, capsys):
    for case in range(3):
        write(label_of(dataset, case), np.where(array_of(label_of(dataset, case)) == 1, 1, 0).astype(np.uint8))
    check()
    assert warnings(capsys) == [f"Warning: No label map of {dataset} shows kidney_left."]


def test_regions_that_hide_each_other(raw, capsys):
    labels = {"background": 0, "kidney_left": 2, "kidneys": [1, 2]}
    write_dataset(raw, labels=labels, regions_class_order=[2, 1])
    check()
    (warning,) = warnings(capsys)
    assert "2 becomes 1. Outer regions come first" in warning


def test_channels_on_other_grids(raw):
    dataset = write_dataset(raw, channel_names={"0": "CT", "1": "CT"})
    for case in range(3):
        shutil.copy(image_of(dataset, case), dataset / "imagesTr" / f"case_{case}_0001.nii.gz")
    second = dataset / "imagesTr" / "case_0_0001.nii.gz"
    files = [str(image_of(dataset, 0)), str(second)]
    headers, offset = read_headers(files, "NibabelIOWithReorient")
    assert len(headers) == 2 and offset == 0
    shift(second, (0, 30, 40))
    assert read_headers(files, "NibabelIOWithReorient")[1] == pytest.approx(50)
    write(second, array_of(second), np.eye(4))
    with pytest.raises(InputError, match=r"case_0_0001\.nii\.gz does not lie on the grid of .*case_0_0000\.nii\.gz"):
        read_headers(files, "NibabelIOWithReorient")


@pytest.mark.parametrize("what", ["first", "second", "affine"])
def test_channels_of_other_spacings(raw, what):
    """nnU-Net's readers raise an error without a word; the commands in the message mend it."""
    dataset = write_dataset(raw)
    second = dataset / "imagesTr" / "case_0_0001.nii.gz"
    write(second, array_of(image_of(dataset, 0)), RAS * np.array([1.001, 1.001, 1.001, 1]) if what == "affine" else RAS)
    files = [str(image_of(dataset, 0)), str(second)]
    if what != "affine":  # rounded by a program, within what is no contradiction
        rounded = nib.load(files[what == "second"], mmap=False)
        rounded.header["pixdim"][1:4] = (2.003, 2.003, 3)
        nib.save(nib.Nifti1Image(rounded.dataobj, rounded.affine, rounded.header), files[what == "second"])
    with pytest.raises(InputError, match="case_0_0001.nii.gz and .*case_0_0000.nii.gz differ in spacing") as error:
        read_image(NibabelIOWithReorient(), files)
    for command in str(error.value).split("Rewrite both: ")[1].split(" && "):
        assert main(shlex.split(command.removeprefix("fseft "))) == 0
    image, _ = read_image(NibabelIOWithReorient(), files)
    np.testing.assert_array_equal(image[0], image[1])
