"""One cell of the grid: trained, predicted and evaluated by commands, and stored next to its training."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from time import time

from fsefs_nnunet.benchmark.evaluation import METRICS, evaluate, write_summary
from fsefs_nnunet.benchmark.result import Result
from fsefs_nnunet.benchmark.study import Study
from fsefs_nnunet.cases.splits import support_cases
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import read_json
from fsefs_nnunet.inference.weights import sha256_of_weights
from fsefs_nnunet.methods.registry import METHODS, Method, configuration_of, shots_in_words
from fsefs_nnunet.methods.run_file import RUN_FILE, RunFile
from fsefs_nnunet.nnunet.experiment import OwnExperiment


@dataclass(frozen=True)
class Spent:
    """What a cell cost the benchmark: wall seconds, and windows passed through the backbone for its predictions."""

    seconds: float = 0.0
    windows: int = 0


@dataclass(frozen=True, eq=False)
class Cell:
    """
    name: one of METHODS.
    shots, fold: 0 for zero-shot, which has neither.
    others: cells of other methods; a training from scratch may take as long as the longest of them.
    """

    study: Study
    name: str
    shots: int | str
    fold: int
    others: tuple[Cell, ...] = ()

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    @property
    def experiment(self) -> OwnExperiment:
        """The study's experiment, with the plans of the method."""
        experiment = self.study.experiment
        return replace(experiment, plans=self.method.plans) if self.method.plans else experiment

    @property
    def title(self) -> str:
        where = f", {shots_in_words(self.shots)}, fold {self.fold}"
        return self.method.title + (where if self.method.trainer else "")

    @property
    def configuration(self) -> str:
        return configuration_of(self.shots, self.method.suffix)

    @property
    def support(self) -> list[str]:
        return support_cases(self.study.splits, self.shots, self.fold) if self.method.trainer else []

    @property
    def folder(self) -> Path:
        """The fold's folder of the training; without one, a folder of the benchmark's."""
        if self.method.trainer is None:
            return self.experiment.work / self.name
        return self.experiment.model(self.method.trainer, self.configuration) / f"fold_{self.fold}"

    @property
    def predictions(self) -> Path:
        """Folder of the predictions: those of nnU-Net's final validation if they are what is needed."""
        if self.study.target.is_queries and self.method.trainer and not self.method.transductive:
            return self.folder / "validation"
        return self.folder / f"benchmark_{self.name}_{self.study.target.name}"

    @property
    def file(self) -> Path:
        """The file of the result."""
        return self.folder / f"benchmark_{self.name}_{self.study.target.name}.json"

    @property
    def predicted(self) -> bool:
        """Whether the final validation of these weights, or its substitute, has predicted the queries."""
        summary = self.predictions / "summary.json"
        if self.predictions.name != "validation" or not summary.exists():
            return False
        try:
            read_json(summary)
        except InputError:  # nnU-Net was killed while writing
            return False
        return summary.stat().st_mtime >= self.checkpoint.stat().st_mtime

    @property
    def run_facts(self) -> RunFile:
        """Facts of the training. Raises InputError if it left none."""
        return RunFile.load(self.folder)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint_final.pth"

    @property
    def weights(self) -> str:
        """SHA-256 of the trained weights, or of the backbone if nothing is trained; "" if there is none."""
        if self.method.trainer is None:
            return self.study.backbone["sha256"]
        return sha256_of_weights(self.checkpoint) if self.checkpoint.exists() else ""

    def check(self) -> None:
        """Raises InputError if plans or splits have no such cell, or if results of other ones are in its place."""
        if self.method.trainer is None:
            return
        support, name = self.support, self.experiment.plans
        plans = self.configurations()
        if self.configuration not in plans:
            raise InputError(
                f"Plans {name!r} have no configuration {self.configuration!r}: plan again with "
                f"`fseft plan -d ID --shots {self.shots}`."
            )
        model = self.folder.parent
        if not self.folder.exists() or not (model / "plans.json").exists():
            return
        then = read_json(model / "plans.json")["configurations"]
        if any(then.get(key) != plans[key] for key in ("3d_fullres", self.configuration)):
            raise InputError(
                f"{model} was trained with plans other than the current {name!r}: move it away, or give the plans that "
                "it was trained with (-p)."
            )
        if (self.folder / RUN_FILE).exists() and self.run_facts.support != support:
            raise InputError(
                f"{self.folder} was trained on {self.run_facts.support}, but the splits now say {support}: move it "
                "away, or draw the splits as before with `fseft splits`."
            )
        if self.study.scratch_minutes or all(other.checkpoint.exists() for other in self.others):
            self.check_budget()

    def configurations(self) -> dict[str, dict]:
        """Configurations of the method's plans; {} if there are no such plans."""
        if not self.method.plans:
            return self.study.plans["configurations"]
        file = self.experiment.preprocessed / f"{self.method.plans}.json"
        return read_json(file)["configurations"] if file.exists() else {}

    def budget(self) -> float:
        """Seconds for a training from scratch: --scratch_minutes, else those of the longest of `others`, else 0.0."""
        if self.study.scratch_minutes:
            return 60 * self.study.scratch_minutes
        return max((cell.run_facts.training_seconds for cell in self.others if cell.checkpoint.exists()), default=0.0)

    def check_budget(self) -> None:
        """Raises InputError if the existing training from scratch had a time other than `budget`."""
        if not self.method.suffix or not self.checkpoint.exists():
            return
        then, now = self.run_facts.budget_seconds or 0.0, self.budget()
        if now and abs(then - now) > 0.01 * now:
            raise InputError(
                f"{self.folder} was trained {f'for {then:.0f} s' if then else 'without a time limit'}, but now it "
                f"would get {now:.0f} s: move it away, or give --methods and --scratch_minutes as before."
            )

    def finished(self) -> Result | None:
        """The result of an earlier run, if it belongs to these images, labels and metrics and the current weights."""
        try:
            result = Result.load(self.file)
            metrics = {tuple(of_class) for of_case in result.cases.values() for of_class in of_case.values()}
            target = self.study.target
            fits = tuple(result.cases) == target.cases and metrics == {METRICS}
            then, now = (result.images, result.labels), (target.images_sha256, target.labels_sha256)
            return result if fits and then == now and result.weights == self.weights else None
        except (FileNotFoundError, InputError):  # none, one of another version, a damaged checkpoint
            return None

    # ---- the work ----

    def run(self, spent: Spent = Spent()) -> Result:
        """Train, predict and evaluate what is not done yet.

        spent: what the benchmark has already spent on it.

        Raises:
            InputError: if a command fails, or what it left cannot be evaluated.
        """
        start, target = time(), self.study.target
        self.folder.mkdir(parents=True, exist_ok=True)
        trained = self.method.trainer is not None
        if trained:
            self.train()
        if not self.predicted and not self.method.shares_features:
            self.predict()
        cases = evaluate(self.predictions, target, self.study.reader())
        run = self.run_facts if trained else RunFile()
        result = Result(
            self.name,
            self.shots,
            self.fold,
            self.support,
            self.weights,
            target.images_sha256,
            target.labels_sha256,
            run.trained_parameters,
            run.training_seconds,
            self.volume_seconds(),
            run.budget_seconds or 0.0,
            run.peak_memory,
            spent.seconds + time() - start,
            spent.windows,
            cases,
        )
        result.save(self.file)
        return result

    def volume_seconds(self) -> float:
        """Mean time of adapting to a volume; 0.0 if the method does not adapt."""
        if not self.method.transductive:
            return 0.0
        return mean(read_json(file)["adaptation_seconds"] for file in self.predictions.glob("*_sizes.json"))

    def train(self) -> None:
        """Run `nnUNetv2_train` unless the final checkpoint exists; validate only if the queries are the target."""
        if self.checkpoint.exists():
            return
        environment = {} if self.study.target.is_queries else {"fseft_final_validation": "0"}
        if self.method.suffix:
            if not self.budget():
                raise InputError(
                    f"{self.method.title} is trained as long as the longest other method of its shots and fold, but "
                    "there is none: add one to --methods, or give --scratch_minutes."
                )
            environment["fseft_train_minutes"] = f"{self.budget() / 60:.4f}"
        if self.method.plans:
            self.experiment.preprocess_missing()
        self.experiment.train(self.method.trainer, self.configuration, self.fold, **environment)

    def predict(self) -> None:
        """Segment the target's images into `predictions`, and let nnU-Net count their Dice."""
        shutil.rmtree(self.predictions, ignore_errors=True)  # of other weights, or of an interrupted run
        experiment, images = self.experiment, self.study.target.image_folder(self.experiment.work)
        if self.method.trainer is None:
            where = ("-d", experiment.dataset, "-i", images, "-o", self.predictions, "-device", experiment.device)
            experiment.run("fseft", "zero_shot", *where, "-b", self.study.backbone["backbone"])
        else:
            experiment.predict(self.method.trainer, self.configuration, images, self.predictions, self.fold)
        self.count_dice()

    def count_dice(self) -> None:
        """nnU-Net's summary.json of the predictions."""
        write_summary(self.predictions, self.study.target, self.study.label_manager(), self.study.reader())
