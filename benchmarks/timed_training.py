"""Trainings that take a given time from the command to the final checkpoint: start, feature bank and training.

On a CPU it is CPU time of one core, on a GPU wall time. Methods on stored features may end earlier, with their epochs.
"""

from __future__ import annotations

import resource
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

from fsefs_nnunet.adaptation.choice import STUDENT
from fsefs_nnunet.methods.registry import METHODS, configuration_of
from fsefs_nnunet.nnunet.experiment import Experiment

START_SECONDS = 15  # of a command of nnU-Net's before the first epoch
TEACHERS = {STUDENT: "context", "student_of_ft_long": "ft_long"}  # by name of the student
SHARE_OF_TEACHER = 1 / 3  # of the time that the teacher may take
PUPIL = "ft_long"


@dataclass(frozen=True)
class Trained:
    """A fold's model, and the seconds that it took."""

    experiment: Experiment
    trainer: str
    configuration: str
    fold: int
    seconds: float

    @property
    def folder(self) -> Path:
        return self.experiment.model(self.trainer, self.configuration) / f"fold_{self.fold}"

    def predict(self, images: Path, name: str) -> Path:
        """`nnUNetv2_predict` into the folder `name` of the fold's."""
        return self.experiment.predict(self.trainer, self.configuration, images, self.folder / name, self.fold)


def seconds_of(device: str) -> float:
    """CPU time of the commands so far; for a GPU, wall time."""
    if device != "cpu":
        return monotonic()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def budget(experiment: Experiment, minutes: float) -> dict[str, str]:
    clock = "cpu" if experiment.device == "cpu" else "wall"
    return {"fseft_train_minutes": str(minutes), "fseft_train_clock": clock}


def train(experiment: Experiment, name: str, shots: int | str, minutes: float, fold: int) -> Trained:
    """Train a method or a student (TEACHERS) from the beginning, with an empty feature bank."""
    run = train_student if name in TEACHERS else train_method
    return run(experiment, name, shots, minutes, fold)


def train_method(experiment: Experiment, name: str, shots: int | str, minutes: float, fold: int) -> Trained:
    method = METHODS[name]
    plans, configuration = method.plans or experiment.plans, configuration_of(shots, method.suffix)
    own = replace(experiment, plans=plans, results=f"nnUNet_results_{minutes:g}min")
    if method.plans:
        own.preprocess_missing()
    experiment.run("fseft", "bank", "-d", own.dataset, "--clear")
    # what was interrupted has lost its time
    shutil.rmtree(own.model(method.trainer, configuration) / f"fold_{fold}", ignore_errors=True)
    before, limit = seconds_of(experiment.device), budget(experiment, minutes - START_SECONDS / 60)
    own.train(method.trainer, configuration, fold, fseft_final_validation="0", **limit)
    return Trained(own, method.trainer, configuration, fold, seconds_of(experiment.device) - before)


def train_student(experiment: Experiment, name: str, shots: int, minutes: float, fold: int) -> Trained:
    """Teacher, pile and student in the same time."""
    own = replace(experiment, results=f"nnUNet_results_{minutes:g}min_{name}")  # with a teacher of its own
    teacher, configuration = METHODS[TEACHERS[name]], configuration_of(shots)
    number = 100 + int(20 * minutes) + 2 * shots + fold + 20 * list(TEACHERS).index(name)
    student = replace(own, dataset=f"Dataset{number}_{own.dataset.split('_')[1]}Student")
    experiment.run("fseft", "bank", "-d", own.dataset, "--clear")
    before = seconds_of(experiment.device)
    for stale in (own.model(teacher.trainer, configuration) / f"fold_{fold}", student.raw, student.preprocessed):
        shutil.rmtree(stale, ignore_errors=True)
    share = budget(experiment, SHARE_OF_TEACHER * minutes)
    own.train(teacher.trainer, configuration, fold, fseft_final_validation="0", **share)
    taught = ("-d", own.dataset, "-c", configuration, "-tr", teacher.trainer, "-p", own.plans, "-f", str(fold))
    own.run("fseft", "student", *taught, "-o", str(number), "--student", "none", "-np", "2", "-device", own.device)
    used = (seconds_of(experiment.device) - before + START_SECONDS) / 60
    trainer, configuration = METHODS[PUPIL].trainer, configuration_of("all")
    shutil.rmtree(student.model(trainer, configuration), ignore_errors=True)
    limit = budget(experiment, minutes - used)
    student.train(trainer, configuration, 0, fseft_final_validation="0", **limit)
    return Trained(student, trainer, configuration, 0, seconds_of(experiment.device) - before)
