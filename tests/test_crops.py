"""Training batches from the bank."""

import math

import numpy as np
import pytest
import torch
from banks import CPU, WINDOW, make_bank, request_of, store, whole_crop, whole_maps
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.cases.shown_voxels import ShownVoxels
from fsefs_nnunet.features.bank import FeatureBank
from fsefs_nnunet.features.crops import CropLoader, CropsAhead, region_transform
from fsefs_nnunet.features.layout import BACKGROUND_BLOCKS, support_layout
from fsefs_nnunet.features.map_crops import MapCrops


@pytest.fixture
def loader(tmp_path, backbone):
    """Support of three cases; features are voxel coordinates, so a crop tells where it was taken."""
    bank = make_bank(tmp_path, backbone)
    segmentations = {}
    for i, (case, shape) in enumerate({"a": (20, 18, 16), "b": (14, 20, 18), "c": (16, 16, 16)}.items()):
        store(bank, case, torch.from_numpy(np.indices(shape)).float())
        segmentation = np.zeros((1, *shape), np.int8)
        segmentation[0, 12, 3 + i, 5] = 1 + i
        segmentation[0, 0] = -1  # outside of the image
        segmentations[case] = segmentation

    def make(seed=(1, 2), crop_size=(6, 7, 8), batch_size=2, transform=None, segmentations=segmentations, device=CPU):
        return CropLoader(bank, segmentations, crop_size, batch_size, seed, transform, device=device)

    make.segmentations, make.bank = segmentations, bank
    return make


def full(crops: MapCrops) -> torch.Tensor:
    return crops.at_full_resolution()


def same(a: dict, b: dict) -> bool:
    equal = torch.equal(full(a["data"]), full(b["data"])) and torch.equal(a["target"], b["target"])
    return equal and a["keys"] == b["keys"]


def test_crops_depend_on_seed_epoch_and_step_alone(loader):
    first = loader()
    batches = {}
    for epoch in range(3):
        first.start_epoch(epoch)
        for step in range(3):
            batches[epoch, step] = next(first)
    np.random.seed(5)
    torch.manual_seed(5)
    second = loader()
    for epoch in (2, 1):  # as if resumed
        second.start_epoch(epoch)
        for step in range(3):
            assert same(next(second), batches[epoch, step])
    values = list(batches.values())
    assert not any(same(values[0], other) for other in values[1:])
    assert not same(next(loader(seed=(1, 3))), batches[0, 0])


def test_crops_from_the_device_are_those_from_the_disk(loader, device):
    expected = loader()
    batches, bank = [next(expected) for _ in range(4)], loader.bank
    needed = sum(bank[case].flat.nbytes for case in "abc")
    bank.device = device
    assert not bank.move_to_device([*"abc"], needed - 1) and isinstance(bank["a"].flat, np.memmap)
    assert bank.move_to_device([*"abc"], needed) and bank["a"].flat.device.type == device.type
    bank.forget_pages()
    crops = loader(device=device)
    for batch in batches:
        moved = next(crops)
        assert moved["data"].device.type == moved["target"].device.type == device.type
        assert same({**moved, "data": moved["data"].to(CPU), "target": moved["target"].cpu()}, batch)


def test_regions_on_the_device(loader, device):
    manager = LabelManager({"background": 0, "any": [1, 2, 3], "second": 2}, regions_class_order=[1, 2])
    loader.bank.device = device
    loader.bank.move_to_device([*"abc"], math.inf)
    crops = loader(transform=region_transform(manager, device), device=device, batch_size=3)
    plain = loader(device=device, batch_size=3)
    for _ in range(4):
        targets, labels = next(crops)["target"], next(plain)["target"]
        assert targets.shape == (3, 2, 6, 7, 8) and targets.device.type == device.type
        assert torch.equal(targets[:, 0], labels[:, 0] > 0) and torch.equal(targets[:, 1], labels[:, 0] == 2)


def test_crops_made_ahead_are_the_same(loader):
    """Also where an epoch ends early, and where it is begun again."""
    ahead, plain = CropsAhead(loader(), 5), loader()
    for epoch, steps in ((0, 5), (1, 1), (1, 3), (7, 4)):
        ahead.start_epoch(epoch)
        plain.start_epoch(epoch)
        for step in range(steps):
            assert ahead.step == plain.step == step
            assert same(next(ahead), next(plain))
        assert (ahead.crop_size == plain.crop_size).all() and len(ahead.waiting) == min(5 - steps, 3)
    ahead.close()
    assert not ahead.waiting


def test_an_error_in_crops_made_ahead_arrives(loader):
    def refuse(segmentation):
        raise ValueError("no such label")

    with pytest.raises(ValueError, match="no such label"):
        next(CropsAhead(loader(transform=refuse), 2))


def test_crops_are_what_lies_in_the_volumes(loader):
    iterator = loader(batch_size=3)
    for _ in range(5):
        batch = next(iterator)
        assert sorted(batch["keys"]) == ["a", "b", "c"]  # without replacement
        crops = full(batch["data"])
        assert crops.shape == (3, 3, 6, 7, 8) and crops.dtype == torch.float16
        assert batch["target"].shape == (3, 1, 6, 7, 8) and batch["target"].dtype == torch.int16
        for case, data, target in zip(batch["keys"], crops, batch["target"]):
            start = data[:, 0, 0, 0].long()
            assert torch.equal(data, torch.from_numpy(np.indices((6, 7, 8))) + start.view(3, 1, 1, 1))
            box = tuple(slice(a, a + n) for a, n in zip(start.tolist(), (6, 7, 8)))
            expected = np.maximum(loader.segmentations[case][(slice(None), *box)], 0)
            assert np.array_equal(target, expected)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_every_other_crop_holds_foreground(loader, batch_size):
    iterator = loader(batch_size=batch_size)
    found = np.concatenate([(next(iterator)["target"] > 0).flatten(1).any(1).numpy() for _ in range(40)])
    assert found[::2].all()
    assert not found[1::2].all()


def test_case_without_foreground_gives_crops(loader):
    empty = {"c": np.zeros((1, 16, 16, 16), np.int8)}
    batch = next(loader(segmentations=empty))
    assert batch["keys"] == ["c", "c"] and not batch["target"].any()


def test_crops_fit_the_smallest_support_volume(loader):
    batch = next(loader(crop_size=(32, 32, 32)))
    assert full(batch["data"]).shape == (2, 3, 14, 16, 16)


def test_transform_makes_the_target(loader):
    class Double:
        def __call__(self, segmentation):
            return {"segmentation": 2 * segmentation}

    plain, doubled = next(loader()), next(loader(transform=Double()))
    assert torch.equal(doubled["target"], 2 * plain["target"])
    assert torch.equal(full(doubled["data"]), full(plain["data"]))


def test_crops_of_a_whole_volume_are_drawn_as_ever(loader):
    """Results on volumes of one window do not depend on how larger ones are kept."""
    rng = np.random.default_rng((1, 2, 0, 0))
    keys = [list("abc")[i] for i in rng.permutation(3)[:2]]
    first, second = (loader.segmentations[case] for case in keys)
    foreground = np.argwhere(first[0] > 0)
    crop = np.array((6, 7, 8))
    starts = [np.clip(foreground[rng.integers(1)] - crop // 2, 0, first.shape[1:] - crop)]
    starts.append(rng.integers(0, second.shape[1:] - crop + 1))
    batch = next(loader())
    assert batch["keys"] == keys
    assert np.array_equal(full(batch["data"])[:, :, 0, 0, 0], starts)


@pytest.fixture
def kept_in_part(bank):
    """Two loaders for one support case: from its parts and from the whole volume; features are voxel coordinates."""
    shape, crop = (60, 50, 40), (8, 9, 10)
    segmentation = np.zeros((1, *shape), np.int8)
    segmentation[0, 20:24, 20:25, 2:6] = 1
    features = torch.from_numpy(np.indices(shape)).float()
    layout = support_layout("a", segmentation[0] > 0, crop, WINDOW)
    store(bank, "a", features, layout)
    loaders = [CropLoader(bank, {"a": segmentation}, crop, 2, (1, 2))]
    whole = FeatureBank(bank.root / "whole", bank.backbone, "last", WINDOW, CPU)
    store(whole, "a", features)
    return layout, *loaders, CropLoader(whole, {"a": segmentation}, crop, 2, (1, 2))


def test_crops_of_parts_are_crops_of_the_volume(kept_in_part):
    layout, parts, whole = kept_in_part
    assert len(layout.boxes) > 1
    places = set()
    for _ in range(300):
        batch, reference = next(parts), next(whole)
        crops = full(batch["data"])
        # around foreground: the same crops, whatever is kept of the rest
        assert torch.equal(crops[0], full(reference["data"])[0])
        assert torch.equal(batch["target"][0], reference["target"][0])
        start = crops[1, :, 0, 0, 0].long()
        assert torch.equal(crops[1].long(), torch.from_numpy(np.indices((8, 9, 10))) + start.view(3, 1, 1, 1))
        box = tuple(slice(a, a + n) for a, n in zip(start.tolist(), (8, 9, 10)))
        assert np.array_equal(batch["target"][1], parts.labels["a"][(slice(None), *box)])
        places.add(tuple(start.tolist()))
    # background: every block is drawn, and nothing else
    assert places == {start for start, _ in layout.boxes[1:]}


def test_smaller_crops_move_within_the_blocks(kept_in_part):
    """The smallest support volume may allow smaller crops than the bank was filled for."""
    layout, parts, _ = kept_in_part
    parts.crop_size = np.array((5, 9, 4))
    starts = {tuple(full(next(parts)["data"])[1, :, 0, 0, 0].long().tolist()) for _ in range(100)}
    assert len(starts) > BACKGROUND_BLOCKS
    for start in starts:
        assert any(
            all(a <= s and s + n <= b for a, s, n, b in zip(first, start, (5, 9, 4), end))
            for first, end in layout.boxes[1:]
        )


def test_crops_of_a_partly_annotated_volume(tmp_path, backbone):
    """All that is annotated is one slice, which every crop shows; every second one shows the class as well."""
    bank, shape = make_bank(tmp_path, backbone), (30, 30, 40)
    store(bank, "a", torch.zeros(3, *shape))
    segmentation = np.full((1, *shape), 2, np.int8)
    segmentation[0, :, :, 30], segmentation[0, 0, 0, 30] = 0, 1
    loader = CropLoader(bank, {"a": segmentation}, (4, 4, 4), 1, (1, 2), ignore_label=2)
    targets = [next(loader)["target"] for _ in range(20)]
    assert all((target < 2).any() for target in targets)
    assert all((target == 1).any() for target in targets[::2])


def place_of(target: torch.Tensor, segmentation: np.ndarray, crop) -> tuple[int, ...]:
    """First voxel of a crop whose voxels are numbered."""
    starts = np.argwhere(segmentation[0] == target[0, 0, 0, 0].item())
    (start,) = [
        tuple(map(int, start))
        for start in starts
        if np.array_equal(segmentation[(0, *(slice(a, a + n) for a, n in zip(start, crop)))], target[0])
    ]
    return start


@pytest.mark.parametrize("kept", ["whole", "in parts"])
def test_crops_of_coarse_maps_are_those_of_the_volume(tmp_path, kept):
    """Crops of a batch at full resolution equal those of the volume, up to float16, wherever they lie."""
    backbone, shape, crop = FrozenBackbone("phantom", "skips"), (44, 30, 40), (8, 9, 7)
    image = torch.rand((1, *shape), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "a.npy", image.numpy())
    segmentation = np.zeros((1, *shape), np.int8)
    segmentation[0, 20:22, 8:11, 38:] = 1
    layout = support_layout("a", segmentation[0], crop, WINDOW) if kept == "in parts" else None
    bank = FeatureBank(tmp_path / "bank", backbone, "skips", WINDOW, CPU)
    bank.fill([request_of("a", tmp_path / "a.npy", layout, statistics=True)])
    tiling, maps = whole_maps(backbone, image)
    features = whole_crop(maps, tiling).at_full_resolution()[0]
    numbered = np.random.default_rng(0).integers(0, 30_000, (1, *shape))
    loader = CropLoader(bank, {"a": numbered}, crop, 3, (1, 2))
    loader.foreground["a"] = ShownVoxels(segmentation[0], lambda labels: labels > 0)
    for _ in range(8):
        batch = next(loader)
        crops = full(batch["data"])
        assert crops.shape == (3, backbone.out_channels, *crop)
        for of_crop, target in zip(crops, batch["target"]):
            start = place_of(target, numbered, crop)
            inside = (slice(None), *(slice(a, a + n) for a, n in zip(start, crop)))
            torch.testing.assert_close(of_crop, features[inside], rtol=5e-3, atol=5e-3)
