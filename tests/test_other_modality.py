"""Images of a modality, or of more channels, than a backbone was trained with."""

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import predict_entry_point
from nnunetv2.run.run_training import run_training
from published_files import narrow_contract, narrow_state

from fsefs_nnunet.backbones.contract import ANY
from fsefs_nnunet.backbones.frozen import FrozenBackbone, as_hounsfield
from fsefs_nnunet.backbones.store import find_backbone, save_backbone
from fsefs_nnunet.backbones.suitability import Suitability, field_of_view_remark, remarks, suitability
from fsefs_nnunet.backbones.zoo import ZOO
from fsefs_nnunet.cli.main import main
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.features.bank import FeatureBank
from fsefs_nnunet.methods.inside.decoder_parts import Everything
from fsefs_nnunet.methods.inside.tuned_backbone import TunedBackbone
from fsefs_nnunet.methods.run_file import RunFile
from fsefs_nnunet.nnunet.shims import fseft_trainers
from fsefs_nnunet.planners.fseft_planner import FSEFTPlanner

CONFIGURATION = "3d_fullres_2shot"


@pytest.fixture
def narrow(tmp_path, monkeypatch):
    """SuPreM's U-Net with 8 features and random weights, a CT backbone."""
    monkeypatch.setenv("fseft_backbones", str(tmp_path / "store"))
    window = {"patch_size": (32, 32, 32), "smallest_window": (16, 16, 16)}
    contract = replace(narrow_contract("suprem_unet", 8), id="narrow", spacing=(6.0, 6.0, 6.0), **window)
    return save_backbone(contract, narrow_state("suprem_unet", 8), tmp_path / "store")


LINE = {"mean": 50.0, "std": 100.0, "low": -200.0, "high": 300.0}


def test_z_scores_become_hounsfield_units(narrow):
    """mean + std z, clipped twice, then CTNormalization's [0, 1]; the other channel stays."""
    z = torch.tensor([-3.0, -2.5, -2.0, 0.0, 1.0, 2.0, 2.5, 9.0])
    units = torch.tensor([-175.0, -175.0, -150.0, 50.0, 150.0, 250.0, 250.0, 250.0])
    image = z.expand(1, 2, 1, 1, 8)
    made = as_hounsfield(image, narrow, {"1": LINE})
    torch.testing.assert_close(made[0, 1, 0, 0], (units + 175) / 425)
    assert torch.equal(made[0, 0, 0, 0], z)


@pytest.mark.parametrize("inside", [None, Everything()])
def test_the_backbone_sees_hounsfield_units(narrow, inside):
    z = torch.randn(1, 2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    images = {"channels": 2, "z_scores_as_hu": {"0": LINE}}
    if inside is None:
        backbone = FrozenBackbone("narrow", "last+image", **images)
    else:
        backbone = TunedBackbone("narrow", "last+image", None, inside, **images)
    features, image = backbone(z)
    seen, alone = as_hounsfield(z, narrow, {"0": LINE}), FrozenBackbone("narrow", "last")
    torch.testing.assert_close(features.detach(), torch.cat([alone(seen[:, c : c + 1])[0] for c in (0, 1)], 1))
    assert torch.equal(image, z)


def test_banks_of_other_lines_are_apart(narrow, tmp_path):
    lines = ({}, {"0": LINE}, {"0": {**LINE, "std": 50.0}})
    backbones = [FrozenBackbone("narrow", "last", z_scores_as_hu=line) for line in lines]
    assert len({FeatureBank(tmp_path, b, "last", (16, 16, 16), torch.device("cpu")).folder for b in backbones}) == 3


def test_which_channels_are_unseen(narrow):
    brain, any_image = ZOO["highres3dnet"].contract({}), ZOO["anatomix"].contract({})
    assert narrow.unseen_channels(["CT", "T1", "ct"]) == [1]
    assert narrow.normalization_of(["CT", "T1"], other_modality=True) == (
        ["CTNormalization", "ZScoreNormalization"],
        [False, False],
    )
    assert narrow.z_scores_of(["CT", "T1"]) == {"1": narrow.z_scores_as_hu}
    assert brain.unseen_channels(["CT", "T2 FLAIR"]) == [0] and brain.z_scores_of(["CT"]) == {}
    assert any_image.unseen_channels(["CT", "T1"]) == find_backbone("phantom").unseen_channels(["CT", "T1"]) == []
    assert any_image.normalization_of(["T1"], other_modality=True) == (["RescaleTo01Normalization"], [False])


def test_refused_unless_wanted(narrow):
    with pytest.raises(
        InputError, match="Channel 0 of d.json is 'MRI', but backbone 'narrow' was trained with 'CT' there"
    ):
        narrow.check_channels(["MRI"], "d.json")
    brain = ZOO["highres3dnet"].contract({})
    with pytest.raises(
        InputError, match="Channel 0 of d.json is 'CT', but backbone 'highres3dnet' was trained with 'T1'"
    ):
        brain.check_channels(["CT"], "d.json")
    brain.check_channels(["T2", "FLAIR"], "d.json")  # one after the other
    ZOO["anatomix"].contract({}).check_channels(["CT"], "d.json")


def test_channels_that_do_not_fit(narrow):
    two = replace(narrow, channel_names=("CT", "PET"), id="two")
    with pytest.raises(
        InputError, match=r"d.json has 3 channel\(s\), but backbone 'two' takes 2: choose another backbone"
    ):
        two.check_channels(["CT", "PET", "PET"], "d.json")
    with pytest.raises(InputError, match=r"d.json has 1 channel\(s\), but backbone 'two' takes 2"):
        two.check_channels(["MR"], "d.json")


def test_other_modality_where_it_is_none(tiny, narrow, monkeypatch):
    for name, folder in tiny.environment().items():
        monkeypatch.setenv(name, folder)
    with pytest.raises(InputError, match="'narrow' takes the channels of .*, CT, as they are: omit --other_modality"):
        FSEFTPlanner(tiny.dataset, backbone="narrow", other_modality=True)


# ---- what suits better ----


def test_suitability(narrow):
    organs = ["liver", "my_tumour"]
    assert suitability(narrow, ["CT"], (0.7, 6.0, 12.0), organs) == Suitability(True, True, 0)
    assert suitability(narrow, ["MR"], (6.0, 6.0, 12.1), []) == Suitability(False, False, 0)
    thick = replace(narrow, spacing=(5.0, 0.8, 0.8), transpose_forward=(0, 1, 2))
    assert suitability(thick, ["CT"], (5.0, 0.8, 0.8), []).spacing  # z, y, x as nnU-Net's reader gives them
    assert suitability(ZOO["fseft"].contract({}), ["CT"], (1.5, 1.5, 1.5), organs).labels == 1
    assert suitability(replace(narrow, channel_names=(ANY,)), ["MR"], (1, 1, 1), []).modality
    assert suitability(ZOO["highres3dnet"].contract({}), ["T2 FLAIR"], (1, 1, 1), []).modality
    best, other = Suitability(True, True, 1), Suitability(True, False, 3)
    assert best.beats(Suitability(True, False, 1))
    assert not best.beats(best) and not best.beats(other) and not other.beats(best)


def test_remarks(narrow):
    assert remarks(find_backbone("phantom"), ["CT"], (2, 2, 2), ["liver"]) == []
    unseen, spacing, better = remarks(narrow, ["MR"], (14, 1, 1), ["other"])
    assert unseen == "Backbone narrow was trained on CT; it has never seen images like this dataset's, MR."
    assert spacing == (
        "Backbone narrow was trained at 6 x 6 x 6 mm, the dataset has 1 x 1 x 14 mm: interpolation adds voxels, not "
        "detail."
    )
    assert better == "In the store, phantom may suit better: it takes such images and takes such a spacing."


# ---- the whole way ----


@pytest.mark.slow
def test_two_channels_of_mr_through_a_ct_backbone(narrow, workspace, tmp_path, monkeypatch, capsys, one_thread):
    """Plans, two epochs, prediction; the model says by itself that its images are z-scored."""
    content = workspace.dataset_json() | {"channel_names": {"0": "T1 in phase", "1": "T1 out of phase"}}
    (workspace.raw / "dataset.json").write_text(json.dumps(content))
    for file in sorted((workspace.raw / "imagesTr").glob("*_0000.nii.gz")):
        image = nib.load(file)
        other = nib.Nifti1Image(np.asarray(image.dataobj)[::-1].copy(), image.affine)
        nib.save(other, str(file).replace("_0000", "_0001"))
    plan = ["plan_and_preprocess", "-d", "77", "-b", "narrow", "-np", "1", "--shots", "2", "--num_queries", "3"]
    assert main(plan) == 2
    assert "plan with --other_modality" in capsys.readouterr().err
    assert main([*plan, "--other_modality"]) == 0
    printed = capsys.readouterr().out
    line = "is {mean:g} + {std:g} z HU to the backbone, within {low:g} and {high:g}.".format(**narrow.z_scores_as_hu)
    assert f"A z-score z of channel 0 {line}\nA z-score z of channel 1 {line}\n" in printed
    assert "Each channel goes through the backbone on its own; the features are concatenated." in printed
    file = workspace.preprocessed / "FSEFTPlans_narrow.json"
    plans = json.loads(file.read_text())
    assert plans["configurations"]["3d_fullres"]["normalization_schemes"] == ["ZScoreNormalization"] * 2
    settings = plans["configurations"][CONFIGURATION]
    lines = {"0": narrow.z_scores_as_hu, "1": narrow.z_scores_as_hu}
    assert settings["architecture"]["arch_kwargs"]["z_scores_as_hu"] == lines
    settings |= {"fseft_epochs": 2, "fseft_views": 2, "fseft_steps_per_epoch": 2, "fseft_prior_from_epoch": 1}
    file.write_text(json.dumps(plans))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(fseft_trainers.__file__).parent))
    run_training("77", CONFIGURATION, 0, "FSEFTTrainer", "FSEFTPlans_narrow", device=torch.device("cpu"))
    folder = workspace.results / f"FSEFTTrainer__FSEFTPlans_narrow__{CONFIGURATION}" / "fold_0"
    assert RunFile.load(folder).trained_parameters == 16 * 32 + 54 * 32**2 + 4 * 33
    images = str(workspace.raw / "imagesTr")
    argv = ["nnUNetv2_predict", "-i", images, "-o", str(tmp_path / "out"), "-d", "77", "-tr", "FSEFTTrainer"]
    argv += ["-p", "FSEFTPlans_narrow", "-c", CONFIGURATION, "-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1"]
    monkeypatch.setattr("sys.argv", argv)
    predict_entry_point()
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == len(list((workspace.raw / "labelsTr").glob("*.nii.gz")))


@pytest.mark.parametrize(
    "window, mm, extent, shown",
    [
        (64, 2.5, 320, "A window shows 160 mm; in the training of phantom it showed 150 to 400 mm"),  # CHAOS
        (64, 4.0, 320, None),
        (64, 3.0, 320, "A window shows 192 mm"),
        (64, 2.5, 240, None),  # there is no more to see
        (56, 1.0, 50, None),  # Hippocampus
    ],
)
def test_a_window_that_shows_less_than_in_the_training(window, mm, extent, shown):
    said = field_of_view_remark(find_backbone("phantom"), (window, 40, 40), (mm,) * 3, (extent, 100, 100))
    assert said is None if shown is None else said.startswith(shown)
    assert said is None or "-overwrite_target_spacing 4 4 4 on your queries" in said
    assert field_of_view_remark(ZOO["fseft"].contract({}), (96,) * 3, (1.5,) * 3, (400,) * 3) is None
