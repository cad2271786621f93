from __future__ import annotations

import json
import os
import shutil
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import in_process
import nibabel as nib
import numpy as np
import pytest
import torch
from banks import make_bank, make_images
from nnunet_models import FOLDER, Model, write_model
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from trainings import make_trainer, text_of

from fsefs_nnunet import device as precision
from fsefs_nnunet.backbones.frozen import FrozenBackbone

SHAPE = (24, 20, 22)
SPACING = (10.0, 10.0, 10.0)
LABELS = {"background": 0, "spleen": 1, "stomach": 2, "kidney_left": 3}  # no backbone knows the stomach
NUM_LABELLED, NUM_UNLABELLED = 8, 2
VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def pytest_collection_modifyitems(items):
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("device")


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        metafunc.parametrize("device", kinds, indirect=True, scope="session")


@pytest.fixture(scope="session")
def device(request):
    """The CPU and, where there is one, the GPU, which computes in full float32 for tests that compare."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield torch.device(request.param)


@pytest.fixture(scope="session", autouse=True)
def one_process():
    """nnU-Net's workers are threads; tests of what processes do start programs."""
    with in_process.threads_for_workers():
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    with pytest.MonkeyPatch.context() as patch:
        in_process.one_thread(patch)
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # of programs that tests start
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_nnunet():
    """Without what nnU-Net spends most of a short run on, and what our plans and results have no use for."""
    collect = DatasetFingerprintExtractor.collect_foreground_intensities

    def leave_file(logger: LocalLogger, output_folder: str) -> None:
        (Path(output_folder) / "progress.png").touch()

    def few_voxels(segmentation, images, seed=1234, num_samples=1000):
        return collect(segmentation, images, seed, min(num_samples, 1000))  # of the 10^8 that it draws by default

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalLogger, "plot_progress_png", leave_file)
        patch.setattr(DatasetFingerprintExtractor, "collect_foreground_intensities", staticmethod(few_voxels))
        yield


@pytest.fixture
def float32(monkeypatch):
    """No bfloat16 on CPUs that have instructions for it."""
    monkeypatch.setattr(precision, "native_bfloat16", lambda: False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data and of the public checkpoints' manifests, which are not in the repository."""
    if not os.environ.get("FSEFT_SHARED"):
        pytest.skip("FSEFT_SHARED is not set: it names the folder with data/ and manifests/ that this test reads.")
    return Path(os.environ["FSEFT_SHARED"])


@pytest.fixture(scope="session")
def real_ct(shared) -> Path:
    """A CT with 104 masks in TotalSegmentator's layout."""
    folder = shared / "data" / "TotalSegmentator_example"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: this test reads a real CT in TotalSegmentator's layout.")
    return folder


@dataclass(frozen=True)
class Workspace:
    """nnU-Net's three folders with one dataset, planned with the embedded backbone and preprocessed."""

    root: Path
    dataset: str = "Dataset077_Tiny"

    @property
    def raw(self) -> Path:
        return self.root / "nnUNet_raw" / self.dataset

    @property
    def preprocessed(self) -> Path:
        return self.root / "nnUNet_preprocessed" / self.dataset

    @property
    def results(self) -> Path:
        return self.root / "nnUNet_results" / self.dataset

    @property
    def queries(self) -> Path:
        """Images without labels."""
        return self.root / "queries"

    def environment(self) -> dict[str, str]:
        return {name: str(self.root / name) for name in VARIABLES}

    def plans(self, **settings) -> dict:
        """The plans, with `settings` in every K-shot configuration."""
        plans = json.loads((self.preprocessed / "FSEFTPlans.json").read_text())
        for name, configuration in plans["configurations"].items():
            if name != "3d_fullres":
                configuration.update(deepcopy(settings))
        return plans

    def dataset_json(self) -> dict:
        return json.loads((self.raw / "dataset.json").read_text())


def write_phantom(image_file: Path, label_file: Path | None, seed: tuple[int, ...]) -> None:
    from fsefs_nnunet.synthetic import phantom

    made = phantom.make_phantom(
        seed, phantom.PhantomConfig(shape=SHAPE, spacing=SPACING[0], centre=(-0.25, -0.05, 0.15))
    )
    affine = np.diag([*SPACING, 1.0])
    nib.save(nib.Nifti1Image(np.round(made.image).astype(np.int16), affine), image_file)
    if label_file is not None:
        labels = np.zeros(SHAPE, np.uint8)
        for name, number in LABELS.items():
            if name != "background":
                labels[made.labels == phantom.LABELS[name]] = number
        nib.save(nib.Nifti1Image(labels, affine), label_file)


def write_tiny_dataset(workspace: Workspace) -> None:
    for folder in (workspace.raw / "imagesTr", workspace.raw / "labelsTr", workspace.queries):
        folder.mkdir(parents=True)
    for i in range(NUM_LABELLED):
        case = f"case_{i}"
        write_phantom(
            workspace.raw / "imagesTr" / f"{case}_0000.nii.gz", workspace.raw / "labelsTr" / f"{case}.nii.gz", (7, i)
        )
    for i in range(NUM_UNLABELLED):
        write_phantom(workspace.queries / f"scan_{i}_0000.nii.gz", None, (8, i))
    content = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": NUM_LABELLED, "file_ending": ".nii.gz"}
    (workspace.raw / "dataset.json").write_text(json.dumps(content))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Workspace:
    """Eight labelled phantoms (5 support, 3 queries) and two unlabelled queries; do not write into it."""
    from fsefs_nnunet.nnunet import drawing, planning

    workspace = Workspace(tmp_path_factory.mktemp("tiny"))
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in workspace.environment().items():
            patch.setenv(name, folder)
        patch.setenv("nnUNet_def_n_proc", "2")
        write_tiny_dataset(workspace)
        name = planning.plan(77, "phantom", [], 1, 8, None)
        queries = drawing.write_splits(77, [], str(workspace.queries), 20, 5, 12345)
        planning.preprocess(77, name, 1, queries)
    return workspace


@pytest.fixture
def workspace(tiny, tmp_path, monkeypatch) -> Workspace:
    """A copy of `tiny` that a test may change, with nnU-Net's environment variables set to it."""
    copy = Workspace(tmp_path / "copy")
    shutil.copytree(tiny.root, copy.root)
    for name, folder in copy.environment().items():
        monkeypatch.setenv(name, folder)
    return copy


@pytest.fixture
def raw(tmp_path, monkeypatch) -> Path:
    """An empty nnUNet_raw; the other two folders of nnU-Net are beside it."""
    for name in VARIABLES:
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path / "nnUNet_raw"


@pytest.fixture(scope="session")
def contract():
    from fsefs_nnunet.backbones.store import find_backbone

    return find_backbone("phantom")


@pytest.fixture
def image() -> torch.Tensor:
    """Smooth blobs in [0, 1], (1, 1, 24, 16, 8)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand((1, 1, 24, 16, 8), generator=generator)
    return torch.nn.functional.avg_pool3d(noise, 5, 1, 2, count_include_pad=False).sub(0.3).mul(2.5)


@pytest.fixture(scope="session")
def banked(tiny, tmp_path_factory):
    """A feature bank of the tiny dataset, filled by one epoch of training, for the other tests to copy."""
    folder = tmp_path_factory.mktemp("banked") / "work"
    shutil.copytree(tiny.root, folder)
    copy = type(tiny)(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in copy.environment().items():
            patch.setenv(name, value)
        trainer = make_trainer(copy, epochs=1)
        trainer.run_training()
    return copy, text_of(trainer)


@pytest.fixture
def work(banked, tmp_path, monkeypatch):
    """A copy with a filled bank and no results."""
    source, _ = banked
    copy = type(source)(tmp_path / "copy")
    shutil.copytree(source.root, copy.root, ignore=shutil.ignore_patterns("nnUNet_results"))
    for name, folder in copy.environment().items():
        monkeypatch.setenv(name, folder)
    return copy


@pytest.fixture(scope="module")
def backbone():
    return FrozenBackbone("phantom", "last")


@pytest.fixture
def bank(backbone, tmp_path):
    return make_bank(tmp_path / "banks", backbone)


@pytest.fixture
def images(tmp_path):
    """Files of two images for a bank, by case."""
    (tmp_path / "images").mkdir()
    return make_images(tmp_path / "images")


@pytest.fixture
def backbones(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("fseft_backbones", str(tmp_path / "backbones"))
    return tmp_path / "backbones"


@pytest.fixture
def model(tmp_path, backbones) -> Model:
    return write_model(tmp_path / "results" / FOLDER, ["CT"])


@pytest.fixture
def folders(workspace, tmp_path):
    return workspace, tmp_path / "output"
