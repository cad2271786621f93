"""What all converters share: the command, resuming, bad input."""

import contextlib
import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from source_trees import AFFINES, SHAPE, TREES, Tree, save

from fsefs_nnunet.cli.main import main
from fsefs_nnunet.datasets import volumes
from fsefs_nnunet.datasets.conversion import _refuse_repeated
from fsefs_nnunet.datasets.jobs import run_jobs
from fsefs_nnunet.datasets.source import Case
from fsefs_nnunet.errors import InputError

FSEFT = str(Path(sys.executable).parent / "fseft")


@pytest.fixture
def tree(tmp_path) -> Tree:
    """BTCV with the cases img0001 and img0002; img0040 cannot be read."""
    return TREES["BTCV"](tmp_path / "source")


def label_file(tree: Tree, case: str) -> Path:
    return tree.folder / "RawData" / "Training" / "label" / f"{case.replace('img', 'label')}.nii.gz"


def fseft(*argv: object) -> int:
    return main(["convert", *map(str, argv)])


def refused(capsys, *argv: object) -> str:
    assert fseft(*argv) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("fseft: ")
    return err[-1]


def left_out(raw: Path, name: str = "Dataset011_BTCV") -> dict[str, str]:
    return json.loads((raw / name / "conversion.json").read_text())["left out"]


def test_dry_run_writes_nothing(tree, raw, capsys):
    assert fseft("btcv", "-i", tree.folder, "-d", 11, "--classes", "liver", "--dry_run") == 0
    out = capsys.readouterr().out
    assert "3 cases with labels, 1 images without" in out and "labels: 0 background, 1 liver" in out
    assert not list(raw.iterdir())


def test_summary(tree, raw, capsys):
    assert fseft("BTCV", "-i", tree.folder, "-d", 11, "-np", 2) == 0
    out = capsys.readouterr().out
    assert "cases: 2\n" in out and "images without labels: 1\n" in out
    assert "spleen 2, kidney_right 2" in out
    assert "images linked: 3\n" in out
    assert "smallest 0.806, 0.806, 2.5, median 0.806, 0.806, 2.5, largest 1.0, 1.0, 3.0" in out
    assert f"left out (1):\n  img0040 {tree.folder}/RawData/Training/img/img0040.nii.gz cannot be read" in out


def test_classes_in_the_order_asked_for(tree, raw):
    assert fseft("BTCV", "-i", tree.folder, "-d", 11, "--classes", "Liver", "left kidney", "-np", 1) == 0
    data = np.asanyarray(nib.load(raw / "Dataset011_BTCV" / "labelsTr" / "img0001.nii.gz").dataobj)
    source = tree.labels["img0001"]
    np.testing.assert_array_equal(data, np.where(source == 6, 1, np.where(source == 3, 2, 0)))


def test_wrong_folder(tree, raw, capsys, tmp_path):
    message = refused(capsys, "AMOS22", "-i", tree.folder, "-d", 11)
    assert "does not hold AMOS22 as published: expected imagesTr, imagesVa" in message and "found RawData" in message
    (tmp_path / "zipped").mkdir()
    (tmp_path / "zipped" / "RawData.zip.part").write_bytes(b"half")
    assert "unpack RawData.zip.part first" in refused(capsys, "BTCV", "-i", tmp_path / "zipped", "-d", 11)
    assert "is not a folder" in refused(capsys, "BTCV", "-i", tmp_path / "none", "-d", 11)
    assert "dataset.json is missing" in refused(capsys, "MSD", "-i", tree.folder, "-d", 11)
    assert not list(raw.iterdir())


def test_folder_that_cannot_be_written_to(tree, raw, capsys, monkeypatch):
    raw.rmdir()
    raw.write_text("a file in its place")
    assert "cannot be written to" in refused(capsys, "BTCV", "-i", tree.folder, "-d", 11)
    monkeypatch.delenv("nnUNet_raw")
    assert "nnUNet_raw is not set" in refused(capsys, "BTCV", "-i", tree.folder, "-d", 11)


def test_taken_id(tree, raw, capsys):
    (raw.parent / "nnUNet_results" / "Dataset011_Old").mkdir()
    assert "Dataset id 11 is taken by Dataset011_Old" in refused(capsys, "BTCV", "-i", tree.folder, "-d", 11)
    assert "ids go from 1 to 999" in refused(capsys, "BTCV", "-i", tree.folder, "-d", 1000)


def test_counterparts_that_are_missing(tree, raw):
    label_file(tree, "img0002").unlink()
    save(label_file(tree, "img0003"), np.ones(SHAPE, np.uint8), AFFINES[0])
    assert fseft("BTCV", "-i", tree.folder, "-d", 11, "-np", 1) == 0
    reasons = left_out(raw)
    image_file = tree.folder / "RawData" / "Training" / "img" / "img0002.nii.gz"
    whole = "unpack the whole archive, or move"
    assert reasons["img0002"] == f"No label for {image_file}: {whole} the image away."
    assert reasons["img0003"] == f"No image for {label_file(tree, 'img0003')}: {whole} the label away."


@pytest.mark.parametrize(
    "data, message",
    [
        (np.full(SHAPE, 14, np.uint8), "has values [14] that the table does not know"),
        (np.full(SHAPE, -1, np.int16), "has values [-1] that the table does not know"),
        (np.full(SHAPE, 0.5, np.float32), "holds values that are not integers, 0.5: round"),
        (np.full(SHAPE, np.nan, np.float32), "holds NaN: repair"),
        (np.zeros(SHAPE, np.uint8), "shows none of the classes"),
        (
            np.ones((*SHAPE[:2], 7), np.uint8),
            "does not lie on its image's grid. If its header is right, --resample_labels",
        ),
        (np.ones((*SHAPE, 1), np.uint8), "has 4 axes: a volume is expected"),
    ],
)
def test_bad_labels_are_named(tree, raw, data, message):
    file = label_file(tree, "img0002")
    save(file, data, tree.affines["img0002"])
    assert fseft("BTCV", "-i", tree.folder, "-d", 11, "-np", 1) == 0
    reason = left_out(raw)["img0002"]
    assert str(file) in reason
    assert message in reason
    assert [f.name for f in (raw / "Dataset011_BTCV" / "imagesTr").iterdir()] == ["img0001_0000.nii.gz"]


def test_no_case_can_be_converted(tree, raw, capsys):
    for case in ("img0001", "img0002"):
        label_file(tree, case).write_bytes(b"no image")
    message = refused(capsys, "BTCV", "-i", tree.folder, "-d", 11, "-np", 1)
    assert (
        "None of the 3 cases can be converted. The first:" in message and "label0001.nii.gz cannot be read" in message
    )
    assert not list(raw.iterdir())


def test_labels_on_another_grid(tree, raw):
    """A label at half the spacing, shifted by one voxel: nearest neighbour brings back what it shows."""
    source, affine = tree.labels["img0001"], tree.affines["img0001"]
    fine = np.repeat(np.repeat(np.repeat(source, 2, 0), 2, 1), 2, 2)
    scale = np.diag([0.5, 0.5, 0.5, 1.0])
    scale[:3, 3] = -0.25
    save(label_file(tree, "img0001"), fine, affine @ scale)
    assert fseft("BTCV", "-i", tree.folder, "-d", 11, "-np", 1) == 0
    assert "does not lie on its image's grid" in left_out(raw)["img0001"]
    assert fseft("BTCV", "-i", tree.folder, "-d", 12, "-np", 1, "--resample_labels") == 0
    out = raw / "Dataset012_BTCV"
    label = nib.load(out / "labelsTr" / "img0001.nii.gz")
    np.testing.assert_array_equal(label.dataobj, source)
    np.testing.assert_allclose(label.affine, affine, atol=1e-6)
    assert json.loads((out / "conversion.json").read_text())["labels resampled"] == ["img0001"]


def test_rounding_in_the_header_is_no_other_grid(tree, raw):
    shifted = tree.affines["img0001"].copy()
    shifted[:3, 3] += 0.2
    save(label_file(tree, "img0001"), tree.labels["img0001"], shifted)
    assert fseft("BTCV", "-i", tree.folder, "-d", 11, "-np", 1) == 0
    label = nib.load(raw / "Dataset011_BTCV" / "labelsTr" / "img0001.nii.gz")
    np.testing.assert_array_equal(label.dataobj, tree.labels["img0001"])
    np.testing.assert_allclose(label.affine, tree.affines["img0001"], atol=1e-6)


def test_copies_where_links_are_impossible(tree, raw, monkeypatch, capsys):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(volumes.os, "symlink", no_links)
    assert fseft("BTCV", "-i", tree.folder, "-d", 11, "-np", 1) == 0
    image = raw / "Dataset011_BTCV" / "imagesTr" / "img0001_0000.nii.gz"
    assert not image.is_symlink()
    np.testing.assert_array_equal(nib.load(image).dataobj, tree.images["img0001"])
    assert "images linked: 0\nimages written: 3" in capsys.readouterr().out


def test_mixed_file_endings(raw, tmp_path):
    """LiTS's volumes, one of them compressed by its owner: all become .nii.gz."""
    tree = TREES["LiTS"](tmp_path / "source")
    plain = tree.folder / "Training Batch 1" / "volume-0.nii"
    with gzip.open(f"{plain}.gz", "wb") as file:
        file.write(plain.read_bytes())
    plain.unlink()
    assert fseft("LiTS", "-i", tree.folder, "-d", 11, "-np", 1) == 0
    folder = raw / "Dataset011_LiTS"
    assert (folder / "imagesTr" / "volume-0_0000.nii.gz").is_symlink()
    for case in ("volume-0", "volume-28"):
        np.testing.assert_array_equal(nib.load(folder / "imagesTr" / f"{case}_0000.nii.gz").dataobj, tree.images[case])
        np.testing.assert_array_equal(nib.load(folder / "labelsTr" / f"{case}.nii.gz").dataobj, tree.labels[case])


def test_one_case_in_two_places(raw, tmp_path, capsys):
    tree = TREES["LiTS"](tmp_path / "source")
    shutil.copytree(tree.folder / "Training Batch 2", tree.folder / "Training Batch 3")
    assert "are the same case twice" in refused(capsys, "LiTS", "-i", tree.folder, "-d", 11)


def test_no_space_left(tree, raw, monkeypatch, capsys):
    """The disk fills up at the second case; with space again the same command goes on."""
    link, calls = volumes.os.symlink, []

    def full(source, target):
        calls.append(target)
        if len(calls) > 2:  # image and label of the first case
            raise OSError(errno.ENOSPC, "No space left on device")
        link(source, target)

    monkeypatch.setattr(volumes.os, "symlink", full)
    message = refused(capsys, "BTCV", "-i", tree.folder, "-d", 11, "-np", 1)
    assert "No space left in nnUNet_raw" in message and "run the same command again" in message
    assert [path.name for path in raw.iterdir()] == [".Dataset011_BTCV.part"]
    monkeypatch.undo()
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(raw.parent / name))
    first = (raw / ".Dataset011_BTCV.part" / "labelsTr" / "img0001.nii.gz").lstat().st_mtime_ns
    assert fseft("BTCV", "-i", tree.folder, "-d", 11, "-np", 1) == 0
    assert (raw / "Dataset011_BTCV" / "labelsTr" / "img0001.nii.gz").lstat().st_mtime_ns == first
    assert [path.name for path in raw.iterdir()] == ["Dataset011_BTCV"]


@pytest.mark.slow
def test_interrupt_and_resume(tree, raw, capsys):
    """Ctrl-C in the middle of many cases; nnU-Net sees no dataset until the same command has finished it."""
    image = tree.folder / "RawData" / "Training" / "img" / "img0001.nii.gz"
    for i in range(1000, 1400):
        os.link(image, image.with_name(f"img{i}.nii.gz"))
        os.link(label_file(tree, "img0001"), label_file(tree, f"img{i}"))
    command = [FSEFT, "convert", "BTCV", "-i", str(tree.folder), "-d", "11", "-np", "2"]
    # a shell's background jobs, of which this may be one, ignore Ctrl-C, and so do their children
    heeding = dict(start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8", **heeding)
    building = raw / ".Dataset011_BTCV.part"
    deadline = time.monotonic() + 60
    while not any((building / "records").glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "Traceback" not in err
    assert err.strip().endswith("fseft: Interrupted: run the same command again to continue.")
    assert list(raw.iterdir()) == [building]
    done = {file.stem for file in (building / "records").glob("*.json")}
    assert 0 < len(done) < 400
    message = refused(capsys, "BTCV", "-i", tree.folder, "-d", 11, "--classes", "liver")
    assert "is unfinished and was started with other options, labels or cases: delete it first" in message
    written = {case: (building / "labelsTr" / f"{case}.nii.gz").lstat().st_mtime_ns for case in done - {"img0040"}}
    assert fseft("BTCV", "-i", tree.folder, "-d", 11, "-np", 1) == 0
    out = raw / "Dataset011_BTCV"
    assert json.loads((out / "dataset.json").read_text())["numTraining"] == 402
    assert {case: (out / "labelsTr" / f"{case}.nii.gz").lstat().st_mtime_ns for case in written} == written
    assert list(left_out(raw)) == ["img0040"]


def test_leftovers_of_a_killed_run(tree, raw):
    """A case that was written, but not recorded, and turns out to be broken, leaves nothing; links are not followed."""
    building = raw / ".Dataset011_BTCV.part"
    for folder in ("imagesTr", "labelsTr"):
        (building / folder).mkdir(parents=True)
    (building / "imagesTr" / "img0040_0000.nii.gz").symlink_to(label_file(tree, "img0001"))
    (building / "labelsTr" / "img0040.nii.gz").write_bytes(b"half")
    (building / "labelsTr" / "img0001.nii.gz").symlink_to(label_file(tree, "img0001"))
    assert fseft("BTCV", "-i", tree.folder, "-d", 11, "-np", 1, "--classes", "liver") == 0
    out = raw / "Dataset011_BTCV"
    assert sorted(file.name for file in (out / "labelsTr").iterdir()) == ["img0001.nii.gz", "img0002.nii.gz"]
    assert sorted(file.name for file in (out / "imagesTr").iterdir()) == ["img0001_0000.nii.gz", "img0002_0000.nii.gz"]
    np.testing.assert_array_equal(nib.load(label_file(tree, "img0001")).dataobj, tree.labels["img0001"])


def test_options_that_a_full_disk_cut(tree, raw, capsys):
    building = raw / ".Dataset011_BTCV.part"
    building.mkdir()
    (building / "options.json").write_text("")
    assert "options.json is damaged" in refused(capsys, "BTCV", "-i", tree.folder, "-d", 11)
    shutil.rmtree(building)
    assert fseft("BTCV", "-i", tree.folder, "-d", 11, "-np", 1) == 0


def test_a_damaged_record(tree, raw, capsys):
    record = raw / ".Dataset011_BTCV.part" / "records" / "img0001.json"
    record.parent.mkdir(parents=True)
    record.write_text("{")
    assert "img0001.json is damaged" in refused(capsys, "BTCV", "-i", tree.folder, "-d", 11, "-np", 1)
    record.unlink()
    assert fseft("BTCV", "-i", tree.folder, "-d", 11, "-np", 1) == 0


def die(case: int) -> None:
    os._exit(1)


@pytest.mark.slow
def test_a_process_that_is_killed():
    with pytest.raises(InputError, match="One of 2 processes was killed.*again with a smaller -np"):
        run_jobs(die, [(1,), (2,)], 2, "dying")


def fill_disk(case: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def refuse(case: int) -> None:
    raise InputError(f"Case {case} is bad.")


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_what_a_job_reports_reaches_the_user(num_processes):
    """An InputError is a SystemExit, which would end a worker without a word."""
    with pytest.raises(InputError, match="^Case 1 is bad.$"):
        run_jobs(refuse, [(1,), (2,)], num_processes, "refusing")
    with pytest.raises(InputError, match="No space left in nnUNet_raw"):
        run_jobs(fill_disk, [(1,), (2,)], num_processes, "filling")


@pytest.mark.slow
def test_results_come_in_the_order_of_the_jobs():
    assert run_jobs(pow, [(i, 2) for i in range(9)], 2, "squares") == [i**2 for i in range(9)]


@pytest.mark.slow
def test_an_error_ends_what_runs():
    started = time.monotonic()
    with pytest.raises(TypeError):
        run_jobs(time.sleep, [("no number",), (100,), (100,)], 2, "sleeping")
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path):
    """SIGKILL, as a cluster sends it, leaves the command no time to end its workers."""
    script = tmp_path / "command.py"
    script.write_text(
        "import time\n"
        "from fsefs_nnunet.datasets.jobs import run_jobs\n"
        "if __name__ == '__main__':\n"
        "    run_jobs(time.sleep, [(1,)] * 1000, 2, 'sleeping')\n"
    )
    # the workers hold the other end of stderr: it closes with the last of them
    process = subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stderr.read(1)  # the progress bar
        time.sleep(5)
        process.kill()
        process.communicate(timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_two_cases_of_one_name():
    cases = [Case("a", Path("1/a"), Path("1/l")), Case("b", None, Path("1/b")), Case("a", Path("2/a"), None)]
    _refuse_repeated(cases[:2])
    with pytest.raises(InputError, match="1/l and 2/a are both case a: move one of them away"):
        _refuse_repeated(cases)


@pytest.mark.slow
def test_a_damaged_header_costs_its_case_alone(tree, raw):
    image = sorted((tree.folder / "RawData" / "Training" / "img").glob("*.nii.gz"))[0]
    content = bytearray(gzip.decompress(image.read_bytes()))
    content[70:72] = (999).to_bytes(2, "little")  # the datatype
    image.write_bytes(gzip.compress(bytes(content)))
    assert fseft("BTCV", "-i", tree.folder, "-d", 11) == 0
    (reason,) = (why for why in left_out(raw).values() if image.name in why and "cannot be read" in why)


def test_a_ct_with_an_offset_is_told(tree, raw, capsys):
    file = tree.folder / "RawData" / "Training" / "img" / "img0001.nii.gz"
    save(file, np.abs(np.asarray(nib.load(file).dataobj)), tree.affines["img0001"])
    assert fseft("BTCV", "-i", tree.folder, "-d", 11, "-np", 1) == 0
    line = "CT without a value below 0: another modality, or stored with an offset (of 1024): img0001"
    assert any(told.startswith(line) for told in capsys.readouterr().out.splitlines())


def lose_header(tree: Tree) -> np.ndarray:
    """The label of img0001 keeps the image's order of voxels, and an affine that says nothing."""
    array = tree.labels["img0001"]
    save(label_file(tree, "img0001"), array, np.eye(4))
    return array


def test_a_lost_header(tree, raw):
    """Resampling would move what it does not lose; the image's header puts every voxel where it was."""
    array = lose_header(tree)
    assert fseft("BTCV", "-i", tree.folder, "-d", 11, "-np", 1) == 0
    said = "does not lie on its image's grid. The shape is the same, so its header may have been lost: --image_header"
    assert said in left_out(raw)["img0001"]
    assert fseft("BTCV", "-i", tree.folder, "-d", 12, "-np", 1, "--resample_labels") == 0
    reason = left_out(raw, "Dataset012_BTCV")["img0001"]
    assert (
        "resampling would lose labels. The shape is the same, so its header may have been lost" in reason
        and "--image_header" in reason
    )
    assert fseft("BTCV", "-i", tree.folder, "-d", 13, "-np", 1, "--image_header", "--resample_labels") == 0
    out = raw / "Dataset013_BTCV"
    label, image = (nib.load(out / name) for name in ("labelsTr/img0001.nii.gz", "imagesTr/img0001_0000.nii.gz"))
    np.testing.assert_array_equal(label.dataobj, array)
    np.testing.assert_allclose(label.affine, image.affine)
    summary = json.loads((out / "conversion.json").read_text())
    assert summary["labels given their image's header"] == ["img0001"] and not summary["labels resampled"]
