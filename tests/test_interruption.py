"""nnUNetv2_train, killed without warning and continued with --c: the adapter is the uninterrupted run's, bit by bit."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fsefs_nnunet.backbones.checkpoints import read_checkpoint

pytestmark = pytest.mark.slow

FIVE = "3d_fullres_5shot"
COMMAND = [Path(sys.executable).parent / "nnUNetv2_train", "77", FIVE, "0", "-tr", "FSEFTTrainer", "-p", "FSEFTPlans"]


def environment(work) -> dict[str, str]:
    import fsefs_nnunet

    shims = str(Path(fsefs_nnunet.__file__).parent / "shims")
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


def kill_when(work, happened) -> None:
    """Start the training and kill it with SIGKILL as soon as `happened()`."""
    process = subprocess.Popen([*COMMAND, "-device", "cpu"], env=environment(work), stdout=subprocess.DEVNULL)
    while not happened():
        assert process.poll() is None, "the training ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()


def fold(work) -> Path:
    return work.results / f"FSEFTTrainer__FSEFTPlans__{FIVE}" / "fold_0"


def adapter(work) -> dict[str, torch.Tensor]:
    return read_checkpoint(fold(work) / "checkpoint_final.pth")["network_weights"]


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory) -> dict[str, torch.Tensor]:
    work = copy_of(tiny, tmp_path_factory.mktemp("whole") / "work")
    train(work)
    return adapter(work)


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
    assert all(torch.equal(tensor, uninterrupted[name]) for name, tensor in adapter(work).items())
    assert (fold(work) / "validation" / "summary.json").exists()
    assert not list(fold(work).glob("*.part"))
