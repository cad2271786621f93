import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from nnunet_models import PATCH, write_model
from published_files import narrow_contract, narrow_state

from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.backbones.published.nnunet_models import import_nnunet_model
from fsefs_nnunet.backbones.store import EMBEDDED, save_backbone
from fsefs_nnunet.features.map_crops import MapCrops
from fsefs_nnunet.methods.network import AdaptedNetwork, ReducedBackbone, summable

SOFTMAX = {"Right Kidney": 3, "background": 0, "spleen": 2, "stomach": 1}  # rows follow the values, not this order
REGIONS = {"background": 0, "kidneys": [1, 2], "kidney_left": 2, "stomach": 3, "ignore": 4}
TRAINED = {"reduction.weight", "adapter.conv1.weight", "adapter.conv2.weight", "head.weight", "head.bias"}
BUFFERS = {"feature_mean", "feature_std", "is_fitted"}


def build(contract, adapter="spatial", stages="all", channels=48, num_classes=4, **changes) -> AdaptedNetwork:
    kwargs = dict(backbone="phantom", sha256=contract.sha256, adapter=adapter, stages=stages, channels=channels, seed=1)
    return AdaptedNetwork(**{"input_channels": 1, "num_classes": num_classes, **kwargs, **changes})


def randomised(network: AdaptedNetwork, seed: int) -> AdaptedNetwork:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def features_of(backbone: FrozenBackbone, image: torch.Tensor) -> torch.Tensor:
    """All maps, at full resolution."""
    return MapCrops.whole(backbone(image), image.shape[2:]).at_full_resolution()


def fit(network: AdaptedNetwork, image: torch.Tensor, labels: dict, has_regions: bool) -> dict:
    features = features_of(network.backbone, image).double().transpose(0, 1).flatten(1)
    return network.fit(features.mean(1).float(), features.std(1).float(), labels, has_regions)


# ---- the frozen backbone ----


def test_backbone_is_in_nobodys_parameters_or_state():
    model = torch.nn.Sequential(FrozenBackbone("phantom", "last"), torch.nn.Conv3d(16, 2, 1))
    assert [name for name, _ in model.named_parameters()] == ["1.weight", "1.bias"]
    assert list(model.state_dict()) == ["1.weight", "1.bias"]
    assert sum(p.numel() for p in model[0].module.parameters()) > 1e6


def test_backbone_stays_in_eval_mode_without_gradients(image, device):
    backbone = FrozenBackbone("phantom", "last").to(device)
    torch.nn.Sequential(backbone).train()
    assert not any(module.training for module in backbone.module.modules())
    assert not any(p.requires_grad for p in backbone.module.parameters())
    (features,) = backbone(image.to(device).requires_grad_())
    assert not features.requires_grad
    assert features.shape == (1, 16, 24, 16, 8)


def test_backbone_follows_to(image):
    backbone = FrozenBackbone("phantom", "all")
    single = features_of(backbone, image)
    torch.nn.Sequential(backbone).to(torch.float64)
    assert {p.dtype for p in backbone.module.parameters()} == {torch.float64}
    double = features_of(backbone, image.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-3, atol=1e-4)
    backbone.to("meta")
    assert {p.device.type for p in backbone.module.parameters()} == {"meta"}


def test_stages_share_their_leading_channels(image):
    last, every, skips = (FrozenBackbone("phantom", stages) for stages in ("last", "all", "skips"))
    assert [b.out_channels for b in (last, every, skips)] == [16, 16 + 32 + 64, 2 * (16 + 32 + 64)]
    maps = skips(image)
    assert [m.shape[1:] for m in maps] == [
        (m.channels, *(n // s for n, s in zip((24, 16, 8), m.stride))) for m in skips.maps
    ]
    assert [m.stride[0] for m in skips.maps] == [1, 2, 4, 2, 4, 1]
    assert all(torch.equal(a, b) for b in (every(image), last(image)) for a, b in zip(maps, b))
    with torch.no_grad():
        assert all(torch.equal(maps[i], skips.module.unet.encoder(image)[s]) for i, s in ((3, 1), (4, 2), (5, 0)))


@pytest.mark.parametrize("stages", ["last", "all", "skips"])
def test_features_and_head_are_the_unet(image, stages):
    backbone = FrozenBackbone("phantom", stages)
    with torch.no_grad():
        logits = backbone.head(backbone(image)[0])
        torch.testing.assert_close(logits, backbone.module.unet(image))


def test_unknown_stages():
    with pytest.raises(ValueError, match="has stages 'skips', 'all', 'last', but the plans' arch_kwargs name 'first'"):
        FrozenBackbone("phantom", "first")


# ---- files that are not what they should be ----


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The embedded backbone, copied to the user's folder, where it takes precedence."""
    monkeypatch.setenv("fseft_backbones", str(tmp_path))
    for ending in ("json", "safetensors"):
        shutil.copy(EMBEDDED / f"phantom.{ending}", tmp_path)
    return tmp_path / "phantom.safetensors"


def test_a_whole_copy_loads(copy):
    FrozenBackbone("phantom", "last")


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-4096])


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, lambda file: file.write_bytes(b"")])
def test_damaged_weights(copy, damage):
    damage(copy)
    with pytest.raises(ValueError, match=r"phantom\.safetensors are damaged.*import them again"):
        FrozenBackbone("phantom", "last")


def test_missing_weights(copy):
    copy.unlink()
    with pytest.raises(ValueError, match=r"phantom\.safetensors are missing: import"):
        FrozenBackbone("phantom", "last")


def test_damaged_contract(copy):
    copy.with_suffix(".json").write_text('{"id": "phantom"')
    with pytest.raises(ValueError, match=r"phantom\.json is not a backbone contract"):
        FrozenBackbone("phantom", "last")


def test_contract_of_unknown_kind(copy):
    file = copy.with_suffix(".json")
    content = json.loads(file.read_text())
    content["architecture"]["kind"] = "transformer"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="'transformer'; known kinds: anatomix, highres3dnet, "):
        FrozenBackbone("phantom", "last")


def test_weights_of_another_architecture(copy):
    file = copy.with_suffix(".json")
    content = json.loads(file.read_text())
    content["classes"].append("appendix")
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="do not fit the architecture"):
        FrozenBackbone("phantom", "last")


def test_unknown_backbone_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'nothing' is not installed; there are: .*phantom.*fseft_backbones.*import"):
        FrozenBackbone("nothing", "last")


def test_other_weights_than_the_plans_were_made_with():
    with pytest.raises(ValueError, match=f"SHA-256 {'0' * 12}, but here it has .*plan and train again"):
        FrozenBackbone("phantom", "last", "0" * 64)


# ---- the adapted network ----


def test_trained_parameters_are_those_of_reduction_adapter_and_head(contract):
    network = build(contract)
    assert {name for name, _ in network.named_parameters()} == TRAINED
    assert set(network.state_dict()) == TRAINED | BUFFERS
    assert sum(p.numel() for p in network.adapter.parameters()) == 124_416
    assert sum(p.numel() for p in network.parameters()) == 112 * 48 + 124_416 + 48 * 4 + 4
    probe = build(contract, "linear_probe", channels=None)
    assert {name for name, _ in probe.named_parameters()} == {"head.weight", "head.bias"}
    assert sum(p.numel() for p in probe.parameters()) == (16 + 32 + 64) * 4 + 4


def test_only_named_parameters_get_gradients(contract, image, device):
    network = randomised(build(contract), 0).to(device)
    network(image.to(device)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    assert all(p.grad is None for p in network.backbone.module.parameters())


def test_seed_alone_decides_the_start(contract):
    torch.manual_seed(3)
    first = build(contract).state_dict()
    torch.manual_seed(4)
    again, other = build(contract).state_dict(), build(contract, seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["adapter.conv1.weight"], other["adapter.conv1.weight"])


def test_state_dicts_go_into_a_fresh_network_one_after_another(contract, image, device):
    """As nnU-Net's predictor does with folds: strict, again and again, in eval mode."""
    image = image.to(device)
    networks = [randomised(build(contract), seed).to(device) for seed in (1, 2)]
    for seed, network in enumerate(networks):
        fit(network, image + seed * image**2, SOFTMAX, False)
    fresh = build(contract, seed=7).to(device).eval()
    outputs = []
    with torch.no_grad():
        for network in [*networks, networks[0]]:
            fresh.load_state_dict(network.state_dict())
            assert bool(fresh.is_fitted)
            outputs.append(fresh(image))
            assert torch.equal(outputs[-1], network(image))
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])
    assert set(fresh.state_dict()) == TRAINED | BUFFERS


def test_state_knows_its_backbone_through_a_file(contract, tmp_path):
    """As nnU-Net's predictor reads it and as we do; a state without the entry, of an earlier version, loads."""
    torch.save(build(contract).state_dict(), tmp_path / "state.pth")
    fresh = build(contract)
    fresh.backbone.contract = replace(contract, sha256="0" * 64)
    for weights_only in (False, True):
        state = torch.load(tmp_path / "state.pth", weights_only=weights_only)
        with pytest.raises(ValueError, match=f"SHA-256 {contract.sha256[:12]}, .* 'phantom' of 000000000000: restore"):
            fresh.load_state_dict(state)
    fresh.load_state_dict(dict(state))


def test_state_of_another_network_is_refused(contract):
    with pytest.raises(RuntimeError, match="size mismatch for head.weight"):
        build(contract).load_state_dict(build(contract, num_classes=3).state_dict())


def test_adapt_takes_what_forward_computes(contract, image, device):
    network, image = randomised(build(contract), 0).to(device), image.to(device)
    fit(network, image, SOFTMAX, False)
    with torch.no_grad():
        expected = network.adapt(features_of(network.backbone, image))
        torch.testing.assert_close(network(image), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stages, maps", [("last", 1), ("all", 3), ("skips", 3)])
def test_a_reduced_backbone_gives_one_map_a_resolution(contract, image, device, stages, maps):
    """Finishing its maps gives the network's logits."""
    network, image = randomised(build(contract, stages=stages), 0).to(device), image.to(device)
    fit(network, image, SOFTMAX, False)
    reduced = ReducedBackbone(network)
    assert not any(p.requires_grad and id(p) not in map(id, network.parameters()) for p in reduced.parameters())
    with torch.no_grad():
        found = reduced(image)
        assert len(found) == len(reduced.maps) == maps
        for values, of_map in zip(found, reduced.maps):
            assert values.shape[1:] == (48, *(n // s for n, s in zip(image.shape[2:], of_map.stride)))
            assert of_map.channels == 48
        logits = network.finish(MapCrops.whole(found, image.shape[2:]))
        torch.testing.assert_close(logits, network(image), rtol=1e-4, atol=1e-4)


def test_the_reduction_standardises(contract, image, device):
    """In one product what standardising first and reducing then gives."""
    network, image = randomised(build(contract, stages="all", channels=48), 0), image.to(device)
    torch.nn.init.normal_(network.reduction.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    fit(network.to(device), image, SOFTMAX, False)
    network = network.double()
    with torch.no_grad():
        features = features_of(network.backbone, image.double())
        mean, std = (value.view(1, -1, 1, 1, 1) for value in (network.feature_mean, network.feature_std))
        expected = network.head(network.adapter(network.reduction((features - mean) / std)))
        torch.testing.assert_close(network.adapt(features), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("channels", [None, 48])
def test_a_channel_that_is_not_kept_is_taken_for_its_mean(contract, image, device, channels):
    network, image = randomised(build(contract, channels=channels), 0).to(device), image.to(device)
    fit(network, image, SOFTMAX, False)
    network = network.double()
    with torch.no_grad():
        features = features_of(network.backbone, torch.cat([image, image + 1]).double())
        kept = (torch.rand(features.shape[:2], generator=torch.Generator().manual_seed(0)) > 0.5).to(device)
        filled = torch.where(kept[..., None, None, None], features, network.feature_mean.view(1, -1, 1, 1, 1))
        torch.testing.assert_close(network.adapt(features, kept), network.adapt(filled), atol=1e-9, rtol=1e-9)
        assert torch.equal(network.adapt(features, torch.ones_like(kept)), network.adapt(features))
        maps = MapCrops.whole(network.backbone(torch.cat([image, image + 1]).double()), image.shape[2:])
        torch.testing.assert_close(network.adapt(maps, kept), network.adapt(features, kept), atol=1e-6, rtol=1e-6)


VARIANTS = [
    ("context", "all", 48),
    ("spatial", "all", 48),
    ("spatial", "last", 48),
    ("spatial", "last", None),
    ("linear_probe", "all", None),
]


@pytest.mark.parametrize("adapter, stages, channels", [*VARIANTS, ("linear_probe", "last", None)])
def test_step_0_is_the_zero_shot_prediction_of_labels(contract, image, device, adapter, stages, channels):
    network, image = build(contract, adapter, stages, channels).to(device), image.to(device)
    matches = fit(network, image, SOFTMAX, False)
    assert matches == {"spleen": "spleen", "Right Kidney": "kidney_right"}
    with torch.no_grad():
        logits, universal = network(image), network.backbone.module.unet(image)
    assert (logits[:, 0] == 0).all()
    rows = {2: contract.classes.index("spleen"), 3: contract.classes.index("kidney_right")}
    for row, k in rows.items():
        torch.testing.assert_close(logits[:, row], universal[:, k], rtol=0, atol=1e-4)
    # against the background alone, a known label wins where its universal logit is positive
    for row, k in rows.items():
        clear = universal[:, k].abs() > 1e-3
        assert torch.equal((logits[:, [0, row]].argmax(1) > 0)[clear], (universal[:, k] > 0)[clear])


@pytest.mark.parametrize("adapter, stages, channels", VARIANTS)
def test_step_0_is_the_zero_shot_prediction_of_regions(contract, image, device, adapter, stages, channels):
    network, image = build(contract, adapter, stages, channels, num_classes=3).to(device), image.to(device)
    assert fit(network, image, REGIONS, True) == {"kidneys": "kidneys", "kidney_left": "kidney_left"}
    with torch.no_grad():
        logits, universal = network(image), network.backbone.module.unet(image)
    for row, name in enumerate(("kidneys", "kidney_left")):
        k = contract.classes.index(name)
        torch.testing.assert_close(logits[:, row], universal[:, k], rtol=0, atol=1e-4)


def softmax_network(tmp_path, monkeypatch, num_classes: int) -> AdaptedNetwork:
    """On an imported nnU-Net model of background, liver and tumour, which compete."""
    monkeypatch.setenv("fseft_backbones", str(tmp_path / "store"))
    mine = import_nnunet_model("mine", write_model(tmp_path / "model", ["CT"]).folder, tmp_path / "store")
    return build(mine, stages="all", channels=None, num_classes=num_classes, backbone="mine")


@pytest.mark.parametrize("labels, regions", [({"background": 0, "Liver": 2, "x": 1}, False), ({"tumour": [1]}, True)])
def test_step_0_of_a_head_whose_classes_compete(tmp_path, monkeypatch, labels, regions):
    """A label against the background alone, by the difference of their logits: their softmax's log odds."""
    network = softmax_network(tmp_path, monkeypatch, 1 if regions else 3)
    image = torch.randn((1, 1, *PATCH), generator=torch.Generator().manual_seed(1))
    matches = fit(network, image, {"background": 0, **labels}, regions)
    assert matches == ({"tumour": "tumour"} if regions else {"Liver": "liver"})
    with torch.no_grad():
        logits, universal = network(image), network.backbone.module.unet(image)
    row, k = (0, 2) if regions else (2, 1)
    torch.testing.assert_close(logits[:, row], universal[:, k] - universal[:, 0], rtol=0, atol=1e-4)
    if not regions:
        assert (logits[:, 0] == 0).all()
        decided = logits[:, [0, row]].softmax(1)[:, 1]
        torch.testing.assert_close(decided, universal[:, [0, k]].softmax(1)[:, 1], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("backbone_id, features, size", [("btcv", 12, 64), ("suprem_unet", 8, 16)])
def test_public_architectures(tmp_path, monkeypatch, backbone_id, features, size):
    """At reduced width: what plans ask for, and step 0 of a softmax head where there is one."""
    if backbone_id == "btcv":
        pytest.importorskip("monai", reason="Swin UNETR needs MONAI: pip install fsefs_nnunet[monai]")
    monkeypatch.setenv("fseft_backbones", str(tmp_path))
    state = narrow_state(backbone_id, features)
    contract = save_backbone(narrow_contract(backbone_id, features), state, tmp_path)
    network = build(contract, stages="last", channels=features, backbone=backbone_id)
    image = torch.rand((1, 1, size, size, size), generator=torch.Generator().manual_seed(1))
    matches = fit(network, image, SOFTMAX, False)
    with torch.no_grad():
        features_of_image, logits = network.backbone(image)[0], network(image)
        assert logits.shape == (1, 4, size, size, size)
        if backbone_id == "suprem_unet":
            assert matches == {}  # no rows of a linear head
            return
        universal = network.backbone.head(features_of_image)
    assert matches == {"spleen": "spleen", "stomach": "stomach", "Right Kidney": "kidney_right"}
    for row, name in {1: "stomach", 2: "spleen", 3: "kidney_right"}.items():
        k = contract.classes.index(name)
        torch.testing.assert_close(logits[:, row], universal[:, k] - universal[:, 0], rtol=0, atol=1e-3)


def test_unknown_labels_start_fresh(contract, image):
    network, untouched = build(contract), build(contract)
    fit(network, image, SOFTMAX, False)
    assert torch.equal(network.head.weight[1], untouched.head.weight[1])
    strangers = build(contract)
    assert fit(strangers, image, {"background": 0, "a": 1, "b": 2, "c": 3}, False) == {}
    assert torch.equal(strangers.head.weight, untouched.head.weight)
    assert bool(strangers.is_fitted) and not torch.equal(strangers.feature_mean, untouched.feature_mean)


def test_several_channels_through_a_backbone_of_one(contract, image):
    """Side by side in each map, the first channel's first; the image may lie behind them."""
    one, two = FrozenBackbone("phantom", "all"), FrozenBackbone("phantom", "all+image", channels=2)
    images = torch.cat((image, image.flip(2)), 1)
    maps = two(images)
    assert [m.channels for m in two.maps] == [m.shape[1] for m in maps] == [32, 64, 128, 2]
    for made, first, second in zip(maps, one(image), one(image.flip(2))):
        torch.testing.assert_close(made, torch.cat((first, second), 1), rtol=1e-4, atol=1e-4)
    assert torch.equal(maps[-1], images)
    network = build(contract, input_channels=2)
    assert network(images).shape[1] == network.head.out_channels


def test_wrong_number_of_image_channels(contract, tmp_path, monkeypatch):
    monkeypatch.setenv("fseft_backbones", str(tmp_path))
    two = replace(contract, id="two", architecture={"kind": "raw_image"}, channel_names=("CT", "PET"), classes=())
    save_backbone(two, {"none": torch.zeros(1)}, tmp_path)
    with pytest.raises(ValueError, match=r"'two' takes 2 image channel\(s\), but the dataset has 3: choose another"):
        FrozenBackbone("two", "last", channels=3)


def test_adapter_narrower_than_the_head(contract):
    with pytest.raises(ValueError, match="^channels must be at least 16"):
        build(contract, channels=8)


def test_logits_that_nnunets_sliding_window_can_sum():
    """It sums in float16, weighted by up to 10.3 where windows overlap."""
    logits = torch.tensor([-1e9, -301.0, -300.0, -0.25, 0.0, 7.0, 300.0, 301.0, 8000.0, 1e9])
    made = summable(logits)
    assert torch.equal(made[2:7], logits[2:7])  # what fits is not touched
    assert (made.diff() > 0).all() and made.abs().max() * 10.3 < torch.finfo(torch.float16).max
    assert made[8] == pytest.approx(300 * (1 + math.log(8000 / 300)))
