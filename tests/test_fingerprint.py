"""Which files a fingerprint is of, and in which axes."""

import json
import os

import numpy as np
import pytest
from field_files import NAME, array_of, files_of, label_of, plan_and_preprocess, turn, write, write_dataset

from fsefs_nnunet.planners.fseft_planner import FSEFTPlanner


@pytest.fixture
def dataset(raw):
    return write_dataset(raw)


def check() -> FSEFTPlanner:
    return FSEFTPlanner(NAME)


def replace_by_older(dataset) -> None:
    """The same arrays at 1 mm, with dates long before the fingerprint, as a copy keeps them."""
    for case in range(3):
        for file in files_of(dataset, case):
            write(file, array_of(file)[::-1].copy(), np.eye(4))
            os.utime(file, (10**9, 10**9))


@pytest.mark.slow
def test_cases_replaced_by_older_files(dataset, raw):
    assert plan_and_preprocess() == 0
    folder = raw.parent / "nnUNet_preprocessed" / NAME
    replace_by_older(dataset)
    assert plan_and_preprocess() == 0
    assert json.loads((folder / "dataset_fingerprint.json").read_text())["spacings"] == [[1, 1, 1]] * 3
    for case in range(3):
        kept = folder / "gt_segmentations" / f"case_{case}.nii.gz"
        assert kept.read_bytes() == label_of(dataset, case).read_bytes()


def test_the_fingerprint_stays_while_the_files_do(dataset, raw):
    check()
    file = raw.parent / "nnUNet_preprocessed" / NAME / "dataset_fingerprint.json"
    made = file.stat().st_mtime_ns
    check()
    assert file.stat().st_mtime_ns == made
    # one file's date, and nothing else
    os.utime(label_of(dataset, 1), (10**9, 10**9))
    check()
    assert file.stat().st_mtime_ns > made


def test_the_fingerprint_follows_cases_that_go(dataset):
    assert len(check().dataset_fingerprint["spacings"]) == 3
    for file in files_of(dataset, 1):
        file.unlink()
    assert len(check().dataset_fingerprint["spacings"]) == 2


@pytest.mark.parametrize("stock", ["NibabelIO", "NibabelIOWithReorient"])
def test_the_file_keeps_the_axes_that_nnunet_expects(raw, stock):
    """Its own planner may read it later; ours has it in the axes of the backbone's reader."""
    dataset = write_dataset(raw, overwrite_image_reader_writer=stock)
    for case in range(3):
        for file in files_of(dataset, case):
            turn(file, "SRA")  # z, y, x of a plain reader: to the front, the right, the head
    planner = check()
    content = json.loads((raw.parent / "nnUNet_preprocessed" / NAME / "dataset_fingerprint.json").read_text())
    stored = ([2, 2, 3], [15, 16, 13]) if stock == "NibabelIO" else ([3, 2, 2], [13, 15, 16])
    assert (content["spacings"][0], content["shapes_after_crop"][0]) == stored
    assert planner.dataset_fingerprint["spacings"][0] == [3, 2, 2]
    assert planner.dataset_fingerprint["shapes_after_crop"][0] == [13, 15, 16]


def test_a_reader_named_later_turns_the_axes(dataset, raw):
    """The files stay as they are; what nnU-Net's own planner would read of them does not."""
    for case in range(3):
        for file in files_of(dataset, case):
            turn(file, "SRA")
    assert check().dataset_fingerprint["spacings"][0] == [3, 2, 2]
    content = json.loads((dataset / "dataset.json").read_text())
    content["overwrite_image_reader_writer"] = "NibabelIOWithReorient"
    (dataset / "dataset.json").write_text(json.dumps(content))
    assert check().dataset_fingerprint["spacings"][0] == [3, 2, 2]


def test_the_order_of_listed_cases_does_not_matter(dataset):
    """Each case's numbers are turned by its own header."""
    for file in files_of(dataset, 0):
        turn(file, "SRA")
    content = json.loads((dataset / "dataset.json").read_text())
    files = {f"case_{i}": files_of(dataset, i) for i in range(3)}
    entries = {case: {"images": [str(image)], "label": str(label)} for case, (image, label) in files.items()}
    for listed in (entries, dict(reversed(entries.items()))):
        (dataset / "dataset.json").write_text(json.dumps({**content, "dataset": listed}))
        assert check().dataset_fingerprint["shapes_after_crop"] == [[13, 15, 16]] * 3
