"""What an extension has to touch: one class and one row each, here in this file alone.

A converter, an encoder whose two maps have strides 2 and 4, a method inside the backbone with an option, and a prior go
through planning, two epochs and nnUNetv2_predict.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import predict_entry_point
from nnunetv2.run.run_training import run_training
from torch import nn

from fsefs_nnunet.backbones.architectures import ARCHITECTURES
from fsefs_nnunet.backbones.checkpoints import read_checkpoint
from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.backbones.state import copy_exactly
from fsefs_nnunet.backbones.store import find_backbone, save_backbone
from fsefs_nnunet.cli.main import main
from fsefs_nnunet.datasets.source import Case, Source, numbered, paired
from fsefs_nnunet.datasets.sources import SOURCES
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.methods.network import AdaptedNetwork
from fsefs_nnunet.methods.registry import BANK, METHODS, PATCHES, Method
from fsefs_nnunet.methods.run_file import RunFile
from fsefs_nnunet.priors import PRIORS
from fsefs_nnunet.priors.prior import Prior, SupportLabels
from fsefs_nnunet.priors.volumes import VolumePrediction
from fsefs_nnunet.synthetic.phantom import LABELS, PhantomConfig, make_phantom

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CONFIGURATION, DATASET = "3d_fullres_2shot", "Dataset501_Toy"


class ToySource(Source):
    """Files scan7.nii.gz and organs7.nii.gz side by side."""

    name = "Toy"
    layout = "scan0.nii.gz beside organs0.nii.gz"
    row: ClassVar = {"labels": {"liver": 1, "spleen": 2}, "reference": "this file"}

    def cases(self, folder: Path) -> list[Case]:
        images = numbered(folder.glob("*.nii.gz"), r"scan(\d+)\.nii\.gz")
        return paired(images, numbered(folder.glob("*.nii.gz"), r"organs(\d+)\.nii\.gz"), "toy_{}")


class ToyEncoder(nn.Module):
    """Two strided convolutions; no decoder, no head."""

    head = None

    def __init__(self, contract: BackboneContract, stages: str):
        super().__init__()
        self.maps = self.stage_maps(contract)[stages]
        self.first = nn.Conv3d(contract.input_channels, 4, 3, stride=2, padding=1)
        self.second = nn.Conv3d(4, 6, 3, stride=2, padding=1)

    @staticmethod
    def stage_maps(contract: BackboneContract) -> dict[str, list[FeatureMap]]:
        return {"last": [FeatureMap(4, (2, 2, 2)), FeatureMap(6, (4, 4, 4))]}

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        fine = torch.relu(self.first(image))
        return [fine, torch.relu(self.second(fine))]

    def tuned_parameters(self, part: str) -> list[str]:
        return [name for name, _ in self.named_parameters()] if part == "all" else []

    def backbone_state(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_backbone_state(self, weights: dict[str, torch.Tensor]) -> None:
        copy_exactly(self.backbone_state(), weights)


class Gain(nn.Module):
    """A convolution whose output is multiplied by trained factors, one for each of `groups` groups of channels."""

    def __init__(self, convolution: nn.Conv3d, groups: int):
        super().__init__()
        self.convolution, self.gain = convolution, nn.Parameter(torch.ones(groups))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dropout(self.convolution(x))
        return y * self.gain.repeat_interleave(y.shape[1] // len(self.gain)).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class Gains:
    """Starts as the identity; `groups` is its option."""

    trains_decoder: ClassVar[bool] = False
    groups: int = 1

    def prepare(self, backbone: nn.Module) -> dict[str, nn.Parameter]:
        backbone.first = Gain(backbone.first, self.groups)
        return {"first.gain": backbone.first.gain}


@dataclass(frozen=True)
class SharePrior(Prior):
    """How much of a volume each class fills."""

    shares: tuple[float, ...]

    @classmethod
    def estimate(cls, support: SupportLabels) -> "SharePrior":
        maps = support.whole.values()
        return cls(tuple(float(np.mean([np.isin(m, labels).mean() for m in maps])) for labels in support.classes))

    def penalty(self, prediction: VolumePrediction, gamma: float) -> torch.Tensor:
        filled = prediction.probabilities.mean((1, 2, 3))
        return ((filled - torch.tensor(self.shares, device=filled.device)).abs() - gamma).relu().mean()

    def why_no_effect(self) -> None:
        return None

    def report(self, names: Sequence[str], gamma: float) -> dict[str, dict]:
        return {name: {"share": share} for name, share in zip(names, self.shares)}

    def describe(self, names: Sequence[str], gamma: float) -> list[str]:
        return [f"Expected share of {name}: {share:.3f}" for name, share in zip(names, self.shares)]

    def state(self) -> list[float]:
        return list(self.shares)

    @classmethod
    def from_state(cls, state: list[float]) -> "SharePrior":
        return cls(tuple(state))

    def agrees_with(self, other: "SharePrior") -> bool:
        return np.allclose(self.shares, other.shares)


ROWS = [
    Method(
        "gains",
        "gains",
        "gains of the first convolution, head",
        "A toy.",
        "FSEFTTrainer_Gains",
        PATCHES,
        adapter="linear_probe",
        maps="last",
        inside=f"{__name__}.Gains",
        rate=1e-2,
    ),
    Method(
        "share",
        "spatial adapter + share prior",
        "spatial adapter, head",
        "A toy.",
        "FSEFTTrainer_Share",
        BANK,
        prior="share",
        trains_with_prior=True,
    ),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Everything registered; the converted dataset, planned with the encoder."""
    folder = tmp_path_factory.mktemp("extending")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "fseft_backbones"):
            (folder / name).mkdir()
            patch.setenv(name, str(folder / name))
        patch.setenv("nnUNet_n_proc_DA", "0")
        patch.setenv("fseft_final_validation", "0")
        patch.setenv("nnUNet_extTrainer", str(Path(main.__code__.co_filename).parents[1] / "nnunet" / "shims"))
        patch.setitem(SOURCES, "Toy", ToySource)
        patch.setitem(ARCHITECTURES, "toy_encoder", ToyEncoder)
        patch.setitem(PRIORS, "share", SharePrior)
        for row in ROWS:
            patch.setitem(METHODS, row.name, row)
        write_download(folder / "download")
        write_backbone(folder / "fseft_backbones")
        assert main(["convert", "toy", "-i", str(folder / "download"), "-d", "501", "-np", "1"]) == 0
        plan = ["plan_and_preprocess", "-d", "501", "-b", "toy", "--shots", "2", "--num_queries", "1", "-np", "1"]
        assert main(plan) == 0
        edit_plans(folder)
        yield folder


def write_download(folder: Path) -> None:
    folder.mkdir()
    config = PhantomConfig(shape=(24, 20, 16), spacing=14.0)
    for i in range(3):
        phantom = make_phantom((5, i), config)
        labels = np.zeros(phantom.labels.shape, np.uint8)
        labels[np.isin(phantom.labels, [LABELS["liver_right_lobe"], LABELS["liver_left_lobe"]])] = 1
        labels[phantom.labels == LABELS["spleen"]] = 2
        affine = np.diag([*phantom.spacing, 1.0])
        nib.save(nib.Nifti1Image(phantom.image.astype(np.int16), affine), folder / f"scan{i}.nii.gz")
        nib.save(nib.Nifti1Image(labels, affine), folder / f"organs{i}.nii.gz")


def write_backbone(folder: Path) -> None:
    contract = BackboneContract(
        id="toy",
        architecture={"kind": "toy_encoder", "features": 10, "head": False},
        classes=(),
        softmax=False,
        channel_names=("CT",),
        image_reader_writer="NibabelIOWithReorient",
        transpose_forward=(2, 1, 0),
        spacing=(14.0, 14.0, 14.0),
        normalization_schemes=("ZScoreNormalization",),
        use_mask_for_norm=(False,),
        foreground_intensity_properties_per_channel={},
        resampling_fn_data="resample_data_or_seg_to_shape",
        resampling_fn_data_kwargs={"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": False},
        patch_size=(16, 16, 16),
        smallest_window=(16, 16, 16),
        divisor=(4, 4, 4),
    )
    torch.manual_seed(0)
    save_backbone(contract, ToyEncoder(contract, "last").backbone_state(), folder)


def edit_plans(folder: Path) -> None:
    file = folder / "nnUNet_preprocessed" / DATASET / "FSEFTPlans_toy.json"
    plans = json.loads(file.read_text())
    keys = {"fseft_epochs": 2, "fseft_steps_per_epoch": 2, "fseft_views": 2, "fseft_prior_from_epoch": 0}
    plans["configurations"][CONFIGURATION].update(keys, fseft_predict_steps=2, fseft_predict_gamma=0.0)
    plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]["options"] = {"gains": {"groups": 2}}
    file.write_text(json.dumps(plans))


def trained(folder: Path, trainer: str) -> Path:
    run_training("501", CONFIGURATION, 0, trainer, "FSEFTPlans_toy", device=torch.device("cpu"))
    fold = folder / "nnUNet_results" / DATASET / f"{trainer}__FSEFTPlans_toy__{CONFIGURATION}" / "fold_0"
    run = RunFile.load(fold)
    assert len(run.epochs) == 2 and len(run.support) == 2
    return fold


def predicted(folder: Path, trainer: str, monkeypatch) -> np.ndarray:
    """Label map that nnUNetv2_predict makes of a training image."""
    output = folder / f"predicted_{trainer}"
    images = folder / "one"
    images.mkdir(exist_ok=True)
    source = folder / "nnUNet_raw" / DATASET / "imagesTr" / "toy_0_0000.nii.gz"
    (images / source.name).write_bytes(source.read_bytes())
    model = ["-d", "501", "-c", CONFIGURATION, "-tr", trainer, "-p", "FSEFTPlans_toy", "-f", "0", "-device", "cpu"]
    argv = ["nnUNetv2_predict", "-i", str(images), "-o", str(output), *model, "-npp", "0", "-nps", "0"]
    monkeypatch.setattr(sys, "argv", argv)
    predict_entry_point()
    return np.asarray(nib.load(output / "toy_0.nii.gz").dataobj)


def test_the_converted_dataset(work):
    content = json.loads((work / "nnUNet_raw" / DATASET / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "liver": 1, "spleen": 2} and content["numTraining"] == 3


def test_an_encoder_with_two_maps(work, monkeypatch):
    fold = trained(work, "FSEFTTrainer_Adapter")
    weights = read_checkpoint(fold / "checkpoint_final.pth")["network_weights"]
    # ten features of the two maps; the planner lays the image beside them
    assert weights["feature_mean"].shape == (11,) and weights["reduction.weight"].shape == (32, 11, 1, 1, 1)
    assert predicted(work, "FSEFTTrainer_Adapter", monkeypatch).shape == (24, 20, 16)


def test_a_method_inside_the_backbone(work, monkeypatch):
    fold = trained(work, "FSEFTTrainer_Gains")
    weights = read_checkpoint(fold / "checkpoint_final.pth")["network_weights"]
    own = {"backbone.tuned.first.gain", "head.weight", "head.bias"}
    assert set(weights) == own | {"feature_mean", "feature_std", "is_fitted"}
    gain = weights["backbone.tuned.first.gain"]
    assert gain.shape == (2,) and not torch.equal(gain, torch.ones(2))  # the option of the plans, trained
    assert RunFile.load(fold).trained_parameters == 2 + 3 * 11 + 3
    assert predicted(work, "FSEFTTrainer_Gains", monkeypatch).shape == (24, 20, 16)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"gain": {}}, r"The options in the plans' arch_kwargs name \['gain'\]: methods are zero_shot, "),
        ({"gains": {"group": 2}}, r"The options of 'gains' .* hold \['group'\]: known are groups"),
        ({"fseft": {"rank": 2}}, r"The options of 'fseft' .* hold \['rank'\]: known are none"),
    ],
)
def test_options_that_nobody_has(work, options, sentence):
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from fsefs_nnunet.methods.network import build_network

    plans = json.loads((work / "nnUNet_preprocessed" / DATASET / "FSEFTPlans_toy.json").read_text())
    plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]["options"] = options
    configuration = PlansManager(plans).get_configuration(CONFIGURATION)
    method = METHODS["fseft" if "fseft" in options else "gains"]
    with pytest.raises(InputError, match=sentence):
        build_network(method, configuration, 1, 3)


def test_what_a_method_adds_stays_in_eval_mode(work):
    contract = find_backbone("toy")
    network = AdaptedNetwork(1, 3, "toy", contract.sha256, "linear_probe", "last", None, 0, inside=Gains(2)).train()
    assert not network.backbone.module.first.dropout.training
    image = torch.rand(1, 1, 16, 16, 16)
    assert torch.equal(network(image), network(image))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"trainer": "MyTrainer"}, "the name of a trainer must begin with FSEFT"),
        ({"learns_from": BANK}, "it learns from patches, not stored features"),
        ({"trains_with_prior": True}, "need stored features"),
    ],
)
def test_rows_that_contradict_themselves(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(ROWS[0], **changes)


def test_a_prior(work, monkeypatch):
    fold = trained(work, "FSEFTTrainer_Share")
    run = RunFile.load(fold)
    assert set(run.prior) == {"liver", "spleen"} and 0 < run.prior["spleen"]["share"] < run.prior["liver"]["share"]
    assert all(epoch["penalty"] > 0 for epoch in run.epochs)
    assert predicted(work, "FSEFTTrainer_Share", monkeypatch).shape == (24, 20, 16)
    model = ["-d", "501", "-c", CONFIGURATION, "-tr", "FSEFTTrainer_Share", "-p", "FSEFTPlans_toy", "-f", "0"]
    output = work / "transductive"
    assert main(["predict", "-i", str(work / "one"), "-o", str(output), *model, "-device", "cpu"]) == 0
    report = json.loads((output / "toy_0_sizes.json").read_text())
    assert report["steps"] == [2] and report["classes"]["liver"]["prior"] == {
        "share": pytest.approx(run.prior["liver"]["share"], abs=1e-4)
    }
