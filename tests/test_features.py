import json
import shutil
import subprocess
import sys
import threading
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from fsefs_nnunet import phantom
from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.bank import disk, features
from fsefs_nnunet.bank.crops import CropLoader
from fsefs_nnunet.bank.features import EntryKey, FeatureBank, extract_features
from fsefs_nnunet.bank.layout import (
    BACKGROUND_BLOCKS,
    MAX_POOLED_VOXELS,
    Layout,
    pooled,
    pooling_factor,
    query_layout,
    support_layout,
    whole_layout,
)
from fsefs_nnunet.network import AdaptedNetwork
from fsefs_nnunet.query_sizes import QuerySizes, block_voxels

CPU = torch.device("cpu")
WINDOW = (16, 16, 16)


def whole(case, shape):
    return whole_layout(shape)


def make_images(cases="ab"):
    rng = np.random.default_rng(0)
    return {case: rng.uniform(0, 1, (1, 16, 16, 20)).astype(np.float32) for case in cases}


def make_bank(root, backbone):
    return FeatureBank(root, backbone, "last", WINDOW, CPU)


def store(bank, case, features, layout=None):
    """Put features (C, X, Y, Z) of our own into a bank."""
    bank.folder.mkdir(parents=True, exist_ok=True)
    key = EntryKey(bank.recipe, case, "", layout or whole_layout(features.shape[1:]))
    bank._write(key, features)
    assert bank._open(key)


@pytest.fixture(scope="module")
def backbone():
    return FrozenBackbone("phantom", "last")


@pytest.fixture(scope="module")
def images():
    return make_images()


@pytest.fixture
def bank(backbone, tmp_path):
    return make_bank(tmp_path, backbone)


# ---- filling ----


def test_second_fill_computes_nothing(bank, images, backbone):
    assert bank.fill(images, images.get, whole) == 2
    times = {file: file.stat().st_mtime_ns for file in bank.folder.iterdir()}
    again = make_bank(bank.root, backbone)
    assert again.fill(images, images.get, whole) == 0
    assert {file: file.stat().st_mtime_ns for file in bank.folder.iterdir()} == times
    entries = sorted(f"{file.name[0]}{file.suffix}" for file in times if file.suffix != ".lock")
    assert entries == ["a.json", "a.npy", "b.json", "b.npy"] and len(times) == 6  # a lock for each volume
    (box,) = again["a"].boxes
    assert box.shape == (16, 16, 16, 20) and box.dtype == np.float16
    assert isinstance(box.base, np.memmap)


def test_a_volume_kept_in_two_ways_is_computed_once(bank, images, monkeypatch):
    passes = []
    whole_volume = features.extract_features
    monkeypatch.setattr(features, "extract_features", lambda *args: passes.append(args) or whole_volume(*args))

    def layout(case: str, shape: tuple[int, ...]) -> Layout:
        return query_layout(shape, 2) if case == "pooled" else whole_layout(shape)

    same = {"a": images["a"], "pooled": images["a"], "b": images["b"]}
    assert bank.fill(same, same.get, layout) == 3
    assert len(passes) == 2
    whole_a = torch.from_numpy(np.array(bank["a"].boxes[0])).float()
    np.testing.assert_allclose(bank["pooled"].boxes[0], pooled(whole_a, 2)[0], rtol=1e-2, atol=1e-2)
    next(bank.folder.glob("pooled_*.npy")).unlink()
    assert bank.fill(same, same.get, layout) == 1


def alter(npy, json_file):
    array = np.load(npy)
    array[7] += 1
    np.save(npy, array)


def change_json(**values):
    def change(npy, json_file):
        json_file.write_text(json.dumps({**json.loads(json_file.read_text()), **values}))

    return change


def half_written(npy, json_file):
    npy.with_name(f"{npy.name}.part").write_bytes(npy.read_bytes()[:1000])
    npy.unlink()
    json_file.unlink()


DAMAGES = {
    "truncated": lambda npy, json_file: npy.write_bytes(npy.read_bytes()[:-100]),
    "altered": alter,
    "half-written": half_written,
    "npy missing": lambda npy, json_file: npy.unlink(),
    "npy empty": lambda npy, json_file: npy.write_bytes(b""),
    "json missing": lambda npy, json_file: json_file.unlink(),
    "json of other features": change_json(features_sha256="0" * 64),
    "json of another entry": change_json(key={}),
    "json cut": lambda npy, json_file: json_file.write_text('{"key'),
    "json no object": lambda npy, json_file: json_file.write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_entry_is_computed_again(bank, images, backbone, damage):
    bank.fill(["a"], images.get, whole)
    (npy,), (json_file,) = bank.folder.glob("a_*.npy"), bank.folder.glob("a_*.json")
    expected, info = npy.read_bytes(), json.loads(json_file.read_text())
    damage(npy, json_file)
    again, said = make_bank(bank.root, backbone), []
    assert again.fill(["a"], images.get, whole, log=said.append) == 1
    assert f"1 entries were not whole, or altered, and are computed again: {npy.stem}." in said
    assert npy.read_bytes() == expected and json.loads(json_file.read_text()) == info
    assert not list(bank.folder.glob("*.part"))
    assert again.fill(["a"], images.get, whole) == 0


def test_other_image_or_layout_is_another_entry(bank, images):
    assert bank.fill(["a"], images.get, whole) == 1
    old = np.array(bank["a"].boxes[0])
    assert bank.fill(["a"], lambda case: images["b"], whole) == 1
    assert not np.array_equal(bank["a"].boxes[0], old)
    region = ((2, 0, 0), (8, 16, 16))
    layouts = {"pooled": query_layout((16, 16, 20), 2), "region": Layout((16, 16, 20), (region,))}
    for layout in layouts.values():
        assert bank.fill(["a"], images.get, lambda case, shape, layout=layout: layout) == 1
        assert bank["a"].layout == layout
    np.testing.assert_array_equal(bank["a"].boxes[0], old[:, 2:8, :, :16])
    assert bank.fill(["a"], images.get, whole) == 0
    np.testing.assert_array_equal(bank["a"].boxes[0], old)


def test_recipes_do_not_share_a_folder(backbone, tmp_path):
    banks = [
        FeatureBank(tmp_path, backbone, "last", WINDOW, CPU),
        FeatureBank(tmp_path, backbone, "all", WINDOW, CPU),
        FeatureBank(tmp_path, backbone, "last", (16, 16, 24), CPU),
    ]
    assert len({bank.folder for bank in banks}) == 3
    assert banks[0].folder == FeatureBank(tmp_path, backbone, "last", list(map(np.int64, WINDOW)), CPU).folder


def test_statistics_are_those_of_whole_volumes(bank, images):
    bank.fill(images, images.get, whole)
    values = np.concatenate([bank[case].boxes[0].astype(np.float64).reshape(16, -1) for case in images], 1)
    mean, std = bank.statistics(images)
    np.testing.assert_allclose(mean, values.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(std, values.std(1), rtol=1e-4)
    bank.fill(images, images.get, lambda case, shape: Layout(tuple(shape), (((0, 0, 0), (4, 4, 4)),)))
    for part, full in zip(bank.statistics(images), (mean, std)):
        assert torch.equal(part, full)


def test_a_dead_channel_is_not_divided_by_zero(bank):
    features = torch.zeros(2, 4, 4, 4)
    features[0] = torch.arange(64.0).view(4, 4, 4)
    features[1] = 3
    store(bank, "a", features)
    mean, std = bank.statistics(["a"])
    assert mean.tolist() == [31.5, 3] and std.tolist() == pytest.approx([np.arange(64).std(), 1])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_image_that_is_not_finite_is_refused_before_anything_is_computed(bank, images, value):
    broken = images["b"].copy()
    broken[0, 3, 3, 3] = value
    with pytest.raises(ValueError, match="image of b holds NaN or infinite values: repair"):
        bank.fill(images, {"a": images["a"], "b": broken}.get, whole)
    assert not list(bank.folder.iterdir())


# ---- several trainings at once ----


def fill_at_once(root, barrier, computed):
    torch.set_num_threads(1)
    bank, images = make_bank(root, FrozenBackbone("phantom", "last")), make_images("abcdef")
    barrier.wait(120)
    computed.put(bank.fill(images, images.get, whole))


def test_two_processes_compute_each_entry_once(bank):
    context = get_context("spawn")
    barrier, computed = context.Barrier(2), context.Queue()
    processes = [context.Process(target=fill_at_once, args=(bank.root, barrier, computed)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sum(computed.get(timeout=10) for _ in processes) == 6
    images = make_images("abcdef")
    assert bank.fill(images, images.get, whole) == 0


def test_killed_holder_of_a_lock_holds_up_nobody(bank, images, backbone):
    bank.fill(["a"], images.get, whole)
    (lock,) = bank.folder.glob("*.lock")
    next(bank.folder.glob("a_*.json")).unlink()
    hold = "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire()"
    wait = "print('held', flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", f"{hold}; {wait}", lock], stdout=subprocess.PIPE)
    assert holder.stdout.readline().strip() == b"held"
    computed = []
    waiting = threading.Thread(
        target=lambda: computed.append(make_bank(bank.root, backbone).fill(["a"], images.get, whole)), daemon=True
    )
    waiting.start()
    waiting.join(1)
    assert waiting.is_alive()
    with pytest.raises(ValueError, match="A training is filling .*: wait until it has, or end it"):
        disk.clear_banks(bank.root, [])
    holder.kill()
    holder.wait()
    waiting.join(30)
    assert computed == [1]


# ---- disk ----

NEEDED = 2 * 16 * 16 * 16 * 20 * 2  # bytes: two cases, 16 channels, fp16


def test_cap_refuses_before_anything_is_computed(bank, images):
    with pytest.raises(ValueError) as refusal:
        bank.fill(images, images.get, whole, (NEEDED - 1) / 1e9)
    for part in ("needs 0.000328 GB more", "holds 0 GB; ", "allows 0.000328 GB: raise it", "fseft bank -d ID --clear"):
        assert part in str(refusal.value)
    assert not list(bank.folder.iterdir())
    assert bank.fill(["a"], images.get, whole, NEEDED / 1e9) == 1
    # what lies there counts, in whichever bank
    other = bank.root / "other_0"
    bank.folder.rename(other)
    with pytest.raises(ValueError, match="holds 0.000[0-9]* GB; fseft_bank_gb allows"):
        bank.fill(images, images.get, whole, NEEDED / 1e9)
    shutil.rmtree(other)
    assert bank.fill(images, images.get, whole, 1.2 * NEEDED / 1e9) == 2
    # nothing is missing, nothing is refused
    assert bank.fill(images, images.get, whole, 0) == 0


def test_full_disk_is_refused_before_anything_is_computed(bank, images, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: SimpleNamespace(free=NEEDED - 1))
    with pytest.raises(ValueError, match="the disk has 0.000328 GB free: free some, clear old banks .* fewer queries"):
        bank.fill(images, images.get, whole)
    assert not list(bank.folder.iterdir())
    assert bank.fill(["a"], images.get, whole) == 1


def test_log_says_what_the_bank_takes(bank, images):
    lines = []
    bank.fill(images, images.get, whole, log=lines.append)
    assert len(lines) == 2 and "2 volumes" in lines[0] and "take 0.000328 GB" in lines[0]
    assert f"{bank.folder} takes 0.0003" in lines[1]
    bank.fill(images, images.get, whole, log=lines.append)
    assert lines[2:] == [lines[1]]


def test_environment_variable_is_the_cap_that_counts(monkeypatch):
    monkeypatch.delenv("fseft_bank_gb", raising=False)
    assert disk.cap_in_gb(None) is None and disk.cap_in_gb(2) == 2 and disk.cap_in_gb(0) == 0
    monkeypatch.setenv("fseft_bank_gb", "0.5")
    assert disk.cap_in_gb(None) == 0.5 and disk.cap_in_gb(2) == 0.5
    for wrong in ("-1", "nan", "20 GB"):
        monkeypatch.setenv("fseft_bank_gb", wrong)
        with pytest.raises(ValueError, match=f"fseft_bank_gb is '{wrong}': give the gigabytes"):
            disk.cap_in_gb(None)


def test_banks_are_listed_and_cleared(workspace, backbone, images, capsys):
    root = workspace.preprocessed / disk.BANK_FOLDER
    disk.show(77)
    assert "0 feature banks" in capsys.readouterr().out
    banks = [FeatureBank(root, backbone, stages, WINDOW, CPU) for stages in ("last", "all")]
    for bank, cases in zip(banks, ("ab", "a")):
        bank.fill(cases, images.get, whole)
    keys = [bank.folder.name.removeprefix("phantom_") for bank in banks]
    listed = {bank.key: bank for bank in disk.list_banks(root)}
    assert {key: bank.entries for key, bank in listed.items()} == dict(zip(keys, (2, 1)))
    capsys.readouterr()
    disk.show(77)
    out = capsys.readouterr().out
    assert f"{keys[0]} (phantom): 2 entries, 0.00033" in out and f"{keys[1]} (phantom): 1 entries" in out
    with pytest.raises(ValueError, match=f"No feature bank nonsense in .*{keys[1]}"):
        disk.clear(77, [keys[0], "nonsense"])
    assert banks[0].folder.exists()
    disk.clear(77, [keys[0]])
    out = capsys.readouterr().out
    assert f"Removed {keys[0]} (phantom): 2 entries" in out and "1 feature banks removed" in out
    assert not banks[0].folder.exists() and banks[1].folder.exists()
    # a training that has opened its entries reads on
    assert np.isfinite(banks[0]["a"].boxes[0]).all()
    disk.clear(77, [])
    assert not banks[1].folder.exists() and disk.list_banks(root) == []


# ---- what is kept ----


def spots(shape, *voxels):
    foreground = np.zeros(shape, bool)
    foreground[tuple(np.transpose(voxels))] = True
    return foreground


@pytest.mark.parametrize("voxels", [[(30, 20, 9)], [(0, 0, 0)], [(59, 49, 39)], [(20, 20, 20), (33, 5, 39)]])
def test_region_holds_every_crop_around_foreground(voxels):
    shape, crop = (60, 50, 40), np.array((9, 8, 7))
    layout = support_layout("a", spots(shape, *voxels), crop, WINDOW)
    assert layout.pool == 1 and len(layout.boxes) == 1 + BACKGROUND_BLOCKS and layout.voxels < np.prod(shape) / 2
    first, end = map(np.array, layout.boxes[0])
    for size in (crop, crop - 1, np.array((3, 8, 1))):
        starts = np.clip(np.array(voxels) - size // 2, 0, shape - size)
        assert (starts >= first).all() and (starts + size <= end).all()
    starts = np.clip(np.array(voxels) - crop // 2, 0, shape - crop)
    assert (first == starts.min(0)).all() and (end == starts.max(0) + crop).all()
    for first, end in layout.boxes[1:]:
        assert min(first) >= 0 and (np.array(end) <= shape).all() and (np.subtract(end, first) == crop).all()


def test_blocks_for_background_differ_between_cases_alone():
    foreground = spots((60, 50, 40), (30, 20, 9))
    first, second = (support_layout(case, foreground, (8, 8, 8), WINDOW) for case in ("a", "b"))
    assert first == support_layout("a", foreground, (8, 8, 8), WINDOW)
    assert first.boxes[0] == second.boxes[0] and not set(first.boxes[1:]) & set(second.boxes[1:])
    moved = support_layout("a", spots((60, 50, 40), (30, 21, 9)), (8, 8, 8), WINDOW)
    assert moved.boxes[1:] == first.boxes[1:] and moved.boxes[0] != first.boxes[0]
    starts = np.array([box[0] for box in first.boxes[1:]])
    assert (np.ptp(starts, 0) > np.array((52, 42, 32)) / 2).all()


def test_small_or_largely_labelled_volume_is_kept_whole():
    assert support_layout("a", spots(WINDOW, (8, 8, 8)), (2, 2, 2), WINDOW) == whole_layout(WINDOW)
    assert len(support_layout("a", spots((16, 16, 60), (8, 8, 8)), (2, 2, 2), WINDOW).boxes) > 1
    shape = (40, 40, 40)
    assert support_layout("a", spots(shape, (0, 0, 0), (39, 39, 39)), (2, 2, 2), WINDOW) == whole_layout(shape)
    assert support_layout("a", spots(shape, (20, 20, 20)), (24, 24, 24), WINDOW) == whole_layout(shape)


def test_case_without_foreground_keeps_blocks():
    layout = support_layout("a", np.zeros((60, 50, 40), bool), (8, 8, 8), WINDOW)
    assert len(layout.boxes) == BACKGROUND_BLOCKS and layout.voxels == BACKGROUND_BLOCKS * 8**3


def test_crop_that_is_not_kept_is_an_error(bank):
    features = torch.from_numpy(np.indices((20, 20, 20))).float()
    store(bank, "a", features, Layout((20, 20, 20), (((0, 0, 0), (6, 6, 6)), ((4, 5, 6), (20, 20, 20)))))
    for start in [(0, 0, 0), (1, 2, 3), (4, 5, 6), (17, 17, 17)]:
        assert bank["a"].crop(start, (3, 3, 3))[:, 0, 0, 0].tolist() == list(start)
    for start in [(3, 4, 5), (18, 17, 17), (-1, 0, 0)]:
        with pytest.raises(IndexError, match="is not stored"):
            bank["a"].crop(start, (3, 3, 3))


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


def stock_predictor(network, tiny, window):
    manager = PlansManager(tiny.plans(patch_size=list(window)))
    predictor = nnUNetPredictor(use_gaussian=True, use_mirroring=False, device=CPU, allow_tqdm=False)
    configuration = manager.get_configuration("3d_fullres_5shot")
    state = [network.state_dict()]
    predictor.manual_initialization(network, manager, configuration, state, tiny.dataset_json(), "FSEFTTrainer", None)
    return predictor


def test_linear_probe_on_the_bank_is_the_predictors_sliding_window(tiny, contract, tmp_path):
    """nnU-Net blends the logits of its windows, the bank blends features."""
    torch.manual_seed(0)
    image = torch.rand(1, 24, 22, 20)
    network = AdaptedNetwork(1, 4, "phantom", contract.sha256, "linear_probe", "all", None, 3)
    bank = FeatureBank(tmp_path, network.backbone, "all", WINDOW, CPU)
    bank.fill(["a"], lambda case: image.numpy(), whole)
    network.fit(*bank.statistics(["a"]), {"background": 0, "x": 1, "y": 2, "z": 3}, False)
    with torch.no_grad():
        ours = network.adapt(torch.from_numpy(bank["a"].boxes[0].astype(np.float32))[None])[0]

    predictor = stock_predictor(network, tiny, WINDOW)
    windows = predictor._internal_get_sliding_window_slicers(image.shape[1:])
    assert len(windows) == 8
    theirs = predictor.predict_sliding_window_return_logits(image).float()
    gaussian = compute_gaussian(WINDOW, 1 / 8, 10, device=CPU).float()
    blended, weight = torch.zeros_like(ours), torch.zeros(image.shape[1:])
    padded = torch.nn.functional.pad(image, (0, 4, 0, 2))
    for window in windows:
        with torch.no_grad():
            logits = network(image[window][None])[0]
        blended[window] += logits * gaussian
        weight[window[1:]] += gaussian
    torch.testing.assert_close(ours, blended / weight, rtol=1e-3, atol=1e-3)
    # the predictor sums in float16: near the volume's corners, where its weights underflow, its logits are coarse
    sound = weight > 0.01
    assert sound.float().mean() > 0.6 and theirs.abs().max() > 1
    torch.testing.assert_close(ours[:, sound], theirs[:, sound], rtol=2e-3, atol=2e-3)
    # windows matter: the volume in one piece gives something else
    with torch.no_grad():
        in_one_piece = network(padded[None])[0, :, :, :22, :20]
    assert (in_one_piece - theirs)[:, sound].abs().max() > 0.03


def test_spatial_adapters_dice_by_bank_and_by_predictor(tiny, contract, tmp_path):
    """The adapter is not linear and sees across the windows' borders: logits differ there, Dice hardly does."""
    shape, window = (56, 56, 56), (40, 40, 40)
    organs = ("spleen", "kidney_right", "vertebrae")
    made = phantom.make_phantom((5, 1), phantom.PhantomConfig(shape, 5.0, (-0.1, 0.0, 0.1)))
    low, high = phantom.HU_WINDOW
    image = torch.from_numpy((made.image.clip(low, high) - low) / (high - low)).float()[None]
    network = AdaptedNetwork(1, 4, "phantom", contract.sha256, "spatial", "all", 32, 3)
    bank = FeatureBank(tmp_path, network.backbone, "all", window, CPU)
    bank.fill(["a"], lambda case: image.numpy(), whole)
    network.fit(*bank.statistics(["a"]), {"background": 0, **{name: i + 1 for i, name in enumerate(organs)}}, False)
    torch.manual_seed(0)
    torch.nn.init.normal_(network.adapter.conv2.weight, 0, 0.02)

    def dice(logits):
        labels = logits.argmax(0).numpy()
        pairs = [(labels == i + 1, made.labels == phantom.LABELS[name]) for i, name in enumerate(organs)]
        return np.array([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs])

    with torch.no_grad():
        ours = dice(network.adapt(torch.from_numpy(bank["a"].boxes[0].astype(np.float32))[None])[0])
        in_one_piece = dice(network(image[None])[0])
    predictor = stock_predictor(network, tiny, window)
    assert len(predictor._internal_get_sliding_window_slicers(shape)) == 8
    theirs = dice(predictor.predict_sliding_window_return_logits(image).float())
    assert theirs.max() > 0.3
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.01)
    assert np.abs(in_one_piece - theirs).max() > 0.02


# ---- crops ----


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
        assert batch["data"].shape == (3, 3, 6, 7, 8) and batch["data"].dtype == torch.float16
        assert batch["target"].shape == (3, 1, 6, 7, 8) and batch["target"].dtype == torch.int16
        for case, data, target in zip(batch["keys"], batch["data"], batch["target"]):
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
    assert batch["data"].shape == (2, 3, 14, 16, 16)


def test_transform_makes_the_target(loader):
    class Double:
        def __call__(self, segmentation):
            return {"segmentation": 2 * segmentation}

    plain, doubled = next(loader()), next(loader(transform=Double()))
    assert torch.equal(doubled["target"], 2 * plain["target"]) and torch.equal(doubled["data"], plain["data"])


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
    assert np.array_equal(batch["data"][:, :, 0, 0, 0], starts)


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
    full = FeatureBank(bank.root / "whole", bank.backbone, "last", WINDOW, CPU)
    store(full, "a", features)
    return layout, *loaders, CropLoader(full, {"a": segmentation}, crop, 2, (1, 2))


def test_crops_of_parts_are_crops_of_the_volume(kept_in_part):
    layout, parts, full = kept_in_part
    assert len(layout.boxes) > 1
    places = set()
    for _ in range(300):
        batch, reference = next(parts), next(full)
        # around foreground: the same crops, whatever is kept of the rest
        assert torch.equal(batch["data"][0], reference["data"][0])
        assert torch.equal(batch["target"][0], reference["target"][0])
        start = batch["data"][1, :, 0, 0, 0].long()
        assert torch.equal(batch["data"][1].long(), torch.from_numpy(np.indices((8, 9, 10))) + start.view(3, 1, 1, 1))
        box = tuple(slice(a, a + n) for a, n in zip(start.tolist(), (8, 9, 10)))
        assert np.array_equal(batch["target"][1], parts.segmentations["a"][(slice(None), *box)])
        places.add(tuple(start.tolist()))
    # background: every block is drawn, and nothing else
    assert places == {start for start, _ in layout.boxes[1:]}


def test_smaller_crops_move_within_the_blocks(kept_in_part):
    """The smallest support volume may allow smaller crops than the bank was filled for."""
    layout, parts, _ = kept_in_part
    parts.crop_size = np.array((5, 9, 4))
    starts = {tuple(next(parts)["data"][1, :, 0, 0, 0].long().tolist()) for _ in range(100)}
    assert len(starts) > BACKGROUND_BLOCKS
    for start in starts:
        assert any(
            all(a <= s and s + n <= b for a, s, n, b in zip(first, start, (5, 9, 4), end))
            for first, end in layout.boxes[1:]
        )


# ---- pooling and sizes ----


def test_pooled_averages_blocks():
    features = np.random.default_rng(0).normal(size=(2, 5, 4, 7)).astype(np.float16)
    result = pooled(torch.from_numpy(features).float(), 2)
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
    result = pooled(torch.from_numpy(features), factor)[0]
    assert voxels.shape == result.shape[1:] and voxels.sum() == np.prod(shape)
    np.testing.assert_allclose((result * voxels).sum((1, 2, 3)), features.sum((1, 2, 3)), rtol=1e-5)


def test_pooling_factor_bounds_the_volume():
    assert pooling_factor((40, 40, 40)) == 1
    shape = (300, 250, 200)
    factor = pooling_factor(shape)
    sizes = [np.prod([-(-n // f) for n in shape]) for f in (factor, factor - 1)]
    assert sizes[0] <= MAX_POOLED_VOXELS < sizes[1]


@pytest.mark.parametrize("shape", [(16, 16, 20), (9, 8, 7), (1, 2, 3)])
def test_query_is_kept_pooled(bank, shape):
    features = torch.randn(16, *shape)
    store(bank, "q", features, query_layout(shape, 2))
    entry = bank["q"]
    assert entry.layout.pool == 2 and entry.layout.shape == shape
    np.testing.assert_allclose(entry.boxes[0], pooled(features, 2)[0], rtol=1e-3, atol=1e-4)
    assert entry.boxes[0].shape[1:] == block_voxels(shape, 2).shape
    assert entry.layout.voxels == np.prod([-(-n // 2) for n in shape])
    sizes = QuerySizes(bank, ["q"], 0.5)
    volume = sizes._load("q")
    assert volume.features.shape == (1, *entry.boxes[0].shape) and volume.features.dtype == torch.float16
    assert volume.voxels_ml.sum() == pytest.approx(0.5 * np.prod(shape))


def test_every_query_is_visited_once_a_round(bank):
    queries = [f"q{i}" for i in range(7)]
    sizes = QuerySizes(bank, queries, 1.0)
    rounds = [[sizes.rotating(step, 3) for step in range(7 * r, 7 * r + 7)] for r in range(4)]
    assert all(sorted(visited) == queries for visited in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert [sizes.rotating(step, 3) for step in range(28)] == sum(rounds, [])
    assert [sizes.rotating(step, 4) for step in range(28)] != sum(rounds, [])


@pytest.mark.parametrize("has_regions", [False, True])
def test_soft_sizes_by_hand(bank, contract, has_regions):
    """Constant logits: every class fills the same share of the volume, whatever the pooling."""
    network = AdaptedNetwork(1, 3, "phantom", contract.sha256, "linear_probe", "last", None, 3)
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
    bias = network.head.bias.detach()
    share = torch.sigmoid(bias) if has_regions else torch.softmax(bias, 0)[1:]
    for pool in (1, 2, 4):
        store(bank, "q", torch.rand(16, 9, 8, 7), query_layout((9, 8, 7), pool))
        sizes = QuerySizes(bank, ["q"], 0.25).predict(network, "q", has_regions).soft
        torch.testing.assert_close(sizes.detach(), share * 9 * 8 * 7 * 0.25, rtol=1e-4, atol=0)
    sizes.sum().backward()
    assert network.head.bias.grad.abs().min() > 0


def probe_of_the_first_channel(contract) -> AdaptedNetwork:
    """Two classes; the first is wherever the first channel is positive, the second nowhere."""
    network = AdaptedNetwork(1, 3, "phantom", contract.sha256, "linear_probe", "last", None, 3)
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.weight[1, 0] = 100.0
        network.head.bias.copy_(torch.tensor([0.0, 0.0, -100.0]))
    return network


def ball(radius: int, centre: int = 8) -> torch.Tensor:
    """Features (16, 17, 17, 17), 1 in a cube of the first channel, -1 elsewhere."""
    features = -torch.ones(16, 17, 17, 17)
    inside = slice(max(0, centre - radius), centre + radius + 1)
    features[0, inside, inside, inside] = 1.0
    return features


def test_sizes_of_pooled_queries_are_calibrated_on_the_support(bank, contract):
    """Pooling by 4 changes what a cube of 9^3 seems to measure; what it does to the support is undone."""
    network = probe_of_the_first_channel(contract)
    store(bank, "query", ball(4), query_layout((17, 17, 17), 4))
    store(bank, "support", ball(4), query_layout((17, 17, 17), 4))
    voxel_ml = 0.5
    plain = QuerySizes(bank, ["query"], voxel_ml)
    plain.calibrate(network, False)
    raw = plain.predict(network, "query", False).soft[0].item()
    assert abs(raw / (9**3 * voxel_ml) - 1) > 0.1
    true = torch.tensor([9**3 * voxel_ml, 0.0])
    calibrated = QuerySizes(bank, ["query"], voxel_ml, {"support": true})
    calibrated.calibrate(network, False)
    assert calibrated.predict(network, "query", False).soft[0].item() == pytest.approx(9**3 * voxel_ml, rel=1e-4)
    # the second class is in no support case, which says nothing of it
    assert calibrated.scale[1] == 1


@pytest.mark.parametrize("centre, at_border", [(8, False), (3, True)])
def test_organs_at_the_border_and_missing_ones_are_not_seen_whole(bank, contract, centre, at_border):
    network = probe_of_the_first_channel(contract)
    store(bank, "query", ball(3, centre), query_layout((17, 17, 17), 1))
    predicted = QuerySizes(bank, ["query"], 1.0).predict(network, "query", False)
    assert predicted.at_border.tolist() == [at_border, False]
    prior = torch.tensor([500.0, 500.0])
    assert predicted.seen_whole(prior).tolist() == [not at_border, False]
