"""Every kind of nnU-Net labels on real MR: labels, regions, ignore label, regions with ignore label.

    FSEFT_SHARED=FOLDER python benchmarks/label_variants.py --work /data/variants

FOLDER is that of `real_data.py`. Makes four datasets of labelled hippocampi, as nnU-Net's own integration test does, of
which four cases are left out of the training, and takes each through nnU-Net's commands: plan, train two folds,
validate, predict with both, evaluate, export as a zip, install elsewhere, predict there. Ends with "4 of 4" if every
step of all four worked and the installed model predicts what the original does. Steps that are done are not done again.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
from real_data import REAL

from fsefs_nnunet.evaluation.tables import markdown_table, mean_dice
from fsefs_nnunet.nnunet.experiment import Experiment

REGIONS = {"hippocampus": [1, 2], "posterior": 2}
LABELS = {"anterior": 1, "posterior": 2}
IGNORE = 3
VARIANTS = {
    "Dataset041_HippocampusLabels": LABELS,
    "Dataset042_HippocampusRegions": REGIONS,
    "Dataset043_HippocampusIgnore": {**LABELS, "ignore": IGNORE},
    "Dataset044_HippocampusRegionsIgnore": {**REGIONS, "ignore": IGNORE},
}
CONFIGURATION, FOLDS = "3d_fullres_5shot", ("0", "1")
CASES, OTHER_CASES = 15, 4


def write_variant(raw: Path, labels: dict, source: Path) -> None:
    """A small dataset; with an ignore label, three training cases of four annotate every fourth slice alone."""
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (raw / name).mkdir(parents=True, exist_ok=True)
    files = sorted((source / "imagesTr").glob("hippocampus_*.nii.gz"))
    for i, file in enumerate(files[:CASES]):
        shutil.copy(file, raw / "imagesTr" / file.name.replace(".nii.gz", "_0000.nii.gz"))
        segmentation = nib.load(source / "labelsTr" / file.name)
        array = np.asarray(segmentation.dataobj).astype(np.uint8)
        if "ignore" in labels and i % 4:
            array[:, np.arange(array.shape[1]) % 4 != 0] = IGNORE
        nib.save(nib.Nifti1Image(array, segmentation.affine), raw / "labelsTr" / file.name)
    for file in files[CASES : CASES + OTHER_CASES]:
        shutil.copy(file, raw / "imagesTs" / file.name.replace(".nii.gz", "_0000.nii.gz"))
    order = {"regions_class_order": [1, 2]} if "hippocampus" in labels else {}
    generate_dataset_json(str(raw), {0: "MRI"}, {"background": 0, **labels}, CASES, ".nii.gz", **order)


def predict(experiment: Experiment, images: Path, output: Path) -> Path:
    if len(list(output.glob("*.nii.gz"))) < OTHER_CASES:
        model = ("-d", experiment.dataset, "-c", CONFIGURATION, "-tr", "FSEFTTrainer", "-p", "FSEFTPlans")
        options = ("-f", *FOLDS, "-device", experiment.device, "-npp", "2", "-nps", "2")
        experiment.run("nnUNetv2_predict", "-i", images, "-o", output, *model, *options)
    return output


def run_variant(work: Path, dataset: str, source: Path, device: str) -> dict:
    """All steps of one variant; returns its row of the table."""
    experiment = Experiment(work, dataset, device=device)
    if not (experiment.raw / "dataset.json").exists():
        write_variant(experiment.raw, VARIANTS[dataset], source)
    if not (experiment.preprocessed / "FSEFTPlans_3d_fullres").exists():
        experiment.run("fseft", "plan_and_preprocess", "-d", dataset, "--shots", "5", "-np", "2")
    queries = [
        mean_dice(experiment.train("FSEFTTrainer", CONFIGURATION, int(f)) / "validation" / "summary.json")["mean"]
        for f in FOLDS
    ]
    images = experiment.raw / "imagesTs"
    predictions = predict(experiment, images, work / "predictions" / dataset)
    files = ("-djfile", predictions / "dataset.json", "-pfile", predictions / "plans.json")
    experiment.run("nnUNetv2_evaluate_folder", source / "labelsTr", predictions, *files, "--chill")
    return {
        "dataset": dataset,
        "queries, fold 0": queries[0],
        "queries, fold 1": queries[1],
        "other cases, both": mean_dice(predictions / "summary.json")["mean"],
        "installed model agrees": installed_model_agrees(experiment, images, predictions),
    }


def installed_model_agrees(experiment: Experiment, images: Path, predictions: Path) -> bool:
    """Export as a zip, install in other nnU-Net folders, predict there, compare voxel by voxel."""
    elsewhere = Experiment(experiment.work / "elsewhere", experiment.dataset, device=experiment.device)
    archive = experiment.work / f"{experiment.dataset}.zip"
    if not archive.exists():
        model = ("-c", CONFIGURATION, "-tr", "FSEFTTrainer", "-p", "FSEFTPlans", "-f", *FOLDS)
        part = archive.with_suffix(".part.zip")
        experiment.run("nnUNetv2_export_model_to_zip", "-d", experiment.dataset, "-o", part, *model)
        os.replace(part, archive)
    if not elsewhere.model("FSEFTTrainer", CONFIGURATION).exists():
        elsewhere.run("nnUNetv2_install_pretrained_model_from_zip", archive)
    output = predict(elsewhere, images, elsewhere.work / "predictions" / experiment.dataset)
    names = [file.name for file in predictions.glob("*.nii.gz")]
    return len(names) == OTHER_CASES and filecmp.cmpfiles(predictions, output, names, shallow=False)[0] == names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    source = REAL["hippocampus"].source
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    rows = []
    for dataset in VARIANTS:
        rows.append(run_variant(work, dataset, source, args.device))
        print(markdown_table(rows), flush=True)
    (work / "variants.json").write_text(json.dumps(rows, indent=1))
    print(f"{sum(row['installed model agrees'] for row in rows)} of {len(VARIANTS)}")


if __name__ == "__main__":
    main()
