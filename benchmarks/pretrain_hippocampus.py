"""The paper's experiment in miniature, on real MR: partial labels -> universal model -> few-shot adaptation.

    FSEFT_SHARED=FOLDER python benchmarks/pretrain_hippocampus.py --work /data/halves

FOLDER is that of `real_data.py`. Of the 110 labelled hippocampi, 60 are for pretraining: one half annotates the
anterior hippocampus alone, the other half the posterior alone. They are converted, assembled, and pretrained on twice,
by Eq. (1) (`masked`) and with missing labels taken for background (`unmasked`). The other 50 come from a simulated
scanner (`drifted`); the pretrained models, and the embedded backbone, are adapted to 1, 5 and 10 of them. Figures are
of 40 of the 50, the queries. Stages that are done are not done again.

Both pretrainings run once more, for a shorter time and to the zero-shot prediction alone, without the weight that
PartialLabelLoss gives the voxels of small organs (`masked_unweighted`, `unmasked_unweighted`).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
from pretrain_phantom import FEATURES
from real_data import REAL
from scipy.ndimage import gaussian_filter, zoom

from fsefs_nnunet.backbones.checkpoints import read_checkpoint
from fsefs_nnunet.evaluation.tables import markdown_table
from fsefs_nnunet.nnunet.experiment import Experiment

PRETRAINING_CASES, SEED = 60, 0
SOURCES = {11: ("anterior", 1), 12: ("posterior", 2)}  # id of the converted dataset -> what it annotates
MASKED, UNMASKED, DRIFTED = "Dataset900_Union", "Dataset901_Unmasked", "Dataset920_DriftedHippocampus"
PRETRAINING_PLANS, TRAINER, UNWEIGHTED = "FSEFTPretrainingPlans", "FSEFTPretrainer", "FSEFTPretrainer_Unweighted"
METHODS = {
    "masked": ("zero_shot", "adapter", "fseft", "scratch"),
    "unmasked": ("zero_shot", "adapter", "fseft"),
    "phantom": ("adapter", "fseft"),
    "masked_unweighted": ("zero_shot",),
    "unmasked_unweighted": ("zero_shot",),
}
PRETRAINED = {
    "masked": (MASKED, TRAINER),
    "unmasked": (UNMASKED, TRAINER),
    "masked_unweighted": (MASKED, UNWEIGHTED),
    "unmasked_unweighted": (UNMASKED, UNWEIGHTED),
}
UNWEIGHTED_SHARE = 0.3  # of --minutes


def drifted(image: np.ndarray, case: str) -> np.ndarray:
    """`image` (X, Y, Z), 1 mm voxels, as another scanner shows it; the same for a case whenever it is called.

    Each outside the ranges of nnU-Net's augmentation, which the pretraining uses: contrast, gamma of 1.8 to 2.6 on the
    range between the percentiles 0.5 and 99.5 (augmentation: 0.7 to 1.5; FSEFTPretrainer's random curves may be
    steeper); resolution, slices of 3 mm on the second axis (1 to 2 mm on all axes); noise, Rician, 0.4 of the image's
    standard deviation (at most 0.32).
    """
    rng = np.random.default_rng(zlib.crc32(case.encode()))
    low, high = np.percentile(image, (0.5, 99.5))
    image = np.clip((image - low) / (high - low), 0, 1) ** rng.uniform(1.8, 2.6)
    slices = max(2, round(image.shape[1] / 3))
    thick = zoom(gaussian_filter(image, (0, 3 / 2.355, 0)), (1, slices / image.shape[1], 1), order=1)
    image = zoom(thick, (1, image.shape[1] / thick.shape[1], 1), order=1)
    sd = 0.4 * image.std()
    real, imaginary = (rng.normal(0, sd, image.shape) for _ in range(2))
    return (1000 * np.hypot(image + real, imaginary)).astype(np.float32)


def cases_of(source: Path) -> tuple[list[str], list[str]]:
    """Those for pretraining, drawn with SEED, and the others."""
    cases = sorted(file.name.removesuffix(".nii.gz") for file in (source / "imagesTr").glob("hippocampus_*.nii.gz"))
    drawn = np.random.default_rng(SEED).permutation(cases).tolist()
    return drawn[:PRETRAINING_CASES], sorted(drawn[PRETRAINING_CASES:])


def write_source(folder: Path, source: Path, cases: list[str], name: str, value: int) -> None:
    """A Decathlon task whose annotators knew one of the two labels."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for case in cases:
        shutil.copy(source / "imagesTr" / f"{case}.nii.gz", folder / "imagesTr")
        labels = nib.load(source / "labelsTr" / f"{case}.nii.gz")
        mask = (np.asarray(labels.dataobj) == value).astype(np.uint8)
        nib.save(nib.Nifti1Image(mask, labels.affine), folder / "labelsTr" / f"{case}.nii.gz")
    content = json.loads((source / "dataset.json").read_text())
    content |= {"labels": {"0": "background", "1": name}, "numTraining": len(cases), "numTest": 0, "test": []}
    content["training"] = [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in cases]
    (folder / "dataset.json").write_text(json.dumps(content))


def write_drifted(raw: Path, source: Path, cases: list[str]) -> None:
    for part in ("imagesTr", "labelsTr"):
        (raw / part).mkdir(parents=True, exist_ok=True)
    for case in cases:
        image = nib.load(source / "imagesTr" / f"{case}.nii.gz")
        other = nib.Nifti1Image(drifted(image.get_fdata(), case), image.affine)
        nib.save(other, raw / "imagesTr" / f"{case}_0000.nii.gz")
        shutil.copy(source / "labelsTr" / f"{case}.nii.gz", raw / "labelsTr")
    labels = {"background": 0, **{name: value for name, value in SOURCES.values()}}
    generate_dataset_json(str(raw), {0: "MRI"}, labels, len(cases), ".nii.gz")


def write_pretraining_plans(preprocessed: Path) -> None:
    """Stock plans with the embedded backbone's small architecture, so that two cores get through many steps."""
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    stock = plans["configurations"]["3d_fullres"]
    network = stock["architecture"]["arch_kwargs"]
    network["features_per_stage"] = FEATURES[: network["n_stages"]]
    stock["batch_size"] = 2
    plans |= {"plans_name": PRETRAINING_PLANS, "configurations": {"3d_fullres": stock}}
    (preprocessed / f"{PRETRAINING_PLANS}.json").write_text(json.dumps(plans, indent=1))


def assemble(experiment: Experiment, source: Path, cases: list[str]) -> None:
    """Two sources in the Decathlon's layout -> converted -> assembled, planned and preprocessed."""
    half = len(cases) // 2
    for (dataset_id, (name, value)), some in zip(SOURCES.items(), (cases[:half], cases[half:])):
        folder = experiment.work / name / source.name
        write_source(folder, source, some, name, value)
        experiment.run("fseft", "convert", "MSD", "-i", folder, "-d", str(dataset_id), "-np", "2")
    experiment.run("fseft", "assemble", "-d", *map(str, SOURCES), "-o", "900", "--template", "union", "-np", "2")
    experiment.run("nnUNetv2_plan_and_preprocess", "-d", "900", "-c", "3d_fullres", "-npfp", "2", "-np", "2")
    write_pretraining_plans(experiment.preprocessed)


def unmask(masked: Experiment, unmasked: Experiment) -> None:
    """The same data; every source says that it annotates both labels, as background where it has none."""
    shutil.copytree(masked.raw, unmasked.raw, symlinks=True)
    shutil.copytree(masked.preprocessed, unmasked.preprocessed)
    for folder in (unmasked.raw, unmasked.preprocessed):
        content = json.loads((folder / "dataset.json").read_text())
        for one in content["sources"].values():
            one["classes"] = [name for name, _ in SOURCES.values()]
        (folder / "dataset.json").write_text(json.dumps(content))
    file = unmasked.preprocessed / f"{PRETRAINING_PLANS}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dataset_name": unmasked.dataset}))


def once(mark: Path, stage: Callable, *args) -> None:
    """Run a stage unless `mark` says that it is done."""
    if not mark.exists():
        stage(*args)
        mark.touch()


def pretrain(experiment: Experiment, name: str, minutes: float) -> None:
    """Fold `all`, then the import as backbone `name`."""
    trainer = PRETRAINED[name][1]
    environment = {"fseft_train_minutes": f"{minutes:g}", "nnUNet_n_proc_DA": "1"}
    if trainer == UNWEIGHTED:
        environment["fseft_train_minutes"] = f"{UNWEIGHTED_SHARE * minutes:g}"
        environment["nnUNet_extTrainer"] = str(Path(__file__).parent / "unweighted_loss")
    arguments = (experiment.dataset, "3d_fullres", "all", "-tr", trainer, "-p", PRETRAINING_PLANS)
    experiment.run("nnUNetv2_train", *arguments, "-device", experiment.device, "--c", **environment)
    experiment.run("fseft", "backbones", "import", name, experiment.model(trainer, "3d_fullres"))


def plan(experiment: Experiment, backbone: str) -> None:
    settings = ("--num_queries", "40", "--shots", "1", "5", "10", "-np", "2")
    experiment.run("fseft", "plan_and_preprocess", "-d", experiment.dataset, "-b", backbone, *settings)


def adapt(experiment: Experiment, backbone: str, folds: int) -> Path:
    """`fseft benchmark` on the queries; returns its folder."""
    output = experiment.work / f"benchmark_{backbone}"
    chosen = ("--shots", "1", "5", "10", "--folds", str(folds), "--methods", *METHODS[backbone])
    device = ("-device", experiment.device)
    experiment.run(
        "fseft", "benchmark", "-d", experiment.dataset, "-p", experiment.plans, *chosen, *device, "-o", output
    )
    return output


def table(folders: dict[str, Path]) -> list[dict]:
    """Mean Dice of the queries by backbone, method and shots, from each results.csv."""
    rows = []
    for backbone, folder in folders.items():
        dice = defaultdict(lambda: defaultdict(list))
        with open(folder / "results.csv", newline="") as file:
            for row in csv.DictReader(file):
                if row["Dice"] not in ("", "nan"):
                    dice[row["shots"], row["method"]][row["class"]].append(float(row["Dice"]))
        for (shots, method), classes in dice.items():
            means = {name: float(np.mean(values)) for name, values in classes.items()}
            mean = float(np.mean(list(means.values())))
            rows.append({"backbone": backbone, "method": method, "shots": shots, **means, "mean Dice": mean})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20, help="of each pretraining; default: 20")
    parser.add_argument("--folds", type=int, default=1, help="draws of the support; default: 1")
    parser.add_argument("--only", choices=METHODS, nargs="+", default=list(METHODS), help="default: all")
    parser.add_argument("-device", default="cpu", help="as nnUNetv2_train")
    args = parser.parse_args()
    source = REAL["hippocampus"].source
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ["fseft_backbones"] = str(work / "backbones")
    masked, unmasked = (Experiment(work, name, PRETRAINING_PLANS, args.device) for name in (MASKED, UNMASKED))
    cases, others = cases_of(source)
    once(work / "assembled", assemble, masked, source, cases)
    once(work / "unmasked", unmask, masked, unmasked)
    once(work / "drifted", write_drifted, work / "nnUNet_raw" / DRIFTED, source, others)
    folders = {}
    for backbone in args.only:
        if backbone in PRETRAINED:
            dataset, trainer = PRETRAINED[backbone]
            experiment = masked if dataset == MASKED else unmasked
            once(work / f"pretrained_{backbone}", pretrain, experiment, backbone, args.minutes)
            final = experiment.model(trainer, "3d_fullres") / "fold_all" / "checkpoint_final.pth"
            log = read_checkpoint(final)["logging"]
            seconds = sum(log["epoch_end_timestamps"]) - sum(log["epoch_start_timestamps"])
            print(f"{backbone}: {seconds:.0f} s of epochs")
        plans = "FSEFTPlans" if backbone == "phantom" else f"FSEFTPlans_{backbone}"
        experiment = Experiment(work, DRIFTED, plans, args.device)
        once(work / f"planned_{backbone}", plan, experiment, backbone)
        folders[backbone] = adapt(experiment, backbone, args.folds)
    text = markdown_table(table(folders))
    (work / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
