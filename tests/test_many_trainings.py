"""`fseft train`: many trainings in one process are what single commands make of them."""

import json
import os
from dataclasses import replace
from pathlib import Path

import in_process
import pytest
import torch
from trainings import TINY, identical

from fsefs_nnunet.backbones.checkpoints import read_checkpoint
from fsefs_nnunet.backbones.frozen import FrozenBackbone, backbones_stay_loaded
from fsefs_nnunet.cli.main import main
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.inference.trained_model import MEMORY_KEY
from fsefs_nnunet.methods.inside.decoder_parts import LastBlock
from fsefs_nnunet.methods.inside.tuned_backbone import TunedBackbone
from fsefs_nnunet.methods.run_file import RunFile
from fsefs_nnunet.nnunet import training
from fsefs_nnunet.nnunet.experiment import OwnExperiment, external_trainers
from fsefs_nnunet.nnunet.training import Training, run_trainings
from fsefs_nnunet.trainers.kshot_trainer import DeviceFailed

CPU = torch.device("cpu")
TRAINERS = ("FSEFTTrainer", "FSEFTTrainer_Context")


@pytest.fixture
def short(work, monkeypatch):
    """Plans for trainings of three epochs."""
    plans = work.plans(**TINY, fseft_epochs=3)
    (work.preprocessed / "FSEFTPlans.json").write_text(json.dumps(plans))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    return work


def of(trainer="FSEFTTrainer", shots=5, fold=0, plans="FSEFTPlans") -> Training:
    return Training("Dataset077_Tiny", plans, trainer, shots, fold)


def train(*arguments) -> int:
    return main(["train", "-d", "77", "-device", "cpu", *map(str, arguments)])


def weights(one: Training) -> dict[str, torch.Tensor]:
    return read_checkpoint(one.folder / "checkpoint_final.pth")["network_weights"]


@pytest.mark.slow
def test_each_is_what_the_single_command_makes_of_it(short, monkeypatch, capsys):
    assert train("--shots", 5, "-f", 0, 1, "-tr", *TRAINERS) == 0
    made = [of(trainer, 5, fold) for fold in (0, 1) for trainer in TRAINERS]
    told = capsys.readouterr().out
    assert all(f"{one.title}: mean Dice of the queries 0." in told for one in made)
    together = {one: weights(one) for one in made}
    summaries = {one: json.loads(one.summary.read_text())["foreground_mean"] for one in made}
    monkeypatch.setenv("nnUNet_results", str(short.root / "single"))
    monkeypatch.setenv("nnUNet_extTrainer", external_trainers())
    for one in made:
        arguments = (one.dataset, one.configuration, one.fold, "-tr", one.trainer, "-p", one.plans, "-device", "cpu")
        in_process.run(["nnUNetv2_train", *arguments], check=True)
        assert identical(weights(one), together[one])
        assert json.loads(one.summary.read_text())["foreground_mean"] == summaries[one]


@pytest.mark.slow
def test_a_training_that_fails_does_not_stop_the_others(short, capsys):
    """A broken checkpoint of the first one; --c then trains what is missing, and that alone."""
    broken = of(fold=0).folder / "checkpoint_final.pth"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"cut")
    assert train("--shots", 1, 5, "--c", "-f", 0) == 2
    out, error = capsys.readouterr()
    assert "1 of 2 trainings failed" in error and f"{of().title}: {broken} " in error
    assert of(shots=1).summary.exists() and "[1/2] FSEFTTrainer, 1 shot, fold 0" in out
    broken.unlink()
    stamp = (of(shots=1).folder / "checkpoint_final.pth").stat().st_mtime_ns
    assert train("--shots", 1, 5, "--c", "-f", 0) == 0
    assert "[1/2] FSEFTTrainer, 1 shot, fold 0: already done." in capsys.readouterr().out
    assert (of(shots=1).folder / "checkpoint_final.pth").stat().st_mtime_ns == stamp and of().summary.exists()
    assert RunFile.load(of().folder).peak_memory_gb["host"] > 0


@pytest.mark.slow
def test_broken_plans_of_one_training_do_not_stop_the_others(short, capsys):
    file = short.preprocessed / "FSEFTPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres_1shot"]["fseft_crop_size"] = "large"
    file.write_text(json.dumps(plans))
    assert train("--shots", 1, 5) == 2
    assert of().summary.exists() and not of(shots=1).summary.exists()
    assert "FSEFTTrainer, 1 shot, fold 0: fseft_crop_size of '3d_fullres_1shot' in" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("-tr", "FSEFTTrainer_Contxt"), "no trainer 'FSEFTTrainer_Contxt': did you mean 'FSEFTTrainer_Context'?"),
        (("--shots", "3"), "have no configuration '3d_fullres_3shot': plan again with `fseft plan -d ID --shots 3`"),
        (("-f", "7"), "Fold 7 does not exist"),
        (("-p", "Other"), "Other.json is missing"),
        (("--report", "none/x.json"), "--report none/x.json: its folder does not exist"),
        (("--val_best", "--disable_checkpointing"), "omit --disable_checkpointing"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_runs(workspace, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(training, "_run", None)
    assert train(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not workspace.results.exists()


def test_every_training_starts_from_the_same_random_state(monkeypatch):
    """As the processes of single commands: nnU-Net initialises networks from the global generator."""
    drawn = []
    monkeypatch.setattr(training, "_run", lambda *_: drawn.append(torch.rand(3).tolist()))
    monkeypatch.setenv("nnUNet_extTrainer", "")
    assert not run_trainings([of(), of(fold=1), of(shots=1)], CPU)
    assert drawn[0] == drawn[1] == drawn[2]


def test_errors_are_collected_and_told(monkeypatch, capsys):
    def fail(one, *_):
        if one.fold == 1:
            raise InputError("no disk")
        if one.fold == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_run", fail)
    monkeypatch.setenv("nnUNet_extTrainer", "")
    assert run_trainings([of(), of(fold=1), of(shots=1)], CPU) == {of(fold=1): "no disk"}
    told = capsys.readouterr().out.splitlines()
    assert "FSEFTTrainer, 5 shots, fold 1 failed: no disk" in told and len(told) == 4
    with pytest.raises(KeyboardInterrupt):
        run_trainings([of(fold=2), of()], CPU)


def test_after_a_failure_of_the_gpu_nothing_is_started(workspace, monkeypatch):
    started = []

    def fail(one, *_):
        started.append(one)
        if one.fold == 1:
            raise DeviceFailed("The GPU failed.")

    monkeypatch.setattr(training, "_run", fail)
    monkeypatch.setenv("nnUNet_extTrainer", "")
    failures = run_trainings([of(), of(fold=1), of(shots=1), of(fold=2)], CPU)
    assert started == [of(), of(fold=1)] and [*failures] == [of(fold=1), of(shots=1), of(fold=2)]
    assert failures[of(fold=2)] == "not started, because the GPU had failed"


def test_what_is_done(workspace, monkeypatch):
    """Trained and, where there are labelled queries and their validation is wanted, validated since."""
    one, without = of(), replace(of(), has_queries=False)
    assert not one.is_done and not without.is_done
    one.summary.parent.mkdir(parents=True)
    one.summary.touch()
    os.utime(one.summary, (1, 1))
    assert not one.is_done
    one.checkpoint.touch()
    assert not one.is_done and without.is_done
    monkeypatch.setenv("fseft_final_validation", "0")
    assert one.is_done
    monkeypatch.delenv("fseft_final_validation")
    one.summary.touch()
    assert one.is_done


@pytest.mark.slow
def test_remembered_features_stay_where_a_training_is_done(short, capsys):
    assert train("--shots", 5) == 0
    assert main(["remember", "-d", "77", "-c", "3d_fullres_5shot", "-f", "0", "-device", "cpu"]) == 0
    assert train("--shots", 5, "--c") == 0
    assert "already done" in capsys.readouterr().out and MEMORY_KEY in read_checkpoint(of().checkpoint)
    assert train("--shots", 1, "--val") == 2
    assert "checkpoint_final.pth is missing: train it, without --val" in capsys.readouterr().err


@pytest.mark.slow
def test_a_report_of_what_failed(short, tmp_path):
    """In a process of its own, as `fseft benchmark` starts it; an old result is not that of a failed training."""
    broken = of().checkpoint
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"cut")
    of().summary.parent.mkdir()
    of().summary.write_text('{"foreground_mean": {"Dice": 0.9}}')
    os.utime(of().summary, (1, 1))
    experiment = OwnExperiment(tmp_path, "Dataset077_Tiny")
    (reason,) = experiment.train_together(["FSEFTTrainer"], [5], [0]).values()
    assert reason.startswith(f"{broken} ")
    assert "mean Dice" not in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    "one, configuration",
    [
        (of(), "3d_fullres_5shot"),
        (of("FSEFTTrainer_Scratch", 1), "3d_fullres_1shot_scratch"),
        (of("FSEFTTrainer_Scratch", "all", plans="nnUNetPlans"), "3d_fullres_allshot_nnunet"),
    ],
)
def test_baselines_have_configurations_of_their_own(one, configuration):
    assert one.configuration == configuration


def test_a_backbone_is_loaded_once():
    """But not where a part of it is trained, or other weights are expected."""
    with backbones_stay_loaded():
        first, second = (FrozenBackbone("phantom", stages) for stages in ("last", "last+image"))
        assert first.module is second.module
        assert FrozenBackbone("phantom", "all").module is not first.module
        assert TunedBackbone("phantom", "last", None, LastBlock()).module is not first.module
        with pytest.raises(InputError, match="These plans were made with backbone"):
            FrozenBackbone("phantom", "last", "0" * 64)
    assert FrozenBackbone("phantom", "last").module is not first.module


def test_the_users_own_trainers_stay_findable(monkeypatch):
    shims = str(Path(training.__file__).parent / "shims")
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(["/own", shims]))
    assert external_trainers() == os.pathsep.join([shims, "/own"])
