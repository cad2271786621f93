import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset

from fsefs_nnunet.backbones.store import load_weights, save_backbone
from fsefs_nnunet.nnunet.linking import MARKER, SHIMS, link, nnunet_folder, unlink
from fsefs_nnunet.planners.fseft_planner import FSEFTPlanner

PLANNER, TRAINERS = SHIMS
NOBODY = 65534


def copied(folder: Path) -> Path:
    """A copy of the installed nnU-Net's package, without compiled files."""
    return shutil.copytree(nnunet_folder(), folder / "nnunetv2", ignore=shutil.ignore_patterns("__pycache__"))


@pytest.fixture
def nnunet(tmp_path) -> Path:
    return copied(tmp_path)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_folder_is_the_one_that_nnunet_searches():
    import nnunetv2

    assert nnunet_folder() == Path(nnunetv2.__path__[0])


def test_link_writes_two_marked_files(nnunet, capsys):
    before = tree(nnunet)
    link(nnunet)
    written = {name: content for name, content in tree(nnunet).items() if before.get(name) != content}
    assert set(written) == {PLANNER, TRAINERS}
    assert all(content.startswith(MARKER.encode()) for content in written.values())
    printed = capsys.readouterr().out
    assert f"{nnunet / PLANNER} was written." in printed and "fseft splits -d ID" in printed
    assert "untracked" not in printed


def test_twice_is_once(nnunet):
    link(nnunet)
    once = tree(nnunet)
    link(nnunet)
    assert tree(nnunet) == once
    (nnunet / PLANNER).write_text(MARKER + "# of an earlier version\n")
    link(nnunet)
    assert tree(nnunet) == once


def test_unlink_leaves_no_trace(nnunet, capsys):
    compiled = nnunet / "experiment_planning" / "__pycache__"
    compiled.mkdir()
    (compiled / "fseft_planner_of_others.cpython-311.pyc").write_bytes(b"theirs")
    before = tree(nnunet)
    link(nnunet)
    for name in ("fseft_planner.cpython-311.pyc", "fseft_planner.cpython-312.opt-1.pyc"):
        (compiled / name).write_bytes(b"ours")
    unlink(nnunet)
    assert tree(nnunet) == before
    assert f"{nnunet / TRAINERS} was removed." in capsys.readouterr().out
    unlink(nnunet)
    assert tree(nnunet) == before
    assert capsys.readouterr().out == f"{nnunet} holds none of our shims: nothing was removed.\n"


@pytest.mark.parametrize("name", SHIMS)
def test_files_of_others_stay(nnunet, capsys, name):
    (nnunet / name).write_bytes(b"\xff their own code\n")
    before = tree(nnunet)
    with pytest.raises(ValueError, match=f"{name} was not written by `fseft link` and is left unchanged: rename it"):
        link(nnunet)
    assert tree(nnunet) == before
    unlink(nnunet)
    assert tree(nnunet) == before
    assert f"{nnunet / name} was not written by `fseft link` and is kept.\n" in capsys.readouterr().out


def test_checkout_is_told_of_untracked_files(nnunet, capsys):
    (nnunet.parent / ".git").mkdir()
    link(nnunet)
    assert f"{nnunet.parent} is a git checkout: its `git status` lists both files as untracked." in (
        capsys.readouterr().out
    )


@pytest.fixture
def unprivileged():
    """Another user where the tests run as root, who may write everywhere."""
    if os.getuid() == 0:
        os.setresuid(NOBODY, NOBODY, 0)
        yield
        os.setresuid(0, 0, 0)
    else:
        yield


@pytest.fixture
def read_only():
    """Copy of nnU-Net that others may read: pytest's own folders are private to the user."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        nnunet = copied(Path(folder))
        link(nnunet)
        closed = (nnunet / TRAINERS).parent
        closed.chmod(0o555)
        yield nnunet
        closed.chmod(0o755)


def test_folder_that_cannot_be_written(read_only, unprivileged):
    before = tree(read_only)
    for call in (link, unlink):
        with pytest.raises(ValueError, match=r"nnunetv2/.* cannot be written: .*virtual environment.*fseft env"):
            call(read_only)
    assert tree(read_only) == before


SEARCH = """
import sys
from os.path import join
import nnunetv2
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

assert nnunetv2.__path__[0] == sys.argv[1], nnunetv2.__path__

def planner(name):
    folder = join(nnunetv2.__path__[0], "experiment_planning")
    return recursive_find_python_class(folder, name, current_module="nnunetv2.experiment_planning")

# stock classes: found as before, and nothing of ours is imported for them
for name in ("ExperimentPlanner", "ResEncUNetPlanner", "DatasetFingerprintExtractor"):
    assert planner(name).__module__.startswith("nnunetv2."), name
assert recursive_find_trainer_class_by_name("nnUNetTrainer_5epochs").__module__.startswith("nnunetv2.")
assert {"nnunetv2.experiment_planning.fseft_planner", "nnunetv2.training.nnUNetTrainer.fseft_trainers"} <= set(
    sys.modules
)
assert not [name for name in sys.modules if name.split(".")[0] == "fsefs_nnunet"]
assert planner("FSEFTNoSuchPlanner") is None

# ours: the installed package's own
from fsefs_nnunet.planners.fseft_planner import FSEFTPlanner
from fsefs_nnunet.trainers.fseft_trainer import FSEFTTrainer
assert planner("FSEFTPlanner") is FSEFTPlanner
assert recursive_find_trainer_class_by_name("FSEFTTrainer") is FSEFTTrainer
assert recursive_find_trainer_class_by_name("FSEFTTrainer_Scratch").__name__ == "FSEFTTrainer_Scratch"

print("planned", plan_experiments([77], "FSEFTPlanner"))
"""


@pytest.mark.slow
def test_nnunet_finds_the_linked_classes_and_plans(workspace, nnunet):
    """nnU-Net's own search and planning, in a process whose nnunetv2 is the linked copy."""
    link(nnunet)
    plans, stock = (workspace.preprocessed / f"{name}.json" for name in ("FSEFTPlans", "nnUNetPlans"))
    plans.unlink(), stock.unlink()
    inherited = {key: value for key, value in os.environ.items() if key != "nnUNet_extTrainer"}
    result = subprocess.run(
        [sys.executable, "-c", SEARCH, str(nnunet)],
        env={**inherited, "PYTHONPATH": str(nnunet.parent)},
        capture_output=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr
    assert "planned FSEFTPlans" in result.stdout
    assert not stock.exists()
    made = json.loads(plans.read_text())
    assert made["experiment_planner_used"] == "FSEFTPlanner"
    # ten shots are more than the labelled cases
    assert {name for name in made["configurations"] if name.endswith("shot")} == {
        f"3d_fullres_{k}shot" for k in (1, 5, "all")
    }


def test_backbone_from_the_environment(workspace, tmp_path, monkeypatch, contract):
    """What nnU-Net's planning calls when -pl is FSEFTPlanner and no -overwrite_plans_name is given."""
    save_backbone(replace(contract, id="other"), load_weights(contract), tmp_path / "backbones")
    monkeypatch.setenv("fseft_backbones", str(tmp_path / "backbones"))
    monkeypatch.setenv("fseft_backbone", "other")
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")  # with which nnU-Net's own planner fails
    plans, name = plan_experiment_dataset(77, FSEFTPlanner)
    assert os.environ["nnUNet_n_proc_DA"] == "0"
    assert name == plans["plans_name"] == "FSEFTPlans_other"
    assert plans["configurations"]["3d_fullres_5shot"]["fseft_backbone"] == "other"
    monkeypatch.setenv("fseft_backbone", "swin")
    with pytest.raises(ValueError, match="Backbone 'swin' is not installed"):
        plan_experiment_dataset(77, FSEFTPlanner)
    assert FSEFTPlanner(77, backbone="phantom").plans_identifier == "FSEFTPlans"
