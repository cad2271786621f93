"""What a GPU, or with `--small` a CPU, makes of the project: the GPU rows of documentation/benchmarks.md.

    FSEFT_SHARED=FOLDER python benchmarks/gpu.py --work /data/gpu
    FSEFT_SHARED=FOLDER python benchmarks/gpu.py --work /data/gpu --device cpu --small

FOLDER/data holds Task04_Hippocampus and OpenKBP; labels of test cases are not read. Rows, in this order:

tests        pytest -m device
features     244 x 202 x 224 voxels through Swin UNETR and SuPreM's U-Net by their layouts, into the layout's boxes,
             without a disk; and their windows alone
hippocampus  five shots from the command to the checkpoint, without the final validation
together     three methods, five draws, in one process
predict      80 hippocampi through `fseft predict`, each adapted to
large        512 x 512 x 400 voxels: seconds of `fseft predict` in reading, backbone, export and all else
published    a step of the published recipe, six windows of 96^3 through backbone and adapter, times 1,000, against the
             bank and the training of five cases of OpenKBP

Each row runs in a process of its own, for at most --seconds, and appends a line of JSON to --work/gpu.jsonl; one that
fails does not stop the others. `--small` takes two minutes on two cores and shows that the rows work, no more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import nibabel as nib
import numpy as np
import torch

from fsefs_nnunet.backbones.architectures import build_architecture
from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.backbones.store import find_backbone, save_backbone
from fsefs_nnunet.backbones.zoo import ZOO
from fsefs_nnunet.device import device_named, reduced_precision
from fsefs_nnunet.files import read_json
from fsefs_nnunet.methods.network import AdaptedNetwork
from fsefs_nnunet.methods.run_file import RunFile
from fsefs_nnunet.nnunet.experiment import Experiment

ROOT = Path(__file__).parents[1]
PUBLIC = {"fseft": "Swin UNETR", "suprem_unet": "SuPreM's U-Net"}
METHODS = ("FSEFTTrainer_Adapter", "FSEFTTrainer", "FSEFTTrainer_Context")
WITHOUT_VALIDATION = {"fseft_final_validation": "0"}
PUBLISHED_STEPS, PATCHES, WINDOW = 1000, 6, 96


@dataclass(frozen=True)
class Setup:
    work: Path
    device: torch.device
    small: bool

    def experiment(self, dataset: str, plans: str = "FSEFTPlans") -> Experiment:
        return Experiment(self.work, dataset, plans, self.device.type)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, function: Callable[[], object]) -> float:
        self.wait()
        start = perf_counter()
        function()
        self.wait()
        return perf_counter() - start


# ---- data ----


def copy_dataset(source: Path, experiment: Experiment, cases: int) -> None:
    """The first `cases` training cases in nnU-Net's layout; written here, since converters need SimpleITK."""
    if (experiment.raw / "dataset.json").exists():
        return
    content = read_json(source / "dataset.json")
    decathlon = "modality" in content
    for folder in ("imagesTr", "labelsTr"):
        (experiment.raw / folder).mkdir(parents=True)
        for file in [f for f in sorted((source / folder).iterdir()) if not f.name.startswith(".")][:cases]:
            case = file.name.removesuffix(".nii.gz")
            name = f"{case}_0000.nii.gz" if decathlon and folder == "imagesTr" else file.name
            (experiment.raw / folder / name).write_bytes(file.read_bytes())
    if decathlon:
        content = {
            "channel_names": content["modality"],
            "labels": {name: int(value) for value, name in content["labels"].items()},
            "file_ending": ".nii.gz",
        }
    number = len(list((experiment.raw / "labelsTr").iterdir()))
    (experiment.raw / "dataset.json").write_text(json.dumps({**content, "numTraining": number}))


def hippocampus(setup: Setup) -> Experiment:
    """Planned with 40 labelled queries."""
    experiment = setup.experiment("Dataset004_Hippocampus")
    source = Path(os.environ["FSEFT_SHARED"]) / "data" / "Task04_Hippocampus"
    copy_dataset(source, experiment, 14 if setup.small else 200)
    if not list(experiment.preprocessed.glob("FSEFTPlans_3d_fullres")):
        queries = "4" if setup.small else "40"
        options = ("-np", "2" if setup.small else "12", "--num_queries", queries, "--shots", "5")
        experiment.run("fseft", "plan_and_preprocess", "-d", experiment.dataset, *options)
        if setup.small:
            shorten(experiment)
    return experiment


def shorten(experiment: Experiment) -> None:
    """Trainings of three epochs."""
    file = experiment.preprocessed / f"{experiment.plans}.json"
    plans = read_json(file)
    plans["configurations"]["3d_fullres_5shot"] |= {"fseft_epochs": 3, "fseft_views": 5, "fseft_prior_from_epoch": 1}
    file.write_text(json.dumps(plans))


def public_backbone(setup: Setup, backbone_id: str) -> str:
    """By its layout, with random weights; returns its id."""
    folder = setup.work / "backbones"
    os.environ["fseft_backbones"] = str(folder)
    if not (folder / f"{backbone_id}.json").exists():
        torch.manual_seed(0)
        contract = ZOO[backbone_id].contract({})
        save_backbone(contract, build_architecture(contract, "last").backbone_state(), folder)
    return backbone_id


# ---- rows ----


def tests(setup: Setup) -> dict:
    if setup.device.type != "cuda":
        return {"skipped": "no GPU"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "device", "-p", "no:cacheprovider", "."]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
    return {"exit code": done.returncode, "end": done.stdout.splitlines()[-8:]}


def features(setup: Setup) -> dict:
    from fsefs_nnunet.features.layout import whole_layout
    from fsefs_nnunet.features.packing import Boxes, Packing, Sums
    from fsefs_nnunet.features.tiling import Tiling
    from fsefs_nnunet.features.windows import run_windows

    shape, window = ((96, 64, 64), 64) if setup.small else ((244, 202, 224), WINDOW)
    image, found = torch.rand((1, *shape), generator=torch.Generator().manual_seed(0)), {}
    for backbone_id, name in PUBLIC.items():
        backbone = FrozenBackbone(public_backbone(setup, backbone_id), "last").to(setup.device)
        tiling = Tiling.of(shape, (window,) * 3, backbone.maps)
        packing = Packing(whole_layout(shape), tiling)

        def run() -> None:
            boxes, sums = Boxes(packing, np.empty(packing.size, np.float16)), Sums(tiling)  # noqa: B023
            for slab in run_windows(backbone, image, tiling, setup.device):  # noqa: B023
                boxes.add(slab), sums.add(slab)

        def windows_alone() -> None:
            batch = torch.zeros((1 if setup.small else 4, 1, *tiling.window), device=setup.device)  # noqa: B023
            with reduced_precision(setup.device):
                for _ in range(-(-tiling.num_windows // len(batch))):  # noqa: B023
                    backbone(batch)  # noqa: B023

        first = setup.seconds(run)
        found[name] = {"first": first, "second": setup.seconds(run), "windows alone": setup.seconds(windows_alone)}
    return found


def anew(experiment: Experiment, row: str) -> Experiment:
    """Without a bank, and with results of its own."""
    experiment.run("fseft", "bank", "-d", experiment.dataset, "--clear")
    made = replace(experiment, results=f"results_{row}")
    shutil.rmtree(made.folders["nnUNet_results"], ignore_errors=True)
    return made


def hippocampus_row(setup: Setup) -> dict:
    experiment = anew(hippocampus(setup), "hippocampus")
    start = perf_counter()
    folder = experiment.train("FSEFTTrainer", "3d_fullres_5shot", 0, **WITHOUT_VALIDATION)
    run = RunFile.load(folder)
    return {"seconds": perf_counter() - start, "stages": run.seconds, "peak GB": run.peak_memory_gb}


def together(setup: Setup) -> dict:
    experiment = anew(hippocampus(setup), "together")
    folds = range(1 if setup.small else 5)
    start = perf_counter()
    failed = experiment.train_together(METHODS, [5], folds, **WITHOUT_VALIDATION)
    return {"seconds": perf_counter() - start, "trainings": len(METHODS) * len(folds), "failed": [*failed.values()]}


def predict(setup: Setup) -> dict:
    """The time between the first and the last segmentation, which leaves out the start."""
    experiment = hippocampus(setup)
    experiment.train("FSEFTTrainer", "3d_fullres_5shot", 0, **WITHOUT_VALIDATION)
    images, output = setup.work / "images", setup.work / "predicted"
    images.mkdir(exist_ok=True)
    for number in range(4 if setup.small else 80):
        files = sorted((experiment.raw / "imagesTr").iterdir())
        (images / f"h{number:03d}_0000.nii.gz").write_bytes(files[number % len(files)].read_bytes())
    start = perf_counter()
    what = ("-d", experiment.dataset, "-c", "3d_fullres_5shot", "-f", "0", "-device", setup.device.type)
    experiment.run("fseft", "predict", "-i", images, "-o", output, *what)
    seconds = perf_counter() - start
    times = sorted(file.stat().st_mtime for file in output.glob("*.nii.gz"))
    return {"seconds": seconds, "volumes": len(times), "without start": times[-1] - times[0]}


@contextmanager
def timed(spent: dict[str, float], owner, name: str, key: str, wait: Callable[[], None]):
    """Adds the time of the method `name` of `owner` to `spent[key]`."""
    method = getattr(owner, name)

    def measured(*args, **kwargs):
        start = perf_counter()
        result = method(*args, **kwargs)
        wait()
        spent[key] = spent.get(key, 0.0) + perf_counter() - start
        return result

    setattr(owner, name, measured)
    try:
        yield
    finally:
        setattr(owner, name, method)


def large(setup: Setup) -> dict:
    """One volume after the other, so that the shares add up; the command overlaps them."""
    from contextlib import ExitStack

    from fsefs_nnunet.inference.prediction import QueryPredictor
    from fsefs_nnunet.inference.support import memories_of
    from fsefs_nnunet.inference.trained_model import TrainedModel

    experiment = hippocampus(setup)
    experiment.train("FSEFTTrainer", "3d_fullres_5shot", 0, **WITHOUT_VALIDATION)
    os.environ |= {name: str(folder) for name, folder in experiment.folders.items()}
    shape = (60, 50, 50) if setup.small else (512, 512, 400)
    file = setup.work / "large_0000.nii.gz"
    if not file.exists():
        noise = np.random.default_rng(0).normal(size=[n // 4 for n in shape]).repeat(4, 0).repeat(4, 1).repeat(4, 2)
        nib.save(nib.Nifti1Image(noise.astype(np.float32), np.eye(4)), file)
    model = TrainedModel(
        experiment.model("FSEFTTrainer", "3d_fullres_5shot"),
        "3d_fullres_5shot",
        ["0"],
        "checkpoint_final.pth",
        setup.device,
    )
    predictor, spent = QueryPredictor(model, memories_of(model)), {}
    output = setup.work / "large" / "x.nii.gz"
    output.parent.mkdir(exist_ok=True)
    with ExitStack() as stack:
        for owner, name, key in (
            (predictor, "load", "reading"),
            (model.network.backbone.module, "forward", "backbone"),
            (predictor, "write", "export"),
            (predictor, "predict", "prediction"),
        ):
            stack.enter_context(timed(spent, owner, name, key, setup.wait))
        predictor.write(predictor.predict(predictor.load([str(file)]), output), output)
    whole = spent["reading"] + spent["prediction"] + spent["export"]
    return {**spent, "whole": whole, "share of all else": (spent["prediction"] - spent["backbone"]) / whole}


def published(setup: Setup) -> dict:
    """GPU time, bank included; random weights, so nothing is said of Dice."""
    found = {}
    source = Path(os.environ["FSEFT_SHARED"]) / "data" / "OpenKBP"
    for backbone_id, name in PUBLIC.items():
        public_backbone(setup, backbone_id)
        found[name] = {"published": published_recipe(setup, backbone_id)}
        if setup.small:
            continue
        experiment = setup.experiment("Dataset021_OpenKBP", f"FSEFTPlans_{backbone_id}")
        copy_dataset(source, experiment, 12)
        backbones = {"fseft_backbones": str(setup.work / "backbones")}
        options = ("-b", backbone_id, "-np", "12", "--num_queries", "4", "--shots", "5")
        experiment.run("fseft", "plan_and_preprocess", "-d", experiment.dataset, *options, **backbones)
        folder = experiment.train("FSEFTTrainer", "3d_fullres_5shot", 0, **WITHOUT_VALIDATION, **backbones)
        found[name]["ours"] = RunFile.load(folder).seconds
    return found


def published_recipe(setup: Setup, backbone_id: str) -> float:
    """Seconds of PUBLISHED_STEPS steps, extrapolated from 50: spatial adapter, soft Dice, AdamW, autocast."""
    from fsefs_nnunet.losses.soft_dice import SoftDiceLoss

    contract, size = find_backbone(backbone_id), 64 if setup.small else WINDOW
    network = AdaptedNetwork(1, 6, backbone_id, contract.sha256, "spatial", "last", None, seed=0).to(setup.device)
    loss, optimizer = SoftDiceLoss(False), torch.optim.AdamW(network.parameters(), 1e-4)
    images = torch.rand((1 if setup.small else PATCHES, 1, size, size, size), device=setup.device)
    target = torch.zeros_like(images)
    target[..., : size // 4] = 1
    scaler = torch.amp.GradScaler(enabled=setup.device.type == "cuda")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with reduced_precision(setup.device):
            value = loss(network(images), target)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()

    steps = 2 if setup.small else 50
    step()
    return PUBLISHED_STEPS / steps * setup.seconds(lambda: [step() for _ in range(steps)])


ROWS = {
    "tests": tests,
    "features": features,
    "hippocampus": hippocampus_row,
    "together": together,
    "predict": predict,
    "large": large,
    "published": published,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=ROWS)
    parser.add_argument("--seconds", type=int, default=150, help="of a row at most")
    parser.add_argument("--alone", action="store_true", help="run the row in this process, without a limit")
    args = parser.parse_args()
    if "FSEFT_SHARED" not in os.environ:
        sys.exit("Set FSEFT_SHARED to the folder that holds data/Task04_Hippocampus and data/OpenKBP.")
    setup = Setup(args.work.resolve(), torch.device(args.device), args.small)
    setup.work.mkdir(parents=True, exist_ok=True)
    if args.alone:
        (row,) = args.rows
        print(f"ROW {json.dumps(ROWS[row](setup))}", flush=True)
        return
    device_named(args.device)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {os.cpu_count()} cores"
    for row in args.rows:
        flags = ["--device", args.device, "--work", str(setup.work), *["--small"] * args.small]
        command = [sys.executable, __file__, "--alone", "--rows", row, *flags]
        start = perf_counter()
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, start_new_session=True, **pipes)
        try:
            out, error = process.communicate(timeout=args.seconds)
            lines = [line[4:] for line in out.splitlines() if line.startswith("ROW ")]
            result = json.loads(lines[0]) if lines else {"failed": error.splitlines()[-3:]}
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the commands that it started
            process.communicate()
            result = {"failed": f"took more than {args.seconds} s"}
        result = {"row": row, "device": name, "wall": round(perf_counter() - start, 1), **result}
        with open(setup.work / "gpu.jsonl", "a") as f:
            f.write(json.dumps(result) + "\n")
        print(json.dumps(result, indent=1), flush=True)


if __name__ == "__main__":
    main()
