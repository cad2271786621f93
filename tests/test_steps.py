"""Steps of a training from the feature bank, on a CPU and on a GPU."""

import pytest
import torch
from trainings import make_trainer, text_of

from fsefs_nnunet.cases.splits import load_splits


def started(work, device, **settings):
    """A trainer whose prior counts from the first epoch on."""
    trainer = make_trainer(work, device=device, fseft_prior_from_epoch=0, **settings)
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    return trainer


@pytest.mark.parametrize("gpu_gb", [4.0, 0.0])
def test_the_first_losses_are_those_of_the_cpu(work, device, gpu_gb):
    """Wherever the stored features lie."""
    expected, trainer = (started(work, d, fseft_gpu_gb=gpu_gb) for d in (torch.device("cpu"), device))
    for _ in range(2):
        losses = [one.train_step(next(one.dataloader_train))["loss"].item() for one in (expected, trainer)]
        assert losses[0] == pytest.approx(losses[1], rel=0.02)
    if device.type == "cuda":
        assert ("lie in the GPU's memory" if gpu_gb else "they are read ahead") in text_of(trainer)


def test_no_step_waits_for_the_gpu(work, device):
    """PyTorch raises an error at what would wait; a first round fills caches."""
    if device.type != "cuda":
        pytest.skip("There is nothing to wait for on a CPU.")
    trainer = started(work, device)
    for _ in load_splits(work.preprocessed / "splits_fseft.json")["queries"] * 2:
        trainer.train_step(next(trainer.dataloader_train))
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.on_train_epoch_end(outputs)
    assert trainer.logger.get_value("train_losses", step=0) > 0
