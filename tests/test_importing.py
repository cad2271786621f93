"""nnU-Net models as backbones: the network, the contract, what is refused."""

import json
import warnings

import numpy as np
import pytest
import torch
from nnunet_models import (
    CT,
    PATCH,
    in_old_format,
    model_plans,
    network_of,
    unet_plans,
    write_checkpoint,
    write_model,
)

from fsefs_nnunet.backbones.architectures.nnunet import NNUNetBackbone
from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.backbones.published.nnunet_models import import_nnunet_model
from fsefs_nnunet.backbones.store import find_backbone
from fsefs_nnunet.cli.main import main
from fsefs_nnunet.errors import InputError

# ---- the network ----


ARCHITECTURES = ["PlainConvUNet", "ResidualEncoderUNet"]


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_head_of_the_features_is_the_stock_networks_output(tmp_path, backbones, kind, prefix):
    """Two channels, anisotropic strides and kernels; a compiled or distributed training's names."""
    model = write_model(tmp_path / "m", ["CT", "MRI"], prefix=prefix, architecture=unet_plans(kind))
    contract = import_nnunet_model("mine", model.folder, backbones)
    assert contract.architecture["network_class_name"].endswith(kind) and contract.divisor == (2, 4, 4)
    image = torch.randn((1, 2, *PATCH), generator=torch.Generator().manual_seed(1))
    last, every = FrozenBackbone("mine", "last"), FrozenBackbone("mine", "all")
    with torch.no_grad():
        stock = model.network(image)[0]
    assert stock.shape == (1, 3, *PATCH)
    assert torch.equal(last.head(last(image)[0]), stock)
    assert [m.channels for m in last.maps] == [4] and [m.channels for m in every.maps] == [4, 6]
    assert [m.stride for m in every.maps] == [(1, 1, 1), (1, 2, 2)]
    first, second = every(image)
    assert torch.equal(first, last(image)[0])
    assert second.shape[2:] == tuple(n // s for n, s in zip(PATCH, (1, 2, 2)))


def test_plans_of_older_nnunet(tmp_path, backbones, model):
    """Before 2.4 the plans described the network by other keys; TotalSegmentator's models do."""
    architecture = unet_plans()
    architecture["arch_kwargs"]["features_per_stage"] = [4, 8, 8]
    content = in_old_format(model_plans(["CT"], architecture=architecture))
    network = network_of(architecture, 1, 3)
    write_checkpoint(model.folder / "fold_0" / "checkpoint_final.pth", network, content)
    (model.folder / "plans.json").write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nnU-Net advises to plan anew
        import_nnunet_model("old", model.folder, backbones)
    image = torch.randn((1, 1, *PATCH), generator=torch.Generator().manual_seed(1))
    backbone = FrozenBackbone("old", "last")
    with torch.no_grad():
        assert torch.equal(backbone.head(backbone(image)[0]), network(image)[0])


# ---- the contract ----


def test_contract_is_the_models_own_plans(tmp_path, backbones):
    model = write_model(tmp_path / "m", ["MRI", "CT"], transpose_forward=[1, 0, 2], transpose_backward=[1, 0, 2])
    contract = import_nnunet_model("mine", model.folder, backbones, licence="CC BY 4.0")
    assert contract == find_backbone("mine")
    assert contract.classes == ("background", "liver", "tumour") and contract.softmax
    assert contract.channel_names == ("MRI", "CT") and contract.input_channels == 2
    assert contract.image_reader_writer == "SimpleITKIO" and contract.transpose_forward == (1, 0, 2)
    assert contract.spacing == (4.0, 2.0, 1.5)
    assert contract.normalization_schemes == ("ZScoreNormalization", "CTNormalization")
    assert contract.use_mask_for_norm == (True, False)
    assert contract.foreground_intensity_properties_per_channel == {"1": CT}
    assert contract.resampling_fn_data_kwargs["order"] == 2
    assert contract.patch_size == contract.smallest_window == tuple(PATCH)
    assert contract.divisor == (2, 4, 4) and contract.licence == "CC BY 4.0"


def test_regions(tmp_path, backbones):
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    model = write_model(tmp_path / "m", ["CT"], labels)
    contract = import_nnunet_model("mine", model.folder, backbones)
    assert contract.classes == ("whole", "core") and not contract.softmax


def test_the_embedded_backbones_contract_is_what_importing_writes(tmp_path, backbones, contract):
    """Keys and preprocessing; benchmarks/pretrain_phantom.py imports its result this way."""
    axes = {"transpose_forward": [2, 1, 0], "transpose_backward": [2, 1, 0]}
    model = write_model(tmp_path / "m", ["CT"], image_reader_writer="NibabelIOWithReorient", **axes)
    made = import_nnunet_model("mine", model.folder, backbones, open_spacing=True)
    written, shipped = (json.loads(c.to_json()) for c in (made, contract))
    assert written.keys() == shipped.keys()
    for key in (
        "channel_names",
        "image_reader_writer",
        "transpose_forward",
        "spacing",
        "normalization_schemes",
        "use_mask_for_norm",
        "resampling_fn_data",
        "resampling_fn_data_kwargs",
        "smallest_window",
    ):
        assert written[key] == shipped[key], key


def test_command_reports_what_it_took(tmp_path, backbones, capsys):
    model = write_model(tmp_path / "m", ["MRI", "CT"])
    assert main(["backbones", "import", "mine", str(model.folder)]) == 0
    out = capsys.readouterr().out
    tensors = len(list(model.network.named_parameters()))
    assert f"trained by nnUNetTrainer: all {tensors} tensors matched" in out
    assert "3 classes, one per voxel: background, liver, tumour" in out
    assert "Channel 0 MRI: ZScoreNormalization inside the nonzero mask\n" in out
    assert "Channel 1 CT: CTNormalization: clipped to [-40, 210], minus 70.5, divided by 40.25\n" in out
    assert "Reader SimpleITKIO, images are used as stored; axes [0, 1, 2] of z, y, x\n" in out
    assert "Spacing [4.0, 2.0, 1.5] mm; window [6, 16, 24], multiples of [2, 4, 4]" in out
    assert "Licence: unknown, ask the authors of the model\n" in out


# ---- what is refused ----


def test_paths_that_are_no_model(tmp_path, backbones, model):
    weights = model.folder / "fold_0" / "checkpoint_final.pth"
    for path, message in (
        (tmp_path / "none", "none is missing: give an nnU-Net model folder or a .zip"),
        (model.folder.parent, "Dataset004_X/plans.json is missing: give the folder that holds plans.json and fold_X"),
        (weights, "checkpoint_final.pth is neither a model folder nor a .zip of one: give the folder"),
    ):
        with pytest.raises(ValueError) as error:
            import_nnunet_model("mine", path, backbones)
        assert message in str(error.value)
    with pytest.raises(ValueError, match=r"has no fold_3/checkpoint_final\.pth: is the training finished"):
        import_nnunet_model("mine", model.folder, backbones, fold="3")
    content = (model.folder / "dataset.json").read_text()
    (model.folder / "dataset.json").unlink()
    with pytest.raises(ValueError, match=r"dataset\.json is missing: copy the model's folder as nnU-Net wrote it"):
        import_nnunet_model("mine", model.folder, backbones)
    (model.folder / "dataset.json").write_text(content)
    (model.folder / "plans.json").write_text("{")
    with pytest.raises(ValueError, match=r"plans\.json is damaged .*: copy the model again"):
        import_nnunet_model("mine", model.folder, backbones)
    assert not backbones.exists()


@pytest.mark.parametrize("name", ["", "../mine", "a/b", "a.b"])
def test_name_of_a_backbone(backbones, model, name):
    with pytest.raises(ValueError, match="cannot name a backbone: use letters, digits"):
        import_nnunet_model(name, model.folder, backbones)


def changed_unet(**arch_kwargs) -> dict:
    architecture = unet_plans()
    architecture["arch_kwargs"] |= arch_kwargs
    return architecture


UNSUPPORTED = [
    ({"architecture": unet_plans("ResidualUNet")}, r"\(ResidualUNet, 3D\) cannot be a backbone: 3D models of Plain"),
    ({"patch_size": [16, 24]}, r"\(PlainConvUNet, 2D\) cannot be a backbone"),
    ({"previous_stage": "3d_lowres"}, "is the second stage of a cascade; import the first"),
    ({"image_reader_writer": "MyReader"}, "The plans name MyReader, which stock nnU-Net's preprocessing does not have"),
    ({"normalization_schemes": ["MyNorm"]}, "The plans name MyNorm, which stock nnU-Net"),
    ({"resampling_fn_data": "mine", "preprocessor_name": "Mine"}, "The plans name mine, Mine, which stock nnU-Net"),
    ({"inherits_from": "other"}, "are not those of one nnU-Net v2 model"),
    ({"configurations": []}, "are not those of one nnU-Net v2 model"),
    ({"image_reader_writer": None}, "are not those of one nnU-Net v2 model"),
    ({"architecture": changed_unet(no_such_argument=3)}, "'mine' has arch_kwargs that do not build a PlainConvUNet"),
    ({"architecture": changed_unet(kernel_sizes=[3])}, "'mine' has arch_kwargs that do not build a PlainConvUNet"),
    ({"architecture": changed_unet(strides=2)}, "are not those of one nnU-Net v2 model"),
]


@pytest.mark.parametrize("changes, message", UNSUPPORTED)
def test_unsupported_models(backbones, model, changes, message):
    content = model_plans(["CT"], **changes)
    (model.folder / "plans.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        import_nnunet_model("mine", model.folder, backbones)
    assert not backbones.exists()


def test_checkpoints_of_another_kind(backbones, model):
    file = model.folder / "fold_0" / "checkpoint_final.pth"
    torch.save([1, 2], file)
    with pytest.raises(InputError, match=r"checkpoint_final\.pth are not those of one nnU-Net v2 model"):
        import_nnunet_model("mine", model.folder, backbones)
    weights = model.network.state_dict()
    write_checkpoint(file, model.network, model.plans, network_weights={**weights, 3: "x"})
    import_nnunet_model("mine", model.folder, backbones)
    name = "decoder.seg_layers.1.weight"
    write_checkpoint(file, model.network, model.plans, network_weights={**weights, name: weights[name] * np.nan})
    with pytest.raises(InputError, match=rf"checkpoint_final\.pth holds NaN or infinite weights, e\.g\. {name}: take"):
        import_nnunet_model("other", model.folder, backbones)


def test_weights_of_another_network(backbones, model):
    """A trainer's own layers are neither left out nor filled in."""
    file = model.folder / "fold_0" / "checkpoint_final.pth"
    weights = model.network.state_dict()
    name = "decoder.seg_layers.1.weight"
    for changed, message in (
        (weights | {"extra.weight": torch.ones(1)}, r"0 tensors are missing \[\], 1 are unknown \['extra.weight'\]"),
        ({k: v for k, v in weights.items() if k != name}, rf"1 tensors are missing \['{name}'\]"),
        (weights | {name: torch.ones(1)}, rf"1 have another shape \['{name}'\]"),
        (None, r"checkpoint_final\.pth holds no network_weights: give a checkpoint that nnU-Net's training wrote"),
    ):
        write_checkpoint(file, model.network, model.plans, network_weights=changed)
        with pytest.raises(ValueError, match=message) as error:
            import_nnunet_model("mine", model.folder, backbones)
        assert str(error.value).startswith(str(file))
    write_checkpoint(file, model.network, model.plans, init_args={})
    with pytest.raises(ValueError, match="are not those of one nnU-Net v2 model .'configuration'.: copy"):
        import_nnunet_model("mine", model.folder, backbones)


def test_a_network_that_a_trainer_builds_itself(backbones, model):
    """STU-Net's trainers for nnU-Net v2: plans.json describes a PlainConvUNet all the same."""
    file = model.folder / "fold_0" / "checkpoint_final.pth"
    weights = {"conv_blocks_context.0.0.conv1.weight": torch.zeros(2), "seg_outputs.0.weight": torch.zeros(2)}
    changes = {"network_weights": weights, "trainer_name": "STUNetTrainer_base_ft"}
    write_checkpoint(file, model.network, model.plans, **changes)
    message = r"\.pth, trained by STUNetTrainer_base_ft, does not hold the network that its plans\.json describes \(.* "
    with pytest.raises(
        InputError, match=message + r"2 are unknown \['conv_blocks_context.*: give a model of nnU-Net's"
    ):
        import_nnunet_model("mine", model.folder, backbones)
    assert not backbones.exists()


@pytest.mark.parametrize("name", ["subprocess.Popen", "torch.nn.functional.relu", "torch.nn.none", "os.system"])
def test_plans_that_name_a_function_as_layer(tmp_path, backbones, model, name):
    """nnU-Net would call it with nonlin_kwargs."""
    witness = tmp_path / "ran"
    architecture = unet_plans()
    architecture["arch_kwargs"] |= {"nonlin": name, "nonlin_kwargs": {"args": ["touch", str(witness)]}}
    (model.folder / "plans.json").write_text(json.dumps(model_plans(["CT"], architecture=architecture)))
    with pytest.raises(ValueError, match=f"'mine' names '{name}' as its nonlin, which is not a layer: do not trust it"):
        import_nnunet_model("mine", model.folder, backbones)
    assert not witness.exists()


def test_a_contract_of_a_stranger_is_checked_too(tmp_path, backbones, model):
    import_nnunet_model("mine", model.folder, backbones)
    content = json.loads((backbones / "mine.json").read_text())
    content["architecture"]["arch_kwargs"]["norm_op"] = "subprocess.Popen"
    (backbones / "mine.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="names 'subprocess.Popen' as its norm_op"):
        NNUNetBackbone(find_backbone("mine"), "last")


def test_a_contract_of_an_earlier_version(backbones, model):
    import_nnunet_model("mine", model.folder, backbones)
    content = json.loads((backbones / "mine.json").read_text())
    (backbones / "mine.json").write_text(json.dumps(content | {"ct_intensities": None}))
    with pytest.raises(
        ValueError, match=r"mine\.json is not a backbone contract .*'ct_intensities'.*import the backbone"
    ):
        find_backbone("mine")
