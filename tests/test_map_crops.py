"""Crops of maps at their own resolution, and logits of whole volumes from slabs of them."""

import numpy as np
import pytest
import torch
from banks import CPU, WINDOW, Given, make_bank, request_of, whole_crop, whole_maps

from fsefs_nnunet import device as precision
from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.features.bank import FeatureBank
from fsefs_nnunet.features.layout import Layout
from fsefs_nnunet.features.map_crops import MapCrops, crop_of
from fsefs_nnunet.features.tiling import Tiling
from fsefs_nnunet.features.volume import VolumeFeatures
from fsefs_nnunet.features.windows import Slab
from fsefs_nnunet.inference import logits as logits_module
from fsefs_nnunet.inference.logits import BlocksOfLogits, logits_in_one_look, logits_of
from fsefs_nnunet.methods.network import AdaptedNetwork

pytestmark = pytest.mark.usefixtures("float32")
STRIDES = [(1, 1, 1), (2, 2, 2), (1, 2, 8), (4, 4, 4), (2, 2, 2)]
CROPS = [
    ((0, 0, 0), (8, 8, 8)),
    ((3, 5, 1), (7, 6, 9)),
    ((12, 0, 9), (1, 1, 1)),
    ((29, 14, 22), (8, 10, 9)),  # at the far corner
    ((0, 0, 0), (37, 24, 31)),
    ((17, 3, 30), (2, 21, 1)),
]


def random_maps(shape=(37, 24, 31), window=WINDOW, strides=STRIDES) -> tuple[Tiling, list[torch.Tensor]]:
    """Maps (C, x, y, z) of a volume."""
    tiling = Tiling.of(shape, window, [FeatureMap(i + 1, stride) for i, stride in enumerate(strides)])
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn((m.channels, *tiling.grid(i)), generator=generator) for i, m in enumerate(tiling.maps)]
    return tiling, maps


def interpolated(maps, tiling: Tiling) -> torch.Tensor:
    """All maps (C, X, Y, Z), by PyTorch's own upsampling of the padded volume."""
    full = [torch.nn.functional.interpolate(m[None], tiling.padded, mode="trilinear") for m in maps]
    return torch.cat(full, 1)[(0, slice(None), *tiling.inside)]


def inside(start, size) -> tuple[slice, ...]:
    return (slice(None), *(slice(a, a + n) for a, n in zip(start, size)))


# ---- one crop ----


@pytest.mark.parametrize("start, size", CROPS)
def test_upsampling_after_a_crop_is_upsampling_before_it(start, size):
    tiling, maps = random_maps()
    regions = [[(0, n) for n in tiling.grid(i)] for i in range(len(maps))]
    crop = crop_of(maps, regions, tiling, start, size)
    assert (len(crop), crop.shape[1], crop.resolutions) == (1, 15, (0, 1, 2, 3, 1))
    expected = interpolated(maps, tiling)[inside(start, size)]
    torch.testing.assert_close(crop.at_full_resolution()[0], expected, rtol=1e-5, atol=1e-5)
    for part, feature_map in zip(crop.maps, tiling.maps):  # no more than a voxel around the crop
        assert all(n <= -(-(s - 1) // t) + 2 for n, s, t in zip(part.shape[2:], size, feature_map.stride))


@pytest.mark.parametrize("shape", [(5, 16, 9), (1, 1, 1), (16, 16, 16)])
def test_crops_of_a_padded_volume(shape):
    tiling, maps = random_maps(shape)
    expected = interpolated(maps, tiling)
    torch.testing.assert_close(whole_crop(maps, tiling).at_full_resolution()[0], expected, rtol=1e-5, atol=1e-5)
    regions = [[(0, n) for n in tiling.grid(i)] for i in range(len(maps))]
    start, size = [n // 2 for n in shape], [max(n // 3, 1) for n in shape]
    crop = crop_of(maps, regions, tiling, start, size).at_full_resolution()[0]
    torch.testing.assert_close(crop, expected[inside(start, size)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("box", [((0, 0, 0), (12, 10, 11)), ((7, 5, 13), (20, 19, 30)), ((25, 12, 18), (37, 24, 31))])
def test_every_crop_of_a_box_is_that_of_the_volume(box):
    """From the regions of the maps that the bank keeps for a box."""
    tiling, maps = random_maps()
    regions = [tiling.region(i, box) for i in range(len(maps))]
    parts = [m[(slice(None), *(slice(a, b) for a, b in region))] for m, region in zip(maps, regions)]
    expected, rng = interpolated(maps, tiling), np.random.default_rng(0)
    sides, shapes = np.subtract(box[1], box[0]), set()
    for k in range(60):
        size = [4, 5, 3] if k % 2 else (rng.integers(sides) + 1).tolist()
        offset = [rng.choice([0, n - s, rng.integers(n - s + 1)]) for n, s in zip(sides, size)]
        start = [int(a + o) for a, o in zip(box[0], offset)]
        crop = crop_of(parts, regions, tiling, start, size)
        full = crop.at_full_resolution()[0]
        torch.testing.assert_close(full, expected[inside(start, size)], rtol=1e-5, atol=1e-5)
        if k % 2:
            shapes.add(tuple(m.shape for m in crop.maps))
    assert len(shapes) == 1  # so that they go into one batch


def test_crops_of_the_backbones_maps_through_the_bank(tmp_path):
    """Blending, storing in boxes and cutting give what interpolating the blended maps gives, up to float16."""
    backbone, box = FrozenBackbone("phantom", "skips"), ((3, 0, 20), (31, 17, 31))
    image = torch.rand((1, 37, 24, 31), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "a.npy", image.numpy())
    bank = FeatureBank(tmp_path / "bank", backbone, "skips", WINDOW, CPU)
    bank.fill([request_of("a", tmp_path / "a.npy", Layout(image.shape[1:], (((0, 0, 0), (5, 5, 5)), box)))])
    tiling, maps = whole_maps(backbone, image)
    expected = interpolated(maps, tiling)
    for start, size in [((3, 0, 20), (28, 17, 11)), ((30, 16, 30), (1, 1, 1)), ((11, 3, 22), (9, 8, 7))]:
        crop = bank["a"].crop(start, size).at_full_resolution()[0]
        torch.testing.assert_close(crop, expected[inside(start, size)], rtol=2e-3, atol=2e-3)
    with pytest.raises(IndexError, match="is not stored"):
        bank["a"].crop((4, 4, 4), (3, 3, 3))


def test_full_resolution_is_interpolates(contract):
    """Of a window's maps, in the network's forward."""
    backbone, image = FrozenBackbone("phantom", "skips"), torch.rand(2, 1, 24, 16, 8)
    maps = backbone(image)
    full = [torch.nn.functional.interpolate(m, image.shape[2:], mode="trilinear") for m in maps]
    crops = MapCrops.whole(maps, image.shape[2:])
    torch.testing.assert_close(crops.at_full_resolution(), torch.cat(full, 1), rtol=1e-5, atol=1e-5)
    assert crops.weights[0] is None and crops.shape[1] == backbone.out_channels and len(crops) == 2


# ---- batches ----


def batch_of(*starts, size=(6, 7, 8)) -> MapCrops:
    tiling, maps = random_maps()
    regions = [[(0, n) for n in tiling.grid(i)] for i in range(len(maps))]
    return MapCrops.join([crop_of(maps, regions, tiling, start, size) for start in starts])


STARTS = [(0, 0, 0), (3, 5, 1), (31, 17, 23)]


def test_batches_are_joined_and_parted():
    ones, batch = [batch_of(start) for start in STARTS], batch_of(*STARTS)
    assert len(batch) == 3
    expected = torch.cat([one.at_full_resolution() for one in ones])
    assert torch.equal(batch.at_full_resolution(), expected)
    for k, one in enumerate(ones):
        part = batch[torch.tensor([k])]
        assert len(part) == 1 and torch.equal(part.at_full_resolution(), one.at_full_resolution())
    assert torch.equal(batch[torch.tensor([2, 0])].at_full_resolution(), expected[[2, 0]])
    numbers = sum(m.numel() for m in batch.maps) + sum(w.numel() for of in batch.weights if of for w in of)
    assert batch.nbytes == 4 * numbers
    moved = batch.to(torch.device("meta"))
    assert moved.device.type == "meta" and all(w.is_meta for of in moved.weights if of for w in of)


def test_state_survives_a_file(tmp_path):
    batch = batch_of(*STARTS)
    torch.save({"features": batch.state()}, tmp_path / "state.pth")
    again = MapCrops.from_state(torch.load(tmp_path / "state.pth", weights_only=True)["features"])
    assert again.resolutions == batch.resolutions and len(again) == 3
    assert torch.equal(again.at_full_resolution(), batch.at_full_resolution())
    assert all(map(torch.equal, again.maps, batch.maps)) and again.weights[0] is None


# ---- logits ----


def network_of(contract, adapter="spatial", stages="skips", channels=20) -> AdaptedNetwork:
    network = AdaptedNetwork(1, 3, "phantom", contract.sha256, adapter, stages, channels, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        network.feature_mean.copy_(torch.randn(network.feature_mean.shape, generator=generator))
        network.feature_std.copy_(torch.rand(network.feature_std.shape, generator=generator) + 0.5)
    return network.eval()


@pytest.fixture(scope="module")
def volume():
    """Of 18 windows."""
    return torch.rand((1, 37, 24, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("adapter", ["spatial", "context", "spatial_in"])
@pytest.mark.parametrize("stages", ["last", "skips"])
def test_reducing_before_blending_is_reducing_after_it(contract, volume, adapter, stages):
    network = network_of(contract, adapter, stages, 20)
    assert network.reduces
    logits, windows = logits_in_one_look(network, volume.numpy(), WINDOW, CPU)
    features = VolumeFeatures(network.backbone, volume.numpy(), WINDOW, CPU)
    expected = logits_of(network, features)
    assert windows == features.windows == features.tiling.num_windows > 8
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


ADAPTERS = [("spatial", 20), ("context", 20), ("spatial_in", 20), ("linear_probe", None), ("spatial", None)]


@pytest.mark.parametrize("adapter, channels", ADAPTERS)
@pytest.mark.parametrize("step, reduced", [(4, False), (16, False), (8, True)])
def test_blocks_of_logits_are_those_of_the_volume(contract, monkeypatch, device, adapter, channels, step, reduced):
    """Many slabs of `step` planes, small blocks, two networks at once."""
    monkeypatch.setattr(precision, "native_bfloat16", lambda: reduced)
    networks = [network_of(contract, adapter, "all", channels).to(device) for _ in range(2)]
    torch.nn.init.normal_(networks[1].head.weight)
    tiling = Tiling.of((41, 21, 18), WINDOW, networks[0].backbone.maps)
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn((m.channels, *tiling.grid(i)), generator=generator) for i, m in enumerate(tiling.maps)]
    with torch.no_grad():
        crop = whole_crop(maps, tiling).to(device)
        expected = [network.adapt(crop)[0].cpu() for network in networks]
    monkeypatch.setattr(logits_module, "BLOCK", 11)
    found = [torch.full_like(e, float("nan")) for e in expected]
    taken = torch.zeros((2, *tiling.shape), dtype=torch.int)

    def take(number, place, logits):
        found[number][(slice(None), *place)] = logits.cpu()
        taken[(number, *place)] += 1

    margin = networks[0].adapter.margin
    blocks = BlocksOfLogits([network.adapt for network in networks], margin, tiling, device, take)
    held = []
    for first in range(0, tiling.padded[0], step):
        buffers = []  # valid until the next slab is asked for
        for m, of_map in zip(maps, tiling.maps):
            stride = of_map.stride[0]
            buffers.append(m[:, first // stride : (first + step) // stride].clone().to(device))
        blocks.add(Slab(first, min(first + step, tiling.padded[0]), buffers))
        for buffer in buffers:
            buffer.fill_(float("nan"))
        held.append(blocks.maps[0].shape[1])
    assert (taken == 1).all()
    for ours, whole in zip(found, expected):
        if reduced or device.type != "cpu":
            assert (ours - whole).norm() < 0.02 * whole.norm()
        else:
            torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4 * whole.std().item())
    if margin is not None:
        assert max(held) <= 8 * margin + 2 * margin + 4 * tiling.stride[0] + step


def test_a_volume_smaller_than_the_window_in_blocks(contract, monkeypatch):
    network = network_of(contract, "context", "skips", 20)
    image = torch.rand((1, 10, 30, 7), generator=torch.Generator().manual_seed(0))
    tiling, maps = whole_maps(network.backbone, image)
    with torch.no_grad():
        expected = network.adapt(whole_crop(maps, tiling))[0]
    monkeypatch.setattr(logits_module, "BLOCK", 5)
    for logits in (
        logits_in_one_look(network, image.numpy(), WINDOW, CPU)[0],
        logits_of(network, VolumeFeatures(network.backbone, image.numpy(), WINDOW, CPU)),
    ):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


# ---- looking more than once ----


@pytest.mark.parametrize("shape", [(37, 24, 20), (10, 30, 7), (16, 16, 16)])
@pytest.mark.parametrize("adapter, channels", [("spatial", 20), ("linear_probe", None)])
def test_a_second_look_reads_what_the_first_gave(contract, tmp_path, shape, adapter, channels):
    network = network_of(contract, adapter, "skips", channels)
    image = torch.rand((1, *shape), generator=torch.Generator().manual_seed(0)).numpy()
    kept = VolumeFeatures(network.backbone, image, WINDOW, CPU, tmp_path)
    assert not kept.only_look and not list(tmp_path.iterdir())
    first = logits_of(network, kept)
    assert kept.windows == kept.tiling.num_windows and len(list(tmp_path.iterdir())) == 1
    assert next(tmp_path.iterdir()).stat().st_size < 2 * kept.packing.size + 1000
    second = logits_of(network, kept)
    assert kept.windows == kept.tiling.num_windows
    torch.testing.assert_close(second, first, rtol=1e-2, atol=1e-2)
    kept.forget()
    assert not list(tmp_path.iterdir())

    again = VolumeFeatures(network.backbone, image, WINDOW, CPU, tmp_path, cap_gb=0)
    assert again.only_look
    for k in (1, 2):
        assert torch.equal(logits_of(network, again), first)
        assert again.windows == k * again.tiling.num_windows
    assert not list(tmp_path.iterdir())


def test_a_second_look_without_a_folder_runs_again(contract):
    network = network_of(contract)
    features = VolumeFeatures(network.backbone, np.zeros((1, 20, 20, 20), np.float32), WINDOW, CPU)
    assert torch.equal(logits_of(network, features), logits_of(network, features))
    assert features.windows == 2 * features.tiling.num_windows


def test_features_too_large_for_float16_are_not_kept(contract, tmp_path):
    """65504 is the largest float16 number; above it, the second look runs the backbone again."""
    image = np.ones((1, 40, 16, 16), np.float32)
    image[0, 35] = 7e4
    features = VolumeFeatures(Given(1, contract), image, WINDOW, CPU, tmp_path)
    for k in (1, 2, 3):
        found = torch.cat([slab.maps[0].clone() for slab in features.slabs()], 1)
        torch.testing.assert_close(found, torch.from_numpy(image))
        assert features.windows == k * features.tiling.num_windows
    features.forget()
    assert not list(tmp_path.iterdir())
    image[0, 35] = 6.5e4
    features = VolumeFeatures(Given(1, contract), image, WINDOW, CPU, tmp_path)
    for _ in range(2):
        found = torch.cat([slab.maps[0].clone() for slab in features.slabs()], 1).float()
        torch.testing.assert_close(found, torch.from_numpy(image), rtol=1e-3, atol=0)
    assert features.windows == features.tiling.num_windows


def test_a_second_look_on_a_disk_that_is_full(contract, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    image = np.random.default_rng(0).random((1, 40, 16, 16)).astype(np.float32)
    features = VolumeFeatures(Given(1, contract), image, WINDOW, CPU, tmp_path)
    for _ in range(2):
        found = torch.cat([slab.maps[0].clone() for slab in features.slabs()], 1)
        torch.testing.assert_close(found, torch.from_numpy(image))
    assert features.windows == 2 * features.tiling.num_windows


def test_an_interrupted_look_is_none(contract, tmp_path):
    """The second one runs the backbone over all of the volume."""
    image = np.random.default_rng(0).random((1, 40, 16, 16)).astype(np.float32)
    features = VolumeFeatures(Given(1, contract), image, WINDOW, CPU, tmp_path)
    slabs = features.slabs()
    next(slabs)
    slabs.close()
    found = torch.cat([slab.maps[0].clone() for slab in features.slabs()], 1)
    torch.testing.assert_close(found, torch.from_numpy(image))
    assert features.arrays is not None


def test_whole_volumes_of_the_bank_are_looked_at(contract, tmp_path):
    network = network_of(contract, "spatial", "last", 20)
    image = torch.rand((1, 37, 24, 20), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "a.npy", image.numpy())
    bank = make_bank(tmp_path / "bank", network.backbone)
    bank.fill([request_of("a", tmp_path / "a.npy")])
    logits = logits_of(network, VolumeFeatures.stored(bank["a"], CPU))
    expected, _ = logits_in_one_look(network, image.numpy(), WINDOW, CPU)
    torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-2)
