"""What the feature bank saves: a training step from it beside one that runs the frozen backbone over whole windows.

    FSEFT_SHARED=FOLDER python benchmarks/step_cost.py --work /data/hippocampus

Uses the folder of benchmarks/hippocampus.py (prepared here if it is new): K = 5, fold 0, the same crops in the same
order. Each way runs in a process of its own, so that its peak memory is its own; the bank is filled before.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from time import monotonic

import numpy as np
import torch
from hippocampus import DATASET, prepare

from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.evaluation.tables import markdown_table
from fsefs_nnunet.features.crops import CropLoader
from fsefs_nnunet.features.disk import used_bytes
from fsefs_nnunet.features.entry import Entry
from fsefs_nnunet.features.map_crops import MapCrops, crop_of
from fsefs_nnunet.features.tiling import Tiling
from fsefs_nnunet.nnunet.experiment import Experiment
from fsefs_nnunet.trainers.fseft_trainer import FSEFTTrainer

CONFIGURATION = "3d_fullres_5shot"
WAYS = {"bank": "from the feature bank", "backbone": "backbone over whole windows"}


class RecomputedEntry(Entry):
    """Crops of a volume whose features are computed each time, in the window that holds the crop."""

    def __init__(self, entry: Entry, image: torch.Tensor, backbone: FrozenBackbone, window: list[int]):
        super().__init__(entry.packing, entry.flat, entry.sums, entry.square_sums)
        object.__setattr__(self, "recompute", (image, backbone, window))

    def crop(self, start, size) -> MapCrops:
        image, backbone, window = self.recompute
        missing = [max(0, n - have) for n, have in zip(window, image.shape[1:])]
        padding = [p for total in reversed(missing) for p in (total // 2, total - total // 2)]
        padded = torch.nn.functional.pad(image, padding)
        before = np.array([total // 2 for total in missing])
        centre = np.array(start) + before + np.array(size) // 2
        first = np.clip(centre - np.array(window) // 2, 0, np.array(padded.shape[1:]) - window)
        inside = (slice(None), *(slice(a, a + n) for a, n in zip(first, window)))
        offset = np.array(start) + before - first
        tiling = Tiling.of(window, window, backbone.maps)
        regions = [[(0, n) for n in tiling.grid(i)] for i in range(len(backbone.maps))]
        return crop_of([m[0] for m in backbone(padded[inside][None])], regions, tiling, offset.tolist(), size)


def trainer(work: Path) -> FSEFTTrainer:
    preprocessed = work / "nnUNet_preprocessed" / DATASET
    plans = json.loads((preprocessed / "FSEFTPlans.json").read_text()) | {"continue_training": False}
    dataset_json = json.loads((preprocessed / "dataset.json").read_text())
    made = FSEFTTrainer(plans, CONFIGURATION, 0, dataset_json, torch.device("cpu"))
    made.disable_checkpointing = True
    made.on_train_start()
    return made


def measure(work: Path, way: str, steps: int) -> dict:
    """Seconds a step and peak memory of one way; in a process of its own."""
    made = trainer(work)
    loader: CropLoader = made.dataloader_train
    if way == "backbone":
        for case in loader.cases:
            image = made.views.make(case)[0] if case in made.views.names else made.load_image(case)
            image = torch.from_numpy(np.array(image, np.float32))
            window = made.configuration_manager.patch_size
            loader.bank._entries[case] = RecomputedEntry(loader.bank[case], image, made.network.backbone, window)
    made.on_train_epoch_start()
    made.train_step(next(loader))
    start = monotonic()
    losses = [float(made.train_step(next(loader))["loss"]) for _ in range(steps)]
    return {
        "a step": WAYS[way],
        "seconds": (monotonic() - start) / steps,
        "peak memory, GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "bank on disk, GB": used_bytes(made.bank.folder) / 1e9,
        "mean loss": float(np.mean(losses)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = args.work.resolve()
    if args.way:
        print(json.dumps(measure(work, args.way, args.steps)))
        return
    experiment = Experiment(work, DATASET)
    prepare(experiment)
    rows = []
    env = {**experiment.environment(), "nnUNet_results": str(work / "step_cost"), "nnUNet_n_proc_DA": "0"}
    for way in ("bank", *WAYS):  # the first fills the bank
        command = [sys.executable, __file__, "--work", work, "--steps", str(args.steps), "--way", way]
        output = subprocess.run(command, env=env, check=True, capture_output=True, encoding="utf-8").stdout
        rows.append(json.loads(output.splitlines()[-1]))
    print(markdown_table(rows[1:]))


if __name__ == "__main__":
    main()
