"""The feature bank on disks that are full, on file systems that lack something, and when it is interrupted."""

import errno
import json
import os
import re
import shutil
from contextlib import suppress

import numpy as np
import pytest
import torch
from banks import CPU, WINDOW, Given, make_bank, request_of, requests, store
from filelock import FileLock

from fsefs_nnunet.errors import InputError
from fsefs_nnunet.features.bank import FeatureBank
from fsefs_nnunet.features.layout import Layout, query_layout
from fsefs_nnunet.files import PART

SHAPE = (16, 16, 20)


def left_behind(bank) -> list[str]:
    """Files in the bank's folder except locks."""
    return sorted(file.name for file in bank.folder.iterdir() if file.suffix != ".lock")


class Acting(Given):
    """A backbone whose only map is the image, and which does something before each window."""

    def __init__(self, contract, act):
        super().__init__(1, contract)
        self.act, self.calls = act, 0

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        self.calls += 1
        self.act(self.calls)
        return super().forward(image)


def no_space(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


# ---- numbers ----


@pytest.mark.parametrize("layout", [None, query_layout(SHAPE, (2, 2, 2)), Layout(SHAPE, (((0, 0, 0), (4, 4, 4)),))])
def test_features_too_large_for_float16_are_stored_in_float32(bank, layout):
    features, said = torch.full((1, *SHAPE), 1e6), []
    features[0, 8:] = 3e5
    bank.root.mkdir()
    np.save(bank.root / "a.npy", features.numpy())
    bank.backbone = Given(1, bank.backbone.contract)
    assert bank.fill([request_of("a", bank.root / "a.npy", layout, statistics=True)], log=said.append) == 1
    assert "Features of a are too large for float16: they are stored in float32." in said
    ((array,),) = bank["a"].arrays
    assert array.dtype == np.float32 and array.max() == pytest.approx(1e6)
    if layout is None:
        torch.testing.assert_close(bank["a"].crop((0, 0, 0), SHAPE).at_full_resolution()[0], features)
    mean, std = bank.statistics(["a"])
    assert mean.item() == pytest.approx(6.5e5, rel=1e-5) and std.item() == pytest.approx(3.5e5, rel=1e-4)
    assert not list(bank.folder.glob(f".*{PART}"))
    store(bank, "b", features / 1e3)
    assert bank["b"].arrays[0][0].dtype == np.float16


# ---- disks and file systems ----


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_in_the_middle(bank, images, monkeypatch, code):
    """The first volume is kept, the second leaves nothing; once there is space, only the second is computed."""
    allocate, calls = os.posix_fallocate, []

    def full(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(code, "full")
        allocate(*args)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match="^The disk of .* is full: free some of it, clear old banks with `fseft bank"):
        bank.fill(requests(images))
    assert [name[0] for name in left_behind(bank)] == ["a", "a"]
    assert bank.fill(requests(images)) == 1


def test_a_disk_that_fills_up_while_the_second_of_two_layouts_is_made(bank, images, monkeypatch):
    allocate, calls = os.posix_fallocate, []
    monkeypatch.setattr(
        os,
        "posix_fallocate",
        lambda *args: no_space() if calls else calls.append(allocate(*args)),
    )
    with pytest.raises(InputError, match="is full"):
        bank.fill([*requests(images, "a"), request_of("pooled", images["a"], query_layout(SHAPE, (2, 2, 2)))])
    assert left_behind(bank) == []


@pytest.mark.parametrize("error", [NotImplementedError(), OSError(errno.ENOLCK, "No locks available")])
def test_a_file_system_without_locks(bank, images, monkeypatch, error):
    def acquire(*args, **kwargs):
        raise error

    monkeypatch.setattr(FileLock, "acquire", acquire)
    assert bank.fill(requests(images)) == 2
    assert bank.fill(requests(images)) == 0


def test_without_locks_two_trainings_may_compute_a_volume_at_once(bank, images, contract, monkeypatch):
    """The second one finishes while the backbone of the first one runs."""

    def acquire(*args, **kwargs):
        raise NotImplementedError

    def fill_beside(call: int) -> None:
        if call == 1:
            assert other.fill(requests(images, "a")) == 1

    monkeypatch.setattr(FileLock, "acquire", acquire)
    other = FeatureBank(bank.root, Given(1, contract), "last", WINDOW, CPU)
    bank.backbone = Acting(contract, fill_beside)
    assert bank.fill(requests(images, "a")) == 1
    assert [name[0] for name in left_behind(bank)] == ["a", "a"]
    assert bank.fill(requests(images, "a")) == other.fill(requests(images, "a")) == 0


def test_an_error_of_a_lock_that_is_none_of_the_file_systems(bank, images, monkeypatch):
    def acquire(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.raises(OSError, match="Input/output error"):
        bank.fill(requests(images))


def test_a_file_system_that_maps_no_files(bank, images, backbone, monkeypatch):
    wanted = requests(images)
    bank.fill(wanted)
    expected = [np.array(bank[case].arrays[0][0]) for case in images]
    shutil.rmtree(bank.folder)

    def no_mapping(*args, **kwargs):
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(np.lib.format, "open_memmap", no_mapping)
    again = make_bank(bank.root, backbone)
    assert again.fill(wanted) == 2
    assert not isinstance(again["a"].arrays[0][0], np.memmap)
    for case, array in zip(images, expected):
        np.testing.assert_array_equal(again[case].arrays[0][0], array)
    monkeypatch.undo()
    assert make_bank(bank.root, backbone).fill(requests(images)) == 0
    assert not list(bank.folder.glob(f".*{PART}"))


def test_an_entry_that_is_removed_while_it_is_mapped(bank, images):
    bank.fill(requests(images))
    place = (3, 4, 5), (8, 8, 8)
    before = bank["a"].crop(*place).at_full_resolution()
    shutil.rmtree(bank.folder)
    assert torch.equal(bank["a"].crop(*place).at_full_resolution(), before)


def test_an_entry_that_is_replaced_while_it_is_mapped(bank, images):
    bank.fill(requests(images))
    opened, before = bank["a"], np.array(bank["a"].arrays[0][0])
    np.save(images["a"], np.load(images["a"]) + 1)
    assert bank.fill(requests(images)) == 1
    np.testing.assert_array_equal(opened.arrays[0][0], before)
    assert not np.array_equal(bank["a"].arrays[0][0], before)


def test_crops_do_not_change_what_is_stored(bank, images, backbone):
    bank.fill(requests(images))
    bank["a"].crop((0, 0, 0), (4, 4, 4)).maps[0].fill_(7)
    bank["a"].arrays[0][0][:] = 7  # this changes only the memory of this process
    assert make_bank(bank.root, backbone).fill(requests(images)) == 0


# ---- interruptions ----


def test_an_interrupt_leaves_no_part_of_an_entry(bank, images, contract):
    def interrupt(call: int) -> None:
        if call == 4:  # the last of two windows of b
            raise KeyboardInterrupt

    bank.backbone = Acting(contract, interrupt)
    with pytest.raises(KeyboardInterrupt):
        bank.fill(requests(images))
    assert [name[0] for name in left_behind(bank)] == ["a", "a"]
    with FileLock(next(bank.folder.glob("*.lock")), timeout=0):
        pass
    bank.backbone = Given(1, contract)
    assert bank.fill(requests(images)) == 1


def test_an_image_that_changes_while_the_backbone_runs_over_it(bank, images, contract):
    """Its features are those of the earlier content."""

    def preprocess_anew(call: int) -> None:
        if call == 1:
            np.save(images["a"], np.load(images["a"]) + 1)

    bank.backbone = Acting(contract, preprocess_anew)
    with suppress(OSError):
        bank.fill(requests(images, "a"))
    bank.fill(requests(images, "a"))
    crop = bank["a"].crop((0, 0, 0), SHAPE).at_full_resolution()[0]
    torch.testing.assert_close(crop.float(), torch.from_numpy(np.load(images["a"])), rtol=1e-3, atol=1e-3)


def test_a_backbone_that_gives_nan(bank, images, contract):
    class Broken(Given):
        def forward(self, image):
            return [image / 0 * 0]

    bank.backbone = Broken(1, contract)
    with pytest.raises(InputError, match="^a: the backbone returns NaN or infinite values for this image, which holds"):
        bank.fill(requests(images))
    assert left_behind(bank) == []


# ---- label maps of views ----


def test_an_entry_keeps_a_label_map(bank, images):
    labels = np.arange(16 * 16 * 20).reshape(1, *SHAPE).astype(np.int16)
    made = []

    def make() -> np.ndarray:
        made.append(1)
        return labels

    request = request_of("v", images["a"], made={"view": 1}, labels=make)
    assert bank.fill([request]) == 1 and bank.fill([request]) == 0 and len(made) == 1
    np.testing.assert_array_equal(bank["v"].labels, labels)
    (file,) = bank.folder.glob("v_*.labels.npy")
    file.write_bytes(file.read_bytes()[:-10])
    assert bank.fill([request]) == 1
    file.unlink()
    assert bank.fill([request]) == 1
    for other in (labels + 1, labels[:, :8]):
        np.save(file, other)
        assert bank.fill([request]) == 1
    np.testing.assert_array_equal(bank["v"].labels, labels)
    assert bank.fill([request_of("v", images["a"], made={"view": 2}, labels=make)]) == 1
    assert json.loads(next(bank.folder.glob("v_*.json")).read_text())["key"]["case"] == "v"


def test_an_entry_whose_description_was_altered(bank, images):
    bank.fill(requests(images, "a"))
    (file,) = bank.folder.glob("a_*.json")
    content = json.loads(file.read_text())
    sums = content["sums"]
    for altered in (sums[:3], [float("nan"), *sums[1:]], ["x"] * len(sums), None):
        file.write_text(json.dumps({**content, "sums": altered}))
        assert make_bank(bank.root, bank.backbone).fill(requests(images, "a")) == 1


@pytest.mark.parametrize("ending", [".npy", ".json"])
def test_a_folder_in_the_place_of_a_file(bank, images, ending):
    bank.fill(requests(images, "a"))
    (file,) = bank.folder.glob(f"a_*{ending}")
    file.unlink(), file.mkdir()
    with pytest.raises(InputError, match=f"{re.escape(str(file))} cannot be written"):
        make_bank(bank.root, bank.backbone).fill(requests(images, "a"))
    assert not [*bank.folder.glob(f"*{PART}")]
