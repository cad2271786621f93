"""Runs the commands of the documentation as they stand there, page by page, on small phantoms.

    python benchmarks/documented_commands.py --work /data/documented

/data is WORK/data, capital placeholders (IMAGES, OUTPUT) are folders of that name in WORK, and trainings are shortened
between planning and training. What the commands expect to find (downloads, a published checkpoint, a nnU-Net model)
is made before, with random weights. Not run here: pip, `fseft demo` and the tests; the benchmarks; `fseft backbones
download`, which tests/test_downloading.py runs against a server of its own; and `fseft benchmark`, which
benchmarks/phantoms.py runs. A command that fails is named with the end of its output; the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from time import time

import nibabel as nib
import numpy as np

from fsefs_nnunet.datasets.tables import tables
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.synthetic.datasets import write_dataset
from fsefs_nnunet.synthetic.phantom import LABELS, PhantomConfig

ROOT = Path(__file__).parents[1]
ORGANS = ("spleen", "kidney_right", "kidney_left", "aorta", "stomach")
# in the order in which a user meets them: later pages use what earlier ones leave
PAGES = (
    "documentation/installation.md",
    "README.md",
    "documentation/transductive_inference.md",
    "documentation/comparing_methods.md",
    "documentation/feature_bank.md",
    "documentation/unlabelled_queries.md",
    "documentation/nnunet_commands.md",
    "documentation/choosing_a_backbone.md",
    "documentation/zero_shot.md",
    "documentation/totalsegmentator_and_own_models.md",
    "documentation/datasets.md",
    "documentation/pretraining.md",
)
RUN_ELSEWHERE = re.compile(r"pip install|python |fseft demo|fseft backbones download|fseft benchmark")
SHORT = {"fseft_epochs": 10, "fseft_steps_per_epoch": 1, "fseft_views": 5, "fseft_crop_size": [16, 16, 16]}


def commands(page: Path) -> list[str]:
    """Lines of the page's shell blocks."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


def phantoms(folder: Path, seed: int, num_cases: int, organs: tuple[str, ...] = ORGANS) -> None:
    """Of 32^3 voxels; the header says 4 mm, so that a window of a public backbone holds them."""
    config = PhantomConfig(shape=(32, 32, 32), spacing=10.0, centre=(-0.1, 0.0, 0.1))
    numbers = {LABELS[name]: i for i, name in enumerate(organs, 1)}
    jobs = [(f"case_{seed}{i:02d}", (seed, i), config, numbers, (4.0, 4.0, 4.0)) for i in range(num_cases)]
    write_dataset(folder, jobs, {name: i for i, name in enumerate(organs, 1)}, 1)


def save(file: Path, like: nib.Nifti1Image, array: np.ndarray | None = None) -> None:
    """`array` with the header of `like`, or a copy of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    array = np.asarray(like.dataobj) if array is None else array
    nib.save(nib.Nifti1Image(array.astype(like.get_data_dtype()), like.affine), file)


class Workplace:
    """A shell in a folder with nnU-Net's three folders, and what the documented commands expect to find."""

    def __init__(self, work: Path):
        self.work = work
        self.raw, self.preprocessed, self.results = (work / f"nnUNet_{n}" for n in ("raw", "preprocessed", "results"))
        self.exported: list[str] = []
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        folders = {f.name: str(f) for f in (self.raw, self.preprocessed, self.results)}
        quick = {"nnUNet_def_n_proc": "2", "fseft_train_minutes": "0.05"}
        models = {"fseft_backbones": str(work / "backbones"), "TOTALSEG_WEIGHTS_PATH": str(work / "totalsegmentator")}
        self.environment = os.environ | folders | quick | models | {"PATH": programs}

    def prepare(self) -> None:
        phantoms(self.raw / "Dataset004_X", 4, 12)
        phantoms(self.raw / "Dataset005_Y", 5, 8)
        for number, name in ((21, "Left"), (22, "Right")):
            phantoms(self.raw / f"Dataset{number:03d}_{name}", number, 4)
        images = [self.work / "IMAGES", self.work / "PILE", self.work / "data" / "unlabelled"]
        for folder in images:
            folder.mkdir(parents=True)
            for file in sorted((self.raw / "Dataset005_Y" / "imagesTr").glob("*.nii.gz"))[:3]:
                shutil.copy(file, folder / f"{folder.name}_{file.name}")
        (self.work / "LABELS").mkdir()
        for file in sorted((self.raw / "Dataset005_Y" / "labelsTr").glob("*.nii.gz"))[:3]:
            shutil.copy(file, self.work / "LABELS" / f"IMAGES_{file.name}")
        self.write_downloads(self.work / "downloads")
        sys.path.insert(0, str(ROOT / "tests"))
        from nnunet_models import write_totalsegmentator
        from published_files import write_published

        write_published(self.work / "fseft.pth", "fseft")
        part, trainer = "Dataset291_TotalSegmentator_part1_organs_1559subj", "nnUNetTrainerNoMirroring"
        names = tables()["sources"]["TotalSegmentator"]["v2"][:24]
        write_totalsegmentator(self.work / "totalsegmentator", part, trainer, "CT", names, patch_size=[32, 32, 32])

    def write_downloads(self, folder: Path) -> None:
        """Three public datasets as they are unpacked, on phantoms."""
        source = folder / "phantoms"
        phantoms(source, 11, 8, ("spleen", "kidney_right", "kidney_left", "aorta", "liver_right_lobe"))
        amos, total, liver = (folder / n for n in ("amos22", "Totalsegmentator_dataset_v201", "Task03_Liver"))
        for i, file in enumerate(sorted((source / "imagesTr").glob("*.nii.gz"))):
            image, labels = nib.load(file), nib.load(source / "labelsTr" / file.name.replace("_0000", ""))
            values = np.asarray(labels.dataobj)
            masks = {"spleen": 1, "kidney_right": 2, "kidney_left": 3, "aorta": 4, "liver": 5}
            # the spleen and the kidneys have the same numbers there
            save(amos / "imagesTr" / f"amos_{i + 1:04d}.nii.gz", image)
            save(amos / "labelsTr" / f"amos_{i + 1:04d}.nii.gz", labels, np.where(values <= 3, values, 0))
            save(total / f"s{i:04d}" / "ct.nii.gz", image, -np.asarray(image.dataobj))
            for name in tables()["sources"]["TotalSegmentator"]["v2"]:
                save(total / f"s{i:04d}" / "segmentations" / f"{name}.nii.gz", labels, values == masks.get(name))
            # turned, since the same voxels in two datasets are one patient
            save(liver / "imagesTr" / f"liver_{i}.nii.gz", image, np.asarray(image.dataobj)[::-1])
            save(liver / "labelsTr" / f"liver_{i}.nii.gz", labels, values[::-1] == 5)
        content = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "2": "cancer"}}
        (liver / "dataset.json").write_text(json.dumps(content))
        shutil.rmtree(source)

    def before(self, command: str) -> None:
        """What a user of this command has done, or has, that its page does not do."""
        if command.startswith("nnUNetv2_train"):
            self.shorten()
        if command.startswith("fseft backbones import mymodel nnUNet_results"):
            self.write_model()
        if command.startswith("fseft predict") and not self.exists("fold_0/checkpoint_final.pth"):
            self.train(0)
        if "--clear 90cb9cb6f7cc" in command:
            self.train(1)

    def train(self, fold: int) -> None:
        self.shorten()
        self.run(f"nnUNetv2_train 4 3d_fullres_5shot {fold} -tr FSEFTTrainer -p FSEFTPlans -device cpu")

    def exists(self, pattern: str) -> bool:
        folder = self.results / "Dataset004_X" / "FSEFTTrainer__FSEFTPlans__3d_fullres_5shot"
        return bool(list(folder.glob(pattern)))

    def shorten(self) -> None:
        for file in self.preprocessed.glob("*/FSEFTPlans*.json"):
            plans = json.loads(file.read_text("utf-8"))
            for configuration in plans["configurations"].values():
                if "fseft_views" in configuration:
                    configuration.update(SHORT)
            file.write_text(json.dumps(plans))

    def write_model(self) -> None:
        """An nnU-Net model of the user's and its zip, untrained."""
        self.run("nnUNetv2_plan_and_preprocess -d 4 -c 3d_fullres")
        self.run("nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainer_1epoch -device cpu")
        name = "nnUNetTrainer__nnUNetPlans__3d_fullres"
        folder = self.results / "Dataset004_X"
        (folder / f"nnUNetTrainer_1epoch{name[13:]}").rename(folder / name)
        self.run("nnUNetv2_export_model_to_zip -d 4 -o model.zip -c 3d_fullres -f 0 -tr nnUNetTrainer -p nnUNetPlans")

    def adapted(self, command: str) -> str:
        command = command.replace("/data/", f"{self.work / 'data'}/").replace("=BACKBONE", "=phantom")
        command = command.replace("--minutes 30", "--minutes 3")
        if "90cb9cb6f7cc" in command:
            listed = self.run("fseft bank -d 4")
            command = command.replace("90cb9cb6f7cc", re.search(r"^  (\w{12}) ", listed, re.MULTILINE)[1])
        if command.startswith("nnUNetv2_train") and "-device" not in command:
            command = re.sub(r"(\s+#.*)?$", " -device cpu", command, count=1)
        if command.startswith("nnUNetv2_train"):
            command = f"nnUNet_n_proc_DA=0 {command}"
        return command

    def run(self, command: str) -> str:
        """Run a line with the variables that lines before have exported; returns its output.

        Raises:
            InputError: if it fails.
        """
        if command.startswith(("export ", "eval ")):
            self.exported.append(command)
        lines = "\n".join(["set -e", *self.exported, command])
        done = subprocess.run(
            ["bash", "-c", lines],
            cwd=self.work,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=1800,
        )
        if done.returncode:
            raise InputError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
        return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="an empty or new folder")
    args = parser.parse_args()
    if args.work.exists() and any(args.work.iterdir()):
        sys.exit(f"{args.work} is not empty.")
    args.work.mkdir(parents=True, exist_ok=True)
    place = Workplace(args.work.resolve())
    place.prepare()
    failed = ran = 0
    # the other pages have commands that run elsewhere, or none
    pages = [*PAGES, *sorted({f"documentation/{f.name}" for f in (ROOT / "documentation").glob("*.md")} - {*PAGES})]
    for page in pages:
        # variables are of one page's shell
        place.exported = ['eval "$(fseft env)"']
        for command in commands(ROOT / page):
            if RUN_ELSEWHERE.search(command):
                continue
            start, ran = time(), ran + 1
            try:
                place.before(command)
                place.run(place.adapted(command))
                said = f"{time() - start:.0f} s"
            except Exception as error:  # whatever became of one command, the others go on
                failed += 1
                said = f"FAILED, {error}"
            print(f"{page}: {command.split('  #')[0].strip()}: {said}", flush=True)
    place.run("fseft unlink")  # should it have failed on its page
    print(f"{ran - failed} of {ran} commands ran.")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
