"""Plans of a user's dataset for an imported model."""

import numpy as np
import pytest
import torch
from nnunet_models import (
    CONFIGURATION,
    CT,
    PATCH,
    make_plans,
    preprocessed_case,
    unet_plans,
    write_dataset,
    write_model,
)

from fsefs_nnunet.backbones.published.nnunet_models import import_nnunet_model
from fsefs_nnunet.cli.main import main
from fsefs_nnunet.methods.network import AdaptedNetwork
from fsefs_nnunet.planners.fseft_planner import FSEFTPlanner

AXES_OF_MODELS = [
    ("SimpleITKIO", [0, 1, 2]),  # nnU-Net's default
    ("SimpleITKIO", [2, 0, 1]),  # not the inverse of itself
    ("NibabelIO", [1, 0, 2]),
    ("NibabelIOWithReorient", [1, 2, 0]),
    ("NibabelIOWithReorient", [0, 1, 2]),  # TotalSegmentator's
    ("SimpleITKIOWithReorient", [2, 1, 0]),
]


@pytest.mark.parametrize("reader, forward", AXES_OF_MODELS)
def test_a_users_images_are_preprocessed_as_the_models_own(tmp_path, backbones, monkeypatch, reader, forward):
    """By stock nnU-Net from our plans, to the same array as from the model's plans; and what the plans say."""
    backward = np.argsort(forward).tolist()
    axes = {"image_reader_writer": reader, "transpose_forward": forward, "transpose_backward": backward}
    model = write_model(tmp_path / "m", ["CT", "MRI"], **axes)
    import_nnunet_model("mine", model.folder, backbones)
    raw = write_dataset(tmp_path, monkeypatch, ["CT", "FLAIR"], axes="PIL")
    plans = make_plans("mine")
    assert plans["plans_name"] == "FSEFTPlans_mine"
    assert {key: plans[key] for key in axes} == axes
    assert plans["foreground_intensity_properties_per_channel"] == {"0": CT, "1": {}}
    parent, child = plans["configurations"][CONFIGURATION], plans["configurations"]["3d_fullres_1shot"]
    for key in ("spacing", "normalization_schemes", "use_mask_for_norm", "resampling_fn_data_kwargs"):
        assert parent[key] == model.plans["configurations"][CONFIGURATION][key], key
    assert child["patch_size"] == PATCH and child["fseft_crop_size"] == [min(n, 16) for n in PATCH]
    image = preprocessed_case(plans, raw)
    np.testing.assert_array_equal(image, preprocessed_case(model.plans, raw))
    # mm along the reader's axes, without the four that are zero
    size = np.array([30, 27, 20]) if "Reorient" in reader else np.array([20, 30, 27])
    assert image.shape[1:] == tuple(np.round(size[forward] / parent["spacing"]))


def test_plans_are_made_by_the_planners_command(tmp_path, backbones, model, monkeypatch, capsys):
    write_dataset(tmp_path, monkeypatch, ["CT"])
    import_nnunet_model("mine", model.folder, backbones)
    capsys.readouterr()
    assert main(["plan", "-d", "5", "-b", "mine"]) == 0
    out = capsys.readouterr().out
    assert "Images as stored, which must match the backbone's own (SimpleITKIO), axes [0, 1, 2] of z, y, x." in out
    assert "Channel 0: CT, the backbone's was CT; CTNormalization: clipped to [-40, 210], minus 70.5" in out
    assert "Spacing [4.0, 2.0, 1.5] mm: the backbone's." in out
    assert "Labels that the backbone knows by name: {'liver': 'liver'}" in out


@pytest.mark.parametrize(
    "widths, expected", [([48, 80, 8], ("skips", 48)), ([48, 81, 8], ("all", 48)), ([129, 129, 8], ("last", 129))]
)
def test_features_of_wide_networks(tmp_path, backbones, monkeypatch, widths, expected):
    """Of every stage while volumes fit into memory; the adapter is no narrower than the head."""
    architecture = unet_plans()
    architecture["arch_kwargs"]["features_per_stage"] = widths
    model = write_model(tmp_path / "m", ["CT"], architecture=architecture)
    import_nnunet_model("mine", model.folder, backbones)
    write_dataset(tmp_path, monkeypatch, ["CT"])
    child = make_plans("mine")["configurations"]["3d_fullres_1shot"]
    kwargs = child["architecture"]["arch_kwargs"]
    assert (kwargs["stages"], kwargs["channels"]) == expected
    network = AdaptedNetwork(1, 2, **kwargs)
    with torch.no_grad():
        assert network(torch.zeros((1, 1, *PATCH))).shape == (1, 2, *PATCH)


@pytest.mark.parametrize("own, users", [("CT", "MRI"), ("MRI", "CT"), ("CT", "noNorm")])
def test_ct_and_other_images_are_not_mixed_up(tmp_path, backbones, monkeypatch, own, users):
    model = write_model(tmp_path / "m", ["T1", own])
    import_nnunet_model("mine", model.folder, backbones)
    write_dataset(tmp_path, monkeypatch, ["T2", users])
    with pytest.raises(ValueError, match=rf"Channel 1 of .*dataset\.json is '{users}', .*'mine' was .* '{own}' there"):
        FSEFTPlanner("Dataset005_User", backbone="mine")


@pytest.mark.parametrize("channels", [["T1"], ["T1", "T2", "FLAIR"]])
def test_number_of_channels(tmp_path, backbones, monkeypatch, channels):
    model = write_model(tmp_path / "m", ["T1", "T2"])
    import_nnunet_model("mine", model.folder, backbones)
    write_dataset(tmp_path, monkeypatch, channels)
    with pytest.raises(ValueError, match=rf"has {len(channels)} channel\(s\), but backbone 'mine' takes 2"):
        FSEFTPlanner("Dataset005_User", backbone="mine")
