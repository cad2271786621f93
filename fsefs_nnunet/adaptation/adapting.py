"""`fseft adapt`: from a raw dataset to an adapted model and its predictions, within a time limit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic

from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

from fsefs_nnunet.adaptation.choice import STUDENT
from fsefs_nnunet.adaptation.decision import TEACHER, Decision, Task, decide, minutes_left
from fsefs_nnunet.adaptation.pseudo_labels import LEAST_PROBABILITY, OPTIONS, SUMMARY
from fsefs_nnunet.adaptation.student import make_student
from fsefs_nnunet.adaptation.teacher import Teacher
from fsefs_nnunet.backbones.store import find_backbone
from fsefs_nnunet.cases.dataset_json import read_dataset_json
from fsefs_nnunet.cases.folders import dataset_folders, folder_of, made_folder
from fsefs_nnunet.cases.images import list_images
from fsefs_nnunet.cases.splits import SPLITS_FILE, load_splits, support_cases
from fsefs_nnunet.device import device_named
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import read_json, refused_if_unwritable, write_json
from fsefs_nnunet.methods.registry import BANK, METHODS, configuration_of, method_of_trainer
from fsefs_nnunet.methods.run_file import RUN_FILE, RunFile
from fsefs_nnunet.nnunet.experiment import OwnExperiment, lacks_cases
from fsefs_nnunet.nnunet.planning import add_configurations, plan_and_preprocess
from fsefs_nnunet.trainers.patch_trainer import GIVES_UP_AT

PUPIL = "ft_long"  # the method that students are trained with
FALLBACK = "context"  # takes the place of a training that gave up
WORTH_GIVING_UP = 3.0  # minutes; a shorter training would leave too little time for another one
HIGHEST_ID = 999  # of datasets
PLANNING = "fseft_adapt_is_planning.json"  # exists during planning, so that an interrupted planning is repeated


@dataclass(frozen=True)
class Training:
    """What is trained in the end."""

    experiment: OwnExperiment
    trainer: str
    configuration: str
    fold: int


def adapt(task: Task, images: Path | None = None, output: Path | None = None) -> Path:
    """Plan what is not planned, choose, train and, with `images`, predict; returns the trained fold's folder.

    Raises:
        InputError: if no time is left for the training, and whatever planning and training raise.
    """
    started = monotonic()
    name, raw, preprocessed = dataset_folders(task.dataset)
    folder_of("nnUNet_results")
    if output is not None:
        if output.exists() and not output.is_dir():
            raise InputError(f"{output} is a file: give a folder for the segmentations.")
        with refused_if_unwritable(output):
            output.mkdir(parents=True, exist_ok=True)
    if images is not None:
        list_images(images, read_dataset_json(raw / "dataset.json")).require_sound()
    plan_if_needed(task)
    support = support_cases(load_splits(preprocessed / SPLITS_FILE), task.shots, task.fold)
    file = preprocessed / f"fseft_adapt_{task.plans}_{task.configuration}.json"
    if file.exists():
        print(f"This choice was made earlier; delete {file} to choose again:")
        decision = Decision.load(file)
    else:
        decision = decide(task, support, started)
        method = METHODS[TEACHER if decision.method == STUDENT else decision.method]
        parent = {"inherits_from": configuration_of(task.shots, method.suffix), "fseft_minutes": decision.minutes}
        add_configurations(preprocessed / f"{method.plans or task.plans}.json", {task.configuration: parent})
        write_json(file, asdict(decision))
    for line in decision.why:
        print(line)
    if decision.method == STUDENT:
        training = prepare_student(task, support, started)
        folder = train(training, gives_up=True)
    else:
        training = prepare(task, decision)
        # the context adapter needs features of a trained decoder, and time
        instead = not find_backbone(task.backbone).encoder_only and decision.minutes >= WORTH_GIVING_UP
        folder = train(training, support, gives_up=instead)
    if (run := RunFile.load(folder)).gave_up:
        training = prepare_instead(task, decision, run)
        folder = train(training, support)
    experiment, trainer, configuration = training.experiment, training.trainer, training.configuration
    model = f"-d {experiment.dataset} -c {configuration} -f {training.fold} -tr {trainer} -p {experiment.plans}"
    if missed := RunFile.load(folder).missed:
        print(
            f"Warning: {', '.join(missed)}: hardly found at the end, even in patches of the support. Give more "
            f"--minutes, or train FSEFTTrainer_Context with -c {configuration_of(task.shots)}, which needs fewer steps."
        )
    print(f"The model is in {folder}. Its options for nnUNetv2_predict: {model}")
    if images is not None:
        segment(training, images, output)
        print(f"Segmentations: {output}")
    return folder


def segment(training: Training, images: Path, output: Path) -> None:
    experiment, trainer, configuration = training.experiment, training.trainer, training.configuration
    if method_of_trainer(trainer).learns_from != BANK:
        experiment.predict(trainer, configuration, images, output, training.fold)
        return
    # runs the adapter once over the blended features: a third of nnUNetv2_predict's time on large volumes
    model = ("-d", experiment.dataset, "-c", configuration, "-tr", trainer, "-p", experiment.plans)
    where = ("-i", images, "-o", output, "-f", str(training.fold), "-device", experiment.device)
    experiment.run("fseft", "predict", "--inductive", *where, *model)


def train(training: Training, support: list[str] = (), gives_up: bool = False) -> Path:
    """
    support: cases of the current splits, if a model that was trained on other cases may exist.
    gives_up: whether a training on patches ends early if it misses classes.

    Raises:
        InputError: if such a model exists.
    """
    experiment = training.experiment
    folder = experiment.model(training.trainer, training.configuration) / f"fold_{training.fold}"
    if support and (folder / RUN_FILE).exists() and sorted(RunFile.load(folder).support) != sorted(support):
        raise InputError(
            f"{folder} was trained on support cases other than those in {SPLITS_FILE} now: delete it, or restore the "
            "splits with `fseft splits`."
        )
    options = {"fseft_final_validation": "0", "fseft_gives_up": str(int(gives_up))}
    return experiment.train(training.trainer, training.configuration, training.fold, **options)


def plan_if_needed(task: Task) -> None:
    """Draw folds, plan and preprocess with the defaults, unless there are plans.

    Raises:
        InputError: if the plans are not suitable: planning again could change what the user chose.
    """
    _, _, preprocessed = dataset_folders(task.dataset)
    file = preprocessed / f"{task.plans}.json"
    options = {
        "dataset_id": task.dataset,
        "backbone": task.backbone,
        "shots": [task.shots],
        "num_processes": task.num_processes,
        "other_modality": task.other_modality,
    }
    begun = preprocessed / PLANNING
    if not file.exists() or begun.exists():
        print("Planning and preprocessing the dataset.")
        write_json(made_folder(preprocessed) / PLANNING, {"plans": task.plans})
        plan_and_preprocess((task.dataset, [task.shots], None), options)
        begun.unlink()
        return
    missing = configuration_of(task.shots) not in read_json(file)["configurations"]
    if missing or lacks_cases(preprocessed, task.plans):
        what = f"{file} has no {configuration_of(task.shots)}" if missing else f"Cases of {file} are not preprocessed"
        raise InputError(
            f"{what}: run `fseft plan_and_preprocess -d {task.dataset} -b {task.backbone} --shots {task.shots}`, with "
            "the options that the plans were made with."
        )


def prepare(task: Task, decision: Decision) -> Training:
    method, name = METHODS[decision.method], dataset_folders(task.dataset)[0]
    experiment = OwnExperiment.of(name, method.plans or task.plans, task.device)
    if method.plans:
        experiment.preprocess_missing()
    return Training(experiment, method.trainer, task.configuration, task.fold)


def prepare_instead(task: Task, decision: Decision, run: RunFile) -> Training:
    """What replaces a training that gave up: the context adapter for the time that is left; for a student, its teacher.

    The decision stands: other folds may find all classes.
    """
    missed, instead = ", ".join(run.missed), METHODS[FALLBACK]
    name, _, preprocessed = dataset_folders(task.dataset)
    experiment = OwnExperiment.of(name, task.plans, task.device)
    if decision.method == STUDENT:
        print(f"The student hardly finds {missed}. The teacher is the result.")
        return Training(experiment, METHODS[TEACHER].trainer, task.configuration, task.fold)
    left = round((1 - GIVES_UP_AT) * decision.minutes, 2)
    print(
        f"Hardly found after a third of the training, even in patches of the support: {missed}. Instead: "
        f"{instead.title}, for {left:.1f} minutes at most."
    )
    configuration = f"{task.configuration}_instead"
    parent = {"inherits_from": configuration_of(task.shots), "fseft_minutes": left}
    add_configurations(preprocessed / f"{task.plans}.json", {configuration: parent})
    return Training(experiment, instead.trainer, configuration, task.fold)


def prepare_student(task: Task, support: list[str], started: float) -> Training:
    """Train the teacher, make the student's dataset and its configuration.

    If that takes all of the time, the teacher is the result.
    """
    teacher, student = METHODS[TEACHER], METHODS[PUPIL]
    experiment = OwnExperiment.of(dataset_folders(task.dataset)[0], task.plans, task.device)
    first = Training(experiment, teacher.trainer, task.configuration, task.fold)
    train(first, support)
    taught = Teacher(task.dataset, teacher.trainer, task.plans, task.configuration, task.fold)
    device, number = device_named(task.device), student_id(taught)
    name = make_student(taught, number, None, False, LEAST_PROBABILITY, device, task.num_processes)
    configuration = configuration_of("all", f"_auto{task.minutes:g}")
    file = dataset_folders(name)[2] / f"{task.plans}.json"
    if configuration not in read_json(file)["configurations"]:
        try:
            left = minutes_left(task, started)
        except InputError as error:
            print(f"{error} The teacher is the result.")
            return first
        parent = {"inherits_from": configuration_of("all"), "fseft_minutes": left}
        add_configurations(file, {configuration: parent})
        print(f"The student is trained for {left:.1f} minutes.")
    return Training(OwnExperiment.of(name, task.plans, task.device), student.trainer, configuration, 0)


def student_id(teacher: Teacher) -> int:
    """The id of the teacher's student, unfinished or finished; otherwise the highest free id."""
    raw = dataset_folders(teacher.dataset)[1].parent
    for file in (*raw.glob(f"Dataset*Student/{SUMMARY}"), *raw.glob(".Dataset*Student.part/options.json")):
        content = read_json(file)
        if content.get(OPTIONS, content).get("teacher") == teacher.name:
            return int(file.parent.name.lstrip(".").removeprefix("Dataset")[:3])
    taken = {int(folder.name[8:11]) for folder in raw.glob(".Dataset*.part")}
    return next(n for n in range(HIGHEST_ID, 0, -1) if n not in taken and not len(find_candidate_datasets(n)))
