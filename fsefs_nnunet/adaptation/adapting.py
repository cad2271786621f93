"""`fseft adapt`: from a raw dataset to an adapted model, and predictions, within a time."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import ceil, prod
from pathlib import Path
from time import monotonic

from fsefs_nnunet.adaptation.choice import STUDENT, Situation, nearest, ranking
from fsefs_nnunet.adaptation.leave_one_out import compare
from fsefs_nnunet.adaptation.pseudo_labels import SURE, Teacher
from fsefs_nnunet.adaptation.student import make_student
from fsefs_nnunet.cases.dataset_json import read_dataset_json
from fsefs_nnunet.cases.folders import dataset_folders, folder_of
from fsefs_nnunet.cases.preprocessed import require_cases
from fsefs_nnunet.cases.splits import SPLITS_FILE, load_splits, support_cases
from fsefs_nnunet.device import device_named
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import read_json, write_atomically, write_json
from fsefs_nnunet.methods.registry import BANK, METHODS, configuration_of, shots_in_words
from fsefs_nnunet.nnunet.experiment import OwnExperiment
from fsefs_nnunet.nnunet.planning import plan_and_preprocess
from fsefs_nnunet.planners.fseft_planner import default_plans_name

TEACHER, PUPIL, FIRST_FREE_ID = "context", "ft_long", 999  # of students
COMPARED = ("fseft", "context")  # what leaving one out tells apart
SHARE = 0.2  # of the time, for that
START_SECONDS = 20  # of a training's command before its first epoch, and of saving


@dataclass(frozen=True)
class Task:
    """What is asked for: the arguments of `fseft adapt`."""

    dataset: str
    shots: int
    fold: int
    minutes: float
    backbone: str
    device: str
    num_processes: int

    @property
    def plans(self) -> str:
        return default_plans_name(self.backbone)

    @property
    def configuration(self) -> str:
        """The one that is added to the plans."""
        return configuration_of(self.shots, f"_auto{self.minutes:g}")


@dataclass(frozen=True)
class Decision:
    """What is trained and why; beside the splits, so that the same call continues.

    method: of the registry, or a student.
    why: sentences.
    minutes: of the training, what the rest took away; None for methods that end by themselves.
    student_id: id of the student's dataset.
    """

    method: str
    why: list[str]
    minutes: float | None
    student_id: int | None = None


def adapt(task: Task, images: Path | None = None, output: Path | None = None) -> Path:
    """Plan what is not planned, choose, train and, with `images`, predict; returns the trained fold's folder.

    Raises:
        InputError: if the time does not suffice for the start, and as planning and training do.
    """
    started = monotonic()
    plan_if_needed(task)
    name, _, preprocessed = dataset_folders(task.dataset)
    support_cases(load_splits(preprocessed / SPLITS_FILE), task.shots, task.fold)
    file = preprocessed / f"fseft_adapt_{task.plans}_{task.configuration}_fold{task.fold}.json"
    if file.exists():
        decision = Decision(**read_json(file))
        print(f"Chosen before ({file}):")
    else:
        decision = decide(task, started)
        add_configuration(task, decision)
        write_json(file, asdict(decision))
    for line in decision.why:
        print(line)
    experiment = OwnExperiment(made_work(name), name, task.plans, task.device)
    if decision.method == STUDENT:
        experiment, trainer, configuration = prepare_student(task, decision, experiment, started)
    else:
        method = METHODS[decision.method]
        if method.plans:
            experiment = OwnExperiment(experiment.work, name, method.plans, task.device)
            experiment.preprocess_missing("3d_fullres")
        trainer, configuration = method.trainer, task.configuration
    fold = 0 if decision.method == STUDENT else task.fold
    folder = experiment.train(trainer, configuration, fold, fseft_final_validation="0")
    print(f"The model: -d {experiment.dataset} -c {configuration} -f {fold} -tr {trainer} -p {experiment.plans}")
    print(f"It lies in {folder}. nnUNetv2_train repeats the training with these flags, nnUNetv2_predict takes them.")
    if images is not None:
        experiment.predict(trainer, configuration, images, output, fold)
        print(f"Segmentations: {output}")
    return folder


def made_work(name: str) -> Path:
    folder = folder_of("nnUNet_results") / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def plan_if_needed(task: Task) -> None:
    """Draw folds, plan and preprocess by the defaults, unless the plans have the shots and all cases are there."""
    _, _, preprocessed = dataset_folders(task.dataset)
    try:
        configurations = read_json(preprocessed / f"{task.plans}.json")["configurations"]
        splits = load_splits(preprocessed / SPLITS_FILE)
        data = preprocessed / configurations["3d_fullres"]["data_identifier"]
        require_cases([*splits["folds"][0], *splits["queries"]], data)
        if configuration_of(task.shots) in configurations:
            return
    except (FileNotFoundError, InputError):
        pass
    print("The dataset is planned and preprocessed first.")
    options = {
        "dataset_id": task.dataset,
        "backbone": task.backbone,
        "shots": [task.shots],
        "num_processes": task.num_processes,
    }
    plan_and_preprocess((task.dataset, [task.shots], None), options)


def decide(task: Task, started: float) -> Decision:
    """Choose by the table and, of what trains on stored features, by leaving one out."""
    name, raw, preprocessed = dataset_folders(task.dataset)
    plans = read_json(preprocessed / f"{task.plans}.json")
    splits = load_splits(preprocessed / SPLITS_FILE)
    pile = len(splits["folds"][task.fold]) - task.shots
    voxels = int(prod(plans["configurations"]["3d_fullres"]["median_image_size_in_voxels"]))
    situation = Situation(task.shots, task.minutes, task.device, voxels, pile)
    cell = nearest(situation)
    ranked = ranking(situation, cell)
    why = [
        f"{shots_in_words(task.shots)}, {task.minutes:g} minutes of a {task.device}, {voxels:,} voxels, {pile} cases "
        f"without labels: nearest to what was measured on {cell.describe()}.",
        f"Dice there: {', '.join(f'{method} {dice:.3f}' for method, dice in ranked)}.",
    ]
    method = ranked[0][0]
    if method != STUDENT and METHODS[method].learns_from == BANK and task.shots > 1:
        dataset_json = read_dataset_json(raw / "dataset.json")
        support = support_cases(splits, task.shots, task.fold)
        plans["continue_training"] = False
        found = compare(
            COMPARED,
            support,
            SHARE * 60 * task.minutes,
            plans,
            configuration_of(task.shots),
            task.fold,
            dataset_json,
            device_named(task.device),
        )
        if found:
            method = max(found, key=found.get)
            why.append(f"Leaving one of the support out: {', '.join(f'{m} {d:.3f}' for m, d in found.items())}.")
    limited = method == STUDENT or METHODS[method].learns_from != BANK
    left = minutes_left(task, started)
    title = "a student of the context adapter" if method == STUDENT else METHODS[method].title
    limit = f", for {left:.1f} minutes" if limited else ", which ends by itself"
    why.append(f"Chosen: {title}{limit}.")
    is_student = method == STUDENT
    return Decision(method, why, left if limited and not is_student else None, free_id() if is_student else None)


def add_configuration(task: Task, decision: Decision) -> None:
    """Add the decision's configuration to the plans; all others stay as they are."""
    method = METHODS[TEACHER if decision.method == STUDENT else decision.method]
    file = dataset_folders(task.dataset)[2] / f"{method.plans or task.plans}.json"
    plans = read_json(file)
    content = {"inherits_from": configuration_of(task.shots, method.suffix), "fseft_minutes": decision.minutes}
    plans["configurations"] |= {task.configuration: content}
    write_atomically(file, json.dumps(plans, indent=4))


def free_id() -> int:
    """The highest id that no dataset has."""
    from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

    return next(number for number in range(FIRST_FREE_ID, 0, -1) if not len(find_candidate_datasets(number)))


def prepare_student(
    task: Task, decision: Decision, experiment: OwnExperiment, started: float
) -> tuple[OwnExperiment, str, str]:
    """Train the teacher and prepare the student; returns its experiment, trainer and configuration."""
    teacher, student = METHODS[TEACHER], METHODS[PUPIL]
    experiment.train(teacher.trainer, task.configuration, task.fold, fseft_final_validation="0")
    taught = Teacher(task.dataset, teacher.trainer, task.plans, task.configuration, task.fold)
    device = device_named(task.device)
    name = make_student(taught, decision.student_id, None, False, SURE, device, task.num_processes)
    configuration = configuration_of("all", f"_auto{task.minutes:g}")
    file = dataset_folders(name)[2] / f"{task.plans}.json"
    plans = read_json(file)
    if configuration not in plans["configurations"]:
        left = minutes_left(task, started)
        content = {"inherits_from": configuration_of("all"), "fseft_minutes": left}
        plans["configurations"] |= {configuration: content}
        write_atomically(file, json.dumps(plans, indent=4))
        print(f"The student is trained for {left:.1f} minutes.")
    made = OwnExperiment(made_work(name), name, task.plans, task.device)
    return made, student.trainer, configuration


def minutes_left(task: Task, started: float) -> float:
    """Raises InputError where nothing is left."""
    used = (monotonic() - started + START_SECONDS) / 60
    if used >= task.minutes:
        raise InputError(
            f"--minutes {task.minutes:g}: the training could not begin, what comes before it takes {used:.1f} minutes "
            f"here. Give at least {ceil(2 * used)}."
        )
    return round(task.minutes - used, 2)
