"""Runs nnU-Net's commands: for demo and benchmarks in a folder of their own, for `fseft adapt` in the user's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from fsefs_nnunet.cases.splits import SPLITS_FILE, load_splits
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import read_json

# glibc returns the memory of large activations to the system after each layer and requests it again for the next;
# keeping it costs memory and saves much of Swin UNETR's time on a CPU (documentation/benchmarks.md, "The public
# backbones")
ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_MMAP_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**26),
}


# a user may have exported them for trainings of their own; ours are given what they need
OF_SINGLE_TRAININGS = ("fseft_train_minutes", "fseft_train_clock", "fseft_final_validation", "fseft_gives_up")


def external_trainers() -> str:
    """nnUNet_extTrainer with our folder in front of the user's own."""
    shims = str(Path(__file__).resolve().parent / "shims")
    folders = [f for f in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if f and f != shims]
    return os.pathsep.join([shims, *folders])


def program(command: str) -> str:
    """Path of a command that was installed with this Python.

    Raises:
        InputError: if there is none.
    """
    folders = os.pathsep.join([str(Path(sys.executable).parent), sysconfig.get_path("scripts"), os.environ["PATH"]])
    found = shutil.which(command, path=folders)
    if found is None:
        raise InputError(
            f"The command {command} is neither next to {sys.executable} nor on the PATH: activate the environment that "
            "fsefs_nnunet is installed in."
        )
    return found


def lacks_cases(preprocessed: Path, plans: str) -> bool:
    """Whether plans or K-shot folds of a dataset are missing, or preprocessed cases that the folds name.

    Raises:
        InputError: for damaged plans.
    """
    from fsefs_nnunet.cases.preprocessed import require_cases  # imports nnU-Net, which `fseft env` does not need

    file = preprocessed / f"{plans}.json"
    if not file.exists():
        return True
    identifier = read_json(file)["configurations"]["3d_fullres"]["data_identifier"]
    try:
        splits = load_splits(preprocessed / SPLITS_FILE)
        require_cases([*splits["folds"][0], *splits["queries"]], preprocessed / identifier)
    except InputError:
        return True
    return False


@dataclass(frozen=True)
class Experiment:
    """A dataset with its plans below `work`, in nnU-Net's three folders; `device` as in nnUNetv2_train.

    results: name of the results' folder, if one dataset has several kinds of them.
    """

    work: Path
    dataset: str
    plans: str = "FSEFTPlans"
    device: str = "cpu"
    results: str = "nnUNet_results"

    @property
    def folders(self) -> dict[str, Path]:
        """nnU-Net's three, by environment variable."""
        results = {"nnUNet_results": self.work / self.results}
        return {**{name: self.work / name for name in ("nnUNet_raw", "nnUNet_preprocessed")}, **results}

    @property
    def raw(self) -> Path:
        return self.folders["nnUNet_raw"] / self.dataset

    @property
    def preprocessed(self) -> Path:
        return self.folders["nnUNet_preprocessed"] / self.dataset

    def environment(self) -> dict[str, str]:
        folders = {name: str(folder) for name, folder in self.folders.items()}
        # two processes each: a command of nnU-Net's starts up to eight, each of which takes seconds to import torch
        processes = {"nnUNet_def_n_proc": "2", "nnUNet_extTrainer": external_trainers()}
        # waiting threads sleep: by default they spin and take the cores from each other
        own = {name: value for name, value in os.environ.items() if name not in OF_SINGLE_TRAININGS}
        return {"OMP_WAIT_POLICY": "PASSIVE", **ALLOCATOR, **own, **folders, **processes}

    def run(self, command: str, *args: str | Path, **environment: str) -> None:
        """Run one of nnU-Net's or of our commands; its output goes to `work`/log.txt.

        Raises:
            InputError: if it fails, with the end of its output.
        """
        log = self.work / "log.txt"
        line = " ".join([command, *map(str, args)])
        print(f"$ {line}", flush=True)
        for folder in self.folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as f:
            f.write(f"\n$ {line}\n")
            f.flush()
            env = {**self.environment(), **environment}
            code = subprocess.run(
                [program(command), *map(str, args)], env=env, stdout=f, stderr=subprocess.STDOUT
            ).returncode
        if code:
            tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-15:])
            raise InputError(f"`{line}` failed; {log} ends with:\n{tail}")

    def preprocess(self, configuration: str) -> None:
        """Run `nnUNetv2_preprocess` on all labelled cases; replaces what was preprocessed before."""
        processes = self.environment()["nnUNet_def_n_proc"]
        number = self.dataset.removeprefix("Dataset")[:3]  # nnUNetv2_preprocess -d does not accept a name
        what = ("-d", number, "-plans_name", self.plans, "-c", configuration)
        self.run("nnUNetv2_preprocess", *what, "-np", processes)

    def preprocess_missing(self) -> None:
        """Preprocess `3d_fullres`, unless every case of the K-shot folds is there."""
        if lacks_cases(self.preprocessed, self.plans):
            self.preprocess("3d_fullres")

    def model(self, trainer: str, configuration: str) -> Path:
        return self.folders["nnUNet_results"] / self.dataset / f"{trainer}__{self.plans}__{configuration}"

    def train(self, trainer: str, configuration: str, fold: int = 0, **environment: str) -> Path:
        """Run `nnUNetv2_train` unless the training is done; returns the fold's folder.

        It is done if it has its final checkpoint and, unless fseft_final_validation is "0", the validation's summary.
        """
        folder = self.model(trainer, configuration) / f"fold_{fold}"
        done = (folder / "checkpoint_final.pth").exists()
        if environment.get("fseft_final_validation") != "0":
            done = done and (folder / "validation" / "summary.json").exists()
        if not done:
            args = (self.dataset, configuration, str(fold), "-tr", trainer, "-p", self.plans, "-device", self.device)
            self.run("nnUNetv2_train", *args, "--c", **self._without_workers(), **environment)
        return folder

    def _without_workers(self) -> dict[str, str]:
        """On a CPU, augmentation in the main process: on few cores workers only compete with the training."""
        on_cpu = {"nnUNet_n_proc_DA": os.environ.get("nnUNet_n_proc_DA", "0")}
        return on_cpu if self.device == "cpu" else {}

    def train_together(
        self, trainers: Iterable[str], shots: Iterable[int | str], folds: Iterable[int], **environment: str
    ) -> dict[Path, str]:
        """Run `fseft train --c` on this grid; what is done is skipped.

        Returns:
            Why trainings failed, by the folders of their folds.

        Raises:
            InputError: if the command itself fails.
        """
        grid = {"-tr": trainers, "--shots": shots, "-f": folds}
        flags = chain.from_iterable((flag, *dict.fromkeys(map(str, of))) for flag, of in grid.items())
        report = self.work / "failed_trainings.json"
        report.unlink(missing_ok=True)
        args = ("-d", self.dataset, "-p", self.plans, *flags, "-device", self.device, "--c", "--report", report)
        try:
            self.run("fseft", "train", *args, **self._without_workers(), **environment)
        except InputError:
            if not report.exists():
                raise
        return {Path(folder): reason for folder, reason in read_json(report).items()} if report.exists() else {}

    def predict(
        self, trainer: str, configuration: str, images: Path, output: Path, fold: int = 0, **environment: str
    ) -> Path:
        """Run `nnUNetv2_predict` with one fold."""
        args = ("-i", images, "-o", output, "-d", self.dataset, "-c", configuration, "-tr", trainer, "-p", self.plans)
        self.run(
            "nnUNetv2_predict", *args, "-f", str(fold), "-device", self.device, "-npp", "2", "-nps", "2", **environment
        )
        return output


@dataclass(frozen=True)
class OwnExperiment(Experiment):
    """A dataset in the user's own folders, as nnU-Net's environment variables name them; `work` only gets log.txt."""

    @classmethod
    def of(cls, dataset: str, plans: str, device: str) -> OwnExperiment:
        """With its log next to the dataset's results."""
        from fsefs_nnunet.cases.folders import folder_of  # imports nnU-Net, which `fseft env` does not need

        work = folder_of("nnUNet_results") / dataset
        work.mkdir(parents=True, exist_ok=True)
        return cls(work, dataset, plans, device)

    @property
    def folders(self) -> dict[str, Path]:
        return {name: Path(os.environ[name]) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}

    def environment(self) -> dict[str, str]:
        chosen = {name: os.environ[name] for name in ("nnUNet_def_n_proc",) if name in os.environ}
        return {**super().environment(), **chosen}
