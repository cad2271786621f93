"""Regions with an ignore label, stored as .mha, through nnU-Net's commands, up to a zip that is installed elsewhere."""

import filecmp
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from in_process import shell

from fsefs_nnunet.nnunet.shims import fseft_trainers

pytestmark = pytest.mark.slow

LABELS = {"background": 0, "organs": [1, 2, 3], "kidney_left": 3, "ignore": 4}
MODEL = "-c 3d_fullres_5shot -tr FSEFTTrainer -p FSEFTPlans"
PREDICT = f"nnUNetv2_predict -d 78 {MODEL} -f 0 -device cpu -npp 1 -nps 1"
SHIMS = str(Path(fseft_trainers.__file__).parent)


@pytest.fixture(scope="module")
def work(tiny, tmp_path_factory):
    """The tiny dataset as another one of .mha files; of every case but two, each other slice is annotated."""
    copy = type(tiny)(tmp_path_factory.mktemp("variant") / "work", "Dataset078_Variant")
    for part in ("imagesTr", "labelsTr"):
        (copy.raw / part).mkdir(parents=True)
        for i, file in enumerate(sorted((tiny.raw / part).glob("*.nii.gz"))):
            image = sitk.ReadImage(str(file))
            if part == "labelsTr" and i > 1:
                array = sitk.GetArrayFromImage(image)
                array[::2] = LABELS["ignore"]
                ignoring = sitk.GetImageFromArray(array)
                ignoring.CopyInformation(image)
                image = ignoring
            sitk.WriteImage(image, str(copy.raw / part / file.name.replace(".nii.gz", ".mha")), True)
    content = {**tiny.dataset_json(), "labels": LABELS, "regions_class_order": [1, 3], "file_ending": ".mha"}
    (copy.raw / "dataset.json").write_text(json.dumps(content))
    (copy.root / "images").mkdir()
    for file in sorted((copy.raw / "imagesTr").iterdir())[:2]:
        shutil.copy(file, copy.root / "images")
    return copy


@pytest.fixture(scope="module")
def run(work):
    """Calls the commands of a shell line in the workspace."""

    def run(line: str, **changes: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(work.root)
            for name, value in {
                **work.environment(),
                "nnUNet_n_proc_DA": "0",
                "nnUNet_extTrainer": SHIMS,
                **changes,
            }.items():
                patch.setenv(name, value)
            assert shell(line) == 0

    return run


@pytest.fixture(scope="module")
def predicted(work, run) -> Path:
    """Planned, trained for a few short epochs, and predicted."""
    run("fseft plan_and_preprocess -d 78 --shots 5 -np 1 --num_queries 2")
    assert work.plans()["image_reader_writer"] == "SimpleITKIOWithReorient"
    file = work.preprocessed / "FSEFTPlans.json"
    short = dict(fseft_steps_per_epoch=8, fseft_views=1, fseft_crop_size=[8] * 3, fseft_pool=4, patch_size=[24] * 3)
    file.write_text(json.dumps(work.plans(fseft_epochs=5, **short)))
    run("nnUNetv2_train 78 3d_fullres_5shot 0 -tr FSEFTTrainer -p FSEFTPlans -device cpu")
    run(f"{PREDICT} -i images -o predicted")
    return work.root / "predicted"


def test_predictions_are_label_maps_of_the_regions(work, predicted):
    files = sorted(predicted.glob("*.mha"))
    assert len(files) == 2
    for file in files:
        image, segmentation = (
            sitk.ReadImage(str(work.root / "images" / f"{file.stem}_0000.mha")),
            sitk.ReadImage(str(file)),
        )
        assert segmentation.GetSize() == image.GetSize() and segmentation.GetDirection() == image.GetDirection()
        values = set(np.unique(sitk.GetArrayFromImage(segmentation)))
        assert 1 in values and values <= {0, 1, 3}


def test_evaluation_leaves_ignored_voxels_out(work, run, predicted):
    run("nnUNetv2_evaluate_folder nnUNet_raw/Dataset078_Variant/labelsTr predicted -djfile predicted/dataset.json "
        "-pfile predicted/plans.json --chill")  # fmt: skip
    summary = json.loads((predicted / "summary.json").read_text())
    assert set(summary["mean"]) == {"(1, 2, 3)", "3"} and summary["foreground_mean"]["Dice"] > 0.1


def test_a_model_from_a_zip_predicts_the_same_elsewhere(work, run, predicted):
    run(f"nnUNetv2_export_model_to_zip -d 78 -o model.zip {MODEL} -f 0")
    elsewhere = {name: str(work.root / "elsewhere" / name) for name in work.environment()}
    for folder in elsewhere.values():
        Path(folder).mkdir(parents=True)
    run("nnUNetv2_install_pretrained_model_from_zip model.zip", **elsewhere)
    run(f"{PREDICT} -i images -o again", **elsewhere)
    names = [file.name for file in sorted(predicted.glob("*.mha"))]
    assert filecmp.cmpfiles(predicted, work.root / "again", names, shallow=False) == (names, [], [])
