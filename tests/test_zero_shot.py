"""Prediction by the backbone's own head: nnU-Net's predictor against plain computations."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunet_models import CONFIGURATION, PATCH, write_checkpoint, write_model
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from published_files import turned
from torch import nn

from fsefs_nnunet.backbones.architectures import ARCHITECTURES
from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.backbones.published.nnunet_models import import_nnunet_model
from fsefs_nnunet.backbones.store import save_backbone
from fsefs_nnunet.backbones.zoo import ZOO
from fsefs_nnunet.cli.main import main
from fsefs_nnunet.inference.zero_shot import ABSENT, ZeroShotNetwork


class Stand(nn.Module):
    """A backbone that passes the image on to its head, with `classes` from row 0 on."""

    def __init__(self, classes: tuple[str, ...], softmax: bool, contract):
        super().__init__()
        channels = ("CT",) * len(classes)
        self.contract = replace(contract, classes=classes, softmax=softmax, channel_names=channels)
        self.head = nn.Conv3d(len(classes), len(classes), 1)
        nn.init.dirac_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, image):
        return [image]


CLASSES = ("background", "liver", "spleen", "aorta", "pancreas")
LABELS = {"background": 0, "Aorta": 2, "heart": 3, "Spleen": 1}
REGIONS = {"background": 0, "trunk": [1, 2], "liver": 1, "spleen": 2}


@pytest.fixture
def universal() -> torch.Tensor:
    """Logits of the five classes, (1, 5, 6, 7, 8)."""
    return torch.randn((1, 5, 6, 7, 8), generator=torch.Generator().manual_seed(0))


def outputs(network: ZeroShotNetwork, image: torch.Tensor) -> torch.Tensor:
    """Of one window, (1, C, X, Y, Z) -> (1, labels or regions, X, Y, Z)."""
    with torch.no_grad():
        return network.outputs(network(image)[0][0])[None]


def test_softmax_head_with_labels(contract, universal):
    """The backbone's own segmentation; where another class of its wins, it is background."""
    network = ZeroShotNetwork(Stand(CLASSES, True, contract), LABELS, False)
    assert network.matches == {"Spleen": "spleen", "Aorta": "aorta"}
    expected = torch.tensor([0, 0, 1, 2, 0])[universal.argmax(1)]
    assert torch.equal(outputs(network, universal).argmax(1), expected)
    assert {0, 1, 2} == set(expected.unique().tolist())


def test_sigmoid_head_with_labels(contract, universal):
    """The largest positive logit among the dataset's labels."""
    logits = outputs(ZeroShotNetwork(Stand(CLASSES, False, contract), LABELS, False), universal)
    spleen, aorta = universal[:, 2], universal[:, 3]
    expected = torch.where(torch.maximum(spleen, aorta) > 0, torch.where(spleen > aorta, 1, 2), 0)
    assert torch.equal(logits.argmax(1), expected)
    assert (logits[:, 0] == 0).all() and (logits[:, 3] == ABSENT).all()


@pytest.mark.parametrize("softmax", [True, False])
def test_regions(contract, universal, softmax):
    logits = outputs(ZeroShotNetwork(Stand(CLASSES, softmax, contract), REGIONS, True), universal)
    probabilities = universal.softmax(1) if softmax else universal.sigmoid()
    torch.testing.assert_close(logits.sigmoid()[:, 1:], probabilities[:, 1:3])
    assert (logits[:, 0].sigmoid() < 1e-20).all()


def test_a_head_without_rows(contract):
    stand = Stand(CLASSES, False, contract)
    stand.contract = replace(stand.contract, architecture={"kind": "suprem_unet", "head": False})
    with pytest.raises(
        ValueError, match="knows none of the labels Spleen, Aorta, heart; its head knows no class: choose"
    ):
        ZeroShotNetwork(stand, LABELS, False)


def test_nnunet_model(tmp_path, monkeypatch):
    """An imported model's own segmentation, without the classes that the dataset does not have."""
    monkeypatch.setenv("fseft_backbones", str(tmp_path / "backbones"))
    model = write_model(tmp_path / "model", ["CT"])
    import_nnunet_model("mine", model.folder, tmp_path / "backbones")
    labels = {"background": 0, "spleen": 1, "Liver": 2}
    network = ZeroShotNetwork(FrozenBackbone("mine", "last"), labels, False)
    image = torch.randn((1, 1, *PATCH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own, made = model.network(image)[0].argmax(1), outputs(network, image).argmax(1)
    assert network.matches == {"Liver": "liver"} and (own == 1).any() and (own == 2).any()  # liver is row 1 there
    assert torch.equal(made, torch.where(own == 1, 2, 0))


# ---- the command ----


def predict(workspace, backbone: str, output, *cases: str) -> dict[str, nib.Nifti1Image]:
    images = workspace.root / "some_images"
    images.mkdir(exist_ok=True)
    for case in cases:
        source = workspace.raw / "imagesTr" / f"{case}_0000.nii.gz"
        (images / source.name).write_bytes(source.read_bytes())
    argv = ["zero_shot", "-d", "77", "-b", backbone, "-i", str(images), "-o", str(output), "-device", "cpu"]
    assert main(argv) == 0
    return {case: nib.load(output / f"{case}.nii.gz") for case in cases}


def window_logits(workspace, backbone: FrozenBackbone, case: str, size: int) -> torch.Tensor:
    """The head's logits of an image that fits one window of size^3, padded symmetrically. (classes, X, Y, Z)."""
    image = nib.load(workspace.raw / "imagesTr" / f"{case}_0000.nii.gz").get_fdata()
    image = (np.clip(image, -175, 250) + 175) / 425
    room = [size - n for n in image.shape]
    padded = np.pad(image, [(r // 2, r - r // 2) for r in room])
    with torch.no_grad():
        (features,) = backbone(torch.tensor(padded, dtype=torch.float32)[None, None])
        logits = backbone.head(features)[0]
    return logits[(slice(None), *(slice(r // 2, r // 2 + n) for r, n in zip(room, image.shape)))]


def expected_segmentation(logits: torch.Tensor, rows: dict[int, int]) -> np.ndarray:
    """rows: label -> row of the head."""
    stack = torch.stack([torch.zeros_like(logits[0]), *(logits[k] for k in rows.values())])
    return np.array([0, *rows])[stack.argmax(0).numpy()]


def test_several_windows_and_classes_that_compete(workspace, tmp_path, monkeypatch, float32):
    """The model's own segmentation as stock nnU-Net makes it; what the dataset does not name is background."""
    monkeypatch.setenv("fseft_backbones", str(tmp_path / "backbones"))
    labels = {"background": 0, "liver": 1, "tumour": 2, "spleen": 3, "aorta": 4}
    model = write_model(tmp_path / "model", ["CT"], labels, spacing=[12.0, 8.0, 9.0])
    image = workspace.raw / "imagesTr" / "case_0_0000.nii.gz"
    middle = torch.tensor(nib.load(image).get_fdata(dtype=np.float32)[6:22, 4:28, 10:16].transpose(2, 0, 1).copy())
    model.network.decoder.deep_supervision = False
    with torch.no_grad():  # so that every class wins somewhere
        model.network.decoder.seg_layers[-1].bias -= model.network((middle[None, None] - 70) / 40).mean((0, 2, 3, 4))
    write_checkpoint(model.folder / "fold_0" / "checkpoint_final.pth", model.network, model.plans)
    import_nnunet_model("mine", model.folder, tmp_path / "backbones")
    made = predict(workspace, "mine", tmp_path / "out", "case_0")["case_0"]
    manager = PlansManager(model.plans)
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), perform_everything_on_device=False)
    content = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
    weights = [model.network.state_dict()]
    predictor.manual_initialization(
        model.network, manager, manager.get_configuration(CONFIGURATION), weights, content, "", None
    )
    predictor.predict_from_files_sequential([[str(image)]], [str(tmp_path / "stock")])
    stock = np.asarray(nib.load(tmp_path / "stock.nii.gz").dataobj)
    assert set(np.unique(stock)) == {0, 1, 2, 3, 4}
    # nnU-Net blends in half precision; were the classes to compete in each window, 1e-2 would differ
    assert (np.asarray(made.dataobj) != np.where(stock == 3, 1, 0)).mean() < 2e-3


def test_one_bad_volume_does_not_stop_the_others(workspace, tmp_path, capsys):
    """The dataset.json is of an older nnU-Net."""
    images, output = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    source = workspace.raw / "imagesTr" / "case_0_0000.nii.gz"
    content, image = source.read_bytes(), nib.load(source)
    voxels = image.get_fdata(dtype=np.float32)
    for name, data in (("good", content), ("cut", content[: len(content) // 2]), ("garbage", b"no image")):
        (images / f"{name}_0000.nii.gz").write_bytes(data)
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        bad = voxels.copy()
        bad[3, 4, 5] = value
        nib.save(nib.Nifti1Image(bad, image.affine), images / f"{name}_0000.nii.gz")
    nib.save(nib.Nifti1Image(np.stack([voxels] * 2, -1), image.affine), images / "series_0000.nii.gz")
    file = workspace.raw / "dataset.json"
    dataset = json.loads(file.read_text())
    dataset["modality"] = dataset.pop("channel_names")
    file.write_text(json.dumps(dataset))
    argv = ["zero_shot", "-d", "77", "-i", str(images), "-o", str(output), "-device", "cpu"]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "fseft: 5 case(s) failed:\n" in err and "Traceback" not in err
    failures = err.split("failed:\n")[1].splitlines()
    assert len(failures) == 5
    for name in ("cut", "garbage", "nan", "inf", "series"):
        assert sum(line.startswith(f"{images}/{name}_0000.nii.gz was not segmented: ") for line in failures) == 1
    assert err.count("_0000.nii.gz was not segmented: it holds NaN or infinite values: repair the raw image") >= 2
    assert "series_0000.nii.gz was not segmented: it has 4 dimensions: give one file per volume" in err
    assert [f.name for f in sorted(output.iterdir())] == ["dataset.json", "good.nii.gz", "plans.json"]
    assert np.asarray(nib.load(output / "good.nii.gz").dataobj).any()


def test_z_scoring_model(workspace, tmp_path, monkeypatch):
    """An imported model for MR, whose plans give no intensities."""
    monkeypatch.setenv("fseft_backbones", str(tmp_path / "backbones"))
    labels = {"background": 0, "spleen": 1}
    import_nnunet_model(
        "mr", write_model(tmp_path / "model", ["MRI"], labels, spacing=[10.0] * 3).folder, tmp_path / "backbones"
    )
    file = workspace.raw / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "channel_names": {"0": "MRI"}}))
    made = predict(workspace, "mr", tmp_path / "out", "case_0")["case_0"]
    assert set(np.unique(made.dataobj)) == {0, 1}


def test_embedded_backbone(workspace, tmp_path, capsys):
    made = predict(workspace, "phantom", tmp_path / "out", "case_0", "case_1")
    out = capsys.readouterr().out
    assert "by the head of phantom: {'spleen': 'spleen', 'kidney_left': 'kidney_left'}" in out
    assert "The backbone's head does not know stomach: these labels are left as background." in out
    backbone = FrozenBackbone("phantom", "last")
    rows = {1: backbone.contract.classes.index("spleen"), 3: backbone.contract.classes.index("kidney_left")}
    for case, image in made.items():
        expected = expected_segmentation(window_logits(workspace, backbone, case, 40), rows)
        segmentation = np.asarray(image.dataobj)
        assert (segmentation != expected).mean() < 1e-4 and set(np.unique(segmentation)) == {0, 1, 3}
        np.testing.assert_array_equal(image.affine, nib.load(workspace.raw / "labelsTr" / f"{case}.nii.gz").affine)
        truth = np.asarray(nib.load(workspace.raw / "labelsTr" / f"{case}.nii.gz").dataobj)
        for label in (1, 3):
            assert 2 * ((segmentation == label) & (truth == label)).sum() > 0.5 * (
                (segmentation == label).sum() + (truth == label).sum()
            )
    plans = json.loads((tmp_path / "out" / "plans.json").read_text())
    own = workspace.plans()["configurations"]["3d_fullres_1shot"]
    assert plans["configurations"]["3d_fullres"]["patch_size"] == own["patch_size"]


@pytest.mark.slow
def test_published_architecture(workspace, tmp_path, monkeypatch, float32):
    """fseft's 29 sigmoid rows on a narrow Swin UNETR with random weights, at the spacing of the tiny dataset.

    However the image is stored, its segmentation lies on the same places.
    """
    pytest.importorskip("monai", reason="Swin UNETR needs MONAI: pip install fsefs_nnunet[monai]")
    monkeypatch.setenv("fseft_backbones", str(tmp_path / "store"))
    contract = ZOO["fseft"].contract({})
    window = (64, 64, 64)
    contract = replace(
        contract,
        architecture={**contract.architecture, "features": 12},
        spacing=(10.0, 10.0, 10.0),
        patch_size=window,
        smallest_window=window,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = ARCHITECTURES["swin_unetr"](contract, "last").backbone_state()
    state["head.bias"] = torch.zeros(29)
    save_backbone(contract, state, tmp_path / "store")
    made = predict(workspace, "fseft", tmp_path / "out", "case_0")["case_0"]
    logits = window_logits(workspace, FrozenBackbone("fseft", "last"), "case_0", 64)
    # rows of the universal template: spleen, kidney_left and stomach
    expected = expected_segmentation(logits, {1: 0, 3: 2, 2: 6})
    assert set(np.unique(expected)) == {0, 1, 2, 3}
    assert (np.asarray(made.dataobj) != expected).mean() < 1e-3
    file = workspace.raw / "imagesTr" / "case_0_0000.nii.gz"
    image = nib.load(file)
    image = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
    for axes in ("LPS", "LAS", "SRP"):
        stored = turned(image, axes)
        nib.save(stored, file)
        other = predict(workspace, "fseft", tmp_path / axes, "case_0")["case_0"]
        assert nib.aff2axcodes(other.affine) == tuple(axes) and other.shape == stored.shape
        back = turned(other, "RAS")
        np.testing.assert_allclose(back.affine, made.affine, atol=1e-4)
        assert (np.asarray(back.dataobj) != np.asarray(made.dataobj)).mean() < 1e-3
    # a header that contradicts the voxels is another anatomy
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1], image.affine), file)
    swapped = predict(workspace, "fseft", tmp_path / "swapped", "case_0")["case_0"]
    assert (np.asarray(swapped.dataobj) != np.asarray(made.dataobj)).mean() > 0.02


def test_bad_input(workspace, tmp_path, capsys, monkeypatch):
    def refused(*argv: str) -> str:
        assert main(["zero_shot", "-d", "77", "-o", str(tmp_path / "out"), "-device", "cpu", *argv]) == 2
        err = capsys.readouterr().err
        assert err.startswith("fseft: ") and err.count("\n") == 1
        return err

    images = str(workspace.raw / "imagesTr")
    assert "has no images named <case>_0000.nii.gz" in refused("-i", str(tmp_path))
    monkeypatch.setenv("fseft_backbones", str(tmp_path / "none"))
    message = refused("-i", images, "-b", "btcv")
    assert "Backbone 'btcv' is not installed" in message and "import it: fseft backbones download btcv." in message
    file = workspace.raw / "dataset.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "labels": {"background": 0, "stomach": 1}}))
    assert "'phantom' knows none of the labels stomach; its head knows " in refused("-i", images)
    file.write_text(json.dumps({**content, "channel_names": {"0": "CT", "1": "CT"}}))
    missing = "scan_0_0001.nii.gz was not segmented: it is missing: every case needs 2 channel(s)"
    assert missing in refused("-i", str(workspace.queries))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU here that PyTorch can use as 'cuda': add -device cpu" in refused("-i", images, "-device", "cuda")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("")
    file.write_text(json.dumps(content))
    assert "out cannot be written (File exists): choose another output folder." in refused("-i", images)
    file.write_text("{")
    assert "dataset.json is not an nnU-Net dataset.json" in refused("-i", images)


def test_a_constant_image_shows_no_organ(workspace, tmp_path, capsys):
    image = nib.load(workspace.raw / "imagesTr" / "case_0_0000.nii.gz")
    (tmp_path / "images").mkdir()
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.int16), image.affine), tmp_path / "images" / "x_0000.nii.gz")
    assert main(["zero_shot", "-d", "77", "-i", str(tmp_path / "images"), "-o", str(tmp_path / "out")]) == 0
    assert "x_0000.nii.gz is constant (0): nothing is segmented in it." in capsys.readouterr().out
    made = nib.load(tmp_path / "out" / "x.nii.gz")
    assert made.shape == image.shape and not np.asarray(made.dataobj).any()


def test_an_image_without_air_is_told(workspace, tmp_path, capsys):
    image = nib.load(workspace.raw / "imagesTr" / "case_0_0000.nii.gz")
    (tmp_path / "images").mkdir()
    shifted = np.clip(np.asarray(image.dataobj) + 1024, 0, None)
    nib.save(nib.Nifti1Image(shifted, image.affine), tmp_path / "images" / "x_0000.nii.gz")
    assert main(["zero_shot", "-d", "77", "-i", str(tmp_path / "images"), "-o", str(tmp_path / "out")]) == 0
    assert "x_0000.nii.gz: no value below 0, unlike CT in HU" in capsys.readouterr().out


def test_no_image_that_can_be_segmented(workspace, tmp_path, capsys):
    (tmp_path / "x_0000.nii.gz").write_bytes(b"no image")
    assert main(["zero_shot", "-d", "77", "-i", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "fseft: None of 1 image(s) can be segmented. " in error and "x_0000.nii.gz was not segmented: it" in error
