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

import nibabel as nib
import numpy as np
import pytest
import torch

from fsefs_nnunet.backbones.checkpoints import read_checkpoint

pytestmark = pytest.mark.slow

FIVE = "3d_fullres_5shot"
PROGRAMS = Path(sys.executable).parent
COMMAND = [PROGRAMS / "nnUNetv2_train", "77", FIVE, "0", "-tr", "FSEFTTrainer", "-p", "FSEFTPlans"]


def environment(work) -> dict[str, str]:
    import fsefs_nnunet

    shims = str(Path(fsefs_nnunet.__file__).parent / "nnunet" / "shims")
    processes = {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **work.environment(), **processes, "nnUNet_extTrainer": shims}


def copy_of(tiny, root: Path):
    """The tiny dataset with plans for a short training; no bank, no results."""
    shutil.copytree(tiny.root, root)
    work = type(tiny)(root)
    settings = dict(fseft_steps_per_epoch=1, fseft_views=1, fseft_crop_size=[8, 8, 8], fseft_pool=4)
    (work.preprocessed / "FSEFTPlans.json").write_text(json.dumps(work.plans(**settings)))
    return work


def train(work, *arguments: str) -> None:
    subprocess.run(
        [*COMMAND, "-device", "cpu", *arguments], env=environment(work), check=True, stdout=subprocess.DEVNULL
    )


def kill_when(work, happened, command=(*COMMAND, "-device", "cpu")) -> None:
    """Start the command and kill it and its children with SIGKILL as soon as `happened()`."""
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
    train(work)
    return work


def same_adapter(work, other) -> bool:
    expected = adapter(other)
    return all(torch.equal(tensor, expected[name]) for name, tensor in adapter(work).items())


@pytest.mark.parametrize("when", ["the bank is filled", "it trains"])
def test_killed_and_continued(tiny, tmp_path, uninterrupted, when):
    work = copy_of(tiny, tmp_path / "work")

    def happened() -> bool:
        if when == "it trains":
            return any("Epoch 33" in log.read_text() for log in fold(work).glob("training_log_*.txt"))
        return any(work.preprocessed.glob("fseft_features/*/*"))

    kill_when(work, happened)
    assert not (fold(work) / "checkpoint_final.pth").exists()
    train(work, "--c")
    assert same_adapter(work, uninterrupted)
    assert (fold(work) / "validation" / "summary.json").exists()
    assert not list(fold(work).glob("*.part"))


def test_a_killed_prediction_goes_on(uninterrupted, tmp_path):
    """What lies there is whole, is not made again, and the rest comes out as in one go."""
    work = uninterrupted
    images, whole, killed = (tmp_path / name for name in ("images", "whole", "killed"))
    images.mkdir()
    for i in range(6):
        shutil.copy(work.raw / "imagesTr" / f"case_{i}_0000.nii.gz", images)
    command = [PROGRAMS / "fseft", "predict", "-d", "77", "-c", FIVE, "-f", "0", "-device", "cpu", "-i", images, "-o"]
    subprocess.run([*command, whole], env=environment(work), check=True)
    kill_when(work, lambda: (killed / "case_1_sizes.json").exists(), [*command, killed])
    made = {file: file.stat().st_mtime_ns for case in (0, 1) for file in killed.glob(f"case_{case}*")}
    assert len(made) == 4 and not (killed / "case_5.nii.gz").exists()
    subprocess.run([*command, killed, "--continue_prediction"], env=environment(work), check=True)
    assert {file: file.stat().st_mtime_ns for file in made} == made
    for i in range(6):
        arrays = [np.asarray(nib.load(folder / f"case_{i}.nii.gz").dataobj) for folder in (whole, killed)]
        assert np.array_equal(*arrays)
    assert sorted(f.name for f in killed.iterdir()) == sorted(f.name for f in whole.iterdir())


def benchmark_of(output: Path) -> list:
    """`fseft benchmark` of one cell, the adapter with the size prior."""
    methods = ["--shots", "5", "--folds", "1", "--methods", "fseft"]
    return [PROGRAMS / "fseft", "benchmark", "-d", "77", "-device", "cpu", "-o", output, *methods]


def test_a_benchmark_killed_in_training_goes_on(tiny, tmp_path, uninterrupted):
    """As a cluster kills a job, at its time limit for example: no cell is lost, none differs."""
    work, output = copy_of(tiny, tmp_path / "work"), tmp_path / "output"
    logs = lambda: fold(work).glob("training_log_*.txt")  # noqa: E731
    kill_when(work, lambda: any("Epoch 33" in log.read_text() for log in logs()), benchmark_of(output))
    assert not (output / "report.html").exists()
    subprocess.run(benchmark_of(output), env=environment(work), check=True)
    assert same_adapter(work, uninterrupted)
    assert "fseft,5,0," in (output / "results.csv").read_text() and (output / "report.html").exists()


def test_a_benchmark_killed_while_it_predicts_goes_on(tmp_path, uninterrupted):
    """What was segmented is kept; the whole agrees with nnU-Net's validation, which computes in float32 on CPUs."""
    work, output = copy_of(uninterrupted, tmp_path / "work"), tmp_path / "output"
    predictions = fold(work) / "validation"
    shutil.move(predictions, tmp_path / "whole")  # nnU-Net's own would be taken
    segmented = lambda: sorted(predictions.glob("*.nii.gz"))  # noqa: E731
    kill_when(work, lambda: len(segmented()) > 0, benchmark_of(output))
    made = {file: file.stat().st_mtime_ns for file in segmented()}
    whole = sorted((tmp_path / "whole").glob("*.nii.gz"))
    assert 0 < len(made) < len(whole) and not (output / "report.html").exists()
    subprocess.run(benchmark_of(output), env=environment(work), check=True)
    assert {file: file.stat().st_mtime_ns for file in made} == made
    assert [file.name for file in segmented()] == [file.name for file in whole]
    for file, expected in zip(segmented(), whole):
        segmentation, reference = (np.asarray(nib.load(f).dataobj) for f in (file, expected))
        assert (segmentation == reference).mean() > 0.999
    assert same_adapter(work, uninterrupted)
    assert "fseft,5,0," in (output / "results.csv").read_text() and (output / "report.html").exists()
