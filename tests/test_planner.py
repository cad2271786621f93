import json
import re
from dataclasses import replace
from math import nan

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from trainings import edit

from fsefs_nnunet.backbones.store import EMBEDDED, load_weights, save_backbone
from fsefs_nnunet.cases.images import list_images
from fsefs_nnunet.cases.queries import UnlabelledQueries
from fsefs_nnunet.cli.main import main
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.methods.settings import Settings
from fsefs_nnunet.nnunet import drawing, planning
from fsefs_nnunet.planners.fseft_planner import FSEFTPlanner

CT_WINDOW = {"percentile_00_5": -175.0, "percentile_99_5": 250.0, "mean": -175.0, "std": 425.0}


def plan(workspace, **arguments) -> dict:
    """Plans from the fingerprint that is there."""
    planner = FSEFTPlanner(workspace.dataset, **arguments)
    planner.plan_experiment()
    return json.loads((workspace.preprocessed / f"{planner.plans_identifier}.json").read_text())


# ---- plans ----


def test_configurations(tiny, contract):
    plans = tiny.plans()
    assert plans["plans_name"] == "FSEFTPlans"
    # ten shots are more than there are cases; 2D and cascade are not planned
    children = ["3d_fullres_1shot", "3d_fullres_5shot", "3d_fullres_allshot"]
    assert list(plans["configurations"]) == ["3d_fullres", *children, *(f"{name}_scratch" for name in children)]
    baseline = plans["configurations"]["3d_fullres_5shot_scratch"]
    assert baseline.pop("architecture")["arch_kwargs"] == contract.architecture["arch_kwargs"]
    assert baseline == {"inherits_from": "3d_fullres", "fseft_shots": 5, "patch_size": [40] * 3, "batch_size": 2}
    for name, shots in zip(children, (1, 5, "all")):
        child = plans["configurations"][name]
        assert child["inherits_from"] == "3d_fullres"
        assert child["fseft_shots"] == shots and child["fseft_backbone"] == "phantom"
        assert child["architecture"]["network_class_name"] == "fsefs_nnunet.methods.network.AdaptedNetwork"
        assert child["architecture"]["arch_kwargs"]["sha256"] == contract.sha256
        assert (child["fseft_lambda"], child["fseft_gamma"]) == (0.3, 0.1)
        assert (child["fseft_crops_per_step"], child["fseft_steps_per_epoch"]) == (2, 8)
        assert child["fseft_views"] == 64 and child["fseft_pool"] == [2, 2, 2]
        flat = {key: value for key, value in child.items() if key.startswith("fseft_")}
        assert not any(isinstance(value, dict) for value in flat.values())  # inherits_from is a shallow merge


def test_parent_is_stock_nnunet(tiny, workspace):
    """The architecture that nnU-Net's own planner gives the same data, without a key of ours."""
    parent = tiny.plans()["configurations"]["3d_fullres"]
    assert not [key for key in parent if key.startswith("fseft_")]
    planner = ExperimentPlanner(workspace.dataset, plans_name="Stock", suppress_transpose=True)
    planner.plan_experiment()
    stock = json.loads((workspace.preprocessed / "Stock.json").read_text())["configurations"]["3d_fullres"]
    ours, theirs = parent["architecture"], stock["architecture"]
    assert ours["network_class_name"] == theirs["network_class_name"]
    assert ours["arch_kwargs"]["features_per_stage"] == theirs["arch_kwargs"]["features_per_stage"]
    # ours is transposed: x, y, z instead of z, y, x
    assert ours["arch_kwargs"]["strides"] == [s[::-1] for s in theirs["arch_kwargs"]["strides"]]
    assert parent["patch_size"] == stock["patch_size"][::-1]
    assert parent["spacing"] == stock["spacing"][::-1]


def test_preprocessing_is_the_contracts(tiny):
    plans = tiny.plans()
    assert plans["image_reader_writer"] == "NibabelIOWithReorient"
    assert plans["transpose_forward"] == plans["transpose_backward"] == [2, 1, 0]
    assert plans["foreground_intensity_properties_per_channel"] == {"0": CT_WINDOW}
    parent = plans["configurations"]["3d_fullres"]
    assert parent["normalization_schemes"] == ["CTNormalization"]
    assert parent["resampling_fn_data_kwargs"]["order"] == 1
    assert parent["spacing"] == [10, 10, 10]


def test_no_statistics_of_the_labels_reach_the_plans(workspace, tiny):
    """The fingerprint's intensities come from all labels: other ones must not change a byte of the plans."""

    def change(fingerprint):
        for values in fingerprint["foreground_intensity_properties_per_channel"].values():
            assert values.keys() >= CT_WINDOW.keys()
            values.update({key: 1234.5 for key in values})

    edit(workspace.preprocessed / "dataset_fingerprint.json", change)
    changed = plan(workspace, shots=(1, 5, "all"))
    assert changed == tiny.plans()
    assert "1234.5" not in json.dumps(changed)


def test_mr_is_normalised_by_the_image(workspace):
    edit(workspace.raw / "dataset.json", lambda content: content.update(channel_names={"0": "MRI"}))
    plans = plan(workspace)
    assert plans["configurations"]["3d_fullres"]["normalization_schemes"] == ["ZScoreNormalization"]


@pytest.mark.parametrize(
    "median, expected",
    [
        ((32, 28, 30), [40, 40, 40]),
        ((41, 48, 63), [48, 48, 64]),
        ((64, 65, 500), [64, 64, 64]),
        ((40, 40, 2), [40, 40, 40]),
    ],
)
def test_window(workspace, median, expected):
    planner = FSEFTPlanner(workspace.dataset)
    contract = planner.contract
    assert (contract.smallest_window, contract.patch_size, contract.divisor) == ((40,) * 3, (64,) * 3, (8,) * 3)
    assert planner.contract.window(np.array(median)) == expected


def test_window_of_other_axes(workspace):
    """Each axis has limits and a divisor of its own."""
    planner = FSEFTPlanner(workspace.dataset)
    planner.contract = replace(
        planner.contract, smallest_window=(4, 32, 16), patch_size=(20, 64, 128), divisor=(2, 16, 32)
    )
    assert planner.contract.window(np.array((1, 33, 30))) == [4, 48, 32]
    assert planner.contract.window(np.array((9, 300, 65))) == [10, 64, 96]


def test_memory_target(workspace):
    children = [plan(workspace, gpu_memory_target_in_gb=gb)["configurations"]["3d_fullres_1shot"] for gb in (0.03, 8)]
    assert [child["fseft_crops_per_step"] for child in children] == [1, 2]
    with pytest.raises(ValueError, match="gpu_memory_target_in_gb = 0.01 is too small for one crop"):
        plan(workspace, gpu_memory_target_in_gb=0.01)


def test_shots_name_the_configurations(workspace):
    assert list(plan(workspace, plans_name="Mine", shots=(3,))["configurations"]) == [
        "3d_fullres",
        "3d_fullres_3shot",
        "3d_fullres_3shot_scratch",
    ]


def test_other_backbone_has_plans_of_its_own(workspace, tiny, tmp_path, monkeypatch, contract):
    monkeypatch.setenv("fseft_backbones", str(tmp_path / "backbones"))
    ct = {"normalization_schemes": ("CTNormalization",), "use_mask_for_norm": (False,)}
    fixed = replace(contract, id="other", spacing=(4.0, 5.0, 6.0), patch_size=(48, 48, 48), **ct)
    saved = save_backbone(fixed, load_weights(contract), tmp_path / "backbones")
    plans = plan(workspace, backbone="other")
    assert plans["plans_name"] == "FSEFTPlans_other"
    assert json.loads((workspace.preprocessed / "FSEFTPlans.json").read_text()) == tiny.plans()
    assert plans["configurations"]["3d_fullres"]["spacing"] == [4, 5, 6]  # x, y, z, as the arrays
    assert plans["configurations"]["3d_fullres"]["data_identifier"] == "FSEFTPlans_other_3d_fullres"
    child = plans["configurations"]["3d_fullres_1shot"]
    assert child["patch_size"] == [48, 40, 40]
    assert child["architecture"]["arch_kwargs"]["backbone"] == "other"
    assert child["architecture"]["arch_kwargs"]["sha256"] == saved.sha256
    edit(workspace.raw / "dataset.json", lambda content: content.update(channel_names={"0": "MRI"}))
    with pytest.raises(ValueError, match=r"Channel 0 of .*dataset\.json is 'MRI', .*'other' was trained with 'CT'"):
        plan(workspace, backbone="other")


@pytest.mark.parametrize(
    "given, voxels",
    [
        ((1e-9, 1.0, 1.0), "e+11 x "),
        ((1e3, 9.0, 9.0), "0 x "),
        ((0.0, 1.0, 1.0), "0 x 0 x 0"),
        ((nan, 1.0, 1.0), "0 x 0"),
    ],
)
def test_a_spacing_that_nothing_could_be_resampled_to(workspace, given, voxels):
    with pytest.raises(InputError, match="would make .* give mm, in the order z y x") as error:
        FSEFTPlanner(workspace.dataset, overwrite_target_spacing=given)
    assert voxels in str(error.value) and "voxels of a median volume of [" in str(error.value)


def test_overwritten_names_and_spacing(workspace):
    plans = plan(workspace, plans_name="Mine", overwrite_target_spacing=(8.0, 9.0, 10.0))
    assert plans["plans_name"] == "Mine"
    assert plans["configurations"]["3d_fullres"]["spacing"] == [10, 9, 8]  # given in z, y, x, as in nnU-Net


# ---- datasets that it refuses ----


def test_wrong_number_of_channels(workspace, contract, tmp_path, monkeypatch):
    monkeypatch.setenv("fseft_backbones", str(tmp_path / "backbones"))
    pair = replace(contract, id="pair", channel_names=("CT", "CT"), architecture={"kind": "raw_image"})
    save_backbone(pair, {"none": torch.zeros(1)}, tmp_path / "backbones")
    with pytest.raises(ValueError, match=r"dataset\.json has 1 channel\(s\), but backbone 'pair' takes 2: choose"):
        FSEFTPlanner(workspace.dataset, backbone="pair")


def test_2d_images(workspace):
    for file in workspace.raw.glob("*Tr/*.nii.gz"):
        image = nib.load(file)
        nib.save(image.slicer[:, :, 10:11], file)
    with pytest.raises(ValueError, match="holds 2D images; the adapters are 3D only"):
        plan(workspace)


def test_unknown_backbone_is_refused_before_the_fingerprint(workspace):
    (workspace.preprocessed / "dataset_fingerprint.json").unlink()
    with pytest.raises(ValueError, match="'swin' is not installed; there are: phantom"):
        planning.plan(77, "swin", [], 1, 8, None)
    assert not (workspace.preprocessed / "dataset_fingerprint.json").exists()


def test_damaged_backbone(workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("fseft_backbones", str(tmp_path))
    (tmp_path / "phantom.json").write_text((EMBEDDED / "phantom.json").read_text())
    (tmp_path / "phantom.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"phantom\.safetensors are damaged"):
        FSEFTPlanner(workspace.dataset)


def test_the_older_name_of_the_channels(workspace, capsys):
    edit(workspace.raw / "dataset.json", lambda content: content.update(modality=content.pop("channel_names")))
    plan(workspace)
    assert "Channel 0: CT" in capsys.readouterr().out
    assert list_images(workspace.queries, json.loads((workspace.raw / "dataset.json").read_text())).cases


def test_more_shots_than_cases(workspace):
    for call in (
        lambda: planning.plan(77, "phantom", [9], 1, 8, None),
        lambda: drawing.write_splits(77, [1, 9], None, 20, 5, 1),
    ):
        with pytest.raises(ValueError, match="9 shots need as many labelled cases, but the dataset has 8"):
            call()


def test_dataset_that_is_not_there(workspace):
    for dataset in (78, "78", "Dataset078_None"):
        with pytest.raises(ValueError, match="78"):
            planning.dataset_folders(dataset)


def test_missing_environment_variable(workspace, monkeypatch):
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(ValueError, match="nnUNet_raw is not set: export nnUNet_raw=FOLDER"):
        planning.plan(77, "phantom", [], 1, 8, None)


@pytest.mark.parametrize(
    "labels, sentence",
    [
        ({"Left Kidney": 4}, "Two labels match the backbone's class 'kidney_left': rename one of them in {file}"),
        ({"liver": 4}, r"Label 'liver' matches the backbone's classes \['liver', 'Liver'\]: rename it in {file}"),
    ],
)
def test_ambiguous_labels_leave_the_plans_alone(workspace, monkeypatch, tmp_path, contract, labels, sentence):
    file = workspace.raw / "dataset.json"
    edit(file, lambda content: content["labels"].update(labels))
    monkeypatch.setenv("fseft_backbones", str(tmp_path))
    classes = tuple("Liver" if name == "spleen" else name for name in contract.classes)
    save_backbone(replace(contract, id="twice", classes=classes), load_weights(contract), tmp_path)
    before = (workspace.preprocessed / "FSEFTPlans.json").read_bytes()
    with pytest.raises(ValueError, match=sentence.format(file=file)):
        plan(workspace, backbone="twice", plans_name="FSEFTPlans")
    assert (workspace.preprocessed / "FSEFTPlans.json").read_bytes() == before


# ---- preprocessed data ----


def test_preprocessed_cases(tiny, contract):
    """In x, y, z, CT in [0, 1]; unlabelled queries just as the labelled cases."""
    folder = tiny.preprocessed / "FSEFTPlans_3d_fullres"
    dataset = infer_dataset_class(str(folder))(str(folder))
    assert sorted(dataset.identifiers) == [f"case_{i}" for i in range(8)]
    queries = UnlabelledQueries(folder)
    assert queries.cases == ["scan_0", "scan_1"]
    images = [dataset.load_case("case_0")[0][:], queries.load("scan_0")]
    for image in images:
        assert image.shape == (1, 24, 20, 22) and image.dtype == np.float32
        assert image.min() == 0 and 0.5 < image.max() <= 1
    x = np.argwhere(dataset.load_case("case_0")[1][0] == 1)[:, 0]  # the spleen
    assert len(x) and x.mean() < 12  # lies on the left, x grows to the right


def test_an_unlabelled_query_is_preprocessed_as_a_labelled_case(workspace):
    """The same image through both paths gives the same array."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(str(workspace.preprocessed / "FSEFTPlans.json"))
    configuration = manager.get_configuration("3d_fullres")
    folder = workspace.preprocessed / "FSEFTPlans_3d_fullres"
    images = {"again": [str(workspace.raw / "imagesTr" / "case_0_0000.nii.gz")]}
    queries = UnlabelledQueries(folder)
    queries.preprocess(images, manager, configuration, workspace.dataset_json())
    assert queries.cases == ["again"]  # earlier ones are forgotten
    stored = infer_dataset_class(str(folder))(str(folder)).load_case("case_0")[0][:]
    np.testing.assert_allclose(queries.load("again"), stored, atol=1e-6)


@pytest.mark.parametrize(
    "broken, sentence",
    [
        ("NaN", r"scan_1_0000\.nii\.gz holds NaN or infinite values: repair"),
        ("cut", r"scan_1_0000\.nii\.gz cannot be read \(.*\): repair it, or leave the case out"),
    ],
)
def test_a_broken_query_leaves_earlier_results_alone(workspace, capsys, broken, sentence):
    file = workspace.queries / "scan_1_0000.nii.gz"
    if broken == "NaN":
        image = nib.load(file)
        data = image.get_fdata()
        data[3, 3, 3] = np.nan
        nib.save(nib.Nifti1Image(data, image.affine), file)
    else:
        file.write_bytes(file.read_bytes()[:1000])
    (workspace.queries / "scan_0_0000.nii.gz").rename(workspace.queries / "another_0000.nii.gz")
    made = [
        workspace.preprocessed / "splits_fseft.json",
        *sorted((workspace.preprocessed / "FSEFTPlans_3d_fullres_queries").iterdir()),
        *sorted((workspace.preprocessed / "FSEFTPlans_3d_fullres").iterdir()),
    ]
    before = [file.read_bytes() for file in made]
    arguments = ["-d", "77", "--shots", "5", "--seed", "1", "-np", "1", "--queries", str(workspace.queries)]
    assert main(["plan_and_preprocess", *arguments]) == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert [file.read_bytes() for file in made] == before
    assert UnlabelledQueries(workspace.preprocessed / "FSEFTPlans_3d_fullres").cases == ["scan_0", "scan_1"]
    assert not list(workspace.preprocessed.glob("*.part"))


def test_query_folders_that_are_refused(workspace, tmp_path):
    content = workspace.dataset_json()
    with pytest.raises(ValueError, match="nothing does not exist. Expected a folder of images named <case>_0000.nii"):
        list_images(tmp_path / "nothing", content)
    two = {**content, "channel_names": {"0": "CT", "1": "CT"}}
    with pytest.raises(ValueError, match=r"scan_0_0001\.nii\.gz is missing: every case needs 2 channel"):
        list_images(workspace.queries, two).require_sound()
    (workspace.queries / "scan_0_0000.nii.gz").rename(workspace.queries / "case_0_0000.nii.gz")
    with pytest.raises(ValueError, match="has cases of imagesTr, e.g. case_0: give other images"):
        drawing.write_splits(77, [], str(workspace.queries), 20, 5, 1)


@pytest.mark.parametrize(
    "spacing, pool", [((1.0, 1.0, 1.0), [2, 2, 2]), ((5.0, 0.8, 0.8), [1, 2, 2]), ((1.0, 3.0, 3.0), [2, 1, 1])]
)
def test_queries_are_pooled_over_cubes(workspace, spacing, pool):
    """Of twice the finest spacing."""
    planner = FSEFTPlanner("Dataset077_Tiny", backbone="phantom")
    parent = {"median_image_size_in_voxels": [40, 40, 40], "spacing": list(spacing)}
    assert planner.child(5, parent, "last")["fseft_pool"] == pool


def test_blocks_of_large_volumes(workspace, monkeypatch):
    """Of 4 mm at least where the volume is longer than two windows; a CPU keeps 100,000 of them."""
    planner = FSEFTPlanner("Dataset077_Tiny", backbone="phantom")
    parent = {"median_image_size_in_voxels": [300, 300, 300], "spacing": [1.5] * 3}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert planner.child(5, parent, "last")["fseft_pool"] == [3, 3, 3]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (side,) = set(planner.child(5, parent, "last")["fseft_pool"])
    assert (300 / side) ** 3 <= 100_000 < (300 / (side - 1)) ** 3


@pytest.mark.parametrize("value, pool", [(4, (4, 4, 4)), ([4, 4, 1], (4, 4, 1)), (1, (1, 1, 1))])
def test_blocks_may_be_one_number_in_the_plans(tiny, value, pool):
    child = tiny.plans(fseft_pool=value)["configurations"]["3d_fullres_5shot"]
    assert Settings.read(child, "3d_fullres_5shot", "FSEFTPlans").pool == pool


@pytest.mark.parametrize("value", [0, [2, 2], [2, 0, 2], "2", True, 1.5, None])
def test_blocks_that_there_are_none_of(tiny, value):
    child = tiny.plans(fseft_pool=value)["configurations"]["3d_fullres_5shot"]
    with pytest.raises(
        ValueError, match="^fseft_pool of '3d_fullres_5shot' .*: make it a whole number of at least 1, or t"
    ):
        Settings.read(child, "3d_fullres_5shot", "FSEFTPlans")
