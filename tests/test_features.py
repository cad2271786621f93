import json

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.crops import CropLoader, pooled
from fsefs_nnunet.features import FeatureBank, extract_features
from fsefs_nnunet.network import AdaptedNetwork
from fsefs_nnunet.transduction import MAX_POOLED_VOXELS, QuerySizes, block_voxels, pooling_factor

CPU = torch.device("cpu")
WINDOW = (16, 16, 16)


@pytest.fixture(scope="module")
def backbone():
    return FrozenBackbone("phantom", "last")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return {case: rng.uniform(0, 1, (1, 16, 16, 20)).astype(np.float32) for case in ("a", "b")}


@pytest.fixture
def bank(backbone, tmp_path):
    return FeatureBank(tmp_path, backbone, "last", WINDOW, CPU)


# ---- filling ----


def test_second_fill_computes_nothing(bank, images):
    assert bank.fill(images, images.get) == 2
    times = {file: file.stat().st_mtime_ns for file in bank.folder.iterdir()}
    assert bank.fill(images, images.get) == 0
    assert {file: file.stat().st_mtime_ns for file in bank.folder.iterdir()} == times
    assert sorted(file.name for file in times) == ["a.json", "a.npy", "b.json", "b.npy"]
    assert bank["a"].shape == (16, 16, 16, 20) and bank["a"].dtype == np.float16


def truncate(folder):
    (folder / "a.npy").write_bytes((folder / "a.npy").read_bytes()[:-100])


def alter(folder):
    array = np.load(folder / "a.npy")
    array[0, 0, 0, 0] += 1
    np.save(folder / "a.npy", array)


def alter_json(folder):
    content = json.loads((folder / "a.json").read_text())
    (folder / "a.json").write_text(json.dumps({**content, "features_sha256": "0" * 64}))


DAMAGES = {
    "truncated": truncate,
    "altered": alter,
    "npy missing": lambda folder: (folder / "a.npy").unlink(),
    "npy empty": lambda folder: (folder / "a.npy").write_bytes(b""),
    "json missing": lambda folder: (folder / "a.json").unlink(),
    "json altered": alter_json,
    "json cut": lambda folder: (folder / "a.json").write_text('{"image_sha'),
    "json no object": lambda folder: (folder / "a.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_entry_is_computed_again(bank, images, damage):
    bank.fill(["a"], images.get)
    expected, info = np.array(bank["a"]), bank.info("a")
    damage(bank.folder)
    assert bank.fill(["a"], images.get) == 1
    assert np.array_equal(bank["a"], expected)
    assert bank.info("a") == info
    assert bank.fill(["a"], images.get) == 0


def test_entry_of_another_image_is_computed_again(bank, images):
    bank.fill(["a"], images.get)
    old = np.array(bank["a"])
    assert bank.fill(["a"], lambda case: images["b"]) == 1
    assert not np.array_equal(bank["a"], old)


def test_recipes_do_not_share_a_folder(backbone, tmp_path):
    banks = [
        FeatureBank(tmp_path, backbone, "last", WINDOW, CPU),
        FeatureBank(tmp_path, backbone, "all", WINDOW, CPU),
        FeatureBank(tmp_path, backbone, "last", (16, 16, 24), CPU),
    ]
    assert len({bank.folder for bank in banks}) == 3
    assert banks[0].folder == FeatureBank(tmp_path, backbone, "last", list(map(np.int64, WINDOW)), CPU).folder


def test_statistics_are_numpys(bank, images):
    bank.fill(images, images.get)
    values = np.concatenate([np.array(bank[case], dtype=np.float64).reshape(16, -1) for case in images], 1)
    mean, std = bank.statistics(images)
    np.testing.assert_allclose(mean, values.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(std, values.std(1), rtol=1e-4)


def test_a_dead_channel_is_not_divided_by_zero(bank):
    bank.folder.mkdir(parents=True)
    features = torch.zeros(2, 4, 4, 4)
    features[0] = torch.arange(64.0).view(4, 4, 4)
    features[1] = 3
    bank._write("a", "", features)
    mean, std = bank.statistics(["a"])
    assert mean.tolist() == [31.5, 3] and std.tolist() == pytest.approx([np.arange(64).std(), 1])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_image_that_is_not_finite_is_refused_before_anything_is_computed(bank, images, value):
    broken = images["b"].copy()
    broken[0, 3, 3, 3] = value
    with pytest.raises(ValueError, match="image of b holds NaN or infinite values: repair"):
        bank.fill(images, {"a": images["a"], "b": broken}.get)
    assert not list(bank.folder.iterdir())


# ---- windows ----


def test_volume_of_one_window_is_one_forward(backbone):
    image = torch.rand(1, *WINDOW)
    features = extract_features(backbone, image, WINDOW, CPU)
    torch.testing.assert_close(features, backbone(image[None])[0])


def test_volume_smaller_than_the_window_is_padded(backbone):
    image = torch.rand(1, 10, 16, 7)
    features = extract_features(backbone, image, WINDOW, CPU)
    padded = torch.zeros(1, *WINDOW)
    padded[:, 3:13, :, 4:11] = image
    assert features.shape == (16, 10, 16, 7)
    torch.testing.assert_close(features, backbone(padded[None])[0][:, 3:13, :, 4:11])


def test_linear_probe_on_the_bank_is_the_predictors_sliding_window(tiny, contract, tmp_path):
    """nnU-Net blends the logits of its windows, the bank blends features."""
    torch.manual_seed(0)
    image = torch.rand(1, 24, 22, 20)
    network = AdaptedNetwork(1, 4, "phantom", contract.sha256, "linear_probe", "all", None, 3)
    bank = FeatureBank(tmp_path, network.backbone, "all", WINDOW, CPU)
    bank.fill(["a"], lambda case: image.numpy())
    network.fit(*bank.statistics(["a"]), {"background": 0, "x": 1, "y": 2, "z": 3}, False)
    with torch.no_grad():
        ours = network.adapt(torch.from_numpy(np.array(bank["a"], np.float32))[None])[0]

    plans = tiny.plans(patch_size=list(WINDOW))
    manager = PlansManager(plans)
    predictor = nnUNetPredictor(use_gaussian=True, use_mirroring=False, device=CPU, allow_tqdm=False)
    configuration = manager.get_configuration("3d_fullres_5shot")
    state = [network.state_dict()]
    predictor.manual_initialization(network, manager, configuration, state, tiny.dataset_json(), "FSEFTTrainer", None)
    windows = predictor._internal_get_sliding_window_slicers(image.shape[1:])
    assert len(windows) == 8
    theirs = predictor.predict_sliding_window_return_logits(image).float()
    # the predictor sums in float16: near the volume's corners, where its weights underflow, its logits are coarse
    weight = torch.zeros(image.shape[1:])
    for window in windows:
        weight[window[1:]] += compute_gaussian(WINDOW, 1 / 8, 10, device=CPU).float()
    sound = weight > 0.01
    assert sound.float().mean() > 0.6 and theirs.abs().max() > 1
    # and the bank holds float16 as well
    torch.testing.assert_close(ours[:, sound], theirs[:, sound], rtol=2e-3, atol=2e-3)
    # windows matter: the volume in one piece gives something else
    padded = torch.nn.functional.pad(image, (0, 4, 0, 2))
    with torch.no_grad():
        whole = network(padded[None])[0, :, :, :22, :20]
    assert (whole - theirs)[:, sound].abs().max() > 0.03


# ---- crops ----


@pytest.fixture
def loader(tmp_path, backbone):
    """Support of three cases; features are voxel coordinates, so a crop tells where it was taken."""
    bank = FeatureBank(tmp_path, backbone, "last", WINDOW, CPU)
    bank.folder.mkdir(parents=True)
    segmentations = {}
    for i, (case, shape) in enumerate({"a": (20, 18, 16), "b": (14, 20, 18), "c": (16, 16, 16)}.items()):
        bank._write(case, "", torch.from_numpy(np.indices(shape)).float())
        segmentation = np.zeros((1, *shape), np.int8)
        segmentation[0, 12, 3 + i, 5] = 1 + i
        segmentation[0, 0] = -1  # outside of the image
        segmentations[case] = segmentation

    def make(seed=(1, 2), crop_size=(6, 7, 8), batch_size=2, transform=None, segmentations=segmentations):
        return CropLoader(bank, segmentations, crop_size, batch_size, seed, transform)

    make.segmentations = segmentations
    return make


def same(a: dict, b: dict) -> bool:
    return a["keys"] == b["keys"] and torch.equal(a["data"], b["data"]) and torch.equal(a["target"], b["target"])


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


def test_crops_are_what_lies_in_the_volumes(loader):
    iterator = loader(batch_size=3)
    for _ in range(5):
        batch = next(iterator)
        assert sorted(batch["keys"]) == ["a", "b", "c"]  # without replacement
        assert batch["data"].shape == (3, 3, 6, 7, 8) and batch["data"].dtype == torch.float32
        assert batch["target"].shape == (3, 1, 6, 7, 8) and batch["target"].dtype == torch.int16
        for case, data, target in zip(batch["keys"], batch["data"], batch["target"]):
            start = data[:, 0, 0, 0].long()
            assert torch.equal(data, torch.from_numpy(np.indices((6, 7, 8))) + start.view(3, 1, 1, 1))
            box = tuple(slice(a, a + n) for a, n in zip(start.tolist(), (6, 7, 8)))
            expected = np.maximum(loader.segmentations[case][(slice(None), *box)], 0)
            assert np.array_equal(target, expected)


def test_every_other_crop_holds_foreground(loader):
    iterator = loader(batch_size=3)
    found = np.array([(next(iterator)["target"] > 0).flatten(1).any(1).numpy() for _ in range(40)])
    assert found[:, [0, 2]].all()
    assert not found[:, 1].all()


def test_case_without_foreground_gives_crops(loader):
    empty = {"c": np.zeros((1, 16, 16, 16), np.int8)}
    batch = next(loader(segmentations=empty))
    assert batch["keys"] == ["c", "c"] and not batch["target"].any()


def test_crops_fit_the_smallest_support_volume(loader):
    batch = next(loader(crop_size=(32, 32, 32)))
    assert batch["data"].shape == (2, 3, 14, 16, 16)


def test_transform_makes_the_target(loader):
    class Double:
        def __call__(self, segmentation):
            return {"segmentation": 2 * segmentation}

    plain, doubled = next(loader()), next(loader(transform=Double()))
    assert torch.equal(doubled["target"], 2 * plain["target"]) and torch.equal(doubled["data"], plain["data"])


# ---- pooling and sizes ----


def test_pooled_averages_blocks():
    features = np.random.default_rng(0).normal(size=(2, 5, 4, 7)).astype(np.float16)
    result = pooled(features, 2)
    assert result.shape == (1, 2, 3, 2, 4) and result.dtype == torch.float32
    double = features.astype(np.float64)
    np.testing.assert_allclose(result[0, :, 0, 0, 0], double[:, :2, :2, :2].mean((1, 2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result[0, :, 2, 1, 3], double[:, 4:, 2:, 6:].mean((1, 2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8, 8), (5, 4, 7), (1, 2, 3)])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_pooling_conserves_volume(shape, factor):
    """Weighted by the voxels that a block stands for, the pooled sum is the sum."""
    features = np.random.default_rng(0).uniform(size=(2, *shape)).astype(np.float32)
    voxels = block_voxels(shape, factor)
    result = pooled(features, factor)[0]
    assert voxels.shape == result.shape[1:] and voxels.sum() == np.prod(shape)
    np.testing.assert_allclose((result * voxels).sum((1, 2, 3)), features.sum((1, 2, 3)), rtol=1e-5)


def test_pooling_factor_bounds_the_volume():
    assert pooling_factor((40, 40, 40), 2) == 2
    assert pooling_factor((40, 40, 40), 1) == 1
    shape = (300, 250, 200)
    factor = pooling_factor(shape, 2)
    sizes = [np.prod([-(-n // f) for n in shape]) for f in (factor, factor - 1)]
    assert sizes[0] <= MAX_POOLED_VOXELS < sizes[1]


def test_every_query_is_visited_once_a_round(bank):
    queries = [f"q{i}" for i in range(7)]
    sizes = QuerySizes(bank, queries, 1.0, 2, CPU)
    rounds = [[sizes.rotating(step, 3) for step in range(7 * r, 7 * r + 7)] for r in range(4)]
    assert all(sorted(visited) == queries for visited in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert [sizes.rotating(step, 3) for step in range(28)] == sum(rounds, [])
    assert [sizes.rotating(step, 4) for step in range(28)] != sum(rounds, [])


@pytest.mark.parametrize("has_regions", [False, True])
def test_soft_sizes_by_hand(bank, contract, has_regions):
    """Constant logits: every class fills the same share of the volume, whatever the pooling."""
    network = AdaptedNetwork(1, 3, "phantom", contract.sha256, "linear_probe", "last", None, 3)
    bank.folder.mkdir(parents=True)
    bank._write("q", "", torch.rand(16, 9, 8, 7))
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
    bias = network.head.bias.detach()
    share = torch.sigmoid(bias) if has_regions else torch.softmax(bias, 0)[1:]
    for pool in (1, 2, 4):
        sizes = QuerySizes(bank, ["q"], 0.25, pool, CPU).soft_sizes(network, "q", has_regions)
        torch.testing.assert_close(sizes.detach(), share * 9 * 8 * 7 * 0.25, rtol=1e-4, atol=0)
    sizes.sum().backward()
    assert network.head.bias.grad.abs().min() > 0
