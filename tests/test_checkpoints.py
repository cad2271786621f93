import argparse
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from fsefs_nnunet.backbones.checkpoints import read_checkpoint
from fsefs_nnunet.errors import InputError


class RunsCode:
    """Unpickled by a careless reader, it runs a command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def nnunet_like() -> dict:
    return {
        "network_weights": {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)},
        "optimizer_state": {"state": {}, "param_groups": [{"lr": 1e-3, "params": [0, 1]}]},
        "grad_scaler_state": None,
        "logging": {
            "train_losses": [np.float32(0.5), np.float64(0.25)],
            "dice_per_class_or_region": [[np.float64(0.1), np.float32("nan")]],
            "counts": [np.int64(3), np.int32(2), np.bool_(True)],
        },
        "_best_ema": np.float64(0.7),
        "current_epoch": 3,
        "init_args": {"configuration": "3d_fullres", "fold": 0, "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }


def test_reads_what_nnunet_writes(tmp_path):
    file = tmp_path / "checkpoint_final.pth"
    torch.save(nnunet_like(), file)
    content = read_checkpoint(file)
    assert torch.equal(content["network_weights"]["a.weight"], torch.arange(6.0).view(2, 3))
    assert content["_best_ema"] == 0.7 and content["logging"]["train_losses"] == [0.5, 0.25]
    assert content["init_args"]["device"] == torch.device("cpu")
    assert content.keys() == nnunet_like().keys()


def test_reads_what_older_numpy_pickled(tmp_path):
    """Before version 2 numpy's scalars were in numpy.core, in files of that time they still are."""
    file = tmp_path / "old.pth"
    torch.save({"best_acc": np.float64(0.5), "net": {"a": torch.ones(2)}}, file, _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    assert b"numpy._core.multiarray" in content
    file.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert read_checkpoint(file)["best_acc"] == 0.5


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, zipped):
    witness, file = tmp_path / "ran", tmp_path / "evil.pth"
    content = {"network_weights": {}, "logging": RunsCode(f"touch {witness}")}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evil\.pth was not opened.*Take it from its publisher again"):
        read_checkpoint(file)
    assert not witness.exists()
    torch.load(file, weights_only=False)
    assert witness.exists()  # so the file was dangerous


def test_a_bare_pickle_that_would_run_code(tmp_path):
    witness, file = tmp_path / "ran", tmp_path / "evil.pth"
    file.write_bytes(pickle.dumps(RunsCode(f"touch {witness}")))
    with pytest.raises(ValueError, match=r"evil\.pth"):
        read_checkpoint(file)
    assert not witness.exists()


@pytest.mark.parametrize("share", [0.9, 0.5, 0.01])
def test_truncated_file(tmp_path, share):
    file = tmp_path / "cut.pth"
    torch.save(nnunet_like(), file)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"cut\.pth (is damaged or incomplete|was not opened)"):
        read_checkpoint(file)


PAGE, NONE = (
    "was not opened: it is a web page",
    "was not opened: it is not a PyTorch checkpoint. Take the checkpoint from",
)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "is damaged or incomplete: download or copy it again."),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", PAGE),
        (b"\xef\xbb\xbf<html><head>", PAGE),
        (b"  <head><title>Sign in</title>", PAGE),
        (b"\x00" * 200, NONE),
        (b'{"error": "not found"}', NONE),
        (b"hello world, plain text\nmore", NONE),
        (bytes([7, 99, 200, 13, 55]) * 300, NONE),
        (pickle.dumps({"a": [1, 2]}), NONE),
    ],
)
def test_a_file_that_is_no_checkpoint(tmp_path, content, said):
    file = tmp_path / "page.pth"
    file.write_bytes(content)
    assert f"{file} {said}" in refusal(file)


def refusal(file) -> str:
    """One sentence or two of our own: PyTorch's advise to load the file anyway."""
    with pytest.raises(InputError) as error:
        read_checkpoint(file)
    text = str(error.value)
    assert "weights_only" not in text and text.isprintable() and text.endswith(".")
    return text


@pytest.mark.parametrize(
    "content, name",
    [(argparse.Namespace(lr=1), "argparse.Namespace"), (torch.nn.ReLU(), "torch.nn.modules.activation.ReLU")],
)
def test_what_a_refused_file_holds_is_named(tmp_path, content, name):
    file = tmp_path / "x.pth"
    torch.save({"net": {}, "args": content}, file)
    assert f"{file} was not opened: it holds more than weights, {name}, and could run code." in refusal(file)


def test_a_torchscript_archive(tmp_path):
    """As torch.jit.save lays it out."""
    file = tmp_path / "script.pt"
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"script/{name}", b"")
    assert f"{file} was not opened: it is a TorchScript archive" in refusal(file)


def test_a_file_that_cannot_be_read(tmp_path):
    """A folder, whose reading fails for every user."""
    assert refusal(tmp_path) == f"{tmp_path} cannot be read (Is a directory): make it readable, or give another file."


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"none\.pth is missing"):
        read_checkpoint(tmp_path / "none.pth")


def test_safe_types_stay_within_the_call(tmp_path):
    """Reading a checkpoint does not loosen what others may load."""
    file = tmp_path / "x.pth"
    torch.save(nnunet_like(), file)
    before = set(torch.serialization.get_safe_globals())
    read_checkpoint(file)
    assert set(torch.serialization.get_safe_globals()) == before
