"""Kills nnUNetv2_train at random moments and continues it: the adapter must be the uninterrupted run's, bit by bit.

    python benchmarks/kill_and_resume.py --work /data/kills

A phantom dataset, a 5-shot training of 100 short epochs. Kills fall in turn while the bank is filled, between the first
checkpoint and the last, while a checkpoint is written and in the final validation; within each of these at a moment
drawn over the time that the uninterrupted training spent in it. Runs that are done are not done again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from time import monotonic, sleep

import torch

from fsefs_nnunet.backbones.checkpoints import read_checkpoint
from fsefs_nnunet.nnunet.experiment import Experiment
from fsefs_nnunet.synthetic.datasets import write_demo_dataset

DATASET = "Dataset045_PhantomKills"
CONFIGURATION = "3d_fullres_5shot"
BANK = "fseft_features"


@dataclass(frozen=True)
class Run:
    """One training with preprocessed data and results of its own, so that its bank is empty at the start."""

    experiment: Experiment

    @classmethod
    def copy_of(cls, prepared: Experiment, work: Path) -> Run:
        if not work.exists():
            shutil.copytree(prepared.preprocessed, work / "nnUNet_preprocessed" / DATASET)
            shutil.copytree(prepared.raw, work / "nnUNet_raw" / DATASET)
        return cls(Experiment(work, DATASET, device=prepared.device))

    @property
    def fold(self) -> Path:
        return self.experiment.model("FSEFTTrainer", CONFIGURATION) / "fold_0"

    def start(self, *arguments: str) -> subprocess.Popen:
        command = [Path(sys.executable).parent / "nnUNetv2_train", DATASET, CONFIGURATION, "0", "-tr", "FSEFTTrainer"]
        env = {**self.experiment.environment(), "nnUNet_n_proc_DA": "0"}
        with open(self.experiment.work / "log.txt", "a") as log:
            options = ["-p", "FSEFTPlans", "-device", self.experiment.device, *arguments]
            return subprocess.Popen([*command, *options], env=env, stdout=log, stderr=subprocess.STDOUT)

    def adapter(self) -> dict[str, torch.Tensor]:
        return read_checkpoint(self.fold / "checkpoint_final.pth")["network_weights"]

    def done(self) -> bool:
        return (self.fold / "validation" / "summary.json").exists()


def bank_begun(run: Run) -> bool:
    return any((run.experiment.preprocessed / BANK).glob("*/*"))


def epochs_begun(run: Run) -> bool:
    return (run.fold / "checkpoint_latest.pth").exists()


def writing(run: Run) -> bool:
    return any(run.fold.glob("*.part"))


def training_ended(run: Run) -> bool:
    return (run.fold / "checkpoint_final.pth").exists()


# what has happened when a stage begins; writing is waited for once its moment of the training has come
STAGES = {"bank": bank_begun, "training": epochs_begun, "writing": epochs_begun, "validation": training_ended}
ENDS = {"bank": epochs_begun, "training": training_ended, "writing": training_ended, "validation": Run.done}


def wait_for(happened: Callable[[Run], bool], run: Run, process: subprocess.Popen) -> None:
    while not happened(run) and process.poll() is None:
        sleep(0.001)


def finish(run: Run, *arguments: str) -> dict[str, float]:
    """Train to the end; returns the seconds of each stage. Raises RuntimeError with the log's name if it fails."""
    process, times = run.start(*arguments), {}
    for happened in (bank_begun, epochs_begun, training_ended, Run.done):
        wait_for(happened, run, process)
        times[happened] = monotonic()
    if process.wait():
        raise RuntimeError(f"The training failed, see {run.experiment.work / 'log.txt'}.")
    return {stage: times[ENDS[stage]] - times[begun] for stage, begun in STAGES.items()}


def kill_and_resume(run: Run, stage: str, after: float) -> None:
    """Kill a fresh training `after` seconds in `stage`, while it writes for "writing", and continue it to the end."""
    process = run.start()
    wait_for(STAGES[stage], run, process)
    sleep(after)
    if stage == "writing":
        wait_for(writing, run, process)
    process.kill()
    process.wait()
    finish(run, "--c")


def prepare(experiment: Experiment) -> None:
    if not (experiment.raw / "dataset.json").exists():
        write_demo_dataset(experiment.raw, 8)
    if not (experiment.preprocessed / "FSEFTPlans_3d_fullres").exists():
        experiment.run("fseft", "plan_and_preprocess", "-d", DATASET, "--shots", "5", "-np", "2")
        file = experiment.preprocessed / "FSEFTPlans.json"
        plans = json.loads(file.read_text())
        short = dict(fseft_steps_per_epoch=1, fseft_views=1, fseft_crop_size=[16, 16, 16])
        plans["configurations"][CONFIGURATION].update(short)
        file.write_text(json.dumps(plans))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    prepared = Experiment(work, DATASET, device=args.device)
    prepare(prepared)
    whole = Run.copy_of(prepared, work / "whole")
    seconds_file = work / "seconds.json"
    if not whole.done():
        seconds_file.write_text(json.dumps(finish(whole)))
    seconds, expected = json.loads(seconds_file.read_text()), whole.adapter()
    print(f"Seconds of the uninterrupted training: {seconds}", flush=True)
    rng, same = random.Random(args.seed), 0
    for i, stage in zip(range(args.kills), cycle(STAGES)):
        after = rng.uniform(0, seconds[stage])
        run = Run.copy_of(prepared, work / f"kill_{i:02d}")
        if not run.done():
            kill_and_resume(run, stage, after)
        equal = all(torch.equal(tensor, expected[name]) for name, tensor in run.adapter().items())
        same += equal
        print(f"{stage}, killed after {after:.1f} s: {'bit-identical' if equal else 'DIFFERENT'}", flush=True)
    print(f"{same} of {args.kills}")


if __name__ == "__main__":
    main()
