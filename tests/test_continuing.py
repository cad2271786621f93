"""Trainings that were interrupted, stopped early, or started twice."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from trainings import FIVE, identical, make_trainer, text_of, trained, weights

from fsefs_nnunet.errors import InputError
from fsefs_nnunet.nnunet import drawing
from fsefs_nnunet.priors.size import SizePrior
from fsefs_nnunet.trainers.fseft_trainer import FSEFTTrainer
from fsefs_nnunet.trainers.kshot_trainer import failures_of_the_device
from fsefs_nnunet.trainers.scratch import FSEFTTrainer_Scratch


@pytest.mark.parametrize("cls, configuration", [(FSEFTTrainer, FIVE), (FSEFTTrainer_Scratch, f"{FIVE}_scratch")])
def test_checkpoint_of_another_support_is_refused(work, cls, configuration):
    """Or a continued training would go on with other labels, and validate on cases that it was trained on."""
    trainer = make_trainer(work, cls, epochs=1, configuration=configuration)
    trainer.initialize()
    trainer.prior = SizePrior(())
    Path(trainer.output_folder).mkdir(parents=True, exist_ok=True)
    file = f"{trainer.output_folder}/checkpoint_latest.pth"
    trainer.save_checkpoint(file)
    make_trainer(work, cls, epochs=1, configuration=configuration).load_checkpoint(file)
    drawing.write_splits(77, [5], None, seed=99)
    with pytest.raises(InputError, match="latest.pth was trained on support cases other than those in splits_"):
        make_trainer(work, cls, epochs=1, configuration=configuration).load_checkpoint(file)


@pytest.mark.slow
def test_plateau_stop_holds_when_continued(work):
    """The rule needs thirty epochs; a loss that cannot fall, because the rate is zero, ends the training there."""
    settings = dict(fseft_stop_at_plateau=True, fseft_steps_per_epoch=1, fseft_crop_size=[4, 4, 4], fseft_lambda=0.0)

    class Still(FSEFTTrainer):
        method = replace(FSEFTTrainer.method, rate=0.0)

        def on_train_epoch_start(self):
            super().on_train_epoch_start()
            self.dataloader_train.start_epoch(0)  # the same crops, the same loss

    stopped = trained(work, Still, epochs=40, **settings)
    assert stopped.current_epoch == 30
    assert "Training ends after epoch 29: the training loss no longer falls" in text_of(stopped)
    continued = make_trainer(work, Still, epochs=40, **settings)
    continued.load_checkpoint(str(Path(stopped.output_folder) / "checkpoint_final.pth"))
    continued.run_training()
    assert continued.current_epoch == 30
    assert identical(weights(continued), weights(stopped))
    assert trained(work, Still, epochs=31, **{**settings, "fseft_stop_at_plateau": False}).current_epoch == 31


def test_one_training_of_a_fold_at_a_time(work):
    """A command that was started twice, or the training of one that was killed, would write into each other's files."""
    trainer, beside = make_trainer(work, epochs=1), make_trainer(work, epochs=1, fold=1)
    with FileLock(Path(trainer.output_folder) / "training.lock"):
        with pytest.raises(
            InputError, match=r"Another process is training in .*fold_0.*wait until it ends, or stop it.*delete .*lock"
        ):
            trainer.run_training()
        beside.run_training()
    trainer.run_training()
    assert (Path(trainer.output_folder) / "checkpoint_final.pth").exists()


@pytest.mark.parametrize(
    "error, message",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "The GPU does not have enough memory for this training: .* --c",
        ),
        (
            RuntimeError("CUDA error: an illegal access\nlines for developers"),
            "The GPU failed .CUDA error: an illegal access.. Checkpoints",
        ),
    ],
)
def test_a_gpu_that_fails_leaves_the_last_epoch(work, error, message):
    whole = trained(work, epochs=3)

    class Failing(FSEFTTrainer):
        def train_step(self, batch):
            if self.current_epoch == 2:
                raise error
            return super().train_step(batch)

    trainer = make_trainer(work, Failing, epochs=3)
    trainer.output_folder = whole.output_folder
    with pytest.raises(InputError, match=message):
        trainer.run_training()
    continued = make_trainer(work, epochs=3)
    continued.load_checkpoint(str(Path(whole.output_folder) / "checkpoint_latest.pth"))
    assert continued.current_epoch == 2
    continued.run_training()
    assert identical(weights(continued), weights(whole))


def test_other_errors_are_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="sizes of tensors"), failures_of_the_device(str(tmp_path)):
        raise RuntimeError("sizes of tensors must match")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_at_once(work):
    plans = work.plans()
    plans["continue_training"] = False
    with pytest.raises(InputError, match="There is no GPU here that PyTorch can use as 'cuda': add -device cpu."):
        FSEFTTrainer(plans, FIVE, 0, work.dataset_json(), torch.device("cuda"))
    assert not work.results.exists()
