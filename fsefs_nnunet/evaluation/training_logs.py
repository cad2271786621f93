"""What a training leaves in its fold's folder, as numbers."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from fsefs_nnunet.priors.size import SizePrior


@dataclass(frozen=True)
class LearningCurve:
    """One value per epoch: seconds of training up to its end, training loss, nnU-Net's mean pseudo Dice."""

    seconds: list[float]
    loss: list[float]
    pseudo_dice: list[float]


def learning_curve(checkpoint: str | Path) -> LearningCurve:
    """nnU-Net's log of every epoch, out of a checkpoint; time between two runs of one training does not count.

    Raises:
        ValueError: if the checkpoint is missing or damaged.
    """
    # imports torch, which the logs do not need
    from fsefs_nnunet.backbones.checkpoints import read_checkpoint

    log = read_checkpoint(Path(checkpoint))["logging"]
    epochs = [end - start for start, end in zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"])]
    return LearningCurve(
        list(accumulate(epochs)), [float(x) for x in log["train_losses"]], [float(x) for x in log["mean_fg_dice"]]
    )


_SUPPORT = re.compile(r"\d+ labelled support cases \([^)]*\): (\[.*?\])(?:\.|; \d+ queries)")


def logged_support(fold_folder: str | Path) -> list[list[str]]:
    """The support cases of every run of the training."""
    logs = [log.read_text("utf-8") for log in sorted(Path(fold_folder).glob("training_log_*.txt"))]
    return [ast.literal_eval(match[1]) for log in logs for match in _SUPPORT.finditer(log)]


_PEAK = re.compile(r"Peak memory of this process: (\S+) GB")


def peak_memory(fold_folder: str | Path) -> float:
    """GB that the training took at most, of the largest of its runs if it was continued; NaN if no log tells."""
    logs = [log.read_text("utf-8") for log in Path(fold_folder).glob("training_log_*.txt")]
    return max((float(match[1]) for log in logs for match in _PEAK.finditer(log)), default=float("nan"))


_PRIOR = re.compile(r"Size prior of (.+): (\S+) ml, spread (\S+) ml, (\d+) cases")


def logged_priors(fold_folder: str | Path) -> dict[str, SizePrior]:
    """Size priors by class, the last ones where a training was continued; {} where the prior had no effect."""
    logs = [log.read_text("utf-8") for log in sorted(Path(fold_folder).glob("training_log_*.txt"))]
    found = [match for log in logs for match in _PRIOR.finditer(log)]
    return {m[1]: SizePrior(float(m[2]), float(m[3]), int(m[4])) for m in found}
