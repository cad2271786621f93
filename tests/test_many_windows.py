"""End to end on volumes of 3 x 3 x 3 windows, isotropic and with thick slices, with a prior and queries pooled by 3."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from in_process import call

from fsefs_nnunet.backbones.store import find_backbone, load_weights, save_backbone
from fsefs_nnunet.cases.splits import load_splits
from fsefs_nnunet.methods.run_file import RunFile
from fsefs_nnunet.nnunet.shims import fseft_trainers
from fsefs_nnunet.synthetic.datasets import write_dataset
from fsefs_nnunet.synthetic.phantom import LABELS, ORGAN_CENTRES, PhantomConfig

pytestmark = pytest.mark.slow

DATASET, CONFIGURATION = "Dataset055_Windows", "3d_fullres_2shot"
MODEL = ("-c", CONFIGURATION, "-tr", "FSEFTTrainer", "-p", "FSEFTPlans_small", "-f", "0", "-device", "cpu")
SHAPE, WINDOW = (32, 32, 32), (16, 16, 16)
KEYS = {"fseft_epochs": 2, "fseft_steps_per_epoch": 2, "fseft_views": 2, "fseft_prior_from_epoch": 0, "fseft_pool": 3}


def keep_off_the_border(file: Path) -> None:
    """A class that reaches the border of the volume has no size prior."""
    image = nib.load(file)
    inside = np.zeros_like(labels := np.asarray(image.dataobj))
    inside[1:-1, 1:-1, 1:-1] = labels[1:-1, 1:-1, 1:-1]
    nib.save(nib.Nifti1Image(inside, image.affine, image.header), file)


@pytest.fixture(scope="module", params=[(8.0, 8.0, 8.0), (1.25, 1.25, 7.7)], ids=["isotropic", "thick slices"])
def work(request, tmp_path_factory):
    """A dataset of four phantoms, planned with the embedded backbone in windows of 16^3, and trained."""
    folder = tmp_path_factory.mktemp("windows")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "fseft_backbones"):
            (folder / name).mkdir()
            patch.setenv(name, str(folder / name))
        patch.setenv("nnUNet_n_proc_DA", "0")
        patch.setenv("nnUNet_extTrainer", str(Path(fseft_trainers.__file__).parent))
        phantom = find_backbone("phantom")
        small = replace(phantom, id="small", patch_size=WINDOW, smallest_window=WINDOW)
        save_backbone(small, load_weights(phantom), folder / "fseft_backbones")
        config = PhantomConfig(shape=SHAPE, spacing=request.param, centre=ORGAN_CENTRES["gallbladder"])
        lobes = (LABELS["liver_right_lobe"], LABELS["liver_left_lobe"])
        numbers = {LABELS["gallbladder"]: 1, **dict.fromkeys(lobes, 2)}
        jobs = [(f"column_{i}", (9, i), config, numbers, None) for i in range(4)]
        write_dataset(folder / "nnUNet_raw" / DATASET, jobs, {"gallbladder": 1, "liver": 2}, 1)
        for file in (folder / "nnUNet_raw" / DATASET / "labelsTr").iterdir():
            keep_off_the_border(file)
        planning = ("-d", "55", "-b", "small", "--shots", "2", "--num_queries", "2", "-np", "1")
        assert call("fseft", "plan_and_preprocess", *planning) == 0
        file = folder / "nnUNet_preprocessed" / DATASET / "FSEFTPlans_small.json"
        plans = json.loads(file.read_text())
        assert plans["configurations"][CONFIGURATION]["patch_size"] == list(WINDOW)
        assert plans["configurations"]["3d_fullres"]["spacing"] == pytest.approx(request.param)
        plans["configurations"][CONFIGURATION].update(KEYS)
        file.write_text(json.dumps(plans))
        training = ("55", CONFIGURATION, "0", "-tr", "FSEFTTrainer", "-p", "FSEFTPlans_small", "-device", "cpu")
        assert call("nnUNetv2_train", *training) == 0
        yield folder


def fold_of(work: Path) -> Path:
    model = f"FSEFTTrainer__FSEFTPlans_small__{CONFIGURATION}"
    return work / "nnUNet_results" / DATASET / model / "fold_0"


def test_training(work):
    run = RunFile.load(fold_of(work))
    # 27 windows a volume
    # support and queries are four volumes; two views are a window each
    assert run.windows == 4 * 27 + 2 and run.validation_windows == 0
    assert set(run.prior) == {"gallbladder", "liver"} and run.prior["liver"]["num_cases"] == 2
    assert all(set(epoch["sizes_ml"]) <= set(run.queries) for epoch in run.epochs)
    sizes = [size for query in run.sizes_ml["after"].values() for size in query.values()]
    assert len(run.queries) == 2 and len(sizes) == 4 and np.isfinite(sizes).all() and min(sizes) > 0
    assert {"start", "feature bank", "training", "validation"} == set(run.seconds)


def test_validation(work):
    queries = load_splits(work / "nnUNet_preprocessed" / DATASET / "splits_fseft.json")["queries"]
    summary = json.loads((fold_of(work) / "validation" / "summary.json").read_text())
    assert sorted(Path(case["prediction_file"]).name for case in summary["metric_per_case"]) == sorted(
        f"{query}.nii.gz" for query in queries
    )
    assert np.isfinite(summary["foreground_mean"]["Dice"])


@pytest.mark.parametrize("program", ["nnUNetv2_predict", "fseft"])
def test_prediction(work, program):
    images, output, name = work / f"{program}_images", work / program, "column_0_0000.nii.gz"
    images.mkdir()
    shutil.copy(work / "nnUNet_raw" / DATASET / "imagesTr" / name, images)
    options = ("-npp", "0", "-nps", "0") if program == "nnUNetv2_predict" else ()
    verb = ("predict",) if program == "fseft" else ()
    assert call(program, *verb, "-i", images, "-o", output, "-d", "55", *MODEL, *options) == 0
    image, made = nib.load(images / name), nib.load(output / "column_0.nii.gz")
    assert made.shape == image.shape
    np.testing.assert_allclose(made.affine, image.affine, atol=1e-5)
    labels = set(np.unique(np.asarray(made.dataobj)))
    assert labels <= {0, 1, 2} and len(labels) > 1
