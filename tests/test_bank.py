"""The feature bank: filling it, by several trainings at once too, and the disk that it takes."""

import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from banks import CPU, WINDOW, make_bank, make_images, request_of, requests, store, whole_maps

from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.features import bank as bank_module
from fsefs_nnunet.features import disk
from fsefs_nnunet.features.bank import FeatureBank
from fsefs_nnunet.features.layout import Layout, query_layout
from fsefs_nnunet.files import PART


def replaced(file, change=lambda image: image + 0.5):
    """Replace the image in `file`."""
    np.save(file, change(np.load(file)))


def whole_of(entry) -> np.ndarray:
    """The only map (C, X, Y, Z) of a whole volume."""
    ((array,),) = entry.arrays
    return array


# ---- filling ----


def test_second_fill_computes_nothing(bank, images, backbone):
    assert bank.fill(requests(images)) == 2
    times = {file: file.stat().st_mtime_ns for file in bank.folder.iterdir()}
    again = make_bank(bank.root, backbone)
    assert again.fill(requests(images)) == 0
    assert {file: file.stat().st_mtime_ns for file in bank.folder.iterdir()} == times
    entries = sorted(f"{file.name[0]}{file.suffix}" for file in times if file.suffix != ".lock")
    assert entries == ["a.json", "a.npy", "b.json", "b.npy"] and len(times) == 6  # a lock for each volume
    array = whole_of(again["a"])
    assert array.shape == (16, 16, 16, 20) and array.dtype == np.float16
    assert isinstance(array, np.memmap)


def test_a_volume_kept_in_two_ways_is_computed_once(bank, images):
    wanted = [*requests(images), request_of("pooled", images["a"], query_layout((16, 16, 20), (2, 2, 2)))]
    assert bank.fill(wanted) == 3
    assert bank.windows == 2 * 2  # of two volumes, two windows each
    expected = torch.nn.functional.avg_pool3d(torch.from_numpy(whole_of(bank["a"]).astype(np.float32)), 2)
    np.testing.assert_allclose(bank["pooled"].blocks, expected, rtol=1e-2, atol=1e-2)
    next(bank.folder.glob("pooled_*.npy")).unlink()
    assert bank.fill(wanted) == 1


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
    "json of other features": change_json(features=[0, 0], features_sha256="0" * 64),
    "json of another entry": change_json(key={}),
    "json cut": lambda npy, json_file: json_file.write_text('{"key'),
    "json no object": lambda npy, json_file: json_file.write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_entry_is_computed_again(bank, images, backbone, damage):
    bank.fill(requests(images, "a"))
    (npy,), (json_file,) = bank.folder.glob("a_*.npy"), bank.folder.glob("a_*.json")
    expected, info = npy.read_bytes(), json.loads(json_file.read_text())
    damage(npy, json_file)
    again, said = make_bank(bank.root, backbone), []
    assert again.fill(requests(images, "a"), log=said.append) == 1
    assert f"1 entries were incomplete, or their files were altered, and are computed again: {npy.stem}." in said
    assert npy.read_bytes() == expected
    assert json.loads(json_file.read_text()) | {"features": info["features"]} == info  # apart from the time
    assert not list(bank.folder.glob(f".*{PART}"))
    assert again.fill(requests(images, "a")) == 0


def test_an_entry_altered_with_its_size_and_time_restored_is_found_by_no_fill(bank, images, backbone):
    """Content is hashed only where size or time differ; `fseft bank --verify` finds the rest."""
    bank.fill(requests(images, "a"))
    (npy,), (json_file,) = bank.folder.glob("a_*.npy"), bank.folder.glob("a_*.json")
    before = npy.stat()
    alter(npy, json_file)
    os.utime(npy, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert make_bank(bank.root, backbone).fill(requests(images, "a")) == 0
    os.utime(npy)
    assert make_bank(bank.root, backbone).fill(requests(images, "a")) == 1


def test_a_copied_bank_is_hashed_once(bank, images, backbone, monkeypatch):
    """A different time does not mean different content; it is stored, so that the next training need not hash again."""
    bank.fill(requests(images))
    for file in [*bank.folder.glob("*.npy"), *images.values()]:
        os.utime(file)
    hashed = []
    original = bank_module.sha256_of
    monkeypatch.setattr(bank_module, "sha256_of", lambda file: hashed.append(file) or original(file))
    assert make_bank(bank.root, backbone).fill(requests(images)) == 0 and len(hashed) == 2
    assert make_bank(bank.root, backbone).fill(requests(images)) == 0 and len(hashed) == 2


def test_a_touched_image_is_no_other_image(bank, images, backbone):
    bank.fill(requests(images))
    os.utime(images["a"])
    assert make_bank(bank.root, backbone).fill(requests(images)) == 0
    replaced(images["a"])
    again = make_bank(bank.root, backbone)
    assert again.fill(requests(images)) == 1 and again.windows == 2
    assert not np.array_equal(whole_of(again["a"]), whole_of(bank["a"]))


def test_an_image_that_did_not_change_is_not_read(bank, images, backbone):
    def read() -> None:
        raise AssertionError

    bank.fill(requests(images))
    unread = [replace(request, content=read, image=read) for request in requests(images)]
    assert make_bank(bank.root, backbone).fill(unread) == 0


def test_other_image_or_layout_is_another_entry(bank, images):
    assert bank.fill(requests(images, "a")) == 1
    old = np.array(whole_of(bank["a"]))
    region = ((2, 0, 0), (8, 16, 16))
    layouts = [query_layout((16, 16, 20), (2, 2, 2)), Layout((16, 16, 20), (region,))]
    for layout in layouts:
        assert bank.fill(requests(images, "a", layout)) == 1
        assert bank["a"].layout == layout
    np.testing.assert_array_equal(whole_of(bank["a"]), old[:, 2:8, :, :16])
    assert bank.fill(requests(images, "a")) == 0
    np.testing.assert_array_equal(whole_of(bank["a"]), old)
    replaced(images["a"])
    assert bank.fill(requests(images, "a")) == 1
    assert not np.array_equal(whole_of(bank["a"]), old)


def test_recipes_do_not_share_a_folder(backbone, tmp_path):
    banks = [
        FeatureBank(tmp_path, backbone, "last", WINDOW, CPU),
        FeatureBank(tmp_path, backbone, "all", WINDOW, CPU),
        FeatureBank(tmp_path, backbone, "last", (16, 16, 24), CPU),
    ]
    assert len({bank.folder for bank in banks}) == 3
    assert banks[0].folder == FeatureBank(tmp_path, backbone, "last", list(map(np.int64, WINDOW)), CPU).folder


def test_statistics_are_those_of_whole_volumes(bank, images):
    bank.fill(requests(images))
    values = np.concatenate([whole_of(bank[case]).astype(np.float64).reshape(16, -1) for case in images], 1)
    mean, std = bank.statistics(images)
    np.testing.assert_allclose(mean, values.mean(1), rtol=1e-4, atol=1e-4)  # of what is stored in float16
    np.testing.assert_allclose(std, values.std(1), rtol=1e-3)
    bank.fill(requests(images, layout=Layout((16, 16, 20), (((0, 0, 0), (4, 4, 4)),))))
    for part, full in zip(bank.statistics(images), (mean, std)):
        assert torch.equal(part, full)


@pytest.mark.parametrize("shape", [(24, 22, 20), (10, 16, 7)])
def test_statistics_of_coarse_maps(tmp_path, shape):
    """Each map at its own resolution, its voxels weighted by how much of the volume they cover."""
    backbone, image = FrozenBackbone("phantom", "all"), torch.rand(1, *shape)
    np.save(tmp_path / "a.npy", image.numpy())
    bank = FeatureBank(tmp_path / "banks", backbone, "all", WINDOW, CPU)
    bank.fill([request_of("a", tmp_path / "a.npy", statistics=True)])
    tiling, maps = whole_maps(backbone, image)
    inside = (slice(None), *tiling.inside)
    repeated = [torch.nn.functional.interpolate(m[None], tiling.padded)[0][inside] for m in maps]
    values = torch.cat(repeated).flatten(1).double()
    mean, std = bank.statistics(["a"])
    torch.testing.assert_close(mean, values.mean(1).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(std, values.std(1, correction=0).float(), rtol=1e-4, atol=1e-5)


def test_a_dead_channel_is_not_divided_by_zero(bank):
    features = torch.zeros(2, 4, 4, 4)
    features[0] = torch.arange(64.0).view(4, 4, 4)
    features[1] = 3
    store(bank, "a", features)
    mean, std = bank.statistics(["a"])
    assert mean.tolist() == [31.5, 3] and std.tolist() == pytest.approx([np.arange(64).std(), 1])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_image_that_is_not_finite_is_refused_before_its_features_are_computed(bank, images, value):
    def broken(image):
        image[0, 3, 3, 3] = value
        return image

    replaced(images["b"], broken)
    with pytest.raises(ValueError, match="image of b holds NaN or infinite values: repair"):
        bank.fill(requests(images))
    assert bank.windows == 2 and not list(bank.folder.glob("*b_*"))
    assert bank.fill(requests(images, "a")) == 0  # what was computed before is kept


# ---- several trainings at once ----


def fill_at_once(root, images, barrier, computed):
    torch.set_num_threads(1)
    bank = make_bank(root, FrozenBackbone("phantom", "last"))
    barrier.wait(120)
    computed.put(bank.fill(requests(images)))


@pytest.mark.slow
def test_two_processes_compute_each_entry_once(bank, tmp_path):
    context, images = get_context("spawn"), make_images(tmp_path, "abcdef")
    barrier, computed = context.Barrier(2), context.Queue()
    arguments = (bank.root, images, barrier, computed)
    processes = [context.Process(target=fill_at_once, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sum(computed.get(timeout=10) for _ in processes) == 6
    assert bank.fill(requests(images)) == 0
    assert not list(bank.folder.glob(f".*{PART}"))


def test_killed_holder_of_a_lock_holds_up_nobody(bank, images, backbone):
    bank.fill(requests(images, "a"))
    (lock,) = bank.folder.glob("*.lock")
    next(bank.folder.glob("a_*.json")).unlink()
    hold = "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire()"
    wait = "print('held', flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", f"{hold}; {wait}", lock], stdout=subprocess.PIPE)
    assert holder.stdout.readline().strip() == b"held"
    computed = []
    waiting = threading.Thread(
        target=lambda: computed.append(make_bank(bank.root, backbone).fill(requests(images, "a"))), daemon=True
    )
    waiting.start()
    waiting.join(1)
    assert waiting.is_alive()
    with pytest.raises(ValueError, match="A training is filling .*: wait until it has finished, or stop it"):
        disk.clear_banks(bank.root, [])
    holder.kill()
    holder.wait()
    waiting.join(30)
    assert computed == [1]


# ---- disk ----


NEEDED = 2 * 16 * 16 * 16 * 20 * 2  # bytes: two cases, 16 channels, fp16


def test_cap_refuses_before_anything_is_computed(bank, images):
    with pytest.raises(ValueError) as refusal:
        bank.fill(requests(images), (NEEDED - 1) / 1e9)
    for part in ("needs 0.000328 GB more", "holds 0 GB; ", "allows 0.000328 GB: raise it", "fseft bank -d ID --clear"):
        assert part in str(refusal.value)
    assert not list(bank.folder.iterdir())
    assert bank.fill(requests(images, "a"), NEEDED / 1e9) == 1
    # what lies there counts, in whichever bank
    other = bank.root / "other_0"
    bank.folder.rename(other)
    with pytest.raises(ValueError, match="holds 0.000[0-9]* GB; fseft_bank_gb allows"):
        bank.fill(requests(images), NEEDED / 1e9)
    shutil.rmtree(other)
    assert bank.fill(requests(images), 1.2 * NEEDED / 1e9) == 2
    # nothing is missing, nothing is refused
    assert bank.fill(requests(images), 0) == 0


def test_full_disk_is_refused_before_anything_is_computed(bank, images, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: SimpleNamespace(free=NEEDED - 1))
    with pytest.raises(ValueError, match="the disk has 0.000328 GB free: free some, clear old banks .* fewer queries"):
        bank.fill(requests(images))
    assert not list(bank.folder.iterdir())
    assert bank.fill(requests(images, "a")) == 1


def test_log_says_what_the_bank_takes(bank, images):
    lines = []
    bank.fill(requests(images), log=lines.append)
    assert len(lines) == 3 and "2 volumes" in lines[0] and "take 0.000328 GB" in lines[0]
    assert lines[1].startswith("The largest volume, 16 x 16 x 20 voxels, takes about")
    assert f"{bank.folder} takes 0.0003" in lines[2]
    bank.fill(requests(images), log=lines.append)
    assert len(lines) == 3  # nothing was missing


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
        bank.fill(requests(images, cases))
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
    assert np.isfinite(whole_of(banks[0]["a"])).all()
    disk.clear(77, [])
    assert not banks[1].folder.exists() and disk.list_banks(root) == []
