"""What the commands of an installed version cost in CPU seconds, wall time and memory, and the Dice that they reach.

    FSEFT_SHARED=FOLDER python benchmarks/engine.py ROW --work /data/engine
    FSEFT_SHARED=FOLDER python benchmarks/engine.py ROW --work /data/engine_old --bin /data/old_environment/bin

The first measures the version that this Python has, the second another one; phantoms are always those of this Python.
FOLDER is that of `real_data.py`; no label of a test case is read. ROW is one of

features     a bank of one volume: the share of its CPU time that is not spent in the backbone's layers
chaos_bank   the bank of five shots and the queries: CPU seconds, GB, and the backbone's layers alone
hippocampus, chaos, openkbp
             five shots from the command to the checkpoint, with an empty bank; Dice of the labelled queries
together     three methods, --draws draws of five hippocampi, without validation and from an empty bank: CPU seconds of
             one `fseft train` or, with --single, of single commands
large        a CT of 512 x 512 x 400 voxels: peak memory of planning, training and prediction
cost         CPU seconds and memory against volume, folds, shots and methods, with two plots

Commands run on one core. CPU seconds are user and system time of a command and all that it starts; memory is the sum
of the proportional set sizes of its processes, looked at five times a second. It counts pages of mapped
files, those of the bank above all, which the system can reclaim at any time; `peak_without_files_gb` does not.
GB are 10^9 bytes. A convolution of fixed size runs before and after each command: where its time differs by more than a
fifth, the figure is marked `discard`. Results are appended to --results. What a row leaves in its folder below --work
is removed when the row is measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from threading import Event, Thread
from time import monotonic, process_time

from real_data import REAL, RealData, make_raw

PLANS, FIVE = "FSEFTPlans", "3d_fullres_5shot"
TRAINER = "FSEFTTrainer"
METHODS = {
    "linear probe": "FSEFTTrainer_LinearProbe",
    "adapter": "FSEFTTrainer_Adapter",
    "with prior": TRAINER,
    "context": "FSEFTTrainer_Context",
}
BANK = "fseft_features"
SAMPLE_SECONDS = 0.2
REFERENCE_RUNS, MOST_DRIFT = 15, 0.2  # about three seconds
FEATURES_SHAPE = (244, 202, 224)
PHANTOM_CLASSES = {"liver": (1, 2), "kidneys": (4, 5), "aorta": (6,)}


@dataclass(frozen=True)
class Source:
    """A real dataset, and the trainer and draws that it is measured by."""

    data: RealData
    trainer: str = TRAINER
    folds: tuple[int, ...] = (0,)


SOURCES = {
    "hippocampus": Source(REAL["hippocampus"], folds=(0, 1)),
    "chaos": Source(REAL["chaos"], "FSEFTTrainer_Context"),
    "openkbp": Source(REAL["openkbp"], "FSEFTTrainer_Context"),
}


def reference_seconds() -> float:
    """CPU seconds of a convolution of fixed size: how fast the machine is now."""
    import torch

    torch.set_num_threads(1)
    image, weights = torch.ones(1, 32, 64, 64, 64), torch.ones(32, 32, 3, 3, 3)
    with torch.no_grad():
        torch.nn.functional.conv3d(image, weights, padding=1)
        start = process_time()
        for _ in range(REFERENCE_RUNS):
            torch.nn.functional.conv3d(image, weights, padding=1)
    return process_time() - start


def memory_gb(session: int) -> tuple[float, float]:
    """Sum of the proportional set sizes of all processes of a session, and what of it are no pages of files."""
    kilobytes = {"Pss": 0, "Pss_File": 0}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it may have ended
            if os.getsid(int(name)) == session:
                rollup = Path("/proc", name, "smaps_rollup").read_text()
                for key, found in re.findall(r"^(Pss|Pss_File):\s+(\d+)", rollup, re.MULTILINE):
                    kilobytes[key] += int(found)
    return kilobytes["Pss"] * 1024 / 1e9, (kilobytes["Pss"] - kilobytes["Pss_File"]) * 1024 / 1e9


class MemoryWatch(Thread):
    """Samples the memory of a session, and kills it if it takes more than `cap_gb`."""

    def __init__(self, session: int, cap_gb: float, cores: set[int]):
        super().__init__(daemon=True)
        self.session, self.cap_gb, self.cores = session, cap_gb, cores
        self.peak_gb, self.peak_without_files_gb, self.ended = 0.0, 0.0, Event()

    def run(self) -> None:
        os.sched_setaffinity(0, self.cores)  # this thread alone: not the core of the command
        while not self.ended.wait(SAMPLE_SECONDS):
            everything, without_files = memory_gb(self.session)
            self.peak_gb = max(self.peak_gb, everything)
            self.peak_without_files_gb = max(self.peak_without_files_gb, without_files)
            if self.peak_gb > self.cap_gb:
                kill(self.session)
                return


def kill(session: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)


@dataclass
class Version:
    """The programs of one installed version, with nnU-Net's folders below `work`.

    commands: what was measured, in order.
    """

    bin: Path
    work: Path
    core: int
    cap_gb: float
    commands: list[dict] = field(default_factory=list)

    @cached_property
    def name(self) -> dict[str, str]:
        """Version of the package, and commit of its checkout if it has one."""
        code = "import fsefs_nnunet as f; print(f.__version__, f.__file__)"
        output = subprocess.run([self.bin / "python", "-c", code], cwd=self.work, check=True, capture_output=True)
        version, file = output.stdout.decode().split(maxsplit=1)
        git = ["git", "-C", Path(file.strip()).parent, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True)
        return {"version": version, "commit": commit.stdout.decode().strip() if not commit.returncode else version}

    @cached_property
    def environment(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("fseft_")}
        own |= {name: str(self.work / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            Path(own[name]).mkdir(parents=True, exist_ok=True)
        # nnU-Net's training asks for as many threads as there are cores; those that wait on the one must not spin
        own |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "nnUNet_def_n_proc": "1"}
        # programs that a command starts are those of this version, too
        own["PATH"] = os.pathsep.join([str(self.bin), own["PATH"]])
        shell = subprocess.run([self.bin / "fseft", "env"], env=own, check=True, capture_output=True).stdout.decode()
        return own | dict(word.split("=", 1) for word in shlex.split(shell) if "=" in word)

    def path(self, *parts: str) -> Path:
        return self.work.joinpath(*parts)

    def run(self, command: str, *arguments: object, **environment: str) -> None:
        """Run a program without measuring it. Raises SystemExit if it fails."""
        self._finish(*self._start(command, arguments, environment))

    def measure(self, command: str, *arguments: object, **environment: str) -> dict:
        """Run a program; its figures, None where it took more memory than allowed. Raises SystemExit if it fails."""
        before = reference_seconds()
        process, line = self._start(command, arguments, {"nnUNet_n_proc_DA": "0", **environment})
        watch = MemoryWatch(process.pid, self.cap_gb, set(range(os.cpu_count())) - {self.core} or {self.core})
        start = monotonic()
        watch.start()
        try:
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            seconds = monotonic() - start
            watch.ended.set()
            watch.join()
            if process.returncode is None:
                kill(process.pid)
        over = watch.peak_gb > watch.cap_gb
        if not over:
            self._finish(process, line)
        after = reference_seconds()
        figures = {
            "command": line,
            "cpu_seconds": None if over else round(used.ru_utime + used.ru_stime, 2),
            "wall_seconds": None if over else round(seconds, 2),
            "peak_gb": f"over {self.cap_gb:g}" if over else round(watch.peak_gb, 3),
            "peak_without_files_gb": round(watch.peak_without_files_gb, 3),
            "reference_seconds": [round(before, 3), round(after, 3)],
            "discard": abs(after - before) > MOST_DRIFT * before,
        }
        self.commands.append(figures)
        print(json.dumps(figures), flush=True)
        return figures

    def _start(self, command: str, arguments: Sequence[object], environment: dict) -> tuple[subprocess.Popen, str]:
        words = [command, *map(str, arguments)]
        line = shlex.join(words)
        print(f"$ {line}", flush=True)
        with open(self.path("log.txt"), "a") as log:
            log.write(f"\n$ {line}\n")
            log.flush()
            process = subprocess.Popen(
                [self.bin / words[0], *words[1:]],
                cwd=self.work,
                env=self.environment | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return process, line

    def _finish(self, process: subprocess.Popen, line: str) -> None:
        try:
            code = process.wait()
        except BaseException:
            kill(process.pid)
            raise
        if code:
            tail = self.path("log.txt").read_text(errors="replace").splitlines()[-15:]
            sys.exit("\n".join([f"`{line}` failed ({code}); {self.path('log.txt')} ends with:", *tail]))


@dataclass(frozen=True)
class Dataset:
    """A dataset of one version, with plans for the embedded backbone."""

    version: Version
    name: str

    @property
    def raw(self) -> Path:
        return self.version.path("nnUNet_raw", self.name)

    @property
    def preprocessed(self) -> Path:
        return self.version.path("nnUNet_preprocessed", self.name)

    def fold(self, trainer: str, configuration: str, fold: int = 0) -> Path:
        return self.version.path("nnUNet_results", self.name, f"{trainer}__{PLANS}__{configuration}", f"fold_{fold}")

    def planning(self, queries: int, spacing: Sequence[float] = (), shots: Sequence[int] = (1, 5)) -> list:
        """Arguments of `fseft`."""
        target = ["-overwrite_target_spacing", *spacing] if spacing else []
        drawn = ["--num_queries", queries, "--shots", *shots]
        return ["plan_and_preprocess", "-d", self.name, "-b", "phantom", "-np", 1, *drawn, *target]

    def training(self, trainer: str, configuration: str, fold: int = 0) -> list:
        """Arguments of `nnUNetv2_train`."""
        return [self.name, configuration, fold, "-tr", trainer, "-p", PLANS, "-device", "cpu"]

    def prediction(self, images: Path, output: Path, configuration: str, folds: Sequence[int] = (0,)) -> list:
        """Arguments of `fseft predict` and `nnUNetv2_predict`."""
        model = ["-d", self.name, "-c", configuration, "-tr", TRAINER, "-p", PLANS, "-f", *folds, "-device", "cpu"]
        return ["-i", images, "-o", output, *model]

    def shorten(self, configuration: str, epochs: int) -> None:
        """Train for `epochs`, or, where plans cannot say so, for one step an epoch and without steps on queries."""
        file = self.preprocessed / f"{PLANS}.json"
        plans = json.loads(file.read_text("utf-8"))
        settings = plans["configurations"][configuration]
        if "fseft_epochs" in settings:
            settings["fseft_epochs"] = epochs
        else:
            settings |= {"fseft_steps_per_epoch": 1, "fseft_prior_from_epoch": 100}
        file.write_text(json.dumps(plans, indent=4), "utf-8")

    def empty_bank(self) -> None:
        shutil.rmtree(self.preprocessed / BANK, ignore_errors=True)

    def bank_gb(self) -> float:
        return sum(file.stat().st_size for file in (self.preprocessed / BANK).rglob("*") if file.is_file()) / 1e9

    def dice(self, trainer: str, configuration: str, fold: int) -> dict[str, float]:
        """Of the labelled queries, by class and their mean."""
        file = self.fold(trainer, configuration, fold) / "validation" / "summary.json"
        summary = json.loads(file.read_text("utf-8"))
        labels = json.loads((self.raw / "dataset.json").read_text("utf-8"))["labels"]
        of_class = {n: round(summary["mean"][str(v)]["Dice"], 4) for n, v in labels.items() if n != "background"}
        return {"mean": round(summary["foreground_mean"]["Dice"], 4), **of_class}


def stage_seconds(fold: Path) -> dict[str, float]:
    """Wall time of the stages of a training, where the version notes it."""
    file = fold / "fseft_run.json"
    return json.loads(file.read_text("utf-8"))["seconds"] if file.exists() else {}


def dataset_of(version: Version, source: Source) -> Dataset:
    """The raw dataset, without the labels of its test cases."""
    made = Dataset(version, source.data.dataset)
    make_raw(source.data, made.raw, version.path("."), version.run)
    return made


def phantoms(version: Version, name: str, shape: Sequence[int], spacing: Sequence[float], cases: int) -> Dataset:
    """A dataset of CTs of `shape` (X, Y, Z): phantoms of half or a quarter as many voxels per axis, enlarged."""
    import nibabel as nib
    import numpy as np
    from scipy.ndimage import zoom

    from fsefs_nnunet.synthetic.phantom import PhantomConfig, make_phantom

    made, factor = Dataset(version, name), 2 if max(shape) <= 256 else 4
    config = PhantomConfig(tuple(n // factor for n in shape), tuple(factor * mm for mm in spacing))
    numbers = np.zeros(256, np.uint8)
    for number, parts in enumerate(PHANTOM_CLASSES.values(), 1):
        numbers[list(parts)] = number
    for folder in ("imagesTr", "labelsTr"):
        (made.raw / folder).mkdir(parents=True)
    for i in range(cases):
        phantom, affine = make_phantom((7, i), config), np.diag([*spacing, 1.0])
        image = zoom(phantom.image, factor, order=1, mode="nearest", grid_mode=True).round().astype(np.int16)
        labels = numbers[phantom.labels].repeat(factor, 0).repeat(factor, 1).repeat(factor, 2)
        nib.save(nib.Nifti1Image(image, affine), made.raw / "imagesTr" / f"case_{i:02d}_0000.nii.gz")
        nib.save(nib.Nifti1Image(labels, affine), made.raw / "labelsTr" / f"case_{i:02d}.nii.gz")
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **{name: i for i, name in enumerate(PHANTOM_CLASSES, 1)}},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (made.raw / "dataset.json").write_text(json.dumps(content), "utf-8")
    return made


def one_image(dataset: Dataset) -> Path:
    """A folder with the image of the last case."""
    folder = dataset.version.path(f"image_of_{dataset.name}")
    folder.mkdir()
    shutil.copy(max((dataset.raw / "imagesTr").iterdir()), folder)
    return folder


# ---- rows: (version, arguments) -> figures ----


def features(version: Version, args: argparse.Namespace) -> dict:
    shape = args.shape or FEATURES_SHAPE
    out = version.path("features.json")
    clock = Path(__file__).with_name("backbone_clock.py").resolve()
    measured = version.measure("python", clock, "features", out, *shape)
    if measured["cpu_seconds"] is None:
        return {"shape": shape}
    found = json.loads(out.read_text("utf-8"))
    outside = found["cpu_seconds"] - found["backbone_cpu_seconds"]
    voxels = [shape[0] * shape[1] * shape[2], FEATURES_SHAPE[0] * FEATURES_SHAPE[1] * FEATURES_SHAPE[2]]
    return {
        "shape": shape,
        **{name: round(seconds, 2) for name, seconds in found.items()},
        "outside_share_of_backbone": round(outside / found["backbone_cpu_seconds"], 4),
        "outside_share_of_all": round(outside / found["cpu_seconds"], 4),
        "outside_forward_share_of_all": round(1 - found["backbone_forward_cpu_seconds"] / found["cpu_seconds"], 4),
        # in proportion to voxels, an estimate for the full volume if this one is smaller
        "cpu_seconds_scaled_to_full": round(found["cpu_seconds"] * voxels[1] / voxels[0], 1),
    }


def chaos_bank(version: Version, args: argparse.Namespace) -> dict:
    source = SOURCES["chaos"]
    dataset = dataset_of(version, source)
    version.run("fseft", *dataset.planning(source.data.queries, args.spacing))
    dataset.shorten(FIVE, 1)
    out, clock = version.path("clock.json"), Path(__file__).with_name("backbone_clock.py").resolve()
    command = ["python", clock, "train", out, *dataset.training(source.trainer, FIVE)]
    filling = version.measure(*command, fseft_final_validation="0")
    if filling["cpu_seconds"] is None:
        return {}
    stages, layers = stage_seconds(dataset.fold(source.trainer, FIVE)), json.loads(out.read_text("utf-8"))
    full = version.measure(*command, fseft_final_validation="0")
    return {
        "bank_cpu_seconds": round(filling["cpu_seconds"] - full["cpu_seconds"], 1),
        **{name: round(seconds, 1) for name, seconds in layers.items()},
        "bank_gb": round(dataset.bank_gb(), 3),
        "peak_gb": filling["peak_gb"],
        "stage_wall_seconds": stages,
    }


def training(name: str) -> Callable[[Version, argparse.Namespace], dict]:
    """The row of a dataset: the cost of five shots, Dice of one and five."""

    def row(version: Version, args: argparse.Namespace) -> dict:
        source, figures = SOURCES[name], {}
        dataset = dataset_of(version, source)
        version.run("fseft", *dataset.planning(source.data.queries, args.spacing))
        if "cost" in args.parts:
            measured = version.measure(
                "nnUNetv2_train", *dataset.training(source.trainer, FIVE), fseft_final_validation="0"
            )
            if measured["cpu_seconds"] is None:
                return {"peak_gb": measured["peak_gb"]}
            figures = {key: measured[key] for key in ("cpu_seconds", "wall_seconds", "peak_gb")}
            figures |= {"bank_gb": round(dataset.bank_gb(), 3)}
            figures |= {"stage_wall_seconds": stage_seconds(dataset.fold(source.trainer, FIVE))}
        if "dice" in args.parts:
            figures["dice"] = {}
            for shots in (5, 1):
                for fold in source.folds:
                    configuration = f"3d_fullres_{shots}shot"
                    done = dataset.fold(source.trainer, configuration, fold) / "checkpoint_final.pth"
                    only = ["--val"] if done.exists() else []
                    command = [*dataset.training(source.trainer, configuration, fold), *only]
                    version.run("nnUNetv2_train", *command, nnUNet_n_proc_DA="0")
                    found = dataset.dice(source.trainer, configuration, fold)
                    figures["dice"][f"{shots} shots, fold {fold}"] = found
                    print(json.dumps({f"dice, {shots} shots, fold {fold}": found}), flush=True)
        return figures

    return row


def together(version: Version, args: argparse.Namespace) -> dict:
    source, trainers = SOURCES["hippocampus"], [METHODS[name] for name in ("adapter", "with prior", "context")]
    dataset = dataset_of(version, source)
    version.run("fseft", *dataset.planning(source.data.queries, args.spacing))
    if args.single:
        commands = [["nnUNetv2_train", *dataset.training(t, FIVE, f)] for f in range(args.draws) for t in trainers]
    else:
        grid = ["--shots", 5, "-f", *range(args.draws), "-tr", *trainers]
        commands = [["fseft", "train", "-d", dataset.name, "-p", PLANS, "-device", "cpu", *grid]]
    measured = [version.measure(*command, fseft_final_validation="0") for command in commands]
    seconds = [one["cpu_seconds"] for one in measured]
    return {"draws": args.draws, "cpu_seconds": round(sum(seconds), 1), "of_each_command": seconds}


def large(version: Version, args: argparse.Namespace) -> dict:
    dataset = phantoms(version, "Dataset030_Large", args.shape or (512, 512, 400), (0.8, 0.8, 1.0), 4)
    two, image = "3d_fullres_2shot", one_image(dataset)
    peaks = {"plan": version.measure("fseft", *dataset.planning(2, args.spacing, [2]))["peak_gb"]}
    if isinstance(peaks["plan"], str):
        return {"peak_gb": peaks}
    dataset.shorten(two, 3)
    trained = version.measure("nnUNetv2_train", *dataset.training(TRAINER, two), fseft_final_validation="0")
    peaks["train"] = trained["peak_gb"]
    if trained["cpu_seconds"] is not None:
        ours, stock = ["fseft", "predict"], ["nnUNetv2_predict"]
        for way, command, more in (("fseft predict", ours, []), ("nnUNetv2_predict", stock, ["-npp", 1, "-nps", 1])):
            arguments = dataset.prediction(image, version.path(command[0]), two)
            peaks[way] = version.measure(*command, *arguments, *more)["peak_gb"]
    return {"peak_gb": peaks, "bank_gb": round(dataset.bank_gb(), 3)}


def cost_by_volume(version: Version, sizes: Sequence[int]) -> dict[str, dict]:
    """Of a training of one epoch with an empty bank, and of one prediction, for cubes of 2 mm voxels."""
    found, two = {"training, one epoch": {}, "fseft predict": {}}, "3d_fullres_2shot"
    for i, size in enumerate(sizes):
        dataset = phantoms(version, f"Dataset{40 + i:03d}_Cube{size}", (size,) * 3, (2.0,) * 3, 4)
        image = one_image(dataset)
        version.run("fseft", *dataset.planning(2, (2.0,) * 3, [2]))
        dataset.shorten(two, 1)
        trained = version.measure("nnUNetv2_train", *dataset.training(TRAINER, two), fseft_final_validation="0")
        found["training, one epoch"][size] = trained
        if trained["cpu_seconds"] is None:
            break  # no larger one fits either
        predicted = dataset.prediction(image, version.path(f"predicted_{size}"), two)
        found["fseft predict"][size] = version.measure("fseft", "predict", *predicted)
    return found


def cost_by_choice(version: Version) -> dict[str, dict]:
    """Of predictions by folds, and of trainings by shots, from an empty bank, and by methods, from a full one."""
    found = {"folds of fseft predict": {}, "shots, empty bank": {}, "method, 5 shots, full bank": {}}
    dataset = phantoms(version, "Dataset050_Choices", (64,) * 3, (4.0,) * 3, 14)
    image = one_image(dataset)
    version.run("fseft", *dataset.planning(2, shots=[1, 5, 10]))
    for shots in (1, 10, 5):
        dataset.empty_bank()
        arguments = dataset.training(TRAINER, f"3d_fullres_{shots}shot")
        found["shots, empty bank"][shots] = version.measure("nnUNetv2_train", *arguments, fseft_final_validation="0")
    for method, trainer in METHODS.items():
        arguments = dataset.training(trainer, FIVE)
        measured = version.measure("nnUNetv2_train", *arguments, fseft_final_validation="0")
        found["method, 5 shots, full bank"][method] = measured
    dataset.shorten(FIVE, 1)
    for fold in range(1, 5):
        arguments = dataset.training(TRAINER, FIVE, fold)
        version.run("nnUNetv2_train", *arguments, fseft_final_validation="0", nnUNet_n_proc_DA="0")
    for folds in (1, 2, 3, 5):
        arguments = dataset.prediction(image, version.path(f"folds_{folds}"), FIVE, range(folds))
        found["folds of fseft predict"][folds] = version.measure("fseft", "predict", *arguments)
    found["shots, empty bank"] = dict(sorted(found["shots, empty bank"].items()))
    return found


def draw(groups: dict[str, dict], file: Path, by_volume: bool) -> None:
    """CPU seconds above, memory below: lines over voxels for volumes, bars for what can be chosen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(2, 1 if by_volume else len(groups), sharex="col", sharey="row", squeeze=False)
    for row, (key, label) in zip(panels, (("cpu_seconds", "CPU seconds"), ("peak_gb", "peak memory, GB"))):
        row[0].set_ylabel(label)
        for i, (name, of_group) in enumerate(groups.items()):
            known = {
                x: figures[key] for x, figures in of_group.items() if not isinstance(figures[key], (str, type(None)))
            }
            if by_volume:
                row[0].plot([x**3 / 1e6 for x in known], list(known.values()), "o-", label=name)
            else:
                row[i].bar([str(x) for x in known], list(known.values()))
        for axes in row:
            axes.set_ylim(bottom=0)
            axes.grid(axis="y", alpha=0.3)
    if by_volume:
        panels[0, 0].legend()
        panels[1, 0].set_xlabel("million voxels")
    else:
        for axes, name in zip(panels[1], groups):
            axes.set_xlabel(name)
    figure.savefig(file, dpi=120)


def cost(version: Version, args: argparse.Namespace) -> dict:
    by_volume, by_choice = cost_by_volume(version, args.sizes), cost_by_choice(version)
    draw(by_volume, version.path("volume.png"), by_volume=True)
    draw(by_choice, version.path("choices.png"), by_volume=False)
    kept = ("cpu_seconds", "peak_gb", "discard")
    return {
        group: {str(x): {key: figures[key] for key in kept} for x, figures in of_group.items()}
        for group, of_group in {**by_volume, **by_choice}.items()
    }


ROWS: dict[str, Callable[[Version, argparse.Namespace], dict]] = {
    "features": features,
    "chaos_bank": chaos_bank,
    **{name: training(name) for name in SOURCES},
    "together": together,
    "large": large,
    "cost": cost,
}


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=ROWS)
    here = Path(sys.executable).parent
    parser.add_argument("--bin", type=Path, default=here, help="folder of the version's programs; default: this one's")
    parser.add_argument("--work", type=Path, default=Path("engine"), help="default: engine")
    parser.add_argument("--results", type=Path, help="JSON list to append to; default: WORK/results.json")
    parser.add_argument("--spacing", type=float, nargs=3, default=[], metavar="MM", help="-overwrite_target_spacing")
    parser.add_argument("--parts", nargs="+", choices=("cost", "dice"), default=["cost", "dice"], help="of a dataset")
    parser.add_argument("--shape", type=int, nargs=3, metavar="N", help="of the volume of features or large")
    parser.add_argument("--draws", type=int, default=5, help="of together")
    parser.add_argument("--single", action="store_true", help="together by single commands")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128, 192, 256], help="of the cubes of cost")
    parser.add_argument("--core", type=int, default=cores[-1], help=f"default: {cores[-1]}")
    parser.add_argument("--cap_gb", type=float, default=16, help="a command that takes more is killed; default: 16")
    args = parser.parse_args()
    name = "_".join([args.row, *(f"{mm:g}" for mm in args.spacing)])
    work = args.work.resolve() / name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    os.sched_setaffinity(0, {args.core})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    version = Version(args.bin.absolute(), work, args.core, args.cap_gb)
    result = {"row": name, **version.name, "date": f"{datetime.now():%Y-%m-%d %H:%M}"}
    result |= {"figures": ROWS[args.row](version, args), "commands": version.commands}
    result["discard"] = any(figures["discard"] for figures in version.commands)
    file = args.results or work.parent / "results.json"
    results = json.loads(file.read_text("utf-8")) if file.exists() else []
    file.write_text(json.dumps([*results, result], indent=1), "utf-8")
    print(json.dumps(result["figures"], indent=1))


if __name__ == "__main__":
    main()
