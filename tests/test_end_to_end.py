"""nnU-Net's own commands on the tiny dataset, as a user types them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import in_process
import nibabel as nib
import numpy as np
import pytest
from in_process import shell

from fsefs_nnunet.cases.splits import load_splits
from fsefs_nnunet.methods.registry import METHODS
from fsefs_nnunet.nnunet import experiment
from fsefs_nnunet.nnunet.shims import fseft_trainers
from fsefs_nnunet.synthetic import demo

pytestmark = pytest.mark.slow

FIVE = "3d_fullres_5shot"
FOLDS = ("0", "1")
EPOCHS = 3
MODEL = "-tr FSEFTTrainer -p FSEFTPlans -device cpu"
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Runs a shell line in a workspace, after `eval "$(fseft env)"`."""
    root = tmp_path_factory.mktemp("commands") / "work"
    shutil.copytree(tiny.root, root)
    work = type(tiny)(root)
    file = work.preprocessed / "FSEFTPlans.json"
    short = dict(fseft_steps_per_epoch=1, fseft_views=1, fseft_crop_size=[8] * 3, fseft_pool=4, patch_size=[24] * 3)
    file.write_text(json.dumps(work.plans(fseft_epochs=EPOCHS, **short)))
    variables = {**work.environment(), "nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f"}
    env = {**os.environ, **variables, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    env.pop("nnUNet_extTrainer", None)

    def attempt(line: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "-c", f'eval "$(fseft env)"; {line}'], env=env, capture_output=True, encoding="utf-8"
        )

    def run(line: str) -> str:
        result = attempt(line)
        assert result.returncode == 0, f"{line}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        return result.stdout

    run.work, run.attempt = work, attempt
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.setenv("nnUNet_extTrainer", str(Path(fseft_trainers.__file__).parent))
        yield run


@pytest.fixture(scope="module")
def model(run) -> Path:
    """Of two folds, the first by a command of its own with workers, curves and all."""
    run(f"nnUNetv2_train 77 {FIVE} 0 {MODEL}")
    assert shell(f"nnUNetv2_train 77 {FIVE} 1 {MODEL}") == 0
    return run.work.results / f"FSEFTTrainer__FSEFTPlans__{FIVE}"


@pytest.fixture(scope="module")
def predictions(run, model) -> tuple[Path, Path]:
    """Folders of images and output: two labelled queries, one stored as LPS as well, predicted by both folds."""
    work, images, labels, output = run.work, *(run.work.root / name for name in ("images", "labels", "output"))
    for folder in (images, labels):
        folder.mkdir()
    queries = load_splits(work.preprocessed / "splits_fseft.json")["queries"][:2]
    for case in queries:
        shutil.copy(work.raw / "imagesTr" / f"{case}_0000.nii.gz", images)
        shutil.copy(work.raw / "labelsTr" / f"{case}.nii.gz", labels)
    lps = nib.orientations.axcodes2ornt("LPS")
    for folder, ending in ((images, "_0000"), (labels, "")):
        stored = nib.load(folder / f"{queries[0]}{ending}.nii.gz")
        to_lps = nib.orientations.ornt_transform(nib.io_orientation(stored.affine), lps)
        nib.save(stored.as_reoriented(to_lps), folder / f"turned{ending}.nii.gz")
    run(f"nnUNetv2_predict -i '{images}' -o '{output}' -f {' '.join(FOLDS)} -d 77 -c {FIVE} {MODEL} -npp 1 -nps 1")
    return images, output


def test_training_leaves_what_nnunet_leaves(model):
    for name in ("plans.json", "dataset.json", "dataset_fingerprint.json"):
        assert (model / name).exists()
    for fold in FOLDS:
        folder = model / f"fold_{fold}"
        assert (folder / "checkpoint_final.pth").stat().st_size < 1_000_000
        assert (folder / "checkpoint_best.pth").exists()
        assert not (folder / "checkpoint_latest.pth").exists()
        log = next(folder.glob("training_log_*.txt")).read_text()
        assert log.count("Epoch time: ") == EPOCHS
        assert "Training done." in log and "summary.json" in log
    assert (model / "fold_0" / "progress.png").exists()


def test_validation_of_the_labelled_queries(run, model):
    queries = load_splits(run.work.preprocessed / "splits_fseft.json")["queries"]
    for fold in FOLDS:
        folder = model / f"fold_{fold}" / "validation"
        summary = json.loads((folder / "summary.json").read_text())
        cases = [Path(case["prediction_file"]).name for case in summary["metric_per_case"]]
        assert sorted(cases) == [f"{case}.nii.gz" for case in queries]
        assert set(summary["mean"]) == {"1", "2", "3"}
        assert 0 < summary["foreground_mean"]["Dice"] <= 1


def test_predictions_have_the_images_geometry(predictions):
    images, output = predictions
    files = sorted(images.iterdir())
    assert len(files) == 3
    for file in files:
        image = nib.load(file)
        segmentation = nib.load(output / file.name.replace("_0000", ""))
        assert segmentation.shape == image.shape
        np.testing.assert_allclose(segmentation.affine, image.affine, atol=1e-4)
        values = np.asarray(segmentation.dataobj)
        assert set(np.unique(values)) <= {0, 1, 2, 3} and values.any()


def test_stored_orientation_does_not_matter(predictions):
    images, output = predictions
    case = next(file for file in sorted(output.glob("case_*.nii.gz")))
    turned = nib.as_closest_canonical(nib.load(output / "turned.nii.gz"))
    assert nib.aff2axcodes(nib.load(output / "turned.nii.gz").affine) == ("L", "P", "S")
    assert np.array_equal(np.asarray(turned.dataobj), np.asarray(nib.load(case).dataobj))


def test_evaluation(predictions):
    images, output = predictions
    labels = images.parent / "labels"
    files = f"-djfile '{output}/dataset.json' -pfile '{output}/plans.json'"
    assert shell(f"nnUNetv2_evaluate_folder '{labels}' '{output}' {files}") == 0
    summary = json.loads((output / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 3
    dice = {Path(c["prediction_file"]).name: c["metrics"]["1"]["Dice"] for c in summary["metric_per_case"]}
    assert dice["turned.nii.gz"] == pytest.approx(dice[sorted(dice)[0]])


def test_a_mistake_ends_in_a_sentence(run):
    """nnU-Net's command fails without a traceback."""
    result = run.attempt(f"nnUNetv2_train 77 {FIVE} 7 {MODEL}")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "Fold 7 does not exist" in result.stderr.splitlines()[-1] and "fseft" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (f"{FIVE} 7", "Fold 7 does not exist"),
        (f"{FIVE} 0 -pretrained_weights model.pth", "does not support -pretrained_weights"),
        ("3d_fullres 0", "is not a K-shot configuration"),
    ],
)
def test_mistakes_name_the_remedy(run, capsys, arguments, sentence):
    assert shell(f"nnUNetv2_train 77 {arguments} {MODEL}") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert sentence in last and "fseft" in last


def test_an_adapted_model_is_no_backbone(model):
    from fsefs_nnunet.backbones.published.nnunet_models import import_nnunet_model

    with pytest.raises(ValueError, match=r"\(AdaptedNetwork, 3D\) cannot be a backbone"):
        import_nnunet_model("mine", model, model.parent / "backbones")


def test_demo(tmp_path, monkeypatch):
    """`fseft demo` with fewer phantoms, methods and steps; called again, it does nothing again."""
    monkeypatch.setattr(experiment, "subprocess", in_process)
    monkeypatch.setattr(demo, "NUM_QUERIES", 2)
    monkeypatch.setattr(
        demo, "SHORT", {"fseft_epochs": 2, "fseft_steps_per_epoch": 1, "fseft_views": 0, "fseft_crop_size": [16] * 3}
    )
    shown = [METHODS[name] for name in ("fseft", "scratch")]
    monkeypatch.setattr(demo, "SHOWN", shown)
    for _ in range(2):
        demo.run_demo(tmp_path / "demo", seconds=1, device="cpu")
    log = (tmp_path / "demo" / "log.txt").read_text("utf-8").splitlines()
    commands = [line.split()[1] for line in log if line.startswith("$ ")]
    assert commands == ["fseft", "nnUNetv2_train", "nnUNetv2_train"]
    table = (tmp_path / "demo" / "table.md").read_text("utf-8")
    assert all(f"| {name} |" in table for name in (*(method.title for method in shown), "stomach"))
    assert len(list((tmp_path / "demo").glob("*.png"))) == 2
    page = (tmp_path / "demo" / "report.html").read_text("utf-8")
    assert "Size prior and predicted sizes" in page and "nnUNetv2_train 901" in page
