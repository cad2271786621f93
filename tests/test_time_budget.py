"""Trainings that end at a limit of time: what counts, and what their checkpoints keep."""

import multiprocessing
import shutil
from pathlib import Path
from time import process_time

import pytest
from trainings import FIVE, identical, make_trainer, splits_of, text_of, weights

from fsefs_nnunet.backbones.checkpoints import read_checkpoint
from fsefs_nnunet.device import cpu_seconds
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.features.bank import FeatureBank
from fsefs_nnunet.features.disk import BANK_FOLDER
from fsefs_nnunet.methods.run_file import RunFile
from fsefs_nnunet.trainers import patch_trainer, time_budget
from fsefs_nnunet.trainers.fseft_trainer import FSEFTTrainer
from fsefs_nnunet.trainers.scratch import FSEFTTrainer_Scratch


def scratch(work, cls=FSEFTTrainer_Scratch):
    trainer = make_trainer(work, cls, configuration=f"{FIVE}_scratch")
    trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = 1
    return trainer


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless a test lets it run."""
    now = {"wall": 100.0, "cpu": 7.0}
    for name in now:
        monkeypatch.setitem(time_budget.CLOCKS, name, lambda name=name: now[name])
    return now


@pytest.mark.slow
def test_drawing_and_saving_count(work, clock, monkeypatch):
    """Epochs take no time on this clock, drawing 5 s and saving 1 s: a budget of 13 s ends after the third epoch."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("fseft_train_minutes", str(13 / 60))
    trainer, save = scratch(work), FSEFTTrainer_Scratch.save_checkpoint
    monkeypatch.setattr(trainer, "progress_png_every", 1)
    drawn = []

    def draw(logger, output_folder):
        drawn.append(trainer.current_epoch)
        assert len(drawn) < 9, "the budget does not end the training"
        clock["wall"] += 5

    def save_slowly(self, filename):
        save(self, filename)
        if filename.endswith("latest.pth"):
            clock["wall"] += 1

    monkeypatch.setattr("nnunetv2.training.logging.nnunet_logger.LocalLogger.plot_progress_png", draw)
    monkeypatch.setattr(FSEFTTrainer_Scratch, "save_checkpoint", save_slowly)
    trainer.save_every = 2
    monkeypatch.setattr(patch_trainer, "HARDLY_FOUND", 1.1)
    trainer.run_training()
    assert drawn == [0, 1, 2]
    final = Path(trainer.output_folder, "checkpoint_final.pth")
    assert read_checkpoint(final)["init_args"][time_budget.SECONDS_KEY] == {"wall": 16.0, "cpu": 0.0}
    run = RunFile.load(trainer.output_folder)
    assert run.missed and f"WARNING: {', '.join(run.missed)}: hardly found at the end" in text_of(trainer)
    assert (run.budget_seconds, run.budget_clock) == (13.0, "wall")
    continued = scratch(work)
    continued.initialize()
    continued.load_checkpoint(str(final))
    assert continued.used_seconds() == 16.0 and continued.progress() == 1.0
    continued.run_training()  # trains nothing more, and forgets nothing
    assert RunFile.load(trainer.output_folder).missed == run.missed


@pytest.mark.slow
def test_a_training_that_gave_up_is_continued(work, clock, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("fseft_train_minutes", str(30 / 60))
    monkeypatch.setenv("fseft_gives_up", "1")
    monkeypatch.setattr(patch_trainer, "HARDLY_FOUND", 1.1)
    monkeypatch.setattr(patch_trainer, "LAST_EPOCHS", 1)

    class Slow(FSEFTTrainer_Scratch):
        def on_epoch_end(self):
            clock["wall"] += 5
            super().on_epoch_end()

    def training():
        trainer = scratch(work, Slow)
        final = Path(trainer.output_folder, "checkpoint_final.pth")
        trainer.initialize()
        if final.exists():
            trainer.load_checkpoint(str(final))
        trainer.run_training()
        return RunFile.load(trainer.output_folder)

    assert training().gave_up and clock["wall"] == 110
    monkeypatch.delenv("fseft_gives_up")
    assert not training().gave_up and clock["wall"] == 130


def test_a_budget_of_cpu_time(work, clock, monkeypatch):
    monkeypatch.setenv("fseft_train_minutes", "1")
    monkeypatch.setenv("fseft_train_clock", "cpu")
    trainer = scratch(work)
    trainer.seconds_before["cpu"], trainer.started = 12.0, dict(clock)
    clock["wall"] += 1000
    clock["cpu"] += 3
    assert trainer.used_seconds() == 15.0 and trainer.progress() == 0.25


@pytest.mark.slow
def test_trainings_on_stored_features_end_with_their_epochs_or_with_the_time(work, clock, monkeypatch):
    """Epochs take 5 s on this clock; the rate and the start of the prior follow the time where that is shorter."""

    class Slow(FSEFTTrainer):
        def on_epoch_end(self):
            clock["wall"] += 5
            super().on_epoch_end()

        def prepare_training(self):
            super().prepare_training()
            clock["wall"] += 100 * fills  # the bank takes its time of the budget, and none of the schedule

    def training(minutes):
        if minutes:
            monkeypatch.setenv("fseft_train_minutes", str(minutes))
        trainer = make_trainer(work, Slow, epochs=6, fseft_prior_from_epoch=3, fseft_gamma=0.01)
        trainer.run_training()
        return trainer, [epoch["epoch"] for epoch in trainer.run.epochs if "penalty" in epoch]

    fills = 0
    free, with_prior = training(None)
    ample, same = training(10)
    assert identical(weights(free), weights(ample)) and with_prior == same == [3, 4, 5]
    assert (ample.run.budget_seconds, free.run.budget_seconds) == (600.0, None)
    short, with_prior = training(13 / 60)
    assert len(short.run.epochs) == 3 and with_prior == [2]
    assert short.optimizer.param_groups[0]["lr"] < 0.5 * short.initial_lr
    fills = 1
    same, with_prior = training(113 / 60)
    assert identical(weights(short), weights(same)) and with_prior == [2]
    assert training(1 / 60)[0].current_epoch == 1  # the bank alone may take the time: one epoch is trained


def test_queries_whose_features_take_too_long(work, clock, monkeypatch):
    """A volume takes 5 s on this clock, and a fifth of the limit is the bank's: the support comes first."""
    compute = FeatureBank._compute

    def slowly(self, *args):
        clock["wall"] += 5
        return compute(self, *args)

    def training(seconds):
        monkeypatch.setenv("fseft_train_minutes", str(seconds / 60))
        trainer = make_trainer(work, FSEFTTrainer, epochs=1, fseft_views=0)
        trainer.run_training()
        return trainer

    monkeypatch.setattr(FeatureBank, "_compute", slowly)
    shutil.rmtree(work.preprocessed / BANK_FOLDER)
    none = training(100)  # the support's five cases took 25 s
    assert none.run.queries == [] and "The prior has no effect: there are no queries" in text_of(none)
    two = training(50)
    assert two.run.queries == two.query_volumes.queries == splits_of(work)["queries"][:2]
    assert len(two.run.labelled_queries) == 3 and "The prior looks at 2 queries and does without 3" in text_of(two)
    assert len(training(50).run.queries) == 4  # what the bank has costs nothing
    assert len(training(60).run.queries) == 5


def test_an_unknown_clock_is_refused(work, monkeypatch):
    monkeypatch.setenv("fseft_train_minutes", "1")
    monkeypatch.setenv("fseft_train_clock", "sun")
    with pytest.raises(InputError, match="""fseft_train_clock must be "wall" or "cpu", not 'sun'"""):
        scratch(work).initialize()


def work_and_wait(done, end) -> None:
    while process_time() < 0.3:
        pass
    done.set()
    end.wait()


def test_workers_count():
    """While they run, and after."""
    context = multiprocessing.get_context("fork")
    done, end = context.Event(), context.Event()
    before = cpu_seconds()
    worker = context.Process(target=work_and_wait, args=(done, end))
    worker.start()
    done.wait()
    assert cpu_seconds() - before > 0.25
    end.set()
    worker.join()
    assert cpu_seconds() - before > 0.25
