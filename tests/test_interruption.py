"""Our commands and nnUNetv2_train, killed without warning and run again: what comes out is the uninterrupted run's."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import in_process
import nibabel as nib
import numpy as np
import pytest
import torch

from fsefs_nnunet.backbones.checkpoints import read_checkpoint
from fsefs_nnunet.nnunet.shims import fseft_trainers

pytestmark = pytest.mark.slow

FIVE = "3d_fullres_5shot"
EPOCHS = 40
TRAIN = ["nnUNetv2_train", "77", FIVE, "0", "-tr", "FSEFTTrainer", "-p", "FSEFTPlans", "-device", "cpu"]


def environment(work) -> dict[str, str]:
    shims = str(Path(fseft_trainers.__file__).parent)
    processes = {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_extTrainer": shims}
    return {**os.environ, **work.environment(), **processes}


def copy_of(tiny, root: Path):
    """The tiny dataset with plans for a short training; no bank, no results."""
    shutil.copytree(tiny.root, root)
    work = type(tiny)(root)
    settings = dict(
        fseft_epochs=EPOCHS,
        fseft_steps_per_epoch=1,
        fseft_views=1,
        fseft_crop_size=[8, 8, 8],
        fseft_pool=4,
        patch_size=[24, 24, 24],
    )
    (work.preprocessed / "FSEFTPlans.json").write_text(json.dumps(work.plans(**settings)))
    return work


def run(work, *command) -> None:
    """To its end, in this process."""
    in_process.run(command, env=environment(work), check=True)


def kill_when(work, happened, *command) -> None:
    """Start the command and kill it and its children with SIGKILL as soon as `happened()`."""
    command = [sys.executable, in_process.__file__, *command]
    process = subprocess.Popen(command, env=environment(work), stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    try:
        while not happened():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline, "what it was to be killed at did not happen"
            time.sleep(0.01)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def fold(work) -> Path:
    return work.results / f"FSEFTTrainer__FSEFTPlans__{FIVE}" / "fold_0"


def adapter(work) -> dict[str, torch.Tensor]:
    return read_checkpoint(fold(work) / "checkpoint_final.pth")["network_weights"]


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    """A workspace with a finished training; do not write into it."""
    work = copy_of(tiny, tmp_path_factory.mktemp("whole") / "work")
    run(work, *TRAIN)
    return work


def log_of(work) -> str:
    return "".join(file.read_text() for file in fold(work).glob("training_log_*.txt"))


def same_adapter(work, other) -> bool:
    expected = adapter(other)
    return all(torch.equal(tensor, expected[name]) for name, tensor in adapter(work).items())


def test_killed_and_continued(tiny, tmp_path, uninterrupted):
    work = copy_of(tiny, tmp_path / "work")
    kill_when(work, lambda: "Epoch 10" in log_of(work), *TRAIN)
    assert not (fold(work) / "checkpoint_final.pth").exists()
    run(work, *TRAIN, "--c")
    assert same_adapter(work, uninterrupted)
    assert (fold(work) / "validation" / "summary.json").exists()


def test_a_killed_prediction_goes_on(uninterrupted, tmp_path):
    """What lies there is whole, is not made again, and the rest comes out as in one go."""
    work = uninterrupted
    images, whole, killed = (tmp_path / name for name in ("images", "whole", "killed"))
    images.mkdir()
    for i in range(6):
        shutil.copy(work.raw / "imagesTr" / f"case_{i}_0000.nii.gz", images)
    command = ["fseft", "predict", "-d", "77", "-c", FIVE, "-f", "0", "-device", "cpu", "-i", images, "-o"]
    run(work, *command, whole)
    kill_when(work, lambda: (killed / "case_1_sizes.json").exists(), *command, killed)
    made = {file: file.stat().st_mtime_ns for case in (0, 1) for file in killed.glob(f"case_{case}*")}
    assert len(made) == 4 and not (killed / "case_5.nii.gz").exists()
    run(work, *command, killed, "--continue_prediction")
    assert {file: file.stat().st_mtime_ns for file in made} == made
    for i in range(6):
        arrays = [np.asarray(nib.load(folder / f"case_{i}.nii.gz").dataobj) for folder in (whole, killed)]
        assert np.array_equal(*arrays)
    assert sorted(f.name for f in killed.iterdir()) == sorted(f.name for f in whole.iterdir())


def test_a_benchmark_killed_while_it_predicts_goes_on(tmp_path, uninterrupted):
    """What was segmented is kept; the whole agrees with nnU-Net's validation, which computes in float32 on CPUs."""
    work, output = copy_of(uninterrupted, tmp_path / "work"), tmp_path / "output"
    predictions = fold(work) / "validation"
    shutil.move(predictions, tmp_path / "whole")  # nnU-Net's own would be taken
    segmented = lambda: sorted(predictions.glob("*.nii.gz"))  # noqa: E731
    benchmark = ["fseft", "benchmark", "-d", "77", "-device", "cpu", "-o", output]
    benchmark += ["--shots", "5", "--folds", "1", "--methods", "fseft"]
    kill_when(work, lambda: len(segmented()) > 0, *benchmark)
    made = {file: file.stat().st_mtime_ns for file in segmented()}
    whole = sorted((tmp_path / "whole").glob("*.nii.gz"))
    assert 0 < len(made) < len(whole) and not (output / "report.html").exists()
    run(work, *benchmark)
    assert {file: file.stat().st_mtime_ns for file in made} == made
    assert [file.name for file in segmented()] == [file.name for file in whole]
    for file, expected in zip(segmented(), whole):
        segmentation, reference = (np.asarray(nib.load(f).dataobj) for f in (file, expected))
        assert (segmentation == reference).mean() > 0.995
    assert same_adapter(work, uninterrupted)
    assert "fseft,5,0," in (output / "results.csv").read_text() and (output / "report.html").exists()
