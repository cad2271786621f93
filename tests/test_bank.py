"""The feature bank: filling it, by several trainings at once too, and the disk that it takes."""

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
from banks import CPU, WINDOW, make_bank, make_images, requests, store

from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.features import bank as features
from fsefs_nnunet.features import disk
from fsefs_nnunet.features.bank import FeatureBank
from fsefs_nnunet.features.layout import Layout, pooled, query_layout, whole_layout
from fsefs_nnunet.files import PART


@pytest.fixture(scope="module")
def images():
    return make_images()


# ---- filling ----


def test_second_fill_computes_nothing(bank, images, backbone):
    assert bank.fill(requests(images, images.get)) == 2
    times = {file: file.stat().st_mtime_ns for file in bank.folder.iterdir()}
    again = make_bank(bank.root, backbone)
    assert again.fill(requests(images, images.get)) == 0
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
    assert bank.fill(requests(same, same.get, layout)) == 3
    assert len(passes) == 2
    whole_a = torch.from_numpy(np.array(bank["a"].boxes[0])).float()
    np.testing.assert_allclose(bank["pooled"].boxes[0], pooled(whole_a, 2)[0], rtol=1e-2, atol=1e-2)
    next(bank.folder.glob("pooled_*.npy")).unlink()
    assert bank.fill(requests(same, same.get, layout)) == 1


def alter(npy, json_file):
    array = np.load(npy)
    array[7] += 1
    np.save(npy, array)


def change_json(**values):
    def change(npy, json_file):
        json_file.write_text(json.dumps({**json.loads(json_file.read_text()), **values}))

    return change


def half_written(npy, json_file):
    """As a killed process leaves it, between its two files."""
    npy.with_name(f".{npy.name}.1-0{PART}").write_bytes(npy.read_bytes()[:100])
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
    bank.fill(requests(["a"], images.get))
    (npy,), (json_file,) = bank.folder.glob("a_*.npy"), bank.folder.glob("a_*.json")
    expected, info = npy.read_bytes(), json.loads(json_file.read_text())
    damage(npy, json_file)
    again, said = make_bank(bank.root, backbone), []
    assert again.fill(requests(["a"], images.get), log=said.append) == 1
    assert f"1 entries were not whole, or altered, and are computed again: {npy.stem}." in said
    assert npy.read_bytes() == expected and json.loads(json_file.read_text()) == info
    assert not list(bank.folder.glob(f".*{PART}"))
    assert again.fill(requests(["a"], images.get)) == 0


def test_other_image_or_layout_is_another_entry(bank, images):
    assert bank.fill(requests(["a"], images.get)) == 1
    old = np.array(bank["a"].boxes[0])
    assert bank.fill(requests(["a"], lambda case: images["b"])) == 1
    assert not np.array_equal(bank["a"].boxes[0], old)
    region = ((2, 0, 0), (8, 16, 16))
    layouts = {"pooled": query_layout((16, 16, 20), 2), "region": Layout((16, 16, 20), (region,))}
    for layout in layouts.values():
        assert bank.fill(requests(["a"], images.get, lambda case, shape, layout=layout: layout)) == 1
        assert bank["a"].layout == layout
    np.testing.assert_array_equal(bank["a"].boxes[0], old[:, 2:8, :, :16])
    assert bank.fill(requests(["a"], images.get)) == 0
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
    bank.fill(requests(images, images.get))
    values = np.concatenate([bank[case].boxes[0].astype(np.float64).reshape(16, -1) for case in images], 1)
    mean, std = bank.statistics(images)
    np.testing.assert_allclose(mean, values.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(std, values.std(1), rtol=1e-4)
    bank.fill(requests(images, images.get, lambda case, shape: Layout(tuple(shape), (((0, 0, 0), (4, 4, 4)),))))
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
        bank.fill(requests(images, {"a": images["a"], "b": broken}.get))
    assert not list(bank.folder.iterdir())


# ---- several trainings at once ----


def fill_at_once(root, barrier, computed):
    torch.set_num_threads(1)
    bank, images = make_bank(root, FrozenBackbone("phantom", "last")), make_images("abcdef")
    barrier.wait(120)
    computed.put(bank.fill(requests(images, images.get)))


@pytest.mark.slow
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
    assert bank.fill(requests(images, images.get)) == 0


def test_killed_holder_of_a_lock_holds_up_nobody(bank, images, backbone):
    bank.fill(requests(["a"], images.get))
    (lock,) = bank.folder.glob("*.lock")
    next(bank.folder.glob("a_*.json")).unlink()
    hold = "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire()"
    wait = "print('held', flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", f"{hold}; {wait}", lock], stdout=subprocess.PIPE)
    assert holder.stdout.readline().strip() == b"held"
    computed = []
    waiting = threading.Thread(
        target=lambda: computed.append(make_bank(bank.root, backbone).fill(requests(["a"], images.get))), daemon=True
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
        bank.fill(requests(images, images.get), (NEEDED - 1) / 1e9)
    for part in ("needs 0.000328 GB more", "holds 0 GB; ", "allows 0.000328 GB: raise it", "fseft bank -d ID --clear"):
        assert part in str(refusal.value)
    assert not list(bank.folder.iterdir())
    assert bank.fill(requests(["a"], images.get), NEEDED / 1e9) == 1
    # what lies there counts, in whichever bank
    other = bank.root / "other_0"
    bank.folder.rename(other)
    with pytest.raises(ValueError, match="holds 0.000[0-9]* GB; fseft_bank_gb allows"):
        bank.fill(requests(images, images.get), NEEDED / 1e9)
    shutil.rmtree(other)
    assert bank.fill(requests(images, images.get), 1.2 * NEEDED / 1e9) == 2
    # nothing is missing, nothing is refused
    assert bank.fill(requests(images, images.get), 0) == 0


def test_full_disk_is_refused_before_anything_is_computed(bank, images, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: SimpleNamespace(free=NEEDED - 1))
    with pytest.raises(ValueError, match="the disk has 0.000328 GB free: free some, clear old banks .* fewer queries"):
        bank.fill(requests(images, images.get))
    assert not list(bank.folder.iterdir())
    assert bank.fill(requests(["a"], images.get)) == 1


def test_log_says_what_the_bank_takes(bank, images):
    lines = []
    bank.fill(requests(images, images.get), log=lines.append)
    assert len(lines) == 2 and "2 volumes" in lines[0] and "take 0.000328 GB" in lines[0]
    assert f"{bank.folder} takes 0.0003" in lines[1]
    bank.fill(requests(images, images.get), log=lines.append)
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
        bank.fill(requests(cases, images.get))
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
